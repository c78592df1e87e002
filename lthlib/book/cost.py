"""What a grid will cost before it is run: trainings, images, multiply-accumulates, hours.

The counts follow from the grid alone: every distinct network that its tickets are or stand on, and every shared rewind
point, once. Hours come from a throughput: of this machine, by `probe`, or as somebody gives it for a GPU.

python -m lthlib estimate GRID [--throughput MACS_PER_SECOND] [--record]
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lthlib import data, networks
from lthlib.book.grid import Grid, read_grid, study_name
from lthlib.core import machine as compute
from lthlib.core.errors import UserError
from lthlib.core.store import ROOT, Store, say, write_atomically
from lthlib.pruning import METHODS
from lthlib.tickets.study import Study
from lthlib.tickets.ticket import Ticket

THROUGHPUT = ROOT / "book" / "results" / "throughput.json"
"""Training throughput by architecture, measured on the machine it names."""

PAPER = ("workflow/grids/paper.yml", "workflow/grids/paper-imagenet.yml")
PASSES = 3  # a training step multiplies about three times what a forward pass does: forward, and back to both factors


@dataclass(frozen=True)
class Images:
    """What of a data set a cost depends on: training images, shape of one (C, H, W), classes."""

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


@dataclass(frozen=True)
class Cost:
    """The training of some networks.

    Attributes:
        study: The study's name.
        method: Whose networks; "dense" includes the rewind points.
        arch: Name of their architecture.
        networks: How many are trained, rewind points aside.
        images: Images seen in training, over all epochs.
        macs: Multiply-accumulates of these images' forward passes and of their gradients, as if all were dense; a
            method that removes channels needs fewer.
    """

    study: str
    method: str
    arch: str
    networks: int
    images: int
    macs: float


def trained(study: Study) -> list[tuple[Ticket, int]]:
    """Return every network that a study trains, once, with the number of epochs; rewind points come as dense ones."""
    runs: dict[tuple[Ticket, int], None] = {}

    def add(ticket: Ticket) -> None:
        rewinds = METHODS[ticket.method].start == "rewind" and ticket.rewind_epoch > 0
        run = ticket, ticket.recipe.epochs - (ticket.rewind_epoch if rewinds else 0)
        if run in runs:
            return
        if ticket.source is not None:
            add(ticket.source)
        if rewinds:
            runs[ticket.dense, ticket.rewind_epoch] = None
        runs[run] = None

    for ticket in study.tickets():
        add(ticket)
    return list(runs)


def cost(grid: Grid) -> list[Cost]:
    """Return what each method of each study costs to train, the dense networks first.

    Raises:
        UserError: A data set is neither here nor in `SIZES`.
    """
    found = []
    for study in grid.studies:
        images = sizes(study)
        per_image = PASSES * macs(study.arch, images)
        per_epoch = study.recipe.steps_per_epoch(images.n) * study.recipe.batch_size
        runs = trained(study)
        for method in dict.fromkeys(ticket.method for ticket, _ in runs):
            epochs = [n for ticket, n in runs if ticket.method == method]
            networks = len({ticket for ticket, _ in runs if ticket.method == method})
            seen = sum(epochs) * per_epoch
            found.append(Cost(study_name(study), method, study.arch, networks, seen, seen * per_image))
    return found


def sizes(study: Study) -> Images:
    """Return the size of a study's training data."""
    if study.data in SIZES:
        known = SIZES[study.data]
        return Images(min(known.n, study.train_size or known.n), known.shape, known.classes)
    try:
        found = data.load(study.data, Store(), study.train_size)
    except UserError as error:
        raise UserError(
            f"What training on {study.data} costs is known for {', '.join(SIZES)} and for data that is here. {error}"
        ) from error
    return Images(len(found.train), found.shape, len(found.classes))


@functools.cache
def macs(arch: str, images: Images) -> int:
    """Return the multiply-accumulates of one image's forward pass through the dense network."""
    return sum(networks.macs(_build(arch, images), images.shape).values())


def _build(arch: str, images: Images) -> torch.nn.Module:
    channels, size, _ = images.shape
    return networks.build(
        arch,
        in_channels=channels,
        num_classes=images.classes,
        image_size=size,
        mean=[0.5] * channels,
        std=[0.25] * channels,
        seed=0,
    )


def probe(arch: str, images: Images, batch_size: int, seconds: float = 5.0) -> float:
    """Measure the multiply-accumulates a second of training on one core, or on the GPU where there is one.

    On a core it is the core's own time that counts: what else the machine does is not held against it.

    Args:
        arch: Name of an architecture.
        images: Their shape and number of classes.
        batch_size: Images a step; fewer where a step of so many takes longer than ``seconds``.
        seconds: How long to measure, after a first step.
    """
    device = compute.device()
    with compute.one_thread():
        model = _build(arch, images).to(device, memory_format=torch.channels_last).train()
        step = _step(model, images, device)
        n = min(8, batch_size)
        step(n)  # compiles and allocates
        while n * 2 <= batch_size and 2 * step(n) < seconds:
            n *= 2
        done, took = 0, 0.0
        while took < seconds:
            took += step(n)
            done += n
    return done * PASSES * macs(arch, images) / took


