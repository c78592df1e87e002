"""Networks of your own: does a pruned network keep what its dense parent has?

    python -m lthlib check GRID DENSE PRUNED [PRUNED ...]

The grid says on which images, with which architecture and by which measurements; the files hold weights, as
safetensors or as a PyTorch state dict. Nothing is trained, and no code in a file is run.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lthlib import data, networks
from lthlib.book.grid import Grid, read_grid
from lthlib.core import machine
from lthlib.core.errors import UserError, choose
from lthlib.core.store import Store, say, write_atomically
from lthlib.data.corrupted import sample
from lthlib.metrics import METRICS
from lthlib.networks.checkpoints import builder, load_network
from lthlib.networks.checks import answers, check_classifier, check_deterministic
from lthlib.networks.inputs import as_input
from lthlib.networks.weights import Used, plain_copy, used_weights
from lthlib.results import verdict
from lthlib.results.collect import COLUMNS, table_of
from lthlib.results.evaluate import DIMENSIONS, measured
from lthlib.tickets.obtain import Trained
from lthlib.tickets.subject import Subject

DENSE = "dense"
PRUNABLE = {"conv": ("conv",), "linear": ("linear",), "all": ("conv", "linear")}
"""Which weights count for the sparsity, by the name that a person gives."""
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# --- measuring ---------------------------------------------------------------------------------------------------


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
        self, label: Label, network: nn.Module, parent: nn.Module | None, store: Store, precision: str = "auto"
    ):
        super().__init__(label, store, precision)
        self.network, self._parent = network, parent

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
        return Trained(self.ticket, self.network, found if sparse else None, {}, self.ticket.digest)

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


def sparsity(used: Used, dense: Used, kind: str = "all") -> float:
    """Return the fraction of a dense network's weights that are zero or gone in another.

    Args:
        used: What `lthlib.networks.weights.used_weights` says of the other.
        dense: The same of the dense one.
        kind: A name in `PRUNABLE`; NaN where the dense network has no such weights.
    """
    left = sum(int(weight.count_nonzero()) for of, weight in used.values() if of in PRUNABLE[kind])
    return 1 - left / (sum(weight.numel() for of, weight in dense.values() if of in PRUNABLE[kind]) or math.nan)


@dataclass(frozen=True)
class Comparison:
    """What a dense network and pruned ones were found to be.

    Attributes:
        rows: The tidy table.
        arrays: Small arrays by the id of the network.
        n_classes: Number of classes.
    """

    rows: pd.DataFrame
    arrays: Mapping[str, Mapping[str, np.ndarray]]
    n_classes: int

    def judged(self, thresholds: verdict.Thresholds | None = None) -> pd.DataFrame:
        """Return what `lthlib.results.verdict.judge` says."""
        return verdict.judge(self.rows, self.arrays, self.n_classes, thresholds)


def compare(
    dense: nn.Module,
    pruned: Mapping[str, nn.Module],
    images: str,
    store: Store,
    dimensions: Mapping[str, Mapping],
    *,
    precision: str = "auto",
    train_size: int | None = None,
    prunable: str | None = None,
) -> Comparison:
    """Measure a dense network and pruned ones, and leave them as they are: mode, device and gradients.

    Args:
        dense: The parent: [0, 1] pixels (N, C, H, W) to logits.
        pruned: By a name of your choice; pruned weights are exactly zero where layers compute with them, or channels
            are gone.
        images: Name of a data set (`lthlib.data.load`).
        store: Where predictions are kept.
        dimensions: Names in `lthlib.results.evaluate.DIMENSIONS`, with parameters where they differ from the defaults.
        precision: Of the forward passes for logits.
        train_size: Number of training images that flatness may draw from, None for all.
        prunable: A name in `PRUNABLE`; by default ``"conv"``, and what else is pruned in one of the networks.

    Returns:
        What was found; the pruned networks' rounds are their order by sparsity.

    Raises:
        UserError: For networks whose answers cannot be trusted (see `lthlib.networks.checks`), naming which.
    """
    if DENSE in pruned:
        raise UserError(f"A pruned network cannot be named {DENSE!r}: that is its parent's name.")
    if prunable is not None:
        choose(prunable, PRUNABLE, "kind of prunable weights")
    like = data.load(images, store, train_size)
    few = few_images(like)
    networks = {name: _examined(name, model, like, few) for name, model in {DENSE: dense, **pruned}.items()}
    used = {name: used_weights(network, few) for name, network in networks.items()}
    prunable = prunable or _pruned_kind(used)
    sparsities = {name: sparsity(found, used[DENSE], prunable) for name, found in used.items()}
    order = [DENSE, *sorted(pruned, key=sparsities.get)]
    subjects = []
    for rank, name in enumerate(order):
        label = Label(images, name, rank, digest(networks[name], few), train_size=train_size)
        subjects.append(OwnSubject(label, networks[name], networks[DENSE] if rank else None, store, precision))
    check_classifier(subjects[0].logits("test", len(like.test)), like.test.labels.numpy(), like.classes)
    parts, kept = [], {subject.ticket.id: {} for subject in subjects}
    for dimension, parameters in dimensions.items():
        settings, found = DIMENSIONS[dimension].parameters(parameters), []
        for subject in subjects:
            values, arrays = measured(subject, dimension, settings)
            found.append((subject.ticket, sparsities[subject.ticket.method], values))
            kept[subject.ticket.id].update(arrays)
        parts.append(table_of(found, dimension))
    return Comparison(pd.concat(parts, ignore_index=True), kept, len(like.classes))


def _examined(name: str, model: nn.Module, images: data.DataSet, few: Tensor) -> nn.Module:
    """Return a plain copy of a network that has one row of logits for the classes of some images."""
    try:
        network = plain_copy(model, few)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    n_logits = answers(network, few).shape[1]
    if n_logits != len(images.classes):
        raise UserError(
            f"{name}: The network's output for an image has the shape {(n_logits,)}; {images.name} has "
            f"{len(images.classes)} classes, so {len(images.classes)} logits are needed."
        )
    return network


def _pruned_kind(used: Mapping[str, Used]) -> str:
    """Return the kinds of weights of which some network lacks more than the dense one; convolutions if none does."""
    dense = used[DENSE]
    more = lambda kind: any(sparsity(found, dense, kind) > sparsity(dense, dense, kind) for found in used.values())
    found = [kind for kind in ("conv", "linear") if more(kind)]
    return "all" if len(found) == 2 else found[0] if found else "conv"


# --- the command -------------------------------------------------------------------------------------------------


def check(
    grid: str,
    dense: Path,
    pruned: list[Path],
    network: str | None = None,
    rows: Path | None = None,
    prunable: str | None = None,
    normalise: str | None = None,
) -> int:
    """Print what `compare_files` finds.

    Args:
        grid: A grid file with one study.
        dense: Weights of the dense network.
        pruned: Weights of pruned ones.
        network: ``package.module:function`` that makes them; by default the grid's architecture.
        rows: Where to write the tidy table.
        prunable: Which weights count for the sparsity, see `compare`.
        normalise: What the grid's architecture does with pixels first, see `normalisation`.

    Returns:
        0 if every pruned network keeps every metric, 2 if one loses some, 3 if one is not shown to keep all.
    """
    found, judged = compare_files(read_grid(grid), dense, pruned, network, prunable, normalise)
    if rows is not None:
        write_atomically(rows, found[list(COLUMNS)].to_csv(index=False))
    print("\n\n".join(summary(judged, name) for name in dict.fromkeys(judged["method"])))
    return _status(judged)


def _status(judged: pd.DataFrame) -> int:
    """Return the exit status that a verdict is worth."""
    outcomes = set(verdict.lth_pass(judged)["outcome"])
    return 2 if outcomes & {verdict.LOST, verdict.COLLAPSED} else 3 if verdict.NOT_SHOWN in outcomes else 0


def compare_files(
    plan: Grid,
    dense: Path,
    pruned: list[Path],
    network: str | None = None,
    prunable: str | None = None,
    normalise: str | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare networks from files by a grid's images, measurements and thresholds.

    Returns:
        The tidy rows, and what `lthlib.results.verdict.judge` says of them.
    """
    if len(plan.studies) > 1:
        raise UserError(f"{plan.name} has {len(plan.studies)} studies; a grid with one data set and arch is needed.")
    if network and normalise:
        raise UserError("--normalise is for the grid's arch; what --network names normalises pixels itself.")
    store, (study,) = Store(), plan.studies
    images = data.load(study.data, store, study.train_size)
    build = builder(network) if network else _registered(study.arch, images, normalise)
    parent = load_network(dense, build)
    networks = {_name(path, pruned): load_network(path, build) for path in pruned}
    found = compare(
        parent,
        networks,
        study.data,
        store,
        plan.dimensions,
        precision=plan.precision,
        train_size=study.train_size,
        prunable=prunable,
    )
    return found.rows, found.judged(verdict.thresholds_from(plan.thresholds))


