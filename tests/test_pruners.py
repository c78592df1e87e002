import copy
import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lthlib import networks, pruning
from lthlib.core.errors import UserError
from lthlib.core.store import ROOT
from lthlib.pruning import METHODS, Found, Moment, Option, dynamic, grasp, masks, method, structured, synflow
from lthlib.pruning.any_network import prune
from lthlib.pruning.densities import erk_counts, erk_densities, uniform_counts
from lthlib.pruning.small_dense import fit_widths
from lthlib.pruning.snip import saliency

GIVEN = {"in_channels": 1, "num_classes": 4, "image_size": 12, "mean": [0.4], "std": [0.3]}
ROUND = 8


def network(seed=0, arch="resnet8", **more):
    return networks.build(arch, seed=seed, **(GIVEN | more))


def find(name, given):
    return METHODS[name].run(given)


def n_parameters(model):
    return sum(p.numel() for p in model.parameters())


def used(model, seed=7):
    """`model` as after some training: no two layers alike, batch normalisations away from the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.randn(module.num_features, generator=generator))
                module.bias.copy_(torch.randn(module.num_features, generator=generator) / 4)
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator) / 4)
                module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model


def images(n, seed=0, channels=1, size=12):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def batch(n=None, per_class=None):
    if n is not None:
        return images(n, seed=1), torch.arange(n) % 4
    return images(4 * per_class, seed=1), torch.arange(4).repeat_interleave(per_class)


def moment(name, model=None, round=ROUND, seed=3, found=None, **options):
    model = used(network()) if model is None else model
    dense = masks.dense(model)
    found = dense if found is None else found
    n_keep = masks.kept(masks.n_kept(dense), round)
    entry = METHODS[name]
    if found is dense and entry.family == "control":
        found = masks.keep_top({n: w.detach().abs() for n, w in masks.prunable(model).items()}, n_keep)
    quick = {"rounds": 10} if name == "synflow" else {}
    return Moment(model, found, n_keep, round, seed, batch, {**entry.options, **quick, **options})


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def scores_of_ones(model):
    return {name: torch.ones_like(w) for name, w in masks.prunable(model).items()}


# --------------------------------------------------------------- contracts: every entry of METHODS


@pytest.mark.parametrize("name", METHODS)
def test_what_is_found_is_exact_and_repeats_by_seed(name):
    given, state = moment(name), torch.random.get_rng_state()
    before = {k: v.clone() for k, v in given.masks.items()}
    first, second = find(name, given), find(name, moment(name))
    assert same(given.masks, before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sum(x is not None for x in (first.masks, first.kept_channels, first.channels)) == (
        METHODS[name].family != "dense"
    )
    if first.masks is not None:
        n_kept = masks.n_kept(first.masks)
        assert n_kept == given.n_keep or (METHODS[name].during and n_kept > given.n_keep)
        assert {k: m.shape for k, m in first.masks.items()} == {k: m.shape for k, m in before.items()}
        assert same(first.masks, second.masks)
    if first.kept_channels is not None:
        assert same(first.kept_channels, second.kept_channels)
        if not name.endswith("-macs"):
            left = masks.n_kept(masks.dense(structured.shrink(network(), first.kept_channels)))
            assert left <= given.n_keep
    assert first.channels == second.channels


@pytest.mark.parametrize("name", [*(n for n in METHODS if METHODS[n].family == "random"), "rigl", "set"])
def test_random_choices_differ_by_seed_and_ignore_the_weights(name):
    one, other = (find(name, moment(name, seed=s)).masks for s in (1, 2))
    assert not same(one, other)
    assert same(one, find(name, moment(name, model=network(seed=9), seed=1)).masks)


def test_networks_that_cannot_be_pruned_are_refused():
    given = moment("rp")
    with pytest.raises(UserError, match="leaves no weight"):
        find("rp", replace(given, n_keep=0, round=90))
    given.masks["conv9.weight"] = given.masks.pop("conv1.weight")
    with pytest.raises(UserError, match=r"mask for 'conv9\.weight', but no such weight"):
        find("rp", given)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_their_layer(value):
    given = moment("small-dense")  # which does not look at them
    given.model.layer2[0].conv1.weight.data[0, 0, 0, 0] = value
    with pytest.raises(UserError, match=r"layer 'layer2\.0\.conv1\.weight' are not finite.*again"):
        find("small-dense", given)


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow", "slimming"])
def test_scores_that_are_not_finite_are_refused(name):
    model = used(network())
    model.layer2[0].bn1.weight.data[0] = math.nan
    with pytest.raises(UserError, match="finite"):
        find(name, moment(name, model=model))


@pytest.mark.parametrize(
    ("option", "allowed", "refused"),
    [
        (Option(3, least=1, most=9), [1, 9], [0, 10, 2.0, True, "3", None, math.nan]),
        (Option(0.3, above=0, most=1), [1e-9, 1, 1.0], [0, 0.0, -0.1, 1.1, True, "0.3", math.nan, math.inf]),
        (Option(1.0, least=0), [0, 0.0, 1e9], [-1e-9, math.inf, math.nan, [1.0]]),
        (Option("a", choices=("a", "b")), ["a", "b"], ["c", "", 1, None, ["a"]]),
        (Option(False), [True, False], [0, 1, "true", None]),
    ],
)
def test_an_option_allows_its_range_with_the_ends_as_said(option, allowed, refused):
    assert [value for value in (*allowed, *refused) if option.allows(value)] == allowed


@pytest.mark.parametrize("bounds", [{}, {"least": 0, "above": 0}])
def test_an_option_cannot_be_declared_without_its_range(bounds):
    with pytest.raises(ValueError, match="least or above"):
        Option(3, **bounds)
    with pytest.raises(ValueError, match="choices"):
        Option("a", choices=("b",))


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].options])
def test_a_method_runs_at_the_ends_of_what_its_options_allow(name):
    """Whatever passes the check of a grid must not fail in the job."""
    for key, option in METHODS[name].allowed.items():
        low = option.least if option.above is None else option.above + 1e-6
        high = option.most if key != "rounds" else None  # thousands take a while
        for value in (v for v in (low, high, *option.choices) if v is not None):
            given = moment(name, **{key: type(option.default)(value)})
            assert find(name, given)
            if METHODS[name].during:
                METHODS[name].during(given.options, 3, given.n_keep, 0)


def test_a_method_that_miscounts_is_caught():
    given = moment("rp")
    METHODS.pop("wrong", None)
    try:
        register = method("wrong", title="", source="init", start="init", reference="", family="random")
        register(lambda m: Found(masks=masks.keep_top(scores_of_ones(m.model), m.n_keep - 1)))
        with pytest.raises(ValueError, match="wrong kept"):
            find("wrong", given)
    finally:
        METHODS.pop("wrong", None)


def test_the_books_example_of_a_method_is_one():
    page = (ROOT / "book" / "adding.md").read_text()
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", page, re.S) if '"magnitude-init"' in c)
    try:
        exec(compile(code, "example", "exec"), {})
        given = moment("omp")
        found = find("magnitude-init", replace(given, options={}))
        assert same(found.masks, find("omp", given).masks)
    finally:
        METHODS.pop("magnitude-init", None)


# ----------------------------------------------------------------------------- random


@pytest.mark.parametrize("name", ["rp", "rp-layerwise", "rp-erk", "omp"])
def test_rounds_of_one_ranking_nest(name):
    rounds = [find(name, moment(name, round=r)).masks for r in range(1, 20)]
    for earlier, later in itertools.pairwise(rounds):
        assert all((earlier[k] | ~later[k]).all() for k in later)


def test_the_three_meanings_of_random_differ_in_their_layer_densities():
    given = moment("rp")
    density = given.n_keep / 76_432
    shapes = {n: w.shape for n, w in masks.prunable(given.model).items()}
    by_layer = {n: masks.density_by_layer(find(n, given).masks) for n in ("rp", "rp-layerwise", "rp-erk")}
    erk = erk_densities(shapes, density)
    for layer, shape in shapes.items():
        n = math.prod(shape)
        assert abs(by_layer["rp-layerwise"][layer] - density) * n <= 1
        assert abs(by_layer["rp-erk"][layer] - erk[layer]) * n <= 1
        assert abs(by_layer["rp"][layer] - density) < 5 * math.sqrt(density / n)
    exact = [abs(by_layer["rp"][layer] - density) * math.prod(s) <= 1 for layer, s in shapes.items()]
    assert not all(exact)


# ----------------------------------------------------------------------------- magnitude and lottery


def test_lth_follows_its_own_masks_round_by_round():
    """All weights change at random between rounds, the pruned ones too: nesting must come from the masks alone."""
    total, found = 76_432, masks.dense(network())
    for round in range(1, 22):
        model = network(seed=round)
        previous, found = found, find("lth", moment("lth", model=model, round=round, found=found)).masks
        assert masks.n_kept(found) == masks.kept(total, round)
        assert all((previous[k] | ~found[k]).all() for k in found)
        weights = {k: w.detach().abs() for k, w in masks.prunable(model).items()}
        lost = torch.cat([weights[k][previous[k] & ~found[k]] for k in found])
        assert lost.max() <= min(weights[k][found[k]].min() for k in found if found[k].any())


def test_controls_keep_one_property_each():
    given = moment("lth-shuffled")
    shuffled, again = (find(n, given).masks for n in ("lth-shuffled", "lth-reinit"))
    assert masks.density_by_layer(shuffled) == masks.density_by_layer(given.masks)
    assert not same(shuffled, given.masks)
    assert same(again, given.masks)
    assert (METHODS["lth-shuffled"].start, METHODS["lth-reinit"].start) == ("rewind", "reinit")
    assert METHODS["lth-shuffled"].source == METHODS["lth-reinit"].source == "lth"


# ----------------------------------------------------------------------------- SNIP and GraSP


def chain(*, norm=False, dtype=torch.float64, seed=0):
    """Convolutions, ReLUs and average pools without biases; with batch normalisation if `norm`."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for inputs, outputs in ((1, 6), (6, 8), (8, 5)):
        conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, dtype=dtype)
        nn.init.kaiming_normal_(conv.weight, generator=generator)
        layers += [conv, nn.BatchNorm2d(outputs, dtype=dtype, eps=1e-20)] if norm else [conv]
        layers += [nn.ReLU(), nn.AvgPool2d(2) if outputs == 6 else nn.Identity()]
    head = nn.Linear(5, 4, bias=False, dtype=dtype)
    nn.init.normal_(head.weight, generator=generator)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def data(n=16, dtype=torch.float64):
    return images(n, seed=4).to(dtype), torch.arange(n) % 4


