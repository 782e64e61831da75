"""Ways in which an exported gradient goes wrong as a whole; every check also sees a graph with the defect.

Those of single operators, 2 to 7, are in ``test_hazards_of_operators.py``.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from goldens import relative_error, standard_normal
from onnx_graphs import (
    CLASSES,
    POOLS,
    batch_of,
    differentiated,
    forward_graph,
    gradient_graph,
    proto,
    run,
    session,
    small_classifier,
)

from admtrt.config import DiffusionConfig
from admtrt.contract import classifier_gradient_spec
from admtrt.errors import ExportError
from admtrt.export.check import check_graph
from admtrt.export.graphs import EXAMPLE_BATCH
from admtrt.models.classifier import Classifier, log_prob_gradient
from admtrt.models.diffusion import Diffusion
from admtrt.schedule.process import process_from_config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# The bar for every graph against PyTorch in fp32, per sample.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def exported() -> onnx.ModelProto:
    """The gradient of the classifier with attention pooling; tests edit copies."""
    return gradient_graph("attention")


def gradient(model: Any, x: Any, t: Any, y: Any) -> np.ndarray:
    return run(model, x=x, t=t, y=y)["grad"]


def edited(model: onnx.ModelProto) -> onnx.ModelProto:
    return copy.deepcopy(model)


def replace_input(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]


def add_constant(model: onnx.ModelProto, name: str, values: Any) -> None:
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))


def after_output(model: onnx.ModelProto, name: str, *nodes: onnx.NodeProto) -> None:
    """Put nodes that read ``inner`` and write ``name`` between the output ``name`` and what made it."""
    for node in model.graph.node:
        node.output[:] = ["inner" if output == name else output for output in node.output]
    replace_input(model, name, "inner")
    model.graph.node.extend(nodes)


# --- 1: nothing of the traced example stays in the graph ------------------------------------------------


def check_reacts(graph: onnx.ModelProto, classifier: Classifier) -> None:
    model = session(graph)
    for size in (1, 3, 5):
        x, t, y = batch_of(size)
        grad = gradient(model, x, t, y)
        assert relative_error(grad, log_prob_gradient(classifier, x, t, y)) <= TOLERANCE
        for other in ((x + 0.5, t, y), (x, t + 50, y), (x, t, (y + 1) % CLASSES)):
            assert (
                np.abs(gradient(model, *other) - grad).max(axis=(1, 2, 3)) > 1e-3 * np.abs(grad).max()
            ).all()


@pytest.mark.parametrize("pool", POOLS)
def test_hazard_01_reacts_to_every_input_at_every_batch_size(pool: str) -> None:
    check_reacts(gradient_graph(pool), small_classifier(pool))


def test_hazard_01_planted(exported: onnx.ModelProto) -> None:
    classifier = small_classifier("attention")
    for name, frozen in (("t", np.float32([500])), ("y", np.int64([2]))):
        model = edited(exported)
        add_constant(model, "frozen", frozen)
        replace_input(model, name, "frozen")
        with pytest.raises(AssertionError):
            check_reacts(model, classifier)
    model = edited(exported)
    targets = {node.input[1] for node in model.graph.node if node.op_type == "Reshape"}
    for tensor in model.graph.initializer:
        if tensor.name in targets and onnx.numpy_helper.to_array(tensor)[0] == -1:
            sizes = onnx.numpy_helper.to_array(tensor).copy()
            sizes[0] = 2
            tensor.CopyFrom(onnx.numpy_helper.from_array(sizes, tensor.name))
    with pytest.raises(AssertionError):
        check_reacts(model, classifier)


# --- 8: small gradients at high noise -------------------------------------------------------------------

BINS = ((0, 250), (250, 500), (500, 750), (750, 1000))


@pytest.fixture(scope="module")
def faint() -> tuple[Classifier, onnx.ModelProto]:
    """A classifier whose logits are scaled by 1e-6, so that its gradients lie below float16's range."""
    classifier = copy.deepcopy(small_classifier("attention"))
    with torch.no_grad():
        for parameter in classifier.out[2].c_proj.parameters():
            parameter.mul_(1e-6)
    forward = proto(forward_graph("attention"))
    add_constant(forward, "scale", np.float32(1e-6))
    index, node = next((i, node) for i, node in enumerate(forward.graph.node) if node.op_type == "LogSoftmax")
    forward.graph.node.insert(index, onnx.helper.make_node("Mul", [node.input[0], "scale"], ["scaled"]))
    node.input[0] = "scaled"
    return classifier, differentiated(forward, of="log_prob")


def cosine_by_bin(graph: onnx.ModelProto, classifier: Classifier) -> list[float]:
    """Smallest cosine similarity to the gradient in float64 of each bin of timesteps."""
    model = session(graph)
    config = DiffusionConfig()
    diffusion = Diffusion(config, process_from_config(config))
    reference = copy.deepcopy(classifier).double()
    reference.timestep_embedding.register_forward_hook(lambda module, args, out: out.double())
    cosines = []
    for low, high in BINS:
        step = torch.linspace(low, high - 1, 5).long()
        x_0, noise, y = (
            batch_of(5)[0].clamp(-1, 1),
            torch.from_numpy(standard_normal(f"n{low}", (5, 3, 8, 8))),
            batch_of(5)[2],
        )
        x, t = diffusion.q_sample(x_0, step, noise), diffusion.model_t(step)
        expected = log_prob_gradient(reference, x.double(), t, y).flatten(1)
        actual = torch.from_numpy(gradient(model, x, t, y)).double().flatten(1)
        cosines.append(torch.nn.functional.cosine_similarity(actual, expected, eps=0).min().item())
    return cosines


