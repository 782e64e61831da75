"""Plans on disk: every field of the build is in the key, and damaged plans are never returned."""

from __future__ import annotations

import json
import threading
import types
from pathlib import Path
from typing import Any

import pytest
from bundles import sham_bundle

from admtrt.errors import BundleError, EngineError, OutputError, PlanError
from admtrt.runtime.engines.device import Gpu
from admtrt.runtime.engines.library import Library
from admtrt.runtime.engines.match import usable_plans
from admtrt.runtime.engines.options import BatchProfile, BuildOptions
from admtrt.runtime.engines.plans import PlanKey, PlanRecord, PlanStore, plan_key
from admtrt.runtime.engines.report import fusion_report
from admtrt.runtime.engines.sources import GraphSource, graph_source

TENSORRT = Library("tensorrt", types.SimpleNamespace(), "11.4.0")
SM = types.SimpleNamespace(__members__={"SM75": 1, "SM80": 2, "SM86": 3, "SM89": 4})
RTX = Library("rtx", types.SimpleNamespace(ComputeCapability=SM), "1.7.1")
ADA = Gpu(name="NVIDIA L4", compute_capability=89, memory=24 * 2**30)
OTHER_ADA = Gpu(name="NVIDIA L40S", compute_capability=89, memory=48 * 2**30)
HOPPER = Gpu(name="NVIDIA H100", compute_capability=90, memory=80 * 2**30)
TURING = Gpu(name="Tesla T4", compute_capability=75, memory=16 * 2**30)
PLAN = bytes(range(256)) * 8
REPORT = fusion_report([])


def source(digest: str = "a" * 64, **fields: Any) -> GraphSource:
    given = {
        "graph": "unet",
        "precision": "fp16",
        "path": Path("unet.onnx"),
        "spec": None,
        "engine_form": True,
    }
    return GraphSource(digest=digest, **given | fields)


def key(library: Library = TENSORRT, gpu: Gpu | None = ADA, **options: Any) -> PlanKey:
    return plan_key(source(), BuildOptions(**options), library, gpu)


def put(store: PlanStore, chosen: PlanKey) -> PlanRecord:
    return store.put(chosen, PLAN, seconds=1.5, report=REPORT)


def parsed(*texts: str) -> tuple[BatchProfile, ...]:
    return tuple(BatchProfile.parse(text) for text in texts)


# --- the key --------------------------------------------------------------------------------------------

CHANGES: dict[str, dict[str, Any]] = {
    "graph": {"graph": "update"},
    "precision": {"precision": "bf16"},
    "onnx": {"onnx": "b" * 64},
    "library": {"library": "rtx"},
    "version": {"version": "11.4.1"},
    "gpu": {"gpu": "NVIDIA L40S (SM89)"},
    "recipe": {"recipe": 2},
}
OPTION_CHANGES: dict[str, Any] = {
    "profiles": parsed("1:4:8"),
    "targets": (89,),
    "workspace": 512,
    "optimization_level": 4,
    "tf32": True,
    "version_compatible": True,
    "hardware_compatible": "ampere_plus",
    "refit": True,
    "strip": True,
}


def test_every_field_has_a_change_below() -> None:
    assert {*CHANGES, "options"} == set(PlanKey.model_fields)
    assert set(OPTION_CHANGES) == set(BuildOptions.model_fields)


@pytest.mark.parametrize("field", [*CHANGES, *OPTION_CHANGES])
def test_no_field_can_change_without_a_new_plan(field: str, tmp_path: Path) -> None:
    store = PlanStore(tmp_path)
    built = key()
    put(store, built)
    if field in CHANGES:
        changed = built.model_copy(update=CHANGES[field])
    else:
        options = built.options.model_copy(update={field: OPTION_CHANGES[field]})
        changed = built.model_copy(update={"options": options})
    assert changed.digest != built.digest
    assert store.find(changed) is None
    assert store.find(built) is not None


def test_the_order_and_number_of_profiles_is_part_of_the_key() -> None:
    keys = [key(profiles=parsed(*texts)) for texts in (["1:4:16"], ["1", "1:4:16"], ["1:4:16", "1"])]
    assert len({one.digest for one in keys}) == 3


def test_the_key_of_a_build_is_the_same_in_every_process() -> None:
    """A changed way of hashing would lose every plan on every disk."""
    assert key().digest == "d27f41e8bdcd3aa5103e6856ae64758e5e9f5717c666b71c7ce2c129c98af51b"


