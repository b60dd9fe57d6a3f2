"""Stage 2: training on latents, resume, sampling that goes on, and what is refused."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from src.core import random_streams as streams
from src.core.errors import UserError
from src.core.random_streams import Purpose
from src.core.weights import PROJECT_ROOT, read
from src.data.latents import LatentStore, LatentWriter
from src.evaluation.images import open_images
from src.export import main as export
from src.formats.export import write_own_statistics
from src.formats.folder import write_folder
from src.formats.opening import open_autoencoder
from src.formats.stage2 import foreign_weights, open_generator
from src.models.dit import build_network, forward_flops
from src.models.encoder_presets import PRESETS, find_preset
from src.reconstruct import main as reconstruct
from src.sample import main as sample
from src.training import stage2
from src.training.generated_latents import GeneratedLatents
from src.training.optimizers import MuonWithAdamW
from src.training.settings import GeneratedLatentsSettings
from src.training.stage2 import DiffusionModule
from src.training.stage2_step import FlowDraws
from tests.test_ecosystem import theirs
from tests.tiny_models import loaded, photos, tiny_rae, two_processes
from tests.training import assert_equal_ends, composed, last, same, train

SMALL = [
    "experiment=dit_dummy", "data.batch_size=8", "data.num_workers=0", "trainer.accelerator=cpu", "trainer.max_epochs=2", "trainer.limit_train_batches=3",
    "trainer.limit_val_batches=1", "trainer.check_val_every_n_epoch=1", "trainer.log_every_n_steps=1", "model.sample_every=0", "callbacks.checkpoint.every_n_steps=1",
    "~callbacks.samples", "logger=csv", "model.network.hidden_size=[32,48]", "model.network.depth=[1,1]", "model.network.num_heads=[2,2]",
    "model.sampler.num_steps=4",
]  # fmt: skip


def fit(folder, autoencoder, *words, checkpoint=None):
    return train(folder, *SMALL, f"model.autoencoder={autoencoder}", *words, small=False, checkpoint=checkpoint)


@pytest.fixture(scope="module")
def whole(autoencoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(folder, autoencoder)


def test_the_first_loss_is_that_of_the_output_zero(whole, autoencoder):
    _, run = whole
    module = DiffusionModule(**{k: v for k, v in run.config["model"].items() if k != "_target_"})
    latents, labels = torch.randn(64, *module.rae.latent_shape), torch.arange(64) % 3
    draws = FlowDraws.at(
        0, {"epoch": 0, "position": torch.arange(64)}, module.rae.latent_shape, torch.device("cpu"), True
    )
    terms = module.step.losses(module.network, latents, labels, draws)
    assert terms["loss"].mean().item() == pytest.approx(2, rel=0.05) and torch.equal(terms["loss"], terms["zero"])
    assert not any(p.requires_grad for p in module.rae.parameters())


def test_draws_are_functions_of_the_position():
    shape, device = (4, 2, 2), torch.device("cpu")
    one = FlowDraws.at(5, {"epoch": 1, "position": torch.arange(6)}, shape, device, True)
    two = FlowDraws.at(5, {"epoch": 1, "position": torch.tensor([4, 2])}, shape, device, True)
    for name in ("noise", "time", "drop", "flip"):
        assert torch.equal(getattr(one, name)[[4, 2]], getattr(two, name)), name
    other = FlowDraws.at(5, {"epoch": 2, "position": torch.arange(6)}, shape, device, True)
    assert not torch.equal(one.noise, other.noise) and not torch.equal(one.time, other.time)


def test_labels_are_dropped_and_images_mirrored_by_the_draws(whole):
    _, run = whole
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


def test_lightnings_callbacks_beside_ours(whole, autoencoder, tmp_path):
    """A file of ModelCheckpoint resumes as ours; EarlyStopping sees what is logged."""
    folder, stops = tmp_path / "first", [f"callbacks.early_stopping.{word}" for word in ("patience=1", "min_delta=9")]
    stops = ["callbacks=[generation,early_stopping]", *stops, "trainer.max_epochs=4"]
    run = fit(folder, autoencoder, *theirs(folder), *stops)
    assert run.trainer.current_epoch == 2 and {"val/loss", "lr/network"} <= run.trainer.callback_metrics.keys()
    fit(tmp_path / "second", autoencoder, checkpoint=folder / "by_step/epoch=0-step=2.ckpt")
    assert_equal_ends(whole[0], tmp_path / "second")


@pytest.mark.parametrize(("stop", "words"), [(2, []), (3, []), (4, ["model.optimizer.name=muon"])])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(whole, autoencoder, tmp_path, stop, words):
    if words:
        fit(tmp_path / "whole", autoencoder, *words)
    fit(tmp_path / "first", autoencoder, *words, f"trainer.max_steps={stop}")
    fit(tmp_path / "second", autoencoder, *words, checkpoint=last(tmp_path / "first"))
    assert_equal_ends(tmp_path / "whole" if words else whole[0], tmp_path / "second")


def test_micro_batches_make_the_gradient_of_the_whole_batch(whole, autoencoder, tmp_path):
    _, run = whole
    halves = ["data.batch_size=4", "trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=6"]
    other = fit(tmp_path, autoencoder, *halves)
    assert other.trainer.global_step == run.trainer.global_step == 6
    for a, b in zip(run.module.network.parameters(), other.module.network.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-4


def test_what_is_logged(autoencoder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(stage2, "STUCK_AFTER", 2)
    slow = ["model.optimizer.lr=1e-12", "model.scheduler.final_lr=1e-12"]
    run = fit(tmp_path, autoencoder, *slow, "callbacks.progress.peak_tflops=0.5")
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()[1:]]
    values = {(int(row[0]), row[1]): float(row[2]) for row in rows}
    names = {name for _, name in values}
    wanted = {"train/loss", "train/grad_norm", "lr/network", "perf/images_per_s", "perf/mfu", "val/loss"}
    assert wanted | {f"train/loss_q{n}" for n in (1, 2, 3, 4)} <= names
    flops = run.module.training_flops()
    assert flops > 3 * forward_flops(run.module.network) > 0  # and the encoder's
    assert values[3, "perf/mfu"] == pytest.approx(values[3, "perf/images_per_s"] * flops / 0.5e12)
    assert [record.getMessage() for record in caplog.records if "is not learning" in record.getMessage()] == [
        "After 2 updates the loss is still 100 % of that of an untrained network: this run is not learning. Is the network at least "
        "as wide as the latent (64 channels)? Are the statistics those of this encoder? Is the learning rate right?"
    ]
    caplog.clear()
    quick = ["model.optimizer.lr=1e-2", "model.label_std=1", "model.network.hidden_size=[64,64]"]
    fit(tmp_path / "b", autoencoder, *quick, "trainer.max_epochs=4")
    assert "is not learning" not in caplog.text


def test_muon_leaves_weights_and_moments_alone_where_a_number_is_not_finite():
    layer = torch.nn.Linear(4, 3)
    optimizer = MuonWithAdamW(layer.parameters(), 1e-2, (0.9, 0.95), 0.0)
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    before = [p.clone() for p in layer.parameters()], optimizer.state_dict()
    kept = [{k: v.clone() for k, v in s.items()} for part in before[1].values() for s in part["state"].values()]
    for bad, changes in ((1.0, False), (0.0, True)):
        optimizer.found_inf = torch.tensor(bad)
        optimizer.step()
        moved = not all(torch.equal(a, b) for a, b in zip(before[0], layer.parameters(), strict=True))
        now = [s for part in optimizer.state_dict().values() for s in part["state"].values()]
        assert moved == changes and same(kept, now) != changes


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
    assert find_preset(model["autoencoder"]["encoder"]).latent_shape(config.data.image_size) == shape
    DiffusionModule.check_arguments({key: value for key, value in model.items() if key != "_target_"})
    with torch.device("meta"):
        network = build_network(model["network"], shape, model["num_classes"], model["label_dropout"], 0)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert forward_flops(network) / 1e9 == pytest.approx(gflop, rel=0.01)


# -- stored latents


@pytest.fixture(scope="module")
def stores(whole, autoencoder, tmp_path_factory):
    """Latents of the dummy's first images, raw and normalised, in several shards."""
    folder = tmp_path_factory.mktemp("stores")
    words = f"--decoder {autoencoder} --input data/dummy_dataset_hf --num_samples 60 --device cpu --num_workers 0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentWriter.__init__, "__defaults__", (20 * 64 * 16 * 4,))  # shards of 20
        for scale in ("raw", "normalized"):
            assert reconstruct([*words.split(), "--latents", scale, "--output", str(folder / scale)]) == 0
    return {scale: folder / scale / "latents" for scale in ("raw", "normalized")}


