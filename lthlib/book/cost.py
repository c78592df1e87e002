"""What a grid will cost before it is run: trainings, images, multiply-accumulates, hours.

The counts follow from the grid alone: every distinct network that its tickets are or stand on, and every shared rewind
point, once. Hours come from a throughput: of this machine, by `probe`, or as somebody gives it for a GPU.

python -m lthlib estimate GRID [--throughput MACS_PER_SECOND] [--record]
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd
import torch

from lthlib import data, networks
from lthlib.book import markdown
from lthlib.book.grid import Grid, read_grid, study_name
from lthlib.core import machine
from lthlib.core.errors import UserError
from lthlib.core.store import ROOT, Store, say, seal, write_atomically
from lthlib.results.recorded import recorded_json
from lthlib.tickets.study import Study
from lthlib.tickets.ticket import Ticket
from lthlib.training.loop import Recipe, train

THROUGHPUT = ROOT / "book" / "results" / "throughput.json"
"""Training throughput by architecture, measured on the machine it names."""

PAPER = ("workflow/grids/paper.yml", "workflow/grids/paper-imagenet.yml")
WORK = 2e11  # multiply-accumulates of a measurement, about; some seconds of a core
PASSES = 3  # a training step multiplies about three times what a forward pass does: forward, and back to both factors


class Images(NamedTuple):
    """What of a data set a cost depends on: number of training images, shape of one (C, H, W), number of classes."""

    n: int
    shape: tuple[int, int, int]
    classes: int


SIZES = {
    "mnist5k": Images(4_000, (1, 28, 28), 10),
    "cifar10": Images(45_000, (3, 32, 32), 10),
    "cifar100": Images(45_000, (3, 32, 32), 100),
    "svhn": Images(73_257, (3, 32, 32), 10),
    "imagenet@224": Images(1_281_167, (3, 224, 224), 1000),
}
"""The data sets whose cost is known without having them."""


def trained(study: Study) -> list[tuple[Ticket, int]]:
    """Return every network that a study trains, once, with the number of epochs; rewind points come as dense ones."""
    runs: dict[tuple[Ticket, int], None] = {}
    waiting = study.tickets()
    while waiting:
        ticket = waiting.pop()
        run = ticket, ticket.epochs - ticket.first_epoch
        if run in runs:
            continue
        runs[run] = None
        if ticket.first_epoch:
            runs[ticket.dense, ticket.rewind_epoch] = None
        if ticket.source is not None:
            waiting.append(ticket.source)
    return list(runs)


def sizes(study: Study) -> Images:
    """Return the size of a study's training data."""
    if study.data in SIZES:
        known = SIZES[study.data]
        return Images(min(known.n, study.train_size or known.n), known.shape, known.classes)
    try:
        found = data.load(study.data, Store(), study.train_size)
    except UserError as error:
        known = f"is known for {', '.join(SIZES)} and for data that is here"
        raise UserError(f"What training on {study.data} costs {known}. {error}") from error
    return Images(len(found.train), found.shape, len(found.classes))


@functools.cache
def macs(arch: str, images: Images) -> int:
    """Return the multiply-accumulates of one image's forward pass through the dense network."""
    return sum(networks.macs(_build(arch, images).to("meta"), images.shape).values())  # shapes, no numbers


def _build(arch: str, images: Images) -> torch.nn.Module:
    channels, size, _ = images.shape
    shape = {"in_channels": channels, "num_classes": images.classes, "image_size": size}
    return networks.build(arch, **shape, mean=[0.5] * channels, std=[0.25] * channels, seed=0)


