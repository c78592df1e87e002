import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import pairwise_distances
from torch import nn
from torch.nn import functional as F

from lthlib.core.errors import UserError
from lthlib.figures.interpretability import explanation_map
from lthlib.metrics import METRICS
from lthlib.metrics.interpretability import lime
from lthlib.metrics.interpretability.expo import SCORES as EXPO_SCORES
from lthlib.metrics.interpretability.expo import expo
from lthlib.metrics.interpretability.superpixels import default_segmentation, segment
from lthlib.networks.fast import inference_copy


class Small(nn.Module):
    """A residual network with batch norm, ReLUs of every kind, and statistics that are not the identity."""

    def __init__(self, channels=3, classes=4, stride=1, seed=0):
        super().__init__()
        torch_state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(channels, 8, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(8, 8, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)
        for norm in (self.norm, self.norm2):
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.running_var.uniform_(0.05, 0.2)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.random.set_rng_state(torch_state)

    def forward(self, x):
        stem = self.norm(self.stem(x))
        y = self.relu(stem)
        # `stem` is read again after its ReLU: overwriting it would change the sum.
        y = F.relu(self.norm2(self.conv(y)) + stem)
        return 3 * self.head(y.mean((2, 3)))


class Linear(nn.Module):
    """Two classes whose first has the probability ``base + <slope, x>``, exactly linear in the pixels."""

    def __init__(self, base, slope):
        super().__init__()
        self.base = base
        self.register_buffer("slope", torch.as_tensor(slope, dtype=torch.float32))

    def probability(self, x):
        return self.base + (x * self.slope).sum((1, 2, 3))

    def forward(self, x):
        p = self.probability(x).double()
        return torch.stack([p.log(), (1 - p).log()], 1)


class Quadratic(Linear):
    """The same with ``+ curvature x² / 2`` summed over the pixels."""

    def __init__(self, base, slope, curvature):
        super().__init__(base, slope)
        self.register_buffer("curvature", torch.as_tensor(curvature, dtype=torch.float32))

    def probability(self, x):
        return super().probability(x) + 0.5 * (x**2 * self.curvature).sum((1, 2, 3))


class Constant(nn.Module):
    def forward(self, x):
        return torch.tensor([0.3, 1.2, -0.5]).expand(len(x), 3)


def each_pixel(size):
    return np.arange(size * size).reshape(size, size)


def blocks(size=16, cells=4):
    """Square superpixels ``cells`` x ``cells``."""
    line = np.arange(size) * cells // size
    return line[:, None] * cells + line


def photo(seed=0, size=16, channels=3):
    return np.random.default_rng(seed).integers(20, 256, (size, size, channels), dtype=np.uint8)


def crops(size, count):
    from sklearn.datasets import load_sample_images

    pictures = load_sample_images().images
    return [pictures[i % 2][40 * i : 40 * i + size, 60 * i : 60 * i + size] for i in range(count)]


def measure_slowly(model, image, labels, *, n_masks, n_perturb, seed):
    """The official procedure, one masked picture and one sklearn fit at a time; masks are given."""
    masks, references = lime.draw_masks(image, labels.max() + 1, n_masks=n_masks, n_perturb=n_perturb, seed=seed)
    pictures = []
    for row in masks:
        picture = image.copy()
        for number in np.flatnonzero(row == 0):
            picture[labels == number] = 0
        pictures.append(torch.from_numpy(picture).permute(2, 0, 1).float() / 255)
    with torch.no_grad():
        probabilities = model(torch.stack(pictures)).softmax(1).numpy()
    label = probabilities[0].argmax()
    f, fits, errors, r2 = probabilities[:, label], [], [], []
    for reference in references:
        distance = pairwise_distances(masks, reference[None], metric="cosine").ravel()
        weight = np.sqrt(np.exp(-(distance**2) / 0.25**2))
        ridge = Ridge(alpha=1).fit(masks, f, sample_weight=weight)
        fits.append(ridge.coef_)
        errors.append(np.mean((f - ridge.predict(masks)) ** 2))
        r2.append(ridge.score(masks, f, sample_weight=weight))
    return {
        "label": label,
        "fidelity": errors[0],
        "stability": np.mean([np.sum((c - fits[0]) ** 2) for c in fits[1:]]),
        "causal": np.mean(errors),
        "lime_r2": r2[0],
        "variance": np.var(f),
        "probability": f[0],
    }


# The kernel and masks of one's own ------------------------------------------------------------------------


def test_the_kernel_is_the_formula_and_a_mask_that_hides_all_is_at_distance_one():
    masks = np.random.default_rng(1).integers(0, 2, (60, 7))
    masks[0], masks[5] = 1, 0
    weights = lime.lime_kernel(masks, masks[[0, 17]])
    for weight, row in zip(weights, masks[[0, 17]], strict=True):
        norms = np.linalg.norm(masks, axis=1) * np.linalg.norm(row)
        distance = 1 - masks @ row / np.where(norms == 0, 1, norms)
        np.testing.assert_allclose(weight, np.sqrt(np.exp(-(distance**2) / 0.25**2)), rtol=1e-10)
    assert weights[0, 5] == pytest.approx(np.exp(-8))


def test_every_mask_of_two_superpixels_by_hand():
    """f(1, 1) = 0.9 and 0.5 for the others, weighted around the whole image and around the first superpixel."""

    class Both(nn.Module):
        def forward(self, x):
            p = torch.where(x.mean((1, 2, 3)) > 0.9, 0.9, 0.5).double()
            return torch.stack([p.log(), (1 - p).log()], 1)

    image, halves = np.full((4, 4), 255, np.uint8), np.arange(4).repeat(4).reshape(4, 4) // 2
    masks = np.array([[1, 1], [1, 0], [0, 1], [0, 0]])
    found = lime.explain(Both(), image, halves, masks=masks, references=masks[:2])
    f = np.array([0.9, 0.5, 0.5, 0.5])
    coefs = []
    for cosine in ([1, 0.5**0.5, 0.5**0.5, 0], [0.5**0.5, 1, 0, 0]):
        w = np.exp(-0.5 * ((1 - np.array(cosine)) / 0.25) ** 2)
        z = np.column_stack([np.ones(4), masks])
        penalty = np.diag([0, 1, 1])
        coefs.append(np.linalg.solve(z.T @ (w[:, None] * z) + penalty, z.T @ (w * f)))
    np.testing.assert_allclose(found["coef"], coefs[0][1:], rtol=1e-6)
    assert found["fidelity"] == pytest.approx(np.mean((f - z @ coefs[0]) ** 2))
    assert found["stability"] == pytest.approx(np.sum((coefs[1][1:] - coefs[0][1:]) ** 2))
    assert found["variance"] == pytest.approx(0.03)
    assert (found["label"], found["n_evaluated"]) == (0, 4)


def test_explain_without_masks_is_a_row_of_the_table():
    image = photo()
    table = lime.fidelity_stability(Small(), [image], segments=[blocks()])
    found = lime.explain(Small(), image, blocks())
    again = lime.explain(Small(), image, blocks(), masks=lime.draw_masks(image, 16)[0])
    assert list(found) == list(table.columns)
    assert [found[name] for name in lime.SCORES] == pytest.approx(table.loc[0, list(lime.SCORES)].tolist())
    assert again["fidelity"] == pytest.approx(found["fidelity"])
    assert np.isnan(again["stability"])


def test_the_class_is_that_of_the_whole_image_whatever_the_masks():
    image = np.full((8, 8, 1), 255, np.uint8)
    model = Linear(0.05, np.full((1, 8, 8), 0.5 / 64))  # 0.55 for the whole image, 0.3 for half of it
    few = np.eye(16)[:5]
    found = lime.explain(model, image, blocks(8), masks=few)
    assert found["label"] == 0
    assert found["probability"] == pytest.approx(0.55, abs=1e-6)


# Fidelity and stability -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_agrees_with_the_official_procedure(channels):
    """With black superpixels too, whose hiding changes nothing and is not evaluated again."""
    images = [photo(seed, channels=channels) for seed in range(3)]
    images[1][:8] = 0
    images[1][0, 0] = 9  # nearly black is not black
    model = Small(channels).eval()
    settings = {"n_masks": 150, "n_perturb": 3, "seed": 4}
    found = lime.fidelity_stability(model, images, segments=[blocks()] * 3, **settings)
    for i, image in enumerate(images):
        expected = measure_slowly(model, image, blocks(), **settings)
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(value, rel=1e-5), name
        assert found.fidelity_r2[i] == pytest.approx(1 - expected["fidelity"] / expected["variance"], rel=1e-5)


def test_equal_pictures_are_evaluated_once():
    image = photo()
    image[:, 4:] = 0  # of 16 superpixels only the four of the left column can be seen
    found = lime.fidelity_stability(Small().eval(), [image], segments=[blocks()])
    masks, _ = lime.draw_masks(image, 16)
    assert found["n_evaluated"][0] == len(np.unique(masks[:, ::4], axis=0)) == 16


def test_224_pixel_photographs_streamed_with_quickshift(monkeypatch):
    pictures = crops(224, 2)
    model = Small(stride=8).eval()
    settings = {"n_masks": 24, "n_perturb": 2, "seed": 0}
    found = lime.fidelity_stability(model, (p for p in pictures), method="quickshift", **settings)
    segments = [segment(picture, "quickshift") for picture in pictures]
    for i, (picture, labels) in enumerate(zip(pictures, segments, strict=True)):
        assert found.n_segments[i] == labels.max() + 1 > 10
        expected = measure_slowly(model, picture, labels, **settings)
        assert found.fidelity[i] == pytest.approx(expected["fidelity"], rel=1e-4)
        assert found.stability[i] == pytest.approx(expected["stability"], rel=1e-4)
    few = {"n_fit": 6, "n_eval": 6, "n_neighbours": 2, "segments": segments}
    at_once = expo(model, (p for p in pictures), **few)
    monkeypatch.setitem(lime.PIXELS, "cpu", 1)  # the fewest images in a pass
    streamed = expo(model, (p for p in pictures), **few)
    assert [coef.size for coef in streamed["coef"]] == (3 * found["n_segments"]).tolist()
    np.testing.assert_allclose(streamed[list(EXPO_SCORES)], at_once[list(EXPO_SCORES)], rtol=1e-4)


def test_constant_network_scores_zero_and_has_no_scale_free_form():
    found = lime.fidelity_stability(Constant(), [photo()], segments=[blocks()], n_masks=50)
    assert found.label[0] == 1
    assert found.fidelity[0] < 1e-25
    assert found.stability[0] < 1e-25
    assert found.variance[0] == 0
    assert found[["fidelity_r2", "stability_relative", "lime_r2"]].isna().all(axis=None)


def test_linear_network_shows_only_the_shrinkage_of_the_ridge():
    image, labels = photo(5), blocks()
    slope = np.random.default_rng(6).normal(size=(3, 16, 16)) * 2e-3
    model = Linear(0.7, slope)
    pixels = image.transpose(2, 0, 1) / 255
    per_segment = np.bincount(labels.ravel(), weights=(pixels * slope).sum(0).ravel())
    found = lime.fidelity_stability(model, [image], segments=[labels])
    masks, references = lime.draw_masks(image, 16)
    exact = 0.7 + masks @ per_segment  # computed without the network
    ridges = [Ridge(alpha=1).fit(masks, exact, sample_weight=weight) for weight in lime.lime_kernel(masks, references)]
    np.testing.assert_allclose(found.coef[0], ridges[0].coef_, atol=1e-7)
    assert found.fidelity[0] == pytest.approx(np.mean((exact - ridges[0].predict(masks)) ** 2), rel=1e-3)
    changes = [np.sum((r.coef_ - ridges[0].coef_) ** 2) for r in ridges[1:]]
    assert found.stability[0] == pytest.approx(np.mean(changes), rel=1e-3)
    assert found.fidelity_r2[0] > 0.9995
    assert np.abs(found.coef[0] - per_segment).max() < 0.03 * np.abs(per_segment).max()


def test_seeds():
    images = [photo(seed) for seed in range(3)]
    settings = {"segments": [blocks()] * 3, "n_masks": 60}
    first = lime.fidelity_stability(Small(), images, seed=0, **settings)
    again = lime.fidelity_stability(Small(), images, seed=0, **settings)
    other = lime.fidelity_stability(Small(), images, seed=1, **settings)
    np.testing.assert_array_equal(first.stability, again.stability)
    assert (first.fidelity != other.fidelity).all()
    assert (first.stability != other.stability).all()


def test_images_do_not_share_masks():
    drawn = [lime.draw_masks(photo(seed), 16)[0] for seed in range(2)]
    assert (drawn[0][1:] == drawn[1][1:]).mean() == pytest.approx(0.5, abs=0.02)
    assert drawn[0].mean() == pytest.approx(0.5, abs=0.02)


def test_an_image_keeps_its_numbers_in_any_company_and_chunk(monkeypatch):
    images = np.stack([photo(seed) for seed in range(3)])
    settings = {"segments": [blocks()] * 3, "n_masks": 60}
    forward = lime.fidelity_stability(Small(), images, **settings)
    monkeypatch.setitem(lime.PIXELS, "cpu", 1)  # the fewest images in a pass
    backward = lime.fidelity_stability(Small(), torch.from_numpy(images[::-1].copy()), **settings)
    np.testing.assert_allclose(forward.fidelity, backward.fidelity[::-1], rtol=1e-5)
    np.testing.assert_allclose(forward.stability, backward.stability[::-1], rtol=1e-5)


@pytest.mark.parametrize("measure", [lime.fidelity_stability, expo])
def test_the_network_and_all_random_states_are_left_as_found(measure):
    model = Small()
    model.norm.eval()
    model.conv.weight.requires_grad_(False)
    model.head(torch.ones(2, 8)).sum().backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_states = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    settings = {"n_masks": 20} if measure is lime.fidelity_stability else {"n_fit": 3, "n_eval": 3}
    measure(model, [photo()], segments=[blocks()], **settings)
    assert modes == [module.training for module in model.modules()]
    assert not model.conv.weight.requires_grad
    assert model.stem.weight.requires_grad
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None) if gradient is None else torch.equal(p.grad, gradient)
    assert torch.equal(random_states[0], torch.random.get_rng_state())
    assert (random_states[1] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_training_mode_makes_no_difference():
    settings = {"segments": [blocks()], "n_masks": 40}
    trained, judged = (lime.fidelity_stability(Small().train(mode), [photo()], **settings) for mode in (True, False))
    assert trained.fidelity[0] == judged.fidelity[0]


def test_an_image_of_one_segment_is_not_scored():
    images = [np.full((16, 16, 3), 90, np.uint8), crops(32, 1)[0]]
    found = lime.fidelity_stability(Small(), images, n_masks=60)
    assert (found["n_segments"] == 1).tolist() == [True, False]
    assert found.loc[0, list(lime.SCORES)].isna().all()
    alone = lime.fidelity_stability(Small(), images[1:], n_masks=60)
    pd.testing.assert_series_equal(found[list(lime.SCORES)].mean(), alone[list(lime.SCORES)].mean())


def test_a_cooler_network_wins_the_raw_scores_and_not_the_relative_ones():
    """For small logits f is linear in them: halving them divides the raw scores by four."""

    class Tempered(nn.Module):
        def __init__(self, temperature):
            super().__init__()
            self.body, self.temperature = Small(), temperature

        def forward(self, x):
            return self.body(x) / self.temperature

    settings = {"segments": [blocks()], "n_masks": 200}
    warm, cool = (lime.fidelity_stability(Tempered(t), [photo()], **settings) for t in (500.0, 1000.0))
    for name in ("fidelity", "stability", "causal"):
        assert warm[name][0] / cool[name][0] == pytest.approx(4, rel=1e-2), name
    for name in ("fidelity_r2", "stability_relative", "lime_r2"):
        assert warm[name][0] == pytest.approx(cool[name][0], rel=1e-2), name
    assert 0 < warm.fidelity_r2[0] < 0.999


# The copy that is evaluated -------------------------------------------------------------------------------


class SharedConvolution(Small):
    """The same convolution under two norms: folding both would apply the second to the first."""

    def forward(self, x):
        y = F.relu(self.norm(self.stem(x)))
        y = F.relu(self.norm(self.conv(y)))
        return self.head(self.norm2(self.conv(y)).mean((2, 3)))


class Branching(Small):
    """Control flow on values, which cannot be traced."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(x) + 1


@pytest.mark.parametrize("kind", [Small, SharedConvolution, Branching])
def test_the_inference_copy_computes_the_same_logits(kind):
    model = kind().eval()
    x = torch.rand(5, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(inference_copy(model, x)(x), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1


def test_a_traceable_network_is_folded():
    layers = [type(module) for module in inference_copy(Small(), torch.rand(1, 3, 12, 12)).modules()]
    assert nn.Conv2d in layers
    assert nn.BatchNorm2d not in layers


def test_bfloat16_moves_the_scores_less_than_the_masks_do():
    images, settings = [photo(s) for s in range(4)], {"segments": [blocks()] * 4, "n_masks": 200}
    full, low, other = (
        lime.fidelity_stability(Small(), images, **settings, **more)[["fidelity", "stability"]]
        for more in ({}, {"precision": "bfloat16"}, {"seed": 1})
    )
    moved, floor = lime.relative_change(full, low), lime.relative_change(full, other)
    assert (moved.max() > 0).all()
    assert (moved.median() < floor.median()).all()


def test_relative_change_by_hand():
    a = pd.DataFrame({"fidelity": [1.0, 3.0], "stability": [0.1, np.nan], "causal": [0.0, 0.0]})
    b = pd.DataFrame({"fidelity": [3.0, 3.0], "stability": [0.3, np.nan], "causal": [0.0, 0.0]})
    expected = pd.DataFrame({"fidelity": [1.0, 0.0], "stability": [1.0, np.nan], "causal": [0.0, 0.0]})
    pd.testing.assert_frame_equal(lime.relative_change(a, b), expected)
    assert lime.relative_change(a.mean(), b.mean())["fidelity"] == pytest.approx(1 / 2.5)


# ExpO -----------------------------------------------------------------------------------------------------


def test_expo_of_a_linear_function_is_exact():
    slope = np.random.default_rng(0).normal(size=(3, 8, 8)) * 3e-3
    model, image, labels = Linear(0.6, slope), photo(size=8), blocks(8, 2)
    pixels = expo(model, [image], segments=[each_pixel(8)], n_fit=4, n_eval=30)
    np.testing.assert_allclose(pixels.coef[0], slope.reshape(3, 64), atol=1e-7)
    assert pixels.expo_fidelity[0] < 1e-12
    assert pixels.expo_stability[0] < 1e-12
    assert pixels.expo_r2[0] == pytest.approx(1, abs=1e-6)
    regions = expo(model, [image], segments=[labels], n_fit=4, n_eval=4000)
    means = np.stack([slope[:, labels == k].mean(1) for k in range(4)], axis=1)
    np.testing.assert_allclose(regions.coef[0], 16 * means, atol=1e-6)
    # What superpixel means cannot express: the slope around its mean, under noise of 0.1.
    unexplained = 0.1**2 * ((slope - means[:, labels]) ** 2).sum()
    assert regions.expo_fidelity[0] == pytest.approx(unexplained, rel=0.1)
    assert regions.variance[0] == pytest.approx(0.1**2 * (slope**2).sum(), rel=0.1)


def test_expo_explains_the_predicted_class():
    slope = np.random.default_rng(0).normal(size=(1, 8, 8)) * 3e-3
    second = expo(Linear(0.3, slope), [photo(size=8, channels=1)], segments=[each_pixel(8)], n_fit=4, n_eval=5)
    assert second.label[0] == 1
    np.testing.assert_allclose(second.coef[0], -slope.reshape(1, 64), atol=1e-7)


def test_expo_of_a_quadratic_function_has_closed_forms():
    """c_x' - c_x = Q (x' - x), known to the noise of n_fit draws on either side.

    The published code explains x again in place of x': its stability is that noise alone.
    """
    rng, sigma, n_fit = np.random.default_rng(1), 0.05, 40
    slope, curvature = rng.normal(size=(1, 12, 12)) * 1e-3, rng.normal(size=(1, 12, 12)) * 5e-3
    model = Quadratic(0.6, slope, curvature)
    found = expo(
        model,
        [photo(s, 12, 1) for s in range(10)],
        segments=[each_pixel(12)] * 10,
        sigma=sigma,
        n_fit=n_fit,
        n_eval=500,
        n_neighbours=10,
    )
    moved, noise = sigma**2 * (curvature**2).sum(), sigma**2 * (curvature**2).sum() / n_fit
    assert found.expo_stability.mean() == pytest.approx(moved + 2 * noise, rel=0.06)
    gradient = slope + curvature * photo(2, 12, 1)[..., 0] / 255
    tolerance = 4 * sigma * np.abs(curvature).max() / np.sqrt(n_fit)
    np.testing.assert_allclose(found.coef[2].ravel(), gradient.ravel(), atol=tolerance)


def test_expo_fidelity_of_a_pure_quadratic():
    """No slope to explain: the error is the variance of e'Qe / 2."""
    curvature, sigma = np.full((1, 6, 6), 4e-2), 0.2
    found = expo(
        Quadratic(0.5, np.zeros((1, 6, 6)), curvature),
        [np.zeros((6, 6), np.uint8)],
        segments=[each_pixel(6)],
        sigma=sigma,
        n_fit=20_000,
        n_eval=20_000,
    )
    assert found.expo_fidelity[0] == pytest.approx(sigma**4 / 2 * (curvature**2).sum(), rel=0.05)
    assert abs(found.expo_r2[0]) < 0.01


