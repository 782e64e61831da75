"""Checkpoints: weights as safetensors with their configuration inside, and the published ``.pt`` files.

Reading never runs code from a file, and every fault of a file becomes a :class:`CheckpointError`.
"""

from __future__ import annotations

import difflib
import functools
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from admtrt.config import ClassifierConfig, Config, DiffusionConfig, RunConfig, SamplerConfig, UNetConfig
from admtrt.errors import CheckpointError, ConfigError
from admtrt.files import atomic_file
from admtrt.models.classifier import Classifier
from admtrt.models.unet import UNet
from admtrt.presets import PRESETS, network_kind
from admtrt.presets import Kind as Kind

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    Shapes = Mapping[str, tuple[int, ...]]

METADATA_KEY = "admtrt"
"""Where a safetensors header holds the JSON of its :class:`CheckpointConfig`."""

_FORMAT_VERSION = 1
_ALIKE = 0.9  # of all keys equal: then a published model is worth naming
_LISTED = 4  # tensors named in a message, of each fault
_RESAVE = "If you trust its source, save its state dict alone as .safetensors where it was made."


class CheckpointConfig(Config):
    """What a checkpoint says of itself.

    ``unet`` is set for the kinds ``unet`` and ``upsampler``, ``classifier`` for ``classifier``. ``sampler``
    is a recommendation. ``run``, ``step`` and ``ema_rate`` tell how the weights came about.
    """

    format_version: Literal[1] = 1
    kind: Kind
    unet: UNetConfig | None = None
    classifier: ClassifierConfig | None = None
    diffusion: DiffusionConfig
    sampler: SamplerConfig = SamplerConfig()
    class_names: tuple[str, ...] = ()
    run: RunConfig | None = None
    step: int = 0
    ema_rate: float | None = None

    @property
    def network(self) -> UNetConfig | ClassifierConfig:
        """The configuration of the network that the file holds."""
        network = self.classifier or self.unet
        assert network is not None  # the validator refuses it
        return network

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        needed, other = ("classifier", "unet") if self.kind == "classifier" else ("unet", "classifier")
        if getattr(self, needed) is None or getattr(self, other) is not None:
            raise ValueError(f"kind '{self.kind}' needs the section '{needed}' and no section '{other}'")
        if network_kind(self.network) != self.kind:
            raise ValueError(
                f"kind is '{self.kind}' but unet.low_res_size makes it '{network_kind(self.network)}'"
            )
        if self.unet is not None and self.unet.learn_sigma != self.diffusion.learns_sigma:
            raise ValueError(
                f"unet.learn_sigma is {self.unet.learn_sigma} but diffusion.variance_type is "
                f"'{self.diffusion.variance_type}'"
            )
        return self


@dataclass(frozen=True)
class LoadedNetwork:
    """A network ready for use: float32 on the CPU, in evaluation mode, without gradients of its weights."""

    module: UNet | Classifier
    config: CheckpointConfig


def build_network(config: CheckpointConfig) -> UNet | Classifier:
    """The network of a checkpoint with freshly initialised weights."""
    network = config.network
    return Classifier(network) if isinstance(network, ClassifierConfig) else UNet(network)


def checkpoint_config_from_preset(name: str) -> CheckpointConfig:
    """What a published checkpoint would say of itself.

    Raises:
        ConfigError: for an unknown name, with the nearest known one.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.3)
        raise ConfigError(
            f"there is no preset '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""),
            hint=f"The presets are {', '.join(PRESETS)}.",
        )
    preset = PRESETS[name]
    section = "classifier" if preset.kind == "classifier" else "unet"
    return CheckpointConfig.model_validate(
        {
            "kind": preset.kind,
            section: preset.network,
            "diffusion": preset.diffusion,
            "sampler": preset.sampler,
        }
    )


def save_checkpoint(path: Path, state: Mapping[str, Tensor], config: CheckpointConfig) -> None:
    """Write a state dict and its configuration as safetensors; the old file stays until the new one is whole.

    Raises:
        OutputError: if the place cannot be written.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    with atomic_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(config.to_dict())})
        except SafetensorError as error:
            # Its writer has an error of its own for a full disk.
            raise OSError(str(error)) from error
        # It also makes its files unreadable for others, whatever the umask says.
        temporary.chmod(mode)


