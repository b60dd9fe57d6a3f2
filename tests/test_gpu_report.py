"""The GPU report: every part at tiny size on the CPU; a part that fails, hangs or can't run leaves the others alone."""

import argparse
import importlib.util
import json
import stat
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_parts
from docs import benchmark_table
from scripts import gpu_report
from scripts.gpu_report import PARTS

OPTIONS = {"only": [], "rae": None, "raev2": None, "dry": True}


@pytest.fixture
def small(monkeypatch):
    """Run three parts instead of ten."""
    monkeypatch.setattr(gpu_report, "PARTS", {letter: PARTS[letter] for letter in "acj"})


def report(folder: Path, seconds: float = 900, **changes) -> tuple[int, dict]:
    options = argparse.Namespace(**{**OPTIONS, "out": folder / "gpu.json", **changes})
    (folder / "scratch").mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as without:
        without.setattr(gpu_report, "tempfile", None)  # used only without --out
        code = gpu_report.report(options, folder / "scratch", time.monotonic() + seconds)
    return code, json.loads((folder / "gpu.json").read_text()) if (folder / "gpu.json").is_file() else {}


@pytest.mark.slow
def test_every_part_runs_on_the_cpu_and_gives_a_table(tmp_path, capsys, monkeypatch):
    code, content = report(tmp_path)
    parts = content["parts"]
    missing = {letter: (p["status"], p.get("error")) for letter, p in parts.items() if p["status"] != "done"}
    assert missing == {"h": ("not run", "no checkouts given: --rae DIR --raev2 DIR")}
    assert code == 1 and list(parts) == list(PARTS)
    table = capsys.readouterr().out
    said = (
        "DRY RUN",
        "x plain with",
        "gan: 4 fit; computed",
        "skipped",
        "two deterministic runs are bit-equal",
        "x as fast",
    )
    assert all(words in table for words in said), table
    assert all(f"\n({letter}) " in table for letter in PARTS)

    monkeypatch.setattr(benchmark_table, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match="names no CUDA device"):
        benchmark_table.rows()
    (tmp_path / "gpu.json").write_text(json.dumps(content | {"cuda_device": "NVIDIA H1"}))
    found = benchmark_table.rows()
    assert any(row[0].startswith("step: gan, bf16; tiny + tiny") and row[1].startswith("NVIDIA H1") for row in found)
    assert any("largest batch" in row[0] for row in found)


