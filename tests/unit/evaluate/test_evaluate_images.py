"""Sets of images for evaluation: what is read from where, in what order, and what is refused."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from feature_networks import pictures, run_folder
from PIL import Image

from admtrt.errors import DataError, RequestError, UserError
from admtrt.evaluate.images import ImageSource, blocks, chosen_images, draw, open_images
from admtrt.evaluate.sets import open_reference, open_set
from admtrt.npz import NpzFile


def everything(source: ImageSource) -> np.ndarray:
    found = np.concatenate([*source.read()])
    assert len(found) == len(source)
    assert found.shape[1:] == source.shape
    return found


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save: object) -> None:
    images, labels = pictures(300), np.arange(300) % 4
    save(tmp_path / "s.npz", arr_0=images, arr_1=labels)  # type: ignore[operator]
    source = open_images(str(tmp_path / "s.npz"))
    np.testing.assert_array_equal(everything(source), images)
    np.testing.assert_array_equal(source.labels, labels)
    assert [len(block) for block in blocks(source, 128)] == [128, 128, 44]


def test_npz_is_streamed(tmp_path: Path) -> None:
    """A file of 48 MB passes through a few MB."""
    images = np.zeros((4000, 64, 64, 3), np.uint8)
    np.savez(tmp_path / "s.npz", arr_0=images)
    del images
    source = open_images(str(tmp_path / "s.npz"))
    tracemalloc.start()
    total = sum(len(block) for block in blocks(source, 256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 4000
    assert peak < 16e6


def test_run_that_is_drawing(tmp_path: Path) -> None:
    images = pictures(30)
    source = open_images(str(run_folder(tmp_path / "run", images, asked=50)))
    np.testing.assert_array_equal(everything(source), images)
    np.testing.assert_array_equal(source.labels, np.arange(30) % 3)
    assert (source.asked, source.run) == (50, tmp_path / "run")
    assert [len(block) for block in blocks(source, 16)] == [16, 14]


def test_run_without_samples(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text("{}")
    with pytest.raises(DataError, match="no finished samples"):
        open_images(str(tmp_path))


@pytest.mark.parametrize("channels", [1, 3])
def test_folder(tmp_path: Path, channels: int) -> None:
    images = pictures(12, channels=channels)
    for index, pixels in enumerate(images):
        file = tmp_path / f"part{index // 6}" / f"{index % 3}_{index:03d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(file)
    source = open_images(str(tmp_path))
    order = sorted(range(12), key=lambda index: f"part{index // 6}/{index % 3}_{index:03d}")
    np.testing.assert_array_equal(everything(source), images[order])
    np.testing.assert_array_equal(source.labels, np.array(order) % 3)


def test_folder_of_jpeg_is_refused_without_lossy(tmp_path: Path) -> None:
    for index, pixels in enumerate(pictures(3)):
        Image.fromarray(pixels).save(tmp_path / f"{index}.jpg")
    with pytest.raises(DataError, match=r"3 of 3 images in .* are JPEG or WebP, 0\.jpg for one"):
        open_images(str(tmp_path))
    assert len(open_images(str(tmp_path), lossy=True)) == 3


def test_folder_of_two_sizes(tmp_path: Path) -> None:
    for index, size in enumerate((8, 9)):
        Image.fromarray(pictures(1, size=size)[0]).save(tmp_path / f"{index}.png")
    with pytest.raises(DataError, match=r"1\.png is 9x9 pixels; 0\.png is 8x8"):
        everything(open_images(str(tmp_path)))
    assert everything(open_images(str(tmp_path), size=8)).shape == (2, 8, 8, 3)


def test_crops_are_those_of_training(tmp_path: Path) -> None:
    from admtrt.data.image_set import load_data
    from admtrt.run_config import DataConfig

    Image.fromarray(pictures(1, size=40)[0][:, :30]).save(tmp_path / "0.png")
    config = DataConfig(source=str(tmp_path), image_size=16)
    expected = load_data(config).pixels(0, np.random.default_rng())
    np.testing.assert_array_equal(everything(open_images(str(tmp_path), size=16))[0], expected)


def test_parts_of_a_training_file(tmp_path: Path) -> None:
    """Judge and floor are disjoint halves of the held-out images of each class; the networks see neither."""
    file = tmp_path / "run.toml"
    file.write_text('[data]\nsource = "digits"\nimage_size = 8\nchannels = 1\nhold_out = 0.3\n')
    whole = {part: open_images(f"{file}:{part}") for part in ("train", "held-out", "judge", "floor")}
    rows = {part: {image.tobytes() for image in everything(source)} for part, source in whole.items()}
    assert not rows["judge"] & rows["floor"]
    assert rows["judge"] | rows["floor"] == rows["held-out"]
    assert not rows["train"] & rows["held-out"]
    assert abs(len(whole["judge"]) - len(whole["floor"])) <= 10
    for part in ("judge", "floor"):
        labels = whole[part].labels
        assert labels is not None
        assert set(labels.tolist()) == set(range(10))
    assert len(open_images(str(file))) == 1797
    with pytest.raises(RequestError, match="the part 'test' is unknown"):
        open_images(f"{file}:test")


def test_draw_takes_some_and_keeps_their_order(tmp_path: Path) -> None:
    images = pictures(500)
    np.savez(tmp_path / "s.npz", arr_0=images, arr_1=np.arange(500))
    source = open_images(str(tmp_path / "s.npz"))
    drawn = draw(source, 100, 3)
    assert drawn.labels is not None
    assert (np.diff(drawn.labels) > 0).all()
    np.testing.assert_array_equal(everything(drawn), images[drawn.labels])
    assert not np.array_equal(draw(source, 100, 4).labels, drawn.labels)
    np.testing.assert_array_equal(chosen_images(source, np.array([400, 2, 2])), images[[400, 2, 2]])
    with pytest.raises(RequestError, match="501 images were asked for; there are 500"):
        draw(source, 501, 0)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncated, flipped, lambda file: file.write_bytes(b"")])
def test_damaged_npz(tmp_path: Path, damage: object) -> None:
    file = tmp_path / "s.npz"
    np.savez(file, arr_0=pictures(50))
    damage(file)  # type: ignore[operator]
    with pytest.raises(DataError, match=r"cannot read .*s\.npz"):
        everything(open_images(str(file)))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": pictures(4).astype(np.float32)}, "arr_0 is float32"),
        ({"arr_0": pictures(4)[..., :2]}, "C 1 or 3"),
        ({"arr_0": pictures(4)[..., 0]}, r"arr_0 is uint8 \[4, 8, 8\]"),
        ({"arr_0": pictures(4)[:0]}, "holds no image"),
        ({"arr_0": np.asfortranarray(pictures(4))}, "column by column"),
        ({"arr_0": np.array([object()] * 4)}, "Python objects"),
        ({"images": pictures(4)}, "has no images: it has images"),
        ({"arr_0": pictures(4), "arr_1": np.arange(3)}, r"4 images and labels of shape \[3\]"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "only be a reference"),
        ({"pool": np.zeros((4, 3), np.int64)}, "pool is int64"),
        ({"pool": np.zeros((4, 3)), "logits": np.zeros((5, 2))}, "rows differ"),
        ({"pool": np.full((4, 3), np.nan)}, "'pool' of image 0 is NaN or infinite"),
    ],
)
def test_npz_of_something_else(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "s.npz", allow_pickle=True, **arrays)
    with pytest.raises(UserError, match=message):
        open_set(str(tmp_path / "s.npz"), "samples")


def test_header_that_promises_more_than_there_is(tmp_path: Path) -> None:
    import io
    import zipfile

    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**9, 256, 256, 3)}
    )
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(100))
    with pytest.raises(DataError, match="cannot read"):
        NpzFile.open(tmp_path / "s.npz")


@pytest.mark.parametrize("name", ["s.npz", "s/a.png"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "s").mkdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=r"cannot (be )?read"):
        open_images(str(tmp_path / name.removesuffix("/a.png")))


def test_a_picture_on_its_side_is_turned(tmp_path: Path) -> None:
    """The reported size is that of the rotated image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png", exif=exif)
    source = open_images(str(tmp_path))
    assert everything(source).shape == (1, *source.shape) == (1, 8, 6, 3)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_images(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="no image in"):
        open_reference(str(tmp_path))
