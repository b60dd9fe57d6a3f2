"""Measure on one NVIDIA GPU what there is to measure, in ten minutes and without supervision.

    python scripts/gpu_report.py                                   make gpu
    python scripts/gpu_report.py --rae ../RAE --raev2 ../RAEv2     with the others' own code, from checkouts
    python scripts/gpu_report.py --only b,c                        these parts, again
    python scripts/gpu_report.py --dry                             no GPU: the same code at tiny size, into a temporary folder

It needs no network, data or weights: networks have their real size and are untrained. Each part is a process with a share
of the time; what one leaves goes to the next. Results are in benchmarks/results/gpu_NAME.json as soon as they are there, and
a later call adds the parts that are missing. README's table is made of it: python docs/benchmark_table.py --write.

Exit codes: 0 all parts are there, 1 some are not, 2 no GPU or wrong options.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from src.core.files import write_text
from src.core.options import above_zero
from src.core.run_names import git_state

RESERVE_S = 30
"""Of the given minutes, kept for starts and ends."""


class Part(NamedTuple):
    """Name of its function in `benchmarks/gpu_parts.py`, share of the time against the other parts', what only it imports."""

    name: str
    share: float
    needs: tuple[str, ...] = ()


PARTS = {
    "a": Part("environment", 15),
    "b": Part("step", 150),
    "c": Part("largest_batch", 35),
    "d": Part("tests", 95, ("pytest", "hydra", "omegaconf")),
    "e": Part("half_precision", 30),
    "f": Part("evaluation", 45),
    "g": Part("runs", 95, ("hydra", "omegaconf")),
    "h": Part("peers", 100),
    "i": Part("data_path", 15),
    "j": Part("switches", 30),
}
NEEDED = {"torch", "pytorch_lightning", "transformers", "pydantic", "safetensors", "numpy", "PIL", "yaml", "simplejpeg"}
PACKAGES = {"hydra": "hydra-core", "pytorch_lightning": "pytorch-lightning", "PIL": "pillow", "yaml": "pyyaml"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=above_zero, default=10, help="for the whole (default: %(default)g)")
    parser.add_argument("--only", default="", metavar="b,c", help="parts, measured again where they are there already")
    parser.add_argument("--rae", type=Path, metavar="DIR", help="checkout of github.com/bytetriper/RAE, for part h")
    parser.add_argument(
        "--raev2", type=Path, metavar="DIR", help="checkout of github.com/nanovisionx/RAEv2, for part h"
    )
    parser.add_argument(
        "--dry", action="store_true", help="tiny, on the CPU, into a temporary folder; measures nothing"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: benchmarks/results/gpu_NAME.json")
    parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)  # what the program starts itself with
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.out)
        return 0
    arguments.only = [letter for letter in arguments.only.split(",") if letter]
    if unknown := set(arguments.only) - PARTS.keys():
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    for folder in (arguments.rae, arguments.raev2):
        if folder is not None and not (folder / "src/train_stage1.py").is_file():
            parser.error(f"{folder}: no src/train_stage1.py there")
    with tempfile.TemporaryDirectory(prefix="gpu_report_") as scratch:
        return report(arguments, Path(scratch), time.monotonic() + 60 * arguments.minutes - RESERVE_S)


def report(arguments: argparse.Namespace, scratch: Path, deadline: float) -> int:
    """Measure the parts that are missing, or that are asked for, and print the table. deadline: of `time.monotonic`."""
    modules = NEEDED.union(*(part.needs for part in PARTS.values()))
    missing = {module for module in modules if importlib.util.find_spec(module) is None}
    if missing:
        without = [letter for letter, part in PARTS.items() if missing & NEEDED.union(part.needs)]
        names = " ".join(sorted(PACKAGES.get(module, module) for module in missing))
        print(f"Not installed here: {names}. Parts {', '.join(without)} need them and are not run. pip install {names}")
        if missing & NEEDED:
            return 2
    first = measure("a", arguments, scratch, deadline, {})
    if "machine" not in first["result"]:
        reason = first.get("error", first["status"]).strip().splitlines()[-1]  # of a traceback
        print(f"No part runs here: {reason}\nWithout a GPU: python scripts/gpu_report.py --dry")
        return 2
    device = first["result"]["machine"]["device"]
    folder = Path(tempfile.mkdtemp(prefix="gpu_report_dry_")) if arguments.dry else ROOT / "benchmarks/results"
    out = arguments.out or folder / f"gpu_{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}.json"
    content = json.loads(out.read_text()) if out.is_file() else {"parts": {}}
    content["cuda_device"] = None if arguments.dry else device
    parts = content["parts"]
    wanted = arguments.only or [letter for letter in PARTS if parts.get(letter, {}).get("status") != "done"]
    wanted = [letter for letter in wanted if letter != "a"]
    keep(out, content, "a", first)
    statuses, shares = [first["status"]], {letter: part.share for letter, part in PARTS.items()}
    if None in (arguments.rae, arguments.raev2):
        shares["h"] = 0.0
    for number, letter in enumerate(wanted):
        left = deadline - time.monotonic()
        share = left * shares[letter] / max(sum(shares[other] for other in wanted[number:]), 1)
        if lacking := missing.intersection(PARTS[letter].needs):
            found: dict[str, Any] = {"status": "not run", "error": f"not installed: {', '.join(sorted(lacking))}"}
        elif not shares[letter]:
            found = {"status": "not run", "error": "no checkouts given: --rae DIR --raev2 DIR"}
        elif left < 1:
            found = {"status": "not run", "error": "no time was left"}
        else:
            earlier = {other: parts[other]["result"] for other in parts if "result" in parts[other]}
            found = measure(letter, arguments, scratch, time.monotonic() + share, earlier)
        keep(out, content, letter, found)
        statuses.append(found["status"])
    show(content)
    print(f"written to {out}")
    return int(set(statuses) != {"done"})