def probe(arch: str, images: Images, batch_size: int) -> float:
    """Measure the multiply-accumulates a second of training on one core, or on the GPU where there is one.

    On a core it is the core's own time that counts: what else the machine does is not held against it.
    """
    n = max(2, int(WORK / (PASSES * macs(arch, images))))
    channels, *size = images.shape
    pixels = torch.randint(256, (n, *size, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noise = data.Images(pixels, torch.arange(n) % images.classes)
    recipe = Recipe(epochs=1, batch_size=min(batch_size, n))
    clock = time.process_time if machine.device().type == "cpu" else time.perf_counter
    with machine.one_thread():
        for part in (noise.subset(torch.arange(recipe.batch_size)), noise):  # the first compiles and allocates
            began = clock()
            train(_build(arch, images), part, recipe, seed=0)
            took = clock() - began
    return recipe.steps_per_epoch(n) * recipe.batch_size * PASSES * macs(arch, images) / took


def kind(study: Study) -> str:
    """Return the name of a measurement in `THROUGHPUT`: architecture and shape of an image."""
    return f"{study.arch} {'x'.join(map(str, sizes(study).shape))}"


def table(grid: Grid, throughput: Mapping[str, float]) -> pd.DataFrame:
    """Return one line a study: networks, images seen in training, multiply-accumulates, hours.

    Multiply-accumulates are those of the images' forward passes and of their gradients, as if all networks were dense;
    a method that removes channels needs fewer. The throughput, multiply-accumulates a second, is given by `kind`.
    """
    lines = []
    for study in grid.studies:
        images, runs = sizes(study), trained(study)
        seen = sum(n for _, n in runs) * study.recipe.steps_per_epoch(images.n) * study.recipe.batch_size
        total = float(seen * PASSES * macs(study.arch, images))
        lines.append((study_name(study), len({ticket for ticket, _ in runs}), seen, total, throughput[kind(study)]))
    found = pd.DataFrame(lines, columns=["study", "networks", "images", "macs", "macs_per_second"])
    return found.assign(hours=found["macs"] / found["macs_per_second"] / 3600)


def estimate(grid: str, throughput: float | None = None, record: bool = False) -> None:
    """Print what training a grid costs; measure the throughput here where none is given, and record it if asked to."""
    plan = read_grid(grid, recorded=True)
    if throughput is not None and not throughput > 0:
        raise UserError(f"throughput is {throughput:g}; it must be a number of multiply-accumulates a second.")
    unit = "hours"
    if throughput is None:
        say("measuring the throughput of this machine, some seconds for each architecture")
        unit = "core-hours" if machine.device().type == "cpu" else unit
    kinds = {kind(study): study for study in plan.studies}
    speeds = {name: throughput or probe(s.arch, sizes(s), s.recipe.batch_size) for name, s in kinds.items()}
    if record and throughput is None:
        every = {**(recorded_json(THROUGHPUT)["macs_per_second"] if THROUGHPUT.exists() else {}), **speeds}
        made = {**machine.provenance("auto"), "threads": 1}
        write_atomically(THROUGHPUT, seal({"macs_per_second": every, "provenance": made}))
    lines = table(plan, speeds)
    for line in lines.itertuples():
        print(
            f"{line.study:<28} {line.networks:5} networks  {line.images / 1e6:9.1f} M images  "
            f"{line.macs / 1e15:10.3f} P multiply-accumulates at {line.macs_per_second / 1e9:8.1f} G/s: "
            f"{line.hours:10.2f} {unit}"
        )
    print(f"{'in all':<28} {lines['hours'].sum():.2f} {unit} of training, evaluation not counted")


def chapter_table() -> str:
    """Return the cost of the paper's grid as the book shows it, at the recorded throughput of one core."""
    known = recorded_json(THROUGHPUT) if THROUGHPUT.exists() else {"macs_per_second": {}}
    grids = [read_grid(ROOT / name, recorded=True) for name in PAPER]
    if not {kind(study) for grid in grids for study in grid.studies} <= set(known["macs_per_second"]):
        return f"No throughput is recorded: `python -m lthlib estimate {PAPER[0]} --record` measures one."
    found = pd.concat([table(grid, known["macs_per_second"]) for grid in grids])
    total = found["hours"].sum()
    lines = [
        {
            "study": line.study,
            "networks": f"{line.networks}",
            "images trained on": f"{line.images / 1e9:.1f} billion",
            "multiply-accumulates": f"${line.macs / 1e18:.2g} \\cdot 10^{{18}}$",
            "core-hours": _rounded(line.hours),
        }
        for line in found.itertuples()
    ]
    lines.append({**dict.fromkeys(lines[0], ""), "study": "in all", "core-hours": f"**{_rounded(total)}**"})
    made = known["provenance"]
    where = ", ".join([made["processor"], made["precision"], f"PyTorch {made['torch']}", f"commit {made['commit']}"])
    return (
        f"{markdown.table(lines)}\n\nTraining only, by the throughput of one core measured on {made['time'][:10]}: "
        f"{where}. One core would take {_rounded(total / 24 / 365.25)} years."
    )


def _rounded(hours: float) -> str:
    """Round to two digits: an estimate knows no more."""
    return f"{float(f'{hours:.2g}'):,.0f}"
