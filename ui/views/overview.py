"""The service at a glance: its state, its load, its models, and what this session has sent."""

from __future__ import annotations

import asyncio
import html
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Any

import streamlit as st

from ui.errors import AccessError, ApiError, ApiTimeoutError, DeadlineError
from ui.load import Load
from ui.problems import explain_file
from ui.service import Service
from ui.session import Session
from ui.strings import Strings, language_name
from ui.transcript import Model
from ui.views.format import count, duration, percent
from ui.work import Task

REFRESH_S = 2.0
_SHOWN_CHARACTERS = 120
_LONG_CHARACTERS = 40


def render(session: Session, service: Service) -> None:
    """Draw the overview; the upper part refreshes itself."""
    strings = session.strings
    _now(session, service)
    st.caption(strings("overview.refresh", seconds=f"{REFRESH_S:g}"))
    if session.settings.grafana_url:
        st.link_button(
            strings("details.grafana"), session.settings.grafana_url, icon=":material/open_in_new:"
        )
    st.subheader(strings("overview.models"), anchor=False)
    st.html(_models(service.models, strings))
    st.subheader(strings("overview.recent"), anchor=False)
    if session.work.tasks:
        offset_min = st.context.timezone_offset  # the browser's own: the page's server may stand elsewhere
        zone = None if offset_min is None else timezone(timedelta(minutes=-offset_min))
        st.html(_recent(list(reversed(session.work.tasks)), strings, zone))
    else:
        st.caption(strings("overview.none"))


@st.fragment(run_every=REFRESH_S)
def _now(session: Session, drawn: Service) -> None:
    strings = session.strings
    service = session.look_at_service(max_age_s=REFRESH_S / 2)
    if service.usable != drawn.usable:
        st.rerun()  # with the notice on top, or without
    state, load = _look(session, service)
    first, second, third, fourth = st.columns(4, vertical_alignment="bottom")
    known = {"ready", "starting", "draining", "down", "access", "late"}
    first.metric(strings("overview.state"), strings(f"overview.{state}") if state in known else state)
    second.metric(strings("overview.queue"), _queue(load, strings), help=strings("overview.queue_help"))
    third.metric(strings("overview.inflight"), _number(load.inflight, strings))
    fourth.metric(strings("overview.busy"), "–" if load.worker_busy is None else percent(load.worker_busy))
    first, second, third, _ = st.columns(4, vertical_alignment="bottom")
    first.metric(strings("overview.requests"), _number(load.requests, strings))
    second.metric(strings("overview.rejections"), _number(load.rejections, strings))
    speed = load.audio_computed_s / load.compute_s if load.audio_computed_s and load.compute_s else None
    third.metric(
        strings("overview.speed"),
        "–" if speed is None else f"{speed:.0f}×",
        help=strings("overview.speed_help"),
    )


def _look(session: Session, service: Service) -> tuple[str, Load]:
    """The state, and the load where it is told: a gateway or a setting may withhold ``/metrics``."""
    background = session.background
    if isinstance(service.problem, AccessError):
        return "access", Load()
    if isinstance(service.problem, ApiTimeoutError | DeadlineError):
        return "late", Load()
    if service.problem is not None:
        return "down", Load()
    try:
        return service.state, background.call(asyncio.wait_for(background.client.load(), REFRESH_S / 2))
    except (ApiError, TimeoutError):
        return service.state, Load()


def _queue(load: Load, strings: Strings) -> str:
    if load.queue_audio_s is None:
        return "–"
    limit = f" / {load.queue_limit_audio_s:.0f}" if load.queue_limit_audio_s else ""
    return f"{load.queue_audio_s:.0f}{limit} {strings('unit.s')}"


def _number(value: float | None, strings: Strings) -> str:
    return "–" if value is None else count(value, strings)


def _models(models: Sequence[Model], strings: Strings) -> str:
    head = ["model", "languages", "parameters", "graph", "runs_on", "wer"]
    rows = []
    for model in models:
        details = model.details
        default = f" ({strings('overview.default')})" if model.is_default else ""
        parameters = details.get("parameters")
        rows.append(
            [
                model.name + default,
                ", ".join(language_name(code) for code in model.languages),
                count(parameters, strings) if isinstance(parameters, int | float) else "–",
                str(details.get("graph") or "–"),
                str(details.get("provider") or "–"),
                _evaluations(details.get("evaluation"), strings),
            ]
        )
    return _table([strings(f"overview.{key}") for key in head], rows)


def _evaluations(value: Any, strings: Strings) -> str:
    """A line for each way of decoding: a model with a language model is measured with it and without.

    Lines break between the test sets, not inside of a rate.
    """
    ways: dict[str, list[str]] = {}
    for entry in value if isinstance(value, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("wer"), int | float) and "test_set" in entry:
            rates = ways.setdefault(str(entry.get("decoding") or ""), [])
            rate = strings.number(entry["wer"] * 100, ".1f")
            rates.append(f"{entry['test_set']}\N{NO-BREAK SPACE}{rate}\N{NO-BREAK SPACE}%")
    texts = [f"{way}: {', '.join(rates)}" if way else ", ".join(rates) for way, rates in ways.items()]
    return "\n".join(texts) or "–"


def _recent(tasks: Sequence[Task], strings: Strings, zone: tzinfo | None) -> str:
    rows = []
    for task in tasks:
        transcript = task.transcript
        text = transcript.text if transcript else ""
        if task.error is not None:
            text = explain_file(task.error, strings, empty=task.empty).title
        short = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS].rstrip() + "…"
        rows.append(
            [
                datetime.fromtimestamp(task.created_at, zone).strftime("%H:%M:%S"),
                task.name,
                strings(f"state.{task.state}") + (f": {short}" if short else ""),
                "–" if task.duration_s is None else duration(task.duration_s, strings),
                strings.number(transcript.real_time_factor, ".3f") if transcript else "–",
                (transcript.request_id or transcript.id)
                if transcript
                else getattr(task.error, "request_id", "") or "–",
            ]
        )
    head = [
        "overview.when",
        "overview.file",
        "overview.result",
        "overview.sound",
        "details.rtf",
        "details.request",
    ]
    return _table([strings(key) for key in head], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    return (
        '<div class="asr-scroll" tabindex="0"><table class="asr-table">'
        f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    return f"<td{' class=long' if len(text) > _LONG_CHARACTERS else ''}>{html.escape(text)}</td>"
