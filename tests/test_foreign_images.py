"""Other people's images: the right pixels and labels, or one sentence; never a silent wrong number."""

import os
import shutil
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from lthlib import data
from lthlib.book.grid import read_grid
from lthlib.core.errors import UserError
from lthlib.core.store import Store
from lthlib.data import sets
from lthlib.data.files import Files

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (8, 8), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("LTHLIB_DATA", str(tmp_path / "data"))
    data.load.cache_clear()
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def load(root, name="pets"):
    data.load.cache_clear()
    return data.load(name, Store(root.parent / "store"))


def save(path, image=GREY, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)


def fill(folder, image=GREY, parts=("train", "test"), classes=("cat", "dog"), n=2):
    for part in parts:
        for c in classes:
            for i in range(n):
                save(folder / part / c / f"{i}.png", image)
    return folder


def pack(folder, path, prefix="", change=None):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = prefix + file.relative_to(folder).as_posix()
            archive.writestr(change(name) if change else name, file.read_bytes())
    shutil.rmtree(folder)


# --- pixels ------------------------------------------------------------------------------------------------

DEEP = RNG.integers(0, 65536, (8, 8), dtype=np.uint16)


def palette():
    image = Image.fromarray(COLOUR[..., 0] % 4).convert("P")
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 200, 0, 1, 2, 3])
    return image, np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0], [1, 2, 3]], np.uint8)[COLOUR[..., 0] % 4]


def half_seen():
    alpha = np.full((8, 8, 1), 255, np.uint8)
    alpha[:4] = 0
    shown = np.where(alpha == 0, 255, COLOUR)
    return Image.fromarray(np.concatenate([COLOUR, alpha], 2)), shown


def turned():
    image = Image.fromarray(COLOUR)
    image.getexif()[0x0112] = 6  # the camera was held upright: to be turned by 90 degrees clockwise
    return image, np.rot90(COLOUR, -1)


@pytest.mark.parametrize(
    ("image", "pixels"),
    [
        (Image.fromarray(DEEP), DEEP >> 8),
        (Image.fromarray(GREY > 128), np.where(GREY > 128, 255, 0)),
        (Image.fromarray(np.stack([GREY, np.full_like(GREY, 255)], 2)), GREY),
        palette(),
        half_seen(),
        turned(),
    ],
    ids=["sixteen bits", "one bit", "grey and alpha", "palette", "transparent", "turned"],
)
def test_every_kind_of_png_has_the_pixels_that_a_person_sees(root, image, pixels):
    fill(root / "pets")
    for part in ("train", "test"):
        exif = {"exif": image.getexif()} if image.getexif() else {}
        save(root / "pets" / part / "cat" / "0.png", image, **exif)
    found = load(root).train.pixels[0].numpy().squeeze()
    assert np.array_equal(found, pixels)
    like = load(root)
    for file in (root / "pets" / "test").rglob("*.png"):
        file.unlink()
    save(root / "other" / "0.png", image, **({"exif": image.getexif()} if image.getexif() else {}))
    foreign = data.ood_images("other", like, 5, Store(root.parent / "store"))
    assert np.array_equal(foreign[0].numpy().squeeze(), pixels)


def test_sixteen_bits_of_colour_and_of_a_ppm(root):
    fill(root / "pets", COLOUR)
    wide = RNG.integers(0, 65536, (8, 8, 3), dtype=np.uint16)
    for part in ("train", "test"):
        content = b"P5 8 8 65535\n" + DEEP.astype(">u2").tobytes()
        (root / "pets" / part / "cat" / "0.ppm").write_bytes(content)
        cv2.imwrite(str(root / "pets" / part / "cat" / "1.png"), wide[..., ::-1])
    found = load(root)
    by_name = dict(zip(["0.png", "0.ppm", "1.png"], found.train.pixels[:3].numpy(), strict=True))
    assert np.array_equal(by_name["0.ppm"][..., 0], DEEP >> 8)
    assert np.array_equal(by_name["1.png"], wide >> 8)


