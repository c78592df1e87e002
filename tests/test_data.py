import io
import math
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from lthlib import data
from lthlib.core.errors import UserError
from lthlib.core.store import Store
from lthlib.data import folders


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LTHLIB_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    data.load.cache_clear()
    return tmp_path / "data"


@pytest.fixture
def empty_store(tmp_path):
    return Store(tmp_path / "store")


def picture(path, size=(8, 8), mode="RGB", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(array).save(path)
    return array


def split(folder, n=4, **more):
    return {
        (part, c, i): picture(folder / part / c / f"{i}.png", seed=hash((part, c, i)) % 1000, **more)
        for part in ("train", "test")
        for c in ("cat", "dog")
        for i in range(n)
    }


def test_mnist5k_is_the_embedded_set_in_its_fixed_split(store):
    found = data.load("mnist5k", store)
    assert found.train.pixels.shape == (4000, 28, 28, 1)
    assert found.test.labels.bincount().tolist() == [100] * 10
    assert found.train.labels.bincount().tolist() == [400] * 10
    every = torch.cat([found.train.pixels, found.test.pixels]).flatten(1)
    assert len(every.unique(dim=0)) == 5000  # no image on both sides
    train = found.train.pixels.double() / 255
    assert found.mean[0] == pytest.approx(train.mean().item(), rel=1e-12)
    assert found.std[0] == pytest.approx(train.std(correction=0).item(), rel=1e-9)


def test_a_part_of_the_training_images_is_stratified_and_fixed(store):
    some = data.load("mnist5k", store, 100)
    assert some.train.labels.bincount().tolist() == [10] * 10
    data.load.cache_clear()
    assert torch.equal(some.train.pixels, data.load("mnist5k", store, 100).train.pixels)
    with pytest.raises(UserError, match="10 to 4000"):
        data.load("mnist5k", store, 9)


def test_a_long_tail_falls_by_one_factor_a_class_and_leaves_the_test_images(store):
    whole, tail = data.load("mnist5k", store), data.load("mnist5k@tail16", store)
    counts = tail.train.labels.bincount()
    assert counts.tolist() == [math.floor(400 * 16 ** (-c / 9) + 1e-9) for c in range(10)]
    assert counts[0] == 400  # no class has more: the largest such choice
    assert counts[9] == 25
    assert torch.equal(tail.test.pixels, whole.test.pixels)
    assert (tail.mean, tail.std) == (whole.mean, whole.std)
    every = {row.tobytes() for row in whole.train.pixels.numpy()}
    assert {row.tobytes() for row in tail.train.pixels.numpy()} <= every
    some = data.load("mnist5k@tail16", store, 500).train.labels.bincount()
    assert some[0] / some[9] == pytest.approx(16, rel=0.1)
    assert 490 <= some.sum() <= 500
    assert data.title_of("mnist5k@tail16").endswith("long tail 16:1")


@pytest.mark.parametrize(
    ("name", "size", "said"), [("mnist5k@tail16", 4000, "may be"), ("mnist5k@tail9999", 500, "may be")]
)
def test_a_tail_that_images_do_not_allow_is_refused(store, name, size, said):
    with pytest.raises(UserError, match=said):
        data.load(name, store, size)


def test_a_tail_is_no_out_of_distribution_set():
    with pytest.raises(UserError, match="has no tail"):
        data.check_ood("mnist5k@tail16")


def test_a_folder_and_a_zip_of_it_give_the_same_images(folder, empty_store):
    arrays = split(folder / "pets")
    with zipfile.ZipFile(folder / "zipped.zip", "w") as archive:
        for path in sorted((folder / "pets").rglob("*.png")):
            archive.write(path, path.relative_to(folder / "pets"))
    pets, zipped = (data.load(name, empty_store) for name in ("pets", "zipped"))
    assert pets.classes == ("cat", "dog")
    assert torch.equal(pets.train.pixels, zipped.train.pixels)
    assert torch.equal(pets.test.labels, torch.tensor([0] * 4 + [1] * 4))
    assert np.array_equal(pets.train.pixels[5].numpy(), arrays["train", "dog", 1])


def test_a_folder_of_classes_alone_is_split_by_class(folder, empty_store):
    for c in ("a", "b"):
        for i in range(10):
            picture(folder / "flat" / c / f"{i}.png", mode="L", seed=i)
    flat = data.load("flat", empty_store)
    assert flat.train.labels.bincount().tolist() == [8, 8]
    assert flat.test.labels.bincount().tolist() == [2, 2]
    assert flat.channels == 1


def test_odd_sizes_can_be_scaled_and_cropped(folder, empty_store):
    split(folder / "wide", size=(20, 10))
    with pytest.raises(UserError, match="wide@10"):
        data.load("wide", empty_store)
    assert data.load("wide@16", empty_store).train.pixels.shape[1:] == (16, 16, 3)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_set_too_large_to_hold_is_read_on_demand_and_is_the_same(folder, empty_store, monkeypatch, zipped):
    split(folder / "pets", n=5, size=(11, 9))
    if zipped:
        with zipfile.ZipFile(folder / "pets.zip", "w") as archive:
            for path in (folder / "pets").rglob("*.png"):
                archive.write(path, path.relative_to(folder / "pets"))
        shutil.rmtree(folder / "pets")
    held = data.load("pets@8", Store(folder.parent / "held"))
    data.load.cache_clear()
    monkeypatch.setattr(folders, "HELD_UP_TO", 0)
    found = data.load("pets@8", empty_store)
    pixels = found.test.pixels
    assert isinstance(pixels, data.OnDemand)
    assert pixels.shape == (10, 8, 8, 3)
    assert torch.equal(pixels[:], held.test.pixels)
    assert torch.equal(pixels[3], held.test.pixels[3])
    some = torch.tensor([7, 0, 7])
    assert torch.equal(found.test.subset(some).pixels[:], held.test.pixels[some])
    batches = list(pixels.split(4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat(batches), held.test.pixels)
    assert (found.mean, found.std) == (held.mean, held.std)
    assert not list((empty_store.root / "data").rglob("*pixels*"))


def test_reading_on_demand_is_one_batch_ahead():
    read = []

    def rows(positions):
        read.append(len(positions))
        return np.zeros((len(positions), 2, 2, 1), np.uint8)

    batches = data.OnDemand(rows, np.arange(100), (2, 2, 1)).split(10)
    for seen, _ in zip(range(1, 6), batches, strict=False):
        assert sum(read) <= 10 * (seen + 1)


def test_what_is_read_on_demand_changes_with_its_files(folder, empty_store, monkeypatch):
    split(folder / "pets")
    monkeypatch.setattr(folders, "HELD_UP_TO", 0)
    first = data.load("pets", empty_store).digest
    data.load.cache_clear()
    assert data.load("pets", empty_store).digest == first
    picture(folder / "pets" / "train" / "cat" / "0.png", seed=77)
    data.load.cache_clear()
    assert data.load("pets", empty_store).digest != first
    (folder / "pets" / "test" / "cat" / "2.png").write_bytes(b"no image")
    data.load.cache_clear()
    with pytest.raises(UserError, match=r"2.png is not a readable image"):
        data.load("pets", empty_store).test.pixels[:]


def break_one_class(root):
    for path in (root / "train" / "dog", root / "test" / "dog"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


def break_empty_class(root):
    for file in (root / "train" / "dog").iterdir():
        file.unlink()


def break_unreadable(root):
    (root / "train" / "dog" / "2.png").write_bytes(b"\x89PNG\r\n not an image")


def break_odd(root):
    picture(root / "test" / "cat" / "1.png", size=(9, 9))


def break_classes(root):
    (root / "test" / "dog").rename(root / "test" / "wolf")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (break_one_class, "two at least"),
        (break_empty_class, "has no images: fill it or remove it"),
        (break_unreadable, "2.png is not a readable image"),
        (break_odd, "1.png is 9 x 9 pixels"),
        (break_classes, "same classes"),
    ],
)
def test_a_faulty_folder_is_named_with_its_fault(folder, empty_store, harm, words):
    split(folder / "pets")
    harm(folder / "pets")
    with pytest.raises(UserError, match=words):
        data.load("pets", empty_store)
    assert not list((empty_store.root / "data").glob("*"))


def test_a_broken_zip_and_unknown_names(folder, empty_store):
    (folder / "bad.zip").write_bytes(b"PK not a zip")
    with pytest.raises(UserError, match="zip"):
        data.load("bad", empty_store)
    with pytest.raises(UserError, match="Did you mean 'mnist5k'"):
        data.load("mnist", empty_store)
    for name in ("../bad", ".", "", "a/b"):
        with pytest.raises(UserError):
            data.load(name, empty_store)


def test_cifar10_in_its_published_format_has_the_papers_split(folder, empty_store, monkeypatch):
    """Five pickled batches of channel-first rows, as distributed; torchvision's checksums do not hold for ours."""
    from torchvision import datasets

    root = folder / "cifar-10-batches-py"
    root.mkdir()
    rng = np.random.default_rng(0)
    rows = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        rows[name] = rng.integers(0, 256, (1100, 3072), dtype=np.uint8)
        batch = {"data": rows[name], "labels": [i % 10 for i in range(1100)]}
        (root / name).write_bytes(pickle.dumps(batch))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *a: True)
    found = data.load("cifar10", empty_store)
    assert (len(found.train), len(found.validation), len(found.test)) == (500, 5000, 1100)
    first = rows["data_batch_1"][0].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(found.train.pixels[0].numpy(), first)


