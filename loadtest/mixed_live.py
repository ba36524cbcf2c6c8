"""Live sessions for the mixed load: short ones as fast as they are taken, abandoned ones, and microphones.

They answer like the requests of ``mixed_load.py``: ``"200"`` when all was as it should be, else what was not.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections.abc import Sequence
from typing import Any

from websockets.asyncio.client import ClientConnection

from loadtest.clips import SAMPLE_RATE_HZ
from loadtest.live_client import PIECE_S, append, opened, pieces, update
from loadtest.load import Clip

WAV_HEADER_BYTES = 44
LONGEST_S = 3300.0
"""Of one microphone's session: below the hour that the service grants."""


def pcm(clip: Clip) -> bytes:
    """The 16-bit samples of a WAV file as ``clips.wav_clip`` writes it."""
    return clip.content[WAV_HEADER_BYTES:]


async def configure(socket: ClientConnection) -> None:
    """Vosk's first message."""
    await socket.send(json.dumps({"config": {"sample_rate": SAMPLE_RATE_HZ}}))


async def vosk(address: str, clip: Clip, rng: random.Random) -> str:
    """One clip over Vosk's protocol: every message has its answer, the last one has words."""
    async with opened(address, "/vosk") as socket:
        await configure(socket)
        said = []
        for piece in pieces(pcm(clip), rng.choice([0.1, 0.25, 1.0])):
            await socket.send(piece)
            said.append(json.loads(await socket.recv()))
        await socket.send(json.dumps({"eof": 1}))
        said.append(json.loads(await socket.recv()))
    if wrong := next((each for each in said if not {"partial", "text"} & set(each)), None):
        return f"the answer {str(wrong)[:80]}"
    return "200"


async def realtime(address: str, clip: Clip, rng: random.Random) -> str:
    """One clip over the realtime API, committed by its caller: the transcript comes."""
    async with opened(address, "/v1/realtime") as socket:
        turn_detection = rng.choice([None, {"type": "server_vad"}])
        await socket.send(update(turn_detection=turn_detection))
        for piece in pieces(pcm(clip) + bytes(SAMPLE_RATE_HZ * 2), 0.5):
            await socket.send(append(piece))
        if turn_detection is None:
            await socket.send(json.dumps({"type": "input_audio_buffer.commit"}))
        async for message in socket:
            event = json.loads(message)
            if event["type"].endswith("transcription.completed"):
                return "200"
            if event["type"] == "error" or event["type"].endswith(".failed"):
                return f"the event {event['type']}: {event['error']['code']}"
    return "closed before the transcript"


async def leave(address: str, clip: Clip, rng: random.Random) -> None:
    """Connects, speaks for a while and is gone, without a closing handshake."""
    async with opened(address, rng.choice(["/vosk", "/v1/realtime"])) as socket:
        await configure(socket)
        for piece in pieces(pcm(clip))[: rng.randrange(20)]:
            await socket.send(piece)
        socket.transport.abort()


class Microphone:
    """Somebody who speaks the same `clips` again and again, with pauses, no faster than a microphone.

    What is said the same way must be understood the same way, in the first minute as in the last.
    """

    def __init__(self, clips: Sequence[Clip]) -> None:
        pause = bytes(round(1.2 * SAMPLE_RATE_HZ) * 2)
        self.round = pieces(b"".join(pause + pcm(clip) for clip in clips))

    async def session(self, address: str, duration_s: float) -> str:
        """Speak for `duration_s`, but less than an hour."""
        start_s, duration_s = time.monotonic(), min(duration_s, LONGEST_S)
        rounds: list[list[str]] = [[]]
        async with opened(address, "/vosk") as socket:
            await configure(socket)
            for said in itertools.count():
                if (now_s := time.monotonic() - start_s) > duration_s:
                    break
                if said and said % len(self.round) == 0:
                    rounds.append([])
                await asyncio.sleep(max(0.0, said * PIECE_S - now_s))
                await socket.send(self.round[said % len(self.round)])
                answer: dict[str, Any] = json.loads(await socket.recv())
                if "partial" not in answer and "text" not in answer:
                    return f"the answer {str(answer)[:80]}"
                if text := answer.get("text"):
                    rounds[-1].append(text)
            await socket.send(json.dumps({"eof": 1}))
            await socket.recv()
        return changed(rounds) or "200"


def changed(rounds: Sequence[list[str]]) -> str:
    """The first round that was understood in another way, in words; empty where there is none.

    Of the first one, which begins in quiet with no end of a round before it, and the last one, which is cut
    off, nothing is expected.
    """
    whole = rounds[1:-1]
    odd = (number for number, texts in enumerate(whole) if texts != whole[0])
    if (number := next(odd, None)) is None:
        return ""
    return f"round {number + 2} was understood as {whole[number]}, the second one as {whole[0]}"
