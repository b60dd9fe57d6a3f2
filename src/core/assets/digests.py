"""Hashes of files: against a published digest, against the record kept at download, and of the hub's cache."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from src.core.assets.table import Digest
from src.core.files import write_text

RECORD = "SHA256SUMS"  # beside the files, in the format of coreutils: `sha256sum -c SHA256SUMS` reads it too
_BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Verdict:
    """`ok` is None where there was nothing to compare with; `detail` says what was compared."""

    ok: bool | None
    detail: str


def file_digest(path: Path, algorithm: str) -> str:
    """Lower-case hex digest of a file, read in blocks."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def compare(path: Path, expected: Digest) -> Verdict:
    """The file against a whole or abbreviated digest."""
    got = file_digest(path, expected.algorithm)
    if got.startswith(expected.hex.lower()):
        return Verdict(True, str(expected))
    return Verdict(False, f"expected {expected}, got {expected.algorithm} {got}")


def verify(path: Path, published: Digest | None) -> Verdict:
    """A present file against its published digest, else against the sha256 recorded when it was downloaded."""
    if published is not None:
        return compare(path, published)
    recorded = read_record(path.parent).get(path.name)
    if recorded is None:
        return Verdict(None, "no published hash, and it was not downloaded by this program: nothing to compare with")
    verdict = compare(path, Digest("sha256", recorded))
    return Verdict(verdict.ok, f"{verdict.detail} (recorded at download)")


def read_record(folder: Path) -> dict[str, str]:
    """File name -> sha256 of the record in `folder`; empty where there is none."""
    try:
        lines = (folder / RECORD).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    matches = (re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line) for line in lines)
    return {match[2]: match[1] for match in matches if match}


def record(path: Path, sha256: str) -> None:
    """Note the sha256 of a downloaded file in the record beside it."""
    known = read_record(path.parent) | {path.name: sha256}
    lines = [f"{digest}  {name}\n" for name, digest in sorted(known.items())]
    write_text(path.parent / RECORD, "".join(lines))


def verify_blob(path: Path) -> Verdict:
    """A file of huggingface_hub's cache: its blob is named by sha256 (large files) or by git's sha1 (small ones)."""
    blob = path.resolve()
    name = blob.name
    if re.fullmatch(r"[0-9a-f]{64}", name):
        return compare(blob, Digest("sha256", name))
    if re.fullmatch(r"[0-9a-f]{40}", name):
        data = blob.read_bytes()
        got = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        return Verdict(got == name, f"git {name}" if got == name else f"expected git {name}, got {got}")
    return Verdict(None, "the cache holds no hash of it (no symbolic links on this file system, or a local folder)")
