"""What the frozen vision encoders have in common: loading, one forward pass, fusion over blocks, identity.

Sources: recipe sections 1 and 8; RAE (arXiv 2510.11690) section 3, RAEv2 (arXiv 2605.18324).
Legend: B batch, T all tokens, N patch tokens, C channels, H = W encoder input px.
"""

import hashlib
import json
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from src.core.errors import UserError
from src.core.weights import PROJECT_ROOT, Weights, freeze
from src.models.layers import FUSIONS, LayerChoice, check_fusion, parse_layers

log = logging.getLogger(__name__)

VOLATILE_KEYS = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
"""Of an encoder's config: they change when the same weights are saved again or read by another transformers."""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FrozenEncoder(nn.Module):
    """Patch tokens of a frozen transformer, normalised without affine parameters and fused over the chosen blocks.

    One forward pass: each chosen block's tokens are added to one accumulator as they appear and then forgotten, and
    blocks after the last chosen one are not run. Subclasses name the parts of their transformers model.
    """

    model: Any
    """The transformers model; its parts are named differently in each family."""
    model_class: ClassVar[type[PreTrainedModel]]
    config_class: ClassVar[type[PretrainedConfig]]
    default_fusion: ClassVar[str] = "mean"
    image_mean: Sequence[float] = IMAGENET_MEAN
    image_std: Sequence[float] = IMAGENET_STD
    ignorable: ClassVar[tuple[str, ...]] = ()
    """Prefixes of names that a checkpoint of this family may hold beyond the vision tower."""

    def __init__(
        self,
        source: str,
        *,
        layers: LayerChoice = None,
        layer_fusion: str | None = None,
        weights: Weights = "pretrained",
        seed: int = 0,
    ) -> None:
        """
        Args:
            source: hub id or folder as written by `save_pretrained`; with `weights="untrained"` its config is enough.
            layers: see `parse_layers`; None is the last block.
            layer_fusion: `mean`, `mean_plus_spatial_mean` (the spatial mean of the last chosen block's tokens is added to
                every token) or `sum`; None is the family's default, and the block as it is where only one is chosen
                (RAEv2's K1 is the plain encoder).
            weights: `untrained` draws them from `seed`, and must be asked for by name.

        Raises:
            UserError: blocks or a fusion that this encoder does not have (before any weight is read), a model of another
                family, weights that are missing or don't fit.
        """
        super().__init__()
        if weights not in get_args(Weights):
            raise UserError(f"model.encoder_params.weights={weights!r}: expected {' or '.join(get_args(Weights))}.")
        config = self.read_config(source)
        self.source = source
        self.hidden_size: int = config.hidden_size
        self.patch_size: int = config.patch_size
        self.depth: int = config.num_hidden_layers
        self.norm_eps: float = config.layer_norm_eps
        self.layers = parse_layers(layers, self.depth)
        self.layer_fusion = layer_fusion or (self.default_fusion if len(self.layers) > 1 else "mean")
        check_fusion(self.layer_fusion, FUSIONS, type(self).__name__)
        self.untrained = weights == "untrained"
        model = self._untrained(config, source, seed) if self.untrained else self._pretrained(config, source)
        said = {key: value for key, value in config.to_diff_dict().items() if key not in VOLATILE_KEYS}
        self.config_digest = _digest(json.dumps(said, sort_keys=True, default=str).encode())
        self.model = freeze(model)

    # -- what a family says about its transformers model

    @abstractmethod
    def embed(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """B 3 H W -> tokens B T C in front of the first block, and what each block needs besides."""

    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """In their order; each takes tokens and what `embed` gives besides, and returns tokens."""

    @property
    @abstractmethod
    def prefix_tokens(self) -> int:
        """CLS, registers: tokens in front of the patches, by the config's own count."""

    def normalize(self, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, (self.hidden_size,), eps=self.norm_eps)

    # -- what the rest of the project calls

    @torch.no_grad()
    def forward(self, images: Tensor, layers: LayerChoice = None) -> Tensor:
        """B 3 H W (normalised) -> B N C. `layers`: fuse these blocks instead, by the same fusion."""
        chosen = self.layers if layers is None else parse_layers(layers, self.depth, "layers")
        tokens, context = self.embed(images)
        fused: Tensor | None = None
        for number, block in enumerate(self.blocks()[: chosen[-1] + 1]):
            tokens = block(tokens, **context)
            if number not in chosen:
                continue
            latent = self.normalize(tokens[:, self.prefix_tokens :])  # B N C
            if number == chosen[-1]:
                spatial_mean = latent.mean(dim=1, keepdim=True)  # B 1 C
            fused = latent if fused is None else fused.add_(latent)
            del latent  # while the next block runs, its input and the accumulator are all that is kept
        assert fused is not None
        if self.layer_fusion != "sum" and len(chosen) > 1:
            fused = fused.div_(len(chosen))
        return fused.add_(spatial_mean) if self.layer_fusion == "mean_plus_spatial_mean" else fused

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Frozen stays frozen: evaluation mode whatever is asked for."""
        return super().train(False)

    def identity(self) -> dict[str, Any]:
        """What a latent depends on, as plain values: stored in checkpoints and beside latent statistics."""
        # The start of each parameter in use: not of the final norm nor of a pooling head. Sorted, since transformers
        # renames and moves parameters between releases.
        used = [p for part in (self.model.embeddings, *self.blocks()) for p in part.parameters()]
        starts = (p.detach().flatten()[:256].float().cpu().numpy().tobytes() for p in used)
        weights = _digest(b"".join(sorted(starts)))
        return {
            "class": type(self).__name__,
            "source": _portable(self.source),
            "config": self.config_digest,
            "weights": "untrained " + weights if self.untrained else weights,
            "layers": list(self.layers),
            "layer_fusion": self.layer_fusion,
        }

    # -- loading

    @classmethod
    def read_config(cls, source: str) -> PretrainedConfig:
        """The config alone: sizes are checked before any weight is read."""
        if _is_path(source) and not Path(local_place(source)).is_dir():
            raise UserError(
                f"{cls.__name__}: there is no folder {source}. model.encoder_params says where the encoder lies: a folder "
                "written by save_pretrained, or a hub id like facebook/dinov2-with-registers-base."
            )
        try:
            config = cls.config_class.from_pretrained(local_place(source))
        except (OSError, ValueError) as error:
            raise UserError(_not_found(cls.__name__, source, error)) from error
        expected = cls.config_class.model_type
        given = cls.config_class.get_config_dict(local_place(source))[0].get("model_type", expected)
        if given not in (expected, *cls.accepted_types()):
            raise UserError(
                f"{source} holds a {given!r} model, but encoder_cls={cls.__name__} wants {expected!r}. "
                "Set model.encoder_cls to the class of that family."
            )
        return config

    @classmethod
    def accepted_types(cls) -> tuple[str, ...]:
        return ()

    @classmethod
    def _untrained(cls, config: PretrainedConfig, source: str, seed: int) -> PreTrainedModel:
        log.warning(
            "%s from %s is UNTRAINED (seed %d): random weights: not a result.",
            cls.__name__,
            source,
            seed,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls.model_class(config)

    @classmethod
    def _pretrained(cls, config: PretrainedConfig, source: str) -> PreTrainedModel:
        try:
            loaded: Any = cls.model_class.from_pretrained(
                local_place(source), config=config, output_loading_info=True, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(_not_found(cls.__name__, source, error)) from error
        model, info = loaded
        missing = sorted(info["missing_keys"])
        unexpected = sorted(k for k in info["unexpected_keys"] if not k.startswith(cls.ignorable or ("\0",)))
        mismatched = sorted(str(k) for k in info["mismatched_keys"])
        if missing or unexpected or mismatched:
            raise UserError(
                f"{source} does not fit {cls.__name__}: missing {missing or 'none'}, unexpected {unexpected or 'none'}, "
                f"other shape {mismatched or 'none'}."
            )
        return model


def identity_differences(stored: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Names of what differs between two identities; where the same weights lie (`source`) makes no difference."""
    return sorted(name for name in own if name != "source" and stored.get(name) != own[name])


def require_same_encoder(encoder: FrozenEncoder, stored: Mapping[str, Any], file: object) -> None:
    """Raise UserError unless `encoder` is the one whose identity `file` keeps; where its weights lie may differ."""
    found = encoder.identity()
    if differing := identity_differences(stored, found):
        raise UserError(
            f"{file} was trained with another encoder: {dict(stored)} there, {found} here ({', '.join(differing)} "
            "differ). Give the encoder that it was trained with."
        )


def is_untrained(identity: Mapping[str, Any]) -> bool:
    return str(identity["weights"]).startswith("untrained")


def local_place(source: str) -> str:
    """Folders are taken relative to the project root; anything else is a hub id."""
    candidate = PROJECT_ROOT / Path(source).expanduser()
    return str(candidate) if candidate.is_dir() else source


def _is_path(source: str) -> bool:
    """A hub id has one slash at most and starts with neither a dot nor a tilde."""
    return source.startswith(("/", ".", "~")) or source.count("/") > 1


def _portable(source: str) -> str:
    path = Path(source)
    return path.name if path.is_absolute() else source


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _not_found(cls: str, source: str, error: Exception) -> str:
    return (
        f"{cls} can't be loaded from {source!r}: {str(error).splitlines()[0]}\n"
        f"Expected a hub id that is in the local cache or reachable, or a folder written by save_pretrained. "
        f"`python scripts/download_weights.py --list` shows what each experiment needs; HF_ENDPOINT chooses a mirror."
    )
