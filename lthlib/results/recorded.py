"""Recorded results: ``book/results/<grid>/``, small, in git, read where they answer a page's question.

A folder holds for each dimension ``<dimension>.json.gz`` (numbers, facts, provenance) and ``<dimension>.npz`` (arrays),
tables beside them, and a manifest with the size and SHA-256 of each file. Arrays of one name and shape lie in one
stack, which takes a third of the space of as many single ones. Records cannot be made again as the store's artifacts
can, so damage is an error that says how to get them back.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from lthlib.core.errors import UserError
from lthlib.core.store import MANIFEST, ROOT, check_files, sha256, unseal, write_atomically
from lthlib.metrics import Value
from lthlib.results.evaluate import Evaluation
from lthlib.tickets.ticket import Ticket

RESULTS = "book/results"
LATENCY = ROOT / RESULTS / "latency.json"  # of a machine, not of a grid
RATIOS = ROOT / RESULTS / "ratios.json"  # by benchmarks/ratios.py


@dataclass(frozen=True)
class Record:
    """One evaluation among recorded results: where its numbers lie, read when asked for."""

    folder: Path
    entry: Mapping
    arrays_file: str

    def evaluation(self, ticket: Ticket) -> Evaluation:
        """Read the evaluation."""
        path, names = self.folder / self.arrays_file, self.entry["arrays"]
        if isinstance(names, Mapping):
            stacks = _stacks(path, path.stat().st_mtime_ns)
            arrays = {key: np.array(stacks[stack][row]) for key, (stack, row) in names.items()}
        else:  # recorded before there were stacks
            with np.load(path) as file:
                arrays = {key: file[f"{ticket.id}/{key}"] for key in names}
        values = [Value(**value) for value in self.entry["values"]]
        return Evaluation(ticket, self.entry["info"], values, arrays, self.entry["provenance"])


@lru_cache(maxsize=4)
def _stacks(path: Path, changed: int) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def read_records(root: Path | str) -> dict[tuple[str, str], Record]:
    """Index all recorded evaluations below a folder by (ticket id, question); UserError where a file is damaged."""
    found = {}
    for folder in sorted(Path(root).glob("[!.]*/")):
        found |= _index(folder, tuple(check_records(folder)), sha256(folder / MANIFEST))
    return found


@lru_cache(maxsize=32)
def _index(folder: Path, files: Sequence[str], digest: str) -> dict[tuple[str, str], Record]:
    """Index one folder, once for each content of its files: whoever forks pages has done so before."""
    found = {}
    for name in (name for name in files if name.endswith(".json.gz")):
        for entry in json.loads(gzip.decompress((folder / name).read_bytes())):
            found[entry["ticket"], entry["question"]] = Record(folder, entry, name.replace(".json.gz", ".npz"))
    return found


def check_records(folder: Path) -> list[str]:
    """Verify the recorded results of one grid, and return the names of their files; UserError says what is damaged."""
    try:
        try:
            files = json.loads((folder / MANIFEST).read_bytes())["files"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{MANIFEST} cannot be read") from None
        check_files(folder, files)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        of_file = isinstance(error, OSError) and error.filename
        damage = f"{Path(error.filename).name}: {error.strerror}" if of_file else error
        raise _damaged(folder, damage) from error
    return list(files)


def write_records(
    folder: Path, evaluations: Mapping[str, Sequence[tuple[str, Evaluation]]], tables: Mapping[str, pd.DataFrame]
) -> None:
    """Record evaluations, by dimension pairs of a question's name and its evaluation, and tables by file name."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for dimension, pairs in evaluations.items():
        stacks: dict[tuple, list[np.ndarray]] = {}
        entries = [
            {
                "ticket": e.ticket.id,
                "question": name,
                "info": {k: v for k, v in e.info.items() if k != "history"},
                "values": [asdict(v) for v in e.values],
                "arrays": {key: _stacked(stacks, key, e.arrays[key]) for key in sorted(e.arrays)},
                "provenance": e.provenance,
            }
            for name, e in pairs
        ]
        packed = gzip.compress(json.dumps(entries).encode(), mtime=0)  # the same bytes for the same results
        write_atomically(folder / f"{dimension}.json.gz", packed)
        np.savez_compressed(folder / f"{dimension}.npz", **{str(n): np.stack(s) for n, s in enumerate(stacks.values())})
        files += [f"{dimension}.json.gz", f"{dimension}.npz"]
    for name, table in tables.items():
        write_atomically(folder / name, table.to_csv(index=False))
        files.append(name)
    sizes = {name: [(folder / name).stat().st_size, sha256(folder / name)] for name in files}
    write_atomically(folder / MANIFEST, json.dumps({"files": sizes}, indent=1) + "\n")


def _stacked(stacks: dict[tuple, list[np.ndarray]], key: str, array: np.ndarray) -> tuple[str, int]:
    """Put an array on the stack of its name, kind and shape; return the stack's name and the array's place there."""
    kind = key, array.dtype.str, array.shape
    stacks.setdefault(kind, []).append(array)
    return str([*stacks].index(kind)), len(stacks[kind]) - 1


def recorded_json(path: Path) -> Mapping:
    """Read a recorded file that `lthlib.core.store.seal` wrote; UserError where it is damaged."""
    try:
        return unseal(path)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, what: object) -> UserError:
    name = path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path
    return UserError(
        f"The recorded results in {name} are damaged ({what}): restore them with `git checkout -- {name}`, or record "
        "them again."
    )
