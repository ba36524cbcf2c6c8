"""`manifest.json`: what a bundle says of itself. Every field is checked, an unknown one is refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.vocabulary import SPACE_MARK, VocabularyKind

GraphName = Literal["int8", "int4", "float32"]
GraphChoice = Literal["auto", "int8", "int4", "float32"]
"""`auto`: the manifest's default."""
FileName = Annotated[str, Field(min_length=1, max_length=100)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Language = Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]
"""ISO 639-1, or the three letters of ISO 639-3 for the many languages that have no other code."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class VocabularyEntry(_Strict):
    """How the outputs are spelled."""

    kind: VocabularyKind
    size: int = Field(ge=2)
    file: FileName
    word_separator: str = SPACE_MARK
    special_ids: tuple[int, ...] = ()


class InputEntry(_Strict):
    """What the graph takes."""

    kind: Literal["waveform"] = "waveform"
    min_samples: int = Field(ge=1)


class GraphEntry(_Strict):
    """One form of the network."""

    file: FileName
    opset: int = Field(ge=1)


class LanguageModelEntry(_Strict):
    """A character n-gram model for the beam search (`api/ngram.py`), and how much it counts.

    `weight` scales its log-probabilities, `bonus` is nats per character, `beam` the width it was chosen at.
    """

    file: FileName
    order: int = Field(ge=1, le=20)
    weight: float = Field(gt=0, le=5)
    bonus: float = Field(ge=0, le=10)
    beam: int = Field(ge=1, le=1024)


class Source(_Strict):
    """Where the weights come from; `revision` pins what was downloaded."""

    title: str
    url: str
    revision: str | None = None


class TrainingData(_Strict):
    """One set of recordings the model learned from."""

    name: str
    licence: str
    hours: float = Field(ge=0)


class Evaluation(_Strict):
    """Word and character error rate (fractions of one) on a named test set."""

    test_set: str
    language: Language
    utterances: int = Field(ge=1)
    wer: float = Field(ge=0)
    cer: float = Field(ge=0)
    decoding: str


class Speed(_Strict):
    """Processing time over audio time, with what it was measured on."""

    hardware: str
    threads: int = Field(ge=1)
    graph: GraphName
    clip_s: float = Field(gt=0)
    rtf: float = Field(gt=0)


class Manifest(_Strict):
    """`manifest.json`."""

    schema_version: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    version: str = Field(min_length=1, max_length=40)
    languages: tuple[Language, ...] = Field(min_length=1)
    sample_rate_hz: int = Field(ge=8_000, le=48_000)
    frame_stride_s: float = Field(gt=0, le=1)
    max_window_s: float = Field(ge=1, le=3600)
    """Shorter windows would cut through most words."""
    blank_id: int = Field(ge=0)
    vocabulary: VocabularyEntry
    text_normalisation: tuple[str, ...] = ()
    input: InputEntry
    graphs: dict[GraphName, GraphEntry] = Field(min_length=1)
    default_graph: GraphName
    graph_without_vnni: GraphName | None = None
    """Taken instead where our kernels run on AVX2 alone, which multiplies four bits faster than eight."""
    decoder: bool = False
    """A decoder network has searched already, inside of the graph: hotwords choose among what it found."""
    language_model: LanguageModelEntry | None = None
    files: dict[FileName, Sha256] = Field(min_length=1)
    source: Source
    licence: str = Field(min_length=1)
    training_data: tuple[TrainingData, ...] = ()
    evaluation: tuple[Evaluation, ...] = ()
    speed: tuple[Speed, ...] = ()
    git_commit: str | None = None
    parameters: int = Field(ge=1)