def on_latents(folder, store, autoencoder, *words, checkpoint=None):
    return fit(folder, autoencoder, f"data.data_dir={store}", *words, checkpoint=checkpoint)


def test_training_from_stored_latents_is_training_from_their_images(stores, autoencoder, tmp_path):
    source = LatentStore(stores["raw"])
    assert len(source.files) == 3 and source.num_classes == 3 and source.class_names == ["red", "green", "blue"]
    plain = [
        "data.train_split=0.9999",
        "model.flip_probability=0",
        "trainer.max_steps=1",
        "trainer.limit_val_batches=0",
    ]
    image = fit(tmp_path / "images", autoencoder, *plain)  # the same rows in the same order, encoded online
    batch = next(iter(on_latents(tmp_path / "raw", stores["raw"], autoencoder).datamodule.train_dataloader()))
    assert batch["latent"].dtype == torch.float32 and "image" not in batch
    rows = dict(zip(batch["index"].tolist(), batch["latent"], strict=True))
    data = image.datamodule.splits.train
    for row, latent in rows.items():
        picture = torch.from_numpy(image.datamodule.evaluation_transform(data.encoded(row)).copy()).permute(2, 0, 1)
        assert (image.module.rae.encode_raw(picture[None])[0] - latent).abs().max() < 1e-4
        assert source.label(row) == data.label(row)
    ends = [
        dict(on_latents(tmp_path / scale, stores[scale], autoencoder).module.network.named_parameters())
        for scale in stores
    ]
    for name, value in ends[0].items():
        assert (value - ends[1][name]).abs().max() < 1e-3, name


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resume_on_stored_latents_is_exact(stores, autoencoder, tmp_path, workers):
    store, more = stores["normalized"], f"data.num_workers={workers}"
    on_latents(tmp_path / "whole", store, autoencoder)
    on_latents(tmp_path / "first", store, autoencoder, more, "trainer.max_steps=4")
    on_latents(tmp_path / "second", store, autoencoder, more, checkpoint=last(tmp_path / "first"))
    assert_equal_ends(tmp_path / "whole", tmp_path / "second")


