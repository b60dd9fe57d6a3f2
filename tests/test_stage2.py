"""Stage 2: training on latents, resume, sampling that goes on, and what is refused."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from src.core.errors import UserError
from src.core.weights import PROJECT_ROOT, read
from src.formats.folder import write_folder
from src.formats.official import write_own_statistics
from src.formats.stage2 import foreign_weights, open_generator
from src.models.dit import build_network, forward_flops
from src.sample import main as sample
from src.training.module import loss_scale  # noqa: F401  (the base that both stages stand on)
from src.training.muon import MuonWithAdamW
from src.training.stage2 import DiffusionModule
from src.training.stage2_step import FlowDraws
from tests.tiny_models import loaded, tiny_rae
from tests.training import same, train

SMALL = [
    "experiment=dit_dummy", "data.batch_size=8", "data.num_workers=0", "trainer.accelerator=cpu", "trainer.max_epochs=2", "trainer.limit_train_batches=3",
    "trainer.limit_val_batches=1", "trainer.check_val_every_n_epoch=1", "trainer.log_every_n_steps=1", "model.sample_every=0", "callbacks.checkpoint.every_n_steps=1",
    "~callbacks.samples", "logger=csv", "model.network.hidden_size=[32,48]", "model.network.depth=[1,1]", "model.network.num_heads=[2,2]",
    "model.sampler.num_steps=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """An export of stage 1: latents of 64 x 4 x 4 at 64 px, with statistics of the dummy's like."""
    folder = tmp_path_factory.mktemp("autoencoder")
    rae = tiny_rae(folder)
    latents = rae.encode_raw(torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    rae.set_statistics(latents.mean(0), latents.var(0))
    out = folder / "export"
    out.mkdir()
    write_folder(loaded(rae), out)
    write_own_statistics(rae, out, rae.encoder.identity())
    return out


@pytest.fixture(scope="module")
def whole(autoencoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder, *SMALL, f"model.autoencoder={autoencoder}", small=False)


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


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
        patch.setattr(type(step.rae), "encode", lambda self, x: (seen.append(x), encode(x))[1])
        labels = torch.full((8,), 2)
        used = []
        step.training_terms(lambda x, t, y: (used.append(y), x)[1], images, None, labels, draws)
    assert used[0].tolist() == [3, 2, 2, 2, 2, 2, 2, 2]  # 0 < 0.1: the null label
    flipped = (draws.flip < 0.5)[:, None, None, None]
    assert torch.equal(seen[0], torch.where(flipped, images.flip(-1), images).float() / 255)


@pytest.mark.parametrize("stop", [2, 3])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(whole, autoencoder, tmp_path, stop):
    folder, _ = whole
    where = f"model.autoencoder={autoencoder}"
    train(tmp_path / "first", *SMALL, where, f"trainer.max_steps={stop}", small=False)
    train(tmp_path / "second", *SMALL, where, small=False, checkpoint=last(tmp_path / "first"))
    a, b = read(last(folder)), read(last(tmp_path / "second"))
    for part in ("state_dict", "optimizer_states", "global_step", "loops"):
        assert same(a[part], b[part]), part


def test_micro_batches_make_the_gradient_of_the_whole_batch(whole, autoencoder, tmp_path):
    _, run = whole
    halves = ["data.batch_size=4", "trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=6"]
    other = train(tmp_path, *SMALL, *halves, f"model.autoencoder={autoencoder}", small=False)
    assert other.trainer.global_step == run.trainer.global_step == 6
    for a, b in zip(run.module.network.parameters(), other.module.network.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-4


def test_muon_trains_and_resumes(autoencoder, tmp_path):
    muon = [*SMALL, "model.optimizer.name=muon", f"model.autoencoder={autoencoder}"]
    train(tmp_path / "whole", *muon, small=False)
    train(tmp_path / "first", *muon, "trainer.max_steps=4", small=False)
    train(tmp_path / "second", *muon, small=False, checkpoint=last(tmp_path / "first"))
    a, b = read(last(tmp_path / "whole")), read(last(tmp_path / "second"))
    assert same(a["state_dict"], b["state_dict"]) and same(a["optimizer_states"], b["optimizer_states"])


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
        config = compose("train", overrides=[f"experiment={name}", "model.autoencoder=somewhere"])
    model = OmegaConf.to_container(config.model, resolve=True)
    DiffusionModule.check_config({key: value for key, value in model.items() if key != "_target_"})
    with torch.device("meta"):
        network = build_network(model["network"], shape, model["num_classes"], model["label_dropout"], 0)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert forward_flops(network) / 1e9 == pytest.approx(gflop, rel=0.01)


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
    reference = drawn(last(folder), tmp_path / "whole.npz")
    command = [sys.executable, "src/sample.py", "--checkpoint", str(last(folder)), "--device", "cpu", "--num_images", "10", "--batch_size", "1",
               "--output", str(tmp_path / "cut.npz")]  # fmt: skip
    journal = tmp_path / ".cut.npz.parts" / "done.0"
    process = subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_text().count("\n") >= 2) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "cut.npz").exists()
    assert sample([*command[2:], "--batch_size", "2"]) == 1  # another block size is refused
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, *command[1:]],
        cwd=PROJECT_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    cut = np.load(tmp_path / "cut.npz")
    assert np.array_equal(cut["labels"], reference["labels"]) and cut["arr_0"].shape == reference["arr_0"].shape
    assert (cut["arr_0"] != reference["arr_0"]).mean() < 1e-3  # blocks of 1 and of 4: up to rounding
    alone = drawn(last(folder), tmp_path / "alone.npz", "--batch_size", 1)
    assert np.array_equal(alone["arr_0"], cut["arr_0"])