def test_snip_is_the_gradient_of_the_gates():
    """The score is what a gate on every weight would feel, taken by finite differences of the gate."""
    model, (x, y) = chain(), data()
    found = saliency(model, masks.prunable(model), x, y)
    for name, places in (("0.weight", (0, 0, 1, 1)), ("3.weight", (2, 3, 0, 2)), ("6.weight", (4, 7, 1, 0))):
        weight, h = masks.prunable(model)[name], 1e-6
        value, losses = weight[places].item(), []
        for gate in (1 + h, 1 - h):
            weight.data[places] = gate * value
            losses.append(F.cross_entropy(model(x), y).item())
        weight.data[places] = value
        assert found[name][places].item() == pytest.approx((losses[0] - losses[1]) / (2 * h), rel=1e-5, abs=1e-9)


def test_snip_is_conserved_from_layer_to_layer_without_biases():
    model, (x, y) = chain(), data()
    logits = model(x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(logits, y), logits)
    expected = (logits * slope).sum().item()
    assert abs(expected) > 1e-3
    for score in saliency(model, masks.prunable(model), x, y).values():
        assert score.sum().item() == pytest.approx(expected, rel=1e-10)


def test_snip_sums_to_nothing_before_batch_statistics_only():
    model, (x, y) = chain(norm=True), data()
    for mode, zero in (("train", True), ("eval", False)):
        model.train(mode == "train")
        scores = saliency(model, masks.prunable(model), x, y)
        assert all((abs(s.sum()) < 1e-12 * s.abs().sum()) == zero for s in scores.values())


