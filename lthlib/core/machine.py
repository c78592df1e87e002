"""The processor: which device, which precision, and what to write down about the machine."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch
from threadpoolctl import threadpool_info

from lthlib.core.errors import choose

PRECISIONS = ("auto", "bfloat16", "float32")


def device() -> torch.device:
    """Return the first visible CUDA device, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def resolve_precision(precision: str) -> torch.dtype:
    """Return the number type of the network's arithmetic; ``"auto"`` is bfloat16 where that is faster."""
    choose(precision, PRECISIONS, "precision")
    if precision == "auto":
        precision = "bfloat16" if _is_faster_in_bfloat16() else "float32"
    return getattr(torch, precision)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread, so that no sum depends on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def keep_memory() -> None:
    """Let this process keep what it frees, for its next step: asking the system anew took a tenth of a training."""
    with contextlib.suppress(AttributeError):  # of a C library that has no such call
        for option, size in ((-3, 2**25), (-1, 2**28)):  # M_MMAP_THRESHOLD, whose most this is, and M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, size)


def give_back_memory() -> None:
    """Give what was freed back to the system: glibc keeps it, 0.8 GB after the curvature of one ResNet-18."""
    with contextlib.suppress(AttributeError):  # of a C library that has no such call
        ctypes.CDLL(None).malloc_trim(0)


@functools.cache
def _is_faster_in_bfloat16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    cpu = torch.cpu.get_capabilities()
    # Intel's vectors multiply no more pairs a second in bfloat16 than in float32, and convert besides: networks take up
    # to 1.8 times as long. Its tiles (AMX), which virtual machines often hide, do, and so do AMD's vectors.
    return cpu.get("amx_bf16", False) or "Intel" not in cpu.get("cpu_name", "")


@functools.cache
def commit() -> str:
    """Return the commit of the checkout, with ``+`` where the library differs from it; ``"unknown"`` outside git."""
    root = Path(__file__).parents[1]
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "."], cwd=root).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def processor() -> str:
    """Return the processor's model and core count, or the GPU's name; never the machine's own name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = named[0] if named else model
    return f"{model}, {os.cpu_count()} cores"


@functools.cache
def blas() -> str:
    """Return whose kernels linear algebra in NumPy runs on: by processor or `OPENBLAS_CORETYPE`. They round apart."""
    found = (library for library in threadpool_info() if library["user_api"] == "blas")
    names = {f"{library['internal_api']} {library.get('architecture', '')}".strip() for library in found}
    return ", ".join(sorted(names)) or "unknown"


def provenance(precision: str) -> dict[str, str | int]:
    """Return what a result must carry so that it can be traced and made again."""
    return {
        "commit": commit(),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in ("torch", "numpy")},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "blas": blas(),
        "device": device().type,
        "precision": str(resolve_precision(precision)).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
