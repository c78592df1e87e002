"""What the blog post asked for: answers that are read off the rows, and what nobody has measured."""

import re

import pandas as pd
import pytest
from pybtex.database import parse_file
from pybtex.style.labels.alpha import LabelStyle
from test_claims import each, made

from lthlib.book.cost import PAPER
from lthlib.book.grid import read_grid
from lthlib.book.plan import pages, recorded_grids
from lthlib.book.questions import CIFAR, EVERY_METHOD, metrics_table, questions_pages, tally
from lthlib.core.store import ROOT
from lthlib.pruning import METHODS
from lthlib.results import reasons
from lthlib.results.claims_parts import Evidence
from lthlib.results.evaluate import DIMENSIONS

TRACES = (reasons.TRACE, f"{reasons.TRACE}_per_weight")
WORKS = (
    "alvarez2018towards chen2022can evci2020rigging frankle2020linear goodfellow2015explaining gui2019model gweon2019how "
    "han2016deep hendrycks2019benchmarking hochreiter1997flat hooker2019what hooker2020characterising iofinova2022how "
    "jiang2020fantastic lecun2015deep lee2019snip moosavi2019robustness naeini2015obtaining nguyen2015deep "
    "plumb2020regularizing ribeiro2016why shen2022when tanaka2020pruning wang2020picking wu2020adversarial "
    "ye2019adversarial"
)


def answer(name, *studies):
    return questions_pages(studies, [])[f"question-{name}.md"]


def line(table, start):
    (found,) = (line for line in table.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in found.strip("|").split("|")][1:]


def test_a_tally_counts_networks_not_rows():
    study = made({"sce": {"dense": 0.1, "lth": 0.1, "rp": 0.4}})
    twice = Evidence("twice", pd.concat([study.rows] * 2), 10)
    for e in (study, twice):
        assert tally(e, ["lth"], ["sce"]) == "✓ 3"
        assert tally(e, METHODS, ["sce"]) == "✓ 3, ↘ 3"
    assert tally(study, ["omp"], ["sce"]) == tally(study, ["lth"], ["ece"]) == "not measured"


def test_imagenet_is_answered_by_a_study_of_imagenet_alone():
    spec = each(("fidelity", "stability"), dense=0.1, lth=0.1, rp=0.3)
    other, mine = (made(spec, dataset=name, label=name) for name in ("mnist5k", "imagenet@224"))
    assert answer("imagenet", other).startswith("Not measured here.")
    assert f"make report GRID={PAPER[1]}" in answer("imagenet", other)
    found = answer("imagenet", other, mine)
    assert (line(found, "LTH"), line(found, "RP")) == (["✓ 3", "✓ 3"], ["↘ 3", "↘ 3"])
    assert "make report" not in found
    assert "hold nothing yet on stability" in answer(
        "imagenet", made({"fidelity": spec["fidelity"]}, dataset="imagenet")
    )


def test_settings_of_the_paper_are_missing_until_a_study_is_about_them():
    mine = made({"sce": {"dense": 0.1, "lth": 0.1}}, dataset="imagenet@224", arch="resnet50", label="mine")
    assert line(answer("settings", mine), "mine") == ["✓ 3", "not measured", "not measured"]
    assert "`imagenet+224-resnet50`" not in answer("settings", mine)
    assert f"GRID={PAPER[1]}" not in answer("settings", mine)
    other = answer("settings", made({"sce": {"dense": 0.1, "lth": 0.1}}))
    assert line(other, "the paper's `imagenet+224-resnet50`") == ["not measured"] * 3
    assert f"GRID={PAPER[1]}" in other


def test_rigl_on_cifar_has_a_line_a_metric_and_a_column_a_sparsity():
    study = made(
        {"nll": {"dense": 0.5, "rigl": 0.5, "lth": 0.9}, "brier": {"dense": 0.1, "rigl": 0.1}}, dataset="cifar10"
    )
    found = answer("rigl", study)
    assert "| metric | dense | 48.8 % | 73.8 % | 86.6 % |" in found
    assert line(found, "NLL &#91;nats&#93; &#8595;") == ["0.5"] * 1 + ["0.5 ✓"] * 3
    assert "Brier" not in found
    assert answer("rigl", made({"nll": {"dense": 0.5, "rigl": 0.5}})).startswith("Not measured here.")


def test_structured_pruning_names_the_dimensions_without_rows():
    two = {"nll": {"dense": 0.5, "slimming": 0.9, "lth": 0.5}}
    found = answer("structured", made(two))
    assert line(found, METHODS["slimming"].title)[1:] == ["↘ 3", "not measured", "not measured"]
    assert "hold nothing yet on interpretability and flatness" in found
    assert f"GRID={EVERY_METHOD}" in found
    four = two | each(("fidelity", reasons.TRACE), dense=1.0, slimming=1.0)
    assert "not measured" not in answer("structured", made(four))
    assert "make report" not in answer("structured", made(four))
    assert answer("structured", made({"nll": {"dense": 0.5, "lth": 0.5}})).startswith("Not measured here.")


