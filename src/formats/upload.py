"""Upload an exported folder to the Hugging Face hub."""

import re
from pathlib import Path

from src.core.errors import UserError


def push(folder: Path, repo_id: str, private: bool) -> str:
    """Upload all files of `folder` in one commit to the model repository, created if missing; return its id.

    Raises:
        UserError: no token, no permission, no connection.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message=f"Export {folder.name}")
    except (OSError, ValueError) as error:  # the hub's own, no connection, no token
        raise UserError(
            f"--push {repo_id}: {str(error).splitlines()[0]}. The export itself is in {folder}; push again once that is fixed. "
            "Pushing needs a token with write permission: `hf auth login`, or HF_TOKEN."
        ) from error
    return repo_id


def check_repo_id(repo_id: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise UserError(f"--push {repo_id}: expected NAME/MODEL: your account or organisation, and the repository.")
