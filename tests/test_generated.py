"""Generated tables, pages and the built book: damaged or missing ones are made again, whole ones are left alone."""

import pytest

from lthlib import generated

DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 4]) + path.read_bytes()[1:]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout with two generated files and a book of three."""
    monkeypatch.setattr(generated, "ROOT", tmp_path)
    generated.write(tmp_path / "book/_generated/grid/rows.csv", "metric,value\n")
    generated.write(tmp_path / "book/_generated/grid/page.ipynb", b"{}")
    for name in ("index.html", "page.html", "_images/a.png"):
        (tmp_path / "_build/html" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "_build/html" / name).write_text(name)
    generated.note_book(finished=True)
    return tmp_path


def files(root):
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file() and "sha256" not in p.parts}


def test_what_is_whole_is_left_alone(root, capsys):
    before = files(root)
    generated.check()
    assert files(root) == before
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["rows.csv", "page.ipynb"])
def test_a_damaged_file_is_named_and_made_again_and_the_book_with_it(root, name, damage, capsys):
    path, before = root / "book/_generated/grid" / name, files(root)
    damage(path)
    generated.check()
    (aside,) = (root / "_build/damaged").iterdir()
    said = f"damaged: {path}: it is not what was written; set aside in {aside} and made again\n"
    assert capsys.readouterr().err == said
    assert before - files(root) == {f"book/_generated/grid/{name}", "_build/html/index.html"}
    generated.write(path, "anew")
    generated.check()
    assert path.read_text() == "anew"


def test_a_file_that_was_to_be_made_again_by_a_run_that_was_killed_is_missed_without_a_word(root, capsys):
    """The workflow removes it before it makes it; beside a newer book nothing would ask for it."""
    (root / "book/_generated/grid/page.ipynb").unlink()
    generated.check()
    assert capsys.readouterr().err == ""
    assert not (root / "_build/html/index.html").exists()


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["index.html", "page.html", "_images/a.png"])
def test_a_damaged_book_is_named_and_built_again_from_nothing(root, name, damage, capsys):
    damage(root / "_build/html" / name)
    generated.check()
    said = capsys.readouterr().err
    assert (
        said
        == f"damaged: {root / '_build/html' / name}: it is not what was written; the book is built again\n"
    )
    assert not (root / "_build/html/index.html").exists()
    generated.begin_book()
    assert not (root / "_build/html").exists()


def test_a_damaged_page_hides_no_damage_to_the_book(root, capsys):
    """Else the next build would go on from the damaged one, and take it for what it wrote."""
    damaged = root / "book/_generated/grid/page.ipynb", root / "_build/html/page.html"
    for path in damaged:
        path.write_text("x")
    generated.check()
    said = capsys.readouterr().err
    assert all(f"damaged: {path}: " in said for path in damaged)
    generated.begin_book()
    assert not (root / "_build/html").exists()


@pytest.mark.parametrize("damage", [*DAMAGES.values(), lambda path: path.unlink()], ids=[*DAMAGES, "missing"])
def test_without_sound_word_of_the_book_it_is_built_again(root, damage):
    damage(root / generated.BOOK)
    generated.check()
    assert not (root / "_build/html/index.html").exists()
    generated.check()  # and again, were that run killed
    generated.begin_book()
    assert not (root / "_build/html").exists()


def test_a_book_that_lacks_pages_is_built_again_though_nothing_is_newer(root, capsys):
    generated.note_book(finished=False)
    generated.check()
    assert capsys.readouterr().err == ""
    assert not (root / "_build/html/index.html").exists()


def test_a_build_goes_on_from_a_whole_one_but_for_generated_pages(root):
    (root / "_build/html/_generated").mkdir()
    generated.begin_book()
    assert files(root / "_build/html") == {"index.html", "page.html", "_images/a.png"}
    assert not (root / "_build/html/_generated").exists()
    generated.begin_book()  # that build was killed
    assert not (root / "_build/html").exists()


def test_a_page_elsewhere_leaves_nothing_beside_it(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    noted = sorted((root / "_build/sha256").rglob("*"))
    generated.write(folder / "page.ipynb", "{}")
    assert [p.name for p in folder.iterdir()] == ["page.ipynb"]
    assert sorted((root / "_build/sha256").rglob("*")) == noted
