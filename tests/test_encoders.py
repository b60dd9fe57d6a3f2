"""Every encoder family against transformers' own forward pass, with weights in which a mistake would show."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
)

from src.core.errors import UserError
from src.models.encoders import ENCODERS, encoder_class, preprocessing
from src.models.frozen_encoder import FrozenEncoder
from src.models.layers import FUSIONS
from tests.conftest import TINY_ENCODERS

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

# What to build, the class that reads it, px of the images. Positions are learned at 64 (56) px: other sizes interpolate.
MODELS = {
    "dinov2": (lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, image_size=56)), "Dinov2withNorm", 56),
    "dinov2, interpolated": (lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, image_size=56)), "Dinov2withNorm", 112),
    "dinov2, 0 registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, image_size=56, num_register_tokens=0)), "Dinov2withNorm", 56
    ),
    "dinov2, swiglu": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, image_size=56, use_swiglu_ffn=True)), "Dinov2withNorm", 56
    ),
    "dinov3": (lambda: DINOv3ViTModel(DINOv3ViTConfig(**WIDE, image_size=64, num_register_tokens=4)), "DINOv3wNorm", 64),
    "dinov3, other size": (lambda: DINOv3ViTModel(DINOv3ViTConfig(**WIDE, image_size=64, num_register_tokens=4)), "DINOv3wNorm", 96),
    "dinov3, 0 registers": (lambda: DINOv3ViTModel(DINOv3ViTConfig(**WIDE, image_size=64, num_register_tokens=0)), "DINOv3wNorm", 64),
    "dinov3, gated mlp": (lambda: DINOv3ViTModel(DINOv3ViTConfig(**WIDE, use_gated_mlp=True, num_register_tokens=4)), "DINOv3wNorm", 64),
    "siglip tower": (lambda: SiglipVisionModel(SiglipVisionConfig(**WIDE, image_size=64)), "SigLIP2wNorm", 64),
    "siglip tower, interpolated": (lambda: SiglipVisionModel(SiglipVisionConfig(**WIDE, image_size=64)), "SigLIP2wNorm", 96),
    "siglip, both towers": (
        lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=WIDE | {"image_size": 64, "patch_size": 16})), "SigLIP2wNorm", 64
    ),
    "mae": (lambda: ViTMAEModel(ViTMAEConfig(**WIDE, image_size=64)), "MAEwNorm", 64),
    "mae, interpolated": (lambda: ViTMAEModel(ViTMAEConfig(**WIDE, image_size=64)), "MAEwNorm", 96),
    "mae, with decoder": (lambda: ViTMAEForPreTraining(ViTMAEConfig(**WIDE, **MAE_DECODER, image_size=64)), "MAEwNorm", 64),
}  # fmt: skip
ONE_EACH = ["dinov2", "dinov3", "siglip, both towers", "mae, with decoder"]


def build(name: str, folder: Path) -> tuple[nn.Module, type[FrozenEncoder], torch.Tensor]:
    """A transformers model saved in `folder`, the class of ours that reads it, and images for both."""
    make, encoder, size = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # gains that aren't 1, biases and tokens that aren't 0
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model, ENCODERS[encoder], torch.randn(2, 3, size, size)


def tower(model: nn.Module) -> nn.Module:
    return {"SiglipModel": lambda: model.vision_model, "ViTMAEForPreTraining": lambda: model.vit}.get(
        type(model).__name__, lambda: model
    )()


@torch.no_grad()
def reference(model: nn.Module, images: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """transformers' own pass: patch tokens of every block through the final LayerNorm without affine, and its last hidden state
    once that LayerNorm has lost its affine parameters."""
    model = tower(model)
    options: dict[str, Any] = {"output_hidden_states": True}
    if isinstance(model, (SiglipVisionModel, ViTMAEModel)):
        options["interpolate_pos_encoding"] = True
    if isinstance(model, ViTMAEModel):
        model.config.mask_ratio = 0.0
        options["noise"] = (
            torch.arange((images.shape[-1] // model.config.patch_size) ** 2).float().expand(len(images), -1)
        )
    norm = next(getattr(model, name) for name in ("layernorm", "norm", "post_layernorm") if hasattr(model, name))
    norm.weight = norm.bias = None
    output = model(images, **options)
    skip = getattr(model.config, "num_register_tokens", 0) + (not isinstance(model, SiglipVisionModel))
    return [norm(state)[:, skip:] for state in output.hidden_states[1:]], output.last_hidden_state[:, skip:]


def fused(states: list[torch.Tensor], layers: list[int], fusion: str) -> torch.Tensor:
    """The formulas of recipe section 8."""
    chosen = torch.stack([states[n] for n in layers])
    if fusion == "sum":
        return chosen.sum(0)
    mean = chosen.mean(0)
    return mean + states[layers[-1]].mean(1, keepdim=True) if fusion == "mean_plus_spatial_mean" else mean


@pytest.mark.parametrize("name", MODELS)
def test_the_last_block_is_the_last_hidden_state_without_affine_parameters(name, tmp_path):
    model, kind, images = build(name, tmp_path)
    encoder = kind(str(tmp_path))
    _, expected = reference(model, images)
    assert (encoder(images) - expected).abs().max() < TOLERANCE
    side = images.shape[-1] // encoder.patch_size
    assert expected.shape == (2, side**2, encoder.hidden_size)
    assert encoder.prefix_tokens == getattr(model.config, "num_register_tokens", 0) + (kind.__name__ != "SigLIP2wNorm")


@pytest.mark.parametrize("name", MODELS)
def test_chosen_blocks_in_every_fusion(name, tmp_path):
    model, kind, images = build(name, tmp_path)
    states, _ = reference(model, images)
    for fusion in FUSIONS:
        encoder = kind(str(tmp_path), layers=[0, 1, DEPTH - 1], layer_fusion=fusion)
        for layers in ([0, 1, DEPTH - 1], [1], [0, 2], list(range(DEPTH))):
            expected = fused(states, layers, fusion)
            assert (encoder(images, layers) - expected).abs().max() < TOLERANCE, (fusion, layers)
        assert torch.equal(encoder(images), encoder(images, [0, 1, DEPTH - 1]))
        assert torch.equal(encoder(images, [2, 0]), encoder(images, [0, 2]))


@pytest.mark.parametrize("name", ONE_EACH)
def test_defaults_are_raev2s(name, tmp_path):
    model, kind, images = build(name, tmp_path)
    states, _ = reference(model, images)
    family = "mean_plus_spatial_mean" if kind.__name__ in ("DINOv3wNorm", "SigLIP2wNorm") else "mean"
    several = kind(str(tmp_path), layers=[1, 3])
    assert several.layer_fusion == family
    assert (several(images) - fused(states, [1, 3], family)).abs().max() < TOLERANCE
    for single in (None, "k1", [DEPTH - 1], DEPTH - 1):
        assert (kind(str(tmp_path), layers=single)(images) - states[-1]).abs().max() < TOLERANCE


def test_mae_patches_stay_in_their_order(tmp_path):
    """What changes most when one patch of the image changes is the token of that place."""
    _, kind, _ = build("mae", tmp_path)
    encoder, images = kind(str(tmp_path)), torch.zeros(16, 3, 64, 64)
    for patch in range(16):
        y, x = patch // 4 * 16, patch % 4 * 16
        images[patch, :, y : y + 16, x : x + 16] = 2
    change = (encoder(images) - encoder(torch.zeros(1, 3, 64, 64))).norm(dim=-1)  # B N
    assert change.argmax(dim=1).tolist() == list(range(16))


# -- one pass, nothing kept, nothing run in vain


@pytest.mark.parametrize("name", ONE_EACH)
def test_blocks_after_the_last_chosen_one_are_not_run(name, tmp_path):
    _, kind, images = build(name, tmp_path)
    encoder = kind(str(tmp_path), layers=[0, 2])
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
def test_no_block_is_kept_longer_than_needed(name, fusion, tmp_path, monkeypatch):
    """While a block runs, its input and one accumulator live; no other block's output, no other latent."""
    _, kind, images = build(name, tmp_path)
    encoder = kind(str(tmp_path), layers=list(range(DEPTH)), layer_fusion=fusion)
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


