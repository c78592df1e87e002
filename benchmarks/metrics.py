"""Metrics of stored logits: time and numbers beside torchmetrics and beside the published evaluation's way.

    OMP_NUM_THREADS=1 python benchmarks/metrics.py [--images 10000] [--sets 75] [--classes 10] [--repeats 5]

The load is every corruption at every severity: `--sets` sets of `--images` logits. "The published way" does
what the paper's code does: a float32 softmax, digitize, one pass over all images per bin, log of the softmax.
Its ECE has 14 bins and its NLL may be infinite, so its numbers stand beside the times. Times are for one
core, the best of the repetitions. Ratios above 1: we are faster.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from ratios import tell
from torchmetrics.functional.classification import multiclass_calibration_error

from lthlib.metrics import bootstrap_intervals, computed, ece, msp_score, nll, roc_auc, softmax


def over_and_underconfident(sets: int, images: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits (sets, images, classes) whose labels are drawn at another temperature in each set."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(sets, images, classes)).astype(np.float32) * 2
    noise = rng.gumbel(size=logits.shape).astype(np.float32)
    temperature = np.linspace(0.5, 3, sets, dtype=np.float32)[:, None, None]
    return logits, (logits / temperature + noise).argmax(axis=2)


def published(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, ECE and NLL of one set as the published evaluation computes them."""
    probs = torch.softmax(torch.from_numpy(logits), dim=1)
    p = probs.numpy()
    hits = (p.argmax(axis=1) == labels).astype(np.float32)
    confidence = p.max(axis=1)
    bins = np.digitize(confidence, np.linspace(0, 1, 15), right=True)
    gaps = [np.abs((hits[bins == b] - confidence[bins == b]).sum()) for b in range(15)]
    loss = torch.nn.functional.nll_loss(probs.log(), torch.from_numpy(labels))
    return {"accuracy": hits.mean(), "ece": sum(gaps) / len(labels), "nll": float(loss)}


def published_with_sce(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`published` with the SCE it lacks, in the same style: a pass over all images per class and bin."""
    numbers, p = published(logits, labels), torch.softmax(torch.from_numpy(logits), dim=1).numpy()
    total = 0.0
    for c in range(p.shape[1]):
        bins = np.digitize(p[:, c], np.linspace(0, 1, 16), right=True)
        residual = (labels == c) - p[:, c]
        total += sum(np.abs(residual[bins == b].sum()) for b in range(16))
    return numbers | {"sce": total / p.size}


def with_torchmetrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """ECE and NLL of one set by torchmetrics and torch."""
    z, y = torch.from_numpy(logits), torch.from_numpy(labels)
    error = multiclass_calibration_error(z, y, logits.shape[1], n_bins=15)
    return {"ece": float(error), "nll": float(torch.nn.functional.cross_entropy(z, y))}


def ours(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """ECE and NLL alone, each by its own function."""
    return {"ece": ece(softmax(logits), labels), "nll": nll(logits, labels)}


def all_of(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """What the published evaluation computes, and SCE and Brier score."""
    return computed(["test_accuracy", "ece", "ece_lthpass", "sce", "nll", "brier"], logits, labels)


def seconds(repeats: int, call: Callable[[], object]) -> float:
    """Least processor time of the repetitions, so that what others run hardly counts."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        call()
        times.append(time.process_time() - begin)
    return min(times)


def report(title: str, times: dict[str, float], alike: Sequence[str] = ()) -> None:
    """Print milliseconds and how many times as long each of the others takes as the first.

    Those that do the same work, ``alike``, are told to whoever collects ratios.
    """
    print(f"\n{title}")
    first = next(iter(times.values()))
    for name, value in times.items():
        print(f"  {name:<44} {1e3 * value:10.2f} ms   {value / first:7.2f}x")
    for name in alike:
        tell(title, name, first, times[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 10_000), ("sets", 75), ("classes", 10), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logits, labels = over_and_underconfident(options.sets, options.images, options.classes)
    pairs = list(zip(logits, labels, strict=True))
    one, many = pairs[-1], (logits.reshape(-1, options.classes), labels.reshape(-1))

    def every_set(measure: Callable) -> float:
        return seconds(options.repeats, lambda: [measure(*pair) for pair in pairs])

    report(
        f"accuracy, ECE (15 and 14 bins), SCE, NLL, Brier of {options.sets} sets of {options.images}",
        {
            "lthlib": every_set(all_of),
            "published way: accuracy, ECE, NLL": every_set(published),
            "published way with SCE": every_set(published_with_sce),
            "torchmetrics: ECE, NLL": every_set(with_torchmetrics),
        },
    )
    report(
        f"ECE and NLL of {len(many[1])} images at once",
        {
            "ece(softmax(...)) + nll": seconds(options.repeats, lambda: ours(*many)),
            "torchmetrics": seconds(options.repeats, lambda: with_torchmetrics(*many)),
            "published way": seconds(options.repeats, lambda: published(*many)),
        },
        alike=["torchmetrics", "published way"],
    )
    known, foreign = msp_score(many[0][: options.images]), msp_score(many[0][options.images :])
    report(
        f"ROC-AUC of {len(known)} against {len(foreign)} scores",
        {"roc_auc": seconds(options.repeats, lambda: roc_auc(known, foreign))},
    )
    report(
        f"bootstrap of {options.images} images, 1,000 replicates",
        {"ECE, SCE and NLL": seconds(1, lambda: bootstrap_intervals(*one, seed=0))},
    )
    print(f"\nnumbers on all {len(many[1])} images")
    for name, measure in (("ours", all_of), ("published", published_with_sce), ("torchmetrics", with_torchmetrics)):
        print(f"  {name:<14}", "  ".join(f"{k} {v:.7f}" for k, v in measure(*many).items()))


if __name__ == "__main__":
    main()
