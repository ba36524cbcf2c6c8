"""Have a decoder's graph give each different frame once (``api.frames``).

The contract's ``log_probs`` has a row for every frame. Where the graph's last step only gathers those rows
from others, of which there are far fewer, the session gives those and the places instead.
"""

from __future__ import annotations

from typing import Any

from api.kernels.model import FLOAT, INT64, readers_of

ROWS, PLACES = "log_probs.rows", "log_probs.places"
"""Outputs in place of ``log_probs``: float32 ``(..., vocabulary)``, and int64 ``(batch, frames, indices)``,
which one of them each frame is."""
DIMENSIONS = 3  # of the rows (steps, batch, vocabulary), as of the places


def give_rows(graph: Any) -> bool:
    """Change a graph's outputs; whether it is such a graph."""
    output = next((value for value in graph.output if value.name == "log_probs"), None)
    last = next((node for node in graph.node if list(node.output) == ["log_probs"]), None)
    if output is None or last is None or (last.domain, last.op_type) != ("", "GatherND"):
        return False
    if any(item.i for item in last.attribute):  # batch_dims
        return False
    made_by = {name: node for node in graph.node for name in node.output}
    readers = readers_of(graph)
    if any(name not in made_by or readers[name] != 1 for name in last.input):
        return False
    vocabulary = output.type.tensor_type.shape.dim[-1].dim_value
    for name, new, kind in zip(last.input, (ROWS, PLACES), (FLOAT, INT64), strict=True):
        maker = made_by[name]
        maker.output[list(maker.output).index(name)] = new
        declared = graph.output.add(name=new).type.tensor_type
        declared.elem_type = kind
        for _ in range(DIMENSIONS):
            declared.shape.dim.add()
        if new == ROWS and vocabulary:
            declared.shape.dim[-1].dim_value = vocabulary
    graph.output.remove(output)
    graph.node.remove(last)
    return True