@pytest.mark.parametrize(
    ("options", "gpu"),
    [
        ({}, "NVIDIA L4 (SM89)"),
        ({"hardware_compatible": "same_compute_capability"}, "SM89"),
        ({"hardware_compatible": "ampere_plus"}, "SM80 and later"),
    ],
)
def test_a_tensorrt_plan_is_bound_to_what_it_was_built_for(options: dict[str, Any], gpu: str) -> None:
    assert key(**options).gpu == gpu
    assert key(RTX).gpu is None


def test_the_content_of_the_onnx_file_and_of_its_weights_counts(tmp_path: Path) -> None:
    weights = bytes([0x0A, 8]) + b"location" + bytes([0x12, 8]) + b"unet.bin"
    tensor = bytes([0x6A, len(weights)]) + weights  # external_data
    graph = bytes([0x2A, len(tensor)]) + tensor  # initializer
    model = b"\x08\x0a" + bytes([0x3A, len(graph)]) + graph
    digests = []
    for index, content in enumerate((b"1", b"1", b"2")):
        bundle = sham_bundle(tmp_path / str(index), graph=model, extra={"unet.bin": content})
        digests.append(graph_source(bundle, "unet", "fp32").digest)
    assert digests[0] == digests[1] != digests[2]
    other = sham_bundle(tmp_path / "other", graph=model + b"\x10\x01", extra={"unet.bin": b"1"})
    assert graph_source(other, "unet", "fp32").digest != digests[0]


def test_fp32_falls_back_to_the_form_for_cpus_and_fp16_does_not(tmp_path: Path) -> None:
    bundle = sham_bundle(tmp_path / "b")
    found = graph_source(bundle, "unet", "fp32")
    assert (found.engine_form, found.path) == (False, bundle.path / "unet.onnx")
    with pytest.raises(BundleError, match="has no engine graphs in fp16"):
        graph_source(bundle, "unet", "fp16")


# --- the store ------------------------------------------------------------------------------------------


def test_what_was_put_is_found_and_loaded(tmp_path: Path) -> None:
    store = PlanStore(tmp_path / "new" / "folder")
    assert store.records() == ([], [])
    assert store.find(key()) is None
    record = put(store, key())
    assert store.find(key()) == record == store.records()[0][0]
    assert store.load(record) == PLAN
    assert (record.plan.size, record.seconds) == (len(PLAN), 1.5)
    assert sorted(path.name for path in store.root.iterdir()) == [
        f"{key().digest}.json", f"{key().digest}.plan",
    ]  # fmt: skip


def test_a_newer_build_replaces_the_older(tmp_path: Path) -> None:
    store = PlanStore(tmp_path)
    put(store, key())
    record = store.put(key(), b"newer", seconds=0.0, report=REPORT)
    assert store.load(record) == b"newer"
    assert store.records() == ([record], [])


def test_of_two_builders_of_one_plan_each_leaves_plan_and_record_together(tmp_path: Path) -> None:
    """Without the lock, the record of one process would sometimes be stored with the plan of the other."""
    store = PlanStore(tmp_path)
    plans = [bytes([index]) * 1000 for index in range(4)]

    def build(plan: bytes) -> None:
        for _ in range(10):
            store.put(key(), plan, seconds=0.0, report=REPORT)

    threads = [threading.Thread(target=build, args=(plan,)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (record,), faults = store.records()
    assert not faults
    assert store.load(record) in plans
    assert len(list(tmp_path.iterdir())) == 2


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def altered(path: Path) -> None:
    path.write_bytes(b"\xff" + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncated, "has 2047 bytes, its record says 2048"),
        (altered, r"has SHA-256 .*, its record says .*; it is not executed"),
        (Path.unlink, "cannot read the plan .*No such file"),
    ],
)
def test_a_damaged_plan_is_never_handed_out(damage: Any, message: str, tmp_path: Path) -> None:
    store = PlanStore(tmp_path)
    record = put(store, key())
    damage(store.path(key()))
    for attempt in (lambda: store.find(key()), lambda: store.load(record)):
        with pytest.raises(PlanError, match=message):
            attempt()


