"""Guides: what is refused before anything runs, what enters where, and what belongs to a run's identity."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import SAMPLER, UNET, network, sham_bundle
from torch import Tensor, nn

from admtrt.bundle import Bundle
from admtrt.config import DiffusionConfig, UNetConfig
from admtrt.errors import CheckpointError, ConfigError, ExportError, RequestError, UserError
from admtrt.export.guides import losses
from admtrt.export.guides.check import check_loss
from admtrt.export.guides.classifiers import classifier
from admtrt.export.guides.guide import Guide, Reference
from admtrt.export.guides.named import guides_named
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.runtime.guide_targets import GuideTargets
from admtrt.runtime.image_inputs import ImageInputs
from admtrt.runtime.operators import Operator
from admtrt.runtime.pipeline import Pipeline
from admtrt.schedule.guides import GUIDE_COLUMNS, GuideChoice, GuideConfig
from admtrt.schedule.sampler import SamplerConfig
from admtrt.schedule.table import UPDATE_FULL, sampling_schedule

EVENT = (1, 8, 8)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, *EVENT)).astype(np.float32)
GUIDES = {
    "linear": losses.linear(EVENT).config,
    "tv": losses.total_variation(EVENT).config,
    "clean": GuideConfig(loss="classifier", place="score", targets={"weights": (3,)}),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return sham_bundle(
        tmp_path_factory.mktemp("guides") / "bundle", guides=GUIDES, classifier=None, class_names=()
    )


@pytest.fixture(scope="module")
def pipeline(bundle: Bundle) -> Pipeline:
    class Nothing:
        def run(self, graph: str, feeds: Any) -> Any:
            raise AssertionError(graph)

    return Pipeline(bundle, Nothing())


class _Loss(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x0: Tensor) -> Tensor:
        return self.function(x0)


class _Batch(nn.Module):
    def forward(self, x0: Tensor, level: Tensor) -> Tensor:
        return (x0.mean((1, 2, 3)) - level.mean()).square()


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (_Loss(lambda x: x.square().sum()), r"shape \[\], expected \[3\]"),
        (_Loss(lambda x: x.square().sum((1, 2))), r"shape \[3, 8\], expected \[3\]"),
        (_Loss(lambda x: x.square().sum((1, 2, 3)) / x.norm()), "mixes samples: the loss"),
        (
            _Loss(lambda x: x.flatten(1).sum(1) * x.detach().mean() * 0 + x[:1].square().sum()),
            "mixes samples",
        ),
        (_Loss(lambda x: torch.ones(len(x))), "does not depend on x0"),
        (_Loss(lambda x: x.detach().sum((1, 2, 3))), "does not depend on x0"),
        (_Loss(lambda x: (x - 5).sum((1, 2, 3)).log()), "not finite"),
        (_Loss(lambda x: x.view(-1, 7).sum(1)), "fails on 3 random images"),
        (_Loss(lambda x: 1.0), "the loss is a float; expected a tensor"),
        pytest.param(
            _Loss(lambda x: torch.linalg.matrix_exp(x).sum((1, 2, 3))),
            "guide 'mine': ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_loss_that_is_none_is_refused_at_export(loss: nn.Module, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        check_loss(Guide("mine", loss), EVENT)


def test_a_loss_that_mixes_targets_is_refused() -> None:
    with pytest.raises(ExportError, match="mixes samples"):
        check_loss(Guide("mine", _Batch(), {"level": (1,)}), EVENT)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"targets": {}}, "forward takes level besides x0, but the targets are none"),
        ({"targets": {"level": (1,), "more": (1,)}}, "targets are level, more"),
        ({"through": "x_t"}, "expected x, t first"),
        ({"through": "y"}, "expected unet or x_t"),
        ({"place": "reference"}, "cannot enter in the place 'reference'"),
        ({"normalise": "cap:0"}, "expected none, unit, eps, or cap:R"),
        ({"scale": 1e9}, "out of range"),
        ({"targets": {"level": (0,)}}, "greater than or equal to 1"),
    ],
)
def test_an_impossible_guide_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ExportError, match=said):
        Guide("mine", _Batch(), **{"targets": {"level": (1,)}, **fields})


@pytest.mark.parametrize("name", ["x", "x_t", "out", "x0_mean", "Measurement", "guide_clip", ""])
def test_names_of_targets_that_the_graph_has_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        GuideConfig.from_dict({"targets": {name: (1,)}})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sr:3", "reduces 8 pixels by 3; expected a divisor"),
        ("sr:1", "expected a divisor"),
        ("sr", "is unknown"),
        ("zoom:2", "is unknown"),
        ("blur:-1", "is unknown"),
        ("blur:1:4", "4 places do not fit"),
        ("blur:9", "places do not fit"),
        ("pool:2,sr:3", "reduces 4 pixels by 3"),
    ],
)
def test_an_operator_that_does_not_fit_is_refused(text: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        Operator(text, EVENT)


def test_operators_compose_and_keep_constants() -> None:
    both = Operator("blur:1:5,pool:2", EVENT)
    apart = Operator("pool:2", EVENT).applied(Operator("blur:1:5", EVENT).applied(IMAGES))
    np.testing.assert_allclose(both.applied(IMAGES), apart, atol=1e-6)
    for text in ("sr:2", "pool:4", "blur:1.5:5", "identity"):
        np.testing.assert_allclose(Operator(text, EVENT).applied(np.ones_like(IMAGES)), 1, atol=1e-6)
    small = Operator("sr:2", EVENT)
    assert small.result == (4, 4)
    filled = {name: one[0].astype(np.float64) for name, one in small.targets().items()}
    whole = filled["rows"] @ IMAGES @ filled["columns"].T
    np.testing.assert_allclose(whole, small.filled(small.applied(IMAGES)), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "needs the target 'measurement'"),
        ({"measurement": IMAGES, "labels": IMAGES}, "has no target 'labels'; it has measurement, mask"),
        ({"measurement": IMAGES[:, :, :4]}, r"expected float32 \[N, 1, 8, 8\] or uint8 \[N, 8, 8, 1\]"),
        ({"measurement": IMAGES.astype(np.float64)}, "is float64"),
        ({"measurement": IMAGES * np.nan}, "not finite"),
        ({"measurement": IMAGES[:0]}, "has no row"),
        ({"measurement": IMAGES, "operator": "sr:2"}, r"expected float32 \[N, 1, 4, 4\]"),
        ({"measurement": IMAGES, "operator": 2}, "expected a text"),
        ({"measurement": IMAGES, "operator": "sr:2", "rows": np.eye(8)[None]}, "exclude each other"),
        (
            {"measurement": IMAGES, "rows": np.eye(4, dtype=np.float32)[None], "columns": IMAGES[0]},
            "linear.rows",
        ),
        ({"measurement": IMAGES, "mask": IMAGES}, "values other than 0 and 1"),
        ({"measurement": IMAGES, "mask": np.ones((8, 8))}, "knows every pixel"),
        ({"measurement": IMAGES, "mask": np.zeros((8, 8))}, "knows no pixel"),
    ],
)
def test_targets_that_do_not_fit_are_refused(pipeline: Pipeline, given: dict[str, Any], said: str) -> None:
    choices = pipeline.guide_choices(["linear"])
    with pytest.raises(RequestError, match=said):
        GuideTargets({"linear": given}).checked(pipeline.bundle.manifest, choices)


def test_targets_of_another_number_than_samples_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(RequestError, match=r"2 rows of the target linear\.measurement for 3 samples"):
        pipeline(seeds=[0, 1, 2], guides={"linear": {"measurement": IMAGES}})
    sampler = pipeline.sampler(guided_by=pipeline.guide_choices(["tv"]))
    inputs = ImageInputs(targets=GuideTargets({"linear": {"measurement": IMAGES}}))
    with pytest.raises(RequestError, match="targets were given of the guide 'linear', which does not guide"):
        pipeline.draw(sampler, inputs=inputs)
    with pytest.raises(RequestError, match="guide 'clean' needs a class for each sample"):
        pipeline(seeds=[0], guides={"clean": {}})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"names": ["nothing"]}, "has no guide 'nothing'; it has linear, tv, clean"),
        ({"names": ["tv"], "scale": {"linear": 1.0}}, "scale was given of the guide 'linear'"),
        ({"names": ["tv"], "place": {"tv": "reference"}}, "cannot enter in the place"),
        ({"names": ["tv"], "place": {"tv": "everywhere"}}, "'place' is 'everywhere'"),
        ({"names": ["tv"], "scale": {"tv": float("nan")}}, "scale"),
        ({"names": ["tv"], "interval": {"tv": (3.0, 1.0)}}, "is empty"),
    ],
)
def test_choices_that_cannot_be_are_refused(pipeline: Pipeline, given: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        pipeline.guide_choices(**given)


@pytest.mark.parametrize(
    ("method", "place", "said"),
    [("dpmpp", "shift", "goes with ddpm and ddim"), ("ddim", "variance", "which ddpm alone has")],
)
def test_places_that_a_solver_has_not_are_refused(
    pipeline: Pipeline, method: str, place: Any, said: str
) -> None:
    choices = pipeline.guide_choices(["tv"], place={"tv": place})
    with pytest.raises(RequestError, match=said):
        pipeline.sampler(method=method, steps="5", guided_by=choices)
    with pytest.raises(RequestError, match="named twice"):
        pipeline.sampler(guided_by=(*choices, *choices))


def test_columns_stand_where_the_place_says() -> None:
    process = DiffusionConfig()
    plain = sampling_schedule(process, SamplerConfig(method="ddim", steps="10", scale=0.0))
    sigma = plain.sigma
    c = sigma**2 / np.hypot(1, sigma)

    def columns(place: Any, method: str = "ddim", **fields: Any) -> dict[str, np.ndarray]:
        choice = GuideChoice(name="one", scale=2.0, place=place, **fields)
        sampler = SamplerConfig(method=method, steps="10", scale=0.0, guided_by=(choice,))
        schedule = sampling_schedule(process, sampler)
        assert schedule.full
        return dict(zip(GUIDE_COLUMNS, schedule.guides["one"].columns.T.astype(np.float64), strict=True)) | {
            name: schedule.coefficients[:, UPDATE_FULL.index(name)]
            for name in ("x0_from_out", "prev_from_x0")
        }

    shift = columns("shift")
    np.testing.assert_array_equal(shift["shift"], 2.0)
    assert not any(shift[name].any() for name in GUIDE_COLUMNS if name != "shift")
    before = columns("before_clip")
    np.testing.assert_allclose(before["x0_from_grad"], 2 * c, rtol=1e-6)
    score = columns("score")
    np.testing.assert_allclose(score["x0_shift"], 2 * c, rtol=1e-6)
    np.testing.assert_allclose(score["shift"], 2 * c * score["prev_from_x0"], rtol=1e-5)
    np.testing.assert_array_equal(columns("variance", "ddpm")["guidance"], 2.0)
    reference = columns("reference")
    own = plain.coefficients[:, UPDATE_FULL.index("x0_from_out")]
    np.testing.assert_allclose(reference["x0_from_out"], 2 * own, rtol=1e-6)
    np.testing.assert_allclose(reference["x0_from_grad"], -own, rtol=1e-6)
    inside = columns("shift", interval=(0.5, 5.0))["shift"] != 0
    np.testing.assert_array_equal(inside, (sigma > 0.5) & (sigma <= 5.0))
    assert 0 < inside.sum() < 10


def test_a_manifest_refuses_guides_that_its_networks_have_not(tmp_path: Path) -> None:
    reference = GuideConfig(kind="reference", place="reference", loss="null")
    with pytest.raises(ConfigError, match="needs a null class"):
        sham_bundle(tmp_path / "bundle", guides={"null": reference})
    other = UNetConfig.from_dict(UNET.to_dict() | {"image_size": 16})
    with pytest.raises(ConfigError, match="image_size 8 but the reference 'weak' 16"):
        sham_bundle(tmp_path / "bundle", guides={"weak": reference.model_copy(update={"network": other})})


def test_a_reference_that_does_not_fit_is_refused_before_the_export(tmp_path: Path) -> None:
    done: list[str] = []
    with pytest.raises(CheckpointError, match="guide 'null' needs a null class") as refused:
        bundle_from_checkpoints(
            network(UNET), None, tmp_path / "bundle", guides=[Reference("null")], progress=done.append
        )
    assert "--null-class" in refused.value.hint
    assert not done
    assert not (tmp_path / "bundle").exists()


def test_classes_may_come_from_a_guide(pipeline: Pipeline) -> None:
    manifest = pipeline.bundle.manifest
    assert manifest.num_classes == 3
    targets = GuideTargets({"clean": {}}).checked(manifest, pipeline.guide_choices(["clean"]))
    weights = targets.of_slots(2, np.array([2, 0]), manifest.guides)["clean"]["weights"]
    np.testing.assert_array_equal(weights, [[0, 0, 1], [1, 0, 0]])


def test_checked_targets_may_be_checked_again(pipeline: Pipeline) -> None:
    """A run checks them before it begins, and every shard once more."""
    sampler = pipeline.sampler(guided_by=pipeline.guide_choices(["linear"]))
    once = pipeline.check_inputs(
        sampler, ImageInputs(targets=GuideTargets({"linear": {"measurement": IMAGES}}))
    )
    assert once.targets.lengths["rows of the target linear.measurement"] == 2
    assert pipeline.check_inputs(sampler, once.part(slice(1))).identity["targets"].keys() == {
        "linear.measurement", "linear.mask", "linear.rows", "linear.columns"
    }  # fmt: skip


def test_targets_belong_to_the_identity_of_a_run(pipeline: Pipeline) -> None:
    sampler = pipeline.sampler(guided_by=pipeline.guide_choices(["linear"]))

    def identity(images: np.ndarray) -> dict[str, Any]:
        inputs = ImageInputs(targets=GuideTargets({"linear": {"measurement": images}}))
        return pipeline.check_inputs(sampler, inputs).identity

    assert identity(IMAGES) == identity(IMAGES.copy())
    assert (
        identity(IMAGES)["targets"]["linear.measurement"]
        != identity(-IMAGES)["targets"]["linear.measurement"]
    )
    assert SAMPLER.to_dict().keys() == SamplerConfig().to_dict().keys()  # no new keys without guides


def test_soft_labels_and_several_classifiers() -> None:
    torch.manual_seed(0)
    two = [nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval() for _ in range(2)]
    guide = classifier(two, 3)
    x, weights = torch.randn(2, *EVENT), torch.tensor([[0.5, 0.5, -1.0], [0.0, 2.0, 0.0]])
    assert guide.config.place == "before_clip"  # behind the bound, samples leave the data at small scales
    mean = torch.stack([torch.log_softmax(one(x), -1) for one in two]).mean(0)
    assert torch.allclose(guide.loss(x, weights), -(mean * weights).sum(-1))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nothing", "there is no built-in guide 'nothing'"),
        ("mine=linears", "is not of the form NAME"),
        ("tv=file.npz", "the built-in guide 'tv' takes no file"),
        ("cosine", "needs a file: an image encoder's ONNX file"),
        ("mine=no_such_module:make", "cannot be imported: No module named 'no_such_module'"),
        ("mine=json:none", "cannot be imported: module 'json' has no attribute 'none'"),
        ("mine=json:__name__", "json:__name__ gives a str; expected an admtrt.Guide"),
        ("convolution=none.npz", "No such file"),
        ("cosine=none.onnx", "cannot read none.onnx as an ONNX file"),
    ],
)
def test_guides_that_cannot_be_named_are_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        guides_named([text], network(UNET))


def test_guides_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_module_of_mine.py").write_text(
        "import torch\nfrom admtrt import Guide\n\n\n"
        "class Mean(torch.nn.Module):\n"
        "    def forward(self, x0, level):\n"
        "        return (x0.mean((1, 2, 3)) - level[:, 0]) ** 2\n\n\n"
        "def make(shape):\n"
        "    return Guide('any', Mean(), targets={'level': (shape[0],)}, place='score', scale=3.0)\n"
    )
    np.savez(tmp_path / "kernel.npz", np.ones((3, 3)) / 9)
    monkeypatch.chdir(tmp_path)
    texts = ["linear", "photo=linear", "blur=convolution:kernel.npz", "mine=a_module_of_mine:make", "null"]
    made = {guide.name: guide.config for guide in guides_named(texts, network(UNET))}
    assert list(made) == ["linear", "photo", "blur", "mine", "null"]
    assert made["photo"].loss == "linear"
    assert made["mine"] == GuideConfig(place="score", scale=3.0, targets={"level": (1,)})
    assert made["null"].kind == "reference"
