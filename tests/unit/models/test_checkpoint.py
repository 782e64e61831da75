"""Checkpoints: round trips, published formats, and every fault of a file as a clear error."""

from __future__ import annotations

import json
import pickle
import stat
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from goldens import generated_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from admtrt.config import ClassifierConfig, DiffusionConfig, UNetConfig
from admtrt.errors import CheckpointError, ConfigError, OutputError
from admtrt.models import weights
from admtrt.models.checkpoint import (
    METADATA_KEY,
    CheckpointConfig,
    build_network,
    convert_checkpoint,
    load_network,
    open_checkpoint,
    read_checkpoint_config,
    save_checkpoint,
)
from admtrt.run_config import DataConfig, RunConfig
from admtrt.schedule.sampler import SamplerConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHAPE = {
    "image_size": 8,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": (1, 2),
    "attention_resolutions": (),
}
UNET = UNetConfig.from_dict(SHAPE | {"in_channels": 1, "num_classes": 10})
UNET_CONFIG = CheckpointConfig(kind="unet", unet=UNET, diffusion=DiffusionConfig())
CLASSIFIER_CONFIG = CheckpointConfig(
    kind="classifier",
    classifier=ClassifierConfig.from_dict(
        SHAPE | {"in_channels": 1, "num_classes": 10, "num_head_channels": 32}
    ),
    diffusion=DiffusionConfig(schedule="cosine"),
)
UPSAMPLER_CONFIG = CheckpointConfig(
    kind="upsampler", unet=UNetConfig.from_dict(SHAPE | {"low_res_size": 4}), diffusion=DiffusionConfig()
)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return generated_weights(build_network(UNET_CONFIG)).state_dict()


