"""The weights that layers compute with, whatever they are made from: parameters, masks beside them, norms."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from lthlib.core.errors import UserError
from lthlib.networks.checks import agree, answers, check_deterministic, check_own_weights, copied

KINDS = {"linear": "linear", "multi_head_attention_forward": "linear"} | {
    name: "conv" for d in "123" for name in (f"conv{d}d", f"conv_transpose{d}d")
}
WEIGHTS = {
    "multi_head_attention_forward": (
        (5, "in_proj_weight"),
        (11, "out_proj_weight"),
        *((18 + i, f"{name}_proj_weight") for i, name in enumerate("qkv")),
    )
}
"""Where a function's weights stand among its arguments, if not second; one that is not used is None or left out."""

Used = dict[str, tuple[str, Tensor]]
"""Name of a parameter -> "conv" or "linear", and the weights that such a layer multiplies with."""


def used_weights(model: nn.Module, images: Tensor) -> Used:
    """Return what convolutions and linear layers multiply with.

    One forward pass is watched, so that it is told what is computed with and not what is stored. Weights that are no
    parameter (the product of one and a mask) are named as the ``weight`` of the module that computes with them.
    """
    watched = copied(model)
    recorder = _Recorder({id(parameter): name for name, parameter in watched.named_parameters()})
    for name, module in watched.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: recorder.inside.append(name))
        module.register_forward_hook(lambda *_: recorder.inside.__delitem__(-1))
    with recorder:
        answers(watched, images)
    return recorder.found


class _Recorder(TorchFunctionMode):
    """Notes the weights of each call of a convolution or linear function."""

    def __init__(self, names: Mapping[int, str]):
        super().__init__()
        self.names, self.inside, self.found = names, [], {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        named = getattr(function, "__name__", "").partition(".")[0]  # conv2d.default of torch.export
        kind = KINDS.get(named)
        for place, argument in WEIGHTS.get(named, ((1, "weight"),)) if kind is not None else ():
            weight = kwargs[argument] if argument in kwargs else next(iter(args[place:]), None)
            if weight is None:
                continue
            name = self.names.get(id(weight)) or f"{self.inside[-1]}.weight".removeprefix(".")
            while name in self.found and not torch.equal(self.found[name][1], weight):
                name += "'"  # one module, several weights that it computes
            self.found[name] = kind, weight.detach().clone()
        return function(*args, **kwargs)


def plain_copy(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy on the CPU, float32 and in evaluation mode, whose parameters are what its layers compute with.

    Masks of `torch.nn.utils.prune`, parametrisations, weight and spectral norms are worked into the weights, and so are
    masks that a layer of one's own applies. Where that would change the network's answers, it stays as it is. The
    images are some of those it is for. `UserError` as in `check_deterministic`, and for a network that computes with
    another's weights.
    """
    network = copied(model).cpu().float().eval()
    try:
        answers(copied(network), images)
    except UserError:  # `view` fails on channels_last
        network.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    found = check_deterministic(copied(network), images)
    check_own_weights(network, found)
    written = copied(network)
    for module in list(written.modules()):
        _remove_reparametrisations(module)
    parameters = dict(written.named_parameters())
    for name, (_, weight) in used_weights(network, images).items():
        if name in parameters and parameters[name].shape == weight.shape:
            parameters[name].data.copy_(weight)
    return written if agree(copied(written), found, 1e-4) else network


def _remove_reparametrisations(module: nn.Module) -> None:
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
    if parametrize.is_parametrized(module):
        made = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
        module.__class__ = type(module).__bases__[0]  # PyTorch's own removal changes the class, which copies share
        del module.parametrizations
        for name, value in made.items():
            module.register_parameter(name, nn.Parameter(value))
