"""Image classification: what is read, prepared, varied and measured. Oracles: transformers, Pillow, numpy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessorPil,
    ConvNextImageProcessorPil,
    EfficientNetImageProcessorPil,
    ViTImageProcessorPil,
)

from qcompress.errors import ModelError, UsageError
from qcompress.models import load_processor
from qcompress.models.architecture import Head
from qcompress.schema.data import Augment
from qcompress.schema.recipe import ImageClassification, Recipe, TextData
from qcompress.tasks import TASKS, image_classification
from qcompress.tasks.images import Picture, Reader, open_image, read_pictures, shaped, varied
from qcompress.tasks.text import fingerprint

NAMES = ["ant", "bee", "cat"]
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def pictures(count: int = 12, height: int = 20, width: int = 24, seed: int = 0) -> np.ndarray:
    """Smooth random images, uint8: noise would hide how an image is resized."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (count, 5, 6, 3)).astype(np.uint8)
    sized = [np.array(Image.fromarray(one).resize((width, height), Image.BICUBIC)) for one in small]
    return np.stack(sized)


def task(**options: Any) -> ImageClassification:
    return ImageClassification(**{"labels": NAMES, "mean": MEAN, "std": STD, "size": [8, 8], **options})


def reader_of(folder: Path, options: ImageClassification) -> Reader:
    (folder / "preprocessor_config.json").write_text(json.dumps(image_classification.processor(options)))
    return image_classification.reader(folder)


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return reader_of(tmp_path, task())


def save_npz(file: Path, **arrays: Any) -> None:
    np.savez_compressed(file, **arrays)


def plain(images: np.ndarray, size: tuple[int, int] = (8, 8)) -> np.ndarray:
    """Model input computed by Pillow and numpy alone, fp64 [batch, 3, height, width]."""
    sized = [np.array(Image.fromarray(one).resize(size[::-1], Image.BILINEAR)) for one in images]
    values = (np.stack(sized) / 255 - np.array(MEAN)) / np.array(STD)
    return values.transpose(0, 3, 1, 2)


# Preparing ----------------------------------------------------------------------------------------


def test_the_recipes_own_preparation_is_resize_rescale_normalize(reader: Reader) -> None:
    images = pictures()
    inputs = reader.pixels([reader.shaped(image) for image in images])
    assert inputs.dtype == np.float32 and inputs.shape == (12, 3, 8, 8)
    np.testing.assert_allclose(inputs, plain(images), atol=1e-6)  # fp32 against fp64
    assert np.array_equal(reader.black(), reader.pixels([np.zeros((8, 8, 3), np.uint8)])[0, :, 3, 5])
    np.testing.assert_allclose(reader.black(), -np.array(MEAN) / np.array(STD), atol=1e-6)


PROCESSORS: dict[str, Callable[[], Any]] = {
    "vit": lambda: ViTImageProcessorPil(size={"height": 16, "width": 12}, resample=3),
    "convnext": lambda: ConvNextImageProcessorPil(size={"shortest_edge": 14}, crop_pct=0.875),
    "efficientnet": lambda: EfficientNetImageProcessorPil(size={"height": 16, "width": 16}, include_top=True),
    "bit": lambda: BitImageProcessorPil(size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16}),
    "as it is": lambda: ViTImageProcessorPil(do_resize=False),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_two_steps_are_what_the_checkpoints_processor_does_in_one(name: str, tmp_path: Path) -> None:
    processor = PROCESSORS[name]()
    processor.save_pretrained(tmp_path)
    loaded = image_classification.reader(tmp_path)
    images = pictures(5)
    for image in images:
        loaded.check(image)
    inputs = loaded.pixels([loaded.shaped(image) for image in images])
    expected = processor(list(images), return_tensors="np", input_data_format="channels_last")["pixel_values"]
    assert np.array_equal(inputs, expected) and len(np.unique(inputs)) > 50


