"""Mixes of sources: exact shares, rounds that are permutations, the same rows for any ranks, workers and resume point."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from src.core import random_streams as stream
from src.core.errors import UserError
from src.data import dummy
from src.data.datamodule import RAEDataModule
from src.data.loader import TrainLoader, WorkerOptions
from src.data.mix import BLOCK, TABLE_ROWS, MixOrder, feistel, images_per_epoch, shares
from src.metrics.generation import load_reference
from src.metrics.inception import InceptionFeatures
from src.metrics.reconstruction import ReconstructionScore
from src.metrics.reference import Preparation
from tests.test_data_loader import arguments, assert_same
from tests.test_data_places import image_tar
from tests.test_data_sources import tree
from tests.test_data_tars import tar
from tests.training import train


def rows_of(sizes: tuple[int, ...], weights: tuple[float, ...], length: int, count: int, seed: int = 3) -> np.ndarray:
    """Return the rows at the first `count` positions, over consecutive epochs."""
    order = MixOrder(length, seed, 1, sizes=sizes, weights=weights)
    parts = [order.rows(e, np.arange(min(length, count - e * length))) for e in range(-(-count // length))]
    return np.concatenate(parts)


@pytest.mark.parametrize(
    ("sizes", "weights", "length"),
    [
        ((7, 50), (1, 1), 57),
        ((30, 2000, 11), (1, 1, 1), 700),
        ((13, 400), (0.3, 5), 2500),
        ((1, 1000, 999, 64), (1, 2, 3, 4), 1001),
        ((50,), (2,), 35),
    ],
)
def test_shares_are_exact_and_rounds_are_permutations(sizes: tuple, weights: tuple, length: int) -> None:
    count = 6 * BLOCK
    rows = rows_of(sizes, weights, length, count)
    borders = np.cumsum([0, *sizes])
    sources = np.searchsorted(borders, rows, "right") - 1
    expected = shares(tuple(weights))
    assert expected.sum() == BLOCK
    assert np.all(np.abs(expected - BLOCK * np.array(weights) / sum(weights)) < 1)
    for block in range(count // BLOCK):
        assert np.array_equal(np.bincount(sources[block * BLOCK : (block + 1) * BLOCK], minlength=len(sizes)), expected)
    seen_orders = set()
    for s, size in enumerate(sizes):
        own = rows[sources == s] - borders[s]
        for r in range(len(own) // size):
            once = own[r * size : (r + 1) * size]
            assert np.array_equal(np.sort(once), np.arange(size))  # every row comes once before any comes twice
            seen_orders.add(once.tobytes())
        if size > 10 and len(own) >= 2 * size:
            assert own[:size].tobytes() != own[size : 2 * size].tobytes()


@pytest.mark.parametrize("unit", ["image", "batch"])
def test_rows_do_not_depend_on_ranks_or_resume_point(unit: Any) -> None:
    place: dict[str, Any] = {"sizes": (30, 200, 11), "weights": (1.0, 2.0, 1.0), "unit": unit}

    def items(batch: int, world: int, accumulate: int, epoch: int, start: int = 0) -> dict[int, int]:
        orders = [MixOrder(250, 5, batch, world, rank, accumulate, **place) for rank in range(world)]
        return {i.position: i.row for order in orders for b in order.epoch(epoch, start) for i in b}

    for epoch in (0, 1, 9):
        reference = items(12, 1, 1, epoch)
        assert sorted(reference) == list(range(240))
        assert items(6, 2, 1, epoch) == items(2, 3, 2, epoch) == items(3, 4, 1, epoch) == reference
        for start in (0, 5, 19):
            assert items(12, 1, 1, epoch, start) == {p: r for p, r in reference.items() if p >= 12 * start}
    assert items(12, 1, 1, 0) != items(12, 1, 1, 1)


def test_batch_unit_takes_one_source_per_update_and_each_image_once_per_round() -> None:
    order = MixOrder(240, 5, 12, sizes=(36, 240), weights=(1.0, 3.0), unit="batch")
    batches = [[i.row for i in b] for e in range(12) for b in order.epoch(e)]
    sources = [{row >= 36 for row in b} for b in batches]
    assert all(len(s) == 1 for s in sources)
    small = [row for b, s in zip(batches, sources, strict=True) if s == {False} for row in b]
    assert len(small) > 2 * 36
    assert all(sorted(small[i : i + 36]) == list(range(36)) for i in (0, 36))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 1000, 4097, 65537])
def test_feistel_is_a_permutation(size: int) -> None:
    keys = [int(k) for k in np.random.default_rng(size).integers(0, 1 << 64, 8, dtype=np.uint64)]
    out = feistel(keys, size, np.arange(size))
    assert np.array_equal(np.sort(out), np.arange(size))
    if size > 1000:
        assert abs(np.corrcoef(out, np.arange(size))[0, 1]) < 0.1
        assert not np.array_equal(out, feistel(keys[::-1], size, np.arange(size)))
        few = np.array([5, 0, size - 1])
        assert np.array_equal(feistel(keys, size, few), out[few])


def test_large_sources_need_no_table() -> None:
    size = TABLE_ROWS + 12345
    at = np.arange(0, size, 4001)
    out = MixOrder(1, 3, 1, sizes=(1, size), weights=(1.0, 1.0)).permuted(1, 0, at)
    assert len(np.unique(out)) == len(at) and out.min() >= 0 and out.max() < size
    assert abs(out.mean() / size - 0.5) < 0.05
    order = MixOrder(16_000_000, 3, 512, sizes=(1_281_167, 31_970_000, 24_390_000), weights=(1.0, 1.0, 1.0))
    next(order.epoch(0))
    began = time.process_time()
    for _, _ in zip(range(20), order.epoch(0, 40), strict=False):
        pass
    assert (time.process_time() - began) / 20 < 0.05  # 512 positions; about 1 ms on an idle machine


def test_many_sources_are_permuted_once_per_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve sources of 40 rows, about 80 draws of each: two or three rounds."""
    made, generator = [], stream.generator
    monkeypatch.setattr(stream, "generator", lambda *place: (made.append(place[1]), generator(*place))[1])
    order = MixOrder(960, 3, 12, sizes=(40,) * 12, weights=(1.0,) * 12)
    assert sum(1 for _ in order.epoch(0)) == 80
    assert made.count(stream.Purpose.ORDER) <= 36


