"""Plans really built with TensorRT-RTX, which needs no GPU: graphs, cache, faults, interruption, report."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from bundles import CLASS_NAMES, CLASSIFIER, UNET, exported_bundle, network
from command_faults import refused
from onnx_graphs import parse
from rtx import NEEDS_RTX

from admtrt.bundle import Bundle
from admtrt.cli import run
from admtrt.contract import GraphSpec, TensorSpec
from admtrt.errors import EngineError, OutputError
from admtrt.export.pack import bundle_from_checkpoints
from admtrt.runtime.engines import builder
from admtrt.runtime.engines.build import PlanBuilder
from admtrt.runtime.engines.builder import Phases, build_plan
from admtrt.runtime.engines.device import Gpu
from admtrt.runtime.engines.library import Library, find_library
from admtrt.runtime.engines.options import BatchProfile, BuildOptions
from admtrt.runtime.engines.plans import PlanStore
from admtrt.runtime.engines.report import fusion_report
from admtrt.runtime.engines.sources import GraphSource, graph_source

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = NEEDS_RTX
TARGETS = (80, 89)
QUICK = BuildOptions(profiles=(BatchProfile.parse("1:2:4"),), targets=(89,), optimization_level=0)
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def library() -> Library:
    return find_library("rtx")


def copied(name: str, tmp_path: Path) -> Bundle:
    """A bundle of one's own, to build into."""
    return Bundle.open(shutil.copytree(exported_bundle(name), tmp_path / name))


def update_of(bundle: Bundle) -> GraphSource:
    return graph_source(bundle, "update", "fp32")


def built(capsys: Capture, *arguments: Any) -> dict[str, Any]:
    assert run(["build", *map(str, arguments), "--json"]) == 0, capsys.readouterr().err
    shown: dict[str, Any] = json.loads(capsys.readouterr().out)
    return shown


# --- the command ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["guided", "conditional", "upsampler"])
def test_every_graph_builds_for_several_targets_in_one_plan(
    name: str, tmp_path: Path, capsys: Capture
) -> None:
    bundle = copied(name, tmp_path)
    options = [item for target in TARGETS for item in ("--target", target)]
    result = built(capsys, bundle.path, "--batch", "1:2:4", "--optimization-level", 0, *options)
    assert result["library"]["name"] == "rtx"
    graphs = [plan["record"]["key"]["graph"] for plan in result["plans"]]
    assert graphs == list(bundle.manifest.graphs)
    store = PlanStore.of(bundle)
    for plan, record in zip(result["plans"], reversed(store.records()[0]), strict=False):
        assert plan["built"]
        assert plan["record"]["key"]["options"]["targets"] == list(TARGETS)
        assert plan["record"]["report"]["kernels"] > 0
        assert store.load(record)
    assert Bundle.open(bundle.path).manifest == bundle.manifest


