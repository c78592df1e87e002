"""Networks of your own: does a pruned network keep what its dense parent has?

    python -m lthlib check GRID DENSE PRUNED [PRUNED ...]

The grid says on which images, with which architecture and by which measurements; the files hold weights, as
safetensors or as a PyTorch state dict. Nothing is trained, and no code in a file is run.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import safetensors.torch
import torch
from torch import Tensor, nn

from lthlib import data
from lthlib.book.grid import Grid, read_grid
from lthlib.core.errors import UserError, suggest
from lthlib.core.store import Store, write_atomically
from lthlib.metrics import METRICS
from lthlib.pruning import masks
from lthlib.results import verdict
from lthlib.results.evaluate import COLUMNS, DIMENSIONS, measured, table_of
from lthlib.tickets.predictions import Subject
from lthlib.tickets.ticket import Trained

DENSE = "dense"
WRAPPINGS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts put the weights beside an optimizer's state and an epoch."""


# --- files -------------------------------------------------------------------------------------------------------


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Read a state dict; weights that `torch.nn.utils.prune` split into weight and mask are put together.

    Args:
        path: ``*.safetensors``, or what `torch.save` wrote; read without running any code in it.

    Raises:
        UserError: For a file that is missing, damaged, holds more than tensors, or no state dict.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}.") from error
    except Exception as error:  # damaged archives end in errors of many libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path} cannot be read as weights ({reason}). Save a state dict: torch.save(model.state_dict(), file)."
        ) from error
    for key in WRAPPINGS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} holds no state dict. Save one: torch.save(model.state_dict(), file).")
    return _joined({_plain_name(k): v for k, v in content.items() if isinstance(v, Tensor)})


def _plain_name(name: str) -> str:
    """Leave out what wrappers such as DataParallel and torch.compile put in front."""
    for prefix in ("module.", "_orig_mod."):
        name = name.removeprefix(prefix)
    return name


def _joined(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in weights.items():
        if name.endswith("_orig"):
            plain = name.removesuffix("_orig")
            found[plain] = value * weights[f"{plain}_mask"] if f"{plain}_mask" in weights else value
        elif not (name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in weights):
            found[name] = value
    return found


def builder(network: str) -> Callable[[], nn.Module]:
    """Return the function that ``package.module:function`` names; it makes your network, without weights.

    The network takes [0, 1] pixels (N, C, H, W), normalises them itself, and returns logits.

    Raises:
        UserError: Where there is no such function, or what it returns is no network.
    """
    module, _, name = network.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"There is no function {network!r} ({error}): name it as package.module:function.") from error
    try:
        made = found()
    except TypeError as error:
        raise UserError(f"{network!r} is no function without arguments ({error}).") from error
    if not isinstance(made, nn.Module):
        raise UserError(f"{network!r} returns a {type(made).__name__}, no network (torch.nn.Module).")
    return found


def load(path: Path | str, build: Callable[[], nn.Module]) -> nn.Module:
    """Make a network and give it the weights of a file.

    Raises:
        UserError: Where they do not fit, naming the layers.
    """
    model, weights = build(), read_weights(path)
    wanted = model.state_dict()
    optional = {name for name in wanted if name.endswith("num_batches_tracked")}
    lacking = [name for name in wanted if name not in weights and name not in optional]
    unknown = [name for name in weights if name not in wanted]
    if lacking or unknown:
        raise UserError(
            f"{path} does not fit the network: {_few('lacks', lacking)}{'; ' if lacking and unknown else ''}"
            f"{_few('has unknown', unknown)}.{suggest(unknown[0], lacking) if unknown and lacking else ''} Is the "
            "architecture the right one? With --network module:function you can name your own."
        )
    for name, value in weights.items():
        if value.shape != wanted[name].shape:
            raise UserError(
                f"{name} in {path} has shape {tuple(value.shape)}, the network's has {tuple(wanted[name].shape)}."
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{name} in {path} holds numbers that are not finite.")
    model.load_state_dict(weights, strict=False)
    return model.eval()


def _few(what: str, names: list[str], limit: int = 3) -> str:
    return (
        f"it {what} {', '.join(names[:limit])}{f' and {len(names) - limit} more' if len(names) > limit else ''}"
        * bool(names)
    )


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
    """A network of your own under examination."""

    def __init__(
        self, label: Label, network: nn.Module, parent: nn.Module | None, store: Store, precision: str = "auto"
    ):
        super().__init__(label, store, precision)
        self.network, self._parent = network, parent

    @cached_property
    def trained(self) -> Trained:
        """The network with the masks that its zeros make; None where no convolution has any."""
        found = {name: weight.detach() != 0 for name, weight in masks.prunable(self.network).items()}
        sparse = any(not mask.all() for mask in found.values())
        return Trained(self.ticket, self.network.cpu().eval(), found if sparse else None, {}, self.ticket.digest)

    @property
    def parent(self) -> nn.Module | None:
        """The dense network it is compared with; None for that one."""
        return self._parent

    @property
    def family(self) -> str:
        """A name that networks of the same layers share."""
        layers = hashlib.sha256(str(self.network).encode()).hexdigest()[:12]
        return f"own-{self.ticket.data.replace('@', '+').lower()}-{layers}"

    def sibling(self, seed: int) -> None:
        """Nothing is known of other seeds."""

    def untrained(self) -> nn.Module:
        """The same network with fresh weights, drawn as its layers draw them."""
        model = copy.deepcopy(self.network)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for module in model.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        return model


def digest(model: nn.Module) -> str:
    """Return a hash of a network's structure and weights."""
    found = hashlib.sha256(str(model).encode())
    for name, value in model.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:12]


