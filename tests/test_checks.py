"""Networks that would be believed without a word: each kind is refused, or answered as plain torch answers."""

import types

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from lthlib.core.errors import UserError
from lthlib.networks.checks import check_deterministic
from lthlib.networks.fast import inference_copy, runs_in_parallel
from lthlib.networks.inputs import as_input
from lthlib.networks.predict import predict
from lthlib.networks.weights import plain_copy, used_weights

PIXELS = torch.randint(256, (40, 12, 12, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
X = as_input(PIXELS)


class Net(nn.Module):
    def __init__(self, norm=True):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=norm)
        self.fc = nn.Linear(8, 5)
        self.eval()

    def forward(self, x):
        return self.fc(self.hidden(x))

    def hidden(self, x):
        return self.norm(self.conv(x)).relu().mean((2, 3))


def hooked():
    net = Net()
    net.norm.register_forward_hook(lambda module, inputs, output: output * 3)
    net.conv.register_forward_hook(lambda module, inputs, output: output - 1)
    return net


def hooked_as_a_whole():
    net = Net()
    net.register_forward_hook(lambda module, inputs, output: output[:, [1, 0, 2, 3, 4]])
    return net


def replaced():
    net = Net()
    net.forward = types.MethodType(lambda self, x: self.fc(self.hidden(1 - x)), net)
    return net


class Stash(Net):
    """Reads in one layer what another has left on the network."""

    def forward(self, x):
        self.seen = self.conv(x)
        return self.later()

    def later(self):
        return self.fc(self.seen.mean((2, 3)))


def stashing_in_a_closure():
    net, seen = Net(), {}
    net.conv.register_forward_hook(lambda module, inputs, output: seen.update(last=output))
    net.forward = lambda x: (net.conv(x), net.fc(seen["last"].mean((2, 3))))[1]
    return net


class Branching(Net):
    def forward(self, x):
        return super().forward(x if len(x) > 0 and x.shape[2] > 4 else -x)


class Halved(Net):
    """Answers in half precision."""

    def forward(self, x):
        return super().forward(x).bfloat16()


class Viewing(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(3 * 12 * 12, 5)

    def forward(self, x):
        return self.fc(x.view(len(x), -1))


@pytest.mark.parametrize("make", [Net, hooked, hooked_as_a_whole, replaced, Stash, stashing_in_a_closure, Branching])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_fast_copy_answers_as_the_network_does(make, threads):
    net, before = make(), torch.get_num_threads()
    with torch.no_grad():
        expected = net(X.contiguous())
    network = inference_copy(net, X[:4])
    torch.set_num_threads(threads)
    found = predict(network, PIXELS, batch=3)
    torch.set_num_threads(before)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_network_that_needs_images_in_one_layout_gets_them():
    net = Viewing()
    with torch.no_grad():
        expected = net(X.contiguous())
    network = inference_copy(plain_copy(net, X), X)
    torch.testing.assert_close(predict(network, PIXELS), expected, rtol=1e-4, atol=1e-5)


def test_logits_of_half_precision_become_float32():
    net = Halved()
    with torch.no_grad():
        expected = net(X).float()
    torch.testing.assert_close(predict(inference_copy(net, X), PIXELS), expected, rtol=0.02, atol=0.02)


def test_a_network_that_computes_with_anothers_weights_is_refused():
    with pytest.raises(UserError, match="does not compute with its own weights"):
        plain_copy(stashing_in_a_closure(), X)


def test_threads_share_only_what_keeps_nothing():
    assert runs_in_parallel(inference_copy(Net(), X))
    for make in (hooked, replaced, stashing_in_a_closure, Branching):
        assert not runs_in_parallel(inference_copy(make(), X))


class Chance(Net):
    def forward(self, x):
        return super().forward(x) + torch.rand(1)


class NumpyChance(Net):
    def forward(self, x):
        return super().forward(x) + float(np.random.default_rng().random())


class Memory(Net):
    last = 0.0

    def forward(self, x):
        now, self.last = self.last, super().forward(x).mean()
        return super().forward(x) + now


class Sixth(Net):
    """Another network from its sixth call on."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) + (self.calls > 5)


class Rare(Net):
    """Draws, but hardly ever uses it."""

    def forward(self, x):
        return super().forward(x) * (torch.rand(1) > 1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Chance, "draws random numbers"),
        (NumpyChance, "draws random numbers"),
        (Rare, "draws random numbers"),
        (lambda: Net().train(), "answer for an image depends on the other images|remembers earlier"),
        (Memory, "remembers earlier images"),
        (Sixth, "depends on the other images"),
        (lambda: Net(norm=False), "depends on the other images of its batch"),
    ],
)
def test_an_answer_that_depends_on_more_than_the_image_is_refused(make, words):
    state = torch.random.get_rng_state()
    net = make()
    with pytest.raises(UserError, match=words):
        check_deterministic(net, X[:1])
    with pytest.raises(UserError, match=words):
        plain_copy(make(), X[:1]) if make is Sixth else check_deterministic(make(), X[:4])
    torch.random.set_rng_state(state)


class Returning(Net):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(super().forward(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: (y, y), "returns a tuple; it must return one tensor"),
        (lambda y: {"logits": y}, "returns a dict; it must return one tensor"),
        (lambda y: y[:1], "one row of logits an image"),
        (lambda y: y[:, :, None], "one row of logits an image"),
        (lambda y: y / 0, "not finite"),
        (lambda y: y @ y, "cannot take images of .3, 12, 12."),
    ],
)
def test_anything_but_a_row_of_logits_an_image_is_refused(change, words):
    with pytest.raises(UserError, match=words) as caught:
        inference_copy(Returning(change), X)
    assert "\n" not in str(caught.value)


def test_rows_that_are_missing_or_broken_later_are_refused():
    for change in (lambda y: y[:30], lambda y: y / (len(y) < 30)):
        network = inference_copy(Returning(change), X)
        with pytest.raises(UserError, match=r"one row of logits|not finite"):
            predict(network, PIXELS, batch=40)


class MaskedConv(nn.Conv2d):
    """A mask in a buffer."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("mask", torch.ones_like(self.weight))

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight * self.mask, self.bias)


class MaskedLinear(nn.Module):
    """A mask beside the weight, a plain tensor."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight, self.mask = nn.Parameter(torch.randn(n_out, n_in)), torch.ones(n_out, n_in)

    def forward(self, x):
        return nn.functional.linear(x, weight=self.weight * self.mask)


def masked():
    net = Net()
    net.conv, net.fc = MaskedConv(3, 8, 3), MaskedLinear(8, 5)
    net.conv.mask[:4], net.fc.mask[:, :2] = 0, 0
    return net.eval()


def pruned():
    net = Net()
    prune.ln_structured(net.conv, "weight", amount=4, n=2, dim=0)
    prune.random_structured(net.fc, "weight", amount=2, dim=1)
    return net


@pytest.mark.parametrize("make", [masked, pruned])
def test_zeros_are_counted_where_layers_compute_with_them(make):
    net = make()
    found = used_weights(net, X)
    zeros = {name: int((weight == 0).sum()) for name, (_, weight) in found.items()}
    assert zeros == {"conv.weight": 4 * 27, "fc.weight": 10}
    assert {name: kind for name, (kind, _) in found.items()} == {"conv.weight": "conv", "fc.weight": "linear"}
    plain = plain_copy(net.train(), X)
    assert net.training
    assert {n: int((w == 0).sum()) for n, w in plain.named_parameters() if n in zeros} == zeros
    with torch.no_grad():
        torch.testing.assert_close(plain(X), net.eval()(X))


@pytest.mark.parametrize(
    "how", [weight_norm, spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm]
)
def test_a_reparametrised_network_becomes_a_plain_one(how):
    net = Net()
    how(net.conv)
    net.eval()
    plain = plain_copy(net, X)
    assert plain.state_dict().keys() == Net().state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(plain(X), net(X))
    assert len(net.state_dict()) > len(plain.state_dict())  # as found


class Doubling(MaskedConv):
    def forward(self, x):
        return nn.functional.conv2d(x, self.weight * 2, self.bias)


def test_weights_that_cannot_be_worked_in_stay_as_they_are():
    net = Net()
    net.conv = Doubling(3, 8, 3)
    plain = plain_copy(net, X)
    assert torch.equal(plain.conv.weight, net.conv.weight)
