"""Tells the browser what Streamlit does not: the page's language, its title, and where the focus goes."""

from __future__ import annotations

from typing import Any

import streamlit as st

_SCRIPT = """
export default function ({ data }) {
  document.documentElement.lang = data.language;
  document.title = data.title;
  const root = document.documentElement;
  const vanished = String(data.vanished);
  const before = root.dataset.vanished ?? "0";
  root.dataset.vanished = vanished;
  if (before === vanished) return;
  const until = Date.now() + 5000; // the button goes a moment later than this comes, at the end of a run
  const look = () => {
    const heading = document.querySelector("h1");
    if (document.activeElement !== document.body) {
      if (Date.now() < until) setTimeout(look, 100);
    } else if (heading) {
      heading.tabIndex = -1;
      heading.focus({ preventScroll: true }); // who uses a mouse stays where they are
    }
  };
  look();
}
"""


def document(language: str, title: str, vanished: int) -> None:
    """Set the document's language, by which screen readers pronounce it, and its title.

    Whenever ``vanished`` changes, the button that was pressed last has gone from the page, and the focus that
    it held goes to the heading; browsers would leave it nowhere.
    """
    data = {"language": language, "title": title, "vanished": vanished}
    _component()(key="document", data=data, height=1)


@st.cache_resource
def _component() -> Any:
    return st.components.v2.component("asr_document", html="<span></span>", js=_SCRIPT)
