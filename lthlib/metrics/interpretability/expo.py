"""ExpO: fidelity and stability of linear explanations as first defined, by neighbours of the pixels.

What Plumb et al. (2020), whom the paper cites for both words, define: Gaussian neighbours of an image, a linear model
fitted around it, and others fitted around its neighbours. `lime` is what the paper's code computes instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from lthlib.core.errors import UserError
from lthlib.metrics.interpretability import lime
from lthlib.metrics.interpretability.superpixels import check_at_least, with_segments

lime.error("expo_fidelity", "ExpO neighbourhood fidelity", reference="plumb2020regularizing")(
    r"$E_{x'}(f(x') - g_x(x'))^2$ on fresh neighbours $x' = x + \sigma N(0, I)$, $g_x$ linear."
)
lime.error("expo_stability", "ExpO stability", reference="plumb2020regularizing")(
    r"$E_{x'}\lVert c_x - c_{x'} \rVert^2$ with $g_{x'}$ fitted around $x'$, not around $x$."
)
lime.scale_free("expo_r2", "ExpO fidelity, R²", higher_is_better=True, reference="plumb2020regularizing")(
    r"$1 - \text{expo\_fidelity} / \mathrm{Var}_{x'} f(x')$ on the same fresh neighbours."
)
lime.scale_free(
    "expo_stability_relative", "ExpO stability, relative", higher_is_better=False, reference="plumb2020regularizing"
)(r"$\text{expo\_stability} / \lVert c_x \rVert^2$.")

SCORES = ("expo_fidelity", "expo_stability", "expo_r2", "expo_stability_relative")


def expo(
    model: nn.Module,
    images: Iterable,
    *,
    segments: Iterable[np.ndarray] | None = None,
    method: str = "felzenszwalb",
    sigma: float = 0.1,
    n_fit: int = 100,
    n_eval: int = 200,
    n_neighbours: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Measure neighbourhood fidelity and stability as Plumb et al. (2020) define them.

    The neighbourhood of x is :math:`x' = x + \sigma N(0, I)` in pixels (not clipped). f is the softmax probability of
    the class predicted for x. g_x is the linear model with intercept that is nearest to f in the mean square over that
    neighbourhood; its features are the means of each superpixel and channel. By Stein's lemma its coefficients are the
    mean gradient there, summed over each superpixel, which needs far fewer draws than the regression itself.

    * fidelity :math:`E_{x'} (f(x') - g_x(x'))^2`, on ``n_eval`` neighbours that g_x was not fitted to;
    * stability :math:`E_{x'} \lVert c_x - c_{x'} \rVert^2`, g_x' fitted to neighbours *of x'*; intercepts left out.

    (The code published with that paper fits around x again, ``x`` for ``x_pert``: the noise of sampling alone.)

    Model, images, segments and method are as in `lime.fidelity_stability`; a segment number for each pixel makes
    pixels the features. ``sigma`` is in units of the [0, 1] pixel range. Each model is fitted to ``n_fit`` neighbours,
    and again around ``n_neighbours`` of them.

    Returns:
        A row an image: ``label``, the explained class; the scores in `SCORES`, the scale-free ones NaN where f is
        constant; ``variance`` of f over the fresh neighbours; ``coef`` (C, segments).
    """
    check_at_least(1, n_fit=n_fit, n_neighbours=n_neighbours)
    check_at_least(2, n_eval=n_eval)
    if not sigma > 0:
        raise UserError(f"sigma is {sigma}; it must be positive (0.1 is the paper's).")
    network, rows = None, []
    for image, labels in with_segments(images, segments, method):
        network = network or lime.fast_copy(model, image)
        local = _Neighbourhood(*network, image, labels, sigma, lime.generator(seed, image))
        slope, intercept = local.fit(local.image, n_fit)
        fidelity, variance = local.judge(slope, intercept, n_eval)
        centres = torch.cat(list(local.neighbours(local.image, n_neighbours)))
        stability = np.mean([float(((local.fit(centre, n_fit)[0] - slope) ** 2).sum()) for centre in centres])
        row = {"label": local.label, "variance": variance, "expo_fidelity": fidelity, "expo_stability": stability}
        row["expo_r2"] = 1 - fidelity / variance if variance else np.nan
        row["expo_stability_relative"] = stability / float((slope**2).sum()) if variance else np.nan
        rows.append(row | {"coef": slope.cpu().numpy()})
    return pd.DataFrame(rows)


class _Neighbourhood:
    """Draws neighbours of an image, asks the network about them and fits linear models to its answers."""

    def __init__(self, network, device, image, labels, sigma, rng):
        self.network, self.sigma, self.rng = network, sigma, rng
        self.batch = lime.images_per_pass(labels.size, device)
        self.image = torch.from_numpy(image).to(device).float().permute(2, 0, 1) / 255
        self.segment = torch.from_numpy(labels).to(device).ravel()
        self.area = torch.bincount(self.segment).double()
        with torch.inference_mode():
            self.label = int(lime.probabilities(network, self.image[None]).argmax())

    def neighbours(self, centre: Tensor, count: int) -> Iterator[Tensor]:
        """Yield ``count`` neighbours of ``centre`` in chunks (B, C, H, W)."""
        for start in range(0, count, self.batch):
            shape = (min(self.batch, count - start), *centre.shape)
            noise = torch.from_numpy(self.rng.standard_normal(shape, dtype=np.float32))
            chunk = centre + self.sigma * noise.to(centre.device)
            yield chunk.contiguous(memory_format=torch.channels_last)

    def values(self, batch: Tensor) -> Tensor:
        return lime.probabilities(self.network, batch)[:, self.label]

    def total(self, batch: Tensor) -> Tensor:
        """Sum pixels (..., H, W) over each superpixel: (..., segments)."""
        flat = batch.double().flatten(-2)
        sums = flat.new_zeros(*flat.shape[:-1], len(self.area))
        return sums.index_add_(-1, self.segment, flat)

    def fit(self, centre: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return coefficients (C, segments) and intercept of the linear model around ``centre``."""
        slope, value, feature = 0.0, 0.0, 0.0
        for chunk in self.neighbours(centre, count):
            chunk.requires_grad_(True)
            with torch.enable_grad():
                f = self.values(chunk)
                (gradient,) = torch.autograd.grad(f.sum(), chunk)
            slope = slope + self.total(gradient).sum(0) / count
            value = value + f.detach().sum() / count
            feature = feature + (self.total(chunk.detach()) / self.area).sum(0) / count
        return slope, value - (slope * feature).sum()

    @torch.inference_mode()
    def judge(self, slope: Tensor, intercept: Tensor, count: int) -> tuple[float, float]:
        """Return the mean squared error of a linear model on fresh neighbours, and the variance of f there."""
        answers = [
            (self.values(chunk), (self.total(chunk) / self.area * slope).sum((1, 2)) + intercept)
            for chunk in self.neighbours(self.image, count)
        ]
        value, linear = (torch.cat(part) for part in zip(*answers, strict=True))
        spread = 0.0 if lime.is_constant(value.cpu().numpy()) else float(value.var(correction=0))
        return float(((value - linear) ** 2).mean()), spread
