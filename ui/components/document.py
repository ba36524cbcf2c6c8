"""Tells the browser which language the page is in, so that screen readers pronounce it right."""

from __future__ import annotations

from typing import Any

import streamlit as st

_SCRIPT = """
export default function ({ data }) {
  document.documentElement.lang = data.language;
  document.title = data.title;
}
"""


def document(language: str, title: str) -> None:
    """Set the document's language and title."""
    _component()(key="document", data={"language": language, "title": title}, height=1)


@st.cache_resource
def _component() -> Any:
    return st.components.v2.component("asr_document", html="<span></span>", js=_SCRIPT)