def test_stored_latents_that_do_not_fit(stores, autoencoder, tmp_path):
    other = shutil.copytree(stores["normalized"], tmp_path / "store")
    index = json.loads((other / "index.json").read_text())

    statistics = re.escape(str(index["statistics"]))
    for values, message in (
        ({"statistics": "0" * 16}, f"statistics: {'0' * 16} there, {statistics} here"),
        ({"encoder": dict.fromkeys(index["encoder"], "x")}, "another encoder, by class.* there"),
        ({"shape": [64, 5, 5]}, r"latents \(20, 64, 4, 4\).*the index says \(20, 64, 5, 5\)"),
    ):
        (other / "index.json").write_text(json.dumps(index | values))
        with pytest.raises(UserError, match=message):
            on_latents(tmp_path / "run", other, autoencoder)
    with pytest.raises(UserError, match=r"shape \(C x h x w\): \(64, 4, 4\) there, \(64, 8, 8\) here"):
        large = tmp_path / "large"
        large.mkdir()
        rae = tiny_rae(tmp_path, image_size=128, statistics=True)
        write_folder(loaded(rae), large)
        on_latents(tmp_path / "run", stores["raw"], large, "data.image_size=128")
    with pytest.raises(UserError, match="this stage trains on images"):
        train(tmp_path / "one", f"data.data_dir={stores['raw']}")
    with pytest.raises(UserError, match="holds stored latents, and images are needed"):
        open_images(stores["raw"], None, None)
    with pytest.raises(UserError, match="can't be mixed"):
        mix = [f"+data.sources.{name}={{data_dir: {stores['raw']}}}" for name in "ab"]
        fit(tmp_path / "mix", autoencoder, "data.data_dir=null", *mix)