def test_snip_ranks_the_absolute_value_of_the_batchs_sum():
    given = moment("snip", batch=6)
    model = copy.deepcopy(given.model).train()
    x, y = batch(6)
    weights = masks.prunable(model)
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(weights.values()))
    expected = {k: (w * g).detach().abs() for (k, w), g in zip(weights.items(), gradients, strict=True)}
    assert same(find("snip", given).masks, masks.keep_top(expected, given.n_keep))


@pytest.mark.parametrize("name", ["snip", "grasp"])
def test_bn_mode_decides_the_mask(name):
    train, eval_ = (find(name, moment(name, model=network(), bn_mode=m)).masks for m in ("train", "eval"))
    shared = sum(int((train[k] & eval_[k]).sum()) for k in train)
    assert shared < 0.9 * masks.n_kept(train)


def test_grasp_sums_to_the_squared_gradient_before_batch_statistics():
    model, (x, y) = chain(norm=True).train(), data()
    g, hg = grasp.hessian_gradient(
        model, masks.prunable(model, "all"), [(x[:8], y[:8]), (x[8:], y[8:])], temperature=200.0
    )
    for name, weight in masks.prunable(model).items():
        total = -(weight.detach() * hg[name]).sum()
        assert total.item() == pytest.approx(g[name].square().sum().item(), rel=1e-8)


