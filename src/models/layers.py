"""Choose the encoder blocks that form the latent, and how they are fused. Source: RAEv2 (arXiv 2605.18324).

Legend: K number of chosen blocks.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from src.core.errors import UserError

Fusion = Literal["mean", "mean_plus_spatial_mean", "sum"]
LayerChoice = Annotated[str | int | float | Sequence[int] | None, Field(description="a list of blocks, one, or a name")]
"""Values allowed in config keys and options; `parse_layers` turns them into block numbers."""

_NAMED = {
    "k1": lambda depth: [depth - 1],
    "k7": lambda depth: list(range(depth - 13, depth, 2)),
    "k23": lambda depth: list(range(depth - 23, depth)),
}


def parse_layers(layers: LayerChoice, depth: int, key: str = "model.encoder_params.layers") -> tuple[int, ...]:
    """Return zero-based block numbers in ascending order. None: the last block only.

    Accepts a list, `k1` | `k7` | `k23` (the last block; every second of the last 13; the last 23) or numbers joined by
    dots (`11.13.15`).

    Raises:
        UserError: an empty choice, a block that does not exist or is listed twice, an unknown name.
    """
    if layers is None:
        return (depth - 1,)
    if isinstance(layers, str):
        chosen = _parse_text(layers, depth, key)
    elif isinstance(layers, float):  # YAML parses 5.11 as a float, and 5.10 as 5.1
        raise UserError(
            f"{key}={layers} was read as a decimal number. Write a list, [5,11], or quote it twice: {key}='\"5.11\"'."
        )
    else:
        chosen = [layers] if isinstance(layers, int) else list(layers)
    if not chosen:
        raise UserError(f"{key} is empty: name at least one block (0 to {depth - 1}), or null for the last one.")
    if bad := [n for n in chosen if not isinstance(n, int) or isinstance(n, bool) or not 0 <= n < depth]:
        raise UserError(f"{key}={layers}: this encoder has {depth} blocks, numbered 0 to {depth - 1}; got {bad}.")
    if len(set(chosen)) != len(chosen):
        raise UserError(f"{key}={layers} lists a block twice.")
    return tuple(sorted(chosen))


def random_subset(layers: Sequence[int], keep_probability: float, uniforms: np.ndarray) -> tuple[int, ...]:
    """Draw a random subset of `layers`, each kept with `keep_probability`, conditioned on keeping at least one.

    With p = keep_probability, P(S) = p^|S| (1-p)^(K-|S|) / (1 - (1-p)^K); p = 0.5 is uniform over all 2^K - 1 subsets
    (FuseReg, arXiv 2609.31620). Exact without rejection: `uniforms[0]` picks the first kept block (a geometric distribution
    truncated at K), the other numbers decide each block after it.

    Args:
        layers: K block numbers.
        uniforms: K numbers in [0, 1).
    """
    first_kept = keep_probability * (1 - keep_probability) ** np.arange(len(layers))
    bounds = np.cumsum(first_kept) / first_kept.sum()
    first = int(np.searchsorted(bounds[:-1], uniforms[0], side="right"))
    kept = uniforms[first + 1 :] < keep_probability
    return (layers[first], *(block for block, keep in zip(layers[first + 1 :], kept, strict=True) if keep))


def _parse_text(text: str, depth: int, key: str) -> list[int]:
    if text in _NAMED:
        chosen = _NAMED[text](depth)
        if chosen[0] < 0:
            fitting = [name for name, blocks in _NAMED.items() if blocks(depth)[0] >= 0]
            raise UserError(
                f"{key}={text} needs more than the {depth} blocks of this encoder. Names that fit: "
                f"{', '.join(fitting)}; or list the blocks."
            )
        return chosen
    if re.fullmatch(r"\d+(\.\d+)*", text):
        return [int(n) for n in text.split(".")]
    raise UserError(f"{key}={text!r}: expected null, {', '.join(_NAMED)}, a list like [5,11] or numbers like 5.11.")
