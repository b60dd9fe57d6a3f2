"""An exported folder to the Hugging Face hub, with errors that say what to do."""

import re
from pathlib import Path
from typing import Any

from src.core.errors import UserError


def push(folder: Path, repo_id: str, private: bool, api: Any | None = None) -> str:
    """Upload all files of `folder` as one commit of the model repository, made when missing; returns its address.

    Args:
        api: stands in for `huggingface_hub.HfApi()`.

    Raises:
        UserError: a name that is none, no token, no permission, no connection.
    """
    check_repo_id(repo_id)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = api or HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message=f"Export {folder.name}")
    except LocalTokenNotFoundError as error:
        raise UserError(_no_token(repo_id)) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 401:
            raise UserError(_no_token(repo_id)) from error
        if status == 403:
            raise UserError(
                f"--push {repo_id}: the token may not write there (HTTP 403). Use a token with write permission, "
                "or a name of your own account."
            ) from error
        raise UserError(
            f"--push {repo_id}: the hub answered {str(error).splitlines()[0]}. The export itself is in {folder}; "
            "push again later."
        ) from error
    except (OSError, ValueError) as error:  # no connection, offline mode
        raise UserError(
            f"--push {repo_id}: the hub can't be reached ({str(error).splitlines()[0]}). The export itself is in "
            f"{folder}."
        ) from error
    return f"{repo_id}"


def check_repo_id(repo_id: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise UserError(f"--push {repo_id}: expected NAME/MODEL, your account or organisation and the repository.")


def _no_token(repo_id: str) -> str:
    return f"--push {repo_id}: no valid token. Log in with `hf auth login`, or set HF_TOKEN to a token with write permission."
