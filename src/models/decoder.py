"""ViT decoder: latent tokens in, pixel patches out. Source: RAE (arXiv 2510.11690); docs/recipe.md, "Decoding".

Legend: B batch, N tokens, C latent channels, D decoder width, A heads, P patch px.
Parameter names match the released decoder files, so that those load strictly here and ours load in the official code.
"""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from src.core.errors import UserError
from src.core.json_files import read_json
from src.core.settings import Settings, Size
from src.core.weights import resolve
from src.models.recompute import recomputed

log = logging.getLogger(__name__)

_TOLERANCE = 1e-5
"""For float32 sines of different libraries. One training step moves a position by about the learning rate, 2e-4."""
# Published files are ViT-MAE configs. Keys that are not in `DecoderConfig` are either fixed by the recipe (checked) or
# about other networks (ignored); latent width, patch and image size come from the model's geometry.
_FIXED = {
    "hidden_act": "gelu", "qkv_bias": True, "num_channels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
_IGNORED = {
    "_name_or_path", "architectures", "hidden_size", "image_size", "initializer_range", "intermediate_size", "mask_ratio",
    "model_type", "norm_pix_loss", "num_attention_heads", "num_hidden_layers", "patch_size", "torch_dtype", "dtype",
    "transformers_version",
}  # fmt: skip


class DecoderConfig(Settings):
    """Required keys of a decoder's `config.json`, named as in the published files."""

    decoder_hidden_size: Annotated[Size, Field(multiple_of=4)]
    decoder_num_hidden_layers: Size
    decoder_num_attention_heads: Size
    decoder_intermediate_size: Size
    layer_norm_eps: float = Field(gt=0)

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any]) -> Self:
        """Read a JSON file, its folder (paths are relative to the project root), or the parsed content of such a file.

        Raises:
            UserError: no such file, missing or unknown keys, values that the recipe does not use.
        """
        name, content = ("the decoder's config", source) if isinstance(source, Mapping) else cls._read_file(source)
        for key, value in _FIXED.items():
            if content.get(key, value) != value:
                raise UserError(f"{name}: {key}={content[key]!r} is not supported; the recipe has {value!r}.")
        return cls.parse({k: v for k, v in content.items() if k not in _FIXED and k not in _IGNORED}, name)

    @staticmethod
    def _read_file(path: str | Path) -> tuple[str, dict[str, Any]]:
        file = resolve(path)
        file = file / "config.json" if file.is_dir() else file
        if not file.is_file():
            known = sorted(p.parent.name for p in resolve("configs/decoder").glob("*/config.json"))
            raise UserError(
                f"model.decoder_config_path={path}: no such file or folder. Known: {', '.join(known)} under configs/decoder."
            )
        return str(file), read_json(file)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.decoder_hidden_size % self.decoder_num_attention_heads:
            raise ValueError(
                f"decoder_hidden_size={self.decoder_hidden_size} must be a multiple of "
                f"decoder_num_attention_heads={self.decoder_num_attention_heads}."
            )
        return self


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width)})

    def forward(self, x: Tensor) -> Tensor:
        # One product for all three: under autocast, separate ones would each cast x again and keep the copy.
        layers: list[Any] = list(self.attention.values())
        weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
        qkv = F.linear(x, weight, bias).unflatten(-1, (3, self.heads, -1))  # B N 3 A D/A
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # B A N D/A
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.output["dense"](mixed.transpose(1, 2).flatten(2))  # B N D


