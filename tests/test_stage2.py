"""Training of stage 2: losses, random draws, resume, logging and errors."""

import copy
import itertools
import json
import math
import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from src.callbacks.checkpoint import AtomicCheckpointIO
from src.core import random_streams as streams
from src.core.errors import UserError
from src.core.nonfinite import NonFiniteCounter
from src.core.random_streams import Purpose
from src.core.weights import PROJECT_ROOT, read
from src.formats.opening import open_autoencoder
from src.models.dit import build_network, forward_flops
from src.models.encoder_presets import PRESETS, find_preset
from src.training import stage2
from src.training.optimizers import MuonWithAdamW, step_optimizer
from src.training.resume import announce_resume
from src.training.run import run as start
from src.training.stage2 import DiffusionModule
from src.training.stage2_step import FlowDraws
from tests.tiny_models import exported, photos, stir, tiny_rae
from tests.training import SMALL_STAGE2, assert_equal_ends, composed, last, same, train_stage2


def untrained(run):
    """Return the module of a run as it was at its start."""
    return DiffusionModule(**{k: v for k, v in run.config["model"].items() if k != "_target_"})


def test_first_loss_is_that_of_a_zero_output(stage2_run):
    module = untrained(stage2_run[1])
    latents, labels = torch.randn(64, *module.rae.latent_shape), torch.arange(64) % 3
    draws = FlowDraws.at(
        0, {"epoch": 0, "position": torch.arange(64)}, module.rae.latent_shape, torch.device("cpu"), True
    )
    terms = module.step.losses(module.network, latents, labels, draws)
    assert terms["loss"].mean().item() == pytest.approx(2, rel=0.05) and torch.equal(terms["loss"], terms["zero"])
    assert not any(p.requires_grad for p in module.rae.parameters())


def test_training_starts_from_a_pretrained_transformer(stage2_run, tmp_path, caplog):
    """From a checkpoint or an official file, with the same or other labels; both networks start from its EMA weights."""
    folder, run = stage2_run
    state, official = run.module.ema_network.state_dict(), tmp_path / "checkpoint.pt"
    torch.save({"ema": {f"module.{name}": value for name, value in state.items()}, "model": {}}, official)
    model = {name: value for name, value in run.config["model"].items() if name != "_target_"}
    for file in (last(folder), official):
        module = DiffusionModule(**model | {"pretrained_path": str(file)})
        assert same(module.network.state_dict(), state) and same(module.ema_network.state_dict(), state)
    fresh = DiffusionModule(**model | {"num_classes": 5}).network.state_dict()
    assert "label table is not loaded" not in caplog.text
    ours = DiffusionModule(**model | {"num_classes": 5, "pretrained_path": str(official)}).network.state_dict()
    table = "y_embedder.embedding_table.weight"
    assert same(ours, {**state, table: fresh[table]}) and "model.num_classes is not 5" in caplog.text
    torch.save({"format_version": 1, "state_dict": {3: torch.ones(1)}}, tmp_path / "odd.ckpt")
    for name, message in (("odd.ckpt", "does not fit DiTDH"), ("no.pt", "from model.pretrained_path")):
        with pytest.raises(UserError, match=message):
            DiffusionModule(**model | {"pretrained_path": str(tmp_path / name)})


def test_draws_are_functions_of_the_position():
    shape, device, positions = (4, 2, 2), torch.device("cpu"), [4, 2, 7]
    for training, *purposes in (
        (True, Purpose.FLOW_NOISE, Purpose.FLOW_SCALARS),
        (False, Purpose.EVAL_NOISE, Purpose.EVAL_SCALARS),
    ):
        draws = FlowDraws.at(5, {"epoch": 1, "position": torch.tensor(positions)}, shape, device, training)
        assert torch.equal(draws.noise, streams.normals(5, purposes[0], 1, positions, shape, device))
        columns = torch.stack([draws.time, draws.drop, draws.flip], dim=1)
        assert torch.equal(columns, streams.uniforms(5, purposes[1], 1, positions, 3))


