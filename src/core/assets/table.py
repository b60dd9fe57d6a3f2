"""What can be downloaded: one entry per file or encoder repository, with its place, its sources and its known hash.

Digests are only those that somebody published: the sha256 prefix that PyTorch's naming rule puts into a file name,
the md5 of the LPIPS v0.1 linear weights. Files of the hub have none here: the hub states theirs with each answer.
"""

from dataclasses import dataclass

from src.core.errors import UserError

RAE = "hf://nyu-visionx/RAE-collections"  # released by the authors of arXiv 2510.11690
RAE_V2 = "hf://nyu-visionx/RAEv2-models"  # released by the authors of arXiv 2605.18324


@dataclass(frozen=True)
class Digest:
    """A published hash; `hex` may be a prefix of the whole digest, in lower case."""

    algorithm: str  # a name that hashlib knows
    hex: str

    def __str__(self) -> str:
        whole = {"sha256": 64, "md5": 32}.get(self.algorithm)
        return f"{self.algorithm} {self.hex}" + ("" if len(self.hex) == whole else "…")


@dataclass(frozen=True)
class FileAsset:
    """One file. `place` is relative to `paths.weights_dir`; `sources` (URL or `hf://owner/repo/path`) go in order."""

    name: str
    what: str
    place: str
    sources: tuple[str, ...]
    digest: Digest | None = None
    about_mib: float | None = None  # as published, for people; None where no source states it
    package: tuple[str, str] | None = None  # (installed package, file in it) that brings the same bytes


@dataclass(frozen=True)
class RepoAsset:
    """One encoder repository of the hub; it belongs into huggingface_hub's own cache (HF_HOME)."""

    repo_id: str
    what: str
    gated: bool = False

    @property
    def name(self) -> str:
        return self.repo_id


Asset = FileAsset | RepoAsset

_PERCEPTUAL = (
    FileAsset(
        name="vgg16",
        what="VGG16 (torchvision, ImageNet), the features under LPIPS",
        place="vgg16-397923af.pth",
        sources=("https://download.pytorch.org/models/vgg16-397923af.pth",),
        digest=Digest("sha256", "397923af"),
        about_mib=527.8,
    ),
    FileAsset(
        name="lpips",
        what="LPIPS v0.1 linear weights for VGG16",
        place="lpips_vgg_v0.1.pth",
        sources=(
            "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
            "https://download.openmmlab.com/mmgen/evaluation/lpips/weights/v0.1/vgg.pth",
            "https://heibox.uni-heidelberg.de/f/607503859c864bc1b30b/?dl=1",
        ),
        digest=Digest("md5", "d507d7349b931f0638a25a48a722f98a"),
        about_mib=7289 / 2**20,
        package=("torchmetrics", "functional/image/lpips_models/vgg.pth"),
    ),
    FileAsset(
        name="inception",
        what="Inception of the original FID (TensorFlow, 2015-12-05), for rFID",
        place="pt_inception-2015-12-05-6726825d.pth",
        sources=(
            "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        ),
        digest=Digest("sha256", "6726825d"),
        about_mib=91.0,
    ),
    FileAsset(
        name="discriminator",
        what="DINO ViT-S/8, the frozen trunk of the discriminator",
        place="discs/dino_vit_small_patch8_224.pth",
        sources=(
            f"{RAE}/discs/dino_vit_small_patch8_224.pth",
            f"{RAE_V2}/encoders/dino/dino_vit_small_patch8_224.pth",
        ),
    ),
)


def _released(name: str, what: str, decoder: str, stats: str) -> tuple[FileAsset, FileAsset]:
    """A released official decoder and the latent statistics that go with it, under their official relative paths."""
    return (
        FileAsset(f"decoder-{name}", f"official ViT-XL decoder for {what}", decoder, (f"{RAE}/{decoder}",)),
        FileAsset(f"stats-{name}", f"official latent statistics of {what}", stats, (f"{RAE}/{stats}",)),
    )


def _released_v2(name: str, what: str) -> tuple[FileAsset, FileAsset]:
    folder = f"stage1/imagenet/{name}"
    return (
        FileAsset(
            f"decoder-{name}",
            f"RAEv2 decoder for {what}",
            f"decoders/{name}/decoder.pt",
            (f"{RAE_V2}/{folder}/decoder.pt",),
        ),
        FileAsset(
            f"stats-{name}",
            f"RAEv2 latent statistics of {what}",
            f"stats/{name}/stats.pt",
            (f"{RAE_V2}/{folder}/stats.pt",),
        ),
    )


_OFFICIAL = (
    *_released(
        "dinov2",
        "DINOv2-B, 256 px",
        "decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
        "stats/dinov2/wReg_base/imagenet1k/stat.pt",
    ),
    *_released(
        "dinov2-512",
        "DINOv2-B, 512 px",
        "decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt",
        "stats/dinov2/wReg_base/imagenet1k_512/stat.pt",
    ),
    *_released(
        "siglip2",
        "SigLIP2-B, 256 px",
        "decoders/siglip2/base_p16_i256/ViTXL_n08/model.pt",
        "stats/siglip2/base_p16_i256/ImageNet1k/stat.pt",
    ),
    *_released(
        "mae",
        "MAE-B, 256 px",
        "decoders/mae/base_p16/ViTXL_n08/model.pt",
        "stats/mae/base_p16/ImageNet1k/stat.pt",
    ),
    *_released_v2("dinov3l-k7", "DINOv3-L, blocks 11, 13, ..., 23"),
    *_released_v2("dinov3l-k23", "DINOv3-L, blocks 1 to 23"),
)

FILES: tuple[FileAsset, ...] = (*_PERCEPTUAL, *_OFFICIAL)

REPOSITORIES: tuple[RepoAsset, ...] = (
    RepoAsset("facebook/dinov2-with-registers-base", "encoder DINOv2-B with registers"),
    RepoAsset("google/siglip-so400m-patch14-384", "encoder SigLIP so400m"),
    RepoAsset("google/siglip2-base-patch16-256", "encoder SigLIP2-B"),
    RepoAsset("facebook/vit-mae-base", "encoder MAE-B"),
    RepoAsset("facebook/dinov3-vitb16-pretrain-lvd1689m", "encoder DINOv3-B", gated=True),
    RepoAsset("facebook/dinov3-vitl16-pretrain-lvd1689m", "encoder DINOv3-L", gated=True),
)

ASSETS: tuple[Asset, ...] = (*REPOSITORIES, *FILES)


def repository(repo_id: str) -> RepoAsset:
    """The entry of a hub repository; one that is not in the table is an encoder of the user's own choice."""
    return next((asset for asset in REPOSITORIES if asset.repo_id == repo_id), RepoAsset(repo_id, "encoder"))


def by_name(name: str) -> Asset:
    """The asset called `name`: its name in the table, its place, or its file name where only one asset has that."""
    exact = [asset for asset in ASSETS if name in (asset.name, getattr(asset, "place", None))]
    same_file = [asset for asset in FILES if asset.place.rsplit("/", 1)[-1] == name]
    found = exact or same_file
    if len(found) != 1:
        known = "\n  ".join(asset.name for asset in ASSETS)
        problem = "is the file name of several assets" if found else "is no known asset"
        raise UserError(f"'{name}' {problem}. Known names (an experiment goes behind --experiment):\n  {known}")
    return found[0]
