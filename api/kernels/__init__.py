"""Operators of our own for ONNX Runtime, where its own are far from what the processor can do.

The depthwise and the pointwise INT8 convolutions of QuartzNet and Citrinet (``depthwise.c``,
``pointwise.c``), and what is in float before and behind them: the front end's blocks and filters, the head's
input (``frames.c``, ``mel.c``, ``head_input.c``); products with weights of four bits (``four_bits.c``).
Bundles know nothing of them. ONNX Runtime optimises the graph as always, the nodes that it made are handed
over to our operators, and the result is used only if it gives the same bits as ONNX Runtime alone, or, with
four bits, if each product is nearly the same.
"""

from api.kernels.library import Kernels, instructions
from api.kernels.rows import PLACES, ROWS
from api.kernels.sessions import open_sessions, outputs_of

__all__ = ["PLACES", "ROWS", "Kernels", "instructions", "open_sessions", "outputs_of"]
