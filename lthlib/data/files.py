"""The files of a folder or zip, and the images among them, decoded with care: a person's files may be anything.

What the system, an editor or version control left there is not seen; links are followed, but a folder is never read
twice; nothing is unpacked to disk; only the formats of `FORMATS` are decoded.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import stat
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps

from lthlib.core.errors import UserError
from lthlib.core.store import ROOT
from lthlib.data.images import OnDemand

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp"}
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP")
NOT_READ = {".gif", ".tif", ".tiff", ".jfif", ".jpe", ".pgm", ".heic", ".avif", ".jp2", ".svg", ".npy", ".mat"}
SYSTEM = {"__macosx", "__pycache__", "@eadir", "cvs", "thumbs.db", "thumbs", "thumbnails", "lost+found", "$recycle.bin"}
GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L")  # Pillow's names for images without colour
LOOKED_AT = 64  # images that tell whether a set has colour
LARGEST = 2**28  # bytes of one file


def data_folder() -> Path:
    """Return the folder with the person's data: ``$LTHLIB_DATA``, else ``data`` in the checkout."""
    return Path(os.environ.get("LTHLIB_DATA") or ROOT / "data")


def in_data_folder(base: str) -> Path | None:
    """Return the folder or zip of a name in the data folder, or None."""
    candidates = (data_folder() / f"{base}{suffix}" for suffix in ("", ".zip", ".ZIP"))
    return next((path for path in candidates if path.is_dir() or path.is_file()), None)


def names_in_data_folder() -> list[str]:
    """Return what can be asked for by name from the data folder."""
    root = data_folder()
    paths = root.iterdir() if root.is_dir() else ()
    found = {p.name if p.is_dir() else p.stem for p in paths if p.is_dir() or p.suffix.lower() == ".zip"}
    return sorted(name for name in found if not _is_hidden(name))


class Files:
    """The files of a folder or zip by their names in it, with / between folders."""

    def __init__(self, path: Path):
        self.path = path

    @functools.cached_property
    def _listed(self) -> tuple[dict[str, object], set[str]]:
        """({file: what is known of it}, folders)."""
        return _walk(self.path) if self.path.is_dir() else _archive(self.path)[1:]

    @functools.cached_property
    def images(self) -> list[str]:
        """Names of the image files, sorted."""
        return sorted(name for name in self._listed[0] if _suffix(name) in SUFFIXES)

    @property
    def not_read(self) -> list[str]:
        """Names of files that may be meant as images and are of no format that is read."""
        return sorted(name for name in self._listed[0] if _suffix(name) in NOT_READ)

    @functools.cached_property
    def folders(self) -> set[str]:
        """Names of all folders, empty ones too where they are known."""
        return self._listed[1] | {p.as_posix() for n in self.images for p in PurePosixPath(n).parents if p.name}

    @property
    def stamp(self) -> str:
        """Identifies the state of all files that are seen, by names, sizes and times, without reading them."""
        if self.path.is_dir():
            facts = [f"{name}:{state}" for name, state in sorted(self._listed[0].items())]
        else:
            facts = [f"{self.path.stat().st_size}:{self.path.stat().st_mtime_ns}"]
        return hashlib.sha256("\n".join([self.path.name, *facts]).encode()).hexdigest()[:12]

    def has(self, name: str) -> bool:
        """Say whether there is a file of that name."""
        return (self.path / name).is_file() if self.path.is_dir() else name in _archive(self.path)[1]

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        where = f"{self.path}/{name}"
        try:
            if self.path.is_dir():
                size, read = (self.path / name).stat().st_size, (self.path / name).read_bytes
            else:
                archive, members, _ = _archive(self.path)
                size, read = members[name].file_size, functools.partial(archive.read, members[name])
            if size <= LARGEST:
                return read()
        except Exception as error:  # zipfile raises what damaged bytes lead it to
            raise UserError(f"{where} cannot be read ({error}). Replace or remove it.") from error
        raise UserError(f"{where} has {size:,} bytes; files of up to {LARGEST:,} are read. Replace or remove it.")

    def lines(self, name: str) -> list[str]:
        """Return the lines of a text file, whatever they end in."""
        try:
            return self.read(name).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path}/{name} is not a text file in UTF-8 ({error}). Save or fetch it again."
            ) from error

    def open_image(self, name: str) -> Image.Image:
        """Open an image without decoding its pixels."""
        content, where = self.read(name), f"{self.path}/{name}"
        try:
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            frames = getattr(image, "n_frames", 1)
        except Exception as error:  # Pillow raises what damaged bytes lead it to
            raise UserError(f"{where} is not a readable image ({error}). Replace or remove it.") from error
        if frames > 1 and image.format != "MPO":  # these are photographs with a preview or depth map behind them
            raise UserError(f"{where} is an animation of {frames} images: replace it by one of them.")
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise UserError(f"{where} has {image.width} x {image.height} pixels, too many to read: make it smaller.")
        return image


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM


