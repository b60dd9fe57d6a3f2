"""The documentation: every command works, and every file, key, option and message that it names exists.

Training commands are composed, other scripts parse their options, small tools are looked up; the README's first ten minutes
run on a tiny model. Nothing is downloaded.
"""

import argparse
import ast
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from src.core.weights import PROJECT_ROOT
from src.formats.export import write_official
from src.training.record import RunRecord, make_folder
from tests.tiny_models import tiny_rae
from tests.training import composed, train

PAGES = [PROJECT_ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((PROJECT_ROOT / "docs").glob("*.md"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT_ROOT)))
PAIRS = [("README.md", "README.zh-CN.md"), ("docs/guide.md", "docs/guide.zh-CN.md")]
HYDRA_FLAGS = {"-m", "--multirun", "--cfg", "job", "--help", "--resolve", "--hydra-help"}
# Prefixes of commands that are not ours; the files of ours that they name are checked below.
OTHERS = (
    "make", "pip", "conda", "tensorboard", "sbatch", "pre-commit", "source", "python3 -m venv", "python -m pip", "python -m pytest",
    "python -c", "nvidia-smi",
)  # fmt: skip
# Even the shortest runs validate, so that best.ckpt exists.
OFTEN = ["~callbacks.rfid", "trainer.check_val_every_n_epoch=1"]


def text(page: Path | str) -> str:
    return (PROJECT_ROOT / page).read_text(encoding="utf-8")


