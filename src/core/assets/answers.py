"""What an HTTP answer says about a file: its size, its hash, where its body starts, and whether it is of any use."""

import re
import zipfile
from pathlib import Path

import requests

from src.core.assets.digests import compare
from src.core.assets.partial import Promise
from src.core.assets.table import Digest

_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}


class CutOff(Exception):
    """Worth another attempt at the same source, after `wait_s` where the server asked for that.

    `reached` tells whether a server answered at all.
    """

    def __init__(self, reason: str, wait_s: float = 0.0, reached: bool = True) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        self.reached = reached


class Refused(Exception):
    """This source won't do; another one may."""


class WrongBytes(Refused):
    """The file is whole and is not the right one."""


def read_promise(url: str, response: requests.Response) -> Promise:
    """Size and hash as the hub states them (before it redirects), and the validator of the final answer."""
    promise = Promise(url)
    for answer in (*response.history, response):
        stated = answer.headers.get("X-Linked-Etag", "").strip('W/"')
        if re.fullmatch(r"[0-9a-f]{64}", stated):
            promise.sha256 = stated
        if answer.headers.get("X-Linked-Size", "").isdigit():
            promise.total = int(answer.headers["X-Linked-Size"])
    etag = response.headers.get("ETag", "")
    promise.validator = etag if etag.startswith('"') else response.headers.get("Last-Modified")
    return promise


def refuse_status(response: requests.Response) -> None:
    """Return for a body that can be used; CutOff or Refused otherwise."""
    status = response.status_code
    if status in (200, 206):
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise Refused(f"sends the file re-encoded as {response.headers['Content-Encoding']}")
        return
    if status in _TRY_AGAIN:
        asked = response.headers.get("Retry-After", "")
        raise CutOff(f"HTTP {status}", wait_s=float(asked) if asked.isdigit() else 0.0)
    hint = " (gated or private: set HF_TOKEN)" if status in (401, 403) else ""
    raise Refused(f"HTTP {status} {response.reason or ''}".rstrip() + hint)


def start_of_body(response: requests.Response) -> int | None:
    """The byte that the body starts at: 0 where the server ignored the range, None where it can't be told."""
    if response.status_code == 200:
        return 0
    match = re.fullmatch(r"bytes (\d+)-\d+/(?:\d+|\*)", response.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def size_in_range(response: requests.Response) -> int | None:
    """The size of the whole file in `Content-Range: bytes 5-9/10` or `bytes */10`."""
    stated = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(stated) if stated.isdigit() else None


def agree_on_size(response: requests.Response, promise: Promise, start: int) -> None:
    """Fill in `promise.total`; two different statements are a lie that no download can mend."""
    ranged = size_in_range(response) if response.status_code == 206 else None
    length = response.headers.get("Content-Length", "")
    by_length = start + int(length) if length.isdigit() else None
    sizes = {size for size in (ranged, by_length, promise.total) if size is not None}
    if len(sizes) > 1:
        raise Refused(f"contradicts itself about the size: {' and '.join(f'{size:,}' for size in sorted(sizes))} bytes")
    promise.total = sizes.pop() if sizes else None


def check_whole(path: Path, published: Digest | None, promise: Promise) -> str:
    """What the whole file was checked against; WrongBytes where it is not what it should be."""
    expected = published or (Digest("sha256", promise.sha256) if promise.sha256 else None)
    if expected is not None:
        verdict = compare(path, expected)
        if not verdict.ok:
            raise WrongBytes(f"serves wrong bytes: {verdict.detail} ({path.stat().st_size:,} bytes)")
        return verdict.detail if published else f"{verdict.detail}, stated by the hub"
    with open(path, "rb") as file:
        head = file.read(24)
    if head.startswith(b"PK"):
        try:
            zipfile.ZipFile(path).close()  # the directory is at the end: a shortened file has none
        except zipfile.BadZipFile as error:
            raise WrongBytes(f"serves a damaged weights file: {error}") from error
    elif not head.startswith(b"\x80"):  # neither a zip nor a pickle: PyTorch writes nothing else
        raise WrongBytes(f"serves no weights file; it starts with {head!r}")
    return "its form only: no published hash"