@pytest.mark.parametrize(
    ("name", "kind", "file"),
    [
        ("cifar10", "CIFAR10", "cifar-10-batches-py/test_batch"),
        ("cifar100", "CIFAR100", "cifar-100-python/test"),
        ("svhn", "SVHN", "test_32x32.mat"),
    ],
)
def test_published_files_that_are_damaged_are_never_unpickled(folder, empty_store, monkeypatch, name, kind, file):
    from torchvision import datasets

    def offline(self):
        raise OSError("network unreachable")

    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(b"cbuiltins\nexit\n(I0\ntR.")  # a pickle that ends the process
    monkeypatch.setattr(getattr(datasets, kind), "download", offline)
    with pytest.raises(UserError, match=f"{kind} is not in .*checksums.*{file.split('/')[0]}"):
        data.load(name, empty_store)


def test_missing_data_without_network_is_one_sentence(folder, empty_store, monkeypatch):
    from torchvision import datasets

    def offline(self):
        raise OSError("network unreachable")

    monkeypatch.setattr(datasets.CIFAR10, "download", offline)
    with pytest.raises(UserError, match="LTHLIB_DATA"):
        data.load("cifar10", empty_store)


@pytest.mark.parametrize("name", ["gaussian", "photos", "digits"])
def test_ood_sets_are_fixed_and_of_the_right_shape(store, name):
    like = data.load("mnist5k", store)
    first, again = data.ood_images(name, like, 50, store), data.ood_images(name, like, 50, store)
    assert first.shape == (50, 28, 28, 1)
    assert torch.equal(first, again)
    assert len(first.flatten(1).unique(dim=0)) == 50


