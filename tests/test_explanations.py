import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import pairwise_distances
from torch import nn
from torch.nn import functional as F

from lthlib.core.errors import UserError
from lthlib.metrics import METRICS
from lthlib.metrics.interpretability import explanations as ex
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
    masks, references = ex.draw_masks(image, labels.max() + 1, n_masks=n_masks, n_perturb=n_perturb, seed=seed)
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
        distance = pairwise_distances(masks, masks[reference : reference + 1], metric="cosine").ravel()
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


# The ridge regressions ------------------------------------------------------------------------------------


def test_all_weighted_ridges_agree_with_sklearn():
    rng = np.random.default_rng(1)
    masks = rng.integers(0, 2, (60, 7))
    masks[0], masks[5] = 1, 0
    values = rng.random(60)
    references = [0, 5, 17, 17, 42]
    weights = ex.lime_kernel(masks, references)
    fits = ex.weighted_ridge(masks, values, weights)
    for k, reference in enumerate(references):
        distance = pairwise_distances(masks, masks[[reference]], metric="cosine").ravel()
        weight = np.sqrt(np.exp(-(distance**2) / 0.25**2))
        np.testing.assert_allclose(weights[k], weight, rtol=1e-10)
        ridge = Ridge(alpha=1).fit(masks, values, sample_weight=weight)
        np.testing.assert_allclose(fits.coef[k], ridge.coef_, rtol=1e-9, atol=1e-13)
        assert fits.intercept[k] == pytest.approx(ridge.intercept_, rel=1e-10)
        assert fits.error[k] == pytest.approx(np.mean((values - ridge.predict(masks)) ** 2), rel=1e-10)
        assert fits.r2[k] == pytest.approx(ridge.score(masks, values, sample_weight=weight), rel=1e-9)


def test_more_superpixels_than_masks():
    rng = np.random.default_rng(2)
    masks, values = rng.integers(0, 2, (10, 25)), rng.random(10)
    masks[0] = 1
    weights = ex.lime_kernel(masks, [0])
    ridge = Ridge(alpha=1).fit(masks, values, sample_weight=weights[0])
    np.testing.assert_allclose(ex.weighted_ridge(masks, values, weights).coef[0], ridge.coef_, atol=1e-13)


def test_without_penalty_a_linear_function_is_recovered_around_every_row():
    rng = np.random.default_rng(3)
    masks = rng.integers(0, 2, (200, 6))
    masks[0] = 1
    slope = rng.normal(size=6)
    fits = ex.weighted_ridge(masks, 0.3 + masks @ slope, ex.lime_kernel(masks, range(20)), alpha=0)
    np.testing.assert_allclose(fits.coef, np.tile(slope, (20, 1)), atol=1e-10)
    np.testing.assert_allclose(fits.intercept, 0.3, atol=1e-10)
    np.testing.assert_allclose(fits.r2, 1, atol=1e-10)


# Fidelity and stability -----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_agrees_with_the_official_procedure(channels):
    """With black superpixels too, whose hiding changes nothing and is not evaluated again."""
    images = [photo(seed, channels=channels) for seed in range(3)]
    images[1][:8] = 0
    images[1][0, 0] = 9  # nearly black is not black
    model = Small(channels).eval()
    settings = {"n_masks": 150, "n_perturb": 3, "seed": 4}
    found = ex.fidelity_stability(model, images, segments=[blocks()] * 3, **settings)
    for i, image in enumerate(images):
        expected = measure_slowly(model, image, blocks(), **settings)
        for name, value in expected.items():
            assert getattr(found, name)[i] == pytest.approx(value, rel=1e-5), name
        assert found.fidelity_r2[i] == pytest.approx(1 - expected["fidelity"] / expected["variance"], rel=1e-5)


def test_equal_pictures_are_evaluated_once():
    image = photo()
    image[:, 4:] = 0  # of 16 superpixels only the four of the left column can be seen
    found = ex.fidelity_stability(Small().eval(), [image], segments=[blocks()])
    masks, _ = ex.draw_masks(image, 16)
    assert found.n_evaluated[0] == len(np.unique(masks[:, ::4], axis=0)) == 16