@pytest.fixture(scope="module")
def typed_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guided bundle with graphs for engines in fp16 and bf16."""
    path = tmp_path_factory.mktemp("typed") / "bundle"
    unet, classifier = network(UNET, class_names=CLASS_NAMES), network(CLASSIFIER)
    bundle_from_checkpoints(unet, classifier, path, engines=["fp16", "bf16"])
    return path


@pytest.mark.parametrize(("precision", "targets"), [("fp16", (75, 89)), ("bf16", TARGETS)])
def test_every_typed_graph_builds(
    precision: str, targets: tuple[int, ...], typed_bundle: Path, capsys: Capture
) -> None:
    options = [item for target in targets for item in ("--target", target)]
    options += ["--precision", precision, "--batch", "1:2:4", "--optimization-level", 0]
    records = [plan["record"] for plan in built(capsys, typed_bundle, *options)["plans"]]
    assert [record["key"]["graph"] for record in records] == list(Bundle.open(typed_bundle).manifest.graphs)
    assert {record["key"]["precision"] for record in records} == {precision}
    reports = {record["key"]["graph"]: record["report"] for record in records}
    assert reports["unet"]["attention"] == 1
    assert min(reports[name]["convolutions"] for name in ("unet", "classifier_gradient")) > 10


def test_a_place_that_cannot_be_written_is_no_fault_where_nothing_is_to_be_built(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwritable(store: PlanStore) -> None:
        raise OutputError("this place cannot be written")

    bundle = copied("guided", tmp_path)
    built(capsys, bundle.path, "--graph", "update")
    monkeypatch.setattr(PlanStore, "prepare", unwritable)
    assert [plan["built"] for plan in built(capsys, bundle.path, "--graph", "update")["plans"]] == [False]
    assert run(["build", str(bundle.path), "--library", "rtx"]) == 2


def test_a_second_build_finds_everything_and_other_options_nothing(tmp_path: Path, capsys: Capture) -> None:
    bundle = copied("guided", tmp_path)
    only = (bundle.path, "--graph", "update", "--plans", tmp_path / "cache")
    assert [plan["built"] for plan in built(capsys, *only)["plans"]] == [True]
    assert [plan["built"] for plan in built(capsys, *only)["plans"]] == [False]
    assert [plan["built"] for plan in built(capsys, *only, "--tf32")["plans"]] == [True]
    assert not (bundle.path / "plans").exists()
    assert len(list((tmp_path / "cache").glob("*.plan"))) == 2


def test_a_damaged_plan_is_built_again_and_said(tmp_path: Path, capsys: Capture) -> None:
    bundle = copied("guided", tmp_path)
    (plan,) = built(capsys, bundle.path, "--graph", "update")["plans"]
    Path(plan["file"]).write_bytes(b"short")
    assert run(["build", str(bundle.path), "--graph", "update"]) == 0
    assert "has 5 bytes" in capsys.readouterr().err
    assert Path(plan["file"]).stat().st_size == plan["record"]["plan"]["size"]


def test_people_see_plans_and_what_was_fused(tmp_path: Path, capsys: Capture) -> None:
    bundle = copied("guided", tmp_path)
    only = ["build", str(bundle.path), "--graph", "update", "--report", "--batch", "2", "--batch", "1:4:8"]
    assert run(only) == 0
    shown, said = capsys.readouterr()
    assert "2:2:2, 1:4:8" in shown
    assert "SM80 and later" in shown
    assert "normalisation + silu" in shown
    assert "the bundle has no fp32 engine graphs; building from the form for CPUs" in said
    assert run(["inspect", str(bundle.path), "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert plan["current"]
    assert plan["runs_on"].endswith("on SM80 and later")


def test_inspect_says_when_a_plan_is_of_another_graph(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")  # no cell is folded
    cache = tmp_path / "cache"
    built(capsys, copied("guided", tmp_path).path, "--graph", "unet", "--plans", cache, "--batch", "1")
    assert run(["inspect", str(exported_bundle("conditional")), "--plans", str(cache)]) == 0
    assert "of another graph" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--timing-cache", "measured"], "does not offer --timing-cache"),
        (["--hardware-compatible", "ampere_plus"], "does not offer --hardware-compatible"),
        (["--version-compatible"], "does not offer --version-compatible"),
        (["--refit"], "does not offer --refit"),
        (["--strip"], "does not offer --strip"),
        (["--target", "90"], "cannot build for SM90"),
        (["--target", "75"], "every matrix product is fp16"),
        (["--precision", "fp16"], "has no engine graphs in fp16"),
        (["--precision", "int8"], "precision 'int8' is unknown"),
        (["--graph", "vae"], "graph 'vae' is unknown; the bundle has unet, update, update_full"),
        (["--library", "trt"], "library 'trt' is unknown; expected auto, tensorrt, rtx"),
        (["--batch", "4:2"], "is neither a size nor"),
        (["--optimization-level", "9"], "'optimization_level' is 9"),
        (["--workspace", "0"], "'workspace' is 0"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    options: list[str], message: str, tmp_path: Path, capsys: Capture
) -> None:
    bundle = copied("guided", tmp_path)
    given = options if "--library" in options else [*options, "--library", "rtx"]
    assert message in refused(capsys, "build", bundle.path, *given)
    assert not (bundle.path / "plans").exists()


def test_tensorrt_without_a_gpu_is_refused(library: Library, tmp_path: Path) -> None:
    plan_builder = PlanBuilder(
        Library("tensorrt", library.module, "11.4.0"), None, PlanStore(tmp_path / "plans")
    )
    with pytest.raises(EngineError, match="this machine has none\nBuild with --library rtx"):
        plan_builder.check([], BuildOptions())


# --- progress and interruption --------------------------------------------------------------------------


def test_progress_rises_from_start_to_end(library: Library) -> None:
    seen: list[tuple[float, str]] = []
    source = update_of(Bundle.open(exported_bundle("guided")))
    build_plan(library, source, QUICK, progress=lambda done, phase: seen.append((done, phase)))
    parts = [done for done, _ in seen]
    assert parts == sorted(parts)
    assert parts[0] == 0
    assert parts[-1] > 0.8
    assert len({phase for _, phase in seen}) > 3


def test_nested_phases_share_the_step_of_their_parent() -> None:
    phases = Phases()
    assert phases.start("all", None, 2) == 0
    phases.start("first", "all", 4)
    assert phases.step("first", 0) == pytest.approx(1 / 8)
    assert phases.step("first", 3) == pytest.approx(1 / 2)
    assert phases.finish("first") == pytest.approx(1 / 2)
    phases.start("again", "all", 3)  # begins before its parent's step is counted: the part does not fall
    assert phases.step("again", 0) == pytest.approx(1 / 2)
    assert phases.step("all", 0) == pytest.approx(1 / 2 + 1 / 6)
    phases.finish("again")
    assert phases.step("all", 1) == 1


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell starts its background jobs with SIGINT ignored, and the tests may run in one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_stops_the_library_and_leaves_nothing(library: Library, tmp_path: Path) -> None:
    bundle, phases = copied("guided", tmp_path), []

    def interrupt(done: float, phase: str) -> None:
        phases.append(phase)
        if phase.startswith("stopping"):
            stopped.set()
        elif len(phases) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            assert stopped.wait(60)  # the main thread takes the signal

    stopped = threading.Event()
    plan_builder = PlanBuilder(library, None, PlanStore.of(bundle))
    with pytest.raises(KeyboardInterrupt):
        plan_builder.make(update_of(bundle), QUICK, interrupt)
    for thread in threading.enumerate():
        if thread.name == "build update":  # has told its end, and may need a moment to be gone
            thread.join(60)
            assert not thread.is_alive()
    assert "Building engine from subgraph" not in phases
    assert phases[-1].startswith("stopping after this step")
    assert not list(PlanStore.of(bundle).root.glob("*"))


def test_a_listener_that_fails_stops_the_build(library: Library) -> None:
    def fails(done: float, phase: str) -> None:
        raise OSError("the terminal is gone")

    with pytest.raises(OSError, match="the terminal is gone"):
        build_plan(library, update_of(Bundle.open(exported_bundle("guided"))), QUICK, progress=fails)


def test_an_interrupted_command_says_so(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: PlanBuilder, *arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PlanBuilder, "make", interrupted)
    assert run(["build", str(copied("guided", tmp_path).path), "--library", "rtx"]) == 130
    assert capsys.readouterr().err.endswith("\nerror: interrupted\n")  # nothing of sampling or training


# --- typed graphs and faults ----------------------------------------------------------------------------


def made(model: onnx.ModelProto, path: Path, precision: Any = "fp16") -> GraphSource:
    """A hand-written graph as a source; its contract is what the graph itself declares."""
    onnx.save(model, path)

    def tensors(values: Any) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                name=value.name,
                dtype="float32",
                shape=tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim),
            )
            for value in values
        )

    spec = GraphSpec(inputs=tensors(model.graph.input), outputs=tensors(model.graph.output))
    return GraphSource("unet", precision, path, spec, "0" * 64, engine_form=True)


ATTENTION = """g (float[N,4,64,32] q32, float[N,4,32,64] k32, float[N,4,64,32] v32) =>
    (float[N,4,64,32] out) {{
    q = Cast<to={type}>(q32) k = Cast<to={type}>(k32) v = Cast<to={type}>(v32)
    logits = MatMul(q, k) weights = Softmax<axis=-1>(logits) mixed = MatMul(weights, v)
    out = Cast<to=1>(mixed)
}}"""
NORMALISED = """g (float[N,32,16,16] x) => (float[N,32,16,16] out) {{
    typed = Cast<to={type}>(x) scale = Cast<to={type}>(ones) shift = Cast<to={type}>(zeros)
    group = GroupNormalization<num_groups=8>(typed, scale, shift)
    gate = Sigmoid(group) silu = Mul(group, gate)
    wide = Conv<pads=[1,1,1,1]>(silu, kernel)
    out = Cast<to=1>(wide)
}}"""
_TYPES = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16, "fp32": onnx.TensorProto.FLOAT}


def typed(text: str, precision: str) -> onnx.ModelProto:
    text = text.replace("\n", " ").replace(") ", ")\n").format(type=_TYPES[precision])
    rng = np.random.default_rng(0)
    model = parse(text, {"ones": np.ones(32, np.float32), "zeros": np.zeros(32, np.float32)}, opset=21)
    kernel = rng.normal(size=(32, 32, 3, 3)).astype(np.float32).ravel()
    model.graph.initializer.append(
        onnx.helper.make_tensor("kernel", _TYPES[precision], (32, 32, 3, 3), kernel)
    )
    return model


@pytest.mark.parametrize(("precision", "fused"), [("fp16", 1), ("bf16", 1), ("fp32", 0)])
def test_attention_in_four_dimensions_is_fused_in_half_precision(
    library: Library, precision: str, fused: int, tmp_path: Path
) -> None:
    source = made(typed(ATTENTION, precision), tmp_path / "g.onnx", precision)
    options = BuildOptions(targets=TARGETS, profiles=(BatchProfile.parse("1:2:4"),))
    report = fusion_report(build_plan(library, source, options).layers)
    assert report.attention == fused
    assert (report.softmax == 0) == bool(fused)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_typed_group_norm_and_convolution_build(library: Library, precision: str, tmp_path: Path) -> None:
    source = made(typed(NORMALISED, precision), tmp_path / "g.onnx", precision)
    report = fusion_report(build_plan(library, source, QUICK).layers)
    assert report.convolutions == 1
    assert report.normalisation + report.normalisation_silu == 1


def test_turing_builds_where_every_product_is_fp16(library: Library, tmp_path: Path) -> None:
    options = BuildOptions(targets=(75, 89), optimization_level=0)
    assert build_plan(library, made(typed(ATTENTION, "fp16"), tmp_path / "a.onnx"), options).plan.nbytes > 0
    wrong = made(typed(ATTENTION, "fp32"), tmp_path / "b.onnx")
    with pytest.raises(EngineError, match=r"FP32 GEMM is not supported.*\n.*leave --target 75 out"):
        build_plan(library, wrong, options)


def with_module(model: onnx.ModelProto, index: int, name: str, module: str) -> onnx.ModelProto:
    """Name a node and note its place, as PyTorch's exporter does."""
    node = model.graph.node[index]
    node.name = name
    entry = node.metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", repr(["", module, "op"])
    return model


