"""Passes that fold constants into weights: each removes operators that would run at every step.

Each pass changes a model in place, returns whether it did, and ignores what it does not recognise. Weights
are combined in float64 and rounded once, so that results change by rounding only.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from admtrt.export.nodes import enlargement_of, int_attribute, ints_attribute
from admtrt.export.passes import constant, insert_in_place_of, only_user

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Array = NDArray[Any]


def fold(model: ir.Model) -> None:
    """Run the passes for CPUs and engines once. The order matters: each enables later ones."""
    for one in (
        fold_padding_into_conv,
        fold_scale_shift,
        fold_affine_into_conv,
        fold_scale_into_conv,
        merge_projections,
    ):
        one(model)


def fold_scale_shift(model: ir.Model) -> bool:
    """``(n * gamma + beta) * (1 + scale) + shift`` -> ``n * scale + shift``, the last two from a Gemm.

    The affine part of an adaptive group norm goes into the projection of the embedding.
    """
    changed = False
    for split in _nodes(model, "Split"):
        gemm = _projection(split)
        if gemm is None or len(split.outputs) != 2 or not _halves(split):
            continue
        scale, shift = split.outputs
        one_plus = only_user(scale, "Add")
        product = None if one_plus is None else only_user(one_plus.outputs[0], "Mul")
        final = None if product is None else only_user(product.outputs[0], "Add")
        if one_plus is None or product is None or final is None or only_user(shift, "Add") is not final:
            continue
        affine = _affine(_other(product, one_plus.outputs[0]))
        if affine is None or _scalar(_other(one_plus, scale)) != 1.0 or not _same_rank(one_plus, scale):
            continue
        normalised, gamma, beta = affine
        weight, bias = _array(gemm.inputs[1]), _array(gemm.inputs[2])
        half = len(weight) // 2
        if not all(_one_for_each_channel(a, normalised, half) for a in (gamma, beta)):
            continue
        gamma, beta = gamma.reshape(-1), beta.reshape(-1)
        new_weight = np.concatenate(
            [weight[:half] * gamma[:, None], weight[half:] + weight[:half] * beta[:, None]]
        )
        new_bias = np.concatenate([(1 + bias[:half]) * gamma, bias[half:] + (1 + bias[:half]) * beta])
        _replace_constant(model, gemm, 1, new_weight)
        _replace_constant(model, gemm, 2, new_bias)
        product.replace_input_with(0, normalised)
        product.replace_input_with(1, scale)
        changed = True
    return changed


def fold_padding_into_conv(model: ir.Model) -> bool:
    """``Conv(Pad(x))`` -> ``Conv(x)`` with larger pads, if Pad adds zeros around the image only."""
    changed = False
    for conv in _nodes(model, "Conv"):
        pad = None if conv.inputs[0] is None else conv.inputs[0].producer()
        widths = None if pad is None or pad.op_type != "Pad" else _zeros_around(pad)
        given = "auto_pad" not in conv.attributes or conv.attributes["auto_pad"].as_string() == "NOTSET"
        if pad is None or widths is None or not given:
            continue
        own = ints_attribute(conv, "pads", [0] * len(widths))
        pads = [a + b for a, b in zip(own, widths, strict=True)]
        conv.attributes["pads"] = ir.AttrInt64s("pads", pads)
        conv.replace_input_with(0, pad.inputs[0])
        changed = True
    return changed


def fold_affine_into_conv(model: ir.Model) -> bool:
    """``Conv(n * gamma + beta)`` -> ``Conv(n)`` with other weights, if the Conv does not pad."""
    changed = False
    for conv in _nodes(model, "Conv"):
        affine = _affine(conv.inputs[0])
        if affine is None or not _plain_weights(conv) or any(ints_attribute(conv, "pads", ())):
            continue
        normalised, gamma, beta = affine
        weight = _array(conv.inputs[1])
        if not all(_one_for_each_channel(a, normalised, weight.shape[1]) for a in (gamma, beta)):
            continue
        gamma = gamma.reshape(-1, *[1] * (weight.ndim - 2))
        taps = weight.sum(axis=tuple(range(2, weight.ndim)))
        _replace_constant(model, conv, 1, weight * gamma)
        # A sum, not a matrix product, whose order of additions depends on the processor.
        _set_bias(model, conv, _bias(conv, len(weight)) + (taps * beta.reshape(-1)).sum(axis=1))
        conv.replace_input_with(0, normalised)
        changed = True
    return changed


def fold_scale_into_conv(model: ir.Model) -> bool:
    """Fold constant factors of some of a Conv's channels (queries and keys) into its weights."""
    changed = False
    for product in _nodes(model, "Mul"):
        source, constant_factor = product.inputs
        if _scalar(constant_factor) is None:
            source, constant_factor = constant_factor, source
        factor = _scalar(constant_factor)
        if source is None or factor is None or not _same_rank(product, source):
            continue
        part = _up(source, ("Reshape", "Slice", "Transpose"))
        split = None if part is None else part.producer()
        if part is None or split is None or split.op_type != "Split" or product.outputs[0].is_graph_output():
            continue
        rows = _channels_of_part(split, part)
        if rows is None:
            continue
        conv, channels = rows
        weight = _array(conv.inputs[1])
        bias = _bias(conv, len(weight))
        weight[channels] *= factor
        bias[channels] *= factor
        _replace_constant(model, conv, 1, weight)
        _set_bias(model, conv, bias)
        product.outputs[0].replace_all_uses_with(source)
        changed = True
    return changed


