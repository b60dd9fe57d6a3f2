"""Faults of many kinds: bad input ends in one message, and nothing goes wrong silently."""

import logging
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from scripts import fuzz
from src.callbacks.checkpoint import AtomicCheckpointIO
from src.core.errors import UserError
from src.core.files import check_writable, write_safetensors, write_text
from src.core.images import save_png
from src.core.terminal import in_options
from src.evaluation.per_image_files import as_text
from src.evaluation.rfid import references
from src.evaluation.variants import Reconstructions, Variant
from src.formats.decoder_files import read_decoder
from src.metrics import npz
from src.metrics.fid import load_npz
from src.metrics.npz import ImageNpz
from src.training.logs import WarningCollector
from src.training.preflight import BYTES, check_disk
from tests.conftest import make_rae
from tests.training import python

PIXEL = torch.zeros(3, 1, 1, dtype=torch.uint8)


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damaged_files_are_read_or_refused(kind, tmp_path):
    counts = fuzz.fuzz(kind, 0.5, 1000, tmp_path)
    harm = {file.name: file.read_text() for file in tmp_path.glob("*/outcome.txt")}
    assert not harm and counts["refused"] + counts["read"] == counts.total() > 0


def hostile(path, shape, size):
    """Write an npz whose members announce `shape` and unpack to `size` bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("arr_0.npy", "mu.npy", "sigma.npy"):
            with archive.open(name, "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                file.write(bytes(size))


@pytest.mark.parametrize(
    ("read", "shape", "size", "said"),
    [(ImageNpz, (2**15, 2**14, 2**14, 3), 1000, "announces 26,388,279,066,624 bytes and has 1,000"), (ImageNpz, (2, 600, 600, 3), 2_160_000, "a row of 1,080,000"),
     (load_npz, (2**20, 2**23), 1000, "announces 8,796,093,022,208 bytes and has 1,000"), (load_npz, (2000, 2000), 4_000_000, "unpacks to 4,000,128 bytes")],
)  # fmt: skip
def test_small_npz_that_unpacks_to_a_huge_array_is_rejected_unread(tmp_path, monkeypatch, read, shape, size, said):
    monkeypatch.setattr(npz, "LARGEST_ROW", 10**6)
    monkeypatch.setattr(npz, "LARGEST_ARRAY", 3 * 10**6)
    hostile(tmp_path / "a.npz", shape, size)
    with pytest.raises(UserError, match=said):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize("cell", ["=1+2", "+1", "-1", "@sum", "\tx", "\rx"])
def test_file_names_in_a_csv_are_not_formulas(cell):
    assert as_text(cell) == f"'{cell}" and as_text(f"a{cell}") == f"a{cell}"


WRAPPED = [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s}, lambda s: {"decoder": s}, lambda s: {"epoch": 3, "model": {"state_dict": s}},
           lambda s: {f"decoder.{k}": v for k, v in s.items()}, lambda s: {"model": {f"module.decoder.{k}": v for k, v in s.items()}},
           lambda s: {f"decoder._orig_mod.{k.replace('layers.0.', 'layers.0._orig_mod.')}": v for k, v in s.items()},
           lambda s: {"optimizer": {"state": {}}, "net": {"weights": s}}]  # fmt: skip


@pytest.mark.parametrize(
    "wrap", WRAPPED, ids=["bare", "model", "state_dict", "decoder", "two", "names", "all", "compiled parts", "unknown"]
)
def test_decoders_are_unwrapped(tmp_path, rae, wrap):
    torch.save(wrap(rae.decoder.state_dict()), tmp_path / "decoder.pt")
    assert read_decoder(tmp_path / "decoder.pt").state.keys() == rae.decoder.state_dict().keys()


def test_messages_name_the_option_of_the_script():
    said = "No dataset at /a (data.data_dir). Set data.data_dir=/b. model.encoder_params says where; data.image_sizes"
    shown = "No dataset at /a (--data_dir). Set --data_dir /b. --encoder says where; data.image_sizes"
    assert in_options(said) == shown


def test_latent_noise_has_the_standard_deviation_asked_for(monkeypatch):
    rae, seen = make_rae(), []
    monkeypatch.setattr(type(rae), "decode_raw", lambda self, z: (seen.append(z), z)[1])
    images = torch.zeros(8, 3, 64, 64, dtype=torch.uint8)
    variants = [Variant("a", rae, "", None, sigma) for sigma in (0.0, 0.5)]
    list(Reconstructions(variants, "32")(images, torch.arange(8)))
    assert (seen[1] - seen[0]).std().item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    ("given", "sets", "served"), [(1, 3, 3), (2, 2, 2), (0, 2, 2), (2, 3, None), (3, 2, None), (2, 1, None)]
)
def test_one_reference_for_all_data_sets_or_one_for_each(given, sets, served):
    names, folders = [f"{i}.npz" for i in range(given)], ["a"] * sets
    if served is None:
        with pytest.raises(UserError, match=f"names {given} files for {sets} data sets"):
            references(names, folders)
    else:
        assert len(references(names, folders)) == served


@pytest.mark.parametrize(("checkpoints", "fits"), [(1.5, False), (2.5, False), (6.1, True)])
def test_disk_must_have_room_for_all_checkpoints_that_are_kept(tmp_path, monkeypatch, checkpoints, fits):
    module = torch.nn.Linear(10, 10)
    module.ema = type("Average", (), {"average": torch.nn.Linear(10, 10)})()
    each = BYTES * 4 * sum(p.numel() for p in module.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": checkpoints * each})())
    config = {"callbacks": {"checkpoint": {"_target_": "a", "keep_epochs": 3}}, "paths": {"log_dir": str(tmp_path)}}
    if fits:
        check_disk(config, module)
    else:
        with pytest.raises(UserError, match="6 checkpoints of"):
            check_disk(config, module)


@pytest.mark.parametrize(
    "content", [{"a": torch.ones(1)}, {"state_dict": {}}, [1], torch.ones(2), {"loops": {}}], ids=str
)
def test_files_that_are_no_checkpoint_are_rejected(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="not a checkpoint of a training run"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("kind", ["device", "folder"])
def test_only_regular_files_are_replaced(tmp_path, kind):
    """As root, a rename would replace /dev/null."""
    place = tmp_path / "place"
    os.mkfifo(place) if kind == "device" else place.mkdir()
    before = place.stat().st_ino
    for write in (
        lambda: check_writable(place, "--json"),
        lambda: write_text(place, "x"),
        lambda: save_png(PIXEL, place),
    ):
        with pytest.raises(UserError, match=f"is a {kind}; give the name of a file"):
            write()
    assert place.stat().st_ino == before


def test_safetensors_on_a_full_disk_raise_oserror(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(9)})


def test_repeated_warning_is_recorded_once():
    collector, log = WarningCollector(), logging.getLogger("tests.faults")
    log.addHandler(collector)
    for text in ("a", "b", "a", "a "):
        log.warning(text)
    log.removeHandler(collector)
    assert collector.messages == ["a", "b"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", [b"experiment_name: a\n\tseed: 1\n", b"seed: 1\nseed: 2\n", b"experiment_name: gr\xfc\n"]
)
def test_unreadable_yaml_ends_in_one_message(tmp_path, text):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/odd.yaml").write_bytes(b"# @package _global_\n" + text)
    words = [f"hydra.searchpath=[file://{tmp_path}]", "experiment=odd"]
    assert "odd.yaml" in python("src/train.py", *words, code=1)


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("src/train.py experiment=rae_dummy data=null", 1, "data=null: expected the name of a file in configs/data: "),
        ("src/train.py experiment=rae_dummy model=[1]", 1, "model=[1]: expected the name of a file in configs/model: "),
        ("scripts/fuzz.py --minutes -1", 2, "expected a number above 0"),
        ("scripts/kill_and_resume.py --kills 0", 2, "expected at least 1"),
        ("scripts/kill_and_resume.py --sampling_kills 3", 2, "--sampling_kills goes with --stage 2"),
        ("scripts/gpu_report.py --minutes 0", 2, "expected a number above 0"),
    ],
)
def test_invalid_values_are_rejected_at_once(line, code, said):
    assert said in python(*line.split(), code=code)
