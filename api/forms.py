"""The fields of a transcription request: names on the wire -> checked values.

Lists come as repeated ``name[]`` parts (the plain name too), nested objects as ``name[key]`` or as JSON.
Numbers and booleans are text on the wire. The models below are also what the OpenAPI document shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from api.errors import InvalidRequestError, InvalidValueError, from_validation
from api.multipart import refuse_file_without_name, refuse_not_offered
from api.settings import Settings
from api.transcriber import Options
from api.vad import VadOptions

_NESTED = re.compile(r"^([A-Za-z_]+)\[([A-Za-z_]+)\]$")

F = TypeVar("F", bound="_Fields")
MAX_HOTWORD_CHARACTERS = 200
Hotword = Annotated[str, Field(min_length=1, max_length=MAX_HOTWORD_CHARACTERS)]
OutputFormat = Literal["json", "text", "srt", "vtt", "verbose_json"]
_LANGUAGE_CODE = "^[a-zA-Z]{2,3}$"


def _boolean(value: object) -> object:
    """``true``/``false`` (and 1/0) as on the wire; anything else is left for the type check to refuse."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower(), value)
    return value


def _language_code(value: str) -> str:
    if re.fullmatch(_LANGUAGE_CODE, value) is None:
        raise PydanticCustomError(
            "value_error", "Input should be an ISO 639-1 code without a region, such as 'en'"
        )
    return value


LanguageCode = Annotated[
    str, AfterValidator(_language_code), WithJsonSchema({"type": "string", "pattern": _LANGUAGE_CODE})
]
Flag = Annotated[bool, BeforeValidator(_boolean)]


class _Fields(BaseModel):
    """``lists`` of the class are fields that may repeat; ``files`` are file parts, documented only."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Pauses(BaseModel):
    """What is speech, and which pause ends a stretch of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: float = Field(
        default=0.5, gt=0, lt=1, description="Probability of speech from which a frame is speech."
    )
    prefix_padding_ms: int = Field(default=300, ge=0, le=5000, description="Audio kept before speech begins.")
    silence_duration_ms: int = Field(default=500, ge=50, le=10000, description="Pause that ends a piece.")

    def options(self) -> VadOptions:
        """What the segmenter takes."""
        return VadOptions(self.threshold, self.prefix_padding_ms, self.silence_duration_ms)


class ServerVad(Pauses):
    """Cut at pauses: a stretch of speech, with its padding, is one piece."""

    type: Literal["server_vad"] = "server_vad"


def _kind_of_strategy(value: object) -> str:
    """Which of the two a value means to be; the other one's complaints would only confuse."""
    return "object" if isinstance(value, dict | ServerVad) else "text"


ChunkingStrategy = Annotated[
    Annotated[Literal["auto"], Tag("text")] | Annotated[ServerVad, Tag("object")],
    Discriminator(_kind_of_strategy),
]
_CHUNKING = "auto cuts only where the model's window ends; server_vad cuts at pauses."


def _vad_of(strategy: Literal["auto"] | ServerVad) -> VadOptions | None:
    return strategy.options() if isinstance(strategy, ServerVad) else None


class TranscribeForm(_Fields):
    """Fields of ``POST /transcribe``, beside ``file``."""

    model: str = Field("", max_length=100, description="Name of a loaded model; empty: the default model.")
    language: LanguageCode | None = Field(None, description="ISO-639-1 code.")
    timestamps: Flag = Field(True, description="false leaves words and segments out of the answer.")
    beam: int | None = Field(
        None,
        ge=0,
        description="Width of the beam search; 0 is greedy. Without it the model decides: greedy, or the "
        "beam of its language model.",
    )
    hotwords: tuple[Hotword, ...] = Field(
        (), description="Words the beam search prefers where the audio allows."
    )
    format: OutputFormat = Field("json", description="verbose_json is the same as json here.")
    stream: Flag = Field(False, description="Server-sent events: each piece of text as soon as it is done.")
    chunking_strategy: ChunkingStrategy = Field("auto", description=_CHUNKING)

    def options(self, settings: Settings) -> Options:
        """What the transcriber takes. Raises InvalidValueError where a limit of the settings is passed."""
        vad = _vad_of(self.chunking_strategy)
        return check_options(
            settings, self.language, self.beam, self.hotwords, vad, hotwords_field="hotwords"
        )


class OpenAIForm(_Fields):
    """Fields of ``POST /v1/audio/transcriptions``, beside ``file``."""

    model: str = Field(
        max_length=100, description="Name of a loaded model, or whisper-1 for the default one."
    )
    language: LanguageCode | None = Field(None, description="ISO-639-1 code.")
    keywords: tuple[Hotword, ...] = Field((), description="Hotwords: preferred where the audio allows.")
    prompt: str = Field("", max_length=10000, description="Accepted, without effect.")
    temperature: float = Field(
        0.0, ge=0, le=1, allow_inf_nan=False, description="Accepted, without effect: nothing is sampled."
    )
    response_format: OutputFormat = Field("json", description="Form of the answer.")
    timestamp_granularities: tuple[Literal["word", "segment"], ...] = Field(
        ("segment",), description="With verbose_json: which times to give."
    )
    include: tuple[Literal["logprobs"], ...] = Field((), description="logprobs: log-posterior of each token.")
    stream: Flag = Field(False, description="Server-sent events; ignores response_format.")
    chunking_strategy: ChunkingStrategy = Field("auto", description=_CHUNKING)

    def options(self, settings: Settings) -> Options:
        """What the transcriber takes. Raises InvalidValueError where a limit of the settings is passed."""
        vad = _vad_of(self.chunking_strategy)
        return check_options(settings, self.language, None, self.keywords, vad, hotwords_field="keywords")


