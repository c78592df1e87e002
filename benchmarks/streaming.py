"""Memory of evaluating a network on ImageNet-sized images: does it grow with their number?

    python benchmarks/streaming.py [--images 2000 20000] [--classes 1000] [--width 0.125] [--corruption contrast]
    python benchmarks/streaming.py --cifar 10000

Makes a folder in ImageNet's layout (train/<class>, val/<class>, JPEG files somewhat larger than 224 pixels, a few
photographs hard-linked many times) and evaluates a ResNet-50 of a fraction of the width, so that it takes minutes and
not hours: logits of the test images and their calibration, then accuracy on the same images under a corruption. Each
number of images has a process of its own; its peak memory is what the operating system says. What may grow is the
logits of one set, 4 bytes an image and class.

With ``--cifar`` the peak memory of measuring generalization and calibration of a ResNet-20, all of it with the default
parameters, on so many images of 32 pixels under 15 corruptions at 5 severities.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image
from tqdm import tqdm

SIDES = ((341, 256), (256, 384), (300, 300), (400, 267))  # width, height


def make_folder(root: Path, n_images: int, n_classes: int) -> None:
    """Fill ``root/imagenet``: n test images, one training image a class."""
    from sklearn.datasets import load_sample_images

    rng, photos = np.random.default_rng(0), [Image.fromarray(photo) for photo in load_sample_images().images]
    files = []
    for i in range(32):
        photo, (width, height) = photos[i % 2], SIDES[i % len(SIDES)]
        left, top = (
            int(rng.integers(0, extent - side + 1)) for extent, side in zip(photo.size, (width, height), strict=True)
        )
        files.append(root / f"{i}.JPEG")
        photo.crop((left, top, left + width, top + height)).save(files[-1], quality=90)
    places = [("train", c) for c in range(n_classes)] + [("val", i % n_classes) for i in range(n_images)]
    for i, (part, c) in enumerate(tqdm(places, desc="making the folder", unit="image")):
        folder = root / "imagenet" / part / f"n{c:08}"
        folder.mkdir(parents=True, exist_ok=True)
        os.link(files[i % len(files)], folder / f"{i:08}.JPEG")


def peak() -> float:
    """Peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 2**20)


def measure(n: int, width: float, corruption: str) -> dict[str, float]:
    """Evaluate n images in this process."""
    import torch

    from lthlib import data, networks
    from lthlib.core.store import Store
    from lthlib.data.corrupted import corrupted_parts
    from lthlib.metrics import computed
    from lthlib.networks.predict import predict
    from lthlib.tickets.subject import Subject
    from lthlib.tickets.ticket import Ticket

    store, began = Store(), time.perf_counter()
    subject = Subject(Ticket(data="imagenet@224", arch="resnet50"), store)
    like = subject.data
    options = {
        "in_channels": 3,
        "num_classes": len(like.classes),
        "image_size": 224,
        "mean": like.mean,
        "std": like.std,
    }
    whole = networks.all_groups(networks.build("resnet50", **options))
    narrow = {group: max(4, int(count * width)) for group, count in whole.items()}
    model = networks.build("resnet50", **options, channels=narrow)
    subject.trained = SimpleNamespace(model=model.eval(), version="untrained")
    found = {"read on demand": isinstance(like.test.pixels, data.OnDemand), "before": peak()}
    labels = subject.labels("test", n).numpy()
    found["clean"] = computed(["test_accuracy", "ece"], subject.logits("test", n), labels)["test_accuracy"]
    found["after test"] = peak()
    parts = corrupted_parts(like, corruption, n, store, severities=(3,))
    answers = torch.cat([predict(subject.fast_model, pixels).argmax(1) for _, _, pixels in parts])
    found["corrupted"] = float((answers.numpy() == labels).mean())
    found |= {"after corruption": peak(), "seconds": time.perf_counter() - began}
    return {**found, "images": len(labels), "logits": 4 * len(labels) * len(like.classes) / 2**20}


def measure_cifar(n: int) -> None:
    """Measure both dimensions of an untrained ResNet-20 on n random images in this process, and say the peak."""
    import torch

    from lthlib import data, networks
    from lthlib.core.store import Store
    from lthlib.metrics.calibration import measure as calibration
    from lthlib.metrics.generalization import measure as generalization
    from lthlib.tickets.subject import Subject
    from lthlib.tickets.ticket import Ticket

    rng = np.random.default_rng(0)

    def part(n: int) -> data.Images:
        pixels = torch.from_numpy(rng.integers(0, 256, (n, 32, 32, 3), np.uint8))
        return data.Images(pixels, torch.arange(n) % 10)

    classes, half = tuple("abcdefghij"), (0.5,) * 3
    like = data.DataSet("random32", classes, part(5 * n), None, part(n), half, half, "random")
    with tempfile.TemporaryDirectory() as root:
        subject = Subject(Ticket(data="random32", arch="resnet20s"), Store(root))
        subject.data = like
        options = {"in_channels": 3, "num_classes": 10, "image_size": 32, "mean": half, "std": half}
        model = networks.build("resnet20s", **options).eval()
        subject.trained = SimpleNamespace(model=model, version="untrained", masks=None)
        dimensions = (("generalization", generalization, {"ood": ["gaussian"]}), ("calibration", calibration, {}))
        for name, dimension, more in dimensions:
            began = time.perf_counter()
            values, _ = dimension.measure(subject, extra=False, **more)
            took = time.perf_counter() - began
            print(f"{name}: {len(values)} numbers, {took:,.0f} s, peak memory {peak():,.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[2_000, 20_000])
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--width", type=float, default=0.125)
    parser.add_argument("--corruption", default="contrast")
    parser.add_argument("--cifar", type=int, metavar="N")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cifar:
        measure_cifar(options.cifar)
        return
    if options.measure:
        print(json.dumps(measure(options.measure, options.width, options.corruption)))
        return
    with tempfile.TemporaryDirectory() as root:
        make_folder(Path(root), max(options.images), options.classes)
        environment = {**os.environ, "LTHLIB_DATA": root, "LTHLIB_STORE": str(Path(root) / "store")}
        command = [sys.executable, __file__, "--width", str(options.width), "--corruption", options.corruption]
        print("\npeak memory in MiB\n")
        names = ("before", "after test", "after corruption", "logits", "seconds")
        print(f"{'images':>8}" + "".join(f"{name:>18}" for name in names))
        for n in (1, *options.images):  # the first lists the files and measures the mean colours, once for all
            run = subprocess.run(
                [*command, "--measure", str(n)], env=environment, stdout=subprocess.PIPE, check=True, text=True
            )
            if n == 1:
                continue
            found = json.loads(run.stdout.splitlines()[-1])
            if not found["read on demand"]:
                print("(so few images that they are held in memory)")
            print(f"{found['images']:>8,}" + "".join(f"{found[name]:>18,.0f}" for name in names), flush=True)


if __name__ == "__main__":
    main()
