"""Flatness: against brute-force Hessians in float64, closed forms, invariants and an independent library."""

import ast
import copy
import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune

from lthlib.core.errors import UserError
from lthlib.figures import flatness as drawing
from lthlib.metrics import METRICS
from lthlib.metrics.flatness import exact
from lthlib.metrics.flatness.exact import hessian_trace, input_hessian_trace, sample_factor
from lthlib.metrics.flatness.frozen import Frozen
from lthlib.metrics.flatness.landscape import (
    LossPath,
    adversarial_slice,
    filter_normalised_surface,
    interpolate,
    rescale_conv,
)
from lthlib.metrics.flatness.measure import measure
from lthlib.metrics.flatness.noise import input_noise_tolerance, largest_sigma, weight_noise_tolerance
from lthlib.metrics.flatness.spectrum import WeightHessian, spectral_density, top_eigenvalue
from lthlib.tickets.study import Study
from lthlib.tickets.subject import Subject


class Tiny(nn.Module):
    """conv-BN-act-pool, a residual grouped conv, conv-BN-ReLU, average pool, linear: every rule there is."""

    def __init__(self, act=F.relu, first=None, classes=3):
        super().__init__()
        self.conv1 = first or nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding="same", groups=2, padding_mode="reflect")
        self.conv3 = nn.Conv2d(4, 3, (2, 1), stride=(1, 2), dilation=(2, 1), padding=(1, 0))
        self.bn3 = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, classes)
        self.act = act

    def forward(self, x):
        x = F.max_pool2d(self.act(self.bn1(self.conv1(2 * x - 1))), 2)
        x = F.relu(x + self.conv2(x), inplace=True)
        x = F.relu(self.bn3(self.conv3(x)))
        return self.fc(F.avg_pool2d(x, x.shape[-2:]).flatten(1))


def make(**kwargs):
    """A network with running statistics and affine parameters away from their defaults."""
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Tiny(**kwargs).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            for values, low in ((module.running_mean, -0.5), (module.running_var, 0.5), (module.weight.data, 0.5)):
                values.copy_(torch.rand(values.shape, generator=generator) + low)
    return model


@pytest.fixture
def model():
    return make()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(5, 2, 6, 6, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])


@pytest.fixture
def masks(model):
    generator = torch.Generator().manual_seed(2)
    names = [name for name, p in model.named_parameters() if p.dim() == 4]
    return {n: torch.rand(model.get_parameter(n).shape, generator=generator) < 0.5 for n in names}


