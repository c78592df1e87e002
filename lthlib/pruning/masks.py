"""Masks: a mask is a parameter name -> bool tensor, True where the weight stays. Exact counts, stated ties.

Sparsity is the fraction of prunable weights removed; prunable are the weights of the convolutions, unless said
otherwise. Round n removes 20 % of what round n - 1 left, so it stands near 1 - 0.8^n; the count follows the recurrence
of `kept`. Masks that do not fit a network, or one another, raise `UserError` that names the layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lthlib.core.errors import UserError, choose, suggest
from lthlib.networks.groups import macs

Masks = dict[str, Tensor]
RATE = 0.2
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PRUNABLE = {"conv": CONVOLUTIONS, "linear": (nn.Linear,), "all": (*CONVOLUTIONS, nn.Linear)}


def prunable(model: nn.Module, which: str | Iterable[str] = "conv") -> dict[str, Tensor]:
    """Return the weights that may be pruned, in the order of the modules; one that layers share comes once.

    ``which`` is "conv" (all convolutions, first one and shortcuts included), "linear", "all" (both), or the names of
    parameters. `UserError` where there are none, or no parameter of a given name.
    """
    if isinstance(which, str):
        choose(which, PRUNABLE, "kind of prunable weights")
        layers = ((name, m) for name, m in model.named_modules() if isinstance(m, PRUNABLE[which]))
        weights = {f"{name}.weight".removeprefix("."): layer.weight for name, layer in layers}
    else:
        parameters, weights = dict(model.named_parameters(remove_duplicate=False)), {}
        for name in which:
            choose(name, parameters, "parameter")
            weights[name] = parameters[name]
    if not weights:
        raise UserError(
            f"{type(model).__name__} has no prunable weights: it has no layer of the kind asked for, {which!r}; "
            f"allowed are {', '.join(PRUNABLE)}, or names of parameters."
        )
    first = {id(weight): name for name, weight in reversed(weights.items())}
    return {name: weight for name, weight in weights.items() if first[id(weight)] == name}


# ---------------------------------------------------------------------------- the ladder


def kept(n_weights: int, round: int) -> int:
    """Count the weights left after a round, from 0 on: n -= round(0.2 n), repeated, not n 0.8^round at once."""
    if round != int(round) or round < 0:
        raise UserError(f"A round is a whole number from 0 (dense) on, got {round}.")
    n = n_weights
    for _ in range(int(round)):
        n -= (n + 2) // 5  # round(n / 5): a fifth of a whole number never falls on a half
    return n


def sparsity_of(round: int) -> float:
    """Return the nominal sparsity of a round, 1 - 0.8^round."""
    return 1 - (1 - RATE) ** round


def check_sparsity(sparsity: object) -> None:
    """Raise `UserError` unless this is a fraction of weights that can be removed, in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        is_percent = isinstance(sparsity, (int, float)) and 1 < sparsity < 100
        raise UserError(
            f"A sparsity is the fraction of weights removed, at least 0 and below 1; got {sparsity!r}."
            + (f" Did you mean {sparsity / 100:g}?" if is_percent else "")
        )


def round_of(sparsity: float) -> int:
    """Return the round nearest to a sparsity, a fraction in [0, 1) within half a percentage point of the ladder.

    `UserError` for a value outside [0, 1) or off the ladder, with the nearest values allowed.
    """
    check_sparsity(sparsity)
    low = math.floor(math.log1p(-sparsity) / math.log(1 - RATE))
    nearest = min((low, low + 1), key=lambda n: abs(sparsity_of(n) - sparsity))
    if abs(sparsity_of(nearest) - sparsity) > 0.005:
        raise UserError(
            f"Sparsity {sparsity:g} is not on the ladder 1 - 0.8^n. The nearest allowed are "
            f"{sparsity_of(low):.4f} (round {low}) and {sparsity_of(low + 1):.4f} (round {low + 1})."
        )
    return nearest


# ---------------------------------------------------------------------------- exact selection


def keep_top(scores: Mapping[str, Tensor], n_keep: int, within: Masks | None = None) -> Masks:
    """Keep exactly the ``n_keep`` highest scores over all layers together, among all or ``within`` masks.

    Equal scores: the earlier layer stays, and in a layer the lower flat index. Scores are all float32 or all float64;
    -0.0 equals 0.0. `UserError` for one that is not finite (names the layer), or fewer than ``n_keep`` candidates.
    """
    _check_scores(scores)
    scores = {name: score.detach().contiguous() for name, score in scores.items()}
    n_candidates = sum(score.numel() for score in scores.values())
    if within is not None:
        _check_same(within, scores)
        if n_kept(within) == n_candidates:
            within = None
        else:
            n_candidates = n_kept(within)
    if not 0 <= n_keep <= n_candidates:
        raise UserError(f"Cannot keep {n_keep} weights: there are {n_candidates} to choose from.")
    if n_keep == 0:
        return {name: torch.zeros_like(score, dtype=torch.bool) for name, score in scores.items()}
    arrays = {name: score.cpu().numpy() for name, score in scores.items()}
    parts = [a.ravel() if within is None else a[within[name].cpu().numpy()] for name, a in arrays.items()]
    candidates = np.concatenate(parts)
    candidates.partition(n_candidates - n_keep)
    threshold = candidates[n_candidates - n_keep].item()
    ties = n_keep - int(np.count_nonzero(candidates[n_candidates - n_keep :] > threshold))
    masks = {}
    for name, score in scores.items():
        mask, equal = score > threshold, score == threshold
        if within is not None:
            mask &= within[name]
            equal &= within[name]
        places = equal.view(-1).nonzero()[:ties, 0]
        mask.view(-1)[places] = True
        ties -= len(places)
        masks[name] = mask
    return masks


