"""What is said of a run, from the lines that Snakemake writes and the logs that its jobs write."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "workflow"))

from progress import Run, follow, span  # noqa: E402

HEAD = """\
  Command: workflow/snake.py --snakefile workflow/Snakefile --config grid=workflow/grids/two.yml
Job stats:
job        count
-------  -------
chains         1
page           2
tickets        1
all            1
total          5

"""
PLAN = {
    "jobs": {"d-a/dense-s0": 1.0, "d-a/lth-s0": 9.0},
    "pages": {"two/d-a/flatness/lth": 1.0, "two/d-a/methods/lth": 1.0},
}


def stamp(moment):
    return time.strftime("[%a %b %d %H:%M:%S %Y]\n", time.localtime(moment))


def begin(moment, rule, jobid, wildcard, log):
    kind = "page" if rule == "page" else "job"
    return (
        f"{stamp(moment)}localrule {rule}:\n    output: x\n    log: {log}\n    jobid: {jobid}\n"
        f"    reason: Missing\n    wildcards: {kind}={wildcard}\n    resources: tmpdir=/tmp\n"
    )


def end(moment, rule, jobid):
    return f"{stamp(moment)}Finished jobid: {jobid} (Rule: {rule})\n1 of 5 steps (20%) done\n"


def fail(moment, rule, jobid, log, message="None"):
    return (
        f"{stamp(moment)}Error in rule {rule}:\n    message: {message}\n    jobid: {jobid}\n    output: x\n"
        f"    log: {log}, _build/slurm/7.log (check log file(s) for error details)\n    shell:\n        wildcards: x\n"
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "_build/plans").mkdir(parents=True)
    (tmp_path / "_build/plans/two.json").write_text(json.dumps(PLAN))
    return tmp_path


@pytest.fixture
def now():
    return float(int(time.time()))


def read(text):
    return follow(iter(text.splitlines(keepends=True)))


def test_the_time_left_weighs_jobs_by_their_length_and_counts_what_a_running_one_has_done(folder, now):
    log = folder / "lth.log"
    text = HEAD + begin(now - 40, "tickets", 1, "d-a/dense-s0", folder / "dense.log") + end(now - 30, "tickets", 1)
    assert read(text).left() == pytest.approx((9 * 10 + 2 * 2) / 1)  # nine times as long as dense; pages as usual
    text += begin(now - 30, "chains", 2, "d-a/lth-s0", log)
    log.write_text("lth, seed 0:   0%|     | 0/3 [00:00<?, ?ticket/s]\rlth, seed 0:  33%|##  | 1/3 [00:30<01:00]")
    os.utime(log, (now, now))
    run = read(text)
    # Weight 1 + 9/3 took 10 + 30 s: another 6 are left, at 10 s each.
    assert run.left() == pytest.approx(60 + 4)
    assert run.fraction() == pytest.approx(40 / (100 + 4))
    assert run.line() == "lth, seed 0 (d-a) ticket 2 of 3"
    text += begin(now, "page", 3, "g/d-a/calibration/lth", log.with_name("none.log"))
    assert read(text).line() == "lth, seed 0 (d-a) ticket 2 of 3 + 1 in the queue"


def test_a_long_chain_is_not_shared_out_among_cores(folder, now):
    text = HEAD + begin(now - 40, "tickets", 1, "d-a/dense-s0", folder / "a.log") + end(now - 30, "tickets", 1)
    text += begin(now - 30, "chains", 2, "d-a/lth-s0", folder / "b.log")
    text += begin(now - 30, "page", 3, "two/d-a/methods/lth", folder / "c.log") + end(now - 28, "page", 3)
    assert read(text).most == 2
    assert read(text).left() == pytest.approx(90)


def test_before_anything_has_finished_no_time_is_made_up(folder, now):
    run = read(HEAD + begin(now, "tickets", 1, "d-a/dense-s0", folder / "dense.log"))
    assert run.left() is None
    assert span(run.left()) == "?"
    assert Run().left() is None


def test_a_step_that_is_tried_again_has_not_failed(folder, now):
    log = folder / "dense.log"
    text = HEAD + begin(now - 9, "tickets", 1, "d-a/dense-s0", log)
    text += fail(
        now - 5, "tickets", 1, log, "SLURM-job '7' failed, SLURM status is: 'TIMEOUT'. Detailed failure reason"
    )
    run = read(text)
    (step,) = run.failed.values()
    assert (step.log, step.name) == (log, "d-a/dense-s0")
    assert step.message == "SLURM-job '7' failed, SLURM status is: 'TIMEOUT'"
    text += "Trying to restart job 1.\n" + begin(now - 5, "tickets", 1, "d-a/dense-s0", log)
    assert not read(text).failed
    text += end(now, "tickets", 1)
    assert [s.seconds for s in read(text).ended] == [5.0]
    assert not read(text).running


def status(folder, *arguments):
    (folder / "workflow").mkdir(exist_ok=True)
    for name in ("status.py", "progress.py"):
        (folder / "workflow" / name).write_text((ROOT / "workflow" / name).read_text())
    return subprocess.run(
        [sys.executable, "-X", "importtime", "workflow/status.py", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
    )


def test_status_tells_done_running_queued_failed_and_waiting(folder, now):
    for name in ("dense", "lth"):
        (folder / f"_build/jobs/two/d-a/{name}-s0.log").parent.mkdir(parents=True, exist_ok=True)
    dense, lth = (folder / f"_build/jobs/two/d-a/{name}-s0" for name in ("dense", "lth"))
    dense.with_suffix(".json").write_text("[]")
    lth.with_suffix(".log").write_text("lth, seed 0:  33%|##  | 1/3 [00:30<01:00]")
    failed = folder / "page.log"
    failed.write_text("notebooks/flatness.ipynb, cell 3 (x): ValueError: bad\n")
    text = HEAD + begin(now - 60, "tickets", 1, "d-a/dense-s0", dense.with_suffix(".log")) + end(now - 50, "tickets", 1)
    text += begin(now - 50, "chains", 2, "d-a/lth-s0", lth.with_suffix(".log"))
    text += begin(now - 40, "page", 3, "two/d-a/flatness/lth", failed) + fail(now - 30, "page", 3, failed)
    text += begin(now - 30, "page", 4, "two/d-a/methods/lth", folder / "queued.log")
    (folder / "_build/snakemake.log").write_text(text)
    assert "nothing runs" in status(folder).stdout

    (folder / ".snakemake").mkdir()
    with (folder / ".snakemake/run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = status(folder)
    assert said.returncode == 1
    assert "jobs:   1 of 2 done, 1 running, 0 failed, 0 waiting" in said.stdout
    assert "pages:  0 of 2 done, 0 running, 1 failed, 1 waiting" in said.stdout
    assert "runs  lth, seed 0 (d-a), ticket 2 of 3, since" in said.stdout
    assert "queued  page two/d-a/methods/lth" in said.stdout
    assert "failed page two/d-a/flatness/lth: notebooks/flatness.ipynb, cell 3 (x): ValueError: bad" in said.stdout
    assert not {"torch", "numpy", "pandas", "yaml"} & {line.split("|")[-1].strip() for line in said.stderr.splitlines()}


def test_status_of_a_grid_that_did_not_run_last_or_never(folder):
    (folder / "_build/plans/other.json").write_text(json.dumps({"jobs": {"d-a/dense-s0": 1.0}, "pages": {}}))
    (folder / "_build/snakemake.log").write_text(HEAD)
    said = status(folder, "workflow/grids/other.yml")
    assert said.returncode == 0
    assert "jobs:   0 of 1 done, 0 running, 0 failed, 1 waiting" in said.stdout
    never = status(folder, "workflow/grids/never.yml")
    assert never.returncode == 1
    assert "No run of workflow/grids/never.yml has begun" in never.stderr