def test_the_mean_gradient_is_what_the_regression_converges_to():
    """Least squares on the means of superpixels and channels, done here, gives the coefficients (Stein's lemma)."""
    model, image, labels, sigma = Small().eval(), photo(3, 8), blocks(8, 2), 0.05
    found = expo(model, [image], segments=[labels], sigma=sigma, n_neighbours=1, n_fit=2000, n_eval=2000)
    noise = sigma * torch.randn(20_000, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pixels = torch.from_numpy(image).permute(2, 0, 1) / 255
        f = model(pixels + noise).softmax(1)[:, found.label[0]].double()
    means = torch.stack([noise[:, :, torch.from_numpy(labels == k)].mean(2) for k in range(4)], 2).double()
    design = torch.cat([means.flatten(1), torch.ones(len(f), 1)], 1)
    slope = torch.linalg.lstsq(design, f[:, None]).solution[:, 0]
    expected = slope[:-1].reshape(3, 4).numpy()
    assert np.linalg.norm(found.coef[0] - expected) < 0.1 * np.linalg.norm(expected)
    assert found.expo_fidelity[0] == pytest.approx(float((f - design @ slope).square().mean()), rel=0.1)
    assert found.expo_r2[0] > 0.1


def test_expo_streams_and_is_seeded_by_image():
    images, labels = [photo(s) for s in range(2)], [blocks()] * 2
    settings = {"n_fit": 6, "n_eval": 10, "n_neighbours": 2}
    both = expo(Small(), iter(images), segments=labels, **settings)
    alone = expo(Small(), images[1:], segments=labels[1:], **settings)
    np.testing.assert_allclose(both.expo_stability[1], alone.expo_stability[0], rtol=1e-3)
    assert both.expo_stability[0] != pytest.approx(both.expo_stability[1], rel=1e-3)
    other = expo(Small(), images[1:], segments=labels[1:], seed=1, **settings)
    assert other.expo_fidelity[0] != alone.expo_fidelity[0]


def test_expo_of_a_constant_network():
    class Dead(Small):
        def forward(self, x):
            return super().forward(0 * x)

    found = expo(Dead(), [photo()], segments=[blocks()], n_fit=3, n_eval=5)
    assert found.expo_fidelity[0] < 1e-12
    assert found.expo_stability[0] == 0
    assert np.isnan([found.expo_r2[0], found.expo_stability_relative[0]]).all()


# Segments and maps ----------------------------------------------------------------------------------------


def test_segments_of_two_colours_are_the_two_halves():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 16:] = (200, 30, 30)
    # Without blur: by default felzenszwalb finds the blurred columns between the halves as well.
    for labels in (segment(image, sigma=0), segment(image, "quickshift")):
        np.testing.assert_array_equal(labels, np.repeat([[0] * 16 + [1] * 16], 32, axis=0))
    assert segment(np.full((20, 20), 7, np.uint8)).max() == 0


