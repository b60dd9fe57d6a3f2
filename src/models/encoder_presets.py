"""Encoder presets: the table of names, RAEv2's spellings of them, and their expansion into model arguments.

A short name (`dinov2-b`) uses the class defaults (usually the final norm without affine parameters), the pixel statistics
of the encoder's files and its last block. A name in RAEv2's spelling (`dinov2-vit-b`) gives what RAEv2 computes under that
name. The table contains all sizes, so that shapes and cost are known without downloading anything.
"""

import difflib
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from src.core.errors import UserError
from src.core.requirements import Asset


@dataclass(frozen=True)
class Size:
    """Sizes of a ViT."""

    width: int
    depth: int
    heads: int
    mlp: int
    """Width of the MLP's hidden layer."""
    gated: bool = False
    """Whether the MLP has a third matrix, its gate."""


T, S, B = Size(192, 12, 3, 768), Size(384, 12, 6, 1536), Size(768, 12, 12, 3072)
L, SO400M, H = Size(1024, 24, 16, 4096), Size(1152, 27, 16, 4304), Size(1280, 32, 16, 5120)
G = Size(1536, 40, 24, 4096, gated=True)
PE_G = Size(1536, 50, 16, 8960)


@dataclass(frozen=True)
class Preset:
    """A named encoder: one row of the table."""

    name: str
    encoder_cls: str
    hub_id: str
    licence: str
    """As named on the model card; with "gated" if it must be accepted on the hub first."""
    size: Size
    patch: int
    native_px: int
    """Image size that its positions were trained for; for other sizes they are resampled."""
    params: Mapping[str, Any]
    """`encoder_params` that differ from the class defaults: blocks, fusion, norm, statistics."""
    decoders: str
    """Who has published decoders for it; empty if nobody is known to."""


