"""RAEv2 end to end: experiments, latents of several blocks, decoder and statistics files, training on random subsets."""

from contextlib import contextmanager

import pytest
import torch
from omegaconf import OmegaConf

from src.core.distributed import Launch
from src.core.errors import UserError
from src.core.text import flat
from src.formats.decoder_files import read_statistics
from src.models.decoder import sincos_positions, unpatchify
from src.models.frozen_encoder import FrozenEncoder
from src.training.run import build_run
from src.training.stage1 import parts_to_compile
from tests.conftest import make_rae
from tests.training import composed, same, train

DEEP = {"encoder_cls": "DINOv3wNorm", "encoder_params": {"layers": [0, 1, 3]}}
LARGE = "facebook/dinov3-vitl16-pretrain-lvd1689m"
BASE = "facebook/dinov3-vitb16-pretrain-lvd1689m"

# Differences from plain RAE (whose settings tests/test_configs.py checks).
DINOV3 = {"model.encoder_cls": "DINOv3wNorm", "model.encoder_params.layer_fusion": None}
RAEV2 = DINOV3 | {
    "model.encoder_config_path": LARGE, "model.encoder_params.model_name": LARGE, "model.decoder_denormalize": False, "model.compile": True,
    "data.train_crop": "center", "trainer.precision": "bf16",
}  # fmt: skip
EXPERIMENTS = {
    "raev2_dinov3l_k7": RAEV2 | {"model.encoder_params.layers": "k7"},
    "raev2_dinov3l_k23": RAEV2 | {"model.encoder_params.layers": "k23"},
    "rae_dinov3b": DINOV3 | {"model.encoder_config_path": BASE, "model.encoder_params.model_name": BASE, "model.encoder_params.layers": None},
}  # fmt: skip


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_are_the_published_recipe(experiment):
    plain, ours = (
        {group: OmegaConf.to_container(config[group], resolve=True) for group in ("model", "data", "trainer")}
        for config in (composed(["experiment=rae_dino"]), composed([f"experiment={experiment}"]))
    )
    plain, ours = flat(plain), flat(ours)
    found = {key: value for key, value in ours.items() if key not in plain or plain[key] != value}
    free = {"data.batch_size", "data.num_workers", "trainer.precision"} - EXPERIMENTS[experiment].keys()
    assert {key: value for key, value in found.items() if key not in free} == EXPERIMENTS[experiment]
    assert {key.split(".")[-1] for key in plain.keys() - ours.keys()} == {"dinov2_path", "normalize"}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_dummy_siblings_differ_in_sizes_only(experiment):
    """All that defines the latent, the image and the crops is the same; `model=` selects the real networks."""
    real, dummy = composed([f"experiment={experiment}"]), composed([f"experiment={experiment}_dummy"])
    for key in ("model.encoder_cls", "model.encoder_params.layers", "model.encoder_params.layer_fusion", "model.decoder_denormalize",
                "data.train_crop", "model.decoder_patch_size", "trainer.precision"):  # fmt: skip
        assert OmegaConf.select(dummy, key) == OmegaConf.select(real, key), key
    swapped = composed([f"experiment={experiment}_dummy", f"model={experiment}"])
    assert swapped.model.encoder_params == real.model.encoder_params


def small(experiment, *more):
    return [f"experiment={experiment}_dummy", "~callbacks.rfid", "data.image_size=64", "data.batch_size=2", "data.num_workers=0",
            "trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu",
            "model.sample_every=0", "logger=csv", *more]  # fmt: skip


