"""Operators of our own for ONNX Runtime, where its own are far from what the processor can do.

One so far: the depthwise INT8 convolution of QuartzNet and Citrinet (``depthwise.c``). Bundles know nothing
of it. ONNX Runtime optimises the graph as always, the nodes that it made are handed over to our operator,
and the result is used only if it gives the same bits as ONNX Runtime alone.
"""

from api.kernels.sessions import Kernels, instructions, open_session

__all__ = ["Kernels", "instructions", "open_session"]