def test_validation_uses_ema_weights_and_unchanged_images(stage2_run):
    module, batch = stage2_run[1].module, next(iter(stage2_run[1].datamodule.val_dataloader()))
    draws = FlowDraws.at(module.settings.seed, batch, module.rae.latent_shape, torch.device("cpu"), training=False)
    losses = module.step.losses(module.ema_network, module.rae.encode(batch["image"]), batch["label"], draws)["loss"]
    assert module.scores["val/loss"] == (6, pytest.approx(losses.mean().item(), rel=1e-4))
    quarters = (draws.time * 4).long()
    found = {name: value for name, (_, value) in module.scores.items() if name.startswith("val/loss_q")}
    means = {f"val/loss_q{n + 1}": losses[quarters == n].mean().item() for n in quarters.unique().tolist()}
    assert found == pytest.approx(means, rel=1e-4)


def test_labels_are_dropped_and_images_mirrored_by_the_draws(stage2_run):
    _, run = stage2_run
    step, seen = run.module.step, []
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    quarter = torch.arange(8) / 8
    draws = FlowDraws(torch.randn(8, *run.module.rae.latent_shape), quarter, quarter, quarter)
    encode = step.rae.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(step.rae), "encode", lambda self, x, check: (seen.append(x), encode(x))[1])
        step.latents({"image": images}, draws, training=True)
    assert step.dropped(torch.full((8,), 2), draws).tolist() == [3, 2, 2, 2, 2, 2, 2, 2]  # 0 < 0.1: the null label
    flipped = (draws.flip < 0.5)[:, None, None, None]
    assert torch.equal(seen[0], torch.where(flipped, images.flip(-1), images).float() / 255)


@pytest.mark.parametrize(
    ("stop", "words", "then"),
    [(2, [], []), (3, [], ["model.network.activation_checkpointing=true"]), (4, ["model.optimizer.name=muon"], [])],
)
def test_resume_gives_the_same_run(stage2_run, autoencoder, tmp_path, caplog, stop, words, then):
    if words:
        train_stage2(tmp_path / "whole", autoencoder, *words)
    train_stage2(tmp_path / "first", autoencoder, *words, f"trainer.max_steps={stop}")
    train_stage2(tmp_path / "second", autoencoder, *words, *then, checkpoint=last(tmp_path / "first"))
    assert "differs from the one it resumes" not in caplog.text
    assert_equal_ends(tmp_path / "whole" if words else stage2_run[0], tmp_path / "second")


def test_resume_from_an_incomplete_checkpoint_is_rejected(stage2_run, tmp_path):
    content, load = read(last(stage2_run[0])), DiffusionModule.load_from_checkpoint
    for name, change in {
        "skipped_steps": {}, "optimizer_states": {"optimizer_states": []}, "lr_schedulers": {}, "pytorch-lightning_version": {},
        "config": {"config": "x"}, "loops.fit_loop": {"loops": {}}, "format_version": {},
    }.items():  # fmt: skip
        torch.save({key: v for key, v in content.items() if key != name} | change, tmp_path / "x.ckpt")
        announce = partial(announce_resume, config=stage2_run[1].config, processes=1)
        for read_by in (AtomicCheckpointIO().load_checkpoint, announce, load):
            with pytest.raises(UserError, match=name):
                read_by(tmp_path / "x.ckpt")
    torch.save(content | {"state_dict": dict(list(content["state_dict"].items())[:-1])}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=rf"missing \(1\): {list(content['state_dict'])[-1]}"):
        load(tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="of another model:\n  model.num_classes: checkpoint 3, model 5"):
        load(last(stage2_run[0]), num_classes=5)


def test_longer_run_warns_only_if_its_schedule_changes(stage2_run, caplog):
    config = copy.deepcopy(stage2_run[1].config)
    config["trainer"]["max_epochs"] += 1
    announce_resume(last(stage2_run[0]), config, 1)
    assert " is now " not in caplog.text
    config["model"]["scheduler"]["decay_end_epoch"] += 1
    announce_resume(last(stage2_run[0]), config, 1)
    assert "model.scheduler.decay_end_epoch was 2 and is now 3: this run differs from the one it resumes" in caplog.text


def test_moments_of_another_optimizer_are_rejected(stage2_run, autoencoder, tmp_path):
    with pytest.raises(UserError, match=r"was adamw and is now muon.*Resume with model.optimizer.name=adamw"):
        train_stage2(tmp_path, autoencoder, "model.optimizer.name=muon", checkpoint=last(stage2_run[0]))


