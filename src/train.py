"""Train the decoder of a representation autoencoder (RAE, stage 1)."""

import signal
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project root instead of src/

import hydra
from omegaconf import DictConfig

PLUGINS = {"hparams_search=optuna": "optuna_sweeper", "hydra/launcher=slurm": "submitit_launcher"}
"""Overrides that need a package which is no requirement, and that package."""


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(config: DictConfig) -> float | None:
    from src.training.run import run  # heavy imports only now, so that --help and --cfg answer at once

    return run(config)


if __name__ == "__main__":
    if {"--help", "-h", "--cfg", "-c", "--info"} & set(sys.argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… --help | head` ends quietly
    for word in sys.argv[1:]:
        name = f"hydra_plugins.hydra_{PLUGINS.get(word)}"
        if word in PLUGINS and not (find_spec("hydra_plugins") and find_spec(name)):
            extra = word.partition("=")[2]
            sys.exit(f"{word} needs a plugin of Hydra that is not installed. Type: pip install '.[{extra}]'")
    try:
        main()
        if training := sys.modules.get("src.training.run"):
            sys.exit(training.sweep_status())
    except SystemExit as ended:
        if ended.code == 1 and "src.training.run" not in sys.modules:  # Hydra's own error
            from src.core.compose import quoting_hint

            if hint := quoting_hint(sys.argv[1:]):
                print(hint, file=sys.stderr)
        raise
    except KeyboardInterrupt:  # before the run listens for it
        print("interrupted before the run began", file=sys.stderr)
        sys.exit(130)
