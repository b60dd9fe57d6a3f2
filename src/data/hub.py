"""Data sets of the Hugging Face hub, named `hf:ORG/NAME` or `hf:ORG/NAME@REVISION`; never guessed from `a/b`."""

import re
from pathlib import Path

from src.core.errors import UserError

PREFIX = "hf:"
_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def hub_folder(name: str, download: bool) -> Path:
    """Return the folder of a data set of the hub, as huggingface_hub keeps it in its cache.

    download: fetch what is missing; False: it is there already.

    Raises:
        UserError: no such name, not reachable, or not downloaded.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(f"data.data_dir={name}: expected hf:ORG/NAME or hf:ORG/NAME@REVISION.")
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(match[1], repo_type="dataset", revision=match[2], local_files_only=not download)
        return Path(found)
    except Exception as error:  # errors of the network and of the hub share no class
        command = f"huggingface-cli download --repo-type dataset {match[1]}" + (
            f" --revision {match[2]}" if match[2] else ""
        )
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"data.data_dir={name} can't be downloaded ({why}). Where there is a network: `{command}`, once its terms are accepted "
            "on the hub; then copy the folder and set data.data_dir to it."
        ) from error
