"""Can you win everything with a lottery ticket? The library behind the book.

The rooms, in the order in which they may import one another:
core -> data, networks -> pruning -> training -> tickets -> metrics -> results -> figures -> book
"""

__version__ = "0.1.0"