def sparsity(model: nn.Module) -> float:
    """Return the fraction of convolution weights that are exactly zero."""
    weights = masks.prunable(model).values()
    return 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def compare(
    dense: nn.Module,
    pruned: Mapping[str, nn.Module],
    images: str,
    store: Store,
    dimensions: Mapping[str, Mapping],
    *,
    precision: str = "auto",
    train_size: int | None = None,
) -> pd.DataFrame:
    """Measure a dense network and pruned ones.

    Args:
        dense: The parent: [0, 1] pixels (N, C, H, W) to logits.
        pruned: By a name of your choice; pruned weights are exactly zero, or channels are gone.
        images: Name of a data set (`lthlib.data.load`).
        store: Where predictions are kept.
        dimensions: Names in `lthlib.results.evaluate.DIMENSIONS`, with parameters where they differ from the defaults.
        precision: Of the forward passes for logits.
        train_size: Number of training images that flatness may draw from, None for all.

    Returns:
        A tidy table as `lthlib.results.verdict.regions` takes it; the pruned networks' rounds are their order by
        sparsity.
    """
    if DENSE in pruned:
        raise UserError(f"A pruned network cannot be named {DENSE!r}: that is its parent's name.")
    _check_output(dense, data.load(images, store))
    order = [DENSE, *sorted(pruned, key=lambda name: sparsity(pruned[name]))]
    parts = []
    for dimension, parameters in dimensions.items():
        settings = DIMENSIONS[dimension].parameters(parameters)
        lines = []
        for rank, name in enumerate(order):
            model, parent = (dense, None) if name == DENSE else (pruned[name], dense)
            label = Label(images, name, rank, digest(model), train_size=train_size)
            values, _ = measured(OwnSubject(label, model, parent, store, precision), dimension, settings)
            lines.append((label, sparsity(model), values))
        parts.append(table_of(lines, dimension))
    return pd.concat(parts, ignore_index=True)


def _check_output(model: nn.Module, images: data.DataSet) -> None:
    try:
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, *images.shape))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"The network cannot take images of {images.name}, {images.shape} (channels, height, width): {error}"
        ) from error
    if logits.shape != (2, len(images.classes)):
        raise UserError(
            f"The network's output for an image has the shape {tuple(logits.shape[1:])}; {images.name} has "
            f"{len(images.classes)} classes, so {len(images.classes)} logits are needed."
        )


# --- the command -------------------------------------------------------------------------------------------------


def check(grid: str, dense: Path, pruned: list[Path], network: str | None = None, rows: Path | None = None) -> int:
    """Print what `compare_files` finds.

    Args:
        grid: A grid file with one study.
        dense: Weights of the dense network.
        pruned: Weights of pruned ones.
        network: ``package.module:function`` that makes them; by default the grid's architecture.
        rows: Where to write the tidy table.

    Returns:
        0 if every pruned network is an LTH-PASS, else 2.
    """
    found, judged = compare_files(read_grid(grid), dense, pruned, network)
    if rows is not None:
        write_atomically(rows, found[list(COLUMNS)].to_csv(index=False))
    names = list(dict.fromkeys(judged["method"]))
    print("\n\n".join(summary(judged, name) for name in names))
    return 0 if verdict.lth_pass(judged)["passed"].all() else 2


def compare_files(
    plan: Grid, dense: Path, pruned: list[Path], network: str | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare networks from files by a grid's images, measurements and thresholds.

    Returns:
        The tidy rows, and what `lthlib.results.verdict.regions` says of them.
    """
    if len(plan.studies) > 1:
        raise UserError(f"{plan.name} has {len(plan.studies)} studies; a grid with one data set and arch is needed.")
    store, (study,) = Store(), plan.studies
    images = data.load(study.data, store, study.train_size)
    build = (
        builder(network)
        if network
        else lambda: networks.build(
            study.arch,
            in_channels=images.channels,
            num_classes=len(images.classes),
            image_size=images.size,
            mean=images.mean,
            std=images.std,
        )
    )
    parent, networks = load(dense, build), {_name(path, pruned): load(path, build) for path in pruned}
    rows = compare(
        parent, networks, study.data, store, plan.dimensions, precision=plan.precision, train_size=study.train_size
    )
    return rows, verdict.regions(rows, len(images.classes), verdict.Thresholds(**plan.thresholds))


def _name(path: Path, others: list[Path]) -> str:
    alike = [other for other in others if Path(other).stem == Path(path).stem]
    return Path(path).stem if len(alike) == 1 else str(path)


def summary(judged: pd.DataFrame, name: str) -> str:
    """Return what is to be said of one pruned network, as text: every metric with a vote, and the verdict."""
    mine = judged[judged["method"] == name]
    votes = mine[mine["metric"].map(lambda metric: METRICS[metric].in_verdict) & (mine["region"] != "")]
    lines = [f"{name}: {100 * mine['sparsity'].iloc[0]:.1f} % of the convolution weights are zero", ""]
    lines.append(f"{'':<44}{'dense':>12}{'pruned':>12}{'worse by':>12}{'allowed':>12}")
    for line in votes.itertuples():
        metric = METRICS[line.metric]
        title = metric.title + ("" if line.shift == "none" else f" ({line.shift})")
        numbers = "".join(f"{value:>12.4g}" for value in (line.dense, line.mean, line.shortfall, line.allowed))
        lines.append(f"{metric.arrow} {title[:41]:<42}{numbers}  {line.region}")
    (passed,) = verdict.lth_pass(mine).itertuples()
    lost = ", ".join(METRICS[metric].title for metric in passed.lost)
    said = "LTH-PASS: it keeps everything that was measured." if passed.passed else f"It does not keep: {lost}."
    return "\n".join([*lines, "", f"{passed.won} of {passed.of} won. {said}"])
