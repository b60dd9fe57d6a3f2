"""List the files that can be downloaded, and find those that a composed config needs.

Only published hashes are listed: the sha256 prefix that PyTorch's naming convention puts into a file name, the md5 of the
LPIPS v0.1 linear weights. Files of the hub have none here: the hub sends theirs with each response.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.core.errors import UserError
from src.core.files import expanded

HUB = "https://huggingface.co"
HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
"""Regular expression of a hub repository id."""
_RAE = f"{HUB}/nyu-visionx/RAE-collections/resolve/main"  # released by the authors of arXiv 2510.11690
_RAE_V2 = f"{HUB}/nyu-visionx/RAEv2-models/resolve/main"  # released by the authors of arXiv 2605.18324
_GITHUB = "https://github.com"


@dataclass(frozen=True)
class Asset:
    """A weights file, an encoder repository of the hub (`name` is its id), or a file that the user has to provide."""

    name: str
    what: str
    place: str = ""  # path of a file below `paths.weights_dir`
    sources: tuple[str, ...] = ()  # URLs, tried in this order
    digest: str | None = None  # `algorithm:hex`, the published hash or a prefix of it
    package: str = ""  # an installed package that contains the same file, and the path in it
    gated: bool = False
    path: Path | None = None  # where the file belongs on this machine; None: the hub's cache (HF_HOME)

    def below(self, weights_dir: Path) -> "Asset":
        """Return the asset with its path below `weights_dir`."""
        return replace(self, path=weights_dir / self.place) if self.place else self


def _released(name: str, what: str, encoder: str, decoder: str, data: str) -> tuple[Asset, Asset]:
    """Return an official decoder and its latent statistics, at their official relative paths."""
    decoder, stats = f"decoders/{encoder}/{decoder}/model.pt", f"stats/{encoder}/{data}/stat.pt"
    return (
        Asset(f"decoder-{name}", f"official ViT-XL decoder for {what}", decoder, (f"{_RAE}/{decoder}",)),
        Asset(f"stats-{name}", f"official latent statistics of {what}", stats, (f"{_RAE}/{stats}",)),
    )


def _released_v2(name: str, what: str) -> tuple[Asset, Asset]:
    decoder, stats = (f"{_RAE_V2}/stage1/imagenet/{name}/{file}" for file in ("decoder.pt", "stats.pt"))
    return (
        Asset(f"decoder-{name}", f"RAEv2 decoder for {what}", f"decoders/{name}/decoder.pt", (decoder,)),
        Asset(f"stats-{name}", f"RAEv2 latent statistics of {what}", f"stats/{name}/stats.pt", (stats,)),
    )


FILES = (
    Asset(
        "vgg16",
        "VGG16 (torchvision, ImageNet), the features under LPIPS; 528 MiB",
        "vgg16-397923af.pth",
        ("https://download.pytorch.org/models/vgg16-397923af.pth",),
        "sha256:397923af",
    ),
    Asset(
        "lpips",
        "LPIPS v0.1 linear weights for VGG16; 7 KiB",
        "lpips_vgg_v0.1.pth",
        (f"{_GITHUB}/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",),
        "md5:d507d7349b931f0638a25a48a722f98a",
        package="torchmetrics/functional/image/lpips_models/vgg.pth",
    ),
    Asset(
        "inception",
        "Inception of the original FID (TensorFlow, 2015-12-05), for rFID; 91 MiB",
        "pt_inception-2015-12-05-6726825d.pth",
        (
            f"{_GITHUB}/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
            f"{_GITHUB}/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        ),
        "sha256:6726825d",
    ),
    Asset(
        "discriminator",
        "DINO ViT-S/8, the frozen trunk of the discriminator",
        "discs/dino_vit_small_patch8_224.pth",
        (f"{_RAE}/discs/dino_vit_small_patch8_224.pth", f"{_RAE_V2}/encoders/dino/dino_vit_small_patch8_224.pth"),
    ),
    *_released("dinov2", "DINOv2-B, 256 px", "dinov2/wReg_base", "ViTXL_n08", "imagenet1k"),
    *_released("dinov2-512", "DINOv2-B, 512 px", "dinov2/wReg_base", "ViTXL_n08_i512", "imagenet1k_512"),
    *_released("siglip2", "SigLIP2-B, 256 px", "siglip2/base_p16_i256", "ViTXL_n08", "ImageNet1k"),
    *_released("mae", "MAE-B, 256 px", "mae/base_p16", "ViTXL_n08", "ImageNet1k"),
    *_released_v2("dinov3l-k7", "DINOv3-L, blocks 11, 13, ..., 23"),
    *_released_v2("dinov3l-k23", "DINOv3-L, blocks 1 to 23"),
)
# Config keys that name a weights file, and the asset it always is (None: identified by path and file name).
_FILE_KEYS = {
    "vgg_path": "vgg16", "linear_path": "lpips", "inception_path": "inception", "dino_ckpt_path": None,
    "pretrained_decoder_path": None, "normalization_stat_path": None,
}  # fmt: skip
USERS_CHOICE = "required"  # value of `model.pretrained_decoder_path` where the user has to choose the decoder


def by_name(name: str, encoders: Mapping[str, Asset]) -> Asset:
    """Return the asset called `name`: by its name or path in the table, or its file name if unique; or one of `encoders`, by
    its key or hub id."""
    if name in encoders:
        return encoders[name]
    exact = [asset for asset in (*FILES, *dict.fromkeys(encoders.values())) if name in (asset.name, asset.place)]
    found = exact or [asset for asset in FILES if Path(asset.place).name == name]
    if len(found) != 1:
        known = "\n  ".join([*(asset.name for asset in FILES), f"an encoder: {', '.join(encoders)}"])
        problem = "is the file name of several assets" if found else "is not a known asset"
        raise UserError(f"'{name}' {problem}. Known names (for an experiment use --experiment):\n  {known}")
    return found[0]


def requirements(config: Mapping[str, Any], weights_dir: Path, root: Path) -> list[Asset]:
    """Return every asset that `config` (plain, resolved, nested) loads, without duplicates, found by the names of its keys.

    Nothing is needed for nodes whose `weights` is not `pretrained`, a path whose sibling is not (`inception_weights` for
    `inception_path`), null keys, losses of weight 0 and evaluations that are off. Relative paths are relative to `root`, the
    project; the table's paths to `weights_dir`. Raises UserError for a missing value (`???`).
    """
    found = []
    for key, value in _references(_in_use(config), ()):
        if value == "???":
            raise UserError(f"{key} is '???': give it a value (`{key}=PATH`) before its weights can be found.")
        leaf, path = key.rpartition(".")[2], root / expanded(value)
        unknown = Asset(key, "no known source: provide it yourself", path=path)
        if leaf in _FILE_KEYS or leaf in ("decoder", "statistics"):
            known = [asset for asset in FILES if weights_dir / asset.place == path]
            known = known or [asset for asset in FILES if Path(asset.place).name == path.name]
            known = known if len(known) == 1 else [asset for asset in FILES if asset.name == _FILE_KEYS.get(leaf)]
            found.append(replace(known[0], path=path) if known else unknown)
        elif "/" in value and not path.exists():  # else a local folder, or a timm model by name
            found.append(Asset(value, "encoder") if re.fullmatch(HUB_ID, value) else unknown)
    return list(dict.fromkeys(found))


def _in_use(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config without the parts that are off: losses of weight 0, callbacks that never run."""
    model, callbacks = dict(config.get("model") or {}), dict(config.get("callbacks") or {})
    for weight, part in (("disc_weight", "disc_arch"), ("perceptual_weight", "lpips_arch")):
        if model.get(weight) == 0:
            model.pop(part, None)
    for name in ("rfid", "gfid"):
        node = callbacks.get(name) or {}
        if "_target_" not in node or not any(
            value for key, value in node.items() if "every" in key or key == "full_at_end"
        ):
            callbacks.pop(name, None)
    return {**config, "model": model, "callbacks": callbacks}


def _references(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, value) of every leaf that names weights, in config order."""
    if isinstance(node, Mapping) and node.get("weights", "pretrained") == "pretrained":
        for name, value in node.items():
            if node.get(str(name).removesuffix("_path") + "_weights", "pretrained") == "pretrained":
                yield from _references(value, (*path, str(name)))
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for index, value in enumerate(node):
            yield from _references(value, (*path, str(index)))
    elif isinstance(node, str) and node not in ("", USERS_CHOICE):
        of_encoder = path[-2:-1] == ("encoder_params",) and (path[-1] == "model_name" or path[-1].endswith("_path"))
        of_released = path[-2:-1] == ("autoencoder",) and path[-1] in ("encoder", "decoder", "statistics")
        if of_encoder or of_released or path[-1] == "encoder_config_path" or path[-1] in _FILE_KEYS:
            yield ".".join(path), node