def test_micro_batches_give_the_gradient_of_the_whole_batch(stage2_run, autoencoder, tmp_path):
    _, run = stage2_run
    halves = ["data.batch_size=4", "trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=6"]
    other = train_stage2(tmp_path, autoencoder, *halves)
    assert other.trainer.global_step == run.trainer.global_step == 6
    for a, b in zip(run.module.network.parameters(), other.module.network.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-4


def test_logged_values(autoencoder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(stage2, "STUCK_AFTER", 2)
    slow = ["model.optimizer.lr=1e-12", "model.scheduler.final_lr=1e-12", "trainer.log_every_n_steps=2"]
    run = train_stage2(tmp_path, autoencoder, *slow, "callbacks.progress.peak_tflops=0.5")
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()[1:]]
    values = {(int(row[0]), row[1]): float(row[2]) for row in rows}
    names = {name for _, name in values}
    wanted = {"train/loss", "train/grad_norm", "lr/network", "perf/images_per_s", "perf/mfu", "val/loss"}
    assert wanted | {f"train/loss_q{n}" for n in (1, 2, 3, 4)} <= names
    flops = run.module.training_flops()
    assert flops > 3 * forward_flops(run.module.network) > 0  # and the encoder's
    assert values[4, "perf/mfu"] == pytest.approx(values[4, "perf/images_per_s"] * flops / 0.5e12)
    step, loader, losses, quarters = run.module.step, run.datamodule.train_dataloader(), [], []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        for batch in itertools.islice(loader, 3):  # the output stays 0
            draws = FlowDraws.at(run.module.settings.seed, batch, step.rae.latent_shape, torch.device("cpu"), True)
            x = step.latents(batch, draws, training=True)
            losses.append(step.losses(lambda x, *_: torch.zeros_like(x), x, batch["label"], draws)["loss"])
            quarters.append((draws.time * 4).long())
    for at in (2, 4):
        found = {name: value for (number, name), value in values.items() if number == at and "train/loss" in name}
        both, quarter = torch.cat(losses[at - 2 : at]), torch.cat(quarters[at - 2 : at])  # since the previous entry
        means = {f"train/loss_q{n + 1}": both[quarter == n].mean().item() for n in quarter.unique().tolist()}
        assert found == pytest.approx(means | {"train/loss": losses[at - 1].mean().item()}, rel=1e-4)
    assert caplog.text.count("the loss is still 100 % of that of an untrained network: this run is not learning") == 1
    caplog.clear()
    quick = [
        "model.optimizer.lr=1e-2",
        "model.label_std=1",
        "model.network.hidden_size=[64,64]",
        "model.label_dropout=0.999999",
    ]
    run = train_stage2(tmp_path / "b", autoencoder, *quick, "trainer.max_epochs=4")
    assert "is not learning" not in caplog.text
    table, before = (module.network.label_table for module in (run.module, untrained(run)))
    assert [torch.equal(*rows) for rows in zip(table, before, strict=True)] == [True] * 3 + [False]  # null label only
    assert before.detach().std() == pytest.approx(1, rel=0.2)


def test_lightning_does_not_warn_about_overridden_hooks(autoencoder, tmp_path):
    words = [f"model.autoencoder={autoencoder}", f"paths.run_dir={tmp_path / 'run'}", "trainer.max_steps=1"]
    start(composed([*SMALL_STAGE2, *words]))
    warnings = json.loads((tmp_path / "run/run.json").read_text())["warnings"]
    assert any("UNTRAINED" in text for text in warnings) and "overridden" not in " ".join(warnings)


def test_muon_and_adamw_are_those_of_torch_at_the_rate_of_the_first_group():
    layer, given = torch.nn.Linear(4, 3), {"lr": 1e-2, "weight_decay": 0.1}
    twin, optimizer = copy.deepcopy(layer), MuonWithAdamW(layer.parameters(), **given, betas=(0.8, 0.9))
    muon = torch.optim.Muon([twin.weight], **given, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([twin.bias], **given, betas=(0.8, 0.9))
    for lr in (1e-2, 5e-3):
        for network, parts in ((layer, [optimizer]), (twin, [muon, adamw])):
            network(torch.eye(4)).square().sum().backward()
            for part in parts:
                part.param_groups[0]["lr"] = lr
                part.step()
    assert torch.allclose(layer.weight, twin.weight) and torch.allclose(layer.bias, twin.bias)


@pytest.mark.parametrize("kind", [partial(MuonWithAdamW, betas=(0.9, 0.95), weight_decay=0.1), torch.optim.Adafactor])
def test_optimizers_that_are_not_fused_change_nothing_at_non_finite_numbers(kind):
    layer, counter = torch.nn.Linear(4, 3), NonFiniteCounter(1)
    optimizer = kind(layer.parameters(), lr=1e-2)
    before = None
    for loss, changes in ((1.0, True), (math.nan, False), (1.0, True)):
        layer(torch.ones(2, 4)).sum().backward()
        step_optimizer(optimizer, 1e-2, counter, 0, {"loss": torch.tensor(loss)})
        now = copy.deepcopy([layer.state_dict(), optimizer.state_dict()])
        assert same(before, now) != changes
        before = now


@pytest.mark.parametrize(
    ("name", "shape", "millions", "gflop"),
    [("ditdh_xl", (768, 16, 16), 838.7, 323), ("dit_xl", (768, 16, 16), 677.2, 238), ("raev2_dit_k7", (1024, 16, 16), 875.2, 475),
     ("ditdh_s", (768, 16, 16), 196.5, 96.9), ("ditdh_b", (768, 16, 16), 294.3, 131.4), ("ditdh_xl_512", (768, 32, 32), 839.6, 1406),
     ("raev2_dit_k1", (1024, 16, 16), 875.2, 475), ("raev2_dit_k23", (1024, 16, 16), 875.2, 475)],
)  # fmt: skip
def test_every_experiment_has_the_published_size(name, shape, millions, gflop):
    with initialize_config_dir(str(PROJECT_ROOT / "configs"), version_base="1.3"):
        config = compose("train", overrides=[f"experiment={name}"])
    model = OmegaConf.to_container(config.model, resolve=True)
    preset = find_preset(model["autoencoder"]["encoder"])
    assert (preset.size.width, config.data.image_size // 16) == shape[:2]
    DiffusionModule.check_arguments({key: value for key, value in model.items() if key != "_target_"})
    with torch.device("meta"):
        network = build_network(model["network"], shape, model["num_classes"], model["label_dropout"], 0)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert forward_flops(network) / 1e9 == pytest.approx(gflop, rel=0.01)


def test_image_without_a_class_gets_the_null_label(stage2_run):
    _, run = stage2_run
    module = untrained(run)
    module._trainer = run.trainer
    stir(module.ema_network)
    totals, null = [], module.settings.num_classes
    for label in (-1, null, null - 1):
        batch = next(iter(run.datamodule.val_dataloader()))
        module.on_validation_epoch_start()
        batch["label"].fill_(label)
        module.validation_step(module.on_before_batch_transfer(batch, 0), 0)
        totals.append(module._totals)
    assert torch.equal(totals[0], totals[1]) and not torch.equal(totals[1], totals[2])
    module.network.null_label = None
    assert torch.equal(module.on_before_batch_transfer(batch, 0)["label"], batch["label"])
    with pytest.raises(UserError, match=r"images without a class \(label -1\)"):
        module.on_before_batch_transfer(batch | {"label": torch.full_like(batch["label"], -1)}, 0)


def test_validation_loss_does_not_depend_on_the_number_of_processes(stage2_run):
    _, run = stage2_run
    module, totals = untrained(run), []
    stir(module.ema_network)
    for world in (1, 2):
        module.on_validation_epoch_start()
        for rank in range(world):
            module._trainer = SimpleNamespace(world_size=world, global_rank=rank)
            for batch in run.datamodule.evaluation_loader(run.datamodule.evaluation_set(), 8, 18, rank, world):
                module.validation_step(batch, 0)
        totals.append(module._totals)
    assert torch.allclose(*totals, rtol=1e-5), totals


# -- errors


def made(name, autoencoder, folder):
    """Return the file or folder that a name in capitals stands for; write it first."""
    if name == "UNLABELLED":
        return photos(folder / "photos", 40) / "cats"
    if name == "UNLABELLED_VAL":  # train/{cats,dogs}, val/*.png
        tree = photos(folder / "tree/train", 40).parent
        shutil.copytree(tree / "train/cats", tree / "val")
        return tree
    if name == "OTHER":
        torch.save({"mean": None, "var": torch.ones(64, 4, 4), "encoder": {"class": "MAEwNorm"}}, folder / "o.pt")
    elif name == "PLAIN":  # an export without statistics
        return exported(tiny_rae(folder), folder / "plain")
    elif name == "BARE":  # a decoder file without its encoder
        torch.save({}, folder / "o.pt")
        return f"{{decoder: {folder / 'o.pt'}}}"
    elif name == "MOVED":  # an export whose encoder is elsewhere
        place = shutil.copytree(autoencoder, folder / "moved")
        config = json.loads((place / "config.json").read_text())
        config["model"]["encoder_params"]["dinov2_path"] = "/nowhere/encoder"
        (place / "config.json").write_text(json.dumps(config))
        return place
    return folder / "o.pt" if name == "OTHER" else name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.autoencoder=null"], "model.autoencoder is not set"),
        (["model.autoencoder=no.ckpt"], "(from model.autoencoder)"),
        (["model.autoencoder=no"], "(from model.autoencoder)"),
        (["model.network.name=DiT"], "expected one of LightningDiT, DiTDH, RAEv2DiT"),
        (["+model.network.widht=3"], r"unknown key model.network.widht"),
        (["model.num_classes=2"], "3 classes.*model.num_classes=2"),
        (["data.image_size=128"], "^The autoencoder .* works at 64 px, the transformer at 128 px"),
        (["model.autoencoder=BARE"], r"model.autoencoder.encoder is None: .*\(model.autoencoder.encoder dinov2-b"),
        (["model.sampler.t_min=0.9", "model.sampler.t_max=0.1", "model.sampler.cfg=2"], "t_min"),
        (["model.flow.shift=null"], "4096"),
        (["model.sampler.method=dopri5"], "needs torchdiffeq"),
        (["model.label_dropout=2"], "model.label_dropout=2: expected at most 1"),
        (["data.data_dir=UNLABELLED"], "The data has no labels"),
        (["data.data_dir=UNLABELLED_VAL"], "The evaluation images .* have no labels.*trainer.limit_val_batches=0"),
        (["model.statistics=OTHER"], "made with another encoder .*Compute its own with `python src/latent_stats.py`"),
        (["model.statistics=no.pt"], r"no.pt \(from model.statistics\)"),
        (["model.autoencoder=MOVED"], "nowhere/encoder"),
        (["model.autoencoder=PLAIN"], r"no latent statistics.*latent_stats.py.*sample.py .* export both"),
    ],
)
def test_invalid_settings_end_in_one_message(autoencoder, tmp_path, overrides, message):
    overrides = [word.split("=")[0] + f"={made(*word.split('=')[1:], autoencoder, tmp_path)}" for word in overrides]
    with pytest.raises(UserError, match=message):
        train_stage2(tmp_path, autoencoder, *overrides)


def test_released_files_with_the_name_of_a_preset(tmp_path, monkeypatch):
    rae = tiny_rae(tmp_path, statistics=True)
    preset = replace(PRESETS["dinov2-b"], hub_id=rae.encoder.source, params={"weights": "untrained", "layers": [0]})
    monkeypatch.setitem(PRESETS, "dinov2-b", preset)
    torch.save(rae.decoder.state_dict(), tmp_path / "model.pt")
    torch.save({"mean": None, "var": rae.latent_var}, tmp_path / "stat.pt")
    files = [f"model.autoencoder.decoder={tmp_path}/model.pt", f"model.autoencoder.statistics={tmp_path}/stat.pt"]
    where = composed(["experiment=ditdh_xl", *files, f"+model.autoencoder.decoder_config={tmp_path}/decoder.json"])
    opened = open_autoencoder(OmegaConf.to_container(where.model.autoencoder), None, 64).rae
    assert same(dict(opened.decoder.state_dict()), dict(rae.decoder.state_dict()))
    assert opened.latent_mean is None and opened.encoder.layers == (0,)
    path = composed(["experiment=ditdh_xl", "model.autoencoder=somewhere"]).model.autoencoder
    assert path == "somewhere"  # in place of the mapping


@pytest.mark.parametrize(
    ("words", "message"),
    [({"decoder": None}, "model.autoencoder is not set"), ({"encoder": "dinov2-bb"}, "encoder is dinov2-bb: give the name of a preset"),
     ({"decoder": "EXPORT"}, "already sets its encoder: set model.autoencoder="), ({"sttistics": "s"}, "did you mean")],
)  # fmt: skip
def test_invalid_autoencoder_mappings_are_rejected(autoencoder, tmp_path, words, message):
    torch.save({}, tmp_path / "model.pt")
    words = {name: str(autoencoder) if value == "EXPORT" else value for name, value in words.items()}
    with pytest.raises(UserError, match=message):
        open_autoencoder({"encoder": "dinov2-b", "decoder": str(tmp_path / "model.pt"), "statistics": None} | words)
