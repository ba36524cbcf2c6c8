"""The tokens of a Whisper tokenizer that a language needs, and the tokenizer that makes do with them.

A token of byte-level BPE is made by merging two others. The kept set is closed under that, and holds every
single byte, so every text can still be written; a word whose token is gone is written in pieces.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from api.vocabulary import BLANK_TOKEN, SPACE_MARK, Vocabulary
from training.errors import CheckpointError, ConfigError
from training.files import written_whole
from training.recipes.whisper_seq2seq.model import Prompt
from training.tokenizer import BYTE_SPACE

CAPITALS = 0.3
"""How much a text counts with its first letter, or every word's, in capitals."""


@dataclass(frozen=True)
class CutVocabulary:
    """Which of a tokenizer's tokens are kept: text first, then the end, then those of the prompt."""

    ids: tuple[int, ...]
    """By new id, the id in the base."""
    texts: int
    """How many of them write text."""
    merges: tuple[tuple[str, str], ...]
    spelled: tuple[str, ...]
    """Of the tokens that write text, in the alphabet of GPT-2's bytes."""
    control: tuple[str, ...]
    """Names of the prompt's tokens."""

    @property
    def end(self) -> int:
        """The id that ends a text."""
        return self.texts

    def prompt(self) -> Prompt:
        """What a decoding starts with; tokens of the prompt are never said."""
        start = tuple(range(self.texts + 1, len(self.ids)))
        return Prompt(start, self.end, start)

    def vocabulary(self) -> Vocabulary:
        """For the bundle."""
        text = (token.replace(BYTE_SPACE, SPACE_MARK) for token in self.spelled)
        tokens = (*text, BLANK_TOKEN, *self.control)
        return Vocabulary(tokens, self.end, "bpe", frozenset(range(self.end + 1, len(tokens))))

    def tokenizer(self) -> Any:
        """From a text to new ids and back, a `tokenizers.Tokenizer`."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        places = {token: index for index, token in enumerate(self.spelled)}
        found = Tokenizer(models.BPE(vocab=places, merges=list(self.merges)))
        found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        found.decoder = decoders.ByteLevel()
        return found

    def save(self, path: Path) -> None:
        """As JSON, whole or not at all."""
        with written_whole(path) as partial:
            partial.write_text(json.dumps(asdict(self), ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> CutVocabulary:
        """The reverse of `save`. Raises CheckpointError."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            merges = tuple((left, right) for left, right in content["merges"])
            spelled, control = tuple(content["spelled"]), tuple(content["control"])
            return cls(tuple(content["ids"]), content["texts"], merges, spelled, control)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: no cut vocabulary: {error}") from error


def cut_vocabulary(
    tokenizer: Any, prompt: Prompt, texts: Iterable[tuple[str, float]], size: int
) -> CutVocabulary:
    """The `size` tokens of text that `texts` need most; the most frequent merges of letters fill up the rest.

    Args:
        tokenizer: a fast one of `transformers`, byte-level BPE.
        prompt: of the base.
        texts: of the language, in any case, and how often each occurs.
        size: tokens of text to keep, the 256 bytes among them.

    Raises ConfigError where `size` is too small for the bytes.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    places: dict[str, int] = described["vocab"]
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in described["merges"]]
    parts = {left + right: (left, right) for left, right in merges}
    control = set(tokenizer.added_tokens_decoder)
    kept = {token for token, index in places.items() if len(token) == 1 and index not in control}
    if size < len(kept):
        raise ConfigError(f"{size} tokens: the single bytes alone are {len(kept)}")
    encoder = tokenizer.backend_tokenizer
    counts = counted(lambda text: encoder.encode(f" {text}", add_special_tokens=False).tokens, texts)
    for token, _ in counts.most_common():
        needed = with_parts(token, parts) - kept
        if len(kept) + len(needed) <= size:
            kept |= needed
    for left, right in merges:
        whole = left + right
        if len(kept) >= size:
            break
        if left in kept and right in kept and whole.removeprefix(BYTE_SPACE).isalpha():
            kept.add(whole)
    spelled = sorted(kept, key=places.__getitem__)
    ids = (*(places[token] for token in spelled), prompt.end, *prompt.ids)
    used = tuple((a, b) for a, b in merges if a in kept and b in kept and a + b in kept)
    names = tuple(tokenizer.convert_ids_to_tokens(list(prompt.ids)))
    return CutVocabulary(ids, len(spelled), used, tuple(spelled), names)


def counted(tokens_of: Callable[[str], list[str]], texts: Iterable[tuple[str, float]]) -> Counter[str]:
    """How often texts need each token, in small and capital letters; a text occurs so often."""
    counts: Counter[str] = Counter()
    for text, often in texts:
        forms = ((text, 1.0), (f"{text[:1].upper()}{text[1:]}.", CAPITALS), (text.title(), CAPITALS))
        for form, weight in forms:
            for token in tokens_of(form):
                counts[token] += often * weight  # type: ignore[assignment]  # a Counter counts in fractions, too
    return counts


def with_parts(token: str, parts: Mapping[str, Sequence[str]]) -> set[str]:
    """A token and all that it is merged from."""
    found: set[str] = set()
    waiting = [token]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += parts.get(one, ())
    return found


def written_whole_words(tokenizer: Any, cut: Any, text: str) -> list[bool]:
    """Per token that `cut`, a `tokenizers.Tokenizer`, writes: has its word the same tokens as before?

    A network that knew the token of a whole word gives the first of its pieces next to nothing.
    """
    whole = tokenizer.backend_tokenizer
    found: list[bool] = []
    for piece, _ in cut.pre_tokenizer.pre_tokenize_str(text):
        ours = [token.value for token in cut.model.tokenize(piece)]
        theirs = [token.value for token in whole.model.tokenize(piece)]
        found += [ours == theirs] * len(ours)
    return found


def unchanged_share(tokenizer: Any, cut: CutVocabulary, texts: Iterable[str]) -> float:
    """How many of the texts' words, each counted once, are still written with the same tokens."""
    ours = cut.tokenizer()
    words = {f" {word}" for text in texts for word in text.split()}
    same = sum(all(written_whole_words(tokenizer, ours, word)) for word in words)
    return float(same / max(1, len(words)))
