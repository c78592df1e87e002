"""Measure a dense network and pruned ones on the same images, and judge them."""

from __future__ import annotations

import hashlib
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from lthlib import data
from lthlib.core import machine
from lthlib.core.errors import UserError, choose
from lthlib.core.store import Store, say
from lthlib.data.corrupted import sample
from lthlib.metrics import Value
from lthlib.metrics.generalization.classes import disagreement, kept_answers
from lthlib.networks.checks import check_classifier, check_deterministic, check_logits
from lthlib.networks.weights import Used, plain_copy, used_weights
from lthlib.networks.whole import sealed
from lthlib.own.subject import Label, OwnSubject, digest, few_images
from lthlib.pruning import METHODS
from lthlib.results import verdict
from lthlib.results.collect import table_of
from lthlib.results.evaluate import DIMENSIONS, measured

DENSE = "dense"
PRUNABLE = {"conv": ("conv",), "linear": ("linear",), "all": ("conv", "linear")}
"""Which weights count for the sparsity, by the name that a person gives."""
SIZES: dict[str, dict[str, object]] = {
    "generalization": {"n_ood": 1000, "n_corrupted": 100, "n_attack": 200, "n_pgd": 24},
    "calibration": {"n_corrupted": 100, "n_bootstrap": 500},
    "interpretability": {"n_images": 10, "n_masks": 500, "n_expo": 0, "n_concept_images": 250, "draws": 19},
    "flatness": {"n_weights": 32, "n_spectrum": 32, "n_pixels": 100, "n_noise": 40, "n_path": 64, "pairs": 4},
}
"""How much of each dimension is measured where a person does not say: minutes for a ResNet on small images."""
FOREIGN = ("gaussian", "photos")  # out-of-distribution sets for images without a name
FILE = "comparison.npz"
SHOWN = 8  # images in the gallery of what a pruned network lost


def sparsity(used: Used, dense: Used, kind: str = "all") -> float:
    """Return the fraction of a dense network's weights that are zero or gone in another.

    Args:
        used: What `lthlib.networks.weights.used_weights` says of the other.
        dense: The same of the dense one.
        kind: A name in `PRUNABLE`; NaN where the dense network has no such weights, and where none of the other can be
            read.
    """
    if not used:
        return math.nan
    left = sum(int(weight.count_nonzero()) for of, weight in used.values() if of in PRUNABLE[kind])
    return 1 - left / (sum(weight.numel() for of, weight in dense.values() if of in PRUNABLE[kind]) or math.nan)


