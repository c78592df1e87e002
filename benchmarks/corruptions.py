"""Corruptions: time per image and pixels, beside the packages `imagecorruptions-imaug` and `corrupt-tta`.

    pip install imagecorruptions-imaug==1.1.5 corrupt-tta==0.1.7    # peers, in an environment of their own
    OMP_NUM_THREADS=1 python benchmarks/corruptions.py [--images 300] [--side 32] [--only NAME ...]

Both peers know the ImageNet-C constants alone, so both sides are timed and compared with those; a last
column has our time with the CIFAR-10-C ones. Images are crops of two photographs that come with scikit-learn.
Times are for one core, the best of the repetitions, with warm caches. Ratios above 1: we are faster.
"""

from __future__ import annotations

import argparse
import importlib
import time

import cv2
import numpy as np
from ratios import tell
from sklearn.datasets import load_sample_images

from lthlib.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt

PEERS = ("imagecorruptions", "corrupt_tta")
DETERMINISTIC = (
    "defocus_blur",
    "zoom_blur",
    "brightness",
    "contrast",
    "pixelate",
    "jpeg_compression",
    "gaussian_blur",
    "saturate",
)


def crops(n: int, side: int, seed: int = 0) -> np.ndarray:
    """Return n square crops of real photographs at 1/1 to 1/6 of their size, uint8 (n, side, side, 3)."""
    rng, photos, out = np.random.default_rng(seed), load_sample_images().images, []
    for i in range(n):
        photo = photos[i % len(photos)]
        size = side * int(rng.integers(1, max(2, min(photo.shape[:2]) // (2 * side))))
        top, left = (int(rng.integers(0, length - size + 1)) for length in photo.shape[:2])
        crop = photo[top : top + size, left : left + size]
        out.append(cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA))
    return np.stack(out)


def peer_corrupt(peer, images: np.ndarray, name: str, severity: int) -> np.ndarray:
    return np.stack([np.uint8(peer.corrupt(x, severity=severity, corruption_name=name)) for x in images])


def seconds(repeats: int, function, *args, **kwargs) -> float:
    """Return the least processor time of the repetitions, so that what others run hardly counts."""
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        function(*args, **kwargs)
        times.append(time.process_time() - begin)
    return min(times)


def distances(clean: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Return each image's root mean square distance from the clean one, in grey levels."""
    return np.sqrt(np.square(images.astype(np.float64) - clean).mean(axis=(1, 2, 3)))


def compare_speed(images: np.ndarray, names: list[str], peers: dict, repeats: int) -> None:
    header = "".join(f"{peer:>18}" for peer in peers)
    print(f"\nMicroseconds per image, mean over severities 1 to 5\n{'':20}{'ours':>9}{header}{'ratio':>8}{'cifar':>9}")
    totals = np.zeros(2 + len(peers))
    for name in names:
        row = np.zeros(2 + len(peers))
        for severity in SEVERITIES:
            for table in ("imagenet", "cifar"):
                corrupt(images[:2], name, severity, constants=table)
            row[0] += seconds(repeats, corrupt, images, name, severity, constants="imagenet")
            row[-1] += seconds(repeats, corrupt, images, name, severity, constants="cifar")
            for k, peer in enumerate(peers.values(), 1):
                np.random.seed(0)  # noqa: NPY002 (the peers know no other generator)
                peer_corrupt(peer, images[:2], name, severity)
                row[k] += seconds(repeats, peer_corrupt, peer, images, name, severity)
        if CORRUPTIONS[name].group != "extra":
            totals += row
        print_row(name, row / len(images) / len(SEVERITIES) * 1e6)
    print_row("sum of common ones", totals / len(images) * 1e6)
    for k, peer in enumerate(peers, 1):
        what = f"{len(images)} images under {len(names)} corruptions at five severities, ImageNet-C's constants"
        tell(what, peer, totals[0], totals[k])
    print("The sum is over the 5 severities of the common corruptions above; the ratio is to the faster peer.")


def print_row(name: str, row: np.ndarray) -> None:
    ratio = row[1:-1].min() / row[0] if len(row) > 2 else np.nan
    print(f"{name:20}{row[0]:9.1f}" + "".join(f"{t:18.1f}" for t in row[1:-1]) + f"{ratio:8.1f}{row[-1]:9.1f}")


def compare_pixels(images: np.ndarray, names: list[str], peers: dict) -> None:
    """Say per corruption how far ours and a peer's are apart.

    Deterministic ones: largest difference in grey levels and share of bytes that differ. Random ones: mean
    distance from the clean image on each side, z-score of the paired difference (they differ beyond 3).
    """
    for peer_name, peer in peers.items():
        print(f"\nPixels beside {peer_name}, ImageNet-C constants, severities 1 to 5")
        for name in names:
            cells = []
            for severity in SEVERITIES:
                np.random.seed(severity)  # noqa: NPY002
                ours = corrupt(images, name, severity, constants="imagenet")
                theirs = peer_corrupt(peer, images, name, severity)
                if name in DETERMINISTIC:
                    apart = np.abs(ours.astype(int) - theirs)
                    cells.append(f"max {apart.max():3d}, {np.mean(apart > 0):7.2%}")
                else:
                    a, b = distances(images, ours), distances(images, theirs)
                    z = (a - b).mean() / ((a - b).std() / np.sqrt(len(a)))
                    cells.append(f"{a.mean():5.1f} {b.mean():5.1f} z{z:+6.1f}")
            print(f"{name:20}" + " | ".join(f"{cell:17}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=list(CORRUPTIONS), choices=list(CORRUPTIONS))
    args = parser.parse_args()
    peers = {}
    for name in PEERS:
        try:
            peers[name] = importlib.import_module(name)
        except ImportError as error:
            print(f"{name} is not here ({error}); nothing is compared with it.")
    images = crops(args.images, args.side)
    print(f"{len(images)} images of {args.side} x {args.side} x 3")
    compare_speed(images, args.only, peers, args.repeats)
    compare_pixels(images, args.only, peers)


if __name__ == "__main__":
    main()