def keep(out: Path, content: dict[str, Any], letter: str, found: dict[str, Any]) -> None:
    """Write the file with one more part; what was measured before stays where nothing came of this call."""
    if found["status"] == "done" or content["parts"].get(letter, {}).get("status") != "done":
        content["parts"][letter] = found
    content["parts"] = dict(sorted(content["parts"].items()))
    write_text(out, json.dumps(content, indent=1) + "\n")


def measure(
    letter: str, arguments: argparse.Namespace, scratch: Path, deadline: float, earlier: dict[str, Any]
) -> dict[str, Any]:
    """Run one part until `deadline` and return its status, seconds and result, whatever comes of it."""
    began, job, log = time.monotonic(), scratch / f"{letter}.json", scratch / f"{letter}.log"
    print(f"({letter}) {PARTS[letter].name}: at most {deadline - began:.0f} s", flush=True)
    checkouts = {"rae": arguments.rae, "raev2": arguments.raev2}
    task = {"dry": arguments.dry, "deadline": deadline, "scratch": str(scratch), "earlier": earlier}
    task["checkouts"] = {name: folder and str(folder.resolve()) for name, folder in checkouts.items()}
    job.write_text(json.dumps(task))
    result, code = job.with_suffix(".result"), None
    result.unlink(missing_ok=True)
    if arguments.dry and letter != "a":  # to start Python takes longer there than most parts
        work(letter, job)
    else:
        command = [sys.executable, __file__, f"--worker={letter}", f"--out={job}"]
        with log.open("w") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(max(deadline - time.monotonic(), 1))
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()
    found = json.loads(result.read_text()) if result.is_file() else {}
    found = {"result": {}, "status": "out of time" if code is None else "failed", **found}
    if found["status"] == "failed" and "error" not in found:
        found["error"] = f"exit code {code}: {log.read_text()[-3000:].strip()}"
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def work(letter: str, job: Path) -> None:
    """Measure one part in this process; what is there so far is written after each figure."""
    out, task = job.with_suffix(".result"), json.loads(job.read_text())
    task |= {"scratch": Path(task["scratch"]), "write": lambda result: write_text(out, json.dumps({"result": result}))}
    measuring = None
    try:
        from benchmarks import gpu_parts

        measuring = gpu_parts.Job(**task)
        getattr(gpu_parts, PARTS[letter].name)(measuring)
        ended = {"status": measuring.status}
    except Exception:  # whatever it is, the other parts go on
        ended = {"status": "failed", "error": traceback.format_exc()[-3000:]}
    write_text(out, json.dumps({"result": measuring.result if measuring else {}, "git": git_state(), **ended}))


def show(content: dict[str, Any]) -> None:
    """Print the table: a line for each part and below it what it found."""
    print(f"\n{content['cuda_device'] or 'DRY RUN: no figure means anything'}")
    for letter, part in PARTS.items():
        found = content["parts"].get(letter, {"status": "not run"})
        reason = found.get("error", "").strip().splitlines()[-1:]
        print(
            f"({letter}) {part.name:15} {found['status']:12} {found.get('seconds', 0):4.0f} s  {''.join(reason)[:160]}"
        )
        for line in found.get("result", {}).get("summary", []):
            print(f"      {line}")


if __name__ == "__main__":
    sys.exit(main())
