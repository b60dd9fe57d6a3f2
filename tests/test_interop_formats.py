"""The three formats: bit-equal round trips, strict loading, position embeddings, and errors."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.core.errors import UserError
from src.core.key_mapping import NameTable
from src.formats.decoder_files import read_decoder
from src.formats.diffusers import obstacles, read_diffusers, write_diffusers
from src.formats.export import write_official, write_own_statistics, write_statistics
from src.formats.folder import read_folder, write_folder
from src.models.decoder import DecoderConfig, ViTDecoder, are_fixed, fit_positions, sincos_positions
from src.models.rae import RAE
from tests.tiny_models import DECODER, WIDTH, equal_decoders, loaded, tiny_rae


def again(rae, folder, decoder=None, statistics=None, image_size=None, **options):
    """Rebuild the model with weights from `decoder`."""
    source = rae.encoder.source
    return RAE(
        type(rae.encoder).__name__, source, {"dinov2_path": source, "weights": "untrained"}, folder / "decoder.json", 16,
        image_size or rae.geometry.image_size, pretrained_decoder_path=decoder, normalization_stat_path=statistics, **options,
    )  # fmt: skip


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


# -- tables


def test_name_table_maps_in_both_directions():
    table = NameTable([("layers.*.a.*", "encoder.layer.*.b.c.*"), ("**", "x.**")])
    for ours, theirs in {"layers.3.a.weight": "encoder.layer.3.b.c.weight", "norm.bias": "x.norm.bias"}.items():
        assert table.theirs(ours) == theirs and table.ours(theirs) == ours
    assert NameTable([("a.*", "b.*")]).theirs("other.name") == "other.name"


@pytest.mark.parametrize(
    ("size", "width", "depth", "mlp", "heads"),
    [("ViTB", 768, 12, 3072, 12), ("ViTL", 1024, 24, 4096, 16), ("ViTXL", 1152, 28, 4096, 16)],
)
def test_official_names_and_shapes(size, width, depth, mlp, heads):
    with torch.device("meta"):
        config = DecoderConfig.read(f"configs/decoder/{size}")
        state = ViTDecoder(config, latent_channels=768, grid=16, patch_size=16).state_dict()
    expected = {"decoder_embed.weight": (width, 768), "decoder_embed.bias": (width,), "decoder_pos_embed": (1, 257, width), "trainable_cls_token": (1, 1, width),
                "decoder_norm.weight": (width,), "decoder_norm.bias": (width,), "decoder_pred.weight": (768, width), "decoder_pred.bias": (768,)}  # fmt: skip
    for i in range(depth):
        for part, shape in (("attention.attention.query", (width, width)), ("attention.attention.key", (width, width)), ("attention.attention.value", (width, width)),
                            ("attention.output.dense", (width, width)), ("intermediate.dense", (mlp, width)), ("output.dense", (width, mlp))):  # fmt: skip
            expected |= {f"decoder_layers.{i}.{part}.weight": shape, f"decoder_layers.{i}.{part}.bias": shape[:1]}
        for part in ("layernorm_before", "layernorm_after"):
            expected |= {f"decoder_layers.{i}.{part}.weight": (width,), f"decoder_layers.{i}.{part}.bias": (width,)}
    assert {name: tuple(value.shape) for name, value in state.items()} == expected
    assert config.decoder_num_attention_heads == heads


# -- official


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_load_and_keep_their_fixed_positions(tmp_path, dtype):
    rae = tiny_rae(tmp_path)
    write_official(rae, tmp_path, dtype)
    back = again(rae, tmp_path, tmp_path / "model.pt")
    for name, value in back.decoder.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, rae.decoder.state_dict()[name].to(dtype).float())
    assert are_fixed(back.decoder.decoder_pos_embed)


def test_official_training_checkpoint_gives_its_ema(tmp_path):
    rae = tiny_rae(tmp_path)
    state = {f"module._orig_mod.decoder.{name}": value for name, value in rae.decoder.state_dict().items()}
    averaged = {**state, "module._orig_mod.encoder.x": torch.zeros(1)}
    torch.save({"model": {}, "ema": averaged, "step": 3}, tmp_path / "ep-last.pt")
    assert equal_decoders(rae, again(rae, tmp_path, tmp_path / "ep-last.pt"))


def test_missing_and_unexpected_names_are_listed_at_once(tmp_path):
    rae = tiny_rae(tmp_path)
    state = rae.decoder.state_dict()
    del state["decoder_norm.bias"]
    state["decoder_extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"(?s)missing \(1\): decoder_norm.bias.*unexpected \(1\): decoder_extra"):
        again(rae, tmp_path, tmp_path / "model.pt")


# -- positions


def test_fixed_positions_are_recomputed_and_trained_ones_resampled(tmp_path, caplog):
    rae = tiny_rae(tmp_path)  # 4 x 4
    write_official(rae, tmp_path)
    with caplog.at_level("INFO"):
        larger = again(rae, tmp_path, tmp_path / "model.pt", image_size=96)
    assert "recomputed for 6 x 6" in caplog.text
    assert torch.equal(larger.decoder.decoder_pos_embed, sincos_positions(32, 6)[None])

    rae.decoder.decoder_pos_embed.data += 0.02 * torch.randn(1, 17, 32)
    write_official(rae, tmp_path)
    larger = again(rae, tmp_path, tmp_path / "model.pt", image_size=96)
    assert "TRAINED positions" in caplog.text
    found, before = larger.decoder.decoder_pos_embed, rae.decoder.decoder_pos_embed
    assert torch.equal(found[:, 0], before[:, 0])
    grid = before[0, 1:].T.reshape(1, 32, 4, 4)
    expected = torch.nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(found[0, 1:].T.reshape(1, 32, 6, 6), expected)
    assert equal_decoders(rae, again(rae, tmp_path, tmp_path / "model.pt"))  # the same grid: unchanged


def test_resampling_follows_rows_and_columns():
    positions = torch.zeros(1, 17, 4)
    positions[0, 1:, 0] = torch.arange(4).repeat_interleave(4)  # row
    positions[0, 1:, 1] = torch.arange(4).repeat(4)  # column
    found = fit_positions(positions, 8, "a file")[0, 1:].reshape(8, 8, 4)
    assert (found[6, :, 0] > found[1, :, 0]).all() and (found[:, 6, 1] > found[:, 1, 1]).all()
    assert found[..., 0].diff(dim=1).abs().max() < 1e-5 and found[..., 1].diff(dim=0).abs().max() < 1e-5


# -- our folder


@pytest.mark.parametrize("with_encoder", [False, True])
@pytest.mark.parametrize("family", ["dinov2", "mae", "siglip2", "dinov3"])
def test_folder_round_trip_is_bit_equal(out, tmp_path, family, with_encoder):
    rae = tiny_rae(tmp_path, family, statistics=True, noise_tau=0.3)
    write_folder(loaded(rae), out, with_encoder=with_encoder)
    back = read_folder(out)
    images = torch.rand(2, 3, 64, 64)
    assert equal_decoders(rae, back.rae)
    assert torch.equal(back.rae.encode(images), rae.encode(images)) and torch.equal(back.rae(images), rae(images))
    assert back.rae.encoder.identity() | {"source": ""} == rae.encoder.identity() | {"source": ""}
    assert back.rae.noise_tau == 0.3 and not any(p.requires_grad for p in back.rae.parameters())


def test_folder_keeps_layers_denormalisation_and_trained_positions(out, tmp_path):
    rae = tiny_rae(tmp_path, "dinov3", encoder_params={"layers": [0, 1]}, decoder_denormalize=False)
    rae.decoder.decoder_pos_embed.data += 0.1
    write_folder(loaded(rae), out, with_encoder=True)
    back = read_folder(out).rae
    assert back.encoder.layers == (0, 1) and back.encoder.layer_fusion == rae.encoder.layer_fusion
    assert not back.decoder_denormalize
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(back(images), rae(images))


def test_folder_in_half_precision(out, tmp_path):
    rae = tiny_rae(tmp_path)
    write_folder(loaded(rae), out, torch.bfloat16, with_encoder=True)
    back = read_folder(out).rae
    assert torch.equal(back.decoder.decoder_pred.weight, rae.decoder.decoder_pred.weight.bfloat16().float())
    assert (back.encode(torch.rand(1, 3, 64, 64))).dtype == torch.float32


def test_folder_rejects_another_encoder(out, tmp_path):
    rae = tiny_rae(tmp_path)
    write_folder(loaded(rae), out)
    (tmp_path / "other").mkdir()
    config = json.loads((tmp_path / "encoder_dinov2/config.json").read_text()) | {"layer_norm_eps": 1e-5}
    (tmp_path / "other/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"another encoder.*config"):
        read_folder(out, encoder=str(tmp_path / "other"))


def test_folder_serves_as_pretrained_decoder_and_as_statistics(out, tmp_path):
    rae = tiny_rae(tmp_path, statistics=True)
    write_folder(loaded(rae), out)
    with pytest.raises(UserError, match="no latent statistics"):
        again(rae, tmp_path, statistics=out)  # written by write_own_statistics
    write_own_statistics(rae, out, rae.encoder.identity())
    for decoder in (out, out / "model.safetensors", out / "config.json"):
        back = again(rae, tmp_path, decoder, out)
        assert equal_decoders(rae, back) and torch.equal(back.latent_var, rae.latent_var)


def test_sizes_that_shapes_do_not_show_are_compared(out, tmp_path):
    rae = tiny_rae(tmp_path)
    write_folder(loaded(rae), out)
    (tmp_path / "decoder.json").write_text(json.dumps(DECODER | {"decoder_num_attention_heads": 2}))
    with pytest.raises(UserError, match="decoder_num_attention_heads: file 4, model 2"):
        again(rae, tmp_path, out)
    (tmp_path / "decoder.json").write_text(json.dumps(DECODER))
    with pytest.raises(UserError, match="decoder_denormalize: file True, model False"):
        again(rae, tmp_path, out, decoder_denormalize=False)


# -- diffusers


@pytest.mark.parametrize("published_names", [False, True])
@pytest.mark.parametrize("family", ["dinov2", "mae", "siglip2"])
def test_diffusers_round_trip(out, tmp_path, family, published_names):
    rae = tiny_rae(tmp_path, family, 256, statistics=True)
    write_diffusers(rae, out, published_names=published_names)
    names = load_file(out / "diffusion_pytorch_model.safetensors").keys()
    if family == "siglip2":
        assert "encoder.vision_model.embeddings.patch_embedding.weight" in names
    else:
        published = "encoder.layer.0.attention.attention.query.weight"  # older transformers use it themselves
        ours = published_names or published in rae.encoder.model.state_dict()
        assert (f"encoder.{published}" in names) == ours
    back = read_diffusers(out).rae
    assert equal_decoders(rae, back)
    torch.testing.assert_close(back.latent_var, rae.latent_var, rtol=1e-5, atol=1e-7)
    images = torch.rand(1, 3, 256, 256)
    assert torch.equal(back.encode_raw(images), rae.encode_raw(images))
    write_own_statistics(rae, out, rae.encoder.identity())
    exact = read_diffusers(out).rae
    assert torch.equal(exact.latent_var, rae.latent_var) and torch.equal(exact(images), rae(images))
    if family == "dinov2":
        assert equal_decoders(rae, again(rae, tmp_path, out, out))


def test_statistics_that_do_not_belong_to_the_weights_are_ignored(out, tmp_path, caplog):
    rae = tiny_rae(tmp_path, "dinov2", 256, statistics=True)
    write_diffusers(rae, out)
    write_statistics(rae.latent_mean, rae.latent_var + 1, rae.encoder.identity(), out / "stats.pt")
    torch.testing.assert_close(read_diffusers(out).rae.latent_var, rae.latent_var, rtol=1e-5, atol=1e-7)
    assert "does not match the weights" in caplog.text
    for damaged in (torch.ones(3), {"mean": 1.0}):
        torch.save(damaged, out / "stats.pt")
        with pytest.raises(UserError, match="damaged: expected `mean` and `var`"):
            read_diffusers(out)
    torch.save({"mean": rae.latent_mean}, out / "stats.pt")
    assert torch.equal(read_diffusers(out).rae.latent_mean.view(-1), rae.latent_mean.view(-1))


@pytest.mark.parametrize(("make", "reason"), [
    (lambda p: tiny_rae(p, image_size=128), "grid is 8 x 8"),
    (lambda p: tiny_rae(p, image_size=256, decoder_denormalize=False), "decoder_denormalize=false"),
    (lambda p: tiny_rae(p, image_size=256, encoder_params={"layers": [0, 1]}), r"blocks \[0, 1\]"),
    (lambda p: tiny_rae(p, "dinov3", 256), "no DINOv3wNorm"),
    (lambda p: tiny_rae(p, image_size=256, encoder={"num_attention_heads": 2}), "heads are 32 wide"),
    (lambda p: tiny_rae(p, "siglip2", 256, encoder={"image_size": 384}), "image_size=384"),
    (lambda p: tiny_rae(p, "siglip2", 256, encoder={"intermediate_size": 4304}), "intermediate_size=4304"),
    (lambda p: tiny_rae(p, "siglip2", 256, encoder={"vision_use_head": False}), "no pooling head"),
    (lambda p: tiny_rae(p, image_size=256, encoder={"num_register_tokens": 0}), "num_register_tokens=0"),
])  # fmt: skip
def test_models_that_diffusers_can_not_express_are_rejected(tmp_path, make, reason):
    with pytest.raises(UserError, match=reason):
        write_diffusers(make(tmp_path), tmp_path)


def test_trained_positions_are_rejected_for_diffusers(tmp_path):
    rae = tiny_rae(tmp_path, image_size=256)
    assert obstacles(rae) == []
    rae.decoder.decoder_pos_embed.data[0, 5, 3] += 2e-4  # one step of training
    with pytest.raises(UserError, match="positions were trained"):
        write_diffusers(rae, tmp_path)


def test_other_diffusers_configs_are_rejected(tmp_path):
    write_diffusers(tiny_rae(tmp_path, image_size=256), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value, said in (
        ("scaling_factor", 0.5, "0.5"), ("_class_name", "AutoencoderKL", "AutoencoderKL"), ("unknown_key", 1, "unknown_key"),
        ("encoder_type", "clip", "clip"),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError, match=said):
            read_diffusers(tmp_path)


# -- diffusers itself


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("family", ["dinov2", "mae"])
def test_diffusers_encodes_and_decodes_as_we_do(diffusers, tmp_path, family, statistics):
    rae = tiny_rae(tmp_path, family, 256, statistics=statistics)
    for parameter in rae.encoder.parameters():  # otherwise biases are zero and norms one
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    write_diffusers(rae, tmp_path)
    theirs = diffusers.AutoencoderRAE.from_pretrained(tmp_path).eval()
    images = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        latents = rae.encode(images)
        assert (theirs.encode(images).latent - latents).abs().max() < 1e-5
        assert (theirs.decode(latents).sample - rae.decode(latents)).abs().max() < 1e-5
        assert (theirs(images).sample - rae(images)).abs().max() < 1e-5
        assert latents.std() > 0.1


def test_diffusers_can_not_load_siglip2_yet(diffusers, tmp_path):
    """Once this fails, drop the remark of the export and add SigLIP2 to the parity test above."""
    write_diffusers(tiny_rae(tmp_path, "siglip2", 256), tmp_path)
    with pytest.raises(AttributeError, match="vision_model"):
        diffusers.AutoencoderRAE.from_pretrained(tmp_path)


# -- wrong files


def test_wrong_kinds_of_files_are_rejected(tmp_path):
    rae = tiny_rae(tmp_path, statistics=True)
    write_statistics(rae.latent_mean, rae.latent_var, rae.encoder.identity(), tmp_path / "stats.pt")
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-1])
    torch.save([1, 2], tmp_path / "list.pt")
    for name, said in (
        ("stats.pt", "latent statistics, not a decoder"), ("other.safetensors", "holds no decoder"), ("list.pt", "holds a list"),
        ("cut.safetensors", "cut short"),
        ("encoder_dinov2", "dinov2_with_registers"), (".", r"no config\.json of either kind"), ("nothing.pt", "not found"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            read_decoder(tmp_path / name)


@pytest.mark.parametrize("absent", ["mean", "var"])
def test_missing_mean_or_var_counts_as_zero_or_one_and_stays_missing(tmp_path, absent):
    """The released DINOv2-B statistics have `mean: None`."""
    rae = tiny_rae(tmp_path, image_size=256, statistics=True)
    setattr(rae, f"latent_{absent}", None)
    z = rae.encode_raw(torch.rand(1, 3, 256, 256))
    mean = 0 if absent == "mean" else rae.latent_mean
    var = z.new_ones(1) if absent == "var" else rae.latent_var
    whole = (z - mean) / (var + 1e-5).sqrt()
    assert (rae.normalize(z) - whole).abs().max() < 1e-4 and (rae.denormalize(rae.normalize(z)) - z).abs().max() < 1e-4
    for name, write, read in (
        ("official", lambda p: write_official(rae, p), lambda p: again(rae, tmp_path, statistics=p / "stats.pt")),
        ("folder", lambda p: write_folder(loaded(rae), p), lambda p: read_folder(p).rae),
        ("diffusers", lambda p: write_diffusers(rae, p), lambda p: read_diffusers(p).rae),
    ):
        out = tmp_path / name
        out.mkdir()
        write(out)
        write_own_statistics(rae, out, rae.encoder.identity())
        assert torch.load(out / "stats.pt", weights_only=True)[absent] is None
        back = read(out)
        assert getattr(back, f"latent_{absent}") is None, name
        assert torch.equal(back.normalize(z), rae.normalize(z)), name


def test_bad_statistics_are_rejected(tmp_path):
    rae = tiny_rae(tmp_path, statistics=True)
    content = {"mean": rae.latent_mean.clone(), "var": rae.latent_var.clone()}
    for name, change, message in (
        ("mean", lambda t: t * torch.nan, "`mean` holds numbers that are complex, NaN or infinite"),
        ("var", lambda t: t.index_fill(0, torch.tensor([1]), torch.inf), "`var` holds numbers"),
        ("var", lambda t: t - 1, "`var` is negative"),
        ("var", lambda t: t * 0, "`var` is zero everywhere"),
        ("var", lambda t: t + 0j, "complex"),
        ("mean", lambda t: t[:1], "`mean` is"),
        ("mean", lambda t: "text", "`mean` is str"),
    ):
        torch.save(content | {name: change(content[name])}, tmp_path / "stats.pt")
        with pytest.raises(UserError, match=message):
            again(rae, tmp_path, statistics=tmp_path / "stats.pt")


def test_statistics_belong_to_an_encoder_at_any_path_and_to_a_size(tmp_path):
    rae = tiny_rae(tmp_path, statistics=True)
    moved = rae.encoder.identity() | {"source": "elsewhere"}
    write_statistics(rae.latent_mean, rae.latent_var, moved, tmp_path / "stats.pt")
    assert again(rae, tmp_path, statistics=tmp_path / "stats.pt").latent_shape == (WIDTH, 4, 4)
    with pytest.raises(UserError, match="this model's latents are"):
        again(rae, tmp_path, statistics=tmp_path / "stats.pt", image_size=96)
