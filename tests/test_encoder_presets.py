"""Encoders by name: the table of presets, RAEv2's names and latents, and names in a config."""

import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from omegaconf import OmegaConf

from src.core.errors import UserError
from src.core.geometry import Geometry
from src.core.weights import PROJECT_ROOT
from src.formats.checkpoint import encoder_of
from src.models.encoder_presets import PRESETS, expand_encoder, find_preset, raev2_names
from src.models.encoders import ENCODERS
from src.models.rae import RAE
from src.training.settings import ModelSettings
from tests.training import composed

sys.path.insert(0, str(PROJECT_ROOT / "docs"))
import encoder_table

K7 = "dinov3mls-vit-l16[layers=11.13.15.17.19.21.23]"


def model_node(*overrides: str) -> dict:
    model = OmegaConf.to_container(composed(["experiment=rae_encoder", *overrides]).model, resolve=True)
    return {key: value for key, value in model.items() if key != "_target_"}


def test_every_name_composes_and_its_sizes_are_known_without_weights():
    node = model_node()
    assert {"dinov3mls-vit-h16plus", "webssl-vit-dino7b_full8b_224", "tipsv2-vit-so14"} < set(raev2_names())
    for name in [*PRESETS, *raev2_names(), K7]:
        preset = find_preset(name)
        settings = ModelSettings.parse({**node, "encoder": name})
        assert settings.encoder_cls == preset.encoder_cls and preset.encoder_cls in ENCODERS
        assert settings.encoder_config_path == preset.hub_id and preset.hub_id in settings.encoder_params.values()
        assert Geometry.of(256, 16, preset.patch).encoder_input_size in (224, 256)
        assert preset.size.width % preset.size.heads == 0


@pytest.mark.parametrize(("name", "params"), [
    ("dinov3-l-k7", {"layers": "k7"}),
    (K7, {"layers": [11, 13, 15, 17, 19, 21, 23], "layer_fusion": "mean_plus_spatial_mean"}),
    ("dinov2-b", {}),
    ("dinov2-vit-b[norm]", {"norm": "affine", "antialias_positions": True}),
    ("dinov2-vit-bnormworeg", {"norm": "affine", "antialias_positions": True}),
    ("dinov2mls-vit-g", {"layers": [10, 20, 30, 39], "layer_fusion": "mean", "norm": "plain", "norm_eps": 1e-5, "antialias_positions": True}),
    ("siglip2-so400m", {}),
    ("siglip2-vit-so400m", {"norm": "affine", "statistics": "imagenet"}),
    ("clip-vit-L", {"norm": "none"}),
    ("pe-vit-l", {"norm": "none", "statistics": "half", "resize": "bilinear"}),
    ("pe-vit-lnorm", {"norm": "affine", "statistics": "half", "resize": "bilinear"}),
    ("eupemls-vit-b16[layers=9.10.11]", {"layers": [9, 10, 11], "layer_fusion": "sum", "norm": "plain", "norm_eps": 1e-5}),
])  # fmt: skip
def test_parameters_of_a_name(name, params):
    found = dict(find_preset(name).params)
    if name == K7:
        assert found.pop("norm") == "plain" and found.pop("norm_eps") == 1e-5
    assert found == params
    assert ("woreg" in name) == (find_preset(name).hub_id == "facebook/dinov2-base")


@pytest.mark.parametrize(("overrides", "message"), [
    (["model.encoder=dinov2-vitb"], r"unknown \(close: .*dinov2-vit-b.*\).*for a folder of your own"),
    (["model.encoder=mae-vit-h"], "unknown"),
    (["model.encoder=clipmls-vit-L"], "unknown"),
    (['model.encoder="dinov3-vit-b16[woreg]"'], r"dinov3 has no flag \[woreg\]"),
    (['model.encoder="dinov3-vit-b16[layers=1.2]"'], r"has no flag \[layers=1.2\]"),
    (["model.encoder=clip-l", "model.encoder_cls=MAEwNorm"], "is a CLIPTower, but model.encoder_cls=MAEwNorm is given"),
    (["model=rae", "model.encoder=clip-l"], "model=rae_encoder"),
])  # fmt: skip
def test_invalid_names_are_rejected(overrides, message):
    with pytest.raises(UserError, match=message):
        ModelSettings.parse(model_node(*overrides))


def test_other_keys_override_those_of_the_name():
    node = model_node(
        "model.encoder=dinov3-l-k23", "model.encoder_config_path=/data/dinov3", "model.encoder_params.layers=k7"
    )
    rae = ModelSettings.parse(node)
    assert rae.encoder_params == {"model_name": "/data/dinov3", "layers": "k7"}
    assert rae.encoder_config_path == "/data/dinov3"
    assert expand_encoder(expand_encoder(node)) == expand_encoder(node)
    params = {"weights": "untrained", "layers": [0, 1]}
    node |= {"encoder": "dinov2-b", "encoder_config_path": "configs/encoder/dinov2_tiny", "encoder_params": params}
    encoder = encoder_of({"model": node}).encoder
    assert encoder.layers == (0, 1) and encoder.source == "configs/encoder/dinov2_tiny" and encoder.untrained


