import numpy as np
import pytest
import safetensors.torch
import torch

from lthlib import data, models
from lthlib.predictions import Subject, for_inference, predict, sample
from lthlib.tickets import Ticket
from lthlib.train import as_input


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(256, (40, 32, 32, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def network(arch):
    """With running statistics off their initial values, so that a wrong fold shows."""
    model = models.build(
        arch, in_channels=3, num_classes=10, image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3, seed=0
    )
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor, low in (
                (module.running_mean, -0.2),
                (module.running_var, 0.5),
                (module.weight.data, 0.5),
                (module.bias.data, -0.2),
            ):
                tensor.copy_(low + torch.rand(tensor.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("arch", ["resnet8", "resnet20s", "resnet18", "vgg16-bn"])
def test_the_folded_network_gives_the_same_logits(arch, pixels):
    model = network(arch)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        expected = model(as_input(pixels))
    folded = for_inference(model)
    n_norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    assert n_norms == 0
    found = predict(folded, pixels, precision="float32", batch=16)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_low_precision_stays_near(pixels):
    folded = for_inference(network("resnet20s"))
    exact = predict(folded, pixels, precision="float32")
    rough = predict(folded, pixels, precision="bfloat16")
    assert 0 < (rough - exact).abs().max() < 0.05 * exact.std() + 0.05 * exact.abs().max()


def test_logits_are_computed_once_and_hold_their_labels(tiny, store, monkeypatch):
    subject = Subject(Ticket(**tiny), store, "float32")
    first = subject.logits("test", 200)
    folder = store.path(f"predictions/{subject.ticket.id}/test-200-float32")
    kept = safetensors.torch.load_file(folder / "logits.safetensors")
    test = data.load("mnist5k", store).test
    which = sample(test.labels, 200)
    assert torch.equal(kept["labels"], test.labels[which])
    with torch.no_grad():
        expected = subject.model(as_input(test.pixels[which]))
    np.testing.assert_allclose(first, expected.numpy(), rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(Subject, "fast_model", property(lambda self: pytest.fail("a second forward pass")))
    assert np.array_equal(Subject(Ticket(**tiny), store, "float32").logits("test", 200), first)
