"""Scores as text for people."""

from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
SCORES = {"rfid": "rFID", "rfid_untrained": "rFID (untrained Inception)"}
QUALITY = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS", "lpips_untrained": "LPIPS (untrained)"}


def text(results: Sequence[Result]) -> str:
    """Return a paragraph for each data set: its first variant in words, all of several variants as a table."""
    paragraphs = []
    for data_dir in dict.fromkeys(result["data_dir"] for result in results):
        own = [result for result in results if result["data_dir"] == data_dir]
        first = own[0]
        lines = [f"Images: {first['images']:,} of {first['available']:,}, {first['split']} of {data_dir}"]
        lines += [f"{label} Score: {first[key]:.4f}" for key, label in SCORES.items() if key in first]
        lines.append(", ".join(f"{label}: {first[key]:.4f}" for key, label in QUALITY.items() if key in first))
        paragraphs.append("\n".join(lines + (_table(own) if len(own) > 1 else [])) + "\n")
    return "\n".join(paragraphs)


def _table(results: Sequence[Result]) -> list[str]:
    columns = {key: label for key, label in (SCORES | QUALITY).items() if key in results[0]}
    rows = [["blocks", "sigma", *columns.values()]]
    rows += [[r["layers"] or "own", f"{r['noise_sigma']:g}", *(f"{r[key]:.4f}" for key in columns)] for r in results]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