@pytest.mark.parametrize(
    "measured",
    [
        lambda model, x, y: weight_noise_tolerance(model, x, y, pairs=2).sigma,
        lambda model, x, y: input_noise_tolerance(model, x, y, pairs=2).sigma,
        lambda model, x, y: filter_normalised_surface(model, x, y, points=3).loss.sum(),
        lambda model, x, y: adversarial_slice(model, x, y, points=3).loss.sum(),
        lambda model, x, y: interpolate(model, model.state_dict(), model.state_dict(), x, y, points=3).loss.sum(),
        lambda model, x, y: hessian_trace(model, x, y).total,
        lambda model, x, y: input_hessian_trace(model, x, y).trace.sum(),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_may_be_any_whole_numbers(model, batch, measured, dtype):
    assert measured(model, batch[0], batch[1].to(dtype)) == measured(model, *batch)


def masked(model, masks):
    pruned = copy.deepcopy(model)
    for name, mask in masks.items():
        pruned.get_parameter(name).data.mul_(mask)
    return pruned


def brute_hessian(model, images, labels):
    """The whole Hessian by double differentiation, and the parameter that each row belongs to."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for _, p in model.named_parameters()]
    sizes = [p.numel() for _, p in model.named_parameters()]

    def loss(flat):
        weights = {n: w.view(s) for n, w, s in zip(names, flat.split(sizes), shapes, strict=True)}
        return F.cross_entropy(functional_call(model, weights, (images,)), labels)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    hessian = torch.autograd.functional.hessian(loss, flat, vectorize=True)
    return hessian, np.repeat(names, sizes), flat


def exact_trace(*args, **kwargs):
    return hessian_trace(*args, method="exact", **kwargs)


def top(model, images, labels, masks=None, **kwargs):
    hessian = WeightHessian(Frozen(model, images, labels, masks))
    return top_eigenvalue(hessian, near=hessian.gradient(), **kwargs)


def density(model, images, labels, **kwargs):
    return spectral_density(WeightHessian(Frozen(model, images, labels)), **kwargs)


def products(model, images, labels, masks, columns):
    hessian = WeightHessian(Frozen(model, images, labels, masks))
    return torch.stack([hessian @ column for column in columns.T], dim=1)


def active_rows(model, masks):
    everything = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    return torch.cat([mask.flatten() for mask in {**everything, **masks}.values()])


# ------------------------------------------------------------------------------------- the exact weight trace


@pytest.mark.parametrize(("pruned", "memory"), [(False, 1), (True, 2**28)])
def test_trace_is_the_brute_force_trace(model, batch, masks, pruned, memory, monkeypatch):
    monkeypatch.setattr(exact, "JACOBIAN_BYTES", memory)
    masks = masks if pruned else {}
    found = exact_trace(model, *batch, masks)
    hessian, owner, flat = brute_hessian(masked(model, masks), *batch)
    keep = active_rows(model, masks)
    diagonal = hessian.diagonal() * keep
    assert found.method == "exact"
    assert found.total == pytest.approx(float(diagonal.sum()), rel=1e-11)
    assert found.relative == pytest.approx(float((flat**2 * diagonal).sum()), rel=1e-11)
    for name, _ in model.named_parameters():
        rows = owner == name
        assert found.per_parameter[name] == pytest.approx(float(diagonal[rows].sum()), rel=1e-10, abs=1e-14)
        assert found.relative_per_parameter[name] == pytest.approx(
            float((flat**2 * diagonal)[rows].sum()), rel=1e-10, abs=1e-14
        )
    assert sum(found.active.values()) == int(keep.sum())
    assert found.per_weight == pytest.approx(found.total / int(keep.sum()))


def test_each_image_contributes_its_own_trace(model, batch):
    images, labels = batch
    found = exact_trace(model, images, labels)
    alone = [exact_trace(model, images[i : i + 1], labels[i : i + 1]) for i in range(5)]
    assert found.per_image.tolist() == pytest.approx([one.total for one in alone], rel=1e-12)
    assert found.relative_per_image.tolist() == pytest.approx([one.relative for one in alone], rel=1e-12)
    low, high = drawing.image_interval(found.per_image)
    assert low < found.total < high


def test_trace_survives_in_place_activations_and_a_residual_branch(batch):
    one = exact_trace(make(), *batch)
    other = exact_trace(make(act=nn.ReLU(inplace=True)), *batch)
    assert other.total == pytest.approx(one.total, rel=1e-12)


def test_factor_reproduces_the_softmax_hessian_even_where_it_is_nearly_singular():
    logits = torch.tensor([[0.0, 1.0, -2.0], [40.0, 0.0, -40.0], [0.0, 0.0, 90.0]], dtype=torch.float64)
    v = sample_factor(logits)
    p = logits.softmax(1)
    others = p @ (1 - torch.eye(3, dtype=torch.float64))  # 1 - p would cancel
    expected = -p[:, :, None] * p[:, None, :]
    expected.diagonal(dim1=1, dim2=2).copy_(p * others)
    assert v.shape[0] == 2
    torch.testing.assert_close(torch.einsum("knc,knd->ncd", v, v), expected, rtol=1e-9, atol=1e-28)


def test_bootstrap_interval_has_the_width_of_the_standard_error():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = drawing.image_interval(values)
    assert (high - low) / 2 == pytest.approx(1.96 * float(values.std()) / 20, rel=0.1)


# --------------------------------------------------------------------------- where the identity does not hold


class Scaled(nn.Conv2d):
    """A subclass whose forward uses another weight than the one it holds."""

    def forward(self, x):
        return self._conv_forward(x, 0.1 * self.weight, self.bias)


@pytest.mark.parametrize(
    "act",
    [
        F.gelu,
        F.softplus,
        nn.SiLU(),
        nn.Hardswish(),
        torch.tanh,
        torch.sigmoid,
        lambda x: x.softmax(1),
        nn.GroupNorm(2, 4),
        nn.LayerNorm([4, 6, 6]),
        lambda x: x * x.relu(),
        lambda x: x / (1 + x.abs()),
        lambda x: x / x.flatten(1).norm(dim=1)[:, None, None, None],
        lambda x: x.exp(),
    ],
)
def test_smooth_parts_are_seen_and_refused(batch, act):
    model, images = make(act=act).float(), batch[0].float()
    with pytest.raises(UserError, match=r"logits bend behind (conv1|bn1)"):
        exact_trace(model, images, batch[1])
    assert hessian_trace(model, images, batch[1], probes=2).method == "hutchinson"


@pytest.mark.parametrize("end", [lambda z: z.log_softmax(1), lambda z: z.softmax(1), lambda z: z**2])
def test_a_smooth_end_is_seen_too(batch, end):
    with pytest.raises(UserError, match="logits bend behind fc"):
        exact_trace(Layers(lambda m, x: end(m.fc(m.conv(x).relu().flatten(1)))), *batch)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clone()


@pytest.mark.parametrize(
    "act", [StraightThrough.apply, lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -9, 9)]
)
def test_a_made_up_derivative_is_not_called_exact(batch, act):
    model = Layers(lambda m, x: m.fc(act(m.conv(x)).flatten(1))).float()
    with pytest.raises(UserError, match="a derivative of its own"):
        exact_trace(model, batch[0].float(), batch[1])


@pytest.mark.parametrize(
    "act",
    [
        nn.ReLU6(),
        nn.LeakyReLU(),
        nn.Hardtanh(),
        torch.abs,
        lambda x: x.clamp(0, 1),
        lambda x: torch.maximum(x, 0.3 * x.roll(1, 1)),
    ],
)
def test_kinked_parts_are_accepted_and_still_exact(batch, act):
    model = make(act=act)
    hessian, _, _ = brute_hessian(model, *batch)
    assert exact_trace(model, *batch).total == pytest.approx(float(hessian.trace()), rel=1e-10)


@pytest.mark.parametrize(
    "act",
    [
        nn.BatchNorm2d(4, track_running_stats=False),
        lambda x: x - x.mean(0),
        lambda x: x + 0.5 * x.roll(1, 0),
        lambda x: torch.maximum(x, x.amax(0)),
        lambda x: x + 0.1 * x[:1],
    ],
)
def test_operations_along_the_batch_are_refused(batch, act):
    for measured in (hessian_trace, input_hessian_trace, top):
        with pytest.raises(UserError, match="other images of its batch"):
            measured(make(act=act), *batch)


def test_a_network_in_training_mode_is_measured_in_evaluation_mode(batch):
    assert hessian_trace(make().train(), *batch).total == hessian_trace(make(), *batch).total


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Conv2d(2, 4, 3, stride=3), nn.Linear(4, 3)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(self.attend(tokens, tokens, tokens, need_weights=False)[0].mean(1))


def test_fused_attention_is_named_and_can_be_differentiated_twice(batch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Attention().double()
    with sdpa_kernel(SDPBackend.MATH):
        hessian, _, _ = brute_hessian(model, *batch)
    found = hessian_trace(model, *batch, probes=150)
    assert "logits bend behind attend" in found.reason
    assert abs(found.total - float(hessian.trace())) < 4 * found.standard_error
    assert top(model, *batch).top == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-4)


def test_an_operation_without_a_second_derivative_is_explained(batch):
    model = make(act=nn.Hardsigmoid())
    for measured in (hessian_trace, input_hessian_trace, top):
        with pytest.raises(UserError, match="cannot differentiate hardsigmoid twice"):
            measured(model, *batch)


def test_tied_weights_are_named(batch):
    tied = Layers(
        lambda m, x: m.fc(m.shared(m.shared(m.conv(x)).relu()).flatten(1)), shared=nn.Conv2d(3, 3, 3, padding=1)
    )
    assert "logits bend behind shared" in hessian_trace(tied, *batch, probes=2).reason


def test_a_network_that_computes_with_anothers_weights_is_refused(model, batch):
    other = make()
    model.forward = lambda x: other(x)
    with pytest.raises(UserError, match="its own weights"):
        hessian_trace(model, *batch)


def assert_exact(model, batch):
    found = exact_trace(model, *batch)
    assert found.total == pytest.approx(float(brute_hessian(model, *batch)[0].trace()), rel=1e-10)


def test_a_layer_that_scales_its_own_weight_is_exact_too(batch):
    assert_exact(make(first=Scaled(2, 4, 3, padding=1)), batch)


def test_a_forward_pass_that_asks_for_values_is_estimated_and_says_why(batch):
    model = Layers(lambda m, x: m.fc(m.conv(x).relu().flatten(1)) * (1.0 if x.sum() > 0 else 2.0))
    found = hessian_trace(model, *batch, probes=60)
    assert "torch.func cannot follow" in found.reason
    assert abs(found.total - float(brute_hessian(model, *batch)[0].trace())) < 4 * found.standard_error
    with pytest.raises(UserError, match="cannot follow its forward pass"):
        exact_trace(model, *batch)


class Layers(nn.Module):
    """Two layers put together by a function."""

    def __init__(self, forward, conv=None, fc=None, **others):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.fc = conv or nn.Conv2d(2, 3, 3), fc or nn.Linear(48, 3)
        for name, module in others.items():
            setattr(self, name, module)
        self.function = forward
        self.double().eval()

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: F.linear(m.conv(x).relu().flatten(1), m.fc.weight, m.fc.bias),
        lambda m, x: m.fc(F.conv2d(x, m.conv.weight, m.conv.bias).relu().flatten(1)),
        lambda m, x: m.fc.forward(m.conv.forward(x).relu().flatten(1)),
        lambda m, x: m.fc(m.conv(x).relu().flatten(1)) + m.fc(x.new_ones(1, 48)),
    ],
)
def test_weights_used_without_a_call_of_their_module_are_exact_too(batch, forward):
    assert_exact(Layers(forward), batch)


@pytest.mark.parametrize(
    ("forward", "curved"),
    [
        (lambda m, x: m.fc((m.conv(x).relu() * m.fc.weight.sum()).flatten(1)), "fc"),
        (lambda m, x: m.fc(F.conv2d(x, m.conv.weight * m.conv.weight.abs()).relu().flatten(1)), "conv"),
    ],
)
def test_weights_that_logits_are_not_affine_in_are_named_and_estimated(batch, forward, curved):
    model = Layers(forward)
    with pytest.raises(UserError, match=f"logits bend behind {curved}"):
        exact_trace(model, *batch)
    hessian, _, _ = brute_hessian(model, *batch)
    found = hessian_trace(model, *batch, probes=60)
    assert abs(found.total - float(hessian.trace())) < 4 * found.standard_error


def test_a_layer_that_is_never_used_has_no_trace_and_is_no_obstacle(batch):
    model = Layers(lambda m, x: m.fc(m.conv(x).relu().flatten(1)), unused=nn.Linear(4, 5))
    hessian, _, _ = brute_hessian(model, *batch)
    found = hessian_trace(model, *batch)
    assert found.method == "exact"
    assert found.total == pytest.approx(float(hessian.trace()), rel=1e-11)


def test_layers_that_fold_something_into_the_batch_are_exact_too(batch):
    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(12, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(F.relu(self.embed(x.reshape(-1, 12))).view(len(x), -1, 4).mean(1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert_exact(Patches().double(), batch)


def test_a_mask_of_torch_prune_is_part_of_the_function_and_stays(model, batch):
    prune.random_unstructured(model.conv1, "weight", 0.5)
    held = model.conv1.weight.detach().clone()
    found = exact_trace(model, *batch)
    assert torch.equal(model.conv1.weight, held)
    plain = copy.deepcopy(make())
    plain.load_state_dict({**plain.state_dict(), "conv1.weight": held})
    masks = {"conv1.weight": model.conv1.weight_mask.bool()}
    assert found.total == pytest.approx(exact_trace(plain, *batch, masks).total, rel=1e-12)


def test_dropout_that_stays_active_is_refused(batch):
    assert hessian_trace(make(act=nn.Dropout(0.5)), *batch).method == "exact"
    with pytest.raises(UserError, match="dropout left active"):
        hessian_trace(make(act=lambda x: F.dropout(x, 0.5)), *batch)


def test_the_estimator_agrees_with_the_exact_trace_within_its_error(model, batch, masks):
    exact = hessian_trace(model, *batch, masks)
    found = hessian_trace(model, *batch, masks, method="hutchinson", probes=120)
    assert (exact.method, found.method) == ("exact", "hutchinson")
    assert 0 < found.standard_error < 0.25 * exact.total
    assert abs(found.total - exact.total) < 4 * found.standard_error
    assert abs(found.relative - exact.relative) < 4 * found.relative_standard_error


def test_the_error_of_the_estimator_falls_as_one_over_root_n_and_shares_add_up(model, batch):
    few, many = (hessian_trace(model, *batch, method="hutchinson", probes=n) for n in (40, 360))
    assert 0.2 < many.standard_error / few.standard_error < 0.5
    assert sum(many.per_parameter.values()) == pytest.approx(many.total)
    assert sum(many.relative_per_parameter.values()) == pytest.approx(many.relative)


def test_many_classes_turn_to_the_estimator_and_say_so(model, batch):
    found = hessian_trace(model, *batch, max_classes=2, probes=3)
    assert found.method == "hutchinson"
    assert "3 classes" in found.reason


# ----------------------------------------------------------------------------------------------------- pixels


def brute_input_hessians(model, images, labels):
    def loss(x, y):
        return F.cross_entropy(model(x[None]), y[None])

    hessians = [
        torch.autograd.functional.hessian(lambda x, y=y: loss(x, y), x) for x, y in zip(images, labels, strict=True)
    ]
    n = images[0].numel()
    return torch.stack(hessians).view(-1, n, n)


def test_input_hessian_is_exact_per_image(model, batch, monkeypatch):
    monkeypatch.setattr(exact, "JACOBIAN_BYTES", 1)
    found = input_hessian_trace(model, *batch)
    hessians = brute_input_hessians(model, *batch)
    torch.testing.assert_close(found.trace, hessians.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.top, torch.linalg.eigvalsh(hessians)[:, -1], rtol=1e-12, atol=1e-14)
    assert found.method == "exact"


def test_legacy_eigenvalue_is_that_of_the_batch_loss(model, batch):
    images, labels = batch

    def loss(x):
        return F.cross_entropy(model(x), labels)

    joint = torch.autograd.functional.hessian(loss, images).view(images.numel(), -1)
    top = float(torch.linalg.eigvalsh(joint)[-1])
    assert input_hessian_trace(model, *batch).legacy_batch_eigenvalue == pytest.approx(top, rel=1e-12)
    twice = input_hessian_trace(model, images.repeat(2, 1, 1, 1), labels.repeat(2))
    assert twice.legacy_batch_eigenvalue == pytest.approx(top / 2, rel=1e-12)


def test_input_hessian_of_a_smooth_network_is_estimated(batch):
    model = make(act=F.gelu)
    found = input_hessian_trace(model, *batch, probes=100)
    hessians = brute_input_hessians(model, *batch)
    traces, tops = hessians.diagonal(dim1=1, dim2=2).sum(1), torch.linalg.eigvalsh(hessians)[:, -1]
    assert found.method == "hutchinson+lanczos"
    assert "logits bend" in found.reason
    assert ((found.trace - traces).abs() < 4.5 * found.trace_standard_error).all()
    torch.testing.assert_close(found.top, tops, rtol=1e-8, atol=1e-12)
    assert (found.top_residual < 1e-8).all()


def test_the_estimator_stops_inventing_directions_where_the_hessian_has_no_more(batch):
    model = nn.Sequential(nn.Conv2d(2, 3, 6), nn.Flatten(), nn.LogSoftmax(1)).double()  # rank 2 of 72
    found = input_hessian_trace(model, *batch, probes=40)
    assert found.method == "hutchinson+lanczos"
    tops = torch.linalg.eigvalsh(brute_input_hessians(model, *batch))[:, -1]
    torch.testing.assert_close(found.top, tops, rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------------------------- spectrum


@pytest.mark.parametrize("pruned", [False, True])
def test_top_eigenvalue_of_the_true_masked_hessian(model, batch, masks, pruned):
    masks = masks if pruned else {}
    keep = active_rows(model, masks)
    hessian = brute_hessian(masked(model, masks), *batch)[0][keep][:, keep]
    expected = torch.linalg.eigvalsh(hessian)
    found = top(model, *batch, masks, tolerance=1e-9)
    assert found.converged
    assert found.top == pytest.approx(float(expected[-1]), rel=1e-8)
    assert found.smallest >= float(expected[0]) - 1e-10
    columns = torch.eye(len(hessian), dtype=torch.float64)[:, ::25]
    product = products(model, *batch, masks, columns)
    torch.testing.assert_close(product, hessian @ columns, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.norm(m.conv(x)) + m.conv(x) ** 2,
        lambda m, x: F.relu(m.norm(h := m.conv(x))) - h,
        lambda m, x: m.norm(m.conv(x)) + F.conv2d(x, m.conv.weight),
        lambda m, x: m.norm(m.conv(x).relu()),
    ],
)
def test_a_convolution_that_feeds_more_than_its_norm_is_not_rescaled(batch, forward):
    norm = nn.BatchNorm2d(3)
    norm.running_var.fill_(3.0)
    norm.running_mean.fill_(0.5)
    model = Layers(lambda m, x: m.fc(F.relu(forward(m, x)).mean((2, 3))), fc=nn.Linear(3, 3), norm=norm)
    with pytest.raises(UserError, match="not followed by one"):
        rescale_conv(model, "conv", 2.0, batch[0])


def test_a_network_that_uses_one_module_twice_keeps_its_parameters(batch):
    conv = nn.Conv2d(2, 2, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv, nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)).double()
    held = dict(model.named_parameters())
    hessian, _, _ = brute_hessian(copy.deepcopy(model), *batch)
    for name, measured in MEASURES.items():
        if name != "rescaled":
            measured(model, *batch)
    assert {name: id(p) for name, p in model.named_parameters()} == {n: id(p) for n, p in held.items()}
    assert top(model, *batch).top == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-5)


def test_weights_tied_between_modules_are_tied_in_every_product(batch):
    first, second = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
    second.weight = first.weight
    model = nn.Sequential(first, nn.BatchNorm2d(2), nn.ReLU(), second, nn.Flatten(), nn.Linear(72, 3)).double().eval()
    hessian, _, _ = brute_hessian(model, *batch)
    columns = torch.eye(len(hessian), dtype=torch.float64)[:, ::9]
    torch.testing.assert_close(products(model, *batch, None, columns), hessian @ columns, rtol=1e-10, atol=1e-12)


def test_a_second_derivative_that_pytorch_has_wrong_is_refused(batch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            return 2 * x.detach() * gradient + x.roll(1, -1) - x.roll(1, -1).detach()

    model = Layers(lambda m, x: m.fc(Wrong.apply(m.conv(x)).flatten(1)))
    with pytest.raises(UserError, match="not symmetric"):
        top(model, *batch)
    with pytest.raises(UserError, match="not symmetric"):
        hessian_trace(model, *batch)


def test_signed_and_absolute_extremes_differ_where_the_negative_end_is_larger():
    matrix = torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.2, -0.1, -7.0], dtype=torch.float64))
    found = top_eigenvalue(matrix)
    assert found.top == pytest.approx(3.0, abs=7e-5)
    assert found.largest_magnitude == pytest.approx(-7.0, abs=7e-5)
    assert top_eigenvalue(-matrix).largest_magnitude == pytest.approx(7.0, abs=7e-5)


def test_the_negative_end_is_waited_for_where_it_may_be_the_larger():
    values = torch.cat([torch.linspace(-1, 1, 200).double() ** 3, torch.tensor([-3.1, -3.05, -3.0, 3.02])])
    for seed in range(5):
        found = top_eigenvalue(torch.diag(values), seed=seed)
        assert found.converged
        assert found.largest_magnitude == pytest.approx(-3.1, abs=3e-5)
        assert found.top == pytest.approx(3.02, abs=3e-5)


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4, 1e-6])
def test_an_early_stop_does_not_take_a_cluster_for_its_top(tolerance):
    values = torch.cat([torch.linspace(0, 1, 400), torch.tensor([9.0, 9.5, 10.0])]).double()
    found = [top_eigenvalue(torch.diag(values), tolerance=tolerance, seed=seed) for seed in range(20)]
    assert all(one.converged and one.top <= 10 + 1e-12 for one in found)
    assert np.mean([10 - one.top <= 10 * tolerance for one in found]) >= 0.8


def test_a_start_in_the_wrong_place_does_not_hide_the_largest():
    values = torch.cat([torch.linspace(0, 1, 300), torch.tensor([5.0, 7.0])]).double()
    near = torch.zeros(302).double()
    near[-2] = 1.0
    found = top_eigenvalue(torch.diag(values), near=near)
    assert found.top == pytest.approx(7, rel=1e-6)
    assert top_eigenvalue(torch.diag(values), near=0 * near).top == pytest.approx(7, rel=1e-6)


def test_sums_over_many_weights_cost_no_digits():
    values = torch.cat([torch.rand(300_000, generator=torch.Generator().manual_seed(0)), torch.tensor([50.0])])

    class Diagonal:
        shape, dtype, device = (300_001, 300_001), torch.float32, values.device

        def __matmul__(self, vector):
            return values * vector

    tops = [top_eigenvalue(Diagonal(), seed=seed).top for seed in range(3)]
    np.testing.assert_allclose(tops, 50.0, rtol=2e-7)


def test_residual_bounds_hold_before_convergence():
    values = torch.linspace(0, 1, 300, dtype=torch.float64) ** 3 * 10
    found = top_eigenvalue(torch.diag(values), tolerance=1e-12, max_products=12)
    assert not found.converged
    assert found.products == 12
    assert float((values - found.top).abs().min()) <= found.residual
    done = top_eigenvalue(torch.diag(values), tolerance=1e-10, max_products=300)
    assert done.converged
    assert abs(done.top - 10) <= 1e-9


def test_lanczos_stops_at_an_exhausted_space():
    low_rank = torch.zeros(40, 40, dtype=torch.float64)
    low_rank[0, 0], low_rank[1, 1] = 5.0, 2.0
    found = top_eigenvalue(low_rank)
    assert found.top == pytest.approx(5.0, rel=1e-12)
    assert found.products <= 4
    assert top_eigenvalue(torch.zeros(4, 4)).top == 0


def test_density_has_the_moments_of_the_hessian(model, batch):
    hessian, _, _ = brute_hessian(model, *batch)
    operator = WeightHessian(Frozen(model, *batch))
    found = [spectral_density(operator, probes=1, steps=8, points=9000, width=1e-3, seed=seed) for seed in range(20)]
    for power in (1, 2):
        each = np.array([np.trapezoid(density * at**power, at) for at, density in found])
        mean, error = each.mean(), each.std(ddof=1) / len(each) ** 0.5
        assert abs(mean - float(torch.linalg.matrix_power(hessian, power).trace()) / len(hessian)) < 4 * error
    together = spectral_density(operator, probes=2, steps=8)
    assert np.trapezoid(*together[::-1]) == pytest.approx(1, abs=1e-3)


def test_density_of_a_known_spectrum():
    values = torch.cat([torch.zeros(900), torch.full((100,), 4.0)]).double()
    at, density = spectral_density(torch.diag(values), probes=20, steps=5)
    assert np.trapezoid(density[at > 2], at[at > 2]) == pytest.approx(0.1, abs=0.01)
    assert at[np.argmax(density)] == pytest.approx(0, abs=2 * 0.01 * 4)


# -------------------------------------------------------------------------------------------------- PAC-Bayes


class Filters(nn.Module):
    """Logits are the weights themselves when the image is a one."""

    def __init__(self, weights):
        super().__init__()
        self.conv = nn.Conv2d(1, len(weights), 1, bias=False)
        self.conv.weight.data = torch.as_tensor(weights, dtype=torch.float64).view(-1, 1, 1, 1)

    def forward(self, x):
        return self.conv(x).flatten(1)


CURVATURE = torch.tensor([1.0, 3.0, 0.5, 2.0] * 50, dtype=torch.float64)
WEIGHTS = torch.linspace(-1, 1, 200, dtype=torch.float64)


def quadratic(logits, labels):
    return 1.0 + 0.5 * (CURVATURE * logits**2).sum(1).mean()


def test_weight_noise_on_a_quadratic_loss_has_its_closed_form():
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    label = torch.zeros(1, dtype=torch.long)
    found = weight_noise_tolerance(Filters(WEIGHTS), one, label, loss=quadratic, pairs=32)
    clean = float(quadratic(WEIGHTS[None], label))
    sigma = (0.2 * clean / float((CURVATURE * WEIGHTS**2).sum())) ** 0.5
    assert found.loss == pytest.approx(clean)
    assert found.low < sigma < found.high
    assert found.sigma == pytest.approx(sigma, rel=0.05)
    assert (found.high - found.low) / sigma < 0.2


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    one, label = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    clean = float(quadratic(WEIGHTS[None], label))
    sigma = (0.2 * clean / float((CURVATURE * WEIGHTS**2).sum())) ** 0.5
    covered = 0
    for seed in range(40):
        found = weight_noise_tolerance(Filters(WEIGHTS), one, label, loss=quadratic, pairs=6, seed=seed)
        covered += found.low < sigma < found.high
    assert covered >= 33


def test_masked_weights_get_no_noise():
    one, label = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.long)
    mask = WEIGHTS.abs() > 0.5
    model = Filters(WEIGHTS)
    kept = WEIGHTS * mask
    found = weight_noise_tolerance(model, one, label, {"conv.weight": mask.view(-1, 1, 1, 1)}, loss=quadratic, pairs=32)
    clean = float(quadratic(kept[None], label))
    assert found.loss == pytest.approx(clean)
    assert found.sigma == pytest.approx((0.2 * clean / float((CURVATURE * kept**2).sum())) ** 0.5, rel=0.05)


def test_input_noise_on_a_quadratic_loss_has_its_closed_form():
    generator = torch.Generator().manual_seed(0)
    images = torch.full((400, 1, 1, 1), 0.5, dtype=torch.float64)
    labels = torch.randint(0, 2, (400,), generator=generator)
    model = Filters([1.0, 1.0])
    found = input_noise_tolerance(
        model, images, labels, loss=lambda z, y: 0.05 + ((z[:, 0] - 0.5) ** 2).mean(), pairs=8
    )
    assert found.sigma == pytest.approx(0.005**0.5, rel=0.03)


def test_input_noise_is_clamped_to_pixels():
    images = torch.ones(200, 1, 1, 1, dtype=torch.float64)
    labels = torch.tensor([0, 1] * 100)
    found = input_noise_tolerance(
        Filters([1.0, 1.0]), images, labels, loss=lambda z, y: 1 + (z[:, 0] > 1).double().mean(), pairs=2
    )
    assert (found.sigma, found.high) == (2.0, float("inf"))


def test_the_first_crossing_is_found_where_the_loss_falls_again():
    found = largest_sigma(lambda sigma, draw: 1 + 0.5 * np.sin(3 * sigma), 1.0, 0.1, 5.0, 4)
    assert found.sigma == pytest.approx(np.arcsin(0.2) / 3, rel=1e-2)


# -------------------------------------------------------------------------------------------------- landscape


def test_path_ends_are_the_two_networks_and_a_convex_loss_has_no_barrier(batch):
    images, labels = batch
    linear = nn.Sequential(nn.Flatten(), nn.Linear(72, 3)).double()
    other = copy.deepcopy(linear)
    other[1].weight.data.mul_(-2)
    path = interpolate(linear, linear.state_dict(), other.state_dict(), images, labels, points=9)
    assert path.loss[0] == pytest.approx(F.cross_entropy(linear(images), labels).item())
    assert path.loss[-1] == pytest.approx(F.cross_entropy(other(images), labels).item())
    assert path.loss_barrier == 0


def test_permuted_copy_of_a_network_is_behind_a_barrier(model, batch):
    images, labels = batch[0], make()(batch[0]).argmax(1)
    if len(labels.unique()) == 1:
        labels = batch[1]
    model.fc.weight.data.mul_(20)
    state = model.state_dict()
    twin = copy.deepcopy(state)
    order = torch.tensor([2, 0, 1])
    for name in ("conv3.weight", "conv3.bias", "bn3.weight", "bn3.bias", "bn3.running_mean", "bn3.running_var"):
        twin[name] = state[name][order]
    twin["fc.weight"] = state["fc.weight"][:, order]
    path = interpolate(model, state, twin, images, labels, points=5)
    assert path.loss[-1] == pytest.approx(path.loss[0], rel=1e-10)
    middle = (path.t == 0.5).argmax()
    assert path.loss_barrier >= path.loss[middle] - path.loss[0]
    assert interpolate(model, state, state, images, labels).loss_barrier == pytest.approx(0, abs=1e-12)


def test_error_barrier_of_a_hand_made_path():
    path = LossPath(np.linspace(0, 1, 5), np.array([1.0, 2, 4, 3, 2]), np.array([0.0, 0.1, 0.6, 0.3, 0.2]))
    assert path.loss_barrier == pytest.approx(4 - 1.5)
    assert path.error_barrier == pytest.approx(0.6 - 0.1)


def test_recomputed_statistics_are_those_of_the_images(model, batch):
    images, labels = batch
    spoilt = model.state_dict()
    for name in spoilt:
        if "running" in name:
            spoilt[name] = torch.rand(spoilt[name].shape, dtype=torch.float64) + 1
    recomputed = interpolate(model, spoilt, spoilt, images, labels, points=3, statistics="recompute")
    trained = copy.deepcopy(model).train()
    for module in trained.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    trained(images)
    expected = F.cross_entropy(trained.eval()(images), labels).item()
    np.testing.assert_allclose(recomputed.loss, expected, rtol=1e-12)


def test_surface_is_centred_filter_normalised_and_keeps_pruned_weights(model, batch, masks):
    from lthlib.metrics.flatness.landscape import _filter_normalised

    surface = filter_normalised_surface(model, *batch, masks, points=3)
    pruned = masked(model, masks)
    assert surface.loss[1, 1] == pytest.approx(F.cross_entropy(pruned(batch[0]), batch[1]).item(), rel=1e-12)
    direction = _filter_normalised(Frozen(model, *batch, masks), seed=0, index=0)
    for name, mask in masks.items():
        assert (direction[name][~mask] == 0).all()
        torch.testing.assert_close(
            direction[name].flatten(1).norm(dim=1), pruned.get_parameter(name).detach().flatten(1).norm(dim=1)
        )
    doubled = rescale_conv(model, "conv1", 8.0, batch[0])
    np.testing.assert_allclose(
        filter_normalised_surface(doubled, *batch, masks, points=3).loss, surface.loss, rtol=1e-9
    )


def test_adversarial_slice_holds_fgsm(model, batch):
    images, labels = batch
    surface = adversarial_slice(model, images, labels, span=0.1, points=3)
    pixels = images.clone().requires_grad_()
    F.cross_entropy(model(pixels), labels).backward()
    fgsm = (images + 0.1 * pixels.grad.sign()).clamp(0, 1)
    assert surface.loss[2, 1] == pytest.approx(F.cross_entropy(model(fgsm), labels).item(), rel=1e-12)
    assert surface.loss[0, 1] == pytest.approx(F.cross_entropy(model(images), labels).item(), rel=1e-12)


# ---------------------------------------------------------------------------------------------------- caveats


@pytest.mark.parametrize("layer", ["conv1", "conv3"])
@pytest.mark.parametrize("factor", [0.25, 10.0])
def test_rescaling_moves_the_trace_and_not_the_function_or_the_relative_flatness(model, batch, layer, factor):
    scaled = rescale_conv(model, layer, factor, batch[0])
    torch.testing.assert_close(scaled(batch[0]), model(batch[0]), rtol=1e-12, atol=1e-12)
    before, after = (exact_trace(m, *batch) for m in (model, scaled))
    for name in before.per_parameter:
        ratio = factor**-2 if name.startswith(layer) else 1
        assert after.per_parameter[name] == pytest.approx(ratio * before.per_parameter[name], rel=1e-9)
        assert after.relative_per_parameter[name] == pytest.approx(before.relative_per_parameter[name], rel=1e-9)
    assert after.total != pytest.approx(before.total, rel=1e-3)


def test_noise_tolerance_is_invariant_too(model, batch):
    scaled = rescale_conv(model, "conv1", 10.0, batch[0])
    one, other = (weight_noise_tolerance(m, *batch, pairs=2) for m in (model, scaled))
    assert other.sigma == pytest.approx(one.sigma, rel=1e-6)


def test_rescaling_needs_a_norm_behind(model, batch):
    with pytest.raises(UserError, match=r"not followed by one batch norm .*conv1, conv3"):
        rescale_conv(model, "conv2", 2.0, batch[0])
    with pytest.raises(UserError, match="Did you mean 'conv1'"):
        rescale_conv(model, "conv11", 2.0, batch[0])
    with pytest.raises(UserError, match="positive"):
        rescale_conv(model, "conv1", 0.0, batch[0])


# -------------------------------------------------------------------------------------- manners and bad input


MEASURES = {
    "exact": lambda m, x, y: hessian_trace(m, x, y),
    "estimated": lambda m, x, y: hessian_trace(m, x, y, method="hutchinson", probes=4),
    "pixels": lambda m, x, y: input_hessian_trace(m, x, y),
    "top": lambda m, x, y: top(m, x, y, max_products=4),
    "density": lambda m, x, y: density(m, x, y, probes=1, steps=3),
    "weight noise": lambda m, x, y: weight_noise_tolerance(m, x, y, pairs=2),
    "input noise": lambda m, x, y: input_noise_tolerance(m, x, y, pairs=2),
    "path": lambda m, x, y: interpolate(m, m.state_dict(), m.state_dict(), x, y, points=3, statistics="recompute"),
    "surface": lambda m, x, y: filter_normalised_surface(m, x, y, points=2),
    "slice": lambda m, x, y: adversarial_slice(m, x, y, points=2),
    "rescaled": lambda m, x, y: rescale_conv(m, "conv1", 2.0, x).state_dict(),
}


@pytest.mark.parametrize("name", MEASURES)
def test_the_model_and_the_generators_are_left_as_found(batch, name):
    images, labels = batch
    model = make()
    model.bn1.train()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    state = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    random = torch.random.get_rng_state()
    legacy = np.random.get_state()[1].copy()  # noqa: NPY002
    pixels = images.clone()
    MEASURES[name](model, images, labels)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert not model.conv1.weight.requires_grad
    assert model.fc.weight.requires_grad
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert all(p.grad is None for n, p in model.named_parameters() if n != "fc.weight")
    assert torch.equal(torch.random.get_rng_state(), random)
    assert (np.random.get_state()[1] == legacy).all()  # noqa: NPY002
    assert torch.equal(images, pixels)
    assert not images.requires_grad


@pytest.mark.parametrize("name", MEASURES)
def test_flags_and_contexts_of_the_caller_do_not_matter(model, batch, name):
    first = MEASURES[name](model, *batch)
    model.requires_grad_(False)
    with torch.no_grad():
        again = MEASURES[name](model, *batch)
    assert repr(first) == repr(again)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["estimated", "density", "top", "weight noise", "slice"])
def test_a_seed_gives_the_same_numbers_whatever_the_global_generator_says(model, batch, name):
    first = MEASURES[name](model, *batch)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        again = MEASURES[name](model, *batch)
    assert repr(first) == repr(again)


@pytest.mark.parametrize("name", ["exact", "estimated", "pixels", "top", "weight noise", "path", "surface", "slice"])
def test_a_loss_that_is_not_finite_is_refused(model, batch, name):
    model.fc.bias.data[0] = float("nan")
    with pytest.raises(UserError, match="finite"):
        MEASURES[name](model, *batch)


def test_a_layer_emptied_by_its_mask_has_no_trace_and_does_no_harm(model, batch):
    masks = {"conv2.weight": torch.zeros(4, 2, 3, 3, dtype=torch.bool)}
    found = exact_trace(model, *batch, masks)
    hessian, owner, _ = brute_hessian(masked(model, masks), *batch)
    assert found.per_parameter["conv2.weight"] == 0
    assert found.active["conv2.weight"] == 0
    assert found.total == pytest.approx(float(hessian.diagonal()[owner != "conv2.weight"].sum()), rel=1e-11)
    assert top(model, *batch, masks).converged
    everything = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    with pytest.raises(UserError, match="no weight active"):
        top(model, *batch, everything)
    with pytest.raises(UserError, match="no weight active"):
        exact_trace(model, *batch, everything)


def test_a_batch_of_one_class_is_measured_with_a_warning(model, batch):
    images, labels = batch
    with pytest.warns(UserWarning, match="label 1"):
        one = exact_trace(model, images, torch.ones_like(labels))
    assert one.total == pytest.approx(exact_trace(model, images, labels).total, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y[:-1]), "one per image is needed"),
        (lambda x, y: (x, y.double()), "integers in"),
        (lambda x, y: (x, y + 1), r"\[0, 2\]"),
        (lambda x, y: ((x * 255).byte(), y), "float"),
        (lambda x, y: (x[:0], y[:0]), "non-empty"),
    ],
)
def test_bad_batches_are_explained(model, batch, change, message):
    with pytest.raises(UserError, match=message):
        hessian_trace(model, *change(*batch))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"conv1.weihgt": torch.ones(4, 2, 3, 3, dtype=torch.bool)}, "Did you mean 'conv1.weight'"),
        ({"conv1.weight": torch.ones(4, 2, 3, 3)}, "make it bool"),
        ({"conv1.weight": torch.ones(4, 2, 1, 1, dtype=torch.bool)}, r"its weight \(4, 2, 3, 3\)"),
    ],
)
def test_bad_masks_are_explained(model, batch, masks, message):
    with pytest.raises(UserError, match=message):
        hessian_trace(model, *batch, masks)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, y: hessian_trace(m, x, y, method="hutch"), "Did you mean"),
        (lambda m, x, y: hessian_trace(m, x, y, method="hutchinson", probes=1), "two independent"),
        (lambda m, x, y: density(m, x, y, probes=0), "probes >= 1"),
        (lambda m, x, y: weight_noise_tolerance(m, x, y, pairs=1), "two draws"),
        (lambda m, x, y: weight_noise_tolerance(nn.Flatten(), x, y * 0 + torch.arange(5)), "no"),
        (lambda m, x, y: interpolate(m, m.state_dict(), {}, x, y), "do not fit"),
        (lambda m, x, y: interpolate(m, m.state_dict(), m.state_dict(), x, y, points=2), "three|between"),
        (
            lambda m, x, y: interpolate(m, m.state_dict(), m.state_dict(), x[:1], y[:1], statistics="recompute"),
            "two images",
        ),
    ],
)
def test_bad_requests_are_explained(model, batch, call, message):
    with pytest.raises(UserError, match=message):
        call(model, *batch)


def test_rows_say_which_way_is_better_and_the_paper_asks_for_both_hessians():
    rows = {name: row for name, row in METRICS.items() if row.dimension == "flatness"}
    assert {name for name, row in rows.items() if row.in_verdict} == {"weight_hessian_trace", "input_hessian_trace"}
    assert {name for name, row in rows.items() if row.higher_is_better} == {
        "pac_bayes_weight_sigma",
        "pac_bayes_input_sigma",
    }


def test_networks_of_the_book_are_piecewise_linear_and_agree_with_curvlinops():
    from curvlinops import GGNLinearOperator

    from lthlib.networks import build

    model = build("resnet8", in_channels=1, num_classes=3, image_size=8, mean=[0.2], std=[0.3]).double().eval()
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(3, 1, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2])
    found = exact_trace(model, images, labels)
    weights = [model.get_parameter("fc.weight"), model.get_parameter("fc.bias")]
    ggn = GGNLinearOperator(model, nn.CrossEntropyLoss(), weights, [(images, labels)])
    n = sum(w.numel() for w in weights)
    dense = ggn @ torch.eye(n, dtype=torch.float64)
    assert found.per_parameter["fc.weight"] + found.per_parameter["fc.bias"] == pytest.approx(
        float(dense.trace()), rel=1e-9
    )


# ------------------------------------------------------------------------------------------------- measure

CHEAP = {
    "n_weights": 12,
    "n_spectrum": 10,
    "n_pixels": 14,
    "n_noise": 8,
    "n_path": 20,
    "pairs": 2,
    "points": 5,
    "probes": 1,
    "steps": 5,
    "surface_points": 3,
    "n_wide": 16,
}


@pytest.fixture(scope="module")
def subjects(store):
    """Dense and one sparse ticket of two seeds."""
    from conftest import TINY

    study = Study(methods=("snip",), rounds=(6,), seeds=(0, 1), recipe=TINY, train_size=500)
    return {(t.method, t.seed): Subject(t, store, "float32") for t in study.tickets()}


@pytest.fixture(scope="module")
def measured(subjects):
    return {key: measure(s, **CHEAP, partner=0, pictured=(6,)) for key, s in subjects.items()}


def drawn(subject, n):
    train = subject.data.train
    which = np.random.default_rng(0).permutation(len(train.labels))[:n]
    return train.pixels[which].permute(0, 3, 1, 2) / 255, train.labels[which]


def numbers(found):
    return {value.metric: value for value in found[0]}


def test_measure_has_every_row_of_the_dimension_and_the_sample_sizes(measured):
    rows = {name for name, row in METRICS.items() if row.dimension == "flatness"}
    for found in measured.values():
        assert set(numbers(found)) == rows
        assert numbers(found)["weight_hessian_trace"].n == 12
        assert numbers(found)["input_hessian_trace"].n == 14
        assert numbers(found)["pac_bayes_weight_sigma"].n == 8
        assert numbers(found)["error_barrier"].n == 20


def test_measured_values_are_those_of_the_functions_on_the_same_images(subjects, measured):
    subject, found = subjects["snip", 0], numbers(measured["snip", 0])
    arrays = measured["snip", 0][1]
    model, masks = subject.model, subject.masks
    trace = exact_trace(model, *drawn(subject, 12), masks)
    pixels = input_hessian_trace(model, *drawn(subject, 14))
    sharpest = top(model, *drawn(subject, 10), masks, tolerance=1e-2)
    expected = {
        "weight_hessian_trace": trace.total,
        "weight_hessian_trace_per_weight": trace.per_weight,
        "relative_flatness": trace.relative,
        "weight_hessian_top": sharpest.top,
        "input_hessian_trace": float(pixels.trace.mean()),
        "input_hessian_top": float(pixels.top.mean()),
        "legacy_batch_eigenvalue": float(pixels.top.max()) / 14,
        "pac_bayes_weight_sigma": weight_noise_tolerance(model, *drawn(subject, 8), masks, pairs=2).sigma,
        "pac_bayes_input_sigma": input_noise_tolerance(model, *drawn(subject, 8), pairs=2).sigma,
    }
    assert {name: found[name].value for name in expected} == pytest.approx(expected, rel=1e-4)
    assert trace.total != pytest.approx(exact_trace(model, *drawn(subject, 12)).total, rel=1e-3)
    assert arrays["layer_trace"].sum() == pytest.approx(trace.total, rel=1e-5)
    assert arrays["layer_active"].sum() == sum(trace.active.values())
    assert arrays["weight_per_image"].mean() == pytest.approx(trace.total, rel=1e-5)
    np.testing.assert_allclose(arrays["input_traces"], pixels.trace, rtol=1e-4)


def test_lines_lead_from_the_dense_parent_and_from_the_other_seed(subjects, measured):
    for key, start in (("dense", ("dense", 1)), ("partner", ("snip", 0))):
        ends = [subjects[which].model for which in (start, ("snip", 1))]
        line = interpolate(ends[1], *(model.state_dict() for model in ends), *drawn(subjects["snip", 1], 20), points=5)
        np.testing.assert_allclose(measured["snip", 1][1][f"{key}_loss"], line.loss, rtol=1e-5)
        if key == "dense":
            assert numbers(measured["snip", 1])["loss_barrier"].value == pytest.approx(line.loss_barrier)
    assert numbers(measured["dense", 1])["loss_barrier"].value == 0.0
    assert "dense_loss" not in measured["dense", 1][1]
    assert "partner_loss" in measured["dense", 1][1]
    assert "partner_loss" not in measured["snip", 0][1]  # no line to oneself


def test_another_architecture_has_no_line_to_the_dense_network(subjects, store):
    ticket = dataclasses.replace(subjects["snip", 0].ticket, method="small-dense")
    values, arrays = measure(Subject(ticket, store, "float32"), **CHEAP)
    assert not {"loss_barrier", "error_barrier"} & {value.metric for value in values}
    assert "dense_loss" not in arrays
    measured = pd.DataFrame({"metric": [value.metric for value in values]})
    assert ("error_barrier", "none") not in drawing.panels(measured)
    assert ("weight_hessian_trace", "none") in drawing.panels(measured)


def test_pictures_are_of_the_rounds_and_the_seed_asked_for(subjects, measured):
    assert "density" in measured["snip", 0][1]
    assert "density" not in measured["snip", 1][1]
    assert "density" not in measured["dense", 0][1]
    arrays = measured["snip", 0][1]
    assert arrays["surface_loss"].shape == (3, 3)
    batch = drawn(subjects["snip", 0], 20)
    loss = F.cross_entropy(subjects["snip", 0].model(batch[0]), batch[1]).detach()
    assert arrays["surface_loss"][1, 1] == pytest.approx(float(loss), rel=1e-4)
    assert arrays["slice_loss"][0, 1] == pytest.approx(float(loss), rel=1e-4)
    assert len(arrays["wide_per_image"]) == 16
    np.testing.assert_allclose(arrays["wide_per_image"][:12], arrays["weight_per_image"], rtol=1e-3)
    assert sum(array.nbytes for array in arrays.values()) < 50_000


def test_the_rescaled_ticket_computes_the_same_and_only_its_trace_moves(measured):
    found, arrays = numbers(measured["snip", 0]), measured["snip", 0][1]
    layer = dict(zip(arrays["layers"], arrays["layer_trace"], strict=True))[str(arrays["rescaled_layer"])]
    total = found["weight_hessian_trace"].value
    np.testing.assert_allclose(
        arrays["rescaled_trace"], total + layer * (arrays["rescaled_factor"] ** -2.0 - 1), rtol=1e-3
    )
    np.testing.assert_allclose(arrays["rescaled_relative"], found["relative_flatness"].value, rtol=1e-3)
    assert (arrays["rescaled_change"] < 1e-4).all()


def test_measuring_twice_gives_the_same_and_leaves_ticket_and_generator(subjects, measured):
    subject = subjects["snip", 1]
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    again = measure(subject, **CHEAP, partner=0, pictured=(6,))
    assert torch.equal(state, torch.random.get_rng_state())
    assert again[0] == measured["snip", 1][0]
    for name, array in again[1].items():
        np.testing.assert_array_equal(array, measured["snip", 1][1][name])
    assert not any(module.training for module in subject.model.modules())
    for name, value in subject.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_another_draw_of_images_gives_another_batch(subjects, measured):
    values = measure(subjects["dense", 0], **CHEAP, batch_seed=1)[0]
    assert numbers((values,))["input_hessian_trace"] != numbers(measured["dense", 0])["input_hessian_trace"]


# ------------------------------------------------------------------------------------------------- tables


def test_labels_below_wrapped_titles_are_shortened_too():
    figure, axis = plt.subplots()
    axis.plot([1.0, 100.0])
    axis.set(title="Error barrier to the dense\nnetwork", ylabel="Error barrier to the dense network [%] ↓")
    drawing.arranged(figure)
    assert axis.get_ylabel() == "[%] ↓"
    assert axis.get_yscale() == "log"
    plt.close(figure)


def test_rankings_are_read_in_each_metric_s_own_direction():
    trace, sigma = [1.0, 2.0, 3.0], [0.3, 0.2, 0.1]  # lower trace, higher noise borne: the same order
    lines = [
        (
            method,
            2,
            0,
            name,
            "none",
            {"pac_bayes_weight_sigma": sigma, "relative_flatness": trace[::-1]}.get(name, trace)[i],
        )
        for i, method in enumerate(("rp", "snip", "omp"))
        for name in {*drawing.RANKED, "weight_hessian_trace"}
    ]
    rows = pd.DataFrame(lines, columns=["method", "round", "seed", "metric", "shift", "value"])
    found = drawing.ranking_table(rows)
    assert list(found.index) == ["36.0 %"]
    assert found[METRICS["pac_bayes_weight_sigma"].title].tolist() == ["1.00"]
    assert found[METRICS["relative_flatness"].title].tolist() == ["-1.00"]
    alone = drawing.ranking_table(rows[rows["method"] == "snip"])
    assert set(alone.loc["SNIP"]) == {"–"}


def test_the_difference_to_dense_is_taken_image_by_image():
    rng = np.random.default_rng(0)
    hard = rng.exponential(10, 200)
    tickets = {
        "dense": {"weight_per_image": hard, "wide_per_image": np.arange(100.0)},
        "SNIP, 36.0 %": {"weight_per_image": hard + rng.normal(1, 0.1, 200)},
    }
    table = drawing.batch_table(tickets, batch=50)
    assert table.loc["dense", "batches of 50"] == "24.5, 74.5"
    assert table.loc["dense", "on more images"] == "49.5 (100)"
    low, high = ast.literal_eval(table.loc["SNIP, 36.0 %", "95 % of that"])
    assert 0.97 < low < 1 < high < 1.03  # either trace alone is uncertain by more than 1