def test_epoch_length_is_the_weighted_mean_of_source_sizes() -> None:
    assert images_per_epoch((1_281_167, 31_970_000, 7_520_000, 24_390_000), (1, 1, 1, 1)) == 16_290_292
    assert images_per_epoch((10, 40), (3, 1)) == 18
    with pytest.raises(UserError, match="gives no image in 1,000"):
        shares((1.0, 1e-5))


# -- through the data module


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mix")
    dummy.write(root / "arrow", 20)
    image_tar(root / "tars/0.tar", 12)
    tree(root / "files", per_class=3)
    (root / "plain").mkdir()
    for i in range(5):
        (root / "plain" / f"{i}.jpg").write_bytes(dummy.jpeg(i))
    return root


def mixed(root: Path, names: str = "arrow tars plain", **changed: Any) -> RAEDataModule:
    sources = {name: {"data_dir": str(root / name)} for name in names.split()}
    sources = {n: s | changed.pop(n, {}) for n, s in sources.items()}
    return RAEDataModule(**arguments(data_dir=None, sources=sources, **{"epoch_images": 40, **changed}))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_of_a_mix(num_workers: int, folders: Path) -> None:
    data = mixed(folders)
    whole = list(data.train_dataloader())
    assert set(whole[0]) == {"image", "position", "index", "bad", "label", "source", "epoch"}
    sources = [splits.train for splits in data.opened]
    for batch in whole:
        for s, i, y in zip(batch["source"].tolist(), batch["index"].tolist(), batch["label"].tolist(), strict=True):
            assert y == (sources[s].label(i) if sources[s].num_classes else -1)
    assert data.num_classes == 3 and data.train_size == 37 and len(whole) == 10
    loader = mixed(folders, num_workers=num_workers).train_dataloader()
    loader.resume_at(0, 4)
    assert_same(list(loader), whole[4:])
    loader.close()
    ranks = [MixOrder(40, 7, 2, 2, r, 1, (20, 12, 5), (1.0, 1.0, 1.0)) for r in (0, 1)]
    halves = [list(TrainLoader(loader.dataset, order, WorkerOptions(0, False), [0.0] * 3)) for order in ranks]
    for one, two, both in zip(*halves, whole, strict=True):
        assert torch.equal(torch.cat([one["image"], two["image"]]), both["image"])