@dataclass(frozen=True)
class Comparison:
    """What a dense network and pruned ones were found to be.

    Attributes:
        rows: The tidy table.
        arrays: Small arrays by the id of the network.
        n_classes: Number of classes.
        facts: What was assumed, what was not measured and why, the density of each layer, on what machine.
        thresholds: Of the verdict.
    """

    rows: pd.DataFrame
    arrays: Mapping[str, Mapping[str, np.ndarray]]
    n_classes: int
    facts: Mapping[str, object] = field(default_factory=dict)
    thresholds: verdict.Thresholds = field(default_factory=verdict.Thresholds)

    @cached_property
    def judged(self) -> pd.DataFrame:
        """What `lthlib.results.verdict.judge` says."""
        return verdict.judge(self.rows, self.arrays, self.n_classes, self.thresholds)

    @property
    def failed(self) -> list[str]:
        """The dimensions that were asked for and could not be measured: nothing is shown to be kept there."""
        return list(self.facts.get("failed", ()))

    @property
    def networks(self) -> dict[str, str]:
        """Name -> id, dense first, then by sparsity."""
        order = self.rows.sort_values("round", kind="stable").drop_duplicates("method")
        return dict(zip(order["method"], order["ticket"], strict=True))

    @property
    def pruned(self) -> list[str]:
        """The names of the pruned networks, by sparsity."""
        return list(self.networks)[1:]

    def report(self, path: Path | str) -> None:
        """Write one HTML file that shows and explains everything; it loads nothing from anywhere."""
        from lthlib.own.report import write

        write(self, Path(path))

    def save(self, folder: Path) -> None:
        """Put it into an existing folder, from which `read` gives it back: an archive that knows its damage."""
        content = {"rows": self.rows.to_dict("list"), "n_classes": self.n_classes, "facts": self.facts}
        told = json.dumps({**content, "thresholds": asdict(self.thresholds)}).encode()
        arrays = {f"{ticket}/{name}": a for ticket, of in self.arrays.items() for name, a in of.items()}
        np.savez_compressed(folder / FILE, **arrays, found=np.frombuffer(told, np.uint8))

    @classmethod
    def read(cls, folder: Path | str) -> Comparison:
        """Read what `save` wrote; UserError where it is damaged."""
        try:
            with np.load(Path(folder) / FILE) as file:
                kept = dict(file)
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{Path(folder) / FILE} cannot be read ({error}): save the comparison again.") from error
        content = json.loads(kept.pop("found").tobytes())
        rows, limits = pd.DataFrame(content["rows"]), verdict.Thresholds(**content["thresholds"])
        arrays: dict[str, dict[str, np.ndarray]] = {ticket: {} for ticket in rows["ticket"]}
        for key, array in kept.items():
            ticket, _, name = key.partition("/")
            arrays[ticket][name] = array
        return cls(rows, arrays, content["n_classes"], content["facts"], limits)


