"""SNIP: connection sensitivity on one batch at initialisation (Lee et al. 2019).

Give each weight a gate c, so that the network computes with c * w. How much the loss reacts to the gate at c = 1 is
dL/dc = w dL/dw; the score is its absolute value. One forward and one backward pass.

What follows from the definition, and is tested: in a chain of ReLU layers without biases, each layer's sum of w dL/dw
is the same number, <logits, dL/dlogits>; for a layer behind which a batch normalisation uses the batch's statistics it
is 0.

Known pitfalls. The absolute value comes after the sum over the batch. BN in train or in eval mode is part of the
definition: at 99 % the two masks hardly overlap; train mode is the published code's. That code trains from a second,
separate draw of initial weights; here the weights that were scored are trained, as in the paper's text.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, autograd, nn

from lthlib.pruning.registry import Found, Moment, Option, method

BN_MODE = Option("train", choices=("train", "eval"))  # whose statistics: the batch's, or the running ones


def saliency(model: nn.Module, weights: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return w * dL/dw of some weights of a network, with its sign; L is the mean cross-entropy of the batch."""
    loss = F.cross_entropy(model(images), labels)
    gradients = autograd.grad(loss, list(weights.values()), materialize_grads=True)
    return {name: g.mul(w.detach()) for (name, w), g in zip(weights.items(), gradients, strict=True)}


@method(
    "snip",
    title="SNIP",
    source="init",
    start="init",
    options={"batch": Option(128, least=1), "bn_mode": BN_MODE},
    reference="lee2019snip",
    family="initialisation",
    paper=True,
)
def snip(moment: Moment) -> Found:
    """Keep the gates that the loss of one batch reacts to most.

    Options: ``batch``, the number of training images; ``bn_mode``, "train" or "eval".
    """
    model = moment.model.train(moment.options["bn_mode"] == "train")
    scores = saliency(model, moment.weights, *moment.batch(moment.options["batch"]))
    return Found({name: score.abs() for name, score in scores.items()})
