"""``asr transcribe``: files to text in this process, a few at a time, in the order they were named."""

from __future__ import annotations

import argparse
import asyncio
import json
import stat
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from tqdm import tqdm

from api.commands.runtime import open_service, warnings_only
from api.errors import AsrError, SettingsError
from api.openai_format import verbose_body
from api.settings import Settings
from api.subtitles import to_srt, to_vtt
from api.transcriber import Options, Transcriber
from api.transcript import Transcript
from api.windows import Progress

if TYPE_CHECKING:
    Bar = tqdm[Any]

_FILES_AT_ONCE = 4
_BAR_FROM_BYTES = 5_000_000
STDIN = "-"
_SPOOL_BYTES = 8 * 2**20  # more goes to disk
_BLOCK_BYTES = 2**16
_LARGEST_BYTES_PER_S = 48_000 * 2 * 4  # stereo as float32

Source = BinaryIO | str
"""What was read from a pipe, or why it could not be."""


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    """0 where every file was transcribed, 1 where one failed (the others are still done)."""
    if arguments.beam is not None and not 0 <= arguments.beam <= settings.max_beam:
        raise SettingsError(f"--beam {arguments.beam}: must be 0 to {settings.max_beam}")
    if arguments.beam == 0 and arguments.hotword:
        raise SettingsError("--beam 0: decodes greedily, which has no use for --hotword; leave --beam out")
    if arguments.output is not None and not arguments.output.is_dir():
        raise SettingsError(f"--output {arguments.output}: is not a folder")
    name, files = Counter(path.name for path in arguments.files).most_common(1)[0]
    if arguments.output is not None and files > 1:
        raise SettingsError(
            f"--output {arguments.output}: {files} of the files are named {name!r}, and each would overwrite "
            "the transcript of the one before; give each folder an --output of its own"
        )
    if arguments.output is None and len(arguments.files) > 1 and arguments.format in ("srt", "vtt"):
        raise SettingsError(
            f"--format {arguments.format}: {len(arguments.files)} files would run together into one; "
            "give a folder for them with --output"
        )
    # Here and not on the event loop, where Ctrl-C would not end a wait for the other end of a pipe.
    most_bytes = int(settings.max_audio_s * _LARGEST_BYTES_PER_S)
    pipes = [_taken_in(path, most_bytes) for path in arguments.files]
    warnings_only()
    return asyncio.run(_run(settings, arguments, pipes))


def _taken_in(path: Path, most_bytes: int) -> Source | None:
    """All of a pipe or a terminal, as a file that can be wound back, or why not; None for what is a file."""
    try:
        if str(path) == STDIN:
            opened = open(0, "rb", closefd=False)  # noqa: SIM115  closed below
        else:
            mode = path.stat().st_mode
            if not (stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
                return None
            opened = path.open("rb")
        with opened as pipe:
            spool = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES)  # noqa: SIM115  closed once it is read
            while block := pipe.read(_BLOCK_BYTES):
                if spool.tell() + len(block) > most_bytes:
                    return f"more than {most_bytes} bytes, too many for ASR_MAX_AUDIO_S"
                spool.write(block)
    except OSError as error:
        return error.strerror or str(error)
    spool.seek(0)
    return cast(BinaryIO, spool)


