import contextlib
import itertools
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lthlib.book.front import _contents
from lthlib.book.grid import KEYS, grid_from, read_grid
from lthlib.book.plan import jobs, needs, pages
from lthlib.core.errors import UserError, shown
from lthlib.pruning import METHODS
from lthlib.results.evaluate import DIMENSIONS
from lthlib.results.verdict import Thresholds
from lthlib.tickets.study import study_from
from lthlib.training.recipe import Recipe

GOOD = {
    "data": "mnist5k",
    "arch": "resnet8",
    "methods": ["lth"],
    "rounds": [1, 2],
    "seeds": [0],
    "dimensions": {"calibration": {}},
}
GRIDS = sorted(Path(__file__).parents[1].glob("workflow/grids/*.yml"))


@pytest.mark.parametrize("path", GRIDS, ids=lambda p: p.stem)
def test_every_grid_of_the_project_is_valid(path):
    grid = read_grid(path, recorded=True)  # a grid may name a folder that the reader has
    assert grid.studies
    assert len({page.path for page in pages(grid)}) == len(pages(grid))


def test_the_default_grid_is_what_the_book_promises():
    grid = read_grid(next(p for p in GRIDS if p.stem == "quick"))
    (study,) = grid.studies
    assert {m.name for m in METHODS.values() if m.paper} <= set(study.methods)
    assert len(study.rounds) >= 6
    assert len(study.seeds) >= 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dta": 1}, "Did you mean 'data'"),
        ({"data": "../mnist5k"}, "cannot name a data set"),
        ({"arch": "resnet9"}, "Did you mean"),
        ({"methods": ["lht"]}, "Did you mean 'lth'"),
        ({"methods": []}, "methods"),
        ({"methods": ["lth", "lth"]}, "twice"),
        ({"rounds": [2, 1]}, "ascending"),
        ({"rounds": [1, 1]}, "ascending"),
        ({"rounds": [0, 1]}, "from 1 on"),
        ({"rounds": "1, 2"}, "list"),
        ({"seeds": [-1]}, "from 0 on"),
        ({"seeds": [True]}, "list"),
        ({"recipe": {"epoch": 3}}, "Did you mean 'epochs'"),
        ({"recipe": 3}, "mapping"),
        ({"dimensions": {"calibrations": {}}}, "Did you mean 'calibration'"),
        ({"dimensions": {"calibration": {"bins": 3}}}, "n_bins"),
        ({"dimensions": {"calibration": {"n_bins": "many"}}}, "n_bins"),
        ({"dimensions": []}, "dimensions"),
        ({"precision": "fp8"}, "bfloat16"),
        ({"thresholds": {"tolerence": 1}}, "Did you mean 'tolerance'"),
        ({"thresholds": {"tolerance": -1}}, "from 0 on"),
        ({"options": {"rigl": {"delta": 3}, "rgl": {}}}, "rigl"),
        ({"methods": ["rigl"], "options": {"rigl": {"delta_t": -1}}}, "delta_t of rigl is -1.* from 1 on"),
        ({"methods": ["rigl"], "options": {"rigl": {"alpha": 2}}}, "alpha of rigl is 2.* at most 1"),
        ({"methods": ["lth"], "options": {"synflow": {"rounds": 0}}}, "rounds of synflow is 0.* from 1 on"),
        ({"train_size": 0}, "train_size"),
        ({"title": "a\nb"}, "one line"),
        ({"method_pages": ["calibraton"]}, "Did you mean 'calibration'"),
        ({"method_pages": "all"}, "list"),
        ({"rewind_epoch": "1"}, "rewind_epoch"),
    ],
)
def test_a_mistake_is_answered_with_key_value_and_what_is_allowed(change, words):
    with pytest.raises(UserError, match=words):
        grid_from("test", {**GOOD, **change})


def test_data_that_are_not_there_are_missed_before_anything_runs_unless_results_are_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("LTHLIB_DATA", str(tmp_path))
    path = tmp_path / "grid.yml"
    path.write_text(yaml.safe_dump({**GOOD, "data": "mnist5"}))
    with pytest.raises(UserError, match="Did you mean 'mnist5k'"):
        read_grid(path)
    assert read_grid(path, recorded=True).studies[0].data == "mnist5"