def merge_projections(model: ir.Model) -> bool:
    """Merge the projections of one vector (every block's, of the embedding) into one Gemm with one Split."""
    groups: dict[tuple[ir.Value, tuple[int, ...]], list[tuple[ir.Node, ir.Node, ir.Node | None]]] = {}
    for unsqueeze in _nodes(model, "Unsqueeze"):
        gemm = None if unsqueeze.inputs[0] is None else unsqueeze.inputs[0].producer()
        axes = unsqueeze.inputs[1]
        if gemm is None or axes is None or axes.const_value is None or not _plain_gemm(gemm):
            continue
        split = only_user(unsqueeze.outputs[0], "Split")
        if split is not None and split.attributes["axis"].as_int() != 1:
            split = None
        source = gemm.inputs[0]
        assert source is not None
        rank = 2 + axes.const_value.size
        key = (source, tuple(int(axis) % rank for axis in axes.const_value.numpy()))
        if min(key[1]) < 2:  # unsqueezed before the features: they are not along axis 1
            continue
        groups.setdefault(key, []).append((gemm, unsqueeze, split))
    changed = False
    for (source, axes_key), members in groups.items():
        if len(members) > 1:
            _merge(model, source, axes_key, members)
            changed = True
    return changed


_TAPS = (np.array([[1, 0, 0], [0, 1, 1]]), np.array([[1, 1, 0], [0, 0, 1]]))
"""The two small pixels that each of three taps on an enlarged image meets: at even positions, where the first
pixel is the previous one, and at odd positions."""


def fold_enlargement_into_conv(model: ir.Model) -> bool:
    """A 3x3 Conv of an image enlarged by 2 -> four interleaved 2x2 Convs of the image itself.

    This needs 4/9 of the multiplications. Three neighbours in the large image come from two pixels of the
    small one, so the taps that meet the same pixel add up. Which taps do depends only on the parity of row
    and column.
    """
    changed = False
    for conv in _nodes(model, "Conv"):
        enlarge = None if conv.inputs[0] is None else conv.inputs[0].producer()
        if enlarge is None or enlarge.op_type != "Resize" or enlargement_of(enlarge) != [2, 2]:
            continue
        weight = _weight_3x3(conv)
        if weight is None:
            continue
        tape = ir.tape.Tape()
        parts = []
        for row, column in itertools.product((0, 1), repeat=2):
            taps = np.einsum("oiab,ra,cb->oirc", weight, _TAPS[row], _TAPS[column])
            parts.append(
                tape.op(
                    "Conv",
                    [
                        enlarge.inputs[0],
                        _like_weight(model, conv, taps),
                        *conv.inputs[2:],
                    ],
                    attributes={"kernel_shape": [2, 2], "pads": [1 - row, 1 - column, row, column]},
                )
            )
        stacked = tape.op("Concat", parts, attributes={"axis": 1})
        tape.op("DepthToSpace", [stacked], attributes={"blocksize": 2})
        for node in tape.nodes:
            node.metadata_props.update(conv.metadata_props)
        insert_in_place_of(model.graph, conv, tape.nodes, conv.outputs[0])
        changed = True
    return changed


