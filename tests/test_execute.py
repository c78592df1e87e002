"""Pages: parameters, failures, and kernels that are forked, killed and left alone."""

import asyncio
import contextlib
import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from lthlib.book import runner as module
from lthlib.book.runner import PageError, check, execute, main, parameters_of
from lthlib.book.zygote import KERNEL, ROOT, VARIABLE, fork, zygote
from lthlib.core.errors import UserError

linux = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")


@pytest.fixture(scope="module", autouse=True)  # it imports while the plain kernels are tested
def heavy():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with zygote(["numpy", "matplotlib.pyplot", "torch"]) as address:
            yield address


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def template(tmp_path):
    def write(*cells, parameters="x = 1", name="template"):
        cells = [cell if isinstance(cell, dict) else new_code_cell(cell) for cell in cells]
        head = new_code_cell(parameters, metadata={"tags": ["parameters"]})
        elsewhere = {"name": "elsewhere", "display_name": "Elsewhere", "language": "python"}
        notebook = new_notebook(cells=[new_markdown_cell("# Title"), head, *cells], metadata={"kernelspec": elsewhere})
        path = tmp_path / f"{name}.ipynb"
        nbformat.write(notebook, path)
        return path

    return write


def texts(path):
    """All that the cells of a page printed."""
    notebook = nbformat.read(path, as_version=4)
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    return "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")


def page(path, parameters=None, **options):
    """Execute a template; what its cells printed, read as JSON."""
    output = path.with_name(f"{path.stem}.page.ipynb")
    execute(path, output, parameters, **options)
    return json.loads(texts(output))


def gone(pid, seconds=30.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.05)
                continue
        return True
    return False


def wait_for(path, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)
    return path.read_text()


# ------------------------------------------------------------------------------------------------- parameters


def declared(source):
    cell = new_code_cell(source, metadata={"tags": ["parameters"]})
    return parameters_of(new_notebook(cells=[cell]))


def test_declarations_with_and_without_annotation():
    found = declared(
        "method = 'lth'  # a comment, n = 3\nrounds: int | None = None\nrate: float = -1e-3\nseeds = [0,\n 1]"
    )
    assert {p.name: p.default for p in found.values()} == {
        "method": "lth",
        "rounds": None,
        "rate": -1e-3,
        "seeds": [0, 1],
    }
    assert [p.optional for p in found.values()] == [False, True, False, False]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = f(1)", ["'x'", "literal", "f(1)"]),
        ("import os", ["name = literal", "import os"]),
        ("x, y = 1, 2", ["name = literal"]),
        ("x: int", ["name = literal", "x: int"]),
        ("x = (", ["not Python", "line 1"]),
        ("x = 1\nx = 2", ["'x'", "twice"]),
    ],
)
def test_a_parameters_cell_holds_literals_only(source, words):
    with pytest.raises(UserError) as error:
        declared(source)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("count", [0, 2])
def test_a_template_has_exactly_one_parameters_cell(count):
    cells = [new_code_cell("x = 1", metadata={"tags": ["parameters"]}) for _ in range(count)]
    with pytest.raises(UserError, match=f"exactly one.*found {count}"):
        parameters_of(new_notebook(cells=cells))


KINDS = "b = True\ni = 3\nf = 0.1\nt = 'lth'\nl = [0, 1]\ne = []\nd = {'a': 1}\nn = None\no: int | None = 3"
ACCEPTED = [("b", False), ("i", -4), ("f", 2), ("t", "rp"), ("t", ["rp", "omp"]), ("t", [])]
ACCEPTED += [("l", [5]), ("l", "all"), ("l", (1, 2)), ("e", ["x", 1]), ("d", {}), ("o", None), ("o", 1)]
ACCEPTED += [("n", value) for value in (None, 1, 2.5, "x", [1, ["x"]], {"a": None})]
REJECTED = [("b", 1), ("b", "true"), ("i", True), ("i", 3.0), ("i", "3"), ("i", None), ("f", "1e-3"), ("f", False)]
REJECTED += [("t", 18), ("t", [1]), ("t", None), ("l", [0, "1"]), ("l", [0.5]), ("l", [True]), ("l", 0)]
REJECTED += [("l", {"a": 0}), ("d", [1]), ("d", "a"), ("d", {1: 2}), ("n", object()), ("n", Path("x")), ("o", "1")]
REJECTED += [("f", math.inf), ("f", math.nan), ("n", 10**30), ("n", [math.inf])]
REJECTED += [("n", {"a": {1, 2}}), ("t", Path("x")), ("n", b"x")]


