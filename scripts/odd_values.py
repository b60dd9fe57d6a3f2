"""Give every config key odd values and check that each of them ends in a run or in one error message.

    python scripts/odd_values.py                                    (hours; --keys 'trainer.*' for a part)
    python scripts/odd_values.py --stage 2 --keys 'model.*'

Each value is passed to `src/train.py` as an override, in a forked process on a copy of the project; accepted values train for
one update. Prints how many values were accepted, or ended in a message, a traceback or a timeout. OUTPUT gets a JSON line for
each value, with the end of its log. Exit status 1 for any traceback, kill or timeout.
"""

import argparse
import fnmatch
import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # instead of scripts/

from src.core.options import above_zero

ODD = {
    "text": "maybe", "empty": "''", "null": "null", "nan": "nan", "inf": "inf", "negative": "-1", "zero": "0",
    "huge": "1000000000000", "fraction": "1.5", "true": "true", "list": "[1]", "node": "{odd: 1}",
}  # fmt: skip
"""Values by kind, as typed after `KEY=`."""
MEMORY = 8 << 30
"""Bytes of address space that an attempt may use beyond its size at the start."""
STAGES = {
    1: ["experiment=rae_dummy", "data.image_size=64", "data.batch_size=4", "model.disc_upd_start_epoch=0",
        "model.disc_start_epoch=0"],
    2: ["experiment=dit_dummy", "data.batch_size=4", "model.network.hidden_size=[32,48]", "model.network.depth=[1,1]",
        "model.network.num_heads=[2,2]", "model.sampler.num_steps=3"],
}  # fmt: skip
QUICK = ["data.num_workers=0", "trainer.accelerator=cpu", "trainer.max_epochs=1", "trainer.max_steps=1",
         "trainer.limit_val_batches=1",
         "trainer.num_sanity_val_steps=0", "trainer.check_val_every_n_epoch=1", "model.scheduler.warmup_epochs=0"]  # fmt: skip


def keys(node: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """Yield the keys of a config, including those of nodes: `model`, `model.optimizer`, `model.optimizer.lr`."""
    for name, value in node.items():
        if name != "hydra":
            yield f"{before}{name}"
        if isinstance(value, Mapping):
            yield from keys(value, f"{before}{name}.")


def attempt(overrides: Sequence[str], log: Path, limit_s: float) -> tuple[str, str]:
    """Run `src/train.py` in a child of this process. Return the outcome and the end of `log`."""
    child = os.fork()
    if child == 0:
        _run_train(overrides, log)
    ended, status, began = 0, 0, time.monotonic()
    while not ended and time.monotonic() - began < limit_s:
        time.sleep(0.02)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    text = log.read_text(errors="replace")
    if not ended:
        outcome = "hang"
    elif "Traceback (most recent call last)" in text:
        outcome = "traceback"
    elif os.WIFSIGNALED(status):
        outcome = f"killed by signal {os.WTERMSIG(status)}"
    elif os.waitstatus_to_exitcode(status) == 0:
        outcome = "accepted"
    else:
        outcome = "message" if text.strip() else "no message"
    return outcome, text.strip()[-1500:]


def _run_train(overrides: Sequence[str], log: Path) -> None:
    """Act as `python src/train.py OVERRIDES`; never returns."""
    code = 1
    try:
        os.setsid()
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        sys.argv = ["src/train.py", *overrides]
        runpy.run_path("src/train.py", run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def walk(stage: int, pattern: str, kinds: Sequence[str], output: Path, limit_s: float) -> int:
    """Try all odd values for keys that match `pattern`, in this copy of the project. Return the number of failures."""
    import src.training.run  # once, before the forks
    import src.training.stage2  # noqa: F401
    from src.core.compose import compose

    base = [*STAGES[stage], *QUICK, *_autoencoder(stage, output)]
    outcome, words = attempt([*base, "paths.log_dir=try/logs"], output.with_suffix(".log"), 600)
    if outcome != "accepted":
        sys.exit(f"The unchanged config should be accepted: {outcome}\n{words}")
    counts: Counter[str] = Counter()
    with open(output, "a") as lines:
        for key in dict.fromkeys(keys(compose(base))):
            if not fnmatch.fnmatch(key, pattern):
                continue
            for kind in kinds:
                value = ODD[kind]
                logs = [] if key in ("paths", "paths.log_dir") else ["paths.log_dir=try/logs"]
                outcome, words = attempt([*base, *logs, f"{key}={value}"], output.with_suffix(".log"), limit_s)
                counts[outcome] += 1
                entry = {"stage": stage, "key": key, "kind": kind, "value": value, "outcome": outcome, "words": words}
                print(json.dumps(entry), file=lines, flush=True)
                shutil.rmtree("try", ignore_errors=True)
    if not counts:
        sys.exit(f"--keys {pattern}: no key of stage {stage} matches it, so nothing was tried.")
    print(f"stage {stage}, {pattern}: " + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    return counts.total() - counts["accepted"] - counts["message"]


def _autoencoder(stage: int, output: Path) -> list[str]:
    """Make an autoencoder of one update and its statistics for stage 2; return the overrides that use them."""
    if stage == 1:
        return []
    run, statistics = ROOT / "autoencoder", ROOT / "autoencoder/stats.pt"
    checkpoint = run / "checkpoints/last.ckpt"
    if not statistics.exists():
        outcome, words = attempt([*STAGES[1], *QUICK, f"paths.run_dir='{run}'"], output.with_suffix(".log"), 600)
        assert outcome == "accepted", words
        command = ["src/latent_stats.py", "--checkpoint", checkpoint, "--data_dir", "data/dummy_dataset_hf", "--device", "cpu",
                   "--output", statistics, "--num_workers", "0"]  # fmt: skip
        subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
    return [f"model.autoencoder='{checkpoint}'", f"model.statistics='{statistics}'"]


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if every value was accepted or ended in a message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=STAGES, action="append", help="1 or 2; default: both")
    parser.add_argument("--keys", default="*", help="pattern of config keys, such as 'model.*'")
    parser.add_argument("--kinds", nargs="+", choices=ODD, default=list(ODD), help="kinds of odd values; default: all")
    parser.add_argument("--limit_s", type=above_zero, default=120, help="time limit of an attempt, in seconds")
    parser.add_argument("--output", type=Path, default=Path("odd_values.jsonl"), help="file for a JSON line per value")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    stages = args.stage or list(STAGES)
    if args.here:
        return int(sum(walk(stage, args.keys, args.kinds, args.output, args.limit_s) for stage in stages) > 0)
    args.output.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        for part in ("src", "configs", "scripts"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        words = [
            copy / "scripts/odd_values.py",
            "--here",
            "--limit_s",
            args.limit_s,
            "--output",
            args.output.absolute(),
        ]
        words += [
            "--keys",
            args.keys,
            "--kinds",
            *args.kinds,
            *(word for stage in stages for word in ("--stage", stage)),
        ]
        return subprocess.run([sys.executable, *map(str, words)], cwd=copy).returncode


if __name__ == "__main__":
    sys.exit(main())