def test_an_image_of_no_class_counts_as_one_of_the_null_label(whole):
    _, run = whole
    totals = []
    for label in (-1, run.module.settings.num_classes):
        batch = next(iter(run.datamodule.val_dataloader()))
        run.module.on_validation_epoch_start()
        run.module.validation_step(batch | {"label": torch.full_like(batch["label"], label)}, 0)
        totals.append(run.module._totals)
    assert torch.equal(*totals) and totals[0][:4].sum() > 0


# -- sampling


def drawn(checkpoint, output, *options):
    words = ["--checkpoint", checkpoint, "--device", "cpu", "--num_images", 10, "--batch_size", 4, "--output", output]
    assert sample([str(word) for word in (*words, *options)]) == 0
    return np.load(output)


def test_samples_are_balanced_and_functions_of_the_index(whole, tmp_path, capsys):
    folder, _ = whole
    one = drawn(
        last(folder), tmp_path / "one.npz", "--cfg", 1.5, "--latents", tmp_path / "z.npz", "--grid", tmp_path / "g.png"
    )
    assert one["arr_0"].shape == (10, 64, 64, 3) and sorted(np.bincount(one["labels"])) == [3, 3, 4]
    assert (tmp_path / "g.png").is_file() and np.load(tmp_path / "z.npz")["latents"].shape == (10, 64, 4, 4)
    two = drawn(last(folder), tmp_path / "two.npz", "--cfg", 1.5, "--batch_size", 3, "--latents", tmp_path / "y.npz")
    assert np.abs(np.load(tmp_path / "z.npz")["latents"] - np.load(tmp_path / "y.npz")["latents"]).max() < 1e-4
    assert (one["arr_0"].astype(int) != two["arr_0"]).mean() < 1e-3
    assert not list(tmp_path.glob(".*")) and "UNTRAINED encoder" in capsys.readouterr().out


@pytest.mark.slow
def test_a_killed_sampling_goes_on_and_two_processes_give_the_same(whole, tmp_path):
    folder, _ = whole
    reference = drawn(last(folder), tmp_path / "whole.npz", "--num_images", 64)
    command = [sys.executable, "src/sample.py", "--checkpoint", str(last(folder)), "--device", "cpu", "--num_images", "64", "--batch_size", "4",
               "--output", str(tmp_path / "cut.npz")]  # fmt: skip
    journal = tmp_path / ".cut.npz.parts" / "done.0"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as here, and under torchrun
    process = subprocess.Popen(
        command, cwd=PROJECT_ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_text().count("\n") >= 2) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "cut.npz").exists() and journal.read_text().count("\n") < 16
    assert sample([*command[2:], "--batch_size", "2"]) == 1  # another block size is refused
    two_processes(*command[1:])
    cut = np.load(tmp_path / "cut.npz")
    assert np.array_equal(cut["labels"], reference["labels"]) and np.array_equal(cut["arr_0"], reference["arr_0"])


