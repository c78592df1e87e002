"""Jupyter Book, tied to the run that started it (`lthlib.book.lifeline`).

With ``--unfinished`` in front, the book lacks pages, and the next run builds it again.
"""

import sys

from jupyter_book.cli.main import main

from lthlib.book import generated, lifeline

if __name__ == "__main__":
    lifeline.watch()
    finished = sys.argv[1] != "--unfinished"
    if not finished:
        del sys.argv[1]
    of = generated.begin_book()
    try:
        main()
    except SystemExit as end:
        if not end.code:
            generated.note_book(of, finished)
        sys.exit(end.code)
