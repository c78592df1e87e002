"""Tickets: a frozen description of one trained network, whose hash is its folder in the store.

``obtain(Ticket(method="lth", round=9), store)`` loads the network, or trains it and whatever it stands on: the dense
run of the same seed, the rewind point on it, the rounds before. Each of those is trained once and shared by all.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from lthlib import data, networks
from lthlib.core import machine as compute
from lthlib.core.errors import UserError, choose
from lthlib.core.store import Store, say
from lthlib.core.versions import code_version
from lthlib.pruning import METHODS, Found, Method, Moment, masks
from lthlib.pruning.masks import Masks
from lthlib.pruning.structured import shrink
from lthlib.training.loop import State, as_input, mix, train
from lthlib.training.recipe import Recipe, recipe_from


@dataclass(frozen=True)
class Ticket:
    """The description of one network.

    A field at its default leaves the identity as it was before the field existed, so that a new one does not orphan
    the tickets of old.

    Attributes:
        data: Name of a data set (`lthlib.data.load`).
        arch: Name of an architecture (`lthlib.networks.networks.ARCHITECTURES`).
        method: Name of a sparsification method (`lthlib.pruning.METHODS`).
        round: n on the ladder of sparsities 1 - 0.8^n; 0 is dense.
        seed: Of the initial weights, the order of the images and whatever the method draws.
        recipe: How it is trained.
        rewind_epoch: Epoch of the dense run to whose state a rewinding method returns (k); 0 is initialisation.
        train_size: Number of training images, None for all.
        options: The method's options that differ from its defaults, as (name, value) pairs.
    """

    data: str = "mnist5k"
    arch: str = "resnet8"
    method: str = "dense"
    round: int = 0
    seed: int = 0
    recipe: Recipe = field(default_factory=Recipe)
    rewind_epoch: int = 1
    train_size: int | None = None
    options: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        data.check_name(self.data)  # the data may be elsewhere: recorded results need only its name
        choose(self.arch, networks.ARCHITECTURES, "architecture")
        choose(self.method, METHODS, "method")
        for name in ("round", "seed", "rewind_epoch"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise UserError(f"{name} is {value!r}; it must be a whole number from 0 on.")
        if (self.method == "dense") != (self.round == 0):
            raise UserError(
                f"Round {self.round} does not go with the method {self.method!r}: round 0 is the dense network, and "
                "every other method starts at round 1."
            )
        if self.rewind_epoch > self.recipe.epochs:
            raise UserError(f"rewind_epoch is {self.rewind_epoch}; training has {self.recipe.epochs} epochs.")
        object.__setattr__(self, "options", self._checked_options())

    def _checked_options(self) -> tuple[tuple[str, object], ...]:
        """Return the options off their defaults, by name; a whole number where any may stand becomes a float."""
        method, given = METHODS[self.method], dict(self.options)
        method.check_options(given)
        typed = {name: type(method.options[name])(given[name]) for name in sorted(given)}
        return tuple((name, value) for name, value in typed.items() if value != method.options[name])

    @property
    def sparsity(self) -> float:
        """The ladder's sparsity, 1 - 0.8^round; the exact fraction is in the trained ticket."""
        return masks.sparsity_of(self.round)

    @property
    def dense(self) -> Ticket:
        """The dense parent: same data, network, seed and recipe."""
        return self._relative("dense", 0)

    @property
    def source(self) -> Ticket | None:
        """The finished ticket at whose weights and masks the method looks; None for initial weights."""
        method = METHODS[self.method]
        kind = method.source
        if kind == "init":
            return None
        if kind == "dense" or (kind == "previous" and self.round == 1):
            options = {**method.options, **dict(self.options)}
            settings = {name: options[name] for name in method.source_recipe}
            return replace(self.dense, recipe=replace(self.recipe, **settings))
        return self._relative(self.method, self.round - 1) if kind == "previous" else self._relative(kind, self.round)

    def _relative(self, method: str, round: int) -> Ticket:
        options = self.options if method == self.method else ()
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("method", "round", "options")}
        return Ticket(method=method, round=round, options=options, **rest)

    def describe(self) -> dict[str, object]:
        """Return the fields that make the identity: those off their default and of consequence."""
        standard = asdict(Ticket())
        mine = asdict(self)
        mine["recipe"] = {k: v for k, v in mine["recipe"].items() if v != standard["recipe"][k]}
        if METHODS[self.method].start != "rewind":
            del mine["rewind_epoch"]
        always = ("data", "arch", "method", "round", "seed")
        return {k: v for k, v in mine.items() if k in always or (v != standard[k] and v not in ({}, ()))}

    @property
    def id(self) -> str:
        """A readable name that ends in the hash of the description; the folder of the ticket in the store."""
        digest = hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:12]
        name = self.data.replace("@", "+").lower()
        return f"{name}-{self.arch}-{self.method}-r{self.round:02d}-s{self.seed}-{digest}"


