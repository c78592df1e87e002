"""The command ``python -m lthlib check``: networks from files, compared, judged, and reported."""

from __future__ import annotations

import json as jsons
import shlex
import sys
from collections import OrderedDict
from pathlib import Path

from torch import nn

from lthlib import data, networks
from lthlib.book.grid import Grid, grid_from, read_yaml
from lthlib.core.errors import UserError, shown
from lthlib.core.store import Store, write_atomically
from lthlib.networks.checkpoints import builder, load_network
from lthlib.networks.layers import Normalize
from lthlib.own.compare import SIZES, Comparison, compare
from lthlib.own.words import as_json, status, summary
from lthlib.results.collect import COLUMNS

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def check(
    dense: Path,
    pruned: list[Path],
    data: str | None = None,
    network: str | None = None,
    config: Path | None = None,
    prunable: str | None = None,
    normalise: str | None = None,
    rows: Path | None = None,
    json: Path | None = None,
    report: Path | None = None,
) -> int:
    """Print what `compare_files` finds, and write it where ``rows`` (a table), ``json`` and ``report`` (HTML) say.

    Args:
        dense, pruned: Files of weights, or such as hold whole networks.
        data: Name of the images; by default the config's.
        network: What makes the networks, see `lthlib.networks.checkpoints.builder`; by default the config's ``arch``.
        config: A file with keys of a grid: dimensions, thresholds, precision, train_size, data, arch.
        prunable, normalise: See `compare` and `normalisation`.
        rows, json, report: Files to write.

    Returns:
        0 if every pruned network keeps every metric, 2 if one loses some, 3 if one is not shown to keep all.
    """
    for path in (rows, json, report):
        if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
            raise UserError(f"{path} cannot be written: name a file in a folder that exists.")
    plan, arch = read_config(config, data)
    again = shlex.join(["python", "-m", "lthlib", *sys.argv[1:]])
    found = compare_files(plan, dense, pruned, network or arch, prunable, normalise, again)
    print("\n\n".join(summary(found, name) for name in found.pruned))
    if rows is not None:
        write_atomically(rows, found.rows[list(COLUMNS)].to_csv(index=False))
    if json is not None:
        write_atomically(json, jsons.dumps(as_json(found), indent=1) + "\n")
    if report is not None:
        found.report(report)
    return status(found)


def read_config(config: Path | None, images: str | None) -> tuple[Grid, str | None]:
    """Return a plan with one study from a config file and the name of the images, and the config's ``arch``."""
    given = read_yaml(config) if config else {}
    if not isinstance(given, dict):
        raise UserError(f"{config} is no mapping of keys to values.")
    if not (images or given.get("data")):
        raise UserError("Name the images: --data, a folder or zip in $LTHLIB_DATA, or a built-in set such as mnist5k.")
    arch = given.get("arch")
    if arch is not None and not isinstance(arch, str):
        raise UserError(f"arch in {config} is {shown(arch)}; one name is needed.")
    content = {"rounds": [1], "seeds": [0], "precision": "float32", "dimensions": list(SIZES), **given}
    content |= {"data": images or given["data"], "arch": arch if arch in networks.ARCHITECTURES else "resnet8"}
    plan = grid_from(config.stem if config else "check", content)
    if len(plan.studies) > 1:
        raise UserError(f"{config} has {len(plan.studies)} studies; one data set and one arch are needed.")
    return plan, arch


def compare_files(
    plan: Grid,
    dense: Path,
    pruned: list[Path],
    network: str | None = None,
    prunable: str | None = None,
    normalise: str | None = None,
    again: str = "",
) -> Comparison:
    """Compare networks from files by the images, measurements and thresholds of a plan with one study."""
    store, (study,) = Store(), plan.studies
    images = data.load(study.data, store, study.train_size)
    build = builder(network, images.channels, images.size, len(images.classes)) if network else None
    default = "images" if network in networks.ARCHITECTURES else "none"
    mean, std = normalisation(normalise or default, images)
    if normalise or default != "none":
        numbers = "/".join(",".join(f"{number:.4g}" for number in each) for each in (mean, std))
        said = f"by {numbers} ({normalise or default}; --normalise says otherwise)"
    else:
        said = "by the network itself (else say --normalise)"

    def load(path: Path) -> nn.Module:
        model = load_network(path, build)
        if not any(mean) and set(std) == {1.0}:
            return model
        return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), network=model))

    return compare(
        load(dense),
        {_name(path, pruned): load(path) for path in pruned},
        study.data,
        dimensions=plan.dimensions,
        store=store,
        precision=plan.precision,
        train_size=study.train_size,
        prunable=prunable,
        thresholds=plan.thresholds,
        normalised=said,
        again=again,
    )


def normalisation(given: str, images: data.DataSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation by channel, in [0, 1] pixels.

    Args:
        given: ``"images"`` (those of the training images), ``"imagenet"``, ``"none"``, or the numbers as
            ``MEAN,.../STD,...``; one number is for all channels.
        images: The data set.
    """
    nothing = (0.0,) * images.channels, (1.0,) * images.channels
    named = {"images": (images.mean, images.std), "none": nothing, "imagenet": IMAGENET}
    try:
        mean, std = named.get(given) or [tuple(map(float, numbers.split(","))) for numbers in given.split("/")]
        mean, std = (each * images.channels if len(each) == 1 else each for each in (mean, std))
    except ValueError:
        raise UserError(f"--normalise is {given!r}; it must be {', '.join(named)} or MEAN,.../STD,...") from None
    if {len(mean), len(std)} != {images.channels} or min(std) <= 0:
        raise UserError(
            f"--normalise is {given!r}: the images have {images.channels} channels, each needs a mean and a deviation "
            "above 0."
        )
    return mean, std


def _name(path: Path, others: list[Path]) -> str:
    alike = [other for other in others if Path(other).stem == Path(path).stem]
    return Path(path).stem if len(alike) == 1 else str(path)
