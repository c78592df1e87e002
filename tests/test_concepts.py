"""Concept sets: Broden's layout as it is on disk, and the generated scenes."""

import csv
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lthlib.core.errors import UserError
from lthlib.data.broden import read_broden
from lthlib.data.scenes import COLOURS, GREYS, PARTS, SHAPES, TEXTURES, scenes

SIZES = {"ih": 8, "iw": 8, "sh": 4, "sw": 4}
COLUMNS = ["image", "split", *SIZES, "colour", "object", "scene"]


def write_table(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_mask(path, numbers):
    numbers = np.asarray(numbers)
    Image.fromarray(np.stack([numbers % 256, numbers // 256, numbers * 0], -1).astype(np.uint8)).save(path)


@pytest.fixture
def broden(tmp_path):
    """Three images; label 300 needs the green channel; 7 is in two categories; numbers have gaps."""
    root = tmp_path / "tiny"
    (root / "images" / "a").mkdir(parents=True)
    labels = {1: "sky", 2: "road", 7: "water", 300: "blue-c", 301: "street-s"}
    write_table(root / "label.csv", [{"number": n, "name": v} for n, v in labels.items()])
    write_table(root / "category.csv", [{"name": c} for c in ("colour", "object", "scene")])
    for category, coverage in (
        ("colour", {300: 1.0, 7: 0.5}),
        ("object", {1: 1.0, 2: 1.0, 7: 0.75}),
        ("scene", {301: 2.0}),
    ):
        rows = [{"code": i + 1, "number": n, "coverage": c} for i, (n, c) in enumerate(coverage.items())]
        write_table(root / f"c_{category}.csv", rows)
    rows = []
    for i in range(3):
        Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)).save(root / f"images/a/{i}.png")
        rows.append(dict.fromkeys(COLUMNS, "") | {"image": f"a/{i}.png", "split": "train"} | SIZES)
    write_mask(root / "images/a/0_object.png", [[1, 1, 2, 2]] * 4)
    write_mask(root / "images/a/0_more.png", [[7] * 4] * 2 + [[0] * 4] * 2)
    write_mask(root / "images/a/2_colour.png", [[300, 0, 0, 0]] * 4)
    rows[0] |= {"object": "a/0_object.png;a/0_more.png", "scene": "301"}
    rows[2] |= {"colour": "a/2_colour.png;7"}
    write_table(root / "index.csv", rows)
    return root


def edit_index(root, line, **cells):
    with open(root / "index.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rows[line - 2] |= {k: str(v) for k, v in cells.items()}
    write_table(root / "index.csv", rows)


def as_sets(concepts, i):
    names = ("", *concepts.labels)
    planes = concepts.planes[i]
    return [[{names[n] for n in pixel} - {""} for pixel in row] for row in np.moveaxis(planes, 0, -1)]


def test_broden_pixels_have_the_labels_of_every_mask_and_number(broden):
    concepts = read_broden(broden)
    assert len(concepts) == 2  # the second row has no label in any category
    assert concepts.labels == ("sky", "road", "water", "blue-c", "street-s")
    top, low = as_sets(concepts, 0)[0], as_sets(concepts, 0)[3]
    assert top == [{"sky", "water", "street-s"}] * 2 + [{"road", "water", "street-s"}] * 2
    assert low == [{"sky", "street-s"}] * 2 + [{"road", "street-s"}] * 2
    assert as_sets(concepts, 1) == [[{"blue-c", "water"}, {"water"}, {"water"}, {"water"}]] * 4
    areas = {label: concepts.mask(label).sum() for label in concepts.labels}
    assert areas == {"sky": 8, "road": 8, "water": 8 + 16, "blue-c": 4, "street-s": 16}


def test_broden_images_are_those_of_the_kept_rows(broden):
    images = read_broden(broden).images[0:2]
    assert images.dtype == np.uint8
    assert images.shape == (2, 8, 8, 3)
    assert images.reshape(2, -1).mean(1).tolist() == [0, 20]


def test_broden_label_belongs_where_it_covers_most(broden):
    concepts = read_broden(broden)
    owner = {n: concepts.categories[c] for n, c in zip(concepts.labels, concepts.category_of, strict=True)}
    assert owner["water"] == "object"
    assert owner["blue-c"] == "colour"
    assert owner["street-s"] == "scene"


def test_broden_of_one_category_has_its_labels_and_rows_only(broden):
    (broden / "category.csv").write_text("name\nscene\n")
    concepts = read_broden(broden)
    assert concepts.labels == ("street-s",)
    assert len(concepts) == 1
    assert concepts.mask("street-s").all()


def test_broden_zip_at_the_root_or_one_level_down_equals_the_folder(broden, tmp_path):
    folder = read_broden(broden)
    for prefix in ("", "broden1_8/"):
        path = tmp_path / f"zip{len(prefix)}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(p for p in broden.rglob("*") if p.is_file()):
                archive.write(file, prefix + str(file.relative_to(broden)))
        zipped = read_broden(path)
        assert zipped.labels == folder.labels
        assert (zipped.images[:] == folder.images[:]).all()
        assert all((zipped.planes[i] == folder.planes[i]).all() for i in range(2))


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        ({"image": "a/9.png"}, "images/a/9.png does not exist"),
        ({"colour": "a/none.png"}, "images/a/none.png does not exist"),
        ({"colour": "99"}, "label 99 is not in label.csv"),
        ({"colour": "a/0.png"}, "images/a/0.png is 8x8, the row says 4x4"),
        ({"sh": "5"}, "differ from those of line 2"),
        ({"iw": "wide"}, "'wide' is not a whole number"),
    ],
)
def test_broden_bad_row_is_named_with_its_file(broden, cells, told):
    edit_index(broden, 4, **cells)
    with pytest.raises(UserError, match=r"index\.csv, line 4") as error:
        read_broden(broden)
    assert told in str(error.value)


def test_broden_mask_outside_the_table_is_named_when_it_is_read(broden):
    write_mask(broden / "images/a/2_colour.png", [[299] * 4] * 4)
    concepts = read_broden(broden)
    with pytest.raises(UserError, match=r"line 4: images/a/2_colour\.png holds label 299"):
        concepts.planes[1]
    Image.fromarray(np.ones((4, 4), np.uint8)).save(broden / "images/a/2_colour.png")
    with pytest.raises(UserError, match="has mode L; a mask is an RGB picture"):
        read_broden(broden).planes[1]


def test_broden_missing_table_column_and_folder_are_told(broden, tmp_path):
    with pytest.raises(UserError, match=r"index\.csv"):
        read_broden(broden / "images")
    with pytest.raises(UserError, match="neither a folder nor a zip"):
        read_broden(tmp_path / "nothing")
    (broden / "c_scene.csv").unlink()
    with pytest.raises(UserError, match=r"lacks c_scene\.csv"):
        read_broden(broden)


# --- scenes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "palette"), [(3, COLOURS), (1, GREYS)])
def test_every_pixel_has_the_colour_it_is_labelled_with(channels, palette):
    concepts = scenes(28, channels, n=60, seed=3)
    table = np.array(list(palette.values()), int)
    nearest = np.abs(concepts.images[..., None, :].astype(int) - table).sum(-1).argmin(-1)
    assert (concepts.planes[:, 0] == nearest + 1).all()


def test_scenes_are_equal_for_equal_seeds_and_begin_alike():
    a, b = scenes(n=40, seed=1), scenes(n=25, seed=1)
    assert (a.images[:25] == b.images).all()
    assert (a.planes[:25] == b.planes).all()
    assert (scenes(n=25, seed=2).images != b.images).any((1, 2, 3)).all()


@settings(deadline=None, max_examples=15)
@given(st.integers(16, 40), st.sampled_from([1, 3]), st.integers(0, 1000))
def test_scene_labels_are_consistent(size, channels, seed):
    concepts = scenes(size, channels, n=4, seed=seed)
    names = np.array(["", *concepts.labels])
    colour, texture, shape, part = np.moveaxis(names[concepts.planes], 1, 0)
    assert set(colour.ravel()) <= set(COLOURS if channels == 3 else GREYS)
    assert set(texture.ravel()) <= {"", *TEXTURES}
    assert set(shape.ravel()) <= {"", *SHAPES}
    assert set(part.ravel()) <= {"", *PARTS}
    assert ((shape != "") >= ((part != "") & (part != "hole"))).all()
    assert (shape[part == "hole"] == "").all()
    assert not np.isin(shape[part == "corner"], ["disc", "ring"]).any()
    edge = np.pad(shape, ((0, 0), (1, 1), (1, 1)))
    neighbours = [edge[:, :-2, 1:-1], edge[:, 2:, 1:-1], edge[:, 1:-1, :-2], edge[:, 1:-1, 2:]]
    open_side = np.any([n == "" for n in neighbours], 0) & (shape != "")
    assert np.isin(part[open_side], ["edge", "corner"]).all()


def test_stripes_repeat_along_the_direction_they_are_named_after():
    concepts = scenes(32, 3, n=300)
    colour, texture = concepts.planes[:, 0], concepts.planes[:, 1]
    steps = {"horizontal": (0, 1), "vertical": (1, 0), "rising": (-1, 1), "falling": (1, 1)}
    for name, (dy, dx) in steps.items():
        number = 1 + concepts.index(f"{name} stripes")
        for axis, (y, x) in steps.items():
            here = np.index_exp[:, max(-y, 0) : 32 - max(y, 0), : 32 - x]
            there = np.index_exp[:, max(y, 0) : 32 + min(y, 0), x:]
            ground = (concepts.planes[:, 2] == 0) & (texture == number)
            inside = ground[here] & ground[there]
            same = (colour[here] == colour[there])[inside].mean()
            assert (same == 1) == ((y, x) == (dy, dx)), (name, axis)


def test_every_label_occurs_in_a_few_hundred_scenes_and_no_shape_hides_in_its_ground():
    concepts = scenes(n=300)
    assert all(concepts.mask(label).sum() > 300 for label in concepts.labels)
    contrast = [len(np.unique(planes[0])) for planes in concepts.planes]
    assert min(contrast) >= 2


def test_sizes_that_cannot_be_drawn_are_told():
    with pytest.raises(UserError, match="at least 16"):
        scenes(8)
    with pytest.raises(UserError, match="number of channels"):
        scenes(32, 2)
    with pytest.raises(UserError, match="concept 'stripe'"):
        scenes(n=1).index("stripe")


def test_subset_picks_images_and_planes_together():
    concepts = scenes(n=10)
    part = concepts.subset([7, 2])
    assert (part.images[:] == concepts.images[[7, 2]]).all()
    assert (part.mask("red") == concepts.mask("red")[[7, 2]]).all()
