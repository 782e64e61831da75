"""A served model: a bundle, or a bundle and the upsampler that enlarges its images."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from admtrt.contract import graph_of
from admtrt.errors import RequestError
from admtrt.images import to_uint8
from admtrt.runtime.image_inputs import NOTHING, ImageInputs
from admtrt.runtime.sampler import runs_of
from admtrt.runtime.two_stage import UNGUIDED, TwoStage
from admtrt.serve.sizes import open_graphs

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from numpy.typing import NDArray

    from admtrt.contract import GraphName, Guides
    from admtrt.runtime.drawn import Given
    from admtrt.runtime.pipeline import Pipeline
    from admtrt.runtime.slots import Images, Slots
    from admtrt.schedule.sampler import SamplerChoices

_BESIDE = 2**20  # bytes of a request besides its targets' values: file headers, images, other fields


@dataclass(frozen=True, eq=False)
class Draw:
    """A checked request: how its rows start in each stage, and how they are finished.

    Attributes:
        pipelines: the pipelines of the model's stages.
        given: the checked request of each stage.
        steps: evaluations of a row in each stage.
        runs: how often a row runs each graph in each stage.
    """

    pipelines: Sequence[Pipeline]
    given: Sequence[Given]
    steps: tuple[int, ...]
    runs: tuple[Mapping[GraphName, int], ...]

    def __len__(self) -> int:
        return len(self.given[0])

    @property
    def seeds(self) -> list[int]:
        """The seed of every row."""
        return self.given[0].seeds

    @property
    def labels(self) -> list[int] | None:
        """The label of every row, if a stage knows classes."""
        labels = next((one.labels for one in self.given if one.labels is not None), None)
        return None if labels is None else labels.tolist()

    @cached_property
    def settings(self) -> Hashable:
        """Equal for requests that a server without step batching could put into one batch."""
        return tuple(one.sampler for one in self.given), self.steps

    def slots(self, stage: int, index: int, small: Images | None) -> Slots:
        """The first state of a row in a stage; ``small`` is its result of the previous stage, [C, H, W]."""
        given = self.given[stage].part(slice(index, index + 1))
        if small is not None:
            # Round to pixels first, as when each stage runs separately.
            given = replace(given, low_res=self.pipelines[stage].check_low_res(to_uint8(small[None])))
        return self.pipelines[stage].slots(given)

    def finished(self, stage: int, index: int, x: Images) -> Images:
        """Check and return one row after the last evaluation of a stage, float32 [C, H, W].

        Raises:
            RequestError: if it is not finite.
        """
        given = self.given[stage].part(slice(index, index + 1))
        finished: Images = self.pipelines[stage].finished(given, x[None])[0]
        return finished


class Model:
    """A model that is served.

    Args:
        name: its name in requests.
        pipeline: the bundle's pipeline.
        upsampler: the pipeline of the bundle that enlarges its images, if any.

    Raises:
        RequestError: if the two do not fit together.
    """

    def __init__(self, name: str, pipeline: Pipeline, upsampler: Pipeline | None = None) -> None:
        self.name = name
        self.pipelines = [pipeline] if upsampler is None else [pipeline, upsampler]
        self._cascade = None if upsampler is None else TwoStage(pipeline, upsampler)

    @property
    def digest(self) -> str:
        """Digest of the bundles."""
        return "+".join(pipeline.bundle.digest for pipeline in self.pipelines)

    @property
    def num_classes(self) -> int | None:
        """Number of classes that can be requested."""
        return next((one.num_classes for one in self._manifests if one.num_classes is not None), None)

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes, if any."""
        return next((one.class_names for one in self._manifests if one.class_names), ())

    @property
    def guides(self) -> Guides:
        """Guides other than the classifier that can be requested: those with open graphs."""
        graphs = open_graphs(self.pipelines[0])
        known = self._manifests[0].guides
        return {name: guide for name, guide in known.items() if graph_of(name, guide) in graphs}

    @property
    def target_bytes(self) -> int:
        """Bytes of a request with all targets of all guides for one sample, as base64 of float32."""
        values = sum(math.prod(sizes) for one in self.guides.values() for sizes in one.targets.values())
        return values * 4 * 4 // 3 + _BESIDE

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images."""
        network = self._manifests[-1].network
        return network.image_size, network.image_size, network.in_channels

    @property
    def _manifests(self) -> list[Any]:
        return [pipeline.bundle.manifest for pipeline in self.pipelines]

    def draw(
        self,
        labels: Sequence[int | str] | None,
        seeds: Sequence[int],
        *,
        choices: SamplerChoices,
        low_res: NDArray[np.uint8] | None = None,
        inputs: ImageInputs = NOTHING,
        upsample_steps: str | int | None = None,
        upsample_scale: float | None = None,
    ) -> Draw:
        """Check a request, arguments as of :class:`~admtrt.runtime.pipeline.Pipeline` and ``TwoStage``.

        Raises:
            RequestError: for anything that the model cannot do.
        """
        first = self.pipelines[0]
        sampler = first.sampler(**choices)
        given = [first.check(sampler, labels, seeds, low_res=low_res, inputs=inputs)]
        if self._cascade is None:
            if upsample_steps is not None or upsample_scale is not None:
                raise RequestError(f"model '{self.name}' has no second stage", hint="Leave upsample_* out.")
        else:
            second = self._cascade.high
            upsampler = second.sampler(
                steps=upsample_steps, scale=UNGUIDED if upsample_scale is None else upsample_scale
            )
            numbers = None if given[0].labels is None else given[0].labels.tolist()
            small = np.zeros((len(given[0]), *_image_shape(first)), np.uint8)  # a placeholder
            given.append(second.check(upsampler, self._cascade.labels_of_high(numbers), seeds, low_res=small))
        schedules = [
            one.inputs.schedule(manifest.diffusion, one.sampler)
            for one, manifest in zip(given, self._manifests, strict=True)
        ]
        return Draw(
            self.pipelines,
            given,
            steps=tuple(len(schedule) for schedule in schedules),
            runs=tuple(
                runs_of(schedule, manifest.guides)
                for schedule, manifest in zip(schedules, self._manifests, strict=True)
            ),
        )


def _image_shape(pipeline: Pipeline) -> tuple[int, int, int]:
    network = pipeline.bundle.manifest.network
    return network.image_size, network.image_size, network.in_channels
