"""Dissection against closed forms and a naive loop; compositions against brute force."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from lthlib.core.errors import UserError
from lthlib.data.concepts import ConceptSet
from lthlib.data.scenes import scenes
from lthlib.metrics.interpretability import composition, dissection
from lthlib.metrics.interpretability.activations import Stream, activations
from lthlib.metrics.interpretability.composition import Formula
from lthlib.metrics.interpretability.regions import Upsampler, activation_regions


def concept_set(planes, category_of=None):
    """Concepts from planes (N, D, H, W); one category unless told."""
    planes = np.asarray(planes, np.int16)
    count = int(planes.max()) if category_of is None else len(category_of)
    category_of = np.zeros(count, int) if category_of is None else np.asarray(category_of)
    names = tuple(f"label{i}" for i in range(count))
    categories = tuple(f"category{i}" for i in range(int(category_of.max(initial=0)) + 1))
    return ConceptSet("test", np.zeros((len(planes), 2, 2, 3), np.uint8), planes, names, categories, category_of)


def random_case(seed, n=5, units=4, low=(3, 4), high=(13, 16), labels=6, categories=3, depth=2, rate=0.2):
    """Smooth label planes with unlabelled areas, and activations with a threshold exceeded at ``rate``."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, labels + 1, (n, depth, 4, 4)) * (rng.random((n, depth, 1, 1)) < 0.8)
    planes = np.stack(
        [np.asarray(Image.fromarray(p.astype(np.uint8)).resize(high[::-1], 0)) for p in coarse.reshape(-1, 4, 4)]
    ).reshape(n, depth, *high)
    acts = rng.normal(size=(n, units, *low)).astype(np.float32)
    concepts = concept_set(planes, rng.permutation(np.arange(labels) % categories))
    return acts, np.quantile(acts, 1 - rate, axis=(0, 2, 3)).astype(np.float32), concepts


def loop_tally(acts, limits, concepts):
    """Count unit by unit, image by image, with PIL's resize: the definition, written out."""
    units, labels, categories = len(limits), len(concepts.labels), len(concepts.categories)
    both, unit = np.zeros((units, labels), int), np.zeros(units, int)
    touching = np.zeros((units, categories), int)
    for maps, planes in zip(acts, concepts.planes, strict=True):
        masks = [(planes == c + 1).any(0) for c in range(labels)]
        for u in range(units):
            if maps[u].max() > limits[u]:
                size = planes.shape[:0:-1]
                region = np.asarray(Image.fromarray(maps[u]).resize(size, Image.BILINEAR)) > limits[u]
                unit[u] += region.sum()
                hits = np.array([(m & region).sum() for m in masks])
                both[u] += hits
                for k in range(categories):
                    own = concepts.category_of == k
                    touching[u, k] += region.sum() * bool(hits[own].any())
    return both, unit, touching


# --- enlargement and thresholds --------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.integers(0, 999),
)
def test_regions_equal_pils_resize_for_any_sizes(low, high, seed):
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=(2, 3, *low)).astype(np.float32)
    limits = rng.normal(size=3).astype(np.float32) / 2
    found = activation_regions(maps, limits, high)
    for i, u in itertools.product(range(2), range(3)):
        big = np.asarray(Image.fromarray(maps[i, u]).resize(high[::-1], Image.BILINEAR))
        clear = np.abs(big - limits[u]) > 1e-5
        assert (found[i, u] == (big > limits[u]))[clear].all()


def test_regions_equal_torchs_half_pixel_interpolation():
    maps = torch.randn(4, 5, 7, 7, generator=torch.Generator().manual_seed(0))
    big = nn.functional.interpolate(maps, (112, 112), mode="bilinear", align_corners=False)
    limits = np.full(5, 1.0, np.float32)
    assert (activation_regions(maps.numpy(), limits, (112, 112)) == (big > 1).numpy()).all()