def test_a_sweep_makes_a_file_for_each_point(whole, tmp_path, capsys):
    folder, _ = whole
    words = f"--checkpoint {last(folder)} --device cpu --num_images 3 --output {tmp_path}/s.npz --cfg 1 2 --interval 0:1 0.2:0.8"
    assert sample(words.split()) == 0
    names = ["s_cfg1_0.2to0.8.npz", "s_cfg1_0to1.npz", "s_cfg2_0.2to0.8.npz", "s_cfg2_0to1.npz"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert "cfg 2 for t in 0.2:0.8" in capsys.readouterr().out


def test_official_files_load_strictly_and_a_checkpoint_without_average_is_refused(whole, autoencoder, tmp_path):
    folder, run = whole
    state = {name: value.clone() for name, value in run.module.ema_network.state_dict().items()}
    assert same(foreign_weights({"ema": {f"module.{k}": v for k, v in state.items()}, "model": {}}, "f"), state)
    with pytest.raises(UserError, match=r"has `model` and no `ema`"):
        foreign_weights({"model": state}, "f")
    torch.save(state, tmp_path / "stage2_model.pt")
    with pytest.raises(UserError, match="--model"):
        open_generator(tmp_path / "stage2_model.pt")
    with pytest.raises(UserError, match="does not fit DiTDH"):
        open_generator(tmp_path / "stage2_model.pt", "ditdh_s", shape=(64, 4, 4))
    own = open_generator(last(folder))
    assert same(dict(own.network.state_dict()), state) and own.rae.has_statistics


@pytest.mark.parametrize("kind", ["DiTDH", "RAEv2DiT"])
def test_an_export_is_the_official_file_and_comes_back_bit_equal(whole, autoencoder, tmp_path, kind, capsys):
    folder, checkpoint = whole[0], last(whole[0])
    if kind == "RAEv2DiT":
        v2 = [
            "model.network.name=RAEv2DiT",
            "+model.network.base_model_depth=1",
            "model.flow.prediction=x",
            "model.flow.t_eps=0.05",
        ]
        fit(tmp_path / "run", autoencoder, *v2, "trainer.max_steps=1")
        checkpoint = last(tmp_path / "run")
    out = tmp_path / "out"
    words = ["--checkpoint", str(checkpoint), "--output", str(out)]
    assert export([*words, "--format", "official"]) == 0
    own = read(checkpoint)["state_dict"]
    own = {name.removeprefix("ema_network."): value for name, value in own.items() if name.startswith("ema_network.")}
    content = read(out / ("checkpoint.pt" if kind == "RAEv2DiT" else "stage2_model.pt"))
    assert same(content["ema"] if kind == "RAEv2DiT" else content, own)
    back = open_generator(next(out.glob("*.pt")), shape=(64, 4, 4))
    assert same(dict(back.network.state_dict()), own) and type(back.network).__name__ == kind
    assert "UNTRAINED" in (out / "README.md").read_text() and str(folder) not in (out / "rae_export.json").read_text()
    assert export([*words, "--format", "folder", "--overwrite"]) == 1
    assert "exported with --format official alone" in capsys.readouterr().err


# -- what is refused


def made(name, autoencoder, folder):
    """The file or folder that a name in capitals stands for."""
    if name == "UNLABELLED":
        return photos(folder / "photos", 40) / "cats"
    if name == "OTHER":
        torch.save({"mean": None, "var": torch.ones(64, 4, 4), "encoder": {"class": "MAEwNorm"}}, folder / "o.pt")
    elif name == "SMALLER":
        torch.save({"mean": None, "var": torch.ones(64, 2, 2)}, folder / "o.pt")
    elif name == "MOVED":  # an export whose encoder is elsewhere
        place = shutil.copytree(autoencoder, folder / "moved")
        config = json.loads((place / "config.json").read_text())
        config["model"]["encoder_params"]["dinov2_path"] = "/nowhere/encoder"
        (place / "config.json").write_text(json.dumps(config))
        return place
    return folder / "o.pt" if name in ("OTHER", "SMALLER") else name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.autoencoder=null"], "model.autoencoder is not set"),
        (["model.autoencoder=no.ckpt"], "(from model.autoencoder)"),
        (["model.autoencoder=no"], "(from model.autoencoder)"),
        (["model.network.name=DiT"], "expected one of LightningDiT, DiTDH, RAEv2DiT"),
        (["+model.network.widht=3"], r"unknown key model.network.widht"),
        (["model.num_classes=2"], "3 classes.*model.num_classes=2"),
        (["data.image_size=128"], "works at 64 px"),
        (["model.sampler.t_min=0.9", "model.sampler.t_max=0.1", "model.sampler.cfg=2"], "t_min"),
        (["model.flow.shift=null"], "4096"),
        (["model.label_dropout=2"], "model.label_dropout=2: expected at most 1"),
        (["data.data_dir=UNLABELLED"], "The data has no labels"),
        (["model.statistics=OTHER"], "made with another encoder .*Compute its own with `python src/latent_stats.py`"),
        (["model.statistics=SMALLER"], r"`var` is \(64, 2, 2\); this model's latents are \(64, 4, 4\)"),
        (["model.autoencoder=MOVED"], "nowhere/encoder"),
    ],
)
def test_mistakes_are_one_message(autoencoder, tmp_path, overrides, message):
    overrides = [word.split("=")[0] + f"={made(*word.split('=')[1:], autoencoder, tmp_path)}" for word in overrides]
    with pytest.raises(UserError, match=message):
        fit(tmp_path, autoencoder, *overrides)


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
     ({"decoder": "EXPORT"}, "says its encoder itself: set model.autoencoder="), ({"sttistics": "s"}, "did you mean")],
)  # fmt: skip
def test_mappings_that_can_not_be_opened(autoencoder, tmp_path, words, message):
    torch.save({}, tmp_path / "model.pt")
    words = {name: str(autoencoder) if value == "EXPORT" else value for name, value in words.items()}
    with pytest.raises(UserError, match=message):
        open_autoencoder({"encoder": "dinov2-b", "decoder": str(tmp_path / "model.pt"), "statistics": None} | words)


