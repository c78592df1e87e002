"""Structured pruning: whole channels go, and the network that is left is dense and smaller.

A channel of a residual stream is written by several layers and read by several; it can only go from all of them at
once. The channel groups of `networks` say which layers these are, as dependency graphs do for arbitrary networks (Fang
et al. 2023). The score of a channel is the mean over the layers that write the group:

* ``filter-l1`` (Li et al. 2017): the sum of ``|w|`` of the filter, divided by the layer's mean, so that layers with
  many inputs do not win for being wide.
* ``slimming`` (Liu et al. 2017): ``|gamma|`` of the batch normalisation, in a dense run of its own that has an L1
  penalty on gamma (option ``bn_l1``). That run chooses the channels and nothing else: the smaller network starts from
  the rewind point that all methods share, and is trained without the penalty, as published.

The rule: channels are ranked over all groups together and the lowest go, until the prunable weights are ``n_keep`` or
fewer; then those gone are put back, best first, where the budget allows. The best channel of a group never goes.
``filter-l1-macs`` and ``slimming-macs`` count in multiply-accumulates instead, and may keep as many as OMP's mask of
the same round keeps. That is a larger share than it keeps of the weights: those of early layers are used at more
positions, and more of them stay. Weights fall as the square of the channels.

Known pitfall: networks with padding shortcuts keep their streams whole, which bounds the sparsity they can reach (the
error says where).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lthlib.core.errors import UserError, choose
from lthlib.networks import channel_groups, convolution_cost, macs, rebuild, spec_of
from lthlib.pruning import masks as masking
from lthlib.pruning.magnitude import magnitudes
from lthlib.pruning.registry import Found, Moment, Option, method

Channels = dict[str, Tensor]


def filter_l1(model: nn.Module) -> Channels:
    """Return the score of each channel by group: L1 norm of its filters, over the layer's mean."""

    def norm(layer: nn.Module) -> Tensor:
        total = layer.weight.detach().abs().sum((1, 2, 3), dtype=torch.float64)
        return total / total.mean().clamp_min(torch.finfo(total.dtype).tiny)

    return _mean_over_writers(model, nn.Conv2d, norm)


def bn_scale(model: nn.Module) -> Channels:
    """Return the score of each channel by group: ``|gamma|`` of its batch normalisations."""
    return _mean_over_writers(model, nn.BatchNorm2d, lambda layer: layer.weight.detach().double().abs())


def _mean_over_writers(model: nn.Module, kind: type[nn.Module], score: Callable[[nn.Module], Tensor]) -> Channels:
    scores = {}
    for group in channel_groups(model):
        layers = [m for m in model.modules() if isinstance(m, kind) and getattr(m, "out_group", None) == group]
        if not layers:
            raise UserError(f"No {kind.__name__} scores the channel group {group!r}: use another structured method.")
        scores[group] = torch.stack([score(layer) for layer in layers]).mean(0)
    return scores


def select(scores: Channels, cost: Callable[[Mapping[str, int]], int], budget: int) -> Channels:
    """Return the channels to keep, by the rule of this module: sorted indices, at least one in each group.

    ``cost`` takes channels per group to a number that falls with each channel; that of those kept is at most
    ``budget``. Ties keep the earlier group, then the lower channel. `UserError` for a score that is not finite, or
    where one channel per group is already too much.
    """
    for group, values in scores.items():
        if not values.isfinite().all():
            raise UserError(f"The channel scores of group {group!r} are not finite: look for infinite weights.")
    full = {group: len(values) for group, values in scores.items()}
    least = cost(dict.fromkeys(full, 1))
    if least > budget:
        raise UserError(
            f"With one channel in each of its {len(full)} prunable groups this network still costs {least}, more than "
            f"the {budget} allowed: choose a lower sparsity."
        )
    sizes, removed = dict(full), []
    for group, channel in _removal_order(scores):
        if cost(sizes) <= budget:
            break
        sizes[group] -= 1
        removed.append((group, channel))
    hopeless = set()  # a group whose next channel did not fit will not fit later, as costs only rise
    gone = {group: set() for group in scores}
    for group, channel in reversed(removed):
        if group not in hopeless and cost(sizes | {group: sizes[group] + 1}) <= budget:
            sizes[group] += 1
        else:
            hopeless.add(group)
            gone[group].add(channel)
    return {group: torch.tensor([c for c in range(n) if c not in gone[group]]) for group, n in full.items()}


def _removal_order(scores: Channels) -> list[tuple[str, int]]:
    """List the channels from the lowest score up, without the best of each group."""
    ranked = []
    for i, (group, values) in enumerate(scores.items()):
        numbers = values.tolist()
        best = max(range(len(numbers)), key=lambda c: (numbers[c], -c))
        ranked += [(numbers[c], -i, -c, group) for c in range(len(numbers)) if c != best]
    return [(group, -c) for _, _, c, group in sorted(ranked)]


