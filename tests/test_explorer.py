"""The explorer: the numbers it is given are the judged ones, and the page shows them as chosen."""

import importlib.util
import itertools
import json
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lthlib.book import explorer
from lthlib.metrics import METRICS
from lthlib.results.claims_parts import Evidence

ROOT = Path(__file__).parents[1]
COLUMNS = ["dataset", "arch", "method", "round", "sparsity", "seed", "metric", "shift", "severity", "value"]


def study(label, methods, seeds, metrics, *, without=(), spread=0.001):
    """Made-up rows: ``metrics`` are (name, shift, severity, dense value, what each round takes away)."""
    draw, lines = np.random.default_rng(3), []
    for (place, method), (metric, shift, severity, dense, lost) in itertools.product(enumerate(methods), metrics):
        for n, seed in itertools.product((0,) if method == "dense" else (3, 6, 9), range(seeds)):
            if (method, metric, n) not in without:
                value = dense - lost * n * place + spread * draw.normal()
                lines.append(("d", "net", method, n, 1 - 0.8**n, seed, metric, shift, severity, value))
    rows = pd.DataFrame(lines, columns=COLUMNS).assign(n=1000)
    rows["dimension"] = [METRICS[name].dimension for name in rows["metric"]]
    rows["ticket"] = [f"{m}-{n}-{s}" for m, n, s in zip(rows["method"], rows["round"], rows["seed"], strict=True)]
    return Evidence(label, rows, 10)


CLEAN = [("test_accuracy", "none", 0.0, 0.95, 0.004), ("temperature", "none", 0.0, 1.5, 0.01)]
FOG = [("corrupted_accuracy", "fog", s, 0.9 - 0.1 * s, 0.01) for s in (1.0, 3.0)]
GAPS = [("rp", "corrupted_accuracy", n) for n in (3, 6, 9)] + [("lth", "ood_auroc", 6), ("dense", "pgd_accuracy", 0)]
MORE = [("ood_auroc", "photos", 0.0, 0.8, 0.001), ("pgd_accuracy", "none", 0.0, 0.4, 0.001)]
STUDIES = {
    "a/many": study("Many </script> & <b>more</b>", ["dense", "lth", "rp"], 2, CLEAN + FOG + MORE, without=GAPS),
    "b/one": study("One", ["dense", "snip"], 1, CLEAN),
    "c/fallen": study("Fallen", ["dense", "omp"], 5, [("test_accuracy", "none", 0.0, 0.9, 0.06)]),
    "d/no-dense": study("No dense", ["lth"], 2, CLEAN),
    "e/only-dense": study("Only dense", ["dense"], 2, CLEAN),
}


@pytest.fixture(scope="module")
def files():
    return explorer.files(STUDIES)


@pytest.fixture(scope="module")
def given(files):
    return json.loads(files["explorer/explorer-data.js"].removeprefix("window.explorerData = ").removesuffix(";"))


def test_only_studies_with_something_to_compare_are_there(given):
    assert list(given["studies"]) == ["a/many", "b/one", "c/fallen"]
    assert set(given["methods"]) == {"lth", "rp", "snip", "omp"}


@pytest.mark.parametrize("name", ["a/many", "b/one", "c/fallen"])
def test_the_numbers_are_the_judged_ones_and_no_others(given, name):
    judged, found = STUDIES[name].judged, given["studies"][name]
    cases = {(c["dimension"], c["metric"], c["shift"]): c for c in found["cases"]}
    assert len(cases) == len(found["cases"])

    def same(told, true):
        return told is None if math.isnan(true) else told == pytest.approx(true, rel=5.1e-5)

    for line in judged.itertuples():
        case = cases[line.dimension, line.metric, f"fog {line.severity:.0f}" if line.severity else line.shift]
        at = found["rounds"].index(line.round)
        means, lows, highs, outcomes = case["methods"][line.method]
        assert all(same(v[at], t) for v, t in ((means, line.mean), (lows, line.low), (highs, line.high)))
        assert all(map(same, case["dense"], (line.dense, line.dense_low, line.dense_high)))
        code = outcomes[at]
        assert (given["outcomes"][int(code)]["name"] if code != "-" else "") == line.outcome
        assert same(found["methods"][line.method][at], line.sparsity)
        assert (case["images"], case["seeds"]) == (1000, line.seeds)
    there = [mean for case in found["cases"] for curve in case["methods"].values() for mean in curve[0]]
    assert sum(mean is not None for mean in there) == len(judged)
    assert sum(c != " " for case in found["cases"] for curve in case["methods"].values() for c in curve[3]) == len(
        judged
    )


