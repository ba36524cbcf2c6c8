"""Hand nodes of an optimised graph over to our operators.

Only the few fields that are looked at are declared; protobuf carries everything else, the weights above
all, through untouched. That takes less than the ``onnx`` package, which the service does not need otherwise.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

DOMAIN = "asr"
OPERATOR = "DepthwiseQLinearConv"
MAX_TAPS = 128  # as in depthwise.c
BIAS, MASK = 8, 9  # places of the optional inputs; QLinearConv has the first nine

# Of onnx.proto (ONNX IR): message -> (field, number, type, repeated).
_Field = descriptor_pb2.FieldDescriptorProto
_FIELDS: dict[str, list[tuple[str, int, Any, bool]]] = {
    "Tensor": [("dims", 1, _Field.TYPE_INT64, True), ("name", 8, _Field.TYPE_STRING, False)],
    "Attribute": [
        ("name", 1, _Field.TYPE_STRING, False),
        ("i", 3, _Field.TYPE_INT64, False),
        ("g", 6, "Graph", False),
        ("ints", 8, _Field.TYPE_INT64, True),
        ("graphs", 11, "Graph", True),
    ],
    "Node": [
        ("input", 1, _Field.TYPE_STRING, True),
        ("output", 2, _Field.TYPE_STRING, True),
        ("op_type", 4, _Field.TYPE_STRING, False),
        ("attribute", 5, "Attribute", True),
        ("domain", 7, _Field.TYPE_STRING, False),
    ],
    "Value": [("name", 1, _Field.TYPE_STRING, False)],
    "Graph": [("node", 1, "Node", True), ("initializer", 5, "Tensor", True), ("output", 12, "Value", True)],
    "OperatorSet": [("domain", 1, _Field.TYPE_STRING, False), ("version", 2, _Field.TYPE_INT64, False)],
    "Model": [("graph", 7, "Graph", False), ("opset_import", 8, "OperatorSet", True)],
}


@cache
def _model_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="asr_onnx.proto", package="asr_onnx", syntax="proto2")
    for message, fields in _FIELDS.items():
        declared = file.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            field = declared.field.add(name=name, number=number)
            field.label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
            if isinstance(kind, str):
                field.type, field.type_name = _Field.TYPE_MESSAGE, f".asr_onnx.{kind}"
            else:
                field.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("asr_onnx.Model"))


def hand_over(model: bytes) -> tuple[bytes, int]:
    """An optimised ONNX model -> the model with our operators, and how many nodes they took.

    A mask that only such a node reads goes into the node: it takes the minimum while it reads its input.
    """
    parsed = _model_class().FromString(model)
    graph = parsed.graph
    made_by = {name: node for node in graph.node for name in node.output}
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    readers = _readers(graph)
    gone = set()
    taken = 0
    for node in graph.node:
        if not _is_ours(node, shapes):
            continue
        node.op_type, node.domain = OPERATOR, DOMAIN
        taken += 1
        mask = made_by.get(node.input[0])
        if mask is not None and _is_mask(mask, shapes) and readers[node.input[0]] == 1:
            node.input[0] = mask.input[0]
            node.input.extend([""] * (MASK - len(node.input)))
            node.input.append(mask.input[1])
            gone.add(mask.output[0])
    if not taken:
        return model, 0
    kept = [node for node in graph.node if node.output[0] not in gone]
    del graph.node[:]
    graph.node.extend(kept)
    parsed.opset_import.add(domain=DOMAIN, version=1)
    return parsed.SerializeToString(), taken


def _readers(graph: Any) -> Counter[str]:
    """How often each value is read, also by the graphs inside of nodes and as an output."""
    found = Counter(name for node in graph.node for name in node.input)
    found.update(value.name for value in graph.output)
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                found.update(_readers(inner))
    return found


def _is_ours(node: Any, shapes: dict[str, list[int]]) -> bool:
    """Whether the kernel can do it: one channel per group, a scale per channel, as wide as its input."""
    if (node.domain, node.op_type) != ("com.microsoft", "QLinearConv"):
        return False
    number: dict[str, int] = {item.name: item.i for item in node.attribute}
    numbers: dict[str, list[int]] = {item.name: list(item.ints) for item in node.attribute}
    channels = number.get("group", 1)
    if number.get("channels_last") != 1 or channels == 1:
        return False
    match numbers.get("kernel_shape"), numbers.get("strides"), numbers.get("dilations"), numbers.get("pads"):
        case [1, taps], [1, 1], [1, dilation], [0, before, 0, after]:
            weights, scales, zeros = (shapes.get(name) for name in node.input[3:6])
            return (
                1 <= taps <= MAX_TAPS
                and 1 <= dilation < 2**31
                and before >= 0 <= after
                and before + after == (taps - 1) * dilation
                and (weights, scales, zeros) == ([channels, 1, 1, taps], [channels], [channels])
            )
    return False


def _is_mask(node: Any, shapes: dict[str, list[int]]) -> bool:
    """The exporter's: the minimum of a value and a mask that the graph computes."""
    return (node.domain, node.op_type) == ("", "Min") and len(node.input) == 2 and node.input[1] not in shapes
