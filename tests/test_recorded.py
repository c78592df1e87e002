"""Recorded results: what is written is what is read, to the bit, in little space; older records stay readable."""

import gzip
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd

from lthlib.book import front, make, pages, plan
from lthlib.core.store import MANIFEST, ROOT, Store, sha256
from lthlib.metrics import Value
from lthlib.metrics.resampling import held
from lthlib.results.evaluate import Evaluation
from lthlib.results.recorded import RESULTS, read_records, write_records
from lthlib.tickets.ticket import Ticket


def evaluations(n):
    draw = np.random.default_rng(0)
    for seed in range(n):
        arrays = {
            "same": draw.normal(size=5).astype(np.float32),
            "shape": np.arange(seed % 3),
            "kind": np.array(seed, np.int64 if seed % 2 else np.float16),
            "text": np.array(["a", "b" * seed]),
            **({"some have it": draw.random((2, 2)) < 0.5} if seed else {}),
        }
        yield Evaluation(Ticket(seed=seed), {"facts": seed}, [Value("ece", 0.1 * seed, 9)], arrays, {"torch": "2"})


def test_what_is_written_is_read_to_the_bit(tmp_path):
    every = list(evaluations(7))
    write_records(tmp_path / "grid", {"calibration": [("calibration-0", e) for e in every]}, {})
    records = read_records(tmp_path)
    assert len(records) == 7
    for wanted in every:
        found = records[wanted.ticket.id, "calibration-0"].evaluation(wanted.ticket)
        assert (found.values, found.info, found.provenance) == (wanted.values, wanted.info, wanted.provenance)
        assert found.arrays.keys() == wanted.arrays.keys()
        for key, array in wanted.arrays.items():
            assert (found.arrays[key].dtype, found.arrays[key].shape) == (array.dtype, array.shape)
            assert (found.arrays[key] == array).all()


def test_recorded_anew_under_the_same_name_the_new_is_read(tmp_path):
    for n in (2, 3):
        every = list(evaluations(n))[::-1]
        write_records(tmp_path / "grid", {"calibration": [("q", e) for e in every]}, {})
        for e in every:
            read = read_records(tmp_path)[e.ticket.id, "q"].evaluation(e.ticket)
            assert (read.arrays["same"] == e.arrays["same"]).all()


def test_records_from_before_there_were_stacks_are_read(tmp_path):
    (e,) = evaluations(1)
    folder = tmp_path / "grid"
    folder.mkdir()
    np.savez_compressed(
        folder / "calibration.npz", **{f"{e.ticket.id}/{key}": array for key, array in e.arrays.items()}
    )
    entry = {"ticket": e.ticket.id, "question": "q", "info": {}, "values": [], "arrays": [*e.arrays], "provenance": {}}
    (folder / "calibration.json.gz").write_bytes(gzip.compress(json.dumps([entry]).encode()))
    files = {p.name: [p.stat().st_size, sha256(p)] for p in folder.iterdir()}
    (folder / MANIFEST).write_text(json.dumps({"files": files}))
    assert (read_records(tmp_path)[e.ticket.id, "q"].evaluation(e.ticket).arrays["same"] == e.arrays["same"]).all()


def test_every_record_of_the_repository_can_be_read_whole():
    for (name, _), record in read_records(ROOT / RESULTS).items():
        found = record.evaluation(_Named(name))
        assert found.arrays.keys() == set(record.entry["arrays"])


class _Named:
    def __init__(self, id):
        self.id = id


def test_the_front_reads_what_there_is_and_judges_accuracy_by_the_replicates_of_its_rows():
    (grid,) = [of for of in plan.recorded_grids("none") if of.name == "long-dense"]
    (study,) = grid.studies
    evidence = front._evidence(grid, study, front._recorded(grid, study))
    lines = evidence.rows[evidence.rows["metric"] == "test_accuracy"]
    assert lines["ticket"].is_unique
    for line in lines.itertuples():
        assert held(evidence.replicates[line.ticket], "test_accuracy", "none", 0)[0] == line.n
    longer = replace(study, seeds=(*study.seeds, 77))  # somebody has edited the grid's file since
    assert {name: len(of) for name, of in front._recorded(grid, longer).items()} == {
        name: len(of) for name, of in front._recorded(grid, study).items()
    }
    twice = front._told_apart([(grid, study, evidence), (replace(grid, name="mine"), study, evidence)])
    assert [e.label for _, _, e in twice] == [f"{grid.title} (long-dense)", f"{grid.title} (mine)"]


