"""An exported folder to the Hugging Face hub, with errors that say what to do."""

import re
from pathlib import Path

from src.core.errors import UserError


def push(folder: Path, repo_id: str, private: bool) -> str:
    """Upload all files of `folder` as one commit of the model repository, made when missing; returns its address.

    Raises:
        UserError: no token, no permission, no connection.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message=f"Export {folder.name}")
    except (OSError, ValueError) as error:
        status, first = getattr(getattr(error, "response", None), "status_code", None), str(error).splitlines()[0]
        if isinstance(error, LocalTokenNotFoundError) or status == 401:
            reason = "no valid token. Log in with `hf auth login`, or set HF_TOKEN to a token with write permission."
        elif status == 403:
            reason = "the token may not write there (HTTP 403). Use a token with write permission, or a name of your own account."
        elif isinstance(error, HfHubHTTPError):
            reason = f"the hub answered {first}. The export itself is in {folder}; push again later."
        else:  # no connection, offline mode
            reason = f"the hub can't be reached ({first}). The export itself is in {folder}."
        raise UserError(f"--push {repo_id}: {reason}") from error
    return repo_id


def check_repo_id(repo_id: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise UserError(f"--push {repo_id}: expected NAME/MODEL, your account or organisation and the repository.")
