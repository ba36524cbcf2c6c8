"""HTTP by hand, for requests that no client would send."""

from __future__ import annotations

import socket


def head(length: int | None, path: str = "/transcribe") -> bytes:
    """A POST of `length` bytes, or of chunks."""
    size = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    return (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: multipart/form-data; boundary=b\r\n{size}\r\n\r\n"
    ).encode()


def body(audio: bytes) -> bytes:
    """A form with one file."""
    return (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\n'
        + audio
        + b"\r\n--b--\r\n"
    )


def read_answer(connection: socket.socket, timeout_s: float = 10) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one answer; raises when the connection closes before it."""
    connection.settimeout(timeout_s)
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = connection.recv(65536)
        if not chunk:
            raise ConnectionError("closed without an answer")
        data += chunk
    raw_head, _, rest = data.partition(b"\r\n\r\n")
    lines = raw_head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines[1:])}
    while len(rest) < int(headers.get("content-length", 0)):
        rest += connection.recv(65536)
    return int(lines[0].split()[1]), headers, rest
