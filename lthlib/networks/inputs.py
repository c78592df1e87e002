"""Pixels as networks take them; a file of its own, so that what trains does not depend on what predicts."""

from torch import Tensor


def as_input(pixels: Tensor) -> Tensor:
    """Turn uint8 (N, H, W, C) into float [0, 1] (N, C, H, W) in channels_last layout, without a copy of the layout."""
    return pixels.permute(0, 3, 1, 2).float().div_(255)