def edited(**changes: Any) -> Any:
    def edit(path: Path) -> None:
        data = json.loads(path.read_text())
        for where, value in changes.items():
            *parents, last = where.split("__")
            target = data
            for parent in parents:
                target = target[parent]
            target[last] = value
        path.write_text(json.dumps(data))

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edited(key__precision="bf16"), "was altered: its fields belong to the name"),
        (edited(key__options__tf32=True), "was altered: its fields belong to the name"),
        (edited(plan__size=3), "has 2048 bytes, its record says 3"),
        (edited(plan__sha256="0" * 64), "its record says 000000000000"),
        (edited(schema_version=2), "'schema_version' is 2"),
        (edited(surprise=1), "unknown key 'surprise'"),
        (lambda path: path.write_text("[]"), "is no record of a plan"),
        (lambda path: path.write_text("{"), "is not valid JSON"),
        (lambda path: path.write_bytes(b"\xff"), "is not valid JSON"),
        (lambda path: path.write_text("[" * 100_000), "is not valid JSON"),
    ],
)
def test_a_damaged_record_is_named(damage: Any, message: str, tmp_path: Path) -> None:
    store = PlanStore(tmp_path)
    put(store, key())
    damage(store.path(key()).with_suffix(".json"))
    with pytest.raises(PlanError, match=message):
        store.find(key())


def test_a_plan_under_another_name_is_not_its_plan(tmp_path: Path) -> None:
    """A record copied to another key does not lend it its plan."""
    store, wanted = PlanStore(tmp_path), key(workspace=512)
    put(store, key())
    for suffix in (".json", ".plan"):
        store.path(key()).with_suffix(suffix).rename(store.path(wanted).with_suffix(suffix))
    with pytest.raises(PlanError, match="was altered"):
        store.find(wanted)


def test_a_kill_between_the_two_files_leaves_no_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PlanStore(tmp_path)
    put(store, key())
    calls = []

    def killed(self: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(self, target)

    real = Path.replace
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        store.put(key(), b"newer", seconds=0.0, report=REPORT)
    assert store.find(key()) is None
    assert [path.suffix for path in tmp_path.iterdir()] == [".plan"]


def test_a_place_that_cannot_be_written_is_named_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"cannot write .*file.*\nName another folder with --plans"):
        PlanStore(tmp_path / "file").prepare()


def test_files_of_others_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text("not ours")
    store = PlanStore(tmp_path)
    record = put(store, key())
    assert store.records() == ([record], [])


# --- which plan runs here -------------------------------------------------------------------------------


