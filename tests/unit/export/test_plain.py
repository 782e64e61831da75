"""Decomposition of captured operators: equal values; operators that are not recognised do not change."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx_graphs import op_types, parse, proto, run

from admtrt.export.passes import infer_shapes, simplify
from admtrt.export.plain import einsums_as_products, spectra_as_convolutions

X, Y = (np.random.default_rng(seed).standard_normal((2, 3, 4, 5)).astype(np.float32) for seed in (0, 1))


def applied(equation: str, a: np.ndarray, b: np.ndarray) -> list[str]:
    """Operators of an Einsum of x and y, both with the batch first or y constant; the values are compared."""
    dims = ", ".join(["N", *map(str, a.shape[1:])])
    expected = torch.einsum(equation, torch.from_numpy(a), torch.from_numpy(b)).numpy()
    rank = ", ".join("?" for _ in expected.shape)
    second = "" if len(b) != len(a) else f", float[N{''.join(f', {n}' for n in b.shape[1:])}] y"
    source = parse(
        f"g (float[{dims}] x{second}) => (float[{rank}] out)"
        f' {{ out = Einsum <equation = "{equation}"> (x, y) }}',
        {} if second else {"y": b},
    )
    model = ir.serde.deserialize_model(source)
    infer_shapes(model)
    einsums_as_products(model)
    simplify(model)
    found = run(proto(model), x=a, **({"y": b} if second else {}))["out"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    return op_types(proto(model))


@pytest.mark.parametrize(
    ("equation", "a", "b"),
    [
        ("bct,bcs->bts", X[:, 0], Y[:, 0]),
        ("bts,bcs->bct", X[:, 0], Y[:, 1]),
        ("bij,bkj->bik", X[:, 0], Y[:, 0]),
        ("nhqc,nhkc->nhqk", X, Y),
        ("nhqk,nhqc->nhkc", X, Y),
        ("nchw,co->nohw", X, Y[0, 0, :3]),
        ("nchw,wc->nh", X, Y[0, 0].T[:, :3]),
        ("nchw,nchw->n", X, Y),
        ("nij,nij->nij", X[:, 0], Y[:, 0]),
        ("ni,nj->nij", X[:, 0, 0], Y[:, 0, 0, :3]),
        ("ni , j -> nji", X[:, 0, 0], Y[0, 0, 0, :3]),
    ],
)  # fmt: skip
def test_einsums_as_products(equation: str, a: np.ndarray, b: np.ndarray) -> None:
    operators = applied(equation, a, b)
    assert operators.count("MatMul") == 1
    assert set(operators) <= {"MatMul", "Reshape", "Transpose"}
    if equation in ("bct,bcs->bts", "bts,bcs->bct"):  # of the original's attention
        assert sorted(operators) == ["MatMul", "Transpose"]


@pytest.mark.parametrize(
    ("equation", "operands"),
    [
        ("nij,nk->ni", (X[:, 0], Y[:, 0, 0])),  # summed in one operand alone
        ("nij->jn", (X[:, 0],)),
        ("nij", (X[:, 0],)),
        ("ni,nj", (X[:, 0, 0], Y[:, 0, 0])),  # the result's labels in alphabetical order
        ("n...j,nj->n...", (X, Y[:, 0, 0])),
        ("...ij,...kj->...ki", (X, Y)),
        ("nchw,cd,hw->nd", (X, Y[0, 0, :3], Y[0, 0])),
        ("ni,nj,nk->nijk", (X[:, 0, 0], Y[:, 0, 0], X[:, 1, 1])),
        ("nij,nij->ni", (X[:, 0], Y[:, 0, :1])),  # the second broadcasts
        ("nij,nij->ni", (X[:, 0, :, :1], Y[:1, 0, :, :])),  # and each, once along the batch
        ("nii->n", (X[:, 0, :, :4],)),
        ("nii->ni", (X[:, 0, :, :4],)),
        ("nii,ni->n", (X[:, 0, :, :4], Y[:, 0, 0, :4])),
        ("niji,jj->nj", (X[:, :, :, :3], Y[0, 0, :, :4])),
    ],
)
def test_einsums_of_any_number(equation: str, operands: tuple[np.ndarray, ...]) -> None:
    names = [f"a{index}" for index in range(len(operands))]
    expected = torch.einsum(equation, *map(torch.from_numpy, operands)).numpy()
    inputs = ", ".join(
        f"float[N{''.join(f', {size}' for size in operand.shape[1:])}] {name}"
        for name, operand in zip(names, operands, strict=True)
        if len(operand) == 2
    )
    given = {name: operand for name, operand in zip(names, operands, strict=True) if len(operand) == 2}
    constants = {name: operand for name, operand in zip(names, operands, strict=True) if name not in given}
    rank = ", ".join("?" for _ in expected.shape)
    body = f'out = Einsum <equation = "{equation}"> ({", ".join(names)})'
    model = ir.serde.deserialize_model(parse(f"g ({inputs}) => (float[{rank}] out) {{ {body} }}", constants))
    infer_shapes(model)
    assert einsums_as_products(model)
    simplify(model)
    assert "Einsum" not in op_types(proto(model))
    np.testing.assert_allclose(run(proto(model), **given)["out"], expected, rtol=1e-5, atol=1e-5)


def test_an_einsum_of_two_unknown_sizes_is_left() -> None:
    body = '{ out = Einsum <equation = "ni,mi->nm"> (x, y) }'
    text = f"g (float[N, 4] x, float[M, 4] y) => (float[N, M] out) {body}"
    model = ir.serde.deserialize_model(parse(text, {}))
    assert not einsums_as_products(model)
    assert op_types(proto(model)) == ["Einsum"]


@pytest.mark.parametrize(
    ("dims", "options", "inputs"),
    [
        ("N, 20, 1", "onesided = 1", "x, three, window, eight"),
        ("N, 20, 1", "onesided = 0", "x, three, window"),
        ("N, 21, 1", "onesided = 1", "x, three, , eight"),
        ("N, 20, 1", "onesided = 1", "x, three, odd"),
    ],
)
def test_spectra_as_convolutions(dims: str, options: str, inputs: str) -> None:
    constants = {
        "three": np.int64(3), "eight": np.int64(8), "window": np.hanning(8).astype(np.float32),
        "odd": np.hanning(7).astype(np.float32),
    }  # fmt: skip
    text = f"g (float[{dims}] x) => (float[?, ?, ?, ?] out) {{ out = STFT <{options}> ({inputs}) }}"
    source = parse(text, {name: value for name, value in constants.items() if name in inputs})
    model = ir.serde.deserialize_model(source)
    infer_shapes(model)
    assert spectra_as_convolutions(model)
    simplify(model)
    x = np.random.default_rng(0).standard_normal((2, *map(int, dims.split(",")[1:]))).astype(np.float32)
    np.testing.assert_allclose(run(proto(model), x=x)["out"], run(source, x=x)["out"], rtol=1e-5, atol=1e-5)
    assert "STFT" not in op_types(proto(model))


def test_spectra_of_complex_signals_or_computed_windows_are_left() -> None:
    for dims, inputs in (("N, 20, 2", "x, three, window"), ("N, 8, 1", "x, three, computed")):
        text = (
            f"g (float[{dims}] x) => (float[?, ?, ?, ?] out)"
            f" {{ computed = Sin (window) out = STFT <onesided = 0> ({inputs}) }}"
        )
        constants = {"three": np.int64(3), "window": np.hanning(8).astype(np.float32)}
        model = ir.serde.deserialize_model(parse(text, constants))
        infer_shapes(model)
        assert not spectra_as_convolutions(model)
