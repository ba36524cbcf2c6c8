"""``GET /docs``: the OpenAPI document as one static page. No script, nothing from other hosts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from api.access import is_open

router = APIRouter(include_in_schema=False)

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { border-bottom: 1px solid #8888; margin-top: 2.5rem; }
h3 { margin: 1.5rem 0 .25rem; } code, pre { font: .875rem/1.4 ui-monospace, monospace; }
pre { background: #8881; padding: .75rem; overflow-x: auto; border-radius: .375rem; }
.verb { display: inline-block; min-width: 3.5rem; font-weight: 700; }
table { display: block; overflow-x: auto; border-collapse: collapse; margin: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; }
tr { border-top: 1px solid #8883; }
"""


# OpenAPI has no words for these.
_LIVE = {
    "/v1/realtime": "OpenAI's realtime API, for sessions of type <code>transcription</code>",
    "/vosk": "the protocol of Vosk's server",
}


def with_keys(openapi: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The document of a service that has keys: what must be sent, and where it need not be."""
    document = openapi()
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}]
    for path, methods in document["paths"].items():
        for operation in methods.values():
            if is_open(path):
                operation["security"] = []
    return document


@router.get("/docs")
async def docs(request: Request) -> HTMLResponse:
    """Every route with its fields and an example that runs."""
    document = request.app.openapi()
    base = str(request.base_url).rstrip("/")
    return HTMLResponse("".join(_page(document, base)))


def _page(document: dict[str, Any], base: str) -> Iterator[str]:
    info = document["info"]
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])}</title>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{_STYLE}</style><body><h1>{escape(info['title'])} {escape(info['version'])}</h1>"
    yield f"<p>{escape(info.get('description', ''))} The document itself: "
    yield '<a href="/openapi.json"><code>/openapi.json</code></a>.</p>'
    yield f"<pre>{escape(_curl(base, has_keys='security' in document))}</pre>"
    by_tag: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
    for path, methods in document["paths"].items():
        for verb, operation in methods.items():
            by_tag.setdefault(operation.get("tags", ["other"])[-1], []).append((path, verb, operation))
    for tag, operations in by_tag.items():
        yield f"<h2>{escape(tag)}</h2>"
        for path, verb, operation in operations:
            yield from _operation(path, verb, operation)
    yield "<h2>live sessions</h2><table>"
    for path, meaning in _LIVE.items():
        yield f"<tr><td>WebSocket <code>{path}</code><td>{meaning}"
    yield "</table></body></html>"


def _curl(base: str, *, has_keys: bool) -> str:
    curl = 'curl -H "Authorization: Bearer $KEY"' if has_keys else "curl"
    return (
        f"{curl} -F file=@speech.mp3 {base}/transcribe\n"
        f"{curl} -F file=@speech.mp3 -F format=srt {base}/transcribe\n"
        f"{curl} -F model=whisper-1 -F response_format=verbose_json -F file=@speech.mp3 \\\n"
        f"    {base}/v1/audio/transcriptions"
    )


def _operation(path: str, verb: str, operation: dict[str, Any]) -> Iterator[str]:
    summary = escape(operation.get("summary", ""))
    yield f'<h3><span class="verb">{verb.upper()}</span> <code>{escape(path)}</code></h3><p>{summary}'
    if operation.get("description"):
        yield f"<br>{_prose(operation['description'])}"
    yield "</p>"
    content = operation.get("requestBody", {}).get("content", {})
    for schema in (entry.get("schema", {}) for entry in content.values()):
        required = schema.get("required", [])
        yield "<table><tr><th>field<th>type<th>default<th>meaning"
        fields = schema.get("properties", {})
        for name in sorted(fields, key=lambda name: name not in required):
            default = "required" if name in required else _sent(fields[name].get("default"))
            yield f"<tr><td><code>{escape(name)}</code><td>{escape(_kind(fields[name]))}"
            yield f"<td>{escape(default)}<td>{_prose(fields[name].get('description', ''))}"
        yield "</table>"


def _prose(text: str) -> str:
    """HTML of a docstring's text: ``code`` and paragraphs."""
    marked = re.sub(r"``(.+?)``", r"<code>\1</code>", escape(text))
    return re.sub(r"\n\s*\n", "<br>", marked)


def _sent(default: Any) -> str:
    """A default as a caller would send it in a form; empty where it would send nothing."""
    if default in (None, "", []):
        return ""
    if isinstance(default, list):
        return ", ".join(map(_sent, default))
    return default if isinstance(default, str) else json.dumps(default)


def _kind(field: dict[str, Any]) -> str:
    if field.get("format") == "binary":
        return "file"
    if "enum" in field:
        return " | ".join(str(value) for value in field["enum"])
    if "const" in field:
        return str(field["const"])
    if options := field.get("anyOf") or field.get("oneOf"):
        # A form cannot send null.
        return " or ".join(_kind(option) for option in options if option.get("type") != "null")
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    return str(field.get("title") if field.get("type") == "object" else field.get("type", "any"))