def test_segments_use_the_official_parameters():
    from skimage.segmentation import felzenszwalb, quickshift

    picture = crops(48, 1)[0]
    np.testing.assert_array_equal(segment(picture), felzenszwalb(picture, scale=10, sigma=0.4, min_size=20))
    expected = quickshift(picture, kernel_size=4, max_dist=200, ratio=0.2)
    np.testing.assert_array_equal(segment(picture, "quickshift"), expected)
    assert segment(picture, scale=1000).max() < segment(picture).max()
    gray = picture[..., 0]
    np.testing.assert_array_equal(segment(gray), segment(np.stack([gray] * 3, axis=2)))
    np.testing.assert_array_equal(segment(gray), segment(torch.from_numpy(gray[..., None].copy())))


def test_a_grid_covers_images_that_its_cells_do_not_divide():
    labels = segment(np.zeros((5, 7), np.uint8), "grid", cell=3)
    np.testing.assert_array_equal(labels[[0, 2, 3, 4]], [[0, 0, 0, 1, 1, 1, 2]] * 2 + [[3, 3, 3, 4, 4, 4, 5]] * 2)
    with pytest.raises(UserError, match="cell is 0"):
        segment(photo(), "grid", cell=0)


def test_explanation_map_tints_for_and_against():
    image, coef = np.full((4, 4, 3), 128, np.uint8), np.array([1.0, -1.0, 0.0, 0.5])[blocks(4, 2)]
    tinted = explanation_map(image, coef, 1)
    red, blue, gray, pale = tinted[0, 0], tinted[0, 3], tinted[3, 0], tinted[3, 3]
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    np.testing.assert_allclose(gray, 128 / 255)
    assert red[0] - red[2] == pytest.approx(2 * (pale[0] - pale[2]))
    doubled = explanation_map(image[..., 0], coef, 2)
    assert red[0] - red[2] == pytest.approx(2 * (doubled[0, 0, 0] - doubled[0, 0, 2]))
    np.testing.assert_allclose(explanation_map(image, 0 * coef, 0), 128 / 255)


