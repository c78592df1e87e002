"""`lthlib.networks.fast`: the same logits, with less rounding than autocast. More is in test_predictions.py."""

import pytest
import torch
from torch import nn

from lthlib import networks
from lthlib.networks.fast import inference_copy


def narrow(arch):
    given = {"in_channels": 3, "num_classes": 10, "image_size": 32, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    groups = networks.all_groups(networks.build(arch, **given))
    return networks.build(arch, channels={g: max(2, n // 8) for g, n in groups.items()}, **given)


class Gated(nn.Module):
    """What a foreign network may hold: a sum that broadcasts, a sum with a number, a map read twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding="same"))
        self.relu = nn.ReLU()

    def forward(self, x):
        y = self.relu(self.a(x))
        z = self.b(y)
        y = self.relu(z + y.mean((2, 3), keepdim=True)) + z
        y = self.relu(self.b(y) + 1.0)
        return self.relu(self.c(y) + y).mean((2, 3))


@pytest.mark.parametrize("arch", ["resnet8", "resnet50", "wrn-28-10", "vgg16-bn", "gated"])
def test_the_low_precision_copy_rounds_no_more_than_autocast(arch):
    model = Gated() if arch == "gated" else narrow(arch)
    model.eval()
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        exact = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            usual = (model(x) - exact).abs().max()
        copy = inference_copy(model, x, torch.bfloat16)(x)
        error = (copy - exact).abs().max()
    assert copy.dtype == torch.float32
    assert 0 < error < 2 * usual