@pytest.mark.parametrize(
    ("body", "index", "operator", "reason"),
    [
        ("y = Bernoulli(x)", 0, "Bernoulli", ""),
        ("y = Unheard(x)", 0, "Unheard", "Plugin not found"),
        ("h = Cast<to=10>(x)\n p = Mul(h, x)\n y = Cast<to=1>(p)", 1, "Mul", "types Half and Float"),
    ],
)
def test_a_node_that_the_parser_refuses_is_named_with_its_module(
    library: Library, body: str, index: int, operator: str, reason: str, tmp_path: Path
) -> None:
    model = parse(f"g (float[N,3] x) => (float[N,3] y) {{ {body} }}")
    source = made(with_module(model, index, "bad_node", "middle_block.1"), tmp_path / "g.onnx")
    with pytest.raises(EngineError) as caught:
        build_plan(library, source, QUICK)
    message = caught.value.message
    assert f"{operator} 'bad_node' (module middle_block.1)" in message
    assert reason in message
    assert "cudaError" not in message
    assert caught.value.exit_code == 2


def test_a_node_that_the_builder_refuses_is_named_with_its_module(library: Library, tmp_path: Path) -> None:
    model = with_module(typed(ATTENTION, "fp32"), 3, "first_product", "middle_block.1.attention")
    options = BuildOptions(targets=(75,))
    with pytest.raises(EngineError, match=r"at 'first_product' \(module middle_block.1.attention\): "):
        build_plan(library, made(model, tmp_path / "g.onnx"), options)