@pytest.mark.parametrize(("experiment", "blocks"), [
    ("raev2_dinov3l_k7", [11, 13, 15, 17, 19, 21, 23]), ("raev2_dinov3l_k23", list(range(1, 24))), ("rae_dinov3b", [3])
])  # fmt: skip
def test_dummy_siblings_train_through_every_phase(experiment, blocks, tmp_path):
    run = train(tmp_path, *small(experiment), small=False)
    encoder = run.module.rae.encoder
    assert list(encoder.layers) == blocks
    assert encoder.layer_fusion == ("mean" if experiment == "rae_dinov3b" else "mean_plus_spatial_mean")
    assert run.trainer.global_step == 4
    assert {"train/l1", "train/lpips", "train/gan", "disc/loss"} <= run.module.train_terms.keys()
    assert all(torch.isfinite(value) for value in run.module.train_terms.values())


# -- training on random subsets


@contextmanager
def recorded():
    """Record the `layers` of each call of the encoder; None is its default."""
    asked, original = [], FrozenEncoder.forward

    def forward(self, images, layers=None):
        asked.append(layers)
        return original(self, images, layers)

    FrozenEncoder.forward = forward
    try:
        yield asked
    finally:
        FrozenEncoder.forward = original


L1_ONLY = ["model.disc_weight=0", "model.perceptual_weight=0"]
SUBSETS = small("raev2_dinov3l_k7", "model.layer_subset.kind=uniform", *L1_ONLY)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Train four updates in two epochs on random subsets; return the Run, its folder and the recorded layers."""
    folder = tmp_path_factory.mktemp("whole")
    with recorded() as asked:
        run = train(folder, *SUBSETS, small=False)
    return run, folder, asked


def test_training_uses_the_subset_of_each_step_and_evaluation_all_blocks(whole):
    run, _, asked = whole
    subsets = [run.module.noise.blocks(step) for step in range(4)]
    assert [layers for layers in asked if layers is not None] == subsets
    assert len(set(subsets)) > 1
    assert all(set(subset) <= set(run.module.rae.encoder.layers) for subset in subsets)
    assert asked.count(None) >= 2  # two validations


def test_resumed_run_continues_with_the_same_subsets(whole, tmp_path):
    run, folder, asked = whole
    with recorded() as rest:
        resumed = train(tmp_path, *SUBSETS, small=False, checkpoint=folder / "checkpoints/epoch_001.ckpt")
    taken = [layers for layers in rest if layers is not None]
    assert taken == [layers for layers in asked if layers is not None][2:]
    assert len(taken) == 2
    assert same(dict(resumed.module.state_dict()), dict(run.module.state_dict()))


def test_accumulated_micro_batches_share_the_subset_of_their_step(tmp_path):
    halved = ["trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=4"]
    with recorded() as asked:
        run = train(tmp_path, *SUBSETS, *halved, "trainer.max_epochs=1", "trainer.limit_val_batches=0", small=False)
    first, second = (run.module.noise.blocks(step) for step in range(2))
    assert [layers for layers in asked if layers is not None] == [first, first, second, second]


# -- RAEv2's files


def test_released_decoder_and_its_statistics_load(tmp_path):
    """Official names, trained positions (taken from the file), statistics without an encoder identity."""
    trained = make_rae(**DEEP, decoder_denormalize=False, train_positions=True)
    with torch.no_grad():
        for parameter in trained.decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    torch.save(trained.decoder.state_dict(), tmp_path / "decoder.pt")
    stats = {"mean": torch.randn(trained.latent_shape), "var": torch.rand(trained.latent_shape) + 0.1}
    torch.save(stats, tmp_path / "stats.pt")
    files = {"pretrained_decoder_path": tmp_path / "decoder.pt", "normalization_stat_path": tmp_path / "stats.pt"}
    loaded = make_rae(**DEEP, decoder_denormalize=False, **files)
    images = torch.rand(2, 3, 64, 64)
    trained.set_statistics(stats["mean"], stats["var"])
    assert torch.equal(loaded(images), trained(images))
    fixed = sincos_positions(loaded.decoder.config.decoder_hidden_size, 4)
    assert not torch.allclose(loaded.decoder.decoder_pos_embed[0], fixed)


def test_image_is_the_output_of_the_decoder():
    """decoder_denormalize: false leaves the patches as they are (RAEv2), true applies the encoder's std and mean (RAE)."""
    plain, scaled = (make_rae(**DEEP, decoder_denormalize=flag) for flag in (False, True))
    latents = torch.randn(1, *plain.latent_shape)
    pixels = unpatchify(plain.decoder(latents.flatten(2).transpose(1, 2)), 16)
    assert torch.equal(plain.decode(latents), pixels)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    assert torch.allclose(scaled.decode(latents), pixels * std + mean, atol=1e-6)