@pytest.mark.parametrize(("what", "message"), [("statistics", "statistics: {} there"), ("size", ""),
                                               ("guide", "is of latents of (64, 4, 4) (C x h x w), but (64, 8, 8) are wanted")])  # fmt: skip
def test_an_autoencoder_or_a_guide_of_other_latents_is_refused(whole, tmp_path, what, message):
    folder, run = whole
    if what == "guide":
        with pytest.raises(UserError, match=re.escape(message)):
            open_generator(last(folder), shape=(64, 8, 8))
        return
    other = tiny_rae(tmp_path, image_size=64 if what == "statistics" else 128, statistics=True)
    out = tmp_path / "export"
    out.mkdir()
    write_folder(loaded(other), out)
    write_own_statistics(other, out, other.encoder.identity())
    message = message.format(run.module.autoencoder_identity["statistics"]["digest"])
    with pytest.raises(UserError, match=re.escape(message) if what == "statistics" else "works at 128 px"):
        open_generator(last(folder), autoencoder=str(out))


def test_an_autoencoder_without_statistics_is_refused(tmp_path):
    out = tmp_path / "export"
    out.mkdir()
    write_folder(loaded(tiny_rae(tmp_path)), out)
    with pytest.raises(UserError, match=r"no latent statistics.*latent_stats.py"):
        fit(tmp_path / "run", out)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--interval", "1:0"], "0 <= T_MIN"), (["--labels", "7"], "classes 0 to 2"), (["--labels", "cat"], "expected equal, random"),
     (["--guide", "no.ckpt", "--auto", "1.5"], "(from --guide)"), (["--autoencoder", "no.ckpt"], "(from --autoencoder)"), (["--autoencoder", "no"], "(from --autoencoder)"), (["--autoencoder", "{a: b: c}"], "Expected a path, or a mapping"),
     (["--internal", "1.5"], "base output"), (["--model", "ditdh_xl"], "says itself"), (["--method", "dopri5"], "torchdiffeq")],
)  # fmt: skip
def test_sampling_mistakes(whole, tmp_path, capsys, words, message):
    folder, _ = whole
    command = f"--checkpoint {last(folder)} --device cpu --num_images 2 --output {tmp_path}/s.npz"
    assert sample([*command.split(), *words]) == 1
    assert message in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "s.npz").exists()


