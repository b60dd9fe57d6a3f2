"""Datasets, loaders and the data module: same batches for any number of workers, exact resume, bad images."""

import io
import logging
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from PIL import Image

from src.core import files as core_files
from src.core.errors import UserError
from src.data import dummy
from src.data.crops import adm_center_crop
from src.data.datamodule import RAEDataModule
from src.data.dataset import Failure
from src.data.decode import Decoder
from src.data.loader import BadImages, TrainLoader, WorkerOptions
from src.data.order import evaluation_rows, split_rows

BASE = Path(__file__).parents[1] / "configs/data/imagenet.yaml"


def arguments(**changed: Any) -> dict[str, Any]:
    """Return the keys of imagenet.yaml with small sizes and `changed`."""
    loaded = OmegaConf.create({"seed": 7, "trainer": {"accumulate_grad_batches": 1}, "data": OmegaConf.load(BASE)})
    values = OmegaConf.to_container(loaded, resolve=True)["data"]
    assert values.pop("_target_") == "src.data.datamodule.RAEDataModule"
    return values | {"image_size": 32, "batch_size": 4, "num_workers": 0} | changed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "set"
    dummy.write(path, 40, 3)
    return path


def module(folder: Path, **changed: Any) -> RAEDataModule:
    return RAEDataModule(**arguments(data_dir=str(folder), **changed))


def files(folder: Path, contents: list[bytes], **changed: Any) -> RAEDataModule:
    """Build a data module over image files named by row."""
    folder.mkdir()
    for row, data in enumerate(contents):
        (folder / f"row{row:03d}.jpg").write_bytes(data)
    return module(folder, use_hf_dataset=False, **changed)


def assert_same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x["epoch"] == y["epoch"] and x.keys() == y.keys()
        assert all(torch.equal(x[k], y[k]) for k in x.keys() - {"epoch"})


def test_batch_contents(folder: Path) -> None:
    loader = module(folder).train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 10
    for i, batch in enumerate(batches):
        assert set(batch) == {"image", "position", "index", "bad", "label", "epoch"}
        assert batch["image"].shape == (4, 3, 32, 32)
        assert batch["image"].dtype == torch.uint8
        assert batch["image"].is_contiguous()
        assert batch["position"].tolist() == list(range(4 * i, 4 * i + 4))
        assert not batch["bad"].any()
        assert batch["epoch"] == 0
    assert sorted(torch.cat([b["index"] for b in batches]).tolist()) == list(range(40))
    with pytest.raises(UserError, match=r"data.batch_size=40"):
        module(folder, batch_size=64).train_dataloader()


def labels_of(loader: Any) -> dict[int, int]:
    return {int(i): int(y) for batch in loader for i, y in zip(batch["index"], batch["label"], strict=True)}


