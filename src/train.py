"""Train the decoder of a representation autoencoder (RAE, stage 1)."""

import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project root instead of src/

import hydra
from omegaconf import DictConfig

from src.core.command_line import problem


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(config: DictConfig) -> float | None:
    from src.training.run import run  # heavy imports only now, so that --help and --cfg answer at once

    return run(config)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE") and {"--help", "-h", "--cfg", "-c", "--info"} & set(sys.argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… --help | head` ends quietly
    if said := problem(sys.argv[1:]):
        sys.exit(said)
    try:
        main()
        ended = 0
    except SystemExit as error:
        ended = error.code
        if ended == 1 and "src.training.run" not in sys.modules:  # Hydra's own error
            from src.core.compose import quoting_hint

            if hint := quoting_hint(sys.argv[1:]):
                print(hint, file=sys.stderr)
    except KeyboardInterrupt:  # before the run listens for it
        print("interrupted before the run began", file=sys.stderr)
        sys.exit(130)
    if training := sys.modules.get("src.training.run"):
        status = training.sweep_status()  # of a sweep that broke off, too
        ended = ended or status
    sys.exit(ended)