def test_a_grid_without_some_dimension_has_no_empty_part_in_its_contents():
    contents = _contents(pages(grid_from("test", GOOD)), Path(__file__).parents[1] / "book/contents.yml")
    parts = {part["caption"]: part["chapters"] for part in yaml.safe_load(contents)["parts"]}
    assert all(parts.values())
    assert "Calibration" in parts
    assert "Generalization" not in parts


def test_comparisons_that_would_be_called_alike_name_their_grid():
    template = Path(__file__).parents[1] / "book/contents.yml"
    other = {**GOOD, "arch": ["resnet8", "resnet20s"]}
    plans = [page for name, content in (("a", GOOD), ("b", other)) for page in pages(grid_from(name, content))]
    parts = {part["caption"]: part["chapters"] for part in yaml.safe_load(_contents(plans, template))["parts"]}
    first, second, third = (chapter["title"] for chapter in parts["Calibration"])
    assert first.removesuffix(" (a)") == second.removesuffix(" (b)") != first
    assert "(b)" not in third


def test_sparsities_name_rounds():
    study = study_from({"method": "lth", "sparsities": [0.2, 0.67, 0.893]})
    assert study.rounds == (1, 5, 10)


def test_all_is_every_registered_method():
    assert set(study_from({"method": "all"}).methods) == set(METHODS) - {"dense"}


def test_a_grid_over_lists_has_a_study_for_each_pair():
    grid = grid_from("test", {**GOOD, "data": ["mnist5k", "cifar10"], "arch": ["resnet8", "resnet20s"]})
    assert len(grid.studies) == 4


def test_jobs_wait_for_what_they_build_on():
    grid = grid_from("test", {**GOOD, "methods": ["lth-shuffled", "lth", "snip"]})
    found = {job.method: {need.method for need in needs(grid, job)} for job in jobs(grid)}
    assert found == {"dense": set(), "lth": {"dense"}, "snip": {"dense"}, "lth-shuffled": {"dense", "lth"}}


@pytest.mark.parametrize("content", ["", "[1, 2]", "a: [", "\x00", "!!python/object:os.system {}"])
def test_a_file_that_is_no_grid_is_said(tmp_path, content):
    path = tmp_path / "grid.yml"
    path.write_text(content)
    with pytest.raises(UserError):
        read_grid(path)


def test_a_grid_file_must_have_a_name_that_can_name_pages(tmp_path):
    path = tmp_path / "My Grid.yml"
    path.write_text(yaml.safe_dump(GOOD))
    with pytest.raises(UserError, match="small letters"):
        read_grid(path)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**20, 10**5000)
    | st.floats()
    | st.text(max_size=8)
    | st.text(min_size=600, max_size=700)
    | st.dates()
    | st.datetimes()
    | st.binary(max_size=8)
    | st.sampled_from(["lth", "mnist5k", "../x", "/etc", "~", "all", 1, 2, 0.2, "calibration", "epochs", "lr"])
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text(max_size=8) | st.sampled_from(["epochs", "lth", "calibration", "n_test", "k"]) | SCALARS,
            inner,
            max_size=3,
        )
        | st.frozensets(st.integers(), max_size=2)
    ),
    max_leaves=6,
)
ALLOWED = (
    "must",
    "Allowed: ",
    "allowed are",
    "use letters",
    "twice",
    "sparsity is the fraction",
    "not both",
    "has ",
    "mapping of",
)


def parts_of(value):
    """The value and everything in it, keys included."""
    yield value
    for inner in [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from parts_of(inner)


def check_message(error, key, value):
    """It names the key (perhaps in the singular), the value or the part at fault, and what is allowed; it is short."""
    message = str(error)
    assert key.rstrip("s")[:7] in message.lower(), message
    assert any(shown(part) in message or repr_of(part) in message for part in parts_of(value)), message
    assert any(word in message for word in ALLOWED), message
    assert len(message) < 3000


def repr_of(value):
    try:
        return str(value) if isinstance(value, str | int | float) else repr(value)
    except ValueError:  # an integer of thousands of digits
        return shown(value)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(KEYS), JUNK)