def test_224_pixel_photographs_streamed_with_quickshift():
    pictures = crops(224, 2)
    model = Small(stride=8).eval()
    settings = {"n_masks": 24, "n_perturb": 2, "seed": 0}
    found = ex.fidelity_stability(model, (p for p in pictures), method="quickshift", batch=5, **settings)
    segments = [ex.segment(picture, "quickshift") for picture in pictures]
    for i, (picture, labels) in enumerate(zip(pictures, segments, strict=True)):
        assert found.n_segments[i] == labels.max() + 1 > 10
        expected = measure_slowly(model, picture, labels, **settings)
        assert found.fidelity[i] == pytest.approx(expected["fidelity"], rel=1e-4)
        assert found.stability[i] == pytest.approx(expected["stability"], rel=1e-4)
    few = {"n_fit": 6, "n_eval": 6, "n_neighbours": 2, "segments": segments}
    streamed, at_once = (ex.expo(model, (p for p in pictures), batch=batch, **few) for batch in (4, 64))
    assert streamed.n_features.tolist() == (3 * found.n_segments).tolist()
    for name in streamed.SCORES:
        np.testing.assert_allclose(streamed.score(name), at_once.score(name), rtol=1e-4)


def test_constant_network_scores_zero_and_has_no_scale_free_form():
    found = ex.fidelity_stability(Constant(), [photo()], segments=[blocks()], n_masks=50)
    assert found.label[0] == 1
    assert found.fidelity[0] < 1e-25
    assert found.stability[0] < 1e-25
    assert found.constant[0]
    assert np.isnan([found.fidelity_r2[0], found.stability_relative[0], found.lime_r2[0]]).all()
    summary = found.summary()
    assert summary["fidelity"] < 1e-25
    assert np.isnan(summary["fidelity_r2"])


def test_linear_network_shows_only_the_shrinkage_of_the_ridge():
    image, labels = photo(5), blocks()
    slope = np.random.default_rng(6).normal(size=(3, 16, 16)) * 2e-3
    model = Linear(0.7, slope)
    pixels = image.transpose(2, 0, 1) / 255
    per_segment = np.bincount(labels.ravel(), weights=(pixels * slope).sum(0).ravel())
    found = ex.fidelity_stability(model, [image], segments=[labels])
    masks, references = ex.draw_masks(image, 16)
    exact = 0.7 + masks @ per_segment  # computed without the network
    ridges = [Ridge(alpha=1).fit(masks, exact, sample_weight=weight) for weight in ex.lime_kernel(masks, references)]
    np.testing.assert_allclose(found.coef[0], ridges[0].coef_, atol=1e-7)
    assert found.fidelity[0] == pytest.approx(np.mean((exact - ridges[0].predict(masks)) ** 2), rel=1e-3)
    changes = [np.sum((r.coef_ - ridges[0].coef_) ** 2) for r in ridges[1:]]
    assert found.stability[0] == pytest.approx(np.mean(changes), rel=1e-3)
    assert found.fidelity_r2[0] > 0.9995
    assert np.abs(found.coef[0] - per_segment).max() < 0.03 * np.abs(per_segment).max()


def test_the_class_is_that_of_the_whole_image():
    """The first class has 0.55 for the whole image and 0.3 where half of it is hidden."""
    image = np.full((8, 8, 1), 255, np.uint8)
    model = Linear(0.05, np.full((1, 8, 8), 0.5 / 64))
    found = ex.fidelity_stability(model, [image], segments=[blocks(8)], n_masks=400)
    assert found.label[0] == 0
    assert found.probability[0] == pytest.approx(0.55, abs=1e-6)
    assert (found.coef[0] > 0).all()


def test_seeds():
    images = [photo(seed) for seed in range(3)]
    settings = {"segments": [blocks()] * 3, "n_masks": 60}
    first = ex.fidelity_stability(Small(), images, seed=0, **settings)
    again = ex.fidelity_stability(Small(), images, seed=0, **settings)
    other = ex.fidelity_stability(Small(), images, seed=1, **settings)
    np.testing.assert_array_equal(first.stability, again.stability)
    assert (first.fidelity != other.fidelity).all()
    assert (first.stability != other.stability).all()


