import threading

import numpy as np
import pytest
import torch

from lthlib import data, networks
from lthlib.core.errors import UserError
from lthlib.core.store import Store
from lthlib.data import corrupted, folders
from lthlib.data.corrupted import sample
from lthlib.data.corruptions import corrupt
from lthlib.networks import predict as predictor
from lthlib.networks.predict import for_inference, predict, scaled_to
from lthlib.tickets.subject import Subject
from lthlib.tickets.ticket import Ticket
from lthlib.training.loop import as_input
from lthlib.training.recipe import Recipe


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(256, (40, 32, 32, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.fixture
def empty_store(tmp_path):
    return Store(tmp_path / "store")


def network(arch):
    """With running statistics off their initial values, so that a wrong fold shows."""
    model = networks.build(arch, in_channels=3, num_classes=10, image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3, seed=0)
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
    folded = for_inference(model, pixels, "float32")
    n_norms = sum(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    assert n_norms == 0
    found = predict(folded, pixels, batch=16)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_low_precision_stays_near(pixels):
    model = network("resnet20s")
    exact = predict(for_inference(model, pixels, "float32"), pixels)
    rough = predict(for_inference(model, pixels, "bfloat16"), pixels)
    assert 0 < (rough - exact).abs().max() < 0.05 * exact.std() + 0.05 * exact.abs().max()


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def in_lanes(monkeypatch):
    """Let networks of a test's own pass for such that threads may share."""
    monkeypatch.setattr(predictor, "runs_in_parallel", lambda network: True)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_batches_in_several_lanes_are_the_same_in_the_same_order(pixels, three_threads, precision):
    model = for_inference(network("resnet8"), pixels, precision)
    on_demand = data.OnDemand(lambda which: pixels[which].numpy(), np.arange(len(pixels)), pixels.shape[1:])
    with torch.inference_mode():
        expected = torch.cat([model(as_input(part)) for part in pixels.split(7)])
    for images in (pixels, on_demand):
        found = predict(model, images, batch=7)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not found.is_inference()
        assert torch.get_num_threads() == 3


def test_lanes_run_side_by_side_with_a_share_of_the_threads_each(pixels, three_threads, in_lanes):
    met, seen = threading.Barrier(3), set()

    class Meeting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            met.wait(timeout=30)  # passes only where three batches are under way at once
            seen.add((torch.get_num_threads(), torch.is_inference_mode_enabled()))
            return self.scale * x.flatten(1)[:, :2]

    found = predict(Meeting(), pixels[:9], batch=3)
    assert seen == {(1, True)}
    torch.testing.assert_close(found, as_input(pixels[:9]).flatten(1)[:, :2])


def test_a_failing_batch_ends_the_lanes_and_leaves_the_threads(pixels, three_threads, in_lanes):
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            raise ValueError(f"{len(x)} images")

    before = threading.active_count()
    with pytest.raises(ValueError, match="5 images"):
        predict(Broken(), pixels, batch=5)
    assert torch.get_num_threads() == 3
    assert threading.active_count() == before


def test_a_short_set_is_shared_out_among_the_lanes(pixels, three_threads, in_lanes):
    sizes = []

    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            sizes.append(len(x))
            return x.flatten(1)[:, :2]

    predict(Counting(), pixels)
    assert sorted(sizes) == [12, 14, 14]


def test_logits_are_computed_once_and_hold_their_labels(tiny, store, monkeypatch):
    subject = Subject(Ticket(**tiny), store, "float32")
    first = subject.logits("test", 200)
    folder = store.path(f"predictions/{subject.ticket.id}/test-200-float32")
    test = data.load("mnist5k", store).test
    which = sample(test.labels, 200)
    assert np.array_equal(np.load(folder / "logits.npy"), first)
    assert np.array_equal(np.load(folder / "labels.npy"), test.labels[which].numpy())
    with torch.no_grad():
        expected = subject.model(as_input(test.pixels[which]))
    np.testing.assert_allclose(first, expected.numpy(), rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(Subject, "fast_model", property(lambda self: pytest.fail("a second forward pass")))
    assert np.array_equal(Subject(Ticket(**tiny), store, "float32").logits("test", 200), first)


# --- corrupted images ------------------------------------------------------------------------------------------


def small_set(name, size, channels=3, n=9):
    """A data set of n noisy test images, sorted by class."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (n, size, size, channels), generator=generator).to(torch.uint8)
    images = data.Images(pixels, torch.arange(n) * 3 // n)
    half = (0.5,) * channels
    return data.DataSet(name, ("a", "b", "c"), images, None, images, half, half, f"digest-{size}")


def together(like, name, n, store):
    """All parts, sorted into (5, n, H, W, C)."""
    found = {}
    for severity, count, pixels in corrupted.corrupted_parts(like, name, n, store):
        for i, part in enumerate(pixels.split(count)):
            found.setdefault(severity + i, []).append(part)
    return torch.stack([torch.cat(found[severity]) for severity in (1, 2, 3, 4, 5)]).numpy()


@pytest.mark.parametrize("order", [slice(None), np.random.default_rng(0).permutation(100)])
def test_a_sample_has_every_class_in_proportion(order):
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)[order]
    which = sample(labels, 10)
    assert torch.equal(labels[which].bincount(), torch.tensor([5, 3, 2]))
    assert (which.diff() > 0).all()
    assert torch.equal(sample(labels, 500), torch.arange(100))
    with pytest.raises(UserError, match="at least 1"):
        sample(labels, 0)


def test_corrupted_images_are_made_once_and_shared(empty_store, monkeypatch):
    like = small_set("some", 28, channels=1)
    which = sample(like.test.labels, 5)
    found = together(like, "fog", 5, empty_store)
    for severity, images in enumerate(found, start=1):
        assert np.array_equal(images, corrupt(like.test.pixels[which].numpy(), "fog", severity))
    monkeypatch.setattr(corrupted, "corrupt", lambda *a, **k: pytest.fail("made a second time"))
    assert np.array_equal(together(like, "fog", 5, Store(empty_store.root)), found)


def test_images_too_large_to_keep_are_made_batch_by_batch_and_are_the_same(empty_store, monkeypatch):
    like = small_set("some", 28)
    kept = together(like, "gaussian_noise", 9, empty_store)
    monkeypatch.setattr(corrupted, "KEPT_UP_TO", 0)
    monkeypatch.setattr(corrupted, "PIECE", 2)
    parts = list(corrupted.corrupted_parts(like, "gaussian_noise", 9, empty_store))
    assert max(len(pixels) for _, _, pixels in parts) == 2
    assert np.array_equal(together(like, "gaussian_noise", 9, empty_store), kept)


@pytest.fixture
def cifar_c(tmp_path, monkeypatch):
    """CIFAR-10-C of `small_set`, all severities different, in the data folder."""
    like = small_set("cifar10", 32)
    images = np.random.default_rng(3).integers(0, 256, (5 * 9, 32, 32, 3)).astype(np.uint8)
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    np.save(folder / "fog.npy", images)
    np.save(folder / "labels.npy", np.tile(like.test.labels.numpy(), 5))
    monkeypatch.setenv("LTHLIB_DATA", str(tmp_path))
    return like, images.reshape(5, 9, 32, 32, 3), folder


def test_published_files_are_used_where_they_lie(cifar_c, empty_store, monkeypatch):
    like, images, folder = cifar_c
    assert corrupted.official_folder(like, "fog") == folder
    assert corrupted.official_folder(like, "snow") is None
    assert np.array_equal(together(like, "fog", 4, empty_store), images[:, sample(like.test.labels, 4)])
    before = corrupted.corrupted_version(like, "fog")
    np.save(folder / "fog.npy", images[::-1].reshape(-1, 32, 32, 3))
    assert corrupted.corrupted_version(like, "fog") != before
    assert np.array_equal(together(like, "fog", 4, empty_store), images[::-1, sample(like.test.labels, 4)])
    monkeypatch.setenv("LTHLIB_DATA", str(folder / "nowhere"))
    assert corrupted.official_folder(like, "fog") is None
    made = corrupt(like.test.pixels.numpy(), "fog", 5)
    assert np.array_equal(together(like, "fog", 9, empty_store)[4], made)


def test_published_files_of_other_images_are_refused(cifar_c, empty_store):
    like, _, folder = cifar_c
    np.save(folder / "labels.npy", np.tile(like.test.labels.numpy()[::-1], 5))
    with pytest.raises(UserError, match="does not belong to cifar10"):
        together(like, "fog", 4, empty_store)


def test_a_folder_of_imagenet_c_is_streamed(tmp_path, empty_store, monkeypatch):
    from PIL import Image

    like = small_set("imagenet@224", 224, n=3)
    written = {}
    for severity in (1, 2, 3, 4, 5):
        for i, group in enumerate("abc"):
            path = tmp_path / f"ImageNet-C/fog/{severity}/{group}/x.JPEG"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (224, 224), (40 * severity, 60 * i, 9)).save(path)
            written[severity, i] = np.asarray(Image.open(path))
    monkeypatch.setenv("LTHLIB_DATA", str(tmp_path))
    which = sample(like.test.labels, 2).tolist()
    for i in set(range(3)) - set(which):
        for path in (tmp_path / "ImageNet-C/fog").glob(f"*/{'abc'[i]}/x.JPEG"):
            path.write_bytes(b"not asked for, hence not read")
    found = together(like, "fog", 2, empty_store)
    for severity in (1, 2, 3, 4, 5):
        for k, i in enumerate(which):
            assert np.array_equal(found[severity - 1, k], written[severity, i])


def test_corrupted_logits_are_those_of_each_corrupted_set(tiny, store):
    subject = Subject(Ticket(**tiny), store, "float32")
    names = ("fog", "shot_noise")
    found = {(name, severity): logits for name, severity, logits in subject.corrupted_logits(names, 30)}
    assert list(found) == [(name, severity) for name in names for severity in (1, 2, 3, 4, 5)]
    for (name, severity), logits in found.items():
        ((_, _, pixels),) = corrupted.corrupted_parts(subject.data, name, 30, store, severities=(severity,))
        expected = predict(for_inference(subject.trained.model, pixels, "float32"), pixels)
        assert logits.shape == (30, 10)
        np.testing.assert_allclose(logits, expected.numpy(), rtol=1e-4, atol=1e-4)
    for name, severity, logits in subject.corrupted_logits(names[::-1], 30):
        assert np.array_equal(logits, found[name, severity])


def test_a_set_too_large_to_hold_is_trained_on_and_evaluated_batch_by_batch(tmp_path, tiny, monkeypatch):
    """The same images held in memory and read on demand give the same network and the same logits."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, n in (("train", 40), ("test", 9)):
        for group in ("a", "b"):
            for i in range(n):
                path = tmp_path / "blobs" / part / group / f"{i:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 256, (16, 16, 3)) * (0.5 if group == "a" else 1)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    monkeypatch.setenv("LTHLIB_DATA", str(tmp_path))
    recipe = Recipe(epochs=1, batch_size=20, augment="crop-flip", precision="float32")
    ticket = Ticket(**{**tiny, "data": "blobs", "train_size": None, "recipe": recipe})
    found = []
    for limit in (2**30, 0):
        monkeypatch.setattr(folders, "HELD_UP_TO", limit)
        monkeypatch.setattr(corrupted, "KEPT_UP_TO", limit)
        data.load.cache_clear()
        subject = Subject(ticket, Store(tmp_path / f"store-{limit}"), "float32")
        assert isinstance(subject.data.train.pixels, data.OnDemand if limit == 0 else torch.Tensor)
        shifted = np.stack([logits for _, _, logits in subject.corrupted_logits(("fog", "pixelate"), 12)])
        found.append([subject.logits("test", 12), subject.logits("ood:gaussian", 7), shifted])
    for held, streamed in zip(*found, strict=True):
        np.testing.assert_allclose(streamed, held, rtol=1e-5, atol=1e-5)


def test_batches_shrink_as_images_grow():
    assert scaled_to((32, 32), 125) == scaled_to((64, 64), 125) == 125
    assert scaled_to((128, 128), 120) == 30
    assert scaled_to((4000, 4000), 125) == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tset", "Allowed: train, test"),
        ("ood:nothing", "out-of-distribution set 'nothing'"),
        ("validation", "no validation images"),
    ],
)
def test_an_unknown_image_set_is_named(tiny, store, name, words):
    with pytest.raises(UserError, match=words):
        Subject(Ticket(**tiny), store).images(name, 5)


def test_foreign_images_are_made_once_for_all_tickets(tiny, store, monkeypatch):
    images = Subject(Ticket(**tiny), store).images("ood:photos", 7)
    assert torch.equal(images, data.ood_images("photos", data.load("mnist5k", store, 500), 7, store))
    monkeypatch.setattr(Store, "_make", lambda *a: pytest.fail("made a second time"))
    other = Subject(Ticket(**{**tiny, "seed": 1}), Store(store.root))
    assert torch.equal(other.images("ood:photos", 7), images)
