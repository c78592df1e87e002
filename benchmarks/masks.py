"""What finding a mask costs, as ratios measured in one run. Usage: python benchmarks/masks.py [--threads 2]

* SNIP and GraSP against the bare forward and backward passes that their definitions need;
* SynFlow's 100 rounds against one forward-backward pass of one image in its precision (float64) and in float32;
* how far SynFlow's masks at 99 % move with the counts of its rounds: the published ones, of the nominal density,
  rounded up, beside those of the density that the last count makes, rounded to the nearest;
* 20 rounds of exact selection from 15 million scores: seconds a round, and bytes of extra memory per weight in a
  process of its own, beside torch's global pruning (concatenate, top-k).
"""

from __future__ import annotations

import argparse
import copy
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from ratios import tell
from torch import nn
from torch.nn.utils import prune

from lthlib import networks
from lthlib.pruning import METHODS, Moment, masks

ROUND = 10  # 89.3 %
N_SCORES, N_LAYERS = 15_000_000, 12


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the shortest of ``repeats`` runs."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def interleaved(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the shortest of ``repeats`` runs of each, in turns, so that a busy moment hits all alike."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            best[name] = min(best[name], seconds(run, 1))
    return best


def batch(n: int | None = None, per_class: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 10 if n is not None else torch.arange(10).repeat_interleave(per_class)
    return torch.rand(len(labels), 3, 32, 32, generator=generator), labels


def finder(name: str, model: nn.Module) -> Callable[[], object]:
    """Make a run of one method from a copy that is made beforehand, as its caller does."""
    dense = masks.dense(model)
    n_keep = masks.kept(masks.n_kept(dense), ROUND)
    copies = iter([copy.deepcopy(model) for _ in range(8)])
    options = METHODS[name].options
    return lambda: METHODS[name].run(Moment(next(copies), dense, n_keep, ROUND, 0, batch, options))


def gradient_pass(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()


def double_pass(model: nn.Module, x: torch.Tensor, y: torch.Tensor, g: list[torch.Tensor]) -> None:
    weights = list(masks.prunable(model).values())
    slopes = torch.autograd.grad(F.cross_entropy(model(x), y), weights, create_graph=True)
    torch.autograd.grad(sum((a * b).sum() for a, b in zip(g, slopes, strict=True)), weights)


def grasp_passes(model: nn.Module) -> None:
    """Two half-batches forward and backward for g, and again with the double backward pass for Hg."""
    x, y = batch(per_class=10)
    g = [torch.ones_like(w) for w in masks.prunable(model).values()]
    for half in (slice(0, 50), slice(50, 100)):
        gradient_pass(model, x[half], y[half])
        double_pass(model, x[half], y[half], g)


def image_pass(model: nn.Module) -> None:
    model.zero_grad()
    weight = next(model.parameters())
    model(torch.ones(1, 3, 32, 32, dtype=weight.dtype)).sum().backward()


def finding(arch: str, repeats: int) -> None:
    model = networks.build(arch, in_channels=3, num_classes=10, image_size=32, mean=[0.5] * 3, std=[0.25] * 3)
    train, single, double = (copy.deepcopy(model), copy.deepcopy(model).eval(), copy.deepcopy(model).eval().double())
    x, y = batch(128)
    for name, bare in (("snip", lambda: gradient_pass(train, x, y)), ("grasp", lambda: grasp_passes(train))):
        took = interleaved({"method": finder(name, model), "passes": bare}, repeats)
        ratio = took["method"] / took["passes"]
        print(f"{arch:9} {name:8} {took['method']:7.2f} s = {ratio:.2f} x the passes it needs")
    method, passes64, passes32 = finder("synflow", model), [], []
    passes64.append(seconds(lambda: image_pass(double), 5))
    passes32.append(seconds(lambda: image_pass(single), 5))
    took = seconds(method, 1)
    passes64.append(seconds(lambda: image_pass(double), 5))
    passes32.append(seconds(lambda: image_pass(single), 5))
    print(
        f"{arch:9} synflow  {took:7.2f} s = {took / min(passes64):.0f} float64 passes of one image, "
        f"{took / min(passes32):.0f} float32 passes"
    )


def draw_scores() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"l{i}": torch.rand(N_SCORES // N_LAYERS, generator=generator) for i in range(N_LAYERS)}


def select_by_keep_top(scores: dict[str, torch.Tensor]) -> None:
    found = None
    for round in range(1, 21):
        found = masks.keep_top(scores, masks.kept(N_SCORES, round), within=found)


def select_by_torch(scores: dict[str, torch.Tensor]) -> None:
    """Twenty rounds of `global_unstructured`, the paper's own primitive."""
    layers = []
    for score in scores.values():
        layer = nn.Linear(1, 1, bias=False)
        layer.weight = nn.Parameter(score.view(1, -1), requires_grad=False)
        layers.append((layer, "weight"))
    for _ in range(20):
        prune.global_unstructured(layers, prune.L1Unstructured, amount=0.2)


SELECTIONS = {"keep_top": select_by_keep_top, "torch": select_by_torch}


def one_selection(name: str) -> None:
    """Print seconds a round and the growth of the peak memory in bytes per score; run in a fresh process."""
    scores = draw_scores()
    masks.keep_top({"warm": torch.rand(10)}, 5)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    SELECTIONS[name](scores)
    took = (time.perf_counter() - start) / 20
    unit = 1 if sys.platform == "darwin" else 1024
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit / N_SCORES
    print(f"selection {name:8} {took:7.3f} s a round, {extra:.1f} bytes of extra memory per weight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, choices=range(1, 9))
    parser.add_argument("--arch", nargs="*", default=["resnet18", "vgg16-bn"])
    parser.add_argument("--selection", choices=SELECTIONS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.selection:
        one_selection(given.selection)
        return
    rounds = {}
    for name in SELECTIONS:
        command = [sys.executable, __file__, "--threads", str(given.threads), "--selection", name]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(said, end="")
        rounds[name] = float(said.split()[2])
    what = "a round of exact selection from 15 million scores"
    tell(what, "torch.nn.utils.prune.global_unstructured", *rounds.values())
    for arch in given.arch:
        finding(arch, given.repeats)


if __name__ == "__main__":
    main()
