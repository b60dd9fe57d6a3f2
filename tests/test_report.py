"""The report page: what it shows of a run, that it is self-contained, and that no file of a run can break it."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from src.core import metrics_file
from src.report import main
from src.reporting.figures import CHARTS
from src.reporting.page import number, page
from src.reporting.reading import read_runs

STEPS = (10, 20, 30)
LOGGED = {
    "train/loss": (0.9, 0.5, 0.4), "val/loss": (0.8, 0.45, 0.5), "val/psnr": (math.nan, 17.25, 12.0), "perf/images_per_s": (100, 120, 110),
    "rfid/score": (30.0, 11.5, 12.5), "rfid/images": (1000, 1000, 1000),
}  # fmt: skip
CONFIG = "seed: 3\ntrainer:\n  max_epochs: 3\n  precision: 32\n  limit_val_batches: 1.0\n"
LOG = (
    "2026-01-02 03:04:06,000 INFO src.callbacks.startup: This run:\n  steps         10 an epoch, 3 epoch(s)\n"
    "  starts        LPIPS at step 0, discriminator at step 12, GAN term at step 1,025\n"
    "2026-01-02 03:04:07,000 WARNING a.b: a warning\nof two lines\n2026-01-02 03:04:07,000 INFO a.b: no warning\n"
)
UNTRAINED = LOG + "2026-01-02 03:04:07,000 WARNING a.b: UNTRAINED by request: encoder, LPIPS. And more.\n"
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
    """Return the page without plotly.js."""
    return re.sub(r"<script>/\*\*\s*\* plotly\.js.*?</script>", "", page(read_runs(folders)), flags=re.DOTALL)


def curves(text: str) -> dict[str, list[tuple[int, float]]]:
    """Return the points of all curves by their name in the legend."""
    plots = re.findall(r'Plotly\.newPlot\(\s*"plot-\d+",\s*(\[.*?\]),\s*\{"', text, re.DOTALL)
    traces = [trace for plot in plots for trace in json.loads(plot) if "name" in trace]
    return {trace["name"]: list(zip(trace["x"], trace["y"], strict=True)) for trace in traces}


def marks(text: str) -> set[str]:
    return set(re.findall(r'"text":"([^"]+)","textangle"', text))


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        self.open += [tag] * (tag not in ("meta", "img"))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("one") / "2026-01-02" / "03-04-05")


def test_content_of_the_page(run):
    text = made(run)
    for expected in (
        "<b>11.5</b> <small>step 20 · 1,000 images <em>under 2,048", "<b>17.25</b> <small>step 20 · 58 held-out images", "1,030", "in at most 3 epochs",
        "<b>0.45</b> <small>step 20",         "8 × NVIDIA H100", "<b>110</b> <small>median", "finished", "abc123", "python src/train.py experiment=tiny", "max_epochs: 3", "0.1235",
        "a warning\nof two lines", "step 30", "val/psnr is not finite at 1 of 3 steps, first at 10", "2026-01-02/03-04-05",
    ):  # fmt: skip
        assert expected in text, expected
    assert not any(absent in text for absent in ("no warning", "UNTRAINED", "It ended with", "Sheets"))
    assert text.count('src="data:image/png;base64,') == 3
    assert text.count('"symbol":"star"') == 3  # val/loss, val/psnr, rfid/score
    found = curves(text)
    assert found["val/loss"] == [(10, 0.8), (20, 0.45), (30, 0.5)] and found["val/psnr"][0] == (10, None)
    assert "rfid/images" not in found and marks(text) == {"discriminator"}  # other losses start at 0 or later than 30


@pytest.mark.parametrize(("changes", "said"), [
    ({"status": "failed", "error": "out of <memory>"}, 'class="failed"'),
    ({"error": "out of <memory>"}, "It ended with: out of &lt;memory&gt;"),
    ({"log": UNTRAINED, "logged": {"rfid_untrained/score": STEPS}}, "UNTRAINED: encoder, LPIPS, Inception network. Random weights"),
    ({"config": "model:\n  lpips:\n    weights: tiny\n", "log": ""}, "UNTRAINED: model.lpips.weights (tiny)."),
    ({"status": "running"}, "says `running`, but no process on this machine holds the folder"),
    ({"config": CONFIG.replace("1.0", "0.1")}, "some held-out images"),
])  # fmt: skip
def test_page_warns_of_doubtful_results(tmp_path, changes, said):
    assert said in made(make_run(tmp_path / "r", **changes))


def test_every_name_that_training_logs_has_a_chart_and_others_get_one(tmp_path):
    names = [f"{group}/{name}" for group, names in {
        "train": "loss loss_q1 loss_q4 l1 lpips gan adaptive_weight grad_norm", "disc": "loss accuracy logits_real logits_fake", "lr": "generator discriminator network",
        "perf": "mfu images_per_s data_wait memory_gb", "val": "loss loss_q1 l1 lpips psnr ssim", "rfid": "score psnr ssim lpips", "rfid_full": "score",
        "gfid": "score sfid inception_score precision recall", "gfid_untrained": "score sfid inception_score precision recall",
    }.items() for name in names.split()]  # fmt: skip
    assert all(any(re.fullmatch(chart.names, name) for chart in CHARTS) for name in names)
    assert curves(made(make_run(tmp_path / "r", {"mine/a": STEPS})))["mine/a"] == [(step, step) for step in STEPS]


def test_several_runs_are_overlaid_and_compared(tmp_path, run):
    other = make_run(
        tmp_path / "2026-01-03/03-04-05",
        {"train/loss": STEPS},
        CONFIG.replace("seed: 3", "seed: 4") + "paths:\n  run_dir: /x\n",
    )
    text = made(run, other)
    firsts = [curves(text)[f"2026-01-0{day}/03-04-05 train/loss"][0] for day in (2, 3)]
    assert firsts == [(10, 0.9), (10, 10)] and not marks(text)
    differing = text.split('id="Curves"')[0].split("Where the runs differ")[1]
    assert re.findall(r"<tr><th>(\S+)</th><td>(\S+)</td><td>(\S+)</td>", differing) == [("seed", "3", "4")]


def test_run_that_was_resumed_very_often(tmp_path):
    """Run n resumes at step n of the previous run, which had reached step n + 1."""
    for n in range(600):
        folder = tmp_path / f"d/{n}"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text("{}")
        last = f"Resuming from {tmp_path}/d/{n - 1}/checkpoints/last.ckpt\nResuming at step {n} (epoch 1).\n"
        (folder / "run.log").write_text(last if n else "")
        (folder / "metrics.csv").write_text(
            f"step,name,value,time\n{n + 1},train/loss,{n},0\n{n + 2},train/loss,{n},0\n"
        )
    text = made(tmp_path / "d/599")
    assert curves(text)["train/loss"] == [*((n + 1, n) for n in range(600)), (601, 599)]
    assert marks(text) == {"resumed"}


def test_start_and_end_of_a_long_log_are_read(tmp_path):
    step = (
        "2026-01-02 03:04:08,000 INFO a.b: epoch 1/3 step 10: loss 0.5 | 153 images/s, 1 % waiting for data, 1 h left\n"
    )
    end = "2026-01-02 03:04:09,000 WARNING a.b: the last warning\n"
    text = made(make_run(tmp_path / "r", log=LOG + step * (33 * 2**20 // len(step)) + end))
    assert marks(text) == {"discriminator"} and "a warning\nof two lines" in text and "the last warning" in text


def test_curves_of_several_long_runs_are_thinned(tmp_path):
    rows = "".join(f"{step},train/loss,{step},0\n" for step in range(8001))
    folders = [make_run(tmp_path / f"{n}", {}) for n in range(5)]
    for folder in folders:
        (folder / "metrics.csv").write_text(f"step,name,value,time\n{rows}")
    assert [len(curve) for curve in curves(made(*folders)).values()] == [2667] * 5  # every third


def test_page_fetches_nothing_and_is_reproducible(run):
    text = made(run)
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


def test_content_of_files_is_escaped(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}\n,"
    folder = make_run(
        tmp_path / "a&b<i>", {evil: STEPS, "train/loss": STEPS}, f"{json.dumps(evil)}: {json.dumps(evil)}\n", LOG.replace("a warning", evil),
        experiment_name=evil, status=evil, error=evil, device=evil, git={"commit": evil}, command=[evil], result={evil: evil},
    )  # fmt: skip
    (folder / ".hydra/overrides.yaml").write_text(json.dumps([evil]))
    for text in (made(folder), made(folder, make_run(tmp_path / "other"))):
        tags = Tags(text)
        assert tags.open == [] and text.count("{{ 7 * 7 }}") > 10
        assert not any("onerror" in attributes or attributes.get("src") == "x" for _, attributes in tags.seen)
        assert sum(tag == "script" for tag, _ in tags.seen) == 1 + text.count("Plotly.newPlot")
    assert any("&lt;script&gt;" in name for name in curves(text))  # plotly reads tags in names, too


@pytest.mark.parametrize("name", ["run.json", ".hydra/config.yaml", ".hydra/overrides.yaml", "run.log", "metrics.csv"])
@pytest.mark.parametrize("content", [None, b"[1", b"3", b"\xff\0\r,\n\n", b'{"a": NaN}', b"step,name,value\n1,a,2\n1"])
def test_any_file_may_be_missing_or_damaged(tmp_path, name, content):
    folder = make_run(tmp_path / "r")
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    text = made(folder)
    assert Tags(text).open == []
    if content is None:
        assert ("No numbers have been logged" if name == "metrics.csv" else f"{name} can&#39;t be read") in text
    elif content == b"3" and name not in ("metrics.csv", "run.log"):
        assert f"{name} can&#39;t be read, so its content is not shown: it holds a int" in text


@pytest.mark.parametrize("value", [None, 3, "x", [], {"a": [1]}, math.nan])
def test_record_of_wrong_types_does_not_break_the_page(tmp_path, value):
    keys = ("status", "result", "git", "command", "data", "device", "processes", "error", "experiment_name")
    Tags(made(make_run(tmp_path / "r", config="trainer: 3\ncallbacks:\n  rfid: 1\n", **dict.fromkeys(keys, value))))


def test_sample_images_are_chosen_evenly_and_bounded(tmp_path):
    folder = make_run(tmp_path / "r", pictures=range(100))
    assert re.findall(r'data-step="(\d+)"', made(folder)) == [str(round(i * 9)) for i in range(12)]
    noise = torch.randint(0, 256, (900, 1000, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(folder / "samples/step_0000099.png")
    (folder / "samples/step_0000000.png").write_text("no picture")
    text = made(folder)
    assert len(re.search(r"data:image/jpeg;base64,([^\"]+)", text)[1]) < 1_400_000
    assert "step_0000000.png can&#39;t be shown" in text


def test_rfid_sheets_are_found_in_order(tmp_path):
    config = f"callbacks:\n  rfid:\n    rfid_output_dir: {tmp_path}/sheets\n"
    folder = make_run(tmp_path / "2026-01-02/03-04-05", config=config, pictures=())
    for name in ("end", "epoch_001", "step_0000005", "step_0000015"):
        (tmp_path / "sheets/2026-01-02_03-04-05" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "sheets/2026-01-02_03-04-05" / name / "sheet.png")
    assert re.findall(r"<figcaption>(.*?)<", made(folder)) == ["step 5", "epoch 1", "step 15", "end"]


def test_formatting_of_numbers():
    values = (1234567, 0.123456, 2.0, "x", math.nan, 12345.67, True, ["a", 1])
    assert [number(v) for v in values] == ["1,234,567", "0.1235", "2", "x", "nan", "12,346", "True", "a 1"]


def test_script_writes_the_page_or_ends_with_an_error(tmp_path, capsys):
    folder, out = make_run(tmp_path / "runs" / "a"), tmp_path / "new/x.html"
    assert main([str(folder)]) == 0 and (folder / "report.html").is_file()
    assert main([str(folder), "--out", str(out)]) == 0 and out.is_file() and str(out) in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([tmp_path / "empty"], "is not a run folder"), ([tmp_path / "runs"], f"Runs below it: {folder}"), ([tmp_path / "nowhere"], "no such folder"),
        ([folder, folder], "given twice"), ([folder, "--out", tmp_path], "is a folder"), ([folder, "--out", folder / "run.json/x"], "can't be written"),
    ):  # fmt: skip
        assert main([str(argument) for argument in arguments]) == 1
        assert message in capsys.readouterr().err
