"""Logits: one forward pass per ticket and image set, kept in the store and read by every metric that needs only them.

`Subject` is a ticket under examination: what a dimension's ``measure`` function is given. Corrupted test images are
made once per data set and shared by all tickets; where the published files lie in the data folder (``CIFAR-10-C``,
``CIFAR-100-C``, ``ImageNet-C``), these are read instead.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lthlib import data
from lthlib.core import machine as compute
from lthlib.core.errors import UserError, choose
from lthlib.core.store import Store
from lthlib.core.versions import code_version
from lthlib.data.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    common,
    corrupt,
    has_official,
    load_official,
    stream_official,
)
from lthlib.networks.fast import inference_copy
from lthlib.pruning.masks import Masks
from lthlib.tickets.ticket import Ticket, Trained, new_model, obtain
from lthlib.training.loop import as_input

BATCH = {"cpu": 64, "cuda": 500}  # float32 images of up to 64 pixels; on a CPU larger batches fall out of the cache
LANES = 8  # batches at a time at most on a CPU, whose activations are in memory together
PIECE = 250  # corrupted images made at a time
KEPT_UP_TO = 2**28  # bytes of one corruption's images; more are made again for each ticket, batch by batch
OFFICIAL = {"cifar10": ("CIFAR-10-C", 32), "cifar100": ("CIFAR-100-C", 32), "imagenet": ("ImageNet-C", 224)}
OWN = ("train", "test", "validation")


def for_inference(model: nn.Module, precision: str = "auto") -> nn.Module:
    """Return a faster copy (`lthlib.networks.fast.inference_copy`) on this machine's device.

    Args:
        model: Any network.
        precision: ``"float32"``, ``"bfloat16"`` or ``"auto"``.
    """
    return inference_copy(model, compute.resolve_precision(precision)).to(compute.device())


def predict(model: nn.Module, pixels: data.Pixels, *, batch: int | None = None) -> torch.Tensor:
    """Compute logits.

    On a CPU each thread takes batches of its own: threads that share every layer wait for one another after each.

    Args:
        model: As `for_inference` returns it, which decides the precision. Several batches may be in it at once.
        pixels: uint8 (N, H, W, C), a tensor or read on demand.
        batch: Images a forward pass; by default what suits the device, the precision and the size of the images.

    Returns:
        float32 tensor (N, classes) on the CPU.
    """
    device = next(model.parameters()).device
    lanes = min(torch.get_num_threads(), LANES) if device.type == "cpu" else 1
    most = scaled_to(pixels.shape[1:3], _batch(model, device.type))
    batch = batch or max(1, min(most, -(-len(pixels) // lanes)))

    @torch.inference_mode()
    def infer(part: torch.Tensor) -> torch.Tensor:
        return model(as_input(part.to(device))).cpu()

    found, done = torch.empty(0), 0
    for logits in _in_lanes(infer, pixels.split(batch), min(lanes, -(-len(pixels) // batch))):
        if done == 0:
            found = torch.empty(len(pixels), logits.shape[1])
        found[done : done + len(logits)] = logits
        done += len(logits)
    return found


def _batch(model: nn.Module, device: str) -> int:
    """Return `BATCH` for a network that works in float32, twice that where its weights take half the bytes."""
    low = any(parameter.itemsize == 2 for parameter in model.parameters())
    return BATCH[device] * (2 if low else 1)


def _in_lanes(function: Callable, parts: Iterable[torch.Tensor], lanes: int) -> Iterator[torch.Tensor]:
    """Yield a function's results in order, computed in lanes that share out PyTorch's threads between them."""
    if lanes <= 1:
        yield from map(function, parts)
        return
    threads, pending = torch.get_num_threads(), deque()
    share = (max(1, threads // lanes),)  # PyTorch counts threads for each thread that calls it
    try:
        with ThreadPoolExecutor(lanes, initializer=torch.set_num_threads, initargs=share) as pool:
            for part in parts:
                pending.append(pool.submit(function, part))
                if len(pending) > lanes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    finally:
        torch.set_num_threads(threads)  # for threads that start later too


def scaled_to(size: tuple[int, int], count: int) -> int:
    """Return how many images of a size take the memory of ``count`` images of 64 x 64 pixels; at most ``count``."""
    return max(1, count * 64**2 // max(64**2, size[0] * size[1]))


@dataclass
class Subject:
    """A ticket under examination, with its network, images and logits at hand; each is made when first asked for.

    Attributes:
        ticket: Which.
        store: Where everything made is kept.
        precision: Of the forward passes for logits.
    """

    ticket: Ticket
    store: Store
    precision: str = "auto"
    _cache: dict = field(default_factory=dict, repr=False)

    @cached_property
    def trained(self) -> Trained:
        """The finished ticket."""
        return obtain(self.ticket, self.store)

    @cached_property
    def data(self) -> data.DataSet:
        """Its data set."""
        return data.load(self.ticket.data, self.store, self.ticket.train_size)

    @property
    def masks(self) -> Masks | None:
        """Its masks, or None where nothing is masked."""
        return self.trained.masks

    @cached_property
    def model(self) -> nn.Module:
        """Its network in evaluation mode, on the processor's device, float32."""
        return self.trained.model.to(compute.device())

    @property
    def is_dense(self) -> bool:
        """Whether it is a dense parent and not a sparse network."""
        return self.ticket.method == "dense"

    @property
    def parent(self) -> nn.Module | None:
        """The trained dense parent's network; None for a dense one."""
        return None if self.is_dense else obtain(self.ticket.dense, self.store).model

    def sibling(self, seed: int) -> nn.Module | None:
        """Return the network trained by the same description with another seed; None for its own seed."""
        other = replace(self.ticket, seed=seed)
        return None if other == self.ticket else obtain(other, self.store).model

    def untrained(self) -> nn.Module:
        """Return the dense parent before training."""
        return new_model(self.ticket.dense, self.data)

    @property
    def family(self) -> str:
        """A name, fit for a key of the store, that all subjects with the same `untrained` network share."""
        return f"{self.ticket.data.replace('@', '+').lower()}-{self.ticket.arch}-s{self.ticket.seed}"

    @cached_property
    def fast_model(self) -> nn.Module:
        """The same network folded for inference, at the precision asked for."""
        return for_inference(self.trained.model, self.precision)

    def images(self, name: str, n: int) -> torch.Tensor:
        """Return up to n uint8 images (n, H, W, C) of an image set, in memory.

        ``"test"``, ``"train"`` and ``"validation"`` are the data set's own, spread evenly over the classes (`sample`);
        ``"ood:<name>"`` is an out-of-distribution set (`lthlib.data.ood_images`); ``"corrupted:<name>:<severity>"``
        are the test images of `sample` under a corruption.
        """
        kind, _, which = name.partition(":")
        if kind != "corrupted":
            return self._pixels(name, n)[:]
        corruption, _, severity = which.partition(":")
        choose(severity, [str(s) for s in SEVERITIES], "severity")
        parts = corrupted_parts(self.data, corruption, n, self.store, severities=(int(severity),))
        return torch.cat([pixels for _, _, pixels in parts])

    def _pixels(self, name: str, n: int) -> data.Pixels:
        """As `images`, for sets that are not corrupted; read on demand where there is too much to hold in memory."""
        kind, _, which = name.partition(":")
        if kind in OWN:
            return self._part(name).subset(self.sample(name, n)).pixels
        if kind == "ood":
            return data.ood_images(which, self.data, n, self.store)
        raise UserError(
            f"Unknown image set {name!r}. Allowed: {', '.join(OWN)}, ood:<name>, corrupted:<name>:<severity>."
        )

    def labels(self, name: str, n: int) -> torch.Tensor:
        """Return the labels of ``images(name, n)``, for the data set's own images."""
        return self._part(name).labels[self.sample(name, n)]

    def sample(self, name: str, n: int) -> torch.Tensor:
        """Return the positions of ``images(name, n)`` in the data set's own part of that name."""
        return sample(self._part(name).labels, n)

    def _part(self, name: str) -> data.Images:
        choose(name, OWN, "part of a data set")
        part = getattr(self.data, name)
        if part is None:
            raise UserError(f"{self.ticket.data} has no {name} images.")
        return part

    def logits(self, name: str, n: int) -> np.ndarray:
        """Return the logits (n, classes) of an image set, computed once and kept."""

        def make(folder: Path) -> None:
            _save(folder / "logits.npy", predict(self.fast_model, self._pixels(name, n)).numpy())
            if name in OWN:
                _save(folder / "labels.npy", self.labels(name, n).numpy())

        folder = self._kept(f"{name}-{n}", self.input_version(name), make)
        if folder not in self._cache:
            self._cache[folder] = np.load(folder / "logits.npy")
        return self._cache[folder]

    def corrupted_logits(self, names: Sequence[str], n: int) -> Iterator[tuple[str, int, np.ndarray]]:
        """Yield (corruption, severity, logits (n, classes)), all kept in one file and read one after the other.

        Args:
            names: Names in `lthlib.data.corruptions.CORRUPTIONS`.
            n: Images under each, those of ``sample("test", n)``, whose labels they have.
        """
        labels = self.labels("test", n).numpy()
        shape = (len(names), len(SEVERITIES), len(labels), len(self.data.classes))

        def make(folder: Path) -> None:
            _save(folder / "labels.npy", labels)
            _reserve(folder / "logits.npy", np.float32, shape)
            for row, name in enumerate(names):
                self._predict_corrupted(name, n, folder / "logits.npy", row)

        digest = hashlib.sha256(" ".join(names).encode()).hexdigest()[:6]
        versions = " ".join(self.input_version(f"corrupted:{name}") for name in names)
        version = hashlib.sha256(versions.encode()).hexdigest()[:12]
        folder = self._kept(f"corrupted-{len(names)}-{digest}-{n}", version, make)
        for row, name in enumerate(names):
            for severity in SEVERITIES:
                # mapped anew each time: what has been read counts as memory as long as it is mapped
                yield name, severity, np.array(np.load(folder / "logits.npy", "r")[row, severity - 1])

    def _predict_corrupted(self, name: str, n: int, path: Path, row: int) -> None:
        """Write logits into a row of a file; all severities share batches where the images lie in the store."""
        done = dict.fromkeys(SEVERITIES, 0)
        for severity, count, pixels in corrupted_parts(self.data, name, n, self.store):
            logits = predict(self.fast_model, pixels)
            logits = logits.reshape(-1, count, logits.shape[1]).numpy()
            first, start = severity - 1, done[severity]
            np.load(path, "r+")[row, first : first + len(logits), start : start + count] = logits
            done[severity] += count

    def input_version(self, name: str) -> str:
        """Return what identifies the images of a set beside the ticket's data: the code and files they come from."""
        kind, _, which = name.partition(":")
        if kind == "ood":
            return data.ood_version(which)
        if kind == "corrupted":
            return _corrupted_version(self.data, which.partition(":")[0])
        return code_version(sample)

    def _kept(self, name: str, input_version: str, make: Callable[[Path], None]) -> Path:
        name = name.replace(":", "-").replace("@", "+").lower()
        version = f"{self.trained.version}-{code_version(predict, for_inference)}-{input_version}"
        return self.store.get(f"predictions/{self.ticket.id}/{name}-{self.precision}", version, make)


