"""Sources of training data: what each reads, how it is labelled, and its faults by name."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from images import as_uint8, config, image, noise, save
from PIL import Image

from admtrt.data.image_set import load_data
from admtrt.data.sources import MOST_PIXELS
from admtrt.errors import DataError, MissingDependencyError
from admtrt.training.data import batch

# --- digits ------------------------------------------------------------------------------------------------


def test_digits_are_complete_labelled_and_span_the_range():
    data = load_data(config("digits", channels=1))
    assert len(data) == 1797
    assert data.class_names == tuple("0123456789")
    assert np.bincount(data.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    x = np.stack([image(data, index) for index in range(100)])
    assert x.shape == (100, 1, 8, 8)
    assert x.dtype == np.float32
    assert (x.min(), x.max()) == (-1, 1)
    assert sorted(np.unique(data.images)) == [round(value * 255 / 16) for value in range(17)]


def test_grey_images_are_repeated_for_more_channels():
    grey, colour = (image(load_data(config("digits", channels=channels))) for channels in (1, 3))
    np.testing.assert_array_equal(colour, np.repeat(grey, 3, axis=0))


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match=r"\[train\]"):
        load_data(config("digits"))


def test_kind_digits_refuses_another_source():
    with pytest.raises(DataError, match="kind is 'digits' but source is 'elsewhere'"):
        load_data(config("elsewhere", kind="digits"))


def test_a_folder_may_be_called_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "digits" / "a.png")
    assert len(load_data(config("digits", kind="folder"))) == 1


# --- folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "label_from", "classes", "labels"),
    [
        (["cat/1.png", "cat/in/2.png", "ant/3.png"], "auto", ("ant", "cat"), [0, 1, 1]),
        (["dog_1.png", "ant_2.png", "dog_x_3.png"], "auto", ("ant", "dog"), [0, 1, 1]),
        (["b/dog_1.png", "a/dog_2.png"], "auto", ("a", "b"), [0, 1]),
        (["b/dog_1.png", "a/dog_2.png"], "prefix", ("dog",), [0, 0]),
        (["dog_1.png", "a/ant_2.png"], "auto", ("ant", "dog"), [0, 1]),
        (["1.png", "a/ant_2.png"], "auto", (), None),
        (["b/dog_1.png", "a/dog_2.png"], "none", (), None),
    ],
)
def test_labels_of_folders(tmp_path, names, label_from, classes, labels):
    for name in names:
        save(tmp_path / name)
    data = load_data(config(tmp_path, label_from=label_from))
    assert data.class_names == classes
    assert labels == (None if data.labels is None else data.labels.tolist())
    assert len(data) == len(names)


@pytest.mark.parametrize(
    ("label_from", "message"),
    [("folder", "1 images lie directly in .*: a.png"), ("prefix", "1 names .* a.png")],
)
def test_files_that_do_not_fit_the_asked_labelling_are_named(tmp_path, label_from, message):
    save(tmp_path / "a.png")
    save(tmp_path / "b" / "dog_1.png")
    with pytest.raises(DataError, match=message):
        load_data(config(tmp_path, label_from=label_from))


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tiff", "gif", "jpg", "JPEG"])
def test_formats(tmp_path, suffix):
    save(tmp_path / f"a.{suffix}", np.full((8, 8, 3), 77, np.uint8))
    assert (
        np.abs(as_uint8(image(load_data(config(tmp_path)))).astype(int) - 77).max() <= 2
    )  # JPEG and WebP round


def test_hidden_and_other_files_are_no_images(tmp_path):
    for name in ("._a.png", ".thumbnails/a.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    kept = save(tmp_path / "a.png")
    assert load_data(config(tmp_path)).images == (kept,)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_modes_become_the_asked_channels(tmp_path, mode, channels):
    source = Image.fromarray(noise(8, 8)).convert(mode)
    source.save(tmp_path / f"a.{'tiff' if mode == 'CMYK' else 'png'}")
    got = as_uint8(image(load_data(config(tmp_path, channels=channels))))
    target = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
    np.testing.assert_array_equal(got, np.asarray(source.convert(target)).reshape(8, 8, channels))


ORIENTATION = 0x0112
TURNS = {  # what the pixels of a file become when they are seen upright (EXIF 2.3, tag Orientation)
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("suffix", [".png", ".tiff", ".webp"])
def test_images_are_turned_as_their_exif_data_say(tmp_path, orientation, suffix):
    pixels = noise(8, 8)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if suffix == ".webp" else {}
    Image.fromarray(pixels).save(tmp_path / f"a{suffix}", exif=exif, **options)
    upright = image(load_data(config(tmp_path, channels=3)))
    np.testing.assert_array_equal(as_uint8(upright), TURNS[orientation](pixels))
    as_stored = image(load_data(config(tmp_path, channels=3, exif_rotation=False)))
    stored = TURNS[orientation](pixels) if suffix == ".tiff" else pixels  # which Pillow itself turns
    np.testing.assert_array_equal(as_uint8(as_stored), stored)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist_turn_nothing(tmp_path, orientation):
    pixels = noise(8, 8)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(as_uint8(image(load_data(config(tmp_path)))), pixels)


def transparent(mode: str) -> Image.Image:
    """Left half opaque, right half transparent, with an invisible colour."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., :3] = 60
    pixels[:, :4, 3] = 255
    if mode == "P":
        made = Image.fromarray(np.repeat([[0] * 4 + [1] * 4], 8, axis=0).astype(np.uint8), "P")
        made.putpalette([60, 60, 60, 61, 61, 61])
        made.info["transparency"] = 1
        return made
    if mode == "RGB":  # of which one colour counts as transparent
        pixels[:, 4:, :3] = 61
        made = Image.fromarray(pixels[..., :3])
        made.info["transparency"] = (61, 61, 61)
        return made
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated")
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("background", "seen"), [(255, 255), (0, 0), (128, 128), ("none", None), (None, None)]
)
def test_transparent_pixels_show_the_background(tmp_path, mode, channels, background, seen):
    transparent(mode).save(tmp_path / "a.png", **({"transparency": (61, 61, 61)} if mode == "RGB" else {}))
    shown = as_uint8(image(load_data(config(tmp_path, channels=channels, background=background))))
    assert (shown[:, :4] == 60).all()
    assert (shown[:, 4:] == (seen if seen is not None else 60 if mode in ("RGBA", "LA") else 61)).all()


