"""Base class of the frozen vision encoders: loading, forward pass, fusion over blocks, identity.

Sources: RAE (arXiv 2510.11690) section 3, RAEv2 (arXiv 2605.18324); docs/recipe.md, "Encoding".
Legend: B batch, T all tokens, N patch tokens, C channels, H = W encoder input px.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from pydantic import Field
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from src.core.download import cached_encoder, why_unreachable
from src.core.errors import UserError
from src.core.requirements import HUB_ID
from src.core.settings import checked, one_of
from src.core.weights import Frozen, Weights, freeze, resolve
from src.models.encoder_files import STATISTICS, PixelStatistics, check_folder, read_statistics
from src.models.layers import Fusion, LayerChoice, parse_layers

VOLATILE_KEYS = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}
"""Config keys that change when the same weights are saved again or read by another version of transformers."""
Norm = Literal["plain", "affine", "none"]
NO_GRID = {
    **dict.fromkeys(("swin", "swinv2", "hiera", "pvt", "pvt_v2", "segformer"), "its stages reduce the number of tokens"),
    **dict.fromkeys(("convnext", "convnextv2", "dinov3_convnext", "resnet", "regnet"), "it is a convolutional network"),
    **dict.fromkeys(("siglip2", "siglip2_vision_model"), "it takes flattened patches of any aspect ratio (NaFlex)"),
}  # fmt: skip
"""model_type in transformers -> why such a model has no grid of patch tokens."""


@checked("model.encoder_params")
class FrozenEncoder(Frozen):
    """Frozen transformer that returns patch tokens, normalised and fused over the chosen blocks.

    One forward pass: the tokens of each chosen block are added to an accumulator and then freed; blocks after the last
    chosen one are not run. Subclasses name the parts of their transformers model.
    """

    models: ClassVar[Mapping[str, type[PreTrainedModel]]]
    """transformers classes by the `model_type` in config.json, including that of composites with a text tower.
    A config without one is read as the first."""
    embedding_parts: ClassVar[tuple[str, ...]] = ("embeddings",)
    blocks_at: ClassVar[str]
    final_norm: ClassVar[str | None] = "layernorm"
    cls_tokens: ClassVar[int] = 1
    """Tokens in front of the patches, without the register tokens (whose number is in the config)."""
    default_norm: ClassVar[Norm] = "plain"
    default_fusion: ClassVar[str] = "mean"
    statistics: ClassVar[str] = "imagenet"
    """Pixel statistics, a name in `STATISTICS`, used if the encoder's files have none."""
    ignorable: ClassVar[tuple[str, ...]] = ()
    """Name prefixes of parameters that no latent depends on: a checkpoint may contain or lack them."""
    model: Any
    """The transformers model; each family names its parts differently."""

    def __init__(
        self,
        model_name: str,
        *,
        layers: LayerChoice = None,
        layer_fusion: Fusion | None = None,
        norm: Norm | None = None,
        norm_eps: Annotated[float, Field(gt=0)] | None = None,
        statistics: Annotated[str, one_of(STATISTICS)] | None = None,
        resize: Literal["bicubic", "bilinear"] = "bicubic",
        weights: Weights = "pretrained",
        seed: int = 0,
    ) -> None:
        """
        Args:
            model_name: hub id or folder written by `save_pretrained`; `weights="untrained"` needs only its config.
            layers: see `parse_layers`; None is the last block.
            layer_fusion: `mean`, `mean_plus_spatial_mean` (adds the spatial mean of the last chosen block's tokens to
                every token) or `sum`; None is the family's default for several blocks, and no fusion for a single one
                (RAEv2's K1 is the plain encoder).
            norm: of each chosen block's tokens: `plain` (the final norm without its affine parameters), `affine` (the
                final norm unchanged) or `none`; None is the family's default.
            norm_eps: epsilon of the plain norm; None is that of the final norm.
            statistics: mean and std of the pixels, a name in `STATISTICS`; None reads them from the encoder's files.
            resize: how images are resized to the encoder's input size.
            weights: `untrained` (never the default) draws them from `seed`.

        Raises:
            UserError: blocks, a fusion or a norm that this encoder does not have (before any weight is read), a model of
                another family, weights that are missing, damaged or don't fit.
        """
        super().__init__()
        config = self.read_config(model_name)
        self.source = model_name
        self.hidden_size: int = config.hidden_size
        self.patch_size: int = config.patch_size
        self.depth: int = config.num_hidden_layers
        self.layers = parse_layers(layers, self.depth)
        self.layer_fusion = layer_fusion or (self.default_fusion if len(self.layers) > 1 else "mean")
        self.norm: Norm = norm or self.default_norm
        self.chosen_statistics = statistics
        self.resize = resize
        self.untrained = weights == "untrained"
        model = self._untrained(config, model_name, seed) if self.untrained else self.load(config, model_name)
        stable = {key: value for key, value in config.to_diff_dict().items() if key not in VOLATILE_KEYS}
        self.config_digest = _digest(json.dumps(stable, sort_keys=True, default=str).encode())
        self.model = freeze(model)
        if self.norm == "affine" and self.norm_module is None:
            raise UserError(
                f"model.encoder_params.norm=affine: {type(self).__name__} of {model_name} has no final norm."
            )
        own_eps = float(getattr(self.norm_module, "eps", getattr(self.norm_module, "variance_epsilon", 1e-6)))
        self.norm_eps = own_eps if norm_eps is None else norm_eps
        self.other_choices = [
            f"{name} {value}"
            for name, value, usual in (
                ("norm", self.norm, self.default_norm),
                ("norm_eps", self.norm_eps if self.norm == "plain" else own_eps, own_eps),
                ("statistics", statistics, None),
                ("resize", resize, "bicubic"),
            )
            if value != usual
        ]
        """Non-default choices, added to the identity: so identities with default choices never change."""

    # -- what a subclass may override

    def embed(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return the tokens B T C that enter the first block, and keyword arguments for each block. Images: B 3 H W."""
        return self.model.embeddings(images), {}

    def blocks(self) -> nn.ModuleList:
        """Return the blocks in order; each maps tokens, with the keyword arguments of `embed`, to tokens."""
        return self.model.get_submodule(self.blocks_at)

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens in front of the patches: CLS and registers."""
        return self.cls_tokens + getattr(self.model.config, "num_register_tokens", 0)

    @property
    def norm_module(self) -> nn.Module | None:
        return None if self.final_norm is None else self.model.get_submodule(self.final_norm)

    def states(self, images: Tensor, chosen: Sequence[int]) -> Iterator[Tensor]:
        """Yield the patch tokens B N C after each of the `chosen` blocks, in order, before the norm. Images: B 3 H W."""
        tokens, context = self.embed(images)
        for number, block in enumerate(self.blocks()[: chosen[-1] + 1]):
            tokens = block(tokens, **context)
            if number in chosen:
                yield tokens[:, self.prefix_tokens :]

    def parameters_in_use(self) -> Iterable[nn.Parameter]:
        """Return the parameters a latent depends on: no pooling head, and the final norm only if its affine parameters are used."""
        parts = [*map(self.model.get_submodule, self.embedding_parts), *self.blocks()]
        if self.norm == "affine" and self.norm_module is not None:
            parts.append(self.norm_module)
        return (parameter for part in parts for parameter in part.parameters())

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Write config and weights, in `dtype`, as a folder that this class can load."""
        self.model.save_pretrained(folder, state_dict={k: v.to(dtype) for k, v in self.model.state_dict().items()})

    # -- what the rest of the project calls

    def normalize(self, tokens: Tensor) -> Tensor:
        """Return normalised tokens as a new tensor: the argument is also the input of the next block."""
        if self.norm == "none":
            return tokens.clone()
        if self.norm == "affine":
            assert self.norm_module is not None
            return self.norm_module(tokens)
        return F.layer_norm(tokens, (self.hidden_size,), eps=self.norm_eps)

    @torch.no_grad()
    def forward(self, images: Tensor, layers: LayerChoice = None) -> Tensor:
        """Encode images B 3 H W (normalised) -> B N C. `layers`: fuse these blocks instead, in the same way."""
        chosen = self.layers if layers is None else parse_layers(layers, self.depth, "layers")
        states = self.states(images, chosen)
        fused: Tensor | None = None
        for number in chosen:
            latent = self.normalize(next(states))  # B N C
            if number == chosen[-1]:
                spatial_mean = latent.mean(dim=1, keepdim=True)  # B 1 C
            fused = latent if fused is None else fused.add_(latent)
            del latent  # so that the next block runs with only its input and the accumulator in memory
        assert fused is not None
        if self.layer_fusion != "sum" and len(chosen) > 1:
            fused = fused.div_(len(chosen))
        return fused.add_(spatial_mean) if self.layer_fusion == "mean_plus_spatial_mean" else fused

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        """Return the CLS token B C (the mean over patches if the family has none) after the last block and the unchanged final
        norm, regardless of `layers` and `norm`. Images: B 3 H W, normalised."""
        tokens, context = self.embed(images)
        for block in self.blocks():
            tokens = block(tokens, **context)
        tokens = tokens if self.norm_module is None else self.norm_module(tokens)
        return tokens[:, 0] if self.prefix_tokens else tokens.mean(dim=1)

    def pixel_statistics(self, source: str) -> PixelStatistics:
        """Return (mean, std) of the pixels: the chosen ones, else those in the files of `source`, else the family's."""
        if self.chosen_statistics is not None:
            return STATISTICS[self.chosen_statistics]
        return self.read_statistics(source)

    @classmethod
    def read_statistics(cls, source: str) -> PixelStatistics:
        place = local_place(source)
        known = (Path(place) / "preprocessor_config.json").is_file() or resolve(source).is_dir()
        return read_statistics(place if known else source, STATISTICS[cls.statistics])

    def identity(self) -> dict[str, Any]:
        """Return all that a latent depends on, as plain values: stored in checkpoints and with latent statistics."""
        # The start of each parameter in use; sorted, since transformers renames and moves parameters between releases.
        starts = (p.detach().flatten()[:256].float().cpu().numpy().tobytes() for p in self.parameters_in_use())
        weights = _digest(b"".join(sorted(starts)))
        return {
            "class": type(self).__name__,
            "source": Path(self.source).name if Path(self.source).is_absolute() else self.source,
            "config": ", ".join([self.config_digest, *self.other_choices]),
            "weights": "untrained " + weights if self.untrained else weights,
            "layers": list(self.layers),
            "layer_fusion": self.layer_fusion,
        }

    # -- loading

    @classmethod
    def read_config(cls, source: str) -> Any:
        """Read only the config, with `hidden_size`, `patch_size` and `num_hidden_layers`, before any weight.

        Attention kernels set in config.json are ignored: they could refer to code on the hub.

        Raises:
            UserError: no such folder, damaged files, another family, a model without a grid of patch tokens.
        """
        check_source(cls.__name__, source)
        place = local_place(source)
        try:
            given = PretrainedConfig.get_config_dict(place)[0].get("model_type", next(iter(cls.models)))
            if given in cls.models:
                kind: Any = cls.models[given].config_class
                config = kind.from_pretrained(place)
                config._attn_implementation = config._experts_implementation = None
                return _check_sizes(config, source)
        except UserError:
            raise
        except Exception as error:  # odd values raise different errors in each family
            raise UserError(_load_error(cls.__name__, source, error)) from error
        if given in NO_GRID:
            raise UserError(f"{source} holds a {given!r} model, which has no grid of patch tokens: {NO_GRID[given]}.")
        raise UserError(
            f"{source} holds a {given!r} model, but encoder_cls={cls.__name__} expects {' or '.join(map(repr, cls.models))}. "
            "Set model.encoder_cls to the class of that family."
        )

    @classmethod
    def model_class(cls, config: PretrainedConfig) -> type[PreTrainedModel]:
        return next(model for model in cls.models.values() if model.config_class is type(config))

    @classmethod
    def _untrained(cls, config: Any, source: str, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                return cls.build(config)
            except Exception as error:  # sizes that don't fit each other
                raise UserError(_load_error(cls.__name__, source, error)) from error

    @classmethod
    def build(cls, config: Any) -> nn.Module:
        """Return the model with random weights."""
        return cls.model_class(config)(config)

    @classmethod
    def load(cls, config: Any, source: str) -> nn.Module:
        """Return the model with its weights. Raises UserError if they are missing or don't fit."""
        try:
            if Path(place := local_place(source)).is_dir():
                disable_progress_bar()  # transformers' bar for loading takes under a second; that of downloads stays
            loaded: Any = cls.model_class(config).from_pretrained(
                place, config=config, output_loading_info=True, dtype=torch.float32
            )
        except Exception as error:
            raise UserError(_load_error(cls.__name__, source, error)) from error
        model, info = loaded
        missing, unexpected = (
            sorted(name for name in info[kind] if not name.startswith(cls.ignorable))
            for kind in ("missing_keys", "unexpected_keys")
        )
        mismatched = sorted(str(k) for k in info["mismatched_keys"])
        if missing or unexpected or mismatched:
            raise UserError(
                f"{source} does not fit {cls.__name__}: missing {missing or 'none'}, unexpected {unexpected or 'none'}, "
                f"other shape {mismatched or 'none'}."
            )
        return model


def identity_differences(stored: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Return the keys in which two identities differ, except `source`: the same weights may be stored elsewhere."""
    return sorted(name for name in own if name != "source" and stored.get(name) != own[name])


def require_same_encoder(encoder: FrozenEncoder, stored: Mapping[str, Any], file: object) -> None:
    """Raise UserError unless `encoder` has the identity `stored` in `file`; its `source` may differ."""
    found = encoder.identity()
    if differing := identity_differences(stored, found):
        raise UserError(
            f"{file} was trained with another encoder: {dict(stored)} there, {found} here ({', '.join(differing)} "
            "differ). Give the encoder that it was trained with."
        )


def is_untrained(identity: Mapping[str, Any]) -> bool:
    return str(identity.get("weights")).startswith("untrained")


def local_place(source: str) -> str:
    """Return the local folder of an encoder: `source` relative to the project root, or the hub cache's folder if it is complete
    (so that the hub isn't contacted again). Otherwise return `source`, a hub id to download."""
    candidate = resolve(source)
    return str(candidate if candidate.is_dir() else cached_encoder(source) or source)


def check_source(kind: str, source: str) -> None:
    """Raise UserError if `source` is a path that does not exist, a folder with damaged files, or a hub id that is unavailable.
    This contacts the hub once, while the loaders of transformers and timm would try six times."""
    place = Path(local_place(source))
    if place.is_dir():
        check_folder(place)
    elif re.match(r"[/.~]|[A-Za-z]:|.*\\|.*/.*/", source):  # no hub id matches: those have a single slash
        raise UserError(
            f"{kind}: there is no folder {source}. In model.encoder_params give a folder written by save_pretrained, or a hub "
            "id like facebook/dinov2-with-registers-base."
        )
    elif re.fullmatch(HUB_ID, source) and not try_to_load_from_cache(source, "config.json"):
        reason = why_unreachable(source)
        if reason:
            raise UserError(_load_error(kind, source, ConnectionError(reason)))


def resample_positions(positions: Tensor, side: int, antialias: bool = False, offset: float = 0.0) -> Tensor:
    """Resample positions 1 x N x C of a square grid -> 1 x side*side x C, bicubically in float32.

    `offset`: added to `side` in the scale factor, as in DINO's and DINOv2's code (0.1).
    """
    before = round(positions.shape[1] ** 0.5)
    if before == side:
        return positions
    grid = positions.float().transpose(1, 2).unflatten(2, (before, before))  # 1 C h w
    size: dict[str, Any] = {"scale_factor": (side + offset) / before} if offset else {"size": (side, side)}
    grid = F.interpolate(grid, **size, mode="bicubic", align_corners=False, antialias=antialias)
    return grid.flatten(2).transpose(1, 2).to(positions.dtype)


def _check_sizes(config: Any, source: str) -> Any:
    """Return the config with its patch size as an integer. Raises UserError if the patch is not square or the model quantised."""
    patch = config.patch_size
    if isinstance(patch, (list, tuple)) and len(set(patch)) == 1:
        patch = config.patch_size = patch[0]
    sizes = (config.hidden_size, patch, config.num_hidden_layers)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise UserError(f"{source}: hidden_size, patch_size and num_hidden_layers are {sizes}; expected whole numbers.")
    if getattr(config, "quantization_config", None):
        raise UserError(f"{source} is quantised, which changes the latents. Give the encoder in float32, bf16 or fp16.")
    return config


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _load_error(cls: str, source: str, error: Exception) -> str:
    return (
        f"{cls} can't be loaded from {source!r}: {(str(error).splitlines() or [type(error).__name__])[0]}\n"
        f"Expected a hub id that is in the local cache or reachable, or a folder written by save_pretrained. "
        f"`python scripts/download_weights.py --list` shows what each experiment needs; HF_ENDPOINT chooses a mirror."
    )
