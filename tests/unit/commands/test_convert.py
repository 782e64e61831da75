"""Conversion both ways, bit for bit, and the loading of files by the commands."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import command_faults
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_networks import SMALL, small, state_of
from sparse_checkpoints import zeros_file
from torch import Tensor

from admtrt.cli import run
from admtrt.commands.checkpoints import Description, identify_described, load_pair, parse_settings
from admtrt.errors import CheckpointError, ConfigError, OutputError, RequestError
from admtrt.models import checkpoint
from admtrt.models.checkpoint import (
    PREFIX_KEY,
    convert_checkpoint,
    open_checkpoint,
    read_checkpoint_config,
    save_checkpoint,
)
from admtrt.models.matching import shapes_of_network
from admtrt.models.option_names import OptionNames
from admtrt.models.settings import (
    CheckpointConfig,
    checkpoint_config_from_preset,
    with_settings,
)

UNET = small(num_classes=10, schedule="cosine")
UPSAMPLER = small("upsampler", low_res_size=4)
CLASSIFIER = small("classifier", num_classes=10, schedule="cosine")
CONFIGS = {"unet": UNET, "upsampler": UPSAMPLER, "classifier": CLASSIFIER}


def options_of(config: CheckpointConfig, option: str = "--set") -> list[str]:
    """Options with the settings that the shapes do not show."""
    keys = [
        "image_size",
        "num_head_channels",
        "new_attention_order",
        "schedule",
        "steps",
        "rescale_timesteps",
    ]
    if config.kind != "classifier":
        keys += ["mean_type", "variance_type"]
    if config.kind == "upsampler":
        keys += ["low_res_size"]
    values = config.network.model_dump() | config.diffusion.model_dump()
    return [part for key in keys for part in (option, f"{key}={json.dumps(values[key])}")]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command that fails by the user's fault, and its hint."""
    text = command_faults.refused(capsys, *arguments)
    assert text.splitlines()[-1].startswith(("error: ", "       ")), text
    return text


def same_bytes(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        value.dtype == right[key].dtype
        and value.shape == right[key].shape
        and value.flatten().view(torch.uint8).equal(right[key].flatten().view(torch.uint8))
        for key, value in left.items()
    )


# --- round trips ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_there_and_back(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    config = CONFIGS[kind]
    state = state_of(config, dtype)
    source, middle, back = (tmp_path / name for name in ("a.pt", "b.safetensors", "c.pt"))
    torch.save(OrderedDict(state), source)
    assert run(["convert", str(source), str(middle), *options_of(config)]) == 0
    embedded = read_checkpoint_config(middle)
    assert embedded is not None
    assert (embedded.kind, embedded.network, embedded.diffusion) == (kind, config.network, config.diffusion)
    assert same_bytes(dict(open_checkpoint(middle).tensors), state)
    assert run(["convert", str(middle), str(back)]) == 0
    content = torch.load(back, weights_only=True)
    assert isinstance(content, OrderedDict)
    assert list(content) == list(state)
    assert same_bytes(dict(content), state)
    assert abs(back.stat().st_size - source.stat().st_size) < 0.01 * source.stat().st_size


def test_a_mixture_of_types_and_a_prefix_come_back(tmp_path: Path) -> None:
    state = state_of(UNET)
    mixed = {
        f"module.{key}": value.half() if value.ndim > 1 else value for key, value in state.items()
    }  # as the original's fp16 networks, whose norms stay in float32
    source, middle, back = (tmp_path / name for name in ("a.pt", "b.safetensors", "c.pth"))
    torch.save(mixed, source)
    assert run(["convert", str(source), str(middle), *options_of(UNET)]) == 0
    with safe_open(middle, framework="pt") as opened:
        assert opened.metadata()[PREFIX_KEY] == "module."
        assert set(opened.keys()) == set(state)
    assert run(["convert", str(middle), str(back)]) == 0
    assert same_bytes(torch.load(back, weights_only=True), mixed)


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32"])
def test_weights_are_rounded_where_asked(tmp_path: Path, name: str) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]
    state = state_of(UNET)
    source, target = tmp_path / "a.pt", tmp_path / "b.safetensors"
    torch.save(state, source)
    assert run(["convert", str(source), str(target), *options_of(UNET), "--dtype", name]) == 0
    assert same_bytes(
        dict(open_checkpoint(target).tensors), {key: value.to(dtype) for key, value in state.items()}
    )


def test_weights_too_large_for_a_type_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = state_of(UNET)
    state["out.2.bias"] = torch.full_like(state["out.2.bias"], 1e6)
    source, target = tmp_path / "a.pt", tmp_path / "b.safetensors"
    torch.save(state, source)
    said = refused(capsys, "convert", source, target, *options_of(UNET), "--dtype", "fp16")
    assert "out.2.bias has weights too large for float16" in " ".join(said.split())
    assert not target.exists()