@pytest.fixture
def saved(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    path = tmp_path / "unet.safetensors"
    save_checkpoint(path, state, UNET_CONFIG)
    return path


def torch_file(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def unet_output(module: Any) -> Tensor:
    x = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
    out: Tensor = module(x, torch.tensor([3.0, 700.0]), torch.tensor([1, 9]))
    return out


# --- round trips ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [UNET_CONFIG, CLASSIFIER_CONFIG, UPSAMPLER_CONFIG], ids=lambda c: c.kind)
def test_round_trip(tmp_path: Path, config: CheckpointConfig) -> None:
    full = config.model_copy(
        update={
            "sampler": SamplerConfig(method="ddim", steps="ddim25", scale=2.5, eta=0.5),
            "class_names": ("null", "één", *"cdefghij"),
            "run": RunConfig(data=DataConfig(source="digits", image_size=8, channels=1)),
            "step": 1234,
            "ema_rate": 0.999,
        }
    )
    original = generated_weights(build_network(config))
    path = tmp_path / "new" / "x.safetensors"
    save_checkpoint(path, original.state_dict(), full)
    assert read_checkpoint_config(path) == full
    loaded = load_network(path, kind=config.kind)
    assert loaded.config == full
    assert type(loaded.module) is type(original)
    for key, value in original.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[key], value), key


def test_loaded_network_computes_the_same(saved: Path, state: dict[str, Tensor]) -> None:
    original = build_network(UNET_CONFIG)
    original.load_state_dict(state)
    module = load_network(saved, kind="unet").module
    # The buffer of the time embedding is in no checkpoint and must be real nonetheless.
    assert not any(value.is_meta for value in [*module.parameters(), *module.buffers()])
    assert torch.equal(unet_output(module), unet_output(original.eval()))
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_saving_keeps_the_umask_and_the_names(saved: Path, state: dict[str, Tensor]) -> None:
    reference = saved.with_name("reference")
    reference.touch()
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE(reference.stat().st_mode)
    with safe_open(saved, framework="pt") as opened:
        assert set(opened.keys()) == set(state)
        assert json.loads(opened.metadata()[METADATA_KEY])["unet"]["num_classes"] == 10


def test_non_contiguous_weights_are_saved(tmp_path: Path, state: dict[str, Tensor]) -> None:
    key = "input_blocks.0.0.weight"
    strided = state | {
        key: state[key].to(memory_format=torch.channels_last),
        "label_emb.weight": state["label_emb.weight"].T.contiguous().T,
    }
    save_checkpoint(tmp_path / "a.safetensors", strided, UNET_CONFIG)
    loaded = load_network(tmp_path / "a.safetensors", kind="unet").module.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    "fault", [OSError(28, "No space left on device"), weights.SafetensorError("I/O error: full")]
)
def test_failing_write_leaves_the_old_file(
    saved: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    before = saved.read_bytes()

    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(before[:100])
        raise fault

    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(OutputError, match="cannot write"):
        save_checkpoint(saved, state, UNET_CONFIG)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


# --- files without a configuration ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write",
    [
        lambda path, state: torch_file(path / "a.pt", state),
        lambda path, state: torch_file(path / "a.pth", state, _use_new_zipfile_serialization=False),
        lambda path, state: torch_file(path / "a.pt", {"state_dict": state, "epoch": 3}),
        lambda path, state: torch_file(
            path / "a.pt", {f"module.{key}": value for key, value in state.items()}
        ),
        lambda path, state: (save_file(state, path / "a.safetensors"), path / "a.safetensors")[1],
    ],
    ids=["zip", "legacy", "nested", "prefix", "bare-safetensors"],
)
def test_bare_weights_with_a_given_configuration(
    tmp_path: Path, state: dict[str, Tensor], write: Callable[[Path, dict[str, Tensor]], Path]
) -> None:
    path = write(tmp_path, state)
    assert read_checkpoint_config(path) is None
    loaded = load_network(path, kind="unet", config=UNET_CONFIG)
    assert loaded.config is UNET_CONFIG
    assert all(torch.equal(value, state[key]) for key, value in loaded.module.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_other_precisions_become_float32(
    tmp_path: Path, state: dict[str, Tensor], dtype: torch.dtype, suffix: str
) -> None:
    stored = {key: value.to(dtype) for key, value in state.items()}
    path = tmp_path / f"a{suffix}"
    if suffix == ".pt":
        torch.save(stored, path)
    else:
        save_file(stored, path)
    loaded = load_network(path, kind="unet", config=UNET_CONFIG).module.state_dict()
    assert {value.dtype for value in loaded.values()} == {torch.float32}
    assert all(torch.equal(value, stored[key].float()) for key, value in loaded.items())


def test_only_a_common_prefix_is_stripped(tmp_path: Path, state: dict[str, Tensor]) -> None:
    first, *_ = state
    mixed = {(f"module.{key}" if key == first else key): value for key, value in state.items()}
    with pytest.raises(CheckpointError, match=f"unexpected: module.{first}"):
        load_network(torch_file(tmp_path / "a.pt", mixed), kind="unet", config=UNET_CONFIG)


# --- damaged, unsafe and foreign files --------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_missing_file_and_directory(tmp_path: Path, suffix: str) -> None:
    for path, text in (
        (tmp_path / f"none{suffix}", "does not exist"),
        (tmp_path / f"dir{suffix}", "is a directory"),
    ):
        if text == "is a directory":
            path.mkdir()
        with pytest.raises(CheckpointError, match=text) as caught:
            load_network(path, kind="unet", config=UNET_CONFIG)
        assert caught.value.exit_code == 2
        with pytest.raises(CheckpointError, match=text):
            read_checkpoint_config(path)


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"suffix '\.ckpt'"):
        load_network(tmp_path / "a.ckpt", kind="unet", config=UNET_CONFIG)