def test_a_colour_image_that_the_first_look_missed_keeps_its_colour(root, monkeypatch):
    monkeypatch.setattr("lthlib.data.files.LOOKED_AT", 1)
    fill(root / "pets")
    save(root / "pets" / "train" / "dog" / "1.png", COLOUR)
    found = load(root)
    assert np.array_equal(found.train.pixels[3].numpy(), COLOUR)
    monkeypatch.setattr("lthlib.data.folders.HELD_UP_TO", 0)
    with pytest.raises(UserError, match=r"1\.png has colour"):
        load(root, "pets@8")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (
            lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"),
            "not a readable image",
        ),
        (lambda p: Image.fromarray(GREY).save(p, "GIF"), "not a readable image"),
        (lambda p: Image.fromarray(GREY).save(p, "TIFF"), "not a readable image"),
        (lambda p: p.write_bytes(p.read_bytes()[:70]), "not a readable image"),
        (lambda p: p.write_bytes(b""), "not a readable image"),
        (
            lambda p: Image.fromarray(COLOUR).save(
                p, "WEBP", save_all=True, append_images=[Image.fromarray(255 - COLOUR)], lossless=True
            ),
            "animation of 2",
        ),
        (
            lambda p: Image.fromarray(COLOUR).save(
                p, "PNG", save_all=True, append_images=[Image.fromarray(255 - COLOUR)]
            ),
            "animation of 2",
        ),
        (lambda p: (p.unlink(), p.symlink_to("nowhere")), "link to nothing"),
        (lambda p: (p.unlink(), p.symlink_to(p.name)), "link to nothing or to itself"),
        (lambda p: (p.unlink(), os.mkfifo(p)), "no regular file"),
        (lambda p: os.rename(p, os.fsencode(p.parent) + b"/\xff.png"), "is not UTF-8"),
    ],
)
def test_what_is_no_image_is_one_sentence(root, harm, words):
    harm(fill(root / "pets") / "test" / "cat" / "1.png")
    with pytest.raises(UserError, match=words):
        load(root)


def test_a_bomb_is_not_decoded(root, monkeypatch):
    fill(root / "pets")
    save(root / "pets" / "test" / "cat" / "1.png", np.zeros((400, 400), np.uint8))
    for limit in (100_000, 50_000):  # Pillow warns of the first and refuses the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UserError, match=r"too many to read|not a readable image"):
            load(root)
    monkeypatch.setattr("lthlib.data.files.LARGEST", 20)
    with pytest.raises(UserError, match="files of up to 20 are read"):
        load(root)


# --- parts, hidden folders, links ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test"),
    [("Training", "Testing"), ("TRAIN", "Test"), ("training_set", "test_set"), ("train", "validation")],
)
def test_parts_are_known_by_what_people_call_them(root, train, test):
    fill(root / "pets", parts=(train, test))
    found = load(root)
    assert found.classes == ("cat", "dog")
    assert (len(found.train), len(found.test), found.validation) == (4, 4, None)


def test_validation_images_are_neither_lost_nor_taken_for_test_images(root):
    fill(root / "pets", parts=("train", "val"))
    fill(root / "pets", 255 - GREY, parts=("test",))
    found = load(root)
    assert np.array_equal(found.test.pixels[0, ..., 0], 255 - GREY)
    assert np.array_equal(found.validation.pixels[0, ..., 0], GREY)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (("fold1", "fold2"), "fold1 and fold2 in .* both hold folders cat, dog"),
        (("train", "Training", "test"), "two folders for the part train"),
        (("valid", "invalid"), "'valid' names a part of a data set and 'invalid' does not"),
    ],
)
def test_what_may_be_parts_or_classes_is_refused(root, parts, words):
    fill(root / "pets", parts=parts)
    with pytest.raises(UserError, match=words):
        load(root)


def test_hidden_folders_are_neither_classes_nor_images(root):
    fill(root / "pets")
    clean = load(root)
    for hidden in (".git", ".ipynb_checkpoints", "__MACOSX", "@eaDir", ".thumbnails", "CVS"):
        save(root / "pets" / hidden / "a.png", COLOUR)
        save(root / "pets" / "train" / hidden / "a.png", COLOUR)
        save(root / "pets" / "train" / "cat" / hidden / "a.png", COLOUR)
    (root / "pets" / "train" / "cat" / "._0.png").write_bytes(b"Mac OS X")
    (root / "pets" / "train" / ".DS_Store").write_bytes(b"x")
    (root / "pets" / "train" / "cat" / "Thumbs.db").write_bytes(b"x")
    found = load(root)
    assert found.digest == clean.digest
    save(root / "foreign" / "cat" / "0.png")
    save(root / "foreign" / ".git" / "0.png")
    assert len(data.ood_images("foreign", found, 9, Store(root.parent / "store"))) == 1


