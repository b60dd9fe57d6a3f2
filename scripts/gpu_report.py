"""Run all GPU measurements of the project on one NVIDIA GPU, unattended, in ten minutes.

    python scripts/gpu_report.py                                   same as `make gpu`
    python scripts/gpu_report.py --rae ../RAE --raev2 ../RAEv2     also the official code and RAEv2, from checkouts
    python scripts/gpu_report.py --only b,c                        only these parts, even if they are done
    python scripts/gpu_report.py --dry                             no GPU: the same code at tiny size, into a temporary folder

Needs no internet, data or weights: networks have their real size and are untrained. Each part is a process with a share of
the time; unused time goes to the next part. Parts d to g measure no speed and run concurrently. Each result is written to
benchmarks/results/gpu_NAME.json as soon as it is available, and a later call adds the missing parts. To update the table in
README from that file: python docs/benchmark_table.py --write.

Exit codes: 0 all parts done, 1 some are not, 2 no GPU or wrong options.
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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from src.core.files import write_text
from src.core.options import above_zero
from src.core.run_names import git_state

RESERVE_S = 30
"""Seconds of --minutes that are reserved for starting and ending processes."""


class Part(NamedTuple):
    """Function name in `benchmarks/gpu_parts.py`, share of the time relative to other parts, extra modules that it imports."""

    name: str
    share: float
    needs: tuple[str, ...] = ()


PARTS = {
    "a": Part("environment", 15),
    "b": Part("step", 190),
    "c": Part("largest_batch", 45),
    "d": Part("tests", 95, ("pytest", "hydra", "omegaconf")),
    "e": Part("half_precision", 95),
    "f": Part("evaluation", 95),
    "g": Part("runs", 95, ("hydra", "omegaconf")),
    "h": Part("peers", 180),
    "i": Part("data_path", 12),
    "j": Part("switches", 25),
}
TOGETHER = "defg"
"""Parts that measure no speed: they run concurrently, and each gets the whole share."""
NEEDED = {"torch", "pytorch_lightning", "transformers", "pydantic", "safetensors", "numpy", "PIL", "yaml", "simplejpeg"}
PACKAGES = {"hydra": "hydra-core", "pytorch_lightning": "pytorch-lightning", "PIL": "pillow", "yaml": "pyyaml"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=above_zero, default=10, help="total time (default: %(default)g)")
    parser.add_argument("--only", default="", metavar="b,c", help="measure only these parts, even if they are done")
    parser.add_argument("--rae", type=Path, metavar="DIR", help="checkout of github.com/bytetriper/RAE, for part h")
    parser.add_argument(
        "--raev2", type=Path, metavar="DIR", help="checkout of github.com/nanovisionx/RAEv2, for part h"
    )
    parser.add_argument(
        "--dry", action="store_true", help="tiny, on the CPU, into a temporary folder; measures nothing"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: benchmarks/results/gpu_NAME.json")
    parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)  # for internal use
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
    """Measure the missing parts, or those of --only, and print the table. `deadline` is in terms of `time.monotonic`."""
    modules = NEEDED.union(*(part.needs for part in PARTS.values()))
    missing = {module for module in modules if importlib.util.find_spec(module) is None}
    if missing:
        without = [letter for letter, part in PARTS.items() if missing & NEEDED.union(part.needs)]
        names = " ".join(sorted(PACKAGES.get(module, module) for module in missing))
        print(f"Not installed here: {names}. Parts {', '.join(without)} need them and are skipped: pip install {names}")
        if missing & NEEDED:
            return 2
    first = measure(["a"], start(["a"], arguments, scratch), arguments, scratch, deadline, {})["a"]
    if "machine" not in first["result"]:
        reason = first.get("error", first["status"]).strip().splitlines()[-1]  # the last line of a traceback
        print(f"No part runs here: {reason}\nWithout a GPU: python scripts/gpu_report.py --dry")
        return 2
    device = first["result"]["machine"]["device"]
    out = arguments.out
    if out is None:
        folder = Path(tempfile.mkdtemp(prefix="gpu_report_dry_")) if arguments.dry else ROOT / "benchmarks/results"
        out = folder / f"gpu_{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}.json"
    content = json.loads(out.read_text()) if out.is_file() else {"parts": {}}
    content["cuda_device"] = None if arguments.dry else device
    parts = content["parts"]
    wanted = arguments.only or [letter for letter in PARTS if parts.get(letter, {}).get("status") != "done"]
    keep(out, content, "a", first)
    statuses, reasons = [first["status"]], {}
    for letter in wanted:
        if lacking := missing.intersection(PARTS[letter].needs):
            reasons[letter] = f"not installed: {', '.join(sorted(lacking))}"
        elif letter == "h" and None in (arguments.rae, arguments.raev2):
            reasons[letter] = "no checkouts given: --rae DIR --raev2 DIR"
    for letter, reason in reasons.items():
        keep(out, content, letter, {"status": "not run", "error": reason})
        statuses.append("not run")
    runnable = [letter for letter in PARTS if letter in wanted and letter not in reasons and letter != "a"]
    groups = [list(group) for _, group in groupby(runnable, lambda letter: "" if letter in TOGETHER else letter)]
    shares = [PARTS[group[0]].share for group in groups]
    workers = start(groups[0] if groups else [], arguments, scratch)
    try:
        for number, group in enumerate(groups):
            now, ready = time.monotonic(), workers
            share = (deadline - now) * shares[number] / sum(shares[number:])
            # The next group imports meanwhile, which takes ten seconds or more.
            workers = start(groups[number + 1] if number + 1 < len(groups) else [], arguments, scratch)
            earlier = {other: parts[other]["result"] for other in parts if "result" in parts[other]}
            for letter, found in measure(group, ready, arguments, scratch, now + share, earlier).items():
                keep(out, content, letter, found)
                statuses.append(found["status"])
    finally:
        end(workers)
    show(content)
    print(f"written to {out}")
    return int(set(statuses) != {"done"})


def keep(out: Path, content: dict[str, Any], letter: str, found: dict[str, Any]) -> None:
    """Write the file with one more part; an earlier complete result is only replaced by a complete one."""
    if found["status"] == "done" or content["parts"].get(letter, {}).get("status") != "done":
        content["parts"][letter] = found
    content["parts"] = dict(sorted(content["parts"].items()))
    write_text(out, json.dumps(content, indent=1) + "\n")


def start(letters: Sequence[str], arguments: argparse.Namespace, scratch: Path) -> dict[str, subprocess.Popen[bytes]]:
    """Start processes that wait for a job from `measure`. A dry run has none: starting takes longer than most parts."""
    workers = {}
    for letter in letters:
        job = scratch / f"{letter}.json"
        for stale in (job, job.with_suffix(".result")):
            stale.unlink(missing_ok=True)
        if not arguments.dry:
            command = [sys.executable, __file__, f"--worker={letter}", f"--out={job}"]
            with job.with_suffix(".log").open("w") as log:
                workers[letter] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    return workers


def end(workers: Mapping[str, subprocess.Popen[bytes]]) -> None:
    """Kill processes and their children."""
    for worker in workers.values():
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def measure(
    letters: Sequence[str],
    workers: Mapping[str, subprocess.Popen[bytes]],
    arguments: argparse.Namespace,
    scratch: Path,
    deadline: float,
    earlier: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Run parts until `deadline`. Return status, seconds and result of each, even of those that failed."""
    began, found = time.monotonic(), {}
    checkouts = {"rae": arguments.rae, "raev2": arguments.raev2}
    task = {"dry": arguments.dry, "deadline": deadline, "scratch": str(scratch), "earlier": earlier}
    task["checkouts"] = {name: folder and str(folder.resolve()) for name, folder in checkouts.items()}
    for letter in letters:
        print(f"({letter}) {PARTS[letter].name}: at most {deadline - began:.0f} s", flush=True)
        write_text(scratch / f"{letter}.json", json.dumps(task))
        if arguments.dry:
            work(letter, scratch / f"{letter}.json")
    try:
        for worker in workers.values():
            with suppress(subprocess.TimeoutExpired):
                worker.wait(max(deadline - time.monotonic(), 0))
        codes = {letter: worker.poll() for letter, worker in workers.items()}
    finally:
        end(workers)
    for letter in letters:
        result, code = scratch / f"{letter}.result", codes.get(letter)
        known = json.loads(result.read_text()) if result.is_file() else {}
        known = {"result": {}, "status": "out of time" if code is None else "failed", **known}
        if known["status"] == "failed" and "error" not in known:
            known["error"] = f"exit code {code}: {result.with_suffix('.log').read_text()[-3000:].strip()}"
        found[letter] = {"seconds": round(time.monotonic() - began, 1), **known}
    return found


def work(letter: str, job: Path) -> None:
    """Measure one part in this process as soon as the file `job` exists; write the result so far after each measurement."""
    out, caller, began = job.with_suffix(".result"), os.getppid(), time.monotonic()
    measuring, known = None, {"git": git_state()}
    ended: dict[str, Any]
    try:
        from benchmarks import gpu_parts

        while not job.is_file():
            if os.getppid() != caller:
                return
            time.sleep(0.05)
        began, task = time.monotonic(), json.loads(job.read_text())
        task |= {"scratch": Path(task["scratch"])}
        measuring = gpu_parts.Job(**task, write=lambda result: write_text(out, json.dumps(known | {"result": result})))
        getattr(gpu_parts, PARTS[letter].name)(measuring)
        ended = {"status": measuring.status}
    except Exception:  # whatever it is, the other parts continue
        ended = {"status": "failed", "error": traceback.format_exc()[-3000:]}
    ended |= {"result": measuring.result if measuring else {}, "seconds": round(time.monotonic() - began, 1)}
    write_text(out, json.dumps(known | ended))


def show(content: dict[str, Any]) -> None:
    """Print the table: a line for each part, and its results below."""
    print(f"\n{content['cuda_device'] or 'DRY RUN: the numbers mean nothing'}")
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
