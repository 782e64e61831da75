"""Randomly broken files, each determined by its kind and a number, and the command lines that read them."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bundles import UNET, exported_bundle, network
from hostile import NAME, archive, legacy, tensor
from safetensors.torch import save_file

import admtrt
from admtrt.commands.checkpoints import CheckpointSettings
from admtrt.config_files import save_config
from admtrt.models.checkpoint import save_checkpoint

Arguments = list[str | Path]
VALUES = (
    *(None, True, False, 0, -1, 1, 2, 3, 8, 2**31 - 1, 2**31, 2**63, 10**30, 1e308, 5e-324, -0.0, 0.5),
    *("", "none", "..", "/dev/zero", "\ud800", "\0", "x" * 5000, "fp16", "8", "ddim1000000", "\x1b[2J"),
    *([], {}, [[]], {"a": 1}, [1] * 40, [2**31 - 1] * 12, ["a"], [None]),
)
TOML_VALUES = (
    *("-1", "0", "8", "nan", "inf", "1e400", "99999999999999999999", "2147483647", "true", "1979-05-27"),
    *("[]", "[[[", "{}", '""', '"x"', '"\\ud800"', '"none"', "'../../x'", '"/dev/zero"', "[1, 2]", "[" * 500),
    *("[2147483647]", "{a = 1}", '"""', "\x00", "\U0001f600", "0x", "1_", "[0.5]"),
)
OPCODES = tuple(bytes([code]) for code in b"(})]\x85\x86\x87tRsuaebQ\x88\x89N\x81K0")


