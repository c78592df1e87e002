"""Jupyter Book, tied to the run that started it (`lthlib.lifeline`)."""

from jupyter_book.cli.main import main

from lthlib import lifeline

if __name__ == "__main__":
    lifeline.watch()
    main()