def without_code(page: Path | str) -> str:
    return re.sub(r"^```.*?^```", "", text(page), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path | str) -> list[str]:
    """Return the commands of ```bash blocks, continuation lines joined and comments dropped, then those between backticks."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL):
        lines = block.replace("\\\n", " ").splitlines()
        found += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    inline = re.findall(r"`((?:python|torchrun|make|pip|conda|tensorboard) [^`]+)`", without_code(page))
    return [" ".join(shlex.split(part, posix=False)) for line in found + inline for part in line.split(" && ")]


def unique_commands() -> list[str]:
    found = dict.fromkeys(command for page in PAGES for command in commands(page))
    return [command for command in found if "…" not in command]


def words(command: str) -> list[str]:
    """Split a command, without variables in front and without `.venv/bin/`."""
    parts = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", parts[0]):
        parts.pop(0)
    parts[0] = parts[0].removeprefix(".venv/bin/")
    return parts


def script(parts: list[str]) -> tuple[str, list[str]] | None:
    """Return (file, arguments) of a script of ours that python or torchrun starts, else None."""
    if parts[0] not in ("python", "torchrun"):
        return None
    place = next((i for i, word in enumerate(parts) if word.endswith(".py")), None)
    return None if place is None or "-m" in parts[1:place] else (parts[place], parts[place + 1 :])


# -- commands


class Parsed(Exception):
    """Raised once the options are parsed."""


@cache
def module(file: str):
    kept = list(sys.path)
    try:
        return importlib.import_module(file.removesuffix(".py").replace("/", "."))
    finally:
        sys.path[:] = kept


def parse(file: str, arguments: list[str], monkeypatch) -> None:
    """Run a script's `main` until its options are parsed. A wrong option raises SystemExit."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, args=None, namespace=None):
        original(self, arguments if args is None else args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    with pytest.raises(Parsed):
        main = module(file).main
        main(arguments) if main.__code__.co_argcount else main()


def compose_training(arguments: list[str]) -> None:
    overrides = [word for word in arguments if word not in HYDRA_FLAGS]
    if "hparams_search=optuna" in overrides:  # needs an extra
        overrides = [word for word in overrides if not word.startswith(("hparams_search", "hydra."))]
    if "-m" in arguments:  # the first value of each sweep, and the launcher where it is installed
        find = importlib.util.find_spec
        installed = find("hydra_plugins") and find("hydra_plugins.hydra_submitit_launcher")
        for word in (word for word in overrides if word.startswith("hydra/launcher=")):
            assert (PROJECT_ROOT / f"configs/hydra/launcher/{word.split('=')[1]}.yaml").is_file()
        overrides = [word.split(",")[0] for word in overrides if installed or not word.startswith("hydra")]
    config = composed(overrides)
    config.paths.run_dir = "somewhere"
    OmegaConf.to_container(config, resolve=True)


def test_commands_are_found():
    assert len(unique_commands()) > 80
    assert sum(script(words(c)) is not None for c in unique_commands()) > 60


@pytest.mark.parametrize("command", unique_commands())
def test_command(command, monkeypatch):
    found = script(words(re.sub(r"(experiment[= ])NAME", r"\1rae_dino", command)))
    if found is None:
        plain = " ".join(words(command))
        assert plain.startswith(OTHERS), f"unknown command, add it to tests/test_docs.py: {command}"
        check_other(words(command))
        return
    file, arguments = found
    assert (PROJECT_ROOT / file).is_file(), file
    if file == "src/train.py":
        compose_training(arguments)
    elif arguments != ["--help"]:
        parse(file, arguments, monkeypatch)


def check_other(parts: list[str]) -> None:
    """Check the files of ours that a third-party command names."""
    if parts[0] == "make":
        assert re.search(rf"^{parts[1]}:.*##", text("Makefile"), re.MULTILINE), parts
    for word in parts[1:]:
        if re.fullmatch(r"[\w/.-]+\.(txt|ya?ml|sh|py)", word) and not word.startswith("/"):
            assert (PROJECT_ROOT / word).is_file(), word
        if extra := re.fullmatch(r"\.\[(\w+)\]", word):
            assert re.search(rf"^{extra[1]} = \[", text("pyproject.toml"), re.MULTILINE)
        if pinned := re.fullmatch(r"(\w+)==([\d.]+)", word):
            assert word in text("requirements.txt").splitlines(), pinned[0]
    if parts[0] == "sbatch":
        place = next(i for i, word in enumerate(parts) if word.endswith(".sh"))
        composed(parts[place + 1 :])
    if parts[:2] == ["python", "-c"]:
        compile(parts[2], "documented", "exec")


def slurm_script(folder: Path, *arguments: str) -> list[str]:
    """Return the arguments that docs/examples/slurm.sh passes to `src/train.py`, submitted in `folder` as job 7."""
    srun = folder / "bin/srun"
    srun.parent.mkdir(exist_ok=True)
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    done = subprocess.run(
        ["bash", PROJECT_ROOT / "docs/examples/slurm.sh", *arguments],
        cwd=folder, env={"PATH": f"{srun.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    return lines[lines.index("src/train.py") + 1 :]


def test_requeued_slurm_job_resumes_its_own_run(tmp_path, monkeypatch):
    asked = ["experiment=rae_dummy", "ckpt_path=another.ckpt"]  # the job's own checkpoint replaces it
    first = slurm_script(tmp_path, *asked)
    assert first == [*asked, "trainer.strategy=ddp", "trainer.num_nodes=2", "paths.run_dir=logs/runs/slurm/7"]
    own = tmp_path / "logs/runs/slurm/7/checkpoints/last.ckpt"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    own.parent.mkdir(parents=True)
    RunRecord(own.parents[1], "slurm").update({})
    assert slurm_script(tmp_path, *asked) == first  # requeued before any save: restarts in its folder
    assert make_folder("logs", str(own.parents[1]), tmp_path / "another.ckpt") == own.parents[1]
    own.touch()
    assert make_folder("logs", str(own.parents[1]), own) == own.parents[1]
    again = composed(slurm_script(tmp_path, *asked))
    assert (again.paths.run_dir, again.ckpt_path) == ("logs/runs/slurm/7", "logs/runs/slurm/7/checkpoints/last.ckpt")
    assert again.trainer.num_nodes == 2


def test_python_example_with_a_released_decoder(tmp_path):
    """Run the example of the guides with the paths of a tiny encoder and decoder."""
    blocks = [
        [b for b in re.findall(r"^```python\n(.*?)^```", text(page), re.M | re.S) if "RAE(" in b] for page in PAIRS[1]
    ]
    assert blocks[0] == blocks[1] and len(blocks[0]) == 1
    rae = tiny_rae(tmp_path, image_size=256)
    rae.encoder.model.save_pretrained(tmp_path / "encoder")
    write_official(rae, tmp_path)
    example = blocks[0][0]
    for documented, here in (
        ("facebook/dinov2-with-registers-base", tmp_path / "encoder"),
        ("configs/decoder/ViTXL", tmp_path / "decoder.json"),
        ("weights/decoders/dinov2/wReg_base/ViTXL_n08/model.pt", tmp_path / "model.pt"),
    ):
        assert f'"{documented}"' in example
        example = example.replace(f'"{documented}"', repr(str(here)))
    images = torch.rand(1, 3, 256, 256)
    names = {"images": images}
    exec(example, names)
    assert torch.equal(names["images"], rae(images).clamp(0, 1))


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0])
def test_both_languages_have_the_same_commands_and_the_same_names(pair):
    english, chinese = pair
    assert commands(english) == commands(chinese)
    names = [sorted(set(re.findall(r"`([a-z][\w./-]*[/._][\w./-]*)`", text(page)))) for page in pair]
    assert names[0] == names[1]
    headings = [len(re.findall(r"^#+ ", without_code(PROJECT_ROOT / page), re.MULTILINE)) for page in pair]
    assert headings[0] == headings[1]
    rows = [len(re.findall(r"^\|", text(page), re.MULTILINE)) for page in pair]
    assert rows[0] == rows[1]


def test_first_ten_minutes_of_the_readme(tmp_path, monkeypatch, capsys):
    """Run its commands in order: train with another learning rate, resume, report, score, reconstruct, export."""
    section = text("README.md").split("## The first ten minutes")[1].split("\n## ")[0]
    lines = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1].replace("\\\n", " ").splitlines()
    runs = [script(words(line)) for line in lines]
    programs = [f"src/{name}.py" for name in ("train", "train", "report", "eval_rfid", "reconstruct", "export")]
    assert [file for file, _ in runs] == programs
    for _, arguments in runs[:2]:
        others = ("ckpt_path", "trainer.max_epochs", "experiment")
        assert [word for word in arguments if not word.startswith(others)] == ["model.optimizer.lr=5e-4"]
    rate = [*OFTEN, "model.optimizer.lr=5e-4"]
    assert train(tmp_path / "first", *rate, "trainer.max_epochs=1").module.settings.optimizer.lr == 5e-4
    folder = tmp_path / "run"
    train(folder, *rate, "trainer.max_epochs=2", checkpoint=tmp_path / "first/checkpoints/last.ckpt")
    for file, arguments in runs[2:]:
        here = [word.replace("logs/runs/DATE/TIME", str(folder)) for word in arguments]
        here = [str(tmp_path / word) if word in ("outputs/reconstructed", "exports/dummy") else word for word in here]
        here += ["--num_samples", "8", "--batch_size", "8", "--num_workers", "0"] if file == "src/eval_rfid.py" else []
        here += ["--num_workers", "0"] if file == "src/reconstruct.py" else []
        assert module(file).main(here) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "Score: " in said and "UNTRAINED" in said
    assert (folder / "report.html").is_file() and (tmp_path / "outputs/reconstructed/reconstruct.json").is_file()
    assert (tmp_path / "exports/dummy/model.safetensors").is_file()