def _step(model: torch.nn.Module, images: Images, device: torch.device):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    low = compute.resolve_precision("auto") == torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def step(n: int) -> float:
        began = clock()
        x = torch.rand(n, *images.shape, generator=generator).to(device, memory_format=torch.channels_last)
        y = torch.zeros(n, dtype=torch.long, device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
            logits = model(x)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - began

    return step


def key(arch: str, shape: Iterable[int]) -> str:
    """Return the name of a measurement in `THROUGHPUT`: architecture and shape of an image."""
    return f"{arch} {'x'.join(map(str, shape))}"


def measure(grid: Grid, seconds: float = 5.0) -> dict[str, float]:
    """Return the measured throughput of every architecture and image shape of a grid, by `key`."""
    found = {}
    for study in grid.studies:
        images = sizes(study)
        name = key(study.arch, images.shape)
        if name not in found:
            found[name] = probe(study.arch, images, study.recipe.batch_size, seconds)
    return found


def recorded() -> Mapping:
    """Return what `THROUGHPUT` holds: "macs_per_second" by `key`, "provenance"; empty where there is none."""
    return json.loads(THROUGHPUT.read_text()) if THROUGHPUT.exists() else {"macs_per_second": {}, "provenance": {}}


def _record(found: Mapping[str, float]) -> None:
    """Add measured throughputs to `THROUGHPUT`."""
    every = {**recorded()["macs_per_second"], **found}
    content = {"macs_per_second": every, "provenance": {**compute.provenance("auto"), "threads": 1}}
    write_atomically(THROUGHPUT, json.dumps(content, indent=1) + "\n")


def table(grid: Grid, throughput: Mapping[str, float] | float) -> list[dict[str, object]]:
    """Return one line a study: networks, images, multiply-accumulates, and hours at a throughput.

    Args:
        grid: Which.
        throughput: Multiply-accumulates a second, one number or by `key`.
    """
    lines, costs = [], cost(grid)
    for study in grid.studies:
        mine = [line for line in costs if line.study == study_name(study)]
        name = key(study.arch, sizes(study).shape)
        speed = throughput if isinstance(throughput, float) else throughput[name]
        total = sum(line.macs for line in mine)
        lines.append(
            {
                "study": study_name(study),
                "networks": sum(line.networks for line in mine),
                "images": sum(line.images for line in mine),
                "macs": total,
                "macs_per_second": speed,
                "hours": total / speed / 3600,
            }
        )
    return lines


def estimate(grid: str, throughput: float | None = None, record: bool = False) -> None:
    """Print what training a grid costs; measure the throughput here where none is given."""
    plan = read_grid(grid, recorded=True)
    if throughput is not None and not throughput > 0:
        raise UserError(f"throughput is {throughput:g}; it must be a number of multiply-accumulates a second.")
    if throughput is None:
        say("measuring the throughput of this machine, some seconds for each architecture")
        throughput = measure(plan)
        if record:
            _record(throughput)
    unit = "core-hours" if isinstance(throughput, dict) and compute.device().type == "cpu" else "hours"
    lines = table(plan, throughput)
    for line in lines:
        print(
            f"{line['study']:<28} {line['networks']:5} networks  {line['images'] / 1e6:9.1f} M images  "
            f"{line['macs'] / 1e15:10.3f} P multiply-accumulates at {line['macs_per_second'] / 1e9:8.1f} G/s: "
            f"{line['hours']:10.2f} {unit}"
        )
    print(f"{'in all':<28} {sum(line['hours'] for line in lines):.2f} {unit} of training, evaluation not counted")


def chapter_table() -> str:
    """Return the cost of the paper's grid as the book shows it, at the recorded throughput of one core."""
    known = recorded()
    grids = [read_grid(ROOT / name, recorded=True) for name in PAPER]
    wanted = {key(study.arch, sizes(study).shape) for grid in grids for study in grid.studies}
    if not wanted <= set(known["macs_per_second"]):
        return f"No throughput is recorded: `python -m lthlib estimate {PAPER[0]} --record` measures one.\n"
    lines = ["| study | networks | images trained on | multiply-accumulates | core-hours |", "|---|---|---|---|---|"]
    total = 0.0
    for grid in grids:
        for line in table(grid, known["macs_per_second"]):
            total += line["hours"]
            lines.append(
                f"| {line['study']} | {line['networks']} | {line['images'] / 1e9:.1f} billion | "
                f"${line['macs'] / 1e18:.2g} \\cdot 10^{{18}}$ | {_rounded(line['hours'])} |"
            )
    made = known["provenance"]
    where = ", ".join([made["processor"], made["precision"], f"PyTorch {made['torch']}", f"commit {made['commit']}"])
    lines += [
        f"| in all | | | | **{_rounded(total)}** |",
        "",
        f"Training only, by the throughput of one core measured on {made['time'][:10]}: {where}. One core would take "
        f"{_rounded(total / 24 / 365.25)} years.",
    ]
    return "\n".join(lines) + "\n"


def _rounded(hours: float) -> str:
    """Round to two digits: an estimate knows no more."""
    return f"{float(f'{hours:.2g}'):,.0f}"
