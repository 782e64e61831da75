"""``admtrt triton`` and the model in it, on a double of Triton's module."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bundles import exported_bundle, pipeline

from admtrt.cli import run
from admtrt.errors import EngineError
from admtrt.serve.triton_model import TritonModel

FINAL = 1


class Sender:
    """Records the responses of one request, and whether it is cancelled."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.ended = threading.Event()
        self.cancelled = False

    def send(self, response: Any = None, flags: int = 0) -> None:
        assert not self.ended.is_set()
        self.sent.append(response)
        if flags == FINAL:
            self.ended.set()

    def is_cancelled(self) -> bool:
        return self.cancelled


class Request:
    """One request."""

    def __init__(self, parameters: Any = None, **tensors: Any) -> None:
        self.sender, self.tensors = Sender(), tensors
        self._parameters = json.dumps(parameters or {})

    def parameters(self) -> str:
        return self._parameters

    def get_response_sender(self) -> Sender:
        return self.sender

    def end(self) -> Any:
        assert self.sender.ended.wait(30)
        return self.sender.sent[-1]


class Tensor(np.ndarray):  # type: ignore[type-arg]
    """An array that knows its name."""

    @staticmethod
    def from_dlpack(name: str, values: Any) -> Any:
        tensor = np.array(values).view(Tensor)
        tensor.name = name  # type: ignore[attr-defined]
        return tensor


def double() -> Any:
    """The module ``triton_python_backend_utils``."""

    def response(tensors: Any = (), error: Any = None) -> Any:
        return SimpleNamespace(tensors={one.name: np.asarray(one) for one in tensors}, error=error)

    class Error(SimpleNamespace):
        INVALID_ARG, UNAVAILABLE, INTERNAL, CANCELLED = "invalid", "unavailable", "internal", "cancelled"

        def __init__(self, message: str, code: str) -> None:
            super().__init__(message=message, code=code)

    class Family:
        GAUGE = 0

        def __init__(self, **_: Any) -> None:
            pass

        def Metric(self, **_: Any) -> Any:  # noqa: N802
            return SimpleNamespace(set=lambda _: None)

    return SimpleNamespace(
        Tensor=Tensor,
        InferenceResponse=response,
        TritonError=Error,
        MetricFamily=Family,
        Logger=SimpleNamespace(log_info=lambda _: None, log_error=lambda _: None),
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
        get_input_tensor_by_name=lambda request, name: request.tensors.get(name),
    )


def arguments(repository: Path, name: str) -> dict[str, str]:
    """The arguments that Triton gives a model, by its configuration."""
    text = (repository / name / "config.pbtxt").read_text()
    found: dict[str, Any] = {"parameters": {}}
    for line in text.splitlines():
        if line.startswith("parameters"):
            key, value = (part.split('"')[1] for part in line.split("key:")[1].split("value {", 1))
            found["parameters"][key] = {"string_value": value}
    return {"model_config": json.dumps(found), "model_repository": str(repository / name), "model_name": name}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    out = tmp_path / "repository"
    bundles = [f"{name}={exported_bundle(kind)}" for name, kind in (("tiny", "guided"), ("up", "upsampler"))]
    assert run(["triton", *bundles, "--out", str(out), "--threads", "1"]) == 0
    return out


def test_a_repository(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = (repository / "tiny" / "config.pbtxt").read_text()
    assert "decoupled: true" in config
    assert '{ name: "label" data_type: TYPE_INT64 dims: [ -1 ] optional: true }' in config
    compile((repository / "tiny" / "1" / "model.py").read_text(), "model.py", "exec")
    assert (repository / "tiny" / "bundle").is_symlink()
    assert "tritonserver --model-repository" in (repository / "RUN.md").read_text()
    config = (repository / "up" / "config.pbtxt").read_text()
    assert '{ name: "low_res" data_type: TYPE_UINT8 dims: [ -1, -1, -1, -1 ] optional: false }' in config
    again = ["triton", f"tiny={exported_bundle('guided')}", "--out", str(repository)]
    assert run(again) == 2
    assert "already exists" in capsys.readouterr().err
    assert run([*again, "--overwrite", "--copy", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == ["tiny"]
    assert not (repository / "tiny" / "bundle").is_symlink()


def test_requests(repository: Path) -> None:
    model = TritonModel(double())
    model.initialize(arguments(repository, "tiny"))
    try:
        label, seed = np.array([0, 2]), np.array([5, 2**64 - 1], np.uint64)
        good = Request(
            {"steps": "ddim10", "scale": 1.5, "preview_every": 4, "of no field": 1}, label=label, seed=seed
        )
        bad = {
            "invalid class 9": Request(label=np.array([9]), seed=np.array([1], np.uint64)),
            "invalid steps": Request({"steps": "x"}, label=label, seed=seed),
            "unavailable": Request({"timeout": 1e-9}, label=label, seed=seed),
        }
        gone = Request({"steps": "1000"}, label=label, seed=seed)
        gone.sender.cancelled = True
        model.execute([good, gone, *bad.values()])
        end = good.end()
        expected = pipeline("guided")([0, 2], [5, 2**64 - 1], steps="ddim10", scale=1.5).images
        assert np.abs(end.tensors["images"].astype(int) - expected).max() <= 1
        assert end.tensors["images"].dtype == np.uint8
        assert [one.tensors["step"].tolist() for one in good.sender.sent] == [[4], [8], [10]]
        for told, request in bad.items():
            error = request.end().error
            assert f"{error.code} {error.message}".startswith(told)
        assert gone.end().error.code == "cancelled"
    finally:
        model.finalize()
    late = Request(label=label, seed=seed)
    model.execute([late])
    assert late.end().error.code == "unavailable"


def test_requests_with_images(repository: Path) -> None:
    """Images to begin at and images to enlarge are the pipeline's; what is no image is refused."""
    generator = np.random.default_rng(0)
    seed = np.array([5, 6], np.uint64)
    for name, tensor, size, choices in (
        ("tiny", "init", 8, {"strength": 0.5, "steps": "ddim10"}),
        ("up", "low_res", 4, {"steps": "ddim5"}),
    ):
        model = TritonModel(double())
        model.initialize(arguments(repository, name))
        images = generator.integers(0, 256, (2, size, size, 1), np.uint8)
        known = {"label": np.array([0, 2])} if name == "tiny" else {}
        wrong = {
            "of float": images.astype(np.float32),
            "of other sizes": images[:, 1:],
            "flat": images.ravel(),
            "none": images[:0],
            "too many": np.repeat(images, 40, 0),
        }
        requests = {
            what: Request(choices, seed=seed, **known, **{tensor: given})
            for what, given in {"good": images, **wrong}.items()
        }
        try:
            model.execute(list(requests.values()))
            ends = {what: request.end() for what, request in requests.items()}
        finally:
            model.finalize()
        for what in wrong:
            assert ends[what].error.code == "invalid", what
            assert tensor in ends[what].error.message, what
        kind = "guided" if name == "tiny" else "upsampler"
        labels = [0, 2] if name == "tiny" else None
        expected = pipeline(kind)(labels, [5, 6], **choices, **{tensor: images}).images
        assert np.abs(ends["good"].tensors["images"].astype(int) - expected).max() <= 1


def test_a_backend_that_passes_tensors_wrongly_is_refused(repository: Path) -> None:
    wrong = double()
    wrong.Tensor = SimpleNamespace(from_dlpack=lambda _, values: np.full_like(values, values.flat[0]))
    with pytest.raises(EngineError, match="Python backend gives"):
        TritonModel(wrong).initialize(arguments(repository, "tiny"))