def test_threshold_leaves_the_stated_fraction_above():
    rng = np.random.default_rng(0)
    acts = rng.normal(size=(150, 6, 5, 4)).astype(np.float32)
    limits = dissection.thresholds(acts)
    assert ((acts > limits[:, None, None]).sum((0, 2, 3)) == 15).all()  # 0.005 x 3000
    assert np.isin(limits, acts).all()
    sketch = np.sort(acts.transpose(1, 0, 2, 3).reshape(6, -1), 1)
    assert (limits == sketch[:, -16]).all()


def test_threshold_of_a_stream_is_that_of_the_array():
    acts = np.random.default_rng(1).gamma(0.1, size=(33, 5, 3, 3)).astype(np.float32).round(2)
    blocks = _Blocks(acts, 4)
    for quantile in (0.005, 0.1, 0.6):
        assert (dissection.thresholds(blocks, quantile) == dissection.thresholds(acts, quantile)).all()
        at_most = (acts > dissection.thresholds(acts, quantile)[:, None, None]).mean((0, 2, 3))
        assert (at_most <= quantile).all()


class _Blocks:
    def __init__(self, acts, chunk):
        self.acts, self.chunk = acts, chunk

    def __len__(self):
        return len(self.acts)

    def __iter__(self):
        return (self.acts[i : i + self.chunk] for i in range(0, len(self.acts), self.chunk))


# --- tally -----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10**6),
    st.sampled_from([((3, 4), (13, 16)), ((2, 2), (16, 16)), ((8, 8), (8, 8)), ((1, 1), (5, 6)), ((9, 3), (4, 12))]),
    st.sampled_from([0.01, 0.2, 0.9]),
)
def test_counts_equal_a_loop_over_units_and_images(seed, shapes, rate):
    acts, limits, concepts = random_case(seed, low=shapes[0], high=shapes[1], rate=rate)
    both, _, touching = loop_tally(acts, limits, concepts)
    counts = dissection.tally(acts, limits, concepts)
    assert (counts.both == both).all()
    assert (counts.touching == touching).all()
    areas = np.array([concepts.mask(label).sum() for label in concepts.labels])
    assert (counts.concept == areas).all()
    expected = both / np.maximum(touching[:, concepts.category_of] + areas - both, 1)
    np.testing.assert_allclose(dissection.iou(counts), expected, rtol=1e-15)


def test_counts_do_not_depend_on_chunks():
    acts, limits, concepts = random_case(5, n=9)
    whole, parts = (dissection.tally(a, limits, concepts) for a in (acts, _Blocks(acts, 2)))
    for name in ("both", "concept", "touching"):
        assert (getattr(whole, name) == getattr(parts, name)).all()


def test_a_unit_is_not_charged_for_images_without_a_label_of_the_category():
    planes = np.zeros((2, 1, 4, 4), int)
    planes[0, 0, :, :2] = 1  # the second image has no label, the first half of one
    acts = np.zeros((2, 2, 4, 4), np.float32)
    acts[0, 0, :, 1:3] = acts[1, 0] = 1  # 8 pixels, 4 of them on the label; and 16 without any
    acts[0, 1, :, 2:] = 1  # 8 pixels beside the label
    counts = dissection.tally(acts, np.zeros(2, np.float32), concept_set(planes))
    assert dissection.iou(counts)[:, 0].tolist() == [4 / (8 + 8 - 4), 0]
    assert counts.touching[:, 0].tolist() == [8, 0]


def test_iou_of_equal_disjoint_and_half_overlapping_regions():
    planes = np.zeros((3, 1, 12, 12), int)
    planes[:, 0, 2:8, 3:9] = 1
    acts = np.zeros((3, 3, 12, 12), np.float32)
    acts[:, 0, 2:8, 3:9] = 1
    acts[:, 1, 8:, :] = 1
    acts[:, 2, 2:8, 6:12] = 1
    counts = dissection.tally(acts, np.full(3, 0.5, np.float32), concept_set(planes))
    assert dissection.iou(counts)[:, 0].tolist() == [1, 0, 1 / 3]


