"""What a run writes for its readers (tables, pages, the book): whether it is as written, and what it was made from.

Snakemake goes by times, and by its notes of the last run. A page that the disk cut short is a page to it, and a newer
one; a page whose run was killed is missed only where something newer lacks it; a result that was made again in a run
that was killed before the pages is old news to the next. So each generated file has a note of its own: the SHA-256 of
its content, and a fingerprint of what it was made from, taken before it was made. Before a run both are looked at
(`lthlib.book.verify`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from lthlib.core.store import ROOT, say, seal, sha256, unseal, write_atomically

FOLDER = Path("book/_generated")
CONTENTS, UNFINISHED = ("_toc.yml", "_toc.unfinished.yml")  # in it: the book's contents, those of one that lacks pages
HTML = Path("_build/html")
DOCTREES = Path("_build/.doctrees")  # Sphinx's own notes
NOTES = Path("_build/notes")
BOOK = Path("_build/book.json")
ASIDE = Path("_build/damaged")
OF_THE_BOOK = ("book", "_config.yml")
NOT_OF_THE_BOOK = ("results",)  # of the folder `book`: read by pages, not by the book


def fingerprint(files: Iterable[str | Path], *texts: str) -> str:
    """Return a hash of the contents of files, one that is missing told from an empty one, and of some texts."""
    parts = [f"{path} {_content(ROOT / path)}" for path in sorted(map(str, files))]
    return hashlib.sha256(json.dumps([parts, texts]).encode()).hexdigest()[:16]


def page_of(
    template: str | Path, parameters: Mapping[str, object], title: str | None, version: str, results: Iterable[str]
) -> str:
    """Return the fingerprint of a page: of its template, its parameters and title, code, and the results it shows."""
    return fingerprint([template, *results], json.dumps(dict(parameters), sort_keys=True), title or "", version)


def write(path: Path, content: str | bytes, of: str = "") -> None:
    """Write a file as `lthlib.core.store.write_atomically`; of one in the book's generated part, keep a note.

    Args:
        path: The file.
        content: All of it.
        of: `fingerprint` of what it is made from.
    """
    if path.resolve().is_relative_to(ROOT / FOLDER):
        content = content.encode() if isinstance(content, str) else content
        note = {"sha256": hashlib.sha256(content).hexdigest(), "of": of}
        write_atomically(_note(path), json.dumps(note))
    write_atomically(path, content)


def is_current(path: Path, of: str, *, look: bool = False) -> bool:
    """Say whether a generated file is there as it was written, and was made from this.

    One that is there but not as it was written is set aside, and that is said: somebody may have worked on it.

    Args:
        path: The file.
        of: `fingerprint` of what it would be made from now.
        look: Leave it where it is.
    """
    if not os.path.lexists(path):  # the run that was to make it again was killed, or somebody removed it
        return False
    try:
        note = json.loads(_note(path).read_bytes())
        known, made_of = note["sha256"], note["of"]
    except (OSError, ValueError, TypeError, KeyError):
        return False
    if _content(path) == known:
        return made_of == of
    if not look:
        aside = ROOT / ASIDE / f"{time.time_ns()}-{path.name}"
        aside.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, aside)
        say(f"damaged: {path}: it is not what was written; set aside in {aside} and made again")
    return False


def book_is_current(*, look: bool = False) -> bool:
    """Say whether the built book lacks no page, is as it was written, and was made from what there is now.

    Of one that is not as it was written this is said, and the word of it taken back: `begin_book` does the rest.
    """
    word, html = ROOT / BOOK, ROOT / HTML
    if not word.exists() or not html.exists():
        return False
    try:
        book = unseal(word)
        damaged = [html / name for name, digest in book["files"].items() if _content(html / name) != digest]
    except (OSError, ValueError):
        book, damaged = {}, [word]
    if damaged and not look:
        for path in damaged:
            say(f"damaged: {path}: it is not what was written; the book is built again")
        remove(word)
    return not damaged and book["finished"] and book["of"] == book_sources()


def book_sources() -> str:
    """Return a fingerprint of all that the book is built from: prose, pages, looks, settings."""
    found = []
    for name in OF_THE_BOOK:
        below = [ROOT / name, *(ROOT / name).rglob("*")]
        found += [p.relative_to(ROOT) for p in below if p.is_file() and not p.name.startswith(".")]
    skipped = tuple(Path("book", name) for name in NOT_OF_THE_BOOK)
    return fingerprint(p for p in found if not any(p.is_relative_to(folder) for folder in skipped))


def begin_book() -> str:
    """Make ready for a build, and return `book_sources`: Sphinx goes on from the last one, unless it was killed."""
    pages = [HTML / "_generated", HTML / "_sources/_generated"]  # of another grid, or marks of missing ones
    left = pages if (ROOT / BOOK).exists() else [HTML, DOCTREES]
    remove(ROOT / BOOK)
    for folder in left:
        shutil.rmtree(ROOT / folder, ignore_errors=True)
    return book_sources()


def note_book(of: str, finished: bool) -> None:
    """Note the files of the book that has just been built, what from, and whether it lacks no page."""
    html = ROOT / HTML
    files = {str(p.relative_to(html)): sha256(p) for p in sorted(html.rglob("*")) if p.is_file()}
    write_atomically(ROOT / BOOK, seal({"finished": finished, "of": of, "files": files}))


def remove(path: Path) -> None:
    """Remove a file, or a folder that has taken its place, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _note(path: Path) -> Path:
    return ROOT / NOTES / f"{path.resolve().relative_to(ROOT / FOLDER)}.json"


def _content(path: Path) -> str:
    """Return the SHA-256 of a file, empty where it is not there or is no file.

    Raises:
        OSError: It cannot be read; that says nothing about its content.
    """
    try:
        return sha256(path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return ""
