"""Pixels and grids."""

from __future__ import annotations

import time

import numpy as np
import pytest
from PIL import Image

from admtrt.errors import OutputError
from admtrt.images import save_grid, to_uint8, usual_columns


def test_levels_are_cut_not_rounded():
    x = np.array([-2, -1, -0.5, 0, 0.999, 1, 3], dtype=np.float32).reshape(1, 1, 1, 7)
    assert to_uint8(x).reshape(-1).tolist() == [0, 0, 63, 127, 254, 255, 255]


def test_channels_come_last():
    x = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 5)).astype(np.float32)
    pixels = to_uint8(x)
    assert pixels.shape == (2, 4, 5, 3)
    assert pixels.dtype == np.uint8
    assert pixels[1, 2, 3, 0] == int((x[1, 0, 2, 3] + 1) * 127.5)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_grid_holds_every_image_in_order(tmp_path, channels, mode):
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, channels), dtype=np.uint8)
    path = tmp_path / "grid.png"
    save_grid(images, path, 3)
    with Image.open(path) as grid:
        assert grid.mode == mode
        pixels = np.asarray(grid)
    assert pixels.shape[:2] == (2 * 66 + 2, 3 * 66 + 2)
    for index, image in enumerate(images):
        top, left = 2 + index // 3 * 66, 2 + index % 3 * 66
        assert (pixels[top : top + 64, left : left + 64].reshape(image.shape) == image).all()


@pytest.mark.parametrize(
    ("count", "classes", "columns"),
    [
        (1, 1, 1),
        (10, 10, 3),  # one of each: there is no turn to repeat
        (50, 10, 10),
        (13, 10, 10),
        (100, 3, 9),  # three turns a row are nearest to a square
        (100, 2, 10),
        (1000, 10, 20),
        (60, 20, 20),
        (60, 21, 8),  # too many for a row
        (100, 1, 10),
    ],
)
def test_a_column_has_one_class_where_classes_take_turns(count, classes, columns):
    labels = [str(index % classes) for index in range(count)]
    assert usual_columns(count, labels) == columns
    assert columns % classes == 0 or columns == usual_columns(count)


def test_other_orders_of_classes_make_a_square():
    for labels in (["a"] * 8 + ["b"] * 8, ["a", "b", "b", "a"] * 4, None):
        assert usual_columns(16, labels) == usual_columns(16) == 4


def test_small_images_are_enlarged_by_a_whole_factor(tmp_path):
    images = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    save_grid(images, tmp_path / "grid.png", 4)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert (pixels[2:66:8, 2:66:8] == images[0, :, :, 0]).all()
    assert pixels.shape == (68, 68)


def test_labels_stand_above_their_images_and_are_cut_to_their_width(tmp_path):
    images = np.zeros((2, 64, 64, 1), dtype=np.uint8)
    save_grid(images, tmp_path / "plain.png", 2)
    save_grid(images, tmp_path / "labelled.png", 2, ["a label much wider than the image", ""])
    plain, labelled = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("plain", "labelled"))
    header = labelled.shape[0] - plain.shape[0]
    assert (labelled[2 + header : 66 + header, 2:66] == 0).all()
    text = labelled[: 2 + header]
    assert (text[:, 2:66] < 255).any()
    assert (text[:, 66:] == 255).all()


def test_a_place_that_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        save_grid(np.zeros((1, 8, 8, 1), dtype=np.uint8), tmp_path / "file" / "grid.png", 1)


@pytest.mark.parametrize(
    ("label", "same_as"),
    [
        ("é" * 100_000, "é" * 1000),
        ("a\u0301" * 50_000, "a\u0301" * 1000),  # characters without a width
        ("\u0301" * 50_000, "\u0301" * 70),
        ("two\nlines", "two lines"),
        (" x\t", "x"),
    ],
)
def test_labels_of_any_length_take_no_time(tmp_path, label, same_as):
    images = np.zeros((1, 8, 8, 1), np.uint8)
    drawn = []
    for index, text in enumerate((label, same_as)):
        before = time.process_time()
        save_grid(images, tmp_path / f"{index}.png", 1, [text])
        assert time.process_time() - before < 2
        drawn.append((tmp_path / f"{index}.png").read_bytes())
    assert drawn[0] == drawn[1]