def test_crops_and_bad_share_are_those_of_the_source(folders: Path, tmp_path: Path) -> None:
    own = {"train_crop": "center", "weight": 3, "exif": "ignore"}  # the common resize_shorter_px does not apply
    data = mixed(folders, "arrow plain", resize_shorter_px=48, plain=own)
    assert [t.train_crop for t in data.train_transforms] == ["random", "center"]
    assert [t.decoder.exif for t in data.train_transforms] == ["apply", "ignore"]
    (tmp_path / "bad").mkdir()
    for i in range(8):
        (tmp_path / "bad" / f"{i}.jpg").write_bytes(dummy.jpeg(i) if i else b"")
    sources = {"good": {"data_dir": str(folders / "arrow")}, "bad": {"data_dir": str(tmp_path / "bad")}}

    def batches(share: float) -> list[dict[str, Any]]:
        given = sources | {"bad": sources["bad"] | {"max_bad_share": share}}
        return list(
            RAEDataModule(
                **arguments(data_dir=None, sources=given, epoch_images=400, max_bad_share=0.0)
            ).train_dataloader()
        )

    replaced = [int(s) for b in batches(0.5) for s, bad in zip(b["source"], b["bad"], strict=True) if bad]
    assert replaced and set(replaced) == {1}  # replaced from the same source
    with pytest.raises(UserError, match="bad images among"):
        batches(0.01)


def test_mix_of_one_source_gives_the_batches_of_that_source(folders: Path) -> None:
    alone = list(RAEDataModule(**arguments(data_dir=str(folders / "arrow"))).train_dataloader())
    named = list(mixed(folders, "arrow", epoch_images=None).train_dataloader())
    for one, other in zip(alone, named, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one if key != "epoch")


def test_fingerprint_of_a_mix_names_sources_and_weights(folders: Path) -> None:
    stored = mixed(folders).state_dict()
    mixed(folders).load_state_dict(stored)
    for other in (mixed(folders, arrow={"weight": 2}), mixed(folders, "arrow plain"), mixed(folders, mix_unit="batch")):
        with pytest.raises(UserError, match=r"mix.weights.*now \[2|mix.unit: image, now batch|tars: gone"):
            other.load_state_dict(stored)
    assert mixed(folders).fingerprint != mixed(folders, arrow={"weight": 2}).fingerprint


def test_labels_that_mean_different_classes_are_rejected(folders: Path, tmp_path: Path) -> None:
    """Otherwise a network would be trained or scored on classes that are mixed up."""
    with pytest.raises(UserError, match=r"Label 0 is 'red' in data.sources.arrow and 'cat' in data.sources.files"):
        _ = mixed(folders, "arrow files").num_classes
    tree(tmp_path, "train", "val")
    rest = RAEDataModule(**arguments(data_dir=str(tmp_path), train_split=1.0))
    assert rest.num_classes == 2
    (tmp_path / "val/bird").mkdir()
    with pytest.raises(UserError, match=r"Label 0 is 'cat' in training and 'bird' in evaluation"):
        _ = RAEDataModule(**arguments(data_dir=str(tmp_path), train_split=1.0)).num_classes
    (tmp_path / "val/bird").rename(tmp_path / "val/emu")
    assert (
        RAEDataModule(**arguments(data_dir=str(tmp_path), train_split=1.0)).num_classes == 3
    )  # label 2 would not fit a table of 2


def test_evaluation_sets(folders: Path) -> None:
    evaluation = {"arrow": {"data_dir": str(folders / "arrow")}, "files": {"data_dir": str(folders / "files")}}
    data = mixed(folders, evaluation=evaluation)
    assert data.val_size == 20 and list(data.evaluation_sets) == ["arrow", "files"]
    assert {"evaluation arrow", "evaluation files"} <= data.fingerprint_state["sources"].keys()
    assert sum(len(b["image"]) for b in data.val_dataloader()) == 20
    assert sum(len(b["image"]) for b in data.evaluation_loader(data.evaluation_set("files"), 4)) == 6
    rows = dict(data.describe())
    assert rows["data tars"].startswith("tar files: 12 training images, weight 1, 13 an epoch, 3 classes, index")
    assert rows["evaluation files"].startswith("6 images")