@pytest.mark.parametrize("write", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("keep", [0.0, 0.00005, 0.001, 0.5, 0.999])
def test_truncated_file(tmp_path: Path, state: dict[str, Tensor], write: str, keep: float) -> None:
    path = tmp_path / ("a.safetensors" if write == "safetensors" else "a.pt")
    if write == "safetensors":
        save_checkpoint(path, state, UNET_CONFIG)
    else:
        torch_file(path, state, _use_new_zipfile_serialization=write == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(CheckpointError, match="truncated, damaged"):
        load_network(path, kind="unet", config=UNET_CONFIG)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_garbage(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    for seed in range(20):
        path.write_bytes(np.random.default_rng(seed).bytes(300))
        with pytest.raises(CheckpointError):
            load_network(path, kind="unet", config=UNET_CONFIG)


class Payload:
    """Pickles as a call that leaves a mark on disk."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


@pytest.mark.parametrize("layout", ["zip", "legacy", "raw", "raw-new-protocol"])
def test_pickle_that_runs_code_is_refused(
    tmp_path: Path, state: dict[str, Tensor], layout: str, recwarn: pytest.WarningsRecorder
) -> None:
    mark, path = tmp_path / "executed", tmp_path / "a.pt"
    content = {**state, "extra": Payload(mark)}
    if layout.startswith("raw"):
        path.write_bytes(pickle.dumps(content["extra"], protocol=2 if layout == "raw" else 5))
    else:
        torch_file(path, content, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(CheckpointError, match="executed") as caught:
        load_network(path, kind="unet", config=UNET_CONFIG)
    assert not mark.exists()
    assert not recwarn.list
    if layout != "raw-new-protocol":  # PyTorch's reader refuses that one before it comes to any name
        assert "exec'" in caught.value.message
    if layout.startswith("raw"):
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert mark.exists(), "the payload is harmless, so the test shows nothing"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([1, 2], "holds a list"),
        (torch.zeros(3), "holds a Tensor"),
        ({"epoch": 3}, "'epoch' is a int"),
        ({3: torch.zeros(1)}, "entry 3 is"),
        ({"state_dict": {"a": 1.5}}, "'a' is a float"),
    ],
)
def test_not_a_state_dict(tmp_path: Path, content: Any, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        load_network(torch_file(tmp_path / "a.pt", content), kind="unet", config=UNET_CONFIG)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weight_is_named(tmp_path: Path, state: dict[str, Tensor], value: float) -> None:
    poisoned = state["out.2.weight"].clone()
    poisoned[0, 0, 0, 0] = value
    save_checkpoint(tmp_path / "a.safetensors", state | {"out.2.weight": poisoned}, UNET_CONFIG)
    with pytest.raises(CheckpointError, match=r"out\.2\.weight has weights that are NaN or infinite"):
        load_network(tmp_path / "a.safetensors", kind="unet")


@pytest.mark.parametrize(
    ("convert", "text"),
    [
        (Tensor.int, r"out\.2\.bias is a torch.int32 tensor; expected plain floating-point"),
        (Tensor.to_sparse, "wants to use 'torch._utils._rebuild_sparse_tensor'"),
        (lambda v: v.to("meta"), "wants to use 'torch._utils._rebuild_meta_tensor_no_storage'"),
        (lambda v: torch.nested.nested_tensor([v, v[:1]]), "'torch._utils._rebuild_nested_tensor'"),
        (lambda v: v[:1].expand(10**6, 10**6), r"repeat what it holds; the largest is out\.2\.bias"),
        (lambda v: v.to(torch.complex64), r"out\.2\.bias is a torch.complex64 tensor"),
    ],
    ids=["int", "sparse", "meta", "nested", "expanded", "complex"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_weights_that_are_not_plain(
    tmp_path: Path, state: dict[str, Tensor], convert: Callable[[Tensor], Tensor], text: str
) -> None:
    path = torch_file(tmp_path / "a.pt", state | {"out.2.bias": convert(state["out.2.bias"])})
    with pytest.raises(CheckpointError, match=text):
        convert_checkpoint(open_checkpoint(path), tmp_path / "b.pt", None)
    with pytest.raises(CheckpointError):
        load_network(path, kind="unet", config=UNET_CONFIG)


def test_weights_of_eight_bits(tmp_path: Path, state: dict[str, Tensor]) -> None:
    narrow = state["out.2.bias"].to(torch.float8_e4m3fn)
    path = torch_file(tmp_path / "a.pt", state | {"out.2.bias": narrow})
    with pytest.raises(CheckpointError, match=r"out\.2\.bias is a torch.float8_e4m3fn .*8 bits are not read"):
        load_network(path, kind="unet", config=UNET_CONFIG)


# --- tensors of another model -----------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_named_with_shapes(tmp_path: Path, state: dict[str, Tensor]) -> None:
    wrong = {key: value for key, value in state.items() if not key.startswith("time_embed.0.")}
    wrong |= {f"extra.{i}": torch.zeros(2, i) for i in range(6)} | {"label_emb.weight": torch.zeros(7, 128)}
    with pytest.raises(CheckpointError) as caught:
        load_network(torch_file(tmp_path / "a.pt", wrong), kind="unet", config=UNET_CONFIG)
    message = caught.value.message
    assert "2 missing: time_embed.0.weight [128, 32]; time_embed.0.bias [128]" in message
    shown = "; ".join(f"extra.{i} [2, {i}]" for i in range(5))
    assert f"6 unexpected: {shown}; and 1 more" in message
    assert "1 of another shape: label_emb.weight is [7, 128], expected [10, 128]" in message
    assert "configuration" in caught.value.hint


def test_a_network_of_another_kind(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a network of kind 'unet'; expected 'classifier'"):
        load_network(saved, kind="classifier")
    with pytest.raises(
        CheckpointError, match="given describes a network of kind 'classifier'; expected 'unet'"
    ):
        load_network(saved, kind="unet", config=CLASSIFIER_CONFIG)


def test_no_configuration_at_all(tmp_path: Path, state: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match="do not tell image_size") as caught:
        load_network(torch_file(tmp_path / "a.pt", state), kind="unet")
    assert caught.value.hint.startswith("Give each with --unet-set KEY=VALUE")


# --- the configuration inside -----------------------------------------------------------------------------


def test_a_given_configuration_may_not_contradict_the_file(saved: Path) -> None:
    same = UNET_CONFIG.model_copy(update={"sampler": SamplerConfig(scale=3.0), "step": 5})
    assert load_network(saved, kind="unet", config=same).config == UNET_CONFIG
    other = UNET_CONFIG.model_copy(update={"diffusion": DiffusionConfig(schedule="cosine")})
    with pytest.raises(CheckpointError, match="schedule is linear in the file, cosine given"):
        load_network(saved, kind="unet", config=other)
    other = UNET_CONFIG.model_copy(update={"unet": UNET.model_copy(update={"num_heads": 2})})
    with pytest.raises(CheckpointError, match="num_heads is 4 in the file, 2 given"):
        load_network(saved, kind="unet", config=other)
    for settings in ({"image_size": 9}, {"num_heads": 5}, {"image_size": "big"}):  # impossible with the rest
        with pytest.raises(CheckpointError, match=r"carries its own.* do not fit: .*\nLeave out --unet-set"):
            load_network(saved, kind="unet", settings=settings)
    with pytest.raises(ConfigError, match="no setting 'image_sizes'; did you mean 'image_size'"):
        load_network(saved, kind="unet", settings={"image_sizes": 4})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format_version": 2}, "format_version 2; this version of admtrt reads 1"),
        ({"format_version": None}, "format_version None"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"unet": UNET.to_dict() | {"model_chanels": 32}}, "did you mean 'model_channels'"),
        ({"kind": "classifier"}, "kind 'classifier' needs the section 'classifier'"),
        ({"kind": "upsampler"}, "low_res_size"),
        ({"unet": UNET.to_dict() | {"learn_sigma": False}}, "learn_sigma is False"),
    ],
)
def test_unusable_configuration_in_the_header(
    tmp_path: Path, state: dict[str, Tensor], change: dict[str, Any], text: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(state, path, metadata={METADATA_KEY: json.dumps(UNET_CONFIG.to_dict() | change)})
    for read in (read_checkpoint_config, lambda path: load_network(path, kind="unet", config=UNET_CONFIG)):
        with pytest.raises(CheckpointError, match=text):
            read(path)


@pytest.mark.parametrize(
    "text", ["{", "[1]", "null", '"x"', "[" * 200_000], ids=["open", "list", "null", "text", "deep"]
)
def test_header_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={METADATA_KEY: text})
    with pytest.raises(CheckpointError, match="no JSON object"):
        read_checkpoint_config(tmp_path / "a.safetensors")


def test_exactly_the_network_of_the_kind() -> None:
    both = {"kind": "unet", "unet": UNET, "classifier": CLASSIFIER_CONFIG.classifier, "diffusion": {}}
    for data in (both, both | {"unet": None}, both | {"unet": None, "classifier": None}):
        with pytest.raises(
            ConfigError, match="kind 'unet' needs the section 'unet' and no section 'classifier'"
        ):
            CheckpointConfig.from_dict(data)
    with pytest.raises(ConfigError, match="makes it 'upsampler'"):
        CheckpointConfig.from_dict({"kind": "unet", "unet": UPSAMPLER_CONFIG.unet, "diffusion": {}})
