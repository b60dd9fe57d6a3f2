"""Frozen DINO ViT, the discriminator's feature extractor. Caron et al., arXiv 2104.14294.

Weights: `dino_vit_small_patch8_224.pth` and its siblings, the released DINO backbones with timm's parameter names.

Legend: B batch, L patch tokens, C width, H W image, P patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from src.core.images import IMAGENET_MEAN, IMAGENET_STD
from src.core.weights import Frozen, SizedWeights, freeze, load_strict, read, require


@dataclass(frozen=True)
class DinoRecipe:
    """Sizes of a trunk."""

    patch: int
    """Side in px."""
    width: int
    heads: int
    depth: int = 12
    image_size: int = 224
    """Side in px; inputs are resized to it."""

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2


RECIPES = {
    "S_8": DinoRecipe(patch=8, width=384, heads=6),
    "S_16": DinoRecipe(patch=16, width=384, heads=6),
    "B_16": DinoRecipe(patch=16, width=768, heads=12),
}
TINY = DinoRecipe(patch=8, width=64, heads=2, depth=4, image_size=64)
"""Sizes for `weights: tiny`, used by tests and the dummy experiments."""

MLP_RATIO = 4
NORM_EPS = 1e-6
# The features are taken before the final LayerNorm, and there is no classifier.
UNUSED_IN_FILE = ("norm.weight", "norm.bias", "head.weight", "head.bias")


class DinoTrunk(Frozen):
    """Images in [-1, 1] -> patch tokens after chosen blocks. Frozen; gradients flow to the images only.

    Parameter names are those of the file. The ImageNet normalisation is folded into the patch embedding at load (exact,
    since the embedding has no padding). The whole module may be cast to half precision.
    """

    def __init__(
        self, recipe: DinoRecipe, path: str | Path | None, weights: SizedWeights = "pretrained", seed: int = 0
    ) -> None:
        """`path`: weights file; None if the weights are drawn from `seed`."""
        super().__init__()
        self.recipe = recipe
        self.untrained = weights != "pretrained"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, recipe.width, recipe.patch, stride=recipe.patch)})
            self.cls_token = nn.Parameter(torch.randn(1, 1, recipe.width) * 0.02)
            self.pos_embed = nn.Parameter(torch.randn(1, 1 + recipe.tokens, recipe.width) * 0.02)
            self.blocks = nn.ModuleList(Block(recipe.width, recipe.heads) for _ in range(recipe.depth))
        if not self.untrained:
            file = require(path, "The DINO trunk of the discriminator", "dino_ckpt_path")
            load_strict(self, {name: value for name, value in read(file).items() if name not in UNUSED_IN_FILE}, file)
            for block in self.blocks:  # a key bias shifts all logits of a query equally, which softmax ignores
                block.attn["qkv"].bias.data.chunk(3)[1].zero_()
        _fold_normalisation(self.patch_embed["proj"])
        freeze(self)

    def forward(self, images: Tensor, depths: Sequence[int]) -> list[Tensor]:
        """Return the B x L x C map after each of `depths` (ascending, from 0), for images B x 3 x H x W, float in [-1, 1].

        Blocks after the last of `depths` are not run.
        """
        size = (self.recipe.image_size, self.recipe.image_size)
        if images.shape[2:] != size:  # the resize is the identity at this size
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        projection = self.patch_embed["proj"]
        x = projection(images.to(projection.weight.dtype)).flatten(2).transpose(1, 2)  # B L C
        x = torch.cat((self.cls_token.expand(len(x), -1, -1).to(x.dtype), x), dim=1) + self.pos_embed
        maps = []
        for depth, block in enumerate(self.blocks[: max(depths) + 1]):
            x = block(x)
            if depth in depths:
                maps.append(x[:, 1:])
        return maps


class Block(nn.Module):
    """Pre-norm transformer block with a tanh-GELU MLP, no dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, MLP_RATIO * width), "fc2": nn.Linear(MLP_RATIO * width, width)}
        )

    def forward(self, x: Tensor) -> Tensor:  # B 1+L C
        x = x + self._attention(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)), approximate="tanh"))

    def _attention(self, x: Tensor) -> Tensor:
        qkv = self.attn["qkv"](x).unflatten(2, (3, self.heads, -1))  # B 1+L 3 heads C/heads
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # B heads 1+L C/heads
        x = F.scaled_dot_product_attention(query, key, value)
        return self.attn["proj"](x.transpose(1, 2).flatten(2))


@torch.no_grad()
def _fold_normalisation(projection: nn.Conv2d) -> None:
    """Make the patch embedding expect [-1, 1]: ((x + 1) / 2 - mean) / std = x * scale + shift, in float64."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    weight = projection.weight.double()
    projection.bias.add_((weight * ((0.5 - mean) / std)).sum((1, 2, 3)))
    projection.weight.copy_(weight * (0.5 / std))
