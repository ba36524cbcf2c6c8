"""Live sessions in real time: how soon their text comes, and how many a machine carries.

    python -m loadtest.bench_live [--model en-moonshine-tiny] [--sessions 1,8,32] [--seconds 40]

Each session of ``/v1/realtime`` speaks clips of 3 to 8 seconds with pauses of 1.2, in pieces of 100 ms, no
faster than a microphone. They begin at different times. Measured from the moment that the sound was sent:

- *first words*: from the beginning of an utterance (its padding included) to the first text told of it;
- *transcript*: from where it is cut, 200 ms after the last speech, to its transcript. 300 ms of it are the
  rest of the pause that ends an utterance;
- *after the pause*: from ``speech_stopped`` to the transcript, which is what the service needs for it.

The transcripts of all sessions must be the same, whatever the load. The service shares the cores with the
callers. The last line is JSON.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection

from loadtest.clips import SAMPLE_RATE_HZ, speech
from loadtest.command import bundle_parser
from loadtest.live_client import PIECE_S, append, opened, pieces, update
from loadtest.processes import LiveServer, api_server, hardware

CLIPS_S = (3.0, 5.0, 8.0, 4.0)
PAUSE_S = 1.2


@dataclass
class Heard:
    """Of all sessions of one level; seconds."""

    first_words_s: list[float] = field(default_factory=list)
    transcript_s: list[float] = field(default_factory=list)
    after_pause_s: list[float] = field(default_factory=list)
    late_s: float = 0.0
    """How far the slowest caller fell behind its microphone."""


def recording(seconds: float) -> tuple[bytes, str]:
    """16-bit samples of clips and pauses, at least `seconds` of them, and where the speech comes from."""
    samples, source = speech(sum(CLIPS_S))
    bounds = np.cumsum([0, *(round(each * SAMPLE_RATE_HZ) for each in CLIPS_S)])
    pause = np.zeros(round(PAUSE_S * SAMPLE_RATE_HZ), np.float32)
    parts = [part for a, b in pairwise(bounds) for part in (pause, samples[a:b])]
    once = np.concatenate(parts)
    times = max(1, round(seconds * SAMPLE_RATE_HZ / len(once)))
    whole = np.concatenate([*[once] * times, pause])
    return (whole * 32767).astype("<i2").tobytes(), source


async def session(server: LiveServer, model: str, data: bytes, wait_s: float, heard: Heard) -> list[str]:
    """One caller: its transcripts; its times go into `heard`."""
    await asyncio.sleep(wait_s)
    async with opened(server.address, f"/v1/realtime?model={model}") as socket:
        await socket.send(update())
        while json.loads(await socket.recv())["type"] != "session.updated":
            pass
        start_s = time.perf_counter()
        speaking = asyncio.create_task(speak(socket, data, start_s, heard))
        texts = await listen(socket, start_s, heard, speaking)
        await speaking
        return texts


async def speak(socket: ClientConnection, data: bytes, start_s: float, heard: Heard) -> None:
    """Send each piece when a microphone would have it."""
    for count, piece in enumerate(pieces(data), 1):
        due_s = start_s + count * PIECE_S
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        await socket.send(append(piece))
        heard.late_s = max(heard.late_s, time.perf_counter() - due_s)


async def listen(
    socket: ClientConnection, start_s: float, heard: Heard, speaking: asyncio.Task[None]
) -> list[str]:
    """The transcripts, until all is said and each utterance that began has one."""
    texts: list[str] = []
    began: dict[str, float] = {}
    stopped: dict[str, tuple[float, float]] = {}
    while not (speaking.done() and began and len(texts) == len(stopped) == len(began)):
        try:
            event: dict[str, Any] = json.loads(await asyncio.wait_for(socket.recv(), 1.0))
        except TimeoutError:
            continue
        now_s, item = time.perf_counter() - start_s, event.get("item_id", "")
        match event["type"]:
            case "input_audio_buffer.speech_started":
                began[item] = event["audio_start_ms"] / 1000
            case "input_audio_buffer.speech_stopped":
                stopped[item] = (event["audio_end_ms"] / 1000, now_s)
            case "conversation.item.input_audio_transcription.delta" if began[item] >= 0:
                heard.first_words_s.append(now_s - began[item])
                began[item] = -1.0
            case "conversation.item.input_audio_transcription.completed":
                texts.append(event["transcript"])
                heard.transcript_s.append(now_s - stopped[item][0])
                heard.after_pause_s.append(now_s - stopped[item][1])
            case "error" | "conversation.item.input_audio_transcription.failed":
                raise RuntimeError(f"the service answered {event}")
    return texts


async def level(server: LiveServer, model: str, sessions: int, data: bytes) -> tuple[Heard, float, list[str]]:
    """`sessions` callers at once: what they heard, CPU seconds of the service, the transcripts of one."""
    heard = Heard()
    cpu_s = server.cpu_s()
    spread_s = sum(CLIPS_S) / len(CLIPS_S)
    found = await asyncio.gather(
        *(session(server, model, data, spread_s * index / sessions, heard) for index in range(sessions))
    )
    if any(texts != found[0] for texts in found):
        raise RuntimeError("sessions that said the same were understood differently")
    return heard, server.cpu_s() - cpu_s, found[0]


def row(sessions: int, heard: Heard, cpu_s: float, audio_s: float) -> dict[str, float]:
    """The figures of one level, milliseconds but for CPU and counts."""
    figures: dict[str, float] = {"sessions": sessions}
    for name in ("first_words_s", "transcript_s", "after_pause_s"):
        values = np.array(getattr(heard, name)) * 1000
        p50, p95 = np.percentile(values, [50, 95]).round()
        figures |= {f"{name[:-2]}_p50_ms": float(p50), f"{name[:-2]}_p95_ms": float(p95)}
    figures["late_ms"] = round(heard.late_s * 1000)
    figures["cpu_s_per_audio_s"] = round(cpu_s / (sessions * audio_s), 4)
    return figures


def run(model: str, models_dir: Path, sessions: Sequence[int], seconds: float) -> list[dict[str, float]]:
    """Measure level by level; prints the table."""
    data, source = recording(seconds)
    audio_s = len(data) / 2 / SAMPLE_RATE_HZ
    rows, expected = [], None
    print(f"{model}, {hardware()}; {audio_s:.0f} s per session of {source}, pauses of {PAUSE_S} s\n")
    print("| sessions | first words p50, p95 (ms) | transcript | after the pause | CPU seconds per second |")
    print("|--:|--:|--:|--:|--:|")
    with api_server(model, models_dir, calibrate="false", log_level="warning", max_streams=4096) as server:
        for count in sessions:
            heard, cpu_s, texts = asyncio.run(level(server, model, count, data))
            if texts != (expected := expected or texts):
                raise RuntimeError(f"{count} sessions were understood differently from {sessions[0]}")
            figures = row(count, heard, cpu_s, audio_s)
            rows.append(figures)
            cells = (
                f"{figures[f'{name}_p50_ms']:.0f}, {figures[f'{name}_p95_ms']:.0f}"
                for name in ("first_words", "transcript", "after_pause")
            )
            print(f"| {count} | {' | '.join(cells)} | {figures['cpu_s_per_audio_s']:.4f} |", flush=True)
    return rows


def main() -> int:
    """Command line."""
    parser = bundle_parser(__doc__)
    parser.add_argument("--sessions", default="1,8,32", help="levels, comma list")
    parser.add_argument("--seconds", type=float, default=40.0, help="of sound per session, about")
    options = parser.parse_args()
    sessions = [int(each) for each in options.sessions.split(",")]
    print(json.dumps(run(options.model, options.models_dir, sessions, options.seconds)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
