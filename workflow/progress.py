"""How far a run is, from what Snakemake says and from the logs of its jobs; imports nothing that takes time.

`Run` reads Snakemake's output line by line: `workflow.report` while it appears, `workflow.status` from the file in
which it is kept. The time left is reckoned from what the finished part of this very run took, kind by kind.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

PLAN = "_build/plans"
"""Where `workflow/snake.py` writes the plan of each grid it runs: its jobs and pages by name, with their weights."""

RATES = "_build/rates.json"
"""Seconds that the steps of the last whole run took, by kind; jobs aside, whose length is the grid's own."""

DRY = {"-n", "--dry-run", "--dryrun"}
"""Snakemake's options to run nothing."""

USUAL = {"page": 2.0, "rows": 5.0, "front": 10.0, "book": 15.0}
KINDS = {"tickets": "job", "chains": "job", "page": "page"}  # by rule; other rules are their own kind
STAMP = re.compile(r"^\[(\w{3} \w{3} +\d+ \d\d:\d\d:\d\d \d{4})\]$")
START = re.compile(r"^(?:local)?(?:rule|checkpoint) (\w+):$")
DETAIL = re.compile(r"^    (jobid|wildcards|log|message): (.*)$")
FINISHED = re.compile(r"^Finished jobid: (\d+) ")
FAILED = re.compile(r"^Error in rule (\w+):$")
AGAIN = re.compile(r"^Trying to restart job (\d+)\.")
COUNT = re.compile(r"^(\w+) +(\d+)$")
GRID = re.compile(r"--config '?grid=(.+?\.ya?ml)\b")
TICKET = re.compile(r"(\d+)/(\d+) \[")  # of a job's progress bar


@dataclass
class Step:
    """One thing that Snakemake runs: a job, a page, the table of rows, the front, the book."""

    rule: str
    jobid: int = -1
    name: str = ""
    log: Path | None = None
    message: str = ""
    since: float = 0.0
    seconds: float = 0.0

    @property
    def kind(self) -> str:
        """What it is compared with where time is reckoned."""
        return KINDS.get(self.rule, self.rule)

    def begun(self) -> bool:
        """Say whether it works; on a cluster it may be in the queue, and has written no log since."""
        return self.log is None or (self.log.exists() and self.log.stat().st_mtime >= self.since - 1)

    def done(self) -> tuple[int, int] | None:
        """Return how many of its tickets a running job has done, and of how many; None where its log does not say."""
        if self.kind != "job" or self.log is None or not self.log.exists():
            return None
        if self.log.stat().st_mtime < self.since:  # of an earlier run; this one waits in a queue
            return None
        found = TICKET.findall(self.log.read_text(errors="replace")[-2000:])
        return (int(found[-1][0]), int(found[-1][1])) if found else None

    def __str__(self) -> str:
        """Name it as a person would."""
        if self.kind == "job":
            study, _, rest = self.name.partition("/")
            method, _, seed = rest.rpartition("-s")
            return f"{method}, seed {seed} ({study})"
        return f"page {self.name}" if self.kind == "page" else self.rule


