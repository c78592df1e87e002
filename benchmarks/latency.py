"""How long sparse networks really take: ResNet-18 at CIFAR size, forward passes in float32 on the processor.

    python benchmarks/latency.py [--batches 1 64] [--threads 1 2] [--repeats 30] [--record]

The dense network, an unstructured mask (one-shot magnitude) that removes 90 %, channels removed down to as many weights
and down to as many multiply-accumulates as that mask keeps, and the small dense network. All run in turns, so that a
busy moment hits all alike; the median is reported. A mask leaves the arrays as large as they were, and a dense kernel
multiplies by its zeros: expect no gain from it. `--record` writes the table to book/results/latency.json, where the
book finds it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence

import torch
from torch import nn

from lthlib import networks
from lthlib.core import machine
from lthlib.core.store import ROOT, seal, write_atomically
from lthlib.networks.predict import for_inference
from lthlib.pruning import METHODS, Moment, masks
from lthlib.pruning.structured import shrink
from lthlib.results.recorded import LATENCY

ROUND = 10  # 89.3 %
SHAPE = (3, 32, 32)
TITLE = "ResNet-18, images of 32 x 32 pixels, 10 classes, 90 % sparsity"


def compared() -> dict[str, tuple[nn.Module, masks.Masks]]:
    """Return the networks by name, with their masks; what they answer is of no consequence to their speed."""
    dense = networks.build("resnet18", in_channels=3, num_classes=10, image_size=32, mean=[0.5] * 3, std=[0.25] * 3)
    full = masks.dense(dense)
    n_keep = masks.kept(masks.n_kept(full), ROUND)

    def found(name: str):
        moment = Moment(dense, full, n_keep, ROUND, 0, lambda: None, METHODS[name].options)
        return METHODS[name].run(moment)

    masked = networks.rebuild(dense, {})
    mask = found("omp").masks
    masks.apply_(masked, mask)
    return {
        "dense": (dense, {}),
        "unstructured mask": (masked, mask),
        "channels removed, equal parameters": (shrink(dense, found("filter-l1").kept_channels), {}),
        "channels removed, equal MACs": (shrink(dense, found("filter-l1-macs").kept_channels), {}),
        "small dense": (networks.rebuild(dense, found("small-dense").channels), {}),
    }


def medians(runs: dict[str, nn.Module], images: torch.Tensor, repeats: int) -> dict[str, float]:
    """Return the median milliseconds of a forward pass by name, measured in turns after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for i in range(repeats + 3):
            for name, network in runs.items():
                began = time.perf_counter()
                network(images)
                if i >= 3:
                    times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(batches: Sequence[int], threads: Sequence[int], repeats: int) -> list[dict[str, object]]:
    """Return one row for each network, batch and number of threads."""
    made = compared()
    facts = {
        name: {
            "network": name,
            "parameters": sum(p.numel() for p in network.parameters()) - sum(int((~m).sum()) for m in mask.values()),
            "macs": round(masks.sparse_macs(network, SHAPE, mask)),
            "macs_dense_kernel": sum(networks.macs(network, SHAPE).values()),
        }
        for name, (network, mask) in made.items()
    }
    pixels = torch.randint(256, (4, *SHAPE[1:], SHAPE[0])).to(torch.uint8)
    runs = {name: for_inference(network, pixels, "float32") for name, (network, _) in made.items()}
    rows = []
    for n in threads:
        torch.set_num_threads(n)
        for batch in batches:
            images = torch.rand(batch, *SHAPE).to(memory_format=torch.channels_last)
            for name, value in medians(runs, images, repeats).items():
                rows.append({**facts[name], "batch": batch, "threads": n, "milliseconds": value})
    return rows


def report(rows: Sequence[dict]) -> None:
    """Print milliseconds and the ratio to the dense network."""
    dense = {(r["batch"], r["threads"]): r["milliseconds"] for r in rows if r["network"] == "dense"}
    for r in rows:
        ratio = r["milliseconds"] / dense[r["batch"], r["threads"]]
        where = f"batch {r['batch']:3}, {r['threads']} threads  {r['network']:<36}"
        size = f"{r['parameters'] / 1e6:6.2f} M parameters  {r['macs'] / 1e6:7.1f} M MACs"
        print(f"{where} {r['milliseconds']:9.2f} ms  {ratio:5.2f} of dense  {size}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--record", action="store_true", help="write the table to book/results")
    options = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # this is about the processor
    rows = measure(options.batches, options.threads, options.repeats)
    report(rows)
    if options.record:
        made = {k: v for k, v in machine.provenance("float32").items() if k != "threads"}
        content = {"title": TITLE, "repeats": options.repeats, "provenance": made, "rows": rows}
        write_atomically(LATENCY, seal(content))
        print(f"recorded in {LATENCY.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
