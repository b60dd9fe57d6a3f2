"""Bring one needed thing onto this machine: from where it already is, an installed package, a mirror or its origin."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from src.core.assets.digests import compare, record, verify
from src.core.assets.download import DEFAULT_PATIENCE, Patience, Progress, Source, fetch
from src.core.assets.hub import fetch_repository
from src.core.assets.needs import Need
from src.core.assets.partial import Partial
from src.core.assets.table import FileAsset, RepoAsset
from src.core.errors import UserError

_HUB = "https://huggingface.co"


def obtain(
    need: Need, mirrors: Sequence[str], force: bool, progress: Progress, patience: Patience = DEFAULT_PATIENCE
) -> str:
    """Make sure that `need` is met and say how, in one line. UserError names what to do by hand."""
    asset, place = need.asset, need.place
    if isinstance(asset, RepoAsset):
        return f"{asset.name}: {fetch_repository(asset, [_base(mirror) for mirror in mirrors], force)}"
    if not isinstance(asset, FileAsset) or place is None:
        if place is None or not place.exists():
            raise UserError(
                f"{need.key} names {place}, which does not exist and has no known source: bring it yourself."
            )
        return f"{place}: present"
    if place.is_file() and not force:
        verdict = verify(place, asset.digest)
        if verdict.ok is False:
            raise UserError(f"{place} is there but is the wrong file: {verdict.detail}. Replace it with --force.")
        return f"{place}: present; {verdict.detail}"
    if _copied_from_package(asset, place):
        return f"{place}: copied from an installed package; checked: {asset.digest}"
    try:
        fetched = fetch(sources(asset, mirrors), place, asset.digest, progress, patience)
    except UserError as error:
        raise UserError(f"{error}\n{by_hand(asset, place)}") from error
    record(place, fetched.sha256)
    return f"{place}: {fetched.size:,} bytes from {fetched.url}; checked: {fetched.checked}"


def sources(asset: FileAsset, mirrors: Sequence[str]) -> list[Source]:
    """The mirrors first (the origin's path behind their address, then a copy of the weights folder), then the origins.

    The hub is asked at HF_ENDPOINT with the user's token, and not at all under HF_HUB_OFFLINE; mirrors get no token.
    """
    from huggingface_hub import constants, get_token

    addresses = [_address(text) for text in asset.sources]
    paths = list(dict.fromkeys([*map(_path_of, addresses), f"/{asset.place}"]))
    found = [Source(_base(mirror) + path) for mirror in mirrors for path in paths]
    endpoint = os.environ.get("HF_ENDPOINT", _HUB).rstrip("/")
    for address in addresses:
        if not address.startswith(f"{_HUB}/"):
            found.append(Source(address))
        elif not constants.HF_HUB_OFFLINE:
            found.append(Source(endpoint + _path_of(address), get_token()))
    return found


def by_hand(asset: FileAsset, place: Path) -> str:
    """How a person gets the file to its place."""
    addresses = "\n".join(f"    {_address(text)}" for text in asset.sources)
    check = f"its hash: {asset.digest}; --check compares it" if asset.digest else "no published hash"
    return f"By hand: get the file from one of\n{addresses}\n  and put it at\n    {place}\n  ({check})"


def hash_text(asset: FileAsset) -> str:
    """The known hash, in words."""
    if asset.digest:
        return str(asset.digest)
    return "no published hash" + ("; the hub states one at download" if asset.sources[0].startswith("hf://") else "")


def _address(text: str) -> str:
    if not text.startswith("hf://"):
        return text
    owner, repo, path = text.removeprefix("hf://").split("/", 2)
    return f"{_HUB}/{owner}/{repo}/resolve/main/{path}"


def _path_of(url: str) -> str:
    parts = urlsplit(url)
    return parts.path + (f"?{parts.query}" if parts.query else "")


def _base(mirror: str) -> str:
    if not mirror.startswith(("http://", "https://")):
        raise UserError(f"--mirror {mirror}: give an address such as https://mirror.example/weights")
    return mirror.rstrip("/")


def _copied_from_package(asset: FileAsset, place: Path) -> bool:
    """Take the file from an installed package (found without importing it) where its hash is the published one."""
    if asset.package is None or asset.digest is None:
        return False
    package, inside = asset.package
    spec = find_spec(package)
    origin = Path(spec.origin).parent / inside if spec and spec.origin else None
    if origin is None or not origin.is_file() or not compare(origin, asset.digest).ok:
        return False
    with Partial.open(place) as partial:
        partial.start_over()
        partial.append(origin.read_bytes())
        partial.finish()
    return True