def test_enlarged_unit_equal_to_its_mask_has_iou_one():
    acts = np.random.default_rng(2).normal(size=(6, 4, 5, 5)).astype(np.float32)
    limits = dissection.thresholds(acts, 0.2)
    masks = activation_regions(acts, limits, (20, 20))
    concepts = concept_set(masks * np.arange(1, 5)[:, None, None])
    scores = dissection.iou(dissection.tally(acts, limits, concepts))
    assert (np.diag(scores) == 1).all()
    assert (scores[~np.eye(4, dtype=bool)] < 1).all()


@pytest.mark.parametrize("kept", [0.1, 0.3])
def test_iou_of_a_perfect_detector_at_another_quantile_is_the_attainable_one(kept):
    planes = np.zeros((4, 1, 10, 10), int)
    planes[:, 0, :, :2] = 1
    acts = np.arange(10, 0, -1, dtype=np.float32)[None, None, None].repeat(4, 0).repeat(10, 2)
    concepts = concept_set(planes)
    counts = dissection.tally(acts, dissection.thresholds(acts, kept), concepts)
    assert dissection.iou(counts) == pytest.approx(min(kept, 0.2) / max(kept, 0.2))


def test_only_values_strictly_above_the_threshold_count():
    acts = np.full((2, 1, 3, 3), 2.0, np.float32)
    counts = dissection.tally(acts, np.array([2.0], np.float32), concept_set(np.ones((2, 1, 6, 6))))
    assert counts.both.sum() == counts.touching.sum() == 0


def test_concept_that_never_occurs_and_silent_unit_have_iou_zero():
    planes = np.ones((2, 1, 4, 4), int)
    concepts = concept_set(planes, category_of=[0, 1])
    acts = np.zeros((2, 2, 2, 2), np.float32)
    acts[:, 0] = 1
    counts = dissection.tally(acts, np.zeros(2, np.float32), concepts)
    scores = dissection.iou(counts)
    assert scores.tolist() == [[1, 0], [0, 0]]


def test_images_without_any_label_count_for_nothing():
    counts = dissection.tally(
        np.ones((2, 1, 2, 2), np.float32), np.zeros(1, np.float32), concept_set(np.zeros((2, 1, 4, 4)), category_of=[0])
    )
    assert counts.both.sum() == counts.touching.sum() == 0


def test_summary_counts_distinct_best_labels_above_the_limit():
    scores = np.array([[0.5, 0.2, 0.3], [0.6, 0, 0], [0, 0.041, 0], [0, 0, 0.04]])
    found = dissection.summary(scores)
    assert found["unique_detectors"] == 2
    assert found["interpretable_units"] == 3 / 4
    assert found["mean_best_iou"] == pytest.approx((0.5 + 0.6 + 0.041 + 0.04) / 4)
    concepts = concept_set(np.zeros((1, 1, 2, 2)), category_of=[0, 1, 1])
    assert dissection.detectors_by_category(scores, concepts).tolist() == [1, 1]


# --- networks --------------------------------------------------------------------------------------------


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, stride=2, padding=1),
        nn.BatchNorm2d(5),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Sequential(nn.Conv2d(5, 4, 3), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def test_activations_are_the_layers_outputs_before_what_follows_changes_them():
    model, images = small_network(), scenes(16, n=10).images
    model.train()
    model[1].eval()
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    found = activations(model, "1", images, chunk=4)
    assert torch.equal(rng, torch.get_rng_state())
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not model[1]._forward_hooks
    model.eval()
    with torch.no_grad():
        expected = model[1](model[0](pixels))
    assert (expected < 0).any()  # the ReLU in place would have removed these
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-6)


def test_flat_layer_has_maps_of_one_pixel():
    model, images = small_network(), scenes(16, n=6).images
    assert activations(model, "7", images).shape == (6, 3, 1, 1)