class Block(nn.Module):
    """Pre-norm transformer block with exact GELU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, hidden, eps = config.decoder_hidden_size, config.decoder_intermediate_size, config.layer_norm_eps
        self.attention = SelfAttention(width, config.decoder_num_attention_heads)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, width)})
        self.layernorm_before = nn.LayerNorm(width, eps=eps)
        self.layernorm_after = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        hidden = self.intermediate["dense"](self.layernorm_after(x))  # B N 4D
        # The GELU output is the largest activation of a block and the cheapest to recompute.
        return x + recomputed(self._contract, hidden)

    def _contract(self, hidden: Tensor) -> Tensor:
        return self.output["dense"](F.gelu(hidden))


class ViTDecoder(nn.Module):
    """Tokens B x N x C -> patches B x N x (P*P*3), order (row, column, channel) inside a patch."""

    def __init__(
        self,
        config: DecoderConfig,
        latent_channels: int,
        grid: int,
        patch_size: int,
        train_positions: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        """
        Args:
            grid: side of the latent grid.
            train_positions: train the sin-cos positions, as the official trainer does, instead of keeping them fixed.
            activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        """
        super().__init__()
        width = config.decoder_hidden_size
        self.config = config
        self.grid = grid
        self.patch_size = patch_size
        self.activation_checkpointing = activation_checkpointing
        self.decoder_embed = nn.Linear(latent_channels, width)
        self.decoder_pos_embed = nn.Parameter(sincos_positions(width, grid)[None], requires_grad=train_positions)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_layers = nn.ModuleList(Block(config) for _ in range(config.decoder_num_hidden_layers))
        self.decoder_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(width, patch_size**2 * 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder_pred(self.trunk(tokens))

    def trunk(self, tokens: Tensor) -> Tensor:
        """Apply everything but the last linear layer: B N C -> B N D, without the cls token."""
        x = self.decoder_embed(self._resample(tokens))
        cls_token = self.trainable_cls_token.expand(len(x), -1, -1).to(x.dtype)
        x = torch.cat([cls_token, x], dim=1) + self.decoder_pos_embed  # B 1+N D
        for block in self.decoder_layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return self.decoder_norm(x[:, 1:])

    def _resample(self, tokens: Tensor) -> Tensor:
        """Resample tokens of another grid size bilinearly."""
        if tokens.shape[1] == self.grid**2:
            return tokens
        side = round(tokens.shape[1] ** 0.5)
        if side * side != tokens.shape[1]:
            raise ValueError(f"expected a square number of tokens, got {tokens.shape[1]}")
        grid = tokens.transpose(1, 2).unflatten(2, (side, side))  # B C h w
        grid = F.interpolate(grid, size=(self.grid, self.grid), mode="bilinear", align_corners=False)
        return grid.flatten(2).transpose(1, 2)


def sincos_positions(width: int, grid: int) -> Tensor:
    """Return 2-D sin-cos positions, (1 + grid*grid) x width: zeros for the cls token; the first half of the channels encodes
    the column, the second the row, each as sines followed by cosines."""
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies  # grid D/4
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # grid D/2
    positions = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)], dim=1)
    return torch.cat([torch.zeros(1, width), positions.float()])


def are_fixed(positions: Tensor) -> bool:
    """Return whether positions are the fixed sin-cos ones, in float32 or rounded to half precision once."""
    fixed = sincos_positions(positions.shape[2], math.isqrt(positions.shape[1] - 1))[None]
    found = positions.detach().float().cpu()
    return any(
        torch.allclose(found, fixed.to(dtype).float(), rtol=0, atol=_TOLERANCE)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


def fit_positions(positions: Tensor, grid: int, source: str) -> Tensor:
    """Return positions for a `grid` x `grid` latent; unchanged if they have that size already.

    Fixed sin-cos positions are recomputed; trained ones are resampled bicubically, except for the row of the cls token.
    """
    if positions.ndim != 3 or len(positions) != 1 or math.isqrt(positions.shape[1] - 1) ** 2 != positions.shape[1] - 1:
        raise UserError(
            f"{source}: decoder_pos_embed is {tuple(positions.shape)}; expected 1 x (1 + a square number) x width."
        )
    before = math.isqrt(positions.shape[1] - 1)
    if before == grid:
        return positions
    sizes = f"positions of a {before} x {before} grid", f"{grid} x {grid}"
    if are_fixed(positions):
        log.info("%s: %s, recomputed for %s (fixed sin-cos).", source, *sizes)
        return sincos_positions(positions.shape[2], grid)[None]
    log.warning("%s: TRAINED %s, resampled bicubically to %s; the cls row is kept.", source, *sizes)
    patches = positions[:, 1:].float().transpose(1, 2).unflatten(2, (before, before))  # 1 D g g
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1].float(), patches.flatten(2).transpose(1, 2)], dim=1)


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images B 3 H W into patches B N (P*P*3), order (row, column, channel) inside a patch."""
    batch, _, height, width = images.shape
    x = images.reshape(batch, 3, height // patch, patch, width // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, patch * patch * 3)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """Undo `patchify` for square images of C channels: B N (P*P*C) -> B C H W."""
    batch, tokens, _ = patches.shape
    side = round(tokens**0.5)
    x = patches.reshape(batch, side, side, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, side * patch, side * patch)
