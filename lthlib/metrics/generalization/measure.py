"""Generalization: what holds on the test set, on foreign images, under corruption and under attack."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lthlib.core.errors import UserError, choose
from lthlib.data import corruptions, ood_classes, source
from lthlib.data.corrupted import corrupted_parts, corruption_names, official_folder, sample
from lthlib.metrics.generalization import corruption
from lthlib.metrics.generalization.accuracy import accuracy, true_class_margin
from lthlib.metrics.generalization.attacks import adversarial_logits, pgd
from lthlib.metrics.generalization.classes import kept_answers
from lthlib.metrics.generalization.ood import detection, msp_score, roc_curve
from lthlib.metrics.registry import Found, Value, code_of_metrics, computed, measured_on_test, metric, values
from lthlib.metrics.resampling import kept, kept_accuracy, resampled_auroc, resampled_mean, resamples
from lthlib.tickets.subject import Subject

_row = partial(metric, dimension="generalization", reference="hendrycks2019benchmarking")
_row("corrupted_accuracy", "Accuracy under corruption", higher_is_better=True, unit="fraction")(
    "Accuracy on test images under one corruption at one severity."
)
_row("official_corruptions", "Corruptions from published files", higher_is_better=None, unit="")(
    "Of the corruptions measured, how many were read from the published files; the others were made here."
)


def measure(
    subject: Subject,
    *,
    ood: Sequence[str] = (),
    n_test: int = 10_000,
    n_ood: int = 10_000,
    n_corrupted: int = 10_000,
    extra: bool = True,
    n_attack: int = 1_000,
    n_pgd: int = 200,
    epsilons: Sequence[float] = (1.0, 2.0, 4.0, 8.0),
) -> Found:
    """Measure how a ticket generalizes.

    Fewer images than there are is a sample spread evenly over the classes (`lthlib.data.corrupted.sample`), the
    same for every ticket.

    Args:
        subject: The ticket.
        ood: Out-of-distribution sets; empty for the data set's own list.
        n_test: Test images at most.
        n_ood: Images of each out-of-distribution set at most.
        n_corrupted: Test images at most under each corruption and severity.
        extra: Whether the corruptions beside the 15 common ones are measured too; they have a mean of their own.
        n_attack: Test images at most that are attacked by FGSM.
        n_pgd: How many of those are attacked by PGD-20 as well; it costs about twenty times as much.
        epsilons: Attack strengths in units of 1/255; the paper's 8 is always among them.

    Returns:
        Values, and for figures ``roc_<set>`` with the ROC curve on a grid of 101 false positive rates; of the dense
        network ``gallery``, a test image under every corruption at the severities 1, 3 and 5; the answers of
        `lthlib.metrics.generalization.classes.kept_answers`; for the verdict replicates of the metrics on resampled
        images (`lthlib.metrics.resampling`).
    """
    labels, known = subject.labels("test", n_test).numpy(), subject.logits("test", n_test)
    numbers = computed(measured_on_test("generalization"), known, labels)
    found = values(numbers, len(labels))
    arrays = kept_accuracy(known, labels) | kept_answers(known, labels, subject.data.classes)
    for name in _ood_sets(subject, ood):
        pair = _among(ood_classes(name, subject.data), subject, labels, known, subject.logits(f"ood:{name}", n_ood))
        detected = values(detection(*pair), sum(map(len, pair)), name)
        found += detected
        scores = msp_score(pair[0]), msp_score(pair[1])
        draws = resamples(len(pair[0])), resamples(len(pair[1]), name)
        arrays |= kept(detected[0], resampled_auroc(*scores, *draws))
        false, true = roc_curve(*scores)
        arrays[f"roc_{name}"] = np.interp(np.linspace(0, 1, 101), false, true).astype(np.float32)
    names = corruption_names(extra)
    if subject.is_dense:
        arrays["gallery"] = _gallery(subject, names, n_corrupted)
    corrupted = _under_corruption(subject, names, n_corrupted)
    attacked = _attacks(subject, n_attack, n_pgd, sorted({*epsilons, 8.0}))
    return found + corrupted[0] + attacked[0], arrays | corrupted[1] | attacked[1]


def inputs(subject: Subject, *, ood: Sequence[str], extra: bool, **rest: object) -> str:
    """Return the versions of what `measure` reads beside the test images: other images, and metrics' own files."""
    sets = [f"ood:{name}" for name in _ood_sets(subject, ood)]
    sets += [f"corrupted:{name}" for name in corruption_names(extra)]
    return " ".join([code_of_metrics("generalization"), *map(subject.input_version, sets)])


def _ood_sets(subject: Subject, ood: Sequence[str]) -> tuple[str, ...]:
    return tuple(ood) or source(subject.ticket.data).ood


