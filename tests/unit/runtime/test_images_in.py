"""Images, masks and latents from files: every way to store the right ones, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from admtrt.errors import RequestError
from admtrt.runtime.images_in import read_images, read_mask
from admtrt.runtime.latents import Latents

GRAY, RGB = (1, 8, 6), (3, 8, 6)
RNG = np.random.default_rng(5)
PIXELS = {event: RNG.integers(0, 256, (*event[1:], event[0]), dtype=np.uint8) for event in (GRAY, RGB)}
MASK = np.zeros((8, 6), np.uint8)
MASK[:3] = 1


def saved(path: Path, pixels: np.ndarray, mode: str | None = None) -> Path:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    (image if mode is None else image.convert(mode)).save(path)
    return path


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


# --- images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [GRAY, RGB])
def test_a_file_a_folder_and_an_npz_hold_the_same(tmp_path: Path, event: tuple[int, ...]) -> None:
    pixels = PIXELS[event]
    file = saved(tmp_path / "one.png", pixels)
    np.testing.assert_array_equal(read_images(file, event, "--init")[0], pixels[None])
    folder = tmp_path / "folder"
    folder.mkdir()
    saved(folder / "b.PNG", pixels)
    saved(folder / "a.bmp", 255 - pixels)
    (folder / "notes.txt").touch()
    (folder / ".hidden.png").touch()
    np.testing.assert_array_equal(read_images(folder, event, "--init")[0], [255 - pixels, pixels])
    labelled = npz(tmp_path / "images.npz", arr_0=np.stack([pixels] * 2), arr_1=np.array([3, 1], np.int32))
    images, labels = read_images(labelled, event, "--init")
    np.testing.assert_array_equal(images, [pixels] * 2)
    assert labels is not None
    assert labels.tolist() == [3, 1]
    floats = npz(tmp_path / "floats.npz", arr_0=np.full((1, *event), 0.5, np.float32))
    assert read_images(floats, event, "--init")[0].dtype == np.float32


def test_ways_to_store_the_same_pixels(tmp_path: Path) -> None:
    few = (PIXELS[RGB] // 128 * 255).astype(np.uint8)
    read = read_images(saved(tmp_path / "palette.png", few, "P"), RGB, "--init")[0]
    np.testing.assert_array_equal(read[0], few)
    bilevel = Image.fromarray(MASK * 255).convert("1")
    bilevel.save(tmp_path / "bilevel.png")
    np.testing.assert_array_equal(
        read_images(tmp_path / "bilevel.png", GRAY, "--init")[0][0, ..., 0], MASK * 255
    )


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("absent.png", lambda path: None, "No such file"),
        ("absent.npz", lambda path: None, "No such file"),
        ("text.png", lambda path: path.write_text("hello"), "it is damaged or no image"),
        ("text.npz", lambda path: path.write_text("hello"), "truncated, damaged or something else"),
        ("cut.png", lambda path: path.write_bytes(saved(path, PIXELS[GRAY]).read_bytes()[:60]), "damaged"),
        ("empty", lambda path: path.mkdir(), "holds no image"),
        (
            "rgb.png",
            lambda path: saved(path, PIXELS[RGB]),
            "pixels of mode RGB; the network's are L (1 channel",
        ),
        ("la.png", lambda path: saved(path, PIXELS[GRAY], "LA"), "pixels of mode LA"),
        ("deep.png", lambda path: Image.new("I;16", (6, 8)).save(path), "pixels of mode I;16"),
        (
            "turned.png",
            lambda path: saved(path, PIXELS[GRAY].transpose(1, 0, 2)),
            "has 8x6 pixels; expected 6x8",
        ),
        ("other.npz", lambda path: npz(path, images=MASK), "has no arr_0; it has images"),
        ("none.npz", lambda path: npz(path), "has no arr_0; it has nothing"),
        ("flat.npz", lambda path: npz(path, arr_0=MASK), "is uint8 [N, 6]; expected uint8 [N, 8, 6, 1]"),
        (
            "labels.npz",
            lambda path: npz(path, arr_0=PIXELS[GRAY][None], arr_1=np.zeros(2, int)),
            "expected 1",
        ),
        (
            "object.npz",
            lambda path: npz(path, arr_0=np.array([None], dtype=object)),
            "truncated, damaged or something else",
        ),
    ],
)
def test_images_that_are_refused(tmp_path: Path, name: str, make: Any, message: str) -> None:
    make(tmp_path / name)
    with pytest.raises(RequestError) as caught:
        read_images(tmp_path / name, GRAY, "--init")
    assert message in caught.value.message
    assert name in caught.value.message


# --- masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored",
    [MASK, MASK[None], MASK[None, None], MASK.astype(bool), MASK.astype(np.float32), MASK.astype(np.int64)],
    ids=lambda one: f"{one.dtype}{one.shape}",
)
def test_masks_of_npz(tmp_path: Path, stored: np.ndarray) -> None:
    mask = read_mask(npz(tmp_path / "mask.npz", arr_0=stored), GRAY)
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, MASK[None, None])


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_masks_of_pictures_are_known_where_white(tmp_path: Path, mode: str) -> None:
    values = np.where(MASK == 1, 128, 127).astype(np.uint8) if mode == "L" else MASK * 255
    saved(tmp_path / "mask.png", values[..., None], mode)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", GRAY), MASK[None, None])


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("mask.png", lambda path: saved(path, MASK[..., None] * 255, "LA"), "has transparency"),
        ("mask.png", lambda path: saved(path, MASK[:6, :, None] * 255), "has 6x6 pixels; expected 6x8"),
        ("mask.png", lambda path: saved(path, MASK[..., None]), "the mask knows no pixel"),
        ("mask.png", lambda path: saved(path, MASK[..., None] + 200), "the mask knows every pixel"),
        ("mask.npz", lambda path: npz(path, arr_0=MASK * 255), "with values other than 0 and 1"),
        ("mask.npz", lambda path: npz(path, arr_0=MASK[:, :4]), "the mask is uint8 [8, 4]; expected [8, 6]"),
        ("mask.npz", lambda path: npz(path, arr_0=np.zeros((0, 8, 6), bool)), "holds no mask"),
        ("mask.npz", lambda path: npz(path, mask=MASK), "has no arr_0; it has mask"),
        ("mask.npz", lambda path: None, "No such file"),
    ],
)
def test_masks_that_are_refused(tmp_path: Path, name: str, make: Any, message: str) -> None:
    make(tmp_path / name)
    with pytest.raises(RequestError) as caught:
        read_mask(tmp_path / name, GRAY)
    assert message in caught.value.message


# --- latents ---------------------------------------------------------------------------------------------

X = RNG.standard_normal((2, *GRAY), dtype=np.float32)
INVERTED = {"levels": 4, "steps": "ddim10", "clip": False}


def test_latents_come_back_as_they_were(tmp_path: Path) -> None:
    given = Latents(X, 4, "ddim10", True, np.array([1, 0]), np.stack([PIXELS[GRAY]] * 2))
    given.save(tmp_path / "latents.npz")
    read = Latents.read(tmp_path / "latents.npz", GRAY)
    for name, one in vars(given).items():
        np.testing.assert_array_equal(getattr(read, name), one)
    bare = Latents.read(npz(tmp_path / "bare.npz", latents=X), GRAY)
    assert (bare.levels, bare.steps, bare.clip, bare.labels, bare.images) == (None,) * 5


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "has no latents; it has nothing"),
        ({"latents": X[:, :, :4]}, "latents are float32 [2, 1, 4, 6]"),
        ({"latents": X.astype(np.float64)}, "latents are float64"),
        ({"latents": X * np.float32("nan")}, "latents have values that are not finite"),
        ({"latents": np.float32(1)}, "latents are float32 []"),
        ({"latents": X, "levels": 4}, "does not tell levels of at least 1 together with steps and clip"),
        ({"latents": X, **INVERTED, "levels": 0}, "does not tell levels of at least 1"),
        ({"latents": X, **INVERTED, "levels": 1.5}, "levels is float64 []"),
        ({"latents": X, **INVERTED, "steps": 10}, "steps is int64 []"),
        ({"latents": X, "labels": np.array([1])}, "holds 1 labels for 2 latents"),
        ({"latents": X, "labels": np.array([[1]])}, "labels is int64 [1, 1]"),
        ({"latents": X, "images": PIXELS[GRAY][None]}, "holds 1 images for 2 latents"),
        ({"latents": X, "images": PIXELS[RGB][None]}, "expected uint8 [N, 8, 6, 1]"),
    ],
)
def test_latents_that_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        Latents.read(npz(tmp_path / "latents.npz", **arrays), GRAY)
    assert message in caught.value.message
