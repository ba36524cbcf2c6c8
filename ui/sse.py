"""Server-sent events as the OpenAI contract uses them: ``data:`` frames of JSON, ``[DONE]`` at the end.

Lines end in CR, LF or CRLF and nothing else (WHATWG HTML, "Server-sent events"): ``str.splitlines`` would
also cut at U+2028, which JSON may carry unescaped.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterable, AsyncIterator

_LINE_END = re.compile(rb"\r\n|\n|\r(?!$)")
_LONGEST_LINE_BYTES = 16 * 1024 * 1024


class SseError(ValueError):
    """A stream that is not server-sent events."""


async def events(chunks: AsyncIterable[bytes]) -> AsyncIterator[str]:
    """The ``data`` of each event, in order, joined by newlines when an event has several data lines.

    Comments (pings) and other fields are passed over. An event that the stream's end cuts off is dropped, as
    the standard says.

    Raises:
        SseError: a line longer than 16 MiB, or bytes that are not UTF-8.
    """
    pending = b""
    data: list[str] = []
    async for chunk in chunks:
        *lines, pending = _LINE_END.split(pending + chunk)
        if len(pending) > _LONGEST_LINE_BYTES:
            raise SseError("a line of the event stream is too long")
        for line in lines:
            if not line:
                if data:
                    yield "\n".join(data)
                data = []
            elif line.startswith(b"data:"):
                try:
                    data.append(line[5:].decode("utf-8").removeprefix(" "))
                except UnicodeDecodeError:
                    raise SseError("the event stream is not UTF-8") from None
