"""Generate the speed table of the two READMEs from benchmarks/results/*.json.

    python docs/benchmark_table.py             print it
    python docs/benchmark_table.py --write     write it between the markers in README.md and README.zh-CN.md

A test compares the pages with the files.
"""

import argparse
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmark table -->", "<!-- /benchmark table -->"
HEADS = {
    "README.md": ("what", "where", "images/s", "against", "peak memory", "file"),
    "README.zh-CN.md": ("内容", "硬件", "图像/秒", "对比", "显存/内存峰值", "文件"),
}
NOTHING = {
    "README.md": "Nothing is measured yet.",
    "README.zh-CN.md": "尚无测量结果。",
}
PEERS = {"official": "official RAE", "raev2": "RAEv2", "raev2_compile": "RAEv2 --compile"}
NAMES = {"ours": "step", "compiled": "step, compiled"}
DATA = {"arrow": "data path, Arrow", "ours_resized": "data path, stored with --resize_shorter 384"}
Row = tuple[str, ...]


def rows() -> list[Row]:
    """Return a row of cells for each measurement; steps timed on a CPU are left out."""
    found: list[Row] = []
    for file in sorted(RESULTS.glob("*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        link = f"[{file.name}](benchmarks/results/{file.name})"
        if "parts" in content and not content["cuda_device"]:
            raise SystemExit(f"{file}: names no CUDA device, so nothing in it was measured on one. Remove it.")
        for row in _rows(content):
            found.append((*row, link))
    return found


def table(page: str) -> str:
    body = rows()
    if not body:
        return NOTHING[page]
    lines = [HEADS[page], ("---",) * len(HEADS[page]), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replaced(page: str, text: str) -> str:
    """Return the text of a page with an up-to-date table."""
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{table(page)}\n{END}", text, flags=re.DOTALL)


def _rows(content: dict[str, Any]) -> Iterator[Row]:
    results = content.get("results", {})
    if "parts" in content:
        yield from _gpu(content)
    elif "computed" in content:
        yield from _computed(content)
    elif any("/" in name for name in results) and content["arguments"]["device"] != "cpu":
        yield from _steps(content, content["device"])
    elif "pillow" in results:
        yield from _data(content)


def _steps(content: dict[str, Any], device: str) -> Iterator[Row]:
    """Yield the rows of benchmarks/train_step.py: ours against the published order of computation, phase by phase."""
    said = content["arguments"]
    sizes = f"{said['encoder']} + {said['decoder']}, {said['image_size']} px, batch {said['batch']}"
    for name, measured in content["results"].items():
        precision, phase = name.split("/")
        if "official" in measured:
            yield from _beside_peers(measured, phase, precision, sizes, device)
            continue
        plain = measured.get("plain", {})
        for variant, label in NAMES.items():
            if "seconds" not in measured.get(variant, {}):  # not measured, or out of memory
                continue
            own = measured[variant]
            against = memory = ""
            if "seconds" in plain:
                against = f"{_ratio(plain, own):.2f} x plain"
            if own["peak_memory_gb"] is not None:
                memory = f"{own['peak_memory_gb']:.2f} GB"
                memory += f" ({own['peak_memory_gb'] / plain['peak_memory_gb']:.2f} x)" if "seconds" in plain else ""
            what = f"{label}: {phase}, {precision}; {sizes}"
            yield what, device, f"{own['images_per_s']:.3g}", against, memory


def _beside_peers(measured: dict[str, Any], phase: str, precision: str, sizes: str, where: str) -> Iterator[Row]:
    """Yield the rows of benchmarks/peers.py: ours against third-party code."""
    for variant, label in NAMES.items():
        own, official = measured.get(variant, {}), measured["official"]
        if "seconds" not in own:
            continue
        against = []
        for peer, words in PEERS.items():
            if why := measured.get(peer, {}).get("not_measured"):
                against.append(f"{words}: {why}")
            elif peer in measured:
                against.append(f"{_ratio(measured[peer], own):.2f} x {words}")
        memory = f"{own['peak_memory_gb']:.2f} GB"
        if "seconds" in official:
            memory += f" ({own['peak_memory_gb'] / official['peak_memory_gb']:.2f} x)"
        yield f"{label}: {phase}, {precision}; {sizes}", where, f"{own['images_per_s']:.3g}", ", ".join(against), memory


def _gpu(content: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows of scripts/gpu_report.py: the step alone, the comparison with others, and the largest batches."""
    found = {letter: part.get("result", {}) for letter, part in content["parts"].items()}
    beside = found.get("h", {})
    for measured in (found.get("b", {}), beside, beside.get("batch 48", {})):
        if "results" in measured:
            yield from _steps(measured, content["cuda_device"])
    for phase in ("warmup", "gan"):
        if "fits" in (batch := found.get("c", {}).get(phase, {})):
            text = f"largest batch {batch['fits']}, computed {batch['computed']}"
            yield f"{text}: {phase}, bf16; dinov2_b + ViTXL, 256 px", content["cuda_device"], "", "", ""


def _computed(content: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows of benchmarks/memory.py."""
    said = content["arguments"]
    sizes = f"{said['encoder']} + {said['decoder']}, {said['image_size']} px, batch {content['batch']}"
    for phase, measured in content["results"].items():
        own, plain = measured["ours"], measured["plain"]
        memory = f"{own['peak_gib']:.1f} GiB ({own['peak_gib'] / plain['peak_gib']:.2f} x)"
        what = f"step: {phase}, {said['precision']}; {sizes}"
        yield what, "memory of the tensors, computed without a GPU", "", "plain (memory)", memory


def _ratio(other: dict[str, Any], own: dict[str, Any]) -> float:
    """Return the median speed-up over paired repetitions."""
    return statistics.median(a / b for a, b in zip(other["seconds_all"], own["seconds_all"], strict=True))


def _data(content: dict[str, Any]) -> Iterator[Row]:
    """Yield the rows of benchmarks/data.py, measured on one core."""
    what = f"{content['size']} px, {content['files']} images"
    for name, label in DATA.items():
        measured = content["results"][name]
        against = f"{measured['ratio']:.2f} x Pillow"
        yield f"{label}; {what}", content["hardware"], f"{measured['images_per_s']:.0f}", against, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write it to the READMEs")
    options = parser.parse_args()
    if not options.write:
        print(table("README.md"))
        return
    for page in HEADS:
        file = ROOT / page
        file.write_text(replaced(page, file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
