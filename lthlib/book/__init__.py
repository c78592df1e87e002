"""From a grid to a book: its pages, how they are made, and its front."""
