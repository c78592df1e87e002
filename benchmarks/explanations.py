"""Fidelity and stability against the `lime` package doing the same work: same masks, same fits, one run.

    python benchmarks/explanations.py [images] [training steps]

The peer is lime 0.2.0.1 (`pip install lime==0.2.0.1`, in an environment of its own), called as the official
code of the paper calls its copy of it: pictures masked one by one, ten in a batch, a scikit-learn ridge for
the image and for each of five reference rows. Both sides get the masks and reference rows of
`lime.draw_masks`.

The network is a ResNet-20s that first learns, for some steps, which part of scikit-learn's two sample
photographs a 32-pixel crop was taken from: the scores of an untrained network are too small to compare
precisions by.
"""

import argparse
import copy
import importlib.util
import resource
import time

import numpy as np
import torch
from ratios import tell
from sklearn.datasets import load_sample_images
from sklearn.metrics import pairwise_distances
from torch.nn import functional as F

from lthlib.core import machine
from lthlib.metrics.interpretability.expo import expo
from lthlib.metrics.interpretability.lime import SCORES, draw_masks, fidelity_stability, relative_change
from lthlib.networks import build

CROP, SHRINK, CLASSES = 32, 2, 8
COMPARED = ("fidelity", "stability", "lime_r2")


def crops(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Crops of either photograph at half size, and which of four columns of which photograph they come
    from."""
    pictures = [p[::SHRINK, ::SHRINK] for p in load_sample_images().images]
    rng = np.random.default_rng(seed)
    height, width, _ = pictures[0].shape
    which = rng.integers(2, size=n)
    top, left = rng.integers(height - CROP, size=n), rng.integers(width - CROP, size=n)
    pixels = [pictures[p][y : y + CROP, x : x + CROP] for p, y, x in zip(which, top, left, strict=True)]
    return np.stack(pixels), 4 * which + 4 * left // (width - CROP)


def as_input(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def trained_network(steps: int) -> torch.nn.Module:
    pixels, labels = crops(128 * max(steps, 1), seed=0)
    sample = pixels[:1000] / 255
    moments = {"mean": sample.mean((0, 1, 2)).tolist(), "std": sample.std((0, 1, 2)).tolist()}
    model = build("resnet20s", in_channels=3, num_classes=CLASSES, image_size=CROP, **moments)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for step in range(steps):
        batch = slice(128 * step, 128 * (step + 1))
        loss = F.cross_entropy(model(as_input(pixels[batch])), torch.from_numpy(labels[batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    held_out, truth = crops(400, seed=1)
    with torch.inference_mode():
        accuracy = (model(as_input(held_out)).argmax(1).numpy() == truth).mean()
    print(f"network: {steps} steps, accuracy {accuracy:.2f} on other crops ({CLASSES} classes)")
    return model


class InDouble(torch.nn.Module):
    """The network in float64: what is left of a difference is the procedure, not the rounding of logits."""

    def __init__(self, model):
        super().__init__()
        self.model = copy.deepcopy(model).double()

    def forward(self, x):
        return self.model(x.double())


class GivenDraws:
    """Stands where lime keeps its random state and hands out masks that were drawn already."""

    def __init__(self, masks: np.ndarray):
        self.masks = masks

    def randint(self, low, high, size):
        assert (low, high, size) == (0, 2, self.masks.size)
        return self.masks.astype(int).ravel()


def explain_with_lime(model, image: np.ndarray) -> dict[str, float]:
    from lime import lime_image
    from lime.wrappers.scikit_image import SegmentationAlgorithm
    from torchvision.transforms.functional import to_tensor

    @torch.inference_mode()
    def predict(pictures):
        return model(torch.stack([to_tensor(picture) for picture in pictures])).softmax(1).numpy()

    segments = SegmentationAlgorithm("felzenszwalb", scale=10, sigma=0.4, min_size=20)(image)
    masks, references = draw_masks(image, len(np.unique(segments)))
    explainer = lime_image.LimeImageExplainer()
    explainer.random_state = GivenDraws(masks)
    lime_image.tqdm = lambda rows: rows
    data, f = explainer.data_labels(image, np.zeros_like(image), segments, predict, len(masks))
    label, coefs, errors, scores = f[0].argmax(), [], [], []
    for reference in references:
        distances = pairwise_distances(data, reference[None], metric="cosine").ravel()
        intercept, pairs, r2, _ = explainer.base.explain_instance_with_data(data, f, distances, label, 100_000)
        coef = np.zeros(len(pairs))
        coef[[number for number, _ in pairs]] = [weight for _, weight in pairs]
        coefs.append(coef)
        errors.append(np.mean((f[:, label] - intercept - data @ coef) ** 2))
        scores.append(r2)
    changes = [np.sum((coef - coefs[0]) ** 2) for coef in coefs[1:]]
    return {"fidelity": errors[0], "stability": np.mean(changes), "lime_r2": scores[0]}


def timed(function, *args, **settings):
    start = time.perf_counter()
    result = function(*args, **settings)
    return time.perf_counter() - start, result


def precisions() -> list[str]:
    """Return what the processor computes fast: bfloat16 only where it is the default."""
    default = str(machine.resolve_precision("auto")).removeprefix("torch.")
    return list(dict.fromkeys(("float32", default)))


def compare_with_lime(model, images: np.ndarray) -> None:
    """Alternate between the ways in blocks of five images, so that all see the same machine."""
    seconds, deviation = dict.fromkeys(("lime", *precisions()), 0.0), dict.fromkeys(COMPARED, 0.0)
    explain_with_lime(model, images[0])
    fidelity_stability(model, images[:1])
    for start in range(0, len(images), 5):
        block = images[start : start + 5]
        taken, peers = timed(lambda block: [explain_with_lime(model, image) for image in block], block)
        seconds["lime"] += taken / len(images)
        found = {}
        for precision in precisions():
            taken, found[precision] = timed(fidelity_stability, model, block, precision=precision)
            seconds[precision] += taken / len(images)
        full = found["float32"]
        for name in COMPARED:
            worst = max(abs(ours / peer[name] - 1) for ours, peer in zip(full[name], peers, strict=True))
            deviation[name] = max(deviation[name], worst)
    print("seconds per image:", " | ".join(f"{name} {value:.3f}" for name, value in seconds.items()))
    for precision in precisions():
        tell(f"fidelity and stability of an image, {precision}", "lime", seconds[precision], seconds["lime"])
    print("largest relative deviation from lime, float32:", listed(deviation))
    exact = InDouble(model)
    ours, peer = fidelity_stability(exact, images[:1]), explain_with_lime(exact, images[0])
    apart = {name: abs(ours[name][0] / peer[name] - 1) for name in COMPARED}
    print("of the first image with the network in float64:", listed(apart))


def listed(deviations: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in deviations.items())


def compare_with_floor(model, images: np.ndarray) -> None:
    full = fidelity_stability(model, images)
    low = fidelity_stability(model, images, precision="bfloat16")
    other = fidelity_stability(model, images, seed=1)
    pairs = (full, low), (full, other)
    print(f"relative change over {len(images)} images, bfloat16 against another mask seed:")
    for name in SCORES:
        each, chance = (relative_change(a[name], b[name]).median() for a, b in pairs)
        print(f"  {name:20s} per image (median) {each:.4f} against {chance:.4f}", end=" | ")
        mean, chance = (relative_change(a[[name]].mean(), b[[name]].mean()).item() for a, b in pairs)
        print(f"of the mean {mean:.4f} against {chance:.4f}")


def show_large(masks: int = 48) -> None:
    """The scores of ImageNet-sized photographs, streamed through a ResNet-50: what an image takes, and the memory."""
    model = build("resnet50", in_channels=3, num_classes=1000, image_size=224, mean=[0.5] * 3, std=[0.25] * 3).eval()
    pictures = [p[:448:2, :448:2] for p in load_sample_images().images]
    few = {"n_fit": 8, "n_eval": 8, "n_neighbours": 2}
    for n in (1, 2):
        lime, found = timed(fidelity_stability, model, iter(pictures[:n]), method="quickshift", n_masks=masks)
        near, _ = timed(expo, model, iter(pictures[:n]), method="quickshift", **few)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"224 pixels, ResNet-50, {n} streamed, {found['n_segments'].tolist()} quickshift segments: "
            f"{1000 * lime / n / masks:.0f} s an image with 1,000 masks (from {masks}), "
            f"ExpO {near / n:.0f} s (from 8 + 8 neighbours); peak {peak:.2f} GiB"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", nargs="?", type=int, default=20)
    parser.add_argument("steps", nargs="?", type=int, default=100)
    wanted = parser.parse_args()
    model = trained_network(wanted.steps)
    images, _ = crops(wanted.images, seed=2)
    if importlib.util.find_spec("lime"):
        compare_with_lime(model, images)
    else:
        print("The peer is not installed: pip install lime==0.2.0.1")
    if "bfloat16" in precisions():
        compare_with_floor(model, images)
    show_large()


if __name__ == "__main__":
    main()