def test_images_that_are_left_out_are_said(root, capsys):
    fill(root / "pets")
    save(root / "pets" / "train" / "stray.png")
    save(root / "pets" / "train" / "cat" / "moving.gif")
    load(root)
    said = capsys.readouterr().err
    assert "1 images lie in no class folder and are left out, train/stray.png first" in said
    assert "train/cat/moving.gif first" in said


def test_links_are_followed_once(root):
    fill(root / "pets")
    real = (root / "pets" / "train").rename(root.parent / "elsewhere")
    (root / "pets" / "train").symlink_to(real)
    first = load(root)
    save(real / "cat" / "0.png", 255 - GREY)
    assert load(root).digest != first.digest
    (root / "pets" / "test" / "dog" / "again").symlink_to(root / "pets")
    with pytest.raises(UserError, match="again, through a link: its images would count twice"):
        load(root)


# --- zips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["pets/", "a/b/", "./pets/"])
def test_a_zip_with_one_folder_around_everything_is_a_data_set(root, prefix):
    pack(fill(root / "folder"), root / "pets.zip", prefix)
    assert load(root).classes == ("cat", "dog")
    assert len(load(root).test) == 4


def test_a_zip_from_windows_is_a_data_set(root):
    pack(fill(root / "folder"), root / "pets.ZIP", change=lambda name: name.replace("/", "\\"))
    assert len(load(root).test) == 4


def encrypt(path):
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = content.find(mark)
        while at >= 0:
            content[at + offset] |= 1
            at = content.find(mark, at + 4)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (encrypt, "is encrypted"),
        (lambda p: p.write_bytes(p.read_bytes()[:300]), "not a readable zip"),
        (lambda p: zipfile.ZipFile(p, "a").writestr("../train/cat/9.png", b"x"), "lies outside"),
        (lambda p: zipfile.ZipFile(p, "a").writestr("/etc/9.png", b"x"), "lies outside"),
        (lambda p: p.write_bytes(p.read_bytes().replace(b"IDAT", b"IDAX")), "cannot be read|not a readable image"),
    ],
)
def test_a_zip_that_cannot_be_trusted_is_one_sentence(root, harm, words):
    pack(fill(root / "folder"), root / "pets.zip")
    harm(root / "pets.zip")
    with pytest.raises(UserError, match=words):
        load(root)


# --- classes and lists -----------------------------------------------------------------------------------------

NUMBERS = [str(i) for i in range(12)]


def numbered(root, said=None):
    for i in NUMBERS:
        save(root / "pets" / "train" / i / "x.png", np.full((8, 8), 20 * int(i), np.uint8))
        save(root / "pets" / "test" / f"{i}.png", np.full((8, 8), 20 * int(i), np.uint8))
    if said:
        (root / "pets" / "test.txt").write_text(said)


def test_class_names_may_begin_with_digits_of_any_script(root):
    for part in ("train", "test"):
        for name in ("\uff14b", "4b", "b4"):
            save(root / "pets" / part / name / "x.png", np.zeros((8, 8), np.uint8))
    assert load(root).classes == ("4b", "b4", "\uff14b")


def labels(found):
    return {
        int(pixels[0, 0, 0]) // 20: int(label)
        for pixels, label in zip(found.test.pixels, found.test.labels, strict=True)
    }


def test_the_order_of_numbered_classes_is_said_and_can_be_given(root, capsys):
    numbered(root, "".join(f"{i}.png {i}\n" for i in NUMBERS).replace("\n", "\r\n"))
    with pytest.raises(UserError, match="names of class folders or positions"):
        load(root)
    (root / "pets" / "test.txt").write_text("# names\n" + "".join(f"{i}.png {i}\n" for i in NUMBERS))
    found = load(root)
    assert found.classes == tuple(sorted(NUMBERS))
    assert labels(found) == {int(c): k for k, c in enumerate(sorted(NUMBERS))}
    assert "order of text, 0, 1, 10, 11 ..." in capsys.readouterr().err
    (root / "pets" / "test.txt").write_text("# positions\n" + "".join(f"{i}.png {i}\n" for i in NUMBERS))
    assert labels(load(root)) == {i: i for i in range(12)}
    (root / "pets" / "classes.txt").write_text("\ufeff" + "\r\n".join(NUMBERS))
    (root / "pets" / "test.txt").write_text("".join(f"{i}.png {i}\n" for i in NUMBERS))
    found = load(root)  # both readings agree now
    assert found.classes == tuple(NUMBERS)
    assert labels(found) == {i: i for i in range(12)}
    assert capsys.readouterr().err.count("order of text") == 1


