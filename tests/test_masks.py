import math

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from torch.nn.utils import prune

from lthlib import networks
from lthlib.core.errors import UserError
from lthlib.pruning import masks
from lthlib.pruning.densities import erk_counts, erk_densities, uniform_counts


def network(seed=0):
    return networks.build("resnet8", in_channels=1, num_classes=10, image_size=28, mean=[0.1], std=[0.3], seed=seed)


SHAPES = {name: tuple(w.shape) for name, w in masks.prunable(network()).items()}
TOTAL = sum(map(math.prod, SHAPES.values()))


# ---------------------------------------------------------------------------- ladder


@pytest.mark.parametrize("n", [1, 2, 3, 4, 2736, 76_432, 267_696])
def test_kept_is_the_recurrence_of_torchs_repeated_global_pruning(n):
    layer = nn.Linear(n, 1, bias=False)
    for round in range(22):
        assert masks.kept(n, round) == (int(layer.weight_mask.sum()) if round else n)
        prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=0.2)


def test_rounds_are_found_from_percentages_as_papers_print_them():
    printed = [0.0, 0.2, 0.36, 0.488, 0.5904, 0.6723, 0.9908]
    assert [*map(masks.round_of, printed)] == [0, 1, 2, 3, 4, 5, 21]
    assert [masks.round_of(masks.sparsity_of(n)) for n in range(30)] == list(range(30))


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        (1.0, "below 1"),
        (-0.1, "at least 0"),
        (59.04, r"Did you mean 0\.5904"),
        (True, "fraction"),
        ("0.2", "fraction"),
        (math.nan, "below 1"),
        (0.5, r"0\.4880 \(round 3\) and 0\.5904 \(round 4\)"),
        (0.1, r"0\.0000 \(round 0\) and 0\.2000 \(round 1\)"),
    ],
)
def test_sparsities_off_the_ladder_are_refused_with_the_nearest(sparsity, message):
    with pytest.raises(UserError, match=message):
        masks.round_of(sparsity)


# ---------------------------------------------------------------------------- selection


