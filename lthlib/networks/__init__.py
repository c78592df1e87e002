"""The networks: `build` makes one by its name in `ARCHITECTURES`.

A new architecture is a function under ``@architecture`` in a file of this package; it is found by itself.
"""

import importlib
import pkgutil

from lthlib.networks.groups import all_groups, channel_groups, convolution_cost, macs
from lthlib.networks.layers import Layers, Spec
from lthlib.networks.registry import ARCHITECTURES, Architecture, architecture, build, rebuild, spec_of

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Layers",
    "Spec",
    "all_groups",
    "architecture",
    "build",
    "channel_groups",
    "convolution_cost",
    "macs",
    "rebuild",
    "spec_of",
]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
