"""Every encoder family matches transformers' own forward pass, with weights that would expose a mistake."""

import copy
import json
import sys
import weakref
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import DINOv3ViTModel

from src.core.errors import UserError
from src.formats.checkpoint import statistics_digest
from src.models.encoders import ENCODERS, encoder_class
from src.models.frozen_encoder import FrozenEncoder
from src.models.layers import Fusion
from tests.conftest import TINY_ENCODERS

FUSIONS = get_args(Fusion)
TOLERANCE = 1e-5
DEPTH = 4
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
}
WIDE = SMALL | {"intermediate_size": 48}
MAE_DECODER = {
    "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32
}  # fmt: skip
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20}


def tiny(model: str, **config: Any) -> Callable[[], nn.Module]:
    kind = getattr(transformers, model)
    return lambda: kind(kind.config_class(**config))


DINOV2, DINOV3 = SMALL | {"image_size": 56, "patch_size": 14}, WIDE | {"image_size": 64, "num_register_tokens": 4}
AT_64 = WIDE | {"image_size": 64, "patch_size": 16}
# Model to build, our class that reads it, tokens before the patches, image size in px. Positions are learned at 64 (56) px:
# other sizes interpolate.
MODELS = {
    "dinov2": (tiny("Dinov2WithRegistersModel", **DINOV2), "Dinov2withNorm", 5, 56),
    "dinov2, interpolated": (tiny("Dinov2WithRegistersModel", **DINOV2), "Dinov2withNorm", 5, 112),
    "dinov2, 0 registers": (tiny("Dinov2WithRegistersModel", **DINOV2, num_register_tokens=0), "Dinov2withNorm", 1, 56),
    "dinov2, swiglu": (tiny("Dinov2WithRegistersModel", **DINOV2, use_swiglu_ffn=True), "Dinov2withNorm", 5, 56),
    "dinov2 without registers": (tiny("Dinov2Model", **DINOV2), "Dinov2withNorm", 1, 56),
    "dinov2 without registers, interpolated": (tiny("Dinov2Model", **DINOV2), "Dinov2withNorm", 1, 112),
    "webssl": (tiny("Dinov2Model", **DINOV2, use_swiglu_ffn=True, use_mask_token=False), "Dinov2withNorm", 1, 56),
    "dinov3": (tiny("DINOv3ViTModel", **DINOV3), "DINOv3wNorm", 5, 64),
    "dinov3, other size": (tiny("DINOv3ViTModel", **DINOV3), "DINOv3wNorm", 5, 96),
    "dinov3, 0 registers": (tiny("DINOv3ViTModel", **DINOV3 | {"num_register_tokens": 0}), "DINOv3wNorm", 1, 64),
    "dinov3, gated mlp": (tiny("DINOv3ViTModel", **DINOV3, use_gated_mlp=True), "DINOv3wNorm", 5, 64),
    "siglip tower": (tiny("SiglipVisionModel", **AT_64), "SigLIP2wNorm", 0, 64),
    "siglip tower, interpolated": (tiny("SiglipVisionModel", **AT_64), "SigLIP2wNorm", 0, 96),
    "siglip, both towers": (tiny("SiglipModel", text_config=TEXT, vision_config=AT_64), "SigLIP2wNorm", 0, 64),
    "mae": (tiny("ViTMAEModel", **AT_64), "MAEwNorm", 1, 64),
    "mae, interpolated": (tiny("ViTMAEModel", **AT_64), "MAEwNorm", 1, 96),
    "mae, with decoder": (tiny("ViTMAEForPreTraining", **AT_64, **MAE_DECODER), "MAEwNorm", 1, 64),
    "vit": (tiny("ViTForImageClassification", **AT_64), "ViTwNorm", 1, 64),
    "vit, interpolated": (tiny("ViTModel", **AT_64), "ViTwNorm", 1, 96),
    "msn, interpolated": (tiny("ViTMSNModel", **AT_64), "ViTwNorm", 1, 96),
    "i-jepa": (tiny("IJepaModel", **AT_64), "IJEPAwNorm", 0, 64),
    "i-jepa, interpolated": (tiny("IJepaModel", **AT_64), "IJEPAwNorm", 0, 96),
    "clip tower, interpolated": (tiny("CLIPVisionModel", **AT_64), "CLIPTower", 1, 96),
    "clip, both towers": (tiny("CLIPModel", text_config=TEXT, vision_config=AT_64), "CLIPTower", 1, 64),
    "metaclip 2, both towers": (tiny("MetaClip2Model", text_config=TEXT, vision_config=AT_64), "CLIPTower", 1, 64),
    "metaclip 2, interpolated": (tiny("MetaClip2VisionModel", **AT_64), "CLIPTower", 1, 96),
    "aimv2": (tiny("Aimv2VisionModel", **AT_64), "AIMv2wNorm", 0, 64),
    "aimv2, native, other size": (tiny("Aimv2VisionModel", **AT_64, is_native=True), "AIMv2wNorm", 0, 96),
    "c-radio": (tiny("RadioModel", **SMALL, patch_size=16, max_img_size=64), "RADIO", 10, 64),
    "c-radio, interpolated": (tiny("RadioModel", **SMALL, patch_size=16, max_img_size=64), "RADIO", 10, 96),
}  # fmt: skip
ONE_EACH = [
    "dinov2", "dinov3", "siglip, both towers", "mae, with decoder", "vit", "i-jepa", "clip, both towers", "aimv2", "c-radio"
]  # fmt: skip