def test_stream_and_array_give_the_same_dissection():
    model, concepts = small_network(), scenes(16, n=30)
    acts, stream = activations(model, "4", concepts.images), Stream(model, "4", concepts.images, chunk=7)
    limits = dissection.thresholds(acts, 0.05)
    np.testing.assert_allclose(dissection.thresholds(stream, 0.05), limits, rtol=1e-5)
    a, b = (dissection.tally(x, limits, concepts).both for x in (acts, stream))
    assert np.abs(a - b).sum() <= 0.001 * a.sum()


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu, self.spare = nn.ReLU(), nn.ReLU()

    def forward(self, x):
        return self.relu(self.relu(x))


def test_layers_that_cannot_be_dissected_are_told():
    images = scenes(16, n=2).images
    with pytest.raises(UserError, match=r"no layer '4\.2'\. Did you mean '4\.[01]'\? Its blocks are: 0, 1"):
        activations(small_network(), "4.2", images)
    with pytest.raises(UserError, match="called 2 times"):
        activations(_Twice(), "relu", images)
    with pytest.raises(UserError, match="called 0 times"):
        activations(_Twice(), "spare", images)
    with pytest.raises(UserError, match=r"gives \(2, 3, 256\)"):
        activations(nn.Sequential(nn.Flatten(2)), "0", images)


def test_bad_arguments_are_told():
    acts, limits, concepts = random_case(0)
    with pytest.raises(UserError, match="5 images and labels of 3"):
        dissection.tally(acts, limits, concepts.subset(range(3)))
    with pytest.raises(UserError, match="4 units and 3 thresholds"):
        dissection.tally(acts, limits[:3], concepts)
    with pytest.raises(UserError, match=r"\(0, 1\), not 1\.5"):
        dissection.thresholds(acts, 1.5)
    with pytest.raises(UserError, match="not finite"):
        dissection.thresholds(acts * np.inf)
    with pytest.raises(UserError, match="19 draws"):
        dissection.null_floor(acts, limits, concepts, draws=18)
    with pytest.raises(UserError, match="1 to 10 labels"):
        composition.best_formulas(composition.census(acts, limits, concepts), max_length=11)


# --- null floor ------------------------------------------------------------------------------------------


def test_floor_is_exceeded_by_a_detector_and_by_a_twentieth_of_units_that_know_nothing():
    concepts = scenes(16, n=40, seed=4)
    rng = np.random.default_rng(0)
    acts = rng.normal(size=(40, 301, 4, 4)).astype(np.float32)
    disc = concepts.mask("disc").reshape(40, 4, 4, 4, 4).mean((2, 4))
    acts[:, 300] = disc
    limits = dissection.thresholds(acts, 0.05)
    floor = dissection.null_floor(acts, limits, concepts, draws=19, seed=1)
    above = dissection.iou(dissection.tally(acts, limits, concepts)).max(1) > floor
    assert above[300]
    # binomial(300, 0.05) with shared labels: three standard deviations
    assert abs(above[:300].mean() - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 300)


def test_floor_is_an_order_statistic_of_what_shuffled_labels_give():
    """Images permuted and labels rolled, here by hand and one draw after the other."""
    acts, limits, concepts = random_case(3, n=8)
    null = []
    for rng in np.random.default_rng(5).spawn(39):
        order, shifts = rng.permutation(8), rng.integers(0, concepts.mask_shape, (8, 2))
        planes = [np.roll(concepts.planes[i], shift, (1, 2)) for i, shift in zip(order, shifts, strict=True)]
        shuffled = concept_set(planes, concepts.category_of)
        null.append(dissection.iou(dissection.tally(acts, limits, shuffled)).max(1))
    for draws, rank in ((39, 38), (19, 19)):
        floor = dissection.null_floor(acts, limits, concepts, draws=draws, seed=5)
        assert (floor == np.sort(null[:draws], 0)[rank - 1]).all()


# --- formulas --------------------------------------------------------------------------------------------

NAMES = ("water", "river", "blue", "car")


def grown(*steps):
    formula = Formula().extend("OR", steps[0])
    for operator, label in steps[1:]:
        formula = formula.extend(operator, label)
    return formula