def compare(
    dense: nn.Module,
    sparse: nn.Module | Mapping[str, nn.Module],
    images: str | Tensor | np.ndarray,
    labels: Sequence[int] | Tensor | np.ndarray | None = None,
    *,
    dimensions: Iterable[str] | Mapping[str, Mapping] = tuple(SIZES),
    classes: Sequence[str] | None = None,
    store: Store | None = None,
    precision: str = "float32",
    train_size: int | None = None,
    prunable: str | None = None,
    thresholds: Mapping[str, float] | None = None,
    normalised: str = "as the networks do themselves",
    again: str = "",
) -> Comparison:
    """Measure a dense network and pruned ones, and leave them as they are: mode, device and gradients.

    Args:
        dense: The parent: [0, 1] pixels (N, C, H, W) to logits.
        sparse: A pruned network, or several by names of your choice; pruned weights are exactly zero where layers
            compute with them, or channels are gone.
        images: Test images, uint8 or [0, 1] floats (N, C, H, W), C 1 or 3; or the name of a data set
            (`lthlib.data.load`), whose training images flatness is then measured on.
        labels: Their classes (N,), numbered as the logits are; None for a named data set.
        dimensions: Names in `lthlib.results.evaluate.DIMENSIONS`, perhaps with parameters; what these do not say is
            taken from `SIZES`.
        classes: Their names, for images in memory.
        store: Where predictions are kept, by default ``$LTHLIB_STORE``.
        precision: Of the forward passes for logits and explanations; bfloat16 (``"auto"``: where that is faster)
            changes the answer to one image in some hundreds.
        train_size: Number of training images that flatness may draw from, None for all.
        prunable: A name in `PRUNABLE`; by default what is pruned in one of the networks, ``"conv"`` if nothing is.
        thresholds: Of the verdict, see `lthlib.results.verdict.Thresholds`.
        normalised: How pixels are normalised, in words, for the report.
        again: How to run it again, for the report.

    Returns:
        What was found; the pruned networks' rounds are their order by sparsity. A dimension that has no meaning for
        one of the networks is left out for all, and ``facts["not_measured"]`` says why.

    Raises:
        UserError: For networks whose answers cannot be trusted (see `lthlib.networks.checks`), naming which.
    """
    pruned = sparse if isinstance(sparse, Mapping) else {"pruned": sparse}
    for name in pruned:
        if name in METHODS and METHODS[name].family == "dense":
            raise UserError(f"A pruned network cannot be named {name!r}: that is the name of a dense one.")
    if prunable is not None:
        choose(prunable, PRUNABLE, "kind of prunable weights")
    limits, settings = verdict.thresholds_from(thresholds or {}), _settings(dimensions)
    store = store or Store()
    if isinstance(images, str):
        like = data.load(images, store, train_size)
    else:
        like = in_memory(images, labels, classes)
        settings = {name: {**s, "ood": s["ood"] or FOREIGN} if "ood" in s else s for name, s in settings.items()}
    few = few_images(like)
    networks = {name: _examined(name, model, like, few) for name, model in {DENSE: dense, **pruned}.items()}
    used = {name: _used(network, few) for name, network in networks.items()}
    prunable = prunable or _pruned_kind(used)
    sparsities = {name: sparsity(found, used[DENSE], prunable) for name, found in used.items()}
    for name, value in sparsities.items():
        if value < sparsities[DENSE]:
            raise UserError(f"{name} has more weights that are not zero than dense: are the two in the right order?")
    order = [DENSE, *sorted(pruned, key=lambda name: (math.isnan(sparsities[name]), sparsities[name]))]
    layers = _density_by_layer(used, order, prunable)
    assumed = _assumed(like, normalised, prunable, layers, sparsities)
    say(assumed)
    subjects = {}
    for rank, name in enumerate(order):
        label = Label(like.name, name, rank, digest(networks[name], few), train_size=train_size)
        subjects[name] = OwnSubject(label, networks[name], networks[DENSE] if rank else None, store, precision, like)
    logits = subjects[DENSE].logits("test", len(like.test))
    check_classifier(logits, like.test.labels.numpy(), like.classes)
    parts, arrays, lacking = _measure(subjects, settings, sparsities)
    if not parts:
        raise UserError(f"Nothing could be measured. {' '.join(lacking.values())}")
    facts = {
        "images": f"{like.name}: {len(like.test):,} test images of {len(like.classes)} classes",
        "assumed": assumed,
        "layers": layers,
        "not_measured": {name: "It was not asked for." for name in DIMENSIONS if name not in settings} | lacking,
        "failed": list(lacking),
        "settings": settings,
        "provenance": machine.provenance(precision),
        "in_memory": not isinstance(images, str),
        "again": again or "lthlib.compare(dense, sparse, images, labels).report('report.html')",
    }
    return Comparison(pd.concat(parts, ignore_index=True), arrays, len(like.classes), facts, limits)


def _settings(dimensions: Iterable[str] | Mapping[str, Mapping]) -> dict[str, dict[str, object]]:
    """Return all parameters of the dimensions that are asked for."""
    given = dimensions if isinstance(dimensions, Mapping) else dict.fromkeys(dimensions)
    for name in given:
        choose(name, DIMENSIONS, "dimension")
    return {name: DIMENSIONS[name].parameters({**SIZES[name], **(given[name] or {})}) for name in given}


