"""What ``session.update`` may say, checked, and the session as the server describes it."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from api.errors import InvalidRequestError, from_validation
from api.forms import Hotword, LanguageCode, Pauses, check_options
from api.live.listener import AudioForm
from api.live.pcm import Encoding
from api.multipart import refuse_not_offered
from api.settings import Settings
from api.transcriber import Options
from api.vad import VadOptions

_KINDS = {
    "none_required": "Input should be null",
    "model_type": "Input should be an object",
    "tuple_type": "Input should be a list",
}
"""pydantic's types of error -> what a caller is told, who sent JSON and not Python."""

_NULL_IS_ABSENT = frozenset(
    {
        *("type", "audio", "input", "format", "transcription", "model", "keywords"),
        *("threshold", "prefix_padding_ms", "silence_duration_ms"),
    }
)


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_G711_RATE_HZ = 8000


class AudioFormat(_Shape):
    """``audio/pcm`` is 16-bit little-endian at ``rate`` Hz; the two G.711 forms have 8,000."""

    type: Encoding = "audio/pcm"
    rate: int | None = Field(default=None, ge=8000, le=48000)

    @field_validator("rate")
    @classmethod
    def _has_the_rate(cls, rate: int | None, info: ValidationInfo) -> int | None:
        """G.711 at another rate would be heard at the wrong speed."""
        encoding = info.data.get("type", "audio/pcm")
        if encoding != "audio/pcm" and rate not in (None, _G711_RATE_HZ):
            raise PydanticCustomError(
                "value_error", "{encoding} has {rate_hz} Hz", {"encoding": encoding, "rate_hz": _G711_RATE_HZ}
            )
        return rate

    @property
    def rate_hz(self) -> int:
        """Samples per second of what comes."""
        return (self.rate or 24000) if self.type == "audio/pcm" else _G711_RATE_HZ


class Transcription(_Shape):
    """``prompt`` and ``delay`` are accepted and have no effect."""

    model: str = Field(default="", max_length=100)
    language: LanguageCode | None = None
    keywords: tuple[Hotword, ...] = ()
    prompt: str | None = Field(default=None, max_length=10000)
    delay: Literal["minimal", "low", "medium", "high", "xhigh"] | None = None


class TurnDetection(Pauses):
    """When an utterance begins and ends. What concerns answers of a model that talks has no effect.

    ``semantic_vad``, the default of OpenAI's Agents SDK, ends utterances at the same pauses: nothing here
    judges whether a sentence is finished.
    """

    type: Literal["server_vad", "semantic_vad"] = "server_vad"
    eagerness: Literal["low", "medium", "high", "auto"] | None = None
    create_response: bool | None = None
    interrupt_response: bool | None = None
    idle_timeout_ms: None = None


class NoiseReduction(_Shape):
    """Accepted and without effect: the models hear what comes."""

    type: Literal["near_field", "far_field"] | None = None
    strength: float | None = Field(default=None, allow_inf_nan=False)


class AudioInput(_Shape):
    """What the caller sends, and how it is heard."""

    format: AudioFormat = AudioFormat()
    transcription: Transcription = Transcription()
    turn_detection: TurnDetection | None = TurnDetection()
    noise_reduction: NoiseReduction | None = None


class Audio(_Shape):
    """Only input: nothing here talks back."""

    input: AudioInput = AudioInput()


class Session(_Shape):
    """One session's choices; the defaults are OpenAI's."""

    type: Literal["transcription"] = "transcription"
    audio: Audio = Audio()
    include: tuple[Literal["item.input_audio_transcription.logprobs"], ...] | None = None

    @classmethod
    def of_model(cls, model: str) -> Self:
        """The defaults, with a model named in the address."""
        return cls.model_validate({"audio": {"input": {"transcription": {"model": model}}}})

    @property
    def audio_form(self) -> AudioForm:
        """Of what the caller sends."""
        chosen = self.audio.input.format
        return AudioForm(chosen.type, chosen.rate_hz)

    @property
    def transcription(self) -> Transcription:
        """Model, language, hotwords."""
        return self.audio.input.transcription

    @property
    def vad(self) -> VadOptions | None:
        """None where the caller commits by itself."""
        found = self.audio.input.turn_detection
        return None if found is None else found.options()

    def options(self, settings: Settings) -> Options:
        """What the transcriber takes. Raises InvalidValueError where a limit of the settings is passed."""
        chosen = self.transcription
        return check_options(
            settings, chosen.language, None, chosen.keywords, None, hotwords_field="keywords"
        )

    def described(self, model: str) -> dict[str, Any]:
        """As it goes into ``session.created`` and ``session.updated``; `model` is the one that answers."""
        body = self.model_dump(mode="json")
        audio_input = body["audio"]["input"]
        audio_input["format"]["rate"] = self.audio_form.rate_hz
        audio_input["transcription"]["model"] = model
        return body


def updated(session: Session, changes: object) -> Session:
    """`session` with what `changes` names; the rest stays, as with OpenAI.

    A null is as if the field was not there, unless it says something (``turn_detection``).
    Raises InvalidRequestError (no object, unknown field, wrong type) or InvalidValueError (out of range).
    """
    if not isinstance(changes, dict):
        raise InvalidRequestError("session.update needs session, an object.", param="session")
    try:
        return Session.model_validate(
            _merged(session.model_dump(exclude_unset=True), _without_nulls(changes))
        )
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        for one in found:
            if one["type"] == "extra_forbidden":
                refuse_not_offered(_name_of(one["loc"]))
        raise from_validation([_in_words_of_json(dict(one)) for one in found]) from None


def _in_words_of_json(error: dict[str, Any]) -> dict[str, Any]:
    """pydantic's `error` with its place in the event, and JSON's kinds of values by their names there."""
    message = _KINDS.get(error["type"], error["msg"])
    return {**error, "loc": ("session", *error["loc"]), "msg": message}


def _name_of(place: tuple[int | str, ...]) -> str:
    return ".".join(["session", *map(str, place)])


def _without_nulls(changes: dict[str, Any], depth: int = 4) -> dict[str, Any]:
    """`changes` without what OpenAI's types let a client send as null for nothing.

    `depth` objects are looked into, as many as a session has within each other.
    """
    given = {
        name: value for name, value in changes.items() if value is not None or name not in _NULL_IS_ABSENT
    }
    if depth == 1:
        return given
    return {
        name: _without_nulls(value, depth - 1) if isinstance(value, dict) else value
        for name, value in given.items()
    }


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` over `old`, object by object; null is a value, and so is a format: a rate is that of its type."""
    merged = dict(old)
    for name, value in new.items():
        before = merged.get(name) if name != "format" else None
        merged[name] = (
            _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
        )
    return merged
