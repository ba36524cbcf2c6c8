"""Wire form -> checked fields, and the multipart reader against any way of cutting the body into chunks."""

from __future__ import annotations

import asyncio
import os
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.audio.transcription_create_params import TranscriptionCreateParamsBase
from starlette.requests import Request

from api.access import RateLimiter
from api.errors import (
    AsrError,
    ClientDisconnected,
    InvalidRequestError,
    InvalidValueError,
    OutOfResourcesError,
    RateLimitedError,
    UploadTimeoutError,
    UploadTooLargeError,
)
from api.forms import OpenAIForm, ServerVad, TranscribeForm, form_schema, parse_form
from api.multipart import Form, Limits, read_form
from api.settings import Settings
from api.vad import VadOptions

SETTINGS = Settings(max_beam=64, max_hotwords=3)


class TestFields:
    def test_defaults_are_openais(self) -> None:
        form = parse_form(OpenAIForm, [("model", "whisper-1")])
        assert form.response_format == "json"
        assert form.timestamp_granularities == ("segment",)
        assert form.stream is False
        assert form.chunking_strategy == "auto"
        assert form.options(SETTINGS).vad is None

    def test_lists_come_with_and_without_brackets(self) -> None:
        fields = [("model", "m"), ("keywords[]", "a"), ("keywords", "b"), ("include[]", "logprobs")]
        form = parse_form(OpenAIForm, fields)
        assert form.keywords == ("a", "b")
        assert form.include == ("logprobs",)

    @pytest.mark.parametrize(
        "fields",
        [
            [
                ("chunking_strategy[type]", "server_vad"),
                ("chunking_strategy[threshold]", "0.7"),
                ("chunking_strategy[prefix_padding_ms]", "100"),
                ("chunking_strategy[silence_duration_ms]", "900"),
            ],
            [
                (
                    "chunking_strategy",
                    '{"type": "server_vad", "threshold": 0.7, "prefix_padding_ms": 100, '
                    '"silence_duration_ms": 900}',
                )
            ],
        ],
    )
    @pytest.mark.parametrize("kind", [OpenAIForm, TranscribeForm])
    def test_server_vad_reaches_the_transcriber(
        self, kind: type[OpenAIForm | TranscribeForm], fields: list[tuple[str, str]]
    ) -> None:
        form = parse_form(kind, [("model", "m"), *fields])
        assert isinstance(form.chunking_strategy, ServerVad)
        assert form.options(SETTINGS).vad == VadOptions(0.7, 100, 900)

    @pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("1", True), ("0", False)])
    def test_booleans(self, text: str, value: bool) -> None:
        assert parse_form(TranscribeForm, [("timestamps", text)]).timestamps is value

    def test_empty_fields_are_as_if_not_sent(self) -> None:
        form = parse_form(TranscribeForm, [("language", ""), ("beam", ""), ("model", ""), ("hotwords[]", "")])
        assert (form.language, form.beam, form.model, form.hotwords) == (None, None, "", ())

    def test_language_is_case_blind(self) -> None:
        assert parse_form(TranscribeForm, [("language", "EN")]).options(SETTINGS).language == "en"

    @pytest.mark.parametrize("name", ["en-US", "english", "e", "en\n"])
    def test_what_is_no_code_of_a_language_is_told_what_one_looks_like(self, name: str) -> None:
        with pytest.raises(InvalidValueError, match=r"language: Input should be an ISO 639-1 code .* 'en'"):
            parse_form(OpenAIForm, [("model", "whisper-1"), ("language", name)])

    @pytest.mark.parametrize(
        ("fields", "error", "param"),
        [
            ([], InvalidRequestError, "model"),
            ([("model", "m"), ("model", "n")], InvalidRequestError, "model"),
            ([("model", "m"), ("modle", "n")], InvalidRequestError, "modle"),
            ([("model", "m"), ("file", "text")], InvalidRequestError, "file"),
            ([("model", "m"), ("temperature", "hot")], InvalidRequestError, "temperature"),
            ([("model", "m"), ("temperature", "nan")], InvalidValueError, "temperature"),
            ([("model", "m"), ("chunking_strategy", "{")], InvalidRequestError, "chunking_strategy"),
            (
                [("model", "m"), ("chunking_strategy", '{"a":' * 9000)],
                InvalidRequestError,
                "chunking_strategy",
            ),
            ([("model", "m"), ("chunking_strategy[type]", "x")], InvalidValueError, "chunking_strategy"),
            (
                [("model", "m"), ("chunking_strategy", "auto"), ("chunking_strategy[type]", "server_vad")],
                InvalidRequestError,
                "chunking_strategy",
            ),
            ([("model", "m"), ("keywords", "x" * 201)], InvalidValueError, "keywords"),
            ([("model", "m"), ("keywords", "a"), ("keywords", "")], InvalidValueError, "keywords"),
        ],
    )
    def test_bad_fields(self, fields: list[tuple[str, str]], error: type[AsrError], param: str) -> None:
        with pytest.raises(error) as caught:
            parse_form(OpenAIForm, fields)
        assert str(caught.value.param).startswith(param)

    @pytest.mark.parametrize(
        ("fields", "message", "param"),
        [
            (
                {"": "server_vad"},
                "chunking_strategy: Input should be 'auto' (given: 'server_vad')",
                "chunking_strategy",
            ),
            (
                {"[type]": "server_vad", "[threshold]": "5", "[silence_duration_ms]": "1"},
                "chunking_strategy.threshold: Input should be less than 1 (given: '5'); "
                "chunking_strategy.silence_duration_ms: "
                "Input should be greater than or equal to 50 (given: '1')",
                "chunking_strategy.threshold",
            ),
        ],
    )
    def test_a_bad_strategy_is_told_by_the_names_on_the_wire(
        self, fields: dict[str, str], message: str, param: str
    ) -> None:
        sent = [("model", "m"), *((f"chunking_strategy{key}", value) for key, value in fields.items())]
        with pytest.raises(InvalidValueError) as caught:
            parse_form(OpenAIForm, sent)
        assert (caught.value.message, caught.value.param) == (message, param)

    @pytest.mark.parametrize(
        ("form", "name"),
        [
            (TranscribeForm, "format"),
            (TranscribeForm, "hotwords[]"),
            (OpenAIForm, "chunking_strategy[type]"),
        ],
    )
    def test_a_field_in_the_query_is_refused_and_what_is_no_field_is_left_alone(
        self, form: type[TranscribeForm | OpenAIForm], name: str
    ) -> None:
        assert parse_form(TranscribeForm, [], ["api-version"]).format == "json"
        with pytest.raises(InvalidRequestError, match="query of the address") as caught:
            parse_form(form, [], ["api-version", name])
        assert caught.value.param == name

    @pytest.mark.parametrize(
        ("name", "values", "message"),
        [
            ("beam", ["65"], "beam: 65 is too wide, at most 64."),
            ("hotwords", ["a", "b", "c", "d"], "hotwords: 4 are too many, at most 3."),
        ],
    )
    def test_limits_of_the_settings(self, name: str, values: list[str], message: str) -> None:
        form = parse_form(TranscribeForm, [(name, value) for value in values])
        with pytest.raises(InvalidValueError) as caught:
            form.options(SETTINGS)
        assert caught.value.message == message

    @pytest.mark.parametrize(
        ("field", "reason"),
        [
            ("languages[]", "one language is taken, in the field 'language'"),
            ("known_speaker_names[]", "speakers are not told apart"),
            ("known_speaker_references[]", "speakers are not told apart"),
            ("known_speaker_references", "speakers are not told apart"),
        ],
    )
    def test_what_openai_has_and_this_service_does_not_is_said(self, field: str, reason: str) -> None:
        with pytest.raises(InvalidRequestError, match=f"is not offered: {reason}") as caught:
            parse_form(OpenAIForm, [("model", "tiny"), (field, "x")])
        assert caught.value.param == field

    def test_every_field_of_the_official_client_has_an_answer(self) -> None:
        for name in TranscriptionCreateParamsBase.__annotations__.keys() - OpenAIForm.model_fields.keys():
            with pytest.raises(InvalidRequestError, match=r"is not offered|must be a file part"):
                parse_form(OpenAIForm, [("model", "tiny"), (name, "x")])

    def test_schema_lists_every_field_and_the_file(self) -> None:
        schema = form_schema(OpenAIForm)["requestBody"]["content"]["multipart/form-data"]["schema"]
        assert set(schema["properties"]) == {"file", *OpenAIForm.model_fields}
        assert "$ref" not in str(schema)


