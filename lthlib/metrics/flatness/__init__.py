"""The metrics of flatness."""
