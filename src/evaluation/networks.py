"""Load the evaluation networks: feature networks and LPIPS. Errors include the command that fixes them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from src.core.errors import UserError
from src.core.options import INCEPTION_FILE, LPIPS_FILES, FeatureOptions, LpipsOptions
from src.core.precision import full_float32
from src.core.weights import SizedWeights, resolve
from src.formats.checkpoint import stored, with_current_keys
from src.losses.lpips import LPIPS
from src.metrics.features import INCEPTION, FeatureNetwork, FeatureOutputs
from src.metrics.inception import InceptionFeatures
from src.models.encoder_presets import PRESETS
from src.models.encoders import encoder_class

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PooledEncoder:
    """A frozen encoder used as a feature network: an entry of `ENCODERS`."""

    preset: str
    """Name in `src/models/encoder_presets.py`."""
    input_px: int
    params: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the encoder class."""


ENCODERS = {"dinov2": PooledEncoder("dinov2-l-woreg", 224, {"position_offset": 0.1, "statistics": "imagenet"})}
"""By --features name (`inception` is the other choice). dinov2: as in dgm-eval (Stein et al., arXiv 2306.04675)."""


class EncoderFeatures(FeatureNetwork):
    """`EncoderFeatures("dinov2")(uint8 B x 3 x H x W) -> B x F float32`, F = 1024: the output of `FrozenEncoder.pooled`.

    Images are resized to squares and rounded to 8 bits as in Pillow (bicubic, antialiased).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, space: str, place: str | None = None) -> None:
        """`place`: folder; None: the preset's hub id. Raises UserError if it is missing, and as the encoder does."""
        super().__init__()
        row = ENCODERS[space]
        preset, self.input_px = PRESETS[row.preset], row.input_px
        if place is not None and not resolve(place).is_dir():
            raise UserError(
                f"--features {space}={place}: no such folder. Expected one written by save_pretrained; the default is "
                f"{preset.hub_id} (`python scripts/download_weights.py {preset.hub_id}`)."
            )
        kind, place = encoder_class(preset.encoder_cls), place or preset.hub_id
        self.encoder = kind(place, **row.params)
        self.space, self.feature_dim = space, self.encoder.hidden_size
        self.name = f"{space}-{self.encoder.identity()['weights']}"
        if (self.feature_dim, self.encoder.depth) != (preset.size.width, preset.size.depth):
            message = "--features %s: %s has another size than %s: its scores are not comparable with any others."
            log.warning(message, space, place, preset.hub_id)
        mean, std = self.encoder.pixel_statistics(place)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def outputs(self, images: Tensor) -> FeatureOutputs:
        with full_float32(self.device):
            x = resize_pillow(images.to(self.device).float(), self.input_px) / 255
            return FeatureOutputs(self.encoder.pooled((x - self.mean) / self.std))


def resize_pillow(images: Tensor, size: int) -> Tensor:
    """Resize B x 3 x H x W float 0..255 -> B x 3 x size x size integers: rows, then columns, each rounded to 8 bits."""
    for shape in ((images.shape[-2], size), (size, size)):
        if images.shape[-2:] != shape:
            images = F.interpolate(images, size=shape, mode="bicubic", antialias=True).round_().clamp_(0, 255)
    return images


def load_features(
    chosen: Sequence[str], path: str | None, weights: SizedWeights, key: str, width: float | None
) -> list[FeatureNetwork]:
    """Load the networks given as NAME or NAME=DIR, in order.

    Args:
        path: Inception's weights file, unless DIR sets it; `key`: the option or config key that `path` comes from.
        width: `inception_width` of an older config or command; any value but 1 turns untrained weights into tiny ones.

    Raises:
        UserError: an unknown or repeated name, weights that are missing or don't fit.
    """
    networks: list[FeatureNetwork] = []
    if width not in (None, 1):
        if weights == "pretrained":
            raise UserError(
                f"An Inception width of {width:g} is for untrained weights only: the published network has width 1."
            )
        weights = "tiny"
    for name, _, place in (text.partition("=") for text in chosen):
        if name not in (INCEPTION, *ENCODERS) or name in [network.space for network in networks]:
            raise UserError(
                f"--features {' '.join(chosen)}: expected one or more of {', '.join((INCEPTION, *ENCODERS))}, each once."
            )
        if name == INCEPTION:
            networks.append(InceptionFeatures(place or path, weights, key=key))
        else:
            networks.append(EncoderFeatures(name, place or None))
    return networks


def networks_of(options: FeatureOptions, config: Mapping[str, Any]) -> list[FeatureNetwork]:
    """Load the networks of --features; Inception's file comes from the options, else the run's config, else the default."""
    path = options.inception_path or stored(config, "callbacks.rfid.inception_path") or INCEPTION_FILE
    weights, width = options.inception_weights, options.inception_width
    return load_features(options.features, path, weights, "--inception_path", width)


def lpips_of(options: LpipsOptions, config: Mapping[str, Any]) -> LPIPS | None:
    """Load LPIPS from the files in the options, else those in the run's config, else the default ones.

    Returns None, with a warning, if the files are missing: the other scores do not need LPIPS.
    """
    given = {"vgg_path": options.vgg_path, "linear_path": options.lpips_path}
    arguments = stored(config, "model.lpips_arch") or LPIPS_FILES
    if any(given.values()):
        arguments = {name: path or LPIPS_FILES[name] for name, path in given.items()}
    arguments = with_current_keys({"lpips_arch": arguments})["lpips_arch"]  # the run may be of an older version
    if arguments.get("weights", "pretrained") == "pretrained":
        files = [resolve(arguments[name]) for name in given if arguments.get(name)]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            log.warning(
                "LPIPS is left out: %s not found. Download it with `python scripts/download_weights.py vgg16 lpips`, or "
                "set its path with --vgg_path and --lpips_path.", " and ".join(missing),
            )  # fmt: skip
            return None
    return LPIPS(**arguments)