@pytest.mark.parametrize("given", ["0\n1\n", "\n".join([*NUMBERS, "12"]), "\n".join([*NUMBERS, "3"])])
def test_an_order_that_is_not_of_the_class_folders_is_refused(root, given):
    numbered(root, "".join(f"{i}.png {i}\n" for i in NUMBERS))
    (root / "pets" / "classes.txt").write_text(given)
    with pytest.raises(UserError, match=r"classes\.txt"):
        load(root)


@pytest.mark.parametrize(
    ("line", "twice", "words"),
    [
        ("{0}.png {1}", "", "begin at 0 and end at 2"),
        ("{0}.png {2}", "1.png dog\n", r"lists test/1\.png twice"),
        ("{0} {2}", "", None),
        ('"{0}.png", "{2}"', "", None),
        ("{0}.png\t{2}", "", None),
        ("test/{0}.png {2}", "other.png wolf\n", None),
        ("{0}.png {2}", "1.png cat\n", None),
        ("{0}.png", "", "a file name and its class are needed"),
    ],
)
def test_lists_as_people_write_them(root, line, twice, words):
    classes = ["bat", "cat", "dog"]
    for k, c in enumerate(classes):
        save(root / "pets" / "train" / c / "x.png")
        save(root / "pets" / "test" / f"{k}.png", np.full((8, 8), 20 * k, np.uint8))
    text = "".join(line.format(k, k + 1, c) + "\n" for k, c in enumerate(classes))
    (root / "pets" / "test.txt").write_text(text + twice)
    if words:
        with pytest.raises(UserError, match=words):
            load(root)
    else:
        assert labels(load(root)) == {0: 0, 1: 1, 2: 2}


def test_names_with_blanks_and_equal_stems(root):
    for k, c in enumerate(("big cat", "dog")):
        save(root / "pets" / "train" / c / "x.png")
        save(root / "pets" / "test" / f"a b{k}.png", np.full((8, 8), 20 * k, np.uint8))
    (root / "pets" / "test.txt").write_text("a b0.png big cat\na b1.png dog\n")
    assert labels(load(root)) == {0: 0, 1: 1}
    save(root / "pets" / "test" / "a b0.bmp")
    (root / "pets" / "test.txt").write_text("a b0 big cat\na b1.png dog\n")
    with pytest.raises(UserError, match="may mean"):
        load(root)


@pytest.mark.parametrize("n", [1, 2])
def test_a_class_too_small_to_be_split_is_named(root, n):
    for i in range(20):
        save(root / "pets" / "dog" / f"{i}.png")
    for i in range(n):
        save(root / "pets" / "cat" / f"{i}.png")
    with pytest.raises(UserError, match=f"cat has {n}"):
        load(root)


def test_a_class_of_one_image_cannot_be_in_a_share_of_the_training_images(root):
    fill(root / "pets")
    (root / "pets" / "train" / "cat" / "1.png").unlink()
    with pytest.raises(UserError, match="1 of the smallest, cannot be split"):
        data.load("pets", Store(root.parent / "store"), 2)


# --- names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../..", "/etc", "gausian", "a@99999"])
def test_a_foreign_set_is_refused_where_the_grid_is_read(root, tmp_path, name):
    grid = yaml.safe_load(Path("workflow/grids/quick.yml").read_text())
    grid["dimensions"]["generalization"] = {**(grid["dimensions"]["generalization"] or {}), "ood": [name]}
    path = tmp_path / "mine.yml"
    path.write_text(yaml.safe_dump(grid))
    with pytest.raises(UserError, match=r"cannot name a data set|Unknown out-of-distribution set"):
        read_grid(path)


def test_the_stamp_sees_what_the_reader_sees(root):
    fill(root / "pets")
    before = Files(root / "pets").stamp
    save(root / "pets" / ".cache" / "x.png")
    assert Files(root / "pets").stamp == before
    (root / "pets" / "classes.txt").write_text("dog\ncat\n")
    assert Files(root / "pets").stamp != before
    assert load(root).classes == ("dog", "cat")
    assert sets.source("pets").path == root / "pets"