def read_checkpoint_config(path: Path) -> CheckpointConfig | None:
    """What a file says of itself, from its header alone; None if it says nothing.

    Raises:
        CheckpointError: if the file is missing or damaged, or says something that cannot be used.
    """
    if _suffix_of(path) != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            text = (opened.metadata() or {}).get(METADATA_KEY)
    except SafetensorError as error:
        raise _damaged_safetensors(path, error) from None
    if text is None:
        return None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: the configuration in its header is no JSON object")
    version = data.get("format_version")
    if version != _FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format_version {version!r}; this version of admtrt reads {_FORMAT_VERSION}",
            hint="Update admtrt, or write the checkpoint again with this version.",
        )
    try:
        return CheckpointConfig.from_dict(data, source=f"{path} (its header)")
    except ConfigError as error:
        raise CheckpointError(error.message) from None


def load_network(path: Path, *, kind: Kind, config: CheckpointConfig | None = None) -> LoadedNetwork:
    """Load a network of the expected kind.

    Args:
        path: a ``.safetensors`` file, or a ``.pt`` or ``.pth`` file with a state dict.
        kind: what the file must hold.
        config: for a file that carries no configuration; it may not contradict one that does.

    Raises:
        CheckpointError: if the file is missing, damaged or wants to run code, is of another kind, or its
            tensors are not those of its configuration.
    """
    embedded = read_checkpoint_config(path)
    for candidate in (embedded, config):
        if candidate is not None and candidate.kind != kind:
            holder = f"{path} holds" if candidate is embedded else "the configuration given describes"
            raise CheckpointError(f"{holder} a network of kind '{candidate.kind}'; expected '{kind}'")
    if embedded is not None and config is not None:
        _check_agreement(path, embedded, config)
    state = _read_state(path)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    config = embedded or config
    if config is None:
        raise CheckpointError(
            f"{path} carries no configuration, and none was given",
            hint=_preset_hint(shapes, kind, better_than=0.0) or f"Pass {_option(kind)} or --config.",
        )
    with torch.device("meta"):
        module = build_network(config)
    _check_shapes(path, shapes, _shapes_of(module), kind)
    module.load_state_dict(
        {key: _plain_float32(path, key, value) for key, value in state.items()}, assign=True
    )
    return LoadedNetwork(module=module.eval().requires_grad_(False), config=config)


def nearest_preset(shapes: Shapes) -> tuple[str, float] | None:
    """The published model most like a state dict.

    Returns:
        Its name and the fraction of all keys, of either, that are in both with equal shapes; of equally near
        ones the first. None if no key of any agrees.
    """
    fractions = {name: _fraction_equal(shapes, _preset_shapes(name)) for name in PRESETS}
    name = max(fractions, key=fractions.__getitem__)
    return (name, fractions[name]) if fractions[name] else None


def _shapes_of(module: UNet | Classifier) -> Shapes:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


@functools.cache
def _preset_shapes(name: str) -> Shapes:
    with torch.device("meta"):
        return _shapes_of(build_network(checkpoint_config_from_preset(name)))


def _fraction_equal(left: Shapes, right: Shapes) -> float:
    return len(left.items() & right.items()) / max(len(left.keys() | right.keys()), 1)


def _option(kind: Kind) -> str:
    """The command line's name for a preset."""
    return "--classifier-preset" if kind == "classifier" else "--unet-preset"


def _preset_hint(shapes: Shapes, kind: Kind, *, better_than: float) -> str:
    """Advice that names a published model which the tensors fit better than a given fraction, or nothing."""
    nearest = nearest_preset(shapes)
    if nearest is None or nearest[1] < _ALIKE or nearest[1] <= better_than:
        return ""
    name, fraction = nearest
    same = [f"'{other}'" for other in PRESETS if _preset_shapes(other) == _preset_shapes(name)]
    presets = f"preset {same[0]}" if len(same) == 1 else f"presets {', '.join(same)}"
    if fraction < 1:
        return f"{fraction:.0%} of the keys are those of {presets}: it may be a variant of that model."
    if PRESETS[name].kind != kind:
        return f"These are the keys of {presets}, of kind '{PRESETS[name].kind}'; expected '{kind}'."
    choice = f"{_option(kind)} {name}" if len(same) == 1 else f"{_option(kind)} with the one that it is"
    return f"These are the keys of {presets}: pass {choice}."