_LISTS = frozenset({"hotwords", "keywords", "timestamp_granularities", "include"})


def parse_form(model: type[F], fields: Sequence[tuple[str, str]], query: Iterable[str] = ()) -> F:
    """Fields as they came -> the checked form. ``query``: names in the address's query.

    Raises InvalidRequestError (unknown, repeated or misplaced field, wrong type) or InvalidValueError (out of
    range).
    """
    values: dict[str, Any] = {}
    known = model.model_fields
    for name in query:
        if name.partition("[")[0] in known:  # dropped in silence it would look as if it had been obeyed
            raise InvalidRequestError(
                f"Field {name!r} came in the query of the address; send it as a part of the form.", param=name
            )
    for wire_name, value in fields:
        refuse_file_without_name(wire_name)
        name = wire_name.removesuffix("[]")
        nested = _NESTED.match(wire_name)
        if nested and nested.group(1) in known:
            _put_nested(values, nested.group(1), nested.group(2), value)
        elif name in _LISTS and name in known:
            values.setdefault(name, []).append(value)
        elif wire_name not in known:
            refuse_not_offered(wire_name)
            names = ", ".join(sorted(known))
            raise InvalidRequestError(
                f"Unknown field {wire_name[:64]!r}; there are file, {names}.", param=wire_name[:64]
            )
        elif wire_name in values:
            raise InvalidRequestError(f"Field {wire_name!r} is given twice.", param=wire_name)
        else:
            values[wire_name] = _maybe_object(wire_name, value)
    values = {name: value for name, value in values.items() if value not in ("", [""])}
    try:
        return model.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        raise from_validation([{**one, "loc": _on_the_wire(one["loc"])} for one in found]) from None


def _on_the_wire(place: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """pydantic's place of an error without the tag it puts behind ``chunking_strategy``."""
    return (*place[:1], *place[2:]) if place[:1] == ("chunking_strategy",) else place


def _put_nested(values: dict[str, Any], name: str, key: str, value: str) -> None:
    target = values.setdefault(name, {})
    if not isinstance(target, dict) or key in target:
        raise InvalidRequestError(f"Field {name!r} is given twice.", param=name)
    target[key] = value


def _maybe_object(name: str, value: str) -> object:
    """``chunking_strategy`` may come as JSON text."""
    if name == "chunking_strategy" and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise InvalidRequestError("chunking_strategy is not valid JSON.", param=name) from None
    return value


def check_options(
    settings: Settings,
    language: str | None,
    beam: int | None,
    hotwords: tuple[str, ...],
    vad: VadOptions | None,
    *,
    hotwords_field: str,
) -> Options:
    """What the transcriber takes. Raises InvalidValueError where a limit of the settings is passed."""
    if beam is not None and beam > settings.max_beam:
        raise InvalidValueError(f"beam: {beam} is too wide, at most {settings.max_beam}.", param="beam")
    if len(hotwords) > settings.max_hotwords:
        raise InvalidValueError(
            f"{hotwords_field}: {len(hotwords)} are too many, at most {settings.max_hotwords}.",
            param=hotwords_field,
        )
    if beam == 0 and hotwords:
        raise InvalidValueError(
            f"beam: 0 decodes greedily, which has no use for {hotwords_field}; leave beam out, or give a "
            f"width from 1 to {settings.max_beam}.",
            param="beam",
        )
    code = language.lower() if language else None
    return Options(language=code, beam=beam, hotwords=hotwords, vad=vad)


def form_schema(model: type[_Fields], *, files: str = "file", many: bool = False) -> Mapping[str, Any]:
    """OpenAPI request body: the file part and the model's fields as multipart."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    definitions = schema.pop("$defs", {})
    binary: dict[str, Any] = {
        "type": "string",
        "format": "binary",
        "contentMediaType": "application/octet-stream",
    }
    meaning = "Audio or video in any common format, judged by its bytes."
    part = {"type": "array", "items": binary, "minItems": 1} if many else binary
    properties = {
        **_inline(schema.get("properties", {}), definitions),
        files: {**part, "description": meaning},
    }
    required = [*schema.get("required", []), files]
    content = {"schema": {"type": "object", "properties": properties, "required": required}}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": content}}}


def _inline(value: Any, definitions: Mapping[str, Any]) -> Any:
    """Replace references by what they stand for: the document then needs no component of ours."""
    if isinstance(value, dict):
        reference = value.get("$ref")
        if isinstance(reference, str):
            return _inline(definitions[reference.rsplit("/", 1)[-1]], definitions)
        return {key: _inline(item, definitions) for key, item in value.items()}
    if isinstance(value, list):
        return [_inline(item, definitions) for item in value]
    return value