def test_batches_carry_labels_if_the_data_has_them(folder: Path, tmp_path: Path) -> None:
    data = module(folder, train_split=0.5)
    source = data.splits.train
    assert data.num_classes == len(dummy.CLASSES) == 3
    for loader in (data.train_dataloader(), data.val_dataloader()):
        got = labels_of(loader)
        assert len(got) == 20 and got == {row: source.label(row) for row in got}
    (tmp_path / "tree").mkdir()
    for i, name in enumerate("abc"):
        files(tmp_path / "tree" / name, FILES[2 * i : 2 * i + 2])
    data = module(tmp_path / "tree", use_hf_dataset=False, batch_size=2)
    assert data.num_classes == 3
    assert labels_of(data.train_dataloader()) == {row: row // 2 for row in range(6)}
    flat = files(tmp_path / "flat", FILES[:8], train_split=0.5)
    assert flat.num_classes is None
    assert all("label" not in b for loader in (flat.train_dataloader(), flat.val_dataloader()) for b in loader)
    with pytest.raises(UserError, match=r"data\.label=kind.*folders"):
        module(tmp_path / "flat", use_hf_dataset=False, label="kind").setup()


def test_replacement_image_brings_its_own_label(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name, contents in (("bad", [b""] * 2), ("good", FILES[:8])):
        files(tmp_path / "set" / name, contents)
    loader = module(tmp_path / "set", use_hf_dataset=False, max_bad_share=1.0, batch_size=5).train_dataloader()
    batches = list(loader)
    assert sum(int(b["bad"].sum()) for b in batches) == 2
    assert all(set(b["label"].tolist()) == {1} for b in batches)


def test_adm_crop_is_the_same_in_training_and_evaluation(folder: Path) -> None:
    data = module(folder, train_crop="adm", batch_size=8)
    evaluated = {
        int(i): x
        for b in data.evaluation_loader(data.evaluation_set(or_training=True), 8)
        for i, x in zip(b["index"], b["image"], strict=True)
    }
    for batch in data.train_dataloader():
        assert all(torch.equal(x, evaluated[int(i)]) for i, x in zip(batch["index"], batch["image"], strict=True))
    with pytest.raises(UserError, match="train_crop=adm.*resize_shorter_px=64"):
        module(folder, train_crop="adm", resize_shorter_px=64)


@pytest.mark.parametrize(("num_workers", "start"), [(3, "fork"), (1, "spawn")])
def test_workers_do_not_change_the_batches(folder: Path, num_workers: int, start: str) -> None:
    reference = module(folder).train_dataloader()
    loader = TrainLoader(reference.dataset, reference.order, WorkerOptions(num_workers, False, start=start), 0.01)
    for epoch in (0, 1, 5):
        for one in (reference, loader):
            one.set_epoch(epoch)
        assert_same(list(reference), list(loader))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_gives_the_remaining_batches(folder: Path, num_workers: int) -> None:
    whole = module(folder).train_dataloader()
    whole.set_epoch(3)
    batches = list(whole)
    resumed = module(folder, num_workers=num_workers).train_dataloader()
    resumed.resume_at(3, 4)
    resumed.set_epoch(3)  # as Lightning does
    assert_same(list(resumed), batches[4:])
    assert resumed.start_batch == 0
    assert len(resumed) == 10
    resumed.set_epoch(4)
    assert next(iter(resumed))["position"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 2])
def test_epoch_may_be_set_after_the_iterator_is_created(folder: Path, num_workers: int, taken: int) -> None:
    """Lightning does so before the first batch (0 taken); later an epoch may be abandoned."""
    loader, reference = module(folder, num_workers=num_workers).train_dataloader(), module(folder).train_dataloader()
    iterator = iter(loader)
    for _ in range(taken):
        next(iterator)
    for one in (loader, reference):
        one.sampler.set_epoch(1)
    assert_same(list(loader if taken else iterator), list(reference))


def test_lightning_runs_the_epochs_in_order(folder: Path) -> None:
    seen: list[dict[str, Any]] = []
    others = set(multiprocessing.active_children())  # left by earlier tests

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.validated = 0

        def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
            seen.append(batch)
            return self.weight.sum()

        def validation_step(self, batch: dict[str, Any], _: int) -> None:
            self.validated += len(batch["image"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    names = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    silent = dict.fromkeys(names, False)
    data, model = module(folder, num_workers=2, train_split=0.8), Model()
    silent |= {"accelerator": "cpu", "use_distributed_sampler": False, "num_sanity_val_steps": 0}
    pl.Trainer(max_epochs=2, **silent).fit(model, data)
    reference = module(folder, train_split=0.8).train_dataloader()
    expected = list(reference)
    reference.set_epoch(1)
    assert_same(seen, expected + list(reference))
    assert {batch["epoch"] for batch in seen} == {0, 1}
    assert model.validated == 2 * 8
    without = Model()
    pl.Trainer(max_epochs=1, limit_train_batches=2, **silent).fit(without, module(folder))
    assert without.validated == 0
    assert set(multiprocessing.active_children()) <= others  # `teardown` ended the workers


def test_closed_loaders_reopen_and_do_not_depend_on_torch_seed(folder: Path) -> None:
    data = module(folder, num_workers=2, train_split=0.5)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        torch.manual_seed(1)
        first = list(loader)
        loader.close()
        torch.manual_seed(2)
        assert_same(first, list(loader))
    data.teardown()
    assert not multiprocessing.active_children()


FILES = [dummy.jpeg(i) for i in range(40)]
BROKEN = [data if i % 8 else data[:600] for i, data in enumerate(FILES)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_replaced_and_named_once(
    num_workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader = files(tmp_path / "set", BROKEN, max_bad_share=0.3, num_workers=num_workers).train_dataloader()
    with caplog.at_level(logging.WARNING):
        first = list(loader)
        loader.set_epoch(1)
        second = list(loader)
    index = torch.cat([b["index"] for b in first])
    assert torch.cat([b["bad"] for b in first]).sum() == 5
    assert not (index % 8 == 0).any()
    assert len(index) == 40
    named = [r.getMessage().split(":")[0] for r in caplog.records if "Bad image" in r.getMessage()]
    assert sorted(named) == [f"Bad image {tmp_path}/set/row{i:03d}.jpg" for i in range(0, 40, 8)]
    again = module(tmp_path / "set", use_hf_dataset=False, max_bad_share=0.3).train_dataloader()
    assert_same(first, list(again))  # the replacements are drawn from (seed, epoch, position)
    again.set_epoch(1)
    assert_same(second, list(again))


@pytest.mark.parametrize(
    ("contents", "share", "num_workers", "says"),
    [
        (BROKEN, 0.05, 0, r"data\.max_bad_share=0\.05.*row\d+.jpg: Truncated"),
        (BROKEN, 0.05, 1, r"data\.max_bad_share=0\.05.*row\d+.jpg: Truncated"),
        ([*FILES[:39], b""], 0, 0, r"data\.max_bad_share=0 "),
        ([b""] * 8, 1.0, 0, "empty file"),  # no replacement: stops at any share
    ],
    ids=str,
)
def test_too_many_bad_images_stop_the_run(
    contents: list[bytes], share: float, num_workers: int, says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        list(files(tmp_path / "set", contents, max_bad_share=share, num_workers=num_workers).train_dataloader())


def test_image_without_a_replacement_stops_at_any_share() -> None:
    counter, failure = BadImages(max_share=1.0, epoch_images=1000), (Failure(3, "row 3", "empty file"),)
    counter.account(500, failure)
    with pytest.raises(UserError, match="no good one was found in .*row 3: empty file") as error:
        counter.account(4, failure, stuck=True)
    assert "max_bad_share" not in str(error.value)


def test_one_bad_image_in_a_large_set_does_not_stop(tmp_path: Path) -> None:
    loader = files(tmp_path / "set", [b"", *FILES[1:]] * 5, max_bad_share=0.03).train_dataloader()
    assert sum(int(b["bad"].sum()) for b in loader) == 5


def test_evaluation_leaves_bad_images_out_and_keeps_order(tmp_path: Path) -> None:
    data = files(tmp_path / "set", BROKEN, train_split=0.5, max_bad_share=0.5, exif="ignore")
    held = split_rows(40, 0.5)[1]
    rows = held[evaluation_rows(len(held))]
    batches = list(data.val_dataloader())
    assert torch.cat([b["index"] for b in batches]).tolist() == [r for r in rows if r % 8]
    for batch in batches:
        for image, row in zip(batch["image"], batch["index"], strict=True):
            reference = np.asarray(Image.open(io.BytesIO(FILES[row])).convert("RGB"))
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), adm_center_crop(reference, 32))
    with pytest.raises(UserError, match="max_bad_share"):
        strict = module(tmp_path / "set", use_hf_dataset=False, train_split=0.5, max_bad_share=0.0)
        list(strict.val_dataloader())


def test_evaluation_is_split_over_ranks(folder: Path) -> None:
    data = module(folder, train_split=0.5)
    held_out = data.evaluation_set()
    whole = [i for b in data.evaluation_loader(held_out, 3, num_images=17) for i in b["index"].tolist()]
    assert len(whole) == 17
    for images in (17, 1):  # ranks without an image get as many batches
        loaders = [data.evaluation_loader(held_out, 3, images, rank, 4) for rank in range(4)]
        assert len({len(loader) for loader in loaders}) == 1
        shares = [[i for b in loader for i in b["index"].tolist()] for loader in loaders]
        assert shares == [whole[:images][rank::4] for rank in range(4)]


def test_fallback_to_training_images(folder: Path) -> None:
    data = module(folder)
    assert data.val_dataloader() == []
    assert data.val_size == 0
    assert data.train_size == 40
    with pytest.raises(UserError, match=r"use_train_dataloader=true"):
        data.evaluation_set()
    assert len(data.evaluation_dataset(data.evaluation_set(or_training=True), num_images=10)) == 10
    assert len(module(folder, train_split=0.9).evaluation_set(or_training=True).rows) == 4


def test_evaluation_does_not_depend_on_the_seed(folder: Path) -> None:
    one, other = (module(folder, train_split=0.5, seed=seed) for seed in (1, 2))
    assert_same(list(one.val_dataloader()), list(other.val_dataloader()))
    assert one.fingerprint == other.fingerprint
    assert module(folder, train_split=0.6).fingerprint != one.fingerprint


def test_dummy_dataset_is_created_if_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_files, "PROJECT_ROOT", tmp_path)
    data = module(Path("data/test_hf"), train_split=0.8)
    data.prepare_data()
    data.setup("fit")
    assert (data.train_size, data.val_size) == (16, 4)
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["test_hf"]
    data.prepare_data()  # exists: nothing to do
    with pytest.raises(UserError, match=r"No dataset at .*somewhere"):
        module(Path("data/somewhere")).setup()


@pytest.mark.parametrize(("row", "label", "sides", "means", "length"), [
    (dummy._row(0), 1, (364, 327), (58.2, 183.3, 97.8), 7858), (dummy._row(41), 0, (184, 317), (173.9, 75.4, 164.9), 4590),
    (dummy._row(9), 0, (256, 368), (127.8, 127.8, 127.8), 4571),  # a grey one
    (dummy._row(287), 2, (383, 361), (134.0, 89.8, 221.9), 8461), (dummy._text_row(5), -1, (160, 160), (196.0, 196.0, 196.0), 11997),
])  # fmt: skip
def test_dummy_images_do_not_change_between_versions(row, label, sides, means, length) -> None:
    """Up to rounding that differs between CPUs: losses of dummy runs stay comparable across versions."""
    pixels = Decoder("ignore", 80).decode(row.data).pixels
    assert row.label == label and pixels.shape[:2] == sides
    assert np.allclose(pixels.mean((0, 1)), means, atol=0.2) and abs(len(row.data) - length) <= 0.005 * length


def test_every_data_config_is_complete() -> None:
    keys = set(OmegaConf.load(BASE))
    for path in BASE.parent.glob("*.yaml"):
        assert set(OmegaConf.load(path)) <= keys, path
    RAEDataModule(**arguments(pin_memory="auto", prefetch_factor=4))  # keys of older runs, removed since
    with pytest.raises(UserError, match=r"unknown key data\.misspelt"):
        RAEDataModule(**arguments(misspelt=1))


@pytest.mark.parametrize(
    ("key", "value"),
    [("image_size", 0), ("batch_size", 0), ("train_split", 0.0), ("train_split", 1.5), ("accumulate", 0), ("num_workers", -1), ("max_bad_share", 2), ("exif", "both"),
     ("max_megapixels", -1), ("train_crop", "left"), ("resize_shorter_px", 8)],
)  # fmt: skip
def test_invalid_values_name_their_key(key: str, value: Any) -> None:
    with pytest.raises(UserError, match="trainer.accumulate_grad_batches" if key == "accumulate" else f"data.{key}"):
        RAEDataModule(**arguments(**{key: value}))
