"""`eval_rfid.py --report_card`: decoders side by side score as they do alone, also on generated latents."""

import json
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from src import eval_generation, eval_rfid, make_reference
from src.formats.checkpoint import load_trained
from src.formats.folder import write_folder
from tests.test_eval_generation import SCORES
from tests.test_eval_rfid import LAYERED, QUICK, write_checkpoint, write_images

QUALITY = ("rfid_untrained", "psnr", "ssim", "lpips_untrained")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Write images, a checkpoint, an export with other decoder weights, generated latents and a reference."""
    root = tmp_path_factory.mktemp("card")
    data = write_images(root / "pictures", 9)
    loaded = load_trained(write_checkpoint(root / "a.ckpt", data))
    with torch.no_grad():
        for parameter in loaded.rae.decoder.parameters():
            parameter.mul_(0.8)
    (root / "b").mkdir()
    write_folder(loaded, root / "b", with_encoder=True)
    latents = torch.randn(6, *loaded.rae.latent_shape, generator=torch.Generator().manual_seed(0))
    np.savez(root / "z.npz", latents=latents.numpy())
    words = f"{QUICK} --data_dir {data} --split all --image_size 64 --kind images --output {root}/r.npz"
    assert make_reference.main(shlex.split(words)) == 0
    return root


def run(program, place, line):
    words = f"{QUICK} {line} --json {place}/out.json"
    assert program.main(shlex.split(words)) == 0
    return json.loads((place / "out.json").read_text())["results"]


def test_decoders_side_by_side_score_as_they_do_alone(place, tmp_path, capsys):
    data, generated = f"--data_dir {place}/pictures --split all", f"--latents {place}/z.npz"
    line = f"{data} --noise_sigma 0 0.4 {generated} --generation_reference {place}/r.npz --report_card {tmp_path}/card"
    together = run(eval_rfid, place, f"--decoder {place}/a.ckpt {place}/b {line} --num_samples 8")
    printed = capsys.readouterr().out
    found = [(row["model"], row["noise_sigma"]) for row in together]
    assert found == [(f"{place}/{model}", sigma) for model in ("a.ckpt", "b") for sigma in (0, 0.4)]
    for model, rows in ((f"--checkpoint {place}/a.ckpt", together[:2]), (f"--decoder {place}/b", together[2:])):
        alone = run(eval_rfid, place, f"{model} {data} --noise_sigma 0 0.4 --num_samples 8")
        for row, own in zip(rows, alone, strict=True):
            same = [name for name in QUALITY if name in own]  # an export doesn't name LPIPS files
            assert [row[name] for name in same] == [own[name] for name in same] and len(same) >= 3  # to the last digit
    first, second = together[0], together[2]
    assert len({row[name] for row in together for name in QUALITY}) == 16
    words = f"{generated} --decoder {place}/a.ckpt {place}/b --reference {place}/r.npz"
    for row, own in zip((first, second), run(eval_generation, place, words), strict=True):
        assert [row[name] for name in SCORES] == [own[name] for name in SCORES] and row["generated"] == 6
    assert "gfid_untrained" not in together[1]

    folder = tmp_path / "card"
    assert sorted(path.name for path in folder.iterdir()) == ["report_card.json", "report_card.md", "sheet.png"]
    assert json.loads((folder / "report_card.json").read_text())["results"] == together
    card = (folder / "report_card.md").read_text()
    figure = f"{second['gfid_untrained']:.4f}"
    for words in (
        "8 of 9 images",
        f"6 generated latents against {place}/r.npz",
        figure,
        "rFID (untrained)",
        str(place / "b"),
    ):
        assert words in card
    assert figure in printed
    with Image.open(folder / "sheet.png") as sheet:  # originals and four variants of eight images, names on the left
        assert sheet.height == 5 * 66 - 2 and 8 * 66 < sheet.width < 8 * 66 + 300
        assert np.asarray(sheet)[:, : sheet.width - 8 * 66].min() < 64


def test_incompatible_options_are_rejected(place, capsys, tmp_path):
    with pytest.raises(SystemExit):
        eval_rfid.main(shlex.split(f"--checkpoint a --data_dir b --latents {place}/z.npz"))
    assert "--latents and --generation_reference go together" in capsys.readouterr().err
    small = write_checkpoint(tmp_path / "small.ckpt", place / "pictures", model={**LAYERED, "image_size": 32})
    words = f"{QUICK} --decoder {place}/b {small} --data_dir {place}/pictures"
    assert eval_rfid.main(shlex.split(words)) == 1
    assert "different sizes" in capsys.readouterr().err
