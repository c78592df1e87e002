"""Pruning any torch network: `prune`, `apply`, `scores` and `sparsity`, for networks that are nobody's ticket."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from lthlib.core import machine
from lthlib.core.errors import UserError
from lthlib.networks.checks import check_shape, copied
from lthlib.pruning import masks as masking
from lthlib.pruning.masks import Masks
from lthlib.pruning.registry import METHODS, SOURCES, Found, Method, Moment

Batch = tuple[Tensor, Tensor]


def prune(
    net: nn.Module,
    method: str,
    *,
    sparsity: float,
    batch: Batch | None = None,
    prunable: str | Iterable[str] = "conv",
    seed: int = 0,
    **options,
) -> Masks:
    """Return the masks that a method finds for a network, which is left as it was.

    Args:
        net: Any network from images to logits. Its weights as they are now are looked at: initial ones for SNIP, GraSP
            and SynFlow as published, trained ones for OMP.
        method: A name in `METHODS` that needs no training: "rp", "rp-layerwise", "rp-erk", "omp", "snip", "grasp" or
            "synflow".
        sparsity: Fraction of the prunable weights to remove, in [0, 1); of N, N - round(sparsity N) stay, exactly.
        batch: Images as the network takes them, and labels (N,). All of them are used: SNIP in one pass, GraSP sorted
            by class and in two halves; SynFlow looks at the images' shape alone, the others at nothing.
        prunable: "conv", "linear", "all", or the names of parameters; the rest stays dense.
        seed: Of whatever is drawn (random scores, GraSP's linear layers, dropout).
        **options: Of the method, see its page. GraSP: ``reinit_linear=False`` takes linear layers that are not
            pruned as they are, ``with_linear=False`` leaves them out of gradient and Hessian as well.

    Returns:
        Name of the weight -> bool tensor on its device, True where it stays.
    """
    masking.check_sparsity(sparsity)
    return _run(net, method, sparsity, batch, prunable, seed, options).masks


def scores(
    net: nn.Module,
    method: str,
    *,
    batch: Batch | None = None,
    prunable: str | Iterable[str] = "conv",
    seed: int = 0,
    **options,
) -> dict[str, Tensor]:
    """Return the number by which a method ranks each prunable weight; the highest stay. Arguments as for `prune`.

    OMP: ``|w|``; SNIP: ``|w dL/dw|``; GraSP: ``w * Hg``; SynFlow: ``|w| dR/d|w|`` of its first round, in float64;
    random methods: uniform numbers in [0, 1). Those of rp-layerwise and rp-erk are compared within each layer, all
    others over all.
    """
    found = _run(net, method, 0.0, batch, prunable, seed, options)
    return {name: score.detach() for name, score in found.scores.items()}


def apply(net: nn.Module, masks: Masks) -> ExitStack:
    """Set the pruned weights of a network to zero, in place, and hold them there while it trains.

    Their gradients are set to zero, so that optimizers leave them at zero, with weight decay too, if they are made
    after this call (a momentum from before would move them). A copy of the network has to be given its masks again.
    What is returned holds them; its ``close()`` lets them go.
    """
    masking.apply_(net, masks)
    held = ExitStack()
    for name, weight in masking.weights_of(net, masks).items():
        keep, trains = masks[name].clone(), weight.requires_grad
        weight.requires_grad_(True)  # a frozen layer may thaw, and takes no hook before
        hook = weight.register_hook(lambda gradient, keep=keep: gradient.masked_fill(~keep.to(gradient.device), 0.0))
        weight.requires_grad_(trains)
        held.callback(hook.remove)
    return held


def sparsity(net_or_masks: nn.Module | Mapping[str, Tensor], prunable: str | Iterable[str] = "conv") -> float:
    """Return the fraction of weights removed: of masks, or the share of exact zeros in a network's prunable weights."""
    if isinstance(net_or_masks, nn.Module):
        net_or_masks = {name: weight.detach() for name, weight in masking.prunable(net_or_masks, prunable).items()}
    kept = sum(int(tensor.count_nonzero()) for tensor in net_or_masks.values())
    return 1 - kept / sum(tensor.numel() for tensor in net_or_masks.values())


def _run(
    net: nn.Module,
    method: str,
    sparsity: float,
    batch: Batch | None,
    prunable: str | Iterable[str],
    seed: int,
    options: Mapping[str, object],
) -> Found:
    """Run a method on a copy of the network, and on the caller's batch whatever it asks for."""
    entry = METHODS[method]
    if reason := _needs_training(entry):
        raise UserError(
            f"{entry.title} {reason}: describe it as a ticket and obtain that, "
            f'lthlib.obtain(lthlib.Ticket(method="{method}", ...), lthlib.Store()).'
        )
    for name in {"batch", "samples_per_class"} & set(options):
        raise UserError(
            f"All images of batch=(x, y) are used, so {name} cannot be chosen here: give as many as you want."
        )
    prunable = prunable if isinstance(prunable, str) else tuple(prunable)  # it is gone through twice
    for name, weight in masking.prunable(net, prunable).items():
        if not isinstance(weight, nn.Parameter):
            raise UserError(
                f"{name!r} is computed from other parameters: make it permanent first, by torch.nn.utils.prune.remove "
                "or torch.nn.utils.parametrize.remove_parametrizations."
            )
    net = copied(net).requires_grad_(True)
    if not {p.dtype for p in net.parameters()} <= {torch.float32, torch.float64}:
        net.float()
    net.register_forward_hook(lambda _, inputs, output: check_shape(output, len(inputs[0])))
    masks = masking.dense(net, prunable)
    n = sum(mask.numel() for mask in masks.values())
    weight = next(iter(masking.weights_of(net, masks).values()))

    def given(n: int | None = None, *, per_class: int | None = None) -> Batch:
        if batch is None:
            raise UserError(f"{entry.title} needs batch=(images, labels)" + (", for their shape." if n == 1 else "."))
        images, labels = batch
        if not len(images) == labels.numel() > 0 or labels.dim() != 1 or labels.is_floating_point():
            raise UserError(
                f"batch has {len(images)} images and labels of shape {tuple(labels.shape)}, {labels.dtype}: give one "
                "whole number per image."
            )
        return images.to(weight.device, weight.dtype), labels.to(weight.device, torch.long)

    moment = Moment(
        model=net,
        masks=masks,
        n_keep=n - round(sparsity * n),
        round=0,
        seed=seed,
        batch=given,
        options={**entry.options, **options},
        density=1 - sparsity,
    )
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []), machine.one_thread():
        torch.manual_seed(seed)
        return entry.run(moment)


def _needs_training(entry: Method) -> str:
    """Say why a method cannot look at a network as it is, in words that follow its title; nothing if it can."""
    if entry.during is not None:
        return "moves its masks while the network trains"
    if entry.family == "structured":
        return "makes a smaller network of its own, not masks"
    if entry.source == "previous":
        return "trains the network again between its rounds"
    if entry.source not in SOURCES:
        return f"starts from the masks of {METHODS[entry.source].title}"
    return "removes nothing" if entry.family == "dense" else ""