@pytest.mark.parametrize(
    "file", sorted({script(words(c))[0] for c in unique_commands() if script(words(c))} - {"src/train.py"})
)
def test_help_has_an_example_and_exit_codes(file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [file, "--help"])
    with pytest.raises(SystemExit) as ended:
        main = module(file).main
        main(["--help"]) if main.__code__.co_argcount else main()
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert f"{file} " in said, "no example command"
    assert not re.search(r"\S {4,}--", said), "a command whose lines were joined"
    assert file.startswith(("benchmarks/", "docs/")) or re.search(r"exit (codes|status)", said, re.IGNORECASE)


def test_help_of_training_names_real_keys_and_experiments():
    help_text = yaml.safe_load(text("configs/hydra/default.yaml"))["help"]
    everything = "\n".join(help_text.values())
    overrides = re.findall(r"^  ([a-z][\w./]*=[^\s]+)", everything, re.MULTILINE)
    assert len(overrides) > 12
    composed(["experiment=rae_dino", *overrides])
    lines = re.findall(r"^  (?:python|torchrun) .*?src/train\.py (.*?)(?:   .*)?$", help_text["template"], re.MULTILINE)
    for command in lines:
        if "NAME" not in command:
            composed(shlex.split(command))
    for code in ("0  ", "1  ", "143"):
        assert code in everything
    assert "-sc install=bash" in everything


# -- what the pages name


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", without_code(page), re.MULTILINE):
        found.add(re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-"))
    return found


@each_page
def test_link_targets_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name}: {target}"
        assert place.is_relative_to(PROJECT_ROOT)
        assert not anchor or anchor in anchors(place), f"{page.name}: no heading #{anchor} in {place.name}"


