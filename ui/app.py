"""Entry of the page: ``streamlit run ui/app.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import streamlit as st

if str(Path(__file__).resolve().parent.parent) not in sys.path:  # streamlit puts only this folder there
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ui.background import Background
from ui.page import render
from ui.settings import UiSettings


@st.cache_resource
def shared() -> tuple[UiSettings, Background]:
    """Settings and the connection pool, once for the process."""
    settings = UiSettings.from_env()
    return settings, Background(settings)


render(*shared())
