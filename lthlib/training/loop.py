"""The one training loop.

The loop knows masks and a hook that may change them; it does not know which method asked. Its state (weights, BN
statistics, momentum, step) can be saved and taken up again bit for bit: the order and the augmentation of the images
depend only on the seed and the epoch, so a run rewound to epoch k sees from there on what the dense run saw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lthlib.core import machine
from lthlib.core.errors import UserError
from lthlib.data import Images, OnDemand
from lthlib.networks.inputs import as_input
from lthlib.pruning.masks import Masks, weights_of
from lthlib.pruning.registry import Dynamics
from lthlib.training.recipe import Recipe


@dataclass
class State:
    """Everything training needs to go on: bit for bit, given recipe, data and seed.

    Attributes:
        model: The network's state dict (weights and BN statistics).
        momentum: SGD's momentum by parameter name; empty before the first step.
        epoch: Epochs done.
    """

    model: dict[str, torch.Tensor]
    momentum: dict[str, torch.Tensor]
    epoch: int

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, epoch: int = 0) -> State:
        """Copy the state of a network and its optimizer to the CPU."""

        def copied(tensors: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
            there = {name: tensor.detach().cpu() for name, tensor in tensors.items() if tensor is not None}
            return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in there.items()}

        steps = optimizer.state if optimizer is not None else {}
        momentum = {name: steps.get(p, {}).get("momentum_buffer") for name, p in model.named_parameters()}
        return cls(copied(model.state_dict()), copied(momentum), epoch)


def train(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    *,
    seed: int,
    state: State | None = None,
    until: int | None = None,
    masks: Masks | None = None,
    dynamics: Dynamics | None = None,
) -> tuple[State, list[dict[str, float]]]:
    """Train a network in place.

    Args:
        model: The network.
        images: Training images.
        recipe: How.
        seed: Of the order and augmentation of the images.
        state: Where to go on from; by default the network as it is, at epoch 0.
        until: Stop after this epoch; by default the recipe's last.
        masks: Weights to keep. The others and their momentum are set to zero, and their gradients before each step, so
            that they stay exactly zero.
        dynamics: A method's hook that changes masks on the way.

    Returns:
        The state at the end, and for each epoch {"epoch", "loss", "accuracy"} over its training batches.

    Raises:
        UserError: Where the loss stops being finite.
    """
    device = machine.device()
    layout = _layout(model, device)
    model.to(device=device, memory_format=layout).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    start, end = 0 if state is None else state.epoch, recipe.epochs if until is None else until
    if state is not None:
        _resume(model, optimizer, state)
    gates = _gates(model, masks)
    for parameter, gate in gates:  # the state may be that of the dense run
        for tensor in (parameter.data, optimizer.state.get(parameter, {}).get("momentum_buffer")):
            if tensor is not None:
                tensor.mul_(gate)
    stream = _Batches(images, recipe, seed, device)
    is_low = machine.resolve_precision(recipe.precision) == torch.bfloat16
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_low)
    history = []
    scales = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d) and recipe.bn_l1 > 0]
    for epoch in range(start, end):
        total, correct = torch.zeros((), device=device), torch.zeros((), device=device)
        for i, (x, y) in enumerate(stream.epoch(epoch)):
            step = epoch * stream.steps + i
            optimizer.param_groups[0]["lr"] = recipe.learning_rate(step, stream.steps)
            with autocast:
                logits = model(x if layout == torch.channels_last else x.clone(memory_format=layout))
            loss = F.cross_entropy(logits.float(), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            total += loss.detach()
            correct += (logits.detach().argmax(1) == y).sum()
            for scale in scales:
                scale.grad.add_(scale.detach().sign(), alpha=recipe.bn_l1)
            if dynamics is not None:
                skip = dynamics.update(step, model, masks, optimizer)
                gates = _gates(model, masks)
                if skip:
                    continue
            if gates:
                torch._foreach_mul_([parameter.grad for parameter, _ in gates], [gate for _, gate in gates])
            optimizer.step()
        if not torch.isfinite(total):
            raise UserError(
                f"The training loss is not finite in epoch {epoch}: lower the learning rate (lr {recipe.lr}) or raise "
                f"warmup ({recipe.warmup})."
            )
        n = stream.steps
        history.append({"epoch": epoch, "loss": total.item() / n, "accuracy": correct.item() / (n * recipe.batch_size)})
    return State.of(model, optimizer, end), history


def _layout(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Return channels_last, which is faster, unless a gradient would be written past the end of a buffer.

    On CPUs oneDNN does so in that layout, for strided 1x1 convolutions with fewer input channels than a register holds
    numbers (its issue 6035): the process dies, or goes on with wrong weights. Pruned channels leave such layers.
    """
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    few = any(max(m.kernel_size) == 1 < max(m.stride) and m.in_channels < 16 * m.groups for m in convolutions)
    return torch.contiguous_format if few and device.type == "cpu" else torch.channels_last


def _resume(model: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    model.load_state_dict(state.model)
    for name, parameter in model.named_parameters():
        if name in state.momentum:
            buffer = torch.empty_like(parameter)  # of the parameter's memory format
            optimizer.state[parameter]["momentum_buffer"] = buffer.copy_(state.momentum[name])


def _gates(model: nn.Module, masks: Masks | None) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Pair each masked parameter with its mask in the parameter's own type and memory layout."""
    return [(w, torch.empty_like(w).copy_(masks[name])) for name, w in weights_of(model, masks or {}).items()]


class _Batches:
    """Seeded, augmented batches from uint8 images, as [0, 1] floats in channels_last layout."""

    def __init__(self, images: Images, recipe: Recipe, seed: int, device: torch.device):
        self.recipe, self.seed, self.device = recipe, seed, device
        self.steps = recipe.steps_per_epoch(len(images))
        self.pixels, self.labels = images.pixels, images.labels
        if device.type == "cuda" and not isinstance(self.pixels, OnDemand):
            self.pixels, self.labels = self.pixels.to(device), self.labels.to(device)

    def epoch(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(mix(self.seed, epoch))
        order = torch.randperm(len(self.labels), generator=generator).to(self.labels.device)
        for index in order.split(self.recipe.batch_size)[: self.steps]:
            pixels = self.pixels[index]
            pixels = pixels if self.recipe.augment == "none" else self._augmented(pixels, generator)
            yield as_input(pixels.to(self.device)), self.labels[index].to(self.device)

    def _augmented(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Pad, and crop (and mirror) each image at its own offset with one gather."""
        n, size, device = len(pixels), pixels.shape[1], pixels.device
        margin, span = max(1, size // 8), torch.arange(size)
        down, right = torch.randint(2 * margin + 1, (2, n, 1), generator=generator)
        columns = span.expand(n, -1)
        if self.recipe.augment == "crop-flip":
            mirrored = torch.rand(n, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, size - 1 - columns, columns)
        rows, columns = (span + down).to(device), (columns + right).to(device)
        padded = F.pad(pixels, (0, 0, *[margin] * 4))
        return padded[torch.arange(n, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]


def mix(*numbers: int) -> int:
    """Return one 63-bit seed for several small integers, so that nearby ones give unrelated streams.

    >>> mix(0, 1) == mix(1, 0)
    False
    """
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
