"""Names of classes: found whatever their case and spaces, shown by messages and by inspect."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from bundles import SAMPLER, UNET, network, sham_bundle

from admtrt.bundle import Bundle
from admtrt.cli import run
from admtrt.commands.labels import requested_labels
from admtrt.errors import RequestError
from admtrt.models.checkpoint import save_checkpoint
from admtrt.runtime.pipeline import Pipeline
from admtrt.runtime.request import class_index, numbered_names

if TYPE_CHECKING:
    from pathlib import Path


class Unused:
    """A denoiser that no request reaches."""

    def run(self, graph: str, feeds: Any) -> dict[str, Any]:
        raise AssertionError(graph)


@pytest.fixture
def shapes(tmp_path: Path) -> Bundle:
    return sham_bundle(tmp_path / "bundle", class_names=("circle", "Big Square", "a:b, c"))


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ("Circle", [0]),
        ("CIRCLE, bigsquare", [0, 1]),
        ("circle: 2, big square:1", [0, 0, 1]),
        ("circle :1", [0]),
        ("0: 2", [0, 0]),
        ("A:B,C", [2]),
        ("A:B, C: 2,circle:1", [2, 2, 0]),
    ],
)
def test_case_and_spaces_do_not_matter(shapes: Bundle, classes: str, expected: list[int]) -> None:
    assert requested_labels(classes, None, shapes.manifest) == expected


def test_the_name_as_written_comes_first(tmp_path: Path) -> None:
    manifest = sham_bundle(tmp_path / "bundle", class_names=("Ant", "ant", "1 0")).manifest
    assert [class_index(name, manifest) for name in ("Ant", "ant", "10")] == [0, 1, 2]
    with pytest.raises(RequestError, match=r"class 'ANT' is neither .* the names are Ant, ant, 1 0"):
        class_index("ANT", manifest)  # which of the two?
    assert requested_labels("1,1 0", None, manifest) == [1, 2]


def test_messages_name_the_classes(shapes: Bundle) -> None:
    pipeline = Pipeline(shapes, Unused())
    with pytest.raises(RequestError) as caught:
        pipeline.check_labels([3], SAMPLER)
    assert caught.value.message == (
        "class 3 is out of range; the classes are 0 to 2 (circle, Big Square, a:b, c)"
    )


def test_many_names_are_cut() -> None:
    assert numbered_names([f"n{index}" for index in range(11)]).endswith("8 n8, 9 n9, and 1 more")
    assert numbered_names([f"n{index}" for index in range(10)]).endswith("8 n8, 9 n9")
    assert not numbered_names([])


def test_inspect_shows_them(capsys: pytest.CaptureFixture[str], tmp_path: Path, shapes: Bundle) -> None:
    assert run(["inspect", str(shapes.path)]) == 0
    assert "classes: 0 circle, 1 Big Square, 2 a:b, c" in capsys.readouterr().out
    path = tmp_path / "unet.safetensors"
    named = network(UNET.model_copy(update={"num_classes": 2}), class_names=("circle", "square"))
    save_checkpoint(path, named.module.state_dict(), named.config)
    assert run(["inspect", str(path)]) == 0
    assert "classes: 0 circle, 1 square" in capsys.readouterr().out
    assert run(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["class_names"] == ["circle", "square"]
