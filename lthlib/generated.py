"""What a run writes for its readers, and whether it still is what was written: tables, pages, the built book.

Snakemake goes by times: a page that the disk cut short is a page to it, and a newer one; one that is missing matters
only where something newer lacks it. So the SHA-256 of every generated file is kept, and looked at before a run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path

from lthlib.store import ROOT, say, seal, sha256, unseal, write_atomically

FOLDER = Path("book/_generated")
HTML = Path("_build/html")
DOCTREES = Path("_build/.doctrees")  # Sphinx's own notes
NOTES = Path("_build/sha256")
BOOK = Path("_build/book.json")
ASIDE = Path("_build/damaged")


def write(path: Path, content: str | bytes) -> None:
    """Write a file as `lthlib.store.write_atomically`; of one in the book's generated part, note its SHA-256."""
    if path.resolve().is_relative_to(ROOT / FOLDER):
        content = content.encode() if isinstance(content, str) else content
        write_atomically(_note(path), hashlib.sha256(content).hexdigest())
    write_atomically(path, content)


def check() -> None:
    """Set generated files aside that are not what was written, and say so; have a book built that lacks something.

    The workflow makes again what is absent.
    """
    whole = [_check(note) for note in sorted(p for p in (ROOT / NOTES).rglob("*") if p.is_file())]
    if not all([*whole, _book_is_whole()]):  # every one is looked at, and named
        remove(ROOT / HTML / "index.html")


def note_book(finished: bool) -> None:
    """Note the files of the book that has just been built, and whether it lacks no page."""
    html = ROOT / HTML
    files = {str(p.relative_to(html)): sha256(p) for p in sorted(html.rglob("*")) if p.is_file()}
    write_atomically(ROOT / BOOK, seal({"finished": finished, "files": files}))


def begin_book() -> None:
    """Make ready for a build: Sphinx goes on from the last one, for which what a killed one left is not fit."""
    pages = [HTML / "_generated", HTML / "_sources/_generated"]  # of another grid, or marks of missing ones
    left = pages if (ROOT / BOOK).exists() else [HTML, DOCTREES]
    remove(ROOT / BOOK)
    for folder in left:
        shutil.rmtree(ROOT / folder, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file, or a folder that has taken its place, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _note(path: Path) -> Path:
    return ROOT / NOTES / path.resolve().relative_to(ROOT / FOLDER)


def _check(note: Path) -> bool:
    path = ROOT / FOLDER / note.relative_to(ROOT / NOTES)
    if _is(path, note.read_text(errors="replace")):
        return True
    if os.path.lexists(path):  # else the run that was to make it again was killed, or somebody removed it
        aside = ROOT / ASIDE / f"{time.time_ns()}-{path.name}"  # somebody may have worked on it
        aside.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, aside)
        say(f"damaged: {path}: it is not what was written; set aside in {aside} and made again")
    note.unlink()
    return False


def _book_is_whole() -> bool:
    """Say whether the book is finished and undamaged; of one that is not, the word is taken back."""
    word, html = ROOT / BOOK, ROOT / HTML
    if not word.exists():
        return False
    try:
        book = unseal(word)
        damaged = [html / name for name, digest in book["files"].items() if not _is(html / name, digest)]
    except (OSError, ValueError):
        damaged = [word]
    if not damaged:
        return book["finished"]
    if html.exists():
        for path in damaged:
            say(f"damaged: {path}: it is not what was written; the book is built again")
    remove(word)
    return False


def _is(path: Path, digest: str) -> bool:
    try:
        return sha256(path) == digest
    except OSError:
        return False