def test_tensors_that_share_a_storage(tmp_path: Path) -> None:
    """Averaged weights are often views of one long vector."""
    state = state_of(UNET)
    flat = torch.cat([value.flatten() for value in state.values()])
    pieces = flat.split([value.numel() for value in state.values()])
    views = {key: piece.view_as(state[key]) for key, piece in zip(state, pieces, strict=True)}
    views["out.0.bias"] = views["out.0.weight"]
    torch.save(views, tmp_path / "a.pt")
    convert_checkpoint(open_checkpoint(tmp_path / "a.pt"), tmp_path / "b.safetensors", UNET)
    assert same_bytes(dict(open_checkpoint(tmp_path / "b.safetensors").tensors), views)
    assert (tmp_path / "b.safetensors").stat().st_size < 4 * flat.numel() + 100_000


def test_bare_safetensors_files(tmp_path: Path) -> None:
    state = state_of(CLASSIFIER)
    save_file(state, tmp_path / "bare.safetensors")
    described = tmp_path / "described.safetensors"
    assert run(["convert", str(tmp_path / "bare.safetensors"), str(described), *options_of(CLASSIFIER)]) == 0
    assert read_checkpoint_config(described) is not None
    assert run(["convert", str(tmp_path / "bare.safetensors"), str(tmp_path / "b.pt")]) == 0
    assert same_bytes(torch.load(tmp_path / "b.pt", weights_only=True), state)


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "a.pt", tmp_path / "b.safetensors"
    torch.save(state_of(UNET, torch.float16), source)
    assert run(["convert", str(source), str(target), *options_of(UNET), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["target"], found["dtypes"]) == (str(target), ["float16"])
    assert found["parameters"] == sum(value.numel() for value in state_of(UNET).values())
    assert found["bytes"] == target.stat().st_size
    assert found["config"]["unet"] == UNET.network.to_dict()
    assert run(["convert", str(target), str(tmp_path / "c.pt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["diffusion"]["schedule"] == "cosine"


@pytest.mark.parametrize("kind", CONFIGS)
def test_one_file_of_settings_for_all(tmp_path: Path, kind: str) -> None:
    sections = {name: config.network.to_dict() for name, config in CONFIGS.items()}
    text = "".join(
        f"[{name}]\n"
        + "".join(f"{key} = {json.dumps(value)}\n" for key, value in section.items() if value is not None)
        for name, section in sections.items()
    )
    (tmp_path / "all.toml").write_text(text + '[diffusion]\nschedule = "cosine"\n')
    torch.save(state_of(CONFIGS[kind]), tmp_path / "a.pt")
    target = tmp_path / "b.safetensors"
    assert run(["convert", str(tmp_path / "a.pt"), str(target), "--config", str(tmp_path / "all.toml")]) == 0
    embedded = read_checkpoint_config(target)
    assert embedded is not None
    assert (embedded.kind, embedded.network) == (kind, CONFIGS[kind].network)


def test_a_training_file_whose_networks_take_their_sizes_of_its_data(tmp_path: Path) -> None:
    network = {key: value for key, value in SMALL.items() if key not in ("image_size", "in_channels")}
    data = {"source": "photos", "image_size": UNET.network.image_size, "channels": UNET.network.in_channels}
    sections = {"data": data, "unet": network | {"num_classes": 10}, "diffusion": {"schedule": "cosine"}}
    lines = [
        line
        for name, section in sections.items()
        for line in (f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in section.items()))
    ]
    (tmp_path / "training.toml").write_text("\n".join(lines))
    torch.save(state_of(UNET), tmp_path / "a.pt")
    target = tmp_path / "b.safetensors"
    told = ["--config", str(tmp_path / "training.toml")]
    assert run(["convert", str(tmp_path / "a.pt"), str(target), *told]) == 0
    embedded = read_checkpoint_config(target)
    assert embedded is not None
    assert (embedded.network, embedded.diffusion) == (UNET.network, UNET.diffusion)


def test_an_existing_file_stays_unless_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.pt"
    save_checkpoint(source, state_of(UNET), UNET)
    target.write_text("old")
    assert "already exists" in refused(capsys, "convert", source, target)
    assert target.read_text() == "old"
    assert run(["convert", str(source), str(target), "--overwrite"]) == 0
    assert same_bytes(torch.load(target, weights_only=True), state_of(UNET))
    # In place, while the file is mapped.
    assert run(["convert", str(source), str(source), "--overwrite"]) == 0
    assert same_bytes(dict(open_checkpoint(source).tensors), state_of(UNET))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.pt"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_appears_meanwhile_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """Of two processes that convert to one new place, the second is refused."""
    save_checkpoint(tmp_path / "a.safetensors", state_of(UNET), UNET)
    stored, target = open_checkpoint(tmp_path / "a.safetensors"), tmp_path / f"b{suffix}"
    checked = checkpoint.check_weights

    def late(*arguments: Any) -> None:
        checked(*arguments)
        target.write_text("another's")

    monkeypatch.setattr(checkpoint, "check_weights", late)
    with pytest.raises(OutputError, match="already exists"):
        convert_checkpoint(stored, target, stored.embedded)
    assert target.read_text() == "another's"
    convert_checkpoint(stored, target, stored.embedded, overwrite=True)
    assert target.read_bytes() != b"another's"


def test_a_failing_write_leaves_the_old_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.pt"
    save_checkpoint(source, state_of(UNET), UNET)
    target.write_text("old")

    def fail(content: Any, opened: Any) -> None:
        opened.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    assert "No space left" in refused(capsys, "convert", source, target, "--overwrite")
    assert target.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_under_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(content: Any, opened: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 1 vs 2\nframe #0")

    source, target = tmp_path / "a.safetensors", tmp_path / "b.pt"
    save_checkpoint(source, state_of(UNET), UNET)
    monkeypatch.setattr(torch, "save", fail)
    complaint = refused(capsys, "convert", source, target)
    assert f"cannot write {target}" in complaint
    assert "frame #0" not in complaint
    assert list(tmp_path.iterdir()) == [source]


def test_weights_stay_mapped(tmp_path: Path) -> None:
    """The tensors of an opened file lie in mappings of the file itself."""
    save_checkpoint(tmp_path / "a.safetensors", state_of(UNET), UNET)
    torch.save(state_of(UNET), tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        tensors = open_checkpoint(tmp_path / name).tensors
        addresses = {value.data_ptr() for value in tensors.values()}
        lines = Path("/proc/self/maps").read_text().splitlines()
        maps = [line.split() for line in lines if line.endswith(name)]
        ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
        assert all(any(low <= address < high for low, high in ranges) for address in addresses)


# --- bad input --------------------------------------------------------------------------------------------


def test_files_that_cannot_be_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.pt"
    torch.save(state_of(UNET), source)
    target = tmp_path / "b.safetensors"
    assert "suffix '.onnx'" in refused(capsys, "convert", source, tmp_path / "b.onnx")
    (tmp_path / "folder.pt").mkdir()
    assert "is a directory" in refused(capsys, "convert", source, tmp_path / "folder.pt", "--overwrite")
    assert "does not exist" in refused(capsys, "convert", tmp_path / "none.pt", target)
    untold = refused(capsys, "convert", source, target)
    assert "do not tell image_size, new_attention_order" in untold
    assert "--set KEY=VALUE" in untold
    assert "no preset '64x64'" in refused(capsys, "convert", source, target, "--preset", "64x64")
    wrong = refused(capsys, "convert", source, target, "--preset", "64x64_diffusion")
    assert "missing: input_blocks." in wrong
    assert "time_embed.0.weight is [128, 32], expected [768, 192]" in wrong
    assert "comes twice" in refused(capsys, "convert", source, target, "--set", "a=1", "--set", "a=2")
    assert "not of the form" in refused(capsys, "convert", source, target, "--set", "image_size")
    assert "no setting 'colour'" in refused(capsys, "convert", source, target, "--set", "colour=1")
    assert not target.exists()


def test_damaged_and_unsafe_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = state_of(UNET, torch.float16)
    state["out.2.weight"][0, 0, 0, 0] = torch.nan
    source, target = tmp_path / "a.pt", tmp_path / "b.safetensors"
    torch.save(state, source)
    nan = refused(capsys, "convert", source, target, *options_of(UNET))
    assert "out.2.weight has weights that are NaN or infinite" in nan
    source.write_bytes(source.read_bytes()[:5000])
    assert "truncated, damaged" in refused(capsys, "convert", source, target)

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return exec, (f"open({str(tmp_path / 'mark')!r}, 'w').close()",)

    torch.save({**state, "extra": Payload()}, source)
    assert "wants to use" in refused(capsys, "convert", source, target)
    assert not (tmp_path / "mark").exists()
    assert not target.exists()


def test_a_file_that_says_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.safetensors"
    save_checkpoint(source, state_of(UNET), UNET)
    text = refused(capsys, "convert", source, tmp_path / "b.pt", "--set", "schedule=linear")
    assert "schedule is cosine in the file, linear given" in text
    assert "Leave out --preset, --set and --config" in text
    other = refused(capsys, "convert", source, tmp_path / "b.pt", "--preset", "64x64_classifier")
    assert "of kind 'unet'; the configuration given describes one of kind 'classifier'" in other
    assert run(["convert", str(source), str(tmp_path / "b.pt"), "--set", "schedule=cosine"]) == 0


# --- pairs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_size": 16, "attention_resolutions": (8,)}, "image_size 8 but the classifier 16"),
        ({"num_classes": 7}, "10 classes but the classifier 7"),
        ({"in_channels": 1}, "in_channels 3 but the classifier 1"),
    ],
)
def test_a_classifier_for_something_else(
    tmp_path: Path, changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "admtrt.models.checkpoint.load_identified", lambda *_: pytest.fail("weights were read")
    )
    other = small("classifier", **{"num_classes": 10, "schedule": "cosine"} | changes)
    torch.save(state_of(UNET), tmp_path / "unet.pt")
    torch.save(state_of(other), tmp_path / "classifier.pt")
    with pytest.raises(CheckpointError, match=said):
        load_pair(
            tmp_path / "unet.pt",
            tmp_path / "classifier.pt",
            unet_preset=None,
            classifier_preset=None,
            config=None,
            unet_set=options_of(UNET)[1::2],
            classifier_set=options_of(other)[1::2],
        )


def test_each_file_of_a_pair_has_its_own_settings(tmp_path: Path) -> None:
    torch.save(state_of(UNET), tmp_path / "unet.pt")
    torch.save(state_of(CLASSIFIER, torch.float16), tmp_path / "classifier.pt")
    pair: dict[str, Any] = {"unet_preset": None, "classifier_preset": None, "config": None}
    pair["unet_set"] = options_of(UNET)[1::2]
    unet, none = load_pair(tmp_path / "unet.pt", None, **pair)
    for alone in ({"classifier_preset": "64x64_classifier"}, {"classifier_set": ["image_size=8"]}):
        with pytest.raises(RequestError, match="describe a classifier, and none was given"):
            load_pair(tmp_path / "unet.pt", None, **(pair | alone))
    unused = {"config": tmp_path / "some.toml", "unet_preset": "64x64_diffusion"}
    with pytest.raises(RequestError, match="says nothing that is asked for"):
        load_pair(tmp_path / "unet.pt", None, **(pair | unused))
    assert (unet.config.network, none) == (UNET.network, None)
    with pytest.raises(CheckpointError, match="do not tell") as caught:
        load_pair(tmp_path / "unet.pt", tmp_path / "classifier.pt", **pair)
    assert "--classifier-set KEY=VALUE" in caught.value.hint
    pair["classifier_set"] = options_of(CLASSIFIER)[1::2]
    unet, classifier = load_pair(tmp_path / "unet.pt", tmp_path / "classifier.pt", **pair)
    assert classifier is not None
    assert classifier.config.network == CLASSIFIER.network
    assert {value.dtype for value in classifier.module.state_dict().values()} == {torch.float32}
    with pytest.raises(CheckpointError, match="kind 'unet'; expected 'classifier'"):
        load_pair(tmp_path / "unet.pt", tmp_path / "unet.pt", **(pair | {"classifier_set": pair["unet_set"]}))
    swapped = {"unet_set": pair["classifier_set"], "classifier_set": ()}
    with pytest.raises(CheckpointError, match="kind 'classifier'; expected 'unet' or 'upsampler'"):
        load_pair(tmp_path / "classifier.pt", None, **(pair | swapped))


def test_what_was_assumed_is_said(tmp_path: Path) -> None:
    fork = with_settings(checkpoint_config_from_preset("64x64_classifier"), {"num_classes": 10})
    shapes = shapes_of_network(fork)
    path = zeros_file(tmp_path / "classifier.safetensors", shapes)
    notes: list[str] = []
    with pytest.raises(CheckpointError, match="expected 'unet' or 'upsampler'"):
        load_pair(
            path,
            None,
            unet_preset=None,
            classifier_preset=None,
            config=None,
            note=notes.append,
        )
    found = identify_described(
        open_checkpoint(path),
        kinds=("classifier",),
        description=Description(options=OptionNames("--classifier-")),
        note=notes.append,
    )
    assert found.config.network == fork.network
    (note,) = notes
    assert (
        "preset '64x64_classifier' but for num_classes 10; assumed from there: image_size 64, num_head"
        in note
    )


def test_settings_on_the_command_line() -> None:
    found = parse_settings(
        [
            "image_size=64",
            " schedule = cosine",
            "channel_mult=[1, 0.5]",
            "x=none",
            "y=true",
            'z="a=b"',
            "w=a=b",
        ]
    )
    assert found == {
        "image_size": 64,
        "schedule": "cosine",
        "channel_mult": [1, 0.5],
        "x": "none",
        "y": True,
        "z": "a=b",
        "w": "a=b",
    }
    for bad in ("=1", "a", ""):
        with pytest.raises(ConfigError, match="not of the form"):
            parse_settings([bad])