def _among(
    classes: Sequence[str], subject: Subject, labels: np.ndarray, known: np.ndarray, foreign: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of some classes, if any are named: of the test images that belong to them, and of images foreign to them.

    ImageNet-O is scored this way: its images are of none of ImageNet's classes, and were chosen for being mistaken for
    one of 200; the other 800 are left out *before* the softmax, for the in-distribution images too (Hendrycks et al.,
    2021).
    """
    if not classes:
        return known, foreign
    for name in classes:
        choose(name, subject.data.classes, "class")
    kept = np.array([subject.data.classes.index(name) for name in classes])
    mine = known[np.isin(labels, kept)]
    if len(mine) == 0:
        raise UserError("No test image has a class that the foreign images are named after; raise n_test.")
    return mine[:, kept], foreign[:, kept]


def _under_corruption(subject: Subject, names: Sequence[str], n: int) -> Found:
    labels = subject.labels("test", n).numpy()
    n, errors, found = len(labels), {name: [] for name in names}, []
    wrong = np.zeros(n)  # of each image, how often under the common corruptions
    for name, severity, logits in subject.corrupted_logits(names, n):
        right = accuracy(logits, labels)
        errors[name].append(1 - right)
        found.append(Value("corrupted_accuracy", right, n, name, severity))
        wrong += (logits.argmax(1) != labels) * (name in corruption.COMMON_CORRUPTIONS)
    clean = 1 - accuracy(subject.logits("test", n), labels)  # on the same images
    numbers = {
        "corruption_error": corruption.corruption_error(errors),
        "relative_corruption_error": corruption.relative_corruption_error(errors, clean),
    }
    if corruptions.default_constants(subject.data.size, subject.data.size) == "imagenet":
        numbers["corruption_error_alexnet"] = corruption.corruption_error_alexnet(errors)
        numbers["relative_corruption_error_alexnet"] = corruption.relative_corruption_error_alexnet(errors, clean)
    cases = 5 * len(corruption.COMMON_CORRUPTIONS)
    found += values(numbers, n * cases, "common")
    mean = Value("corruption_error", numbers["corruption_error"], n, "common")
    arrays = kept(mean, resampled_mean(wrong / cases, resamples(n)), 1 / (n * cases))
    if len(names) > len(corruption.COMMON_CORRUPTIONS):
        found.append(
            Value("corruption_error_all", corruption.corruption_error(errors, names), n * 5 * len(names), "all")
        )
    official = sum(official_folder(subject.data, name) is not None for name in names)
    return [*found, Value("official_corruptions", official, len(names))], arrays


def _gallery(subject: Subject, names: Sequence[str], n: int) -> np.ndarray:
    """One test image, small, clean in the first row, then under each corruption: uint8 (1 + names, 3, h, w, C)."""
    step = -(-subject.data.size // 64)

    def first(name: str, severity: int) -> Tensor:
        _, _, pixels = next(corrupted_parts(subject.data, name, n, subject.store, severities=(severity,)))
        return pixels[0]

    clean = subject.data.test.pixels[int(subject.sample("test", n)[0])]
    rows = [torch.stack([clean] * 3)]
    rows += [torch.stack([first(name, severity) for severity in (1, 3, 5)]) for name in names]
    return torch.stack(rows)[:, :, ::step, ::step].numpy()


def _attacks(subject: Subject, n: int, n_pgd: int, epsilons: Sequence[float]) -> Found:
    images, labels = subject.images("test", n).permute(0, 3, 1, 2), subject.labels("test", n)
    attacked = adversarial_logits(subject.model, images, labels, [e / 255 for e in epsilons])
    after, few = dict(zip(epsilons, attacked, strict=True)), sample(labels, n_pgd)
    found = [Value("adversarial_accuracy", accuracy(z, labels), len(labels), "fgsm", e) for e, z in after.items()]
    pushed = pgd(subject.model, images[few], labels[few], 8 / 255)
    pushed = adversarial_logits(subject.model, pushed, labels[few], [0])[0]  # as they are
    by_fgsm, by_pgd = accuracy(after[8][few.numpy()], labels[few]), accuracy(pushed, labels[few])
    margin = true_class_margin(after[8], labels).mean()
    numbers = {"fgsm_accuracy": accuracy(after[8], labels), "adversarial_margin": margin}
    found += values(numbers, len(labels), "fgsm", 8)
    found += values({"pgd_accuracy": by_pgd, "fgsm_pgd_gap": by_fgsm - by_pgd}, len(few), "pgd", 8)
    arrays = kept_accuracy(after[8], labels, "fgsm_accuracy", "fgsm", 8)
    return found, arrays | kept_accuracy(pushed, labels[few], "pgd_accuracy", "pgd", 8)
