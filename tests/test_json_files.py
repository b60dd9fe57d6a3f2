"""Any content of a JSON file, ours or third-party, is read or rejected with one message that names the file."""

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from src.core.errors import UserError
from src.data import dummy
from src.data.decode import BadImage
from src.data.latents import LatentStore, LatentWriter, write_index
from src.data.places import locate
from src.data.splits import open_splits
from src.formats.card import _scores as card_rows
from src.formats.decoder_files import read_decoder, read_record
from src.formats.diffusers_layout import decoder_config, grid, read_config
from src.formats.folder import read_folder, write_folder
from src.formats.provenance import _run_record, _scores, untrained_parts, write_record
from src.models.decoder import DecoderConfig
from src.models.encoder_files import STATISTICS, check_folder, read_statistics
from src.reporting.page import facts, number
from src.reporting.reading import read_runs
from src.training.resume import find_checkpoint
from tests.tiny_models import DECODER, loaded, tiny_rae

ODD: list[Any] = [None, "text", "", 5, -1, 1e400, 10**400, True, [], [None], {}, {"a": []}]


def damaged(content: Any) -> Iterator[str]:
    """Yield texts of a JSON file with one defect: cut, of another type, without a key, or with an odd value anywhere."""
    text = json.dumps(content)
    yield from ("", text[: len(text) // 2], "[" * 10**5, "null", "3", "[]", '"text"', "{}", "\udcff", text + "x")
    for path in list(places(content)):
        for value in ODD:
            changed = copy.deepcopy(content)
            owner = at(changed, path[:-1])
            owner[path[-1]] = value
            yield json.dumps(changed)
        changed = copy.deepcopy(content)
        del at(changed, path[:-1])[path[-1]]
        yield json.dumps(changed)


def places(content: Any, depth: int = 3) -> Iterator[tuple[Any, ...]]:
    inner = content.items() if isinstance(content, dict) else ()
    inner = enumerate(content[:1]) if isinstance(content, list) else inner
    for key, value in inner if depth else ():
        yield (key,)
        yield from ((key, *rest) for rest in places(value, depth - 1))


def at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


def dataset(folder: Path) -> None:
    dummy.write(folder, 6, 1)


def open_dataset(folder: Path) -> None:
    splits = open_splits(locate(str(folder)), None, "train", "validation", 0.5)
    splits.train.encoded(0)


def latents(folder: Path) -> None:
    writer = LatentWriter(folder, (2, 1, 1), torch.float32, 0)
    writer.write(torch.ones(3, 2, 1, 1), torch.arange(3), torch.zeros(3, dtype=torch.int64))
    about = {"scale": "raw", "shape": [2, 1, 1], "encoder": {"weights": "untrained"}, "statistics": None}
    write_index(folder, writer.close(), about)


def read_latents(folder: Path) -> None:
    store = LatentStore(folder)
    assert all(latent.shape == (2, *store.shape) or len(latent) == 1 for _, _, latent in store.batches(2))


def run(folder: Path) -> None:
    place = folder / "runs/2026-01-01/00-00-00/checkpoints"
    place.mkdir(parents=True)
    (place / "last.ckpt").touch()
    result = {"val/psnr": 20.5, "rfid/score": 0.5, "rfid/images": 1000, "picture": "a.png", "step": 3}
    record = {"experiment_name": "rae", "status": "finished", "started": "2026-01-01T00:00:00", "ended": None, "slurm_job": None,
              "git": {"commit": "c0ffee", "clean": True}, "packages": {"torch": "2"}, "data": {"train": 3, "validation": 1}, "result": result,
              "processes": 1, "device": "CPU", "warnings": ["a"], "command": ["python", "a"]}  # fmt: skip
    (place.parent / "run.json").write_text(json.dumps(record))


def use_run(folder: Path) -> None:
    checkpoint = folder / "runs/2026-01-01/00-00-00/checkpoints/last.ckpt"
    find_checkpoint("last", str(folder), "rae")
    record = _run_record(checkpoint)
    untrained_parts({"encoder": {"weights": "untrained"}, "step": 1}, record)
    card_rows({"run": record, "untrained": []})
    (shown,) = read_runs([checkpoint.parents[1]])
    facts(shown)
    [number(value) for value in shown.record.values()]


def export(folder: Path) -> None:
    model = loaded(tiny_rae(folder / "parts"))
    write_folder(model, folder)
    write_record({"encoder": model.description["encoder"], "step": 3, "epoch": 1, "weights": "ema", "scores": [], "run": {"result": {}},
                  "config": {"model": {"lpips_arch": {"weights": "tiny"}}}}, folder)  # fmt: skip


def use_export(folder: Path) -> None:
    read_decoder(folder)
    opened = read_folder(folder)
    untrained_parts(opened.description, read_record(folder).get("run"))


def use_record(folder: Path) -> None:
    record = read_record(folder)
    untrained_parts({**record, "encoder": record.get("encoder") or {"weights": "a"}}, record.get("run"))


DIFFUSERS = {
    "_class_name": "AutoencoderRAE", "encoder_type": "dinov2", "encoder_hidden_size": 64, "encoder_patch_size": 14, "encoder_num_hidden_layers": 2,
    "decoder_hidden_size": 32, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 4, "decoder_intermediate_size": 64, "patch_size": 16,
    "encoder_input_size": 56, "encoder_norm_mean": [0.5, 0.5, 0.5], "noise_tau": 0.8, "latents_mean": None, "latents_std": None, "image_size": 64,
}  # fmt: skip
RESULT = {"images": 1000, "split": "val", "rfid": 0.5, "data_dir": "a", "noise_sigma": 0.1}
SCORES = {"features": "pretrained", "results": [RESULT]}


def lines(content: Any, name: str = "config.json") -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(json.dumps(content))  # type: ignore[return-value]


def weights_index(folder: Path) -> None:
    (folder / "a.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    lines({"metadata": {"total_size": 3}, "weight_map": {"a": "a.safetensors"}}, "model.safetensors.index.json")(folder)


KINDS: dict[str, tuple[Callable[[Path], Any], str, Callable[[Path], Any]]] = {
    "state.json": (dataset, "state.json", open_dataset),
    "dataset_info.json": (dataset, "dataset_info.json", open_dataset),
    "dataset_dict.json": (lambda folder: (dataset(folder / "train"), lines({"splits": ["train"]}, "dataset_dict.json")(folder)), "dataset_dict.json", open_dataset),
    "latents": (latents, "index.json", read_latents),
    "run.json": (run, "runs/2026-01-01/00-00-00/run.json", use_run),
    "config.json of an export": (export, "config.json", use_export),
    "record of an export": (export, "rae_export.json", use_record),
    "decoder": (lines(DECODER), "config.json", DecoderConfig.read),
    "diffusers": (lines(DIFFUSERS), "config.json", lambda folder: grid(decoder_config(read_config(folder)) and read_config(folder))),
    "scores": (lines(SCORES, "scores.json"), "scores.json", lambda folder: card_rows({"scores": [_scores(folder / "scores.json")], "untrained": []})),
    "index of weights": (weights_index, "model.safetensors.index.json", check_folder),
    "preprocessor": (lines({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": True}, "preprocessor_config.json"), "preprocessor_config.json",
                     lambda folder: read_statistics(str(folder), STATISTICS["half"])),
}  # fmt: skip
"""Name -> (function that writes a valid folder, the JSON file in it, function that uses the folder as the scripts do)."""


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_json_is_read_or_named(tmp_path, kind):
    make, name, use = KINDS[kind]
    make(tmp_path)
    use(tmp_path)
    file = tmp_path / name
    refused: list[str] = []
    texts = damaged(json.loads(file.read_text()))
    for text in itertools.islice(texts, 0, None, 5 if use is use_export else 1):  # opening a model is slow
        file.write_text(text, encoding="utf-8", errors="surrogateescape")
        try:
            use(tmp_path)
        except UserError as error:
            refused.append(str(error))
    assert refused or kind == "run.json"
    assert not [text for text in refused if " at 0x" in text]


@pytest.mark.parametrize("damage", ["bit", "nan"])
def test_damaged_latent_is_detected(tmp_path, damage):
    if damage == "nan":
        writer = LatentWriter(tmp_path, (2, 1, 1), torch.float16, 0)
        with pytest.raises(UserError, match="row 7 hold NaN or infinity"):
            writer.write(torch.tensor([1.0, 1e6]).view(1, 2, 1, 1), torch.tensor([7]), torch.tensor([0]))
        return
    latents(tmp_path)
    read_latents(tmp_path)
    (shard,) = tmp_path.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    at = data.rindex(torch.ones(2).numpy().tobytes())  # of the last latent
    data[at + 2] ^= 4
    shard.write_bytes(data)
    with pytest.raises(UserError, match="latents 2 to 2 are not what was written"):
        read_latents(tmp_path)
    source = LatentStore(tmp_path)  # as training reads it
    assert len(source.encoded(0)) == 8
    with pytest.raises(BadImage, match="not what was written"):
        source.encoded(len(source) - 1)
