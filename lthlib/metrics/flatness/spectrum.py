"""The spectrum of the weight Hessian: its ends by Lanczos, with bounds, and its density by quadrature.

Everything here works with products H v of the true Hessian, so it holds for any network that can be differentiated
twice. The Hessian is M H M seen in the active weights alone: pruned weights add no zeros to the spectrum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd import grad

from lthlib.core.errors import UserError
from lthlib.metrics.flatness.frozen import Frozen, normal_like, rademacher_like, twice_differentiable


class WeightHessian:
    """The Hessian of the mean cross-entropy in the active weights, as a symmetric operator with ``@``.

    One graph of the gradient over the whole batch is kept, and differentiated for every product. ``shape`` is (n, n)
    with n active weights, ``sizes`` says how many of them each parameter has.
    """

    def __init__(self, frozen: Frozen):
        self.frozen = frozen
        first = next(iter(frozen.weights.values()))
        self.dtype, self.device = first.dtype, first.device
        self.sizes = [frozen.active(name) for name in frozen.weights]
        self.shape = (sum(self.sizes), sum(self.sizes))
        masks = (frozen.masks.get(name, torch.ones_like(w, dtype=torch.bool)) for name, w in frozen.weights.items())
        self._active = torch.cat([mask.flatten() for mask in masks])
        self._first: tuple[Tensor, Tensor] | None = None
        self._leaves = [w.clone().requires_grad_() for w in frozen.weights.values()]
        with torch.enable_grad():
            loss = frozen.loss(dict(zip(frozen.weights, self._leaves, strict=True)))
            self._gradients = grad(loss, self._leaves, create_graph=True, materialize_grads=True)

    def __matmul__(self, vector: Tensor) -> Tensor:
        full = torch.zeros_like(self._active, dtype=vector.dtype).masked_scatter(self._active, vector)
        parts = full.split([leaf.numel() for leaf in self._leaves])
        pairs = [(g, v.view_as(g)) for g, v in zip(self._gradients, parts, strict=True) if g.requires_grad]
        if not pairs:
            return torch.zeros_like(vector)
        gradients, direction = zip(*pairs, strict=True)
        with twice_differentiable():
            found = grad(gradients, self._leaves, direction, retain_graph=True, materialize_grads=True)
        return self._symmetric(vector, self._gather(found))

    def weights(self) -> Tensor:
        """Return the active weights as one vector."""
        return self._gather(self.frozen.weights.values())

    def gradient(self) -> Tensor:
        """Return the gradient of the loss in the active weights; it costs nothing more."""
        return self._gather(self._gradients).detach()

    def _symmetric(self, vector: Tensor, image: Tensor) -> Tensor:
        """Return the image, after a look at u·Hv = v·Hu: PyTorch's second derivatives are not all right."""
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

    def _gather(self, tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([tensor.flatten() for tensor in tensors])[self._active]


@dataclass(frozen=True)
class Extremes:
    """The ends of a spectrum, with bounds.

    Attributes:
        top: The largest eigenvalue, signed: the sharpest upward curvature. The true one is not below it.
        residual: ||H v - θ v|| of it: some eigenvalue lies within this distance, whatever H is.
        error_bound: min(residual, residual²/gap), the sharper bound of Kato and Temple, with a gap that reaches to the
            nearest end of the other Ritz values' intervals, value ± residual. It holds if the largest eigenvalue has
            shown, which the random part of the start vector brings about in the end, and nothing proves by now.
            Rounding is not in it: in float32 it moves an eigenvalue by some 1e-7 of itself.
        smallest: The smallest eigenvalue found (an upper bound of the true one).
        products: Hessian-vector products that it took.
        converged: Whether the error bound is within the tolerance, and the residual within a tenth of its square root
            (else one Ritz value may stand for several eigenvalues, with a small bound between them); also of
            ``smallest`` where it may be the larger in magnitude.
    """

    top: float
    residual: float
    error_bound: float
    smallest: float
    products: int
    converged: bool

    @property
    def largest_magnitude(self) -> float:
        """The eigenvalue farthest from 0, with its sign: what power iteration (PyHessian) converges to."""
        return self.smallest if -self.smallest > self.top else self.top


def top_eigenvalue(
    operator: WeightHessian | Tensor,
    *,
    near: Tensor | None = None,
    tolerance: float = 1e-6,
    max_products: int = 80,
    seed: int = 0,
) -> Extremes:
    """Compute the largest eigenvalue (of the weight Hessian: lower is flatter) with bounds on its error.

    Lanczos with full reorthogonalisation, until the error bound falls below ``tolerance`` times the largest magnitude
    (`Extremes.converged`), or ``max_products``. Memory: one vector per product. It starts ``near`` some
    vector, for instance the gradient, which lies for a large part in the few sharp directions; as much of a random
    vector is added, for it may lack some of them.
    """
    found = None
    for alphas, betas in lanczos(_one(operator), _start(operator, near, seed)[None], max_products, operator.dtype):
        found = _ends(alphas, betas, tolerance)
        if found.converged and alphas.shape[1] > 1:
            break
    return found


def lanczos(
    product: Callable[[Tensor], Tensor], start: Tensor, steps: int, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run Lanczos on B symmetric matrices at once; yield diagonals and off-diagonals (B, steps so far) after each step.

    The last off-diagonal entry couples to the next step; 0 says that the Krylov space is exhausted, so that the Ritz
    values are exact. ``product`` takes a vector for each matrix, (B, n), to their images, in ``dtype``; so are vectors
    kept. Sums are in float64: over a million weights in float32 they cost more digits than the products do.
    """
    n, basis, alphas, betas = start.shape[1], [], [], []
    vector = (start / start.norm(dim=1, keepdim=True, dtype=torch.float64)).to(dtype)
    live = torch.ones(len(start), dtype=torch.bool, device=start.device)
    del start  # as long as several vectors
    for _ in range(steps):
        basis.append(vector)
        image = product(vector).to(torch.float64, copy=True)  # which is changed below
        alpha = (vector * image).sum(1)
        # An exhausted matrix goes on with zeros; its first entry again is no new end of its spectrum.
        alphas.append(torch.where(live, alpha, alphas[0]) if alphas else alpha)
        for known in [*basis, *basis]:
            image -= (known * image).sum(1, keepdim=True) * known
        beta = image.norm(dim=1)
        rounding = 10 * torch.finfo(dtype).eps * torch.stack([*alphas, *betas]).abs().amax(0)
        live = live & (beta > rounding) & (len(basis) < n)
        betas.append(torch.where(live, beta, 0.0))
        yield torch.stack(alphas, 1), torch.stack(betas, 1)
        if not live.any():
            return
        image /= beta.clamp_min(torch.finfo(beta.dtype).tiny)[:, None]
        vector = torch.where(live[:, None], image, 0.0).to(dtype)
        del image


def tridiagonal(alphas: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues (B, k), ascending, and eigenvectors of what `lanczos` yields."""
    return torch.linalg.eigh(torch.diag_embed(alphas) + sum(torch.diag_embed(betas[:, :-1], i) for i in (-1, 1)))


def _start(operator: WeightHessian | Tensor, near: Tensor | None, seed: int) -> Tensor:
    start = normal_like(torch.empty(operator.shape[0], dtype=torch.float64, device=operator.device), seed)
    if near is None or not bool(near.any()):
        return start
    return start / start.norm() + near.double() / near.double().norm()


def _one(operator: WeightHessian | Tensor) -> Callable[[Tensor], Tensor]:
    return lambda vectors: (operator @ vectors[0])[None]


def _ends(alphas: Tensor, betas: Tensor, tolerance: float) -> Extremes:
    values, vectors = (found[0].numpy(force=True) for found in tridiagonal(alphas, betas))
    residuals = np.abs(float(betas[0, -1]) * vectors[-1])
    rivals = len(values) > 1 and residuals[0] - values[0] > values[-1]
    asked = [-1, 0] if rivals else [-1]
    bounds = np.array([_bound(values, residuals, i) for i in asked])
    size = np.abs(values).max()
    close = (bounds <= tolerance * size) & (residuals[asked] <= 0.1 * tolerance**0.5 * size)
    return Extremes(
        top=float(values[-1]),
        residual=float(residuals[-1]),
        error_bound=float(bounds[0]),
        smallest=float(values[0]),
        products=len(values),
        converged=bool(close.all()),
    )


def _bound(values: np.ndarray, residuals: np.ndarray, i: int) -> float:
    """Return min(residual, residual²/gap), the gap up to the interval of the nearest other Ritz value."""
    gap = np.delete(np.abs(values - values[i]) - residuals, i).min(initial=np.inf)
    return residuals[i] ** 2 / gap if np.isfinite(gap) and gap > residuals[i] else residuals[i]


def spectral_density(
    operator: WeightHessian | Tensor,
    *,
    probes: int = 4,
    steps: int = 30,
    points: int = 1000,
    width: float = 0.01,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Estimate a symmetric operator's spectral density by stochastic Lanczos quadrature (Ghorbani et al. 2019).

    The quadratures of some random start vectors (Rademacher, ``probes``) are averaged; one of m steps is exact for
    polynomials of degree 2m - 1. They are smoothed by Gaussians whose standard deviation is ``width``, a fraction of
    the spectrum's range. Returned are eigenvalues and the density at these, (points,), which integrates to 1.
    """
    if probes < 1 or steps < 1 or points < 2 or width <= 0:
        raise UserError("The spectral density needs probes >= 1, steps >= 1, points >= 2 and a width above 0.")
    like = torch.empty(operator.shape[0], dtype=operator.dtype, device=operator.device)
    nodes, weights = [], []
    for probe in range(probes):
        *_, found = lanczos(_one(operator), rademacher_like(like, seed, probe)[None], steps, operator.dtype)
        values, vectors = (part[0].numpy(force=True) for part in tridiagonal(*found))
        nodes.extend(values)
        weights.extend(vectors[0] ** 2 / probes)
    low, high = min(nodes), max(nodes)
    sigma = width * ((high - low) or abs(high) or 1.0)
    grid = np.linspace(low - 5 * sigma, high + 5 * sigma, points)
    bumps = np.exp(-0.5 * ((grid - np.array(nodes)[:, None]) / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi))
    return grid, np.array(weights) @ bumps