def fold_pooling_into_conv(model: ir.Model) -> bool:
    """A 3x3 Conv and the average over each 2x2 of its results -> one 4x4 Conv of stride 2.

    This is the backward of :func:`fold_enlargement_into_conv`, again with 4/9 of the multiplications: each of
    the four results reads the image at its own offset, so the taps that meet the same pixel add up.
    """
    changed = False
    for conv in _nodes(model, "Conv"):
        pool, weight = only_user(conv.outputs[0], "AveragePool"), _weight_3x3(conv)
        if pool is None or weight is None or not _halves_the_image(pool):
            continue
        height, width = weight.shape[:2]
        taps = np.zeros((height, width, 4, 4))
        for row, column in itertools.product((0, 1), repeat=2):
            taps[:, :, row : row + 3, column : column + 3] += weight / 4
        attributes = {"kernel_shape": [4, 4], "strides": [2, 2], "pads": [1] * 4}
        inputs = [conv.inputs[0], _like_weight(model, conv, taps), *conv.inputs[2:]]
        made = ir.node("Conv", inputs, attributes=attributes)
        made.metadata_props.update(conv.metadata_props)
        insert_in_place_of(model.graph, pool, [made], pool.outputs[0])
        changed = True
    return changed


def _weight_3x3(conv: ir.Node) -> Array | None:
    """The weight of a 3x3 Conv of constants that keeps the size of its image, None for others."""
    moved = [*ints_attribute(conv, "strides", ()), *ints_attribute(conv, "dilations", ())]
    same_size = ints_attribute(conv, "pads", ()) == [1] * 4 and all(step == 1 for step in moved)
    if not same_size or not _plain_weights(conv):
        return None
    weight = _array(conv.inputs[1])
    return weight if weight.shape[2:] == (3, 3) else None


def _halves_the_image(pool: ir.Node) -> bool:
    """True for the average over whole 2x2 parts of an image."""
    windows = [ints_attribute(pool, name, ()) for name in ("kernel_shape", "strides")]
    padded = any(ints_attribute(pool, "pads", ())) or not _no_auto_pad(pool)
    return windows == [[2, 2]] * 2 and not padded and not int_attribute(pool, "ceil_mode", 0)


def _like_weight(model: ir.Model, conv: ir.Node, taps: Array) -> ir.Value:
    """A constant of the type of a Conv's weight."""
    weight = conv.inputs[1]
    assert weight is not None
    assert weight.dtype is not None
    return constant(model.graph, taps.astype(weight.dtype.numpy()))


def _merge(
    model: ir.Model,
    source: ir.Value,
    axes: tuple[int, ...],
    members: list[tuple[ir.Node, ir.Node, ir.Node | None]],
) -> None:
    weights = np.concatenate([_array(gemm.inputs[1]) for gemm, _, _ in members])
    biases = np.concatenate([_array(gemm.inputs[2]) for gemm, _, _ in members])
    parts = [
        part for _, unsqueeze, split in members for part in ((unsqueeze if split is None else split).outputs)
    ]
    sizes = [(_sizes(part) or [0])[0] for part in parts]
    assert sum(sizes) == len(weights)
    like = members[0][0].inputs[1]
    assert like is not None
    dtype = like.dtype.numpy() if like.dtype is not None else np.float32
    graph = model.graph
    tape = ir.tape.Tape()
    every = tape.op(
        "Gemm",
        [source, constant(graph, weights.astype(dtype)), constant(graph, biases.astype(dtype))],
        attributes={"transB": 1},
    )
    spread = tape.op("Unsqueeze", [every, constant(graph, np.array(axes, np.int64))])
    outputs = tape.op_multi_out(
        "Split",
        [spread, constant(graph, np.array(sizes, np.int64))],
        attributes={"axis": 1},
        num_outputs=len(parts),
    )
    graph.insert_before(members[0][0], tape.nodes)
    for old, new in zip(parts, outputs, strict=True):
        new.shape, new.type = old.shape, old.type
        old.replace_all_uses_with(new)