APACHE, NC = "Apache-2.0", "CC-BY-NC-4.0"
K7, K23 = {"layers": "k7"}, {"layers": "k23"}
# class, licence, patch, native px, name -> (hub id, size[, params])
_FAMILIES: tuple[tuple[str, str, int, int, dict[str, tuple[Any, ...]]], ...] = (
    ("Dinov2withNorm", APACHE, 14, 518, {
        "dinov2-s": ("facebook/dinov2-with-registers-small", S),
        "dinov2-b": ("facebook/dinov2-with-registers-base", B),
        "dinov2-l": ("facebook/dinov2-with-registers-large", L),
        "dinov2-g": ("facebook/dinov2-with-registers-giant", G),
        "dinov2-s-woreg": ("facebook/dinov2-small", S),
        "dinov2-b-woreg": ("facebook/dinov2-base", B),
        "dinov2-l-woreg": ("facebook/dinov2-large", L),
        "dinov2-g-woreg": ("facebook/dinov2-giant", G),
    }),
    ("Dinov2withNorm", NC, 14, 224, {
        "webssl-300m": ("facebook/webssl-dino300m-full2b-224", Size(1024, 24, 16, 2736, gated=True)),
        "webssl-1b": ("facebook/webssl-dino1b-full2b-224", G),
        "webssl-2b": ("facebook/webssl-dino2b-full2b-224", Size(2688, 24, 21, 7168, gated=True)),
        "webssl-3b": ("facebook/webssl-dino3b-full2b-224", Size(3072, 26, 24, 8192, gated=True)),
        "webssl-5b": ("facebook/webssl-dino5b-full2b-224", Size(3584, 32, 28, 9560, gated=True)),
        "webssl-7b": ("facebook/webssl-dino7b-full8b-224", Size(4096, 32, 32, 10928, gated=True)),
    }),
    ("DINOv3wNorm", "DINOv3 License, gated", 16, 256, {
        "dinov3-s": ("facebook/dinov3-vits16-pretrain-lvd1689m", S),
        "dinov3-splus": ("facebook/dinov3-vits16plus-pretrain-lvd1689m", Size(384, 12, 6, 1536, gated=True)),
        "dinov3-b": ("facebook/dinov3-vitb16-pretrain-lvd1689m", B),
        "dinov3-l": ("facebook/dinov3-vitl16-pretrain-lvd1689m", L),
        "dinov3-l-k7": ("facebook/dinov3-vitl16-pretrain-lvd1689m", L, K7),
        "dinov3-l-k23": ("facebook/dinov3-vitl16-pretrain-lvd1689m", L, K23),
        "dinov3-hplus": ("facebook/dinov3-vith16plus-pretrain-lvd1689m", Size(1280, 32, 20, 5120, gated=True)),
        "dinov3-7b": ("facebook/dinov3-vit7b16-pretrain-lvd1689m", Size(4096, 40, 32, 8192, gated=True)),
    }),
    ("SigLIP2wNorm", APACHE, 16, 256, {
        "siglip2-b": ("google/siglip2-base-patch16-256", B),
        "siglip2-l": ("google/siglip2-large-patch16-256", L),
        "siglip2-so400m": ("google/siglip2-so400m-patch16-256", SO400M),
        "siglip2-g": ("google/siglip2-giant-opt-patch16-256", Size(1536, 40, 16, 6144)),
        "siglip-b": ("google/siglip-base-patch16-256", B),
        "siglip-l": ("google/siglip-large-patch16-256", L),
    }),
    ("SigLIP2wNorm", APACHE, 14, 384, {"siglip-so400m": ("google/siglip-so400m-patch14-384", SO400M)}),
    ("MAEwNorm", APACHE, 16, 224, {
        "mae-b": ("facebook/vit-mae-base", B),
        "mae-l": ("facebook/vit-mae-large", L),
    }),
    ("MAEwNorm", APACHE, 14, 224, {"mae-h": ("facebook/vit-mae-huge", H)}),
    ("CLIPTower", "MIT", 16, 224, {"clip-b": ("openai/clip-vit-base-patch16", B)}),
    ("CLIPTower", "MIT", 14, 224, {"clip-l": ("openai/clip-vit-large-patch14", L)}),
    ("CLIPTower", NC, 14, 224, {"metaclip2-h": ("facebook/metaclip-2-worldwide-huge-quickgelu", H)}),
    ("IJEPAwNorm", NC, 14, 224, {"ijepa-h": ("facebook/ijepa_vith14_1k", H)}),
    ("ViTwNorm", APACHE, 16, 224, {
        "vit-b": ("google/vit-base-patch16-224", B),
        "vit-l": ("google/vit-large-patch16-224", L),
        "msn-s": ("facebook/vit-msn-small", S),
        "msn-b": ("facebook/vit-msn-base", B),
        "msn-l": ("facebook/vit-msn-large", L),
    }),
    ("AIMv2wNorm", "Apple AMLR", 14, 224, {
        "aimv2-l": ("apple/aimv2-large-patch14-224", Size(1024, 24, 8, 2816, gated=True)),
        "aimv2-1b": ("apple/aimv2-1B-patch14-224", Size(2048, 24, 16, 5632, gated=True)),
        "aimv2-3b": ("apple/aimv2-3B-patch14-224", Size(3072, 24, 24, 8192, gated=True)),
    }),
    ("RADIO", "NVIDIA Open Model License", 16, 2048, {"c-radio-v4-h": ("nvidia/C-RADIOv4-H", H)}),
    ("TimmViT", APACHE, 16, 384, {
        "pe-core-t": ("timm/vit_pe_core_tiny_patch16_384.fb", T),
        "pe-core-s": ("timm/vit_pe_core_small_patch16_384.fb", S),
    }),
    ("TimmViT", APACHE, 16, 224, {"pe-core-b": ("timm/vit_pe_core_base_patch16_224.fb", B)}),
    ("TimmViT", APACHE, 14, 336, {"pe-core-l": ("timm/vit_pe_core_large_patch14_336.fb", L)}),
    ("TimmViT", APACHE, 16, 512, {"pe-spatial-b": ("timm/vit_pe_spatial_base_patch16_512.fb", B)}),
    ("TimmViT", APACHE, 14, 448, {
        "pe-core-g": ("timm/vit_pe_core_gigantic_patch14_448.fb", PE_G),
        "pe-spatial-l": ("timm/vit_pe_spatial_large_patch14_448.fb", L),
        "pe-spatial-g": ("timm/vit_pe_spatial_gigantic_patch14_448.fb", PE_G),
        "pe-lang-l": ("timm/vit_pe_lang_large_patch14_448.fb", replace(L, depth=23)),
        "pe-lang-g": ("timm/vit_pe_lang_gigantic_patch14_448.fb", replace(PE_G, depth=47)),
    }),
    ("TimmViT", APACHE, 14, 448, {
        "tipsv2-b": ("timm/vit_base_patch14_reg1_tipsv2.webli", B),
        "tipsv2-l": ("timm/vit_large_patch14_reg1_tipsv2.webli", L),
        "tipsv2-so400m": ("timm/vit_so400m_patch14_reg1_tipsv2.webli", SO400M),
        "tipsv2-g": ("timm/vit_giant_patch14_reg1_tipsv2.webli", G),
    }),
    ("TimmViT", "FAIR Noncommercial Research License", 16, 256, {
        "eupe-t": ("timm/vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", T),
        "eupe-s": ("timm/vit_small_patch16_dinov3_qkvb.eupe_lvd1689m", S),
        "eupe-b": ("timm/vit_base_patch16_dinov3_qkvb.eupe_lvd1689m", B),
    }),
    ("TimmViT", "MIT", 14, 224, {
        "eva02-b": ("timm/eva02_base_patch14_224.mim_in22k", Size(768, 12, 12, 2048, gated=True)),
        "eva02-l": ("timm/eva02_large_patch14_224.mim_m38m", Size(1024, 24, 16, 2730, gated=True)),
    }),
)  # fmt: skip
_DECODERS = {
    **dict.fromkeys(("dinov2-b", "siglip2-b", "mae-b"), "RAE"), **dict.fromkeys(("dinov3-l-k7", "dinov3-l-k23"), "RAEv2")
}  # fmt: skip
PRESETS: dict[str, Preset] = {
    name: Preset(
        name, kind, row[0], licence, row[1], patch, px, row[2] if len(row) > 2 else {}, _DECODERS.get(name, "")
    )
    for kind, licence, patch, px, rows in _FAMILIES
    for name, row in rows.items()
}