def test_a_page_names_every_machine_and_commit_behind_its_numbers():
    made = {
        (r.entry["provenance"]["processor"], r.entry["provenance"]["commit"])
        for r in read_records(plan.ROOT / RESULTS).values()
        if r.folder.name == "cifar10-study" and r.entry["question"].startswith("calibration")
    }
    (grid,) = [of for of in plan.recorded_grids("none") if of.name == "cifar10-study"]
    study, every = grid.studies[0], front._recorded(grid, grid.studies[0])["calibration"]
    line = pages.summary_line(
        SimpleNamespace(study=study, results=SimpleNamespace(provenance=[e.provenance for e in every]))
    )
    assert len(made) > 1
    assert all(line.data.count(f"{processor}, commit `{commit}`") == 1 for processor, commit in made)
    alone = SimpleNamespace(study=study, results=SimpleNamespace(provenance=[every[0].provenance] * 3))
    assert line.data.count("commit") == len(made) > pages.summary_line(alone).data.count("commit") == 1


def test_a_ticket_that_was_stopped_between_two_dimensions_is_not_shown(monkeypatch):
    def shown() -> plan.Grid:
        return next(of for of in plan.recorded_grids.__wrapped__("none") if of.name == "cifar10-study")

    whole, records = shown(), read_records(plan.ROOT / RESULTS)
    stopped = next(t.id for t in whole.studies[0].tickets() if t.method == "rigl")
    last = max(name for ticket, name in records if ticket == stopped)
    monkeypatch.setattr(plan, "read_records", lambda _: {k: r for k, r in records.items() if k != (stopped, last)})
    assert set(whole.studies[0].methods) - set(shown().studies[0].methods) == {"rigl"}
    assert shown().lacking == whole.lacking + 5


def test_a_grid_recorded_in_pieces_keeps_what_another_machine_has_computed(tmp_path, monkeypatch):
    """Each piece on a machine of its own: the second has neither the tickets nor the evaluations of the first."""
    monkeypatch.setattr(make, "ROOT", tmp_path)
    grid = tmp_path / "pieces.yml"
    text = (
        "{data: mnist5k, arch: resnet8, methods: [rp, omp], rounds: [5], seeds: SEEDS, train_size: 200, "
        "recipe: {epochs: 1, batch_size: 50, warmup: 0}, dimensions: {calibration: {n_test: 100, n_corrupted: 10}}}"
    )
    recorded = {}
    for piece in ("[0]", "[0, 1]"):
        monkeypatch.setenv("LTHLIB_STORE", str(tmp_path / f"store-{piece}"))
        grid.write_text(text.replace("SEEDS", piece))
        make.record(str(grid))
        recorded[piece] = {
            ticket: (r.entry["values"], r.entry["provenance"])
            for (ticket, _), r in read_records(tmp_path / RESULTS).items()
        }
    assert len(recorded["[0]"]) == 3
    assert len(recorded["[0, 1]"]) == 6
    assert recorded["[0]"].items() <= recorded["[0, 1]"].items()
    trained = {p.name.split("-s")[1][0] for p in (tmp_path / "store-[0, 1]" / "tickets").iterdir()}
    assert trained == {"1"}
    shared = pd.read_csv(tmp_path / RESULTS / "pieces" / "overlaps.csv")
    assert len(shared) == shared["first"].nunique() == 2
    monkeypatch.setenv("LTHLIB_STORE", str(tmp_path / "store-snip"))  # a third machine, which has one method alone
    grid.write_text(text.replace("SEEDS", "[0, 1]").replace("[rp, omp]", "[omp, rp, snip]"))
    (study,) = make.read_grid(str(grid)).studies
    make.record(str(grid), so_far=True)  # it has nothing yet, and trains nothing
    assert {ticket for ticket, _ in read_records(tmp_path / RESULTS)} == set(recorded["[0, 1]"])
    make.tickets(str(grid), "mnist5k-resnet8", "snip", 0)
    make.record(str(grid), so_far=True)
    held = {ticket for ticket, _ in read_records(tmp_path / RESULTS)}
    assert (len(held), len(pd.read_csv(tmp_path / RESULTS / "pieces" / "overlaps.csv"))) == (7, 4)
    shown = {
        "all of seed 0": plan._so_far(study, held),
        "two methods": plan._so_far(study, recorded["[0, 1]"]),
        "nothing whole": plan._so_far(study, recorded["[0]"].keys() - {study.tickets()[0].id}),
    }
    assert (shown["all of seed 0"].methods, shown["all of seed 0"].seeds) == (("omp", "rp", "snip"), (0,))
    assert (shown["two methods"].methods, shown["two methods"].seeds) == (("omp", "rp"), (0, 1))
    assert shown["nothing whole"] == study
    make.record(str(grid))
    again = pd.read_csv(tmp_path / RESULTS / "pieces" / "overlaps.csv")
    assert again[:2].equals(shared)
    assert (len(again), again[2:]["jaccard"].isna().sum(), again[2:]["chance"].isna().sum()) == (6, 4, 4)
    known = {"recorded": tmp_path / RESULTS, "compute_missing": False}
    told = make.overlaps.compare(study, Store(tmp_path / "nothing"), **known)
    of_snip = (told["a"] == "snip") | (told["b"] == "snip")
    assert told["jaccard"].isna().equals(of_snip)
