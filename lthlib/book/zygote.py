"""A process that has imported the heavy libraries and forks workers and notebook kernels from itself in a moment.

Importing torch, pandas and seaborn costs every process seconds before its first line runs, and hundreds of megabytes.
The zygote pays once; each worker and each page then gets a fork of it, with an environment, a working directory,
standard streams, thread counts and random states of its own. The zygote itself starts no thread, which is what makes
the fork safe. `lthlib.book.fork` asks for a worker from the command line.

The client and the zygote speak over a unix socket, one connection per fork:

    client -> zygote   one line of JSON (executable, main, argv, env, cwd) with its stdout and stderr attached
    zygote -> client   one line: the process id, or why there is no fork
    client -> zygote   one byte per signal for the fork; closing the connection kills it
    zygote -> client   one line when the fork has ended: its exit status as in `subprocess.Popen.returncode`

Nobody outlives the one who asked: a fork dies with its client and with the zygote, the zygote with its parent.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import random
import runpy
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from lthlib.core.errors import UserError

ROOT = Path(__file__).resolve().parents[2]  # the checkout
"""The checkout, from which `lthlib` is imported."""

VARIABLE = "LTHLIB_ZYGOTE"
"""The environment variable that names the socket of a running zygote."""

PRELOAD = (
    "numpy",
    "pandas",
    "matplotlib.pyplot",
    "seaborn",
    "torch",
    "torchvision",
    "safetensors.torch",
    "papermill.execute",
)
"""What workers and pages import from other projects. Nothing of `lthlib`: an edited file must reach the next page."""

KERNEL = "ipykernel_launcher"
"""The main module that makes a fork a notebook kernel."""

INLINE = "module://matplotlib_inline.backend_inline"
PR_SET_PDEATHSIG = 1
REPLY_SECONDS = 60.0  # a zygote that is still importing answers when it is done
REQUEST_SECONDS = 5.0  # a page sends its request in one go; one that stalls must not stall the others


class TemporaryFolder:
    """A private folder (0700) whose path is short enough for the address of a unix socket.

    It is locked for as long as its maker lives. A maker that is killed cannot remove it, so whoever makes the next one
    removes those of the same prefix that nobody holds.
    """

    def __init__(self, prefix: str):
        parent = Path(tempfile.gettempdir() if len(tempfile.gettempdir()) < 60 else "/tmp")
        for left in parent.glob(f"{prefix}*"):
            with contextlib.suppress(OSError):  # held, another person's, or just gone
                os.close(_locked(left))
                shutil.rmtree(left)
        self._held = None
        while self._held is None:
            self.name = tempfile.mkdtemp(prefix=prefix, dir=parent)
            with contextlib.suppress(OSError):  # another maker took it for abandoned before it was locked
                self._held = _locked(self.name)

    def cleanup(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.name, ignore_errors=True)
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def __enter__(self) -> str:
        return self.name

    def __exit__(self, *_: object) -> None:
        self.cleanup()


def _locked(folder: str | Path) -> int:
    """Lock a folder and return the descriptor that holds the lock; OSError where another holds it or it is gone."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(folder)
    except BaseException:
        os.close(held)
        raise
    return held


# -------------------------------------------------------------------------------------------- the page's side