def test_statistics_of_other_blocks_are_rejected(tmp_path, caplog):
    """The width is the same: only the encoder identity in the file differs."""
    rae, file = make_rae(**DEEP), tmp_path / "stats.pt"
    content = {"mean": torch.zeros(rae.latent_shape), "var": torch.ones(rae.latent_shape)}
    torch.save(content | {"encoder": rae.encoder.identity()}, file)
    read_statistics(file, rae.latent_shape, rae.encoder.identity())
    assert "no `var`" not in caplog.text
    torch.save({"mean": content["mean"], "std": content["var"]}, tmp_path / "std.pt")  # of another tool
    read_statistics(tmp_path / "std.pt", rae.latent_shape, rae.encoder.identity())
    assert "std.pt has no `var`" in caplog.text
    fused = r"another encoder \(layer_fusion: .*; layers: file \[3\], model \[0, 1, 3\]\).*src/latent_stats.py"
    for changes, message in (
        ({"layers": "k1"}, fused),
        ({"layers": [0, 3]}, r"\(layers: file \[0, 3\], model \[0, 1, 3\]\)"),
        ({"layer_fusion": "sum"}, "layer_fusion: file 'sum', model 'mean_plus_spatial_mean'"),
        ({"seed": 1}, "weights: file 'untrained"),
    ):
        other = make_rae(**{**DEEP, "encoder_params": DEEP["encoder_params"] | changes}).encoder.identity()
        torch.save(content | {"encoder": other}, file)
        with pytest.raises(UserError, match=message):
            make_rae(**DEEP, normalization_stat_path=file)


def test_checkpoint_of_other_blocks_is_rejected(whole, tmp_path):
    with pytest.raises(UserError, match=r"of another model:\n  layers: checkpoint \[11, .*, model \[1, 2, "):
        last = whole[1] / "checkpoints/last.ckpt"
        train(tmp_path, *SUBSETS, "model.encoder_params.layers=k23", small=False, checkpoint=last)


@pytest.mark.parametrize(("overrides", "message"), [
    (["model.encoder_params.layers=11.13"], r"decimal number. Write a list"),
    (["model.encoder_params.layers=k1", "model.layer_subset.kind=uniform"], "needs several blocks to choose from"),
    (["model.generated.checkpoint=x.ckpt", "model.layer_subset.kind=uniform"], "exclude each other"),
    (["model.generated.checkpoint=x.ckpt"], r"generated.checkpoint=x.ckpt: Checkpoint not found"),
])  # fmt: skip
def test_invalid_overrides_are_rejected(overrides, message, tmp_path):
    config = composed([*small("raev2_dinov3l_k7"), *overrides, f"paths.run_dir={tmp_path}"])
    with pytest.raises(UserError, match=message):
        build_run(config, Launch(0, 1, "single"))


def test_blocks_joined_by_dots_are_compiled_one_by_one(tmp_path):
    """Compiling the encoder's transformers model as a whole would have no effect."""
    config = composed([*small("raev2_dinov3l_k7"), "model.encoder_params.layers=11.13.23", f"paths.run_dir={tmp_path}"])
    module = build_run(config, Launch(0, 1, "single")).module
    assert module.rae.encoder.layers == (11, 13, 23)
    parts = parts_to_compile(module.rae, module.ema_decoder, None, None)
    assert {id(block) for block in module.rae.encoder.blocks()} <= {id(part) for part in parts}