async def _run(settings: Settings, arguments: argparse.Namespace, pipes: list[Source | None]) -> int:
    language = arguments.language.lower() if arguments.language else None
    options = Options(language=language, beam=arguments.beam, hotwords=tuple(arguments.hotword))
    failed, many = 0, len(arguments.files) > 1
    async with open_service(settings) as service:
        transcriber = service.transcriber("")
        transcriber.language_of(options.language)
        slots = asyncio.Semaphore(_FILES_AT_ONCE)
        with ExitStack() as stack:
            bar = stack.enter_context(_bar(arguments))

            async def one(path: Path, pipe: Source | None) -> Transcript | str:
                async with slots:
                    outcome = await _transcribe(transcriber, pipe or path, options, bar, by_seconds=not many)
                if many:
                    bar.update(1)
                return outcome

            work = [asyncio.create_task(one(*pair)) for pair in zip(arguments.files, pipes, strict=True)]
            for path, task in zip(arguments.files, work, strict=True):
                outcome = await task
                problem = outcome if isinstance(outcome, str) else _write(outcome, path, arguments, bar)
                if problem is not None:
                    failed += 1
                    bar.write(f"asr: {path}: {problem}", file=sys.stderr)
                    if _in_lines(arguments):
                        bar.write(_line(path, {"error": problem}), file=sys.stdout, end="")
    return 1 if failed else 0


async def _transcribe(
    transcriber: Transcriber, source: Path | Source, options: Options, bar: Bar, *, by_seconds: bool
) -> Transcript | str:
    """The transcript, or why there is none. A single file moves the bar by its seconds."""
    if isinstance(source, str):
        return source
    loop = asyncio.get_running_loop()
    progress, segments, start_s = Progress(), [], loop.time()
    try:
        with source.open("rb") if isinstance(source, Path) else source as file:
            async for part in transcriber.stream(file, options, progress, wait=True):
                segments.extend(part)
                if by_seconds:
                    bar.update(round(progress.duration_s - bar.n, 1))
    except AsrError as error:
        return error.message
    except OSError as error:
        return error.strerror or str(error)
    return transcriber.finish(tuple(segments), options, progress, loop.time() - start_s)


def _bar(arguments: argparse.Namespace) -> Bar:
    """Files done for many files, audio seconds for one long one; none where nobody looks."""
    many = len(arguments.files) > 1
    sizes = [path.stat().st_size for path in arguments.files if path.is_file()]
    wanted = many or max(sizes, default=0) > _BAR_FROM_BYTES
    hidden = arguments.no_progress or not wanted or not sys.stderr.isatty()
    return tqdm(
        total=len(arguments.files) if many else None,
        unit="file" if many else "s",
        disable=hidden,
        file=sys.stderr,
        leave=False,
    )


def render(transcript: Transcript, output_format: str) -> str:
    """One transcript as text, json (OpenAI's verbose form with words), srt or vtt."""
    if output_format == "json":
        return json.dumps(_body(transcript), ensure_ascii=False, indent=2) + "\n"
    if output_format == "srt":
        return to_srt(transcript)
    if output_format == "vtt":
        return to_vtt(transcript)
    return transcript.text + "\n"


def _body(transcript: Transcript) -> dict[str, Any]:
    return verbose_body(transcript, ("word", "segment"), logprobs=False)


def _in_lines(arguments: argparse.Namespace) -> bool:
    """Whether there are several transcripts as JSON in one stream, where each becomes a line."""
    return arguments.format == "json" and arguments.output is None and len(arguments.files) > 1


def _line(path: Path, body: dict[str, Any]) -> str:
    return json.dumps({"file": str(path), **body}, ensure_ascii=False) + "\n"


def _write(transcript: Transcript, path: Path, arguments: argparse.Namespace, bar: Bar) -> str | None:
    """To stdout or a file of its own; returns why it could not be written there."""
    text = _line(path, _body(transcript)) if _in_lines(arguments) else render(transcript, arguments.format)
    for warning in transcript.warnings:
        bar.write(f"asr: {path}: {warning}", file=sys.stderr)
    if arguments.output is not None:
        suffix = "txt" if arguments.format == "text" else arguments.format
        target = arguments.output / f"{path.name}.{suffix}"
        try:
            target.write_text(text, encoding="utf-8")
        except OSError as error:
            return f"{target}: {error.strerror or error}"
        return None
    if len(arguments.files) > 1 and arguments.format == "text":
        text = f"{path}: {text}"
    bar.write(text, file=sys.stdout, end="")
    return None