def test_grasp_removes_what_lets_the_gradient_grow():
    """The sign, by the definition: shrink single weights a little and look at the gradient's norm."""
    model, (x, y) = chain().train(), data()
    _, hg = grasp.hessian_gradient(model, masks.prunable(model, "all"), [(x, y)], temperature=1.0)
    weight, step = masks.prunable(model)["3.weight"], 1e-5
    leading = [m.weight for m in model if isinstance(m, (nn.Conv2d, nn.Linear))]

    def norm():
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), leading)
        return sum(float(g.square().sum()) for g in gradients)

    score = -(weight.detach() * hg["3.weight"])
    for place in (score.argmax(), score.argmin()):
        index = np.unravel_index(place.item(), weight.shape)
        value, before = weight[index].item(), norm()
        weight.data[index] = value * (1 - step)
        growth = (norm() - before) / step
        weight.data[index] = value
        assert growth == pytest.approx(2 * score[index].item(), rel=1e-2)
    keep = masks.keep_top({"3.weight": -score}, 1)["3.weight"]  # the rule of `find`: keep the highest w * Hg
    assert keep.flatten().nonzero().item() == score.argmin()


def test_grasp_is_found_from_class_sorted_halves_and_redrawn_linear_layers():
    given = moment("grasp", samples_per_class=2)
    model = copy.deepcopy(given.model).train()
    nn.init.xavier_normal_(model.fc.weight, generator=torch.Generator().manual_seed(given.seed))
    x, y = batch(per_class=2)
    assert y[:4].tolist() == [0, 0, 1, 1]
    _, hg = grasp.hessian_gradient(
        model, masks.prunable(model, "all"), [(x[:4], y[:4]), (x[4:], y[4:])], temperature=200.0
    )
    expected = {k: w.detach() * hg[k] for k, w in masks.prunable(model).items()}
    assert same(find("grasp", given).masks, masks.keep_top(expected, given.n_keep))
    kept_head = moment("grasp", samples_per_class=2, reinit_linear=False)
    assert not same(find("grasp", kept_head).masks, find("grasp", moment("grasp", samples_per_class=2)).masks)


def test_grasp_iterations_cut_a_class_sorted_batch():
    x, y = torch.arange(24.0).view(-1, 1), torch.arange(4).repeat_interleave(6)
    parts = list(grasp.halves(x, y, iterations=3))
    assert [b.tolist() for _, b in parts] == [[0, 0, 1, 1], [2, 2, 3, 3]] * 3
    assert sorted(int(v) for a, _ in parts for v in a.flatten()) == list(range(24))
    mixed = torch.tensor([2, 0, 1, 0, 1])  # in any order, and as many of each class as there are
    assert [b.tolist() for _, b in grasp.halves(torch.arange(5), mixed, iterations=1)] == [[0, 0, 1], [1, 2]]
    assert [a.tolist() for a, _ in grasp.halves(torch.arange(5), mixed, iterations=1)] == [[1, 3, 2], [4, 0]]


# ----------------------------------------------------------------------------- SynFlow


def test_synflow_is_conserved_in_layers_and_units():
    model = synflow.linearize_(chain())
    total, scores = synflow.flow(model, masks.prunable(model), (1, 12, 12))
    first, second, third = scores.values()
    for score in scores.values():
        assert score.sum().item() == pytest.approx(total.item(), rel=1e-12)
    torch.testing.assert_close(first.sum((1, 2, 3)), second.sum((0, 2, 3)))
    torch.testing.assert_close(second.sum((1, 2, 3)), third.sum((0, 2, 3)))


def test_synflow_ones_enter_the_first_convolution_and_everything_is_absolute():
    model = used(network())
    flat = copy.deepcopy(model).double().eval()
    seen = []
    flat.conv1.register_forward_pre_hook(lambda m, i: (torch.ones_like(i[0]),))
    for tensor in [*flat.parameters(), *flat.buffers()]:
        tensor.data.abs_()
    weights = masks.prunable(flat)
    total = flat(torch.rand(1, 1, 12, 12, dtype=torch.float64)).sum()
    gradients = torch.autograd.grad(total, list(weights.values()))
    prepared = synflow.linearize_(model)
    prepared.conv1.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    found, scores = synflow.flow(prepared, masks.prunable(prepared), (1, 12, 12))
    assert seen[0].eq(1).all()
    assert found.item() == pytest.approx(total.item(), rel=1e-12)
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        torch.testing.assert_close(scores[name], weight.detach() * gradient)


def test_synflow_overflows_in_float32_where_float64_is_finite():
    model = networks.build("resnet50", in_channels=3, num_classes=10, image_size=32, mean=[0.0] * 3, std=[1.0] * 3)
    wide = copy.deepcopy(model)
    with pytest.raises(UserError, match=r"not finite in torch\.float32: use float64"):
        synflow.flow(synflow.linearize_(wide, torch.float32), masks.prunable(wide), (3, 8, 8))
    total, scores = synflow.flow(synflow.linearize_(model), masks.prunable(model), (3, 8, 8))
    assert torch.finfo(torch.float32).max < total.item() < math.inf
    assert all(score.isfinite().all() for score in scores.values())