def in_memory(images: Tensor | np.ndarray, labels: object, classes: Sequence[str] | None = None) -> data.DataSet:
    """Return images and labels that a person holds as a data set, the images serving as training images as well.

    Raises:
        UserError: For pixels that are not in [0, 1] or uint8, other shapes, and labels that do not fit.
    """
    images = torch.as_tensor(images).detach().cpu()
    labels = torch.as_tensor(labels if labels is not None else []).cpu()
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.shape[2] != images.shape[3]:
        raise UserError(f"images has the shape {tuple(images.shape)}; (N, C, H, H) is needed, C 1 or 3, square.")
    if labels.shape != images.shape[:1] or labels.is_floating_point() or not len(labels) or int(labels.min()) < 0:
        raise UserError(f"labels has the shape {tuple(labels.shape)}; one whole number from 0 on an image is needed.")
    if images.is_floating_point():
        low, high = float(images.min()), float(images.max())
        if not 0 <= low <= high <= 1:
            raise UserError(
                f"images has values from {low:.3g} to {high:.3g}; pixels are uint8 or floats in [0, 1]: leave out the "
                "normalisation, and put it into the network (nn.Sequential with one in front)."
            )
        images = (255 * images.double()).round()
    elif images.dtype != torch.uint8:
        raise UserError(f"images is of {images.dtype}; pixels are uint8, or floats in [0, 1].")
    pixels = images.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    names = tuple(map(str, classes or range(int(labels.max()) + 1)))
    if int(labels.max()) >= len(names):
        raise UserError(f"labels go up to {int(labels.max())}, and classes names {len(names)}.")
    share = pixels.flatten(0, 2).double() / 255
    content = hashlib.sha256(pixels.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:16]
    both = data.Images(pixels, labels.long())
    mean, std = share.mean(0).tolist(), share.std(0).clamp_min(1e-4).tolist()
    return data.DataSet(f"images-{content[:8]}", names, both, None, both, tuple(mean), tuple(std), content)


def _examined(name: str, model: nn.Module, images: data.DataSet, few: Tensor) -> nn.Module:
    """Return a plain copy of a network that has one row of logits for the classes of some images."""
    try:
        network = model.eval() if sealed(model) else plain_copy(model, few)
        n_logits = check_deterministic(network, few)[0][1].shape[1]
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if n_logits != len(images.classes):
        raise UserError(
            f"{name}: The network's output for an image has the shape {(n_logits,)}; {images.name} has "
            f"{len(images.classes)} classes, so {len(images.classes)} logits are needed."
        )
    return network


def _used(network: nn.Module, few: Tensor) -> Used:
    """Return the weights of a network by their names in itself, without those of what is around it."""
    closed = sealed(network)
    found = used_weights(network, few) if closed is None else closed.used
    return {re.sub(r"^(network\.)+", "", name): of for name, of in found.items()}


def _pruned_kind(used: Mapping[str, Used]) -> str:
    """Return the kinds of weights of which some network lacks more than the dense one; convolutions if none does."""
    dense = used[DENSE]
    more = lambda kind: any(sparsity(found, dense, kind) > sparsity(dense, dense, kind) for found in used.values())
    found = [kind for kind in ("conv", "linear") if more(kind)]
    return "all" if len(found) == 2 else found[0] if found else "conv"


def _density_by_layer(used: Mapping[str, Used], order: Sequence[str], kind: str) -> dict[str, dict[str, float]]:
    """Return network -> layer -> the share of the dense layer's weights that are there and not zero.

    Layers of files that hold a whole network have names of their own; they are taken in the order of their use. A
    network whose weights cannot be read has none.
    """
    dense = {layer: weight for layer, (of, weight) in used[DENSE].items() if of in PRUNABLE[kind]}
    found = {}
    for name in order:
        mine = {layer: weight for layer, (of, weight) in used[name].items() if of in PRUNABLE[kind]}
        if not mine.keys() & dense.keys() and len(mine) == len(dense):
            mine = dict(zip(dense, mine.values(), strict=True))
        left = {layer: int(mine[layer].count_nonzero()) if layer in mine else 0 for layer in dense if used[name]}
        found[name] = {layer.removesuffix(".weight"): n / dense[layer].numel() for layer, n in left.items()}
    return found


def _assumed(like: data.DataSet, normalised: str, prunable: str, layers: Mapping, sparsities: Mapping) -> str:
    """Say in one line what is taken for granted."""
    classes = ", ".join(like.classes[:6]) + (", ..." if len(like.classes) > 6 else "")
    what = {"conv": "convolutions", "linear": "linear layers", "all": "convolutions and linear layers"}[prunable]
    shares = "; ".join(
        f"{name}'s weights cannot be read"
        if not of
        else f"{name} keeps {100 * (1 - sparsities[name]):.1f} % ("
        + ", ".join(f"{layer} {100 * share:.0f} %" for layer, share in of.items())
        + ")"
        for name, of in layers.items()
        if name != DENSE
    )
    return (
        f"Assumed: pixels in [0, 1], {' x '.join(map(str, like.shape))}, normalised {normalised}; {len(like.classes)} "
        f"classes in the order {classes}; what counts as pruned are zeros and missing channels in {what}: {shares}."
    )


