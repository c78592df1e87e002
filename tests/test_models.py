import math
import re

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lthlib import networks
from lthlib.core.errors import UserError
from lthlib.core.store import ROOT
from lthlib.networks.resnet import PadShortcut

RGB = {"in_channels": 3, "num_classes": 10, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
GRAY = {"in_channels": 1, "num_classes": 10, "image_size": 28, "mean": [0.1], "std": [0.3]}


def n_parameters(model):
    return sum(p.numel() for p in model.parameters())


def narrow(arch, factor=8, **given):
    """The architecture itself, with every group at least `factor` times narrower, so that tests are quick."""
    given = {"image_size": 32, **RGB, **given}
    groups = networks.all_groups(networks.build(arch, **given))
    return networks.build(arch, channels={g: max(2, n // factor) for g, n in groups.items()}, **given)


@pytest.mark.parametrize(
    ("arch", "published"),
    [("resnet20s", 269_722), ("resnet18", 11_173_962), ("resnet50", 23_520_842), ("wrn-28-10", 36_479_194)],
)
def test_parameter_counts_are_the_published_ones(arch, published):
    assert n_parameters(networks.build(arch, image_size=32, **RGB)) == published


def test_resnet8_has_the_weights_of_its_description():
    stem, stages = 9 * 1 * 16, 2 * 9 * 16**2 + 9 * (16 * 32 + 32**2) + 9 * (32 * 64 + 64**2)
    shortcuts = 16 * 32 + 32 * 64
    model = networks.build("resnet8", **GRAY)
    assert networks.convolution_cost(model)({}) == stem + stages + shortcuts == 76_432
    norms = 2 * (3 * 16 + 3 * 32 + 3 * 64)
    assert n_parameters(model) == 76_432 + norms + 64 * 10 + 10


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_imagenet_resnets_compute_what_torchvision_computes(arch):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, arch)(num_classes=10)
    ours = networks.build(arch, image_size=64, **RGB)
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(ours.normalize(x)), rtol=1e-5, atol=1e-5)


def test_cifar_stem_keeps_the_size_and_imagenet_stem_quarters_it():
    for size, expected in ((32, 32), (64, 16)):
        model = networks.build("resnet18", image_size=size, **RGB)
        seen = []
        model.layer1.register_forward_hook(lambda m, i, o, seen=seen: seen.append(o.shape[-1]))
        model.eval()(torch.rand(1, 3, size, size))
        assert seen == [expected]


def test_vgg_has_the_convolutions_of_torchvisions():
    ours = [m for m in networks.build("vgg16-bn", image_size=32, **RGB).modules() if isinstance(m, nn.Conv2d)]
    with torch.device("meta"):
        theirs = [m for m in torchvision.models.vgg16_bn().features if isinstance(m, nn.Conv2d)]
    assert [m.weight.shape for m in ours] == [m.weight.shape for m in theirs]


def test_option_a_shortcut_halves_the_picture_and_pads_both_sides():
    x = torch.arange(2 * 4 * 4.0).view(1, 2, 4, 4)
    y = PadShortcut(2, 5)(x)
    assert y.shape == (1, 5, 2, 2)
    torch.testing.assert_close(y[:, 1:3], x[:, :, [0, 2]][:, :, :, [0, 2]])
    assert y[:, [0, 3, 4]].abs().sum() == 0
    with pytest.raises(UserError, match="must not fall"):
        PadShortcut(5, 2)


def test_wide_resnet_projects_behind_the_first_relu():
    """A stream negative everywhere reaches no branch of a projecting block, and passes the next whole."""
    block = narrow("wrn-28-10").blocks[0].eval()
    stream = -torch.rand(1, block.conv1.in_channels, 8, 8) - 0.1
    assert block(stream).abs().max() == 0
    identity = narrow("wrn-28-10").blocks[1].eval()
    stream = -torch.rand(1, identity.conv1.in_channels, 8, 8) - 0.1
    torch.testing.assert_close(identity(stream), stream)


@pytest.mark.parametrize("arch", networks.ARCHITECTURES)
def test_every_layer_knows_groups_whose_sizes_agree(arch):
    model = narrow(arch)
    sizes = networks.all_groups(model) | {"input": 3, "classes": 10}
    assert next(iter(model._modules)) == "normalize"
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            assert layer.weight.shape[:2] == (sizes[layer.out_group], sizes[layer.in_group])
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.in_group == layer.out_group
            assert layer.num_features == sizes[layer.out_group]


@pytest.mark.parametrize("arch", networks.ARCHITECTURES)
@pytest.mark.parametrize("size", [28, 32, 64])
def test_every_network_is_traceable_and_locally_affine(arch, size):
    given = {**GRAY, "image_size": size} if size == 28 else {**RGB, "image_size": size}
    model = narrow(arch, 16, **given).double().eval()
    generator = torch.Generator().manual_seed(1)
    x, d = torch.rand(2, 1, given["in_channels"], size, size, generator=generator, dtype=torch.float64)
    h = 1e-6
    with torch.no_grad():
        a, b, c = (model(x + k * h * d) for k in range(3))
        traced = torch.fx.symbolic_trace(model)(x)
    assert (b - a).abs().max() > 1e-9
    assert (a - 2 * b + c).abs().max() < 1e-6 * (b - a).abs().max()
    torch.testing.assert_close(traced, a, rtol=0, atol=0)


def test_normalisation_is_inside():
    model = networks.build("resnet8", image_size=32, seed=3, **RGB).eval()
    plain = networks.build("resnet8", image_size=32, seed=3, **{**RGB, "mean": [0.0] * 3, "std": [1.0] * 3}).eval()
    x = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(RGB[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    torch.testing.assert_close(model(x), plain((x - mean) / std))
    assert not any("normalize" in name for name in model.state_dict())


def test_normalisation_is_exact_in_the_precision_of_the_network():
    """0.1 is no float32: a network cast to double must not compute with what single precision made of it."""
    model = networks.build("resnet8", **{**GRAY, "mean": [0.1], "std": [0.3]})
    x = torch.rand(2, 1, 28, 28)
    expected = (x - torch.tensor(0.1)) / torch.tensor(0.3)
    for _ in range(2):
        assert torch.equal(model.normalize(x), expected)
        model.double()
        assert torch.equal(model.normalize(x.double()), (x.double() - 0.1) / 0.3)
        model.float()
    assert not any("normalize" in name for name in model.state_dict())


def test_initial_weights_depend_on_the_seed_alone():
    before = torch.random.get_rng_state()
    one = networks.build("resnet8", seed=1, **GRAY).state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)
    again, other = (networks.build("resnet8", seed=s, **GRAY).state_dict() for s in (1, 2))
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])
    assert not torch.equal(one["fc.weight"], other["fc.weight"])


def test_initial_variance_is_two_over_fan_out():
    model = networks.build("resnet18", image_size=32, **RGB)
    weight = model.layer2[0].conv1.weight  # 64 -> 128: fan-in would give twice the variance
    n = weight.numel()
    assert abs(weight.var().item() * 128 * 9 / 2 - 1) < 5 * math.sqrt(2 / n)
    norm = model.layer2[0].bn1
    assert norm.weight.eq(1).all()
    assert norm.bias.eq(0).all()


def test_other_widths_are_built_from_a_small_mapping():
    model = networks.build("resnet8", channels={"layer2.0.inner": 5, "stage3": 7}, **GRAY)
    assert model.layer2[0].conv1.out_channels == model.layer2[0].conv2.in_channels == 5
    assert model.layer3[0].conv2.out_channels == model.layer3[0].downsample[0].out_channels == 7
    assert model.fc.in_features == 7
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert networks.all_groups(networks.rebuild(model, {"stage3": 9}))["stage3"] == 9


@pytest.mark.parametrize("arch", ["resnet8", "resnet20s"])
def test_half_and_twice_the_width_are_that_of_every_group_but_the_input(arch):
    groups = {x: networks.all_groups(networks.build(f"{arch}{x}", image_size=32, **RGB)) for x in ("", "-x0.5", "-x2")}
    hidden = [name for name in groups[""] if name not in ("input", "classes", "logits")]
    assert len(hidden) > 3
    for name in hidden:
        assert (groups["-x0.5"][name], groups["-x2"][name]) == (groups[""][name] / 2, groups[""][name] * 2)


def test_padding_streams_are_settable_but_not_prunable():
    model = networks.build("resnet20s", image_size=32, **RGB)
    assert {"stage1", "stage2", "stage3"} <= set(networks.all_groups(model))
    assert not {"stage1", "stage2", "stage3"} & set(networks.channel_groups(model))
    assert len(networks.channel_groups(model)) == 9


@pytest.mark.parametrize("arch", ["resnet20s", "wrn-28-10", "vgg16-bn", "resnet50"])
def test_macs_agree_with_torchs_flop_counter(arch):
    model = narrow(arch).train()
    model.normalize.eval()
    modes = [m.training for m in model.modules()]
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, 32, 32))
    model.train()
    model.normalize.eval()
    assert 2 * sum(networks.macs(model, (3, 32, 32)).values()) == counter.get_total_flops()
    assert modes == [m.training for m in model.modules()]