def test_images_do_not_share_masks():
    drawn = [ex.draw_masks(photo(seed), 16)[0] for seed in range(2)]
    assert (drawn[0][1:] == drawn[1][1:]).mean() == pytest.approx(0.5, abs=0.02)
    assert drawn[0].mean() == pytest.approx(0.5, abs=0.02)


def test_an_image_keeps_its_numbers_in_any_company_and_chunk():
    images = np.stack([photo(seed) for seed in range(3)])
    settings = {"segments": [blocks()] * 3, "n_masks": 60}
    forward = ex.fidelity_stability(Small(), images, batch=7, **settings)
    backward = ex.fidelity_stability(Small(), torch.from_numpy(images[::-1].copy()), batch=60, **settings)
    np.testing.assert_allclose(forward.fidelity, backward.fidelity[::-1], rtol=1e-5)
    np.testing.assert_allclose(forward.stability, backward.stability[::-1], rtol=1e-5)


@pytest.mark.parametrize("measure", [ex.fidelity_stability, ex.expo])
def test_the_network_and_all_random_states_are_left_as_found(measure):
    model = Small()
    model.norm.eval()
    model.conv.weight.requires_grad_(False)
    model.head(torch.ones(2, 8)).sum().backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_states = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    settings = {"n_masks": 20} if measure is ex.fidelity_stability else {"n_fit": 3, "n_eval": 3}
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
    trained, judged = (ex.fidelity_stability(Small().train(mode), [photo()], **settings) for mode in (True, False))
    assert trained.fidelity[0] == judged.fidelity[0]


def test_an_image_of_one_segment_is_not_scored_but_counted():
    images = [np.full((16, 16, 3), 90, np.uint8), crops(32, 1)[0]]
    found = ex.fidelity_stability(Small(), images, n_masks=60)
    assert found.single_segment.tolist() == [True, False]
    alone = ex.fidelity_stability(Small(), images[1:], n_masks=60)
    for name in ex.Explanations.SCORES:
        assert np.isnan(found.score(name)[0]), name
        assert found.summary()[name] == alone.score(name)[0], name
    assert not found.constant[0]
    nothing = ex.fidelity_stability(Small(), images[:1], n_masks=60).summary()
    assert all(np.isnan(value) for value in nothing.values())


def test_a_cooler_network_wins_the_raw_scores_and_not_the_relative_ones():
    """For small logits f is linear in them: halving them divides the raw scores by four."""

    class Tempered(nn.Module):
        def __init__(self, temperature):
            super().__init__()
            self.body, self.temperature = Small(), temperature

        def forward(self, x):
            return self.body(x) / self.temperature

    settings = {"segments": [blocks()], "n_masks": 200}
    warm, cool = (ex.fidelity_stability(Tempered(t), [photo()], **settings) for t in (500.0, 1000.0))
    for name in ("fidelity", "stability", "causal"):
        assert warm.score(name)[0] / cool.score(name)[0] == pytest.approx(4, rel=1e-2), name
    for name in ("fidelity_r2", "stability_relative", "lime_r2"):
        assert warm.score(name)[0] == pytest.approx(cool.score(name)[0], rel=1e-2), name
    assert 0 < warm.fidelity_r2[0] < 0.999


