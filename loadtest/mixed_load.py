"""Mixed load: what real callers send, each time something else, and the answers each kind may get."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from websockets.exceptions import WebSocketException

from loadtest import mixed_live
from loadtest.clips import SAMPLE_RATE_HZ, cut_clips, speech, wav_clip
from loadtest.fuzz_mutations import mutant
from loadtest.fuzz_seeds import make_seeds
from loadtest.load import Clip

LONG_S = 90.0
LEFT = "left"
"""What stands in for a status where the caller went away, as it meant to."""


@dataclass
class Tally:
    """Answers by kind of request, and those that their kind does not allow."""

    answers: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def note(self, kind: Kind, said: str) -> None:
        """Count one answer: its status and, for an error, its code."""
        self.answers[kind.name, said] += 1
        if said not in kind.allowed:
            self.wrong.append(f"{kind.name}: {said}")


Ask = Callable[[httpx.AsyncClient, random.Random], Awaitable[str]]


@dataclass(frozen=True)
class Kind:
    """A sort of request: how it is made, which answers it may get, how often it comes."""

    name: str
    ask: Ask
    allowed: frozenset[str]
    weight: int


UNREADABLE = frozenset(
    f"400 {code}"
    for code in (
        "undecodable_audio", "empty_file", "no_audio_stream", "no_audio_samples", "not_finite_samples",
    )
)  # fmt: skip


def said(response: httpx.Response) -> str:
    """``"200"``, or the status and the code of the error."""
    if response.status_code == 200:
        return "200"
    try:
        return f"{response.status_code} {response.json()['error']['code']}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} without an error body"


class Callers:
    """The kinds of requests, over one set of files."""

    def __init__(self, seed: int) -> None:
        lengths_s = [2.0, 3.5, 5.0, 8.0, 12.0, 15.0]
        self.clips = cut_clips(lengths_s)[0]
        self.long: Clip = wav_clip("long", speech(LONG_S)[0][: int(LONG_S * SAMPLE_RATE_HZ)])
        self.formats = make_seeds()
        self.seed = seed
        self.mutants = 0
        self.kinds = [
            Kind("clip", self.clip, frozenset({"200"}), 30),
            Kind("another format", self.other_format, frozenset({"200"}), 15),
            Kind("OpenAI with times", self.openai, frozenset({"200"}), 15),
            Kind("beam and hotwords", self.hotwords, frozenset({"200"}), 10),
            Kind("long, streamed", self.streamed, frozenset({"200"}), 3),
            Kind("batch", self.batch, frozenset({"200"}), 5),
            Kind("damaged file", self.damaged, UNREADABLE | {"200", "422 audio_too_long"}, 15),
            Kind("wrong field", self.wrong_field, frozenset({"422 invalid_value", "404 model_not_found"}), 5),
            Kind("leaves while waiting", self.leaves, frozenset({LEFT, "200"}), 5),
            Kind("leaves in the upload", self.half_upload, frozenset({LEFT}), 5),
            Kind("scrape and health", self.scrape, frozenset({"200"}), 5),
            Kind("live, Vosk", self.vosk, frozenset({"200"}), 5),
            Kind("live, realtime", self.realtime, frozenset({"200"}), 5),
            Kind("live, leaves", self.leaves_live, frozenset({LEFT}), 5),
        ]
        self.microphone = mixed_live.Microphone(self.clips[1:4])

    async def clip(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        return said(await http.post("/transcribe", files=_file(rng.choice(self.clips))))

    async def other_format(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        name = rng.choice(sorted(self.formats))
        return said(await http.post("/transcribe", files={"file": (name, self.formats[name])}))

    async def openai(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        kind = rng.choice(["json", "verbose_json", "text", "srt", "vtt"])
        form: dict[str, Any] = {"model": "whisper-1", "response_format": kind}
        if kind == "verbose_json":
            form["timestamp_granularities[]"] = ["word", "segment"]
        return said(
            await http.post("/v1/audio/transcriptions", data=form, files=_file(rng.choice(self.clips)))
        )

    async def hotwords(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        words = [f"word{chr(97 + rng.randrange(26)) * 3}" for _ in range(rng.randrange(1, 40))]
        beam = rng.choice([0, 8, 16])
        form: dict[str, Any] = {"beam": str(beam)}
        if beam:  # greedy decoding takes no hotwords
            form["hotwords[]"] = [*words, "hello"]
        return said(await http.post("/transcribe", data=form, files=_file(rng.choice(self.clips))))

    async def streamed(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        form, last = {"stream": "true"}, ""
        async with http.stream("POST", "/transcribe", data=form, files=_file(self.long)) as response:
            if response.status_code != 200:
                await response.aread()
                return said(response)
            async for line in response.aiter_lines():
                last = line or last
        return "200" if last == "data: [DONE]" else f"a stream that ends with {last[:80]!r}"

    async def batch(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        chosen = rng.sample(self.clips, 3)
        files = [("files", (clip.name, clip.content)) for clip in chosen]
        files.insert(rng.randrange(4), ("files", ("bad.wav", b"not a sound at all")))
        response = await http.post("/transcribe/batch", files=files)
        if response.status_code != 200:
            return said(response)
        body = response.json()
        counts = body["succeeded"], body["failed"]
        return "200" if counts == (3, 1) else f"succeeded and failed {counts}"

    async def damaged(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        self.mutants += 1
        name, _, data = mutant(self.formats, self.seed, self.mutants)
        return said(await http.post("/transcribe", files={"file": (name, data)}))

    async def wrong_field(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        form = rng.choice([{"beam": "-1"}, {"model": "nobody-has-this"}, {"format": "docx"}])
        return said(await http.post("/transcribe", data=form, files=_file(self.clips[0])))

    async def leaves(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        try:
            async with asyncio.timeout(rng.uniform(0.001, 0.3)):
                return said(await http.post("/transcribe", files=_file(self.clips[-1])))
        except TimeoutError:
            return LEFT

    async def half_upload(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        url = http.base_url
        head = (
            f"POST /transcribe HTTP/1.1\r\nHost: {url.host}\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\n"
            f"Content-Length: {2 * len(self.long.content)}\r\n\r\n--b\r\n"
            'Content-Disposition: form-data; name="file"; filename="half.wav"\r\n\r\n'
        )
        _, writer = await asyncio.open_connection(url.host, url.port)
        with contextlib.suppress(ConnectionError):
            writer.write(head.encode() + self.long.content[: rng.randrange(len(self.long.content))])
            await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        return LEFT

    async def scrape(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        for path in ("/metrics", "/health", "/health/live", "/models", "/v1/models"):
            response = await http.get(path)
            if response.status_code != 200:
                return said(response)
        return "200"

    async def vosk(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        return await mixed_live.vosk(_address(http), rng.choice(self.clips), rng)

    async def realtime(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        return await mixed_live.realtime(_address(http), rng.choice(self.clips), rng)

    async def leaves_live(self, http: httpx.AsyncClient, rng: random.Random) -> str:
        await mixed_live.leave(_address(http), rng.choice(self.clips), rng)
        return LEFT


def _address(http: httpx.AsyncClient) -> str:
    return http.base_url.netloc.decode()


def _file(clip: Clip) -> dict[str, tuple[str, bytes]]:
    return {"file": (clip.name, clip.content)}


async def drive(base_url: str, callers: Callers, clients: int, duration_s: float, seed: int) -> Tally:
    """`clients` callers, each with one request at a time and a connection of its own, for `duration_s`.

    Beside them one speaks live all the time.
    """
    tally = Tally()
    until_s = time.monotonic() + duration_s

    async def speak(http: httpx.AsyncClient, rng: random.Random) -> str:
        return await callers.microphone.session(_address(http), until_s - time.monotonic())

    async def caller(number: int, kinds: Sequence[Kind]) -> None:
        rng = random.Random(f"{seed} {number}")
        weights = [kind.weight for kind in kinds]
        async with httpx.AsyncClient(base_url=base_url, timeout=120.0, trust_env=False) as http:
            while time.monotonic() < until_s:
                (kind,) = rng.choices(kinds, weights)
                try:
                    answer = await kind.ask(http, rng)
                except (httpx.HTTPError, OSError, WebSocketException) as error:
                    answer = f"connection: {type(error).__name__}"
                tally.note(kind, answer)

    microphone = Kind("live, microphone", speak, frozenset({"200"}), 1)
    await asyncio.gather(
        *(caller(number, callers.kinds) for number in range(clients)),
        caller(clients, [microphone]),
    )
    return tally
