"""Training speed, and what masks cost it: ResNet-20s at 80 % sparsity on images of 32 x 32 pixels.

    python benchmarks/training.py [--images 4096] [--repeats 5] [--threads 2]

Images a second of `lthlib.training.loop.train`, with masks and without, beside a plain loop: float32 in NCHW, a
DataLoader with two workers that crop, mirror and normalise PIL images, masks by `torch.nn.utils.prune`. An epoch
each, in turns; the median of the repetitions. Same network, batch, optimizer and masks.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from ratios import tell
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from lthlib import networks
from lthlib.core import machine
from lthlib.data import Images
from lthlib.pruning import masks
from lthlib.training.loop import train
from lthlib.training.recipe import Recipe

ROUND = 7  # 79.0 %
RECIPE = Recipe(epochs=1, batch_size=128, lr=0.01, warmup=0.0, augment="crop-flip")
MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]


class PilImages(Dataset):
    """Images as most training scripts hold them: decoded one at a time, augmented and normalised by torchvision."""

    def __init__(self, images: Images):
        self.pixels, self.labels = images.pixels.numpy(), images.labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.transform(Image.fromarray(self.pixels[i])), self.labels[i]


def network() -> nn.Module:
    return networks.build("resnet20s", in_channels=3, num_classes=10, image_size=32, mean=MEAN, std=STD)


def some_masks(model: nn.Module) -> masks.Masks:
    """Keep the largest initial weights; which ones is of no consequence to the speed."""
    scores = {name: weight.detach().abs() for name, weight in masks.prunable(model).items()}
    return masks.keep_top(scores, masks.kept(masks.n_kept(masks.dense(model)), ROUND))


def ours(model: nn.Module, images: Images, recipe: Recipe, *, masked: bool) -> Callable[[], object]:
    kept = some_masks(model) if masked else None
    return lambda: train(model, images, recipe, seed=0, masks=kept)


def plain(model: nn.Module, images: Images) -> Callable[[], object]:
    model.normalize = nn.Identity()  # the transform does it
    for name, mask in some_masks(model).items():
        prune.custom_from_mask(model.get_submodule(name.removesuffix(".weight")), "weight", mask)
    optimizer = torch.optim.SGD(model.parameters(), RECIPE.lr, RECIPE.momentum, weight_decay=RECIPE.weight_decay)
    loader = DataLoader(PilImages(images), RECIPE.batch_size, shuffle=True, drop_last=True, num_workers=2)

    def epoch() -> None:
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return epoch


def medians(makers: dict[str, Callable[[], Callable[[], object]]], repeats: int) -> dict[str, float]:
    """Return the median seconds of each, made anew for each repetition and run in turns: a busy moment hits all."""
    took: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(repeats):
        for name, make in makers.items():
            run = make()
            began = time.perf_counter()
            run()
            took[name].append(time.perf_counter() - began)
    return {name: statistics.median(seconds) for name, seconds in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 4096), ("repeats", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (options.images, 32, 32, 3), generator=generator, dtype=torch.uint8)
    images = Images(pixels, torch.randint(10, (options.images,), generator=generator))
    full = Recipe(**{**vars(RECIPE), "precision": "float32"})
    ours(network(), Images(pixels[:256], images.labels[:256]), RECIPE, masked=True)()  # warm
    seconds = medians(
        {
            "lthlib, masks": lambda: ours(network(), images, RECIPE, masked=True),
            "lthlib, no masks": lambda: ours(network(), images, RECIPE, masked=False),
            "lthlib in float32, masks": lambda: ours(network(), images, full, masked=True),
            "lthlib in float32, no masks": lambda: ours(network(), images, full, masked=False),
            "plain loop, torch.nn.utils.prune": lambda: plain(network(), images),
        },
        options.repeats,
    )
    n = options.images // RECIPE.batch_size * RECIPE.batch_size
    for name, value in seconds.items():
        print(f"{name:<34} {n / value:8.0f} images/s   {seconds['lthlib, masks'] / value:6.2f} of the first")
    loop = seconds["plain loop, torch.nn.utils.prune"]
    default = str(machine.resolve_precision("auto")).removeprefix("torch.")
    for name, way in {default: "lthlib, masks", "float32": "lthlib in float32, masks"}.items():
        tell(f"training ResNet-20 with masks, {name}", "a plain loop with torch.nn.utils.prune", seconds[way], loop)
    for precision in ("", " in float32"):
        cost = seconds[f"lthlib{precision}, masks"] / seconds[f"lthlib{precision}, no masks"] - 1
        print(f"masks{precision} cost {100 * cost:+.1f} % of the time without")


if __name__ == "__main__":
    main()