def test_standard_errors_are_those_of_the_mean():
    found = ex.fidelity_stability(Small(), [photo(s) for s in range(5)], segments=[blocks()] * 5, n_masks=40)
    from scipy.stats import sem

    for name, error in found.standard_errors().items():
        assert error == pytest.approx(sem(found.score(name)))


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
        torch.testing.assert_close(inference_copy(model)(x), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1


def test_a_traceable_network_is_folded():
    layers = [type(module) for module in inference_copy(Small(), images=torch.rand(1, 3, 12, 12)).modules()]
    assert nn.Conv2d in layers
    assert nn.BatchNorm2d not in layers


def test_bfloat16_moves_the_scores_less_than_the_masks_do():
    images, labels = [photo(s) for s in range(4)], [blocks()] * 4
    settings = {"segments": labels, "n_masks": 200}
    full = ex.fidelity_stability(Small(), images, **settings)
    low = ex.fidelity_stability(Small(), images, precision="bfloat16", **settings)
    moved, floor = ex.differences(full, low), ex.seed_floor(Small(), images, **settings)
    for name in ("fidelity", "stability"):
        assert moved[name].image.max() > 0
        assert np.median(moved[name].image) < np.median(floor[name].image)


# Floors ---------------------------------------------------------------------------------------------------


def test_differences_by_hand():
    def measured(fidelity, stability):
        n = len(fidelity)
        return ex.Explanations(
            label=np.zeros(n),
            probability=np.ones(n),
            n_segments=np.full(n, 4),
            n_evaluated=np.full(n, 9),
            variance=np.full(n, 0.5),
            fidelity=np.array(fidelity),
            stability=np.array(stability),
            causal=np.zeros(n),
            lime_r2=np.ones(n),
            coef=(np.ones(4),) * n,
        )

    found = ex.differences(measured([1.0, 3.0], [0.1, np.nan]), measured([3.0, 3.0], [0.3, np.nan]))
    np.testing.assert_allclose(found["fidelity"].image, [1, 0])
    assert found["fidelity"].mean == pytest.approx(1 / 2.5)
    np.testing.assert_allclose(found["stability"].image, [1, np.nan])
    assert found["stability"].mean == pytest.approx(1)
    assert found["causal"].mean == 0
    with pytest.raises(UserError, match="the same images"):
        ex.differences(measured([1.0], [1.0]), measured([1.0, 2.0], [1.0, 2.0]))


def test_seed_floor_compares_two_seeds_and_falls_with_the_number_of_masks():
    images, settings = [photo(s) for s in range(6)], {"segments": [blocks()] * 6}
    few = ex.seed_floor(Small(), images, n_masks=60, **settings)
    many = ex.seed_floor(Small(), images, n_masks=3000, **settings)
    assert many["fidelity"].image.mean() < 0.5 * few["fidelity"].image.mean()
    runs = [ex.fidelity_stability(Small(), images, n_masks=60, seed=seed, **settings) for seed in (0, 1)]
    np.testing.assert_array_equal(few["stability"].image, ex.differences(*runs)["stability"].image)
    with pytest.raises(UserError, match="two different seeds"):
        ex.seed_floor(Small(), images, seeds=(3, 3))


# ExpO -----------------------------------------------------------------------------------------------------


def test_expo_of_a_linear_function_is_exact():
    slope = np.random.default_rng(0).normal(size=(3, 8, 8)) * 3e-3
    model, image, labels = Linear(0.6, slope), photo(size=8), blocks(8, 2)
    pixels = ex.expo(model, [image], features="pixels", n_fit=4, n_eval=30)
    np.testing.assert_allclose(pixels.coef[0], slope.reshape(3, 64), atol=1e-7)
    assert pixels.fidelity[0] < 1e-12
    assert pixels.stability[0] < 1e-12
    assert pixels.r2[0] == pytest.approx(1, abs=1e-6)
    regions = ex.expo(model, [image], segments=[labels], n_fit=4, n_eval=4000)
    means = np.stack([slope[:, labels == k].mean(1) for k in range(4)], axis=1)
    np.testing.assert_allclose(regions.coef[0], 16 * means, atol=1e-6)
    # What superpixel means cannot express: the slope around its mean, under noise of 0.1.
    unexplained = 0.1**2 * ((slope - means[:, labels]) ** 2).sum()
    assert regions.fidelity[0] == pytest.approx(unexplained, rel=0.1)
    assert regions.variance[0] == pytest.approx(0.1**2 * (slope**2).sum(), rel=0.1)


def test_expo_explains_the_predicted_class():
    slope = np.random.default_rng(0).normal(size=(1, 8, 8)) * 3e-3
    second = ex.expo(Linear(0.3, slope), [photo(size=8, channels=1)], features="pixels", n_fit=4, n_eval=5)
    assert second.label[0] == 1
    np.testing.assert_allclose(second.coef[0], -slope.reshape(1, 64), atol=1e-7)


def test_expo_of_a_quadratic_function_has_closed_forms():
    """c_x' - c_x = Q (x' - x), known to the noise of n_fit draws on either side.

    The published code explains x again in place of x': its stability is that noise alone.
    """
    rng, sigma, n_fit = np.random.default_rng(1), 0.05, 40
    slope, curvature = rng.normal(size=(1, 12, 12)) * 1e-3, rng.normal(size=(1, 12, 12)) * 5e-3
    model = Quadratic(0.6, slope, curvature)
    found = ex.expo(
        model,
        [photo(s, 12, 1) for s in range(10)],
        features="pixels",
        sigma=sigma,
        n_fit=n_fit,
        n_eval=500,
        n_neighbours=10,
    )
    moved, noise = sigma**2 * (curvature**2).sum(), sigma**2 * (curvature**2).sum() / n_fit
    assert found.stability.mean() == pytest.approx(moved + 2 * noise, rel=0.06)
    assert found.stability_floor.mean() == pytest.approx(2 * noise, rel=0.2)
    gradient = slope + curvature * photo(2, 12, 1)[..., 0] / 255
    tolerance = 4 * sigma * np.abs(curvature).max() / np.sqrt(n_fit)
    np.testing.assert_allclose(found.coef[2].ravel(), gradient.ravel(), atol=tolerance)


def test_expo_fidelity_of_a_pure_quadratic():
    """No slope to explain: the error is the variance of e'Qe / 2."""
    curvature, sigma = np.full((1, 6, 6), 4e-2), 0.2
    found = ex.expo(
        Quadratic(0.5, np.zeros((1, 6, 6)), curvature),
        [np.zeros((6, 6), np.uint8)],
        features="pixels",
        sigma=sigma,
        n_fit=20_000,
        n_eval=20_000,
    )
    assert found.fidelity[0] == pytest.approx(sigma**4 / 2 * (curvature**2).sum(), rel=0.05)
    assert abs(found.r2[0]) < 0.01


def test_the_mean_gradient_is_what_the_regression_converges_to():
    settings = {"segments": [blocks(8, 2)], "sigma": 0.05, "n_neighbours": 1, "n_eval": 5000}
    image = photo(3, 8)
    gradient = ex.expo(Small(), [image], fit="gradient", n_fit=2000, **settings)
    samples = ex.expo(Small(), [image], fit="samples", n_fit=20_000, **settings)
    size = np.linalg.norm(gradient.coef[0])
    assert np.linalg.norm(gradient.coef[0] - samples.coef[0]) < 0.1 * size
    assert gradient.fidelity[0] == pytest.approx(samples.fidelity[0], rel=0.1)
    assert gradient.r2[0] > 0.1


def test_expo_streams_and_is_seeded_by_image():
    images, labels = [photo(s) for s in range(2)], [blocks()] * 2
    settings = {"n_fit": 6, "n_eval": 10, "n_neighbours": 2}
    both = ex.expo(Small(), iter(images), segments=labels, batch=4, **settings)
    alone = ex.expo(Small(), images[1:], segments=labels[1:], batch=6, **settings)
    np.testing.assert_allclose(both.stability[1], alone.stability[0], rtol=1e-3)
    assert both.stability[0] != pytest.approx(both.stability[1], rel=1e-3)
    other = ex.expo(Small(), images[1:], segments=labels[1:], seed=1, **settings)
    assert other.fidelity[0] != alone.fidelity[0]


def test_expo_of_a_constant_network():
    class Dead(Small):
        def forward(self, x):
            return super().forward(0 * x)

    found = ex.expo(Dead(), [photo()], segments=[blocks()], n_fit=3, n_eval=5)
    assert found.fidelity[0] < 1e-12
    assert found.stability[0] == 0
    assert np.isnan([found.r2[0], found.stability_relative[0]]).all()


# Segments and maps ----------------------------------------------------------------------------------------


def test_segments_of_two_colours_are_the_two_halves():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 16:] = (200, 30, 30)
    # Without blur: by default felzenszwalb finds the blurred columns between the halves as well.
    for labels in (ex.segment(image, sigma=0), ex.segment(image, "quickshift")):
        np.testing.assert_array_equal(labels, np.repeat([[0] * 16 + [1] * 16], 32, axis=0))
    assert ex.segment(np.full((20, 20), 7, np.uint8)).max() == 0