class ForkedProcess:
    """A fork of the zygote, with the part of `subprocess.Popen` that a kernel provisioner uses."""

    stdin = stdout = stderr = None

    def __init__(self, connection: socket.socket, pid: int):
        self.pid = pid
        self.returncode: int | None = None
        self._connection = connection
        connection.setblocking(False)

    def poll(self) -> int | None:
        """Return the exit status, None while the fork runs. Without its zygote a fork is dead."""
        if self.returncode is None:
            try:
                line = self._connection.recv(64)
            except BlockingIOError:
                return None
            except OSError:
                line = b""
            self.returncode = int(line) if line else -signal.SIGKILL
            self._connection.close()
        return self.returncode

    def wait(self) -> int:
        """Wait for the end of the fork and return its exit status."""
        while self.poll() is None:
            select.select([self._connection], [], [])
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """Send a signal to the fork's process group, through the zygote: no other process can get it."""
        if self.poll() is None:
            with contextlib.suppress(OSError):
                self._connection.send(bytes([signum]))

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def fork(address: str, main: str, argv: Sequence[str], env: dict[str, str], cwd: str) -> ForkedProcess:
    """Ask the zygote at ``address`` for a fork.

    Args:
        address: The zygote's socket.
        main: What it runs: a module as in ``python -m``, or a file ``*.py``; `KERNEL` for a notebook kernel.
        argv: Its arguments.
        env: Its whole environment.
        cwd: Its working directory.

    Raises:
        OSError: There is no zygote, it does not answer, or it runs on another interpreter.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(REPLY_SECONDS)
        connection.connect(address)
        request = {"executable": sys.executable, "main": main, "argv": list(argv), "env": env, "cwd": cwd}
        line = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(connection, [line], [1, 2])
        connection.sendall(line[sent:])
        reply = json.loads(_read_line(connection) or '{"error": "it closed the connection"}')
        if "error" in reply:
            raise OSError(reply["error"])
    except BaseException:
        connection.close()
        raise
    return ForkedProcess(connection, reply["pid"])


def _read_line(connection: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n") and (byte := connection.recv(1)):  # not a byte of the line after it
        line += byte
    return line


@contextlib.contextmanager
def zygote(modules: Sequence[str] = PRELOAD, *, holding: int | None = None) -> Iterator[str | None]:
    """Keep a zygote running for what is started inside the ``with`` block, here and in child processes.

    Returns at once: clients that ask while the zygote still imports wait for it. `VARIABLE` is set for the
    block. Only on Linux: the system libraries of macOS forbid work after a fork, so there everything starts as a
    plain process and the context is None.

    Args:
        modules: What to import before the first fork.
        holding: A descriptor that the zygote and every fork keep open: a lock on it is free when all have ended.

    Raises:
        UserError: The zygote did not start.
    """
    if sys.platform != "linux":
        yield None
        return
    with TemporaryFolder("lth-zygote-") as folder:
        address = str(Path(folder, "socket"))
        process = _start(address, modules, () if holding is None else (holding,))
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = address
        try:
            yield address
        finally:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before
            process.terminate()
            process.wait()


def _start(address: str, modules: Sequence[str], held: Sequence[int]) -> subprocess.Popen:
    # Thread counts are each page's own business; OpenBLAS alone would start its threads on import.
    env = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    env |= {"OPENBLAS_NUM_THREADS": "1", "MPLBACKEND": INLINE}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "lthlib.book.zygote", "--parent", str(os.getpid()), address, *modules]
    process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, pass_fds=held)
    deadline = time.monotonic() + REPLY_SECONDS
    while not os.path.exists(address):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise UserError(f"The process that forks workers did not start: {' '.join(command)}.")
        time.sleep(0.01)
    return process


# ------------------------------------------------------------------------------------------ the zygote's side


class _Server:
    """Forks, passes signals on and reports exits, all in one thread."""

    def __init__(self, listener: socket.socket, parent: int):
        self.pid = os.getpid()
        self.parent = parent
        self.forks: dict[int, socket.socket] = {}
        self.listener = listener
        self.wake, self.woken = socket.socketpair()
        self.woken.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ, self._accept)
        self.selector.register(self.wake, selectors.EVENT_READ, lambda: self.wake.recv(4096) and None)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes the selector through the descriptor below
        signal.set_wakeup_fd(self.woken.fileno(), warn_on_full_buffer=False)

    def run(self) -> dict | None:
        """Serve until the parent is gone. Returns a request in every fork, None in the zygote."""
        while os.getppid() == self.parent:
            for key, _ in self.selector.select(timeout=0.5):
                request = key.data()
                if request is not None:
                    return request
            self._reap()
        return None

    def stop(self) -> None:
        """Kill every fork."""
        for pid in self.forks:
            _signal_group(pid, signal.SIGKILL)

    def _accept(self) -> dict | None:
        connection, _ = self.listener.accept()
        try:
            request = _receive(connection)
        except (OSError, ValueError) as problem:
            _send(connection, {"error": f"the request was not understood ({problem})"})
            connection.close()
            return None
        if request["executable"] != sys.executable:
            _send(connection, {"error": f"it runs on another interpreter, {sys.executable}"})
            connection.close()
            return None
        return self._fork(connection, request)

    def _fork(self, connection: socket.socket, request: dict) -> dict | None:
        pid = os.fork()
        if pid == 0:
            self._close()
            connection.close()
            return request
        for stream in request["streams"]:
            os.close(stream)
        self.forks[pid] = connection
        _send(connection, {"pid": pid})
        self.selector.register(connection, selectors.EVENT_READ, lambda: self._obey(pid))
        return None

    def _obey(self, pid: int) -> None:
        connection = self.forks[pid]
        try:
            signals = connection.recv(64)
        except OSError:
            signals = b""
        if not signals:  # the client is gone, and with it all interest in its fork
            self.selector.unregister(connection)
            signals = bytes([signal.SIGKILL])
        for signum in signals:
            _signal_group(pid, signum)

    def _reap(self) -> None:
        for pid, connection in list(self.forks.items()):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                with contextlib.suppress(OSError):  # what it started does not outlive it either
                    os.killpg(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                del self.forks[pid]
                with contextlib.suppress(KeyError):
                    self.selector.unregister(connection)
                _send(connection, os.waitstatus_to_exitcode(status))
                connection.close()

    def _close(self) -> None:
        """Let go, in a fork, of what is the zygote's: it must not hold another client's line open."""
        signal.set_wakeup_fd(-1)
        self.selector.close()
        for end in (self.listener, self.wake, self.woken, *self.forks.values()):
            end.close()


def _receive(connection: socket.socket) -> dict:
    connection.settimeout(REQUEST_SECONDS)
    data, streams, _, _ = socket.recv_fds(connection, 65536, 2)
    while data and not data.endswith(b"\n"):
        more = connection.recv(65536)
        if not more:
            break
        data += more
    if len(streams) != 2:
        raise ValueError("no standard streams")
    return json.loads(data) | {"streams": streams}


def _send(connection: socket.socket, reply: object) -> None:
    with contextlib.suppress(OSError):  # a page that is gone is noticed when its line reads empty
        connection.sendall(json.dumps(reply).encode() + b"\n")


def _signal_group(pid: int, signum: int) -> None:
    try:
        os.killpg(pid, signum)
    except ProcessLookupError:  # forked a moment ago and not yet the leader of its group
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


def _become(request: dict, zygote_pid: int, path: list[str]) -> int:
    """Turn this fork into what ``python -m main argv`` would have been; return its exit status."""
    os.setsid()
    _end_with(zygote_pid, signal.SIGKILL)
    for signum in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(signum, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream, target in zip([os.open(os.devnull, os.O_RDONLY), *request["streams"]], (0, 1, 2), strict=True):
        os.dup2(stream, target)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[:] = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *path]
    sys.argv = [request["main"], *request["argv"]]
    _set_threads()
    _reseed()
    if "matplotlib" in sys.modules:
        default = INLINE if request["main"] == KERNEL else "agg"
        sys.modules["matplotlib"].rcParams["backend"] = os.environ.get("MPLBACKEND", default)
    status = _run(request["main"], zygote_pid)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    return status


def _run(main: str, zygote_pid: int) -> int:
    try:
        if main == KERNEL:
            from ipykernel.kernelapp import IPKernelApp

            # ipykernel reads the parent's id on import, which was in the zygote; it ends the kernel on any system.
            IPKernelApp.launch_instance([*sys.argv[1:], f"--IPKernelApp.parent_handle={zygote_pid}"])
        elif main.endswith(".py"):
            sys.path.insert(0, str(Path(main).resolve().parent))
            runpy.run_path(main, run_name="__main__")
        else:
            runpy.run_module(main, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end_with(parent: int, signum: int) -> None:
    """Let the system send this process a signal when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:  # it ended before the line above
        os.kill(os.getpid(), signum)


