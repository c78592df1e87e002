"""A store that cannot be written, seen from the driver: one sentence, nothing half-written, and the next run ends right."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_report import copy_of_the_checkout

from lthlib.core.store import Store

GRID = {
    "title": "A tiny grid",
    "data": "mnist5k",
    "arch": "resnet8",
    "methods": ["rp", "snip"],
    "rounds": [1],
    "seeds": [0],
    "train_size": 200,
    "recipe": {"epochs": 1, "batch_size": 50, "warmup": 0.0},
    "method_pages": [],
    "dimensions": {"calibration": {"n_test": 50, "n_corrupted": 5, "n_bootstrap": 5}},
}
COMMAND = [
    sys.executable,
    "workflow/report.py",
    "workflow/grids/disk.yml",
    "--cores",
    "1",
    "--",
    "_build/stamps/disk/mnist5k-resnet8/rp-s0.json",
    "_build/stamps/disk/mnist5k-resnet8/snip-s0.json",
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout with a finished grid."""
    folder = copy_of_the_checkout(tmp_path_factory.mktemp("disk"))
    (folder / "workflow/grids/disk.yml").write_text(yaml.safe_dump(GRID))
    result = report(folder, folder / "store")
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.fixture
def store(checkout, tmp_path):
    """A store that lacks what RP and SNIP have to show; the dense network is there."""
    root = tmp_path / "disk" / "store"
    shutil.copytree(checkout / "store", root)
    for path in [path for method in ("rp", "snip") for path in root.glob(f"*/*-{method}-*") if path.is_dir()]:
        shutil.rmtree(path)
    shutil.rmtree(root / "locks")
    return root


def report(checkout, store, *before):
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "LTHLIB_STORE": str(store)}
    for name in ("LTHLIB_ZYGOTE", "LTHLIB_RUN"):
        environment.pop(name, None)
    return subprocess.run(
        [*before, "env", "-C", str(checkout), *COMMAND], env=environment, capture_output=True, text=True
    )


@pytest.fixture
def mounts(tmp_path):
    """Whether and how file systems of the test's own are mounted: ``inside(command)`` sees them, and ``root`` shows them."""
    if not (shutil.which("unshare") and shutil.which("nsenter")):
        pytest.skip("no `unshare` and `nsenter` to mount a small disk of the test's own")
    holder = subprocess.Popen(
        [
            "unshare",
            "-rm",
            "sh",
            "-c",
            f"mount -t tmpfs none {tmp_path} && umount {tmp_path} && echo ready && exec sleep 1000",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if holder.stdout.readline() != "ready\n":
        pytest.skip(f"a small disk cannot be mounted here: {holder.communicate()[1].strip()}")
    yield Mounts(holder.pid)
    holder.kill()
    holder.communicate()


class Mounts:
    def __init__(self, pid):
        self.enter = ["nsenter", "-t", str(pid), "-U", "-m", "--preserve-credentials"]
        self.root = Path(f"/proc/{pid}/root")

    def inside(self, *command):
        subprocess.run([*self.enter, *command], check=True)

    def seen(self, path):
        """Return where this process sees a path as it is in there."""
        return self.root / path.relative_to("/")


def state(store):
    """Return every file of a store but its locks, and which file on the disk it is since when."""
    files = [p for p in store.rglob("*") if p.is_file() and p.suffix != ".lock" and p.name != "filler"]
    return {p.relative_to(store): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


def rows(store):
    """Return what every evaluation of a store found."""
    return {p.parts[-3:]: json.loads(p.read_text())["values"] for p in store.glob("evaluations/*/*/values.json")}


def check_refusal(result, store, reason, failed):
    """It ended with one sentence that says what is wrong, however many jobs met it."""
    assert result.returncode == 1
    errors = re.findall(r"^ *error: (.*)$", result.stderr, flags=re.M)
    assert len(errors) == 1, result.stderr
    assert errors[0].startswith(f"The store {store} cannot be used: {reason}")
    assert "Traceback" not in result.stderr
    listed = re.findall(r"^(?:failed:|       ) (\w+)-s0 ", result.stderr, flags=re.M)
    assert sorted(listed) == failed


def check_mended(checkout, store, before, result):
    assert result.returncode == 0, result.stderr[-3000:]
    after = state(store)
    assert {path: identity for path, identity in after.items() if path in before} == before
    for method in ("rp", "snip"):
        assert [path for path in after if f"-{method}-" in str(path)]
    assert not Store(store).lost([*Store(store).list()])
    assert not (store / "damaged").exists()
    assert not list((store / "tmp").glob("*"))
    assert rows(store) == rows(checkout / "store")


def test_a_full_disk(checkout, store, mounts):
    disk, here = store.parent, mounts.seen(store)
    shutil.copytree(store, disk.parent / "kept")
    mounts.inside("mount", "-t", "tmpfs", "-o", "size=12m", "small", str(disk))
    mounts.inside("cp", "-a", str(disk.parent / "kept"), str(store))
    free = shutil.disk_usage(here).free
    (here / "filler").write_bytes(b"x" * (free - 100_000))  # a mask fits, and then the weights do not
    before = state(here)
    check_refusal(report(checkout, store, *mounts.enter), store, "no space is left", ["rp", "snip"])
    assert state(here) == before
    assert shutil.disk_usage(here).free < 100_000
    (here / "filler").unlink()
    check_mended(checkout, here, before, report(checkout, store, *mounts.enter))


def test_a_read_only_store(checkout, store, mounts):
    here, before = mounts.seen(store), state(store)
    mounts.inside("mount", "--bind", str(store), str(store))
    mounts.inside("mount", "-o", "remount,ro,bind", str(store))
    check_refusal(report(checkout, store, *mounts.enter), store, "it is read-only", ["rp", "snip"])
    assert state(here) == before
    mounts.inside("mount", "-o", "remount,rw,bind", str(store))
    check_mended(checkout, here, before, report(checkout, store, *mounts.enter))


def test_a_finished_store_need_not_be_writable(checkout, mounts):
    store = checkout / "store"
    mounts.inside("mount", "--bind", str(store), str(store))
    mounts.inside("mount", "-o", "remount,ro,bind", str(store))
    shutil.rmtree(checkout / "_build" / "stamps")
    before = state(store)
    result = report(checkout, store, *mounts.enter)
    assert result.returncode == 0, result.stderr[-3000:]
    assert state(store) == before


@pytest.fixture
def as_anyone():
    """What starts a program that permissions bind; they do not bind root."""
    if os.geteuid():
        return []
    if not shutil.which("setpriv"):
        pytest.skip("no `setpriv` to give up root's right to write everywhere")
    dropped = "-dac_override,-dac_read_search"
    return ["setpriv", "--bounding-set", dropped, "--inh-caps", dropped]


def test_no_permission_to_write_or_read(checkout, store, as_anyone):
    before = state(store)
    folders = [store, *(path for path in store.rglob("*") if path.is_dir())]
    for mode, failed in (0o000, []), (0o555, ["rp", "snip"]):
        for folder in reversed(folders):
            folder.chmod(mode)
        result = report(checkout, store, *as_anyone)
        for folder in folders:
            folder.chmod(0o755)
        check_refusal(result, store, "permission is denied", failed)
        assert state(store) == before
    check_mended(checkout, store, before, report(checkout, store, *as_anyone))
