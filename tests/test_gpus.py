"""GPUs are shared out without one: a list of names, and jobs that write down which name they got and when."""

import collections
import itertools
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from lthlib.core import gpus
from lthlib.core.store import ROOT

JOB = """
import sys, time
from pathlib import Path
folder, name, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
from lthlib.core import gpus
device = gpus.claim()
import os
torch = sys.modules.get("torch")
assert torch is None or not torch.cuda.is_initialized()
assert os.environ["CUDA_VISIBLE_DEVICES"] == device
began = time.monotonic()
(folder / f"{name}.begun").write_text(device)
time.sleep(seconds)
(folder / f"{name}.ended").write_text(f"{device} {began} {time.monotonic()}")
"""
LISTED = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-aa-00)
  MIG 3g.20gb     Device  0: (UUID: MIG-aa-01)
  MIG 3g.20gb     Device  1: (UUID: MIG-GPU-aa/7/0)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-bb-00)
"""


@pytest.fixture
def devices():
    """Two names that nobody else on this machine uses; their lock files go with the test."""
    names = [f"GPU-{uuid.uuid4()}" for _ in range(2)]
    yield names
    for name in names:
        Path(f"/tmp/lthlib-gpus-{os.getuid()}/{name}.lock").unlink(missing_ok=True)


@pytest.fixture
def environment(tmp_path, devices):
    (tmp_path / "job.py").write_text(JOB)
    return {**os.environ, "PYTHONPATH": str(ROOT), gpus.VARIABLE: ",".join(devices)}


def start(folder, environment, name, seconds):
    command = [sys.executable, str(folder / "job.py"), str(folder), name, str(seconds)]
    return subprocess.Popen(command, env=environment)


def wait_for(path):
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return path.read_text()


def test_jobs_never_share_a_gpu_and_use_them_all(tmp_path, environment, devices):
    jobs = [start(tmp_path, environment, str(n), 0.3) for n in range(6)]
    assert [job.wait(timeout=60) for job in jobs] == [0] * 6
    held = collections.defaultdict(list)
    for n in range(6):
        device, began, ended = (tmp_path / f"{n}.ended").read_text().split()
        held[device].append((float(began), float(ended)))
    assert set(held) == set(devices)
    for spans in held.values():
        spans.sort()
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))


def test_a_killed_job_frees_its_gpu(tmp_path, environment, devices):
    environment[gpus.VARIABLE] = devices[0]
    killed = start(tmp_path, environment, "killed", 60)
    assert wait_for(tmp_path / "killed.begun") == devices[0]
    other = start(tmp_path, environment, "other", 0)
    time.sleep(0.5)
    assert not (tmp_path / "other.begun").exists()
    killed.kill()
    assert other.wait(timeout=30) == 0
    killed.wait()


def test_gpus_are_counted_without_cuda(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<X\n{LISTED}X\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv(gpus.CUDA, raising=False)
    assert gpus.visible() == ["MIG-aa-01", "MIG-GPU-aa/7/0", "GPU-bb-00"]
    monkeypatch.setenv(gpus.CUDA, "3, 1")
    assert gpus.visible() == ["3", "1"]
    for none in ("", "-1"):
        monkeypatch.setenv(gpus.CUDA, none)
        assert gpus.visible() == []
    monkeypatch.delenv(gpus.CUDA)
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2\nexit 9\n")
    assert gpus.visible() == []


def test_where_no_gpu_is_named_nothing_changes(monkeypatch):
    monkeypatch.delenv(gpus.VARIABLE, raising=False)
    monkeypatch.setenv(gpus.CUDA, "1")
    assert gpus.claim() is None
    assert os.environ[gpus.CUDA] == "1"


def test_a_process_that_already_uses_cuda_is_refused(monkeypatch):
    import torch

    monkeypatch.setenv(gpus.VARIABLE, "GPU-a")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="before a GPU was chosen"):
        gpus.claim()