def test_made_up_studies_have_every_outcome(given):
    """Otherwise the tests here would show less than they seem to."""
    outcomes = {outcome for name in given["studies"] for outcome in STUDIES[name].judged["outcome"]}
    assert outcomes == {"kept", "lost", "not shown", "collapsed", ""}


def test_without_studies_there_is_a_page_all_the_same():
    assert explorer.explored({})["studies"] == {}


def test_the_script_that_draws_leaves_room_for_the_numbers(files):
    assert len(files["explorer/vega.js"].encode()) < 1.5e6


# --- in a browser ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def look():
    spec = importlib.util.spec_from_file_location("look", ROOT / ".ci/look.py")
    module = sys.modules["look"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        module.find_chromium()
    except SystemExit as reason:
        pytest.skip(str(reason))
    return module


@pytest.fixture(scope="module")
def browser(look):
    with look.Browser(60) as browser:
        yield browser


@pytest.fixture(scope="module")
def site(files, tmp_path_factory):
    """The page's own block of HTML with the files it loads, in a page without the book's theme."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "book/_assets", folder / "_static", ignore=shutil.ignore_patterns("mathjax"))
    for name, text in files.items():
        (folder / "_static" / Path(name).name).write_text(text)
    (block,) = re.findall(r"^```\{raw\} html\n(.*?)^```$", (ROOT / "book/explorer.md").read_text(), flags=re.M | re.S)
    colours = "--pst-color-text-base: #{}; --pst-color-background: #{};"
    style = f"html {{ {colours.format(111, 'fff')} }} html[data-theme=dark] {{ {colours.format('eee', 222)} }}"
    head = f'<html lang="en" data-theme="light"><meta charset="utf-8"><title>Explorer</title><style>{style}</style>'
    (folder / "explorer.html").write_text(f"<!doctype html>{head}<body>{block}</body></html>")
    return folder / "explorer.html"


SHOWN = """(async () => {
  const all = (which) => [...document.querySelectorAll(which)], started = Date.now();
  await new Promise((resolve) => setTimeout(resolve, 300));
  while (!all('[data-part=chart] svg').length && Date.now() < started + 30000)
    await new Promise((resolve) => setTimeout(resolve, 20));
  const box = (mark) => { const r = mark.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; };
  return {
    chosen: all('select').map((one) => one.value), hash: location.hash,
    methods: all('input:checked').map((one) => one.value), caption: document.querySelector('caption').textContent,
    rows: all('tbody tr').map((row) => [...row.cells].map((cell) => cell.textContent)),
    marks: all('.layer_4_marks path').map((mark) => [mark.getAttribute('stroke'), ...box(mark)]),
    dashes: all('.layer_3_marks line').map((line) => line.getAttribute('stroke-dasharray')),
    dense: all('.layer_2_marks line').map((line) => line.getAttribute('stroke')),
    says: document.querySelector('output').textContent, wide: document.scrollingElement.scrollWidth,
  };
})()"""


def opened(browser, site, link=""):
    session = browser.open(SimpleNamespace(as_uri=lambda: site.as_uri() + link))
    return session, browser.evaluate(session, SHOWN)


def table(name, metric, methods, factor=100, severity=0):
    """What the table is to say, from the judged rows."""
    judged = STUDIES[name].judged
    lines = judged[(judged["metric"] == metric) & (judged["severity"] == severity) & judged["method"].isin(methods)]
    return lines.sort_values(["method", "round"]).assign(
        **{column: factor * lines[column] for column in ("mean", "low", "high")}
    )


def agrees(rows, wanted):
    marks = {"kept": "✓", "lost": "↘", "not shown": "?", "collapsed": "✗", "": ""}
    assert len(rows) == len(wanted)
    for (_, sparsity, mean, interval, outcome), line in zip(rows, wanted.itertuples(), strict=True):
        assert float(sparsity) == pytest.approx(100 * line.sparsity, rel=1e-3)
        assert float(mean) == pytest.approx(line.mean, rel=5.1e-5)
        bounds = [] if interval == "–" else [float(v) for v in interval.split(" to ")]
        assert bounds == pytest.approx([line.low, line.high] if line.low < line.high else [], rel=5.1e-5)
        assert outcome.strip() == f"{marks[line.outcome]} {line.outcome}".strip()


def test_a_link_chooses_what_is_drawn_and_tabled(browser, site, look, given):
    link = "#study=a/many&dimension=generalization&metric=corrupted_accuracy&shift=fog+3&methods=lth"
    session, shown = opened(browser, site, link)
    assert shown["chosen"] == ["a/many", "generalization", "corrupted_accuracy", "fog 3"]
    assert shown["methods"] == ["lth"]
    wanted = table("a/many", "corrupted_accuracy", ["lth"], severity=3)
    agrees(shown["rows"], wanted)
    colours, xs, ys = zip(*shown["marks"], strict=True)
    assert set(colours) == {given["methods"]["lth"]["colour"]}
    assert np.corrcoef(xs, wanted["round"])[0, 1] == pytest.approx(1)
    assert np.corrcoef(ys, wanted["mean"])[0, 1] == pytest.approx(-1)
    looks = {"kept": "1,0", "not shown": "8,3,2,3", "lost": "5,4"}
    assert shown["dashes"] == [looks[outcome] for outcome in wanted["outcome"][1:]]
    assert list(look.complaints(browser.events(session))) == []


def test_it_begins_with_the_first_study_and_all_its_methods(browser, site, look):
    session, shown = opened(browser, site)
    assert shown["chosen"] == ["a/many", "generalization", "test_accuracy", "none"]
    assert {mark[0] for mark in shown["marks"]} == {
        explorer.to_hex(explorer.figures.colours()[m]) for m in ("lth", "rp")
    }
    agrees(shown["rows"], table("a/many", "test_accuracy", ["lth", "rp"]))
    assert list(look.complaints(browser.events(session))) == []


@pytest.mark.parametrize(
    ("link", "says", "points"),
    [
        ("#study=b/one", "one seed each, so no intervals", 3),
        ("#study=b/one&metric=temperature&dimension=calibration", "one seed", 3),  # nothing to win, no outcome
        ("#study=c/fallen", "means over 5 seeds", 3),
        ("#metric=ood_auroc", "OoD ROC-AUC [%] ↑, ", 5),  # a round of one method is missing
        ("#metric=corrupted_accuracy", "Fog 1", 3),  # of one method nothing was measured
        ("#metric=pgd_accuracy", "dense: not measured", 6),
        ("#methods=", "Sparse networks: 0", 0),
        ("#study=gone&metric=none&methods=rp,unheard-of", "Accuracy", 3),  # an old link: what is known of it counts
    ],
)
def test_gaps_are_no_hindrance(browser, site, look, link, says, points):
    session, shown = opened(browser, site, link)
    assert says in shown["caption"]
    assert len(shown["rows"]) == len(shown["marks"]) == points
    assert list(look.complaints(browser.events(session))) == []
    browser.close(session)


def test_choosing_changes_table_and_link_and_the_link_leads_back(browser, site):
    session, _ = opened(browser, site)
    choose = """(() => { const one = document.querySelector('[data-part=study]'); one.value = 'b/one';
      one.dispatchEvent(new Event('change', {bubbles: true})); return 1; })()"""
    browser.evaluate(session, choose)
    shown = browser.evaluate(session, SHOWN)
    agrees(shown["rows"], table("b/one", "test_accuracy", ["snip"]))
    assert {row[3] for row in shown["rows"]} == {"–"}
    assert shown["hash"] == "#study=b/one&dimension=generalization&metric=test_accuracy&shift=none"
    _, again = opened(browser, site, shown["hash"])
    assert again["rows"] == shown["rows"]


def test_arrow_keys_read_the_points_aloud(browser, site):
    session, shown = opened(browser, site)
    browser.evaluate(session, "document.querySelector('[data-part=chart]').focus() ?? 1")
    said = []
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        browser.call("Input.dispatchKeyEvent", session, type="keyDown", key=key)
        said.append(browser.evaluate(session, SHOWN)["says"])
    means = [row[2] for row in shown["rows"]]  # three of LTH, three of RP
    assert [re.search(r": (\S+)", text)[1] for text in said] == [means[i] for i in (0, 1, 4, 3)]


def test_it_follows_the_theme_and_fits_a_narrow_screen(browser, site):
    session, light = opened(browser, site)
    browser.evaluate(session, "document.documentElement.dataset.theme = 'dark'")
    dark = browser.evaluate(session, SHOWN)
    assert (light["dense"], dark["dense"]) == (["#111"], ["#eee"])
    browser.resize(session, (360, 800))
    assert browser.evaluate(session, SHOWN)["wide"] <= 360
