"""Small files that need much memory or time: refused within limits of both, in a separate process."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import MEBIBYTE, NAME, Write, archive, legacy, shared, tensor
from limited import Outcome, Worker
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(
        "torch", "safetensors.torch", "admtrt.models.checkpoint", "admtrt.commands.checkpoints"
    ) as made:
        yield made


PICKLES = {
    "a key of shared tuples": b"})" + shared(b"\x86", 40) + b"K\x01s",
    "a key of wide tuples": b"})"
    + b"".join(b"q%c(" % i + b"h%c" % i * 3000 + b"t" for i in range(3))
    + b"K\x01s",
    "a key nested a million deep": b"})" + b"\x85" * 1_000_000 + b"K\x01s",
    "a value nested a million deep": b"}" + NAME + b")" + b"\x85" * 1_000_000 + b"s",
    "a list that holds itself": b"}" + NAME + b"]q\x00" + b"h\x00a" * 200_000 + b"s",
    "a dictionary of pairs": b"ccollections\nOrderedDict\n]])" + shared(b"\x86", 40) + b"aK\x01aa\x85R",
    "millions of opcodes": b"}" + NAME + b"]" + b"K\x01a" * 3_000_000 + b"s",
    "a size of shared tuples": b"}" + NAME + b"ctorch\nSize\n)" + shared(b"\x86", 40) + b"\x85Rs",
    "a byte array": b"}" + NAME + b"cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85Rs",
    "a storage by a call": b"}" + NAME + b"ctorch\nFloatStorage\nJ\x00\x00\x00\x40\x85Rs",
    "a new tensor": b"}" + NAME + b"ctorch\nFloatTensor\nJ\x00\x00\x00\x40\x85\x81s",
    "a tensor larger than its storage": b"}" + NAME + tensor(size=2**40) + b"s",
    "a string that is not there": b"}X\xff\xff\xff\x7fabc",
    "a number of many digits": b"}" + NAME + b"\x8b\xff\xff\xff\x7f123s",
}
PICKLES = {name: b"\x80\x02" + content + b"." for name, content in PICKLES.items()}


def refusal(worker: Worker, path: Path) -> Outcome:
    outcome = worker.run(["convert", path, path.with_suffix(".safetensors")], seconds=20)
    assert outcome.code == 2, outcome
    assert outcome.sound, outcome
    assert outcome.seconds < 10
    assert outcome.grown < 200 * MEBIBYTE
    assert len(outcome.err) < 2000
    return outcome


@pytest.mark.parametrize("layout", [archive, legacy])
@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_ask_for_much(
    worker: Worker, tmp_path: Path, name: str, layout: Callable[[bytes], Write]
) -> None:
    path = tmp_path / "a.pt"
    layout(PICKLES[name])(path)
    assert path.stat().st_size < 10 * MEBIBYTE
    refusal(worker, path)


def test_the_pickles_would_be_read_if_they_asked_for_less(tmp_path: Path) -> None:
    """Shows that the files above are refused for their sizes, and not for their structure."""
    for layout in (archive, legacy):
        layout(b"\x80\x02}" + NAME + b")" + shared(b"\x86", 3) + b"s.")(tmp_path / "a.pt")
        assert torch.load(tmp_path / "a.pt")["a"] == ((((), ()), ((), ())), (((), ()), ((), ())))


def test_archives_that_are_larger_inside(worker: Worker, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    pickled = b"\x80\x02}" + NAME + tensor(elements=2**26) + b"s."
    archive(pickled, compression=zipfile.ZIP_DEFLATED, zeros=2**28)(path)
    assert path.stat().st_size < 2 * MEBIBYTE
    assert "is compressed" in refusal(worker, path).err
    archive(b"\x80\x02}" + NAME + b")" * 4000 + b"s.", compression=zipfile.ZIP_DEFLATED)(path)
    assert "is compressed" in refusal(worker, path).err


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("second", ["x/data.pkl", "x/DATA.PKL", "y/data.pkl", "x/y/data.pkl"])
@pytest.mark.parametrize("first", [False, True])
def test_archives_with_two_pickles(worker: Worker, tmp_path: Path, second: str, first: bool) -> None:
    """One of the two is harmless; the file is refused whichever of them PyTorch would read."""
    path = tmp_path / "a.pt"
    hostile, harmless = PICKLES["a key of shared tuples"], pickle.dumps({}, protocol=2)
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("x/version", "3\n")
        made.writestr("x/data.pkl", hostile if first else harmless)
        made.writestr(second, harmless if first else hostile)
    refusal(worker, path)


def test_an_archive_with_two_directories(worker: Worker, tmp_path: Path) -> None:
    """Python takes the directory before the end record, PyTorch the one that the record points to."""
    hostile, harmless = tmp_path / "hostile.pt", tmp_path / "harmless.pt"
    archive(PICKLES["a key of shared tuples"])(hostile)
    archive(pickle.dumps({}, protocol=2))(harmless)
    first, second = hostile.read_bytes(), bytearray(harmless.read_bytes())
    path = tmp_path / "a.pt"
    second[-6:-2] = struct.pack("<L", struct.unpack("<L", first[-6:-2])[0])
    path.write_bytes(first + second)
    assert "directory" in refusal(worker, path).err


def test_a_header_of_safetensors_without_end(worker: Worker, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    entry = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    for header, text in (
        (b"{" + b",".join(entry % i for i in range(200_000)) + b"}", "its header would have"),
        (b"[" * 8_000_000, "its header would have|damaged"),
        (b'{"__metadata__":{"admtrt":"' + b"[" * 100_000 + b'"}}', "no JSON object"),
        (rb'{"__metadata__":{"admtrt":"{\"\\ud800\": 1}"}}', "no JSON object"),
    ):
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        outcome = worker.run(["convert", path, tmp_path / "b.pt"], seconds=20)
        assert outcome.code == 2, outcome
        assert any(one in outcome.err for one in text.split("|")), outcome
        assert outcome.seconds < 10
        assert outcome.grown < 200 * MEBIBYTE
    path.write_bytes(struct.pack("<Q", 2**62))
    assert worker.run(["convert", path, tmp_path / "b.pt"]).code == 2


def test_a_prefix_that_would_come_before_every_key(worker: Worker, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(
        {str(i): torch.zeros(1) for i in range(1000)}, path, metadata={"admtrt.key_prefix": "x" * 10**6}
    )
    outcome = worker.run(["convert", path, tmp_path / "b.pt"])
    assert outcome.code == 2
    assert "puts 1000000 characters before every key" in outcome.err


@pytest.mark.parametrize("option", ["--config", "--preset"])
def test_settings_without_end(worker: Worker, tmp_path: Path, option: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    outcome = worker.run(["convert", path, tmp_path / "b.pt", option, "/dev/zero"])
    assert outcome.code == 2
    assert outcome.sound
    assert outcome.grown < 200 * MEBIBYTE


# --- networks that are declared, and could never be built -------------------------------------------------

SHAPE = {
    "image_size": 2048,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1] * 12,
    "attention_resolutions": [],
    "num_heads": 1,
}
DECLARED = {
    "blocks without end": (
        {"num_res_blocks": 2**31 - 1},
        "num_res_blocks' is 2147483647; input should be less",
    ),
    "blocks beyond the file's": (
        {"num_res_blocks": 32},
        "has 1 tensors, too few for 12 levels of 32 residual",
    ),
    "channels without end": ({"model_channels": 2**31 - 32}, "input should be less than or equal to 8192"),
    "channels beyond the file's": ({"model_channels": 8192}, "are not those of its configuration"),
    "wide levels": ({"channel_mult": [1024] * 12}, "are not those of its configuration"),
    "an image without end": ({"image_size": 2**30}, "input should be less than or equal to 8192"),
    "classes without end": ({"num_classes": 2**31 - 1}, "are not those of its configuration"),
}


def toml(settings: dict[str, Any]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())


@pytest.mark.parametrize("where", ["header", "config", "set"])
@pytest.mark.parametrize("name", DECLARED)
def test_declared_sizes_are_held_against_the_file_first(
    worker: Worker, tmp_path: Path, name: str, where: str
) -> None:
    declared, text = SHAPE | DECLARED[name][0], DECLARED[name][1]
    path, options = tmp_path / "a.safetensors", []
    header = {"format_version": 1, "kind": "unet", "unet": declared, "diffusion": {}}
    metadata = {"admtrt": json.dumps(header)} if where == "header" else None
    save_file({"a": torch.zeros(1)}, path, metadata=metadata)
    if where == "config":
        (tmp_path / "c.toml").write_text("[unet]\n" + toml(declared))
        options = ["--config", tmp_path / "c.toml"]
    if where == "set":
        (tmp_path / "c.toml").write_text("[unet]\n" + toml(SHAPE))
        options = ["--config", tmp_path / "c.toml"]
        options += [f"--set={key}={json.dumps(value)}" for key, value in DECLARED[name][0].items()]
    outcome = worker.run(["convert", path, tmp_path / "b.pt", *options])
    assert outcome.code == 2, outcome
    assert outcome.sound, outcome
    assert text in outcome.err
    assert outcome.seconds < 10
    assert outcome.grown < 200 * MEBIBYTE


@pytest.mark.parametrize(
    ("declared", "text"),
    [
        (
            {"unet.model_channels": 8192, "unet.channel_mult": [64, 64]},
            "the weights and what training keeps of each would take",
        ),
        ({"unet.num_res_blocks": 2**31 - 1}, "input should be less than or equal to 32"),
        ({"train_unet.batch_size": 2**31 - 1}, "input should be less than or equal to 1048576"),
        (
            {"train_unet.batch_size": 2**20, "data.image_size": 2048, "unet.image_size": 2048},
            "the images of one micro-batch would take",
        ),
        ({"data.image_size": 2**31 - 1}, "input should be less than or equal to 8192"),
    ],
)
def test_training_beyond_this_machine(
    worker: Worker, tmp_path: Path, declared: dict[str, Any], text: str
) -> None:
    network = SHAPE | {"image_size": 8, "channel_mult": [1, 1], "in_channels": 1}
    data = {"source": "digits", "image_size": 8, "channels": 1}
    (tmp_path / "c.toml").write_text("[data]\n" + toml(data) + "[unet]\n" + toml(network))
    options = [f"--set={key}={value}" for key, value in declared.items()]
    outcome = worker.run(["train", "unet", tmp_path / "c.toml", "--out", tmp_path / "run", *options])
    assert outcome.code == 2, outcome
    assert outcome.sound, outcome
    assert text in outcome.err
    assert outcome.grown < 200 * MEBIBYTE
