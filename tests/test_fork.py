"""`lthlib.book.fork` behaves as ``python -m`` does, with a zygote and without."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lthlib.book.zygote import ROOT, VARIABLE, zygote

MAIN = """
import os, signal, sys, time
from pathlib import Path
folder, what = Path(sys.argv[1]), sys.argv[2]
(folder / "facts").write_text(repr((__name__, sys.argv[1:], os.environ.get("COLOUR"), "torch" in sys.modules)))
print("to stdout", flush=True)
print("to stderr", file=sys.stderr)
if what == "exit": sys.exit(7)
if what == "message": sys.exit("why it ends")
if what == "raise": {}["missing"]
if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
if what == "sleep":
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def address():
    with zygote(["torch"]) as found:
        yield found


@pytest.fixture(params=["forked", "plain"])
def environment(request, address):
    if request.param == "forked" and sys.platform != "linux":
        pytest.skip("processes are forked on Linux only")
    given = {**os.environ, "COLOUR": "blue", "PYTHONPATH": str(ROOT)}
    given.pop(VARIABLE, None)
    return given | ({VARIABLE: address} if request.param == "forked" else {})


def start(folder, what, environment, **pipes):
    (folder / "work_on_it.py").write_text(MAIN)
    command = [sys.executable, "-m", "lthlib.book.fork", "work_on_it.py", ".", what]
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("go", 0, ""),
        ("exit", 7, ""),
        ("message", 1, "why it ends\n"),
        ("raise", 1, "KeyError: 'missing'\n"),
        ("kill", 128 + signal.SIGKILL, ""),
    ],
)
def test_status_streams_and_arguments_are_those_of_a_plain_process(tmp_path, environment, what, status, said):
    process = start(tmp_path, what, environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    # A plain process shows the signal that ended it as a negative status.
    assert process.returncode in (status, 128 - status)
    assert (out, err.splitlines()[0]) == ("to stdout\n", "to stderr")
    assert err.endswith(said)
    forked = VARIABLE in environment
    assert (tmp_path / "facts").read_text() == repr(("__main__", [".", what], "blue", forked))


def wait_for(path):
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int(path.read_text())


def test_a_termination_reaches_the_fork_and_its_status_comes_back(tmp_path, environment):
    process = start(tmp_path, "sleep", environment)
    pid = wait_for(tmp_path / "pid")
    process.terminate()
    assert process.wait(timeout=20) in (128 + signal.SIGTERM, -signal.SIGTERM)
    assert not psutil.pid_exists(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
def test_a_fork_dies_with_its_client(tmp_path, environment):
    process = start(tmp_path, "sleep", environment)
    pid = wait_for(tmp_path / "pid")
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while psutil.pid_exists(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_without_the_zygote_it_names_the_plain_process_starts(tmp_path, environment):
    gone = {**environment, VARIABLE: str(tmp_path / "nobody")}
    process = start(tmp_path, "exit", gone, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 7
    assert "starting a plain process" in err.splitlines()[0]


def test_a_module_is_run_as_main(environment):
    command = [sys.executable, "-m", "lthlib.book.fork", "lthlib", "rows", "nowhere.yml", "rows.csv"]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == 1
    assert "There is no grid file nowhere.yml" in found.stderr
    assert not Path(ROOT, "rows.csv").exists()