@pytest.mark.parametrize(("config", "name"), [
    ("rae", "dinov2-b"), ("rae_dinov3b", "dinov3-b"), ("rae_siglip", "siglip-so400m"), ("rae_siglip2", "siglip2-b"),
    ("rae_mae", "mae-b"), ("raev2_dinov3l_k7", "dinov3-l-k7"), ("raev2_dinov3l_k23", "dinov3-l-k23"),
])  # fmt: skip
def test_model_configs_match_the_table(config, name):
    written, named = ModelSettings.parse(model_node(f"model={config}")), expand_encoder({"encoder": name})
    assert (written.encoder_cls, written.encoder_config_path) == (named["encoder_cls"], named["encoder_config_path"])
    given = {key: value for key, value in written.encoder_params.items() if value not in (None, True)}
    assert given == named["encoder_params"]


# -- latents that RAEv2's own classes compute under its names (nanovisionx/RAEv2 at 8a0d238, with facebookresearch/dinov2
# and dinov3, openai/CLIP and transformers 4.57.1) on the weights and images below: channels 0, 11, 22 of one token.

S = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
W = S | {"intermediate_size": 128, "patch_size": 16}
BUILT = {
    "dinov2": ("Dinov2WithRegistersModel", S | {"image_size": 518, "patch_size": 14}),
    "woreg": ("Dinov2Model", S | {"image_size": 518, "patch_size": 14}),
    "dinov3": ("DINOv3ViTModel", W | {"num_register_tokens": 4}),
    "siglip2": ("SiglipVisionModel", W | {"image_size": 256}),
    "mae": ("ViTMAEModel", W),
    "clip": ("CLIPVisionModel", W | {"patch_size": 14}),
}
RAEV2_LATENTS = {
    "dinov2-vit-b": [-0.029185, 1.158842, -1.822678],
    "dinov2-vit-b[norm]": [-0.258742, 1.569342, -0.998749],
    "dinov2mls-vit-b[layers=0.2]": [-1.895074, 0.814504, -1.402858],
    "dinov2-vit-bnormworeg": [1.48276, 1.154044, 0.882763],
    "dinov3-vit-l16": [-0.875085, 0.898816, 0.581875],
    "dinov3-vit-l16norm": [0.803543, 1.136157, 1.059395],
    "dinov3mls-vit-l16[layers=0.1.3]": [-0.79858, 1.21852, 1.130904],
    "siglip2-vit-b": [0.975087, 2.009505, 1.62942],
    "siglip2mls-vit-b[layers=0.1]": [2.003301, 3.986689, 3.073898],
    "mae-vit-b": [0.896675, -0.119849, -1.417359],
    "clip-vit-L": [-14.22991, 35.092621, -14.729751],
}


@pytest.mark.parametrize("name", RAEV2_LATENTS)
def test_raev2_names_give_raev2_latents(name, tmp_path: Path):
    model, config = BUILT["woreg" if "woreg" in name else re.split("mls|-", name)[0]]
    kind = getattr(transformers, model)
    built = kind(kind.config_class(**config))
    names, pair = list(dict(built.named_parameters())), ["embeddings.position_embeddings", "embeddings.register_tokens"]
    if set(pair) <= set(names):  # their order depends on the version of transformers
        first = min(names.index(name) for name in pair)
        names[first : first + 2] = pair
    with torch.no_grad():
        for i, parameter in enumerate(map(built.get_parameter, names)):
            wave = torch.sin(torch.arange(parameter.numel()).double() * (0.7 + 0.37 * i) + i).reshape(parameter.shape)
            gain = parameter.ndim == 1 and i % 2 == 0
            parameter.copy_(wave * (0.3 if parameter.ndim > 1 else 0.5) + gain)
    built.save_pretrained(tmp_path)
    t = torch.arange(2 * 3 * 256 * 256).double()
    images = ((torch.sin(t * 0.0137) + torch.sin(t * 0.000931)) / 4 + 0.5).reshape(2, 3, 256, 256).float()
    encoder = expand_encoder({"encoder": name, "encoder_config_path": str(tmp_path)})
    rae = RAE(**encoder, decoder_config_path="configs/decoder/tiny", decoder_patch_size=16, image_size=256)
    assert rae.encode_raw(images)[1, ::11, 7, 3].tolist() == pytest.approx(RAEV2_LATENTS[name], rel=1e-5, abs=1e-5)


# -- the page


def test_encoder_page_has_the_table():
    page = (PROJECT_ROOT / "docs/encoders.md").read_text(encoding="utf-8")
    table = page.split(encoder_table.BEGIN)[1].split(encoder_table.END)[0].strip().splitlines()
    assert [line.split("`")[1] for line in table[2:]] == list(PRESETS)
    assert table[0] == encoder_table.line(encoder_table.HEAD)
    for name in ("dinov2-b", "msn-s", "siglip2-b", "clip-l", "pe-core-t", "aimv2-l"):
        assert encoder_table.line(encoder_table.row(PRESETS[name])) in table
    _, operations = encoder_table.cost(PRESETS["dinov2-b"])
    assert operations == pytest.approx(47e9, rel=0.01)
