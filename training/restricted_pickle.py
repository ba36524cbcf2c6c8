"""Read tensors out of a pickled checkpoint without running anything that is pickled inside.

A pickle names the functions and classes that build its objects. Here only those that build tensors and plain
containers are what they say; every other name becomes a placeholder that keeps nothing and does nothing.
"""

from __future__ import annotations

import collections
import pickle
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.errors import CheckpointError
from training.pretrained import read_weights

_TENSOR_BUILDERS = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch", "Size"): torch.Size,
}
_STORAGES = {
    "FloatStorage",
    "HalfStorage",
    "BFloat16Storage",
    "DoubleStorage",
    "LongStorage",
    "IntStorage",
    "ShortStorage",
    "CharStorage",
    "ByteStorage",
    "BoolStorage",
}


class Inert:
    """Stands where a pickled object of an unknown class would be."""

    def __new__(cls, *_arguments: Any, **_named: Any) -> Inert:
        """Made with whatever the pickle passes."""
        return super().__new__(cls)

    def __init__(self, *_arguments: Any, **_named: Any) -> None:
        """Keep nothing."""

    def __call__(self, *_arguments: Any, **_named: Any) -> Inert:
        """A pickled call gives another placeholder."""
        return Inert()

    def __setstate__(self, _state: Any) -> None:
        """Drop the state."""

    def __setitem__(self, _key: Any, _value: Any) -> None:
        """Drop the item."""

    def append(self, _value: Any) -> None:
        """Drop the value."""

    def extend(self, _values: Any) -> None:
        """Drop the values."""

    def add(self, _value: Any) -> None:
        """Drop the value."""


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler whose every unknown name is Inert."""

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may call: builders of tensors and containers, else the placeholder."""
        if (module, name) in _TENSOR_BUILDERS:
            return _TENSOR_BUILDERS[module, name]
        if module == "torch" and name in _STORAGES:
            return getattr(torch, name)
        return Inert


def _module() -> types.ModuleType:
    """What `torch.load` takes as a pickle module."""
    module = types.ModuleType("restricted_pickle_module")
    module.Unpickler = RestrictedUnpickler  # type: ignore[attr-defined]
    module.load = lambda file, **named: RestrictedUnpickler(file, **named).load()  # type: ignore[attr-defined]
    return module


def _is_torchscript(path: Path) -> bool:
    """Whether `torch.load` would hand the file to `torch.jit.load`, which runs what it finds.

    Asked of torch's own reader: another one may see other members in a zip made for that.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    return zipped and "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records()


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of `state_dict` or `model_state_dict` in a checkpoint (or of the checkpoint), on the CPU.

    Reads safetensors as well. Raises CheckpointError.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    if path.suffix == ".safetensors":
        return read_weights(path)
    try:
        if _is_torchscript(path):
            raise CheckpointError(
                "a TorchScript archive, which is a program; a checkpoint of weights is needed"
            )
        content = torch.load(path, map_location="cpu", pickle_module=_module(), weights_only=False)
    except Exception as error:
        raise CheckpointError(f"{path.name}: not a checkpoint that can be read: {error}") from error
    state = content
    if isinstance(content, dict):
        state = content.get("state_dict", content.get("model_state_dict", content))
    if not isinstance(state, dict):
        raise CheckpointError(f"{path.name}: holds no state dict")
    tensors = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path.name}: its state dict holds no tensors")
    return tensors
