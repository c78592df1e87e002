"""A ticket's life: it is in the store, or it is made: source, masks, starting weights, training, each only once.

``obtain(Ticket(method="lth", round=9), store)`` loads the network, or trains it and whatever it stands on: the dense
run of the same seed, the rewind point on it, the rounds before. Each of those is trained once and shared by all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from lthlib import data, networks
from lthlib.core import machine
from lthlib.core.store import Store, say
from lthlib.core.versions import code_version, digest
from lthlib.networks.inputs import as_input
from lthlib.pruning import METHODS, Found, Moment, masks
from lthlib.pruning.masks import Masks
from lthlib.pruning.structured import shrink
from lthlib.tickets.ticket import Ticket
from lthlib.training.loop import State, mix, train


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


def obtain(ticket: Ticket, store: Store) -> Trained:
    """Load a ticket, training it (and first what it stands on) where the store does not hold it."""
    images = data.load(ticket.data, store, ticket.train_size)
    folder = _folder(ticket, images, store)
    info = json.loads((folder / "ticket.json").read_text())
    model = new_model(ticket, images, channels=info["channels"])
    model.load_state_dict(safetensors.torch.load_file(folder / "weights.safetensors"))
    file = folder / "masks.safetensors"
    return Trained(ticket, model.eval(), masks.load(file) if file.exists() else None, info, version_of(ticket, images))


def facts(ticket: Ticket, store: Store) -> Mapping:
    """Return what is known of a ticket (``ticket.json``) without loading its network; train it where it is absent."""
    folder = _folder(ticket, data.load(ticket.data, store, ticket.train_size), store)
    return json.loads((folder / "ticket.json").read_text())


def _folder(ticket: Ticket, images: data.DataSet, store: Store) -> Path:
    """Return a ticket's folder, whole and verified."""
    make = lambda empty: _make(ticket, images, store, empty)
    return store.get(f"tickets/{ticket.id}", version_of(ticket, images), make)


def version_of(ticket: Ticket, images: data.DataSet) -> str:
    """Return a hash of the code and data that a ticket depends on, its sources included."""
    method = METHODS[ticket.method]
    makers = {f.__module__ for f in (networks.ARCHITECTURES[ticket.arch].build, method.find, method.during) if f}
    parts = [images.digest, code_version(__name__, *sorted(makers))]
    return digest(parts + ([version_of(ticket.source, images)] if ticket.source is not None else []))


def new_model(ticket: Ticket, images: data.DataSet, *, channels: Mapping[str, int] | None = None) -> nn.Module:
    """Build the ticket's network with the initial weights of its seed."""
    return networks.build(
        ticket.arch,
        in_channels=images.channels,
        num_classes=len(images.classes),
        image_size=images.size,
        mean=images.mean,
        std=images.std,
        channels=channels,
        seed=ticket.seed,
    )


