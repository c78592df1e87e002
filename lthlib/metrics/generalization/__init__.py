"""The metrics of generalization, in the order in which the book has them."""

from lthlib.metrics.generalization import accuracy, ood, corruption, attacks  # isort: skip

__all__ = ["accuracy", "attacks", "corruption", "ood"]