def shrink(model: nn.Module, kept_channels: Channels) -> nn.Module:
    """Return the network without the other channels: dense, smaller, with the weights of those kept.

    In evaluation mode its outputs equal those of ``model`` with the filters, gamma and beta of the others at zero.
    Groups left out are kept whole. `UserError` for a group that does not exist, or indices that do not fit it.
    """
    _check_channels(model, kept_channels)
    old = dict(model.named_modules())
    sizes = dict(spec_of(model).channels or {}) | {g: len(kept) for g, kept in kept_channels.items()}
    small = rebuild(model, sizes)
    reference = next(model.parameters())
    small.to(device=reference.device, dtype=reference.dtype)
    for name, layer in small.named_modules():
        layer.training = old[name].training
        if isinstance(layer, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            _copy_kept_(layer, old[name], kept_channels)
    return small


def _copy_kept_(layer: nn.Module, source: nn.Module, kept_channels: Channels) -> None:
    reads = isinstance(layer, (nn.Conv2d, nn.Linear))
    state = {}
    for name, tensor in source.state_dict().items():
        if tensor.dim() > 0 and layer.out_group in kept_channels:
            tensor = tensor.index_select(0, kept_channels[layer.out_group].to(tensor.device))
        if tensor.dim() > 1 and reads and layer.in_group in kept_channels:
            tensor = tensor.index_select(1, kept_channels[layer.in_group].to(tensor.device))
        state[name] = tensor
    layer.load_state_dict(state)


def _check_channels(model: nn.Module, kept_channels: Channels) -> None:
    sizes = channel_groups(model)
    for group, kept in kept_channels.items():
        choose(group, sizes, "prunable channel group")
        indices = kept.tolist()
        if not indices or indices != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < sizes[group]:
            raise UserError(
                f"The channels kept of group {group!r} have to be different, sorted, and from 0 to "
                f"{sizes[group] - 1}, at least one; got {indices[:5]}{'...' if len(indices) > 5 else ''}."
            )


def macs_budget(moment: Moment) -> tuple[Callable[[Mapping[str, int]], int], int]:
    """Return the cost of channel counts in multiply-accumulates of one image, and the cost allowed.

    Allowed is what the one-shot magnitude mask of as many weights (`magnitude.omp`) keeps of them.
    """
    model = moment.model
    spec = spec_of(model)
    shape = (spec.in_channels, spec.image_size, spec.image_size)
    sizes = {name: layer.weight.numel() for name, layer in model.named_modules() if hasattr(layer, "out_group")}
    uses = {name: total // sizes[name] for name, total in macs(model, shape).items()}
    mask = masking.keep_top(magnitudes(moment), moment.n_keep)
    allowed = masking.sparse_macs(model, shape, mask)
    return convolution_cost(model, uses), round(allowed)


STRUCTURED = {"start": "rewind", "source": "dense", "family": "structured"}
SLIMMING = {
    **STRUCTURED,
    "reference": "liu2017learning",
    "options": {"bn_l1": Option(1e-4, least=0)},
    "source_recipe": ("bn_l1",),
}


@method("filter-l1", title="Filter L1", reference="li2017pruning", **STRUCTURED)
def find_filter_l1(moment: Moment) -> Found:
    """Keep the channels whose filters have the largest L1 norms, as many weights as the sparse networks."""
    model = moment.model
    return Found(kept_channels=select(filter_l1(model), convolution_cost(model), moment.n_keep))


@method("filter-l1-macs", title="Filter L1, by MACs", reference="li2017pruning", **STRUCTURED)
def find_filter_l1_macs(moment: Moment) -> Found:
    """Keep the channels whose filters have the largest L1 norms, as many multiply-accumulates as OMP's mask."""
    return Found(kept_channels=select(filter_l1(moment.model), *macs_budget(moment)))


@method("slimming", title="Slimming", **SLIMMING)
def find_slimming(moment: Moment) -> Found:
    """Keep the channels with the largest ``|gamma|``, as many weights as the sparse networks.

    Options: ``bn_l1``, the L1 penalty on gamma in the dense run that is looked at (published: 1e-4 for VGG, 1e-5
    for others); 0 is the common dense run.
    """
    model = moment.model
    return Found(kept_channels=select(bn_scale(model), convolution_cost(model), moment.n_keep))


@method("slimming-macs", title="Slimming, by MACs", **SLIMMING)
def find_slimming_macs(moment: Moment) -> Found:
    """Keep the channels with the largest ``|gamma|``, as many multiply-accumulates as OMP's mask.

    Options: ``bn_l1`` as in ``slimming``.
    """
    return Found(kept_channels=select(bn_scale(moment.model), *macs_budget(moment)))