def limits(tmp_path: Path, **changes: object) -> Limits:
    given = {
        "file_bytes": 10_000, "files": 2, "body_bytes": 20_000, "idle_s": 0.2, "total_s": 5.0,
        "spool_dir": tmp_path, **changes,
    }  # fmt: skip
    return Limits(**given)  # type: ignore[arg-type]


def request_of(chunks: list[bytes], *, hang: bool = False, leave: bool = False) -> Request:
    pending = list(chunks)

    async def receive() -> dict[str, object]:
        if pending:
            more = bool(len(pending) > 1 or hang or leave)
            return {"type": "http.request", "body": pending.pop(0), "more_body": more}
        if hang:
            await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    headers = [(b"content-type", b"multipart/form-data; boundary=XX")]
    return Request({"type": "http", "method": "POST", "headers": headers, "path": "/"}, receive)


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    file = f'; filename="{filename}"' if filename is not None else ""
    return f'--XX\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + value + b"\r\n"


END = b"--XX--\r\n"
BODY = (
    part("model", b"tiny")
    + part("keywords[]", "Ünï".encode())
    + part("file", b"\r\n--X" * 900, "a.wav")
    + END
)


async def read(request: Request, given: Limits) -> Form:
    return await read_form(request, given)


class TestMultipart:
    @given(cuts=st.lists(st.integers(1, len(BODY) - 1), max_size=20))
    def test_any_chunks_give_the_same_form(self, cuts: list[int]) -> None:
        edges = [0, *sorted(set(cuts)), len(BODY)]
        chunks = [BODY[a:b] for a, b in pairwise(edges)]
        form = asyncio.run(read(request_of(chunks), limits(Path(tempfile.gettempdir()))))
        assert form.fields == [("model", "tiny"), ("keywords[]", "Ünï")]
        (upload,) = form.files
        assert (upload.field, upload.filename, upload.size_bytes) == ("file", "a.wav", 4500)
        assert upload.file.read() == b"\r\n--X" * 900
        form.close()
        assert upload.file.closed

    @pytest.mark.parametrize("quote", ["", '"'])
    async def test_a_name_beyond_ascii_in_the_extended_form(self, tmp_path: Path, quote: str) -> None:
        disposition = f"form-data; name=file; filename*={quote}utf-8''%D0%B7%20%C3%A9.wav{quote}"
        body = f"--XX\r\nContent-Disposition: {disposition}\r\n\r\nsound\r\n--XX--\r\n"
        form = await read(request_of([body.encode()]), limits(tmp_path))
        assert [(upload.field, upload.filename) for upload in form.files] == [("file", "з é.wav")]
        form.close()

    async def test_the_recording_of_a_speaker_is_not_called_too_long(self, tmp_path: Path) -> None:
        """No shorter one would be taken either."""
        body = part("known_speaker_references[]", b"data:audio/wav;base64," + b"A" * 100_000) + END
        with pytest.raises(InvalidRequestError, match="speakers are not told apart"):
            await read(request_of([body]), limits(tmp_path, body_bytes=1_000_000))

    @given(
        before=st.sampled_from([b"", b"\r\n", b"This is a preamble.\r\n", b"--X\r\n-- X\r\n\r\n", b"line\n"]),
        after=st.sampled_from([b"", b"The epilogue.", b"\r\n" + BODY]),
        cuts=st.lists(st.integers(1, 40), max_size=6),
    )
    def test_preamble_and_epilogue_change_nothing(self, before: bytes, after: bytes, cuts: list[int]) -> None:
        """RFC 2046, section 5.1.1: what stands outside of the boundaries is to be ignored."""
        body = before + BODY + after
        edges = [0, *sorted(set(cuts)), len(body)]
        chunks = [body[a:b] for a, b in pairwise(edges)]
        form = asyncio.run(read(request_of(chunks), limits(Path(tempfile.gettempdir()))))
        assert form.fields == [("model", "tiny"), ("keywords[]", "Ünï")]
        assert [upload.file.read() for upload in form.files] == [b"\r\n--X" * 900]
        form.close()

    @given(
        padding=st.tuples(*[st.text(" \t", max_size=3).map(str.encode)] * 4),
        cuts=st.lists(st.integers(1, 300), max_size=12),
    )
    def test_blanks_behind_a_boundary_change_nothing(
        self, padding: tuple[bytes, ...], cuts: list[int]
    ) -> None:
        """RFC 2046, section 5.1.1: transport padding, from a gateway that fills up lines."""
        first, second, third, last = padding
        body = (
            part("model", b"tiny").replace(b"--XX", b"--XX" + first)
            + part("language", b"en").replace(b"--XX", b"--XX" + second)
            + part("file", b"-- XX \r\n--X", "a.wav").replace(b"--XX", b"--XX" + third)
            + END.replace(b"--\r\n", b"--" + last + b"\r\n")
        )
        edges = [0, *sorted({cut for cut in cuts if cut < len(body)}), len(body)]
        chunks = [body[a:b] for a, b in pairwise(edges)]
        form = asyncio.run(read(request_of(chunks), limits(Path(tempfile.gettempdir()))))
        assert form.fields == [("model", "tiny"), ("language", "en")]
        assert [upload.file.read() for upload in form.files] == [b"-- XX \r\n--X"]
        form.close()

    @pytest.mark.parametrize(
        ("body", "problem"),
        [
            (b"preamble" + BODY, "within a line"),
            (b"--XX \t", "ends before its closing boundary"),
            (BODY.replace(b"--XX", b"--XX x", 1), "Did not find CR"),
            (BODY.replace(b"--XX", b"--YY"), "never comes"),
            (b"x" * 70_000 + b"\r\n" + BODY, "no boundary in its first 65536 bytes"),
        ],
    )
    async def test_no_part_is_taken_for_a_preamble(self, tmp_path: Path, body: bytes, problem: str) -> None:
        chunks = [body[start : start + 4096] for start in range(0, len(body), 4096)]
        with pytest.raises(InvalidRequestError, match=problem):
            await read(request_of(chunks), limits(tmp_path, body_bytes=1_000_000))

    async def test_large_files_are_spooled_and_removed(self, tmp_path: Path) -> None:
        data = bytes(range(256)) * 8192  # 2 MiB
        body = part("file", data, "a") + END
        chunks = [body[start : start + 65536] for start in range(0, len(body), 65536)]
        given = limits(tmp_path, file_bytes=3_000_000, body_bytes=3_000_000)
        form = await read(request_of(chunks), given)
        assert form.files[0].file.read() == data
        form.close()
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize(
        ("chunks", "error"),
        [
            ([part("file", b"x" * 10_001, "a") + END], UploadTooLargeError),
            ([part("file", b"x", "a") * 3 + END], InvalidRequestError),
            ([part("file", b"x", "a")], InvalidRequestError),
            ([part("model", b"x" * 70_000) + END], InvalidRequestError),
            ([b"garbage"], InvalidRequestError),
            ([part("f", b"") * 5000 + END], InvalidRequestError),
        ],
    )
    async def test_limits_and_damage(
        self, tmp_path: Path, chunks: list[bytes], error: type[AsrError]
    ) -> None:
        with pytest.raises(error):
            await read(request_of(chunks), limits(tmp_path))

    async def test_fields_are_limited_each_and_together(self, tmp_path: Path) -> None:
        given, longest = limits(tmp_path, body_bytes=10_000_000), part("x", b"x" * 65536)
        form = await read(request_of([*[longest] * 16, END]), given)
        assert [len(value) for _, value in form.fields] == [65536] * 16
        with pytest.raises(InvalidRequestError, match=r"^A field is longer than 65536 bytes\.$"):
            await read(request_of([part("x", b"x" * 65537), END]), given)
        with pytest.raises(InvalidRequestError, match=r"^The fields together are longer than 1048576 bytes"):
            await read(request_of([*[longest] * 16, part("y", b"y"), END]), given)

    @pytest.mark.parametrize(
        ("headers", "error"),
        [
            ({"content-length": "9000000"}, UploadTooLargeError),
            ({"content-type": f"multipart/form-data; boundary={'X' * 257}"}, InvalidRequestError),
            ({"content-type": "multipart/form-data"}, InvalidRequestError),
            ({"content-type": "application/json; boundary=XX"}, InvalidRequestError),
        ],
    )
    async def test_what_the_head_tells_is_refused_before_anything_is_read(
        self, tmp_path: Path, headers: dict[str, str], error: type[AsrError]
    ) -> None:
        async def receive() -> dict[str, object]:
            raise AssertionError("the body was read")

        fields = {"content-type": "multipart/form-data; boundary=XX", **headers}
        raw = [(name.encode(), value.encode()) for name, value in fields.items()]
        request = Request({"type": "http", "method": "POST", "headers": raw, "path": "/"}, receive)
        with pytest.raises(error):
            await read(request, limits(tmp_path))

    async def test_reading_stops_at_the_limit(self, tmp_path: Path) -> None:
        seen = -1  # before the part's head

        async def receive() -> dict[str, object]:
            nonlocal seen
            seen += 1
            body = b"x" * 5000 if seen else part("file", b"", "a")[:-2]
            return {"type": "http.request", "body": body, "more_body": True}

        headers = [(b"content-type", b"multipart/form-data; boundary=XX")]
        request = Request({"type": "http", "method": "POST", "headers": headers, "path": "/"}, receive)
        with pytest.raises(UploadTooLargeError, match="10000 bytes"):
            await read(request, limits(tmp_path))
        assert seen == 3

    async def test_stalled_body(self, tmp_path: Path) -> None:
        with pytest.raises(UploadTimeoutError):
            await read(request_of([BODY[:100]], hang=True), limits(tmp_path))

    async def test_caller_that_leaves(self, tmp_path: Path) -> None:
        with pytest.raises(ClientDisconnected):
            await read(request_of([BODY[:100]], leave=True), limits(tmp_path))

    async def test_full_disk_asks_to_come_back(self, tmp_path: Path) -> None:
        given = limits(tmp_path / "gone", file_bytes=3_000_000, body_bytes=3_000_000)
        chunks = [part("file", b"x" * 2_000_000, "a") + END]
        with pytest.raises(OutOfResourcesError) as caught:
            await read(request_of(chunks), given)
        assert "retry-after-ms" in caught.value.headers()


