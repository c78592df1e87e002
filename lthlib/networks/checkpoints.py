"""Networks from files: state dicts as `torch.save` and safetensors write them, read without running code in them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from lthlib.core.errors import UserError, suggest
from lthlib.core.store import say
from lthlib.networks.checks import first_line
from lthlib.networks.registry import ARCHITECTURES, build
from lthlib.networks.whole import installed, load_whole

WRAPPINGS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")
"""Keys under which training scripts put the weights beside an optimizer's state and an epoch."""
AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "averaged_model", "swa_model")
"""Keys of weights averaged over training; they count only where nothing else is in the file."""
PREFIXES = {"module", "_orig_mod", "model", "net"}
"""Names that wrappers such as DataParallel, torch.compile, AveragedModel and Lightning put in front of a layer's."""
COUNTERS = ("num_batches_tracked", "n_averaged")
HOW = "Save a state dict alone: torch.save(model.state_dict(), file)."


def read_weights(path: Path | str) -> dict[str, Tensor]:
    """Read a state dict that safetensors or `torch.save` wrote, with its names as they are.

    `UserError` for a file that is missing, damaged, holds more than tensors, or no state dict.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"There is no file {path}.")
    if not path.is_file():
        raise UserError(f"{path} is no file but a {'folder' if path.is_dir() else 'pipe or device'}: name a file.")
    try:
        with path.open("rb") as file:
            is_safe = file.read(9)[8:] == b"{" or path.suffix == ".safetensors"
        if is_safe:
            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged archives end in errors of many libraries
        raise UserError(f"{path} cannot be read as weights ({_reason(path, error)}). {HOW}") from error
    return {name: _dense(value, f"{name} in {path}") for name, value in _state_in(content, path).items()}


def _reason(path: Path, error: Exception) -> str:
    """Say in a few words what is wrong with a file; name what it holds beside tensors."""
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # no archive of torch.save's, or an old one
        found = [word for word in str(error).split() if "GLOBAL" in str(error) and "." in word.strip(".")][:1]
    if found:
        return f"beside tensors it holds {', '.join(sorted(found)[:3])}, which to read would run code of the file"
    return first_line(error)


def _state_in(content: object, path: Path) -> dict[str, Tensor]:
    """Find the state dict in what a file holds."""
    while isinstance(content, Mapping):
        found = [key for key in (*WRAPPINGS, *AVERAGES) if isinstance(content.get(key), Mapping)]
        if not found:
            break
        if len(found) > 1:
            say(f"note: {path} holds {' and '.join(found)}; {found[0]} is taken")
        content = content[found[0]]
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} holds no state dict. {HOW}")
    if odd := [name for name in content if not isinstance(name, str)]:
        raise UserError(f"{path} has the key {odd[0]!r} among its tensors; the keys of a state dict are names. {HOW}")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _dense(value: Tensor, where: str) -> Tensor:
    if value.is_quantized:
        raise UserError(f"{where} is quantised; weights in floating point are needed.")
    value = value.to_dense() if value.layout != torch.strided else value
    if value.is_floating_point() and not value.isfinite().all():
        raise UserError(f"{where} holds numbers that are not finite.")
    return value


def builder(network: str, channels: int, size: int, n_classes: int) -> Callable[[], nn.Module]:
    """Return the function that makes a network, without weights.

    Args:
        network: A name of this book's, of torchvision's or timm's (``torchvision:resnet18`` where several have it),
            or ``package.module:function``, a function of your own without arguments.
        channels: Of an image.
        size: Its height and width.
        n_classes: Number of logits.

    Raises:
        UserError: Where there is no such function, or what it returns is no network.
    """
    from torchvision import models  # takes its time, and is needed here alone

    module, _, name = network.rpartition(":")
    if not module and name in ARCHITECTURES:
        plain = {"mean": (0.0,) * channels, "std": (1.0,) * channels}  # what is done first is said elsewhere
        return partial(build, name, in_channels=channels, num_classes=n_classes, image_size=size, **plain)
    if module in ("", "torchvision") and name in models.list_models():
        return partial(models.get_model, name, weights=None, num_classes=n_classes)
    if module in ("", "timm"):
        try:
            timm = installed("timm", f"make {network!r}")
        except UserError:
            if module:
                raise
        else:
            if timm.is_model(name):
                return partial(timm.create_model, name, pretrained=False, num_classes=n_classes, in_chans=channels)
    if module in ("", "torchvision", "timm"):
        known = [*ARCHITECTURES, *models.list_models()]
        raise UserError(
            f"There is no network {network!r}.{suggest(name, known)} Give a name of this book "
            f"({', '.join(ARCHITECTURES)}), of torchvision or timm where installed, or your own as "
            "package.module:function."
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"There is no function {network!r} ({error}): name it as package.module:function.") from error
    try:
        made = found()
    except TypeError as error:
        raise UserError(f"{network!r} is no function without arguments ({error}).") from error
    if not isinstance(made, nn.Module):
        raise UserError(f"{network!r} returns a {type(made).__name__}, no network (torch.nn.Module).")
    return found


def load_network(path: Path | str, make: Callable[[], nn.Module] | None = None) -> nn.Module:
    """Make a network and give it the weights of a file, or return the one that a file holds (`load_whole`).

    The file's names are taken as they are where the network has them. Else they may differ by what wrappers put in
    front of a layer's name (`PREFIXES`), and `torch.nn.utils.prune`'s pairs of weight and mask are put together.
    """
    if Path(path).is_file() and (whole := load_whole(Path(path))) is not None:
        return whole
    weights = read_weights(path)
    if make is None:
        raise UserError(f"{path} holds weights alone: say by --network what makes the network.")
    model = make()
    wanted = model.state_dict()
    weights = _renamed(weights, wanted, path)
    if any(name not in wanted for name in weights):
        weights = _renamed(_joined(weights), wanted, path)
    there = {wanted[name].data_ptr() for name in weights if name in wanted}  # tied weights need to be there once
    lacking = [
        name
        for name, value in wanted.items()
        if name not in weights and not name.endswith(COUNTERS) and not (value.numel() and value.data_ptr() in there)
    ]
    unknown = [name for name in weights if name not in wanted and not name.endswith(COUNTERS)]
    if lacking or unknown:
        raise UserError(
            f"{path} does not fit the network: {'; '.join(_few('lacks', lacking) + _few('has unknown', unknown))}."
            f"{suggest(unknown[0], lacking) if unknown else ''} Is the architecture the right one? With --network "
            "module:function you can name your own."
        )
    for name, value in weights.items():
        if name in wanted and value.shape != wanted[name].shape:
            raise UserError(
                f"{name} in {path} has shape {tuple(value.shape)}, the network's has {tuple(wanted[name].shape)}."
            )
    model.load_state_dict(weights, strict=False)
    return model.eval()


def _renamed(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path | str) -> dict[str, Tensor]:
    """Give weights the names that the network has for them, where these differ by `PREFIXES` alone."""
    bare = [_bare(name) for name in wanted]
    known = {short: name for short, name in zip(bare, wanted, strict=True) if bare.count(short) == 1}
    found: dict[str, str] = {}
    for name in weights:
        mine = name if name in wanted else known.get(_bare(name), _bare(name))
        if mine in found and not torch.equal(weights[name], weights[found[mine]]):
            raise UserError(
                f"{path} holds {mine} twice, as {found[mine]} and {name}: save the one network that is meant."
            )
        found[mine] = name
    return {mine: weights[name] for mine, name in found.items()}


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in PREFIXES)


def _joined(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiply the pairs ``weight_orig``, ``weight_mask`` of `torch.nn.utils.prune`."""
    pruned = [name.removesuffix("_mask") for name in weights if name.endswith("_mask")]
    pruned = [name for name in pruned if f"{name}_orig" in weights]
    parts = {f"{name}{end}" for name in pruned for end in ("_orig", "_mask")}
    plain = {name: value for name, value in weights.items() if name not in parts}
    return plain | {name: weights[f"{name}_orig"] * weights[f"{name}_mask"] for name in pruned}


def _few(what: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"it {what} {', '.join(names[:3])}{more}"] if names else []
