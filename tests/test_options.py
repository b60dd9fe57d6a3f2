"""Command lines: options from dataclasses, progress on stderr, exit status."""

import signal
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal, get_type_hints

import pytest
import torch

from src.core import terminal
from src.core.distributed import processes
from src.core.errors import UserError
from src.core.files import PROJECT_ROOT
from src.core.options import NotNegative, Pixels, Positive, Share, option, parse
from src.evaluation.options import ReconstructionOptions, SampleOptions, StatisticsOptions
from src.export import Options as ExportOptions


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A group of options."""

    GROUP: ClassVar = "numbers"
    batch_size: Positive = option("images at once", "N", 64)
    share: float | None = option("of the whole", "SHARE")


@dataclass(frozen=True, kw_only=True)
class Options(Shared):
    """The options of a script."""

    names: tuple[str, ...] = option("what", default=(), positional=True, nargs="*")
    out_dir: Path = option("where", "DIR", MISSING)
    kind: Literal["a", "b"] = option("which", default="a")
    part: Share = option("of the whole", default=0.5)
    seed: NotNegative = option("of draws", default=0)
    side: Pixels = option("of images", default=1)
    over_write: bool = option("anew", default=False)
    data: tuple[str, ...] = option("sets", "DIR", ())
    mirror: tuple[str, ...] = option("repeatable", "URL", (), action="append", nargs=None)
    batch_size: Positive = option("images at once, here", "N", 8)

    def __post_init__(self) -> None:
        if self.share and not self.data:
            raise ValueError("--share needs --data")


def test_types_defaults_and_both_spellings():
    assert parse(Options, None, ["--out_dir", "x"]) == Options(out_dir=Path("x"))
    line = "a k=v --out-dir x --kind b --over-write --data c d --mirror u --mirror v --batch-size 2 --share .5"
    assert parse(Options, None, line.split()) == Options(
        names=("a", "k=v"), out_dir=Path("x"), kind="b", over_write=True, data=("c", "d"), mirror=("u", "v"), batch_size=2,
        share=0.5,
    )  # fmt: skip


def test_relative_paths_start_at_the_project_root_in_every_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for program in (SampleOptions, StatisticsOptions, ReconstructionOptions, ExportOptions):
        hints = get_type_hints(program, include_extras=True)
        assert not [entry.name for entry in fields(program) if hints[entry.name] in (Path, Path | None)], program
    words = ["--checkpoint", "x", "--output", "a.npz", "--grid", "~no-such-user/b.png"]  # a file of that name
    options = parse(SampleOptions, None, words)
    assert (options.output, options.grid) == (PROJECT_ROOT / "a.npz", PROJECT_ROOT / "~no-such-user/b.png")


def test_help_has_groups_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parse(Options, "Does things.", ["--help"], "the end")
    said = " ".join(capsys.readouterr().out.split())
    batch = "numbers: --batch_size N, --batch-size N images at once, here (default: 8)"
    assert all(words in said for words in ("Does things.", batch, "the end"))
    assert "which (default: a)" in said and "anew" in said and "()" not in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "--out_dir"),
        ("--out_dir x --kind c", "invalid choice"),
        ("--out_dir x --batch_size 0", "expected at least 1"),
        (f"--out_dir x --batch_size {2**63}", "expected at least 1, below 2^63"),
        ("--out_dir x --side 16385", "16385: expected 1 to 16384 pixels"),
        ("--out_dir= --kind a", "no value after `--out_dir`"),
        ("--out_dir x --kind= ", "no value after `--out_dir x --kind`"),
        ("--out_dir x --batch 2", "unrecognized"),
        ("--out_dir x --share 1", "--share needs --data"),
        ("--out_dir x --part nan", "nan: expected a share, 0 to 1"),
        ("--out_dir x --part 2", "2: expected a share, 0 to 1"),
        (f"--out_dir x --seed {2**63}", "expected 0 or more, below 2^63"),
    ],
)
def test_wrong_options_end_with_status_2(line, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Options, None, line.split())
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_progress_without_a_terminal_is_lines(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "_LINE_EVERY_S", 0.0)
    for shown, lines in ((True, ["0 of 2 images", "1 of 2 images", "2 of 2 images"]), (False, [])):
        with terminal.progress("images", shown) as update:
            assert list(terminal.counted("ab", 2, update)) == ["a", "b"]
        assert [line.split(" after")[0] for line in capsys.readouterr().err.splitlines()] == lines


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("x y"), 1, "Error: x y"),
        (MemoryError("8 TB."), 1, "Error: Not enough memory: 8 TB. Use a smaller --batch_size, or fewer images."),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left", "x.npz"), 1, "Error: x.npz: No space left. Make room, or give another path."),
        (OSError(28, "No space left"), 1, "Error: a file: No space left. Make room, or give another path."),
        (OSError(17, "File exists", "x"), 1, "Error: x: File exists. Make room, or give another path."),
    ],
)
def test_errors_end_a_script_with_a_message_and_a_status(error, status, words, capsys):
    def body() -> int:
        raise error

    assert terminal.run_program(body) == status and capsys.readouterr().err == f"{words}\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_a_script_as_an_exception_would(number, code):
    unheard = lambda *_: None  # noqa: E731  # otherwise an unhandled signal would end the tests
    before = signal.signal(number, unheard)
    try:
        with pytest.raises(SystemExit) as stop:
            terminal.run_program(lambda: signal.raise_signal(number))
        assert stop.value.code == code and signal.getsignal(number) == unheard
        signal.signal(number, signal.SIG_IGN)  # as under nohup
        assert terminal.run_program(lambda: signal.raise_signal(number) or 0) == 0
    finally:
        signal.signal(number, before)


def test_sigterm_ends_a_script_that_waits_for_others_to_join(monkeypatch):
    """A handler in Python would have to wait as well."""
    seen = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    join = lambda *_, **__: seen.append(signal.getsignal(signal.SIGTERM))  # noqa: E731
    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)

    def body() -> int:
        with processes("cpu") as process:
            join()
            return process.world

    assert terminal.run_program(body) == 2
    assert seen[0] == signal.SIG_DFL and callable(seen[1])
