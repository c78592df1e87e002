"""The store: folders that are either whole or absent, made once however many processes ask.

Every result that costs time (tickets, logits, decoded images, evaluations) is an *artifact*: a folder under the
store's root, named by its key. A maker writes the folder under a temporary name; the store adds a manifest with the
size and SHA-256 of each file, and renames it into place. Whatever a reader finds under the key is therefore finished,
and is checked against its manifest before use: damage is set aside, said, and made again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lthlib.errors import UserError

MANIFEST = "manifest.json"
ROOT = Path(__file__).resolve().parent.parent  # the checkout
_KEY = re.compile(r"[a-z0-9][A-Za-z0-9._+-]*(/[A-Za-z0-9][A-Za-z0-9._+-]*)*")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def say(message: str) -> None:
    """Tell the person something that is not a result (standard error, one line)."""
    print(message, file=sys.stderr, flush=True)


class Store:
    """A root folder of artifacts.

    Args:
        root: The folder; by default ``$LTHLIB_STORE``, else ``store`` in the checkout.
    """

    def __init__(self, root: str | Path | None = None):
        self.root = Path(root or os.environ.get("LTHLIB_STORE") or ROOT / "store")
        self._checked: dict[str, str] = {}  # key -> version already verified by this process

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    def path(self, key: str) -> Path:
        """Return the folder of a key, which may not exist; a key that could leave the store is refused."""
        if not _KEY.fullmatch(key):
            raise UserError(
                f"{key!r} cannot name a folder of the store: use letters, digits and . _ + - / only."
            )
        return self.root / key

    def has(self, key: str, version: str) -> bool:
        """Say whether a whole artifact of this version lies under the key (damage counts as absence)."""
        return self._checked.get(key) == version or self._fault(key, version) is None

    def get(self, key: str, version: str, make: Callable[[Path], None]) -> Path:
        """Return the folder of an artifact, making it first where it is absent, outdated or damaged.

        Args:
            key: The folder's name below the root.
            version: Identifies code and inputs; an artifact of another version is made again.
            make: Writes the artifact's files into the empty folder it is given.

        Returns:
            The folder, whole and verified.

        Raises:
            UserError: Where the store cannot be written (no space, no permission, read-only).
        """
        path = self.path(key)
        if self.has(key, version):
            self._checked[key] = version
            return path
        with self._guard(), self._lock(key):
            fault = self._fault(key, version)  # another process may have finished it while we waited
            if fault is not None:
                self._clear(key, fault)
                self._make(key, version, make)
        self._checked[key] = version
        return path

    def _fault(self, key: str, version: str) -> str | None:
        """Return None for a whole artifact, "absent", "outdated", or a sentence about the damage."""
        path = self.path(key)
        if not path.exists():
            return "absent"
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            found, files = manifest["version"], manifest["files"]
            for name, (size, digest) in files.items():
                file = path / name
                if file.stat().st_size != size or sha256(file) != digest:
                    return f"{name} is not what was written"
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing"
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{MANIFEST} cannot be read"
        return None if found == version else "outdated"

    def _clear(self, key: str, fault: str) -> None:
        path = self.path(key)
        if fault == "absent":
            return
        if fault == "outdated":
            shutil.rmtree(path)
            return
        aside = self.root / "damaged" / f"{key.replace('/', '--')}-{time.time_ns()}"
        aside.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, aside)
        say(f"damaged: {path}: {fault}; set aside in {aside} and made again")

    def _make(self, key: str, version: str, make: Callable[[Path], None]) -> None:
        temporary = self.root / "tmp" / key.replace("/", "--")
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed holder of this lock left
        temporary.mkdir(parents=True)
        try:
            make(temporary)
            files = {}
            for file in sorted(p for p in temporary.rglob("*") if p.is_file()):
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
                files[file.relative_to(temporary).as_posix()] = [file.stat().st_size, sha256(file)]
            write_atomically(temporary / MANIFEST, json.dumps({"version": version, "files": files}, indent=1))
            path = self.path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @contextlib.contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        """Hold the key's lock. The system frees it with the process, however that ends: no lock goes stale."""
        file = self.root / "locks" / f"{key.replace('/', '--')}.lock"
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                handle.seek(0)
                say(f"waiting: {key} is being made by process {handle.read().strip() or '?'}")
                fcntl.flock(handle, fcntl.LOCK_EX)
            handle.seek(0)
            handle.truncate()
            handle.write(str(os.getpid()))
            handle.flush()
            yield

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = {
                errno.ENOSPC: "no space is left on its disk: free some",
                errno.EDQUOT: "the disk quota is used up: free some space",
                errno.EROFS: "it is read-only: choose another place with LTHLIB_STORE",
                errno.EACCES: "it may not be written: check its permissions or choose another with LTHLIB_STORE",
                errno.EPERM: "it may not be written: check its permissions or choose another with LTHLIB_STORE",
            }.get(error.errno or 0)
            if reason is None:
                raise
            raise UserError(
                f"The store {self.root} cannot take a new result: {reason}. Nothing was half-written."
            ) from error