_LETTERS = {name: name for name in ("t", "s", "b", "l", "g", "so400m")}
_PLAIN_1E5, _AFFINE = {"norm": "plain", "norm_eps": 1e-5}, {"norm": "affine"}
_PE = {"norm": "none", "statistics": "half", "resize": "bilinear"}
_DINOV3 = {"s16": "s", "s16plus": "splus", "b16": "b", "l16": "l", "h16plus": "hplus", "7b16": "7b"}
# RAEv2 type -> prefix of our names, RAEv2 size -> size in our name, encoder_params, fusion of its `mls` names
_RAEV2: dict[str, tuple[str, dict[str, str], dict[str, Any], str | None]] = {
    "dinov2": ("dinov2", _LETTERS, _PLAIN_1E5 | {"antialias_positions": True}, "mean"),
    "dinov3": ("dinov3", _DINOV3, _PLAIN_1E5, "mean_plus_spatial_mean"),
    "siglip2": ("siglip2", _LETTERS, _AFFINE | {"statistics": "imagenet"}, "mean_plus_spatial_mean"),
    "mae": ("mae", _LETTERS, {}, None),
    "webssl": ("webssl", {f"dino{n}_full{d}_224": n for n, d in
               (("300m", "2b"), ("1b", "2b"), ("2b", "2b"), ("3b", "2b"), ("5b", "2b"), ("7b", "8b"))}, _AFFINE, None),
    "pe": ("pe-core", _LETTERS, _PE, None),
    "spatialpe": ("pe-spatial", _LETTERS, _PE, None),
    "langpe": ("pe-lang", _LETTERS, _PE, None),
    "eupe": ("eupe", {"t16": "t", "s16": "s", "b16": "b"}, _PLAIN_1E5, "sum"),
    "tipsv2": ("tipsv2", {"b14": "b", "l14": "l", "so14": "so400m", "g14": "g"},
               _PLAIN_1E5 | {"statistics": "none"}, None),
    "clip": ("clip", {"L": "l"}, {"norm": "none"}, None),
    "jepa": ("ijepa", {"h": "h"}, _AFFINE, None),
}  # fmt: skip
_MLS_LAYERS = {
    "l": [5, 11, 17, 23],
    "l16": [5, 11, 17, 23],
    "g": [10, 20, 30, 39],
    "h16plus": [8, 16, 24, 31],
    "so400m": [5, 12, 19, 26],
}
"""Blocks that RAEv2 uses for an `mls` name without `layers=`; [2, 5, 8, 11] for all other sizes."""
_NORM_FLAG = ("dinov2", "dinov3", "pe", "spatialpe", "langpe")


def find_preset(name: str) -> Preset:
    """Return the preset of a short name or of a name in RAEv2's spelling, such as `dinov3mls-vit-l16[layers=11.13]`.

    Raises:
        UserError: an unknown name (with close matches), or flags that do not apply to it.
    """
    name = str(name)
    if name in PRESETS:
        return PRESETS[name]
    found = re.fullmatch(r"([a-z0-9]+?)(mls)?-vit-(\w+)(?:\[([^\]]*)\])?", name)
    if found and (preset := _raev2_preset(name, *found.groups())):
        return preset
    near = difflib.get_close_matches(name, [*PRESETS, *raev2_names()], n=4)
    raise UserError(
        f"model.encoder={name!r} is unknown{' (close: ' + ', '.join(near) + ')' if near else ''}. docs/encoders.md and "
        "`python scripts/download_weights.py --list` list the names; for a folder of your own set model.encoder_cls, "
        "model.encoder_config_path and model.encoder_params instead."
    )


