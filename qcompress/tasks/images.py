"""Images from archives, folders and `datasets`: reading, resizing and conversion to model inputs.

Torch is imported only where tensors are made, Pillow only where a file is opened.

The checkpoint's image processor of transformers does both steps: the geometry (resize, crop) when an image is
read, the values (rescale, normalize) when a batch is made. So images are kept as bytes, and a batch equals
the processor's result in one step.

Shapes: an image uint8 [height, width, 3]; pixel values fp32 [batch, 3, height, width].
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qcompress.errors import ModelError, UsageError
from qcompress.models.architecture import PIXELS
from qcompress.schema.data import Augment
from qcompress.schema.recipe import TextData
from qcompress.system.untrusted_file import demand_file, unpacked_limit
from qcompress.tasks.columns import columns_in
from qcompress.tasks.examples import LABELS, Batch, OfOneSize
from qcompress.tasks.text import open_dataset

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Suffixes of image files in a folder, in lower or upper case."""

GEOMETRY = ("do_resize", "do_center_crop", "do_pad")
"""Steps of transformers' image processors that move pixels."""

VALUES = ("do_rescale", "do_normalize", "include_top")
"""Steps that change each pixel separately; the last is EfficientNet's second normalization."""


class Reader:
    """Image processor of a checkpoint, in two steps. Raises ModelError if it cannot be split into them."""

    def __init__(self, processor: Any, size: tuple[int, int] | None = None) -> None:
        """`size`: height and width of the model's input, if known."""
        self.processor, self.size = processor, size
        self.fill: np.ndarray | None = None

    def shaped(self, image: np.ndarray) -> np.ndarray:
        """Resize an image of any size for the model, uint8 [height, width, 3]."""
        resized = self._run([image], VALUES)[0]
        if resized.dtype != np.uint8:
            raise ModelError(f"{self._name}: a resized image is {resized.dtype} and not uint8", fix=self._fix)
        return np.ascontiguousarray(resized.transpose(1, 2, 0))

    def pixels(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Model input for images of its size, fp32 [batch, 3, height, width]."""
        return self._run(images, GEOMETRY).astype(np.float32, copy=False)

    def black(self) -> np.ndarray:
        """Input value of a black pixel, fp32 [3]."""
        if self.fill is None:
            self.fill = self.pixels([np.zeros((1, 1, 3), np.uint8)])[0, :, 0, 0]
        return self.fill

    def check(self, image: np.ndarray) -> None:
        """Check that both steps equal the processor's result in one step. Raises ModelError if not."""
        if not np.array_equal(self._run([image], ()), self.pixels([self.shaped(image)])):
            raise ModelError(
                f"{self._name} does more than resize, crop, rescale and normalize", fix=self._fix
            )

    def _run(self, images: Sequence[np.ndarray], without: Sequence[str]) -> np.ndarray:
        off = {step: False for step in without if getattr(self.processor, step, None)}
        processed = self.processor(
            list(images), return_tensors="np", input_data_format="channels_last", **off
        )
        return processed[PIXELS]

    @property
    def _name(self) -> str:
        return type(self.processor).__name__

    @property
    def _fix(self) -> str:
        return "write `mean`, `std` and `size` under `task`"


@dataclass(frozen=True)
class ImageSample:
    """One image of the model's size. `known`: fields of samples.json.gz that are known from the data; without
    `label` if the data have none.
    """

    image: np.ndarray
    reader: Reader
    known: Mapping[str, Any]


@dataclass(frozen=True)
class ImageExamples(OfOneSize):
    """Images for training or calibration."""

    samples: Sequence[ImageSample]
    augment: Augment | None = None
    unit = "images"

    def batch(self, rows: Sequence[int], moment: tuple[int, ...] | None = None) -> Batch:
        """Images of these rows, randomly changed in training; labels int64 [batch] if the data have them."""
        import torch

        chosen = [self.samples[row] for row in rows]
        arrays = collate(chosen)
        if moment is not None and self.augment is not None:
            black = chosen[0].reader.black()
            arrays[PIXELS] = varied(arrays[PIXELS], black, self.augment, rows, moment)
        if all("label" in sample.known for sample in chosen):
            arrays[LABELS] = np.array([sample.known["label"] for sample in chosen], np.int64)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def varied(
    pixels: np.ndarray, black: np.ndarray, augment: Augment, rows: Sequence[int], moment: tuple[int, ...]
) -> np.ndarray:
    """Mirror and move images [batch, 3, height, width] at random, after He et al. (arXiv:1512.03385), section
    4.2. Uncovered pixels become `black` [3].

    The changes of an image depend on the moment and on its row only, not on the other images of the batch:
    several processes change images as one does. All random numbers are drawn for any options, so that options
    do not affect each other.
    """
    changed, (height, width), pad = np.empty_like(pixels), pixels.shape[2:], augment.crop
    for place, row in enumerate(rows):
        random = np.random.default_rng((*moment, int(row)))
        mirrored, (top, left) = random.random() < 0.5, random.integers(0, 2 * pad, 2, endpoint=True)
        image = pixels[place]
        image = image[:, :, ::-1] if mirrored and augment.flip else image
        if pad:
            framed = np.empty((len(image), height + 2 * pad, width + 2 * pad), image.dtype)
            framed[:] = black[:, None, None]
            framed[:, pad : pad + height, pad : pad + width] = image
            image = framed[:, top : top + height, left : left + width]
        changed[place] = image
    return changed


def collate(samples: Sequence[ImageSample]) -> dict[str, np.ndarray]:
    """Model inputs, fp32 [batch, 3, height, width]."""
    return {PIXELS: samples[0].reader.pixels([sample.image for sample in samples])}


def shaped(pictures: Sequence[Picture], reader: Reader) -> list[ImageSample]:
    """Resize images for the model; raises UsageError if the processor leaves them at different sizes."""
    samples = []
    for picture in pictures:
        image = picture.open()
        if not samples:
            reader.check(image)
        sample = ImageSample(reader.shaped(image), reader, picture.known)
        if samples and sample.image.shape != samples[0].image.shape:
            raise UsageError(
                f"{picture.place} is {_size(sample.image)} and the first image {_size(samples[0].image)}, "
                "and the checkpoint's preprocessing resizes neither",
                fix="write `mean`, `std` and `size` under `task`",
            )
        if reader.size not in (None, sample.image.shape[:2]):
            raise UsageError(
                f"{picture.place} is {_size(sample.image)} when it is prepared, and the model takes "
                f"{reader.size[0]} x {reader.size[1]}",
                fix=f"write `size: [{reader.size[0]}, {reader.size[1]}]`, `mean` and `std` under `task`",
            )
        samples.append(sample)
    return samples


def _size(image: np.ndarray) -> str:
    return f"{image.shape[0]} x {image.shape[1]}"


# Reading ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """One image of the data, opened on demand; `label` as written in the data, None without one."""

    open: Callable[[], np.ndarray]
    place: str
    label: Any = None
    known: Mapping[str, Any] = ()
    size: tuple[int, int] | None = None
    """Height and width, if known before opening."""


@dataclass(frozen=True)
class Pictures:
    """Images of a data section. `names`: names that a dataset gives to its integer labels."""

    pictures: list[Picture]
    names: tuple[str, ...] | None = None


def read_pictures(data: TextData, base: Path, columns: Mapping[str, str]) -> Pictures:
    """Images of a recipe's section, unopened. `columns` are those that the recipe names."""
    if data.npz is not None:
        pictures = Pictures([picture for name in data.npz for picture in _archive(base / name, columns)])
    elif data.folder is not None:
        pictures = Pictures(list(_folder(base / data.folder)))
    else:
        pictures = _dataset(data, base, columns)
    if not pictures.pictures:
        origin = data.folder or data.dataset or ", ".join(data.npz or ())
        raise UsageError(f"{origin} has no image", fix=f"name one with images ({', '.join(SUFFIXES)})")
    return pictures


@contextlib.contextmanager
def opened_archive(file: Path) -> Iterator[Any]:
    """Open a numpy archive. Raises UsageError if it is not one, also while it is read."""
    try:
        opened = np.load(demand_file(file), allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise ValueError("it is one array, without a name")
        with opened as archive:
            yield archive
    except (OSError, ValueError, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as error:
        raise UsageError(
            f"{file.name} is not a numpy archive that can be read ({error})",
            fix="write it with numpy.savez_compressed, from arrays of numbers or texts",
        ) from None


def _archive(file: Path, columns: Mapping[str, str]) -> Iterator[Picture]:
    """Images uint8 [images, height, width, 3] of a numpy archive, with labels [images] if it has them."""
    with opened_archive(file) as archive:
        names = {"image": columns.get("image", "images"), "label": columns.get("label", "labels")}
        columns_in(file.name, archive.files, names, () if "label" in columns else ("label",), what="arrays")
        shape, dtype = array_header(archive, names["image"])
        labels = read_array(archive, names["label"]) if names["label"] in archive.files else None
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise UsageError(
            f"{file.name}: {names['image']} is {dtype} {list(shape)}, and images are uint8 "
            "[images, height, width, 3]",
            fix="write red, green and blue as bytes, the channels last",
        )
    if labels is not None and labels.shape == (shape[0], 1):
        labels = labels[:, 0]  # as Keras writes those of CIFAR
    if labels is not None and labels.shape != shape[:1]:
        raise UsageError(
            f"{file.name}: {shape[0]} images, and {names['label']} is of shape {list(labels.shape)}",
            fix="write one label for each image",
        )
    images = functools.cache(lambda: _pixels(file, names["image"]))
    for row in range(shape[0]):
        label = None if labels is None else labels[row].item()
        place = f"{file.name}, row {row + 1}"
        yield Picture(lambda row=row: images()[row], place, label, size=shape[1:3])


def _pixels(file: Path, name: str) -> np.ndarray:
    with opened_archive(file) as archive:
        return read_array(archive, name)


RATIO, LEAST_MIB = 100, 256
"""Largest unpacked size of an archive: `RATIO` times its own size, or this number of MiB."""

MOST_PIXELS = 64_000_000
"""Largest image that is read, in pixels."""

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
"""Formats that are read, whatever a file's suffix is: Pillow passes others to programs such as
Ghostscript.
"""

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def array_header(archive: Any, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array in an archive, read from its header."""
    info = archive.zip.getinfo(f"{name}.npy")
    packed = os.stat(archive.zip.filename).st_size
    if info.file_size > unpacked_limit(Path(archive.zip.filename), RATIO, LEAST_MIB):
        raise ValueError(f"{name} would unpack to {info.file_size:,} bytes, of a file of {packed:,}")
    with archive.zip.open(info) as stream:
        read = HEADERS.get(np.lib.format.read_magic(stream))
        if read is None:  # the third version is for records with names in other letters
            raise ValueError(f"{name} is in a version of numpy's format without plain numbers")
        shape, _, dtype = read(stream)
    claimed = math.prod(shape) * dtype.itemsize
    if any(length < 0 for length in shape) or claimed > info.file_size:
        raise ValueError(
            f"{name} claims {claimed:,} bytes {list(shape)}, and the file has {info.file_size:,}"
        )
    return shape, dtype


def read_array(archive: Any, name: str) -> np.ndarray:
    """Read an array of an archive after checking that the file can hold the claimed size."""
    array_header(archive, name)
    return archive[name]


def _folder(folder: Path) -> Iterator[Picture]:
    """Images in subfolders, ordered by path; the subfolder's name is the label. Hidden files are skipped."""
    loose = [file.name for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()]
    if loose:
        raise UsageError(
            f"{loose[0]} ({len(loose)} images in all) lies in {folder} itself, not in the folder of a label",
            fix="put each image into the folder of its label",
        )
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        for file in sorted(inner.rglob("*")):
            hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
            if file.suffix.lower() in SUFFIXES and file.is_file() and not hidden:
                yield Picture(lambda file=file: open_image(file), str(file.relative_to(folder)), inner.name)


def open_image(file: Path) -> np.ndarray:
    """Open an image file, upright, as uint8 [height, width, 3]; grey becomes colour, transparency
    is dropped.
    """
    from PIL import Image

    return _rgb(lambda: Image.open(demand_file(file), formats=FORMATS), str(file))


def _rgb(opened: Callable[[], Any], place: str) -> np.ndarray:
    """Pixels of a Pillow image. Raises UsageError for unreadable images, and for pixels of more than 8 bits,
    which Pillow would clip.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MOST_PIXELS is smaller
            picture = opened()
        with picture as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it is {image.width} x {image.height}, and {MOST_PIXELS:,} pixels are read")
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels are {image.mode}, and only 8 bits a channel are read")
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(
            f"{place} is not an image that can be read ({error})", fix="correct it or remove it"
        ) from None


def _dataset(data: TextData, base: Path, columns: Mapping[str, str]) -> Pictures:
    """Rows of `datasets`, opened by the feature `Image`."""
    rows = open_dataset(data, base)
    names = {"image": columns.get("image", "image"), "label": columns.get("label", "label")}
    optional = () if "label" in columns else ("label",)
    columns_in(f"dataset {data.dataset}", rows.column_names, names, optional)
    labels: Sequence[Any] = [None] * len(rows)
    if names["label"] in rows.column_names:
        labels = rows.select_columns(names["label"])[:][names["label"]]
    pictures = rows.select_columns(names["image"])

    def opener(row: int, place: str) -> Callable[[], np.ndarray]:
        def image() -> Any:
            cell = pictures[row][names["image"]]
            if not hasattr(cell, "convert"):
                raise UsageError(
                    f"{place}: {names['image']} is not an image but {type(cell).__name__}",
                    fix="name the column of images with `columns: {image: ...}`",
                )
            return cell

        return lambda: _rgb(image, place)

    images = []
    for row, label in enumerate(labels):
        place = f"dataset {data.dataset}, row {row + 1}"
        images.append(Picture(opener(row, place), place, label))
    feature = rows.features.get(names["label"])
    known = getattr(feature, "names", None)
    return Pictures(images, tuple(known) if known else None)
