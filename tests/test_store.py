import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lthlib.core.errors import UserError
from lthlib.core.store import MANIFEST, Store, seal, unseal, write_atomically


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


def test_what_another_version_of_the_code_made_meanwhile_is_not_taken_for_ones_own(tmp_path):
    """Two checkouts of different code on one store; the first has verified its own artifact already."""
    mine, other = Store(tmp_path), Store(tmp_path)
    mine.get("a", "1", writer("mine"))
    other.get("a", "2", writer("other"))
    assert not mine.has("a", "1")
    assert (mine.get("a", "1", writer("mine")) / "value.txt").read_text() == "mine"


def test_killed_while_it_removes_what_is_outdated_it_leaves_no_damage(tmp_path, monkeypatch, capsys):
    store = Store(tmp_path)
    store.get("a/b", "1", writer("old"))
    removed = shutil.rmtree

    def killed(path, **how):
        if how:
            return removed(path, **how)
        next(Path(path).iterdir()).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        store.get("a/b", "2", writer("new"))
    monkeypatch.undo()
    assert (Store(tmp_path).get("a/b", "2", writer("new")) / "value.txt").read_text() == "new"
    assert capsys.readouterr().err == ""
    assert list((tmp_path / "tmp").iterdir()) == []


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def folder_in_its_place(path):
    path.unlink()
    path.mkdir()


def file_in_its_folders_place(path):
    shutil.rmtree(path.parent)
    path.parent.write_text("no folder")


def another_owns_sum(path):
    """A manifest that agrees with the file, and with itself no longer."""
    manifest = json.loads((path.parent / MANIFEST).read_text())
    path.write_text("other")
    manifest["files"]["value.txt"] = [5, hashlib.sha256(b"other").hexdigest()]
    (path.parent / MANIFEST).write_text(json.dumps(manifest))


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "a folder": folder_in_its_place,
    "no folder": file_in_its_folders_place,
    "manifest truncated": lambda path: (path.parent / MANIFEST).write_text("{"),
    "manifest flipped": lambda path: flip(path.parent / MANIFEST),
    "manifest empty": lambda path: (path.parent / MANIFEST).write_bytes(b""),
    "manifest missing": lambda path: (path.parent / MANIFEST).unlink(),
    "manifest deep": lambda path: (path.parent / MANIFEST).write_text("[" * 100_000),
    "manifest binary": lambda path: (path.parent / MANIFEST).write_bytes(bytes(range(256))),
    "manifest of other things": lambda path: (path.parent / MANIFEST).write_text("[1, 2]"),
    "manifest rewritten": another_owns_sum,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen_set_aside_and_mended(tmp_path, damage, capsys):
    DAMAGES[damage](Store(tmp_path).get("a", "1", writer("hello world")) / "value.txt")
    fresh = Store(tmp_path)  # another process would not have verified it yet
    assert not fresh.has("a", "1")
    assert (fresh.get("a", "1", writer("hello world")) / "value.txt").read_text() == "hello world"
    assert len(list((tmp_path / "damaged").iterdir())) == 1
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_check_sets_aside_what_is_damaged_and_that_alone(tmp_path, damage, capsys):
    store = Store(tmp_path)
    for key in ("k/a", "k/b", "k/c/d"):
        path = store.get(key, "1", writer("hello world"))
    DAMAGES[damage](path / "value.txt")
    assert store.lost(["k/a", "k/b", "k/c/d", "k/absent"]) == {"k/c/d", "k/absent"}
    assert not path.exists()
    assert capsys.readouterr().err.count("damaged") >= 1
    assert sorted(store.list()) == ["k/a", "k/b"]
    assert len(list((tmp_path / "damaged").iterdir())) == 1


def test_no_flipped_bit_of_a_sealed_file_goes_unseen(tmp_path):
    path = tmp_path / "sealed"
    content = {"version": "1-a2", "files": {"x.npz": [12, "0af3"]}, "n": 1.5}
    text = seal(content).encode()
    path.write_bytes(text)
    assert unseal(path) == content
    for place in range(len(text)):
        for bit in range(8):
            path.write_bytes(text[:place] + bytes([text[place] ^ 1 << bit]) + text[place + 1 :])
            with pytest.raises(ValueError, match="not what was written"):
                unseal(path)
    for length in range(len(text) - 1):
        path.write_bytes(text[:length])
        with pytest.raises(ValueError, match="not what was written"):
            unseal(path)


def test_another_artifact_in_its_place_is_seen(tmp_path, capsys):
    """Whole by its own manifest, and of the same version: only the key tells."""
    store = Store(tmp_path)
    one, two = (store.get(f"k/{name}", "1", writer(name)) for name in ("one", "two"))
    one.rename(tmp_path / "other")
    two.rename(one)
    (tmp_path / "other").rename(two)
    fresh = Store(tmp_path)
    assert not fresh.has("k/one", "1")
    assert fresh.lost(["k/one", "k/two"]) == {"k/one", "k/two"}
    assert "what lies there is k/two" in capsys.readouterr().err
    assert (fresh.get("k/one", "1", writer("one")) / "value.txt").read_text() == "one"


