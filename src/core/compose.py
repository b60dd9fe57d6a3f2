"""Compose the configuration of `src/train.py` from other scripts, and explain faulty command lines where Hydra's own message
doesn't tell what to do. The only file below `src/training` that imports Hydra. No heavy imports.
"""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from src.core.errors import UserError
from src.core.files import PROJECT_ROOT
from src.core.text import hydra_quoted

_CONFIGS = PROJECT_ROOT / "configs"
_PLUGINS = {"hparams_search=optuna": "optuna_sweeper", "hydra/launcher=slurm": "submitit_launcher"}
"""Overrides that need an optional package, and that package."""


def problem(arguments: Sequence[str]) -> str:
    """Return what is wrong with the overrides of `src/train.py` and what to type instead; empty if no problem is known."""
    for word in arguments:
        key, _, value = word.partition("=")
        if key == "--experiment":  # as for download_weights.py; Hydra reads --experimental-rerun
            return "Overrides are typed without dashes: experiment=NAME"
        plugin = _PLUGINS.get(word)
        if plugin and not (find_spec("hydra_plugins") and find_spec(f"hydra_plugins.hydra_{plugin}")):
            return f"{word} needs a Hydra plugin that is not installed. Type: pip install -e '.[{value}]'"
        file = _CONFIGS / "experiment" / f"{value}.yaml"
        if key == "experiment" and re.fullmatch(r"[\w-]+", value) and file.is_file():
            text = file.read_text(encoding="utf-8")
            groups = re.findall(r"^\s*- (model|data|trainer|logger|callbacks):", text, re.MULTILINE)
            if "@package _global_" not in text or groups:
                lines = "".join(f"\n    - override /{group}: …" for group in groups)
                return (
                    f"{file}: an experiment begins with the line `# @package _global_`, and its defaults override those of "
                    f"configs/train.yaml.{' Write' * bool(groups)}{lines}"
                )
    return ""


def compose(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the configuration that `python src/train.py OVERRIDES` would run with, as plain values. Raises UserError for
    an unknown experiment or key, or a value that can't be resolved."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(config_dir=str(_CONFIGS), version_base="1.3"):
            config = OmegaConf.to_container(hydra_compose("train", overrides=list(overrides)), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        known = ", ".join(sorted(path.stem for path in (_CONFIGS / "experiment").glob("*.yaml")))
        reason = _unknown_key(error) or str(error).strip().splitlines()[0]
        raise UserError(
            f"{' '.join(overrides)}: {reason} Expected overrides as for src/train.py; experiments: {known}."
        ) from error
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def quoting_hint(arguments: Sequence[str]) -> str:
    """Return how to quote the overrides that Hydra can't parse as typed; empty if there are none."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    typed = []
    for word in arguments:
        key, equals, value = word.partition("=")
        if not equals or word.startswith("-"):
            continue
        try:
            OverridesParser.create().parse_override(word)
        except HydraException:
            typed.append(f"{key}={hydra_quoted(value)}")
    return f"Hydra parses some characters itself. Quoted for Hydra and the shell: {' '.join(typed)}" if typed else ""


def _unknown_key(error: Exception) -> str:
    """Return the message for a key that the configuration lacks, with the closest known key; empty for any other error."""
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    from src.core.settings import check_keys

    cause = error.__cause__
    if not isinstance(cause, ConfigAttributeError | ConfigKeyError) or not cause.parent_node:
        return ""
    place = str(cause.full_key).rpartition(".")[0]
    groups = [] if place else [folder.name for folder in _CONFIGS.iterdir()]
    try:
        check_keys([str(cause.key)], [*cause.parent_node, *groups], place)
    except UserError as unknown:
        return str(unknown)
    return ""


def explained(error: Exception, arguments: Sequence[str]) -> str:
    """Return the message for an error that Hydra raised while composing the configuration."""
    from yaml import MarkedYAMLError

    if isinstance(error, OSError) and error.filename:  # Hydra's own, for a missing file of a group, has no filename
        return (
            f"{error.filename}: {error.strerror}. Sweeps are written below paths.log_dir, a run to hydra.run.dir if given: set it "
            "to a folder that can be written."
        )
    if isinstance(error, RuntimeError | ValueError | TypeError) and not isinstance(error, UnicodeDecodeError):
        lines = []
        for key, _, value in (word.partition("=") for word in arguments if not word.startswith(("-", "~"))):
            known = sorted(file.stem for file in (_CONFIGS / key).glob("*.yaml"))
            if known and not set(value.split(",")) <= set(known):
                lines.append(f"{key}={value}: expected the name of a file in configs/{key}: {', '.join(known)}.")
        return "\n".join(lines) or f"Hydra failed: {str(error).rstrip('.!?')}."
    if not isinstance(error, MarkedYAMLError | UnicodeDecodeError):
        unknown = _unknown_key(error)
        if "did you mean" in unknown:  # without a close match, Hydra's own lines tell how to add a key
            return unknown
        parts = unknown, str(error), "" if unknown else str(error.__cause__ or ""), quoting_hint(arguments)
        return "\n".join(text for text in parts if text)
    place, trace = "", error.__traceback__
    while trace is not None:  # Hydra's reader has the path in a local variable; the error may not
        place, trace = trace.tb_frame.f_locals.get("full_path", place), trace.tb_next
    where, reason = f", {place}" if place else "", " ".join(str(error).split())
    return f"The configuration can't be read{where}: {reason}. Expected YAML in UTF-8, indented with spaces, each key once."
