"""The report page and the metrics.csv behind it: what they say of a run, and that no file of a run can break them."""

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from src.callbacks.metrics_csv import MetricsCsv
from src.core import metrics_file
from src.core.errors import UserError
from src.core.weights import PROJECT_ROOT
from src.report import main, write
from src.reporting.figures import CHARTS
from src.reporting.page import number, page
from src.reporting.reading import read_runs
from src.training.folder import ENVIRONMENT_KEY
from src.training.run import run as run_program
from tests.training import SMALL, composed

STEPS = (10, 20, 30)
LOGGED = {
    "train/loss": (0.9, 0.5, 0.4),
    "val/loss": (0.8, 0.45, 0.5),
    "val/psnr": (12.0, 17.25, math.nan),
    "perf/images_per_s": (100.0, 120.0, 110.0),
    "rfid/score": (30.0, 11.5, 12.5),
    "rfid/images": (1000.0, 1000.0, 1000.0),
}
CONFIG = "seed: 3\ntrainer:\n  max_epochs: 3\n  precision: 32\n  limit_val_batches: 1.0\n"
LOG = (
    "2026-01-02 03:04:06,000 INFO src.callbacks.startup: This run:\n  steps         10 an epoch, 3 epoch(s)\n"
    "  starts        LPIPS at step 0, discriminator at step 12, GAN term at step 1,025\n"
    "2026-01-02 03:04:07,000 WARNING src.data: a warning\nof two lines\n2026-01-02 03:04:07,000 INFO src.data: no warning\n"
)
RECORD = {
    "experiment_name": "tiny", "status": "finished", "command": ["python", "src/train.py", "experiment=tiny"], "git": {"commit": "abc123"},
    "device": "NVIDIA H100", "processes": 8, "data": {"validation": 58}, "result": {"step": 1030, "val/ssim": 0.123456},
}  # fmt: skip


def make_run(folder: Path, logged=LOGGED, config=CONFIG, log=LOG, pictures=STEPS, **record) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({**RECORD, **record}))
    (folder / ".hydra/config.yaml").write_text(config)
    (folder / ".hydra/overrides.yaml").write_text("- experiment=tiny\n")
    (folder / "run.log").write_text(log)
    for place, step in enumerate(STEPS if logged else ()):
        metrics_file.append(folder / "metrics.csv", step, {name: values[place] for name, values in logged.items()})
    for step in pictures:
        (folder / "samples").mkdir(exist_ok=True)
        Image.new("RGB", (32, 16), (step, 0, 0)).save(folder / f"samples/step_{step:07d}.png")
    return folder


def made(*folders: Path) -> str:
    """The page without plotly.js."""
    return re.sub(r"<script>/\*\*\s*\* plotly\.js.*?</script>", "", page(read_runs(folders)), flags=re.DOTALL)


def curves(text: str) -> dict[str, list[tuple[int, float]]]:
    """Points of all curves by their name in the legend."""
    plots = re.findall(r'Plotly\.newPlot\(\s*"plot-\d+",\s*(\[.*?\]),\s*\{"', text, re.DOTALL)
    return {trace["name"]: list(zip(trace["x"], trace["y"], strict=True)) for plot in plots for trace in json.loads(plot) if "name" in trace}  # fmt: skip


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("one") / "2026-01-02" / "03-04-05")


@pytest.fixture(scope="module")
def text(run) -> str:
    return made(run)


def test_what_the_page_says(text):
    for expected in (
        "<b>11.5</b> <small>step 20 · 1,000 images <em>under 2,048", "<b>17.25</b> <small>step 20 · 58 held-out images", "1,030", "of 3 epochs",
        "8 × NVIDIA H100", "<b>110</b> <small>median", "finished", "abc123", "python src/train.py experiment=tiny", "max_epochs: 3", "0.1235",
        "a warning\nof two lines", "step 30", "val/psnr is not finite at 1 of 3 steps, first at 30", "2026-01-02/03-04-05",
    ):  # fmt: skip
        assert expected in text, expected
    assert text.count('src="data:image/png;base64,') == 3
    for absent in ("no warning", "UNTRAINED", "It ended with"):
        assert absent not in text
    assert curves(text)["val/loss"] == [(10, 0.8), (20, 0.45), (30, 0.5)]
    assert curves(text)["val/psnr"][2] == (30, None)
    assert re.findall(r'"text":"(\w[\w ]+)","textangle"', text) and "rfid/images" not in curves(text)
    assert set(re.findall(r'"text":"([^"]+)","textangle"', text)) == {
        "discriminator"
    }  # at step 12; the others are outside


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"status": "failed", "error": "out of <memory>"}, ['class="failed"', "It ended with: out of &lt;memory&gt;"]),
        (
            {"log": LOG + "2026-01-02 03:04:07,000 WARNING a.b: UNTRAINED by request: encoder, LPIPS. And more.\n", "logged": {"rfid_untrained/score": (3, 2, 1)}},
            ["UNTRAINED: encoder, LPIPS, Inception network. Random weights: not a result."],
        ),
        ({"config": "model:\n  lpips:\n    weights: tiny\n", "log": ""}, ["UNTRAINED: model.lpips.weights (tiny)."]),
        ({"config": CONFIG.replace("1.0", "0.1")}, ["some held-out images"]),
    ],
)  # fmt: skip
def test_what_is_to_be_doubted(tmp_path, changes, said):
    text = made(make_run(tmp_path / "r", **changes))
    assert all(words in text for words in said)