class TestRateLimiter:
    def test_burst_then_rate_per_caller(self) -> None:
        limiter = RateLimiter(60)  # one a second, bursts of six
        for _ in range(6):
            limiter.take("alice", 100.0)
        with pytest.raises(RateLimitedError) as caught:
            limiter.take("alice", 100.0)
        assert caught.value.retry_after_s == pytest.approx(1.0)
        limiter.take("bob", 100.0)
        limiter.take("alice", 101.01)

    def test_waiting_as_told_is_enough(self) -> None:
        limiter = RateLimiter(7)
        now_s = 0.0
        limiter.take("alice", now_s)
        for _ in range(50):
            with pytest.raises(RateLimitedError) as caught:
                limiter.take("alice", now_s)
            now_s += (caught.value.retry_after_s or 0.0) + 1e-9
            limiter.take("alice", now_s)

    def test_all_who_were_refused_together_and_wait_as_told_get_through(self) -> None:
        limiter = RateLimiter(60)
        for _ in range(6):
            limiter.take("alice", 100.0)
        waits_s = [self._refusal_s(limiter, 100.0) for _ in range(4)]
        assert waits_s == pytest.approx([1.0, 2.0, 3.0, 4.0])
        for wait_s in waits_s:
            limiter.take("alice", 100.0 + wait_s + 1e-9)

    def test_who_goes_on_asking_is_not_sent_away_for_longer_and_longer(self) -> None:
        limiter = RateLimiter(60)
        for _ in range(6):
            limiter.take("alice", 100.0)
        waits_s = [self._refusal_s(limiter, 100.0) for _ in range(50)]
        assert waits_s[-1] == pytest.approx(7.0)  # a token, and a burst of six

    @staticmethod
    def _refusal_s(limiter: RateLimiter, now_s: float) -> float:
        with pytest.raises(RateLimitedError) as caught:
            limiter.take("alice", now_s)
        return caught.value.retry_after_s or 0.0

    def test_memory_is_bounded_and_clocks_may_jump_back(self) -> None:
        limiter = RateLimiter(60)
        for index in range(20_000):
            limiter.take(str(index), float(index))
        assert len(limiter._buckets) == 10_000
        limiter.take("19999", 0.0)

    def test_a_caller_beyond_the_most_that_are_remembered_is_limited_too(self) -> None:
        limiter = RateLimiter(60)
        for index in range(10_000):
            limiter.take(str(index), float(index))
        for _ in range(6):
            limiter.take("alice", 10_000.0)
        assert self._refusal_s(limiter, 10_000.0) == pytest.approx(1.0)
