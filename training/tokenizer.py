"""Byte-level BPE tokenizers of `transformers` (Whisper's) as a bundle's vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from api.vocabulary import BLANK_TOKEN, SPACE_MARK, Vocabulary
from training.errors import CheckpointError
from training.pretrained import from_hub

BYTE_SPACE = "\u0120"
"""What GPT-2's table writes for the space byte."""


def load_tokenizer(source: str, revision: str | None = None) -> Any:
    """A tokenizer from a folder or the hub. Raises CheckpointError."""
    from transformers import AutoTokenizer

    return from_hub(AutoTokenizer, source, revision)


class ByteLevelCodec:
    """Encodes with the tokenizer; decodes as the service does, with every control token dropped by its id."""

    def __init__(self, tokenizer: Any, outputs: int | None = None, blank_id: int | None = None) -> None:
        """Take a tokenizer's tokens as outputs.

        Args:
            tokenizer: of `transformers`.
            outputs: of the head; default: the tokenizer's size.
            blank_id: default: the tokenizer's pad token.

        Raises CheckpointError where they do not fit each other.
        """
        self.tokenizer = tokenizer
        known = tokenizer.get_vocab()
        if missing := sum(symbol not in known for symbol in ByteLevel.alphabet()):
            # transformers makes an empty tokenizer of a folder without its files, and texts then have no ids
            raise CheckpointError(
                f"{tokenizer.name_or_path}: the tokenizer lacks {missing} of 256 bytes; tokenizer.json, or "
                "vocab.json and merges.txt, belong beside config.json"
            )
        size = outputs if outputs is not None else len(tokenizer)
        blank = blank_id if blank_id is not None else tokenizer.pad_token_id
        if blank is None or not 0 <= blank < size:
            raise CheckpointError(f"blank id {blank} is not one of the {size} outputs")
        named = min(size, len(tokenizer))
        tokens = [
            token.replace(BYTE_SPACE, SPACE_MARK)
            for token in tokenizer.convert_ids_to_tokens(list(range(named)))
        ]
        tokens += [f"<unused_{index}>" for index in range(named, size)]
        control = {index for index in tokenizer.added_tokens_decoder if index < size}
        control |= {index for index in tokenizer.all_special_ids if index < size}
        control |= set(range(named, size))
        tokens[blank] = BLANK_TOKEN
        self.vocabulary = Vocabulary(tuple(tokens), blank, "bpe", frozenset(control - {blank}))

    def encode(self, text: str) -> list[int]:
        """Token ids without control tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def outside(self, text: str) -> list[str]:
        """Every text has bytes: nothing is outside."""
        return []


def train_tokenizer(texts: list[str], folder: Path, size: int = 400) -> Path:
    """A small byte-level tokenizer in the form of Whisper's, for rehearsals without the hub.

    Its control tokens are Whisper's first ones; the pad token is `<|endoftext|>`, as Whisper has it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import WhisperTokenizer

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    folder.mkdir(parents=True, exist_ok=True)
    inner.model.save(str(folder))
    tokenizer = WhisperTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        unk_token="<|endoftext|>",  # noqa: S106  names of tokens, no passwords
        bos_token="<|endoftext|>",  # noqa: S106
        eos_token="<|endoftext|>",  # noqa: S106
        pad_token="<|endoftext|>",  # noqa: S106
    )
    languages = [f"<|{code}|>" for code in ("en", "ru", "tr", "az", "vi")]
    tasks = ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>"]
    control = ["<|startoftranscript|>", *languages, *tasks, "<|notimestamps|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": control})
    tokenizer.save_pretrained(str(folder))
    return folder