def test_every_name_that_training_logs_has_a_chart_and_others_get_one(tmp_path):
    names = [f"{group}/{name}" for group, names in {
        "train": "loss l1 lpips gan adaptive_weight grad_norm", "disc": "loss accuracy logits_real logits_fake", "lr": "generator discriminator",
        "perf": "images_per_s data_wait memory_gb", "val": "loss l1 lpips psnr ssim", "rfid": "score psnr ssim lpips", "rfid_full": "score",
    }.items() for name in names.split()]  # fmt: skip
    assert all(any(re.fullmatch(chart.names, name) for chart in CHARTS) for name in names)
    assert curves(made(make_run(tmp_path / "r", {"mine/score": (1, 2, 3)})))["mine/score"] == [
        (10, 1),
        (20, 2),
        (30, 3),
    ]


def test_several_runs_are_overlaid_and_compared(tmp_path, run):
    other = make_run(tmp_path / "2026-01-03/03-04-05", {"train/loss": (9, 8, 7)}, CONFIG.replace("seed: 3", "seed: 4"))
    text = made(run, other)
    found = curves(text)
    assert found["2026-01-02/03-04-05 train/loss"][0] == (10, 0.9)
    assert found["2026-01-03/03-04-05 train/loss"][0] == (10, 9)
    differing = text.split("Where the runs differ")[1].split("</table>")[0]
    assert re.findall(r"<tr><th>(\S+)</th><td>(\S+)</td><td>(\S+)</td>", differing) == [("seed", "3", "4")]


def test_page_is_one_file_that_fetches_nothing_and_is_the_same_each_time(run, text):
    tags = Tags(text)
    assert tags.open == [] and made(run) == text
    for tag, attributes in tags.seen:
        assert tag not in ("link", "iframe", "base", "form", "object", "embed")
        for name in attributes.keys() & {"src", "href", "action", "data", "srcset", "poster"}:
            assert attributes[name].startswith(("data:image/", "#")), (tag, attributes)
    assert "http" not in text.replace("http-equiv", "") and "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text and page(read_runs([run])).count("plotly.js v") == 1
    ids = [attributes["id"] for _, attributes in tags.seen if "id" in attributes]
    assert len(ids) == len(set(ids)) and {a["href"][1:] for tag, a in tags.seen if tag == "a"} <= set(ids)


def test_nothing_of_a_file_becomes_markup(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}\n,"
    folder = make_run(
        tmp_path / "a&b<i>", {evil: (1, 2, 3), "train/loss": (1, 2, 3)}, f"{json.dumps(evil)}: {json.dumps(evil)}\n", LOG.replace("a warning", evil),
        experiment_name=evil, status=evil, error=evil, device=evil, git={"commit": evil}, command=[evil], result={evil: evil},
    )  # fmt: skip
    (folder / ".hydra/overrides.yaml").write_text(json.dumps([evil]))
    for text in (made(folder), made(folder, make_run(tmp_path / "other"))):
        tags = Tags(text)
        assert tags.open == [] and "49" not in re.sub('base64,.*?"', "", text).split("<body>")[1].split("<h2")[0]
        assert not any("onerror" in attributes or attributes.get("src") == "x" for _, attributes in tags.seen)
        assert sum(tag == "script" for tag, _ in tags.seen) == 1 + text.count("Plotly.newPlot")
    assert any("&lt;script&gt;" in name for name in curves(text))  # plotly reads tags in names, too