def reference(scores, n_keep, within=None):
    """A stable argsort, which is what `keep_top` promises without sorting."""
    flat = np.concatenate([s.numpy().ravel() for s in scores.values()])
    inside = np.ones(len(flat), bool)
    if within is not None:
        inside = np.concatenate([w.numpy().ravel() for w in within.values()])
    order = np.argsort(-flat, kind="stable")
    mask = np.zeros(len(flat), bool)
    mask[order[inside[order]][:n_keep]] = True
    parts = np.split(mask, np.cumsum([s.numel() for s in scores.values()])[:-1])
    return {name: part.reshape(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(found[name].numpy(), expected[name])


def values(dtype):
    width = np.dtype(dtype).itemsize * 8
    ordinary = st.floats(allow_nan=False, allow_infinity=False, width=width)
    info = np.finfo(dtype)
    near = [0.0, -0.0, 1.0, -1.0, info.tiny, -info.tiny, info.smallest_subnormal, -info.smallest_subnormal, info.max]
    return st.one_of(ordinary, st.sampled_from([float(v) for v in near]))


@st.composite
def problems(draw):
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    scores = {
        f"l{i}": torch.from_numpy(draw(hnp.arrays(dtype, n, elements=values(dtype)))) for i, n in enumerate(sizes)
    }
    within = None
    if draw(st.booleans()):
        within = {k: torch.from_numpy(draw(hnp.arrays(bool, s.shape))) for k, s in scores.items()}
    most = sum(sizes) if within is None else masks.n_kept(within)
    return scores, draw(st.integers(0, most)), within


@given(problems())
def test_keep_top_is_a_stable_argsort(problem):
    scores, n_keep, within = problem
    assert_same(masks.keep_top(scores, n_keep, within), reference(scores, n_keep, within))


def test_keep_top_counts_in_the_flat_index_whatever_the_memory_layout():
    score = torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last)
    mask = masks.keep_top({"a": score}, 5)["a"]
    assert mask.reshape(-1).nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_name_their_layer(bad):
    scores = {"conv1.weight": torch.ones(3), "layer1.0.conv1.weight": torch.tensor([1.0, bad, bad])}
    with pytest.raises(UserError, match=r"2 of 3 scores of layer 'layer1\.0\.conv1\.weight' are not finite"):
        masks.keep_top(scores, 2)


def test_impossible_selections_are_refused():
    scores = {"a": torch.ones(3)}
    for n_keep, within in ((4, None), (-1, None), (2, {"a": torch.tensor([True, False, False])})):
        with pytest.raises(UserError, match="Cannot keep"):
            masks.keep_top(scores, n_keep, within)
    for wrong in ({}, {"a": torch.ones(3).half()}, {"a": torch.ones(3), "b": torch.ones(3).double()}):
        with pytest.raises(UserError, match="float32 or all float64"):
            masks.keep_top(wrong, 0)


def test_keep_top_per_layer_ranks_layers_apart():
    scores = {"a": torch.tensor([1.0, 3.0, 2.0]), "b": torch.tensor([30.0, 10.0, 20.0])}
    found = masks.keep_top_per_layer(scores, {"a": 2, "b": 1})
    assert_same(found, {"a": [False, True, True], "b": [True, False, False]})


# ---------------------------------------------------------------------------- layer densities


def test_erk_densities_share_one_factor_where_not_full():
    for density in (0.02, 0.1, 0.5, 0.9, 0.999):
        found = erk_densities(SHAPES, density)
        total = sum(found[n] * math.prod(s) for n, s in SHAPES.items())
        assert total == pytest.approx(density * TOTAL, rel=1e-12)
        factors = {n: found[n] * math.prod(s) / sum(s) for n, s in SHAPES.items()}
        open_ = [f for n, f in factors.items() if found[n] < 1]
        assert max(open_) == pytest.approx(min(open_), rel=1e-12)
        assert all(factors[n] <= min(open_) * (1 + 1e-12) for n in SHAPES if found[n] == 1)


def test_erk_of_a_network_worked_by_hand():
    """eps * sum / prod: 11 / 36 for (4, 1, 3, 3), 18 / 288 for (8, 4, 3, 3); half of 324 fills the first."""
    shapes = {"small": (4, 1, 3, 3), "large": (8, 4, 3, 3)}
    assert erk_densities(shapes, 0.5) == pytest.approx({"small": 1.0, "large": (162 - 36) / 288})
    assert erk_densities(shapes, 29 / 324) == pytest.approx({"small": 11 / 36, "large": 18 / 288})
    assert erk_densities(shapes, 1.0) == pytest.approx({"small": 1.0, "large": 1.0})


@given(st.integers(0, TOTAL - 1))
def test_layer_counts_are_exact_near_their_densities_and_nest(n_keep):
    densities = erk_densities(SHAPES, n_keep / TOTAL)
    for counts, more, share in (
        (erk_counts(SHAPES, n_keep), erk_counts(SHAPES, n_keep + 1), densities),
        (uniform_counts(SHAPES, n_keep), uniform_counts(SHAPES, n_keep + 1), None),
    ):
        assert sum(counts.values()) == n_keep
        for name, shape in SHAPES.items():
            wanted = math.prod(shape) * (share[name] if share else n_keep / TOTAL)
            assert abs(counts[name] - wanted) < 2
            assert counts[name] <= more[name] <= math.prod(shape)


def test_uniform_counts_may_leave_layers_full():
    first = next(iter(SHAPES))
    counts = uniform_counts(SHAPES, 10_000, full=[first])
    assert counts[first] == 144
    assert sum(counts.values()) == 10_000
    shares = [counts[n] / math.prod(s) for n, s in SHAPES.items() if n != first]
    assert max(shares) - min(shares) < 1 / 512
    with pytest.raises(UserError, match="alone has 144 weights, but only 100 may stay"):
        uniform_counts(SHAPES, 100, full=[first])


# ---------------------------------------------------------------------------- using them


def some_masks(density=0.3):
    generator = torch.Generator().manual_seed(5)
    return {name: torch.rand(shape, generator=generator) < density for name, shape in SHAPES.items()}


def test_prunable_are_the_convolutions_alone():
    found = masks.prunable(network())
    assert all(w.dim() == 4 for w in found.values())
    assert {"conv1.weight", "layer2.0.downsample.0.weight"} <= set(found)
    assert sum(w.numel() for w in found.values()) == 76_432
    with pytest.raises(UserError, match=r"no prunable weights.*'conv'.*linear"):
        masks.prunable(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm2d(2)))


def test_prunable_may_be_linear_layers_both_or_named_and_what_is_shared_counts_once():
    conv, head = nn.Conv2d(1, 2, 3), nn.Linear(2, 2)
    tied = nn.Linear(2, 2)
    tied.weight = head.weight
    model = nn.Sequential(conv, nn.BatchNorm2d(2), head, tied)
    assert list(masks.prunable(model)) == ["0.weight"]
    assert list(masks.prunable(model, "linear")) == ["2.weight"]
    assert list(masks.prunable(model, "all")) == ["0.weight", "2.weight"]
    assert list(masks.prunable(model, ["2.weight", "0.bias"])) == ["2.weight", "0.bias"]
    with pytest.raises(UserError, match="Did you mean 'linear'"):
        masks.prunable(model, "lineer")
    with pytest.raises(UserError, match=r"Unknown parameter '0\.weights'\. Did you mean '0\.weight'"):
        masks.prunable(model, ["0.weights"])


def test_applying_masks_zeroes_what_they_drop_and_nothing_else():
    model, found = network(), some_masks()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    masks.apply_(model, found)
    for name, tensor in model.state_dict().items():
        expected = torch.where(found[name], before[name], 0.0) if name in found else before[name]
        assert torch.equal(tensor, expected)