def keep_top_per_layer(scores: Mapping[str, Tensor], counts: Mapping[str, int], within: Masks | None = None) -> Masks:
    """Keep the highest scores of each layer, as many as ``counts`` says; otherwise as `keep_top`."""
    return {
        name: keep_top({name: score}, counts[name], None if within is None else {name: within[name]})[name]
        for name, score in scores.items()
    }


def _check_scores(scores: Mapping[str, Tensor]) -> None:
    kinds = {score.dtype for score in scores.values()}
    if len(kinds) != 1 or not kinds <= {torch.float32, torch.float64}:
        got = ", ".join(sorted(map(str, kinds))) or "no scores"
        raise UserError(f"Scores have to be all float32 or all float64, got {got}.")
    for name, score in scores.items():
        if score.numel() and not all(map(math.isfinite, torch.aminmax(score.detach()))):
            bad = int((~torch.isfinite(score)).sum())
            raise UserError(
                f"{bad} of {score.numel()} scores of layer {name!r} are not finite: compute them in float64, "
                "or look for an infinite loss or weight."
            )


# ---------------------------------------------------------------------------- using masks


def dense(model: nn.Module, which: str | Iterable[str] = "conv") -> Masks:
    """Return masks that keep every prunable weight."""
    return {name: torch.ones_like(w, dtype=torch.bool) for name, w in prunable(model, which).items()}


def weights_of(model: nn.Module, masks: Masks) -> dict[str, nn.Parameter]:
    """Return the parameters that masks are for."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _check_fit(masks, parameters)
    return {name: parameters[name] for name in masks}


def apply_(model: nn.Module, masks: Masks) -> None:
    """Set the pruned weights of ``model`` to zero, in place."""
    with torch.no_grad():
        for name, weight in weights_of(model, masks).items():
            weight.masked_fill_(~masks[name].to(weight.device), 0.0)


def n_kept(masks: Masks) -> int:
    """Count the weights kept."""
    return sum(int(mask.count_nonzero()) for mask in masks.values())


def density_by_layer(masks: Masks) -> dict[str, float]:
    """Return the fraction of weights kept in each layer."""
    return {name: int(mask.count_nonzero()) / mask.numel() for name, mask in masks.items()}


def jaccard(first: Masks, second: Masks) -> float:
    """Return the overlap of two masks: weights kept by both over weights kept by either, in [0, 1]."""
    _check_same(first, second)
    both = sum(int((first[name] & second[name]).count_nonzero()) for name in first)
    return _overlap(both, first, second)


def chance_jaccard(first: Masks, second: Masks) -> float:
    """Return the overlap that two masks would have whose layers keep as many weights as these, at random places.

    In a layer of n weights of which the masks keep a and b, a b / n are expected to be kept by both (hypergeometric
    law). The ratio is taken of the expected counts; for layers of thousands of weights it is the expected ratio too.
    """
    _check_same(first, second)
    density = density_by_layer(second)
    return _overlap(sum(int(mask.count_nonzero()) * density[name] for name, mask in first.items()), first, second)


def _overlap(both: float, first: Masks, second: Masks) -> float:
    either = n_kept(first) + n_kept(second) - both
    return both / either if either else 1.0


def shuffle_within_layers(masks: Masks, seed: int) -> Masks:
    """Return masks with the same count in each layer, at places drawn anew; depends on ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = {}
    for name, mask in masks.items():
        order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
        shuffled[name] = mask.reshape(-1)[order].view(mask.shape)
    return shuffled


def _check_fit(masks: Masks, tensors: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        if name not in tensors:
            raise UserError(f"There is a mask for {name!r}, but no such weight.{suggest(name, tensors)}")
        if mask.dtype != torch.bool:
            raise UserError(f"The mask of layer {name!r} is {mask.dtype}: make it bool, True where a weight stays.")
        if mask.shape != tensors[name].shape:
            raise UserError(
                f"The mask of layer {name!r} has shape {tuple(mask.shape)}, its weight "
                f"{tuple(tensors[name].shape)}: the mask belongs to another architecture or width."
            )


def _check_same(masks: Masks, tensors: Mapping[str, Tensor]) -> None:
    _check_fit(masks, tensors)
    for name in tensors:
        if name not in masks:
            raise UserError(f"There is no mask for layer {name!r}: the masks belong to another architecture.")


def save(masks: Masks, path: str | Path) -> None:
    """Write masks to a safetensors file."""
    tensors = {name: mask.contiguous().cpu() for name, mask in masks.items()}
    Path(path).write_bytes(safetensors.torch.save(tensors))  # unlike save_file, says OSError where the disk is full


def load(path: str | Path) -> Masks:
    """Read the masks that `save` wrote; the layers come in the order of the file, sorted by name."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"Cannot read the masks in {path} ({error}): find them again or restore the file.") from error


# ---------------------------------------------------------------------------- cost


def sparse_macs(model: nn.Module, input_shape: Sequence[int], masks: Masks) -> float:
    """Count the multiply-accumulates of one image if pruned weights were skipped; dense kernels skip none."""
    shares = density_by_layer(masks)
    return sum(n * shares.get(f"{layer}.weight", 1.0) for layer, n in macs(model, input_shape).items())


def pack(state: Mapping[str, Tensor], masks: Masks) -> bytes:
    """Return a checkpoint that stores of a masked weight one bit per place and the values kept."""
    packed = {}
    for name, tensor in state.items():
        if name in masks:
            mask = masks[name].cpu()
            packed[f"{name}:bits"] = torch.from_numpy(np.packbits(mask.numpy()))
            packed[f"{name}:kept"] = tensor.cpu()[mask]
        else:
            packed[name] = tensor.cpu().contiguous()
    return safetensors.torch.save(packed)
