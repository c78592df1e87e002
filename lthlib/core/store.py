"""The store: folders that are either whole or absent, made once however many processes ask.

Every result that costs time (tickets, logits, decoded images, evaluations) is an *artifact*: a folder under the
store's root, named by its key. A maker writes the folder under a temporary name; the store adds a manifest with the
key, and size and SHA-256 of each file, and renames it into place. Whatever a reader finds under the key is therefore
finished, and is checked against its manifest before use: damage is set aside, said, and made again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout

from lthlib.core.errors import UserError

MANIFEST = "manifest.json"
ROOT = Path(__file__).resolve().parents[2]  # the checkout
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


def seal(content: Mapping[str, object]) -> str:
    """Return a mapping as JSON that carries its own SHA-256, so that `unseal` sees any damage."""
    return json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n"


def unseal(path: Path) -> dict[str, object]:
    """Read what `seal` returned; ValueError where the file is not what was written."""
    try:
        content = json.loads(path.read_bytes())
        whole = content.pop("sha256") == _digest(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path.name} is not what was written")
    return content


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_files(folder: Path, files: Mapping[str, Sequence]) -> None:
    """Raise ValueError where a file of a folder differs from the size and SHA-256 that a manifest tells of it."""
    for name, (size, digest) in files.items():
        if (folder / name).stat().st_size != size or sha256(folder / name) != digest:
            raise ValueError(f"{name} is not what was written")


def why(error: OSError) -> str | None:
    """Return what stands in the way of a file, and what to do about it, as a clause; None where that is not known."""
    where = f" ({error.filename})" if error.filename else ""
    reasons = {
        errno.ENOSPC: "no space is left on its disk; free some",
        errno.EDQUOT: "the disk quota is used up; free some space",
        errno.EFBIG: "a file would be larger than this account or its disk allows",
        errno.EIO: f"its disk fails{where}",
        errno.EROFS: "it is read-only",
        errno.EACCES: f"permission is denied{where}",
        errno.EPERM: f"permission is denied{where}",
        errno.EEXIST: f"a file is where a folder should be{where}",
        errno.ENOTDIR: f"a file is where a folder should be{where}",
    }
    if error.errno is None and "requested and" in str(error):  # how numpy tells that it could not write all
        return reasons[errno.ENOSPC]
    return reasons.get(error.errno or 0)


def say(message: str) -> None:
    """Tell the person something that is not a result (standard error, one line)."""
    print(message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def locked(file: Path, waiting: str) -> Iterator[None]:
    """Hold a lock, saying so where it has to be waited for. The system frees it with its holder, however that ends."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(waiting)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


