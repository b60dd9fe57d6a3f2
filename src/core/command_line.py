"""Look at the words of a command before Hydra does, where its own message would not say what to do. No heavy imports."""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
_PLUGINS = {"hparams_search=optuna": "optuna_sweeper", "hydra/launcher=slurm": "submitit_launcher"}
"""Overrides that need a package which is no requirement, and that package."""


def problem(arguments: Sequence[str]) -> str:
    """Return what is wrong with the overrides of `src/train.py`, and what to type; empty where nothing is known to be."""
    for word in arguments:
        key, _, value = word.partition("=")
        plugin = _PLUGINS.get(word)
        if plugin and not (find_spec("hydra_plugins") and find_spec(f"hydra_plugins.hydra_{plugin}")):
            return f"{word} needs a plugin of Hydra that is not installed. Type: pip install -e '.[{value}]'"
        file = _CONFIGS / "experiment" / f"{value}.yaml"
        if key == "experiment" and re.fullmatch(r"[\w-]+", value) and file.is_file():
            text = file.read_text(encoding="utf-8")
            groups = re.findall(r"^\s*- (model|data|trainer|logger|callbacks):", text, re.MULTILINE)
            if "@package _global_" not in text or groups:
                lines = "".join(f"\n    - override /{group}: …" for group in groups)
                return (
                    f"{file}: an experiment begins with the line `# @package _global_`, and its defaults change those of "
                    f"configs/train.yaml.{' Write' * bool(groups)}{lines}"
                )
    return ""
