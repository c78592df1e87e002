"""Masks: a mask is a parameter name -> bool tensor, True where the weight stays. Exact counts, stated ties.

Sparsity is the fraction of prunable weights removed, prunable are the weights of the convolutions. Round n
removes 20 % of what round n - 1 left, so it stands near 1 - 0.8^n; the count follows the recurrence of
`kept`.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lthlib.core.errors import UserError, suggest
from lthlib.networks.models import macs

Masks = dict[str, Tensor]
RATE = 0.2


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of all convolutions (first one and shortcuts included), in the order of the modules.

    Raises:
        UserError: Where the model has none.
    """
    found = {
        f"{name}.weight" if name else "weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    if not found:
        raise UserError(
            f"{type(model).__name__} has no prunable weights: only the weights of Conv2d layers are pruned, "
            "and it has no such layer."
        )
    return found


# ---------------------------------------------------------------------------- the ladder


def kept(n_weights: int, round: int) -> int:
    """Count the weights left after ``round`` rounds: n -= round(0.2 n), repeated, not n 0.8^round at once.

    Raises:
        UserError: For a round that is not a whole number from 0 on.
    """
    if round != int(round) or round < 0:
        raise UserError(f"A round is a whole number from 0 (dense) on, got {round}.")
    n = n_weights
    for _ in range(int(round)):
        n -= (n + 2) // 5  # round(n / 5): a fifth of a whole number never falls on a half
    return n


def sparsity_of(round: int) -> float:
    """Return the nominal sparsity of a round, 1 - 0.8^round."""
    return 1 - (1 - RATE) ** round


def rounds_of(sparsities: Iterable[float]) -> list[int]:
    """Return the round nearest to each sparsity.

    Args:
        sparsities: Fractions of weights removed, in [0, 1), each within half a percentage point of the
        ladder.

    Raises:
        UserError: For a value outside [0, 1) or off the ladder, with the nearest values allowed.
    """
    return [_round_of(s) for s in sparsities]


def _round_of(sparsity: float) -> int:
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1:
        raise UserError(
            f"A sparsity is the fraction of weights removed, at least 0 and below 1; got {sparsity!r}."
            + (f" Did you mean {sparsity / 100:g}?" if _is_percent(sparsity) else "")
        )
    low = math.floor(math.log1p(-sparsity) / math.log(1 - RATE))
    nearest = min((low, low + 1), key=lambda n: abs(sparsity_of(n) - sparsity))
    if abs(sparsity_of(nearest) - sparsity) > 0.005:
        raise UserError(
            f"Sparsity {sparsity:g} is not on the ladder 1 - 0.8^n. The nearest allowed are "
            f"{sparsity_of(low):.4f} (round {low}) and {sparsity_of(low + 1):.4f} (round {low + 1})."
        )
    return nearest


def _is_percent(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 1 < value < 100


# ---------------------------------------------------------------------------- exact selection

_CHUNK = 1 << 17
_KINDS = {torch.float32: (np.float32, np.int32), torch.float64: (np.float64, np.int64)}


def keep_top(scores: Mapping[str, Tensor], n_keep: int, within: Masks | None = None) -> Masks:
    """Keep exactly the ``n_keep`` highest scores over all layers together.

    Equal scores: the earlier layer stays, and in a layer the lower flat index. The threshold is found by
    radix selection on the float's bits, 16 at a time, chunk by chunk: nothing is concatenated, sorted or
    copied.

    Args:
        scores: Name -> float tensor, one type for all; higher is better; -0.0 equals 0.0.
        n_keep: How many to keep.
        within: Choose only among the weights kept here; among all if None.

    Returns:
        Name -> bool tensor of the score's shape, with ``n_keep`` True in total.

    Raises:
        UserError: For a score that is not finite (names the layer), or fewer than ``n_keep`` candidates.
    """
    _check_scores(scores)
    if within is not None:
        _check_same(within, scores)
    candidates = sum(s.numel() for s in scores.values()) if within is None else n_kept(within)
    if not 0 <= n_keep <= candidates:
        raise UserError(f"Cannot keep {n_keep} weights: there are {candidates} to choose from.")
    if n_keep == 0:
        return {name: torch.zeros(s.shape, dtype=torch.bool, device=s.device) for name, s in scores.items()}
    threshold, ties = _select(scores, n_keep, within)
    masks = {}
    for name, score in scores.items():
        masks[name], ties = _above(score, threshold, ties, None if within is None else within[name])
    return masks


def _select(scores: Mapping[str, Tensor], n_keep: int, within: Masks | None) -> tuple[float, int]:
    """Return the ``n_keep``-th highest score, and how many of the scores equal to it are among the kept."""
    real, kind = _KINDS[next(iter(scores.values())).dtype]
    prefix, left = None, n_keep
    for shift in range(np.iinfo(kind).bits - 16, -1, -16):
        counts = _histogram(scores, within, kind, shift, prefix)
        from_above = counts[::-1].cumsum()
        digit = 0xFFFF - int(np.searchsorted(from_above, left))
        left -= int(counts[digit + 1 :].sum())
        prefix = digit - 0x8000 if prefix is None else prefix << 16 | digit
    return _flip(np.array(prefix, dtype=kind)).view(real).item(), left


def _histogram(
    scores: Mapping[str, Tensor], within: Masks | None, kind: type, shift: int, prefix: int | None
) -> np.ndarray:
    """Count the 16-bit digits at ``shift`` of all keys whose higher digits are ``prefix``."""
    counts = np.zeros(1 << 16, dtype=np.int64)
    for name, score in scores.items():
        for part, inside in _chunks(score, None if within is None else within[name]):
            keys = _flip((part + 0.0).view(kind))  # + 0.0 makes -0.0 and 0.0 one key
            if inside is not None:
                keys = keys[inside]
            if prefix is None:  # the leading digit carries the sign
                digits = (keys >> shift) + 0x8000
            else:
                digits = (keys[keys >> (shift + 16) == prefix] >> shift) & 0xFFFF
            counts += np.bincount(digits, minlength=1 << 16)
    return counts


def _flip(bits: np.ndarray) -> np.ndarray:
    """Map the bits of floats to integers of the same order, and back."""
    info = np.iinfo(bits.dtype)
    return bits ^ ((bits >> (info.bits - 1)) & info.max)


def _above(score: Tensor, threshold: float, ties: int, inside: Tensor | None) -> tuple[Tensor, int]:
    """Keep scores above the threshold and the first ``ties`` equal to it; return the ties still to keep."""
    mask = torch.empty(score.shape, dtype=torch.bool)
    for (part, within), out in zip(_chunks(score, inside), mask.view(-1).split(_CHUNK), strict=True):
        keep, equal = part > threshold, part == threshold
        if within is not None:
            keep &= within
            equal &= within
        if ties:
            places = np.flatnonzero(equal)[:ties]
            keep[places] = True
            ties -= len(places)
        out.copy_(torch.from_numpy(keep))
    return mask.to(score.device), ties


def _chunks(tensor: Tensor, other: Tensor | None):
    """Yield both tensors as arrays of at most ``_CHUNK`` entries, in the order of the flat index.

    NumPy's work is that of one thread: threads that meet after each of so many small steps cost more than they bring.
    """
    flat = tensor.detach().reshape(-1).split(_CHUNK)
    second = [None] * len(flat) if other is None else other.reshape(-1).split(_CHUNK)
    for part, inside in zip(flat, second, strict=True):
        yield part.cpu().numpy(), None if inside is None else inside.cpu().numpy()


def _check_scores(scores: Mapping[str, Tensor]) -> None:
    kinds = {s.dtype for s in scores.values()}
    if len(kinds) != 1 or not kinds <= set(_KINDS):
        got = ", ".join(sorted(map(str, kinds))) or "no scores"
        raise UserError(f"Scores have to be all float32 or all float64, got {got}.")
    for name, score in scores.items():
        if score.numel() and not all(map(math.isfinite, torch.aminmax(score.detach()))):
            bad = int((~torch.isfinite(score)).sum())
            raise UserError(
                f"{bad} of {score.numel()} scores of layer {name!r} are not finite: compute them in float64, "
                "or look for an infinite loss or weight."
            )


def keep_top_per_layer(scores: Mapping[str, Tensor], n_keep_by_layer: Mapping[str, int]) -> Masks:
    """Keep the highest scores of each layer, as many as ``n_keep_by_layer`` says; ties as in `keep_top`.

    Raises:
        UserError: As `keep_top` does, and for a count without scores or the reverse.
    """
    _check_names(n_keep_by_layer, scores)
    return {name: keep_top({name: s}, n_keep_by_layer[name])[name] for name, s in scores.items()}


# ---------------------------------------------------------------------------- densities by layer


def erk_densities(shapes: Mapping[str, Sequence[int]], density: float) -> dict[str, float]:
    """Return the Erdos-Renyi-kernel density of each layer: eps * sum(shape) / prod(shape), at most 1.

    eps is the same for every layer that is not full, and such that ``density`` of all weights stays; layers
    that would pass 1 are made dense and eps is solved for again (Evci et al. 2020, rigl/sparse_utils.py).

    Args:
        shapes: Name -> shape of the weight, here (out, in, height, width).
        density: Fraction of all weights to keep, in [0, 1].
    """
    if not 0 <= density <= 1:
        raise UserError(f"A density is a fraction of weights kept, from 0 to 1; got {density}.")
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: sum(shape) / size[name] for name, shape in shapes.items()}
    budget = density * sum(size.values())
    full: set[str] = set()
    while len(full) < len(raw):
        room = budget - sum(size[name] for name in full)
        eps = room / sum(raw[name] * size[name] for name in raw if name not in full)
        highest = max(raw[name] for name in raw if name not in full)
        if eps * highest <= 1:
            return {name: 1.0 if name in full else eps * raw[name] for name in raw}
        full |= {name for name in raw if raw[name] == highest}
    return dict.fromkeys(raw, 1.0)


def erk_counts(shapes: Mapping[str, Sequence[int]], n_keep: int) -> dict[str, int]:
    """Return how many weights each layer keeps under `erk_densities`, in total exactly ``n_keep``.

    No count grows when ``n_keep`` falls, so rounds can nest.
    """
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    densities = erk_densities(shapes, _fraction(n_keep, sum(size.values())))
    shares = {name: sum(shape) for name, shape in shapes.items()}
    return _apportion({name: densities[name] * size[name] for name in size}, shares, size, n_keep)


def uniform_counts(shapes: Mapping[str, Sequence[int]], n_keep: int, full: Sequence[str] = ()) -> dict[str, int]:
    """Return how many weights each layer keeps at one density for all, in total exactly ``n_keep``.

    No count grows when ``n_keep`` falls, so rounds can nest.

    Args:
        shapes: Name -> shape of the weight.
        n_keep: Weights to keep.
        full: Layers that stay dense; the others share what is left.

    Raises:
        UserError: Where the full layers alone have more than ``n_keep`` weights.
    """
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    _fraction(n_keep, sum(size.values()))
    counts = {name: size[name] for name in full}
    room = n_keep - sum(counts.values())
    if room < 0:
        raise UserError(
            f"{', '.join(map(repr, full))} alone has {n_keep - room} weights, but only {n_keep} may stay: "
            "choose a lower sparsity or let the first layer be pruned too."
        )
    rest = {name: n for name, n in size.items() if name not in counts}
    share = _fraction(room, sum(rest.values()))
    counts |= _apportion({name: share * n for name, n in rest.items()}, rest, rest, room)
    return {name: counts[name] for name in shapes}


def _fraction(n_keep: int, total: int) -> float:
    if not 0 <= n_keep <= total:
        raise UserError(f"Cannot keep {n_keep} weights of {total}.")
    return n_keep / total if total else 0.0


def _apportion(
    targets: Mapping[str, float], shares: Mapping[str, int], size: Mapping[str, int], total: int
) -> dict[str, int]:
    """Round targets, proportional to ``shares`` below ``size``, to whole numbers of sum ``total``.

    Each seat goes to the layer with the smallest (count + 1/2) / share (Webster's method). Unlike largest
    remainders it never takes a weight from one layer because another total grew.
    """
    counts = {name: max(0, min(math.floor(t), size[name]) - len(targets)) for name, t in targets.items()}
    queue = [
        (Fraction(2 * counts[name] + 1, shares[name]), i, name)
        for i, name in enumerate(targets)
        if counts[name] < size[name]
    ]
    heapq.heapify(queue)
    for _ in range(total - sum(counts.values())):
        _, i, name = heapq.heappop(queue)
        counts[name] += 1
        if counts[name] < size[name]:
            heapq.heappush(queue, (Fraction(2 * counts[name] + 1, shares[name]), i, name))
    return counts


# ---------------------------------------------------------------------------- using masks


def dense(model: nn.Module) -> Masks:
    """Return masks that keep every prunable weight."""
    return {name: torch.ones(w.shape, dtype=torch.bool, device=w.device) for name, w in prunable(model).items()}


def apply_(model: nn.Module, masks: Masks) -> None:
    """Set the pruned weights of ``model`` to zero, in place.

    Raises:
        UserError: Where the masks do not fit, see `check_fits`.
    """
    check_fits(model, masks)
    with torch.no_grad():
        for name, weight in prunable(model).items():
            weight.masked_fill_(~masks[name].to(weight.device), 0.0)


def n_kept(masks: Masks) -> int:
    """Count the weights kept."""
    return sum(int(mask.count_nonzero()) for mask in masks.values())


def density(masks: Masks) -> float:
    """Return the fraction of weights kept, over all layers together."""
    return n_kept(masks) / sum(mask.numel() for mask in masks.values())


def density_by_layer(masks: Masks) -> dict[str, float]:
    """Return the fraction of weights kept in each layer."""
    return {name: int(mask.count_nonzero()) / mask.numel() for name, mask in masks.items()}


def jaccard(first: Masks, second: Masks) -> float:
    """Return the overlap of two masks: weights kept by both over weights kept by either, in [0, 1].

    Raises:
        UserError: Where they are masks of different networks.
    """
    _check_same(first, second)
    both = sum(int((first[name] & second[name]).count_nonzero()) for name in first)
    return _ratio(both, n_kept(first) + n_kept(second) - both)


def chance_jaccard(first: Masks, second: Masks) -> float:
    """Return the overlap that two masks would have whose layers keep as many weights as these, at random places.

    In a layer of n weights of which the masks keep a and b, a b / n are expected to be kept by both
    (hypergeometric law). The ratio is taken of the expected counts; for layers of thousands of weights it is the
    expected ratio too.

    Raises:
        UserError: Where they are masks of different networks.
    """
    _check_same(first, second)
    both = sum(
        int(mask.count_nonzero()) * int(second[name].count_nonzero()) / mask.numel() for name, mask in first.items()
    )
    return _ratio(both, n_kept(first) + n_kept(second) - both)


def _ratio(both: float, either: float) -> float:
    return both / either if either else 1.0


def shuffle_within_layers(masks: Masks, seed: int) -> Masks:
    """Return masks with the same count in each layer, at places drawn anew; depends on ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = {}
    for name, mask in masks.items():
        order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
        shuffled[name] = mask.reshape(-1)[order].view(mask.shape)
    return shuffled


def check_fits(model: nn.Module, masks: Masks) -> None:
    """Raise `UserError`, naming the layer, unless there is a bool mask of the same shape for each weight."""
    _check_same(masks, prunable(model))


def _check_same(masks: Masks, tensors: Mapping[str, Tensor]) -> None:
    _check_names(masks, tensors)
    for name, mask in masks.items():
        if mask.dtype != torch.bool:
            raise UserError(f"The mask of layer {name!r} is {mask.dtype}: make it bool, True where a weight stays.")
        if mask.shape != tensors[name].shape:
            raise UserError(
                f"The mask of layer {name!r} has shape {tuple(mask.shape)}, its weight "
                f"{tuple(tensors[name].shape)}: the mask belongs to another architecture or width."
            )


def _check_names(given: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    for name in given:
        if name not in wanted:
            raise UserError(f"There is a mask for {name!r}, but no such prunable weight.{suggest(name, wanted)}")
    for name in wanted:
        if name not in given:
            raise UserError(f"There is no mask for layer {name!r}: the masks belong to another architecture.")


def check_no_empty_layer(masks: Masks, *, allow: bool = False) -> list[str]:
    """Return the layers without any weight left.

    Args:
        masks: Of one network.
        allow: Whether a single empty layer is a finding (it is recorded) or an error. No weight at all is
        always one.

    Raises:
        UserError: For a layer (or a network) left empty, with the way out.
    """
    empty = [name for name, mask in masks.items() if not mask.any()]
    if len(empty) == len(masks):
        raise UserError("The masks leave no weight at all: choose a lower sparsity.")
    if empty and not allow:
        raise UserError(
            f"The masks leave layer {empty[0]!r} empty ({len(empty)} of {len(masks)} layers): choose "
            "a lower sparsity, or a method that gives every layer its share (rp-layerwise, rp-erk)."
        )
    return empty


def save(masks: Masks, path: str | Path) -> None:
    """Write masks to a safetensors file."""
    tensors = {name: mask.contiguous().cpu() for name, mask in masks.items()}
    Path(path).write_bytes(safetensors.torch.save(tensors))  # unlike save_file, says OSError where the disk is full


def load(path: str | Path) -> Masks:
    """Read the masks that `save` wrote; the layers come in the order of the file, sorted by name.

    Raises:
        UserError: For a file that is missing or damaged.
    """
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


def unpack(data: bytes, shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, Tensor], Masks]:
    """Return the state (zero where pruned) and the masks that `pack` stored; ``shapes`` by parameter name."""
    packed = safetensors.torch.load(data)
    state = {name: tensor for name, tensor in packed.items() if not name.endswith((":bits", ":kept"))}
    masks: Masks = {}
    for name in (n.removesuffix(":bits") for n in packed if n.endswith(":bits")):
        bits = np.unpackbits(packed[f"{name}:bits"].numpy(), count=math.prod(shapes[name]))
        masks[name] = torch.from_numpy(bits).bool().view(tuple(shapes[name]))
        values = packed[f"{name}:kept"]
        state[name] = torch.zeros(tuple(shapes[name]), dtype=values.dtype).masked_scatter_(masks[name], values)
    return state, masks
