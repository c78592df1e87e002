"""What flatness costs, as ratios measured in one run. Usage: python benchmarks/flatness.py [--threads 2]

ResNet-20 on 32 x 32 pixels, 10 classes, trained for some epochs (on an untrained network the largest eigenvalue stands
so far out that power iteration finds it at once); a few minutes in all:

* the exact weight-Hessian trace against one probe of Hutchinson's estimator as PyHessian does it (a product
  of the Hessian with a vector, from one graph of the gradient), and peak memory in a process of its own;
* the exact input trace and top eigenvalue against the published estimators run to their own stopping rules;
* the top eigenvalue by Lanczos against power iteration to PyHessian's tolerance, from several starts on several
  networks, dense and pruned, on MNIST-5k and, where LTHLIB_DATA holds it, on CIFAR-10; the error of both against
  Lanczos from another start to 1e-9 (all in float32: float64 has another Hessian where a ReLU is within rounding of 0,
  and rounding alone moves an eigenvalue by some 1e-6 of itself);
* the growth of the exact trace with the number of images and of classes.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from ratios import tell, tell_growth
from torch import Tensor, nn

from lthlib import data, networks
from lthlib.core.store import Store
from lthlib.data import Images
from lthlib.metrics.flatness.exact import hessian_trace, input_hessian_trace
from lthlib.metrics.flatness.frozen import Frozen
from lthlib.metrics.flatness.spectrum import Extremes, WeightHessian, top_eigenvalue
from lthlib.pruning import masks
from lthlib.training.loop import as_input, train
from lthlib.training.recipe import Recipe

Problem = tuple[nn.Module, Tensor, Tensor]

TOLERANCE, MOST = 1e-3, 100  # PyHessian's defaults


def interleaved(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the shortest of ``repeats`` runs of each, in turns, so that a busy moment hits all alike."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def network(classes: int = 10, **moments: list[float]) -> nn.Module:
    moments = moments or {"mean": [0.5] * 3, "std": [0.25] * 3}
    return networks.build("resnet20s", in_channels=3, num_classes=classes, image_size=32, **moments)


def untrained(n: int, classes: int = 10) -> Problem:
    """What has the cost of a real problem, if not its numbers."""
    images = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return network(classes).eval(), images, torch.arange(n) % classes


@functools.cache
def trained(n: int, epochs: int, name: str = "mnist5k", kept: float = 1.0) -> Problem:
    """Train on a data set's first 5,000 images, grey ones enlarged to 32 x 32 pixels; return n of its training images.

    Where less than all is kept, the smallest weights are removed half-way.
    """
    images = data.load(name, Store(), None if name == "mnist5k" else 5000)
    pixels = images.train.pixels
    if name == "mnist5k":
        pixels = F.pad(pixels, (0, 0, 2, 2, 2, 2)).expand(-1, -1, -1, 3)
    as_fractions = pixels.double() / 255
    model = network(mean=[float(as_fractions.mean())] * 3, std=[float(as_fractions.std())] * 3)
    start, found = time.perf_counter(), None
    if kept < 1:
        train(model, Images(pixels, images.train.labels), Recipe(epochs=epochs // 2), seed=0)
        weights = {layer: weight.detach().abs() for layer, weight in masks.prunable(model).items()}
        found = masks.keep_top(weights, int(kept * sum(weight.numel() for weight in weights.values())))
    _, history = train(model, Images(pixels, images.train.labels), Recipe(epochs=epochs), seed=0, masks=found)
    print(
        f"{name}, {kept:.0%} of the weights: trained on {len(pixels)} images for {epochs} epochs in "
        f"{time.perf_counter() - start:.0f} s: loss {history[-1]['loss']:.3f}, accuracy {history[-1]['accuracy']:.1%}"
    )
    model.eval().to(memory_format=torch.contiguous_format).requires_grad_()
    which = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:n]
    model.zero_grad()
    return model, as_input(pixels[which]).contiguous(), images.train.labels[which]


class Graph:
    """The published way: one graph of the gradient, products by differentiating it again."""

    def __init__(self, loss: Tensor, leaves: list[Tensor], masks: list[Tensor] | None = None):
        self.leaves, self.masks = leaves, masks
        self.gradient = torch.autograd.grad(loss, leaves, create_graph=True)
        self.products = 0

    def product(self, vectors: list[Tensor]) -> tuple[Tensor, ...]:
        self.products += 1
        found = torch.autograd.grad(self.gradient, self.leaves, vectors, retain_graph=True)
        return found if self.masks is None else tuple(x * m for x, m in zip(found, self.masks, strict=True))

    def probe(self, generator: torch.Generator) -> float:
        signs = [torch.randint(0, 2, w.shape, generator=generator) * 2.0 - 1 for w in self.leaves]
        return float(sum((v * hv).sum() for v, hv in zip(signs, self.product(signs), strict=True)))

    def trace(self, generator: torch.Generator) -> float:
        """Average probes until the mean moves by less than the tolerance."""
        probes: list[float] = []
        mean = 0.0
        for _ in range(MOST):
            probes.append(self.probe(generator))
            before, mean = mean, sum(probes) / len(probes)
            if abs(mean - before) / (abs(before) + 1e-6) < TOLERANCE:
                break
        return mean

    def power_iteration(self, generator: torch.Generator) -> float:
        """Multiply until the Rayleigh quotient moves by less than the tolerance; PyHessian returns the last but one."""
        v = [torch.randn(w.shape, generator=generator) for w in self.leaves]
        v = v if self.masks is None else [x * m for x, m in zip(v, self.masks, strict=True)]
        value = None
        for _ in range(MOST):
            length = sum((x**2).sum() for x in v).sqrt()
            v = [x / length for x in v]
            image = self.product(v)
            before, value = value, float(sum((a * b).sum() for a, b in zip(v, image, strict=True)))
            if before is not None and abs(value - before) / (abs(before) + 1e-6) < TOLERANCE:
                return before
            v = list(image)
        return value


def weight_graph(model: nn.Module, images: Tensor, labels: Tensor, found: dict[str, Tensor] | None = None) -> Graph:
    """Make the graph; with masks its products are those of M H M, which PyHessian does not offer."""
    kept = found and [found.get(name, torch.ones_like(w)) for name, w in model.named_parameters()]
    return Graph(F.cross_entropy(model(images), labels), list(model.parameters()), kept)


def input_graph(model: nn.Module, images: Tensor, labels: Tensor) -> Graph:
    pixels = images.clone().requires_grad_()
    return Graph(F.cross_entropy(model(pixels), labels), [pixels])


def weight_trace(args: argparse.Namespace) -> None:
    model, images, labels = trained(args.images, args.epochs)
    graph, generator = weight_graph(model, images, labels), torch.Generator().manual_seed(0)
    exact = hessian_trace(model, images, labels).total
    probes = torch.tensor([graph.probe(generator) for _ in range(args.probes)])
    cost = interleaved(
        {"probe": lambda: graph.probe(generator), "exact": lambda: hessian_trace(model, images, labels)}, args.repeats
    )
    ratio = cost["exact"] / cost["probe"]
    print(f"weight trace {exact:.3f}: exact in {cost['exact']:.2f} s = {ratio:.2f} probes of {cost['probe']:.2f} s")
    tell(
        "trace of the weight Hessian, exact", "100 probes of PyHessian's estimator", cost["exact"], 100 * cost["probe"]
    )
    spread = float(probes.std()) / exact
    print(f"  one probe errs by {spread:.0%} (sd), 100 probes by {spread / 10:.1%} at {100 / ratio:.0f}x the cost")


def input_traces(args: argparse.Namespace) -> None:
    model, images, labels = trained(args.images, args.epochs)
    exact = input_hessian_trace(model, images, labels)
    trace, top = float(exact.trace.mean()), exact.legacy_batch_eigenvalue
    generator, found = torch.Generator().manual_seed(0), {}

    def published() -> None:
        graph = input_graph(model, images, labels)
        found["trace"] = graph.trace(generator)
        found["trace products"], graph.products = graph.products, 0
        found["top"], found["top products"] = graph.power_iteration(generator), graph.products

    cost = interleaved(
        {"published": published, "exact": lambda: input_hessian_trace(model, images, labels)}, args.repeats
    )
    tell(
        "trace and top eigenvalue of the input Hessian, exact",
        "the paper's estimators",
        cost["exact"],
        cost["published"],
    )
    errors = found["trace"] / trace - 1, found["top"] / top - 1
    print(
        f"input trace {trace:.4f}, top {top:.5f}: exact in {cost['exact']:.2f} s, published "
        f"{cost['published'] / cost['exact']:.1f}x that ({found['trace products']} + {found['top products']} "
        f"products, errors {errors[0]:+.1%}, {errors[1]:+.2%})"
    )


def eigenvalue(args: argparse.Namespace) -> None:
    names = ["mnist5k", *(["cifar10-jpeg"] if os.environ.get("LTHLIB_DATA") else [])]
    seconds, gains = {"lanczos": [], "power": []}, []
    for name, kept in [(name, kept) for name in names for kept in (1.0, 0.2)]:
        model, images, labels = trained(args.images, args.epochs, name, kept)
        found = None
        if kept < 1:
            found = {layer: weight.detach() != 0 for layer, weight in masks.prunable(model).items()}
        cases = _eigenvalue_cases(args, (model, images, labels), found)
        for cost, gain in cases:
            gains.append(gain)
            for way, took in cost.items():
                seconds[way].append(took)
    speeds = [power / lanczos for lanczos, power in zip(*seconds.values(), strict=True)]
    tell(
        "top eigenvalue of the weight Hessian by Lanczos", "PyHessian's power iteration", *map(_mean, seconds.values())
    )
    print(
        f"Lanczos is {_spread(speeds)} times as fast as power iteration, at an error {_spread(gains)} times as small "
        f"(geometric mean, smallest to largest of {len(speeds)})"
    )


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _spread(ratios: list[float]) -> str:
    return f"{_mean(ratios):.3g} ({min(ratios):.3g} to {max(ratios):.3g})"


def lanczos_from(problem: Problem, found: dict[str, Tensor] | None, **options: float) -> Extremes:
    hessian = WeightHessian(Frozen(*problem, found))
    return top_eigenvalue(hessian, near=hessian.gradient(), **options)


def _eigenvalue_cases(
    args: argparse.Namespace, problem: Problem, found: dict[str, Tensor] | None
) -> list[tuple[dict[str, float], float]]:
    """Return, for each start, the seconds of both ways, and how much smaller the error of Lanczos is."""
    reference = lanczos_from(problem, found, tolerance=1e-9, seed=99)
    print(f"  top eigenvalue {reference.top:.4f}")
    cases = []
    for seed in range(args.starts):
        outcome = {}

        def power(seed: int = seed, outcome: dict = outcome) -> None:
            graph = weight_graph(*problem, found)
            value = graph.power_iteration(torch.Generator().manual_seed(seed))
            outcome["power"] = value, graph.products

        def lanczos(seed: int = seed, outcome: dict = outcome) -> None:
            ends = lanczos_from(problem, found, seed=seed)
            outcome["lanczos"] = ends.top, ends.products

        cost = interleaved({"power": power, "lanczos": lanczos}, args.repeats)
        errors = {way: abs(value / reference.top - 1) for way, (value, _) in outcome.items()}
        cases.append((cost, errors["power"] / max(errors["lanczos"], 1e-9)))
        print(
            f"  start {seed}: Lanczos {outcome['lanczos'][1]} products, {cost['lanczos']:.2f} s, error "
            f"{errors['lanczos']:.1e}; power iteration {outcome['power'][1]} products, {cost['power']:.2f} s, "
            f"error {errors['power']:.1e}"
        )
    return cases


def growth(args: argparse.Namespace) -> None:
    for classes in (5, 10, 20):
        model, images, labels = untrained(args.images, classes)
        runs = {
            str(n): partial(hessian_trace, model, images[:n], labels[:n])
            for n in (args.images // 4, args.images // 2, args.images)
        }
        cost = interleaved(runs, args.repeats)
        unit = {n: f"{1e3 * s / int(n) / (classes - 1):.2f}" for n, s in cost.items()}
        print(f"growth, {classes} classes: ms per image and vector-Jacobian product, by images: {unit}")
        tell_growth(f"trace of the weight Hessian, {classes} classes", "images", {int(n): s for n, s in cost.items()})


def memory(args: argparse.Namespace) -> None:
    out = subprocess.run(
        [sys.executable, __file__, "--only", "peak", "--threads", str(args.threads), "--images", str(args.images)],
        capture_output=True,
        text=True,
        check=True,
    )
    print(out.stdout.strip())


def high_water() -> float:
    """Return this program's peak resident memory in GB; ru_maxrss would begin at that of the parent."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20


def peak(args: argparse.Namespace) -> None:
    model, images, labels = untrained(args.images)
    model(images[:1])
    before = high_water()
    hessian_trace(model, images, labels)
    print(f"peak memory of the exact weight trace: {high_water():.2f} GB, {before:.2f} GB of it before")


PARTS = {part.__name__: part for part in (weight_trace, memory, input_traces, eigenvalue, growth)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--probes", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--only", choices=[*PARTS, "peak"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for part in [{**PARTS, "peak": peak}[args.only]] if args.only else PARTS.values():
        part(args)


if __name__ == "__main__":
    main()
