"""Download weights: files to their paths, encoders into the huggingface_hub cache. The only part that goes online.

HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and proxies (HTTPS_PROXY, HTTP_PROXY, NO_PROXY) work as in huggingface_hub.
"""

import errno
import io
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import distribution
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from src.core.errors import UserError
from src.core.files import file_digest, put_in_place, replacing, write_text
from src.core.folder_lock import lock
from src.core.json_files import read_json
from src.core.requirements import HUB, HUB_ID, Asset

RECORD = "SHA256SUMS"  # next to the files; in the format of `sha256sum -c SHA256SUMS`


class Refused(Exception):
    """Permanent failure: try the next source."""


class _Partial(io.FileIO):
    """A partial file. A server that ignores Range and keeps breaking off makes it restart, at most three times."""

    restarts = 0

    def truncate(self, size: int | None = None) -> int:
        self.restarts += 1
        if self.restarts > 3:
            raise Refused("the connection keeps breaking, and the server can't resume a download")
        return super().truncate(size)


def download(wanted: Iterable[Asset], mirrors: Sequence[str] = (), force: bool = False) -> Iterator[str]:
    """Download each asset that is not present (`force`: every one) and yield a line for each.

    Raises one UserError at the end for all that failed, with every source's reason and what to do by hand; immediately if the
    disk is full or not writable. A host that does not answer is not asked again.
    """
    failures, unreachable = [], set[str]()
    for asset in wanted:
        try:
            yield f"ready   {_obtain(asset, mirrors, force, unreachable)}"
        except Refused as error:
            failures.append(str(error))
            yield f"failed  {asset.path or asset.name}"
        except OSError as error:
            reason = "another process is downloading it" if error.errno == errno.EAGAIN else error.strerror
            raise UserError(
                f"{asset.path or constants.HF_HUB_CACHE}: {reason}. What was downloaded is kept. Fix that, or choose "
                f"another folder ({'--weights_dir' if asset.path else 'HF_HOME'})."
            ) from error
    if failures:
        raise UserError("\n".join([f"{len(failures)} could not be obtained.", *failures]))


def addresses(asset: Asset, mirrors: Sequence[str] = ()) -> list[str]:
    """Return the URLs to try for an asset: mirrors first, then its sources with HF_ENDPOINT in place of the hub.

    A mirror of files serves a source's path below its own address, or is a copy of the weights folder.
    """
    if asset.path is None:
        return [*mirrors, constants.ENDPOINT]
    paths = [*(source.split("/", 3)[3] for source in asset.sources), asset.place]
    mirrored = [f"{mirror}/{path}" for mirror in mirrors for path in dict.fromkeys(paths) if asset.sources]
    return mirrored + [source.replace(HUB, constants.ENDPOINT) for source in asset.sources]


def present(asset: Asset) -> list[Path]:
    """Return the file, or the files of a complete encoder in the hub's cache; empty if it is missing. Never goes online."""
    if asset.path is not None:
        return [asset.path] if asset.path.exists() else []
    folder = cached_encoder(asset.name)
    return _encoder_files(folder) if folder else []


def cached_encoder(repo_id: str) -> Path | None:
    """Return the folder of a complete encoder in the hub's cache; None if it is missing. Never goes online."""
    if not re.fullmatch(HUB_ID, repo_id):
        return None
    config = try_to_load_from_cache(repo_id, "config.json")
    return Path(config).parent if isinstance(config, str) and _encoder_files(Path(config).parent) else None


def why_unreachable(repo_id: str) -> str:
    """Ask the hub for a repository, once, with a timeout of 5 s; return why it is unavailable, or an empty string."""
    try:
        get_hf_file_metadata(hf_hub_url(repo_id, "config.json"), timeout=5)
    except Exception as error:  # several packages can raise here
        return f"{constants.ENDPOINT}: {' '.join(str(error).split())[:200] or type(error).__name__}"
    return ""


def check(path: Path, digest: str | None) -> tuple[bool | None, str]:
    """Return whether a file has the published hash, else the one recorded at download or by the hub's cache, and details.

    The verdict is None if there is no hash to compare with.
    """
    blob = path.resolve().name  # in the hub's cache, the sha256 of a large file or the git hash of a small one
    recorded = blob if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob) else _record(path.parent).get(path.name)
    if digest is None and recorded:
        digest = f"{'git' if len(recorded) == 40 else 'sha256'}:{recorded}"
    if digest is None:
        return None, "no published hash, and not downloaded by this script: nothing to compare with"
    algorithm, expected = digest.split(":")
    got = file_digest(path, algorithm)
    wrong = f"expected {digest}, got {got} ({path.stat().st_size:,} bytes)"
    return (True, digest) if got.startswith(expected) else (False, wrong)


def _obtain(asset: Asset, mirrors: Sequence[str], force: bool, unreachable: set[str]) -> str:
    path, here = asset.path, present(asset)
    known = path is None or asset.sources
    if here and not (force and known):
        right, detail = check(path, asset.digest) if path and known else (True, "")
        if right is False:
            raise Refused(f"{path} exists but is the wrong file: {detail}. Replace it with --force.")
        return f"{path or here[0].parent}: present {detail}"
    if path and asset.package:
        origin = Path(str(distribution(asset.package.split("/")[0]).locate_file(asset.package)))
        if origin.is_file() and check(origin, asset.digest)[0]:
            with replacing(path) as file:
                file.write(origin.read_bytes())
            return f"{path}: copied from {asset.package}, checked: {asset.digest}"
    reasons = []
    for address in addresses(asset, mirrors):
        host = urlsplit(address).netloc
        try:
            if host in unreachable:
                raise Refused("the host did not answer before")
            return _fetch(address, path, asset.digest) if path else _snapshot(asset.name, address)
        except Exception as error:  # huggingface_hub passes on errors of several packages
            if isinstance(error, OSError) and error.errno:  # a local error, such as a full disk
                raise
            if type(error).__module__.startswith("httpx"):
                unreachable.add(host)
            cause = error.__cause__ or error
            reasons.append(f"  {address}: {' '.join(str(cause).split()) or type(cause).__name__}")
    raise Refused("\n".join([f"{asset.name} could not be downloaded:", *reasons, _by_hand(asset)]))


