"""Evaluating a ResNet-20 on CIFAR-sized images: one fast forward pass against the published evaluation's loop.

    OMP_NUM_THREADS=2 python benchmarks/predictions.py [--images 10000] [--arch resnet20s] [--repeats 3]

The load is one image set: accuracy, ECE, SCE and NLL of `--images` colour images of 32 pixels. The loop does what the
paper's code does: images go through torchvision's ToTensor in a DataLoader, the network runs in float32 and NCHW
with its batch normalisations, once for the accuracy and once more for the calibration. (It has no SCE; ours is added
to its numbers outside the time.) Ours folds, runs once and gives each thread batches of its own. Times are the best of
the repetitions, taken in turns; ratios above 1: we are faster. Ratios hold for all 75 corrupted sets, which are the
same work 75 times. The network is trained for a moment, so that its confidences spread; "changed" counts images whose
predicted class differs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from ratios import tell, tell_growth
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_tensor

from lthlib import networks
from lthlib.core import machine
from lthlib.data import Images
from lthlib.metrics import computed, sce, softmax
from lthlib.metrics.calibration.errors import PUBLISHED_BINS
from lthlib.networks.predict import for_inference, predict
from lthlib.training.loop import Recipe, train


def images(n: int, seed: int) -> Images:
    """Blobs: a class is a place and a colour, under noise, so that a network learns and errs."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=generator)
    angle = labels * (2 * torch.pi / 10)
    grid = torch.arange(32) - 15.5
    x, y = 8 * torch.cos(angle), 8 * torch.sin(angle)
    blob = torch.exp(-((grid - x[:, None]) ** 2)[:, None, :] / 40 - ((grid - y[:, None]) ** 2)[:, :, None] / 40)
    tint = torch.stack([0.5 + 0.5 * torch.cos(angle + k) for k in range(3)], dim=1)[:, None, None, :]
    noise = torch.randn(n, 32, 32, 3, generator=generator)
    pixels = (128 + 60 * blob[..., None] * tint + 45 * noise).clamp(0, 255).to(torch.uint8)
    return Images(pixels, labels)


class InMemory(Dataset):
    """As torchvision's CIFAR-10: arrays in memory, a transform per image."""

    def __init__(self, part: Images):
        self.pixels, self.labels = part.pixels.numpy(), part.labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return to_tensor(self.pixels[index]), self.labels[index]


@torch.no_grad()
def published_accuracy(model: nn.Module, loader: DataLoader) -> float:
    right = total = 0
    for x, y in loader:
        right += (model(x).argmax(1) == y).sum().item()
        total += len(y)
    return right / total


@torch.no_grad()
def published_calibration(model: nn.Module, loader: DataLoader) -> dict[str, np.ndarray | float]:
    logits, labels = [], []
    for x, y in loader:
        logits.append(model(x))
        labels.append(y)
    logits, labels = torch.cat(logits), torch.cat(labels)
    probs = torch.softmax(logits, dim=1)
    loss = nn.functional.nll_loss(torch.log(probs), labels).item()
    p, truth = probs.numpy(), labels.numpy()
    confidence, hits = p.max(1), p.argmax(1) == truth
    bins = np.digitize(confidence, np.linspace(0, 1, PUBLISHED_BINS + 1), right=True)
    gaps = [
        np.abs(hits[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean()
        for b in range(1, PUBLISHED_BINS + 1)
        if (bins == b).any()
    ]
    return {"logits": logits.numpy(), "ece_lthpass": sum(gaps), "nll": loss}


def published(model: nn.Module, part: Images) -> dict[str, object]:
    loader = DataLoader(InMemory(part), batch_size=128, shuffle=False, num_workers=0)
    return {"accuracy": published_accuracy(model, loader), **published_calibration(model, loader)}


def ours(model: nn.Module, part: Images, precision: str) -> dict[str, object]:
    logits = predict(for_inference(model, part.pixels, precision), part.pixels).numpy()
    numbers = computed(["test_accuracy", "ece_lthpass", "sce", "nll"], logits, part.labels.numpy())
    return {"logits": logits, "accuracy": numbers.pop("test_accuracy"), **numbers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--arch", default="resnet20s")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    learnt = images(2_000, 0)
    model = networks.build(
        options.arch, in_channels=3, num_classes=10, image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3, seed=0
    )
    train(model, learnt, Recipe(epochs=3, batch_size=100), seed=0)
    model.eval()
    part = images(options.images, 1)
    default = str(machine.resolve_precision("auto")).removeprefix("torch.")
    ways: dict[str, Callable[[], dict]] = {
        "published loop": lambda: published(model, part),
        "ours, float32": lambda: ours(model, part, "float32"),
        f"ours, {default}": lambda: ours(model, part, "auto"),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for _ in range(options.repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            found[name] = way()
            times[name].append(time.perf_counter() - began)
    base, reference = min(times["published loop"]), found["published loop"]
    reference["sce"] = sce(softmax(reference["logits"]), part.labels)
    print(f"{options.arch}, {options.images:,} images, {torch.get_num_threads()} threads, {machine.processor()}")
    print("(ECE in the published code's 14 bins)\n")
    print(f"{'':<28}{'seconds':>8}{'ratio':>7}{'changed':>9}{'accuracy':>10}{'ECE':>9}{'SCE':>9}{'NLL':>9}")
    for name, numbers in found.items():
        seconds = min(times[name])
        changed = int((numbers["logits"].argmax(1) != reference["logits"].argmax(1)).sum())
        cells = "".join(
            f"{numbers[key]:>{w}.5f}" for key, w in (("accuracy", 10), ("ece_lthpass", 9), ("sce", 9), ("nll", 9))
        )
        print(f"{name:<28}{seconds:>8.2f}{base / seconds:>7.1f}{changed:>9,}{cells}")
    for name in list(ways)[1:]:
        what = f"accuracy, ECE, SCE and NLL of {options.images:,} images, {name.removeprefix('ours, ')}"
        tell(what, "the paper's loop (two passes, no SCE)", min(times[name]), base)
    few = images(options.images // 4, 1)
    took = []
    for _ in range(options.repeats):
        began = time.perf_counter()
        ours(model, few, "auto")
        took.append(time.perf_counter() - began)
    tell_growth("predictions", "images", {len(few): min(took), options.images: min(times[list(ways)[-1]])})


if __name__ == "__main__":
    main()
