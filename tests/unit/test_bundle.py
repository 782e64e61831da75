"""Bundles: written bundles are read back, and any altered file is refused."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
from bundles import CLASSIFIER, EMPTY_GRAPH, SAMPLER, UNET, manifest_of, refusal, sham_bundle
from folders import names

from admtrt.bundle import MANIFEST, Bundle
from admtrt.config import ClassifierConfig, DiffusionConfig, UNetConfig
from admtrt.errors import BundleError, ConfigError
from admtrt.files import sha256_of

AGAIN = "Copy the bundle again"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return sham_bundle(tmp_path / "bundle").path


# --- round trip -----------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    written = sham_bundle(tmp_path / "bundle", class_names=("é", "b c", "日"), made_with={"torch": "2"})
    read = Bundle.open(str(tmp_path / "bundle"))
    assert read.manifest == written.manifest
    assert read.path == written.path
    assert read.manifest.network == UNET
    assert read.manifest.classifier == CLASSIFIER
    assert read.manifest.sampler == SAMPLER
    assert read.manifest.class_names == ("é", "b c", "日")
    assert read.manifest.made_with == {"torch": "2"}
    assert read.graph_path("unet").read_bytes() == EMPTY_GRAPH
    assert names(tmp_path / "bundle") == [
        "classifier_gradient.onnx", "edit.onnx", "edit_low_pass.onnx", MANIFEST, "threshold.onnx",
        "unet.onnx", "update.onnx", "update_full.onnx",
    ]  # fmt: skip


def test_without_a_classifier(tmp_path: Path) -> None:
    bundle = sham_bundle(tmp_path / "bundle", classifier=None, class_names=())
    assert Bundle.open(bundle.path).manifest.num_classes is None
    with pytest.raises(BundleError, match="has no graph 'classifier_gradient'"):
        bundle.graph_path("classifier_gradient")


@pytest.mark.parametrize(
    ("unet", "classifier", "expected"), [(None, None, None), (None, 3, 3), (4, None, 4), (3, 3, 3)]
)
def test_number_of_classes(
    tmp_path: Path, unet: int | None, classifier: int | None, expected: int | None
) -> None:
    manifest = sham_bundle(
        tmp_path / "bundle",
        network=UNET.model_copy(update={"num_classes": unet}),
        classifier=None if classifier is None else CLASSIFIER,
        class_names=(),
    ).manifest
    assert manifest.num_classes == expected


def test_a_bundle_may_hold_files_in_folders_and_be_moved(tmp_path: Path) -> None:
    sham_bundle(tmp_path / "bundle", extra={"docs/readme.txt": b"hello"})
    (tmp_path / "bundle").rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to("moved")
    assert "docs/readme.txt" in Bundle.open(tmp_path / "link").manifest.files


# --- what is missing or no bundle -----------------------------------------------------------------------


def test_what_is_no_bundle(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "absent").message
    assert "admtrt export" in refusal(tmp_path / "absent").hint
    assert f"is not a bundle: it has no {MANIFEST}" in refusal(tmp_path).message
    (tmp_path / "file").touch()
    assert "is not a bundle" in refusal(tmp_path / "file").message
    assert "cannot read" in refusal(tmp_path / ("x" * 300)).message
    (tmp_path / MANIFEST).mkdir()
    assert "cannot read" in refusal(tmp_path).message


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"not json", b"\xff\xfe", b'{"schema_version": 1,}', b"9" * 5000, b"[" * 100_000],
)
def test_a_manifest_that_is_no_json(bundle: Path, content: bytes) -> None:
    (bundle / MANIFEST).write_bytes(content)
    error = refusal(bundle)
    assert "is not valid JSON" in error.message
    assert AGAIN in error.hint


@pytest.mark.parametrize(
    "data", [[], 3, "text", {}, *[{"schema_version": v} for v in (0, 3, "1", None, [1], True)]]
)
def test_an_unknown_schema_version(bundle: Path, data: Any) -> None:
    error = refusal(bundle, data)
    assert "schema_version" in error.message
    assert "this admtrt reads 1" in error.message
    assert "version of admtrt" in error.hint


# --- what was altered -----------------------------------------------------------------------------------


def test_a_wrong_hash(bundle: Path) -> None:
    (bundle / "unet.onnx").write_bytes(EMPTY_GRAPH[:-1] + b"\x07")
    error = refusal(bundle)
    assert "'unet.onnx' has SHA-256" in error.message
    assert AGAIN in error.hint


def test_a_wrong_size(bundle: Path) -> None:
    (bundle / "unet.onnx").write_bytes(EMPTY_GRAPH[:-1])
    error = refusal(bundle)
    assert "'unet.onnx' has 1 bytes, the manifest says 2" in error.message
    assert AGAIN in error.hint


def test_a_missing_file(bundle: Path) -> None:
    (bundle / "update.onnx").unlink()
    error = refusal(bundle)
    assert "the file 'update.onnx' is missing" in error.message
    assert AGAIN in error.hint


def test_a_folder_in_place_of_a_file(bundle: Path) -> None:
    (bundle / "update.onnx").unlink()
    (bundle / "update.onnx").mkdir()
    assert "the file 'update.onnx' is missing" in refusal(bundle).message


def test_a_file_that_cannot_be_read(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("admtrt.memo.sha256_of", failing)
    assert "cannot read" in refusal(bundle).message
    assert "Input/output error" in refusal(bundle).message


def test_files_beside_those_of_the_manifest_do_not_matter(bundle: Path) -> None:
    (bundle / "notes.txt").touch()
    Bundle.open(bundle)


# --- paths ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "../outside.onnx",
        "sub/../../outside.onnx",
        "sub/../unet.onnx",
        "/etc/passwd",
        "..",
        ".",
        "",
        "sub\\..\\outside.onnx",
        "nul\0.onnx",
        "line\nbreak",
    ],
)
def test_a_path_outside(bundle: Path, name: str) -> None:
    (bundle.parent / "outside.onnx").write_bytes(EMPTY_GRAPH)
    (bundle / "sub").mkdir()
    data = manifest_of(bundle)
    data["files"][name] = data["files"]["unet.onnx"]
    assert f"the manifest names {name!r}, which lies outside the bundle" in refusal(bundle, data).message
    # The same for a graph's file name.
    data["graphs"]["unet"]["file"] = name
    assert repr(name) in refusal(bundle, data).message


def test_an_absolute_path_is_refused_even_inside(bundle: Path) -> None:
    data = manifest_of(bundle)
    data["files"][str(bundle / "unet.onnx")] = data["files"]["unet.onnx"]
    assert "lies outside the bundle" in refusal(bundle, data).message


def test_a_link_out_of_the_bundle(bundle: Path) -> None:
    (bundle / "unet.onnx").rename(bundle.parent / "elsewhere.onnx")
    (bundle / "unet.onnx").symlink_to("../elsewhere.onnx")
    assert "'unet.onnx', which lies outside the bundle" in refusal(bundle).message


def test_a_folder_that_links_out_of_the_bundle(tmp_path: Path) -> None:
    path = sham_bundle(tmp_path / "bundle", extra={"data/x": b"x"}).path
    (path / "data").rename(tmp_path / "data")
    (path / "data").symlink_to("../data")
    assert "'data/x', which lies outside the bundle" in refusal(path).message


def test_links_in_a_circle(bundle: Path) -> None:
    (bundle / "unet.onnx").unlink()
    (bundle / "unet.onnx").symlink_to("loop")
    (bundle / "loop").symlink_to("unet.onnx")
    assert "unet.onnx" in refusal(bundle).message


def test_a_name_longer_than_any_files(bundle: Path) -> None:
    data = manifest_of(bundle)
    data["files"]["x" * 5000] = data["files"]["unet.onnx"]
    assert "cannot read" in refusal(bundle, data).message


# --- contradictions inside the manifest -----------------------------------------------------------------


def test_unknown_keys_name_the_nearest(bundle: Path) -> None:
    data = manifest_of(bundle)
    data["graphs"]["unet"]["opzet"] = 1
    assert "unknown key 'graphs.unet.opzet'; did you mean 'opset'?" in refusal(bundle, data).message


@pytest.mark.parametrize(
    ("side", "index", "field", "value"),
    [
        ("inputs", 0, "name", "X"),
        ("inputs", 1, "dtype", "int64"),
        ("inputs", 0, "shape", ["N", 1, 8, 9]),
        ("inputs", 0, "shape", [2, 1, 8, 8]),
        ("outputs", 0, "shape", ["N", 1, 8, 8]),
    ],
)
def test_a_graph_that_declares_something_else(
    bundle: Path, side: str, index: int, field: str, value: Any
) -> None:
    data = manifest_of(bundle)
    assert data["graphs"]["unet"]["spec"][side][index][field] != value
    data["graphs"]["unet"]["spec"][side][index][field] = value
    assert "graphs: 'unet' declares other inputs or outputs" in refusal(bundle, data).message


def test_a_graph_too_few_or_too_many(bundle: Path) -> None:
    data = manifest_of(bundle)
    removed = data["graphs"].pop("update")
    left = sorted(data["graphs"])
    assert f"graphs are {left}, expected {sorted([*left, 'update'])}" in refusal(bundle, data).message
    data["graphs"]["update"] = removed
    data |= {"classifier": None, "class_names": []}
    assert f"expected {sorted({*left, 'update'} - {'classifier_gradient'})}" in refusal(bundle, data).message
    data["graphs"]["decoder"] = removed
    assert "'graphs.decoder" in refusal(bundle, data).message


def test_a_graph_whose_file_is_not_listed(bundle: Path) -> None:
    data = manifest_of(bundle)
    del data["files"]["unet.onnx"]
    assert "graphs: 'unet' names the file 'unet.onnx', which is not listed" in refusal(bundle, data).message


def test_class_names_of_another_number(bundle: Path) -> None:
    data = manifest_of(bundle)
    data["class_names"].append("dog")
    error = refusal(bundle, data)
    assert "4 class names for 3 classes" in error.message
    assert AGAIN in error.hint


@pytest.mark.parametrize("steps", ["7000", "ddim300", "many", "1"])
def test_a_recommendation_that_its_process_cannot_meet(bundle: Path, steps: str) -> None:
    data = manifest_of(bundle)
    data["sampler"]["steps"] = steps
    error = refusal(bundle, data)
    assert f"the recommended sampler's steps '{steps}'" in error.message
    assert AGAIN in error.hint
    with pytest.raises(ConfigError, match="the recommended sampler's steps"):
        sham_bundle(bundle.parent / "other", sampler=SAMPLER.model_copy(update={"steps": steps}))
    assert names(bundle.parent) == ["bundle"]


@pytest.mark.parametrize(
    ("unet", "classifier", "diffusion", "expected"),
    [
        (
            {"learn_sigma": False},
            {},
            {},
            "unet.learn_sigma is False but diffusion",
        ),
        ({}, {}, {"variance_type": "fixed_small"}, "is True but diffusion.variance_type is 'fixed_small'"),
        ({}, {"image_size": 16}, {}, "the UNet has image_size 8 but the classifier 16"),
        ({}, {"in_channels": 3}, {}, "the UNet has in_channels 1 but the classifier 3"),
        ({"num_classes": 4}, {}, {}, "the UNet has 4 classes but the classifier 3"),
    ],
)
def test_networks_that_do_not_fit(
    tmp_path: Path, unet: dict[str, Any], classifier: dict[str, Any], diffusion: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        sham_bundle(
            tmp_path / "bundle",
            network=UNetConfig.from_dict(UNET.to_dict() | unet),
            classifier=ClassifierConfig.from_dict(CLASSIFIER.to_dict() | classifier),
            diffusion=DiffusionConfig.from_dict(diffusion),
        )
    assert expected in caught.value.message
    assert names(tmp_path) == []


# --- weights in files of their own ----------------------------------------------------------------------
# --- files that others put there ------------------------------------------------------------------------


def big_manifest(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(600 * 2**20)


@pytest.mark.parametrize(
    ("put", "fault"),
    [
        (os.mkfifo, "it is no regular file"),
        (lambda file: file.mkdir(), "Is a directory"),
        (lambda file: file.symlink_to("/dev/zero"), "is a link out of the bundle"),
        (lambda file: file.symlink_to("../manifest.json"), "is a link out of the bundle"),
        (lambda file: (file.touch(), big_manifest(file)), "it is larger than"),
        (lambda file: file.write_text("[" * 100_000), "nested too deeply"),
        (lambda file: file.write_text('{"a":' * 100_000), "nested too deeply"),
        (lambda file: file.write_text(r'{"a": "\ud800"}'), "half of a surrogate pair"),
        (lambda file: file.write_text(r'{"\uDFFF": "\ud83d\ude00"}'), "half of a surrogate pair"),
        (
            lambda file: file.write_text(r'{"schema_version": "\ud83d\ude00"}'),
            "has schema_version '\N{GRINNING FACE}'",
        ),
    ],
)
def test_a_manifest_that_is_something_else(bundle: Path, put: Any, fault: str) -> None:
    (bundle / MANIFEST).rename(bundle.parent / MANIFEST)
    put(bundle / MANIFEST)
    assert fault in refusal(bundle).message


@pytest.mark.parametrize("put", [os.mkfifo, lambda file: file.mkdir()])
def test_a_file_that_is_something_else(bundle: Path, put: Any) -> None:
    (bundle / "unet.onnx").unlink()
    put(bundle / "unet.onnx")
    assert "the file 'unet.onnx' is missing" in refusal(bundle).message


def test_a_manifest_behind_a_link_within_the_bundle(bundle: Path) -> None:
    (bundle / MANIFEST).rename(bundle / "real.json")
    (bundle / MANIFEST).symlink_to("real.json")
    assert Bundle.open(bundle).digest == sha256_of(bundle / "real.json")


def test_the_digest_is_that_of_the_bytes_that_were_read(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    known = sha256_of(bundle / MANIFEST)
    (bundle / MANIFEST).write_text("{}")
    assert opened.digest == known


def replaced(bundle: Path) -> None:
    """As another export does that finishes meanwhile."""
    sham_bundle(bundle, overwrite=True)


def rewritten(bundle: Path) -> None:
    (bundle / "unet.onnx").write_bytes((bundle / "unet.onnx").read_bytes())


def removed(bundle: Path) -> None:
    (bundle / "unet.onnx").unlink()


@pytest.mark.parametrize("change", [replaced, rewritten, removed])
def test_a_graph_that_changes_while_it_is_opened(bundle: Path, change: Any) -> None:
    opened = Bundle.open(bundle)
    with opened.reading("unet") as path:
        assert path == bundle / "unet.onnx"
    with (  # noqa: PT012
        pytest.raises(BundleError, match=r"was replaced or changed while the bundle was being opened"),
        opened.reading("unet"),
    ):
        time.sleep(0.02)  # the clock of a file system ticks this often
        change(bundle)