def _suffix_of(path: Path) -> str:
    """The suffix of a readable checkpoint file."""
    if not path.is_file():
        found = "is a directory" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {found}; expected a checkpoint file (.safetensors, .pt or .pth)")
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", ".pt", ".pth"):
        raise CheckpointError(f"{path} has the suffix '{path.suffix}'; expected .safetensors, .pt or .pth")
    try:
        path.open("rb").close()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    return suffix


def _read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file under their bare names, as they are stored."""
    state = _read_safetensors(path) if _suffix_of(path) == ".safetensors" else _read_pickle(path)
    prefix = "module."  # of models saved while wrapped for several devices
    if state and all(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no dict
    except SafetensorError as error:
        raise _damaged_safetensors(path, error) from None


def _damaged_safetensors(path: Path, error: SafetensorError) -> CheckpointError:
    return CheckpointError(
        f"{path} is truncated, damaged or no safetensors file: {error}", hint="Copy or download it again."
    )


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats, to developers
            # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # arbitrary bytes make the reader fail in any way
        wanted = re.search(r"GLOBAL ((?:\w+\.)*\w+) (?:was|whose)", str(error))
        if isinstance(error, pickle.UnpicklingError) and wanted:
            raise CheckpointError(
                f"{path} was refused: its pickle wants to use '{wanted[1]}', which weights do not need "
                "and which could run code; nothing was executed",
                hint=_RESAVE,
            ) from None
        raise CheckpointError(
            f"{path} is truncated, damaged or no PyTorch file of weights alone; nothing in it was executed",
            hint=f"Copy or download it again. {_RESAVE}",
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a state dict", hint=_RESAVE)
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} is no state dict: its entry {key!r} is a {type(value).__name__}, not a named tensor",
                hint=_RESAVE,
            )
    return dict(content)


def _check_agreement(path: Path, embedded: CheckpointConfig, given: CheckpointConfig) -> None:
    ours, theirs = ({**c.network.to_dict(), **c.diffusion.to_dict()} for c in (embedded, given))
    different = [
        f"{key} is {ours[key]} in the file, {theirs[key]} given" for key in ours if ours[key] != theirs[key]
    ]
    if different:
        raise CheckpointError(
            f"{path} carries its own configuration, which the one given contradicts: {_listing(different)}",
            hint="Leave out the preset and --config for this file.",
        )


def _check_shapes(path: Path, found: Shapes, expected: Shapes, kind: Kind) -> None:
    missing = [f"{key} {list(expected[key])}" for key in expected if key not in found]
    unexpected = [f"{key} {list(found[key])}" for key in found if key not in expected]
    different = [
        f"{key} is {list(found[key])}, expected {list(expected[key])}"
        for key in expected
        if found.get(key, expected[key]) != expected[key]
    ]
    parts = {"missing": missing, "unexpected": unexpected, "of another shape": different}
    faults = [f"{len(names)} {fault}: {_listing(names)}" for fault, names in parts.items() if names]
    if faults:
        raise CheckpointError(
            f"the tensors of {path} are not those of its configuration.\n" + "\n".join(faults),
            hint=_preset_hint(found, kind, better_than=_fraction_equal(found, expected))
            or "Give the configuration that this network was trained with.",
        )


def _listing(items: Iterable[str]) -> str:
    first, rest = (items := list(items))[:_LISTED], items[_LISTED:]
    return "; ".join(first) + (f"; and {len(rest)} more" if rest else "")


def _plain_float32(path: Path, key: str, stored: Tensor) -> Tensor:
    """A stored weight (half precision included) as float32, refused unless dense, real and finite."""
    if stored.layout is not torch.strided or stored.is_meta or not stored.is_floating_point():
        raise CheckpointError(
            f"{path}: {key} is a {stored.dtype} tensor; expected plain floating-point weights"
        )
    value = stored.float()
    if not bool(torch.isfinite(value).all()):
        raise CheckpointError(
            f"{path}: {key} has weights that are NaN or infinite",
            hint="The training that wrote it diverged, or the file is damaged; take an earlier checkpoint.",
        )
    return value
