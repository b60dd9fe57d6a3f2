"""One file over HTTP: continued where it was cut off, checked before it takes its name, from the first good source.

A partial file is continued only where the same bytes are assured: by an If-Range validator (RFC 9110, 13.1.5) or by a
known hash at the end. Proxies come from the environment (HTTPS_PROXY, HTTP_PROXY, NO_PROXY).
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import requests
import urllib3

from src.core.assets.answers import (
    CutOff,
    Refused,
    WrongBytes,
    agree_on_size,
    check_whole,
    read_promise,
    refuse_status,
    size_in_range,
    start_of_body,
)
from src.core.assets.digests import file_digest
from src.core.assets.partial import Partial, Promise
from src.core.assets.table import Digest
from src.core.errors import UserError

log = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]  # (bytes on disk, bytes in all or None)

_BLOCK_BYTES = 2**20
_LONGEST_WAIT_S = 60.0
_UNREACHED_ATTEMPTS = 2  # where no server answers at all, waiting seldom helps and another source does


@dataclass(frozen=True)
class Source:
    """One place to get a file from. `token` goes to the host of `url` only, never to where that redirects."""

    url: str
    token: str | None = None


@dataclass(frozen=True)
class Patience:
    """`retries`: attempts in a row that bring nothing new before a source is given up; the wait doubles each time."""

    retries: int = 5
    backoff_s: float = 1.0
    timeout_s: float = 30.0


DEFAULT_PATIENCE = Patience()


@dataclass(frozen=True)
class Fetched:
    """A finished download; `checked` says in words what the file was compared with."""

    url: str
    size: int
    sha256: str
    checked: str


def fetch(
    sources: Sequence[Source],
    target: Path,
    digest: Digest | None,
    progress: Progress = lambda done, total: None,
    patience: Patience = DEFAULT_PATIENCE,
) -> Fetched:
    """Download `target` from the first of `sources` that serves the right bytes.

    The target appears whole and checked or not at all; an existing one is replaced. Raises UserError with every
    source's reason, and for a full disk or a place that can't be written.
    """
    reasons = []
    with Partial.open(target) as partial, requests.Session() as session:
        for source in sources:
            transfer = _Transfer(session, source, partial, digest, progress, patience)
            try:
                checked = transfer.complete()
            except Refused as error:
                log.warning("%s: %s", source.url, error)
                reasons.append(f"  {source.url}: {error}")
                continue
            fetched = Fetched(source.url, partial.size(), file_digest(partial.path, "sha256"), checked)
            partial.finish()
            return fetched
    raise UserError("\n".join([f"{target.name} could not be downloaded:", *reasons]))


@dataclass
class _Transfer:
    """One file from one source."""

    session: requests.Session
    source: Source
    partial: Partial
    digest: Digest | None
    progress: Progress
    patience: Patience

    def complete(self) -> str:
        """Attempts until the partial file is whole and right; returns what it was checked against."""
        failures, furthest = 0, self.partial.size()
        while True:
            continued = self.partial.size() > 0
            try:
                promise = self._attempt()
                self.partial.flush()
                return check_whole(self.partial.path, self.digest, promise)
            except CutOff as error:
                reached = self.partial.size()
                failures = 1 if reached > furthest else failures + 1
                furthest = max(furthest, reached)
                if failures > (self.patience.retries if error.reached else _UNREACHED_ATTEMPTS - 1):
                    raise Refused(f"{error} (given up: {failures} attempts in a row brought nothing new)") from error
                wait = min(max(self.patience.backoff_s * 2 ** (failures - 1), error.wait_s), _LONGEST_WAIT_S)
                log.info("%s: %s; trying again in %.1f s", self.source.url, error, wait)
                time.sleep(wait)
            except WrongBytes as error:
                self.partial.start_over()
                if not continued:
                    raise
                log.warning("%s: the continued file is wrong (%s); once more from the start", self.source.url, error)

    def _attempt(self) -> Promise:
        """One request; returns what was promised once all bytes are here."""
        url = self.source.url
        try:
            with self.session.get(
                url, headers=self._headers(), stream=True, timeout=self.patience.timeout_s
            ) as response:
                promise = read_promise(url, response)
                if response.status_code == 416 and self.partial.size():
                    return self._nothing_behind(response, promise)
                refuse_status(response)
                self._receive(response, promise)
                return promise
        except (
            requests.exceptions.InvalidURL,
            requests.exceptions.InvalidSchema,
            requests.exceptions.MissingSchema,
        ) as error:
            raise Refused(f"no valid address: {error}") from error
        except requests.TooManyRedirects as error:
            raise Refused("redirects in circles") from error
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise _network_trouble(error) from error

    def _headers(self) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity", "User-Agent": "rae-train-download/1"}
        if self.source.token:
            headers["Authorization"] = f"Bearer {self.source.token}"
        have, known = self.partial.size(), self.partial.promise()
        if have and known is not None and known.url == self.source.url and known.validator:
            headers |= {"Range": f"bytes={have}-", "If-Range": known.validator}
        elif have and (self.digest is not None or (known is not None and known.sha256)):
            headers["Range"] = f"bytes={have}-"  # other bytes would not pass the hash
        return headers

    def _receive(self, response: requests.Response, promise: Promise) -> None:
        start = start_of_body(response)
        if start not in (0, self.partial.size()):
            self.partial.start_over()
            raise CutOff(f"sent another part of the file than asked for ({response.headers.get('Content-Range')!r})")
        agree_on_size(response, promise, start)
        self.partial.cut(start)
        self.partial.remember(promise)
        self.partial.require_room(promise.total)
        done = start
        self.progress(done, promise.total)
        try:
            while block := response.raw.read1(_BLOCK_BYTES):
                self.partial.append(block)
                done += len(block)
                self.progress(done, promise.total)
        except urllib3.exceptions.ProtocolError as error:
            whole = "more" if promise.total is None else f"{promise.total:,}"
            raise CutOff(f"ended after {done:,} of {whole} bytes") from error
        if promise.total is not None and done != promise.total:
            raise CutOff(f"ended after {done:,} of {promise.total:,} bytes")

    def _nothing_behind(self, response: requests.Response, promise: Promise) -> Promise:
        """416: the file ends at or before our last byte. Either all of it is here, or what is here is of no use."""
        have, size, known = self.partial.size(), size_in_range(response), self.partial.promise()
        if size != have:
            self.partial.start_over()
            raise CutOff(
                f"has {size if size is not None else 'an unknown number of'} bytes; {have:,} were kept from before"
            )
        promise.sha256 = promise.sha256 or (known.sha256 if known else None)
        if self.digest is None and promise.sha256 is None and known is not None and known.total not in (None, have):
            self.partial.start_over()
            raise Refused(f"promised {known.total:,} bytes and has {have:,}; no published hash tells which is right")
        promise.total = have
        return promise


def _network_trouble(error: Exception) -> CutOff:
    text = str(error)
    if isinstance(error, requests.exceptions.ProxyError):
        return CutOff(f"the proxy does not answer ({text})", reached=False)
    if "NameResolution" in text or "resolve" in text:
        return CutOff(
            "the host's name can't be resolved: no connection, or a proxy to set (HTTPS_PROXY)", reached=False
        )
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return CutOff("no connection in time", reached=False)
    if isinstance(error, (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError)):
        return CutOff("no answer in time")
    refused = bool(error.args) and isinstance(error.args[0], urllib3.exceptions.MaxRetryError)
    return CutOff(f"the connection broke ({text})", reached=not refused)
