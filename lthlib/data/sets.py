"""Named data sets: how they come by their images, and the decoded copy that the store keeps.

Decoding happens once, unless the pixels are larger than `lthlib.data.folders.HELD_UP_TO`: such images (ImageNet) are
decoded from their files whenever they are read, batch by batch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lthlib.core.errors import Registry, UserError, suggest
from lthlib.core.store import Store, say
from lthlib.core.versions import code_version
from lthlib.data.files import Files, ImageFiles, data_folder, in_data_folder, names_in_data_folder
from lthlib.data.folders import ORDER, load_folder
from lthlib.data.images import Images, OnDemand, long_tailed, stratified

MOMENTS_FROM = 10_000  # training images, where these are read on demand


@dataclass(frozen=True)
class DataSet:
    """A classification problem.

    Attributes:
        name: The name it was asked for by.
        classes: Class names, by label.
        train: Training images.
        validation: Held-out part of the training images, or None (CIFAR: the last 5,000, as in the paper).
        test: Test images; every accuracy and calibration number is measured on these.
        mean: Mean of the training pixels by channel, in [0, 1].
        std: Standard deviation of the training pixels by channel.
        digest: Hash of the pixels (where they are read on demand: of the files' names, sizes and times) and labels;
            part of the version of whatever is computed from them.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    validation: Images | None
    test: Images
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str

    @property
    def channels(self) -> int:
        """1 for grayscale, 3 for colour."""
        return self.train.pixels.shape[3]

    @property
    def size(self) -> int:
        """Height (= width) of an image in pixels."""
        return self.train.pixels.shape[1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a network's input."""
        return self.channels, *self.train.pixels.shape[1:3]


@dataclass(frozen=True)
class Source:
    """How a named data set comes by its images.

    Attributes:
        load: Given the data folder, returns the arrays {"train": (pixels, labels), "test": ..., perhaps
            "validation": ...} and class names.
        title: What a reader sees.
        ood: Out-of-distribution sets a page compares it with unless told otherwise.
        reference: BibTeX key.
        path: The folder or zip of a person's own data set; None for a registered one.
    """

    load: Callable[[Path], tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]]
    title: str
    ood: tuple[str, ...]
    reference: str
    path: Path | None = None


DATASETS: Registry[Source] = Registry("data set")
"""The built-in data sets by name; folders and zips are found beside them (`source`)."""


def dataset(name: str, *, title: str, ood: tuple[str, ...], reference: str) -> Callable:
    """Register the decorated loader as a data set; the arguments are the attributes of `Source`."""

    def register(load: Callable) -> Callable:
        DATASETS[name] = Source(load, title, ood, reference)
        return load

    return register


def check_name(name: str) -> None:
    """Raise `UserError` unless a name can be a data set's; whether there is one of that name, `source` tells."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*(@[1-9][0-9]{0,3})?(@tail[1-9][0-9]{0,3})?", name):
        raise UserError(
            f"{name!r} cannot name a data set: use letters, digits and . _ + -, and perhaps @ and a size in pixels, of "
            "four digits at most, and @tail and how many times the commonest class outnumbers the rarest."
        )


def split_tail(name: str) -> tuple[str, int]:
    """Return a name without its tail, and by how much the commonest class outnumbers the rarest (1: no tail)."""
    base, _, ratio = name.partition("@tail")
    return base, int(ratio or 1)


def title_of(name: str) -> str:
    """Return what a reader sees in place of a data set's name."""
    base, ratio = split_tail(name)
    title = DATASETS[base].title if base in DATASETS else base
    return title if ratio == 1 else f"{title}, long tail {ratio}:1"


def store_name(name: str) -> str:
    """Return a data set's name as it stands in the store's keys."""
    return name.replace("@", "+").lower()


def source(name: str) -> Source:
    """Return the registered source of a name, or a folder source where ``$LTHLIB_DATA`` holds such a folder or zip.

    Raises:
        UserError: Where there is neither, naming what there is.
    """
    check_name(name)
    name, _ = split_tail(name)
    if name in DATASETS:
        return DATASETS[name]
    base = name.split("@")[0]
    path = in_data_folder(base)
    if path is None:
        there = names_in_data_folder()
        raise UserError(
            f"Unknown data set {name!r}.{suggest(name, [*DATASETS, *there])} Built in: {', '.join(DATASETS)}; in "
            f"{data_folder()} (set LTHLIB_DATA to change it): {', '.join(there) or 'nothing'}."
        )
    return Source(lambda root: load_folder(name, path), base, ("gaussian", "photos"), "", path)


@functools.lru_cache(maxsize=8)
def load(name: str, store: Store, train_size: int | None = None) -> DataSet:
    """Load a data set.

    Args:
        name: A name of `DATASETS`, or of a folder or zip in ``$LTHLIB_DATA``, perhaps with ``@size``; at its end
            ``@tail50`` leaves fewer training images of each class than of the one before, at last 1 in 50.
        store: Where decoded arrays are kept.
        train_size: Take only this many training images, chosen with a fixed seed: each class in proportion.

    Raises:
        UserError: For an unknown name, missing data, or images that cannot form a classification problem.
    """
    base, ratio = split_tail(name)
    folder = decoded(base, store)
    info = json.loads((folder / "info.json").read_text())
    parts = {part: kept_part(base, folder, part) for part in info["parts"]}
    if "train" not in parts:
        raise UserError(f"{name} has no training images; it can only serve as an out-of-distribution set.")
    train, classes = parts["train"], info["classes"]
    if ratio > 1:
        train = train.subset(
            torch.from_numpy(long_tailed(train.labels.numpy(), len(classes), ratio, train_size, seed=0))
        )
    elif train_size is not None:
        if not len(classes) <= train_size <= len(train):
            raise UserError(f"train_size is {train_size}; {name} allows {len(classes)} to {len(train)} (all of them).")
        train = train.subset(torch.from_numpy(stratified(train.labels.numpy(), train_size, seed=0)[0]))
    by_number = sorted(classes, key=lambda c: [int(w) if i % 2 else w for i, w in enumerate(re.split(r"([0-9]+)", c))])
    if classes == sorted(classes) != by_number:
        say(
            f"{name}: the classes are in the order of text, {', '.join(classes[:4])} ...; for another order, of a "
            f"network trained elsewhere for instance, name them one a line in a file {ORDER} beside their folders."
        )
    mean, std = tuple(info["mean"]), tuple(info["std"])
    return DataSet(name, tuple(classes), train, parts.get("validation"), parts["test"], mean, std, info["digest"])


def decoded(name: str, store: Store) -> Path:
    """Return the folder of the store with a data set's decoded images or, where there are too many, their names."""
    found = source(name)
    stamp = Files(found.path).stamp if found.path else ""

    def make(folder: Path) -> None:
        parts, classes = found.load(data_folder())
        if "test" not in parts:
            raise UserError(f"{name} has no test images (a folder called test or val).")
        digest = hashlib.sha256()
        for part, (pixels, labels) in parts.items():
            if isinstance(pixels, OnDemand):
                (folder / f"{part}-files.json").write_text(json.dumps([pixels.mode, pixels.names]))
                digest.update(f"{name} {stamp} {code_version(ImageFiles)}".encode())
            else:
                pixels = np.ascontiguousarray(pixels, np.uint8)
                np.save(folder / f"{part}-pixels.npy", pixels)
                digest.update(pixels.data)
            labels = np.asarray(labels, np.int64)
            np.save(folder / f"{part}-labels.npy", labels)
            digest.update(labels.data)
        mean, std = _moments(parts.get("train", parts["test"])[0])
        info = {"classes": classes, "parts": list(parts), "mean": mean, "std": std, "digest": digest.hexdigest()[:16]}
        (folder / "info.json").write_text(json.dumps(info))

    version = code_version(load_folder if found.path else found.load, _moments)
    return store.get(f"data/{store_name(name)}", f"{version}-{stamp}", make)


def kept_part(name: str, folder: Path, part: str) -> Images:
    """Return a part of a data set from the folder that `decoded` returned."""
    labels = torch.from_numpy(np.load(folder / f"{part}-labels.npy"))
    listing = folder / f"{part}-files.json"
    if not listing.exists():
        return Images(torch.from_numpy(np.load(folder / f"{part}-pixels.npy")), labels)
    mode, names = json.loads(listing.read_text())
    return Images(ImageFiles(Files(source(name).path), names, name, mode), labels)


def _moments(pixels: np.ndarray | OnDemand) -> tuple[list[float], list[float]]:
    """Mean and standard deviation by channel, in [0, 1], from exact integer histograms.

    Of images that are read on demand `MOMENTS_FROM` count, evenly spread.
    """
    n = min(MOMENTS_FROM, len(pixels))
    every = pixels.at(torch.arange(n) * len(pixels) // n) if isinstance(pixels, OnDemand) else torch.as_tensor(pixels)
    counts, values = np.zeros((pixels.shape[3], 256), int), np.arange(256) / 255
    for batch in every.split(256):
        for c, count in enumerate(counts):
            count += np.bincount(batch[..., c].numpy().ravel(), minlength=256)
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ values
    return mean.tolist(), np.sqrt(np.maximum(share @ values**2 - mean**2, 1e-8)).tolist()
