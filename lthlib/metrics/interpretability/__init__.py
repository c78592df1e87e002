"""The metrics of interpretability."""
