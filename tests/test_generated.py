"""Generated tables, pages and the built book: what is damaged, missing, or made from something else is told apart."""

import pytest

from lthlib.book import generated

DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 4]) + path.read_bytes()[1:]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
PAGE = "book/_generated/grid/page.ipynb"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A checkout with a generated page and a book of three files."""
    monkeypatch.setattr(generated, "ROOT", tmp_path)
    (tmp_path / "book/results").mkdir(parents=True)
    (tmp_path / "book/intro.md").write_text("# Intro")
    (tmp_path / "_config.yml").write_text("title: x")
    generated.write(tmp_path / PAGE, b"{}", "this")
    of = generated.begin_book()
    for name in ("index.html", "page.html", "_images/a.png"):
        (tmp_path / "_build/html" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "_build/html" / name).write_text(name)
    generated.note_book(of, finished=True)
    return tmp_path


def test_what_is_whole_and_of_this_is_left_alone(root, capsys):
    assert generated.is_current(root / PAGE, "this")
    assert generated.book_is_current()
    assert capsys.readouterr().err == ""


def test_what_is_of_something_else_is_not_current_and_not_called_damaged(root, capsys):
    assert not generated.is_current(root / PAGE, "that")
    assert generated.is_current(root / PAGE, "this")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named_and_set_aside(root, damage, capsys):
    path = root / PAGE
    damage(path)
    assert not generated.is_current(path, "this", look=True)
    assert path.exists()
    assert not generated.is_current(path, "this")
    (aside,) = (root / "_build/damaged").iterdir()
    said = f"damaged: {path}: it is not what was written; set aside in {aside} and made again\n"
    assert capsys.readouterr().err == said
    assert not path.exists()
    generated.write(path, "anew", "this")
    assert generated.is_current(path, "this")


def test_a_missing_file_is_not_current_without_a_word(root, capsys):
    """A run that was killed removed it, to make it again."""
    (root / PAGE).unlink()
    assert not generated.is_current(root / PAGE, "this")
    assert capsys.readouterr().err == ""


def test_a_file_without_note_is_not_current(root):
    (root / "book/_generated/grid/other.csv").write_text("x")
    assert not generated.is_current(root / "book/_generated/grid/other.csv", "")


@pytest.mark.parametrize("damage", [*DAMAGES.values(), lambda path: path.unlink()], ids=[*DAMAGES, "missing"])
@pytest.mark.parametrize("name", ["index.html", "page.html", "_images/a.png"])
def test_a_damaged_book_is_named_and_built_again_from_nothing(root, name, damage, capsys):
    damage(root / "_build/html" / name)
    assert not generated.book_is_current(look=True)
    assert (root / generated.BOOK).exists()
    assert not generated.book_is_current()
    said = capsys.readouterr().err
    assert said == f"damaged: {root / '_build/html' / name}: it is not what was written; the book is built again\n"
    generated.begin_book()
    assert not (root / "_build/html").exists()


@pytest.mark.parametrize("damage", [*DAMAGES.values(), lambda path: path.unlink()], ids=[*DAMAGES, "missing"])
def test_without_sound_word_of_the_book_it_is_built_again(root, damage):
    damage(root / generated.BOOK)
    assert not generated.book_is_current()
    assert not generated.book_is_current()  # and again, were that run killed
    generated.begin_book()
    assert not (root / "_build/html").exists()


def test_a_book_that_lacks_pages_is_not_current(root, capsys):
    generated.note_book(generated.book_sources(), finished=False)
    assert not generated.book_is_current()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "belongs"),
    [
        ("book/intro.md", True),
        ("book/new.md", True),
        ("book/_templates/layout.html", True),
        ("_config.yml", True),
        (PAGE, True),
        ("book/results/x.json", False),
        ("book/.hidden", False),
        ("README.md", False),
    ],
)
def test_a_book_is_of_its_prose_pages_looks_and_settings_whatever_their_times(root, name, belongs):
    path = root / name
    before = path.read_text() if path.exists() else None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("other")
    assert generated.book_is_current() == (not belongs)
    path.unlink() if before is None else path.write_text(before)
    assert generated.book_is_current()  # restored, with a newer time


def test_a_build_goes_on_from_a_whole_one_but_for_generated_pages(root):
    (root / "_build/html/_generated").mkdir()
    generated.begin_book()
    assert (root / "_build/html/page.html").exists()
    assert not (root / "_build/html/_generated").exists()
    generated.begin_book()  # that build was killed
    assert not (root / "_build/html").exists()


def test_a_page_elsewhere_leaves_nothing_beside_it(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    noted = sorted((root / generated.NOTES).rglob("*"))
    generated.write(folder / "page.ipynb", "{}")
    assert [p.name for p in folder.iterdir()] == ["page.ipynb"]
    assert sorted((root / generated.NOTES).rglob("*")) == noted


def test_a_fingerprint_tells_contents_names_order_of_texts_and_absence(tmp_path, monkeypatch):
    monkeypatch.setattr(generated, "ROOT", tmp_path)
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("")
    prints = [
        generated.fingerprint(["a"]),
        generated.fingerprint(["b"]),
        generated.fingerprint(["c"]),
        generated.fingerprint(["a"], "x", "y"),
        generated.fingerprint(["a"], "y", "x"),
        generated.fingerprint(["a"], "xy"),
        generated.fingerprint(["a", "b"]),
    ]
    assert len(set(prints)) == len(prints)
    assert generated.fingerprint(["b", "a"]) == prints[-1]
    (tmp_path / "a").write_text("2")
    assert generated.fingerprint(["a"]) != prints[0]
