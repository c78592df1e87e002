"""A network of your own under examination, where a dimension's ``measure`` function expects a ticket."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lthlib import data
from lthlib.core import machine
from lthlib.core.store import Store
from lthlib.data.corrupted import sample
from lthlib.networks.checks import check_deterministic
from lthlib.networks.inputs import as_input
from lthlib.networks.weights import used_weights
from lthlib.tickets.obtain import Trained
from lthlib.tickets.subject import Subject


@dataclass(frozen=True)
class Label:
    """What names a network of your own in tables; it takes the place of a `lthlib.tickets.ticket.Ticket`."""

    data: str
    method: str
    round: int
    digest: str
    arch: str = "own"
    seed: int = 0
    train_size: int | None = None

    @property
    def id(self) -> str:
        """A readable name that ends in a hash of the weights; predictions are kept under it."""
        return f"own-{self.data.replace('@', '+').lower()}-{self.digest}"


class OwnSubject(Subject):
    """A network of your own under examination, as `lthlib.networks.weights.plain_copy` returns it."""

    def __init__(
        self,
        label: Label,
        network: nn.Module,
        parent: nn.Module | None,
        store: Store,
        precision: str = "float32",
        images: data.DataSet | None = None,
    ):
        super().__init__(label, store, precision)
        self.network, self._parent = network, parent
        if images is not None:  # in memory; else they are those that the label names
            self.data = images

    @cached_property
    def trained(self) -> Trained:
        """The network with the masks that its zeros make: of convolutions, and of linear layers that have any."""
        names = {name for name, _ in self.network.named_parameters()}
        found = {
            name: weight != 0
            for name, (kind, weight) in used_weights(self.network, few_images(self.data)).items()
            if name in names and (kind == "conv" or not weight.all())
        }
        sparse = any(not mask.all() for mask in found.values())
        version = f"{self.ticket.digest}-{self.data.digest}"  # what it answers is about these images
        return Trained(self.ticket, self.network, found if sparse else None, {}, version)

    @property
    def parent(self) -> nn.Module | None:
        """The dense network it is compared with; None for that one."""
        return self._parent

    @property
    def family(self) -> str:
        """A name that networks share which are the same before training, in layers and in answers."""
        fresh = self.untrained()
        return f"own-{self.ticket.data.replace('@', '+').lower()}-{digest(fresh, few_images(self.data))}"

    def sibling(self, seed: int) -> None:
        """Nothing is known of other seeds."""

    def untrained(self) -> nn.Module:
        """The same network with fresh weights, drawn as its layers draw them; where they do not, shuffled ones."""
        model = copy.deepcopy(self.network)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            for module in model.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
            for fresh, trained in zip(model.parameters(), self.network.parameters(), strict=True):
                if torch.equal(fresh, trained):
                    fresh.copy_(fresh.flatten()[torch.randperm(fresh.numel())].view_as(fresh))
        return model


def few_images(images: data.DataSet) -> Tensor:
    """Return four test images as a network takes them, to ask it what it does."""
    return as_input(images.test.subset(sample(images.test.labels, 4)).pixels[:])


def digest(model: nn.Module, images: Tensor) -> str:
    """Return a hash of a network: of its structure, of its weights, and of what it answers.

    A mask, a temperature or a number of bits that is held as a plain attribute, and an edited ``forward``, show in the
    answers alone.
    """
    with machine.one_thread():
        answered = [("answers", logits) for _, logits in check_deterministic(model, images)]
    found = hashlib.sha256(str(model).encode())
    for name, value in [*model.state_dict().items(), *answered]:
        found.update(name.encode())
        is_tensor = isinstance(value, Tensor)
        found.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy() if is_tensor else repr(value).encode())
    return found.hexdigest()[:12]
