"""Logits of many images: batches that fit a processor's cache, several of them at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from lthlib.core import machine
from lthlib.data import Pixels
from lthlib.networks.checks import check_rows
from lthlib.networks.fast import inference_copy, runs_in_parallel
from lthlib.networks.inputs import as_input

BATCH = {"cpu": 64, "cuda": 500}  # float32 images of up to 64 pixels; on a CPU larger batches fall out of the cache
LANES = 8  # batches at a time at most on a CPU, whose activations are in memory together


def for_inference(model: nn.Module, pixels: Pixels, precision: str = "auto") -> nn.Module:
    """Return an `inference_copy` on this machine's device, for pixels (N, H, W, C) of which some are given.

    ``precision`` is "float32", "bfloat16" or "auto".
    """
    return inference_copy(model, as_input(pixels[:4]), machine.resolve_precision(precision)).to(machine.device())


def scaled_to(size: tuple[int, int], count: int) -> int:
    """Return how many images of a size take the memory of ``count`` images of 64 x 64 pixels; at most ``count``."""
    return max(1, count * 64**2 // max(64**2, size[0] * size[1]))


def predict(model: nn.Module, pixels: Pixels, *, batch: int | None = None) -> Tensor:
    """Compute logits of uint8 pixels (N, H, W, C), a tensor or read on demand: float32 (N, classes) on the CPU.

    On a CPU each thread takes batches of its own: threads that share every layer wait for one another after each. The
    model is as `for_inference` returns it, which decides the precision; networks that may keep something on themselves
    get one batch at a time. ``batch`` is by default what suits the device, the precision and the size of the images.
    """
    first = next(model.parameters())
    in_lanes = first.device.type == "cpu" and runs_in_parallel(model)
    lanes = min(torch.get_num_threads(), LANES) if in_lanes else 1
    halved = any(parameter.itemsize == 2 for parameter in model.parameters())  # weights, hence activations
    most = scaled_to(pixels.shape[1:3], BATCH[first.device.type] * (2 if halved else 1))
    batch = batch or max(1, min(most, -(-len(pixels) // lanes)))

    @torch.inference_mode()
    def infer(part: Tensor) -> Tensor:
        return check_rows(model(as_input(part.to(first.device))), len(part)).cpu()

    found = _in_lanes(infer, pixels.split(batch), min(lanes, -(-len(pixels) // batch)))
    return torch.cat(list(found))


def _in_lanes(function: Callable, parts: Iterable[Tensor], lanes: int) -> Iterator[Tensor]:
    """Yield a function's results in order, computed in lanes that share out PyTorch's threads between them."""
    if lanes <= 1:
        yield from map(function, parts)
        return
    threads, pending = torch.get_num_threads(), deque()
    share = (max(1, threads // lanes),)  # PyTorch counts threads for each thread that calls it
    try:
        with ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=share) as pool:
            for part in parts:
                pending.append(pool.submit(function, part))
                if len(pending) > lanes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    finally:
        torch.set_num_threads(threads)  # for threads that start later too
