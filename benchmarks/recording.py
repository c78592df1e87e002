"""What the scripts behind the chapter on reproducibility share: survey, print a table, record it if asked to."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from lthlib.core.store import seal, write_atomically


def main(
    about: str, survey: Callable[[Path], Mapping[str, object]], table: Callable[[Mapping], str], record: Path
) -> None:
    """Survey in a temporary folder and print the table; with ``--record``, keep what was found for the book.

    Args:
        about: What the script does, in a line.
        survey: From an empty folder to what was found.
        table: From that to Markdown.
        record: Where it is kept.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--record", action="store_true", help=f"put it into {record.name}, for the book")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix=f"{record.stem}-") as folder:
        found = survey(Path(folder).resolve())
    print(table(found))
    if options.record:
        write_atomically(record, seal(found))