TICKET_ID = re.compile(r".+-r\d+-s\d+-[0-9a-f]{12}")
"""What every `Ticket.id` looks like."""


@dataclass(frozen=True)
class Trained:
    """A finished ticket.

    Attributes:
        ticket: Its description.
        model: The network with trained weights, on the CPU, in evaluation mode.
        masks: Its masks, or None where nothing is masked (dense, structured, small dense).
        info: What is known of it: counts, sparsity, cost, history, provenance (``ticket.json``).
        version: Identifies the code and data it was made from.
    """

    ticket: Ticket
    model: nn.Module
    masks: Masks | None
    info: Mapping
    version: str


def obtain(ticket: Ticket, store: Store, progress: Callable[[Ticket, int], None] | None = None) -> Trained:
    """Load a ticket, training it (and first what it stands on) where the store does not hold it.

    Args:
        ticket: Which.
        store: Where tickets are kept.
        progress: Called with the ticket in training and its epochs done.
    """
    images = data.load(ticket.data, store, ticket.train_size)
    folder, version = _folder(ticket, images, store, progress)
    info = json.loads((folder / "ticket.json").read_text())
    model = new_model(ticket, images, channels=info["channels"])
    model.load_state_dict(safetensors.torch.load_file(folder / "weights.safetensors"))
    mask_file = folder / "masks.safetensors"
    found = masks.load(mask_file) if mask_file.exists() else None
    return Trained(ticket, model.eval(), found, info, version)


def facts(ticket: Ticket, store: Store) -> Mapping:
    """Return what is known of a ticket (``ticket.json``) without loading its network; train it where it is absent."""
    folder, _ = _folder(ticket, data.load(ticket.data, store, ticket.train_size), store, None)
    return json.loads((folder / "ticket.json").read_text())


def _folder(
    ticket: Ticket, images: data.DataSet, store: Store, progress: Callable[[Ticket, int], None] | None
) -> tuple[Path, str]:
    """Return a ticket's folder, whole and verified, and its version."""
    version = version_of(ticket, images)
    make = lambda empty: _make(ticket, images, store, empty, progress)
    return store.get(f"tickets/{ticket.id}", version, make), version


def version_of(ticket: Ticket, images: data.DataSet) -> str:
    """Return a hash of the code and data that a ticket depends on, its sources included."""
    method = METHODS[ticket.method]
    parts = [
        images.digest,
        code_version(
            _make,
            new_model,
            train,
            networks.ARCHITECTURES[ticket.arch].build,
            method.find,
            *([method.during] if method.during else []),
        ),
    ]
    if ticket.source is not None:
        parts.append(version_of(ticket.source, images))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


def new_model(
    ticket: Ticket, images: data.DataSet, *, seed: int | None = None, channels: Mapping[str, int] | None = None
) -> nn.Module:
    """Build the ticket's network with the initial weights of its seed (or of another)."""
    return networks.build(
        ticket.arch,
        in_channels=images.channels,
        num_classes=len(images.classes),
        image_size=images.size,
        mean=images.mean,
        std=images.std,
        channels=channels,
        seed=ticket.seed if seed is None else seed,
    )


