"""The spectrum of the weight Hessian: ends by Lanczos, density by quadrature, trace by random probes.

Everything here works with products H v of the true Hessian, so it holds for any network that can be
differentiated twice. The Hessian is M H M seen in the active weights alone: pruned weights add no zeros to
the spectrum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad

from lthlib.core.errors import UserError, choose
from lthlib.metrics.flatness.exact import InputHessian, WeightTrace
from lthlib.metrics.flatness.frozen import (
    Frozen,
    check_finite,
    folded,
    normal_like,
    norms_behind,
    rademacher_like,
    twice_differentiable,
)

TRACE_ESTIMATORS = ("hutchinson", "hutchpp", "xtrace")


class WeightHessian:
    """The Hessian of the mean cross-entropy in the active weights, as a symmetric operator.

    It has ``shape``, ``dtype``, ``device`` and ``@`` with vectors (n,) and matrices (n, k), which is all that
    the estimators of curvlinops ask of an operator.

    Attributes:
        products: How many Hessian-vector products were computed.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        masks: Mapping[str, Tensor] | None = None,
        chunk: int | None = None,
    ):
        """Check the batch; see `Frozen` for the arguments and for what raises `UserError`.

        With ``chunk`` images at a time memory is bounded, and the graph is built anew for every product; None
        keeps one graph of the whole batch, which is faster. Training-mode batch norm needs the whole batch.
        """
        self._start(Frozen(model, images, labels, masks), chunk)

    @classmethod
    def of(cls, frozen: Frozen, chunk: int | None = None) -> WeightHessian:
        """Make the operator of a batch that is checked already."""
        hessian = cls.__new__(cls)
        hessian._start(frozen, chunk)
        return hessian

    def _start(self, frozen: Frozen, chunk: int | None) -> None:
        if chunk is not None and frozen.training and chunk < len(frozen.images):
            raise UserError("A model in training mode is measured on its whole batch: set chunk to None.")
        self.frozen, self.products = frozen, 0
        self.chunk = len(frozen.images) if chunk is None else chunk
        self.active = {name: frozen.masks[name].flatten().nonzero()[:, 0] for name in frozen.masks}
        self.sizes = [frozen.active(name) for name in frozen.weights]
        self._norms = norms_behind(frozen)
        self._graph: tuple[list[Tensor], list[Tensor]] | None = None
        self._first: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n) with n active weights."""
        return sum(self.sizes), sum(self.sizes)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(iter(self.frozen.weights.values())).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.frozen.weights.values())).device

    def __matmul__(self, vectors: Tensor) -> Tensor:
        if vectors.dim() == 1:
            return self._product(vectors)
        return torch.stack([self._product(column) for column in vectors.T], dim=1)

    def shares(self, values: Tensor) -> dict[str, Tensor]:
        """Split a vector over the active weights by parameter: name -> its entries."""
        return dict(zip(self.frozen.weights, values.split(self.sizes), strict=True))

    def weights(self) -> Tensor:
        """Return the active weights as one vector."""
        return self._gather(list(self.frozen.weights.values()))

    def gradient(self) -> Tensor:
        """Return the gradient of the loss in the active weights; where there is one graph, it costs nothing more."""
        total = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        for start in range(0, len(self.frozen.images), self.chunk):
            total += self._gather(self._gradients(start)[1]).detach()
        return total

    def _product(self, vector: Tensor) -> Tensor:
        self.products += 1
        direction, result = self._spread(vector), 0
        for start in range(0, len(self.frozen.images), self.chunk):
            whole = self.chunk >= len(self.frozen.images)
            weights, gradients = self._gradients(start)
            if gradients:
                with twice_differentiable():
                    reached = grad(gradients, weights, direction, retain_graph=whole, materialize_grads=True)
                result = result + self._gather(reached)
        return self._symmetric(vector, result if isinstance(result, Tensor) else torch.zeros_like(vector))

    def _symmetric(self, vector: Tensor, image: Tensor) -> Tensor:
        """Return the image, after a look at u·Hv = v·Hu: PyTorch's second derivatives are not all right.

        Raises:
            UserError: Where that does not hold.
        """
        if self._first is None:
            self._first = vector.detach().clone(), image
        other, its_image = self._first
        size = other.norm() * image.norm() + vector.norm() * its_image.norm()
        if (other @ image - vector @ its_image).abs() > torch.finfo(self.dtype).eps ** 0.5 / 4 * size:
            raise UserError(
                "The products with this network's Hessian are not symmetric, so PyTorch's second derivative of one of "
                "its operations is wrong (as that of weight_norm is: remove_parametrizations() puts plain weights in "
                "its place)."
            )
        return image

    def _gradients(self, start: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return weights and differentiable gradients of one chunk's part of the mean loss."""
        if self._graph is not None:
            return self._graph
        frozen, part = self.frozen, slice(start, start + self.chunk)
        weights = [w.clone().requires_grad_() for w in frozen.weights.values()]
        with torch.enable_grad():
            named = dict(zip(frozen.weights, weights, strict=True))
            logits = check_finite(folded(frozen, self._norms, frozen.images[part], named))
            loss = F.cross_entropy(logits, frozen.labels[part], reduction="sum") / len(frozen.images)
            gradients = list(grad(loss, weights, create_graph=True, materialize_grads=True))
        if self.chunk >= len(frozen.images):
            self._graph = weights, gradients
        return weights, gradients

    def _spread(self, vector: Tensor) -> list[Tensor]:
        full = []
        for (name, weight), part in zip(self.frozen.weights.items(), vector.split(self.sizes), strict=True):
            if name in self.active:
                part = torch.zeros_like(weight).flatten().index_copy(0, self.active[name], part)
            full.append(part.view_as(weight))
        return full

    def _gather(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat(
            [
                tensor.flatten()[self.active[name]] if name in self.active else tensor.flatten()
                for name, tensor in zip(self.frozen.weights, tensors, strict=True)
            ]
        )


# --------------------------------------------------------------------------------------------------- the ends


@dataclass(frozen=True)
class Extremes:
    """The ends of a spectrum, with bounds.

    Attributes:
        largest: The k largest eigenvalues with their sign, descending.
        residuals: ||H v - θ v|| of each: some eigenvalue lies within this distance of it, whatever H is, and none of
            ``largest`` exceeds the true one of its rank.
        error_bounds: min(residual, residual²/gap), the sharper bound of Kato and Temple, with a gap that reaches to
            the nearest end of the other Ritz values' intervals, value ± residual. It holds if every eigenvalue above
            those has shown: the random part of the start vector sees to it that each does in the end, and nothing
            proves that it has by now. Rounding is not in it: in float32 it moves an eigenvalue by some 1e-7 of itself.
        smallest: The smallest eigenvalue found (an upper bound of the true one).
        smallest_residual: Its residual.
        products: Hessian-vector products that it took.
        converged: Whether every error bound is within the tolerance, and every residual within a tenth of its square
            root (else one Ritz value may stand for several eigenvalues, with a small bound between them); also of
            ``smallest`` where it may be the larger in magnitude.
    """

    largest: np.ndarray
    residuals: np.ndarray
    error_bounds: np.ndarray
    smallest: float
    smallest_residual: float
    products: int
    converged: bool

    @property
    def top(self) -> float:
        """The largest eigenvalue, signed: the sharpest upward curvature."""
        return float(self.largest[0])

    @property
    def largest_magnitude(self) -> float:
        """The eigenvalue farthest from 0, with its sign: what power iteration (PyHessian) converges to."""
        return self.smallest if -self.smallest > self.top else self.top


def top_eigenvalues(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: Mapping[str, Tensor] | None = None,
    k: int = 1,
    tolerance: float = 1e-6,
    max_products: int = 80,
    seed: int = 0,
    chunk: int | None = None,
) -> Extremes:
    """Compute the largest eigenvalues of the weight Hessian (lower is flatter) with bounds on their error.

    Lanczos with full reorthogonalisation on M H M, until every wanted eigenvalue's error bound falls below
    ``tolerance`` times the largest magnitude (`Extremes.converged`). It starts near the gradient, which lies for a
    large part in the few sharp directions; as much of a random vector is added, for the gradient alone may lack some
    of them. Memory: one vector of the active weights, in float64, per product.

    Args:
        model: As in `lthlib.metrics.flatness.exact.weight_hessian_trace`; any twice differentiable network.
        images: Pixels in [0, 1], shape (N, channels, height, width).
        labels: Class indices, shape (N,).
        masks: Parameter name -> bool tensor, True where a weight is active.
        k: How many of the largest.
        tolerance: Relative error asked for.
        max_products: Where to stop all the same; ``converged`` is then False.
        seed: Of the random part of the start vector.
        chunk: Images at a time, see `WeightHessian`.

    Raises:
        UserError: For k below 1 or beyond the number of active weights, and as in `Frozen`.
    """
    hessian = WeightHessian(model, images, labels, masks, chunk)
    return extreme_eigenvalues(hessian, k, tolerance, max_products, seed, hessian.gradient())


def extreme_eigenvalues(
    operator: WeightHessian | Tensor,
    k: int = 1,
    tolerance: float = 1e-6,
    max_products: int = 80,
    seed: int = 0,
    near: Tensor | None = None,
) -> Extremes:
    """Do what `top_eigenvalues` does for any symmetric operator or matrix; ``near`` is where to start."""
    n = operator.shape[0]
    if not 1 <= k <= n:
        raise UserError(f"k, the number of eigenvalues, must lie in 1..{n}; got {k}.")
    like = torch.empty(n, dtype=torch.float64, device=operator.device)
    start = normal_like(like, seed)
    if near is not None and bool(near.any()):
        start = start / start.norm() + near.double() / near.double().norm()
    found = None
    for alphas, betas in _lanczos(operator, start, min(max_products, n), again=k > 1):
        found = _ends(alphas, betas, k, tolerance)
        spaces = int((betas == 0).sum())  # each holds one vector of every multiple eigenvalue
        if found.converged and (spaces >= k or len(alphas) == n or (spaces == 0 and len(alphas) > k)):
            break
    return found


def _lanczos(operator: WeightHessian | Tensor, start: Tensor, steps: int, again: bool = False):
    """Yield the diagonal and off-diagonal of the tridiagonal matrix after each step.

    The last off-diagonal entry couples to the next step; 0 says that the Krylov space is exhausted, so that
    the Ritz values are exact. ``again`` goes on with a random vector behind that. Vectors are kept in float64: sums
    over a million weights in float32 cost more digits than the products do.
    """
    vector, basis, alphas, betas = start.double() / start.double().norm(), [], [], []
    for step in range(steps):
        basis.append(vector)
        image = (operator @ vector.to(operator.dtype)).double()
        alphas.append(float(vector @ image))
        image = _orthogonal_to(basis, image)
        beta = float(image.norm())
        scale = max(map(abs, [*alphas, *betas]))
        exhausted = beta <= 10 * torch.finfo(operator.dtype).eps * scale or len(basis) == len(start)
        betas.append(0.0 if exhausted else beta)
        yield np.array(alphas), np.array(betas)
        if exhausted and (not again or len(basis) == len(start)):
            return
        image = _orthogonal_to(basis, normal_like(image, step)) if exhausted else image
        vector = image / image.norm()


def _orthogonal_to(basis: list[Tensor], vector: Tensor) -> Tensor:
    for known in [*basis, *basis]:
        vector = vector - (known @ vector) * known
    return vector


def _ends(alphas: np.ndarray, betas: np.ndarray, k: int, tolerance: float) -> Extremes:
    values, vectors = _tridiagonal(alphas, betas)
    residuals = np.abs(betas[-1] * vectors[-1])
    bounds = _bounds(values, residuals)
    wanted = list(range(len(values) - 1, max(-1, len(values) - 1 - k), -1))
    rivals = len(values) > 1 and residuals[0] - values[0] > values[-1]
    asked = [*wanted, 0] if rivals else wanted
    size = np.abs(values).max()
    close = (bounds[asked] <= tolerance * size) & (residuals[asked] <= 0.1 * tolerance**0.5 * size)
    return Extremes(
        largest=values[wanted],
        residuals=residuals[wanted],
        error_bounds=bounds[wanted],
        smallest=float(values[0]),
        smallest_residual=float(residuals[0]),
        products=len(alphas),
        converged=bool(close.all()) and len(wanted) == k,
    )


def _bounds(values: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """Return min(residual, residual²/gap), the gap up to the interval of the nearest other Ritz value."""
    bounds = residuals.copy()
    for i, (value, residual) in enumerate(zip(values, residuals, strict=True)):
        gap = np.delete(np.abs(values - value) - residuals, i).min(initial=np.inf)
        if np.isfinite(gap) and gap > residual:
            bounds[i] = residual**2 / gap
    return bounds


def _tridiagonal(alphas: np.ndarray, betas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from scipy.linalg import eigh_tridiagonal

    return eigh_tridiagonal(alphas, betas[:-1])


# ------------------------------------------------------------------------------------------------ the density


@dataclass(frozen=True)
class SpectralDensity:
    """An estimate of the distribution of the Hessian's eigenvalues.

    Attributes:
        grid: Eigenvalues at which the density is given, shape (points,).
        density: Density there, integrating to 1 over the real line; bumps have the width ``width``.
        nodes: Ritz values, shape (probes, steps): the unsmoothed quadrature, padded with NaN.
        weights: Their weights, each probe's summing to 1, padded with 0.
        width: Standard deviation of the Gaussian that smooths the density.
    """

    grid: np.ndarray
    density: np.ndarray
    nodes: np.ndarray
    weights: np.ndarray
    width: float

    def moment(self, power: int) -> tuple[float, float]:
        """Return the estimate of tr(H^power)/n and its standard error over the probes."""
        each = np.nansum(self.weights * self.nodes**power, axis=1)
        error = each.std(ddof=1) / np.sqrt(len(each)) if len(each) > 1 else float("nan")
        return float(each.mean()), float(error)


def spectral_density(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    masks: Mapping[str, Tensor] | None = None,
    probes: int = 4,
    steps: int = 30,
    points: int = 1000,
    width: float = 0.01,
    seed: int = 0,
    chunk: int | None = None,
) -> SpectralDensity:
    """Estimate the weight Hessian's spectral density by stochastic Lanczos quadrature (Ghorbani et al. 2019).

    Args:
        model: As in `top_eigenvalues`.
        images: As in `top_eigenvalues`.
        labels: As in `top_eigenvalues`.
        masks: As in `top_eigenvalues`.
        probes: Random start vectors (Rademacher), whose quadratures are averaged.
        steps: Lanczos steps for each; a quadrature of m steps is exact for polynomials of degree 2m - 1.
        points: Size of the grid.
        width: Width of the smoothing as a fraction of the spectrum's range.
        seed: Of the start vectors.
        chunk: Images at a time, see `WeightHessian`.

    Raises:
        UserError: For fewer than one probe or step, and as in `Frozen`.
    """
    return density_of(WeightHessian(model, images, labels, masks, chunk), probes, steps, points, width, seed)


def density_of(
    operator: WeightHessian | Tensor,
    probes: int = 4,
    steps: int = 30,
    points: int = 1000,
    width: float = 0.01,
    seed: int = 0,
) -> SpectralDensity:
    """Do what `spectral_density` does for any symmetric operator or matrix."""
    if probes < 1 or steps < 1 or points < 2 or width <= 0:
        raise UserError("The spectral density needs probes >= 1, steps >= 1, points >= 2 and a width above 0.")
    like = torch.empty(operator.shape[0], dtype=operator.dtype, device=operator.device)
    steps = min(steps, operator.shape[0])
    nodes, weights = np.full((probes, steps), np.nan), np.zeros((probes, steps))
    for probe in range(probes):
        *_, (alphas, betas) = _lanczos(operator, rademacher_like(like, seed, probe), steps)
        values, vectors = _tridiagonal(alphas, betas)
        nodes[probe, : len(values)], weights[probe, : len(values)] = values, vectors[0] ** 2
    low, high = np.nanmin(nodes), np.nanmax(nodes)
    sigma = width * ((high - low) or abs(high) or 1.0)
    grid = np.linspace(low - 5 * sigma, high + 5 * sigma, points)
    bumps = np.exp(-0.5 * ((grid - nodes[..., None]) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    density = np.nansum(weights[..., None] * bumps, axis=(0, 1)) / probes
    return SpectralDensity(grid, density, nodes, weights, float(sigma))


# ------------------------------------------------------------------------------------------------- estimators


def estimate_trace(frozen: Frozen, method: str, probes: int, repeats: int, seed: int, reason: str = "") -> WeightTrace:
    """Estimate tr(M H M) with curvlinops; see `lthlib.metrics.flatness.exact.weight_trace`.

    Hutchinson's probes are independent, so their spread gives the standard error, and the diagonal that each
    estimates gives shares and relative flatness. One run of Hutch++ or XTrace has no spread: it is repeated.

    Raises:
        UserError: For fewer than two probes or repeats, or more probes than active weights.
    """
    choose(method, TRACE_ESTIMATORS, "trace estimator")
    hessian = WeightHessian.of(frozen)
    runs = probes if method == "hutchinson" else repeats
    if runs < 2:
        raise UserError("A standard error needs at least two independent probes or repeats.")
    draw = _diagonals if method == "hutchinson" else _totals
    with _seeded(hessian.device, seed):
        estimates = draw(hessian, method, probes, runs)
    mean, error = estimates.mean(0), estimates.std(0) / runs**0.5
    n = len(hessian.sizes)
    shares, relatives = (
        [dict(zip(frozen.weights, part.tolist(), strict=True)) for part in mean[2:].split(n)]
        if method == "hutchinson"
        else ({}, {})
    )
    return WeightTrace(
        total=float(mean[0]),
        relative=float(mean[1]),
        active={name: frozen.active(name) for name in frozen.weights},
        per_parameter=shares,
        relative_per_parameter=relatives,
        method=method,
        standard_error=float(error[0]),
        relative_standard_error=float(error[1]),
        products=hessian.products,
        reason=reason,
    )


def _diagonals(hessian: WeightHessian, method: str, probes: int, runs: int) -> Tensor:
    """Return, for each of ``runs`` probes: trace, relative flatness, then the shares of both."""
    from curvlinops import hutchinson_diag

    squares, rows = hessian.weights().square(), []
    for _ in range(runs):
        diagonal = hutchinson_diag(hessian, num_matvecs=1).double()
        shares = [part.sum() for part in hessian.shares(diagonal).values()]
        relative = [part.sum() for part in hessian.shares(diagonal * squares).values()]
        rows.append(torch.stack([diagonal.sum(), (diagonal * squares).sum(), *shares, *relative]))
    return torch.stack(rows)


def _totals(hessian: WeightHessian, method: str, probes: int, runs: int) -> Tensor:
    """Return, for each run, the trace and the relative flatness, tr(D H D) with D the active weights."""
    from curvlinops import hutchpp_trace, xtrace

    estimate: Callable = {"hutchpp": hutchpp_trace, "xtrace": xtrace}[method]
    probes -= probes % (3 if method == "hutchpp" else 2)
    if not 1 < probes < hessian.shape[0]:
        raise UserError(f"{method} needs between 3 and {hessian.shape[0] - 1} probes (active weights less one).")
    weighted = _Scaled(hessian, hessian.weights())
    rows = [[estimate(operator, num_matvecs=probes) for operator in (hessian, weighted)] for _ in range(runs)]
    return torch.tensor(rows, dtype=torch.float64)


class _Scaled:
    """D H D for a diagonal D."""

    def __init__(self, operator: WeightHessian, diagonal: Tensor):
        self.operator, self.diagonal = operator, diagonal[:, None]
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device

    def __matmul__(self, vectors: Tensor) -> Tensor:
        return self.diagonal * (self.operator @ (self.diagonal * vectors))


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Run under a seed of its own: curvlinops draws from the global generator, which is put back."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def estimate_input_hessian(frozen: Frozen, probes: int, seed: int, reason: str = "") -> InputHessian:
    """Estimate each image's trace by Hutchinson's probes and its top eigenvalue by Lanczos, all at once.

    The Hessian of the summed loss is block diagonal over images, so one product serves every image.

    Raises:
        UserError: For fewer than two probes.
    """
    if probes < 2:
        raise UserError("A standard error needs at least two probes.")
    pixels = frozen.images.detach().requires_grad_()
    with torch.enable_grad():
        logits = check_finite(frozen(pixels))
        loss = F.cross_entropy(logits, frozen.labels, reduction="sum")
        (gradient,) = grad(loss, pixels, create_graph=True)

    def product(vectors: Tensor) -> Tensor:
        with twice_differentiable():
            return grad(gradient, pixels, vectors.view_as(pixels), retain_graph=True)[0].flatten(1)

    like = frozen.images.flatten(1)
    signs = [rademacher_like(like, seed, probe) for probe in range(probes)]
    traces = torch.stack([(v * product(v)).sum(1) for v in signs])
    start = normal_like(like, seed, probes)
    top, residual = _batched_top(product, start, min(probes, start.shape[1]), seed)
    error = traces.std(0) / probes**0.5
    return InputHessian(traces.mean(0), top, "hutchinson+lanczos", error, residual, reason)


def _batched_top(product: Callable[[Tensor], Tensor], start: Tensor, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Run Lanczos on many symmetric matrices at once; return the largest Ritz value and residual of each.

    A matrix whose Krylov space is exhausted goes on with a new random vector: rounding errors are no direction.
    """
    vector, basis, images = start / start.norm(dim=1, keepdim=True), [], []
    scale = torch.zeros_like(start[:, :1])
    for step in range(steps):
        basis.append(vector)
        image = product(vector)
        images.append(image)
        scale = torch.maximum(scale, image.norm(dim=1, keepdim=True))
        image = _orthogonal(image, basis)
        exhausted = image.norm(dim=1, keepdim=True) <= 10 * torch.finfo(image.dtype).eps * scale
        if bool(exhausted.any()):
            image = torch.where(exhausted, _orthogonal(normal_like(start, seed, steps, step), basis), image)
        vector = image / image.norm(dim=1, keepdim=True).clamp_min(torch.finfo(image.dtype).tiny)
    q, hq = torch.stack(basis, dim=2), torch.stack(images, dim=2)
    projected = q.transpose(1, 2) @ hq
    values, coordinates = torch.linalg.eigh((projected + projected.transpose(1, 2)) / 2)
    ritz = coordinates[..., -1:]
    return values[:, -1], (hq @ ritz - values[:, -1, None, None] * (q @ ritz)).flatten(1).norm(dim=1)


def _orthogonal(vectors: Tensor, basis: list[Tensor]) -> Tensor:
    for known in [*basis, *basis]:
        vectors = vectors - (known * vectors).sum(1, keepdim=True) * known
    return vectors