class Store:
    """A root folder of artifacts; by default ``$LTHLIB_STORE``, else ``store`` in the checkout."""

    def __init__(self, root: str | Path | None = None):
        self.root = Path(root or os.environ.get("LTHLIB_STORE") or ROOT / "store")
        self._checked: dict[str, str] = {}  # key -> version already verified by this process

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r})"

    def path(self, key: str) -> Path:
        """Return the folder of a key, which may not exist; a key that could leave the store is refused."""
        if not _KEY.fullmatch(key):
            raise UserError(f"{key!r} cannot name a folder of the store: use letters, digits and . _ + - / only.")
        return self.root / key

    def has(self, key: str, version: str) -> bool:
        """Say whether a whole artifact of this version lies under the key (damage counts as absence)."""
        with self._guard():
            if self._checked.get(key) == version and self._version(key) == version:
                return True  # another process, on other code, may have replaced it since
            return self._fault(key, version) is None

    def get(self, key: str, version: str, make: Callable[[Path], None]) -> Path:
        """Return the folder of an artifact, making it first where it is absent, outdated or damaged.

        Args:
            key: The folder's name below the root.
            version: Identifies code and inputs; an artifact of another version is made again.
            make: Writes the artifact's files into the empty folder it is given.
        """
        path = self.path(key)
        if not self.has(key, version):
            with self._guard(), self._lock(key):
                fault = self._fault(key, version)  # another process may have finished it while we waited
                if fault is not None:
                    self._clear(key, fault)
                    self._make(key, version, make)
        self._checked[key] = version
        return path

    def list(self) -> Iterator[str]:
        """Yield the key of every artifact, whole or not; files that something else left between them are none."""
        for folder, below, files in os.walk(self.root):
            parts = Path(folder).relative_to(self.root).parts
            if not parts:
                below[:] = sorted(set(below) - {"tmp", "damaged", "locks"})
            elif MANIFEST in files or (len(parts) > 1 and files and not any(Path(folder).rglob(f"*/{MANIFEST}"))):
                below.clear()
                yield "/".join(parts)

    def lost(self, keys: Iterable[str]) -> set[str]:
        """Verify artifacts of whatever version; return the keys that are not there whole, the damaged set aside."""
        keys = [*keys]
        with self._guard():
            with ThreadPoolExecutor() as threads:  # hashing lets others run
                faults = dict(zip(keys, threads.map(self._fault, keys), strict=True))
            faulty = {key for key, fault in faults.items() if fault is not None}
            for key in faulty:
                with self._lock(key):
                    fault = self._fault(key)  # another process may have mended it while we waited
                    if fault is not None:
                        self._clear(key, fault)
        return faulty

    def drop(self, key: str) -> None:
        """Remove an artifact, so that whoever asks for it next makes it again; one that is absent stays so."""
        with self._guard(), self._lock(key):
            if self.path(key).exists():
                self._clear(key, "outdated")

    def _version(self, key: str) -> object:
        """Return the version that lies under a key; None where that cannot be read."""
        try:
            return unseal(self.path(key) / MANIFEST)["version"]
        except (OSError, ValueError, KeyError):
            return None

    def _fault(self, key: str, version: str | None = None) -> str | None:
        """Return None for a whole artifact (of a version), "absent", "outdated", or a sentence about the damage."""
        path = self.path(key)
        if not os.path.lexists(path):
            return "absent"
        try:
            manifest = unseal(path / MANIFEST)
            if manifest.get("key", key) != key:  # manifests written before there was a key in them lack it
                return f"what lies there is {manifest['key']}"
            check_files(path, manifest["files"])
            strange = {p.relative_to(path).as_posix() for p in path.rglob("[!.]*") if not p.is_dir()}
            if strange := strange - {MANIFEST, *manifest["files"]}:
                return f"{min(strange)} does not belong there"
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing"
        except ValueError as error:
            return str(error)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EISDIR, errno.ENOTDIR, errno.ELOOP):
                raise
            return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
        return None if version in (None, manifest["version"]) else "outdated"

    def _clear(self, key: str, fault: str) -> None:
        """Take away what lies under a key: set it aside where it is damaged, remove it where it is outdated."""
        if fault == "absent":
            return
        path, name = self.path(key), key.replace("/", "--")
        if fault == "outdated":  # moved first: half of it would pass for damage, were we killed
            aside = self.root / "tmp" / name
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside = self.root / "damaged" / f"{name}-{time.time_ns()}"
            say(f"damaged: {path}: {fault}; set aside in {aside} and made again")
        aside.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, aside)
        if fault == "outdated":
            shutil.rmtree(aside)

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
            write_atomically(temporary / MANIFEST, seal({"key": key, "version": version, "files": files}))
            path = self.path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _lock(self, key: str) -> contextlib.AbstractContextManager[None]:
        file = self.root / "locks" / f"{key.replace('/', '--')}.lock"
        return locked(file, f"waiting: {key} is being made by another process")

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = why(error)
            if reason is None:
                raise
            raise UserError(
                f"The store {self.root} cannot be used: {reason}. Nothing was half-written. LTHLIB_STORE names "
                "another place."
            ) from error
