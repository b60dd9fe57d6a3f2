"""Format scores as tables, and draw models side by side on a sheet, for `src/eval_rfid.py --report_card`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from src.core.images import GAP_PX, WHITE, save_png, sheet
from src.evaluation.image_pairs import Pair

TABLE, NUMBERS = "report_card.md", "report_card.json"
LABELS = {
    "rfid": "rFID", "rfd": "rFD", "psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS",
    "gfid": "gFID", "gfd": "gFD", "sfid": "sFID", "inception_score": "IS", "precision": "prec.", "recall": "rec.",
}  # fmt: skip
LINE_PX, LETTER_PX = 12, 6  # of Pillow's default font


def label(key: str) -> str | None:
    """Return the name of a score in tables; None if `key` is not that of a score."""
    name, untrained = key.removesuffix("_untrained"), key.endswith("_untrained")
    score, _, space = ("", "", "") if name in LABELS else name.rpartition("_")
    if name not in LABELS and score not in LABELS:
        return None
    return " ".join([LABELS[score or name], *([space] if space else []), *(["(untrained)"] * untrained)])


def score_rows(
    results: Sequence[Mapping[str, Any]], words: Sequence[str] = ("data_dir", "model", "layers")
) -> list[list[str]]:
    """Return a heading and a row for each result: the `words` in which they differ, sigma, and every score that any has."""
    names = {"data_dir": "data", "model": "model", "layers": "blocks"}
    words = [
        word
        for word in words
        if len({result[word] for result in results}) > 1 or (word == "layers" and results[0][word])
    ]
    keys = [key for key in dict.fromkeys(key for result in results for key in result) if label(key)]
    rows = [[*(names[word] for word in words), "sigma", *(str(label(key)) for key in keys)]]
    for r in results:
        figures = (f"{r[key]:.4f}" if key in r else "" for key in keys)
        rows.append([*(str(r[word] or "own") for word in words), f"{r['noise_sigma']:g}", *figures])
    return rows


def aligned(rows: Sequence[Sequence[str]], edge: str = "", between: str = "  ") -> list[str]:
    """Return the rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (between.join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return [f"{edge}{line}{edge[::-1]}".rstrip() for line in lines]


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the report card as Markdown."""
    rows = score_rows(results)
    rows.insert(1, ["-" * max(3, len(cell)) for cell in rows[0]])
    first = results[0]
    images = f"{first['images']:,} of {first['available']:,} images, {first['split']} of {first['data_dir']}"
    generated = ""
    if "generated" in first:
        generated = f"; {first['generated']:,} generated latents against {first['generated_against']}"
    return f"{images}{generated}. sigma: noise on raw latents.\n\n" + "\n".join(aligned(rows, "| ", " | ")) + "\n"


def save_sheet(pairs: Sequence[Pair], names: Sequence[Sequence[str]], file: Path) -> None:
    """Write a sheet: originals, then a row for each variant, labelled with its (model, blocks, sigma) in `names`."""
    rows = [torch.stack([pair.original for pair in pairs])]
    rows += list(torch.stack([pair.reconstructions for pair in pairs]).transpose(0, 1))
    picture = sheet(rows)  # 3 H W
    texts = [["original"]]
    texts += [[_short(model, names), *filter(None, [blocks]), f"sigma {sigma}"] for model, blocks, sigma in names]
    margin = LETTER_PX * (2 + max(len(line) for lines in texts for line in lines))
    canvas = Image.new("RGB", (margin, picture.shape[1]), (WHITE,) * 3)
    height = rows[0].shape[-2] + GAP_PX
    for i, lines in enumerate(texts):
        top = i * height + (height - LINE_PX * len(lines)) // 2
        for number, line in enumerate(lines):
            ImageDraw.Draw(canvas).text((LETTER_PX, top + LINE_PX * number), line, fill=(0, 0, 0))
    words = torch.from_numpy(np.array(canvas)).permute(2, 0, 1)
    save_png(torch.cat([words, picture], dim=2), file)


def _short(model: str, names: Sequence[Sequence[str]]) -> str:
    """Return the last 32 characters of a model's path relative to the folder that all models share."""
    models = {os.path.abspath(name[0]) for name in names}
    shared = os.path.commonpath(models) if len(models) > 1 else os.path.dirname(os.path.abspath(model))
    return os.path.relpath(os.path.abspath(model), shared)[-32:]