def _by_hand(asset: Asset) -> str:
    """Return instructions for getting an asset onto this machine by hand."""
    if asset.path:
        source = f"get it from one of {', '.join(asset.sources)}" if asset.sources else asset.what
        return f"  By hand: {source}, and put it at\n    {asset.path}\n  ({asset.digest or 'no published hash'})"
    gated = f"  It is gated: accept its licence at {HUB}/{asset.name} and set HF_TOKEN=<read token>.\n"
    return (
        f"{gated if asset.gated else ''}  By hand: with a connection, `hf download {asset.name} --local-dir FOLDER`; copy "
        "FOLDER here and give its path instead of the id (model.encoder_config_path and model.encoder_params).\n"
        "  A mirror of the hub: HF_ENDPOINT=https://… (some also need HF_HUB_DISABLE_XET=1)."
    )


def _fetch(url: str, target: Path, digest: str | None) -> str:
    """Download a file from one URL; a partial download is continued if the hash is known."""
    token = None if url.startswith(f"{constants.ENDPOINT}/") else False  # other hosts never see HF_TOKEN
    size = 0
    try:  # one short request first: the download itself retries
        metadata = get_hf_file_metadata(url, token=token)
        size = metadata.size or 0
        if digest is None and metadata.commit_hash and re.fullmatch(r"[0-9a-f]{64}", metadata.etag or ""):  # from a hub
            digest = f"sha256:{metadata.etag}"
    except HfHubHTTPError:  # not every server answers HEAD
        pass
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    for keep in (digest is not None, False):  # the partial bytes may be of another file: retry once without them
        with io.BufferedRandom(_Partial(partial, "a+")) as file:
            lock(file)
            if not keep:
                file.truncate(0)
            kept = file.seek(0, os.SEEK_END)
            if size - kept > shutil.disk_usage(target.parent).free:
                raise OSError(errno.ENOSPC, f"no space left on device for {size - kept:,} bytes")
            try:
                http_get(url, file, resume_size=kept, headers=build_hf_headers(token=token))
            except HfHubHTTPError as error:
                if digest is None or error.response.status_code != 416:  # 416: it may be complete already
                    raise
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            head = file.read(16)
        if digest:
            right, detail = check(partial, digest)
        elif zipfile.is_zipfile(partial) or head.startswith(b"\x80"):  # PyTorch's zip, or its old pickle format
            right, detail = True, "only that it is a weights file, no published hash"
        else:
            right, detail = False, f"not a complete weights file; it starts with {head!r}"
        if right:
            put_in_place(partial, target)
            recorded = {**_record(target.parent), target.name: file_digest(target, "sha256")}
            write_text(target.parent / RECORD, "".join(f"{recorded[name]}  {name}\n" for name in sorted(recorded)))
            return f"{target}: {target.stat().st_size:,} bytes from {url}, checked: {detail}"
        if not kept:
            break
    partial.unlink()
    raise Refused(f"serves wrong bytes: {detail}")


def _record(folder: Path) -> dict[str, str]:
    """Return file name -> sha256 of the files downloaded into `folder`."""
    text = (folder / RECORD).read_text(encoding="utf-8") if (folder / RECORD).is_file() else ""
    return {name: digest for digest, name in re.findall(r"^(\w{64}) [ *](.+)$", text, re.MULTILINE)}


def _snapshot(repo_id: str, endpoint: str) -> str:
    """Download an encoder's configuration, preprocessing and weights into the hub's cache."""
    token = None if endpoint == constants.ENDPOINT else False
    siblings = HfApi(endpoint=endpoint, token=token).model_info(repo_id, timeout=10).siblings or []
    safe = any(sibling.rfilename.endswith(".safetensors") for sibling in siblings)
    weights = ["*.safetensors", "*.safetensors.index.json"] if safe else ["pytorch_model*.bin", "*.bin.index.json"]
    patterns = ["config.json", "preprocessor_config.json", *weights]
    folder = snapshot_download(repo_id, endpoint=endpoint, token=token, allow_patterns=patterns)
    if not _encoder_files(Path(folder)):
        raise Refused("holds no config.json with weights: not an encoder repository")
    return f"{repo_id}: {folder}"


def _encoder_files(folder: Path) -> list[Path]:
    """Return the files of an encoder; empty unless config and weights are complete (links into the cache may dangle)."""
    indexes = [read_json(path, weight_map=dict[str, str]) for path in folder.glob("*.index.json")]
    weights = {shard for index in indexes for shard in index["weight_map"].values()}
    weights |= {path.name for pattern in ("*.safetensors", "pytorch_model*.bin") for path in folder.glob(pattern)}
    complete = weights and all((folder / name).is_file() for name in ("config.json", *weights))
    return sorted(path for path in folder.iterdir() if path.is_file()) if complete else []
