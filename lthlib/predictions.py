"""Logits: one forward pass per ticket and image set, kept in the store and read by every metric that needs only them.

`Subject` is a ticket under examination: what a dimension's ``measure`` function is given.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from lthlib import compute, data
from lthlib.code_version import code_version
from lthlib.errors import UserError
from lthlib.masks import Masks
from lthlib.store import Store
from lthlib.tickets import Ticket, Trained, obtain
from lthlib.train import as_input

BATCH = 250  # on a CPU larger ones fall out of the cache


def for_inference(model: nn.Module) -> nn.Module:
    """Return a copy that computes the same logits faster: batch normalisation folded into convolutions, channels_last.

    The network itself stays as it is. Where it cannot be traced (a foreign one with control flow), only the memory
    layout changes.
    """
    model = copy.deepcopy(model).eval()
    try:
        model = fuse(model)
    except (torch.fx.proxy.TraceError, AttributeError, NotImplementedError):
        pass  # not traceable: slower, equally right
    return model.to(device=compute.device(), memory_format=torch.channels_last)


@torch.inference_mode()
def predict(
    model: nn.Module, pixels: torch.Tensor, *, precision: str = "auto", batch: int = BATCH
) -> torch.Tensor:
    """Compute logits.

    Args:
        model: As `for_inference` returns it.
        pixels: uint8 (N, H, W, C).
        precision: ``"float32"``, ``"bfloat16"`` (autocast) or ``"auto"``.
        batch: Images a forward pass.

    Returns:
        float32 tensor (N, classes) on the CPU.
    """
    device = next(model.parameters()).device
    low = compute.resolve_precision(precision) == torch.bfloat16
    parts = []
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
        for part in pixels.split(batch):
            parts.append(model(as_input(part.to(device))).float().cpu())
    return torch.cat(parts) if parts else torch.empty(0)


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

    @cached_property
    def fast_model(self) -> nn.Module:
        """The same network folded for inference."""
        return for_inference(self.trained.model)

    def images(self, name: str, n: int) -> torch.Tensor:
        """Return up to n uint8 images (n, H, W, C) of an image set.

        ``"test"``, ``"train"`` and ``"validation"`` are the data set's own; ``"ood:<name>"`` is an
        out-of-distribution set (`lthlib.data.ood_images`).
        """
        if name in ("train", "test", "validation"):
            part = getattr(self.data, name)
            if part is None:
                raise UserError(f"{self.ticket.data} has no {name} images.")
            return part.pixels[:n]
        kind, _, which = name.partition(":")
        if kind != "ood":
            raise UserError(f"Unknown image set {name!r}. Allowed: train, test, validation, ood:<name>.")
        return data.ood_images(which, self.data, n, self.store)

    def logits(self, name: str, n: int) -> np.ndarray:
        """Return the logits (n, classes) of an image set, computed once and kept."""
        key = f"predictions/{self.ticket.id}/{name.replace(':', '-').replace('@', '+').lower()}-{n}-{self.precision}"

        def make(folder: Path) -> None:
            pixels = self.images(name, n)
            tensors = {"logits": predict(self.fast_model, pixels, precision=self.precision)}
            if name in ("train", "test", "validation"):
                tensors["labels"] = getattr(self.data, name).labels[:n].clone()
            safetensors.torch.save_file(tensors, folder / "logits.safetensors")

        if key not in self._cache:
            version = f"{self.trained.version}-{code_version(predict, for_inference, data.ood_images, *_maker(name))}"
            folder = self.store.get(key, version, make)
            self._cache[key] = safetensors.torch.load_file(folder / "logits.safetensors")["logits"].numpy()
        return self._cache[key]


def _maker(name: str) -> tuple:
    maker = data.OOD.get(name.partition(":")[2])
    return () if maker is None else (maker,)