def usable(store: PlanStore, **fields: Any) -> list[PlanRecord]:
    given = {"source": source(), "library": TENSORRT, "gpu": ADA} | fields
    return usable_plans(store, given["source"], given["library"], given["gpu"])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"source": source(precision="bf16")}, "is in fp16"),
        ({"source": source("b" * 64)}, "was built from another ONNX file"),
        ({"library": RTX}, "is a plan of tensorrt"),
        ({"library": Library("tensorrt", None, "11.4.1")}, "was built by version 11.4.0"),
        ({"gpu": OTHER_ADA}, r"was built for NVIDIA L4 \(SM89\)"),
    ],
)
def test_a_plan_for_something_else_is_refused_with_the_difference(
    fields: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    store = PlanStore(tmp_path)
    record = put(store, key())
    assert usable(store) == [record]
    with pytest.raises(PlanError, match=rf"has no plan of graph 'unet' .*{key().digest[:12]} .*{reason}"):
        usable(store, **fields)


def test_a_plan_of_another_recipe_is_refused(tmp_path: Path) -> None:
    store = PlanStore(tmp_path)
    put(store, key().model_copy(update={"recipe": 0}))
    with pytest.raises(PlanError, match="another version of admtrt"):
        usable(store)


def test_a_store_without_the_graph_says_how_to_build_it(tmp_path: Path) -> None:
    put(PlanStore(tmp_path), key())
    with pytest.raises(PlanError, match="admtrt build BUNDLE --library tensorrt --precision fp16"):
        usable(PlanStore(tmp_path), source=source(graph="update"))


@pytest.mark.parametrize(
    ("options", "gpu", "runs"),
    [
        ({"hardware_compatible": "same_compute_capability"}, OTHER_ADA, True),
        ({"hardware_compatible": "same_compute_capability"}, HOPPER, False),
        ({"hardware_compatible": "ampere_plus"}, HOPPER, True),
        ({"hardware_compatible": "ampere_plus"}, TURING, False),
        ({}, HOPPER, False),
    ],
)
def test_hardware_compatible_plans(options: Any, gpu: Gpu, runs: bool, tmp_path: Path) -> None:
    put(PlanStore(tmp_path), key(**options))
    if runs:
        assert usable(PlanStore(tmp_path), gpu=gpu)
    else:
        with pytest.raises(PlanError, match="was built for"):
            usable(PlanStore(tmp_path), gpu=gpu)


@pytest.mark.parametrize(
    ("version", "lean", "runs"),
    [
        ("11.5.0", True, True),
        ("12.0.1", True, True),
        ("11.4.0", True, True),
        ("11.4.0", False, False),
        ("11.5.0", False, False),
        ("11.3.9", True, False),
    ],
)
def test_version_compatible_plans_run_on_later_versions_by_the_lean_runtime_of_their_own(
    version: str, lean: bool, runs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"11.4.0": tmp_path / "libnvinfer_lean.so"} if lean else {}
    monkeypatch.setattr("admtrt.runtime.engines.match.lean_runtime", known.get)
    put(PlanStore(tmp_path), key(version_compatible=True))
    library = Library("tensorrt", None, version)
    if runs:
        assert usable(PlanStore(tmp_path), library=library)
    else:
        with pytest.raises(PlanError, match=r"was built by version 11\.4\.0, whose lean runtime it needs"):
            usable(PlanStore(tmp_path), library=library)


@pytest.mark.parametrize("content", ["{}", "not JSON", '{"schema_version": 99}'])
def test_a_record_that_cannot_be_read_does_not_hide_the_others(content: str, tmp_path: Path) -> None:
    store = PlanStore(tmp_path)
    (tmp_path / f"{'0' * 64}.json").write_text(content)
    with pytest.raises(PlanError, match=f"has no plan of graph 'unet'.*{'0' * 64}.json"):
        usable(store)
    record = put(store, key())
    assert usable(store) == [record]
    records, faults = store.records()
    assert records == [record]
    assert len(faults) == 1


@pytest.mark.parametrize(
    ("targets", "gpu", "runs"),
    [
        ((), ADA, True),
        ((), TURING, False),
        ((89,), OTHER_ADA, True),
        ((80, 86), ADA, False),
        ((75,), TURING, True),
    ],
)
def test_rtx_plans_run_on_their_targets(targets: Any, gpu: Gpu, runs: bool, tmp_path: Path) -> None:
    put(PlanStore(tmp_path), key(RTX, None, targets=targets))
    if runs:
        assert usable(PlanStore(tmp_path), library=RTX, gpu=gpu)
    else:
        with pytest.raises(PlanError, match="was built for SM"):
            usable(PlanStore(tmp_path), library=RTX, gpu=gpu)


def test_a_gpu_that_rtx_does_not_serve_is_named(tmp_path: Path) -> None:
    put(PlanStore(tmp_path), key(RTX, None))
    with pytest.raises(EngineError, match=r"does not run on NVIDIA H100 \(SM90\); it runs on SM75, SM80"):
        usable(PlanStore(tmp_path), library=RTX, gpu=HOPPER)


def test_the_newest_plan_comes_first(tmp_path: Path) -> None:
    store = PlanStore(tmp_path)
    for built, batch in (("2026-01-02", "2"), ("2026-01-03", "4"), ("2026-01-01", "1")):
        put(store, key(profiles=parsed(batch)))
        edited(built=built)(store.path(key(profiles=parsed(batch))).with_suffix(".json"))
    batches = [str(record.key.options.profiles[0].best) for record in usable(store)]
    assert batches == ["4", "2", "1"]


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        (key(), "TensorRT 11.4.0 on NVIDIA L4 (SM89)"),
        (key(version_compatible=True), "TensorRT 11.4.0 and later on NVIDIA L4 (SM89)"),
        (key(hardware_compatible="ampere_plus"), "TensorRT 11.4.0 on SM80 and later"),
        (key(RTX, None), "TensorRT-RTX 1.7.1 on SM80 and later"),
        (key(RTX, None, targets=(86, 89)), "TensorRT-RTX 1.7.1 on SM86, SM89"),
    ],
)  # fmt: skip
def test_where_a_plan_runs_is_said(chosen: PlanKey, text: str, tmp_path: Path) -> None:
    assert put(PlanStore(tmp_path), chosen).runs_on == text