@pytest.mark.parametrize("channels", [2, 4])
def test_transparency_stays_where_it_has_a_channel(tmp_path, channels):
    transparent("RGBA").save(tmp_path / "a.png")
    shown = as_uint8(image(load_data(config(tmp_path, channels=channels))))
    assert (shown[..., -1] == [255] * 4 + [0] * 4).all()
    assert (shown[..., 0] == 60).all()


def test_transparent_pixels_of_arrays_show_the_background_as_well(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.asarray(transparent("RGBA"))[None])
    assert (as_uint8(image(load_data(config(tmp_path / "a.npz"))))[:, 4:] == 255).all()
    hidden = load_data(config(tmp_path / "a.npz", background="none"))
    assert (as_uint8(image(hidden)) == 60).all()


def test_of_an_animation_the_first_picture_is_taken(tmp_path):
    first, second = (Image.new("RGB", (8, 8), (level,) * 3) for level in (10, 200))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert (as_uint8(image(load_data(config(tmp_path)))) == 10).all()


def test_images_of_sixteen_bits_are_to_be_converted(tmp_path):
    Image.new("I;16", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(DataError) as caught:
        load_data(config(tmp_path))
    assert caught.value.hint == "Convert them to 8 bits a channel, or remove them."
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(DataError) as caught:
        load_data(config(tmp_path))
    assert caught.value.hint == "Repair or remove them."


def test_palettes_with_transparency_do_not_warn(tmp_path):
    source = Image.fromarray(noise(8, 8)).quantize(4)
    source.save(tmp_path / "a.png", transparency=bytes([0, 128, 255, 255]))
    got = as_uint8(image(load_data(config(tmp_path, background="none"))))
    np.testing.assert_array_equal(got, np.asarray(source.convert("RGB")))


# --- bad files ---------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    save(path, noise(64, 64))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped_bit(path: Path) -> None:
    save(path)
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 1
    path.write_bytes(data)


FAULTS = {
    "text.png": (lambda path: path.write_text("no image"), "not an image"),
    "empty.jpg": (lambda path: path.touch(), "not an image"),
    "folder.png.bmp": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "cut.png": (truncated, "truncated"),
    "cut.jpg": (truncated, "truncated"),
    "cut.gif": (truncated, ""),
    "cut.webp": (truncated, ""),
    "bit.png": (flipped_bit, ""),
    "deep.png": (lambda path: Image.new("I;16", (8, 8)).save(path), "mode I;16, not 8 bits"),
    "float.tiff": (lambda path: Image.new("F", (8, 8), math.nan).save(path), "mode F, not 8 bits"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_file_is_refused_by_name_or_skipped(tmp_path, name):
    make, reason = FAULTS[name]
    good = [save(tmp_path / "ant_1.png"), save(tmp_path / "bee_1.png")]
    bad = tmp_path / f"cat_{name}"
    make(bad)
    with pytest.raises(
        DataError, match=f"(?s)1 of 3 images .*: {bad.name} \\(.*{reason}.*on_bad_file"
    ) as caught:
        load_data(config(tmp_path))
    assert (
        str(caught.value).count(str(tmp_path)) == 1
    )  # the file's name, not its path once more in the reason
    data = load_data(config(tmp_path, on_bad_file="skip"))
    assert data.images == tuple(good)
    assert data.class_names == ("ant", "bee")
    assert [path for path, _ in data.skipped] == [bad]
    assert reason in data.skipped[0].reason
    batch(data, 0, 0, 4)


def test_many_bad_files_are_counted_and_the_first_named(tmp_path):
    for index in range(8):
        (tmp_path / f"{index}.png").write_text("no image")
    for on_bad_file in ("refuse", "skip"):  # skipping everything leaves nothing
        with pytest.raises(
            DataError, match=r"8 of 8 images .*: 0\.png .* 4\.png \(not an image\), and 3 more"
        ):
            load_data(config(tmp_path, on_bad_file=on_bad_file))


def test_odd_sizes_are_resized_or_refused_or_skipped(tmp_path):
    save(tmp_path / "a.png")
    odd = save(tmp_path / "b.png", noise(10, 12))
    assert image(load_data(config(tmp_path)), 1).shape == (3, 8, 8)
    with pytest.raises(DataError, match=r"b\.png \(12x10 pixels, not 8x8\)"):
        load_data(config(tmp_path, resize=False))
    assert load_data(config(tmp_path, resize=False, on_bad_file="skip")).skipped[0].path == odd


def test_a_file_that_vanishes_after_the_check_is_named(tmp_path):
    path = save(tmp_path / "a.png")
    data = load_data(config(tmp_path))
    path.unlink()
    with pytest.raises(DataError, match=r"a\.png can no longer be read: No such file"):
        batch(data, 0, 0, 2)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda path: None, "auto", "does not exist"),
        (lambda path: path.mkdir(), "auto", r"no image in .* \(empty\)"),
        (lambda path: (path.mkdir(), (path / "a.txt").touch()), "auto", "only 1 other files"),
        (lambda path: path.touch(), "auto", "cannot tell what kind"),
        (lambda path: path.touch(), "folder", "is a file; kind 'folder'"),
        (lambda path: path.mkdir(), "npz", "is a folder; kind 'npz'"),
        (lambda path: path.mkdir(), "idx", "holds no file of images"),
    ],
)
def test_places_without_images(tmp_path, make, kind, message):
    make(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        load_data(config(tmp_path / "data", kind=kind))


def test_an_impossible_path_is_a_data_error():
    with pytest.raises(DataError, match="File name too long"):
        load_data(config("x" * 300))


def test_pipes_devices_and_bombs_are_bad_files(tmp_path):
    for index in range(3):
        save(tmp_path / f"a_{index}.png")
    os.mkfifo(tmp_path / "b_pipe.png")
    (tmp_path / "b_zero.png").symlink_to("/dev/zero")
    side = math.isqrt(MOST_PIXELS) + 1
    Image.new("1", (side, side)).save(tmp_path / "b_bomb.png")
    (tmp_path / "b_eps.png").write_bytes(EPS)  # Pillow would run Ghostscript
    (tmp_path / "b_loop.png").symlink_to("b_loop.png")
    found = load_data(config(tmp_path, on_bad_file="skip"))
    assert len(found.images) == 3
    reasons = {skipped.path.stem: skipped.reason for skipped in found.skipped}
    assert reasons == {
        "b_bomb": f"{side}x{side} pixels, more than {MOST_PIXELS} in all",
        "b_eps": "not an image",
        "b_loop": "Too many levels of symbolic links",
        "b_pipe": "it is no regular file",
        "b_zero": "it is no regular file",
    }


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def test_a_link_back_is_not_followed_again_and_one_elsewhere_is(tmp_path):
    for folder in ("data/a", "data/b", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        save(tmp_path / folder / "x.png")
    for folder in ("a", "b"):
        for name in ("1", "2", "3"):
            (tmp_path / "data" / folder / name).symlink_to("..")
    (tmp_path / "data" / "c").symlink_to("../elsewhere")
    found = load_data(config(tmp_path / "data"))
    assert [path.relative_to(tmp_path / "data").as_posix() for path in found.images] == [
        "a/x.png", "b/x.png", "c/x.png",
    ]  # fmt: skip
