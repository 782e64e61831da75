"""Build options: what they take, and what each library refuses before any work."""

from __future__ import annotations

import types
from typing import Any

import pytest

from admtrt.errors import ConfigError, EngineError
from admtrt.runtime.engines.library import Library
from admtrt.runtime.engines.options import BatchProfile, BuildOptions, check_options

SM = types.SimpleNamespace(__members__={"NONE": 0, "CURRENT": 1, "SM75": 2, "SM80": 3, "SM89": 4})
RTX = Library("rtx", types.SimpleNamespace(ComputeCapability=SM), "1.7.1")
TENSORRT = Library("tensorrt", types.SimpleNamespace(), "11.4.0")


@pytest.mark.parametrize(("text", "sizes"), [("1:4:16", (1, 4, 16)), ("4", (4, 4, 4)), ("2:2:9", (2, 2, 9))])
def test_a_profile_is_three_sizes_or_one(text: str, sizes: tuple[int, int, int]) -> None:
    profile = BatchProfile.parse(text)
    assert (profile.smallest, profile.best, profile.largest) == sizes


@pytest.mark.parametrize("text", ["", "1:4", "1:2:3:4", "a", "-1", "1.5", "１", "1: 2:3", "9" * 19])
def test_other_texts_are_no_profile(text: str) -> None:
    with pytest.raises(EngineError, match="is neither a size nor smallest:best:largest"):
        BatchProfile.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [("4:2:8", "4:2:8 is not in order"), ("1:9:8", "1:9:8 is not in order"), ("0", "'smallest' is 0"),
     ("1:1:65537", "'largest' is 65537")],
)  # fmt: skip
def test_impossible_sizes_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchProfile.parse(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"profiles": []}, "'profiles'"),
        ({"profiles": [BatchProfile.parse("2"), BatchProfile.parse("2:2:2")]}, "one --batch is given twice"),
        ({"targets": [89, 89]}, "one --target is given twice"),
        ({"workspace": 0}, "'workspace' is 0"),
        ({"optimization_level": 6}, "'optimization_level' is 6"),
        ({"optimization_level": -1}, "'optimization_level' is -1"),
        ({"hardware_compatible": "hopper"}, "'hardware_compatible' is 'hopper'"),
        ({"refit": True, "strip": True}, "refit and strip exclude each other"),
        ({"strip": True, "version_compatible": True}, "strip and version_compatible exclude each other"),
    ],
)
def test_impossible_options_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildOptions.from_dict(fields)


@pytest.mark.parametrize(
    ("fields", "option"),
    [
        ({"version_compatible": True}, "--version-compatible"),
        ({"hardware_compatible": "ampere_plus"}, "--hardware-compatible"),
        ({"refit": True}, "--refit"),
        ({"strip": True}, "--strip"),
    ],
)
def test_what_rtx_lacks_is_refused_by_name_and_tensorrt_takes_it(fields: dict[str, Any], option: str) -> None:
    options = BuildOptions(**fields)
    with pytest.raises(EngineError, match=f"TensorRT-RTX 1.7.1 does not offer {option}"):
        check_options(options, RTX, "fp32")
    check_options(options, TENSORRT, "fp32")


def test_targets_are_those_of_rtx_and_of_no_other() -> None:
    check_options(BuildOptions(targets=(80, 89)), RTX, "fp32")
    with pytest.raises(
        EngineError, match=r"cannot build for SM90; its targets are SM75, SM80, SM89\n.*tensorrt"
    ):
        check_options(BuildOptions(targets=(89, 90)), RTX, "fp16")
    with pytest.raises(EngineError, match="--target is an option of TensorRT-RTX"):
        check_options(BuildOptions(targets=(89,)), TENSORRT, "fp32")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_turing_takes_fp16_only(precision: Any) -> None:
    options = BuildOptions(targets=(75, 89))
    with pytest.raises(
        EngineError, match=f"is fp16, not {precision}, and one refused target fails the whole"
    ):
        check_options(options, RTX, precision)
    check_options(options, RTX, "fp16")


def test_nothing_is_refused_by_default() -> None:
    for library in (RTX, TENSORRT):
        check_options(BuildOptions(), library, "bf16")