def test_evaluation_set_has_its_own_label_setting(folders: Path, tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", [("a.jpg", dummy.jpeg(0)), ("a.cls", b"1"), ("a.json", b'{"kind": 7}')])
    for label, found in ((None, 1), ("json:kind", 7)):
        data = mixed(folders, evaluation={"own": {"data_dir": str(tmp_path), "label": label}})
        assert [b["label"].tolist() for b in data.val_dataloader()] == [[found]]


def test_errors_name_the_keys_of_the_source_or_evaluation_set(folders: Path) -> None:
    with pytest.raises(UserError, match="Set data.sources.tars.hf_split=train"):
        _ = mixed(folders, tars={"hf_split": "nope"}).opened
    for place, said in (
        ("hf:nope", "data.evaluation.a.data_dir=hf:nope"),
        (f"{folders}/tars", "data.evaluation.a.split=train"),
    ):
        data = mixed(folders, evaluation={"a": {"data_dir": place, "split": "nope"}})
        with pytest.raises(UserError, match=said):
            data.prepare_data()
            _ = data.evaluation_sets


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"data_dir": "x"}, "expected one of them. Set data.data_dir=null"),
        ({"sources": None}, "expected one of them. Set data.data_dir=PATH"),
        ({"sources": {}}, "data.sources={}: expected a name"),
        ({"sources": {"a": {"weight": 1}}}, "data.sources.a=.*data_dir"),
        ({"sources": {"a b": {"data_dir": "x"}}}, "is not a valid name"),
        ({"sources": {"a": {"data_dir": "x", "weight": 0}}}, "data.sources.a.weight"),
        ({"sources": {"a": {"data_dir": "x", "colour": 1}}}, "data.sources.a.colour"),
        ({"sources": {"a": {"data_dir": "x", "train_crop": "left"}}}, "train_crop='left'"),
        ({"mix_unit": "row"}, "data.mix_unit='row'"),
        ({"epoch_images": 0}, "data.epoch_images=0"),
        ({"sources": None, "data_dir": "x", "epoch_images": 5}, "goes with data.sources"),
        ({"evaluation": {"a": {"split": "val"}}}, "data.evaluation.a=.*data_dir"),
        ({"evaluation": {"a": {"data_dir": "x", "num_samples": 1}}}, "data.evaluation.a.num_samples"),
    ],
)
def test_wrong_settings_name_their_key(changed: dict[str, Any], says: str) -> None:
    given = {"data_dir": None, "sources": {"a": {"data_dir": "x"}}} | changed
    with pytest.raises(UserError, match=says):
        RAEDataModule(**arguments(**given))


def test_mix_trains_and_is_scored_on_each_evaluation_set(tmp_path: Path) -> None:
    small = [
        "experiment=rae_general_dummy", "data.image_size=64", "data.batch_size=4", "data.num_workers=0", "data.epoch_images=8",
        "trainer.max_epochs=1", "trainer.accelerator=cpu", "trainer.limit_val_batches=1", "model.sample_every=0",
        "callbacks.rfid.rfid_every_epoch=true", "callbacks.rfid.rfid_num_samples=6", "callbacks.rfid.rfid_device=cpu",
        "+data.evaluation.text.num_samples=4", f"+data.evaluation.text.reference={tmp_path}/reference.npz",
        "callbacks.rfid.rfid_save_samples=false",
    ]  # fmt: skip
    np.savez(tmp_path / "reference.npz", np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8))
    run = train(tmp_path / "run", *small, small=False)
    scores = {name: value for name, (_, value) in run.module.scores.items()}
    assert scores["rfid_untrained/images"] == 6 and scores["rfid_untrained_text/images"] == 4
    assert {"rfid_untrained/score", "rfid_untrained_text/psnr"} <= scores.keys()
    assert run.trainer.global_step == 2
    network = InceptionFeatures(None, "tiny")
    moments = load_reference(tmp_path / "reference.npz", network, 4, Preparation(image_size=64), pool_only=True).pool
    score = ReconstructionScore([network], 4, references={network.space: moments})
    for batch in run.datamodule.evaluation_loader(run.datamodule.evaluation_set("text"), 4, 4):
        score.update(batch["image"], run.module.reconstruct(batch["image"]))
    assert scores["rfid_untrained_text/score"] == pytest.approx(score.compute()["rfid_untrained"], rel=1e-4)