def _nodes(model: ir.Model, op_type: str) -> Iterator[ir.Node]:
    """Iterate over a copy of the nodes of one kind, skipping those removed meanwhile."""
    return (node for node in list(model.graph) if node.op_type == op_type and any(map(_users, node.outputs)))


def _users(value: ir.Value) -> int:
    """Number of readers of a value; a graph output counts as one."""
    return len(list(value.uses())) + int(value.is_graph_output())


def _zeros_around(pad: ir.Node) -> list[int] | None:
    """The pads of each spatial axis if a Pad only adds zeros there; else None."""
    widths = pad.inputs[1].const_value if len(pad.inputs) > 1 and pad.inputs[1] is not None else None
    value = pad.inputs[2] if len(pad.inputs) > 2 else None
    mode = pad.attributes["mode"].as_string() if "mode" in pad.attributes else "constant"
    if (
        widths is None
        or mode != "constant"
        or len(pad.inputs) > 3
        or (value is not None and _scalar(value) != 0)
    ):
        return None
    before, behind = np.split(widths.numpy(), 2)
    if before[:2].any() or behind[:2].any() or min(*before, *behind) < 0:
        return None
    return [int(width) for width in (*before[2:], *behind[2:])]


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    """The other operand of a commutative node."""
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _array(value: ir.Value | None) -> Array:
    """A copy of a constant's values in float64."""
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy().astype(np.float64)


def _scalar(value: ir.Value | None) -> float | None:
    """The value of a one-element constant."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return float(value.const_value.numpy().reshape(()))


def _same_rank(node: ir.Node, value: ir.Value) -> bool:
    """True if a node's result has as many axes as this operand: a one-element constant may add axes."""
    shape, result = value.shape, node.outputs[0].shape
    return shape is not None and result is not None and len(shape) == len(result)


def _affine(value: ir.Value | None) -> tuple[ir.Value, Array, Array] | None:
    """n, gamma and beta of ``n * gamma + beta``: constants of several elements without other readers."""
    operands = []
    for op_type in ("Add", "Mul"):
        node = None if value is None else value.producer()
        if value is None or node is None or node.op_type != op_type or _users(value) != 1:
            return None
        constants = [i for i in node.inputs if i is not None and i.const_value is not None]
        if len(constants) != 1 or constants[0].const_value is None or constants[0].const_value.size == 1:
            return None
        operands.append(_array(constants[0]))
        value = _other(node, constants[0])
    assert value is not None
    beta, gamma = operands
    return value, gamma, beta


def _one_for_each_channel(values: Array, like: ir.Value, channels: int) -> bool:
    """True if a constant that broadcasts to [N, channels, ...] has one value per channel."""
    sizes = _sizes(like)
    if sizes is None or not sizes or sizes[0] != channels:
        return False
    shape = (channels, *[1] * (len(sizes) - 1))
    return values.shape in (shape, (1, *shape))


def _projection(split: ir.Node) -> ir.Node | None:
    """The Gemm whose unsqueezed output a Split divides, if none of them has other readers."""
    unsqueeze = None if split.inputs[0] is None else split.inputs[0].producer()
    if unsqueeze is None or unsqueeze.op_type != "Unsqueeze" or _users(unsqueeze.outputs[0]) != 1:
        return None
    gemm = None if unsqueeze.inputs[0] is None else unsqueeze.inputs[0].producer()
    return gemm if gemm is not None and _plain_gemm(gemm) else None


