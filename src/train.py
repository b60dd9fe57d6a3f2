"""Train the decoder of a representation autoencoder (RAE, stage 1) or a diffusion transformer on its latents (stage 2)."""

import os
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project root instead of src/

import hydra
from hydra.errors import CompactHydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from src.core.compose import explained, problem

RAISE = "HYDRA_FULL_ERROR"
"""Set while Hydra reads the configuration, so that it raises errors instead of printing some with tracebacks."""
wanted = os.environ.get(RAISE)
REPORTED = (
    CompactHydraException,
    OmegaConfBaseException,
    MarkedYAMLError,
    RuntimeError,
    ValueError,
    TypeError,
    OSError,
)
"""Errors of Hydra and its plugins, reported without a traceback."""


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(config: DictConfig) -> float | None:
    if wanted is None:
        os.environ.pop(RAISE, None)
    from src.training.run import run  # heavy imports, deferred so that --help and --cfg are fast

    value = run(config)
    os.environ[RAISE] = "1"  # a sweeper reads the next configuration
    return value


def interrupted(*_: object) -> None:
    """Exit at once on Ctrl-C before the run handles it: an interrupted import could raise any error."""
    print("interrupted before the run began", file=sys.stderr)
    os._exit(130)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)
    if hasattr(signal, "SIGPIPE") and {"--help", "-h", "--cfg", "-c", "--info"} & set(sys.argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... --help | head` ends quietly
    os.environ.setdefault(RAISE, "1")
    # Flags go last: Hydra ignores overrides after a flag between them, and `--info` would take the next override as its value.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word[0:1] != "~" and ("=" not in word or word[0] == "-"))
    try:
        if message := problem(sys.argv[1:]):
            sys.exit(message)
        main()
        exit_code = 0
    except SystemExit as error:
        exit_code = error.code
    except REPORTED as error:
        if wanted or RAISE not in os.environ:  # the user set it, or the run itself failed
            raise
        exit_code = explained(error, sys.argv[1:])
    if training := sys.modules.get("src.training.run"):
        status = training.sweep_status()  # also if the sweep was cut short
        exit_code = exit_code or status
    sys.exit(exit_code)