@pytest.mark.parametrize(("name", "value"), ACCEPTED)
def test_accepted_values(name, value):
    check({name: value}, declared(KINDS))


@pytest.mark.parametrize(("name", "value"), REJECTED)
def test_a_value_of_another_type_names_key_value_and_what_is_allowed(name, value):
    found = declared(KINDS)
    with pytest.raises(UserError) as error:
        check({name: value}, found)
    assert repr(name) in str(error.value)
    assert repr(value) in str(error.value)
    assert f"(default {found[name].default!r})" in str(error.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
odd_values = json_values | st.binary() | st.dates() | st.sets(st.integers()) | st.dictionaries(st.integers(), st.none())


@settings(max_examples=1000, deadline=None)
@given(st.dictionaries(st.sampled_from("bifteldno") | st.text(max_size=4) | st.integers(), odd_values, max_size=2))
def test_any_parameters_end_in_an_error_that_names_them_or_in_the_page(parameters):
    found = declared(KINDS)
    problem = complaint(parameters, found)
    if problem:
        assert any(repr(name) in problem for name in parameters)
        assert "Allowed: b, i, f, t, l, e, d, n, o." in problem or "(default " in problem
    else:
        values = injected(parameters)
        assert values == parameters
        assert all(type(values[name]) is type(value) for name, value in parameters.items())


@pytest.mark.parametrize(
    "value",
    [10**5000, "x" * 10_000, json.loads("[" * 500 + "]" * 500), [0] * 5000, {"a" * 1000: 1}],
    ids=["digits", "letters", "depth", "entries", "key"],
)
def test_no_value_is_too_large_to_be_refused(value):
    problem = complaint({"n": value}, declared(KINDS))
    assert "'n'" in problem
    assert "(default None)" in problem
    assert len(problem) < 1500


def complaint(parameters, found):
    try:
        check(parameters, found)
    except UserError as error:
        return str(error)
    return None


def injected(parameters):
    """The values that the cells of a page get to see."""
    notebook = new_notebook(cells=[new_code_cell(KINDS, metadata={"tags": ["parameters"]})])
    notebook.metadata["papermill"] = {}
    cells = module._prepare(notebook, parameters, Path("t.ipynb"), Path("p.ipynb")).cells
    values = {}
    exec("\n".join(cell.source for cell in cells), values)
    return {name: values[name] for name in parameters}


def test_the_command_line_reads_json_yaml_files_and_text(tmp_path):
    given_ = module._given('{"rate": 1e-3, "n": null}', [("seeds", "[0, 1]"), ("arch", "[a, b]"), ("method", "no")])
    assert given_ == {"rate": 0.001, "n": None, "seeds": [0, 1], "arch": ["a", "b"], "method": "no"}
    (tmp_path / "grid.yml").write_text("method: lth\nrate: 0.5\n")
    assert module._given(str(tmp_path / "grid.yml"), [("rate", "1")]) == {"method": "lth", "rate": 1}
    for text in ("[1, 2]", "{a: [}", "- x", ""):
        with pytest.raises(UserError, match="neither JSON nor YAML"):
            module._given(text, [])
    with pytest.raises(UserError, match="Cannot read the parameters"):
        module._given(str(tmp_path / "absent.json"), [])


# ----------------------------------------------------------------------------------- bad input writes nothing


def test_bad_input_is_one_sentence_and_writes_nothing(template, tmp_path, capsys):
    path = template("1/0", parameters="method = 'lth'")
    (tmp_path / "text.ipynb").write_text("no notebook")
    (tmp_path / "list.ipynb").write_text("[]")
    before = sorted(tmp_path.iterdir())
    runs = [
        ([path, tmp_path / "page.ipynb", "-p", "metod", "rp"], "'metod'. Did you mean 'method'? Allowed: method."),
        ([path, tmp_path / "page.ipynb", "-p", "method", "3"], "takes text or a list of texts (default 'lth'), not 3"),
        ([path, path], "overwrite its template"),
        ([path, tmp_path / "page.html"], "must be named *.ipynb"),
        ([path, path / "below" / "page.ipynb"], "Cannot make the folder"),
        ([tmp_path / "absent.ipynb", tmp_path / "page.ipynb"], "No such file"),
        ([tmp_path / "text.ipynb", tmp_path / "page.ipynb"], "is not a notebook"),
        ([tmp_path / "list.ipynb", tmp_path / "page.ipynb"], "is not a notebook: it has no cells"),
    ]
    for arguments, words in runs:
        assert main(list(map(str, arguments))) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


# ---------------------------------------------------------------------------------------------- plain kernels


def test_a_page_runs_on_this_interpreter_with_its_parameters_and_the_library(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    path = template(
        "import json, os, sys, lthlib\nprint(json.dumps([x, y, sys.executable, lthlib.__file__, os.getcwd()]))",
        parameters="x: int | None = None\ny = 'a'",
    )
    before = path.read_bytes()
    stale, seen, save = tmp_path / "page.failed.ipynb", [], module._save
    stale.write_text("stale")
    monkeypatch.setattr(module, "_save", lambda *given: seen.append(stale.exists()) or save(*given))
    execute(path, tmp_path / "page.ipynb", {"x": 3, "y": 'a"\\\n{z}'})
    assert seen == [False]  # a page that is killed here leaves nothing beside the new one
    page = nbformat.read(tmp_path / "page.ipynb", as_version=4)
    assert json.loads(texts(tmp_path / "page.ipynb")) == [
        3,
        'a"\\\n{z}',
        sys.executable,
        str(ROOT / "lthlib" / "__init__.py"),
        str(tmp_path),
    ]
    assert page.metadata.kernelspec.name == "python3"
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.ipynb", "template.ipynb"]


def test_progress_bars_leave_no_trace_and_warnings_stay(template, tmp_path):
    path = template(
        "import sys\nfrom tqdm import tqdm\n"
        "for i in tqdm(range(3), desc='bar'):\n    print('step', i)\n"
        "print('a warning', file=sys.stderr)",
        "for i in tqdm(range(3), desc='bar'):\n    pass",
        "print('kept\\ras it is')",
    )
    execute(path, tmp_path / "page.ipynb")
    cells = nbformat.read(tmp_path / "page.ipynb", as_version=4).cells[2:]
    assert [(o.name, o.text) for o in cells[0].outputs if o.name == "stderr"] == [("stderr", "a warning\n")]
    assert "".join(o.text for o in cells[0].outputs if o.name == "stdout") == "step 0\nstep 1\nstep 2\n"
    assert cells[1].outputs == []
    assert cells[2].outputs[0].text == "kept\ras it is\n"


def test_a_failing_cell_keeps_its_notebook_and_the_older_page(template, tmp_path):
    path = template("x = 2", "import warnings\nraise KeyError('method')", "print('never')")
    output = tmp_path / "page.ipynb"
    output.write_text("older")
    command = [sys.executable, "-m", "lthlib.book.runner", str(path), str(output), "-p", "x", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    failed = tmp_path / "page.failed.ipynb"
    assert done.stderr == (
        f"{path}, cell 4 (import warnings): KeyError: 'method'. The notebook up to there: {failed}\n"
    )
    assert output.read_text() == "older"
    cells = nbformat.read(failed, as_version=4).cells
    assert [o.ename for cell in cells for o in cell.get("outputs", [])] == ["KeyError"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.failed.ipynb", "page.ipynb", "template.ipynb"]


@pytest.mark.parametrize(
    ("cell", "options", "words"),
    [
        ("import sys; sys.exit(0)", {}, "cell 3 .*SystemExit"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", {}, "cell 3 .*died of SIGKILL .*memory"),
        ("import time; time.sleep(60)", {"timeout": 1}, "cell 3 .*CellTimeoutError: it took longer than 1 s"),
    ],
)
def test_a_page_that_ends_early_is_a_failure(template, tmp_path, cell, options, words, capfd):
    with pytest.raises(PageError, match=words):
        execute(template(cell, "print('never')"), tmp_path / "page.ipynb", **options)
    assert (tmp_path / "page.failed.ipynb").exists()
    assert not (tmp_path / "page.ipynb").exists()
    assert "Traceback" not in capfd.readouterr().err


def test_a_full_disk_is_said_and_the_older_page_stays(template, tmp_path, monkeypatch):
    def full(path, content, of):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.generated, "write", full)
    output = tmp_path / "page.ipynb"
    output.write_text("older")
    with pytest.raises(UserError, match=rf"Cannot write {output}: No space left"):
        execute(template("x"), output)
    with pytest.raises(PageError, match=r"cell 3 \(1/0\): ZeroDivisionError.* is lost.*No space left"):
        execute(template("1/0"), output)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["page.ipynb", "template.ipynb"]
    assert output.read_text() == "older"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_page_that_is_stopped_says_where_and_leaves_no_kernel(template, tmp_path, signum):
    path = template("import os, time; open(name, 'w').write(str(os.getpid()))\ntime.sleep(60)", parameters="name = ''")
    command = [sys.executable, "-m", "lthlib.book.runner", str(path), str(tmp_path / "page.ipynb")]
    command += ["-p", "name", str(tmp_path / "pid")]
    # Tests that run in the background inherit that an interrupt is ignored.
    mind = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=mind)
    kernel = int(wait_for(tmp_path / "pid"))
    process.send_signal(signum)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.splitlines()[-1].startswith(f"{path}, cell 3 (import os")
    assert "interrupted" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert (tmp_path / "page.failed.ipynb").exists()
    assert gone(kernel)


# --------------------------------------------------------------------------------------------- forked kernels


@pytest.fixture
def forked(heavy, monkeypatch):
    monkeypatch.setenv(VARIABLE, heavy)
    return heavy


@pytest.fixture
def light(monkeypatch):
    with zygote(["json"]) as address:
        monkeypatch.setenv(VARIABLE, address)
        yield address


WHO = "import json, os\n"


def parent_of_kernel(template):
    return page(template(WHO + "print(json.dumps(os.getppid()))", name="who"))


@linux
def test_a_forked_kernel_is_like_a_plain_one_but_warm(forked, template, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LTHLIB_TEST_COLOUR", "blue")
    path = template(
        "import sys\nwarm = 'torch' in sys.modules",
        "import json, os, lthlib, torch\nos.write(1, b'from C');",
        "facts = [warm, os.environ['LTHLIB_TEST_COLOUR'], os.getcwd(), lthlib.__file__]\n"
        "facts += [os.getppid(), torch.cuda.is_initialized(), sys.path.count(''), '__file__' in globals()]\n"
        "print(json.dumps(facts))",
        "import matplotlib.pyplot as plt\nplt.plot([1, 2]);",
        "import atexit, pathlib\natexit.register(pathlib.Path('ended').write_text, 'yes');",
    )
    execute(path, tmp_path / "page.ipynb")
    *facts, parent, cuda, here, file = json.loads(texts(tmp_path / "page.ipynb"))
    assert facts == [True, "blue", str(tmp_path), str(ROOT / "lthlib" / "__init__.py")]
    assert (cuda, here, file) == (False, 1, False)
    assert "lthlib.book.zygote" in psutil.Process(parent).cmdline()
    assert psutil.Process(parent).num_threads() == 1
    pictures = [c.outputs[0].data for c in nbformat.read(tmp_path / "page.ipynb", 4).cells[-2:-1]]
    assert "image/png" in pictures[0]
    assert (tmp_path / "ended").read_text() == "yes"
    assert capfd.readouterr() == ("from C", "")


@linux
def test_the_socket_is_private(forked):
    assert os.stat(forked).st_mode & 0o777 == 0o600
    assert os.stat(Path(forked).parent).st_mode & 0o777 == 0o700


@linux
def test_openmp_works_after_the_fork(forked, template):
    path = template(
        "import json, os, numpy as np, torch\n"
        "torch.set_num_threads(2)\n"
        "g = torch.Generator().manual_seed(0)\n"
        "a, b = (torch.randn(300, 300, generator=g) for _ in 'ab')\n"
        "matmul = np.abs((a @ b).numpy() - a.double().numpy() @ b.double().numpy()).max()\n"
        "x, w = torch.randn(16, 32, 32, 32, generator=g), torch.randn(32, 32, 3, 3, generator=g)\n"
        "exact = torch.nn.functional.conv2d(x, w)\n"
        "with torch.autocast('cpu', torch.bfloat16):\n"
        "    rough = torch.nn.functional.conv2d(x, w)\n"
        "relative = ((rough.float() - exact).norm() / exact.norm()).item()\n"
        "print(json.dumps([float(matmul), relative, str(rough.dtype), len(os.listdir('/proc/self/task'))]))"
    )
    matmul, relative, dtype, tasks = page(path)
    assert matmul < 1e-3
    assert 0 < relative < 2**-7
    assert dtype == "torch.bfloat16"
    assert tasks > 1


@linux
@pytest.mark.parametrize("threads", ["1", "2"])
def test_thread_counts_are_those_of_the_page(forked, template, monkeypatch, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    path = template(
        "import json, torch, numpy\nfrom threadpoolctl import threadpool_info\n"
        "print(json.dumps([torch.get_num_threads(), [i['num_threads'] for i in threadpool_info()]]))"
    )
    torch_threads, others = page(path)
    assert torch_threads == int(threads)
    assert len(others) >= 2
    assert set(others) == {int(threads)}


DRAW = (
    "import json, pathlib, random, time, numpy, torch\n"
    "pathlib.Path(mine).write_text('here')\n"
    "while not pathlib.Path(other).exists():\n    time.sleep(0.01)\n"
    "fresh = [random.random(), float(numpy.random.rand()), float(torch.rand(1))]\n"
    "seeded = [random.Random(5).random(), float(numpy.random.default_rng(5).random()),"
    " float(torch.rand(1, generator=torch.Generator().manual_seed(5)))]\n"
    "print(json.dumps([fresh, seeded]))"
)


@linux
def test_two_pages_at_once_share_no_random_state(forked, template, tmp_path):
    import numpy
    import torch

    names = [str(tmp_path / "a"), str(tmp_path / "b")]
    paths = [template(DRAW, parameters="mine = ''\nother = ''", name=n) for n in "pq"]
    with ThreadPoolExecutor() as pool:
        jobs = [
            pool.submit(page, p, {"mine": m, "other": o}) for p, m, o in zip(paths, names, names[::-1], strict=True)
        ]
        (fresh, seeded), (fresh_too, seeded_too) = (job.result() for job in jobs)
    assert all(a != b for a, b in zip(fresh, fresh_too, strict=True))
    generator = torch.Generator().manual_seed(5)
    expected = [random.Random(5).random(), float(numpy.random.default_rng(5).random())]
    assert seeded == seeded_too == [*expected, float(torch.rand(1, generator=generator))]


@linux
def test_one_crash_leaves_the_others_and_the_zygote_alone(forked, template, tmp_path, capfd):
    survivor = template(
        "import json, pathlib, time\npathlib.Path(mine).write_text('here')\n"
        "while not pathlib.Path(other).exists():\n    time.sleep(0.05)\nprint(json.dumps('alive'))",
        parameters="mine = ''\nother = ''",
        name="survivor",
    )
    with ThreadPoolExecutor() as pool:
        job = pool.submit(page, survivor, {"mine": str(tmp_path / "here"), "other": str(tmp_path / "crashed")})
        wait_for(tmp_path / "here")
        with pytest.raises(PageError, match=r"cell 3 .*died of SIGABRT"):
            execute(template("import os; os.abort()", name="crash"), tmp_path / "crash.page.ipynb")
        with pytest.raises(PageError, match=r"cell 3 .*SystemExit: 3"):
            execute(template("import sys; sys.exit(3)", name="exit"), tmp_path / "exit.page.ipynb")
        (tmp_path / "crashed").touch()
        assert job.result() == "alive"
    assert "plain" not in capfd.readouterr().err


@linux
def test_a_forked_kernel_can_be_interrupted_and_goes_on(forked):
    async def talk():
        manager = module.PageKernelManager()
        await manager.start_kernel()
        client = manager.client()
        client.start_channels()
        await client.wait_for_ready(timeout=60)
        asyncio.get_running_loop().call_later(0.3, lambda: asyncio.ensure_future(manager.interrupt_kernel()))
        replies = []
        for code in ("import time; time.sleep(60)", "1"):
            reply = await client.execute_interactive(code, timeout=60, output_hook=lambda _: None)
            replies.append(reply["content"])
        client.stop_channels()
        kernel = manager.provisioner.pid
        await manager.shutdown_kernel()
        return replies, kernel, manager.folder.name

    (interrupted, after), kernel, folder = asyncio.run(talk())
    assert interrupted["ename"] == "KeyboardInterrupt"
    assert after["status"] == "ok"
    assert gone(kernel)
    assert not Path(folder).exists()


SLEEP = (
    WHO
    + "import pathlib, time\n"
    + "pathlib.Path(name).write_text(json.dumps([os.getpid(), os.getppid()]))\ntime.sleep(60)"
)


@linux
def test_without_its_zygote_a_page_fails_and_the_next_starts_a_plain_kernel(light, template, tmp_path, capfd):
    path = template(SLEEP, parameters="name = ''", name="sleep")
    with ThreadPoolExecutor() as pool:
        job = pool.submit(execute, path, tmp_path / "page.ipynb", {"name": str(tmp_path / "pid")})
        kernel, parent = json.loads(wait_for(tmp_path / "pid"))
        os.kill(parent, signal.SIGKILL)
        with pytest.raises(PageError, match="died of SIGKILL"):
            job.result(timeout=60)
    assert gone(kernel)
    capfd.readouterr()
    assert parent_of_kernel(template) == os.getpid()
    (line,) = capfd.readouterr().err.splitlines()
    assert light in line
    assert "starting a plain one" in line


@linux
def test_a_kernel_dies_with_its_page_and_the_zygote_with_its_driver(template, tmp_path):
    path = template(SLEEP, parameters="name = ''", name="sleep")
    run = [sys.executable, "-m", "lthlib.book.runner", str(path)]
    script = (
        "import subprocess, sys, time\nfrom lthlib.book.zygote import zygote\n"
        f"with zygote(['json']):\n"
        f"    for n in '12':\n"
        f"        p = subprocess.Popen({run!r} + [{str(tmp_path)!r} + f'/{{n}}.ipynb', '-p', 'name', "
        f"{str(tmp_path)!r} + f'/pid{{n}}'])\n"
        f"        open({str(tmp_path)!r} + f'/page{{n}}', 'w').write(str(p.pid))\n"
        "    time.sleep(60)"
    )
    driver = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    (first, parent), (second, _) = (json.loads(wait_for(tmp_path / f"pid{n}")) for n in "12")
    os.kill(int(wait_for(tmp_path / "page1")), signal.SIGKILL)
    assert gone(first)
    assert psutil.pid_exists(second)
    assert psutil.pid_exists(parent)
    driver.kill()
    driver.wait()
    assert gone(parent)
    assert gone(second)
    assert gone(int(wait_for(tmp_path / "page2")))
    assert not (tmp_path / "2.ipynb").exists()


@linux
def test_a_zygote_of_another_interpreter_is_refused_and_rubbish_does_no_harm(light, template, monkeypatch):
    import socket

    for rubbish in (b"", b"{}\n", b"\xff\xfe\n", b"[1]\n"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(light)
            connection.sendall(rubbish)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "/elsewhere/python")
        with pytest.raises(OSError, match="another interpreter"):
            fork(light, KERNEL, [], {}, ".")
    assert parent_of_kernel(template) != os.getpid()


@linux
def test_the_context_leaves_nothing_behind(monkeypatch):
    monkeypatch.setenv(VARIABLE, "before")
    with zygote(["json"]) as address:
        (child,) = (p for p in psutil.Process().children() if address in p.cmdline())
        assert os.environ[VARIABLE] == address
    assert os.environ[VARIABLE] == "before"
    assert gone(child.pid)
    assert not Path(address).parent.exists()
