"""Can you win everything with a lottery ticket? The library behind the book.

The rooms, in the order in which they may import one another:
data -> models -> masks, pruners -> train -> tickets -> predictions -> metrics -> evaluate -> verdict -> figures.
"""

__version__ = "0.1.0"