def plain_vgg():
    """A chain whose layers differ much in size, which single-shot scores cannot balance."""
    return networks.build("vgg16-bn", channels={f"conv{i}": min(64, 4 * i) for i in range(1, 14)}, **GIVEN)


def test_synflow_does_not_collapse_where_a_single_shot_does():
    model = plain_vgg()
    total = masks.n_kept(masks.dense(model))
    n_keep = round(0.005 * total)

    def left(rounds, kind="exponential"):
        options = {"rounds": rounds, "schedule": kind, "precision": "float64"}
        given = Moment(copy.deepcopy(model), masks.dense(model), n_keep, 1, 0, batch, options, density=0.005)
        return [name for name, mask in find("synflow", given).masks.items() if not mask.any()]

    assert left(1)
    assert not left(100)


def published_synflow(model, density, rounds):
    """The published loop on a network without normalisation of its input, in double precision, with its own masks."""
    model = copy.deepcopy(model).double().eval()
    model.normalize = nn.Identity()
    weights = list(masks.prunable(model).values())
    start, keep = [w.detach().clone() for w in weights], [torch.ones_like(w) for w in weights]
    for tensor in model.state_dict().values():
        tensor.abs_()
    for k in range(1, rounds + 1):
        for weight, value, mask in zip(weights, start, keep, strict=True):
            weight.data = (value * mask).abs()
        gradients = torch.autograd.grad(model(torch.ones(1, 1, 12, 12).double()).sum(), weights)
        scores = [(g * w).detach().abs() for g, w in zip(gradients, weights, strict=True)]
        flat = torch.cat([score.flatten() for score in scores])
        n_drop = int((1.0 - density ** (k / rounds)) * flat.numel())
        if n_drop >= 1:
            threshold = flat.kthvalue(n_drop).values
            keep = [(score > threshold).double() for score in scores]
    return dict(zip(masks.prunable(model), [mask.bool() for mask in keep], strict=True))


@pytest.mark.parametrize("round", [1, 21])
def test_synflow_finds_the_masks_of_the_published_loop(round):
    """All weights are those of the published code, but for what the last count differs: d N is not a whole number."""
    model = used(network())
    published = published_synflow(model, 0.8**round, rounds=30)
    found = find("synflow", moment("synflow", model=model, round=round, rounds=30)).masks
    assert sum(int((published[k] != found[k]).sum()) for k in found) == abs(
        masks.n_kept(published) - masks.n_kept(found)
    )
    assert abs(masks.n_kept(published) - masks.n_kept(found)) <= 3


def test_synflow_by_a_sparsity_finds_the_masks_of_the_published_loop():
    model = used(network())
    published = published_synflow(model, 1 - 0.99, rounds=100)
    found = prune(model, "synflow", sparsity=0.99, batch=batch(1))
    differ = sum(int((published[k] != found[k]).sum()) for k in found)
    assert differ == abs(masks.n_kept(published) - masks.n_kept(found)) <= 1


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_synflow_schedules_fall_to_the_count_asked_for(kind):
    counts = synflow.schedule(1_000_003, 9_999, 0.01, 100, kind)
    assert len(counts) == 100
    assert counts[-1] == 9_999
    for k, n in enumerate(counts[:-1], start=1):  # what is dropped is rounded down, so what stays is rounded up
        share = 0.01 ** (k / 100) if kind == "exponential" else 1 - 0.99 * k / 100
        assert n == pytest.approx(math.ceil(share * 1_000_003), abs=1e-6)
    assert synflow.schedule(10, 4, 0.3, 3, kind)[1:] == ([5, 4] if kind == "exponential" else [6, 4])


def test_a_score_that_overflows_names_its_layer():
    model = synflow.linearize_(nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 2, 1)), torch.float32)
    with torch.no_grad():
        model[0].weight.fill_(1e-20)
        model[1].weight.fill_(1e38)
        model[1].weight[0] = 0
    with pytest.raises(UserError, match=r"layer '0.weight' is not finite in torch.float32: use float64"):
        synflow.flow(model, masks.prunable(model), (1, 40, 40))


def test_a_flow_that_no_precision_holds_is_not_answered_with_more_precision():
    model = network()
    model.bn1.weight.data[3] = math.inf
    with pytest.raises(UserError, match=r"not finite in torch\.float64: look for infinite weights, scales"):
        find("synflow", moment("synflow", model=model))


# ----------------------------------------------------------------------------- RigL and SET


