"""Layout of a run's folder, and the check whether a run may start or resume there."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

from filelock import FileLock, Timeout

from admtrt.config_files import load_config, save_config
from admtrt.errors import OutputError
from admtrt.files import atomic_file, remove_stale
from admtrt.run_config import RunConfig, network_section

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from admtrt.data.sources import Skipped
    from admtrt.run_config import Task

_FREE_KEYS = frozenset(
    {"steps", "log_every", "checkpoint_every", "sample_every", "max_nan_steps", "tensorboard"}
)
"""Training settings that a resumed run may change: they do not alter what a step computes.

``steps`` is among them unless ``lr_schedule`` anneals or the number of noise levels grows: then a step
depends on it.
"""


@dataclass(frozen=True)
class RunFolder:
    """The files of one network's run; other networks may share ``out``.

    As a context manager, it releases the lock taken by :meth:`prepare`.

    ::

        out/<task>.safetensors            the exported weights: the average of the first EMA rate
        out/<task>-ema-<rate>.safetensors   of every further rate
        out/<task>/config.toml            the resolved configuration
        out/<task>/metrics.jsonl          one line for each logged step
        out/<task>/samples/step-000500.png
        out/<task>/state.safetensors      everything that a resumed run needs
        out/<task>/skipped.txt            the bad files left out, where there are any
        out/<task>/tensorboard/           where asked for
        out/<task>/.lock                  held by the process that trains here
    """

    out: Path
    task: Task

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @cached_property
    def _lock(self) -> FileLock:
        return FileLock(self.root / ".lock", blocking=False)

    @property
    def root(self) -> Path:
        """The folder of everything except the exported weights."""
        return self.out / self.task

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.root / "config.toml"

    @property
    def metrics(self) -> Path:
        """Metrics as JSON lines."""
        return self.root / "metrics.jsonl"

    @property
    def skipped(self) -> Path:
        """The skipped images, one ``path: reason`` per line."""
        return self.root / "skipped.txt"

    @property
    def state(self) -> Path:
        """The training state: a single file, so that it can be replaced atomically."""
        return self.root / "state.safetensors"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's events."""
        return self.root / "tensorboard"

    def samples(self, step: int) -> Path:
        """The sample grid of a step."""
        return self.root / "samples" / f"step-{step:06d}.png"

    def weights(self, rate: float | None = None) -> Path:
        """The exported weights, or those of a further EMA rate."""
        return self.out / f"{self.task}{'' if rate is None else f'-ema-{rate}'}.safetensors"

    def prepare(self, config: RunConfig, *, resume: bool, overwrite: bool) -> None:
        """Lock the folder and prepare it for a run, without changing a run to be resumed.

        Args:
            config: the configuration that an existing run must match.
            resume: continue an existing run.
            overwrite: remove an existing run.

        Raises:
            OutputError: if a run exists and neither option is given, if it has another configuration, if
                another process trains there, or if the folder cannot be written.
        """
        if resume and overwrite:
            raise OutputError(
                "a run cannot both be resumed and overwritten", hint="Pass --resume or --overwrite."
            )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            for folder in (self.out, self.root, self.root / "samples"):
                remove_stale(folder)
            if overwrite:
                self._remove_run()
        except Timeout:
            raise OutputError(
                f"another process is training the {self.task} in {self.out}",
                hint="Wait until it has ended, or choose another --out.",
            ) from None
        except OSError as error:
            raise OutputError(f"cannot write {self.root}: {error.strerror or error}") from error
        found = self._entries()
        if found and not resume:
            raise OutputError(
                f"{found[0]} already exists: a run of the {self.task} stands in {self.out}",
                hint="Pass --resume to go on with it, --overwrite to replace it, or choose another --out.",
            )
        if found:
            self._check_same_run(config)

    def write_config(self, config: RunConfig) -> None:
        """Write the resolved configuration.

        Raises:
            OutputError: if the file cannot be written.
        """
        with atomic_file(self.config) as temporary:
            save_config(config, temporary)

    def write_skipped(self, skipped: Sequence[Skipped]) -> None:
        """Write the skipped files, or remove the list if there are none.

        Raises:
            OutputError: if the file cannot be written.
        """
        if not skipped:
            self.skipped.unlink(missing_ok=True)
            return
        text = "".join(f"{path}: {reason}\n" for path, reason in skipped)
        with atomic_file(self.skipped) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="surrogateescape")

    def _entries(self) -> list[Path]:
        own = [self.config, self.metrics, self.state, self.root / "samples", self.tensorboard, self.skipped]
        exported = [self.weights(), *sorted(self.out.glob(f"{self.task}-ema-*.safetensors"))]
        return [path for path in (*own, *exported) if path.exists()]

    def _remove_run(self) -> None:
        for path in self._entries():
            _remove(path)

    def _check_same_run(self, config: RunConfig) -> None:
        if not self.config.exists():
            raise OutputError(
                f"{self.config} is missing, so the run there cannot be recognised",
                hint="Pass --overwrite to replace it, or choose another --out.",
            )
        old, new = self._identity(load_config(RunConfig, self.config)), self._identity(config)
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                raise OutputError(
                    f"{self.out} holds another run of the {self.task}: {key} is {old.get(key)!r} there and "
                    f"{new.get(key)!r} now",
                    hint="Resume with the same settings, pass --overwrite, or choose another --out.",
                )

    def _identity(self, config: RunConfig) -> dict[str, Any]:
        """Settings that determine this network's weights, flattened to ``section.key``."""
        sections = config.model_dump(mode="json")
        settings = sections[f"train_{self.task}"]
        by_length = settings["lr_schedule"] != "constant" or settings.get("first_levels") is not None
        free = _FREE_KEYS - {"steps"} if by_length else _FREE_KEYS
        return {
            f"{section}.{key}": value
            for section in ("data", "diffusion", network_section(self.task), f"train_{self.task}")
            for key, value in (sections[section] or {}).items()
            if not (section.startswith("train_") and key in free)
        }


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