@pytest.mark.parametrize("name", ["run.json", ".hydra/config.yaml", ".hydra/overrides.yaml", "run.log", "metrics.csv"])
@pytest.mark.parametrize("content", [None, b"", b"[1", b"3", b"\xff\0\r,\n\n", b'{"a": NaN, "result": []}'])
def test_any_file_may_be_missing_or_damaged(tmp_path, run, name, content):
    folder = make_run(tmp_path / "r")
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    text = made(folder)
    assert Tags(text).open == []
    assert (
        f"{name} can&#39;t be read" in text
        or name in ("metrics.csv", "run.log")
        or content in (b"", b'{"a": NaN, "result": []}')
    )
    assert "No numbers have been logged" in text if name == "metrics.csv" else "Plotly.newPlot" in text


@pytest.mark.parametrize("value", [None, 3, "x", [], {"a": [1]}, math.nan])
def test_a_record_of_other_types_is_survived(tmp_path, value):
    keys = ("status", "result", "git", "command", "data", "device", "processes", "error", "experiment_name")
    Tags(made(make_run(tmp_path / "r", config="trainer: 3\ncallbacks:\n  rfid: 1\n", **dict.fromkeys(keys, value))))


# -- where the numbers come from


def rows(file: Path) -> list[tuple[int, str, float]]:
    return [row[:3] for row in metrics_file.read(file)]


def test_metrics_file_goes_on_after_a_line_that_was_cut_off(tmp_path):
    file, expected = tmp_path / "metrics.csv", [(10, "a,\"b", 0.1), (10, "c", math.inf), (20, "new", -1e-9)]  # fmt: skip
    metrics_file.append(file, 10, {"a,\"b": 0.1, "c": math.inf})  # fmt: skip
    with file.open("a") as stream:
        stream.write("20,a,0.12")
    assert rows(file) == expected[:2]
    metrics_file.append(file, 20, {"new": -1e-9})
    assert rows(file) == expected and file.read_text().startswith("step,name,value,time\n")