def trained(name, total_steps=400, momentum=0.9, **options):
    """A sparse network with gradients and momentum in place, its masks, its optimizer and its dynamics."""
    model = network()
    given = moment(name, model=copy.deepcopy(model), **options)
    found = find(name, given).masks
    masks.apply_(model, found)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    dynamics = METHODS[name].during(given.options, total_steps, given.n_keep, given.seed)
    for step in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images(8, seed=step)), torch.arange(8) % 4).backward()
        with torch.no_grad():
            for key, weight in masks.prunable(model).items():
                weight.grad.mul_(found[key])
        optimizer.step()
    optimizer.zero_grad()
    F.cross_entropy(model(images(8, seed=5)), torch.arange(8) % 4).backward()
    return model, found, optimizer, dynamics


def test_rigl_fraction_is_a_cosine():
    assert dynamic.drop_fraction(0, 300, 0.3) == pytest.approx(0.3)
    assert dynamic.drop_fraction(100, 300, 0.3) == pytest.approx(0.225)
    assert dynamic.drop_fraction(150, 300, 0.3) == pytest.approx(0.15)
    assert dynamic.drop_fraction(300, 300, 0.3) == 0
    assert dynamic.drop_fraction(400, 300, 0.3) == 0


def test_rigl_starts_from_erk_counts():
    given = moment("rigl")
    shapes = {n: w.shape for n, w in masks.prunable(given.model).items()}
    counts = {k: int(m.sum()) for k, m in find("rigl", given).masks.items()}
    assert counts == erk_counts(shapes, given.n_keep)
    uniform = {k: int(m.sum()) for k, m in find("rigl", moment("rigl", distribution="uniform")).masks.items()}
    assert uniform == uniform_counts(shapes, given.n_keep, full=["conv1.weight"])


@pytest.mark.parametrize("name", ["rigl", "set"])
def test_an_update_keeps_counts_and_starts_new_weights_from_nothing(name):
    model, found, optimizer, dynamics = trained(name)
    for weight in masks.prunable(model).values():  # a momentum that new weights could wrongly inherit
        optimizer.state[weight]["momentum_buffer"] += 1
    before = {k: m.clone() for k, m in found.items()}
    weights = {k: w.detach().clone() for k, w in masks.prunable(model).items()}
    momenta = {k: optimizer.state[w]["momentum_buffer"].clone() for k, w in masks.prunable(model).items()}
    others = {k: v.clone() for k, v in model.state_dict().items() if k not in found}
    assert dynamics.update(100, model, found, optimizer) is (name == "rigl")
    moved = 0
    for key, weight in masks.prunable(model).items():
        new, stayed = found[key] & ~before[key], found[key] & before[key]
        momentum = optimizer.state[weight]["momentum_buffer"]
        assert int(found[key].sum()) == int(before[key].sum())
        assert weight[new].eq(0).all()
        assert momentum[new].eq(0).all()
        assert weight[~found[key]].eq(0).all()
        assert torch.equal(weight[stayed], weights[key][stayed])
        assert torch.equal(momentum[stayed], momenta[key][stayed])
        moved += int(new.sum())
    assert moved > 100
    assert all(torch.equal(v, others[k]) for k, v in model.state_dict().items() if k in others)


def test_rigl_grows_where_the_gradient_of_absent_weights_is_largest():
    model, found, optimizer, dynamics = trained("rigl")
    before = {k: m.clone() for k, m in found.items()}
    weights = {k: w.detach().abs() for k, w in masks.prunable(model).items()}
    slopes = {k: w.grad.abs().clone() for k, w in masks.prunable(model).items()}
    dynamics.update(100, model, found, optimizer)
    alpha = 0.15 * (1 + math.cos(math.pi / 3))  # end = 0.75 * 400
    for key, mask in before.items():
        n = int(alpha * int(mask.sum()))
        ranked = weights[key].flatten().masked_fill(~mask.flatten(), -1).argsort(descending=True, stable=True)
        survivors = torch.zeros(mask.numel()).bool()
        survivors[ranked[: int(mask.sum()) - n]] = True
        grown = slopes[key].flatten().masked_fill(survivors, -1).argsort(descending=True, stable=True)[:n]
        survivors[grown] = True
        assert torch.equal(found[key].flatten(), survivors)


def test_rigl_may_regrow_what_it_dropped_and_then_keeps_its_value():
    mask = torch.tensor([True, True, True, False, False])
    magnitude, growth = torch.tensor([3.0, 1.0, 2.0, 0.0, 0.0]), torch.tensor([0.0, 9.0, 0.0, 1.0, 2.0])
    found, new = dynamic.move(mask, magnitude, growth, 2, regrow_dropped=True)
    assert found.tolist() == [True, True, False, False, True]
    assert new.tolist() == [False, False, False, False, True]
    found, new = dynamic.move(mask, magnitude, growth, 2, regrow_dropped=False)
    assert found.tolist() == [True, False, False, True, True]
    found, _ = dynamic.move(mask, magnitude, growth, 3, regrow_dropped=False)  # two places only
    assert found.tolist() == [True, False, False, True, True]
    full = torch.ones(3).bool()
    assert dynamic.move(full, magnitude[:3], growth[:3], 2, regrow_dropped=True)[0].all()


