"""Bad input on the command line: a clear message, exit code 2, no traceback, no lost files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import UNET, exported_bundle, network, sham_bundle
from command_faults import refused
from folders import contents

import admtrt
from admtrt.bundle import MANIFEST, Bundle
from admtrt.cli import run
from admtrt.models.checkpoint import (
    save_checkpoint,
)

Capture = pytest.CaptureFixture[str]


# --- sample ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "3"], "class 3 is out of range; the classes are 0 to 2"),
        (["--classes", "-1"], "class -1 is out of range"),
        (["--classes", "dog"], "class 'dog' is neither a number nor a name"),
        (["--classes", "0:0"], "no count of at least 1"),
        (["--classes", "0:3", "--num", "4"], "--classes gives 3 samples; 4 were asked for"),
        (["--scale", "nan"], "'scale' is nan; input should be a finite number"),
        (["--scale", "inf"], "'scale' is inf"),
        (["--scale", "1e9"], "'scale': 1000000000.0 is out of range"),
        (["--scale", "much"], "Invalid value for '--scale'"),
        (["--steps", "some"], "'some' is not a positive whole number"),
        (["--steps", "1001"], "cannot give 1001"),
        (["--steps", "ddim300"], "The nearest that exists is 'ddim334'"),
        (["--steps", "500,600"], "section 2 has 500 timesteps, which cannot give 600"),
        (["--eta", "0.5"], "eta belongs to ddim"),
        (["--method", "ddim", "--eta", "2"], "'eta' is 2.0"),
        (["--method", "plms"], "'plms' is unknown; expected one of"),
        (["--format", "jpeg"], "format 'jpeg' is unknown; expected one of npz, png, grid, gif"),
        (["--num", "0"], "0 samples were asked for"),
        (["--num", "-5"], "-5 samples were asked for"),
        (["--num", "99999999999"], "99999999999 samples were asked for; expected 1 to 10000000"),
        (["--batch-size", "0"], "batch_size is 0; expected at least 1"),
        (["--batch-size", "-1"], "batch_size is -1"),
        (["--shard-size", "0"], "shard_size is 0; expected at least 1"),
        (["--shard-size", "-1"], "shard_size is -1"),
        (["--threads", "0"], "threads is 0; expected 1 to"),
        (["--threads", "-1"], "threads is -1"),
        (["--threads", "1000000"], "threads is 1000000"),
        (["--seed", "-1"], "seed -1 is out of range"),
        (["--seed", str(2**64)], f"seed {2**64} is out of range"),
        (["--seed", str(2**64 - 1)], "leave the range"),
        (["--low-res", "absent.npz"], "cannot read absent.npz as .npz with arr_0"),
        (["--unknown", "1"], "No such option"),
        (["--num", "many"], "Invalid value for '--num'"),
    ],
)
@pytest.mark.parametrize("state", ["no run", "a run"])
def test_requests_that_cannot_be_met(
    capsys: Capture, tmp_path: Path, options: list[str], message: str, state: str
) -> None:
    out = tmp_path / "run"
    base = ["sample", exported_bundle("guided"), "--out", out, "--steps", "2"]
    if state == "a run":
        assert run([str(argument) for argument in base]) == 0
        capsys.readouterr()
    before = contents(tmp_path)
    complaint = refused(capsys, *base, *options)
    assert message in " ".join(complaint.replace("│", " ").split())
    assert contents(tmp_path) == before
    assert out.exists() == (state == "a run")


def test_guidance_without_a_classifier(capsys: Capture, tmp_path: Path) -> None:
    bundle = exported_bundle("conditional")
    complaint = refused(capsys, "sample", bundle, "--out", tmp_path / "run", "--scale", 1)
    assert "holds no classifier" in complaint
    assert "--classifier" in complaint


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "auto"])
def test_a_bundle_whose_path_is_not_in_utf8(capsys: Capture, tmp_path: Path, backend: str) -> None:
    bundle = tmp_path / os.fsdecode(b"bundle-\xff")
    shutil.copytree(exported_bundle("guided"), bundle)
    options = ["--backend", backend, "--steps", "2"]
    complaint = refused(capsys, "sample", bundle, "--out", tmp_path / "run", *options)
    assert "is not in UTF-8, and no inference library opens such files" in complaint
    assert "Rename the folder." in complaint


def test_a_graph_that_the_library_refuses_is_told_once(tmp_path: Path) -> None:
    """The library would print its own line on stderr before ours, bypassing Python's streams."""
    sham_bundle(tmp_path / "bundle")
    command = [sys.executable, "-m", "admtrt", "sample", tmp_path / "bundle", "--out", tmp_path / "run"]
    environment = os.environ | {"PYTHONPATH": str(Path(admtrt.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=180)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ONNX Runtime refuses ")
    assert len(done.stderr.splitlines()) == 1


def test_another_runs_folder(capsys: Capture, tmp_path: Path) -> None:
    base = ["sample", exported_bundle("guided"), "--out", tmp_path / "run", "--steps", "2"]
    assert run([str(argument) for argument in base]) == 0
    capsys.readouterr()
    before = contents(tmp_path)
    for options, differing in (
        (["--num", 4], "count is 3 there and 4 now, labels differ"),
        (["--seed", 1], "first_seed is 0 there and 1 now"),
        (["--scale", 1], "scale is 2.0 there and 1.0 now"),
    ):
        complaint = refused(capsys, *base, *options)
        assert f"holds another run: {differing}\n" in complaint
    assert contents(tmp_path) == before


def test_a_folder_with_something_else(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    for out in (tmp_path, tmp_path / "thesis.tex"):
        complaint = refused(capsys, "sample", exported_bundle("guided"), "--out", out)
        assert "exists and holds no sampling run" in complaint
    complaint = refused(capsys, "sample", exported_bundle("guided"), "--out", tmp_path / "thesis.tex" / "run")
    assert "cannot write" in complaint
    assert os.listdir(tmp_path) == ["thesis.tex"]  # noqa: PTH208


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_target_that_cannot_be_written(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def failing(self: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "mkdir", failing)
    complaint = refused(capsys, "sample", exported_bundle("guided"), "--out", tmp_path / "run")
    assert f"cannot write {tmp_path}" in complaint
    assert os.strerror(code) in complaint


def test_names_longer_than_any_file(capsys: Capture, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300)
    assert "File name too long" in refused(capsys, "sample", exported_bundle("guided"), "--out", long)
    assert "File name too long" in refused(capsys, "inspect", long)
    save_checkpoint(tmp_path / "u.safetensors", network(UNET).module.state_dict(), network(UNET).config)
    assert "File name too long" in refused(capsys, "export", tmp_path / "u.safetensors", "--out", long)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((2, 4, 4, 1))}, "arr_0 is float64 [2, 4, 4, 1]; expected uint8 [N, H, W, C]"),
        ({"arr_0": np.zeros((2, 4, 4), np.uint8)}, "arr_0 is uint8 [2, 4, 4]"),
        (
            {"arr_0": np.zeros((2, 5, 5, 1), np.uint8)},
            ", 5, 5, 1]; expected uint8 [N, 4, 4, 1]",
        ),
        ({"arr_0": np.zeros((0, 4, 4, 1), np.uint8)}, "holds 0 images; expected 1 to"),
        ({"images": np.zeros((2, 4, 4, 1), np.uint8)}, "has no arr_0; it has images"),
        ({"arr_0": np.array([{}], object)}, "as .npz with arr_0"),
        (b"", "as .npz with arr_0"),
        (b"PK\x03\x04 and no more", "as .npz with arr_0"),
        (b"\x93NUMPY\x01\x00", "as .npz with arr_0"),
        (None, "is an upsampler and needs low_res images"),
    ],
)
def test_bad_small_images(capsys: Capture, tmp_path: Path, arrays: Any, message: str) -> None:
    options: list[Any] = ["--low-res", tmp_path / "small.npz"]
    if isinstance(arrays, dict):
        np.savez(tmp_path / "small.npz", **arrays)
    elif arrays is None:
        options = []
    else:
        (tmp_path / "small.npz").write_bytes(arrays)
    complaint = refused(capsys, "sample", exported_bundle("upsampler"), "--out", tmp_path / "run", *options)
    assert message in complaint
    assert "pickle" not in complaint
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("shape", "fault"),
    [
        ((2**40, 4, 4, 1), "truncated, damaged or something else"),  # more than there is
        ((2**26 // 16, 4, 4, 1), "holds 4194304 images; expected 1 to"),
        ((2**26 // 64, 8, 8, 1), "low_res is uint8 [N, 8, 8, 1]; expected uint8 [N, 4, 4, 1]"),
        ((-1, 4, 4, 1), "truncated, damaged or something else"),
    ],
)
def test_small_images_are_judged_before_they_are_inflated(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], fault: str
) -> None:
    monkeypatch.setattr("admtrt.runtime.bulk.MAX_SAMPLES", 2**22 - 1)
    monkeypatch.setattr("admtrt.npz.Archive.read", lambda *_: pytest.fail("it was inflated"))
    with (
        zipfile.ZipFile(tmp_path / "small.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(64):
            member.write(bytes(2**20))
    arguments = ["sample", exported_bundle("upsampler"), "--out", tmp_path / "run", "--low-res"]
    assert fault in refused(capsys, *arguments, tmp_path / "small.npz")


def test_a_second_array_of_the_same_name(capsys: Capture, tmp_path: Path) -> None:
    np.savez(tmp_path / "small.npz", np.zeros((2, 4, 4, 1), np.uint8))
    with (
        zipfile.ZipFile(tmp_path / "small.npz", "a") as archive,
        pytest.warns(UserWarning, match="Duplicate"),
    ):
        archive.writestr("arr_0.npy", b"none")
    arguments = ["sample", exported_bundle("upsampler"), "--out", tmp_path / "run", "--low-res"]
    assert "as .npz with arr_0" in refused(capsys, *arguments, tmp_path / "small.npz")


def test_a_pipe_of_small_images(capsys: Capture, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "small.npz")
    arguments = ["sample", exported_bundle("upsampler"), "--out", tmp_path / "run", "--low-res"]
    assert "it is no regular file" in refused(capsys, *arguments, tmp_path / "small.npz")


def test_more_samples_than_small_images(capsys: Capture, tmp_path: Path) -> None:
    np.savez(tmp_path / "small.npz", np.zeros((2, 4, 4, 1), np.uint8))
    base = [
        "sample",
        exported_bundle("upsampler"),
        "--out",
        tmp_path / "run",
        "--low-res",
        tmp_path / "small.npz",
    ]
    assert "small.npz holds 2 images, --num says 3" in refused(capsys, *base, "--num", 3)


# --- bundles --------------------------------------------------------------------------------------------


def edited(path: Path, **fields: Any) -> None:
    data = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(data | fields))


FAULTS: dict[str, tuple[Any, str]] = {
    "another file": (lambda path: (path / "unet.onnx").write_bytes(b"\x08\x07"), "has SHA-256"),
    "a shorter file": (lambda path: (path / "unet.onnx").write_bytes(b"\x08"), "has 1 bytes"),
    "a missing file": (lambda path: (path / "unet.onnx").unlink(), "'unet.onnx' is missing"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), "is not a bundle"),
    "no JSON": (lambda path: (path / MANIFEST).write_text("{"), "is not valid JSON"),
    "impossible steps": (
        lambda path: edited(path, sampler={"steps": "7000"}),
        "the recommended sampler's steps '7000': section 1 has 1000 timesteps, which cannot give 7000",
    ),
    "a version": (lambda path: edited(path, schema_version=3), "has schema_version 3"),
    "a path": (
        lambda path: edited(path, files={"../x": {"size": 1, "sha256": "0" * 64}}),
        "names the file 'unet.onnx', which is not listed",
    ),
    "a key": (lambda path: edited(path, clasifier=None), "did you mean 'classifier'?"),
    "nothing": (shutil.rmtree, "does not exist"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("command", ["inspect", "sample"])
def test_bundle_faults(capsys: Capture, tmp_path: Path, fault: str, command: str) -> None:
    path = sham_bundle(tmp_path / "bundle").path
    damage, message = FAULTS[fault]
    damage(path)
    options = ["--out", tmp_path / "run"] if command == "sample" else []
    complaint = refused(capsys, command, path, *options)
    assert message in complaint
    assert not (tmp_path / "run").exists()


# --- train ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", [], "'data' is required"),
        ("[data]\nsorce = 1", [], "unknown key 'data.sorce'; did you mean 'source'?"),
        ("[dat]\nx = 1", [], "unknown key 'dat'; did you mean 'data'?"),
        ("not toml", [], "is not valid TOML"),
        (None, [], "cannot read"),
        ('[data]\nsource = "digits"\nimage_size = 8', ["--steps", "0"], "'train_unet.steps' is 0"),
        (
            '[data]\nsource = "digits"\nimage_size = 8',
            ["--batch-size", "-1"],
            "'train_unet.batch_size' is -1",
        ),
        ('[data]\nsource = "digits"\nimage_size = 8', ["--lr", "nan"], "'train_unet.lr' is"),
        ('[data]\nsource = "digits"\nimage_size = 8', ["--set", "unet.x=1"], "unknown key 'unet.x'"),
        ('[data]\nsource = "digits"\nimage_size = 8', ["--set", "steps"], "is not of the form"),
    ],
)
def test_train_settings(
    capsys: Capture, tmp_path: Path, text: str | None, options: list[str], message: str
) -> None:
    config = tmp_path / "run.toml"
    if text is not None:
        config.write_text(text)
    complaint = refused(capsys, "train", "unet", config, "--out", tmp_path / "run", *options)
    assert message in complaint
    assert not (tmp_path / "run").exists()


# --- the command line itself ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["smaple"], "No such command"), (["sample"], "Missing argument"), (["sample", "x"], "Missing option")],
)
def test_wrong_commands(capsys: Capture, arguments: list[str], message: str) -> None:
    assert message in refused(capsys, *arguments)


def test_a_defect_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Path) -> Bundle:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(Bundle, "open", failing)
    with pytest.raises(OSError, match="Bad file"):
        run(["inspect", "bundle"])


@pytest.mark.parametrize(
    "code",
    [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EPERM, errno.EFBIG, errno.EIO, errno.EISDIR],
)
def test_a_place_that_fails_outside_of_any_atomic_write(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def failing(path: Path) -> Bundle:
        raise OSError(code, os.strerror(code), "/some/file")

    monkeypatch.setattr(Bundle, "open", failing)
    assert f"error: cannot use /some/file: {os.strerror(code)}" in refused(capsys, "inspect", "bundle")


def test_success_and_help(capsys: Capture) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("admtrt ")
    for command in ("sample", "export", "inspect", "verify", "demo", "train"):
        assert run([command, "--help"]) == 0
        assert "Usage" in capsys.readouterr().out