def _measure(
    subjects: Mapping[str, OwnSubject], settings: Mapping[str, Mapping], sparsities: Mapping[str, float]
) -> tuple[list[pd.DataFrame], dict[str, dict[str, np.ndarray]], dict[str, str]]:
    """Return tables by dimension, arrays by network, and why a dimension could not be measured."""
    n = max((int(s["n_test"]) for s in settings.values() if "n_test" in s), default=10_000)
    arrays, churn = _answered(subjects, n)
    parts, lacking = [], {}
    bar = tqdm(total=len(settings) * len(subjects), unit="step", delay=2, leave=False)
    for dimension, parameters in settings.items():
        found = []
        try:
            for name, subject in subjects.items():
                bar.set_description(f"{dimension} of {name}")
                _check_open(subject.network, dimension)
                with sdpa_kernel(SDPBackend.MATH):  # of attention's kernels, the one that has second derivatives
                    values, kept = measured(subject, dimension, parameters)
                also = churn.get(name, []) if dimension == "generalization" else []
                found.append((subject.ticket, sparsities[name], [*values, *also]))
                arrays[subject.ticket.id].update(kept)
                bar.update()
                machine.give_back_memory()
        except (UserError, RuntimeError) as error:  # PyTorch's: an operation without the derivative that is needed
            said = str(error).strip().splitlines()[0]
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            lacking[dimension] = f"It cannot be measured for {name}: {kind}{said}"
            say(f"note: {dimension} is left out. {lacking[dimension]}")
        else:
            parts.append(table_of(found, dimension))
    bar.close()
    return parts, arrays, lacking


def _check_open(network: nn.Module, dimension: str) -> None:
    """Raise `UserError` where a dimension asks more of a network than its file gives."""
    closed = sealed(network)
    if closed is None or dimension == "calibration" or (dimension == "generalization" and closed.gradients):
        return
    raise UserError(
        f"a network from {closed.kind} gives no {'layers to look into' if closed.gradients else 'gradients'}: save a "
        "state dict, or use torch.export."
    )


def _answered(
    subjects: Mapping[str, OwnSubject], n: int
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, list[Value]]]:
    """Return arrays by network: its answers, and some images that a pruned one lost; and churn by network."""
    like, arrays, churn = subjects[DENSE].data, {}, {}
    at, labels = sample(like.test.labels, n), subjects[DENSE].labels("test", n).numpy()
    names, dense = np.array(like.classes), subjects[DENSE].logits("test", n).argmax(1)
    for name, subject in subjects.items():
        logits = subject.logits("test", n)
        check_logits(logits, name)
        mine = arrays[subject.ticket.id] = kept_answers(logits, labels, like.classes)
        if name != DENSE:
            predicted = logits.argmax(1)
            churn[name] = [Value("churn", disagreement(predicted, dense), len(labels))]
            lost = np.flatnonzero((dense == labels) & (predicted != labels))
            shown = lost[np.unique(np.linspace(0, max(0, len(lost) - 1), SHOWN).astype(int))] if len(lost) else lost
            mine["lost_pixels"] = like.test.pixels[at[torch.from_numpy(shown)]].numpy()
            mine["lost_answers"] = np.stack([names[labels[shown]], names[dense[shown]], names[predicted[shown]]])
            mine["lost_counts"] = np.array([len(lost), int(((dense != labels) & (predicted == labels)).sum()), len(at)])
    return arrays, churn
