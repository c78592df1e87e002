"""A real Slurm of one node, started by `tests/slurm.sh`: a tiny grid completes, a cancelled job is tried again."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
import yte
from test_report import GRID, copy_of_the_checkout

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tests/slurm.sh"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")


def obstacle():
    missing = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)}): tests/slurm.sh install"
    if os.geteuid():
        return "starting Slurm takes root"
    if os.path.lexists("/etc/slurm/slurm.conf"):
        return "this machine has a Slurm of its own (/etc/slurm/slurm.conf)"
    return None


@pytest.mark.skipif(sys.platform != "linux", reason="Slurm runs on Linux")
def test_the_script_says_what_is_missing(tmp_path):
    said = subprocess.run(
        [shutil.which("bash"), SCRIPT, "start"], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert said.returncode == 1
    assert "install" in said.stderr


@pytest.fixture
def slurm():
    reason = obstacle()
    if reason:
        pytest.skip(reason)
    subprocess.run([SCRIPT, "start"], check=True, timeout=120)
    try:
        yield
    finally:
        subprocess.run([SCRIPT, "stop"], check=True, timeout=120)
    assert not os.path.lexists("/etc/slurm/slurm.conf")
    assert not Path("/run/lthlib-slurm").exists()


def test_a_grid_completes_though_a_job_is_cancelled(slurm, tmp_path):
    checkout = copy_of_the_checkout(tmp_path)
    grid = {**GRID, "methods": ["omp"], "rounds": [1], "seeds": [0], "method_pages": []}
    dimensions = {"calibration": {"n_test": 300, "n_corrupted": 5, "n_bootstrap": 20}}
    (checkout / "workflow/grids/small.yml").write_text(yaml.safe_dump({**grid, "dimensions": dimensions}))
    environment = {**os.environ, "PYTHONPATH": str(checkout), "SBATCH_PARTITION": "main"}
    for name in ("LTHLIB_STORE", "LTHLIB_ZYGOTE", "LTHLIB_RUN"):
        environment.pop(name, None)
    run = subprocess.Popen(
        [sys.executable, "workflow/report.py", "workflow/grids/small.yml", "--profile", "slurm"],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    begun = checkout / "_build/logs/small/mnist5k-resnet8/dense-s0.log"
    deadline = time.monotonic() + 600
    while not begun.exists():
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    running = subprocess.run(["squeue", "-h", "-o", "%A", "-t", "R"], capture_output=True, text=True).stdout.split()
    subprocess.run(["scancel", running[0]], check=True)
    _, err = run.communicate(timeout=1800)
    assert run.returncode == 0, err[-3000:]
    log = (checkout / "_build/snakemake.log").read_text()
    assert "SLURM status is: 'CANCELLED'" in log
    assert log.count("Trying to restart job") == 1
    assert "failed" not in err
    rows = pd.read_csv(checkout / "book/_generated/small/rows.csv")
    assert set(rows["method"]) == {"dense", "omp"}
    assert (checkout / "_build/html/index.html").exists()


def settings(monkeypatch, **environment):
    for name in ("SBATCH_PARTITION", "LTHLIB_MINUTES", "LTHLIB_MB", "LTHLIB_THREADS", "LTHLIB_GPU", "LTHLIB_JOBS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return yte.process_yaml((ROOT / "workflow/profiles/slurm/config.yaml").read_text(), require_use_yte=True)


LATER = {"slurm_extra": "'--nice=100'"}


def test_the_clusters_settings_come_from_the_environment(monkeypatch):
    usual = settings(monkeypatch)
    assert usual["default-resources"] == {"mem_mb": "3000 * attempt", "runtime": "240 * attempt"}
    assert usual["set-resources"] == {"tickets": LATER}
    given = settings(
        monkeypatch,
        SBATCH_PARTITION="long",
        LTHLIB_MINUTES="600",
        LTHLIB_MB="8000",
        LTHLIB_THREADS="4",
        LTHLIB_GPU="1",
        LTHLIB_JOBS="9",
    )
    assert given["default-resources"] == {
        "slurm_partition": "long",
        "mem_mb": "8000 * attempt",
        "runtime": "600 * attempt",
    }
    assert given["set-threads"] == {"tickets": 4, "chains": 4, "book": 4}
    assert given["set-resources"] == {"tickets": {**LATER, "gpu": 1}, "chains": {"gpu": 1}}
    assert given["jobs"] == "9"


def test_what_a_killed_run_left_in_the_queue_is_cancelled_and_nothing_else(tmp_path, monkeypatch):
    sys.path.insert(0, str(ROOT / "workflow"))
    import report

    (tmp_path / "scancel").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    (tmp_path / "scancel").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(report, "LOG", tmp_path / "run.log")
    report.cancel_leftovers()
    report.LOG.write_text("Building DAG of jobs...\n")
    report.cancel_leftovers()
    assert not (tmp_path / "called").exists()
    report.LOG.write_text("Building DAG of jobs...\nSLURM run ID: 2859d042-aa\nSelect jobs\n")
    report.cancel_leftovers()
    assert (tmp_path / "called").read_text() == "--quiet --me --name 2859d042-aa\n"
