"""One job a GPU: where a machine has several, each job takes a free one and sees no other.

The driver names the machine's GPUs in `VARIABLE`. A job locks the file of one of them and sets CUDA_VISIBLE_DEVICES
before CUDA is touched; the system frees the lock with the job, however that ends. On a cluster the variable is unset:
the scheduler shares out the GPUs.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout

from lthlib.core.store import say

VARIABLE = "LTHLIB_GPUS"
CUDA = "CUDA_VISIBLE_DEVICES"
SECONDS = 0.2

_held: list[FileLock] = []  # as long as this process lives


def visible() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; empty where there are none.

    Asks the environment, else nvidia-smi, never CUDA: a process that has touched CUDA cannot fork workers that use it.
    """
    named = os.environ.get(CUDA)
    if named is not None:
        devices = [device.strip() for device in named.split(",")]
        return [d for d in devices if d not in ("", "-1", "NoDevFiles")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    found: list[str] = []
    for slice_of, uuid in re.findall(r"^( *)\S.*\(UUID: ([\w/-]+)\)", listed.stdout, flags=re.M):
        if slice_of and found and found[-1].startswith("GPU-"):
            found.pop()  # a GPU that is cut into slices is used through them only
        found.append(uuid)
    return found


def claim() -> str | None:
    """Take a free GPU for the rest of this process, waiting for one where all are taken; return its name.

    None where `VARIABLE` names no GPU: then nothing has changed.
    """
    devices = [device for device in os.environ.get(VARIABLE, "").split(",") if device]
    if not devices:
        return None
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        raise RuntimeError(f"CUDA was initialised before a GPU was chosen among {', '.join(devices)}")
    folder = Path("/tmp", f"lthlib-gpus-{os.getuid()}")  # not TMPDIR: it is another one in each run
    folder.mkdir(mode=0o700, exist_ok=True)
    locks = {device: FileLock(folder / f"{re.sub(r'[^A-Za-z0-9-]', '_', device)}.lock") for device in devices}
    said = False
    while True:
        for device, lock in locks.items():
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                _held.append(lock)
                os.environ[CUDA] = device
                return device
        if not said:
            say(f"waiting: {len(devices)} of {len(devices)} GPUs are taken by other jobs")
        said = True
        time.sleep(SECONDS)
