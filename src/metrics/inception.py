"""Compute Inception features for FID from the standard weights file: uint8 images in, 2,048 features per image out.

Legend: B batch, C channels, H, W image px (any size), S output side, F features (2048).
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from src.core.errors import UserError
from src.core.files import file_digest
from src.core.precision import full_float32
from src.core.weights import SizedWeights, freeze, load_strict, read, require
from src.metrics.features import INCEPTION, FeatureNetwork, FeatureOutputs
from src.metrics.inception_network import SPATIAL_DIM, TF_CLASSES, InceptionNetwork

log = logging.getLogger(__name__)

TINY_WIDTH = 0.125
"""Channels of `tiny`, as a share of the full network's."""
INPUT_PX = 299
PUBLISHED_SHA256 = "6726825d"  # in the file names of pytorch-fid and torch-fidelity, which hold the same tensors
# In the standard file but not used. Everything else must be present and fit.
UNUSED = "fc.bias"
COUNTER = "num_batches_tracked"  # only in files re-saved by a newer PyTorch; eval mode doesn't read it


class InceptionFeatures(FeatureNetwork):
    """`InceptionFeatures(path)(uint8 B x 3 x H x W) -> B x F float32` on the device of its weights.

    Always frozen, in eval mode, float32 (turns off autocast and TF32). Raises UserError if the file is missing or holds
    another network. Random weights, drawn from `seed`, only on request by `weights`: `untrained` is then true, and scores
    must not be called rFID. `key` is the config key or option of the path in error messages.
    """

    space, spatial_dim = INCEPTION, SPATIAL_DIM

    def __init__(
        self,
        weights_path: str | Path | None,
        weights: SizedWeights = "pretrained",
        seed: int = 0,
        key: str = "weights_path",
    ) -> None:
        super().__init__()
        width = TINY_WIDTH if weights == "tiny" else 1.0
        network = InceptionNetwork(width)
        self.untrained = weights != "pretrained"
        self.feature_dim = network.feature_dim
        if self.untrained:
            self.name = f"inception-untrained-seed{seed}-width{width:g}"
            _initialise(network, seed)
            log.warning("Inception features are untrained (seed %d): scores are not rFID", seed)
        else:
            self.name = "inception-2015-12-05"
            _load(network, weights_path, key)
        freeze(network)
        self.network = network.fuse().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def outputs(self, images: Tensor) -> FeatureOutputs:
        """Return pooled and spatial features and logits of uint8 images B x 3 x H x W, each B x D float32."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 B x 3 x H x W, got {images.dtype} {tuple(images.shape)}")
        with full_float32(self.device):
            x = resize_tf1(images.to(self.device).float(), INPUT_PX)
            x = x.sub(128).div_(128)  # as in TensorFlow: 255 becomes 0.992
            return self.network.outputs(x.contiguous(memory_format=torch.channels_last))


def resize_tf1(images: Tensor, size: int) -> Tensor:
    """Resize B x C x H x W float -> B x C x S x S like `tf.image.resize_bilinear(align_corners=False)` of TensorFlow 1,
    which every published FID uses.

    Output pixel i reads the input at i * H / S, not at (i + .5) * H / S - .5 as `torch.nn.functional.interpolate` does:
    no half-pixel centres, no antialiasing, last row and column repeated beyond the edge.
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    return _lerp(_lerp(images, -1, size), -2, size)  # TensorFlow interpolates along rows first


def _lerp(images: Tensor, axis: int, size: int) -> Tensor:
    length = images.shape[axis]
    # float32 positions, as TensorFlow computes them
    position = torch.arange(size, dtype=torch.float32, device=images.device) * (length / size)
    low = position.long().clamp_(max=length - 1)
    high = (low + 1).clamp_(max=length - 1)
    weight = (position - low).to(images.dtype)
    if axis == -2:
        weight = weight[:, None]
    start = images.index_select(axis, low)
    return torch.addcmul(start, images.index_select(axis, high) - start, weight)


def _load(network: InceptionNetwork, weights_path: str | Path | None, key: str) -> None:
    path = require(weights_path, "Inception weights for FID", key)
    state = read(path)
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, not the weights of the FID Inception network")
    classes = len(state["fc.weight"]) if isinstance(state.get("fc.weight"), Tensor) else None
    if classes != TF_CLASSES:
        found = "no classifier (fc.weight)" if classes is None else f"a classifier of {classes} classes"
        raise UserError(
            f"{path} is not the FID Inception network: it has {found}, the standard file has {TF_CLASSES}. "
            "torchvision's ImageNet Inception-v3 gives other scores; use pt_inception-2015-12-05-6726825d.pth."
        )
    counters = {name: value for name, value in network.state_dict().items() if name.endswith(COUNTER)}
    needed = {name: value for name, value in state.items() if name != UNUSED and not name.endswith(COUNTER)}
    load_strict(network, {**needed, **{name: torch.zeros_like(value) for name, value in counters.items()}}, path)
    digest = file_digest(path, "sha256")
    if not digest.startswith(PUBLISHED_SHA256):
        log.warning(
            "%s is not the published file byte for byte (sha256 %s…, published %s…): scores compare with published "
            "ones only if its tensors are the same", path, digest[:8], PUBLISHED_SHA256,
        )  # fmt: skip


def _initialise(network: InceptionNetwork, seed: int) -> None:
    """Draw weights that keep the variance through the ReLUs, so that features differ between images; own generator."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
