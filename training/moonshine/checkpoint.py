"""A published Moonshine: a folder as `transformers` stores it, or its name on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.errors import CheckpointError
from training.moonshine.model import Moonshine, Shape, from_transformers
from training.moonshine.vocabulary import Tokens, published_tokens, read_tokenizer
from training.pretrained import fill, from_hub, model_from_hub


class Published:
    """Network, tokenizer, and what its outputs mean."""

    def __init__(self, base: str, revision: str | None = None) -> None:
        """Raises CheckpointError."""
        from transformers import MoonshineForConditionalGeneration

        model = model_from_hub(MoonshineForConditionalGeneration, base, revision, "moonshine")
        try:
            shape = Shape.from_transformers(model.config)
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{base}: {error}") from error
        described = _tokenizer(base, revision)
        if (written := max(described["model"]["vocab"].values()) + 1) > shape.vocabulary:
            raise CheckpointError(
                f"{base}: tokenizer.json has {written} tokens, the network {shape.vocabulary} outputs"
            )
        self.tokens: Tokens = published_tokens(described, shape.vocabulary)
        self.network = Moonshine(shape, self.tokens.prompt())
        fill(self.network, from_transformers(model.state_dict()))
        self.network.eval()


def _tokenizer(base: str, revision: str | None) -> dict[str, Any]:
    """What ``tokenizer.json`` says."""
    folder = Path(base)
    if folder.is_dir():
        return read_tokenizer(folder / "tokenizer.json")
    from huggingface_hub import hf_hub_download

    class Download:
        @staticmethod
        def from_pretrained(source: str, revision: str) -> str:
            return hf_hub_download(source, "tokenizer.json", revision=revision)

    return read_tokenizer(Path(from_hub(Download, base, revision)))
