"""A ticket under examination: what a dimension's ``measure`` function is given.

Logits are computed in one forward pass per ticket and image set, kept in the store, and read by every metric that needs
only them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lthlib import data
from lthlib.core import machine
from lthlib.core.errors import UserError, choose
from lthlib.core.store import Store
from lthlib.core.versions import code_version, digest
from lthlib.data.corrupted import corrupted_parts, corrupted_version, sample, write_array
from lthlib.data.corruptions import SEVERITIES
from lthlib.networks.predict import for_inference, predict
from lthlib.pruning.masks import Masks
from lthlib.tickets.obtain import Trained, new_model, obtain
from lthlib.tickets.ticket import Ticket

OWN = ("train", "test", "validation")


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
        return self.trained.model.to(machine.device())

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
        return for_inference(self.trained.model, self._pixels("test", 4), self.precision)

    def images(self, name: str, n: int) -> torch.Tensor:
        """Return up to n uint8 images (n, H, W, C) of an image set, in memory.

        ``"test"``, ``"train"`` and ``"validation"`` are the data set's own, spread evenly over the classes (`sample`);
        ``"ood:<name>"`` is an out-of-distribution set (`lthlib.data.ood_images`).
        """
        return self._pixels(name, n)[:]

    def _pixels(self, name: str, n: int) -> data.Pixels:
        """As `images`, read on demand where there is too much to hold in memory."""
        kind, _, which = name.partition(":")
        if kind in OWN:
            return self._part(name).subset(self.sample(name, n)).pixels
        if kind == "ood":
            return data.ood_images(which, self.data, n, self.store)
        raise UserError(f"Unknown image set {name!r}. Allowed: {', '.join(OWN)}, ood:<name>.")

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
            logits = predict(self.fast_model, self._pixels(name, n)).numpy()
            write_array(folder / "logits.npy", np.float32, logits.shape, [(0, logits)])
            if name in OWN:
                self._write_labels(folder, name, n)

        return np.load(self._kept(f"{name}-{n}", self.input_version(name), make) / "logits.npy")

    def corrupted_logits(self, names: Sequence[str], n: int) -> Iterator[tuple[str, int, np.ndarray]]:
        """Yield (corruption, severity, logits (n, classes)), all kept in one file and read one after the other.

        The images under each are those of ``sample("test", n)``, whose labels they have.
        """
        labels = self.labels("test", n)

        def parts() -> Iterator[tuple[int, np.ndarray]]:
            for row, name in enumerate(names):
                for severity, count, pixels in corrupted_parts(self.data, name, n, self.store):
                    logits = predict(self.fast_model, pixels)  # all severities share batches where they are kept
                    for further, part in enumerate(logits.split(count)):
                        yield row * len(SEVERITIES) + severity - 1 + further, part.numpy()

        def make(folder: Path) -> None:
            self._write_labels(folder, "test", n)
            shape = (len(names) * len(SEVERITIES), len(labels), len(self.data.classes))
            write_array(folder / "logits.npy", np.float32, shape, parts())

        version = digest(self.input_version(f"corrupted:{name}") for name in names)
        folder = self._kept(f"corrupted-{len(names)}-{digest(names)[:6]}-{n}", version, make)
        for row, (name, severity) in enumerate((name, severity) for name in names for severity in SEVERITIES):
            # mapped anew each time: what has been read counts as memory as long as it is mapped
            kept = np.load(folder / "logits.npy", "r").reshape(-1, len(labels), len(self.data.classes))
            yield name, severity, np.array(kept[row])

    def _write_labels(self, folder: Path, name: str, n: int) -> None:
        labels = self.labels(name, n).numpy()
        write_array(folder / "labels.npy", np.int64, labels.shape, [(0, labels)])

    def input_version(self, name: str) -> str:
        """Return what identifies the images of a set beside the ticket's data: the code and files they come from."""
        kind, _, which = name.partition(":")
        if kind == "ood":
            return data.ood_version(which)
        if kind == "corrupted":
            return corrupted_version(self.data, which.partition(":")[0])
        return code_version(sample)

    def _kept(self, name: str, input_version: str, make: Callable[[Path], None]) -> Path:
        name = name.replace(":", "-").replace("@", "+").lower()
        version = f"{self.trained.version}-{code_version(predict, for_inference)}-{input_version}"
        return self.store.get(f"predictions/{self.ticket.id}/{name}-{self.precision}", version, make)
