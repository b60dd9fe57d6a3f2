"""The report page: what it says of a run, that it stands alone, and that no file of a run can break it."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from src.core.errors import UserError
from src.core.weights import PROJECT_ROOT
from src.report import main, write
from src.reporting.charts import CHARTS, charts
from src.reporting.events import read_csv, read_events
from src.reporting.facts import duration, flat, number
from src.reporting.figures import in_script
from src.reporting.markup import element
from src.reporting.page import page
from src.reporting.pictures import MAX_BYTES, encode, evenly
from src.reporting.reading import labels, read_runs
from src.reporting.series import Series, join, smooth, thin

STEPS = (10, 20, 30)
FIGURES = {
    "train/loss": (0.9, 0.5, 0.4),
    "val/loss": (0.8, 0.45, 0.5),
    "val/psnr": (12.0, 17.25, 16.0),
    "lr/generator": (1e-4, 2e-4, 1e-4),
    "perf/images_per_s": (100.0, 120.0, 110.0),
    "rfid/score": (30.0, 11.5, 12.5),
    "rfid/images": (1000.0, 1000.0, 1000.0),
    "hp_metric": (-1.0, -1.0, -1.0),
}
CONFIG = "experiment_name: tiny\nseed: 3\ntrainer:\n  max_epochs: 3\n  precision: 32\n  limit_val_batches: 1.0\nmodel:\n  optimizer:\n    lr: 0.0002\n"
LOG = (
    "2026-01-02 03:04:06,000 INFO src.callbacks.startup: This run:\n  data          230 training images, 58 held out; x\n"
    "  steps         10 an epoch, 3 epoch(s)\n  starts        LPIPS at step 0, discriminator at step 12, GAN term at step 25\n"
    "2026-01-02 03:04:07,000 WARNING src.data: a warning of the log\n"
)


def record(**changes):
    return {
        "experiment_name": "tiny", "status": "finished", "started": "2026-01-02T03:04:05", "ended": "2026-01-02T05:34:05",
        "command": ["python", "src/train.py", "experiment=tiny"], "git": {"commit": "abc123", "clean": False}, "python": "3.11.7",
        "packages": {"torch": "2.13.0"}, "device": "NVIDIA H100", "processes": 8, "data": {"fingerprint": "f00d", "train": 230, "validation": 58},
        "warnings": ["something odd"], "result": {"step": 30, "epochs": 3, "val/psnr": 16.0, "images_per_s": 111.0}, **changes,
    }  # fmt: skip


def make_run(folder: Path, figures=FIGURES, config=CONFIG, log=LOG, pictures=STEPS, **changes) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record(**changes)))
    (folder / ".hydra").mkdir()
    (folder / ".hydra" / "config.yaml").write_text(config)
    (folder / ".hydra" / "overrides.yaml").write_text("- experiment=tiny\n")
    (folder / "run.log").write_text(log)
    events(folder, figures)
    for step in pictures:
        (folder / "samples").mkdir(exist_ok=True)
        Image.new("RGB", (32, 16), (step, 0, 0)).save(folder / "samples" / f"step_{step:07d}.png")
    return folder


def events(folder: Path, figures, steps=STEPS) -> None:
    with SummaryWriter(str(folder)) as writer:
        for name, values in figures.items():
            for step, value in zip(steps, values, strict=True):
                writer.add_scalar(name, value, step)
        writer.add_image("samples", torch.zeros(3, 8, 8), 30)


def made(*folders: Path) -> str:
    return page(read_runs(folders))


def own(text: str) -> str:
    """The page without plotly.js."""
    return re.sub(r"<script>/\*\*\s*\* plotly\.js.*?</script>", "", text, flags=re.DOTALL)


def drawn(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)[1])


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
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


# -- what it says


def test_best_scores_stand_with_their_step_and_number_of_images(text):
    for expected in (
        ">11.5<",
        "step 20 · 1,000 images",
        "under 2,048 images",
        "17.25 dB",
        "step 20 · 58 held-out images",
        "epoch 3 of 3",
    ):
        assert expected in text


def test_record_config_log_and_pictures_are_there(text):
    for expected in (
        "finished", "8 × NVIDIA H100", "2 h 30 min", "abc123", "with uncommitted changes", "something odd", "a warning of the log", "f00d",
        "python src/train.py experiment=tiny", "max_epochs: 3", "2.13.0", "experiment=tiny",
    ):  # fmt: skip
        assert expected in own(text)
    assert own(text).count('src="data:image/png;base64,') == 3 and "step 30" in text


def test_curves_have_the_values_of_the_events(text):
    found = drawn(text)
    assert {"loss", "rfid", "psnr", "lr", "speed"} == found.keys()  # neither images, hp_metric nor empty charts
    training, held_out = found["loss"]["data"]
    assert training["x"] == [10, 20, 30] and training["y"] == [0.9, 0.5, 0.4] and held_out["y"] == [0.8, 0.45, 0.5]
    assert [note["text"] for note in found["loss"]["layout"]["annotations"]] == [
        "discriminator",
        "GAN term",
    ]  # not the one at step 0
    star = found["rfid"]["data"][1]
    assert (star["x"], star["y"], star["marker"]["symbol"]) == ([20], [11.5], "star")


def test_untrained_parts_are_said_loudly(tmp_path, text):
    assert "UNTRAINED" not in own(text)
    said = ["UNTRAINED by request: encoder, LPIPS. Figures of this run say nothing of the method."]
    figures = {"rfid_untrained/score": (3.0, 2.0, 1.0), "val/lpips": (1.0, 0.9, 0.8)}
    page_text = made(make_run(tmp_path / "r", figures, warnings=said))
    assert "<strong>UNTRAINED: </strong>encoder, LPIPS, Inception network." in page_text
    assert (
        "untrained Inception: no rFID" in page_text
        and "untrained network: no LPIPS" in page_text
        and "best rFID" not in page_text
    )
    # a run that still goes on has recorded no warnings, and its log may not be there: the configuration tells
    going = make_run(
        tmp_path / "s",
        config="model:\n  encoder_params:\n    weights: untrained\n",
        log="",
        warnings=None,
        status="running",
    )
    assert "model.encoder_params.weights (untrained)" in made(going)


def test_failed_run_shows_its_error(tmp_path):
    text = made(make_run(tmp_path / "r", status="failed", error="RuntimeError: out of <memory>", result=None))
    assert 'badge bad">failed' in text and "out of &lt;memory&gt;" in text


def test_names_nobody_foresaw_are_drawn(tmp_path):
    make_run(tmp_path / "r", {"mine/score": (1.0, 2.0, 3.0)})
    assert drawn(made(tmp_path / "r"))["other-0"]["data"][0]["y"] == [1.0, 2.0, 3.0]
    make_run(tmp_path / "s", {f"mine/{i:02d}": (1.0, 2.0, 3.0) for i in range(30)})
    runs = read_runs([tmp_path / "s"])
    assert len(charts(runs)) == 24 and any("6 more" in note for note in runs[0].notes)


def test_every_name_that_training_logs_has_a_place():
    placed = {tag for chart in CHARTS for tag, _ in chart.tags}
    assert {
        *(f"train/{n}" for n in ("loss", "l1", "lpips", "gan", "adaptive_weight", "grad_norm")),
        *(f"disc/{n}" for n in ("loss", "accuracy", "logits_real", "logits_fake")),
        *("lr/generator", "lr/discriminator", "perf/images_per_s", "perf/data_wait", "perf/memory_gb"),
        *(f"val/{n}" for n in ("loss", "l1", "lpips", "psnr", "ssim")),
        *(f"rfid/{n}" for n in ("score", "psnr", "ssim", "lpips")),
    } <= placed


# -- several runs


def test_several_runs_are_overlaid_and_compared(tmp_path, run):
    other = make_run(tmp_path / "2026-01-03" / "03-04-05", config=CONFIG.replace("seed: 3", "seed: 4"))
    text = made(run, other)
    colors = [trace["line"]["color"] for trace in drawn(text)["speed"]["data"]]
    assert len(colors) == 2 and colors[0] != colors[1]
    differing = re.search(r"Where the runs differ</h3>(.*?)</table>", text, re.DOTALL)[1]
    assert re.findall(r'<th scope="row">(.*?)</th>', differing) == ["seed"]
    assert "2026-01-02/03-04-05" in text and "2026-01-03/03-04-05" in text


def test_labels_are_as_short_as_they_can_be():
    assert labels([Path("/a/logs/2026-01-02/x"), Path("/a/logs/2026-01-03/x")]) == ["2026-01-02/x", "2026-01-03/x"]
    assert labels([Path("/a/one/d/x"), Path("/a/two/d/x")]) == ["one/d/x", "two/d/x"]


# -- stands alone


def test_page_is_one_file_that_fetches_nothing(text):
    for tag, attributes in Tags(text).seen:
        assert tag not in ("link", "iframe", "base", "form", "object", "embed")
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            if name in attributes:
                assert attributes[name].startswith(("data:image/", "#")), (tag, attributes)
    assert "http" not in own(text).replace("http-equiv", "") and "url(" not in own(text) and "@import" not in own(text)
    assert "default-src 'none'" in text and text.count("plotly.js v") == 1


def test_markup_is_balanced_and_links_lead_somewhere(text):
    tags = Tags(text)
    assert tags.open == []
    ids = [attributes["id"] for _, attributes in tags.seen if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for tag, a in tags.seen if tag == "a"} <= set(ids)


def test_same_files_make_the_same_page(run, text):
    assert made(run) == text


def test_nothing_of_a_file_becomes_markup(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
    folder = make_run(
        tmp_path / "a&b<i>", {f"x/{evil}"[:60]: (1.0, 2.0, 3.0), "train/loss": (1.0, 2.0, 3.0)}, experiment_name=evil, status=evil,
        device=evil, error=evil, warnings=[evil], git={"commit": evil, "clean": True}, command=[evil], python=evil, packages={evil: evil},
        result={evil: evil}, config=f"experiment_name: x\nevil: {json.dumps(evil)}\n", log=f"2026-01-02 03:04:07,000 WARNING a: {evil}\n",
    )  # fmt: skip
    other = make_run(tmp_path / "other")
    for text in (made(folder), made(folder, other)):
        tags = Tags(text)
        assert tags.open == []
        assert sum(tag == "script" for tag, _ in tags.seen) == 3  # figures, plotly.js, page.js
        assert not any("onerror" in attributes for _, attributes in tags.seen)
        assert not any(
            tag in ("img", "i") and attributes.get("src", "data:").startswith("x") for tag, attributes in tags.seen
        )
        drawn(text)
    legend = [trace["name"] for trace in drawn(text)["loss"]["data"]]  # plotly reads tags in names, too
    assert "a&amp;b&lt;i&gt; training" in legend
    assert in_script('"</script>&"') == '"\\u003c/script\\u003e\\u0026"'


def test_plain_text_is_escaped_by_the_builder():
    assert (
        element("p", "<b>", element("i", "&"), None, title='"x"')
        == '<p title="&quot;x&quot;">&lt;b&gt;<i>&amp;</i></p>'
    )


# -- broken and missing files


@pytest.mark.parametrize("name", ["run.json", ".hydra/config.yaml", "run.log", "events"])
def test_any_file_may_be_missing(tmp_path, name):
    folder = make_run(tmp_path / "r")
    for file in folder.glob("events*" if name == "events" else name):
        file.unlink()
    text = made(folder)
    assert "Notes on the files" in text and ("No curves" if name == "events" else f"{name} is missing") in text


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("run.json", '{"status": "run', "run.json can&#x27;t be read"),
        ("run.json", "[1]", "run.json holds a list"),
        (".hydra/config.yaml", "a: [1", "config.yaml can&#x27;t be read"),
        ("samples/step_0000020.png", "no picture", "step_0000020.png can&#x27;t be shown"),
    ],
)
def test_damaged_files_become_notes(tmp_path, name, content, note):
    folder = make_run(tmp_path / "r")
    (folder / name).write_text(content)
    assert note in made(folder)


@pytest.mark.parametrize("value", [None, 3, "x", [], {"a": [1]}, float("nan")])
def test_record_of_other_types_is_survived(tmp_path, value):
    keys = (
        "status",
        "warnings",
        "result",
        "git",
        "command",
        "packages",
        "data",
        "device",
        "processes",
        "started",
        "ended",
        "experiment_name",
    )
    folder = make_run(tmp_path / "r", config="trainer: 3\ncallbacks:\n  rfid: 1\n", **dict.fromkeys(keys, value))
    Tags(made(folder))


def test_events_that_break_off_keep_what_was_before(tmp_path):
    folder = make_run(tmp_path / "r")
    file = next(folder.glob("events*"))
    whole = file.read_bytes()
    scalars, _, problem = read_events(file)
    assert problem is None and len(scalars["train/loss"]) == 3
    places = [i for i in range(len(whole)) if whole.startswith(b"val/psnr", i)]
    file.write_bytes(whole[: places[1]])
    scalars, _, problem = read_events(file)
    assert len(scalars["val/psnr"]) == 1 and len(scalars["train/loss"]) == 3 and "breaks off" in problem
    file.write_bytes(whole[: places[1]] + b"\xff" + whole[places[1] + 1 :])
    assert "damaged" in read_events(file)[2]
    file.write_bytes(b"garbage, not events" * 9)
    assert read_events(file)[0] == {} and "events.out" in made(folder)


def test_csv_stands_in_for_events(tmp_path):
    folder = make_run(tmp_path / "r", {})
    (folder / "csv").mkdir()
    (folder / "csv" / "metrics.csv").write_text(
        "epoch,step,train/loss,val/psnr\n0,10,0.5,\n0,20,nan,17.0\n0,,1,1\n0,30,junk,18\n0,40"
    )
    scalars, problem = read_csv(folder / "csv" / "metrics.csv")
    assert scalars["val/psnr"] == [(20, 17.0), (30, 18.0)] and "2 entries" in problem and "epoch" not in scalars
    text = made(folder)
    assert drawn(text)["loss"]["data"][0]["y"] == [0.5, None]
    assert "train/loss is no finite number at 1 of 2 steps, first at step 20" in text


def test_a_later_file_of_the_same_run_replaces_what_it_did_again(tmp_path):
    folder = make_run(tmp_path / "r", {"train/loss": (3.0, 2.0, 1.0)})
    first = next(folder.glob("events*"))
    first.rename(folder / "events.out.tfevents.1000000000.a.1.0")
    events(folder, {"train/loss": (9.0, 8.0)}, steps=(20, 25))
    series = read_runs([folder])[0].series["train/loss"]
    assert (series.steps, series.values) == ((10, 20, 25), (3.0, 9.0, 8.0))


# -- arithmetic


def test_thinning_keeps_ends_and_extremes():
    values = [math.sin(i / 7) for i in range(20000)]
    values[777], values[15555], values[9000] = 50.0, -50.0, math.nan
    thinned = thin(Series(tuple(range(20000)), tuple(values)), 1000)
    assert len(thinned) <= 1000 and thinned.steps[0] == 0 and thinned.steps[-1] == 19999
    assert thinned.at(777) == 50.0 and thinned.at(15555) == -50.0
    assert list(thinned.steps) == sorted(set(thinned.steps))
    small = Series((1, 2), (1.0, 2.0))
    assert thin(small) is small


def test_running_mean():
    steps = tuple(range(400))
    straight = smooth(Series(steps, tuple(2.0 * s for s in steps)))
    assert straight.values[5:-5] == pytest.approx(
        [2.0 * s for s in steps][5:-5]
    )  # no lag, and hardly a bend at the ends
    assert straight.values == pytest.approx([2.0 * s for s in steps], abs=2.0)
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(0)).tolist()
    assert max(map(abs, smooth(Series(tuple(range(4000)), tuple(noise))).values)) < 1.0  # the very last point too
    constant = smooth(Series(steps, tuple(math.nan if s % 3 == 0 else 5.0 for s in steps)))
    assert [v for v in constant.values if not math.isnan(v)] == pytest.approx(
        [5.0] * (400 - sum(map(math.isnan, constant.values)))
    )
    assert smooth(Series((1, 2), (1.0, 2.0))) is None


def test_join_and_best():
    series = join([[(1, 1.0), (5, 2.0), (9, 3.0)], [(5, 7.0)], []])
    assert series == Series((1, 5), (1.0, 7.0))
    values = Series((1, 2, 3, 4), (2.0, math.nan, 1.0, 1.0))
    assert (
        values.best("low") == (3, 1.0)
        and values.best("high") == (1, 2.0)
        and Series((1,), (math.nan,)).best("low") is None
    )


def test_pictures_are_chosen_evenly_and_bounded(tmp_path):
    assert (
        evenly(list(range(100)), 12)[:2] == [0, 9]
        and evenly(list(range(100)), 12)[-1] == 99
        and len(evenly(list(range(100)), 12)) == 12
    )
    assert evenly([1, 2], 12) == [1, 2]
    noise = torch.randint(0, 256, (900, 1000, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy()).save(tmp_path / "big.png")
    uri, size, remark = encode(tmp_path / "big.png")
    assert (
        uri.startswith("data:image/jpeg;base64,")
        and len(uri) < MAX_BYTES * 1.4
        and f"{size[0]} x {size[1]} px of 1000 x 900" in remark
    )


def test_rfid_sheets_are_found_in_order(tmp_path):
    config = f"callbacks:\n  rfid:\n    rfid_output_dir: {tmp_path / 'sheets'}\n"
    folder = make_run(tmp_path / "2026-01-02" / "03-04-05", config=config, pictures=())
    for name in ("end", "epoch_001", "step_0000005", "step_0000015"):
        (tmp_path / "sheets" / "2026-01-02_03-04-05" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "sheets" / "2026-01-02_03-04-05" / name / "sheet.png")
    assert re.findall(r'data-caption="(.*?)"', made(folder)) == [
        "step 5",
        "end of epoch 1",
        "step 15",
        "end of training",
    ]


def test_words_for_numbers():
    assert [duration(s) for s in (12, 90, 9000, 200000)] == ["12 s", "2 min", "2 h 30 min", "2 d 8 h"]
    assert [number(v) for v in (1234567, 0.123456, 2.0, "x", math.nan, 12345.67)] == [
        "1,234,567",
        "0.1235",
        "2",
        "x",
        "nan",
        "12,346",
    ]
    assert flat({"a": {"b": 1, "c": {}}, "d": None}) == {"a.b": 1, "a.c": {}, "d": None}


# -- the program


def test_program_writes_and_refuses(tmp_path, capsys):
    folder = make_run(tmp_path / "runs" / "a")
    assert main([str(folder)]) == 0 and (folder / "report.html").is_file()
    assert (
        main([str(folder), "--out", str(tmp_path / "new" / "x.html")]) == 0 and (tmp_path / "new" / "x.html").is_file()
    )
    assert "x.html" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([tmp_path / "empty"], "is no run's folder"),
        ([tmp_path / "runs"], f"Runs below it: {folder}"),
        ([tmp_path / "nowhere"], "No such folder"),
        ([folder, folder], "given twice"),
        ([folder, "--out", tmp_path], "is a folder"),
    ):
        assert main([str(argument) for argument in arguments]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="can't be written"):
        write([folder], folder / "run.json" / "x.html")


def test_help_tells_examples_and_exit_codes():
    done = subprocess.run(
        [sys.executable, "src/report.py", "--help"], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "exit codes" in done.stdout and "python src/report.py logs/runs" in done.stdout