def test_segments_use_the_official_parameters():
    from skimage.segmentation import felzenszwalb, quickshift

    picture = crops(48, 1)[0]
    np.testing.assert_array_equal(ex.segment(picture), felzenszwalb(picture, scale=10, sigma=0.4, min_size=20))
    expected = quickshift(picture, kernel_size=4, max_dist=200, ratio=0.2)
    np.testing.assert_array_equal(ex.segment(picture, "quickshift"), expected)
    assert ex.segment(picture, scale=1000).max() < ex.segment(picture).max()
    gray = picture[..., 0]
    np.testing.assert_array_equal(ex.segment(gray), ex.segment(np.stack([gray] * 3, axis=2)))
    np.testing.assert_array_equal(ex.segment(gray), ex.segment(torch.from_numpy(gray[..., None].copy())))


def test_a_grid_covers_images_that_its_cells_do_not_divide():
    labels = ex.segment(np.zeros((5, 7), np.uint8), "grid", cell=3)
    np.testing.assert_array_equal(labels[[0, 2, 3, 4]], [[0, 0, 0, 1, 1, 1, 2]] * 2 + [[3, 3, 3, 4, 4, 4, 5]] * 2)
    with pytest.raises(UserError, match="cell is 0"):
        ex.segment(photo(), "grid", cell=0)


