"""What the units of a layer answer: maps of any layer of any network, in memory or computed anew in each pass."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from lthlib.core.errors import UserError, suggest

CHUNK = 64
"""Images that are passed through a network, or tallied, at once."""


class Stream:
    """The maps of a layer, computed anew in chunks whenever they are iterated over; ``stream[a:b]`` is that of a part.

    Iterating yields float32 arrays (n, U, h, w); a layer with flat outputs (n, U) has maps of one pixel. The model
    takes [0, 1] pixels (n, C, H, W), is evaluated in eval mode without gradients and left as found; the layer is named
    as in ``model.named_modules()``; images are uint8 (N, H, W, C), an array or anything that gives one when sliced.

    Raises:
        UserError: If no module has this name, or (when iterated over) if the layer is not called exactly once
            per pass or its output is not a map of units.
    """

    def __init__(self, model: nn.Module, layer: str, images: Sequence, chunk: int = CHUNK):
        self.model, self.layer, self.images, self.chunk = copy.deepcopy(model).eval(), layer, images, chunk
        modules = dict(self.model.named_modules())
        if not layer or layer not in modules:
            blocks = ", ".join(name for name, _ in model.named_children())
            raise UserError(f"The network has no layer {layer!r}.{suggest(layer, modules)} Its blocks are: {blocks}.")
        self.outputs: list = []  # copies, since an in-place activation may follow
        modules[layer].register_forward_hook(
            lambda _, inputs, output: self.outputs.append(output.clone() if torch.is_tensor(output) else output)
        )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, part: slice) -> Stream:
        sliced = copy.copy(self)
        sliced.images = self.images[part]
        return sliced

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the maps chunk by chunk."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        for start in range(0, len(self), self.chunk):
            images = np.ascontiguousarray(self.images[start : start + self.chunk])
            self.outputs.clear()
            with torch.no_grad():
                self.model(torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255)
            yield self._maps()

    def _maps(self) -> np.ndarray:
        if len(self.outputs) != 1:
            raise UserError(
                f"Layer {self.layer!r} is called {len(self.outputs)} times in one pass; dissect a layer that is "
                "called once, for instance the block around it."
            )
        maps = self.outputs[0]
        if not torch.is_tensor(maps) or maps.ndim not in (2, 4):
            shape = tuple(maps.shape) if torch.is_tensor(maps) else type(maps).__name__
            raise UserError(f"Layer {self.layer!r} gives {shape}; dissection needs (N, units, h, w) or (N, units).")
        maps = maps.float().cpu().numpy()
        return maps if maps.ndim == 4 else maps[:, :, None, None]


def activations(model: nn.Module, layer: str, images: Sequence, chunk: int = CHUNK) -> np.ndarray:
    """Return the low-resolution maps of a layer, float32 (N, U, h, w), all in memory: see `Stream`."""
    return np.concatenate(list(Stream(model, layer, images, chunk)))


def chunks(acts: np.ndarray | Stream) -> Iterator[np.ndarray]:
    """Iterate over maps in float32 blocks (n, U, h, w), n at most `CHUNK` for an array."""
    if isinstance(acts, np.ndarray):
        return (acts[i : i + CHUNK].astype(np.float32, copy=False) for i in range(0, len(acts), CHUNK))
    return iter(acts)


def last_maps(model: nn.Module, shape: tuple[int, int, int], least: int = 4) -> str:
    """Return the name of the last module that gives maps of at least ``least`` x ``least`` positions.

    On smaller maps a region is a quarter of the image or more. Of modules with the same output the outermost counts.
    That is the last stage of every residual network of the book (``layer4`` of ResNet-50, as in the paper); the chain
    of VGG-16 pools further, and ends three convolutions earlier for images of 32 pixels. ``shape`` is (C, H, W) of an
    image. `UserError` if there is no such module.
    """
    twin, calls = copy.deepcopy(model).eval(), []
    for name, module in twin.named_modules():
        if name:
            module.register_forward_hook(lambda _m, _i, output, name=name: calls.append((name, output)))
    with torch.no_grad():
        twin(torch.zeros(1, *shape, device=next(twin.parameters()).device))
    names = [name for name, _ in calls]
    for name, output in reversed(calls):
        is_maps = isinstance(output, torch.Tensor) and output.ndim == 4 and min(output.shape[2:]) >= least
        if is_maps and names.count(name) == 1:
            return name
    raise UserError(f"No layer gives maps of at least {least}x{least} positions; name one as `layer`.")
