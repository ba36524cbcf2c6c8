"""Word error rate against a text the person pastes, with every difference shown."""

from __future__ import annotations

import html
from collections.abc import Sequence

import streamlit as st

from ui.alignment import Step, TextTooLongError, align, comparable, error_rate
from ui.session import Session
from ui.strings import Strings
from ui.transcript import Transcript
from ui.work import Task


def render(session: Session, task: Task, transcript: Transcript) -> None:
    """A box for the right text; the rate and the differences below it."""
    strings, key = session.strings, f"reference.{task.id}"
    if key not in st.session_state:
        st.session_state[key] = session.references.get(key, "")
    with st.expander(strings("compare.title"), icon=":material/rule:", key=f"compare.{task.id}"):
        reference = session.references[key] = st.text_area(strings("compare.reference"), key=key, height=120)
        wanted, heard = (comparable(text, transcript.language) for text in (reference, transcript.text))
        if not wanted:
            return
        try:
            steps = align(wanted, heard)
        except TextTooLongError:
            st.warning(strings("compare.too_long"))
            return
        rate = error_rate(steps)
        st.metric(strings("compare.wer"), f"{strings.number(rate.rate * 100, '.1f')} %")
        st.markdown(
            strings(
                "compare.errors",
                changed=rate.changed,
                missing=rate.missing,
                extra=rate.extra,
                words=rate.reference_words,
            )
        )
        st.html(difference_html(steps, wanted, heard, strings))


def difference_html(
    steps: Sequence[Step], wanted: Sequence[str], heard: Sequence[str], strings: Strings
) -> str:
    """Missing words struck through, extra words underlined; ``del`` and ``ins`` say it to screen readers."""
    parts = []
    for step in steps:
        old = html.escape(wanted[step.reference]) if step.reference is not None else ""
        new = html.escape(heard[step.hypothesis]) if step.hypothesis is not None else ""
        if step.kind == "equal":
            parts.append(new)
            continue
        title = html.escape(strings(f"compare.{step.kind}"))
        parts.append(
            (f'<del title="{title}">{old}</del>' if old else "")
            + (" " if old and new else "")
            + (f'<ins title="{title}">{new}</ins>' if new else "")
        )
    return f'<p class="asr-diff">{" ".join(parts)}</p>'