def _plain_gemm(node: ir.Node) -> bool:
    """True for ``x W' + b`` with constant W and b and one reader."""
    return (
        node.op_type == "Gemm"
        and len(node.inputs) == 3
        and all(value is not None and value.const_value is not None for value in node.inputs[1:])
        and _attribute(node, "transB", 0) == 1
        and _attribute(node, "transA", 0) == 0
        and _attribute(node, "alpha", 1.0) == 1
        and _attribute(node, "beta", 1.0) == 1
        and node.inputs[2] is not None
        and node.inputs[2].shape is not None
        and len(node.inputs[2].shape) == 1
        and _users(node.outputs[0]) == 1
    )


def _attribute(node: ir.Node, name: str, default: float) -> float:
    return float(node.attributes[name].value) if name in node.attributes else default


def _sizes(value: ir.Value | None) -> list[int] | None:
    """The shape of one sample; None if a size is unknown."""
    if value is None or value.shape is None:
        return None
    sizes = [size for size in list(value.shape)[1:] if isinstance(size, int)]
    return sizes if len(sizes) == len(value.shape) - 1 else None


def _halves(split: ir.Node) -> bool:
    """True if a Split divides the channels into two equal parts."""
    sizes = [None if value.shape is None else value.shape[1] for value in split.outputs]
    return split.attributes["axis"].as_int() == 1 and isinstance(sizes[0], int) and sizes[0] == sizes[1]


def _plain_weights(conv: ir.Node) -> bool:
    constants = [value for value in conv.inputs[1:] if value is not None]
    return (
        all(value.const_value is not None for value in constants)
        and _attribute(conv, "group", 1) == 1
        and _no_auto_pad(conv)
    )


def _no_auto_pad(node: ir.Node) -> bool:
    return "auto_pad" not in node.attributes or node.attributes["auto_pad"].as_string() == "NOTSET"


def _bias(conv: ir.Node, channels: int) -> Array:
    given = len(conv.inputs) > 2 and conv.inputs[2] is not None
    return _array(conv.inputs[2]) if given else np.zeros(channels)


def _set_bias(model: ir.Model, conv: ir.Node, bias: Array) -> None:
    if len(conv.inputs) < 3:
        conv.resize_inputs(3)
    weight = conv.inputs[1]
    assert weight is not None
    assert weight.dtype is not None
    conv.replace_input_with(2, constant(model.graph, bias.astype(weight.dtype.numpy())))


def _replace_constant(model: ir.Model, node: ir.Node, index: int, values: Array) -> None:
    old = node.inputs[index]
    assert old is not None
    assert old.dtype is not None
    node.replace_input_with(index, constant(model.graph, values.astype(old.dtype.numpy())))


def _up(value: ir.Value | None, through: tuple[str, ...]) -> ir.Value | None:
    """Follow a value up through nodes of these kinds; None if a value on the way has another reader."""
    while value is not None and _users(value) == 1:
        node = value.producer()
        if node is None or node.op_type not in through:
            return value
        value = node.inputs[0]
    return None


def _channels_of_part(split: ir.Node, part: ir.Value) -> tuple[ir.Node, Array] | None:
    """The Conv that feeds a Split, and the output channels of one part, if no other part shares them."""
    conv_out = _up(split.inputs[0], ("Reshape",))
    conv = None if conv_out is None else conv_out.producer()
    if conv is None or conv.op_type != "Conv" or not _plain_weights(conv) or _users(conv.outputs[0]) != 1:
        return None
    axis = split.attributes["axis"].as_int()
    sizes, target = _sizes(conv.outputs[0]), _sizes(split.inputs[0])
    pieces = [
        None if part_sizes is None else part_sizes[axis - 1] for part_sizes in map(_sizes, split.outputs)
    ]
    if sizes is None or target is None or axis == 0 or math.prod(sizes) != math.prod(target):
        return None
    channel = np.broadcast_to(np.arange(sizes[0]).reshape(-1, *[1] * (len(sizes) - 1)), sizes)
    ends = np.cumsum([size or 0 for size in pieces])[:-1].tolist()
    divisions = np.split(channel.reshape(target), ends, axis=axis - 1)
    held = [np.unique(division) for division in divisions]
    if sum(len(one) for one in held) != sizes[0]:
        return None
    return conv, held[list(split.outputs).index(part)]