def expand_encoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `model:` node with `encoder` (a preset name, or null) replaced by the `RAE` arguments it stands for.

    Other keys override the preset: `encoder_config_path` is then the path or hub id of the weights, and non-null entries
    of `encoder_params` replace the preset's.

    Raises:
        UserError: an unknown name, or an `encoder_cls` that contradicts the preset.
    """
    expanded = dict(config)
    name = expanded.pop("encoder", None)
    if name is None:
        return expanded
    preset = find_preset(name)
    if expanded.get("encoder_cls") not in (None, preset.encoder_cls):
        raise UserError(
            f"model.encoder={name} is a {preset.encoder_cls}, but model.encoder_cls={expanded['encoder_cls']} is given too. "
            "Use the model config that leaves it unset (model=rae_encoder), or drop model.encoder."
        )
    place = expanded.get("encoder_config_path") or preset.hub_id
    given = {k: v for k, v in (expanded.get("encoder_params") or {}).items() if v is not None}
    params = {source_key(preset.encoder_cls): place, **preset.params, **given}
    return expanded | {"encoder_cls": preset.encoder_cls, "encoder_config_path": place, "encoder_params": params}


def with_places(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a `model:` node with preset names replaced by the paths or hub ids of the encoders, including
    `autoencoder.encoder`, given with released files in stage 2. Raises UserError like `expand_encoder`."""
    expanded = expand_encoder(model)
    released = expanded.get("autoencoder")
    if isinstance(released, Mapping) and released.get("encoder") and released.get("encoder_cls") is None:
        with suppress(UserError):  # reported when the autoencoder is opened
            expanded["autoencoder"] = {**released, "encoder": find_preset(released["encoder"]).hub_id}
    return expanded


def source_key(encoder_cls: str) -> str:
    """Return the name of the encoder class's argument for the path or hub id of the encoder."""
    return "dinov2_path" if encoder_cls == "Dinov2withNorm" else "model_name"


def hub_assets() -> dict[str, Asset]:
    """Return the hub repository of each preset, by preset name, for downloads; presets may share one."""
    names: dict[str, list[str]] = {}
    for preset in PRESETS.values():
        names.setdefault(preset.hub_id, []).append(preset.name)
    return {
        p.name: Asset(p.hub_id, f"encoder {', '.join(names[p.hub_id])}; {p.licence}", gated="gated" in p.licence)
        for p in PRESETS.values()
    }


def _raev2_preset(name: str, family: str, mls: str | None, size: str, brackets: str | None) -> Preset | None:
    """Return the preset of what RAEv2 computes under `name`; None if RAEv2 has no such name."""
    flags = [flag.strip() for flag in brackets.split(",")] if brackets else []
    while family in _NORM_FLAG and (suffix := re.fullmatch(r"(\w+?)(norm|woreg)", size)):  # `bnormworeg`
        size, flags = suffix[1], [*flags, suffix[2]]
    prefix, sizes, params, fusion = _RAEV2.get(family, ("", {}, {}, None))
    own = f"{prefix}-{sizes.get(size)}" + "-woreg" * ("woreg" in flags and family == "dinov2")
    if own not in PRESETS or (mls and fusion is None):
        return None
    params = dict(params)
    if mls:
        params |= {"layers": _MLS_LAYERS.get(size, [2, 5, 8, 11]), "layer_fusion": fusion}
    for flag in flags:
        if flag == "norm" and family in _NORM_FLAG:
            params = {key: value for key, value in params.items() if key != "norm_eps"} | _AFFINE
        elif mls and (layers := re.fullmatch(r"layers=(\d+(?:\.\d+)*)", flag)):
            params["layers"] = [int(number) for number in layers[1].split(".")]
        elif not (flag == "woreg" and family == "dinov2"):
            raise UserError(f"model.encoder={name!r}: {family}{mls or ''} has no flag [{flag}].")
    return replace(PRESETS[own], name=name, params=params)


@cache
def raev2_names() -> tuple[str, ...]:
    """Return the RAEv2 names (without flags) that have a preset."""
    return tuple(
        f"{family}{mls}-vit-{size}"
        for family, (prefix, sizes, _, fusion) in _RAEV2.items()
        for mls in ("", "mls")[: 1 + (fusion is not None)]
        for size, own in sizes.items()
        if f"{prefix}-{own}" in PRESETS
    )
