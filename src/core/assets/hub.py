"""Encoder repositories of the Hugging Face hub, through huggingface_hub: its cache, its proxies, HF_ENDPOINT, HF_TOKEN.

Only what an encoder needs is fetched: configuration, preprocessing statistics, weights.
"""

import errno
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from src.core.assets.table import RepoAsset
from src.core.errors import UserError

log = logging.getLogger(__name__)

_CONFIGS = ("config.json", "preprocessor_config.json")
_SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")
_PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json")  # for repositories without safetensors


def cached(repo_id: str) -> Path | None:
    """The folder of a completely cached encoder, or None. Never goes online."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo_id, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return folder if _complete(folder) else None


def files_of(folder: Path) -> list[Path]:
    """The files of a cached encoder in a fixed order."""
    return sorted(path for path in folder.iterdir() if path.is_file())


def fetch_repository(asset: RepoAsset, mirrors: Sequence[str] = (), force: bool = False) -> Path:
    """The folder of the encoder in huggingface_hub's cache, downloaded unless it is whole there already.

    `mirrors` are tried before the hub (or HF_ENDPOINT) and never see the HF_TOKEN; huggingface_hub itself resumes and
    repeats. `force` asks the hub for a newer revision. Raises UserError with each reason and with what to do by hand.
    """
    from huggingface_hub import constants

    folder = cached(asset.repo_id)
    if folder is not None and not (force and not constants.HF_HUB_OFFLINE):
        return folder
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{asset.repo_id}: HF_HUB_OFFLINE is set and the cache does not hold it.\n{by_hand(asset)}")
    reasons = []
    for endpoint in (*mirrors, None):
        try:
            return _snapshot(asset.repo_id, endpoint)
        except Exception as error:  # the boundary to a library whose errors come from four packages
            reasons.append(f"  {endpoint or constants.ENDPOINT}: {_explain(error)}")
            log.warning("%s from%s", asset.repo_id, reasons[-1])
    raise UserError("\n".join([f"{asset.repo_id} could not be downloaded:", *reasons, by_hand(asset)]))


def by_hand(asset: RepoAsset) -> str:
    """How a person gets the repository onto this machine."""
    gated = (
        f"It is gated: log in, accept its licence at https://huggingface.co/{asset.repo_id}, make a read token at "
        "https://huggingface.co/settings/tokens, and set HF_TOKEN=<token> (or run `hf auth login`).\n"
        if asset.gated
        else ""
    )
    return (
        f"{gated}By hand: on a machine with a connection run `hf download {asset.repo_id} --local-dir FOLDER`, copy "
        "FOLDER here, and give its path instead of the id (model.encoder_config_path and model.encoder_params).\n"
        "Where the hub can't be reached, HF_ENDPOINT=https://… names a mirror (some also need HF_HUB_DISABLE_XET=1)."
    )


def _snapshot(repo_id: str, endpoint: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    token = False if endpoint else None  # None: HF_TOKEN or the stored login; a mirror gets neither
    siblings = HfApi(endpoint=endpoint, token=token).model_info(repo_id, timeout=30).siblings or []
    names = [sibling.rfilename for sibling in siblings]
    weights = _SAFETENSORS if any(name.endswith(".safetensors") for name in names) else _PICKLED
    folder = Path(snapshot_download(repo_id, endpoint=endpoint, token=token, allow_patterns=[*_CONFIGS, *weights]))
    if not _complete(folder):
        raise UserError(f"{repo_id} holds no config.json with weights; it is no encoder repository")
    return folder


def _complete(folder: Path) -> bool:
    """Whether config and weights are there, every shard of an index included (links into the cache may dangle)."""
    if not (folder / "config.json").is_file():
        return False
    for index in (*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not all((folder / shard).is_file() for shard in shards):
            return False
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return bool(weights) and all(path.is_file() for path in weights)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explain(error: Exception) -> str:
    """The reason for people; troubles with this machine's own disk are UserErrors at once."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"The disk of the cache is full: {cause}. Free space, or set HF_HOME to another place."
            ) from error
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"The cache can't be written: {cause}. Set HF_HOME to a place that you may write."
            ) from error
        if isinstance(cause, GatedRepoError):
            return "gated, and no token with access was given (HF_TOKEN)"
        if isinstance(cause, (RepositoryNotFoundError, HFValidationError)):
            return "no such repository there, or it is private and no token with access was given (HF_TOKEN)"
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            return f"HTTP {cause.response.status_code}"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