def _bytes_changed(data: bytes, rng: random.Random, *, end: int | None = None) -> bytes:
    """Replace some bytes; sometimes also remove, duplicate or cut off a piece."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        place = rng.randrange(min(end or len(changed), len(changed)))
        changed[place] = rng.choice((0, 255, rng.randrange(256), changed[place] ^ 1, ord("["), ord("9")))
    if rng.random() < 0.15:
        first, second = sorted(rng.randrange(len(changed) + 1) for _ in range(2))
        changed[first:second] = rng.choice((b"", bytes(changed[first:second]) * 2))
    if rng.random() < 0.1:
        del changed[rng.randrange(len(changed)) :]
    return bytes(changed)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The positions of all values in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _places(inner, (*path, key))


def _document_changed(document: Any, rng: random.Random) -> Any:
    """Replace or remove some values, or nest them in themselves."""
    changed = json.loads(json.dumps(document))
    for _ in range(rng.choice((1, 1, 2, 3))):
        *path, last = rng.choice(list(_places(changed)) or [(0,)])
        parent = changed
        for key in path:
            parent = parent[key]
        if rng.random() < 0.2:
            parent.pop(last)
        elif rng.random() < 0.1:
            parent[last] = {"deep": parent[last]}
        else:
            parent[last] = copy.deepcopy(rng.choice(VALUES))
    return changed


class Kinds:
    """Every kind of broken file, made in one folder.

    ``makers`` contains, by name, functions that write the file of a number and return the command line that
    reads it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._target = folder / "made"
        self._guided, self._upsampler = exported_bundle("guided"), exported_bundle("upsampler")
        self._copy = folder / "bundle"
        shutil.copytree(self._guided, self._copy)
        self._manifest = json.loads((self._copy / "manifest.json").read_text())
        loaded = network(UNET)
        save_checkpoint(folder / "whole.safetensors", loaded.module.state_dict(), loaded.config)
        self._safetensors = (folder / "whole.safetensors").read_bytes()
        self._pickles = []
        for zipped in (True, False):
            state = {
                "state_dict": {"a": torch.zeros(4, 4), "b": torch.ones(3, dtype=torch.float16)},
                "step": 3,
            }
            stream = io.BytesIO()
            torch.save(state, stream, _use_new_zipfile_serialization=zipped)
            self._pickles.append(stream.getvalue())
        with zipfile.ZipFile(io.BytesIO(self._pickles[0])) as opened:
            (name,) = (name for name in opened.namelist() if name.endswith("data.pkl"))
            self._opcodes = opened.read(name)
        pixels = io.BytesIO()
        np.savez(pixels, arr_0=np.zeros((2, 4, 4, 1), np.uint8), arr_1=np.zeros(2, np.int64))
        self._npz = pixels.getvalue()
        self._run = (Path(admtrt.__file__).parent / "demo" / "digits.toml").read_text().splitlines()
        save_file(loaded.module.state_dict(), folder / "bare.safetensors")
        described = CheckpointSettings(unet=UNET, diffusion=loaded.config.diffusion)
        save_config(described, folder / "settings.toml")
        self._settings = (folder / "settings.toml").read_text().splitlines()
        self.makers: dict[str, Callable[[random.Random], Arguments]] = {
            "pt bytes": self._pt_bytes,
            "pt pickle": self._pt_pickle,
            "pt opcodes": self._pt_opcodes,
            "safetensors bytes": self._safetensors_bytes,
            "safetensors header": self._safetensors_header,
            "manifest": self._manifest_values,
            "graph": self._graph,
            "npz bytes": self._npz_bytes,
            "npz header": self._npz_header,
            "train toml": self._train_toml,
            "settings toml": self._settings_toml,
        }

    def make(self, kind: str, number: int) -> Arguments:
        """Write the file of a number, and return the command line that reads it."""
        return self.makers[kind](random.Random(f"{kind} {number}"))

    def _convert(self, path: Path, *options: str | Path) -> Arguments:
        target = self._target.with_suffix(".pt" if path.suffix == ".safetensors" else ".safetensors")
        return ["convert", path, target, "--overwrite", *options]

    def _pt_bytes(self, rng: random.Random) -> Arguments:
        path = self._folder / "a.pt"
        path.write_bytes(_bytes_changed(rng.choice(self._pickles), rng))
        return self._convert(path)

    def _pt_pickle(self, rng: random.Random) -> Arguments:
        """A pickle with some bytes changed, in an archive with correct checksums."""
        path = self._folder / "b.pt"
        archive(_bytes_changed(self._opcodes, rng))(path)
        return self._convert(path)

    def _pt_opcodes(self, rng: random.Random) -> Arguments:
        """Pickle opcodes in any order; some make tensors."""
        path = self._folder / "c.pt"
        atoms = (b")", b"}", b"]", b"K\x01", NAME, b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n")
        sizes = (0, 1, 4, 5, -1, 2**31, 2**62)
        parts = [
            rng.choice(
                (rng.choice(OPCODES), rng.choice(atoms), tensor(size=rng.choice(sizes)), b"q\x00", b"h\x00")
            )
            for _ in range(rng.randrange(1, 60))
        ]
        rng.choice((archive, legacy))(b"\x80\x02" + b"".join(parts) + b".")(path)
        return self._convert(path)

    def _safetensors_bytes(self, rng: random.Random) -> Arguments:
        path = self._folder / "a.safetensors"
        length = struct.unpack("<Q", self._safetensors[:8])[0]
        path.write_bytes(_bytes_changed(self._safetensors, rng, end=length + 8))
        return self._convert(path)

    def _safetensors_header(self, rng: random.Random) -> Arguments:
        """Other values in the header, or in the configuration within it."""
        path = self._folder / "b.safetensors"
        length = struct.unpack("<Q", self._safetensors[:8])[0]
        header = json.loads(self._safetensors[8 : 8 + length])
        if rng.random() < 0.7:
            own = json.loads(header["__metadata__"]["admtrt"])
            header["__metadata__"]["admtrt"] = json.dumps(_document_changed(own, rng))
        else:
            header = _document_changed(header, rng)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + self._safetensors[8 + length :])
        return self._convert(path)

    def _manifest_values(self, rng: random.Random) -> Arguments:
        text = json.dumps(_document_changed(self._manifest, rng))
        if rng.random() < 0.1:
            text = _bytes_changed(text.encode(), rng).decode(errors="replace")
        (self._copy / "manifest.json").write_text(text)
        return ["inspect", self._copy, *["--json"] * (rng.random() < 0.5)]

    def _graph(self, rng: random.Random) -> Arguments:
        """A graph with some bytes changed, in a bundle with correct hashes."""
        bundle = self._folder / "graphs"
        shutil.copytree(self._guided, bundle, dirs_exist_ok=True)
        manifest = json.loads(json.dumps(self._manifest))
        name = rng.choice(sorted(name for name in manifest["files"] if name.endswith(".onnx")))
        data = _bytes_changed((bundle / name).read_bytes(), rng, end=rng.choice((200, None)))
        (bundle / name).write_bytes(data)
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        shutil.rmtree(self._target, ignore_errors=True)
        options = ["--num", "1", "--steps", "2", "--threads", "1", "--format", "npz"]
        return ["sample", bundle, "--out", self._target, *options]

    def _enlarge(self, path: Path) -> Arguments:
        shutil.rmtree(self._target, ignore_errors=True)
        options = ["--steps", "2", "--threads", "1", "--format", "npz"]
        return ["sample", self._upsampler, "--out", self._target, "--low-res", path, *options]

    def _npz_bytes(self, rng: random.Random) -> Arguments:
        path = self._folder / "a.npz"
        path.write_bytes(_bytes_changed(self._npz, rng))
        return self._enlarge(path)

    def _npz_header(self, rng: random.Random) -> Arguments:
        """Arrays with arbitrary headers, in an archive with correct checksums."""
        path = self._folder / "b.npz"
        descriptions = ("|u1", "<f4", "|O", "<U9", "<i8", "[('a', '|u1')]", "x", "|V0", ">c16", "<M8[s]")
        shapes = (
            "(2, 4, 4, 1)",
            "()",
            "(2,)",
            "(-1,)",
            f"({2**40},)",
            "(0, 4, 4, 1)",
            "(" * 300,
            "[2]",
            "(1e9,)",
        )
        with zipfile.ZipFile(path, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as made:
            for name in rng.choice((["arr_0"], ["arr_0", "arr_1"], ["arr_1"], ["arr_0", "../x"])):
                head = (
                    f"{{'descr': {rng.choice(descriptions)!r}, 'fortran_order': False, "
                    f"'shape': {rng.choice(shapes)}, }}\n"
                ).encode()
                length = struct.pack("<H", rng.choice((len(head), len(head), 0, 65535)))
                content = b"\x93NUMPY\x01\x00" + length + head + bytes(rng.choice((32, 0, 100_000)))
                made.writestr(f"{name}.npy", content)
        return self._enlarge(path)

    def _toml(self, path: Path, lines: list[str], rng: random.Random) -> Path:
        """A file of settings with some of its lines replaced."""
        changed = list(lines)
        for _ in range(rng.choice((1, 2, 3))):
            place = rng.randrange(len(changed))
            key = changed[place].split("=")[0]
            changed[place] = rng.choice(
                (f"{key}={rng.choice(TOML_VALUES)}",) * 6 + ("", "[", "[[x]]", "=", key)
            )
        path.write_text("\n".join(changed) + "\n")
        return path

    def _train_toml(self, rng: random.Random) -> Arguments:
        path = self._toml(self._folder / "train.toml", self._run, rng)
        kind = rng.choice(("unet", "classifier"))
        # A valid file is only refused for its missing data.
        return ["train", kind, path, "--out", self._folder / "run", "--data", self._folder / "no images"]

    def _settings_toml(self, rng: random.Random) -> Arguments:
        path = self._toml(self._folder / "settings.toml", self._settings, rng)
        return self._convert(self._folder / "bare.safetensors", "--config", path)