@pytest.mark.parametrize("content", [b"junk", b"", b"\x08\x0a"])
def test_a_file_that_is_no_graph_is_refused(library: Library, content: bytes, tmp_path: Path) -> None:
    source = made(parse("g (float[N,3] x) => (float[N,3] y) { y = Neg(x) }"), tmp_path / "g.onnx")
    source.path.write_bytes(content)
    with pytest.raises(EngineError, match=r"g\.onnx"):
        build_plan(library, source, QUICK)


def test_other_inputs_than_declared_are_refused(library: Library, tmp_path: Path) -> None:
    source = made(parse("g (float[N,3] x) => (float[N,3] y) { y = Neg(x) }"), tmp_path / "g.onnx")
    onnx.save(parse("g (float[N,4] x) => (float[N,4] y) { y = Neg(x) }"), source.path)
    with pytest.raises(EngineError, match=r"finds inputs \[\('x', \(-1, 4\)\)\] .* the manifest declares"):
        build_plan(library, source, QUICK)


# --- what only TensorRT honours: the flags, on the real configuration object of the other library -------


def configured(library: Library, **options: Any) -> Any:
    trt = library.module
    config = trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR)).create_builder_config()
    builder.configure(config, Library("tensorrt", trt, "11.4.0"), BuildOptions(**options))
    return config


