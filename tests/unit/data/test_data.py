"""Training data in use: crops as the original's, splits, and reproducible batches."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from images import as_uint8, config, image, noise, save
from PIL import Image

from admtrt.data.image_set import center_crop, load_data, random_crop, require_classes, split
from admtrt.errors import DataError
from admtrt.training.data import batch

# --- crops and flips ---------------------------------------------------------------------------------------


class Script:
    """A generator that returns given whole numbers and records the requested bounds."""

    def __init__(self, *values: int) -> None:
        self.values, self.asked = list(values), []

    def integers(self, low: int, high: int | None = None) -> int:
        self.asked.append((low, high))
        return self.values.pop(0)


def box_halved(pixels: np.ndarray) -> np.ndarray:
    """Means of pairs along the width, then along the height; Pillow rounds after each."""
    for axis in (1, 0):
        first, second = (
            pixels.take(range(start, pixels.shape[axis], 2), axis).astype(int) for start in (0, 1)
        )
        pixels = (first + second + 1) // 2
    return pixels.astype(np.uint8)


def test_center_crop_of_a_power_of_two_is_repeated_averaging():
    pixels = noise(32, 48)
    expected = box_halved(box_halved(pixels))[:, 2:10]  # 8x12 -> the middle 8x8
    np.testing.assert_array_equal(center_crop(Image.fromarray(pixels), 8), expected)


def test_center_crop_halves_while_at_least_twice_as_large_then_interpolates():
    pixels = noise(21, 30)
    halved = Image.fromarray(pixels).resize((15, 10), Image.Resampling.BOX)
    scaled = np.asarray(halved.resize((12, 8), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(center_crop(Image.fromarray(pixels), 8), scaled[:, 2:10])


def test_center_crop_leaves_images_of_the_right_size_alone():
    pixels = noise(8, 8)
    np.testing.assert_array_equal(center_crop(Image.fromarray(pixels), 8), pixels)


@pytest.mark.parametrize(("side", "top", "left"), [(8, 0, 1), (9, 1, 2), (10, 2, 0)])
def test_random_crop_for_given_draws(side, top, left):
    pixels = noise(40, 60)
    rng = Script(side, top, left)
    halved = Image.fromarray(pixels).resize((30, 20), Image.Resampling.BOX)
    if side <= 10:
        halved = halved.resize((15, 10), Image.Resampling.BOX)
    scaled = np.asarray(halved.resize((round(1.5 * side), side), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(
        random_crop(Image.fromarray(pixels), 8, rng), scaled[top : top + 8, left : left + 8]
    )
    # 80 to 100 % of the smaller side: 8 / 1.0 to 8 / 0.8
    assert rng.asked == [(8, 11), (scaled.shape[0] - 7, None), (scaled.shape[1] - 7, None)]


@pytest.mark.parametrize("in_memory", [True, False])
def test_augmentation_comes_from_the_generator_alone(tmp_path, in_memory):
    pixels = noise(12, 12)
    save(tmp_path / "a.png", pixels)
    np.savez(tmp_path / "a.npz", pixels[None])
    source = tmp_path / "a.npz" if in_memory else tmp_path
    plain, flips, crops = (
        load_data(config(source, **asked)) for asked in ({}, {"random_flip": True}, {"random_crop": True})
    )
    seeds = range(16)
    draw = lambda data: [data.image(0, np.random.default_rng(seed)) for seed in seeds]  # noqa: E731
    np.testing.assert_array_equal(draw(crops), draw(crops))
    assert len({drawn.tobytes() for drawn in draw(plain)}) == 1
    assert len({drawn.tobytes() for drawn in draw(crops)}) > 4  # 14 exist
    assert {drawn.tobytes() for drawn in draw(flips)} == {
        image(plain).tobytes(),
        image(plain)[..., ::-1].tobytes(),
    }


# --- splits, classes, batches ------------------------------------------------------------------------------


def numbered(tmp_path: Path, count: int, labels=None, **overrides):
    """Images whose every pixel is their own index."""
    pixels = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 8, 8, 1))
    arrays = [pixels] if labels is None else [pixels, np.asarray(labels)]
    np.savez(tmp_path / "numbered.npz", *arrays)
    return load_data(config(tmp_path / "numbered.npz", channels=1, **overrides))


def numbers(x: torch.Tensor) -> list[int]:
    return torch.round((x[:, 0, 0, 0] + 1) * 127.5).int().tolist()


def test_split_is_stratified_disjoint_and_repeatable(tmp_path):
    data = numbered(tmp_path, 63, [0] * 40 + [1] * 20 + [2] * 2 + [3])
    train, held = split(data, 0.2)
    assert np.bincount(held.labels, minlength=4).tolist() == [
        8,
        4,
        1,
        0,
    ]  # a class's only image stays in training
    seen = [int(images.images[i, 0, 0, 0]) for images in (train, held) for i in range(len(images))]
    assert sorted(seen) == list(range(63))
    assert held.class_names == data.class_names
    np.testing.assert_array_equal(split(data, 0.2)[1].images, held.images)
    assert not np.array_equal(held.images[:8, 0, 0, 0], np.arange(8))  # a draw, not the first ones


def test_split_without_labels_or_without_a_share(tmp_path):
    data = numbered(tmp_path, 10)
    train, held = split(data, 0.3)
    assert (len(train), len(held), held.labels) == (7, 3, None)
    train, held = split(data, 0.0)
    assert (len(train), len(held)) == (10, 0)


def test_split_of_files_and_held_out_images_are_not_augmented(tmp_path):
    for index in range(4):
        save(tmp_path / f"{index}.png", noise(12, 12))
    data = load_data(config(tmp_path, random_crop=True, random_flip=True))
    train, held = split(data, 0.5)
    assert set(train.images) | set(held.images) == set(data.images)
    assert len(held) == 2
    with Image.open(held.images[0]) as opened:
        np.testing.assert_array_equal(as_uint8(image(held)), center_crop(opened, 8))
    assert train.config == data.config


def test_required_classes(tmp_path):
    require_classes(numbered(tmp_path, 4, [0, 1, 2, 1]), 3)
    for labels, message in (
        (None, "has no labels, and 3 classes"),
        ([0] * 4, r"one class only \('0'\), and 3"),
        ([0, 1, 0, 1], r"has 2 classes \(0, 1\), and the network has num_classes 3"),
        ([0, 2, 0, 2], r"has no image of 1 of 3 classes \(1\)"),
        ([7] * 4, r"has 8 classes \(0, 1, 2, 3, 4, and 3 more\), and the network has num_classes 3"),
    ):
        with pytest.raises(DataError, match=message):
            require_classes(numbered(tmp_path, 4, labels), 3)
    require_classes(numbered(tmp_path, 4, [0] * 4), 1)


def test_every_epoch_shows_every_image_once_in_another_order(tmp_path):
    data = numbered(tmp_path, 7, np.arange(7) % 2)
    drawn = [batch(data, 5, step, 3) for step in range(14)]  # 6 epochs of 7
    assert all(
        x.shape == (3, 1, 8, 8) and x.dtype == torch.float32 and y.dtype == torch.int64 for x, y in drawn
    )
    row = [number for x, _ in drawn for number in numbers(x)]
    assert [label for _, y in drawn for label in y.tolist()] == [number % 2 for number in row]
    epochs = [tuple(row[start : start + 7]) for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) == 6
    assert numbers(batch(data, 5, 0, 42)[0]) == row  # a batch may hold several epochs
    assert numbers(batch(data, 6, 0, 42)[0]) != row


def test_a_signal_is_heard_when_the_images_are_read(tmp_path, monkeypatch):
    """Otherwise the exception of a signal handler would propagate through the locks of the pool."""
    for index in range(8):
        save(tmp_path / f"{index}.png")
    data = load_data(config(tmp_path, label_from="none"))
    read, pixels = [], type(data).pixels

    def interrupted(self, index, rng):
        if not read:
            signal.raise_signal(signal.SIGTERM)
        read.append(index)
        return pixels(self, index, rng)

    def ends(number, _):
        raise SystemExit(len(read))

    monkeypatch.setattr(type(data), "pixels", interrupted)
    before = signal.signal(signal.SIGTERM, ends)
    try:
        with pytest.raises(SystemExit) as ended:
            batch(data, seed=0, step=0, size=8)
        assert ended.value.code == len(read) == 8
        assert signal.getsignal(signal.SIGTERM) is ends
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_batch_depends_on_nothing_that_came_before(tmp_path):
    data = numbered(tmp_path, 9, random_crop=True, random_flip=True)
    later = [batch(data, 1, step, 4)[0] for step in range(6)][5]
    torch.testing.assert_close(
        batch(numbered(tmp_path, 9, random_crop=True, random_flip=True), 1, 5, 4)[0], later, rtol=0, atol=0
    )


@pytest.mark.parametrize("in_memory", [True, False])
def test_processes_share_the_batch_of_one_process(tmp_path, in_memory):
    pixels = np.stack([noise(12, 12) for _ in range(8)])
    for index, each in enumerate(pixels):
        save(tmp_path / f"{index}_.png", each)
    np.savez(tmp_path / "a.npz", pixels, np.arange(8))
    data = load_data(
        config(tmp_path / "a.npz" if in_memory else tmp_path, random_crop=True, random_flip=True)
    )
    x, y = batch(data, 2, 3, 6)
    for rank in (0, 1):
        part, labels = batch(data, 2, 3, 3, rank=rank, world=2)
        assert torch.equal(part, x[rank::2])
        assert torch.equal(labels, y[rank::2])


def test_augmentation_differs_between_seeds_and_epochs(tmp_path):
    save(tmp_path / "a.png", noise(12, 12))
    data = load_data(config(tmp_path, random_crop=True, random_flip=True))
    assert len({each.numpy().tobytes() for each in batch(data, 0, 0, 16)[0]}) > 8
    assert not torch.equal(batch(data, 0, 0, 16)[0], batch(data, 1, 0, 16)[0])
