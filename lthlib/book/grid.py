"""Grid files: which studies a report runs, in which dimensions, with which parameters.

A grid is a YAML file. `read_grid` accepts the keys of `lthlib.tickets.study.Study` (``data`` and ``arch`` may be
lists: one study each) and those of `Grid`; whatever else it finds is an error that names the key, the value
and what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import yaml

from lthlib import data
from lthlib.core import machine
from lthlib.core.errors import UserError, check_plain, choose, require, shown
from lthlib.results.evaluate import DIMENSIONS
from lthlib.results.verdict import thresholds_from
from lthlib.tickets.study import Study, study_from

STUDY_KEYS = (*(field.name for field in fields(Study)), "sparsities")
KEYS = ("title", *STUDY_KEYS, "dimensions", "precision", "thresholds", "method_pages")
ON_METHODS = "methods"  # the topic of the pages on the tickets themselves
LARGEST = 100_000  # bytes of a grid file


class _Loader(yaml.SafeLoader):
    """Reads plain values, without what surprises in YAML: keys that stand twice, numbers on another base."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if not re.fullmatch(r"[-+]?(0|[1-9][0-9_]*)", node.value):  # 010 would be 8, and 1:30 ninety
            problem = f"{node.value} is no plain whole number; write it in decimal digits, or in quotes if it is text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


@dataclass(frozen=True)
class Grid:
    """What a report runs.

    Attributes:
        name: The file's name without its suffix; the folder of its pages and recorded results.
        title: What a reader sees.
        studies: One for each data set and architecture.
        dimensions: Dimension -> its parameters where they differ from the defaults.
        precision: Of forward passes for logits.
        thresholds: Of the verdict.
        method_pages: Topics (dimensions, and "methods") with a page a method beside the comparison; by default all.
        lacking: Of recorded results, the number of tickets that the grid asks for and that are not shown yet.
    """

    name: str
    title: str
    studies: tuple[Study, ...]
    dimensions: Mapping[str, Mapping[str, object]]
    precision: str
    thresholds: Mapping[str, float]
    method_pages: tuple[str, ...]
    lacking: int = 0

    def study(self, name: str) -> Study:
        """Return the study of a name as `study_name` gives it."""
        by_name = {study_name(study): study for study in self.studies}
        choose(name, by_name, f"study of the grid {self.name}")
        return by_name[name]


def study_name(study: Study) -> str:
    """Return the name of a study within its grid: data set and architecture."""
    return f"{study.data.replace('@', '+').lower()}-{study.arch}"


def read_grid(path: Path | str, *, recorded: bool = False) -> Grid:
    """Read and check a grid file; nothing is trained, loaded or written.

    Where only its recorded results are wanted, its data need not be there.
    """
    path = Path(path)
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", path.stem):
        raise UserError(
            f"The grid file {path} must be named in small letters, digits, - and _: pages are named after it."
        )
    content = read_yaml(path)
    try:
        grid = grid_from(path.stem, content)
        for study in grid.studies if not recorded else ():
            data.source(study.data)
        for name in grid.dimensions.get("generalization", {}).get("ood", ()):
            (data.check_name if recorded else data.check_ood)(name)
        return grid
    except UserError as error:
        raise UserError(f"In {path}: {error}") from error


def read_yaml(path: Path) -> object:
    """Return the content of a YAML file of sane size, or raise a `UserError` that says why it cannot be read."""
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"The grid file {path} is larger than {LARGEST} bytes.")
        return yaml.load(path.read_text(), _Loader)
    except FileNotFoundError as error:
        known = sorted(str(p) for p in Path("workflow/grids").glob("*.yml"))
        raise UserError(f"There is no grid file {path}. There are: {', '.join(known)}.") from error
    except RecursionError:
        raise UserError(f"The grid file {path} cannot be read: it is nested too deep.") from None
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, a date or number that cannot be
        raise UserError(f"The grid file {path} cannot be read: {error}") from error


def grid_from(name: str, content: object) -> Grid:
    """Build a grid from the content of its file; see `read_grid`."""
    if not isinstance(content, dict):
        raise UserError(f"A grid is a mapping with the keys {', '.join(KEYS)}; this is {shown(content)}.")
    check_plain(content, "the grid")
    for key in content:
        choose(key, KEYS, "grid key")
    for key in ("data", "arch", "rounds" if "sparsities" not in content else "sparsities", "seeds", "dimensions"):
        if key not in content:
            raise UserError(f"The key {key!r} is missing; a grid needs data, arch, rounds, seeds and dimensions.")
    shared = {key: content[key] for key in STUDY_KEYS if key in content and key not in ("data", "arch")}
    studies = tuple(
        study_from({**shared, "data": data, "arch": arch})
        for data in _names(content["data"], "data")
        for arch in _names(content["arch"], "arch")
    )
    if len({study_name(study) for study in studies}) < len(studies):
        twice = f"data is {shown(content['data'])} and arch is {shown(content['arch'])}"
        raise UserError(f"{twice}; neither must name one of them twice.")
    title, precision = content.get("title", name), content.get("precision", "auto")
    is_line = isinstance(title, str) and title.strip() and title.isprintable()
    require(is_line, "title", title, "be one line of text")
    choose(precision, machine.PRECISIONS, "precision")
    dimensions = _dimensions(content["dimensions"])
    thresholds = content.get("thresholds") or {}
    thresholds_from(thresholds)
    method_pages = _method_pages(content.get("method_pages"), dimensions)
    return Grid(name, title, studies, dimensions, precision, thresholds, method_pages)


def _method_pages(value: object, dimensions: Mapping[str, object]) -> tuple[str, ...]:
    topics = (*dimensions, ON_METHODS)
    if value is None:
        return topics
    require(isinstance(value, list), "method_pages", value, f"be a list of some of {', '.join(topics)}")
    for name in value:
        choose(name, topics, "topic under method_pages")
    return tuple(value)


def _names(value: object, key: str) -> list[str]:
    names = value if isinstance(value, list) else [value]
    are_names = names and all(isinstance(name, str) for name in names)
    require(are_names, key, value, "be a name or a list of names")
    return names


def _dimensions(value: object) -> dict[str, dict[str, object]]:
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        value = dict.fromkeys(value)
    is_mapping = isinstance(value, dict) and value
    require(is_mapping, "dimensions", value, f"map some of {', '.join(DIMENSIONS)} to their parameters")
    for name, parameters in value.items():
        choose(name, DIMENSIONS, "dimension")
        is_known = isinstance(parameters, dict | None)
        require(is_known, f"dimensions: {name}", parameters, "be a mapping of parameters, or empty")
        DIMENSIONS[name].parameters(parameters)
    return {name: dict(parameters or {}) for name, parameters in value.items()}
