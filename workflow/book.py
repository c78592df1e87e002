"""Jupyter Book, tied to the run that started it (`lthlib.lifeline`).

Sphinx goes on from what it finds of the last build. What a killed build left is not fit for that and is removed first.
"""

import shutil
import sys
from pathlib import Path

from jupyter_book.cli.main import main

from lthlib import lifeline

WHOLE = Path("_build/book-is-whole")

if __name__ == "__main__":
    lifeline.watch()
    if not WHOLE.exists():
        for left in ("html", ".doctrees"):
            shutil.rmtree(Path("_build", left), ignore_errors=True)
    WHOLE.unlink(missing_ok=True)
    try:
        main()
    except SystemExit as end:
        if not end.code:
            WHOLE.touch()
        sys.exit(end.code)