def test_convolution_cost_is_the_count_of_the_network_built():
    model = networks.build("resnet50", image_size=32, **RGB)
    widths = {name: n // 3 for name, n in networks.all_groups(model).items()}
    small = networks.rebuild(model, widths)
    built = sum(m.weight.numel() for m in small.modules() if isinstance(m, nn.Conv2d))
    assert networks.convolution_cost(model)(widths) == built


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "resnet80"}, "Did you mean 'resnet8'"),
        ({"channels": {"stage4": 3}}, "Unknown channel group of resnet8 'stage4'.*stage3"),
        ({"channels": {"stage3": 0}}, "at least 1"),
        ({"channels": {"classes": 3}}, "Unknown channel group"),
        ({"mean": [0.5]}, "one finite number per input channel"),
        ({"std": [0.2, 0.0, 0.2]}, "positive"),
    ],
)
def test_what_cannot_be_built_is_said_in_a_sentence(change, message):
    given = {"arch": "resnet8", "image_size": 32, **RGB, **change}
    with pytest.raises(UserError, match=message):
        networks.build(**given)


def test_a_foreign_network_cannot_be_rebuilt():
    with pytest.raises(UserError, match="does not say how to rebuild"):
        networks.rebuild(nn.Sequential(nn.Conv2d(1, 2, 3)), {})


def test_the_books_example_of_a_network_is_one():
    page = (ROOT / "book" / "adding.md").read_text()
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", page, re.S) if '"resnet32s"' in c)
    try:
        exec(compile(code, "example", "exec"), {})
        # Published: 0.46 million parameters, with biases nowhere but in the linear layer.
        assert n_parameters(networks.build("resnet32s", image_size=32, **RGB)) == 464_154
    finally:
        networks.ARCHITECTURES.pop("resnet32s", None)