@pytest.mark.parametrize("name", ["rigl", "set"])
def test_masks_move_at_their_steps_only(name):
    model, found, optimizer, dynamics = trained(name, delta_t=10, end_fraction=0.75)
    for step, moves in ((0, False), (5, False), (10, True), (11, False), (290, True), (300, False), (310, False)):
        before = {k: m.clone() for k, m in found.items()}
        skipped = dynamics.update(step, model, found, optimizer)
        assert skipped is (moves and name == "rigl")
        if not moves:
            assert same(found, before)
        elif step == 10:
            assert not same(found, before)


def test_rigl_options_are_followed():
    model, found, optimizer, dynamics = trained("rigl", skip_step=False)
    assert dynamics.update(100, model, found, optimizer) is False


def test_set_grows_at_random_places_that_depend_on_seed_and_step():
    def grown(seed, step):
        model, found, optimizer, _ = trained("set")
        before = {k: m.clone() for k, m in found.items()}
        METHODS["set"].during(METHODS["set"].options, 400, 1, seed).update(step, model, found, optimizer)
        for key, mask in before.items():  # what was dropped cannot come back, so as many are new
            n = min(int(0.3 * int(mask.sum())), int((~mask).sum()))
            assert int((found[key] & ~mask).sum()) == n
        return found

    assert same(grown(1, 100), grown(1, 100))
    assert not same(grown(1, 100), grown(2, 100))
    assert not same(grown(1, 100), grown(1, 200))


# ----------------------------------------------------------------------------- structured and small dense