def test_a_sweep_makes_a_file_for_each_point(whole, tmp_path, capsys):
    folder, _ = whole
    words = [
        "--checkpoint",
        last(folder),
        "--device",
        "cpu",
        "--num_images",
        3,
        "--output",
        tmp_path / "s.npz",
        "--cfg",
        1,
        2,
        "--interval",
        "0:1",
        "0.2:0.8",
    ]
    assert sample([str(word) for word in words]) == 0
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


# -- what is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.autoencoder=null"], "model.autoencoder is not set"),
        (["model.network.name=DiT"], "expected one of LightningDiT, DiTDH, RAEv2DiT"),
        (["+model.network.widht=3"], r"unknown key model.network.widht"),
        (["model.num_classes=2"], "3 classes.*model.num_classes=2"),
        (["data.image_size=128"], "works at 64 px"),
        (["model.sampler.t_min=0.9", "model.sampler.t_max=0.1", "model.sampler.cfg=2"], "t_min"),
        (["model.flow.shift=null"], "4096"),
        (["model.label_dropout=2"], "model.label_dropout=2: expected at most 1"),
    ],
)
def test_mistakes_are_one_message(autoencoder, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path, *SMALL, f"model.autoencoder={autoencoder}", *overrides, small=False)


def test_an_autoencoder_without_statistics_is_refused(tmp_path):
    out = tmp_path / "export"
    out.mkdir()
    write_folder(loaded(tiny_rae(tmp_path)), out)
    with pytest.raises(UserError, match=r"no latent statistics.*latent_stats.py"):
        train(tmp_path / "run", *SMALL, f"model.autoencoder={out}", small=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--interval", "1:0"], "0 <= T_MIN"), (["--labels", "7"], "classes 0 to 2"), (["--labels", "cat"], "expected equal, random"),
     (["--internal", "1.5"], "base output"), (["--model", "ditdh_xl"], "says itself"), (["--method", "dopri5"], "torchdiffeq")],
)  # fmt: skip
def test_sampling_mistakes(whole, tmp_path, capsys, words, message):
    folder, _ = whole
    command = [
        "--checkpoint",
        last(folder),
        "--device",
        "cpu",
        "--num_images",
        2,
        "--output",
        tmp_path / "s.npz",
        *words,
    ]
    assert sample([str(word) for word in command]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "s.npz").exists()
