"""Subject of a measurement: a bundle, and the checkpoints that it was exported from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from admtrt.bench.remote import run_remotely
from admtrt.bundle import Bundle, Manifest
from admtrt.errors import CheckpointError, RequestError
from admtrt.presets import PRESETS

if TYPE_CHECKING:
    from collections.abc import Callable

    from admtrt.contract import Precision
    from admtrt.export.guides.guide import AnyGuide
    from admtrt.models.checkpoint import Kind, LoadedNetwork
    from admtrt.models.classifier import Classifier
    from admtrt.models.identify import IdentifiedCheckpoint
    from admtrt.models.unet import UNet

_AGAIN = "Give the checkpoints from which the bundle was exported."


@dataclass(frozen=True)
class Subject:
    """One set of weights in every form that a row may need.

    Attributes:
        name: for the report.
        bundle: the exported graphs.
        unet, classifier: checkpoints; None if there are none.
        original: checkout of the original implementation; None if not given.
        scratch: folder for rows' temporary files.
        plans: folder of plans; None for the bundle's own.
    """

    name: str
    bundle: Path
    unet: Path | None
    classifier: Path | None
    original: Path | None
    scratch: Path
    plans: Path | None = None

    def check(self) -> Manifest:
        """Compare the checkpoints with the bundle without reading weights, and return the manifest.

        Raises:
            BundleError: if the bundle cannot be used.
            CheckpointError: if a checkpoint cannot be used, is missing or does not fit the bundle.
            RequestError: if the checkout of the original has no networks.
        """
        manifest = Bundle.open(self.bundle).manifest
        check_original(self.original)
        if self.unet is None and self.classifier is not None:
            raise CheckpointError("a classifier was given without its UNet", hint=_AGAIN)
        if self.unet is not None:
            _identify(self.unet, manifest, _generator_kind(manifest))
            if (self.classifier is None) != (manifest.classifier is None):
                held = "holds no classifier" if manifest.classifier is None else "holds one"
                given = "no classifier was given" if self.classifier is None else "a classifier was given"
                raise CheckpointError(f"{given}, but {self.bundle} {held}", hint=_AGAIN)
        if self.classifier is not None:
            _identify(self.classifier, manifest, "classifier")
        return manifest

    def networks(self) -> tuple[UNet, Classifier | None]:
        """The networks in PyTorch, with float32 weights memory-mapped from their files.

        Raises:
            CheckpointError: if there are none, or one cannot be used.
        """
        from admtrt.models.checkpoint import load_identified
        from admtrt.models.classifier import Classifier
        from admtrt.models.pair import in_units_of
        from admtrt.models.unet import UNet

        manifest = Bundle.open(self.bundle).manifest
        unet = self._generator(manifest).module
        assert isinstance(unet, UNet)
        if self.classifier is None:
            return unet, None
        guide = load_identified(_identify(self.classifier, manifest, "classifier"))
        classifier = in_units_of(manifest.discrete("guidance"), guide).module
        assert isinstance(classifier, Classifier)
        return unet, classifier

    def guides(self) -> dict[str, AnyGuide]:
        """The bundle's built-in guides in PyTorch, by name, but for those made of a file.

        Raises:
            CheckpointError: as :meth:`networks`.
        """
        from admtrt.export.guides.named import BUILT_INS

        manifest = Bundle.open(self.bundle).manifest
        known = {name: BUILT_INS.get(guide.loss) for name, guide in manifest.guides.items()}
        makers = {name: built.make for name, built in known.items() if built is not None and not built.file}
        if not makers:
            return {}
        unet = self._generator(manifest)
        return {name: make(unet, None).named(name) for name, make in makers.items()}

    def _generator(self, manifest: Manifest) -> LoadedNetwork:
        from admtrt.models.checkpoint import load_identified

        if self.unet is None:
            raise CheckpointError("PyTorch needs the checkpoints", hint="Give --unet and --classifier.")
        return load_identified(_identify(self.unet, manifest, _generator_kind(manifest)))


def subject_from_preset(
    name: str,
    work: Path,
    original: Path | None,
    note: Callable[[str], None],
    *,
    engines: tuple[Precision, ...] = (),
) -> Subject:
    """A published model with generated weights, see :mod:`admtrt.models.generated`.

    Checkpoints and bundle are written into ``work``, the bundle with engine graphs in the precisions
    ``engines``. Existing files there are reused.

    Raises:
        RequestError: if there is no such model, it is a classifier, or ``original`` is not a checkout.
        RemoteError: if the export fails.
    """
    if name not in PRESETS or PRESETS[name].kind == "classifier":
        names = ", ".join(name for name, preset in PRESETS.items() if preset.kind != "classifier")
        raise RequestError(f"there is no preset '{name}' to sample from", hint=f"There are: {names}.")
    check_original(original)
    guide = PRESETS[name].guided_by
    subject = Subject(
        name=name,
        bundle=work / f"{name}.bundle",
        unet=work / f"{name}.safetensors",
        classifier=None if guide is None else work / f"{guide}.safetensors",
        original=original,
        scratch=work,
    )
    for preset, path in ((name, subject.unet), (guide, subject.classifier)):
        if preset is not None and path is not None and not path.exists():
            note(f"generating {path}")
            run_remotely(_generate, preset, path, log=work / "generate.log")
    if subject.bundle.exists():
        note(f"using {subject.bundle} as it stands")
    else:
        note(f"exporting {subject.bundle}")
        run_remotely(_export, subject, engines, log=work / "export.log")
    return subject


def check_original(path: Path | None) -> None:
    """Check that a given folder is a checkout of the original.

    Raises:
        RequestError: if it has no networks.
    """
    if path is not None and not (path / "guided_diffusion" / "unet.py").is_file():
        raise RequestError(
            f"{path} is no checkout of the original: it has no guided_diffusion/unet.py",
            hint="Give the folder into which its repository was cloned.",
        )


def _generate(preset: str, path: Path) -> None:
    from admtrt.models.checkpoint import build_network, checkpoint_config_from_preset, save_checkpoint
    from admtrt.models.generated import generate_weights

    config = checkpoint_config_from_preset(preset)
    network = build_network(config)
    generate_weights(network)
    save_checkpoint(path, network.state_dict(), config)


def _export(subject: Subject, engines: tuple[Precision, ...]) -> None:
    from admtrt.export.pack import bundle_from_checkpoints
    from admtrt.models.checkpoint import load_network
    from admtrt.presets import network_kind

    assert subject.unet is not None  # a preset's subject has one
    unet = load_network(subject.unet, kind=network_kind(PRESETS[subject.name].network))
    guide = None if subject.classifier is None else load_network(subject.classifier, kind="classifier")
    bundle_from_checkpoints(unet, guide, subject.bundle, engines=engines)


def _generator_kind(manifest: Manifest) -> Kind:
    return "unet" if manifest.network.low_res_size is None else "upsampler"


def _identify(path: Path, manifest: Manifest, kind: Kind) -> IdentifiedCheckpoint:
    """Identify a checkpoint by its own configuration, else by the bundle's."""
    from admtrt.models.checkpoint import CheckpointConfig, open_checkpoint
    from admtrt.models.identify import identify_checkpoint

    stored = open_checkpoint(path)
    expected = manifest.classifier if kind == "classifier" else manifest.network
    field = "classifier" if kind == "classifier" else "unet"
    given = []
    if stored.embedded is None:
        process = manifest.diffusion
        if kind == "classifier" and manifest.classifier_rescale_timesteps is not None:
            rescaled = {"rescale_timesteps": manifest.classifier_rescale_timesteps}
            process = process.model_copy(update=rescaled)
        said = {"kind": kind, field: expected, "diffusion": process, "sampler": manifest.sampler}
        given = [CheckpointConfig.model_validate(said)]
    try:
        found = identify_checkpoint(stored, kinds=(kind,), configs=given)
    except CheckpointError as error:
        raise CheckpointError(error.message, hint=_AGAIN) from None
    assert expected is not None  # a classifier is asked for only where the bundle has one
    ours, theirs = found.config.network.model_dump(), expected.model_dump()
    if ours | {"null_class": None} != theirs | {"null_class": None}:  # only the bundle has it
        raise CheckpointError(f"{path} is not the bundle's {kind}: its settings differ", hint=_AGAIN)
    return found
