"""Llama's tokenizer, which Moonshine writes with, as a bundle's vocabulary; and cut to what a language needs.

A token is made by merging two others, and what has no token is written in bytes of UTF-8 (`<0x41>`). In a
bundle every token is written in the alphabet of GPT-2's bytes, as those of Whisper are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from api.vocabulary import BLANK_TOKEN, SPACE_MARK, Vocabulary, byte_of_character
from training.compression.vocabulary import counted, with_parts
from training.errors import CheckpointError, ConfigError
from training.files import written_whole
from training.recipes.whisper_seq2seq.model import Prompt

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
FEWEST = 500
"""Bytes and single characters, and some more."""


@dataclass(frozen=True)
class Tokens:
    """A tokenizer, and what the network's outputs mean."""

    described: dict[str, Any]
    """As `tokenizers` describes it; its ids are outputs."""
    ids: tuple[int, ...]
    """By output, the id in the published tokenizer."""
    end: int
    """The output that ends a text, which is the bundle's blank."""
    start: int
    """The output that every text begins with."""

    def spelled(self) -> dict[int, str]:
        """Outputs that write text, and what; the byte of what has a token of its own is none of them."""
        places: dict[str, int] = self.described["model"]["vocab"]
        control = {self.end, self.start, places.get(UNKNOWN, -1)}
        found = {in_bytes(token): place for token, place in places.items() if BYTE.fullmatch(token)}
        found |= {in_bytes(token): place for token, place in places.items() if not BYTE.fullmatch(token)}
        return {place: token for token, place in found.items() if place not in control}

    def prompt(self) -> Prompt:
        """A decoding starts with one token; that and all that write nothing are never said."""
        silent = set(range(len(self.ids))) - self.spelled().keys() - {self.end}
        return Prompt((self.start,), self.end, tuple(sorted(silent)))

    def vocabulary(self) -> Vocabulary:
        """For the bundle."""
        spelled = self.spelled()
        tokens = [spelled.get(output, f"<unused_{output}>") for output in range(len(self.ids))]
        tokens[self.end] = BLANK_TOKEN
        return Vocabulary(tuple(tokens), self.end, "bpe", frozenset(self.prompt().suppressed))

    def tokenizer(self) -> Any:
        """From a text to outputs and back, a `tokenizers.Tokenizer`."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(json.dumps(self.described))

    def encode(self, text: str) -> list[int]:
        """Outputs that write a text, without start and end."""
        ids: list[int] = self.tokenizer().encode(text, add_special_tokens=False).ids
        return ids

    def save(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        with written_whole(path) as partial:
            partial.write_text(json.dumps(asdict(self), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Tokens:
        """The reverse of `save`. Raises CheckpointError."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(content["described"], tuple(content["ids"]), content["end"], content["start"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: no tokens: {error}") from error


def published_tokens(described: dict[str, Any], outputs: int) -> Tokens:
    """All that a published network writes with."""
    places = described["model"]["vocab"]
    return Tokens(described, tuple(range(outputs)), places[END], places[START])


def in_bytes(token: str) -> str:
    """A token of Llama's in the alphabet of GPT-2's bytes, the space as U+2581."""
    characters = {byte: character for character, byte in byte_of_character().items()}
    if found := BYTE.fullmatch(token):
        return characters[int(found[1], 16)]
    return "".join(characters[byte] for byte in token.replace(SPACE_MARK, " ").encode())


def read_tokenizer(path: Path) -> dict[str, Any]:
    """``tokenizer.json`` of a published network. Raises CheckpointError."""
    try:
        described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        model = described["model"]
        known = model["byte_fallback"] and {START, END} <= model["vocab"].keys()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: no tokenizer: {error}") from error
    if not known:
        raise CheckpointError(f"{path}: not the tokenizer of a Moonshine, which has {START}, {END} and bytes")
    return described


def cut_tokens(described: dict[str, Any], texts: Iterable[tuple[str, float]], size: int) -> Tokens:
    """The `size` tokens that `texts` need most, closed under merging, with every byte.

    Args:
        described: of :func:`read_tokenizer`.
        texts: of the language, in any case, and how often each occurs.
        size: tokens of text to keep.

    Raises ConfigError where `size` is too small for the bytes.
    """
    from tokenizers import Tokenizer

    places: dict[str, int] = described["model"]["vocab"]
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in described["model"]["merges"]]
    parts: dict[str, Sequence[str]] = {}
    for left, right in pairs:
        parts.setdefault(left + right, (left, right))
    kept = {token for token in places if _always(token, places)}
    if size < max(FEWEST, len(kept)):
        raise ConfigError(f"{size} tokens: expected {max(FEWEST, len(kept))} at least")
    tokenizer = Tokenizer.from_str(json.dumps(described))
    counts = counted(lambda text: tokenizer.encode(text, add_special_tokens=False).tokens, texts)
    for token, _ in counts.most_common():
        if token not in places or token in (START, END, UNKNOWN):
            continue  # a text that has the name of a control token
        needed = with_parts(token, parts) - kept
        if len(kept) + len(needed) <= size:
            kept |= needed
    ordered = sorted(kept, key=places.__getitem__)
    merges = [[a, b] for a, b in pairs if a in kept and b in kept and a + b in kept]
    vocab = {token: index for index, token in enumerate(ordered)}
    model = described["model"] | {"vocab": vocab, "merges": merges, "unk_token": None}
    small = described | {"model": model, "added_tokens": [], "post_processor": None}
    ids = (*(places[token] for token in ordered), places[END], places[START])
    return Tokens(small, ids, len(ordered), len(ordered) + 1)


def _always(token: str, places: dict[str, int]) -> bool:
    """Printable ASCII, the space, and the bytes of everything else."""
    if found := BYTE.fullmatch(token):
        return chr(int(found[1], 16)) not in places or int(found[1], 16) > 0x7E
    return token == SPACE_MARK or (len(token) == 1 and " " < token <= "~")


def written_as_before(whole: Any, cut: Any, text: str) -> list[bool]:
    """Per token that `cut`, a `tokenizers.Tokenizer`, writes: has its word the same tokens in `whole`?

    A network that knew the token of a whole word gives the first of its pieces next to nothing.
    """
    found: list[bool] = []
    for word in text.split(" ") if text else ():  # other white space is within words
        ours = cut.encode(word, add_special_tokens=False).tokens
        found += [ours == whole.encode(word, add_special_tokens=False).tokens] * len(ours)
    return found
