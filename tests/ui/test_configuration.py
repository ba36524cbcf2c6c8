"""How Streamlit serves the page when nobody says otherwise, and where images do say otherwise."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_which_has_no_login_is_served_to_this_machine_only() -> None:
    server = tomllib.loads((ROOT / "ui/.streamlit/config.toml").read_text())["server"]
    assert server["address"] == "127.0.0.1"
    for name in ("docker/ui.Dockerfile", "k8s/base/ui/settings.env"):
        assert "STREAMLIT_SERVER_ADDRESS=0.0.0.0" in (ROOT / name).read_text(), "there the network decides"
