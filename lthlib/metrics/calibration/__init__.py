"""The metrics of calibration."""