# -- a decoder fine-tuned on what the sampler makes


def generated(run, checkpoint, **changed):
    settings = GeneratedLatentsSettings(**{"checkpoint": str(checkpoint), "t0": 0.5, "steps": 3} | changed)
    return GeneratedLatents(settings, run.module.rae, seed=0)


def test_generated_latents_are_brought_back_from_t0_for_each_image_by_itself(whole):
    folder, run = whole
    rae, module = run.module.rae, generated(run, last(folder))
    raw = rae.encode_raw(torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(3)))
    batch = {"epoch": 1, "position": np.array([5, 2, 9, 7]), "label": np.array([0, 2, -1, 1])}
    made = module(rae, raw, batch)
    part = module(rae, raw[1:3], {name: v if name == "epoch" else v[1:3] for name, v in batch.items()})
    assert torch.allclose(part, made[1:3], atol=1e-5) and made.shape == raw.shape
    unlabelled = module(rae, raw, {"epoch": 1, "position": batch["position"]})
    assert torch.allclose(unlabelled[2], made[2], atol=1e-5), "an image of no class has the null label"

    noise = streams.normals(0, Purpose.GENERATED_NOISE, 1, [5, 2, 9, 7], rae.latent_shape, torch.device("cpu"))
    x, labels = 0.5 * rae.normalize(raw) + 0.5 * noise, torch.tensor([0, 2, 3, 1])
    shift = module.sampler.shift
    u0 = 0.5 / (shift - (shift - 1) * 0.5)
    times = [shift * u / (1 + (shift - 1) * u) for u in (u0, u0 * 2 / 3, u0 / 3, 0.0)]
    settings, flow = run.module.settings.sampler, run.module.settings.flow
    assert (settings.method, settings.cfg, settings.internal, flow.prediction) == ("euler", 1, 1, "velocity")
    for t, end in itertools.pairwise(times):
        x = x + (end - t) * module.network(x, torch.full((4,), t), labels)
    assert torch.allclose(rae.denormalize(x), made, atol=1e-4)
    assert torch.allclose(generated(run, last(folder), t0=1e-6)(rae, raw, batch), raw, atol=1e-3)


def test_a_decoder_is_fine_tuned_on_generated_latents_and_resumes_exactly(whole, autoencoder, tmp_path):
    folder, _ = whole
    encoder = autoencoder.parent / "encoder_dinov2"
    options = [
        "data.image_size=64", f"model.encoder_config_path={encoder}", f"model.normalization_stat_path={autoencoder}",
        f"model.generated.checkpoint={last(folder)}", "model.generated.steps=2", "model.noise_tau=0",
    ]  # fmt: skip
    one = train(tmp_path / "one", *options, "trainer.max_epochs=1")
    train(tmp_path / "first", *options, "trainer.max_epochs=1", "trainer.max_steps=2")
    two = train(tmp_path / "two", *options, "trainer.max_epochs=1", checkpoint=last(tmp_path / "first"))
    assert same(one.module.state_dict(), two.module.state_dict())
    assert not any(name.startswith("generated") for name in one.module.state_dict())
    assert all(p.grad is None and not p.requires_grad for p in one.module.generated.parameters())
    without = train(tmp_path / "without", *options, "model.generated.checkpoint=null", "trainer.max_epochs=1")
    assert not same(one.module.state_dict(), without.module.state_dict())
    with pytest.raises(UserError, match="other statistics.*model.normalization_stat_path"):
        train(tmp_path / "odd", *options, "model.normalization_stat_path=null")