def training_batch(images: data.Images, seed: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return ``batch(n)`` -> n training images in a seeded order; ``batch(per_class=k)`` -> k a class, class by class.

    Images come as [0, 1] floats (n, C, H, W), contiguous, un-augmented, with their labels; the same call gives the same
    images.
    """

    def batch(n: int | None = None, *, per_class: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(mix(seed, 7))
        order = torch.randperm(len(images), generator=generator)
        if per_class is None:
            index = order[:n]
        else:
            labels = images.labels[order]
            index = torch.cat([order[labels == c][:per_class] for c in labels.unique()])
        # Of one channel, images are contiguous in both layouts; with the strides of channels_last, batch normalisation
        # would sum its statistics in single precision, four digits worse and in as many parts as there are threads.
        pixels = as_input(images.pixels[index]).clone(memory_format=torch.contiguous_format)
        return pixels, images.labels[index]

    return batch


def _make(
    ticket: Ticket, images: data.DataSet, store: Store, folder: Path, progress: Callable[[Ticket, int], None] | None
) -> None:
    method = METHODS[ticket.method]
    source = obtain(ticket.source, store, progress) if ticket.source is not None else None
    began = time.perf_counter()
    found = _find(ticket, method, source, images)
    mask_seconds = time.perf_counter() - began
    model, state = _start(ticket, method, found, images, store)
    dynamics, n_keep = None, None
    if method.during is not None:
        steps = ticket.recipe.epochs * ticket.recipe.steps_per_epoch(len(images.train))
        options = {**method.options, **dict(ticket.options)}
        n_keep = masks.kept(sum(mask.numel() for mask in found.masks.values()), ticket.round)
        dynamics = method.during(options, steps, n_keep, ticket.seed)
    began = time.perf_counter()
    end, history = train(
        model,
        images.train,
        ticket.recipe,
        seed=ticket.seed,
        state=state,
        masks=found.masks,
        dynamics=dynamics,
        progress=None if progress is None else lambda epoch: progress(ticket, epoch),
    )
    train_seconds = time.perf_counter() - began
    if n_keep is not None and masks.n_kept(found.masks) != n_keep:
        raise ValueError(f"{method.name} ended with {masks.n_kept(found.masks)} weights, not {n_keep}")
    trainings = (ticket.recipe.epochs - state.epoch) / ticket.recipe.epochs
    if source is not None:
        trainings += source.info["cost"]["trainings"]
    weights = {name: value.contiguous() for name, value in end.model.items()}
    checkpoint = safetensors.torch.save(weights)
    (folder / "weights.safetensors").write_bytes(checkpoint)
    if found.masks is not None:
        masks.save(found.masks, folder / "masks.safetensors")
    info = {
        "id": ticket.id,
        "ticket": asdict(ticket),
        "channels": dict(model.spec.channels) if model.spec.channels else None,
        **_counts(ticket, model, found.masks, images),
        "cost": {
            "trainings": trainings,
            "mask_seconds": mask_seconds,
            "train_seconds": train_seconds,
            "bytes": len(checkpoint),
            "bytes_compressed": len(masks.pack(weights, found.masks or {})),
        },
        "history": history,
        "provenance": compute.provenance(ticket.recipe.precision),
    }
    (folder / "ticket.json").write_text(json.dumps(info, indent=1))


def _find(ticket: Ticket, method: Method, source: Trained | None, images: data.DataSet) -> Found:
    """Let the method choose, on a private copy of the weights at the moment it asks for."""
    if ticket.round == 0:
        return Found()
    model = new_model(ticket, images) if source is None else source.model
    reference = masks.prunable(new_model(ticket, images))
    n_weights = sum(weight.numel() for weight in reference.values())
    seen = source.masks if source is not None and source.masks is not None else masks.dense(model)
    moment = Moment(
        model=model,
        masks=seen,
        n_keep=masks.kept(n_weights, ticket.round),
        round=ticket.round,
        seed=ticket.seed,
        batch=training_batch(images.train, ticket.seed),
        options={**method.options, **dict(ticket.options)},
    )
    with compute.one_thread():  # sums in parts would make the mask depend on how many threads there are
        found = method.run(moment)
    if found.masks is not None:
        dead = [name for name, mask in found.masks.items() if not mask.any()]
        if dead:
            say(
                f"note: {ticket.id} has no weight left in {', '.join(dead)} (layer collapse): it is trained all the "
                "same; a lower sparsity, or a method with a share for each layer (rp-layerwise, rp-erk), avoids it"
            )
    return found


def _start(ticket: Ticket, method: Method, found: Found, images: data.DataSet, store: Store) -> tuple[nn.Module, State]:
    """Return the network and the state from which its training sets out: initial, re-drawn or rewound."""
    seed = mix(ticket.seed, 1) % 2**31 if method.start == "reinit" else ticket.seed
    model = new_model(ticket, images, seed=seed, channels=found.channels)
    state = State.of(model)
    if method.start == "rewind" and ticket.rewind_epoch > 0:
        state = _rewind_point(ticket, images, store)
        model.load_state_dict(state.model)
    if found.kept_channels is not None:
        model, state = _shrunk(model, state, found.kept_channels)
    if found.masks is not None:
        masks.apply_(model, found.masks)
        state.model.update(State.of(model).model)
    return model, state


def _shrunk(model: nn.Module, state: State, kept: Mapping[str, torch.Tensor]) -> tuple[nn.Module, State]:
    """Cut a network and its state to the kept channels; momentum has the weights' shapes and is cut like them."""
    small = shrink(model, kept)
    momentum = {}
    if state.momentum:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(state.momentum[name])
        momentum = {name: p.detach().clone() for name, p in shrink(model, kept).named_parameters()}
    return small, State(State.of(small).model, momentum, state.epoch)


def _rewind_point(ticket: Ticket, images: data.DataSet, store: Store) -> State:
    """Return the dense run's state after ``rewind_epoch`` epochs, trained once and shared by all methods."""
    dense, epoch = ticket.dense, ticket.rewind_epoch

    def make(folder: Path) -> None:
        model = new_model(dense, images)
        state, _ = train(model, images.train, dense.recipe, seed=dense.seed, until=epoch)
        parts = {"model": state.model, "momentum": state.momentum}
        tensors = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
        (folder / "state.safetensors").write_bytes(safetensors.torch.save(tensors))

    folder = store.get(f"rewind-points/{dense.id}-e{epoch}", version_of(dense, images), make)
    tensors = safetensors.torch.load_file(folder / "state.safetensors")
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "momentum": {}}
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = value
    return State(parts["model"], parts["momentum"], epoch)