def _registered(arch: str, images: data.DataSet, normalise: str | None) -> partial:
    """Return what makes a network of the registry, and say what it takes for granted."""
    mean, std = normalisation(normalise, images)
    if normalise is None:
        numbers = "/".join(",".join(f"{number:.4g}" for number in each) for each in (mean, std))
        say(
            f"note: {arch} normalises pixels by the mean and deviation of {images.name}, {numbers}; for networks that "
            "were trained with others say --normalise imagenet, none or MEAN,.../STD,..."
        )
    channels, size = images.channels, images.size
    fixed = {"in_channels": channels, "num_classes": len(images.classes), "image_size": size, "mean": mean, "std": std}
    return partial(networks.build, arch, **fixed)


def normalisation(given: str | None, images: data.DataSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation by channel, in [0, 1] pixels.

    Args:
        given: ``"images"`` (or None: those of the training images), ``"imagenet"``, ``"none"``, or the numbers as
            ``MEAN,.../STD,...``.
        images: The data set.
    """
    nothing = (0.0,) * images.channels, (1.0,) * images.channels
    named = {"images": (images.mean, images.std), "none": nothing, "imagenet": IMAGENET}
    given = given or "images"
    try:
        mean, std = named.get(given) or [tuple(map(float, numbers.split(","))) for numbers in given.split("/")]
    except ValueError:
        raise UserError(f"--normalise is {given!r}; it must be {', '.join(named)} or MEAN,.../STD,...") from None
    return mean, std  # whether they are as many as channels, the network says


def _name(path: Path, others: list[Path]) -> str:
    alike = [other for other in others if Path(other).stem == Path(path).stem]
    return Path(path).stem if len(alike) == 1 else str(path)


def summary(judged: pd.DataFrame, name: str) -> str:
    """Return what is to be said of one pruned network, as text: every metric with a vote, and the verdict."""
    mine = judged[judged["method"] == name]
    votes = mine[mine["metric"].map(lambda metric: METRICS[metric].in_verdict) & (mine["outcome"] != "")]
    lines = [f"{name}: {100 * mine['sparsity'].iloc[0]:.1f} % of the prunable weights are zero or gone", ""]
    lines.append(f"{'':<44}{'dense':>10}{'pruned':>10}{'worse by':>10}{'at most':>10}{'tolerated':>11}")
    open_ = []
    for line in votes.to_dict("records"):
        metric = METRICS[line["metric"]]
        title = metric.title + ("" if line["shift"] == "none" else f" ({line['shift']})")
        numbers = "".join(f"{line[key]:>10.4g}" for key in ("dense", "mean", "shortfall", "most"))
        lines.append(f"{metric.arrow} {title[:41]:<42}{numbers}{line['allowed']:>11.4g}  {line['outcome']}")
        if line["outcome"] == verdict.NOT_SHOWN:
            open_.append(f"  {title}: {verdict.what_would_decide(line)}")
    if open_:
        lines += ["", "What would decide what is not shown:", *open_]
    (passed,) = verdict.lth_pass(mine).itertuples()
    lost = ", ".join(METRICS[metric].title for metric in passed.lost)
    said = {
        verdict.KEPT: "LTH-PASS: it keeps everything that was measured.",
        verdict.NOT_SHOWN: "It loses nothing for certain, and is not shown to keep the rest.",
    }.get(passed.outcome, f"It does not keep: {lost}.")
    scope = next(iter(votes["scope"][votes["scope"] != ""]), "")
    about = f"This is about {scope}." if scope else ""
    return "\n".join([*lines, "", f"{passed.kept} of {passed.of} kept. {said} {about}".rstrip()])
