"""Kill a training run repeatedly, resume it each time, and compare its final state with that of an uninterrupted run.

    python scripts/kill_and_resume.py --kills 20
    python scripts/kill_and_resume.py --stage 2 --kills 20 --sampling_kills 10

SIGKILL is sent at a random moment, while a checkpoint is being written, or at an epoch's last batch. In between, SIGINT,
SIGHUP and SIGUSR1 are sent at random moments (the run must save and exit with 128 + the signal's number), and a data-loading
worker is killed (the run must save and exit with 1). After each, every checkpoint on disk must be readable. At the end
weights, EMA, optimiser states and counters must equal those of the uninterrupted run bit for bit. Exit status 0: they do;
1: they don't, a checkpoint was unreadable, or the run ended with an unexpected exit status.

Stage 2 trains a transformer, with SIGKILL only. Then src/sample.py is killed at random moments, running on one and on two
processes in turn, and its npz must equal that of an uninterrupted call.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from src.core.options import not_negative, positive

ROOT = Path(sys.path[0])
STEPS_PER_EPOCH, EPOCHS = 8, 3
MODES = ("random", "writing", "last_batch", "SIGINT", "SIGHUP", "SIGUSR1", "loader")
RUN = [
    "experiment=rae_dummy", "~callbacks.rfid", "logger=csv", "trainer.accelerator=cpu", "data.image_size=64", "data.batch_size=4",
    f"trainer.limit_train_batches={STEPS_PER_EPOCH}", f"trainer.max_epochs={EPOCHS}", "trainer.limit_val_batches=1",
    "model.disc_upd_start_epoch=0.5", "model.disc_start_epoch=1", "model.sample_every=0", "trainer.log_every_n_steps=1",
    "callbacks.checkpoint.every_n_steps=2",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=positive, default=20)
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments")
    parser.add_argument("--processes", type=positive, default=1, help="number of training processes (gloo)")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=1)
    parser.add_argument("--sampling_kills", type=not_negative, default=0, help="with --stage 2")
    parser.add_argument("--folder", type=Path, help="keep the runs here; default: a temporary folder")
    arguments = parser.parse_args()
    if arguments.sampling_kills and arguments.stage == 1:
        parser.error("--sampling_kills goes with --stage 2")
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        base = arguments.folder or Path(temporary)
        modes = MODES
        if arguments.stage == 2:
            RUN[:], modes = stage_2(base), MODES[:3]
        start(base / "peace", arguments.processes).wait()
        expected = newest(base / "peace")
        for number in range(arguments.kills):
            mode = modes[number % len(modes)]
            done = kill_once(base / "killed", arguments.processes, mode, rng)
            bad = unreadable(base / "killed")
            step = step_of(base / "killed")
            print(f"kill {number + 1}/{arguments.kills} ({mode}): newest checkpoint at step {step}", flush=True)
            if bad:
                print(f"UNREADABLE: {bad}")
                return 1
            if done:
                print("the run finished before it could be killed; starting another one")
                if not equal(expected, newest(base / "killed")):
                    return 1
                (base / "killed").rename(base / f"ended-{number}")
        finish(base / "killed", arguments.processes, rng)
        if not equal(expected, newest(base / "killed")):
            return 1
        return 0 if not arguments.sampling_kills or sampling(base, arguments.sampling_kills, rng) else 1


def stage_2(base: Path) -> list[str]:
    """Create an untrained autoencoder and return the overrides of a small stage-2 run on it."""
    from src.formats.export import write_own_statistics
    from src.formats.folder import write_folder
    from tests.tiny_models import loaded, tiny_rae

    rae, folder = tiny_rae(base / "tiny", statistics=True), base / "autoencoder"
    folder.mkdir()
    write_folder(loaded(rae), folder)
    write_own_statistics(rae, folder, rae.encoder.identity())
    replaced = ("experiment=", "data.", "model.", "~")
    own = ["experiment=dit_dummy", f"model.autoencoder={folder}", "data.batch_size=24", "model.sample_every=0"]
    return own + ["trainer.check_val_every_n_epoch=1"] + [word for word in RUN if not word.startswith(replaced)]


def sampling(base: Path, kills: int, rng: random.Random) -> bool:
    """Kill a sampling call repeatedly; return whether its samples equal those of an uninterrupted call."""
    import numpy as np

    def start_sampling(name: str, processes: int) -> subprocess.Popen:
        words = f"--device cpu --num_images {8 * kills + 16} --batch_size 4 --cfg 2".split()
        files = ["--checkpoint", str(newest(base / "peace")), "--output", str(base / name)]
        return launch(base / "sampling.txt", processes, "src/sample.py", *words, *files)

    start_sampling("whole.npz", 1).wait()
    for number in range(kills):
        process, before = start_sampling("cut.npz", 1 + number % 2), blocks(base)
        wait_for(lambda before=before: blocks(base) > before, process)
        time.sleep(rng.uniform(0, 0.1))
        if process.poll() is not None:
            raise SystemExit(
                f"sampling ended with {process.returncode} before it was killed; see {base / 'sampling.txt'}"
            )
        for pid in [process.pid, *children(process.pid)]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
        print(f"sampling, kill {number + 1}/{kills}: {blocks(base)} blocks of 4 done", flush=True)
    start_sampling("cut.npz", 2).wait()
    whole, cut = np.load(base / "whole.npz"), np.load(base / "cut.npz")
    found = {name: np.array_equal(whole[name], cut[name]) for name in ("arr_0", "labels")}
    print("the same samples:", ", ".join(f"{name} {'yes' if value else 'NO'}" for name, value in found.items()))
    return all(found.values())


def blocks(base: Path) -> int:
    return sum(text(file).count("\n") for file in base.glob(".cut.npz.parts/done.*"))


def launch(log: Path, processes: int, *words: str) -> subprocess.Popen:
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    command, environment = [sys.executable, *several, *words], {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "ab") as output:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True, env=environment
        )


def start(log_dir: Path, processes: int, *overrides: str) -> subprocess.Popen:
    log_dir.mkdir(parents=True, exist_ok=True)
    resume = ["ckpt_path=last"] if newest(log_dir) else []
    words = ["src/train.py", *RUN, f"paths.log_dir={log_dir}", *resume, *overrides]
    return launch(log_dir / "output.txt", processes, *words)


def kill_once(log_dir: Path, processes: int, mode: str, rng: random.Random) -> bool:
    """Start or resume the run and kill it. Return True if it finished first."""
    seen = set(log_dir.glob("runs/*/*"))
    workers = 2 if mode == "loader" else rng.choice([0, 2])
    process = start(log_dir, processes, f"data.num_workers={workers}")
    folder = wait_for(lambda: next(iter(set(log_dir.glob("runs/*/*")) - seen), None), process)
    if mode not in ("writing", "last_batch"):
        wait_for(lambda: "step " in text(folder / "run.log"), process)
    moment = time.monotonic() + rng.uniform(0, 3)
    wanted_step = STEPS_PER_EPOCH * rng.randint(1, EPOCHS)

    def due() -> bool:
        if mode == "writing":
            return (folder / "checkpoints" / ".last.ckpt.next.writing").exists() and rng.random() < 0.3
        if mode == "last_batch":
            return any(f"step {s}:" in text(folder / "run.log") for s in range(wanted_step, 99, STEPS_PER_EPOCH))
        return time.monotonic() > moment

    wait_for(due, process)
    ended = process.poll() is not None
    if not ended and mode.startswith("SIG"):
        os.killpg(process.pid, signal.Signals[mode])
        process.wait()
        # torchrun exits with 1 after a signal that it handles, and dies of any other
        expected = (128 + signal.Signals[mode],) if processes == 1 else (1, -signal.Signals[mode])
        # the signal may arrive after the last update, while the process is exiting
        ended = process.returncode == 0 or finished(folder)
        if not ended and process.returncode not in expected:
            raise SystemExit(f"exit status {process.returncode} after {mode}; see {log_dir / 'output.txt'}")
    elif not ended and mode == "loader":
        kill_loader(process.pid)
        process.wait()
        ended = process.returncode == 0
        if not ended and process.returncode != 1:
            raise SystemExit(f"exit status {process.returncode}; see {log_dir / 'output.txt'}")
    elif not ended:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return ended and (process.returncode == 0 or finished(folder))


def finished(folder: Path) -> bool:
    return '"status": "finished"' in text(folder / "run.json")


def children(pid: int) -> list[int]:
    """Return all descendants of a process."""
    found = [int(word) for file in Path(f"/proc/{pid}/task").glob("*/children") for word in text(file).split()]
    return found + [further for child in found for further in children(child)]


def kill_loader(pid: int) -> None:
    """Kill a data-loading worker of a run: a descendant without children of its own."""
    leaves = [child for child in children(pid) if not children(child)]
    if leaves:
        os.kill(leaves[-1], signal.SIGKILL)


def finish(log_dir: Path, processes: int, rng: random.Random) -> None:
    code = start(log_dir, processes, f"data.num_workers={rng.choice([0, 2])}").wait()
    if code:
        raise SystemExit(f"the last resume failed with status {code}; see {log_dir / 'output.txt'}")


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (value := condition()) or process.poll() is not None:
            return value
        time.sleep(0.002)
    raise SystemExit("the run did not reach the moment to kill it within 120 s")


def text(file: Path | None) -> str:
    return file.read_text() if file and file.exists() else ""


def newest(log_dir: Path) -> Path | None:
    return max(log_dir.glob("runs/*/*/checkpoints/last.ckpt"), key=lambda f: f.stat().st_mtime_ns, default=None)


def step_of(log_dir: Path) -> int | None:
    from src.core.weights import read

    file = newest(log_dir)
    return read(file)["global_step"] if file else None


def unreadable(log_dir: Path) -> list[str]:
    from src.core.errors import UserError
    from src.core.weights import read

    bad = []
    for file in log_dir.glob("runs/*/*/checkpoints/*.ckpt"):
        try:
            read(file)
        except UserError as error:
            bad.append(str(error))
    for file in log_dir.glob("runs/*/*/run.json"):
        json.loads(file.read_text())
    return bad


def equal(expected: Path | None, actual: Path | None) -> bool:
    from src.core.weights import read
    from tests.training import same

    if expected is None or actual is None:
        print("a run left no checkpoint")
        return False
    a, b = read(expected), read(actual)
    parts = {part: same(a[part], b[part]) for part in ("state_dict", "optimizer_states", "global_step", "loops")}
    print("the same bit for bit:", ", ".join(f"{part} {'yes' if value else 'NO'}" for part, value in parts.items()))
    return all(parts.values())


if __name__ == "__main__":
    raise SystemExit(main())
