"""Structured pruning beside torch-pruning, an independent implementation that traces the network for itself."""

import copy

import pytest
import torch
from test_pruners import images, n_parameters, narrow
from torch import nn

from lthlib import networks
from lthlib.pruning import structured

peer = pytest.importorskip(
    "torch_pruning", reason="torch-pruning is no dependency: pip install torch-pruning to compare"
)
LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)


@pytest.fixture(params=networks.ARCHITECTURES)
def model(request):
    return narrow(request.param).eval()


def traced(model):
    return peer.DependencyGraph().build_dependency(model, example_inputs=images(1, channels=3, size=16))


def members(group):
    """What a traced group joins: (layer, whether it is the layer's inputs that go)."""
    layers = [(dep.target.module, "in_channels" in dep.handler.__name__) for dep, _ in group]
    return {(layer, reads) for layer, reads in layers if isinstance(layer, LAYERS)}


def groups_of(model):
    return list(traced(model).get_all_groups(root_module_types=[nn.Conv2d]))


def writers(group):
    return [layer for layer, reads in members(group) if isinstance(layer, nn.Conv2d) and not reads]


def ours(model, name):
    layers = [layer for layer in model.modules() if isinstance(layer, LAYERS)]
    reading = {(a, True) for a in layers if a.in_group == name and not isinstance(a, nn.BatchNorm2d)}
    return reading | {(a, False) for a in layers if a.out_group == name}


def test_the_same_channels_are_coupled(model):
    found = [members(group) for group in groups_of(model)]
    for name in networks.channel_groups(model):
        assert found.count(ours(model, name)) == 1
    # What is left are the streams that padding joins to one another: for torch-pruning one group.
    joined = set().union(*(ours(model, name) for name in model.coupled_groups))
    assert [group for group in found if group & joined] == ([joined] if joined else [])


def test_the_same_network_is_left(model):
    budget = round(0.7 * networks.convolution_cost(model)({}))
    kept = structured.select(structured.filter_l1(model), networks.convolution_cost(model), budget)
    theirs = copy.deepcopy(model)
    graph = traced(theirs)
    for name, channels in kept.items():
        layer = next(m for m in theirs.modules() if isinstance(m, nn.Conv2d) and m.out_group == name)
        gone = sorted(set(range(layer.out_channels)) - set(channels.tolist()))
        if gone:
            graph.get_pruning_group(layer, peer.prune_conv_out_channels, idxs=gone).prune()
    small = structured.shrink(model, kept)
    assert n_parameters(small) < n_parameters(model)
    torch.testing.assert_close(small.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    x = images(4, channels=3, size=16)
    with torch.no_grad():
        torch.testing.assert_close(small(x), theirs(x), rtol=0, atol=0)


def test_the_scores_are_the_same(model):
    """Its "first" looks at one writer; its "mean" also at those who read, so streams are compared by scale alone."""
    norms, scales = structured.filter_l1(model), structured.bn_scale(model)
    first = peer.importance.MagnitudeImportance(p=1, group_reduction="first", normalizer="mean")
    scale = peer.importance.BNScaleImportance(group_reduction="mean", normalizer=None)
    for group in groups_of(model):
        name = writers(group)[0].out_group
        if name in norms and len(writers(group)) == 1:
            torch.testing.assert_close(first(group).double(), norms[name], rtol=1e-5, atol=0)
        if name in scales:
            torch.testing.assert_close(scale(group).double(), scales[name], rtol=1e-5, atol=0)
