"""The fusion report reads known log lines and ignores all others."""

from __future__ import annotations

import pytest

from admtrt.runtime.engines.report import fusion_report

KNOWN = {
    "__mye1454_0_myl0_0, LayerType: shape_call": None,
    "node_conv2d_1_myl0_6, LayerType: correlation": "convolutions",
    "__myl_CorrMulMul_myl0_3, LayerType: runtime_fusion": "convolutions",
    "node_ConvTranspose_436_myl0_58, LayerType: deconv": "convolutions",
    "__myl_DecoMulMul_myl0_67, LayerType: runtime_fusion": "convolutions",
    "first_conv, LayerType: CaskConvolution": "convolutions",
    "node_linear_4+node_linear_3_myl0_12, LayerType: gemm": "products",
    "__myl_FcAddSilu_myl0_10, LayerType: runtime_fusion": "products",
    "_gemm_mha_v2_myl0_6, LayerType: kgen": "attention",
    "__myl_SiluGnor_myl0_4, LayerType: runtime_function": "normalisation_silu",
    "__myl_SiluCastGnor_myl0_4, LayerType: kgen": "normalisation_silu",
    "__myl_Inor_myl0_4, LayerType: runtime_function": "normalisation",
    "__myl_MaxrSubExpSum_myl0_9, LayerType: kgen": "softmax",
    "__myl_Cast_myl0_1, LayerType: kgen": "casts",
    "__myl_MoveReshCast_myl0_7, LayerType: kgen": "moves",
    "__myl_AddSiluMul_myl0_7, LayerType: kgen": "other",
    "something_new, LayerType: unheard_of": "other",
}


@pytest.mark.parametrize("line", KNOWN)
def test_each_kind_is_counted_as_what_it_is(line: str) -> None:
    report = fusion_report(
        [f"Name: {line}, Inputs: [ {{ Name: x, Dimensions: [-1] }}], Metadata: "]
    ).to_dict()
    kinds = report.pop("kinds")
    counted = {name: count for name, count in report.items() if count}
    role = KNOWN[line]
    assert counted == ({} if role is None else {role: 1, "kernels": 1})
    assert sum(kinds.values()) == len(counted) // 2


def test_a_log_that_says_nothing_gives_zeros() -> None:
    report = fusion_report(["", "Layers:", "Name: x", "LayerType: kgen", "garbage \x00"])
    assert report.kernels == 0
    assert report.kinds == {}