def test_metrics_file_survives_a_kill(tmp_path):
    program = "import sys, itertools, pathlib; from src.core import metrics_file as m\nfor i in itertools.count(): m.append(pathlib.Path(sys.argv[1]), i, {'a': i, 'b': i}); print(i, flush=True)"  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "m.csv")], cwd=PROJECT_ROOT, stdout=subprocess.PIPE
    )
    last = [int(child.stdout.readline()) for _ in range(50)][-1]
    child.send_signal(signal.SIGKILL)
    child.communicate()
    found = rows(tmp_path / "m.csv")
    assert len(found) >= 2 * last + 2 and found == [(i // 2, "ab"[i % 2], i // 2) for i in range(len(found))]


def test_a_full_disk_is_said_once_and_stops_nothing(tmp_path, monkeypatch, caplog):
    logger = MetricsCsv(tmp_path)
    monkeypatch.setattr(
        metrics_file, "append", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    logger.log_metrics({"a": 1}, 1)
    logger.log_metrics({"a": 1}, 2)
    assert caplog.text.count("No space left") == 1


def test_a_restart_in_the_folder_replaces_what_it_did_again(tmp_path):
    folder = make_run(tmp_path / "r")
    for step, values in ((15, {"train/loss": 7.0}), (25, {"train/loss": 6.0, "new": 1.0})):
        metrics_file.append(folder / "metrics.csv", step, values)
    found = curves(made(folder))
    assert found["train/loss"] == [(10, 0.9), (15, 7.0), (25, 6.0)] and found["val/loss"] == [(10, 0.8)]
    assert found["new"] == [(25, 1.0)]


def real_run(folder: Path, *overrides: str) -> None:
    """`src/train.py` in this process, with logging and environment put back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        run_program(composed([*SMALL, "~callbacks.rfid", f"paths.run_dir={folder}", *overrides]))
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.captureWarnings(False)
        os.environ.pop(ENVIRONMENT_KEY, None)


def test_real_runs_and_the_one_that_resumed(tmp_path):
    first, second = tmp_path / "d/first", tmp_path / "d/second"
    real_run(first, "logger=csv", "trainer.max_epochs=2")
    real_run(
        second, "trainer.max_epochs=2", f"ckpt_path={first}/checkpoints/epoch_001.ckpt", "trainer.log_every_n_steps=2"
    )
    assert not list(first.glob("csv")) and not list(first.glob("events*"))
    own = {name: dict(points) for name, points in curves(made(first)).items()}
    text = made(second)
    assert {step for step, _ in curves(text)["train/loss"]} == {1, 2, 3, 4, 6}  # step 5 is the first run's, and cut
    assert all(own["train/loss"][step] == pytest.approx(value) for step, value in curves(text)["train/loss"])
    assert set(re.findall(r'"text":"([^"]+)","textangle"', text)) == {"discriminator", "GAN term", "resumed"}
    first.rename(tmp_path / "gone")
    assert min(step for step, _ in curves(made(second))["train/loss"]) == 4
    (second / "metrics.csv").unlink()
    assert {step for step, _ in curves(made(second))["train/loss"]} == {4, 6}  # of TensorBoard


def test_events_are_read_where_there_is_no_metrics_file(tmp_path, caplog):
    folder = make_run(tmp_path / "r", {})
    for steps in ((10, 20, 30), (20, 25)):
        with SummaryWriter(str(folder)) as writer:
            for step in steps:
                writer.add_scalar("train/loss", float(step + len(steps)), step)
            writer.add_scalar("hp_metric", -1, 0)
            writer.add_image("samples", torch.zeros(3, 8, 8), 30)
        for file in folder.glob("events.out.tfevents.[!1]*"):
            file.rename(folder / f"events.out.tfevents.1.{len(steps)}")
        next(folder.glob("events.out.tfevents.??????????.*")).rename(folder / f"events.out.tfevents.{4 - len(steps)}")
    assert curves(made(folder)) == {"train/loss": [(10, 13), (20, 22), (25, 27)]}
    assert "No metrics.csv" in caplog.text and "slow" in caplog.text
    last = folder / "events.out.tfevents.2"
    last.write_bytes(last.read_bytes()[: last.read_bytes().rfind(b"train/loss")])
    assert curves(made(folder)) == {"train/loss": [(10, 13), (20, 22)]}


def test_tables_of_lightnings_logger_are_read(tmp_path):
    folder = make_run(tmp_path / "r", {})
    (folder / "csv").mkdir()
    (folder / "csv/metrics.csv").write_text(
        "epoch,step,train/loss,val/psnr\n0,10,0.5,\n0,20,nan,17.0\n0,,1,1\n0,30,x,18\n0,40"
    )
    found = curves(made(folder))
    assert found["train/loss"] == [(10, 0.5), (20, None)] and found["val/psnr"] == [(20, 17.0), (30, 18.0)]


# -- pictures, words, the program


def test_pictures_are_chosen_evenly_and_bounded(tmp_path):
    text = made(make_run(tmp_path / "r", pictures=range(100)))
    assert re.findall(r'data-step="(\d+)"', text) == [str(round(i * 9)) for i in range(12)]
    noise = torch.randint(0, 256, (900, 1000, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(tmp_path / "r/samples/step_0000099.png")
    (tmp_path / "r/samples/step_0000000.png").write_text("no picture")
    text = made(tmp_path / "r")
    assert len(re.search(r"data:image/jpeg;base64,([^\"]+)", text)[1]) < 1_400_000
    assert "step_0000000.png can&#39;t be shown" in text


def test_rfid_sheets_are_found_in_order(tmp_path):
    config = f"callbacks:\n  rfid:\n    rfid_output_dir: {tmp_path}/sheets\n"
    folder = make_run(tmp_path / "2026-01-02/03-04-05", config=config, pictures=())
    for name in ("end", "epoch_001", "step_0000005", "step_0000015"):
        (tmp_path / "sheets/2026-01-02_03-04-05" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "sheets/2026-01-02_03-04-05" / name / "sheet.png")
    assert re.findall(r"<figcaption>(.*?)<", made(folder)) == ["step 5", "epoch 1", "step 15", "end"]


def test_words_for_numbers():
    values = (1234567, 0.123456, 2.0, "x", math.nan, 12345.67, True, ["a", 1])
    assert [number(v) for v in values] == ["1,234,567", "0.1235", "2", "x", "nan", "12,346", "True", "a 1"]


def test_program_writes_and_refuses(tmp_path, capsys):
    folder = make_run(tmp_path / "runs" / "a")
    assert main([str(folder)]) == 0 and (folder / "report.html").is_file()
    assert main([str(folder), "--out", str(tmp_path / "new/x.html")]) == 0 and (tmp_path / "new/x.html").is_file()
    assert "x.html" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([tmp_path / "empty"], "is no run's folder"),
        ([tmp_path / "runs"], f"Runs below it: {folder}"),
        ([tmp_path / "nowhere"], "no such folder"),
        ([folder, folder], "given twice"),
        ([folder, "--out", tmp_path], "is a folder"),
    ):
        assert main([str(argument) for argument in arguments]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="can't be written"):
        write([folder], folder / "run.json/x.html")
