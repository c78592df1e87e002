"""The page on the methods: overlaps recorded and read, leads, densities, costs; its place among the pages."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lthlib.book import front, methods_page
from lthlib.book.grid import ON_METHODS, grid_from
from lthlib.book.pages import Page
from lthlib.book.plan import COMPARISON, pages
from lthlib.core.errors import UserError
from lthlib.figures import colours
from lthlib.figures import methods as drawing
from lthlib.pruning import METHODS, masks
from lthlib.results import overlaps, verdict
from lthlib.results.claims_parts import Evidence
from lthlib.results.collect import collect
from lthlib.results.recorded import read_records, write_records
from lthlib.tickets.obtain import obtain
from lthlib.tickets.study import Study
from lthlib.training.recipe import Recipe

BOOK = Path(__file__).parents[1] / "book"
STUDY = Study(
    data="mnist5k",
    arch="resnet8",
    methods=("lth", "snip", "filter-l1", "small-dense", "lth-shuffled"),
    rounds=(1, 2),
    seeds=(0, 1),
    recipe=Recipe(epochs=2, batch_size=50, warmup=0.0, precision="float32"),
    train_size=300,
)


@pytest.fixture(scope="module")
def page(store):
    results = collect(STUDY, "calibration", store, parameters={"n_test": 100, "n_corrupted": 1, "n_bootstrap": 2})
    judged = verdict.judge(results.rows, results.arrays, 10)
    return Page(STUDY, results, judged, verdict.Thresholds(), store, None, True)


def test_overlaps_are_those_of_the_stored_masks_of_one_round_and_seed(page, store):
    found = overlaps.compare(STUDY, store)
    assert {frozenset(p) for p in zip(found["a"], found["b"], strict=True)} == {
        frozenset(p) for p in [("lth", "snip"), ("lth", "lth-shuffled"), ("snip", "lth-shuffled")]
    }  # structured and small dense networks have no mask
    assert len(found) == 3 * len(STUDY.rounds) * len(STUDY.seeds)
    by_id = {ticket.id: ticket for ticket in STUDY.tickets()}
    for line in found.itertuples():
        first, second = by_id[line.first], by_id[line.second]
        assert (first.round, first.seed) == (second.round, second.seed) == (line.round, line.seed)
        a, b = (
            np.concatenate([m.flatten().numpy() for _, m in sorted(obtain(t, store).masks.items())])
            for t in (first, second)
        )
        assert line.jaccard == (a & b).sum() / (a | b).sum()
    shuffled = found[(found["a"] == "lth") & (found["b"] == "lth-shuffled")]
    assert shuffled["jaccard"].to_numpy() == pytest.approx(shuffled["chance"].to_numpy(), abs=0.01)


def test_recorded_overlaps_answer_without_any_mask(page, store, tmp_path):
    from lthlib.core.store import Store

    found = overlaps.compare(STUDY, store)
    write_records(tmp_path / "results" / "some", {}, {overlaps.FILE: found[list(overlaps.COLUMNS)]})
    read_records(tmp_path / "results")
    nothing = Store(tmp_path / "empty")
    again = overlaps.compare(STUDY, nothing, recorded=tmp_path / "results", compute_missing=False)
    pd.testing.assert_frame_equal(again, found, check_exact=True)
    turned = Study(**{**vars(STUDY), "methods": STUDY.methods[::-1]})
    assert len(overlaps.compare(turned, nothing, recorded=tmp_path / "results", compute_missing=False)) == len(found)
    with pytest.raises(UserError, match="record the grid again"):
        overlaps.compare(STUDY, nothing, recorded=tmp_path / "other", compute_missing=False)
    (tmp_path / "results/some" / overlaps.FILE).write_text("first,second,jaccard,chance\n")
    with pytest.raises(UserError, match="damaged"):
        read_records(tmp_path / "results")


def test_densities_are_those_of_the_masks(page, store):
    found = methods_page.densities(page)
    assert "dense" not in found.index.get_level_values("method")
    tickets = [t for t in STUDY.tickets() if (t.method, t.round) == ("snip", 2)]
    by_layer = [masks.density_by_layer(obtain(t, store).masks) for t in tickets]
    for layer, density in found.loc["snip", 2].items():
        assert density == pytest.approx(np.mean([d[layer] for d in by_layer]))
    pd.testing.assert_series_equal(found.loc["lth", 2], found.loc["lth-shuffled", 2], check_names=False)


def accuracy(page, method, round, seed):
    rows = page.results.rows
    which = (rows["method"] == method) & (rows["round"] == round) & (rows["seed"] == seed)
    return rows.loc[which & (rows["metric"] == "test_accuracy") & (rows["shift"] == "none"), "value"].item()


def test_leads_are_taken_seed_by_seed(page):
    found = methods_page.leads(page, [("lth", "small-dense"), ("lth", "lth-shuffled")])
    assert len(found) == 4
    for line in found.itertuples():
        gaps = [
            100 * (accuracy(page, line.first, line.round, s) - accuracy(page, line.second, line.round, s))
            for s in (0, 1)
        ]
        assert line.mean == pytest.approx(np.mean(gaps))
        assert (line.low, line.high) == (pytest.approx(min(gaps)), pytest.approx(max(gaps)))


def test_the_page_looks_at_what_it_holds(page):
    assert methods_page.settle(page, None, None) == (None, 2)
    assert methods_page.settle(page, "snip", 1) == ("snip", 1)
    with pytest.raises(UserError, match="Did you mean 'lth'"):
        methods_page.settle(page, "lht", None)
    with pytest.raises(UserError, match="round of this page"):
        methods_page.settle(page, None, 3)
    one = type(page)(**{**vars(page), "study": Study(methods=("rp",), rounds=(1, 4, 8))})
    assert methods_page.settle(one, None, None) == ("rp", 4)


def test_costs_are_means_over_seeds(page):
    found = methods_page.costs(page).set_index(["method", "round"])
    assert len(found) == 1 + 5 * 2
    assert found.loc[("lth", 2), "accuracy"] == pytest.approx(np.mean([accuracy(page, "lth", 2, s) for s in (0, 1)]))
    assert found.loc[("lth", 2), "macs_dense_kernel"] == found.loc[("dense", 0), "macs"]
    assert found.loc[("filter-l1", 2), "macs_dense_kernel"] < found.loc[("dense", 0), "macs"]


def test_tables_say_what_there_is_and_what_is_missing(page):
    controls = methods_page.control_table(page).data
    assert METHODS["lth-shuffled"].title in controls
    assert METHODS["lth-reinit"].title not in controls
    small = methods_page.lead_table(page, ["small-dense", "slimming"]).data
    assert small.count("Small dense") == 3  # LTH, SNIP and filter L1 beside it; controls have their own table
    assert methods_page.lead_table(page, ["small-dense"], about="snip").data.count("Small dense") == 1
    assert "`slimming`" in methods_page.lead_table(page, ["slimming"]).data


def test_latencies_stand_beside_those_of_the_dense_network(tmp_path, monkeypatch):
    monkeypatch.setattr(methods_page, "LATENCY", tmp_path / "latency.json")
    shown = []
    monkeypatch.setattr(methods_page, "show", lambda *items: shown.extend(items))
    methods_page.latency()
    assert "benchmarks/latency.py" in shown[0].data
    networks = {  # multiply-accumulates, and milliseconds for one image and for 64
        "dense": (20, 4.0, 10.0),
        "unstructured mask": (5, 5.0, 30.0),
        "channels removed, equal parameters": (2, 1.0, 2.0),
        "channels removed, equal MACs": (5, 2.0, 6.0),
    }
    rows = [
        {"network": name, "batch": batch, "threads": 1, "parameters": 10, "macs": macs, "milliseconds": ms}
        for name, (macs, *times) in networks.items()
        for batch, ms in zip((1, 64), times, strict=True)
    ]
    made = {"processor": "a machine", "commit": "abc", "torch": "2"}
    content = {"title": "Any", "repeats": 3, "provenance": made, "rows": rows}
    monkeypatch.setattr(methods_page, "recorded_json", lambda path: content)
    methods_page.LATENCY.touch()
    shown.clear()
    methods_page.latency()
    table, source, reading = (item.data for item in shown)
    assert re.findall(r"<td>([\d.]+ \([\d.]+\))</td>", table) == [
        "4.00 (1.00)",
        "10.00 (1.00)",
        "5.00 (1.25)",
        "30.00 (3.00)",
        "1.00 (0.25)",
        "2.00 (0.20)",
        "2.00 (0.50)",
        "6.00 (0.60)",
    ]
    assert "on a machine" in source
    assert "mask leaves 25 % of the MACs in 125 to 300 % of the time" in reading
    assert "10 % of the MACs in 20 to 25 % of the time; at equal MACs, 25 % of the MACs in 50 to 60 %" in reading


def test_empty_layers_are_named(page):
    assert "No ticket" in methods_page.empty_layers(page).data
    tickets = page.results.tickets.copy()
    hit = tickets.index[(tickets["method"] == "snip") & (tickets["round"] == 2)][0]
    tickets.at[hit, "density_by_layer"] = {**tickets.at[hit, "density_by_layer"], "conv1.weight": 0.0}
    results = type(page.results)(**{**vars(page.results), "tickets": tickets})
    said = methods_page.empty_layers(type(page)(**{**vars(page), "results": results})).data
    assert "SNIP at 36.0 %" in said
    assert "`conv1.weight`" in said


def test_the_overlap_map_has_measured_below_and_chance_above():
    lines = pd.DataFrame({"a": ["lth", "lth"], "b": ["snip", "snip"], "jaccard": [0.5, 0.7], "chance": [0.1, 0.3]})
    axis = drawing.overlap_map(lines).axes[0]
    numbers = {(round(t.get_position()[0] - 0.5), round(t.get_position()[1] - 0.5)): t.get_text() for t in axis.texts}
    assert numbers == {(0, 1): "60.0", (1, 0): "20.0"}  # (column, row)


def test_every_study_has_a_page_on_its_methods_and_on_each_of_them():
    grid = grid_from(
        "test",
        {
            "data": "mnist5k",
            "arch": ["resnet8", "resnet20s"],
            "methods": ["lth", "snip"],
            "rounds": [1],
            "seeds": [0],
            "options": {"snip": {"batch": 64}},
            "dimensions": {"calibration": {"n_bins": 10}},
        },
    )
    mine = [plan for plan in pages(grid) if plan.topic == ON_METHODS]
    assert [plan.method for plan in mine] == 2 * [COMPARISON, "lth", "snip"]
    for plan in mine:
        assert plan.template == "notebooks/methods.ipynb"
        assert plan.parameters["method"] == ["lth", "snip"]  # a method is seen beside the others
        assert plan.parameters["about"] == (None if plan.method == COMPARISON else plan.method)
        assert plan.parameters["dimension"] == "calibration"  # what the grid computes anyway
        assert plan.parameters["measure"] == {"n_bins": 10}
        assert plan.parameters["options"] == {"snip": {"batch": 64}}
    others = [plan for plan in pages(grid) if plan.topic == "calibration" and plan.method == "lth"]
    assert others[0].parameters["method"] == ["lth"]
    assert others[0].parameters["options"] == {}


def test_a_chapters_part_has_the_curve_of_each_study_that_measured_the_method(page, tmp_path, monkeypatch):
    monkeypatch.setattr(front, "GENERATED", tmp_path)
    asked = {"data": "mnist5k", "arch": "resnet8", "rounds": [1], "seeds": [0], "dimensions": {"calibration": {}}}
    grid = grid_from("test", {**asked, "method_pages": ["calibration"]})
    (study,) = grid.studies
    evidence = Evidence("A *study*", page.results.rows, 10)
    said = dict(
        re.findall(
            r"<!-- (\S+): begin -->(.*?)<!-- \1: end -->",
            front._methods(pages(grid), [(grid, study, evidence)]),
            flags=re.S,
        )
    )
    assert set(said) == set(METHODS) - {"dense"}
    for name, part in said.items():
        pictures = re.findall(r"!\[(.*)\]\(/_generated/(.*)\)", part)
        assert bool(pictures) == (name in STUDY.methods)
        assert ("was not measured" in part) == (name not in STUDY.methods)
        for alt, file in pictures:
            assert (tmp_path / file).read_text().rstrip().endswith("</svg>")
            means = [100 * np.mean([accuracy(page, name, n, s) for s in (0, 1)]) for n in (1, 2)]
            assert [f"{m:.1f} %" for m in means] == re.findall(r"([\d.]+ %) at", alt)
    assert "A &#42;study&#42;" in said["lth"]
    assert said["lth"].count("(/_generated/test/mnist5k-resnet8/methods/comparison.ipynb)") == 1
    assert "methods/lth.ipynb" not in said["lth"]  # this grid makes no page a method


def test_a_methods_curve_stands_in_front_of_the_others_in_grey(page):
    axis = drawing.accuracy_beside(page.judged, "snip").axes[0]
    grey = {tuple(np.round(line.get_ydata(), 6)) for line in axis.lines if line.get_color() == "grey"}
    others = [m for m in STUDY.methods if m != "snip"]
    wanted = {tuple(round(100 * np.mean([accuracy(page, m, n, s) for s in (0, 1)]), 6) for n in (1, 2)) for m in others}
    assert grey == wanted
    drawn = [line.get_ydata() for line in axis.lines if line.get_color() == colours()["snip"] and len(line.get_ydata())]
    assert {round(y, 6) for line in drawn for y in line} == {
        round(100 * np.mean([accuracy(page, "snip", n, s) for s in (0, 1)]), 6) for n in (1, 2)
    }


def test_every_chapter_on_a_method_shows_its_results():
    included = {}
    for chapter in BOOK.glob("methods/*.md"):
        for name in re.findall(r"^:start-after: <!-- (\S+): begin -->$", chapter.read_text(), flags=re.M):
            included.setdefault(name, []).append(chapter.stem)
    assert all(len(chapters) == 1 for chapters in included.values())
    assert set(included) <= set(METHODS)
    assert {name for name, method in METHODS.items() if method.paper} <= set(included)
    silent = {c.stem for c in BOOK.glob("methods/*.md")} - {"index"} - {c for cs in included.values() for c in cs}
    assert not silent
