import errno
import json
import os
import subprocess
import sys
import time

import pytest

from lthlib.errors import UserError
from lthlib.store import MANIFEST, Store, write_atomically


def writer(text, calls=None):
    def make(folder):
        if calls is not None:
            calls.append(text)
        (folder / "value.txt").write_text(text)

    return make


def test_an_artifact_is_made_once(tmp_path):
    calls = []
    for _ in range(3):
        path = Store(tmp_path).get("a/b", "1", writer("x", calls))
    assert (path / "value.txt").read_text() == "x"
    assert calls == ["x"]


def test_another_version_is_made_again(tmp_path):
    store = Store(tmp_path)
    store.get("a", "1", writer("old"))
    assert (store.get("a", "2", writer("new")) / "value.txt").read_text() == "new"
    assert not (tmp_path / "damaged").exists()


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "delete", "manifest", "manifest-gone"])
def test_damage_is_seen_set_aside_and_mended(tmp_path, damage, capsys):
    path = Store(tmp_path).get("a", "1", writer("hello world")) / "value.txt"
    manifest = path.parent / MANIFEST
    if damage == "truncate":
        path.write_text("hello")
    elif damage == "flip":
        content = bytearray(path.read_bytes())
        content[3] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "delete":
        path.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:20])
    else:
        manifest.unlink()
    fresh = Store(tmp_path)  # another process would not have verified it yet
    assert not fresh.has("a", "1")
    assert (fresh.get("a", "1", writer("hello world")) / "value.txt").read_text() == "hello world"
    assert len(list((tmp_path / "damaged").iterdir())) == 1
    assert "damaged" in capsys.readouterr().err


def test_a_maker_that_fails_leaves_nothing(tmp_path):
    def fails(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("no")

    store = Store(tmp_path)
    with pytest.raises(RuntimeError):
        store.get("a", "1", fails)
    assert not (tmp_path / "a").exists()
    assert list((tmp_path / "tmp").iterdir()) == []
    assert store.get("a", "1", writer("y")).name == "a"


@pytest.mark.parametrize(
    ("code", "word"), [(errno.ENOSPC, "space"), (errno.EROFS, "read-only"), (errno.EACCES, "permissions")]
)
def test_a_store_that_cannot_be_written_is_said_in_a_sentence(tmp_path, code, word):
    def full(folder):
        raise OSError(code, os.strerror(code))

    with pytest.raises(UserError, match=word):
        Store(tmp_path).get("a", "1", full)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("key", ["../a", "/a", "a/../b", "", "a//b", ".a", "a/.b", "a b"])
def test_a_key_cannot_leave_the_store(tmp_path, key):
    with pytest.raises(UserError):
        Store(tmp_path).get(key, "1", writer("x"))


MAKER = """
import sys, time
from pathlib import Path
from lthlib.store import Store
def make(folder):
    with open(sys.argv[2], "a") as log: log.write("made\\n")
    time.sleep(float(sys.argv[3]))
    (folder / "value.txt").write_text("x")
Store(sys.argv[1]).get("a", "1", make)
"""


def start(tmp_path, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", MAKER, str(tmp_path / "s"), str(tmp_path / "log"), str(seconds)]
    )


def test_two_processes_make_it_once(tmp_path):
    both = [start(tmp_path, 1) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert (tmp_path / "log").read_text() == "made\n"


def test_a_killed_maker_leaves_neither_lock_nor_rubbish(tmp_path):
    killed = start(tmp_path, 60)
    while not (tmp_path / "log").exists():
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    store = Store(tmp_path / "s")
    assert (store.get("a", "1", writer("y")) / "value.txt").read_text() == "y"
    assert list((tmp_path / "s" / "tmp").iterdir()) == []


def test_a_manifest_tells_sizes_and_hashes(tmp_path):
    path = Store(tmp_path).get("a", "7", writer("abc"))
    manifest = json.loads((path / MANIFEST).read_text())
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4, appendix B.1
    assert manifest == {"version": "7", "files": {"value.txt": [3, abc]}}


def test_write_atomically_replaces_whole_files(tmp_path):
    write_atomically(tmp_path / "f", "one")
    write_atomically(tmp_path / "f", b"two")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_text() == "two"