def test_gaussian_noise_has_the_papers_law(store):
    """clip(N(0, 1/2), -1, 1) / 2 + 1/2: mean 1/2; 2 Phi(-2) of the pixels lie on the two ends."""
    pixels = data.ood_images("gaussian", data.load("mnist5k", store), 500, store).double() / 255
    ends = ((pixels == 0) | (pixels == 1)).double().mean().item()
    assert pixels.mean().item() == pytest.approx(0.5, abs=0.002)
    assert ends == pytest.approx(0.0455 + 0.0021, abs=0.002)  # and what rounding to 255 levels adds


def test_a_folder_can_be_an_ood_set_of_another_size(folder, empty_store):
    for i in range(5):
        picture(folder / "foreign" / "test" / "x" / f"{i}.png", size=(16, 16), seed=i)
        picture(folder / "foreign" / "test" / "y" / f"{i}.png", size=(16, 16), seed=50 + i)
    like = data.load("mnist5k", empty_store)
    assert data.ood_images("foreign", like, 100, empty_store).shape == (10, 28, 28, 1)
    with pytest.raises(UserError, match="only serve as an out-of-distribution set"):
        data.load("foreign", empty_store)
    with pytest.raises(UserError, match="Did you mean 'gaussian'"):
        data.ood_images("gausian", like, 10, empty_store)


