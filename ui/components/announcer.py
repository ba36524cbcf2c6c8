"""Says to screen readers what comes onto the page by itself (WCAG 2.2, success criterion 4.1.3)."""

from __future__ import annotations

from typing import Any

import streamlit as st

# The element stays while its words change, which is what screen readers listen to. The same words once more
# are a change only after they were gone for a moment.
_SCRIPT = """
export default function ({ data, parentElement }) {
  const status = parentElement.querySelector("[role=status]");
  if (status.dataset.number === String(data.number)) return;
  status.dataset.number = data.number;
  status.textContent = "";
  setTimeout(() => { status.textContent = data.text; }, 100);
}
"""


def announce(text: str, number: int) -> None:
    """Say ``text`` once for each ``number``, without showing it."""
    _component()(key="announcer", data={"text": text, "number": number}, height=1)


@st.cache_resource
def _component() -> Any:
    # Without styles of its own it stands in the page itself, where every screen reader finds it.
    return st.components.v2.component(
        "asr_announcer",
        html='<p class="asr-spoken" role="status" aria-live="polite"></p>',
        js=_SCRIPT,
        isolate_styles=False,
    )
