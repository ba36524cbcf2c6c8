"""Published checkpoints: read as `transformers` stores them, and put into our networks tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from training.errors import CheckpointError

_UNREADABLE = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)
"""What `transformers` raises for a folder that it did not expect, depending on what it looks at first."""
_MADE = ("masked_spec_embed", "proj_out.weight")
"""What may be missing: who fine-tunes without masks has not the one, the other is the embedding again."""


def from_hub(kind: Any, source: str, revision: str | None, **options: Any) -> Any:
    """`kind.from_pretrained` of a folder or of a name on the hub. Raises CheckpointError."""
    try:
        return kind.from_pretrained(source, revision=revision or "main", **options)
    except _UNREADABLE as error:
        raise CheckpointError(f"{source}: no {kind.__name__} there: {_first_line(error)}") from error


def config_from_hub(kind: Any, source: str, revision: str | None, *families: str) -> Any:
    """`kind`, a configuration, of a folder or of a name on the hub. Raises CheckpointError.

    `families`: the `model_type`s that it may have; `transformers` reads any file as any configuration, and a
    folder without one as the default configuration.
    """
    try:
        described, _ = kind.get_config_dict(source, revision=revision or "main")
    except _UNREADABLE as error:
        raise CheckpointError(f"{source}: no config.json there: {_first_line(error)}") from error
    if not described:
        raise CheckpointError(f"{source}: no config.json there")
    if (family := described.get("model_type")) not in families:
        raise CheckpointError(f"{source}: config.json says model_type {family!r}, expected {families[0]!r}")
    return from_hub(kind, source, revision)


def model_from_hub(
    kind: Any, source: str, revision: str | None, *families: str, unused: tuple[str, ...] = ()
) -> Any:
    """`kind`, a model, in float32, of a folder or of a name on the hub. Raises CheckpointError.

    `families`: see `config_from_hub`. `unused`: beginnings of the names of tensors that nobody will look at.
    What the checkpoint lacks of the others `transformers` fills with random numbers; here it is an error.
    """
    config_from_hub(kind.config_class, source, revision, *families)
    model, found = from_hub(kind, source, revision, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(name for name in found["missing_keys"] if not name.startswith((*_MADE, *unused))):
        raise CheckpointError(f"{source}: its weights lack {missing[0]} ({len(missing)} in all)")
    return model


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_weights(path: Path) -> dict[str, Tensor]:
    """What another run left as `weights.safetensors`. Raises CheckpointError."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: no weights can be read: {error}") from error


class FrozenNorms(nn.Module):
    """One whose batch normalisations keep their statistics while it trains, where `frozen_norms` is set.

    Their scales still learn.
    """

    frozen_norms = False

    def train(self, mode: bool = True) -> Self:
        """Training mode, or evaluation mode."""
        super().train(mode)
        if mode and self.frozen_norms:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm1d):
                    module.eval()
        return self


def rest_if_frozen(part: nn.Module) -> None:
    """Evaluation mode for what does not learn: no dropout, and no new statistics of its normalisations."""
    if not any(parameter.requires_grad for parameter in part.parameters()):
        part.eval()


def fill(
    network: nn.Module,
    state: Mapping[str, Tensor],
    *,
    new: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
) -> None:
    """Put `state` into `network`, all of it into all of it.

    Args:
        network: what is filled; its tensors stay float32.
        state: tensors under the network's own names.
        new: beginnings of names that the network keeps as they are, whatever `state` has for them.
        optional: names that `state` may lack.

    Raises CheckpointError naming the first tensor that has no place, another shape, or is missing.
    """
    places = {name: place for name, place in network.state_dict().items() if not name.startswith(new)}
    given = {name: value for name, value in state.items() if not name.startswith(new)}
    for name, value in given.items():
        if name not in places:
            raise CheckpointError(f"{name}: the network has no such tensor; is it of this configuration?")
        if value.shape != places[name].shape:
            shapes = f"{tuple(value.shape)}, expected {tuple(places[name].shape)}"
            raise CheckpointError(f"{name} has shape {shapes}")
    if missing := [name for name in places if name not in given and name not in optional]:
        raise CheckpointError(f"{missing[0]} is missing ({len(missing)} in all)")
    network.load_state_dict({name: value.float() for name, value in given.items()}, strict=False)