def test_superpixels_of_colour_images_are_the_papers():
    found = [default_segmentation(*s) for s in ((1, 28), (3, 32), (3, 224))]
    assert found == ["grid", "felzenszwalb", "quickshift"]


# Bad input ------------------------------------------------------------------------------------------------


def test_errors_say_what_to_do():
    model, image = Small(), photo()
    table = lime.fidelity_stability
    with pytest.raises(UserError, match=r"Did you mean 'quickshift'\?"):
        segment(image, "quick_shift")
    with pytest.raises(UserError, match=r"Did you mean 'min_size'\?"):
        segment(image, minsize=3)
    with pytest.raises(UserError, match=r"Did you mean 'bfloat16'\?"):
        table(model, [image], precision="float16")
    with pytest.raises(UserError, match="uint8"):
        table(model, [image / 255])
    with pytest.raises(UserError, match=r"image\[None\]"):
        table(model, image)
    with pytest.raises(UserError, match="at least one"):
        table(model, [])
    with pytest.raises(UserError, match="n_masks is 1"):
        table(model, [image], n_masks=1)
    with pytest.raises(UserError, match="one \\(H, W\\) array"):
        table(model, [image, image], segments=[blocks()], n_masks=4)
    with pytest.raises(UserError, match="one \\(H, W\\) array"):
        table(model, [image], segments=[blocks(8)])
    with pytest.raises(UserError, match="sigma"):
        expo(model, [image], sigma=0)
    with pytest.raises(UserError, match="n_eval is 1"):
        expo(model, [image], n_eval=1)
    for wrong in (np.ones((3, 15)), np.full((3, 16), 0.5), np.ones(16), np.ones((0, 16))):
        with pytest.raises(UserError, match="rows of 0 and 1, one column for each of the 16 superpixels"):
            lime.explain(model, image, blocks(), masks=wrong)
    with pytest.raises(UserError, match="The reference rows have the shape"):
        lime.explain(model, image, blocks(), references=[0, 1])
    with pytest.raises(
        UserError, match=r"returns the shape \(3840,\) for 5 images; it must return one row of logits an image"
    ):
        lime.explain(nn.Flatten(0), image, blocks())
    nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        table(model, [image], segments=[blocks()], n_masks=4)


def test_every_score_is_described():
    for name in (*lime.SCORES, *EXPO_SCORES):
        assert METRICS[name].dimension == "interpretability"
    assert METRICS["fidelity"].in_verdict
    assert not METRICS["fidelity"].higher_is_better
    assert METRICS["fidelity_r2"].higher_is_better
