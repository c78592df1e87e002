"""Several who use one store at the same time: everything is trained once, and all get the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

from lthlib.book import cost as estimate
from lthlib.tickets.study import study_from

ROOT = Path(__file__).parents[1]
STUDY = {
    "data": "mnist5k",
    "arch": "resnet8",
    "methods": ["lth", "snip"],
    "rounds": [1, 2],
    "seeds": [0],
    "recipe": {"epochs": 2, "batch_size": 100, "warmup": 0.0, "precision": "float32"},
    "train_size": 300,
}
CALLER = """
import json, sys
from lthlib.tickets import obtain as tickets
from lthlib.core.store import Store
from lthlib.tickets.study import study_from

train = tickets.train

def counted(*given, **named):
    with open(sys.argv[2], "a") as file:  # a short line is written in one piece
        file.write("trained\\n")
    return train(*given, **named)

tickets.train = counted
print("ready", flush=True)
sys.stdin.readline()
found = study_from(json.loads(sys.argv[1])).tickets()
for ticket in found if sys.argv[3] == "forwards" else reversed(found):
    trained = tickets.obtain(ticket, Store())
    print(ticket.id, [float(w.double().sum()) for w in trained.model.parameters()], flush=True)
"""


def test_three_callers_train_each_network_once_and_see_the_same(tmp_path):
    log = tmp_path / "log"
    (tmp_path / "caller.py").write_text(CALLER)
    environment = {**os.environ, "LTHLIB_STORE": str(tmp_path / "store"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(tmp_path)])
    callers = [
        subprocess.Popen(
            [sys.executable, "-c", "import caller", json.dumps(STUDY), str(log), order],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for order in ("forwards", "backwards", "forwards")
    ]
    for caller in callers:
        assert caller.stdout.readline() == "ready\n"
    for caller in callers:  # all at once
        caller.stdin.write("\n")
        caller.stdin.flush()
    found = []
    for caller in callers:
        out, err = caller.communicate(timeout=300)
        assert caller.returncode == 0, err
        found.append(sorted(out.splitlines()))
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 5
    assert len(log.read_text().splitlines()) == len(estimate.trained(study_from(STUDY)))
    assert not (tmp_path / "store" / "damaged").exists()
    assert not list((tmp_path / "store" / "tmp").glob("*"))