def narrow(arch):
    given = {"in_channels": 3, "num_classes": 4, "image_size": 16, "mean": [0.4] * 3, "std": [0.3] * 3}
    groups = networks.all_groups(networks.build(arch, **given))
    return used(networks.build(arch, channels={g: max(4, n // 16) for g, n in groups.items()}, **given))


def zero_channels_(model, kept):
    """Filters, gamma and beta of the channels that are not kept become 0."""
    for layer in (m for m in model.modules() if getattr(m, "out_group", None) in kept):
        gone = torch.ones(len(layer.weight)).bool().index_fill(0, kept[layer.out_group], False)
        for parameter in layer.parameters():
            parameter.data[gone] = 0


@pytest.mark.parametrize("arch", networks.ARCHITECTURES)
def test_removing_channels_is_masking_them(arch):
    model = narrow(arch)
    found = find("slimming", moment("slimming", model=copy.deepcopy(model), round=3)).kept_channels
    small = structured.shrink(model, found).eval()
    zero_channels_(model, found)
    x = images(5, channels=3, size=16)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    assert n_parameters(small) < n_parameters(model)


def test_removing_inner_channels_saves_what_the_formula_says():
    model = network()
    small = structured.shrink(model, {"layer2.0.inner": torch.arange(3, 32)})
    saved = n_parameters(model) - n_parameters(small)
    assert saved == 3 * (9 * 16 + 2 + 9 * 32)


def test_shrinking_leaves_the_network_and_its_modes_as_found():
    model = used(network()).eval()
    model.bn1.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small = structured.shrink(model, {"stage3": torch.tensor([0, 5])})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]


@pytest.mark.parametrize("name", ["filter-l1", "slimming"])
@pytest.mark.parametrize("round", [1, 5, 12, 21])
def test_structured_budgets_are_met_from_below_as_nearly_as_one_channel_allows(name, round):
    given = moment(name, round=round)
    found = find(name, given).kept_channels
    cost = networks.convolution_cost(given.model)
    sizes = {g: len(kept) for g, kept in found.items()}
    full = networks.channel_groups(given.model)
    assert set(sizes) == set(full)
    assert min(sizes.values()) >= 1
    assert cost(sizes) <= given.n_keep
    for group, n in sizes.items():
        assert n == full[group] or cost(sizes | {group: n + 1}) > given.n_keep


@pytest.mark.parametrize("name", ["filter-l1-macs", "slimming-macs"])
@pytest.mark.parametrize("arch", ["resnet8", "vgg16-bn"])
def test_structured_networks_by_macs_spend_what_the_magnitude_mask_spends(arch, name):
    """As many as it keeps, by forward passes of both; no channel that would still fit is left out."""
    model = used(network() if arch == "resnet8" else plain_vgg())
    shape, given = (1, 12, 12), moment(name, model=model, round=6)
    mask = find("omp", moment("omp", model=model, round=6)).masks
    allowed = round(masks.sparse_macs(model, shape, mask))
    kept = find(name, given).kept_channels

    def spent(channels):
        return sum(networks.macs(structured.shrink(model, channels), shape).values())

    assert spent(kept) <= allowed
    for group, n in networks.channel_groups(model).items():
        more = sorted({*kept[group].tolist(), *[c for c in range(n) if c not in kept[group]][:1]})
        assert len(more) == len(kept[group]) or spent(kept | {group: torch.tensor(more)}) > allowed


def test_filter_l1_removes_the_filters_with_the_least_norm_of_coupled_layers():
    model = network()
    model.layer2[0].conv1.weight.data[7] *= 1e-3
    model.layer3[0].conv2.weight.data[9] *= 1e-3  # half of its channel: the shortcut writes the same stream
    kept = find("filter-l1", moment("filter-l1", model=model, round=1)).kept_channels
    assert 7 not in kept["layer2.0.inner"]
    scores = structured.filter_l1(model)
    by_hand = [model.layer3[0].conv2.weight, model.layer3[0].downsample[0].weight]
    norms = [w.detach().abs().sum((1, 2, 3)) for w in by_hand]
    torch.testing.assert_close(scores["stage3"].float(), sum(n / n.mean() for n in norms) / 2)
    assert scores["stage3"][9] == pytest.approx(0.5, abs=0.15)


def test_slimming_ranks_the_absolute_scale():
    model = used(network())
    expected = {"layer1.0.inner": model.layer1[0].bn1.weight, "layer3.0.inner": model.layer3[0].bn1.weight}
    scores = structured.bn_scale(model)
    for group, gamma in expected.items():
        torch.testing.assert_close(scores[group].float(), gamma.detach().abs())
    kept = find("slimming", moment("slimming", model=model)).kept_channels
    lost = set(range(64)) - set(kept["layer3.0.inner"].tolist())
    gamma = expected["layer3.0.inner"].detach().abs()
    assert max(gamma[list(lost)]) <= min(gamma[kept["layer3.0.inner"]])


def test_networks_that_cannot_shrink_further_say_so():
    model = networks.build("resnet20s", **GIVEN)
    with pytest.raises(UserError, match=r"one channel in each of its 9 prunable groups.*lower sparsity"):
        find("filter-l1", moment("filter-l1", model=model, round=25))
    for wrong in (torch.tensor([], dtype=torch.int64), torch.tensor([1, 0]), torch.tensor([0, 64])):
        with pytest.raises(UserError, match="'stage3' have to be different, sorted"):
            structured.shrink(network(), {"stage3": wrong})
    with pytest.raises(UserError, match="Did you mean 'stage3'"):
        structured.shrink(network(), {"stage33": torch.tensor([0])})


@pytest.mark.parametrize("arch", networks.ARCHITECTURES)
def test_small_dense_networks_are_the_nearest_of_all_multipliers(arch):
    model = networks.build(arch, **GIVEN)
    cost, groups = networks.convolution_cost(model), networks.all_groups(model)
    widest = max(groups.values())
    tried = [
        cost({g: max(1, math.floor(n * k / (8 * widest) + 0.5)) for g, n in groups.items()})
        for k in range(1, 8 * widest + 1, max(1, widest // 128))
    ]
    for round in (1, 5, 10, 21):
        n_keep = masks.kept(cost({}), round)
        off = abs(cost(fit_widths(model, n_keep)) - n_keep)
        assert off <= min(abs(count - n_keep) for count in tried)
        assert off < 0.1 * max(n_keep, 1000)  # of few weights, one channel more is many


def test_small_dense_networks_work_and_scale_every_group():
    model = networks.build("resnet20s", **GIVEN)
    groups = networks.all_groups(model)
    found = find("small-dense", moment("small-dense", model=model)).channels
    small = networks.rebuild(model, found)
    assert small(images(2)).shape == (2, 4)
    ratios = {g: found[g] / n for g, n in groups.items()}
    assert max(ratios.values()) - min(ratios.values()) < 1 / 16
    with pytest.raises(UserError, match=r"one channel in each group there are \d+"):
        fit_widths(model, 10)


@pytest.mark.parametrize("source", ["previuos", "rp"])
def test_a_source_that_is_not_there_is_refused_when_methods_are_gathered(monkeypatch, source):
    wrong = {**METHODS, "rp": replace(METHODS["rp"], source=source)}
    monkeypatch.setattr(pruning, "METHODS", wrong)
    with pytest.raises(UserError, match=f"Unknown source of rp '{source}'.*previous"):
        pruning._check_sources()