def test_any_bad_value_of_a_key_is_answered_with_key_value_and_what_is_allowed(key, value):
    content = {**GOOD, key: value}
    if key == "sparsities":
        del content["rounds"]
    try:
        grid_from("test", content)
    except UserError as error:  # any other exception fails the test
        check_message(error, key, value)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["recipe", "dimensions", "thresholds"]), st.data())
def test_any_bad_value_below_a_key_is_answered_likewise(key, data):
    outer = {
        "recipe": vars(Recipe()),
        "thresholds": vars(Thresholds()),
        "dimensions": DIMENSIONS["calibration"].parameters(),
    }[key]
    name, value = data.draw(st.sampled_from(sorted(outer))), data.draw(JUNK)
    inner = {"dimensions": {"calibration": {name: value}}}
    try:
        grid_from("test", {**GOOD, key: inner.get(key, {name: value})})
    except UserError as error:
        check_message(error, name, value)


OPTIONS = [(method, name) for method in METHODS for name in METHODS[method].options]
NEAR_THE_ENDS = st.integers(-3, 3) | st.floats(-1.5, 1.5) | st.sampled_from([10_000, 10_001, True, "erk", "eval"])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(OPTIONS), NEAR_THE_ENDS | JUNK)
def test_an_option_passes_where_its_method_allows_it_and_is_answered_otherwise(option, value):
    method, name = option
    allowed = METHODS[method].allowed[name]
    content = {**GOOD, "methods": [method], "options": {method: {name: value}}}
    if allowed.allows(value):
        (study,) = grid_from("test", content).studies
        assert study.options[method][name] == value
        return
    with pytest.raises(UserError) as error:
        grid_from("test", content)
    check_message(error.value, name, value)
    if isinstance(value, bool | int | float) and abs(value) < 100:
        assert f"must be {allowed}" in str(error.value)


@settings(max_examples=100, deadline=None)
@given(JUNK)
def test_no_content_can_do_worse_than_a_clear_error(content):
    with pytest.raises(UserError) as error:
        grid_from("test", content)
    assert len(str(error.value)) < 3000


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=6), st.data())
def test_no_file_can_do_worse_than_a_clear_error(tmp_path_factory, noise, data):
    text = yaml.safe_dump(GOOD).encode()
    place = data.draw(st.integers(0, len(text)))
    path = tmp_path_factory.getbasetemp() / "noisy.yml"
    path.write_bytes(text[:place] + noise + text[place + data.draw(st.integers(0, 4)) :])
    with contextlib.suppress(UserError):
        read_grid(path)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in itertools.pairwise("abcdefgh")
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "at most 2000 values"),
        ("seeds: &s [*s]", "deep"),
        ("seeds: " + "[" * 2000, "deep"),
        ("seeds: " + "[" * 20 + "]" * 20, "deep"),
        ("seeds: [" + "9" * 5000 + "]", "cannot be read"),
        ("seeds: [" + "9" * 30 + "]", "2\\^63"),
        ("rewind_epoch: 2001-02-31", "cannot be read"),
        ("rewind_epoch: 2001-02-03", "in quotes it is text"),
        ("title: !!binary aGVsbG8=", "in quotes it is text"),
        ("recipe: {lr: .nan}", "finite"),
        ("seeds: [0]\nseeds: [1]", "'seeds' stands twice"),
        ("? [1, 2]\n: 3", "cannot be read"),
        ("1: 2", "keys must be text"),
        ("rounds: [1, 101]", "at most 100"),
        ("seeds: [4294967296]", "at most 2147483647"),
        ("title: " + "x" * 200_000, "larger than"),
    ],
)
def test_no_trick_of_yaml_gets_through(tmp_path, text, words):
    keys = {line.split(":")[0] for line in text.splitlines()}
    rest = yaml.safe_dump({key: value for key, value in GOOD.items() if key not in keys})
    path = tmp_path / "grid.yml"
    path.write_text(f"{rest}\n{text}\n")
    with pytest.raises(UserError, match=words) as error:
        read_grid(path)
    assert len(str(error.value)) < 3000