def _reserve(path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    """Write an array of zeros, to be mapped and filled: writing to a mapping that the disk cannot take is fatal."""
    with path.open("wb") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        block, size = bytes(2**20), math.prod(shape) * np.dtype(dtype).itemsize
        for start in range(0, size, len(block)):
            file.write(block[: size - start])


def _save(path: Path, array: np.ndarray) -> None:
    """Write an array as ``np.save`` does, whose error does not say when the disk is full."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)


def sample(labels: torch.Tensor, n: int) -> torch.Tensor:
    """Return the positions of n images, ascending, every class in proportion; of all where there are not more.

    Evenly spaced in the order by class: many sets are sorted by class, and their first n images are all alike.

    Raises:
        UserError: For n below 1.
    """
    if n < 1:
        raise UserError(f"{n} images are asked for; at least 1 is needed.")
    n = min(n, len(labels))
    return labels.argsort(stable=True)[torch.arange(n) * len(labels) // n].sort().values


# --- corrupted test images -------------------------------------------------------------------------------------


def corruption_names(extra: bool) -> tuple[str, ...]:
    """Return the names of the 15 common corruptions, or with the extra ones of all that are registered."""
    return tuple(CORRUPTIONS) if extra else common()


def official_folder(like: data.DataSet, name: str) -> Path | None:
    """Return the folder in the data folder that holds the published files of a corruption of a data set, if any."""
    folder, size = OFFICIAL.get(like.name.split("@")[0], ("", 0))
    root = data.data_folder() / folder
    there = folder and like.size == size and has_official(root, name)
    return root if there else None


def corruption_source(like: data.DataSet, name: str) -> str:
    """Return ``"official"`` or ``"generated"``: where a data set's images under a corruption come from."""
    return "generated" if official_folder(like, name) is None else "official"


def corrupted_parts(
    like: data.DataSet, name: str, n: int, store: Store, severities: Sequence[int] = SEVERITIES
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield the sampled test images under a corruption, in parts that fit in memory.

    They are made once and kept in the store, unless they are larger than `KEPT_UP_TO`: then each caller makes them
    again, a batch at a time.

    Args:
        like: The data set; ``sample(like.test.labels, n)`` of its test images are taken.
        name: A name in `lthlib.data.corruptions.CORRUPTIONS`.
        n: How many.
        store: Where they are kept.
        severities: Consecutive ones.

    Yields:
        The first severity of the part, how many images of each severity it has, and its pixels, uint8
        (severities x count, H, W, C), severity by severity.
    """
    choose(name, CORRUPTIONS, "corruption")
    positions = sample(like.test.labels, n).numpy()
    shape = (len(SEVERITIES), len(positions), *like.test.pixels.shape[1:])
    if np.prod(shape) > KEPT_UP_TO:
        for severity, pixels in _corrupted_batches(like, name, severities, positions):
            yield severity, len(pixels), torch.from_numpy(pixels)
        return

    def make(folder: Path) -> None:
        _reserve(folder / "pixels.npy", np.uint8, shape)
        kept = np.load(folder / "pixels.npy", "r+")
        done = dict.fromkeys(SEVERITIES, 0)
        for severity, pixels in _corrupted_batches(like, name, SEVERITIES, positions):
            kept[severity - 1, done[severity] : done[severity] + len(pixels)] = pixels
            done[severity] += len(pixels)
        kept.flush()

    key = f"corrupted/{like.name.replace('@', '+').lower()}-{len(positions)}/{name}"
    folder = store.get(key, f"{like.digest}-{_corrupted_version(like, name)}", make)
    pixels = np.load(folder / "pixels.npy", mmap_mode="c")[severities[0] - 1 : severities[-1]]
    yield severities[0], len(positions), torch.from_numpy(pixels.reshape(-1, *shape[2:]))


def _corrupted_version(like: data.DataSet, name: str) -> str:
    folder = official_folder(like, name)
    if folder is None:
        return code_version(sample, _corrupted_batches, CORRUPTIONS[name].function)
    files = [path for path in (folder / f"{name}.npy", folder / "labels.npy", folder / name) if path.exists()]
    facts = " ".join(f"{p.name}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in files)
    return f"{code_version(sample, _corrupted_batches)}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def _corrupted_batches(
    like: data.DataSet, name: str, severities: Sequence[int], positions: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (severity, uint8 (m, H, W, C)), for each severity the test images at the positions, in their order."""
    folder = official_folder(like, name)
    if folder is not None:
        for severity in severities:
            yield from ((severity, part) for part in _official_batches(like, folder, name, severity, positions))
        return
    start = 0
    for batch in like.test.subset(torch.from_numpy(positions)).pixels.split(PIECE):
        for severity in severities:
            yield severity, corrupt(batch.numpy(), name, severity, start=start)
        start += len(batch)


def _official_batches(
    like: data.DataSet, folder: Path, name: str, severity: int, positions: np.ndarray
) -> Iterator[np.ndarray]:
    """Pick the positions out of the published files, and see that these belong to the data set."""
    expected = like.test.labels.numpy()
    if (folder / f"{name}.npy").is_file():
        pixels, labels = load_official(folder, name, severity, rows=5 * len(expected))
        batches = iter([(pixels[positions], labels)])
    else:
        expected = expected[positions]
        batches = stream_official(
            folder, name, severity, classes=like.classes, rows=len(like.test), positions=positions
        )
    for pixels, labels in batches:
        same, expected = np.array_equal(labels, expected[: len(labels)]), expected[len(labels) :]
        if not same or pixels.shape[1:] != tuple(like.test.pixels.shape[1:]):
            raise UserError(
                f"{folder} does not belong to {like.name}: labels or image size of {name} differ from the test set's."
            )
        yield pixels