def test_a_file_too_many_is_seen_unless_it_is_hidden(tmp_path, capsys):
    """Who reads a ticket asks whether there are masks: another's must not count as its own."""
    store = Store(tmp_path)
    path = store.get("k/a", "1", writer("one"))
    (path / ".nfs0001").write_text("a network file system keeps what someone still reads")
    assert store.lost(["k/a"]) == set()
    (path / "masks.safetensors").write_text("another's")
    assert store.lost(["k/a"]) == {"k/a"}
    assert "masks.safetensors does not belong there" in capsys.readouterr().err
    assert len([*(store.root / "damaged").iterdir()]) == 1


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
    ("code", "word"), [(errno.ENOSPC, "space"), (errno.EROFS, "read-only"), (errno.EACCES, "permission")]
)
def test_a_store_that_cannot_be_written_is_said_in_a_sentence(tmp_path, code, word):
    def full(folder):
        raise OSError(code, os.strerror(code))

    with pytest.raises(UserError, match=word):
        Store(tmp_path).get("a", "1", full)
    assert not (tmp_path / "a").exists()


def test_a_store_that_is_a_file_is_said_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("mine")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="a file is where a folder should be"):
            Store(root).get("a", "1", writer("x"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_makers_own_error_is_not_laid_on_the_store(tmp_path):
    def fails(folder):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "data.zip")

    with pytest.raises(FileNotFoundError):
        Store(tmp_path).get("a", "1", fails)


FILLER = """
import sys
import numpy as np, torch, safetensors.torch
from lthlib.pruning import masks
from lthlib.core.errors import UserError
from lthlib.core.store import Store
big = np.arange(2**20, dtype=np.int32)
ways = {
    "bytes": lambda f: (f / "x").write_bytes(big.tobytes()),
    "array": lambda f: np.save(f / "x.npy", big),
    "arrays": lambda f: np.savez(f / "x.npz", big=big),
    "masks": lambda f: masks.save({"w": torch.ones(2**22, dtype=torch.bool)}, f / "masks.safetensors"),
}
for name, way in ways.items():
    try:
        Store(sys.argv[1]).get("k/" + name, "1", way)
    except UserError as error:
        print(error)
"""


def check_that_nothing_fits(output, root):
    lines = output.splitlines()
    assert len(lines) == 4
    assert all(line.startswith(f"The store {root} cannot be used: ") for line in lines)
    return lines


@pytest.mark.skipif(not shutil.which("unshare"), reason="no `unshare` to mount a small disk of the test's own")
def test_a_full_disk_is_said_in_a_sentence_and_nothing_is_half_written(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    script = f"mount -t tmpfs -o size=1m small {small} || exit 77; {sys.executable} -c '{FILLER}' {small}; find {small} -type f ! -name '*.lock' >&2"
    result = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    if result.returncode == 77 or "unshare" in result.stderr:
        pytest.skip(f"a small disk cannot be mounted here: {result.stderr.strip()}")
    assert all("no space is left" in line for line in check_that_nothing_fits(result.stdout, small))
    assert result.stderr == ""


def test_a_limit_on_file_size_is_said_in_a_sentence_and_nothing_is_half_written(tmp_path):
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))\n" + FILLER
    result = subprocess.run([sys.executable, "-c", limited, str(tmp_path)], capture_output=True, text=True, check=True)
    check_that_nothing_fits(result.stdout, tmp_path)
    assert [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"] == []


@pytest.mark.parametrize("key", ["../a", "/a", "a/../b", "", "a//b", ".a", "a/.b", "a b"])
def test_a_key_cannot_leave_the_store(tmp_path, key):
    with pytest.raises(UserError):
        Store(tmp_path).get(key, "1", writer("x"))


MAKER = """
import sys, time
from pathlib import Path
from lthlib.core.store import Store
def make(folder):
    with open(sys.argv[2], "a") as log: log.write("made\\n")
    time.sleep(float(sys.argv[3]))
    (folder / "value.txt").write_text("x")
Store(sys.argv[1]).get("a", "1", make)
"""


def start(tmp_path, seconds):
    return subprocess.Popen([sys.executable, "-c", MAKER, str(tmp_path / "s"), str(tmp_path / "log"), str(seconds)])


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
    manifest = unseal(path / MANIFEST)
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4, appendix B.1
    assert manifest == {"key": "a", "version": "7", "files": {"value.txt": [3, abc]}}


def test_write_atomically_replaces_whole_files(tmp_path):
    write_atomically(tmp_path / "f", "one")
    write_atomically(tmp_path / "f", b"two")
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_text() == "two"
