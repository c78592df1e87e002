import os
import subprocess
import sys
import time

from lthlib.book import lifeline

WORKER = "import time; from lthlib.book import lifeline; lifeline.watch(); print('on', flush=True); time.sleep({})"


def worker(run, seconds):
    environment = {**os.environ, lifeline.VARIABLE: str(run)}
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER.format(seconds)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "on\n"
    return process


def test_a_worker_ends_with_its_run_even_before_anybody_reaps_it():
    run = subprocess.Popen(["sleep", "60"])
    process = worker(run.pid, 60)
    run.kill()  # not waited for: it stays a zombie, as under a parent that is busy
    assert process.wait(timeout=10) == 1
    assert not lifeline.is_alive(run.pid)
    run.wait()


def test_a_worker_of_a_living_run_goes_on():
    process = worker(os.getpid(), 1.5)
    assert process.wait(timeout=20) == 0


def test_without_a_run_nothing_is_watched(monkeypatch):
    monkeypatch.delenv(lifeline.VARIABLE, raising=False)
    lifeline.watch()
    time.sleep(2 * lifeline.SECONDS)
