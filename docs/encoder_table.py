"""Generate the table of docs/encoders.md from src/models/encoder_presets.py.

    python docs/encoder_table.py             print it
    python docs/encoder_table.py --write     write it between the markers in docs/encoders.md

Parameters and floating-point operations are counted on torch's meta device, for the blocks that run and the layers
before them. A test compares the page with the table.
"""

import argparse
import json
import logging
import re
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from src.models.encoder_presets import PRESETS, Preset  # noqa: E402
from src.models.encoders import DINOv3wNorm, encoder_class  # noqa: E402

PAGE = ROOT / "docs" / "encoders.md"
GRID = 16
"""Latents per side, for images of 256 px and a decoder patch of 16 px."""
BEGIN, END = "<!-- encoder table -->", "<!-- /encoder table -->"
HEAD = (
    "name", "class", "hub id", "blocks", "width", "patch", "input px", "parameters (M)", "GFLOP", "licence", "decoders",
)  # fmt: skip


def cost(preset: Preset) -> tuple[int, int]:
    """Return the number of parameters that a latent depends on, and the floating-point operations for a 256 px image."""
    kind = DINOv3wNorm if preset.encoder_cls == "TimmViT" else encoder_class(preset.encoder_cls)  # same sizes
    types = {"woreg": "dinov2", "webssl": "dinov2", "msn": "vit_msn"}
    size, model_type = preset.size, next((value for part, value in types.items() if part in preset.name), None)
    config = {
        "model_type": model_type or next(iter(kind.models)),
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": size.heads,
        "intermediate_size": size.mlp,
        "use_swiglu_ffn": size.gated,
        "use_gated_mlp": size.gated,
        "patch_size": preset.patch,
        "image_size": preset.native_px,
        "max_img_size": preset.native_px,
        "num_register_tokens": 4,
    }
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"), FlopCounterMode(display=False) as counter:
        Path(folder, "config.json").write_text(json.dumps(config))
        encoder = kind(folder, weights="untrained")
        encoder(torch.empty(1, 3, GRID * preset.patch, GRID * preset.patch))
    return sum(parameter.numel() for parameter in encoder.parameters_in_use()), counter.get_total_flops()


def row(preset: Preset) -> tuple[str, ...]:
    parameters, operations = cost(preset)
    about = "~" if preset.encoder_cls == "TimmViT" else ""
    return (
        f"`{preset.name}`", preset.encoder_cls, preset.hub_id, str(preset.params.get("layers", "last")),
        str(preset.size.width), str(preset.patch), str(GRID * preset.patch),
        f"{about}{parameters / 1e6:,.0f}", f"{about}{operations / 1e9:,.0f}", preset.licence, preset.decoders,
    )  # fmt: skip


def line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def table() -> str:
    return "\n".join([line(HEAD), line(("---",) * len(HEAD)), *(line(row(preset)) for preset in PRESETS.values())])


def replaced(text: str) -> str:
    """Return the page's text with an up-to-date table."""
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{table()}\n{END}", text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write it to docs/encoders.md")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # each model would warn that it is untrained
    if options.write:
        PAGE.write_text(replaced(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