FLAGS = ("TF32", "REFIT", "REFIT_IDENTICAL", "STRIP_PLAN", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME")


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, set()),
        ({"tf32": True}, {"TF32"}),
        ({"refit": True}, {"REFIT"}),
        ({"strip": True}, {"STRIP_PLAN", "REFIT_IDENTICAL"}),
        ({"version_compatible": True}, {"VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"}),
    ],
)
def test_each_option_sets_its_flags_and_no_other(
    library: Library, options: dict[str, Any], flags: set[str]
) -> None:
    config, kinds = configured(library, **options), library.module.BuilderFlag
    assert {flag for flag in FLAGS if config.get_flag(getattr(kinds, flag))} == flags


def test_limits_reach_the_library(library: Library) -> None:
    config, trt = configured(library, workspace=3, optimization_level=1), library.module
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 3 * 2**20
    assert config.builder_optimization_level == 1


def test_a_timing_cache_that_cannot_be_written_is_refused_before_any_work(
    library: Library, tmp_path: Path
) -> None:
    bundle = copied("guided", tmp_path)
    full = Library("tensorrt", library.module, "11.4.0")
    plan_builder = PlanBuilder(full, Gpu("Any", 89, 2**30), PlanStore.of(bundle), timing_cache=tmp_path)
    with pytest.raises(OutputError, match="it is a folder"):
        plan_builder.check([update_of(bundle)], BuildOptions(profiles=(BatchProfile.parse("1"),)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the other library has no such cache
def test_the_timing_cache_is_read_before_and_written_after(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, file = copied("guided", tmp_path), tmp_path / "measured"
    same = Library("tensorrt", library.module, "11.4.0")
    plan_builder = PlanBuilder(same, None, PlanStore.of(bundle), timing_cache=file)
    assert plan_builder.make(update_of(bundle), BuildOptions(profiles=(BatchProfile.parse("1"),))).built
    first = file.read_bytes()
    assert first
    given: list[bytes] = []
    monkeypatch.setattr(builder, "use_timing_cache", lambda config, library, content: given.append(content))
    with contextlib.suppress(Exception):  # a configuration without a cache has none to write
        plan_builder.make(update_of(bundle), BuildOptions(profiles=(BatchProfile.parse("2"),)))
    assert given == [first]


@pytest.mark.parametrize(("cache", "taken"), [(None, True), ("cache", False)])
def test_a_timing_cache_of_something_else_is_refused(library: Library, cache: Any, taken: bool) -> None:
    config = types.SimpleNamespace(
        create_timing_cache=lambda content: cache, set_timing_cache=lambda cache, ignore_mismatch: taken
    )
    with pytest.raises(EngineError, match="refuses the timing cache: it is damaged, or of another version"):
        builder.use_timing_cache(config, library, b"measured elsewhere")