def executable(folder: Path, monkeypatch, cases: str) -> None:
    """Replace the parts by a shell script: `$2` is --worker=LETTER, `$out` the results file."""
    file = folder / "python"
    here = f'out="${{3#--out=}}"; out="${{out%.json}}.result"\nexport PYTHONPATH={gpu_report.ROOT}\n'
    machine = '{"result": {"machine": {"device": "GPU 1"}}, "status": "done"}'
    file.write_text(f"#!/bin/sh\n{here}case $2 in\n--worker=a) echo '{machine}' > $out;;\n{cases}\nesac\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(file))


def test_part_that_crashes_or_hangs_ends_no_other_and_keeps_its_results(tmp_path, monkeypatch, small):
    hangs = """--worker=c) echo '{"result": {"gan": {"fits": 8}}}' > $out; sleep 60 & echo $! > $out.child; wait;;"""
    executable(tmp_path, monkeypatch, f"{hangs}\n--worker=j) echo a kernel went wrong; kill -SEGV $$;;")
    began = time.monotonic()
    code, content = report(tmp_path, seconds=4, dry=False)
    parts = content["parts"]
    assert time.monotonic() - began < 8 and code == 1
    assert parts["c"]["status"] == "out of time" and parts["c"]["result"] == {"gan": {"fits": 8}}
    assert parts["j"]["status"] == "failed" and parts["j"]["error"] == "exit code -11: a kernel went wrong"
    child = Path("/proc", (tmp_path / "scratch/c.result.child").read_text().strip(), "cmdline")
    assert not child.exists() or b"sleep" not in child.read_bytes()


def test_parts_that_measure_no_speed_run_in_parallel(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "PARTS", {letter: PARTS[letter] for letter in "adg"})
    told = "until [ -f ${{out%.result}}.json ]; do sleep 0.1; done; "  # before that it may only import
    wait = (
        told
        + """touch $out.{0}; until [ -f ${{out%{0}.result}}{1}.result.{1} ]; do sleep 0.1; done; echo '{{"status": "done"}}' > $out;;"""
    )
    executable(tmp_path, monkeypatch, f"--worker=d) {wait.format('d', 'g')}\n--worker=g) {wait.format('g', 'd')}")
    code, content = report(tmp_path, seconds=20, dry=False)
    assert code == 0 and [part["status"] for part in content["parts"].values()] == ["done"] * 3


def test_waiting_process_ends_with_its_parent(tmp_path, monkeypatch, small):
    executable(tmp_path, monkeypatch, "--worker=c) echo {} > $out;;\n--worker=j) echo $$ > $out.pid; sleep 60;;")

    def interrupted(*_):
        while not (tmp_path / "scratch/j.result.pid").exists():
            time.sleep(0.05)
        raise KeyboardInterrupt

    keep = gpu_report.keep
    monkeypatch.setattr(gpu_report, "keep", lambda *found: interrupted() if found[2] == "c" else keep(*found))
    with pytest.raises(KeyboardInterrupt):
        report(tmp_path, dry=False)
    assert not Path("/proc", (tmp_path / "scratch/j.result.pid").read_text().strip()).exists()

    parents = iter([1, 2])  # the parent was killed
    monkeypatch.setattr(gpu_report.os, "getppid", lambda: next(parents))
    gpu_report.work("c", tmp_path / "none.json")
    assert not (tmp_path / "none.result").exists()


def test_program_that_runs_out_of_time_keeps_its_results(tmp_path, monkeypatch):
    """The caller sets the deadline: a part that starts slowly does not move it."""
    record = '{"arguments": {}, "results": {"bf16/gan": {"official": {"seconds": 1}}}}'
    program = tmp_path / "python"
    program.write_text(
        f"#!/bin/sh\necho '{record}' > '{tmp_path}/peers_1.json'; echo gan official: 1 s; exec sleep 60\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(program))
    work = gpu_report.work
    monkeypatch.setattr(gpu_report, "work", lambda *job: (time.sleep(3), work(*job)))
    options = argparse.Namespace(**OPTIONS | {"rae": tmp_path, "raev2": tmp_path})
    deadline = time.monotonic() + 9
    found = gpu_report.measure("h", {}, options, tmp_path, deadline, {})["h"]
    assert deadline - time.monotonic() > 3.5, "no time is left to write the results"
    assert found["status"] == "out of time"
    assert found["result"]["results"] == {"bf16/gan": {"official": {"seconds": 1}}}
    assert found["result"]["summary"] == ["batch 1, gan official: 1 s"]
    assert found["result"]["output"] == "gan official: 1 s\n\nended: its share of the time was over"


def test_variant_that_can_not_be_compiled_ends_no_other(tmp_path, monkeypatch):
    job, calls = gpu_parts.Job(True, time.monotonic() + 60, tmp_path, {}, {}, lambda result: None), []
    row = {"seconds": 1.0, "images_per_s": 2.0}
    monkeypatch.setattr(job, "runner", lambda *of: calls.append(of))
    monkeypatch.setattr(gpu_parts, "peak", lambda *_: None)

    def measured(names, *_):
        if calls[-1] == ("ours", "bf16"):
            raise RuntimeError("Failed to find C compiler")
        return dict.fromkeys(names, row)

    monkeypatch.setattr(gpu_parts, "measure", measured)
    gpu_parts.step(job)
    assert job.status == "failed" and "bf16 ours: Failed to find C compiler" in job.result["summary"]
    assert {name: list(rows) for name, rows in job.result["results"].items()} == {
        "bf16/gan": ["plain"],
        "fp16/gan": ["ours"],
    }


def test_later_call_adds_what_is_missing_to_the_same_file(tmp_path, monkeypatch, small):
    first = '--worker=c) exit 1;;\n--worker=j) echo \'{"result": {"x": 1}, "status": "done"}\' > $out;;'
    executable(tmp_path, monkeypatch, first)
    assert report(tmp_path, dry=False)[1]["parts"]["c"]["status"] == "failed"
    again = '--worker=c) echo \'{"result": {"x": 2}, "status": "done"}\' > $out;;\n--worker=j) exit 1;;'
    executable(tmp_path, monkeypatch, again)
    code, content = report(tmp_path, dry=False)
    assert code == 0 and content["cuda_device"] == "GPU 1"
    assert [content["parts"][letter]["result"] for letter in "cj"] == [{"x": 2}, {"x": 1}]
    code, content = report(tmp_path, dry=False, only=["j"])  # requested, and failed
    assert code == 1 and content["parts"]["j"]["result"] == {"x": 1}


def test_missing_modules_are_named_once_and_skip_only_their_parts(tmp_path, monkeypatch, capsys):
    executable(tmp_path, monkeypatch, '*) echo \'{"result": {}, "status": "done"}\' > $out;;')
    find, absent = importlib.util.find_spec, ("hydra", "omegaconf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    _, content = report(tmp_path, dry=False)
    said = capsys.readouterr().out
    assert said.count("Not installed here: hydra-core omegaconf. Parts d, g need them") == 1
    assert {letter for letter, part in content["parts"].items() if part["status"] == "not run"} == {"d", "g", "h"}
    assert content["parts"]["g"]["error"] == "not installed: hydra, omegaconf"


def test_report_without_a_gpu_says_so(tmp_path, monkeypatch, capsys):
    executable(tmp_path, monkeypatch, "")
    (tmp_path / "python").write_text("#!/bin/sh\necho no CUDA; exit 1\n")
    assert report(tmp_path, dry=False) == (2, {})
    assert "No part runs here: exit code 1: no CUDA" in capsys.readouterr().out