def test_a_processor_that_does_more_is_refused(reader: Reader) -> None:
    class Brighter(type(reader.processor)):
        def __call__(self, images: Any, **options: Any) -> Any:
            processed = super().__call__(images, **options)
            if options.get("do_resize", True) and options.get("do_rescale", True):
                processed["pixel_values"] = processed["pixel_values"] + 1
            return processed

    strange = Reader(Brighter(size={"height": 8, "width": 8}))
    with pytest.raises(ModelError, match="Brighter does more than resize, crop, rescale and normalize"):
        strange.check(pictures(1)[0])


def test_a_checkpoint_without_a_processor_is_named_and_the_recipe_can_help(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no preprocessor_config\.json") as raised:
        load_processor(tmp_path)
    assert str(tmp_path) in str(raised.value) and "`mean`, `std` and `size`" in raised.value.fix
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    with pytest.raises(ModelError, match="transformers cannot make an image processor from it"):
        load_processor(tmp_path)
    assert image_classification.processor(ImageClassification()) is None
    assert image_classification.processor(task(size=None))["do_resize"] is False
    for wrong in ({"std": None}, {"mean": None, "std": None}, {"std": [0.1, 0.0, 0.1]}, {"size": [0, 8]}):
        with pytest.raises(ValueError, match="`mean` and `std` belong together|must be above 0"):
            task(**wrong)


# Reading ------------------------------------------------------------------------------------------


def known(samples: list[Any]) -> list[Any]:
    return [sample.known.get("label") for sample in samples]


def test_an_archive_with_names_of_its_own(tmp_path: Path, reader: Reader) -> None:
    images, labels = pictures(), np.arange(12, dtype=np.uint8) % 3
    save_npz(tmp_path / "a.npz", x=images[:8], y=labels[:8])
    save_npz(tmp_path / "b.npz", x=images[8:], y=labels[8:])
    data = TextData(npz=["a.npz", "b.npz"], columns={"image": "x", "label": "y"})
    sample_list = image_classification.samples(data, tmp_path, reader, task(), None)
    assert known(sample_list) == list(range(3)) * 4
    pixels = image_classification.collate(sample_list)["pixel_values"]
    np.testing.assert_allclose(pixels, plain(images), atol=1e-6)
    few = image_classification.samples(data, tmp_path, reader, task(), 5)
    assert known(few) == [0, 1, 2, 0, 1]
    spread = image_classification.examples(data.model_copy(update={"limit": 4}), tmp_path, reader, task())
    assert known(spread.samples) == [0, 0, 0, 0] and len(spread) == 4 and spread.unit == "images"
    assert spread.lengths.tolist() == [1, 1, 1, 1] and not spread.notes
    batch = spread.batch([2, 0])
    assert batch["labels"].tolist() == [0, 0] and batch["labels"].dtype == torch.int64
    np.testing.assert_allclose(batch["pixel_values"].numpy(), plain(images[[6, 0]]), atol=1e-6)


def test_labels_may_be_names_and_the_checkpoints_order_counts(tmp_path: Path, reader: Reader) -> None:
    save_npz(tmp_path / "a.npz", images=pictures(3), labels=np.array(["cat", "Ant", "bee"]))
    sample_list = image_classification.samples(TextData(npz=["a.npz"]), tmp_path, reader, task(), None)
    assert known(sample_list) == [2, 0, 1]
    settled = image_classification.settled(task(), {"id2label": {"0": "cat", "1": "ant", "2": "bee"}})
    assert settled.labels == ["cat", "ant", "bee"]
    sample_list = image_classification.samples(TextData(npz=["a.npz"]), tmp_path, reader, settled, None)
    assert known(sample_list) == [0, 1, 2]


@pytest.mark.parametrize(
    ("arrays", "columns", "match"),
    [
        ({"x": pictures(2)}, None, "has the arrays x, and not 'images'"),
        ({"images": pictures(2)}, {"label": "y"}, "has the arrays images, and not 'y'"),
        ({"images": pictures(2) / 255}, None, r"images is float64 \[2, 20, 24, 3\], and images are uint8"),
        ({"images": pictures(2)[..., 0]}, None, r"images is uint8 \[2, 20, 24\], and images"),
        ({"images": pictures(2), "labels": [1]}, None, r"2 images, and labels is of shape \[1\]"),
        ({"images": pictures(2), "labels": [0, 3]}, None, "row 2: 3 is not the name or the index of"),
        ({"images": pictures(2), "labels": ["ant", "elk"]}, None, "the data have the labels ant, elk, and"),
        ({"images": pictures(1)[:0]}, None, "has no image"),
        ({"images": np.array([{}])}, None, "images is object"),
    ],
)  # fmt: skip
def test_a_wrong_archive_is_named(
    arrays: dict[str, Any], columns: Any, match: str, tmp_path: Path, reader: Reader
) -> None:
    save_npz(tmp_path / "a.npz", **arrays)
    data = TextData(npz=["a.npz"], columns=columns)
    with pytest.raises(UsageError, match=match):
        image_classification.samples(data, tmp_path, reader, task(), None)


def write_folder(folder: Path, images: np.ndarray) -> None:
    for place, image in enumerate(images):
        name = folder / NAMES[place % 3] / f"{place:02}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(name)


def test_a_folder_of_folders(tmp_path: Path, reader: Reader) -> None:
    images = pictures()
    write_folder(tmp_path / "photos", images)
    Image.fromarray(images[0]).convert("L").save(tmp_path / "photos" / "bee" / "zz.PNG")
    (tmp_path / "photos" / "bee" / "notes.txt").write_text("no image")
    data = TextData(folder="photos")
    sample_list = image_classification.samples(data, tmp_path, reader, task(), None)
    assert known(sample_list) == [0] * 4 + [1] * 5 + [2] * 4
    order = [*range(0, 12, 3), *range(1, 12, 3), *range(2, 12, 3)]
    coloured = [sample for place, sample in enumerate(sample_list) if place != 8]
    pixels = image_classification.collate(coloured)["pixel_values"]
    np.testing.assert_allclose(pixels, plain(images[order]), atol=1e-6)
    grey = sample_list[8].image
    assert np.array_equal(grey[..., 0], grey[..., 1]) and np.array_equal(grey[..., 0], grey[..., 2])
    assert len(fingerprint(data, tmp_path)) == 14
    (tmp_path / "photos" / "cat" / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(UsageError, match=r"broken\.png is not an image that can be read"):
        image_classification.samples(data, tmp_path, reader, task(), None)


def test_images_of_several_sizes_need_a_processor_that_resizes(tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", pictures(2))
    Image.fromarray(pictures(1, 9, 9)[0]).save(tmp_path / "photos" / "bee" / "small.png")
    data, options = TextData(folder="photos"), task(size=None)
    with pytest.raises(UsageError, match="small.png is 9 x 9 and the first image 20 x 24"):
        image_classification.samples(data, tmp_path, reader_of(tmp_path, options), options, None)
    assert len(image_classification.samples(data, tmp_path, reader_of(tmp_path, task()), task(), None)) == 3


def test_a_dataset_of_a_local_directory(tmp_path: Path, reader: Reader) -> None:
    images = pictures(6)
    write_folder(tmp_path / "set" / "train", images)
    data = TextData(dataset="./set", split="train")
    sample_list = image_classification.samples(data, tmp_path, reader, task(labels=NAMES[::-1]), None)
    order = [0, 3, 1, 4, 2, 5]
    assert known(sample_list) == [2, 2, 1, 1, 0, 0]  # by name: the dataset's own numbers are another order
    pixels = image_classification.collate(sample_list)["pixel_values"]
    np.testing.assert_allclose(pixels, plain(images[order]), atol=1e-6)
    with pytest.raises(UsageError, match="has the columns image, label, and not 'picture'"):
        columns = {"columns": {"image": "picture"}}
        image_classification.samples(TextData(**data.model_dump() | columns), tmp_path, reader, task(), None)


def test_data_without_labels_have_no_labels(tmp_path: Path, reader: Reader) -> None:
    save_npz(tmp_path / "a.npz", images=pictures(4))
    save_npz(tmp_path / "b.npz", images=pictures(4), labels=[-1] * 4)
    for name in ("a.npz", "b.npz"):
        example_set = image_classification.examples(TextData(npz=[name]), tmp_path, reader, task())
        assert [sample.known for sample in example_set.samples] == [{}] * 4 and set(
            example_set.batch([1])
        ) == {"pixel_values"}
    with pytest.raises(UsageError, match="no labels, and the task's loss needs them"):
        image_classification.loss(torch.zeros(1, 3), example_set.batch([1]))


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_cifar_archive_of_the_assets(split: str, assets: Path, tmp_path: Path) -> None:
    options = task(labels=[str(label) for label in range(10)], size=None)
    reader = reader_of(tmp_path, options)
    data = TextData(npz=["images/cifar10-jpeg/cifar10_subset.npz"], limit=50,
                    columns={"image": f"x_{split}", "label": f"y_{split}"})  # fmt: skip
    sample_list = image_classification.samples(data, assets, reader, options, None)
    assert len(sample_list) == 50 and {sample.image.shape for sample in sample_list} == {(32, 32, 3)}
    assert len(set(known(sample_list))) == 10


# Varying ------------------------------------------------------------------------------------------


def test_a_varied_image_is_the_image_mirrored_framed_and_cut() -> None:
    random = np.random.default_rng(1)
    pixels = random.normal(size=(400, 3, 6, 5)).astype(np.float32)
    black = np.array([7.0, 8.0, 9.0], np.float32)
    changed = varied(pixels, black, Augment(flip=True, crop=2), range(400), (0, 0, 0))
    seen = set()
    for image, made in zip(pixels, changed, strict=True):
        framed = {}
        for mirrored in (False, True):
            turned = image[..., ::-1] if mirrored else image
            whole = np.stack([np.pad(turned[c], 2, constant_values=black[c]) for c in range(3)])
            framed |= {(mirrored, top, left): whole[:, top : top + 6, left : left + 5]
                       for top in range(5) for left in range(5)}  # fmt: skip
        matching = [key for key, value in framed.items() if np.array_equal(value, made)]
        assert len(matching) == 1
        seen.add(matching[0])
    assert len(seen) == 50  # every one of 2 x 5 x 5 occurs: 400 draws miss one with probability 0.02
    flipped = varied(pixels, black, Augment(flip=True), range(400), (0, 0, 0))
    share = np.mean(
        [np.array_equal(made, image[..., ::-1]) for made, image in zip(flipped, pixels, strict=True)]
    )
    assert 0.4 < share < 0.6
    assert np.array_equal(varied(pixels, black, Augment(), range(400), (0, 0, 0)), pixels)


def test_what_happens_to_an_image_depends_on_the_moment_and_the_row_alone(
    tmp_path: Path, reader: Reader
) -> None:
    save_npz(tmp_path / "a.npz", images=pictures(), labels=np.arange(12) % 3)
    data = TextData(npz=["a.npz"], augment={"flip": True, "crop": 2})
    example_set = image_classification.examples(data, tmp_path, reader, task())
    rows = [3, 8, 1, 5]

    def pixels(chosen: list[int], moment: tuple[int, ...] | None) -> np.ndarray:
        return example_set.batch(chosen, moment)["pixel_values"].numpy()

    whole = pixels(rows, (0, 1, 2))
    assert np.array_equal(whole, pixels(rows, (0, 1, 2)))
    assert np.array_equal(whole[::2], pixels(rows[::2], (0, 1, 2)))  # as one of two processes sees them
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3), None):
        assert not np.array_equal(whole, pixels(rows, other))
    plainly = image_classification.examples(
        data.model_copy(update={"augment": None}), tmp_path, reader, task()
    )
    assert np.array_equal(plainly.batch(rows, (0, 1, 2))["pixel_values"].numpy(), pixels(rows, None))


# Measuring ----------------------------------------------------------------------------------------


def test_results_and_metrics_by_hand() -> None:
    names = [f"l{index}" for index in range(6)]
    options = ImageClassification(labels=names)
    rows = np.log(np.array([[32, 16, 8, 4, 2, 2], [1, 1, 1, 1, 1, 59], [8, 8, 4, 4, 4, 4]], np.float32))
    outcomes = image_classification.results([{"label": 1}, {"label": 4}, {"label": 1}], rows, options)
    assert [one["prediction"] for one in outcomes] == [0, 5, 0]
    assert [one["rank"] for one in outcomes] == [1, 5, 1]  # of equal logits the first comes first
    losses = [math.log(64 / 16), math.log(64), math.log(32 / 8)]
    assert [one["loss"] for one in outcomes] == pytest.approx(losses, rel=1e-6)
    values = image_classification.metrics(outcomes, options)
    assert values == pytest.approx(
        {"accuracy": 0.0, "top5_accuracy": 2 / 3, "cross_entropy": sum(losses) / 3}, rel=1e-6
    )
    right = image_classification.results([{"label": 0}, {"label": 5}, {"label": 0}], rows, options)
    assert image_classification.metrics(right, options)["accuracy"] == 1
    unlabelled = image_classification.results([{}] * 3, rows, options)
    assert image_classification.metrics(unlabelled, options) == {}
    other = [{"prediction": 0}, {"prediction": 1}, {"prediction": 0}]
    assert image_classification.metrics(unlabelled, options, other) == {"agreement": pytest.approx(2 / 3)}
    assert set(image_classification.metrics(outcomes, ImageClassification(labels=NAMES))) == {
        "accuracy", "cross_entropy",
    }  # fmt: skip


def test_ranks_and_losses_are_torchs() -> None:
    random = np.random.default_rng(2)
    logits = random.normal(size=(60, 7)).astype(np.float32)
    labels = random.integers(0, 7, 60)
    outcomes = image_classification.results([{"label": int(one)} for one in labels], logits, task())
    order = torch.from_numpy(logits).argsort(-1, descending=True)
    ranks = [row.tolist().index(label) for row, label in zip(order, labels, strict=True)]
    assert [one["rank"] for one in outcomes] == ranks and len(set(ranks)) == 7
    batch = {"labels": torch.from_numpy(labels)}
    mean = image_classification.loss(torch.from_numpy(logits), batch)
    assert float(mean) == pytest.approx(np.mean([one["loss"] for one in outcomes]), rel=1e-6)


def test_a_broken_model_gets_no_score() -> None:
    rows = np.array([[1.0, np.nan, 0.0], [2.0, 1.0, 0.0]], np.float32)
    outcomes = image_classification.results([{"label": 0}, {"label": 0}], rows, task())
    assert outcomes[0]["prediction"] is None and outcomes[0]["rank"] is None
    options = task(labels=[f"l{index}" for index in range(5)])
    values = image_classification.metrics(outcomes, options)
    assert len(values) == 3 and all(math.isnan(value) for value in values.values())


def test_the_head_is_of_single_labels() -> None:
    assert image_classification.head(task()) == Head(
        "image-classification", tuple(NAMES), "single_label_classification"
    )
    assert image_classification.head(ImageClassification()).labels is None
    assert image_classification.logits_of(task(), {}) == (1, 3)
    assert TASKS["image-classification"] is image_classification


# Recipes ------------------------------------------------------------------------------------------


def test_a_recipe_without_images_is_written_as_before() -> None:
    """Digests of recipes that know nothing of images stay what they were."""
    text = TextData(table=["a.tsv"], columns={"text": "b"})
    assert text.model_dump() == {
        "text": None, "table": ["a.tsv"], "dataset": None, "config": None, "split": "train", "revision": None,
        "columns": {"text": "b", "pair": None, "label": None, "tokens": None, "tags": None},
        "column": "text", "limit": None,
    }  # fmt: skip
    images = {"npz": ["a.npz"], "augment": {"flip": True, "crop": 4}, "columns": {"image": "x"}}
    recipe = Recipe.model_validate({
        "name": "images", "model": {"family": "bert", "source": "unused"},
        "task": {"name": "image-classification"},
        "data": {"train": images, "evaluate": {"test": {"folder": "test"}}}, "format": "w8a8",
    })  # fmt: skip
    again = Recipe.model_validate(recipe.model_dump(mode="json", by_alias=True))
    assert again == recipe and again.data.train.augment == Augment(flip=True, crop=4)


# What images are not what they seem ---------------------------------------------------------------


def test_more_than_8_bits_are_refused_and_not_clipped(tmp_path: Path) -> None:
    deep = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(deep.astype(np.float32) / 65535).save(tmp_path / "float.tiff")
    for name in ("deep.png", "float.tiff"):
        with pytest.raises(UsageError, match=f"{name} is not an image .*only 8 bits a channel"):
            open_image(tmp_path / name)


def test_a_photo_is_turned_upright(tmp_path: Path) -> None:
    image = Image.fromarray(pictures(1, 4, 8)[0])
    tags = image.getexif()
    tags[0x0112] = 6  # the camera was held upright
    image.save(tmp_path / "tilted.png", exif=tags)
    assert np.array_equal(open_image(tmp_path / "tilted.png"), np.rot90(np.array(image), -1))


def test_images_beside_the_folders_of_labels_are_named_and_hidden_ones_are_none(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "photos"
    write_folder(folder, pictures(4))
    count = len(read_pictures(TextData(folder="photos"), tmp_path, {}).pictures)
    inner = next(path for path in folder.iterdir() if path.is_dir())
    (inner / ".checkpoints").mkdir()
    Image.fromarray(pictures(1)[0]).save(inner / ".checkpoints" / "x.png")
    Image.fromarray(pictures(1)[0]).save(inner / "._x.png")
    assert len(read_pictures(TextData(folder="photos"), tmp_path, {}).pictures) == count > 0
    Image.fromarray(pictures(1)[0]).save(folder / "loose.png")
    with pytest.raises(UsageError, match=r"loose\.png \(1 images in all\) lies in .* itself"):
        read_pictures(TextData(folder="photos"), tmp_path, {})


def test_one_array_is_no_archive_and_labels_may_stand_in_a_column(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", pictures())
    with pytest.raises(UsageError, match=r"one\.npy is not a numpy archive .*one array, without a name"):
        read_pictures(TextData(npz=["one.npy"]), tmp_path, {})
    save_npz(tmp_path / "keras.npz", images=pictures(3), labels=np.array([[2], [0], [1]]))
    images = read_pictures(TextData(npz=["keras.npz"]), tmp_path, {}).pictures
    assert [one.label for one in images] == [2, 0, 1]


def test_images_of_another_size_than_the_graphs_are_named(tmp_path: Path) -> None:
    made = reader_of(tmp_path, task())
    sized = Reader(made.processor, (9, 8))
    pictured = [Picture(lambda: pictures(1)[0], "row 1", 0)]
    with pytest.raises(UsageError, match="row 1 is 8 x 8 when it is prepared, and the model takes 9 x 8"):
        shaped(pictured, sized)
    assert len(shaped(pictured, Reader(made.processor, (8, 8)))) == 1
