"""The metrics of generalization."""