def test_explanation_map_tints_for_and_against():
    image, labels = np.full((4, 4, 3), 128, np.uint8), blocks(4, 2)
    tinted = ex.explanation_map(image, labels, np.array([1.0, -1.0, 0.0, 0.5]))
    red, blue, gray, pale = tinted[0, 0], tinted[0, 3], tinted[3, 0], tinted[3, 3]
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    np.testing.assert_allclose(gray, 128 / 255)
    assert red[0] - red[2] == pytest.approx(2 * (pale[0] - pale[2]))
    doubled = ex.explanation_map(image, labels, np.array([1.0, -1.0, 0.0, 0.5]), scale=2)
    assert red[0] - red[2] == pytest.approx(2 * (doubled[0, 0, 0] - doubled[0, 0, 2]))
    np.testing.assert_allclose(ex.explanation_map(image, labels, np.zeros(4)), 128 / 255)
    with pytest.raises(UserError, match="do not fit"):
        ex.explanation_map(image, labels, np.ones(3))


# Bad input ------------------------------------------------------------------------------------------------


def test_errors_say_what_to_do():
    model, image = Small(), photo()
    lime = ex.fidelity_stability
    with pytest.raises(UserError, match=r"Did you mean 'quickshift'\?"):
        ex.segment(image, "quick_shift")
    with pytest.raises(UserError, match=r"Did you mean 'min_size'\?"):
        ex.segment(image, minsize=3)
    with pytest.raises(UserError, match=r"Did you mean 'bfloat16'\?"):
        lime(model, [image], precision="float16")
    with pytest.raises(UserError, match="uint8"):
        lime(model, [image / 255])
    with pytest.raises(UserError, match=r"image\[None\]"):
        lime(model, image)
    with pytest.raises(UserError, match="at least one"):
        lime(model, [])
    with pytest.raises(UserError, match="n_masks is 1"):
        lime(model, [image], n_masks=1)
    with pytest.raises(UserError, match="one \\(H, W\\) array"):
        lime(model, [image, image], segments=[blocks()], n_masks=4)
    with pytest.raises(UserError, match="one \\(H, W\\) array"):
        lime(model, [image], segments=[blocks(8)])
    with pytest.raises(UserError, match="sigma"):
        ex.expo(model, [image], sigma=0)
    with pytest.raises(UserError, match='fit="gradient"'):
        ex.expo(model, [image], segments=[blocks()], fit="samples", n_fit=49)
    with pytest.raises(UserError, match="Did you mean 'pixels'"):
        ex.expo(model, [image], features="pixel")
    nn.init.constant_(model.head.bias, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        lime(model, [image], segments=[blocks()], n_masks=4)


def test_every_score_is_described():
    for name in (*ex.Explanations.SCORES, *ex.Neighbourhoods.SCORES):
        assert METRICS[name].dimension == "interpretability"
    assert METRICS["fidelity"].in_verdict
    assert not METRICS["fidelity"].higher_is_better
    assert METRICS["fidelity_r2"].higher_is_better