@each_page
def test_named_files_exist(page):
    for name in re.findall(r"`((?:src|configs|scripts|docs|tests|benchmarks)/[\w./-]+)`", text(page)):
        if not any(mark in name for mark in ("NAME", "my_dataset", "rae_vit")):
            assert (PROJECT_ROOT / name).exists(), f"{page.name}: {name}"


def test_pages_and_headings_named_in_the_code_exist():
    for folder in ("src", "configs", "scripts", "benchmarks", "tests"):
        for file in [*(PROJECT_ROOT / folder).rglob("*.py"), *(PROJECT_ROOT / folder).rglob("*.yaml")]:
            said = re.sub(r"\s+", " ", file.read_text(encoding="utf-8"))
            assert not re.search(r"recipe,? sections? \d", said), f"{file}: the pages have no numbered sections"
            for page, heading in re.findall(r"(docs/[\w.-]+\.md)(?:, \"(\w[^\"]*)\")?", said):
                assert re.search(rf"^#+ {re.escape(heading)}", without_code(page), re.MULTILINE), (
                    f"{file}: {page}, {heading}"
                )


@cache
def whole_configs():
    return [composed([f"experiment={name}", "logger=many"]) for name in ("rae_dino", "ditdh_xl")]


@each_page
def test_named_keys_exist(page):
    for key in re.findall(r"`((?:data|model|trainer|callbacks|paths|logger|seed)\.[a-z_.]+)(?:=[^`]*)?`", text(page)):
        if key.startswith("model.encoder_params.") or key in ("model.pt", "model.safetensors"):
            continue  # keys of one encoder family; a file
        missing = object()
        found = (OmegaConf.select(config, key.rstrip("."), default=missing) for config in whole_configs())
        assert any(value is not missing for value in found), f"{page.name}: {key}"


@each_page
def test_named_options_exist(page):
    files = [file for folder in ("src", "scripts", "benchmarks") for file in (PROJECT_ROOT / folder).rglob("*.py")]
    known = "\n".join(text(file) for file in files)
    others = {"help", "cfg", "no-index", "nodes", "ntasks", "ntasks-per-node", "signals-to-handle", "signal"}
    for name in set(re.findall(r"`--([a-z][\w-]*)", text(page))).difference(others):
        spelled = name.replace("-", "[_-]")  # quoted, or a field of an options class
        assert re.search(rf"[\"'](?:--)?{spelled}[\"']|^    {spelled}: .*= option\(", known, re.M), (
            f"{page.name}: --{name}"
        )


def test_readme_lists_every_experiment():
    rows = "\n".join(line for line in text("README.md").splitlines() if line.startswith("|"))
    for file in (PROJECT_ROOT / "configs/experiment").glob("*.yaml"):
        assert f"`{file.stem}`" in rows, file.stem


def test_weights_page_lists_every_download():
    from src.core.requirements import FILES

    for asset in FILES:
        assert f"`{asset.name}`" in text("docs/weights.md"), asset.name


@cache
def messages() -> list[str]:
    """Return all strings in the code, with `…` for what is filled in later."""
    found = []
    for file in [*(PROJECT_ROOT / "src").rglob("*.py"), *(PROJECT_ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[.\d]*[sdgf]|%%", "…", node.value))
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in node.values))
    return found


def test_messages_in_troubleshooting_are_those_of_the_code():
    looked_at = 0
    for line in text("docs/troubleshooting.md").splitlines():
        if not line.startswith("**`") or "(Hydra)" in line or "(PyTorch)" in line:
            continue
        for message in re.findall(r"`([^`]+)`", line.split("**")[1]):
            parts = [part for part in message.split("…") if part.strip(" .:,()")]
            assert any(all(part.strip() in said for part in parts) for said in messages()), message
            looked_at += 1
    assert looked_at > 30


def test_pre_commit_and_requirements_pin_the_same_ruff():
    (wanted,) = (line for line in text("requirements.txt").splitlines() if line.startswith("ruff=="))
    hooks = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    assert {d for hook in hooks for d in hook["additional_dependencies"]} == {wanted}


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_benchmark_table_matches_the_result_files(page):
    sys.path.insert(0, str(PROJECT_ROOT / "docs"))
    try:
        import benchmark_table
    finally:
        sys.path.pop(0)
    assert benchmark_table.BEGIN in text(page)
    assert benchmark_table.replaced(page, text(page)) == text(page), "run python docs/benchmark_table.py --write"
