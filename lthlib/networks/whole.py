"""Networks from files that hold a whole network: TorchScript, torch.export, ONNX."""

from __future__ import annotations

import hashlib
import importlib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lthlib.core.errors import UserError
from lthlib.networks.checks import first_line
from lthlib.networks.weights import Used


class Sealed(nn.Module):
    """A network that answers and cannot be looked into.

    Args:
        path: The file, which is what it is known by.
        kind: What such files are called.
        ask: Images (N, C, H, W) to logits.
        weights: Name -> what it multiplies with, as far as the file tells.
        batch: How many images it takes at once; None for any number.
        gradients: Whether its answers can be differentiated in the pixels.
    """

    def __init__(
        self, path: Path, kind: str, ask: Callable, weights: Mapping[str, Tensor], batch: int | None, gradients: bool
    ):
        super().__init__()
        self.known_by, self.kind = f"{kind} {hashlib.sha256(path.read_bytes()).hexdigest()}", kind
        self.ask, self.batch, self.gradients = ask, batch, gradients
        self.used: Used = {n: ("conv" if w.ndim > 2 else "linear", w) for n, w in weights.items() if w.ndim > 1}
        self.place = nn.Parameter(torch.zeros(1))  # says on which device it is

    def __deepcopy__(self, memo: dict) -> Sealed:
        return self  # nothing in it changes

    def extra_repr(self) -> str:
        """Say which file it is."""
        return self.known_by

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return in_batches(self.ask, x, self.batch)


class Exported(nn.Module):
    """A network from `torch.export`, whose mode was fixed when it was exported."""

    def __init__(self, network: nn.Module, batch: int | None):
        super().__init__()
        self.network, self.batch = network, batch

    def train(self, mode: bool = True) -> Exported:
        """Do nothing: there is no other mode."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return in_batches(self.network, x, self.batch)


def in_batches(ask: Callable, x: Tensor, batch: int | None) -> Tensor:
    """Ask about images in batches of a fixed size, the last of them filled up."""
    if batch is None:
        return ask(x)
    full = torch.cat([x, x[-1:].expand(-len(x) % batch, *x.shape[1:])])
    return torch.cat([ask(part) for part in full.split(batch)])[: len(x)]


def sealed(network: nn.Module) -> Sealed | None:
    """Return the `Sealed` network that one is or wraps; None where it can be looked into."""
    return next((module for module in network.modules() if isinstance(module, Sealed)), None)


def load_whole(path: Path) -> nn.Module | None:
    """Return the network of a file that holds a whole one; None where it holds anything else, weights perhaps.

    Raises:
        UserError: Where it cannot be read, or what reads it is not installed.
    """
    names = set()
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                names = {name.partition("/")[2] for name in file.namelist()}
        if path.suffix == ".onnx":
            return _onnx(path)
        if path.suffix == ".pt2" or "archive_format" in names:
            return _exported(path)
        if "constants.pkl" in names:
            script = torch.jit.load(path, map_location="cpu").float().eval()
            ask = lambda x: script.to(x.device)(x.contiguous())  # a module here would become a part of the network
            return Sealed(path, "TorchScript", ask, _scripted_weights(script), None, gradients=True)
    except UserError:
        raise
    except Exception as error:  # each reader raises errors of its own
        raise UserError(f"{path} cannot be read as a network ({first_line(error)}).") from error
    return None


def _exported(path: Path) -> Exported:
    program = torch.export.load(path)
    inputs = [node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs]
    size = inputs[0].meta["val"].shape[0]
    return Exported(program.module(), size if isinstance(size, int) else None)


def _scripted_weights(script: nn.Module) -> dict[str, Tensor]:
    """Return what is called a weight, under the mask that `torch.nn.utils.prune` has put beside it."""
    held, found = dict(script.named_buffers()), {}
    for name, parameter in script.named_parameters():
        plain = name.removesuffix("_orig")
        if plain.endswith("weight"):
            found[plain] = parameter.detach() * held.get(f"{plain}_mask", 1)
    return found


def _onnx(path: Path) -> Sealed:
    runtime = installed("onnxruntime", f"read {path}")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    first, weights = session.get_inputs()[0], {}
    try:
        onnx = importlib.import_module("onnx")
        held = onnx.load(str(path)).graph.initializer
        weights = {one.name: torch.tensor(onnx.numpy_helper.to_array(one)) for one in held}
    except ImportError:
        pass  # the answers are there without it, the weights are not

    def ask(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {first.name: x.detach().cpu().contiguous().numpy()})[0]).to(x.device)

    size = first.shape[0]
    return Sealed(path, "ONNX", ask, weights, size if isinstance(size, int) else None, gradients=False)


def installed(package: str, purpose: str):
    """Return a package that is no dependency; `UserError` where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"To {purpose}, install {package}: pip install {package}.") from None