def build(name: str, folder: Path) -> tuple[nn.Module, type[FrozenEncoder], torch.Tensor]:
    """Save a transformers model in `folder`; return it, our class that reads it, and images for both."""
    make, encoder, _, size = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # gains that aren't 1, biases and tokens that aren't 0
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model, ENCODERS[encoder], torch.randn(2, 3, size, size)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Callable[[str], tuple[Path, nn.Module, type[FrozenEncoder], torch.Tensor]]:
    """Return a cached function of a name: its folder and what `build` returns. Do not modify the results."""

    @cache
    def once(name: str) -> tuple[Path, nn.Module, type[FrozenEncoder], torch.Tensor]:
        folder = tmp_path_factory.mktemp("encoder")
        return folder, *build(name, folder)

    return once


@torch.no_grad()
def reference(model: nn.Module, images: torch.Tensor, skip: int, norm: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Run transformers: return the patch tokens of every block after the final norm, and the last hidden state.

    `norm`: plain drops the final norm's affine parameters, affine keeps them, none skips the norm.
    """
    model = deepcopy(model)
    for part in ("vision_model", "vit"):
        model = getattr(model, part, model)
    options: dict[str, Any] = {"output_hidden_states": True}
    if not type(model).__name__.startswith(("Dinov2", "DINOv3", "Aimv2", "Radio")):
        options["interpolate_pos_encoding"] = True
    if isinstance(model, transformers.ViTMAEModel):
        model.config.mask_ratio = 0.0
        tokens = (images.shape[-1] // model.config.patch_size) ** 2
        options["noise"] = torch.arange(tokens).float().expand(len(images), -1)
    names = ("layernorm", "norm", "post_layernorm", "rms_norm")
    final = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if norm == "plain":
        for parameter, value in zip(final.parameters(), (1.0, 0.0), strict=False):
            parameter.fill_(value)
    output = model(images, **options)
    states = output.hidden_states[1:]
    return [(s if norm == "none" else final(s))[:, skip:] for s in states], output.last_hidden_state[:, skip:]


def fused(states: list[torch.Tensor], layers: list[int], fusion: str) -> torch.Tensor:
    """Apply the formulas of docs/recipe.md, "Encoding"."""
    chosen = torch.stack([states[n] for n in layers])
    if fusion == "sum":
        return chosen.sum(0)
    mean = chosen.mean(0)
    return mean + states[layers[-1]].mean(1, keepdim=True) if fusion == "mean_plus_spatial_mean" else mean


@pytest.mark.parametrize("name", MODELS)
def test_output_is_the_last_hidden_state_without_affine_parameters(name, built):
    folder, model, kind, images = built(name)
    encoder = kind(str(folder))
    assert encoder.prefix_tokens == MODELS[name][2]
    assert encoder.norm == ("none" if kind.__name__ in ("CLIPTower", "RADIO") else "plain")
    side = images.shape[-1] // encoder.patch_size
    if kind.__name__ != "RADIO":  # with its whole final norm; C-RADIO has none
        _, expected = reference(model, images, encoder.prefix_tokens, "affine")
        found = kind(str(folder), norm="none" if kind.__name__ == "CLIPTower" else "affine")(images)
        assert (found - expected).abs().max() < TOLERANCE
    states, expected = reference(model, images, encoder.prefix_tokens, encoder.norm)
    assert (encoder(images) - expected).abs().max() < TOLERANCE * expected.abs().max().clamp(min=1)
    assert (states[-1] - expected).abs().max() < TOLERANCE
    assert expected.shape == (2, side**2, encoder.hidden_size)


def test_positions_of_aimv2_are_resampled_bicubically(built):
    """transformers accepts no other size there: compare with its model of that size and resampled positions."""
    folder, model, kind, _ = built("aimv2")
    other = tiny("Aimv2VisionModel", **AT_64 | {"image_size": 96})().eval()
    positions = "embeddings.position_embedding.weight"
    state = model.state_dict()
    grid = state[positions].T.reshape(1, 32, 4, 4)
    resampled = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    other.load_state_dict(state | {positions: resampled.flatten(2)[0].T})
    images = torch.randn(2, 3, 96, 96)
    states, _ = reference(other, images, 0, "plain")
    assert (kind(str(folder))(images) - states[-1]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_chosen_blocks_in_every_fusion(name, built):
    folder, model, kind, images = built(name)
    states, _ = reference(model, images, MODELS[name][2], kind.default_norm)
    for fusion in FUSIONS:
        encoder = kind(str(folder), layers=[0, 1, DEPTH - 1], layer_fusion=fusion)
        for layers in ([0, 1, DEPTH - 1], [1], [0, 2], list(range(DEPTH))):
            expected = fused(states, layers, fusion)
            bound = TOLERANCE * expected.abs().max().clamp(min=1)
            assert (encoder(images, layers) - expected).abs().max() < bound, (fusion, layers)
        assert torch.equal(encoder(images), encoder(images, [0, 1, DEPTH - 1]))
        assert torch.equal(encoder(images, [2, 0]), encoder(images, [0, 2]))


@pytest.mark.parametrize("name", ONE_EACH)
def test_default_fusion_of_a_family_is_that_of_raev2(name, built):
    folder, _, kind, _ = built(name)
    family = "mean_plus_spatial_mean" if kind.__name__ in ("DINOv3wNorm", "SigLIP2wNorm") else "mean"
    assert kind(str(folder), layers=[1, 3]).layer_fusion == family


# -- compute and memory


@pytest.mark.parametrize("name", ONE_EACH)
def test_blocks_after_the_last_chosen_one_are_not_run(name, built):
    folder, _, kind, images = built(name)
    encoder = kind(str(folder), layers=[0, 2])
    calls = []
    for number, block in enumerate(encoder.blocks()):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    early = encoder(images)
    assert calls == [0, 1, 2]
    for broken in list(encoder.blocks())[3:]:
        for parameter in broken.parameters():
            parameter.fill_(float("nan"))
    assert torch.equal(encoder(images), early)


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_no_block_is_kept_longer_than_needed(name, fusion, built, monkeypatch):
    """While a block runs, only its input and one accumulator are alive: no other block's output, no other latent."""
    folder, _, kind, images = built(name)
    encoder = kind(str(folder), layers=list(range(DEPTH)), layer_fusion=fusion)
    outputs, latents, seen = [], [], []

    def before(*_):
        seen.append((sum(ref() is not None for ref in outputs), sum(ref() is not None for ref in latents)))

    for block in encoder.blocks():
        block.register_forward_pre_hook(before)
        block.register_forward_hook(lambda _, __, output: outputs.append(weakref.ref(output)))
    original = encoder.normalize

    def normalize(tokens):
        latent = original(tokens)
        latents.append(weakref.ref(latent))
        return latent

    monkeypatch.setattr(encoder, "normalize", normalize)
    encoder(images)
    assert seen == [(0, 0)] + [(1, 1)] * (DEPTH - 1)


# -- loading


@pytest.mark.parametrize("name", ONE_EACH)
def test_loading_is_strict(name, tmp_path):
    from safetensors.torch import load_file, save_file

    _, kind, _ = build(name, tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    names = [key for key in state if "1" in key and key.endswith("weight")]
    block = next(key for key in names if not key.startswith(("text_model", "decoder")))
    for content, said in (
        ({k: v for k, v in state.items() if k != block}, "missing"),
        (state | {"stowaway": torch.zeros(1)}, r"unexpected.*stowaway"),
        (state | {block: torch.zeros(3)}, kind.__name__),
    ):
        save_file(content, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=said):
            kind(str(tmp_path))
    file.unlink()
    with pytest.raises(UserError, match="can't be loaded"):
        kind(str(tmp_path))
    assert kind(str(tmp_path), weights="untrained").untrained


def test_identity_changes_with_all_that_a_latent_depends_on(tmp_path):
    model, kind, _ = build("dinov3", tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    one, moved = (kind(str(tmp_path / name), layers=[1, 3]).identity() for name in "ab")
    assert one | {"source": ""} == moved | {"source": ""}
    assert str(tmp_path) not in str(one)
    for options in ({"layers": [2, 3]}, {"layers": [1, 3], "layer_fusion": "mean"}):
        assert kind(str(tmp_path / "a"), **options).identity() != one
    parts = {"norm.bias": False, "embeddings.cls_token": True, "model.layer.2.mlp.up_proj.bias": True}
    for name, changed in parts.items():
        with torch.no_grad():  # the final norm's affine parameters are not used
            model.get_parameter(name).add_(1)
        model.save_pretrained(tmp_path / name)
        assert (kind(str(tmp_path / name), layers=[1, 3]).identity()["weights"] != one["weights"]) == changed
    before, after = (kind(str(tmp_path / name), norm="affine").identity()["weights"] for name in ("a", "norm.bias"))
    assert before != after


@pytest.mark.parametrize(("options", "message"), [
    ({"layers": []}, "is empty: name at least one block"),
    ({"layer_fusion": "median"}, "params.layer_fusion='median': expected mean, mean_plus_spatial_mean or sum"),
    ({"weights": "pretraned"}, "expected pretrained or untrained"),
    ({"norm": "layer"}, "expected plain, affine or none"),
    ({"statistics": "imagenette"}, "expected imagenet, half, clip, none"),
    ({"resize": "lanczos"}, "expected bicubic or bilinear"),
])  # fmt: skip
def test_invalid_options_are_named_before_any_weight_is_read(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(DINOv3ViTModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=message):
        ENCODERS["DINOv3wNorm"](TINY_ENCODERS["DINOv3wNorm"]["model_name"], **options)


def test_wrong_encoder_class_is_rejected():
    with pytest.raises(UserError, match="'dinov3_vit' model, but encoder_cls=Dinov2withNorm"):
        ENCODERS["Dinov2withNorm"](TINY_ENCODERS["DINOv3wNorm"]["model_name"])
    for name, message in {
        "Dinov3": "encoder_cls='Dinov3' is unknown. Expected one of: Dinov2withNorm, DINOv3wNorm",
        "nowhere.Mine": r"encoder_cls='nowhere.Mine': No module named 'nowhere'. Expected package.module.Class",
        "torch.nn.Mine": "encoder_cls='torch.nn.Mine': .* no attribute 'Mine'. Expected package.module.Class",
        "torch.nn.Linear": r"expected a subclass of src\.models\.frozen_encoder\.FrozenEncoder",
    }.items():
        with pytest.raises(UserError, match=message):
            encoder_class(name)


def test_model_without_a_patch_grid_is_rejected_with_the_reason(tmp_path):
    reasons = {"swin": "reduce the number of tokens", "dinov3_convnext": "convolutional", "siglip2": "any aspect ratio"}
    for model_type, reason in reasons.items():
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        with pytest.raises(UserError, match=f"'{model_type}' model, which has no grid of patch tokens: .*{reason}"):
            ENCODERS["SigLIP2wNorm"](str(tmp_path))


def test_identity_contains_options_that_differ_from_the_default(built):
    folder, _, kind, images = built("dinov2 without registers, interpolated")
    plain = kind(str(folder))
    choices = [
        {"norm": "affine"}, {"norm": "none"}, {"norm_eps": 1e-5}, {"statistics": "half"}, {"resize": "bilinear"},
        {"antialias_positions": True},
    ]  # fmt: skip
    found = [kind(str(folder), **choice) for choice in choices]
    assert len({json.dumps(encoder.identity()) for encoder in [plain, *found]}) == 7
    usual = {"norm": "plain", "norm_eps": 1e-6, "resize": "bicubic", "antialias_positions": False}
    assert kind(str(folder), **usual).identity() == plain.identity()
    assert not torch.allclose(found[0](images), plain(images))
    with pytest.raises(UserError, match="RADIO of .* has no final norm"):
        ENCODERS["RADIO"](str(built("c-radio")[0]), norm="affine")


# -- timm


def test_missing_timm_is_an_error_with_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    said = r"TimmViT needs timm, which can't be imported here: .*pip install -e '\.\[timm\]'"
    with pytest.raises(UserError, match=said):
        ENCODERS["TimmViT"]("timm/vit_pe_core_large_patch14_336.fb")


@pytest.mark.parametrize("architecture", ["test_vit", "vit_pe_core_tiny_patch16_384", "vit_tiny_patch16_dinov3_qkvb"])
def test_vit_of_timm(architecture, tmp_path):
    """Match timm's own blocks and final norm at another image size, and after saving. Skipped without timm."""
    pytest.importorskip("timm", exc_type=Exception)
    kind, images = ENCODERS["TimmViT"], torch.randn(2, 3, 96, 96)
    encoder = kind(architecture, weights="untrained", layers=[0, 2])
    states: list[torch.Tensor] = []
    for block in encoder.model.blocks:
        block.register_forward_hook(lambda _, __, output: states.append(output[:, encoder.prefix_tokens :]))
    with torch.no_grad():
        last = encoder.model.forward_features(images)[:, encoder.prefix_tokens :]
    expected = [F.layer_norm(state, state.shape[-1:], eps=encoder.norm_eps) for state in (states[0], states[2])]
    assert (encoder(images) - fused(expected, [0, 1], "mean")).abs().max() < TOLERANCE
    encoder.save(tmp_path, torch.float32)
    assert (kind(str(tmp_path), norm="affine")(images) - last).abs().max() < TOLERANCE
    again = kind(str(tmp_path), layers=[0, 2]).identity()
    assert again | {"source": ""} == {
        **encoder.identity(), "source": "", "weights": encoder.identity()["weights"].removeprefix("untrained "),
    }  # fmt: skip


def test_norm_has_no_affine_parameters_and_the_eps_of_the_model():
    encoder = ENCODERS["MAEwNorm"](**TINY_ENCODERS["MAEwNorm"], weights="untrained")
    tokens = torch.randn(1, 2, encoder.hidden_size) * 1e-5  # so small that an eps of 1e-6 would show
    assert torch.equal(encoder.normalize(tokens), F.layer_norm(tokens, (encoder.hidden_size,), eps=1e-12))


# -- inputs of the whole model


def test_images_of_wrong_range_dtype_or_shape_are_rejected(rae):
    for value in (255.0, -1.0, float("nan"), 1.02):
        for function in (rae.encode, rae):
            with pytest.raises(ValueError, match=f"values from {value:g} to {value:g}"):
                function(torch.full((1, 3, 64, 64), value))
    for images, message in (
        (torch.zeros(1, 3, 64, 64, dtype=torch.int64), "got torch.int64"),
        (torch.zeros(1, 3, 32, 32), r"got \(1, 3, 32, 32\); resize=True"),
        (torch.zeros(3, 64, 64), r"got \(3, 64, 64\)"),
    ):
        with pytest.raises(ValueError, match=message):
            rae.encode(images)


def test_accepted_images(rae):
    images = torch.rand(2, 3, 64, 64).mul(1.018).sub(0.009)  # as resizing overshoots
    latents = rae.encode(images)
    assert torch.equal(rae.encode(images, check=False), latents) and torch.equal(rae(images), rae.decode(latents))
    assert rae.encode(images * 255, check=False).isfinite().all()
    pixels = torch.randint(0, 256, (1, 3, 64, 90), dtype=torch.uint8)
    assert torch.allclose(rae.encode(pixels[..., :64]), rae.encode(pixels[..., :64] / 255), atol=1e-5)
    resized = F.interpolate(pixels / 255, size=(64, 64), mode="bicubic", antialias=True).clamp(0, 1)
    for wide in (pixels, pixels / 255):
        assert torch.allclose(rae.encode(wide, resize=True), rae.encode(resized), atol=1e-5)


def test_half_precision_model_decodes_float32_latents_and_wrong_shapes_are_rejected(rae):
    latents, half = rae.encode(torch.rand(2, 3, 64, 64)), copy.deepcopy(rae).bfloat16()
    decoded = half.decode(latents)
    assert decoded.dtype == torch.bfloat16 and torch.equal(decoded, half.decode(latents.bfloat16()))
    assert half(torch.rand(1, 3, 64, 64)).dtype == torch.bfloat16
    channels = latents.shape[1]
    for wrong in (latents[:, 1:], latents.flatten(2).transpose(1, 2), latents[0]):
        with pytest.raises(ValueError, match=rf"expected latents B x {channels} x h x w, got \({wrong.shape[0]}, "):
            rae.decode(wrong)


def test_noise_of_an_encoded_image_and_latents_of_another_grid(rae):
    images = torch.rand(3, 3, 64, 64)
    raw = rae.encode(images)
    coarse = raw[:, :, 1:, :3]  # 3 x 3, decoded like its interpolation to 4 x 4
    assert torch.allclose(rae.decode(coarse), rae.decode(F.interpolate(coarse, size=4, mode="bilinear")), atol=1e-6)
    with pytest.raises(ValueError, match="square number of tokens, got 12"):
        rae.decode(raw[:, :, :3])
    rae.set_statistics(raw.mean(0), raw.var(0))
    torch.manual_seed(0)
    noisy = rae.encode(images, noise_tau=0.5)
    torch.manual_seed(0)
    sigma = 0.5 * torch.rand(3, 1, 1, 1)
    assert torch.allclose(noisy, rae.normalize(raw + sigma * torch.randn_like(raw)), atol=1e-5)
    digests = set()
    for mean, var in (
        (raw.mean(0), raw.var(0)),
        (raw.mean(0) + 1, raw.var(0)),
        (None, raw.var(0)),
        (raw.mean(0), None),
    ):
        rae.set_statistics(mean, var)
        digests.add(statistics_digest(rae))
    assert len(digests) == 4
