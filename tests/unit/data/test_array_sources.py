"""IDX and npz files as training data: how they are found and labelled, and their faults by name."""

from __future__ import annotations

import gzip
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from images import RNG, as_uint8, config, image
from PIL import Image

from admtrt.data.image_set import load_data
from admtrt.errors import DataError


def test_pipes_in_place_of_archives(tmp_path):
    for name in ("a.npz", "train-images-idx3-ubyte"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match="it is no regular file"):
            load_data(config(tmp_path / name))


def test_an_idx_file_that_inflates_further_than_it_says(tmp_path):
    with gzip.open(tmp_path / "train-images-idx3-ubyte.gz", "wb", compresslevel=1) as opened:
        opened.write(bytes([0, 0, 8, 3]) + struct.pack(">3I", 1, 8, 8) + bytes(2**26))
    with pytest.raises(
        DataError, match="too long: its header promises 1 x 8 x 8 bytes of data, it holds mor"
    ):
        load_data(config(tmp_path / "train-images-idx3-ubyte.gz"))


# --- IDX ---------------------------------------------------------------------------------------------------

GREY = RNG.integers(0, 256, (6, 8, 8), dtype=np.uint8)
NUMBERS = np.array([3, 0, 7, 3, 0, 7], np.uint8)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(folder: Path, prefix: str = "train-", pack=lambda data: data, suffix: str = "") -> Path:
    (folder / f"{prefix}labels-idx1-ubyte{suffix}").write_bytes(pack(idx(NUMBERS)))
    images = folder / f"{prefix}images-idx3-ubyte{suffix}"
    images.write_bytes(pack(idx(GREY)))
    return images


@pytest.mark.parametrize(("pack", "suffix"), [(lambda data: data, ""), (gzip.compress, ".gz")])
def test_idx_from_its_folder_or_its_file(tmp_path, pack, suffix):
    images = write_idx(tmp_path, pack=pack, suffix=suffix)
    for source in (tmp_path, images):
        data = load_data(config(source, channels=1))
        assert data.class_names == tuple("01234567")
        assert data.labels.tolist() == [3, 0, 7, 3, 0, 7]
        np.testing.assert_array_equal(as_uint8(image(data, 2))[..., 0], GREY[2])


def test_idx_prefers_the_training_file_and_refuses_to_guess(tmp_path):
    write_idx(tmp_path, "t10k-")
    write_idx(tmp_path, "train-")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(GREY[:6, ::-1].copy()))
    data = load_data(config(tmp_path, channels=1))
    np.testing.assert_array_equal(as_uint8(image(data))[..., 0], GREY[0, ::-1])
    write_idx(tmp_path, "extra-train-")
    with pytest.raises(DataError, match=r"extra-train-images-idx3-ubyte, t10k-.*, train-"):
        load_data(config(tmp_path, channels=1))


def test_idx_without_labels_and_with_labels_dropped(tmp_path):
    images = write_idx(tmp_path)
    assert load_data(config(images, label_from="none")).labels is None
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    assert load_data(config(images)).labels is None
    with pytest.raises(DataError, match="label_from 'prefix' applies to folders"):
        load_data(config(images, label_from="prefix"))


def test_idx_resizes_like_pillow_or_refuses(tmp_path):
    images = write_idx(tmp_path)
    larger = load_data(config(images, channels=1, image_size=12))
    expected = Image.fromarray(GREY[1]).resize((12, 12), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(as_uint8(image(larger, 1))[..., 0], np.asarray(expected))
    with pytest.raises(DataError, match="are 8x8 pixels, image_size is 12, and resize is off"):
        load_data(config(images, channels=1, image_size=12, resize=False))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(GREY)[:-5], "truncated: its header promises 6 x 8 x 8 bytes of data, it holds 379"),
        (idx(GREY) + b"x", "too long"),
        (idx(GREY)[:9], "ends within its header: 9 of 16 bytes"),
        (idx(NUMBERS), "starts with the bytes '00 00 08 01'; .* '00 00 08 03'"),
        (b"", "starts with the bytes ''"),
        (gzip.compress(idx(GREY))[:-20], "cannot read .*images-idx3-ubyte"),
        (idx(GREY[:5]), "holds 5 images but labels of shape .6."),
        (idx(GREY[:0]), "holds no image"),
    ],
    ids=["cut", "long", "header", "labels", "empty", "gzip", "count", "none"],
)
def test_damaged_idx_files(tmp_path, content, message):
    images = write_idx(tmp_path)
    images.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_data(config(tmp_path))


# --- .npz --------------------------------------------------------------------------------------------------

COLOUR = RNG.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)


def test_npz_with_and_without_labels(tmp_path):
    path = tmp_path / "samples.npz"
    np.savez(path, COLOUR)
    data = load_data(config(path))
    assert data.labels is None
    np.testing.assert_array_equal(as_uint8(image(data, 3)), COLOUR[3])
    np.savez(path, COLOUR, np.array([5, 5, 10, 2, 10]))
    data = load_data(config(path, channels=1))
    assert data.class_names == tuple(map(str, range(11)))
    assert data.labels.tolist() == [5, 5, 10, 2, 10]
    np.testing.assert_array_equal(
        as_uint8(image(data))[..., 0], np.asarray(Image.fromarray(COLOUR[0]).convert("L"))
    )


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": COLOUR}, r"holds no arr_0 \(it holds: x\)"),
        ({"arr_0": COLOUR.astype(np.float32) * math.nan}, "is float32"),
        ({"arr_0": COLOUR[..., 0]}, r"is uint8 \[5, 8, 8\]"),
        ({"arr_0": np.zeros((5, 3, 8, 8), np.uint8)}, r"is uint8 \[5, 3, 8, 8\]"),
        ({"arr_0": COLOUR[:0]}, "holds no image"),
        ({"arr_0": COLOUR, "arr_1": np.array([0, 1, -1, 0, 1])}, "has the label -1; labels are the numbers"),
        ({"arr_0": COLOUR, "arr_1": np.array([0, 1, 10**12, 0, 1])}, "has the label 1000000000000; labels"),
        ({"arr_0": COLOUR, "arr_1": np.arange(4)}, "holds 5 images but labels of shape .4."),
        ({"arr_0": COLOUR, "arr_1": np.arange(5.0)}, "arr_1 .* is float64"),
        ({"arr_0": np.array([print, len])}, "Python objects"),
    ],
)
def test_npz_of_another_form(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load_data(config(tmp_path / "a.npz"))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-30], lambda data: data[:400] + b"!!" + data[402:], lambda data: b"text"]
)
def test_damaged_npz(tmp_path, damage):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, COLOUR)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"a\.npz"):
        load_data(config(path))