def check_small_gradients(model: onnx.ModelProto, classifier: Classifier) -> None:
    for (low, high), cosine in zip(BINS, cosine_by_bin(model, classifier), strict=True):
        assert cosine >= 0.99999, f"t in [{low}, {high}): {cosine}"


def test_hazard_08_small_gradients_survive(faint: tuple[Classifier, onnx.ModelProto]) -> None:
    classifier, model = faint
    check_small_gradients(model, classifier)
    narrow = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    inferred = onnx.shape_inference.infer_shapes(model).graph
    assert narrow.isdisjoint(value.type.tensor_type.elem_type for value in inferred.value_info)
    assert narrow.isdisjoint(tensor.data_type for tensor in inferred.initializer)


def test_hazard_08_planted(faint: tuple[Classifier, onnx.ModelProto]) -> None:
    classifier, good = faint
    model = edited(good)
    make = onnx.helper.make_node
    halved = make("Cast", ["inner"], ["half"], to=onnx.TensorProto.FLOAT16)
    after_output(model, "grad", halved, make("Cast", ["half"], ["grad"], to=onnx.TensorProto.FLOAT))
    with pytest.raises(AssertionError, match="t in"):
        check_small_gradients(model, classifier)


# --- 9: samples do not see each other -------------------------------------------------------------------


def check_rows(graph: onnx.ModelProto) -> None:
    model = session(graph)
    x, t, y = batch_of(3)
    together = gradient(model, x, t, y)
    others = gradient(model, torch.cat([x[:1], 3 * x[1:]]), t * torch.tensor([1, 0.5, 0.5]), y)
    alone = gradient(model, x[:1], t[:1], y[:1])
    # Engines may sum in another order at another batch size; a real influence is percents.
    assert relative_error(together[:1], alone) <= 1e-5
    assert relative_error(others[:1], alone) <= 1e-5


@pytest.mark.parametrize("pool", POOLS)
def test_hazard_09_rows_are_independent(pool: str) -> None:
    check_rows(gradient_graph(pool))


@pytest.mark.parametrize("reduction", ["ReduceMean", "ReduceSum"])
def test_hazard_09_planted(exported: onnx.ModelProto, reduction: str) -> None:
    model = edited(exported)
    add_constant(model, "batch_axis", np.int64([0]))
    make = onnx.helper.make_node
    mixed = make(reduction, ["inner", "batch_axis"], ["mixed"], keepdims=1)
    after_output(model, "grad", mixed, make("Sub", ["inner", "mixed"], ["grad"]))
    with pytest.raises(AssertionError):
        check_rows(model)


# --- 10: nothing frozen, nothing dead -------------------------------------------------------------------


def check_clean(model: onnx.ModelProto, path: Path) -> None:
    graph = model.graph
    for tensor in graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        assert EXAMPLE_BATCH not in tensor.dims, tensor.name
        assert values.dtype != np.int64 or EXAMPLE_BATCH not in values, tensor.name
    needed = {output.name for output in graph.output}
    for node in reversed(graph.node):
        assert needed.intersection(node.output), f"{node.op_type} '{node.name}' reaches no output"
        needed.update(node.input)
    assert {tensor.name for tensor in graph.initializer} <= needed
    onnx.save(model, path)
    try:
        check_graph(
            path, classifier_gradient_spec(small_classifier("attention").config), example_batch=EXAMPLE_BATCH
        )
    except ExportError as error:
        raise AssertionError(str(error)) from error


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("conv_backward", ["flipped", "transposed"])
def test_hazard_10_nothing_frozen_nothing_dead(pool: str, conv_backward: Any, tmp_path: Path) -> None:
    check_clean(gradient_graph(pool, conv_backward), tmp_path / "g.onnx")


def plant_saved_tensor(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Sqrt")
    add_constant(model, "saved", np.ones((EXAMPLE_BATCH, 32, 1), np.float32))
    replace_input(model, node.output[0], "saved")


def plant_fixed_reshape(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Reshape")
    add_constant(model, "frozen", np.int64([EXAMPLE_BATCH, 32, -1]))
    node.input[1] = "frozen"


def plant_dead_node(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, onnx.helper.make_node("Exp", ["x"], ["unused"]))


def plant_unused_constant(model: onnx.ModelProto) -> None:
    add_constant(model, "unused", np.float32([1]))


@pytest.mark.parametrize(
    "plant", [plant_saved_tensor, plant_fixed_reshape, plant_dead_node, plant_unused_constant]
)
def test_hazard_10_planted(
    exported: onnx.ModelProto, plant: Callable[[onnx.ModelProto], None], tmp_path: Path
) -> None:
    model = edited(exported)
    plant(model)
    with pytest.raises(AssertionError):
        check_clean(model, tmp_path / "g.onnx")


def test_hazard_10_frozen_reshape_does_not_enter_a_bundle(exported: onnx.ModelProto, tmp_path: Path) -> None:
    model = edited(exported)
    plant_fixed_reshape(model)
    onnx.save(model, tmp_path / "g.onnx")
    spec = classifier_gradient_spec(small_classifier("attention").config)
    with pytest.raises(ExportError, match=f"fixed to the traced batch of {EXAMPLE_BATCH}"):
        check_graph(tmp_path / "g.onnx", spec, example_batch=EXAMPLE_BATCH)