@pytest.mark.parametrize("name", ENCODERS)
def test_frozen_stays_frozen(name):
    encoder = ENCODERS[name](**TINY_ENCODERS[name], weights="untrained")
    encoder.train()
    encoder.train(True)
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    images = torch.randn(1, 3, 8 * encoder.patch_size, 8 * encoder.patch_size, requires_grad=True)
    first = encoder(images)
    assert not first.requires_grad
    nn.Sequential(encoder).train()
    assert torch.equal(encoder(images), first)


# -- loading


@pytest.mark.parametrize("name", ONE_EACH)
def test_loading_is_strict(name, tmp_path):
    from safetensors.torch import load_file, save_file

    _, kind, _ = build(name, tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    block = next(
        key for key in state if "1" in key and key.endswith("weight") and not key.startswith(("text_model", "decoder"))
    )
    save_file({k: v for k, v in state.items() if k != block}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="missing"):
        kind(str(tmp_path))
    save_file(state | {"stowaway": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"unexpected.*stowaway"):
        kind(str(tmp_path))
    save_file(state | {block: torch.zeros(3)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=kind.__name__):
        kind(str(tmp_path))
    file.unlink()
    with pytest.raises(UserError, match="can't be loaded"):
        kind(str(tmp_path))
    assert kind(str(tmp_path), weights="untrained").untrained


@pytest.mark.parametrize("name", ENCODERS)
def test_untrained_weights_are_seeded_and_leave_the_generator_alone(name):
    before = torch.get_rng_state()
    first, again, other = (ENCODERS[name](**TINY_ENCODERS[name], weights="untrained", seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert first.identity() == again.identity() != other.identity()
    assert first.identity()["weights"].startswith("untrained")


def test_identity_follows_what_a_latent_depends_on(tmp_path):
    model, kind, _ = build("dinov3", tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    one, moved = (
        kind(str(tmp_path / "a"), layers=[1, 3]).identity(),
        kind(str(tmp_path / "b"), layers=[1, 3]).identity(),
    )
    assert one | {"source": ""} == moved | {"source": ""}
    assert str(tmp_path) not in str(one)
    for options in ({"layers": [2, 3]}, {"layers": [1, 3], "layer_fusion": "mean"}):
        assert kind(str(tmp_path / "a"), **options).identity() != one
    for name, changed in (
        ("norm.bias", False),
        ("embeddings.cls_token", True),
        ("model.layer.2.mlp.up_proj.bias", True),
    ):
        with torch.no_grad():  # the final norm loses its affine parameters, so they make no difference
            model.get_parameter(name).add_(1)
        model.save_pretrained(tmp_path / name)
        assert (kind(str(tmp_path / name), layers=[1, 3]).identity()["weights"] != one["weights"]) == changed


@pytest.mark.parametrize(("options", "message"), [
    ({"layers": []}, "is empty: name at least one block"),
    ({"layers": [1, 4]}, r"4 blocks, numbered 0 to 3; got \[4\]"),
    ({"layers": "k7"}, "needs more than the 4 blocks of this encoder. Names that fit: k1"),
    ({"layers": "k9"}, "expected null, k1, k7, k23"),
    ({"layer_fusion": "median"}, "unknown to DINOv3wNorm: expected mean, mean_plus_spatial_mean, sum"),
    ({"weights": "pretraned"}, "expected pretrained or untrained"),
])  # fmt: skip
def test_mistakes_are_named_before_any_weight_is_read(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(DINOv3ViTModel, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=message):
        ENCODERS["DINOv3wNorm"](TINY_ENCODERS["DINOv3wNorm"]["model_name"], **options)


def test_a_model_of_another_family_is_refused():
    with pytest.raises(UserError, match="'dinov3_vit' model, but encoder_cls=Dinov2withNorm"):
        ENCODERS["Dinov2withNorm"](TINY_ENCODERS["DINOv3wNorm"]["model_name"])
    with pytest.raises(
        UserError, match=r"encoder_cls='Dinov3' is unknown. Expected one of: Dinov2withNorm, DINOv3wNorm"
    ):
        encoder_class("Dinov3")


def test_preprocessing_statistics(tmp_path):
    siglip, dino = ENCODERS["SigLIP2wNorm"], ENCODERS["DINOv3wNorm"]
    assert preprocessing(str(tmp_path), siglip)[0] == (0.5, 0.5, 0.5)
    assert preprocessing(str(tmp_path), dino) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    assert preprocessing(str(tmp_path), dino) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_the_norm_has_no_affine_parameters_and_the_models_own_eps():
    encoder = ENCODERS["MAEwNorm"](**TINY_ENCODERS["MAEwNorm"], weights="untrained")
    tokens = torch.randn(1, 2, encoder.hidden_size) * 1e-5  # where an eps of 1e-6 would show
    assert torch.equal(encoder.normalize(tokens), F.layer_norm(tokens, (encoder.hidden_size,), eps=1e-12))
