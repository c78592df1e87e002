"""What the chapter on costs says of recorded ratios: the peer's time over ours, a column a processor."""

import importlib.util
import json
from pathlib import Path

import pytest

from lthlib.book import front, ratios

MADE = {"time": "2026-01-02T03:04", "commit": "abc", "python": "3.13", "torch": "2.9", "processor": "old"}


def machine(name, *lines):
    programs = {"a program": {"provenance": MADE, "lines": list(lines)}}
    return {"processor": name, "instructions": "AVX2", "programs": programs}


def test_a_ratio_is_the_peers_time_over_ours_in_the_column_of_its_processor():
    both = {"what": "a trace", "peer": "a probe", "ours": 2.0, "theirs": 7.0}
    one = {"what": "a mask", "peer": "a loop", "ours": 4.0, "theirs": 1.0}
    table = ratios.ratios_table([machine("old", both, one), machine("new", {**both, "ours": 1.0})])
    assert "| a trace | a probe | **3.5** (7 s) | **7** (7 s) |" in table
    assert "| a mask | a loop | **0.25** (1 s) | – |" in table
    assert "**1,200**" in ratios.ratios_table([machine("old", {**both, "theirs": 2400.0})])
    assert "old, AVX2: Recorded on 2026-01-02 at commit abc" in table


def test_growth_is_told_from_the_fewest_to_the_most():
    table = ratios.growth_table([machine("old", {"what": "x", "by": "images", "seconds": {"10": 1.0, "40": 3.0}})])
    assert "| x | images | 10: 1 s, 40: 3 s | 3 times for 4 times as many | old, AVX2 |" in table


def test_where_no_growth_is_recorded_the_command_is_named():
    assert "make benchmarks" in ratios.growth_table([machine("old")])


def test_limits_have_a_line_for_each_processor_that_was_measured():
    limit = {"images": 400.0, "beside": 500.0, "multiply": 1000.0, "memory": 3000.0}
    found = ratios.limits([machine("old", {"what": "x", "limit": limit}), machine("new")])
    assert found.to_dict("index") == {"old, AVX2": limit}


def test_a_record_of_one_program_leaves_the_others_part_of_the_chapter_to_say_so():
    few = [machine("old", {"what": "x", "by": "images", "seconds": {"10": 1.0, "40": 3.0}})]
    assert ratios.ratios_table(few) == ratios.NOT_YET
    assert front._limits({"machines": few}) == ratios.NOT_YET


def test_without_a_record_the_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ratios, "RATIOS", tmp_path / "ratios.json")
    assert all("benchmarks/ratios.py --record" in text for text in ratios.chapter_tables().values())


@pytest.fixture
def program(tmp_path, monkeypatch):
    """The program that collects, with a record and a list of its own."""
    path = Path(__file__).parents[1] / "benchmarks" / "ratios.py"
    spec = importlib.util.spec_from_file_location("ratios_program", path)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    monkeypatch.setattr(program, "RATIOS", tmp_path / "ratios.json")
    monkeypatch.setenv("LTHLIB_RATIOS", str(tmp_path / "lines"))
    return program


def test_a_benchmark_leaves_its_lines_where_it_is_told(program, tmp_path, capsys):
    program.tell("a mask", "a loop", 2.0, 5.0)
    program.tell_growth("a trace", "images", {10: 1.0, 20: 2.0})
    program.tell_limit("a training", images=4.0, memory=9.0)
    assert "2.50 x as fast as a loop" in capsys.readouterr().out
    assert [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()] == [
        {"what": "a mask", "peer": "a loop", "ours": 2.0, "theirs": 5.0},
        {"what": "a trace", "by": "images", "seconds": {"10": 1.0, "20": 2.0}},
        {"what": "a training", "limit": {"images": 4.0, "memory": 9.0}},
    ]


def test_a_record_replaces_what_the_same_program_told_on_such_a_processor_and_nothing_else(program):
    foreign = {"processor": "another", "instructions": "AVX2", "programs": {"a": {"provenance": MADE, "lines": [{}]}}}
    program.write_atomically(program.RATIOS, program.seal({"machines": [foreign]}))
    for name, threads, line in (("a", 1, {"n": 1}), ("b", 2, {"n": 2}), ("a", 2, {"n": 3})):
        program.record(name, threads, [line])
    other, here = program.recorded_json(program.RATIOS)["machines"]
    assert other == foreign
    assert {name: told["lines"] for name, told in here["programs"].items()} == {"a": [{"n": 3}], "b": [{"n": 2}]}
    assert [here["programs"][name]["provenance"]["threads"] for name in "ab"] == [2, 2]