def test_any_folder_of_images_can_be_an_ood_set(folder, empty_store, monkeypatch):
    """Without parts and without classes too; all its images count, also where they are read on demand."""
    arrays = [picture(folder / "loose" / f"{i}.png", size=(28, 28), mode="L", seed=i) for i in range(6)]
    like = data.load("mnist5k", empty_store)
    found = data.ood_images("loose", like, 100, empty_store)
    assert np.array_equal(found[..., 0].numpy(), arrays)
    every_other = data.ood_images("loose", like, 3, empty_store)
    assert torch.equal(every_other, found[::2])
    monkeypatch.setattr(folders, "HELD_UP_TO", 0)
    again = data.ood_images("loose", like, 100, empty_store)
    assert isinstance(again, data.OnDemand)
    assert torch.equal(again[:], found)
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no images"):
        data.ood_images("empty", like, 10, empty_store)


def test_a_set_may_be_foreign_to_some_classes_only(folder, empty_store):
    """As ImageNet-O, in its published layout, is to 200 of ImageNet's."""
    for part in ("train", "val"):
        for wnid in ("n01", "n02", "n03", "n04"):
            picture(folder / "imagenet" / part / wnid / "a.png", size=(16, 16))
    for wnid in ("n04", "n02"):
        picture(folder / "imagenet-o" / wnid / "x.png", size=(20, 16))
    picture(folder / "others" / "n02" / "x.png", size=(16, 16))
    picture(folder / "others" / "dog" / "x.png", size=(16, 16))
    like = data.load("imagenet", empty_store)
    assert data.ood_classes("imagenet-o@16", like) == ("n02", "n04")
    assert data.ood_images("imagenet-o@16", like, 9, empty_store).shape == (2, 16, 16, 3)
    assert data.ood_classes("others", like) == ()  # not all are classes of the data set
    assert data.ood_classes("imagenet", like) == ()  # all of them: nothing to leave out
    assert data.ood_classes("gaussian", like) == ()


def test_a_jpeg_is_decoded_as_pillow_does(folder, empty_store):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(buffer, "JPEG")
    for part in ("train", "test"):
        for c in ("a", "b"):
            path = folder / "jpeg" / part / c / "0.jpg"
            path.parent.mkdir(parents=True)
            path.write_bytes(buffer.getvalue())
    expected = np.asarray(Image.open(io.BytesIO(buffer.getvalue())))
    assert np.array_equal(data.load("jpeg", empty_store).train.pixels[0].numpy(), expected)


def test_one_grey_image_does_not_take_the_colour_from_a_set(folder, empty_store):
    split(folder / "pets")
    expected = data.load("pets", empty_store)
    for part in ("train", "test"):
        first = folder / "pets" / part / "cat" / "0.png"
        Image.fromarray(np.full((8, 8), 90, np.uint8)).save(first)
    data.load.cache_clear()
    found = data.load("pets", empty_store)
    assert found.train.pixels.shape == expected.train.pixels.shape == (8, 8, 8, 3)
    assert (found.train.pixels[0] == 90).all()
    assert (found.test.pixels[0] == 90).all()
    assert torch.equal(found.test.pixels[1:], expected.test.pixels[1:])


def test_a_set_with_colour_in_one_part_alone_has_it_in_both(folder, empty_store, monkeypatch):
    split(folder / "pets")
    for file in (folder / "pets" / "test").rglob("*.png"):
        Image.fromarray(np.full((8, 8), 90, np.uint8)).save(file)
    for held in (2**30, 0):  # in memory, and read on demand
        monkeypatch.setattr(folders, "HELD_UP_TO", held)
        data.load.cache_clear()
        found = data.load("pets", Store(empty_store.root / str(held)))
        assert found.test.pixels[:].shape == (8, 8, 8, 3)
        assert found.channels == 3