def _counts(ticket: Ticket, model: nn.Module, found: Masks | None, images: data.DataSet) -> dict[str, object]:
    """Count weights and multiply-accumulates, of the network and of its dense parent."""
    parent = new_model(ticket, images)
    full = {name: weight.numel() for name, weight in masks.prunable(parent).items()}
    left = {
        name: weight.numel() if found is None else int(found[name].count_nonzero())
        for name, weight in masks.prunable(model).items()
    }
    n_parent, n_kept = sum(full.values()), sum(left.values())
    by_layer = networks.macs(model, images.shape)
    alive = masks.sparse_macs(model, images.shape, found or {})
    return {
        "n_prunable": n_parent,
        "n_kept": n_kept,
        "sparsity": 1 - n_kept / n_parent,
        "n_parameters": sum(p.numel() for p in model.parameters())
        - (sum((~mask).sum().item() for mask in found.values()) if found is not None else 0),
        "macs": round(alive),
        "macs_dense_kernel": sum(by_layer.values()),
        "macs_parent": sum(networks.macs(parent, images.shape).values()),
        "density_by_layer": {name: left[name] / n for name, n in full.items()},
    }


def ticket_from(description: Mapping) -> Ticket:
    """Build a ticket from a mapping such as ``ticket.json`` holds under "ticket"."""
    fields_ = dict(description)
    fields_["recipe"] = recipe_from(fields_.get("recipe", {}))
    fields_["options"] = tuple((name, value) for name, value in fields_.get("options", ()))
    return Ticket(**fields_)
