"""SNIP: connection sensitivity on one batch at initialisation (Lee et al. 2019).

Give each weight a gate c, so that the network computes with c * w. How much the loss reacts to the gate at c
= 1 is dL/dc = w dL/dw; the score is its absolute value. One forward and one backward pass.

What follows from the definition, and is tested: in a chain of ReLU layers without biases, each layer's sum of
w dL/dw is the same number, <logits, dL/dlogits>; for a layer behind which a batch normalisation uses the
batch's statistics it is 0.

Known pitfalls. The absolute value comes after the sum over the batch. BN in train or in eval mode is part of
the
definition: at 99 % the two masks hardly overlap; train mode is the published code's. That code trains from a
second, separate draw of initial weights; here the weights that were scored are trained, as in the paper's
text.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, autograd, nn

from lthlib.core.errors import choose
from lthlib.pruning import Found, Moment, Option, method
from lthlib.pruning import masks as masking

BN_MODES = ("train", "eval")


def set_bn_mode(model: nn.Module, bn_mode: str) -> None:
    """Let batch normalisation use the batch ("train") or its running statistics ("eval")."""
    choose(bn_mode, BN_MODES, "bn_mode")
    model.train(bn_mode == "train")


def saliency(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return w * dL/dw of every prunable weight, with its sign; L is the mean cross-entropy of the batch."""
    weights = masking.prunable(model)
    gradients = autograd.grad(F.cross_entropy(model(images), labels), list(weights.values()))
    return {name: g.mul_(w.detach()) for (name, w), g in zip(weights.items(), gradients, strict=True)}


@method(
    "snip",
    title="SNIP",
    source="init",
    start="init",
    options={"batch": Option(128, least=1), "bn_mode": Option("train", choices=BN_MODES)},
    reference="lee2019snip",
    family="initialisation",
    paper=True,
)
def find(moment: Moment) -> Found:
    """Keep the gates that the loss of one batch reacts to most.

    Options: ``batch``, the number of training images; ``bn_mode``, "train" or "eval".
    """
    set_bn_mode(moment.model, moment.options["bn_mode"])
    images, labels = moment.batch(moment.options["batch"])
    scores = {name: s.abs_() for name, s in saliency(moment.model, images, labels).items()}
    return Found(masking.keep_top(scores, moment.n_keep))