@dataclass
class Run:
    """What Snakemake has said of a run so far.

    Attributes:
        counts: Rule -> how many steps it has in this run.
        running: Steps begun and not ended, by Snakemake's number of them; on a cluster also those in its queue.
        ended: Steps that succeeded.
        failed: Steps that failed, and were not tried again.
        grid: The grid file.
        now: When the last line with a time was said.
    """

    weights: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=lambda: dict(USUAL) | _load(RATES))
    counts: dict[str, int] = field(default_factory=dict)
    running: dict[int, Step] = field(default_factory=dict)
    ended: list[Step] = field(default_factory=list)
    failed: dict[int, Step] = field(default_factory=dict)
    grid: str = ""
    began: float = 0.0
    now: float = 0.0
    most: int = 1
    _step: Step | None = None
    _is_error: bool = False
    _message: str = ""
    _counting: bool = False

    def read(self, line: str) -> None:
        """Take in one line of Snakemake's output."""
        line = line.rstrip("\n")
        if stamp := STAMP.match(line):
            self.now = datetime.strptime(stamp[1], "%a %b %d %H:%M:%S %Y").timestamp()
            self.began = self.began or self.now
        elif found := START.match(line):
            self._step, self._is_error = Step(found[1], since=self.now), False
        elif found := FAILED.match(line):
            self._step, self._is_error, self._message = Step(found[1]), True, ""
        elif found := DETAIL.match(line):
            self._detail(found[1], found[2])
        elif found := FINISHED.match(line):
            self._end(int(found[1]))
        elif found := AGAIN.match(line):
            self.failed.pop(int(found[1]), None)
        elif found := GRID.search(line):
            self.grid = self.grid or found[1]
            self.weights = self.weights or weights(self.grid)
        elif line.startswith("Job stats:"):
            self._counting = True
        elif self._counting and (found := COUNT.match(line)):
            self._counting = found[1] != "total"
            if self._counting:
                self.counts[found[1]] = int(found[2])

    def _detail(self, key: str, value: str) -> None:
        step = self._step
        if step is None:
            return
        if key == "log":
            step.log = Path(re.split(r", | \(check", value)[0])  # a cluster's own log stands behind ours
        elif key == "message":
            self._message = "" if value == "None" else value.split(". Detailed")[0]
        elif key == "wildcards":
            step.name = value.partition("=")[2]
        elif self._is_error:
            known = self.running.pop(int(value), step)
            known.message = self._message
            self.failed[int(value)], self._step = known, known
        else:
            step.jobid = int(value)
            self.running[step.jobid] = step
            self.most = max(self.most, len(self.running))

    def _end(self, jobid: int) -> None:
        step = self.running.pop(jobid, None)
        if step is not None:
            step.seconds = self.now - step.since
            self.ended.append(step)

    def weight(self, step: Step) -> float:
        """Return how long a step is, beside others of its kind."""
        return self.weights.get(step.name, 1.0)

    def amounts(self) -> dict[str, tuple[float, float, float]]:
        """Return by kind the weight done (parts of running jobs too), the weight in all, and the seconds it took."""
        found = {}
        for kind in dict.fromkeys(KINDS.get(rule, rule) for rule in self.counts if rule != "all"):
            ended = [s for s in self.ended if s.kind == kind]
            begun = [s for s in self.running.values() if s.kind == kind]
            done = sum(map(self.weight, ended))
            seconds = sum(s.seconds for s in ended)
            for step in begun:
                if part := step.done():
                    done += self.weight(step) * part[0] / part[1]
                    seconds += max(0.0, step.log.stat().st_mtime - step.since) if part[0] else 0.0
            found[kind] = done, self._total(kind), seconds
        return found

    def _total(self, kind: str) -> float:
        n = sum(count for rule, count in self.counts.items() if KINDS.get(rule, rule) == kind)
        seen = [s for s in (*self.ended, *self.running.values(), *self.failed.values()) if s.kind == kind]
        names = {s.name for s in seen}
        known = sum(map(self.weight, seen))
        waiting = [weight for name, weight in self.weights.items() if name not in names and _kind_of(name) == kind]
        mean = sum(waiting) / len(waiting) if waiting else 1.0
        return known + mean * max(0, n - len(names)) if kind in ("job", "page") else float(n)

    def fraction(self) -> float:
        """Return the part of the work that is done, as far as it can be told."""
        rates = self.rates()
        parts = self.amounts()
        total = sum(rates.get(kind, 1.0) * whole for kind, (_, whole, _) in parts.items())
        done = sum(rates.get(kind, 1.0) * done for kind, (done, _, _) in parts.items())
        return min(1.0, done / total) if total else 0.0

    def rates(self) -> dict[str, float]:
        """Return seconds per weight by kind: of this run where it has shown them, else of the one before."""
        found = {kind: seconds / done for kind, (done, _, seconds) in self.amounts().items() if done > 0}
        return self.before | found

    def left(self) -> float | None:
        """Return the seconds that are left, None as long as nothing tells.

        The work that is left, shared out among as many as were seen to run at once, but no less than the longest job
        under way needs to its end.
        """
        rates, parts = self.rates(), self.amounts()
        if parts and "job" in parts and "job" not in rates:
            return None
        if not parts:
            return None
        shared = sum(
            rates[kind] * max(0.0, whole - done) for kind, (done, whole, _) in parts.items() if kind in ("job", "page")
        )
        alone = sum(
            rates[kind] * max(0.0, whole - done)
            for kind, (done, whole, _) in parts.items()
            if kind in ("front", "book")
        )
        longest = max((self._rest(s, rates) for s in self.running.values() if s.kind == "job"), default=0.0)
        return max(shared / self.most, longest) + alone

    def _rest(self, step: Step, rates: dict[str, float]) -> float:
        part = step.done()
        share = 1 - part[0] / part[1] if part else 1.0
        return rates.get(step.kind, 0.0) * self.weight(step) * share

    def line(self) -> str:
        """Return in one line what is running, and how much waits in a cluster's queue."""
        steps = [step for step in self.running.values() if step.rule != "all"]
        begun = sorted((step for step in steps if step.begun()), key=lambda s: s.since)
        shown = [f"{step}{_ticket(step)}" for step in begun]
        parts = [*shown[:2], *([f"{len(shown) - 2} more"] if len(shown) > 2 else [])]
        parts += [f"{len(steps) - len(begun)} in the queue"] if len(steps) > len(begun) else []
        return " + ".join(parts) or "preparing"


def _ticket(step: Step) -> str:
    part = step.done()
    return f" ticket {min(part[0] + 1, part[1])} of {part[1]}" if part else ""


def _kind_of(name: str) -> str:
    return "page" if name.count("/") == 3 else "job"


def weights(grid: str) -> dict[str, float]:
    """Return name -> weight of a grid's jobs and pages, from the plan written when it last ran; empty without one."""
    found = plan(grid)
    return {**found.get("jobs", {}), **found.get("pages", {})}


def plan(grid: str) -> dict[str, dict[str, float]]:
    """Return the plan of a grid; empty where it never ran in this checkout."""
    return _load(f"{PLAN}/{Path(grid).stem}.json")


def remember(run: Run) -> None:
    """Keep what the steps of a run took, for the next one to begin with."""
    rates = {kind: rate for kind, rate in run.rates().items() if kind in USUAL}
    Path(RATES).write_text(json.dumps(rates))


def _load(path: str) -> dict:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):  # none yet, or being written this moment
        return {}


def follow(lines: Iterator[str]) -> Run:
    """Return the run that some lines of output tell of."""
    run = Run()
    for line in lines:
        run.read(line)
    return run


def span(seconds: float | None) -> str:
    """Say a time as a person would: ``40 s``, ``12 min``, ``3 h 20 min``.

    >>> [span(s) for s in (None, 41.2, 700, 12_000)]
    ['?', '41 s', '12 min', '3 h 20 min']
    """
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def clock(moment: float) -> str:
    """Say when, in local time."""
    return time.strftime("%H:%M:%S", time.localtime(moment))