def test_densities_weigh_layers_by_their_size():
    found = {"a": torch.tensor([True, False]), "b": torch.tensor([True] * 6)}
    assert masks.n_kept(found) == 7
    assert masks.density_by_layer(found) == {"a": 0.5, "b": 1.0}


def test_overlap_is_what_both_keep_over_what_either_keeps():
    first = {"a": torch.tensor([True, True, False, False]), "b": torch.tensor([True, False])}
    second = {"a": torch.tensor([False, True, True, True]), "b": torch.tensor([True, True])}
    assert masks.jaccard(first, second) == 2 / 6
    by_chance = 2 * 3 / 4 + 1 * 2 / 2
    assert masks.chance_jaccard(first, second) == by_chance / (3 + 5 - by_chance)
    assert masks.jaccard(first, first) == 1
    assert masks.jaccard({"a": ~first["a"]}, {"a": first["a"]}) == 0
    with pytest.raises(UserError, match="another architecture or width"):
        masks.jaccard(first, {"a": second["a"], "b": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(UserError, match="no mask for layer 'b'"):
        masks.jaccard({"a": first["a"]}, first)


def test_overlap_by_chance_is_what_shuffled_masks_have():
    densities = dict(zip(SHAPES, np.linspace(0.02, 0.9, len(SHAPES)), strict=True))
    generator = torch.Generator().manual_seed(0)
    found = {n: torch.rand(shape, generator=generator) < densities[n] for n, shape in SHAPES.items()}
    other = masks.shuffle_within_layers(found, seed=99)
    draws = [masks.jaccard(masks.shuffle_within_layers(found, seed=s), other) for s in range(20)]
    error = np.std(draws, ddof=1) / math.sqrt(len(draws))
    assert np.mean(draws) == pytest.approx(masks.chance_jaccard(found, other), abs=4 * error)
    density = masks.n_kept(found) / TOTAL  # one density for all layers would be told apart
    assert abs(density / (2 - density) - masks.chance_jaccard(found, other)) > 20 * error


def test_shuffling_keeps_counts_by_layer_and_moves_places():
    found = some_masks()
    shuffled = masks.shuffle_within_layers(found, seed=1)
    assert masks.density_by_layer(shuffled) == masks.density_by_layer(found)
    overlap = sum(int((found[n] & shuffled[n]).sum()) for n in found) / masks.n_kept(found)
    assert overlap == pytest.approx(0.3, abs=0.02)  # what independent draws of density 0.3 share
    assert_same(masks.shuffle_within_layers(found, seed=1), {k: v.numpy() for k, v in shuffled.items()})


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (lambda m: m.update({"conv9.weight": torch.ones(1).bool()}), r"'conv9.weight'.*Did you mean 'conv1.weight'"),
        (lambda m: m.update({"conv1.weight": torch.ones(16, 3, 3, 3).bool()}), r"'conv1.weight' has shape \(16, 3"),
        (lambda m: m.update({"conv1.weight": torch.ones(16, 1, 3, 3)}), "'conv1.weight' is torch.float32"),
    ],
)
def test_masks_that_do_not_fit_name_the_layer(break_, message):
    model, found = network(), some_masks()
    break_(found)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        masks.apply_(model, found)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_saved_masks_come_back_and_damaged_files_are_named(tmp_path):
    found, path = some_masks(), tmp_path / "masks.safetensors"
    found["conv1.weight"] = found["conv1.weight"].to(memory_format=torch.channels_last)
    masks.save(found, path)
    back = masks.load(path)
    assert set(back) == set(found)
    assert all(torch.equal(back[n], found[n]) for n in found)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"masks\.safetensors"):
        masks.load(path)
    with pytest.raises(UserError, match="missing"):
        masks.load(tmp_path / "missing")


def test_packed_checkpoints_lose_nothing_and_cost_one_bit_a_place():
    model, found = network(), some_masks(0.05)
    masks.apply_(model, found)
    data = masks.pack(model.state_dict(), found)
    packed = safetensors.torch.load(data)
    for name, value in model.state_dict().items():
        if name in found:
            bits = np.unpackbits(packed[f"{name}:bits"].numpy(), count=value.numel()).astype(bool)
            packed[name] = torch.zeros(value.shape)
            packed[name][torch.from_numpy(bits).view(value.shape)] = packed[f"{name}:kept"]
        assert torch.equal(packed[name], value)
    rest = sum(v.numel() * v.element_size() for n, v in model.state_dict().items() if n not in found)
    coded = sum(math.ceil(math.prod(s) / 8) for s in SHAPES.values()) + 4 * masks.n_kept(found)
    assert coded + rest < len(data) < coded + rest + 8192


def test_sparse_macs_count_each_weight_as_often_as_it_is_used():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 1, stride=2), nn.Flatten(), nn.Linear(16, 3))
    found = {"0.weight": torch.zeros(2, 1, 3, 3).bool(), "1.weight": torch.ones(1, 2, 1, 1).bool()}
    found["0.weight"].view(-1)[:5] = True
    assert masks.sparse_macs(model, (1, 8, 8), found) == 5 * 64 + 2 * 16 + 48
