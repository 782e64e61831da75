"""`admtrt verify` passes for a correct bundle and identifies every planted defect."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bundles import edit_manifest, replace_graph
from onnx import helper
from verified import CLASSIFIER, TINY, append_ops, network

from admtrt.bundle import Bundle
from admtrt.config import DiffusionConfig
from admtrt.errors import CheckpointError, RequestError
from admtrt.export.graphs import EXAMPLE_BATCH
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.models.checkpoint import LoadedNetwork
from admtrt.runtime.backends.choice import BackendChoice
from admtrt.verify.inputs import BATCHES
from admtrt.verify.record import Recorder
from admtrt.verify.reference import Reference
from admtrt.verify.report import Row, VerificationReport
from admtrt.verify.stages import verify_bundle

GRAPH_ROWS = ["unet: out", "classifier_gradient: grad", "classifier_gradient: log_prob"] + [
    f"update ({name}): {output}"
    for name in ("ddim", "ddim eta 0.5", "ddpm")
    for output in ("x_prev", "pred_x0")
]
SMALL_ROWS = [
    *(f"update_full: {output}" for output in ("x_prev", "pred_x0", "saved_next")),
    "threshold: r", "edit: x_edited", "edit_low_pass: x_edited",
]  # fmt: skip
STEPS = 4


@pytest.fixture(scope="module")
def unet() -> LoadedNetwork:
    return network("unet", TINY)


@pytest.fixture(scope="module")
def classifier() -> LoadedNetwork:
    return network("classifier", CLASSIFIER)


@pytest.fixture(scope="module")
def good(unet: LoadedNetwork, classifier: LoadedNetwork, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_from_checkpoints(unet, classifier, tmp_path_factory.mktemp("verify") / "bundle")


@pytest.fixture
def altered(good: Bundle, tmp_path: Path) -> Path:
    """A copy of the bundle to be spoilt."""
    return Path(shutil.copytree(good.path, tmp_path / "altered"))


def run(
    bundle: Bundle | Path, unet: LoadedNetwork, classifier: LoadedNetwork | None, **options: Any
) -> VerificationReport:
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    return verify_bundle(opened, unet, classifier, **({"steps": STEPS} | options))


def failed(report: VerificationReport, stage: str) -> list[str]:
    return [row.what for row in report.failures if row.stage == stage]


def find(report: VerificationReport, what: str) -> Row:
    (row,) = (row for row in report.rows if row.what == what)
    return row


def measured(report: VerificationReport) -> list[Row]:
    return [row for row in report.rows if row.stage not in ("build", "manifest")]


def test_faithful_bundle_passes(good: Bundle, unet: LoadedNetwork, classifier: LoadedNetwork) -> None:
    stages: list[str] = []
    report = run(good, unet, classifier, steps=10, progress=stages.append)
    assert report.passed, report.failures
    assert report.exit_code == 0
    assert stages == ["sessions", "graphs", "steps", "trajectories"]
    assert [row.what for row in report.rows if row.stage == "graph"] == GRAPH_ROWS + SMALL_ROWS
    for stage, count in {"build": 1, "manifest": 1, "step": 4, "trajectory": 6, "image": 3}.items():
        assert sum(row.stage == stage for row in report.rows) == count
    for row in measured(report):
        assert row.error is not None
        assert row.where is not None
        assert row.where.batch in BATCHES
        small = row.what in SMALL_ROWS
        assert row.tolerance == (1 if row.stage == "image" else 1e-5 if small else 1e-4)
    lengths = {name: len(errors) for name, errors in report.drift.items()}
    assert lengths == {"ddpm": 10, "ddim": 10, "dpmpp": 10}
    # Two implementations that never differ by a bit would be one and the same.
    assert 0 < max(max(errors) for errors in report.drift.values()) <= 1e-4


def test_traced_batch_is_avoided() -> None:
    assert EXAMPLE_BATCH not in BATCHES


def test_seed_changes_the_inputs(good: Bundle, unet: LoadedNetwork, classifier: LoadedNetwork) -> None:
    first, again, other = (run(good, unet, classifier, steps=2, seed=seed) for seed in (0, 0, 7))
    assert first.drift == again.drift
    assert first.drift != other.drift
    with pytest.raises(RequestError):
        run(good, unet, classifier, seed=-1)


@pytest.mark.parametrize("steps", [0, 1])
def test_too_few_steps_are_refused(
    good: Bundle, unet: LoadedNetwork, classifier: LoadedNetwork, steps: int
) -> None:
    with pytest.raises(RequestError):
        run(good, unet, classifier, steps=steps)


@pytest.mark.parametrize(
    ("kind", "section", "diffusion"),
    [
        ("upsampler", TINY | {"low_res_size": 4}, {}),
        ("unet", TINY | {"num_classes": 3}, {}),
        ("unet", TINY | {"learn_sigma": False}, {"variance_type": "fixed_small", "mean_type": "x_0"}),
    ],
    ids=["upsampler", "class_conditional", "fixed_sigma"],
)
def test_kinds_without_classifier(
    kind: str, section: dict[str, Any], diffusion: dict[str, Any], tmp_path: Path
) -> None:
    generator = network(kind, section, diffusion=diffusion, scale=0.0)
    report = run(bundle_from_checkpoints(generator, None, tmp_path / "bundle"), generator, None)
    assert report.passed, report.failures
    graphs = {row.what.split(":")[0].split(" ")[0] for row in report.rows if row.stage == "graph"}
    assert graphs == {"unet", "update", "update_full", "threshold", "edit", "edit_low_pass"}
    row = find(report, "unet: out")
    assert row.where is not None
    assert (row.where.y is not None) == ("num_classes" in section)


def test_class_conditional_with_classifier(classifier: LoadedNetwork, tmp_path: Path) -> None:
    generator = network("unet", TINY | {"num_classes": 5})
    report = run(bundle_from_checkpoints(generator, classifier, tmp_path / "bundle"), generator, classifier)
    assert report.passed, report.failures


@pytest.fixture(scope="module", params=["linear", pytest.param("cosine", marks=pytest.mark.slow)])
def unguided(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, LoadedNetwork]:
    """The first step is long and amplifies rounding of the outputs, by 157 (linear) or 2e4 (cosine)."""
    section = TINY | {"image_size": 16, "in_channels": 3, "attention_resolutions": []}
    generator = network("unet", section, diffusion={"schedule": request.param}, scale=0.0)
    path = tmp_path_factory.mktemp("unguided") / "bundle"
    return bundle_from_checkpoints(generator, None, path), generator


def test_amplified_rounding_is_judged_by_float64(unguided: tuple[Bundle, LoadedNetwork]) -> None:
    """Bundles of both schedules pass with any seed, although rounding may exceed the tolerance of float32."""
    reports = [run(*unguided, None, steps=2, seed=seed) for seed in (0, 100, 200, 300)]
    assert not [row for report in reports for row in report.failures]
    rows = [row for report in reports for row in report.rows if row.stage in ("step", "trajectory")]
    judged = [row for row in rows if row.what.endswith(", against float64")]
    assert judged
    assert all(row.tolerance is not None and 1e-4 <= row.tolerance <= 2e-2 for row in judged)
    assert all(row.tolerance == 1e-4 for row in rows if row not in judged)


def test_small_defect_fails_where_float64_judges(unguided: tuple[Bundle, LoadedNetwork]) -> None:
    """An output moved by so little that the graph passes, which is still more than its rounding."""
    bundle, generator = unguided
    if generator.config.diffusion.schedule != "linear":
        pytest.skip("clipping of x_0 leaves too few pixels to carry it")
    module = copy.deepcopy(generator.module)
    module.state_dict()["out.2.bias"][0] += 1e-4
    report = run(bundle, LoadedNetwork(module, generator.config), None, steps=2)
    assert not failed(report, "graph")
    assert [what for what in failed(report, "step") if what.endswith(", against float64")]


def test_float64_is_asked_only_where_the_bar_is_exceeded(
    unguided: tuple[Bundle, LoadedNetwork],
) -> None:
    bundle, generator = unguided
    module = copy.deepcopy(generator.module)
    module.state_dict()["input_blocks.0.0.weight"].flatten()[0] += 1e-2
    stages: list[str] = []
    report = run(bundle, LoadedNetwork(module, generator.config), None, steps=10, progress=stages.append)
    assert stages.count("networks in float64") == 1
    assert failed(report, "step")
    assert failed(report, "trajectory")


# Every parameter that reaches an output may be the altered one; these lie at either end and in the middle.
@pytest.mark.parametrize(
    "key",
    [
        "middle_block.1.qkv.weight",
        *(pytest.param(key, marks=pytest.mark.slow) for key in ("input_blocks.0.0.weight", "out.2.bias")),
    ],
)
def test_altered_unet_weight_fails(
    good: Bundle, unet: LoadedNetwork, classifier: LoadedNetwork, key: str
) -> None:
    module = copy.deepcopy(unet.module)
    module.state_dict()[key].flatten()[0] += 1e-2
    report = run(good, LoadedNetwork(module, unet.config), classifier)
    assert report.exit_code == 1
    assert failed(report, "graph") == ["unet: out"]
    assert failed(report, "step")
    assert failed(report, "trajectory")


def test_altered_classifier_weight_fails(
    good: Bundle, unet: LoadedNetwork, classifier: LoadedNetwork
) -> None:
    module = copy.deepcopy(classifier.module)
    module.state_dict()["input_blocks.0.0.weight"].flatten()[0] += 1e-2
    report = run(good, unet, LoadedNetwork(module, classifier.config))
    assert report.exit_code == 1
    assert failed(report, "graph") == ["classifier_gradient: grad", "classifier_gradient: log_prob"]
    assert failed(report, "trajectory")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("variance_type", "learned"),
        ("mean_type", "x_0"),
        pytest.param("schedule", "cosine", marks=pytest.mark.slow),  # of a command's exit codes as well
        pytest.param("steps", 999, marks=pytest.mark.slow),
    ],
)
def test_altered_schedule_fails(
    altered: Path, unet: LoadedNetwork, classifier: LoadedNetwork, key: str, value: Any
) -> None:
    edit_manifest(altered, lambda data: data["diffusion"].update({key: value}))
    report = run(altered, unet, classifier)
    assert report.exit_code == 1
    assert f"{key} is {value!r} in the bundle" in find(report, "diffusion").detail
    # Not only the manifest differs, but also the results of the runtime.
    assert failed(report, "graph")
    assert failed(report, "step")
    assert not find(report, "unet: out").detail


def test_rescaled_timesteps_fail_in_the_steps(
    altered: Path, unet: LoadedNetwork, classifier: LoadedNetwork, tmp_path: Path
) -> None:
    """The graphs and the update are correct: only the t that the runtime passes to the networks is wrong."""
    diffusion = DiffusionConfig(steps=500, rescale_timesteps=False)
    config = unet.config.model_copy(update={"diffusion": diffusion})
    edit_manifest(altered, lambda data: data["diffusion"].update({"steps": 500, "rescale_timesteps": True}))
    report = run(altered, LoadedNetwork(unet.module, config), classifier)
    assert report.exit_code == 1
    assert not failed(report, "graph")
    assert failed(report, "step")
    assert failed(report, "trajectory")


def test_flipped_sign_of_the_gradient_fails(
    altered: Path, unet: LoadedNetwork, classifier: LoadedNetwork
) -> None:
    append_ops(altered, "classifier_gradient", "grad", "Neg")
    report = run(altered, unet, classifier)
    assert report.exit_code == 1
    assert failed(report, "graph") == ["classifier_gradient: grad"]
    assert find(report, "classifier_gradient: grad").error == pytest.approx(2, abs=1e-3)
    assert len(failed(report, "step")) == 4
    assert failed(report, "trajectory")
    assert failed(report, "image")


def test_garbage_graph_is_a_build_failure(
    altered: Path, unet: LoadedNetwork, classifier: LoadedNetwork
) -> None:
    replace_graph(altered, "unet", b"\x0a\x07garbage")  # reads as a message, though not as a graph
    report = run(altered, unet, classifier)
    assert report.exit_code == 3
    assert [row.status for row in report.rows] == ["build"]
    assert "unet.onnx" in report.rows[0].detail
    assert report.drift == {}


def test_unknown_operator_is_a_build_failure(
    altered: Path, unet: LoadedNetwork, classifier: LoadedNetwork
) -> None:
    append_ops(altered, "update", "x_prev", "NoSuchOperator")
    assert run(altered, unet, classifier).exit_code == 3


def test_nan_is_a_run_failure(altered: Path, unet: LoadedNetwork, classifier: LoadedNetwork) -> None:
    append_ops(altered, "unet", "out", "Exp", "Neg", "Log")
    report = run(altered, unet, classifier)
    assert report.exit_code == 4
    assert {row.status for row in report.failures} == {"run"}
    assert failed(report, "graph") == ["unet: out"]  # the other graphs are still compared
    assert "not finite" in find(report, "unet: out").detail
    assert len(failed(report, "step")) == 4
    assert "not finite" in find(report, "ddpm: final x_0").detail
    assert report.drift == {"ddpm": (), "ddim": (), "dpmpp": ()}


def test_raising_graph_is_a_run_failure(
    altered: Path, unet: LoadedNetwork, classifier: LoadedNetwork
) -> None:
    """An index beyond a table's end, which only running can find."""
    model = onnx.load(altered / "unet.onnx")
    producer = next(node for node in model.graph.node if "out" in node.output)
    producer.output[0] = "before"
    for name, values in (("table", np.ones(1, np.float32)), ("one", np.ones((), np.float32))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    model.graph.node.extend(
        [
            helper.make_node("ReduceMax", ["t"], ["largest"], keepdims=0),
            helper.make_node("Add", ["largest", "one"], ["beyond"]),
            helper.make_node("Cast", ["beyond"], ["index"], to=onnx.TensorProto.INT64),
            helper.make_node("Gather", ["table", "index"], ["factor"]),
            helper.make_node("Mul", ["before", "factor"], ["out"]),
        ]
    )
    replace_graph(altered, "unet", model.SerializeToString())
    report = run(altered, unet, classifier)
    assert report.exit_code == 4
    assert "raised" in find(report, "unet: out").detail


@pytest.mark.parametrize(("old", "new"), [("log_prob", "log_p"), ("grad", "gradient")])
def test_renamed_output_is_a_build_failure(
    altered: Path, unet: LoadedNetwork, classifier: LoadedNetwork, old: str, new: str
) -> None:
    append_ops(altered, "classifier_gradient", old, "Identity")
    model = onnx.load(altered / "classifier_gradient.onnx")
    model.graph.node[-1].output[0] = new
    next(output for output in model.graph.output if output.name == old).name = new
    replace_graph(altered, "classifier_gradient", model.SerializeToString())
    report = run(altered, unet, classifier)
    assert report.exit_code == 3
    assert f"{new} float32[N" in report.rows[0].detail


def test_checkpoint_of_another_network_is_refused(
    good: Bundle, unet: LoadedNetwork, classifier: LoadedNetwork
) -> None:
    with pytest.raises(CheckpointError, match="--classifier"):
        run(good, unet, None)
    with pytest.raises(CheckpointError, match=r"graph 'unet' has .*y int64\[N\]"):
        run(good, network("unet", TINY | {"num_classes": 5}), classifier)


def test_classifier_without_a_place_is_refused(
    unguided: tuple[Bundle, LoadedNetwork], classifier: LoadedNetwork
) -> None:
    with pytest.raises(CheckpointError, match="Leave out --classifier"):
        run(*unguided, classifier)


def test_labels_avoid_certainty(unet: LoadedNetwork, classifier: LoadedNetwork) -> None:
    module = copy.deepcopy(classifier.module)
    module.state_dict()["out.2.c_proj.bias"][2] += 50  # now certain of class 2, and so near p = 1
    reference = Reference(unet, LoadedNetwork(module, classifier.config))
    x, t = np.zeros((3, 1, 8, 8), np.float32), np.zeros(3, np.float32)
    assert reference.uncertain_labels(x, t, np.array([1, 2, 4]), 5).tolist() == [1, 3, 4]


def test_impossible_steps_are_refused_before_any_work(
    good: Bundle, unet: LoadedNetwork, classifier: LoadedNetwork
) -> None:
    started: list[str] = []
    with pytest.raises(RequestError, match="'0'"):
        verify_bundle(good, unet, classifier, steps=0, progress=started.append)
    assert not started


def test_another_backend(good: Bundle, unet: LoadedNetwork, classifier: LoadedNetwork) -> None:
    report = run(good, unet, classifier, backend=BackendChoice("openvino"))
    assert report.passed, report.failures
    said: list[Any] = []
    assert run(good, unet, classifier, backend=BackendChoice("auto"), backend_progress=said.append).passed
    assert str(said[-1]).startswith("auto: unet on ")


@pytest.mark.parametrize("graphs", [["update_full"], pytest.param([], marks=pytest.mark.slow, id="all")])
def test_what_polygraphy_is_given(
    good: Bundle, unet: LoadedNetwork, classifier: LoadedNetwork, tmp_path: Path, graphs: list[str]
) -> None:
    """Polygraphy's command compares every graph with PyTorch's saved outputs and detects an altered one."""
    recorder = Recorder(tmp_path)
    run(good, unet, classifier, record=recorder.add)
    saved = recorder.write()
    assert len(saved) == 2 * len(good.manifest.graphs)

    def compared(graph: str, path: Path) -> int:
        files = [str(tmp_path / f"{graph}.{kind}.json") for kind in ("inputs", "outputs")]
        program = str(Path(sys.executable).with_name("polygraphy"))
        command = [program, "run", str(path), "--onnxrt", "--atol", "1e-4"]
        command += ["--rtol", "1e-4", "--load-inputs", files[0], "--load-outputs", files[1]]
        return subprocess.run(command, capture_output=True, check=False).returncode

    for graph in graphs or good.manifest.graphs:
        assert compared(graph, good.graph_path(graph)) == 0, graph
    altered = Path(shutil.copytree(good.path, tmp_path / "altered"))
    append_ops(altered, "classifier_gradient", "grad", "Neg")
    assert compared("classifier_gradient", altered / "classifier_gradient.onnx") != 0
