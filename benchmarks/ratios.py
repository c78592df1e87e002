"""What the library costs beside other people's code: every ratio in one run, for the chapter *What it costs*.

    make benchmarks          # or: python benchmarks/ratios.py [--only training ...] [--record]

Runs the programs below one after the other, each in a process of its own; each says what it measured with `tell`.
Peers that are no dependency of the project are installed in a folder that is thrown away. `--record` writes
book/results/ratios.json, program by program: one entry for each kind of processor, what a program told before replaced.
Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from lthlib.core import machine
from lthlib.core.store import ROOT, seal, write_atomically
from lthlib.results.recorded import RATIOS, recorded_json

HERE = Path(__file__).resolve().parent
PEERS = ("lime==0.2.0.1", "imagecorruptions-imaug==1.1.5", "corrupt-tta==0.1.7")
PROGRAMS = {
    "limits": (),
    "training": ("--repeats", "3", "--threads", "{threads}"),
    "predictions": (),
    "explanations": ("8",),
    "dissection": (),
    "flatness": ("--starts", "2", "--epochs", "3", "--threads", "{threads}"),
    "corruptions": ("--images", "100", "--repeats", "1"),
    "masks": ("--arch", "resnet18", "--threads", "{threads}"),
    "metrics": (),
}
ONE_THREAD = ("corruptions", "dissection", "metrics")  # as their texts say


def tell(what: str, peer: str, seconds: float, peer_seconds: float) -> None:
    """Print what takes how long here and by a peer, and leave it to whoever collects such lines."""
    print(f"{what}: {peer_seconds / seconds:.2f} x as fast as {peer}")
    _leave({"what": what, "peer": peer, "ours": seconds, "theirs": peer_seconds})


def tell_growth(what: str, by: str, seconds: dict[int, float]) -> None:
    """Print how the time of something grows with a number of images, classes, weights or workers."""
    print(f"{what} by {by}: " + ", ".join(f"{n:,} {s:.3g} s" for n, s in seconds.items()))
    _leave({"what": what, "by": by, "seconds": {str(n): s for n, s in seconds.items()}})


def tell_limit(what: str, **images: float) -> None:
    """Print images a second of a training, and the most that the rates of multiplying and of memory would allow."""
    print(f"{what}, images a second: " + ", ".join(f"{name} {value:,.0f}" for name, value in images.items()))
    _leave({"what": what, "limit": images})


def _leave(line: dict) -> None:
    if path := os.environ.get("LTHLIB_RATIOS"):
        with Path(path).open("a") as file:
            file.write(json.dumps(line) + "\n")


def peers(folder: Path) -> str:
    """Install the peers apart from the project, as far as they can be had; return their folder."""
    uv = shutil.which("uv") or shutil.which(ROOT / ".uv" / "bin" / "uv")
    for peer in PEERS:
        command = [uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", folder, peer]
        if uv is None or subprocess.run(command, check=False).returncode:
            print(f"{peer} could not be installed; what is compared with it is left out.", file=sys.stderr)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--record", action="store_true", help="put the result into book/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        where = os.pathsep.join(filter(None, (peers(Path(folder, "peers")), os.environ.get("PYTHONPATH"))))
        for name in options.only:
            print(f"\n=== {name}", flush=True)
            found = Path(folder, f"{name}.jsonl")
            threads = 1 if name in ONE_THREAD else os.cpu_count()
            env = {**os.environ, "PYTHONPATH": where, "LTHLIB_RATIOS": str(found), "OMP_NUM_THREADS": str(threads)}
            arguments = [argument.format(threads=threads) for argument in PROGRAMS[name]]
            subprocess.run([sys.executable, str(HERE / f"{name}.py"), *arguments], env=env, check=True)
            if options.record and found.exists():
                record(name, threads, [json.loads(line) for line in found.read_text().splitlines()])


def record(program: str, threads: int, lines: list[dict]) -> None:
    """Put what one program told into the entry of this kind of processor, in the place of what it told before."""
    kind = {"processor": machine.processor(), "instructions": torch.backends.cpu.get_cpu_capability()}
    known = recorded_json(RATIOS)["machines"] if RATIOS.exists() else []
    here = next((of for of in known if {name: of[name] for name in kind} == kind), {**kind, "programs": {}})
    told = {"provenance": {**machine.provenance("auto"), "threads": threads}, "lines": lines}
    others = [of for of in known if of is not here]
    now = {**here, "programs": {**here["programs"], program: told}}
    write_atomically(RATIOS, seal({"machines": [*others, now]}))


if __name__ == "__main__":
    main()
