"""How far training is from what the processor can do at most, and what several workers gain over one.

    python benchmarks/limits.py [--images 1536] [--repeats 3]

The limits are measured, not looked up: multiply-accumulates a second of large matrix products, and bytes a second of
copies that no cache holds, on all threads. Training a ResNet-20 takes three times the multiply-accumulates of its
forward pass (one for the outputs, two for the gradients), and moves each convolution's input and output at least as
often. Then: one training after the other on all threads, beside as many at once as there are cores, a thread each.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from ratios import tell_limit
from torch import nn
from training import RECIPE, network, ours

from lthlib.core import machine
from lthlib.data import Images
from lthlib.networks import macs

CORES = os.cpu_count() or 1
SIDE, FLOATS, PASSES = 2048, 1 << 26, 3


def best(run: Callable[[], object], repeats: int) -> float:
    """Return the least seconds of some runs, after one that warms up."""
    run()
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
    return min(took)


def peak_macs(precision: torch.dtype, repeats: int) -> float:
    """Return multiply-accumulates a second of a product of two square matrices."""
    a, b = (torch.randn(SIDE, SIDE).to(precision) for _ in range(2))
    return SIDE**3 / best(lambda: a @ b, repeats)


def bandwidth(repeats: int) -> float:
    """Return bytes a second that a copy reads and writes."""
    source, target = torch.zeros(FLOATS), torch.empty(FLOATS)
    return 2 * 4 * FLOATS / best(lambda: target.copy_(source), repeats)


def moved(model: nn.Module, width: int) -> int:
    """Return the bytes that the convolutions of one forward pass of an image read and write, weights left out."""
    counts = []
    hooks = [
        layer.register_forward_hook(lambda _, given, made: counts.append(given[0].numel() + made.numel()))
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    for hook in hooks:
        hook.remove()
    return width * sum(counts)


def epoch(n: int) -> None:
    """Train for one epoch on noise, with masks."""
    pixels = torch.randint(256, (n, 32, 32, 3), dtype=torch.uint8)
    ours(network(), Images(pixels, torch.randint(10, (n,))), RECIPE, masked=True)()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 1536), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(CORES)
    precision = machine.resolve_precision("auto")
    one = best(lambda: epoch(options.images), options.repeats)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(CORES, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        many = best(lambda: list(pool.map(epoch, [options.images] * CORES)), options.repeats)
    tell_limit(
        "ResNet-20 at 32 x 32 pixels",
        images=options.images / one,
        beside=CORES * options.images / many,
        multiply=peak_macs(precision, options.repeats) / PASSES / sum(macs(network(), (3, 32, 32)).values()),
        memory=bandwidth(options.repeats) / PASSES / moved(network(), precision.itemsize),
    )


if __name__ == "__main__":
    main()