def training_batch(images: data.Images, seed: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Return ``batch(n)`` -> n training images in a seeded order; ``batch(per_class=k)`` -> k a class, class by class.

    Images come as [0, 1] floats (n, C, H, W), contiguous, un-augmented, with their labels; the same call gives the same
    images.
    """

    def batch(n: int | None = None, *, per_class: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        index = torch.randperm(len(images), generator=torch.Generator().manual_seed(mix(seed, 7)))
        if per_class is not None:
            labels = images.labels[index]
            index = torch.cat([index[labels == c][:per_class] for c in labels.unique()])
        index = index[:n]
        # Of one channel, images are contiguous in both layouts; with the strides of channels_last, batch normalisation
        # would sum its statistics in single precision, four digits worse and in as many parts as there are threads.
        pixels = as_input(images.pixels[index]).clone(memory_format=torch.contiguous_format)
        return pixels, images.labels[index]

    return batch


def _make(ticket: Ticket, images: data.DataSet, store: Store, folder: Path) -> None:
    source = obtain(ticket.source, store) if ticket.source is not None else None
    parent = new_model(ticket, images)
    n_keep = masks.kept(sum(weight.numel() for weight in masks.prunable(parent).values()), ticket.round)
    began = time.perf_counter()
    found = _masks(ticket, source, images, n_keep)
    mask_seconds = time.perf_counter() - began
    model, start = _start(ticket, found, images, store)
    during = METHODS[ticket.method].during
    steps = ticket.recipe.epochs * ticket.recipe.steps_per_epoch(len(images.train))
    began = time.perf_counter()
    end, history = train(
        model,
        images.train,
        replace(ticket.recipe, epochs=ticket.epochs),
        seed=ticket.seed,
        state=start,
        masks=found.masks,
        dynamics=None if during is None else during(ticket.settings, steps, n_keep, ticket.seed),
    )
    if found.masks is not None and masks.n_kept(found.masks) != n_keep:
        raise ValueError(f"{ticket.method} ended with {masks.n_kept(found.masks)} weights, not {n_keep}")
    cost = {
        "trainings": (ticket.epochs - start.epoch) / ticket.recipe.epochs,
        "mask_seconds": mask_seconds,
        "train_seconds": time.perf_counter() - began,
    }
    if source is not None:
        cost["trainings"] += source.info["cost"]["trainings"]
    checkpoint = safetensors.torch.save(end.model)
    cost |= {"bytes": len(checkpoint), "bytes_compressed": len(masks.pack(end.model, found.masks or {}))}
    (folder / "weights.safetensors").write_bytes(checkpoint)
    if found.masks is not None:
        masks.save(found.masks, folder / "masks.safetensors")
    info = {
        "id": ticket.id,
        "ticket": asdict(ticket),
        "channels": dict(model.spec.channels) if model.spec.channels else None,
        **_counts(model, parent, found.masks, images),
        "cost": cost,
        "history": history,
        "provenance": machine.provenance(ticket.recipe.precision),
    }
    (folder / "ticket.json").write_text(json.dumps(info, indent=1))


def _masks(ticket: Ticket, source: Trained | None, images: data.DataSet, n_keep: int) -> Found:
    """Let the method choose, on a private copy of the weights at the moment it asks for."""
    if ticket.round == 0:
        return Found()
    model = new_model(ticket, images) if source is None else source.model
    moment = Moment(
        model=model,
        masks=source.masks if source is not None and source.masks is not None else masks.dense(model),
        n_keep=n_keep,
        round=ticket.round,
        seed=ticket.seed,
        batch=training_batch(images.train, ticket.seed),
        options=ticket.settings,
    )
    with machine.one_thread():  # sums in parts would make the mask depend on how many threads there are
        found = METHODS[ticket.method].run(moment)
    if empty := [name for name, mask in (found.masks or {}).items() if not mask.any()]:
        say(
            f"note: {ticket.id} has no weight left in {', '.join(empty)} (layer collapse): it is trained all the "
            "same; a lower sparsity, or a method with a share for each layer (rp-layerwise, rp-erk), avoids it"
        )
    return found


def _start(ticket: Ticket, found: Found, images: data.DataSet, store: Store) -> tuple[nn.Module, State]:
    """Return the network and the state from which its training sets out: initial, re-drawn or rewound."""
    start = METHODS[ticket.method].start
    drawn = replace(ticket, seed=mix(ticket.seed, 1) % 2**31) if start == "reinit" else ticket
    model = new_model(drawn, images, channels=found.channels)
    state = State.of(model)
    if start == "rewind" and ticket.rewind_epoch > 0:
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
        state, _ = train(new_model(dense, images), images.train, dense.recipe, seed=dense.seed, until=epoch)
        for part in ("model", "momentum"):
            (folder / f"{part}.safetensors").write_bytes(safetensors.torch.save(getattr(state, part)))

    folder = store.get(f"rewind-points/{dense.id}-e{epoch}", version_of(dense, images), make)
    parts = (safetensors.torch.load_file(folder / f"{part}.safetensors") for part in ("model", "momentum"))
    return State(*parts, epoch)


def _counts(model: nn.Module, parent: nn.Module, found: Masks | None, images: data.DataSet) -> dict[str, object]:
    """Count weights and multiply-accumulates, of the network and of its dense parent."""
    full = {name: weight.numel() for name, weight in masks.prunable(parent).items()}
    left = {
        name: weight.numel() if found is None else int(found[name].count_nonzero())
        for name, weight in masks.prunable(model).items()
    }
    n_parent, n_kept = sum(full.values()), sum(left.values())
    n_masked = sum(int((~mask).sum()) for mask in found.values()) if found is not None else 0
    return {
        "n_prunable": n_parent,
        "n_kept": n_kept,
        "sparsity": 1 - n_kept / n_parent,
        "n_parameters": sum(p.numel() for p in model.parameters()) - n_masked,
        "macs": round(masks.sparse_macs(model, images.shape, found or {})),
        "macs_dense_kernel": sum(networks.macs(model, images.shape).values()),
        "macs_parent": sum(networks.macs(parent, images.shape).values()),
        "density_by_layer": {name: left[name] / n for name, n in full.items()},
    }
