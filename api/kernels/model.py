"""ONNX graphs as bytes, read and written with protobuf alone.

Only the few fields that are looked at are declared; everything else is carried through untouched. That takes
less than the ``onnx`` package, which the service does not need otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

FLOAT, UINT8, INT8, INT64 = 1, 2, 3, 7
"""Of onnx.proto: types of a tensor,"""
INTS = 7
"""and of an attribute."""

# Of onnx.proto (ONNX IR): message -> (field, number, type, repeated).
_Field = descriptor_pb2.FieldDescriptorProto
_FIELDS: dict[str, list[tuple[str, int, Any, bool]]] = {
    "Tensor": [
        ("dims", 1, _Field.TYPE_INT64, True),
        ("data_type", 2, _Field.TYPE_INT32, False),
        ("name", 8, _Field.TYPE_STRING, False),
        ("raw_data", 9, _Field.TYPE_BYTES, False),
    ],
    "Attribute": [
        ("name", 1, _Field.TYPE_STRING, False),
        ("i", 3, _Field.TYPE_INT64, False),
        ("g", 6, "Graph", False),
        ("ints", 8, _Field.TYPE_INT64, True),
        ("graphs", 11, "Graph", True),
        ("type", 20, _Field.TYPE_INT32, False),
    ],
    "Node": [
        ("input", 1, _Field.TYPE_STRING, True),
        ("output", 2, _Field.TYPE_STRING, True),
        ("name", 3, _Field.TYPE_STRING, False),
        ("op_type", 4, _Field.TYPE_STRING, False),
        ("attribute", 5, "Attribute", True),
        ("domain", 7, _Field.TYPE_STRING, False),
    ],
    "Dimension": [("dim_value", 1, _Field.TYPE_INT64, False)],
    "Shape": [("dim", 1, "Dimension", True)],
    "TensorType": [("elem_type", 1, _Field.TYPE_INT32, False), ("shape", 2, "Shape", False)],
    "Type": [("tensor_type", 1, "TensorType", False)],
    "Value": [("name", 1, _Field.TYPE_STRING, False), ("type", 2, "Type", False)],
    "Graph": [
        ("node", 1, "Node", True),
        ("name", 2, _Field.TYPE_STRING, False),
        ("initializer", 5, "Tensor", True),
        ("input", 11, "Value", True),
        ("output", 12, "Value", True),
    ],
    "OperatorSet": [("domain", 1, _Field.TYPE_STRING, False), ("version", 2, _Field.TYPE_INT64, False)],
    "Model": [
        ("ir_version", 1, _Field.TYPE_INT64, False),
        ("graph", 7, "Graph", False),
        ("opset_import", 8, "OperatorSet", True),
    ],
}


@cache
def model_class() -> Any:
    """The message of a whole model."""
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


def graphs_of(graph: Any) -> Iterator[Any]:
    """The graph, and those inside of its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from graphs_of(inner)


def readers_of(graph: Any) -> Counter[str]:
    """How often each value is read, also by the graphs inside of nodes and as an output."""
    found: Counter[str] = Counter()
    for each in graphs_of(graph):
        found.update(name for node in each.node for name in node.input)
        found.update(value.name for value in each.output)
    return found


def constants_of(graph: Any) -> dict[str, Any]:
    """The tensors of a graph that whoever runs it cannot replace, by name."""
    replaceable = {value.name for value in graph.input}
    return {tensor.name: tensor for tensor in graph.initializer if tensor.name not in replaceable}


def drop_unread(graph: Any, names: set[str]) -> None:
    """Take away those of the tensors that nobody reads any more."""
    unread = names - readers_of(graph).keys()
    keep_only(graph.initializer, [tensor for tensor in graph.initializer if tensor.name not in unread])


def keep_only(items: Any, wanted: list[Any]) -> None:
    """Of a repeated field."""
    del items[:]
    items.extend(wanted)
