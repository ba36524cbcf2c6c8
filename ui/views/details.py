"""For the engineer: where the time went, how sure the model was, and how to find the request again."""

from __future__ import annotations

import html
from collections.abc import Mapping

import streamlit as st

from ui.session import Session
from ui.strings import Strings
from ui.transcript import Transcript
from ui.views.format import milliseconds, percent
from ui.work import Task

# What the service's processing time leaves out: it runs from the end of the upload to the text.
_OUTSIDE = ("read", "render")
_ROUNDING_S = 0.001
# Colours of the Okabe-Ito palette, which people with any colour vision can tell apart; the table names each.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7F7F7F")


def render(session: Session, task: Task, transcript: Transcript) -> None:
    """Timings, factors, identifiers and links of one request."""
    strings = session.strings
    with st.expander(strings("details.title"), icon=":material/timer:", key=f"details.{task.id}"):
        waited, service, factor, confidence = st.columns(4, vertical_alignment="bottom")
        waited.metric(strings("details.total"), milliseconds(task.elapsed_s, strings))
        service.metric(strings("details.service"), milliseconds(transcript.processing_s, strings))
        speed = strings.number(transcript.real_time_factor, ".3f")
        factor.metric(strings("details.rtf"), speed, help=strings("details.rtf_help"))
        sure = "–" if transcript.confidence is None else percent(transcript.confidence)
        confidence.metric(strings("details.confidence"), sure)
        if transcript.stages_s:
            st.html(stages_html(transcript.stages_s, task.elapsed_s, transcript.processing_s, strings))
        else:
            st.caption(strings("details.no_stages"))
        _identifiers(session, transcript)


def stages_html(stages_s: Mapping[str, float], total_s: float, processing_s: float, strings: Strings) -> str:
    """A bar and a table of the same numbers; what the service does not account for is sending and waiting.

    Pieces of a long recording run side by side and the service adds up their times. These are no parts of
    the time that passed, so there is then no bar and no share, and a line that says why. ``processing_s``
    (0 where the service does not tell it) is what passed for all pieces together.
    """
    known_s = spent_s = sum(stages_s.values())
    if processing_s > 0:
        spent_s = min(known_s, processing_s + sum(stages_s.get(name, 0.0) for name in _OUTSIDE))
    summed = known_s > min(spent_s, total_s) + _ROUNDING_S
    rows = [(name, seconds) for name, seconds in stages_s.items() if seconds > 0]
    if total_s > spent_s:
        rows.append(("upload", total_s - spent_s))
    whole = sum(seconds for _, seconds in rows) or 1.0
    bar, body = [], []
    for index, (name, seconds) in enumerate(rows):
        label = html.escape(stage_name(name, strings))
        time = f'<td class="number">{milliseconds(seconds, strings)}</td>'
        if summed:
            body.append(f"<tr><td>{label}</td>{time}</tr>")
            continue
        colour, share = _COLOURS[index % len(_COLOURS)], seconds / whole
        bar.append(
            f'<span style="width:{share * 100:.2f}%;background:{colour}" '
            f'title="{label}: {milliseconds(seconds, strings)}"></span>'
        )
        body.append(
            f'<tr><td><span class="asr-swatch" style="background:{colour}"></span>{label}</td>'
            f'{time}<td class="number">{percent(share)}</td></tr>'
        )
    columns = ["details.stage", "details.time", *([] if summed else ["details.share"])]
    head = "".join(
        f'<th scope="col"{" class=number" if number else ""}>{html.escape(strings(key))}</th>'
        for number, key in enumerate(columns)
    )
    table = f'<table class="asr-table"><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    if summed:
        return f"<p>{html.escape(strings('details.summed'))}</p>{table}"
    return f'<div class="asr-bar" aria-hidden="true">{"".join(bar)}</div>{table}'


def stage_name(name: str, strings: Strings) -> str:
    """A stage in plain words; one this page has never heard of keeps its own name."""
    try:
        return strings(f"stage.{name}")
    except KeyError:
        return name


def _identifiers(session: Session, transcript: Transcript) -> None:
    strings, settings = session.strings, session.settings
    for label, value in (
        (strings("details.request"), transcript.request_id or transcript.id),
        (strings("details.trace"), transcript.trace_id),
    ):
        if value:
            st.caption(label)
            st.code(value, language=None)
    trace_url = settings.trace_url(transcript.trace_id)
    if trace_url:
        st.link_button(strings("details.jaeger"), trace_url, icon=":material/open_in_new:")
    if settings.grafana_url:
        st.link_button(strings("details.grafana"), settings.grafana_url, icon=":material/open_in_new:")