def test_formulas_read_as_one_writes_them():
    assert grown(0, ("OR", 1), ("AND NOT", 2)).text(NAMES) == "(water OR river) AND NOT blue"
    assert grown(1, ("AND", 0), ("OR", 3)).text(NAMES) == "(water AND river) OR car"
    assert grown(3, ("AND NOT", 2), ("AND", 0)).text(NAMES) == "water AND car AND NOT blue"
    text = grown(0, ("OR", 1), ("AND", 2), ("OR", 3)).text(NAMES)
    assert text == "((water OR river) AND blue) OR car"


steps = st.lists(st.tuples(st.sampled_from(composition.OPERATORS), st.integers(0, 3)), max_size=6)


@given(st.integers(0, 3), steps)
def test_canonical_form_keeps_the_meaning(first, steps):
    masks = np.array(list(itertools.product([False, True], repeat=4))).T
    value = masks[first]
    for operator, c in steps:
        value = {"OR": value | masks[c], "AND": value & masks[c], "AND NOT": value & ~masks[c]}[operator]
    formula = grown(first, *steps)
    assert (formula.holds(masks.__getitem__) == value).all()
    assert len(formula) <= 1 + len(steps)


@given(st.permutations([1, 2, 3]), st.sampled_from(["OR", "AND"]))
def test_formulas_that_differ_in_order_are_equal(order, operator):
    a, b, c = order
    assert grown(a, (operator, b), (operator, c)) == grown(1, (operator, 2), (operator, 3))
    assert grown(a, ("AND NOT", b), ("AND", c)) == grown(c, ("AND", a), ("AND NOT", b))


# --- composition search ----------------------------------------------------------------------------------


def brute_force(region, masks, length):
    """Best IoU of all formulas ((a op b) op c) ... of at most this length."""
    values = [m for m in masks if (m & region).any()]
    seen = list(values)
    for _ in range(length - 1):
        values = [v for f in values for m in masks for v in (f | m, f & m, f & ~m)]
        values = list({v.tobytes(): v for v in values}.values())
        seen += values
    return max(((v & region).sum() / max((v | region).sum(), 1) for v in seen), default=0.0)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 3))
def test_wide_beam_finds_what_brute_force_finds(seed, length):
    acts, limits, concepts = random_case(seed, n=3, units=2, labels=4)
    masks = [concepts.mask(c) for c in range(4)]
    counts = composition.census(acts, limits, concepts)
    where = activation_regions(acts, limits, concepts.mask_shape)
    wide = composition.best_formulas(counts, max_length=length, beam=10**6)
    narrow = composition.best_formulas(counts, max_length=length)
    for u in range(2):
        region = where[:, u]
        best = brute_force(region, masks, length)
        assert wide[u].iou == pytest.approx(best, abs=1e-12)
        assert wide[u].by_length[0] - 1e-12 <= narrow[u].iou <= best + 1e-12
        if narrow[u].formula:
            holds = narrow[u].formula.holds(masks.__getitem__)
            assert narrow[u].iou == pytest.approx((holds & region).sum() / (holds | region).sum(), abs=1e-12)


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=10)
def test_longer_formulas_are_never_worse_and_begin_with_netdissects_plain_iou(seed):
    acts, limits, concepts = random_case(seed, labels=6, depth=3)
    counts = composition.census(acts, limits, concepts)
    both, unit, _ = loop_tally(acts, limits, concepts)
    plain = both / np.maximum(unit[:, None] + dissection.tally(acts, limits, concepts).concept - both, 1)
    short = composition.best_formulas(counts, max_length=3)
    for u, e in enumerate(composition.best_formulas(counts, max_length=10)):
        assert len(e.by_length) == 10
        assert (np.diff(e.by_length) >= 0).all()
        assert e.by_length[0] == pytest.approx(plain[u].max())
        assert short[u].iou == e.by_length[2]


def test_census_agrees_with_the_tally():
    acts, limits, concepts = random_case(12, n=7, depth=3)
    counts, tally = composition.census(acts, limits, concepts), dissection.tally(acts, limits, concepts)
    assert (counts.members @ counts.pixels == tally.concept).all()
    assert (counts.units @ counts.members.T.toarray() == tally.both).all()
    assert (counts.units.sum(1) == loop_tally(acts, limits, concepts)[1]).all()
    assert counts.pixels.sum() == concepts.planes[:, 0].size


