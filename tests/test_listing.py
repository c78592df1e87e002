import io
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from lthlib import data
from lthlib.core.errors import UserError
from lthlib.core.store import Store

DEVKIT = "ILSVRC2012_devkit_t12"
TRUTH = f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt"
WORDNET = {3: "n01440764", 1: "n01443537", 2: "n02110958"}  # class numbers are not in the order of the names
LINES = [2, 3, 3, 1, 2, 1]  # of the validation images 1 to 6


def grey(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(path, quality=100)


def val(i):
    return f"ILSVRC2012_val_{i:08d}"


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """Training images in class folders, validation image i flat and of the grey level 20 i."""
    monkeypatch.setenv("LTHLIB_DATA", str(tmp_path))
    data.load.cache_clear()
    for name in WORDNET.values():
        grey(tmp_path / "imagenet" / "train" / name / f"{name}_10.JPEG", 0)
    for i in range(1, 7):
        grey(tmp_path / "imagenet" / "val" / f"{val(i)}.JPEG", 20 * i)
    return tmp_path / "imagenet"


def devkit(root):
    """As unpacked: MATLAB structs whose last entry is no class but a group of them."""
    (root / DEVKIT / "data").mkdir(parents=True)
    (root / TRUTH).write_text("".join(f"{number}\n" for number in LINES))
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(number, WORDNET[number], "a word, another", "what", 0) for number in (1, 2, 3)]
    synsets = np.array([*rows, (1001, "n00001740", "entity", "what is", 2)], dtype=kinds).reshape(-1, 1)
    savemat(root / DEVKIT / "data" / "meta.mat", {"synsets": synsets})


def pack(root):
    devkit(root)
    with tarfile.open(root / f"{DEVKIT}.tar.gz", "w:gz") as archive:
        archive.add(root / DEVKIT, DEVKIT)
    shutil.rmtree(root / DEVKIT)


def kaggle(root):
    rows = [f"{val(i)},{WORDNET[n]} 85 1 499 272 {WORDNET[1]} 3 3 9 9" for i, n in enumerate(LINES, 1)]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]))


def names(root):
    (root / "val.txt").write_text("".join(f"{val(i)}.JPEG {WORDNET[n]}\n" for i, n in enumerate(LINES, 1)))


def positions(root):
    order = sorted(WORDNET.values())
    rows = [f"{val(i)}.JPEG\t{order.index(WORDNET[n])}" for i, n in enumerate(LINES, 1)]
    (root / "val.txt").write_text("\r\n".join(rows) + "\r\n\r\n")


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("listing", [devkit, pack, kaggle, names, positions])
def test_flat_images_get_the_classes_of_every_list_in_the_order_of_class_folders(imagenet, tmp_path, listing, zipped):
    listing(imagenet)
    name = "imagenet"
    if zipped:
        shutil.make_archive(str(tmp_path / "packed"), "zip", imagenet)
        name = "packed"
    found = data.load(name, Store(tmp_path / "store"))
    assert found.classes == ("n01440764", "n01443537", "n02110958")
    assert found.test.pixels[:, 0, 0, 0].tolist() == [40, 60, 80, 120, 20, 100]
    assert found.test.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_with_the_devkit_images_may_be_missing(imagenet, tmp_path):
    devkit(imagenet)
    (imagenet / "val" / f"{val(2)}.JPEG").unlink()
    found = data.load("imagenet", Store(tmp_path / "store"))
    assert found.test.pixels[:, 0, 0, 0].tolist() == [60, 80, 120, 20, 100]


def test_of_the_devkit_only_lines_of_images_that_are_there_are_read(imagenet, tmp_path):
    devkit(imagenet)
    (imagenet / "val" / f"{val(2)}.JPEG").unlink()
    lines = (imagenet / TRUTH).read_text().splitlines()
    (imagenet / TRUTH).write_text("\ufeff" + "\n".join([lines[0], "no number", *lines[2:], "", ""]), encoding="utf-8")
    found = data.load("imagenet", Store(tmp_path / "store"))
    assert found.test.pixels[:, 0, 0, 0].tolist() == [60, 80, 120, 20, 100]


def test_another_list_is_read_anew(imagenet, tmp_path):
    names(imagenet)
    store = Store(tmp_path / "store")
    assert data.load("imagenet", store).test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    (imagenet / "val.txt").write_text("".join(f"{val(i)} n02110958\n" for i in range(1, 7)))
    data.load.cache_clear()
    assert data.load("imagenet", store).test.labels.tolist() == [2] * 6


def no_list(root):
    pass


def lacks_an_image(root):
    names(root)
    (root / "val.txt").write_text("\n".join((root / "val.txt").read_text().splitlines()[1:]))


def foreign_class(root):
    names(root)
    (root / "val.txt").write_text((root / "val.txt").read_text().replace("n02110958", "n02110985"))


def far_position(root):
    (root / "val.txt").write_text(f"{val(1)} 2\n{val(2)} 3\n")


def no_class(root):
    (root / "val.txt").write_text(f"{val(1)} 2\n{val(2)}\n")


def no_text(root):
    (root / "val.txt").write_bytes(b"\xff\xfe\x00\x93")


def short_truth(root):
    devkit(root)
    (root / TRUTH).write_text("1\n2\n3\n")


def odd_truth(root):
    devkit(root)
    (root / TRUTH).write_text("3\n4\n1\n1\n1\n1\n")


def no_synsets(root):
    devkit(root)
    (root / DEVKIT / "data" / "meta.mat").unlink()


def cut_synsets(root):
    devkit(root)
    path = root / DEVKIT / "data" / "meta.mat"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_archive(root):
    pack(root)
    path = root / f"{DEVKIT}.tar.gz"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_archive(root):
    with tarfile.open(root / f"{DEVKIT}.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("readme"), io.BytesIO())


def other_names(root):
    devkit(root)
    (root / "val" / f"{val(3)}.JPEG").rename(root / "val" / "cat.JPEG")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (no_list, r"no class folders.*val\.txt.*LOC_val_solution\.csv.*ILSVRC2012_devkit_t12\.tar\.gz"),
        (lacks_an_image, r"val\.txt does not list val/ILSVRC2012_val_00000001\.JPEG \(1 images of 6\)"),
        (foreign_class, "'n02110985', of which there are no training images. Did you mean 'n02110958'"),
        (far_position, r"00000002\.JPEG the class 3, .*; positions among 3 classes begin at 0 and end at 2"),
        (no_class, r"Line 2 of .*val\.txt is 'ILSVRC2012_val_00000002'"),
        (no_text, r"val\.txt is not a text file"),
        (short_truth, r"devkit_t12 does not list val/.*val_00000004\.JPEG \(3 images of 6\)"),
        (odd_truth, "Line 2 of .* is '4', which is no class number"),
        (no_synsets, r"devkit_t12 is damaged or lacks .*meta\.mat"),
        (cut_synsets, r"devkit_t12 is damaged or lacks .*meta\.mat"),
        (cut_archive, r"tar\.gz is damaged"),
        (other_archive, r"tar\.gz is damaged or lacks .*ground_truth"),
        (other_names, r"devkit_t12 does not list val/cat\.JPEG"),
    ],
)
def test_a_missing_or_damaged_list_is_named(imagenet, tmp_path, harm, words):
    harm(imagenet)
    with pytest.raises(UserError, match=words):
        data.load("imagenet", Store(tmp_path / "store"))
