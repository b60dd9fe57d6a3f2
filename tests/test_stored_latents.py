"""Training on stored latents: the same as on their images, exact resumes, and errors."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from src.core.errors import UserError
from src.data.latents import LatentStore, LatentWriter
from src.evaluation.images import open_images
from src.reconstruct import main as reconstruct
from tests.tiny_models import exported, tiny_rae
from tests.training import assert_equal_ends, last, train, train_stage2


@pytest.fixture(scope="module")
def stores(autoencoder, tmp_path_factory):
    """Write latents of the first dummy images, raw and normalized, in several shards."""
    folder = tmp_path_factory.mktemp("stores")
    words = f"--decoder {autoencoder} --input data/dummy_dataset_hf --num_samples 60 --device cpu --num_workers 0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentWriter.__init__, "__defaults__", (20 * 64 * 16 * 4,))  # shards of 20
        for scale in ("raw", "normalized"):
            assert reconstruct([*words.split(), "--latents", scale, "--output", str(folder / scale)]) == 0
    return {scale: folder / scale / "latents" for scale in ("raw", "normalized")}


def on_latents(folder, store, autoencoder, *words, checkpoint=None):
    return train_stage2(folder, autoencoder, f"data.data_dir={store}", *words, checkpoint=checkpoint)


def test_training_on_stored_latents_equals_training_on_their_images(stores, autoencoder, tmp_path):
    source = LatentStore(stores["raw"])
    assert len(source.files) == 3 and source.num_classes == 3 and source.class_names == ["red", "green", "blue"]
    plain = [
        "data.train_split=0.9999",
        "model.flip_probability=0",
        "trainer.max_steps=1",
        "trainer.limit_val_batches=0",
    ]
    image = train_stage2(tmp_path / "images", autoencoder, *plain)  # the same rows in the same order, encoded online
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


def test_resume_on_stored_latents_is_exact(stores, autoencoder, tmp_path):
    store = stores["normalized"]
    on_latents(tmp_path / "whole", store, autoencoder)
    for workers in (0, 1):
        first, second, more = tmp_path / f"first{workers}", tmp_path / f"second{workers}", f"data.num_workers={workers}"
        on_latents(first, store, autoencoder, more, "trainer.max_steps=4")
        on_latents(second, store, autoencoder, more, checkpoint=last(first))
        assert_equal_ends(tmp_path / "whole", second)
    other = shutil.copytree(store, tmp_path / "edited")
    index = json.loads((other / "index.json").read_text())
    (other / "index.json").write_text(json.dumps(index | {"scale": "raw"}))
    assert LatentStore(other).fingerprint() != LatentStore(store).fingerprint()
    with pytest.raises(UserError, match="latents are raw, were normalized"):
        on_latents(tmp_path / "third", other, autoencoder, checkpoint=last(first))


def test_unsuitable_latents_are_rejected(stores, autoencoder, tmp_path):
    other = shutil.copytree(stores["normalized"], tmp_path / "store")
    index = json.loads((other / "index.json").read_text())
    statistics = re.escape(str(index["statistics"]))
    for values, message in (
        ({"statistics": "0" * 16}, f"statistics: {'0' * 16} there, {statistics} here.*--stats, model.statistics"),
        ({"encoder": dict.fromkeys(index["encoder"], "x")}, "another encoder, by class.* there"),
        ({"shape": [64, 5, 5]}, r"latents \(20, 64, 4, 4\).*the index lists \(20, 64, 5, 5\)"),
    ):
        (other / "index.json").write_text(json.dumps(index | values))
        with pytest.raises(UserError, match=message):
            on_latents(tmp_path / "run", other, autoencoder)
    (other / "index.json").write_text(json.dumps(index))
    for damage, message in (
        (lambda z: z.to(torch.uint8), "torch.uint8, torch.int64"),
        (lambda z: z.mul(torch.nan), "NaN"),
    ):
        for file in other.glob("*.safetensors"):
            tensors = load_file(stores["normalized"] / file.name)
            del tensors["crc"]
            save_file(tensors | {"latents": damage(tensors["latents"])}, file)
        with pytest.raises(UserError, match=message):
            on_latents(tmp_path / "run", other, autoencoder)
    with pytest.raises(UserError, match=r"shape \(C x h x w\): \(64, 4, 4\) there, \(64, 8, 8\) here"):
        large = exported(tiny_rae(tmp_path, image_size=128, statistics=True), tmp_path / "large")
        on_latents(tmp_path / "run", stores["raw"], large, "data.image_size=128")
    with pytest.raises(UserError, match="this stage trains on images"):
        train(tmp_path / "one", f"data.data_dir={stores['raw']}")
    with pytest.raises(UserError, match="holds stored latents, and images are needed"):
        open_images(stores["raw"], None, None)
    with pytest.raises(UserError, match="can't be mixed"):
        mix = [f"+data.sources.{name}={{data_dir: {stores['raw']}}}" for name in "ab"]
        train_stage2(tmp_path / "mix", autoencoder, "data.data_dir=null", *mix)