def planted(region, concepts):
    """Explanation of a unit whose map, at mask resolution, is this region."""
    acts = region[:, None].astype(np.float32)
    counts = composition.census(acts, np.full(1, 0.5, np.float32), concepts)
    return composition.best_formulas(counts, max_length=3)[0]


def test_census_does_not_depend_on_chunks():
    acts, limits, concepts = random_case(6, n=11)
    whole, parts = (composition.census(a, limits, concepts) for a in (acts, _Blocks(acts, 2)))
    assert (whole.pixels == parts.pixels).all()
    for name in ("members", "units"):
        np.testing.assert_array_equal(getattr(whole, name).toarray(), getattr(parts, name).toarray())


def test_planted_formulas_are_recovered():
    concepts = scenes(32, n=120, seed=9)
    stripes, red, disc = (concepts.mask(name) for name in ("vertical stripes", "red", "disc"))
    found = planted(stripes & ~red, concepts)
    assert found.iou == 1
    assert found.formula.text(concepts.labels) == "vertical stripes AND NOT red"
    found = planted((disc | stripes) & ~red, concepts)
    assert found.iou == 1
    assert found.formula.text(concepts.labels) == "(vertical stripes OR disc) AND NOT red"
    assert planted(red, concepts).formula == grown(concepts.index("red"))


def test_beam_grows_a_union_of_exclusive_labels_to_the_end():
    planes = np.repeat(np.arange(16), 2)[None, None, None, :].repeat(32, 2)
    concepts = concept_set(planes)
    acts = (planes[:, 0] % 2 == 1).astype(np.float32)[:, None]
    counts = composition.census(acts, np.full(1, 0.5, np.float32), concepts)
    found = composition.best_formulas(counts, max_length=10)[0]
    assert found.iou == 1
    assert len(found.formula) == 8
    np.testing.assert_allclose(found.by_length[:8], np.arange(1, 9) / 8)


def test_copies_of_one_mask_do_not_fill_the_beam():
    """The unit is P AND Q AND R. A label X of IoU 1/2 has eight copies such as X AND NOT Z.

    They outrank the pairs (IoU 1/5) that lead to the triple: a beam of five copies ends at 1/2.
    """
    unit, pq, pr, qr, *far = np.split(np.eye(4 + 3 * 16 + 6 * 30, dtype=bool), [4, 20, 36, 52, *range(82, 232, 30)])
    unit, pq, pr, qr, *far = (part.any(0) for part in (unit, pq, pr, qr, *far))
    half = unit & (np.cumsum(unit) <= 2)
    labels = np.array([half, unit | pq | pr, unit | pq | qr, unit | pr | qr, *far])
    planes = (labels * np.arange(1, 11)[:, None])[None, :, None, :]
    counts = composition.census(
        unit[None, None, None].astype(np.float32), np.full(1, 0.5, np.float32), concept_set(planes)
    )
    found = composition.best_formulas(counts, max_length=3)[0]
    assert found.formula == grown(1, ("AND", 2), ("AND", 3))
    assert found.by_length == (0.5, 0.5, 1)


def test_unit_without_labels_has_no_formula():
    planes = np.zeros((2, 1, 4, 4), int)
    planes[0] = 1
    acts = np.zeros((2, 2, 4, 4), np.float32)
    acts[1, 0] = 1
    counts = composition.census(acts, np.zeros(2, np.float32), concept_set(planes))
    explanations = composition.best_formulas(counts)
    assert [e.formula for e in explanations] == [None, None]
    assert composition.summary(explanations) == {"composition_iou": 0, "composition_gain": 0}


def test_pixels_beyond_the_last_cell_never_count():
    up = Upsampler((2, 3), (5, 7))
    _, numbers, masks = up.cells([np.ones((1, 5, 7), np.int16)])
    assert numbers.tolist() == [0]
    assert np.bitwise_count(masks).sum() == 35