def why(trace=1.3, free=1.0, pixels=1.0, accuracy=0.9, **given):
    spec = each(TRACES, rp=1.0, rigl=trace) | {
        reasons.SCALE_FREE: {"rp": 1.0, "rigl": free},
        reasons.PIXELS: {"rp": 1.0, "rigl": pixels},
        reasons.ACCURACY: {"rp": 0.9, "rigl": accuracy},
    }
    return reasons.why_less_flat(made(spec, **given))[0]


class TestWhyRigLIsLessFlat:
    def test_scale_is_left_where_a_measure_without_scale_shows_nothing(self):
        assert reasons.SCALE in why(free=0.7)
        assert reasons.NO_SCALE in why(free=1.3)
        assert reasons.SCALE not in why(free=1.3)

    def test_doubt_is_left_where_it_is_less_accurate_and_not_alone_where_pixels_are_flat(self):
        assert reasons.DOUBT in why(accuracy=0.8)
        assert reasons.NOT_ALONE not in why(accuracy=0.8, pixels=1.5)
        assert reasons.NOT_ALONE in why(accuracy=0.8, pixels=0.5)
        assert reasons.NO_DOUBT in why(accuracy=0.95)
        assert reasons.DOUBT not in why(accuracy=0.95)

    @pytest.mark.parametrize("given", [{"trace": 0.7}, {"seeds": 1}, {"noise": 0.5, "seeds": 2}])
    def test_no_reason_is_given_where_it_is_flatter_or_nothing_is_shown(self, given):
        said = why(**given)
        assert "nothing to explain" in said
        assert not any(reason in said for reason in (reasons.COUNT, reasons.SCALE, reasons.NO_SCALE, reasons.DOUBT))

    def test_what_lacks_is_not_measured(self):
        assert reasons.why_less_flat(made({"nll": {"dense": 1.0, "rigl": 1.0}})) == ("", ())
        assert answer("flat") == "Not measured here."
        assert answer("flat", made({"nll": {"dense": 1.0, "rigl": 1.0}})) == "**study.** Not measured here.\n"
        one = reasons.why_less_flat(made({reasons.TRACE: {"rp": 1.0, "rigl": 1.3}}))[0]
        assert reasons.COUNT in one
        assert reasons.SCALE not in one


def test_every_page_on_a_metric_is_in_the_table():
    table = metrics_table(ROOT / "book" / "metrics")
    labels = {path.read_text().split(")=")[0][1:] for path in (ROOT / "book" / "metrics").glob("*.md")} - {"metrics"}
    assert set(re.findall(r"\(#(metric-[\w-]+)\) \|", table)) == labels
    cells = [re.split(r" \| ", line.strip("| ")) for line in table.splitlines()[2:]]
    assert all(len(of) == 4 and all(of) for of in cells)


def test_the_commands_measure_what_they_promise():
    paper, photos, cifar, every = (read_grid(ROOT / name, recorded=True) for name in (*PAPER, CIFAR, EVERY_METHOD))
    assert all(set(grid.dimensions) == set(DIMENSIONS) for grid in (paper, photos, cifar, every))
    assert all("rigl" in study.methods for grid in (paper, photos, cifar, every) for study in grid.studies)
    assert {name for name, m in METHODS.items() if m.family == "structured"} <= set(every.studies[0].methods)


def test_a_record_is_shown_as_far_as_it_goes():
    for grid in recorded_grids(""):
        folder = ROOT / "book" / "results" / grid.name
        assert set(grid.dimensions) == {path.name.split(".")[0] for path in folder.glob("*.json.gz")}
        assert {page.topic for page in pages(grid, from_record=True)} == {*grid.dimensions, "methods"}


def cited():
    texts = [path.read_text() for path in (ROOT / "book").rglob("*.md") if "_generated" not in path.parts]
    return {key for text in texts for keys in re.findall(r"\{cite(?::t)?\}`([^`]+)`", text) for key in keys.split(",")}


def test_the_works_of_the_post_are_all_cited():
    assert len(WORKS.split()) == 26
    assert {*WORKS.split(), "siddhartha2023can"} <= cited()


def test_no_work_for_further_reading_has_the_label_of_a_cited_one():
    """The list of references and that of further reading are labelled apart, and Sphinx refuses a label twice."""
    entries, mine = parse_file(ROOT / "book" / "references.bib").entries, cited()
    parts = [[entries[key] for key in entries if (key in mine) == told] for told in (True, False)]
    first, second = (set(LabelStyle().format_labels(part)) for part in parts)
    assert not first & second