def _set_threads() -> None:
    """Apply the thread counts of the environment, which the libraries read when they were loaded."""
    from threadpoolctl import threadpool_limits

    openmp = os.environ.get("OMP_NUM_THREADS")
    if openmp:
        threadpool_limits(int(openmp), user_api="openmp")
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(int(openmp))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threadpool_limits(int(os.environ.get("OPENBLAS_NUM_THREADS") or openmp or cores), user_api="blas")


def _reseed() -> None:
    """Give the global generators fresh entropy: two forks must not draw the same numbers."""
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].seed()


def _listen(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(f"{address}.new")
        listener.listen(128)
        os.rename(f"{address}.new", address)  # whoever finds it is heard
    except OSError as problem:
        raise UserError(f"Cannot listen on {address}: {problem.strerror or problem}.") from None
    finally:
        os.umask(mask)
    return listener


def _preload(modules: Sequence[str]) -> None:
    for name in ("ipykernel.kernelapp", "ipykernel.zmqshell", "threadpoolctl", *modules):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # collections in the forks then leave the shared pages alone


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the zygote (see the head of this file)."""
    parser = argparse.ArgumentParser(prog="python -m lthlib.book.zygote", description=__doc__.splitlines()[0])
    parser.add_argument("socket", help="where to listen, in a folder that is yours alone")
    parser.add_argument("modules", nargs="*", help=f"what to import first (default: {' '.join(PRELOAD)})")
    parser.add_argument("--parent", type=int, default=os.getppid(), help="the process with which it ends")
    options = parser.parse_args(arguments)
    parent = options.parent
    try:
        listener = _listen(options.socket)
    except UserError as problem:
        print(problem, file=sys.stderr)
        return 2
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [entry for entry in sys.path[1:] if entry not in own]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which then ends this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    request, server = None, None
    try:
        _end_with(parent, signal.SIGTERM)
        _preload(options.modules or PRELOAD)
        server = _Server(listener, parent)
        request = server.run()
    except SystemExit:
        pass
    finally:
        if server is None or os.getpid() == server.pid:
            if server is not None:
                server.stop()
            Path(options.socket).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # whoever made the folder may have been killed
                Path(options.socket).parent.rmdir()
    return 0 if request is None else _become(request, server.pid, path)


if __name__ == "__main__":
    os._exit(main())  # taking down torch module by module costs every fork half a second