def _walk(root: Path) -> tuple[dict[str, str], set[str]]:
    files, folders, waiting = {}, {}, [(root, "")]
    while waiting:
        path, name = waiting.pop()
        shown = ascii(str(path))[1:-1]
        try:
            status = path.stat()
            name.encode()
            below = list(path.iterdir()) if stat.S_ISDIR(status.st_mode) else None
        except UnicodeError as error:
            raise UserError(f"The name {shown} is not UTF-8: rename it.") from error
        except OSError as error:
            why = "it is a link to nothing or to itself" if path.is_symlink() else error.strerror
            raise UserError(f"{shown} cannot be read: {why}. Mend or remove it.") from error
        if below is None and stat.S_ISREG(status.st_mode):
            files[name] = f"{status.st_size}:{status.st_mtime_ns}"
        elif below is not None:
            first = folders.setdefault((status.st_dev, status.st_ino), name)
            if first != name:
                raise UserError(
                    f"{shown} is the folder {root / first} again, through a link: its images would count twice. "
                    "Remove the link."
                )
            waiting += [(p, f"{name}/{p.name}".lstrip("/")) for p in below if not _is_hidden(p.name)]
        elif _suffix(name) in SUFFIXES:
            raise UserError(f"{shown} is no regular file: remove it.")
    return files, set(folders.values()) - {""}


def _archive(path: Path) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo], set[str]]:
    return _open_archive(path, path.stat().st_mtime_ns, os.getpid())


@functools.lru_cache(maxsize=4)
def _open_archive(path: Path, time: int, process: int) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo], set[str]]:
    """Open a zip; each process for itself, since forks would move one another's place in the file."""
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # zipfile raises what damaged bytes lead it to
        raise UserError(f"{path} is not a readable zip file ({error}). Copy it again.") from error
    files, folders = {}, set()
    for info in archive.infolist():
        place = PurePosixPath(info.filename.replace("\\", "/"))
        name = place.as_posix()
        if place.is_absolute() or ".." in place.parts:
            raise UserError(f"{path} holds {info.filename!r}, which lies outside of it: pack it again.")
        if any(_is_hidden(part) for part in place.parts):
            continue
        if info.flag_bits & 1:
            raise UserError(f"{path} is encrypted ({name}): pack it again without a password.")
        if name in files:
            raise UserError(f"{path} holds {name!r} twice: pack it again.")
        if info.is_dir() or info.filename.endswith("\\"):
            folders.add(name)
        else:
            files[name] = info
    return archive, files, folders


def decode_image(image: Image.Image, mode: str, where: str, *, upright: bool = True) -> Image.Image:
    """Decode an image's pixels, grey (mode ``"L"``) or in colour (``"RGB"``).

    Of sixteen bits the upper eight are taken, as Pillow itself does for colour; transparent pixels show white; an
    image that a camera marked as turned is turned back where it is to stand ``upright``.
    """
    try:
        image.load()
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).astype(np.int32) >> 8).clip(0, 255).astype(np.uint8))
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers")
        if image.has_transparency_data:
            above = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
        return image.convert(mode)
    except Exception as error:  # Pillow raises what damaged bytes lead it to
        raise UserError(f"{where} is not a readable image ({error}). Replace or remove it.") from error


class ColourFoundError(UserError):
    """An image has colour where those looked at first had none."""


class ImageFiles(OnDemand):
    """Image files of a folder or zip, uint8 of one shape, decoded in as many threads as PyTorch has.

    Args:
        files: The folder or zip.
        names: Files in it.
        name: What the data set was asked for by; what follows @ is the side to scale and crop to.
        mode: ``"L"`` for grey images, ``"RGB"`` for colour; by default colour where one of some images has it.
    """

    def __init__(self, files: Files, names: Sequence[str], name: str, mode: str | None = None):
        self.files, self.names = files, names
        self.base, _, size = name.partition("@")
        self.size = int(size or 0)
        few = names[:: -(-len(names) // LOOKED_AT)]
        self.mode = mode or ("L" if all(files.open_image(file).mode in GREY for file in few) else "RGB")
        super().__init__(self._decode, np.arange(len(names)), self._image(names[0]).shape)

    def _decode(self, positions: np.ndarray) -> np.ndarray:
        pixels = np.empty((len(positions), *self.shape[1:]), np.uint8)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            names = [self.names[position] for position in positions]
            for row, name, image in zip(pixels, names, pool.map(self._image, names), strict=True):
                if image.shape != row.shape:
                    raise UserError(
                        f"{self.files.path}/{name} is {image.shape[1]} x {image.shape[0]} pixels, {self.names[0]} is "
                        f"{row.shape[1]} x {row.shape[0]}. All must be alike and square{self._hint(len(row))}."
                    )
                row[:] = image
        return pixels

    def _hint(self, size: int) -> str:
        return f": ask for {self.base}@{size} to have them scaled and cropped" if self.base else ""

    def _image(self, file: str) -> np.ndarray:
        where, size, image = f"{self.files.path}/{file}", self.size, self.files.open_image(file)
        if self.mode == "L" and image.mode not in GREY:
            raise ColourFoundError(f"{where} has colour, {self.names[0]} has none: make all grey, or all RGB.")
        image = decode_image(image, self.mode, where)
        if size and image.size != (size, size):
            scale = size * 8 / 7 / min(image.size)
            if max(image.size) * size > min(image.size) * Image.MAX_IMAGE_PIXELS / (2 * size):
                raise UserError(
                    f"{where} has {image.width} x {image.height} pixels, too many when scaled: crop it, or ask for "
                    f"less than @{size}."
                )
            image = image.resize([max(size, round(extent * scale)) for extent in image.size], resample=2)
            left, top = ((extent - size) // 2 for extent in image.size)
            image = image.crop((left, top, left + size, top + size))
        if image.size[0] != image.size[1]:
            raise UserError(
                f"{where} is {image.size[0]} x {image.size[1]} pixels. Images must be "
                f"square{self._hint(min(image.size))}."
            )
        array = np.asarray(image)
        return array[:, :, None] if array.ndim == 2 else array
