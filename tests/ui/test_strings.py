"""Every language says everything, with the same blanks to fill; every failure has words."""

from __future__ import annotations

import ast
import string
from pathlib import Path

import pytest

import ui
from ui import errors
from ui.components.player import _STRINGS
from ui.problems import explain, explain_state
from ui.strings import NAMES, TABLES, Strings, language_for
from ui.views.format import count, duration, milliseconds
from ui.work import State

UI = Path(ui.__file__).parent


def blanks(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


@pytest.mark.parametrize("language", sorted(set(TABLES) - {"en"}))
def test_translations_are_complete(language: str) -> None:
    original, table = TABLES["en"], TABLES[language]
    assert set(table) == set(original)
    for key, text in table.items():
        assert text.strip(), key
        assert blanks(text) == blanks(original[key]), key
    same = [key for key in table if table[key] == original[key] and len(original[key].split()) > 1]
    assert not same, "left in English"


def test_every_key_the_code_names_exists() -> None:
    named = {f"player.{name}" for name in _STRINGS} | {f"state.{state}" for state in State}
    for path in UI.rglob("*.py"):
        if path.parent.name == "locales":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and getattr(node.func, "id", getattr(node.func, "attr", "")) == "strings"
            ):
                named |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    assert named <= set(TABLES["en"])
    assert len(named) > 60


@pytest.mark.parametrize(
    ("locale", "language"),
    [
        ("vi-VN", "vi"),
        ("tr", "tr"),
        ("az_AZ", "az"),
        ("RU-ru", "ru"),
        ("de-DE", "en"),
        (None, "en"),
        ("", "en"),
    ],
)
def test_the_browsers_language_is_met(locale: str | None, language: str) -> None:
    assert language_for(locale) == language


@pytest.mark.parametrize("language", sorted(NAMES))
@pytest.mark.parametrize(
    ("error", "key", "retry"),
    [
        (errors.ApiUnreachableError("x"), "down", True),
        (errors.ApiTimeoutError("x"), "late", True),
        (errors.ApiProtocolError("x"), "protocol", True),
        (errors.PageFaultError("x"), "page", True),
        (errors.status_error(429, {}, retry_after_s=2.2), "busy", True),
        (errors.status_error(503, {}), "starting", True),
        (errors.status_error(503, {"error": {"code": "draining"}}), "draining", True),
        (errors.status_error(413, {}), "too_large", False),
        (errors.status_error(422, {"error": {"code": "audio_too_long"}}), "too_long", False),
        (errors.status_error(422, {}), "value", True),
        (errors.status_error(400, {"error": {"code": "undecodable_audio"}}), "undecodable", False),
        (errors.status_error(400, {}), "value", True),
        (errors.status_error(401, {}), "access", True),
        (errors.status_error(404, {}), "model", True),
        (errors.status_error(504, {}), "late", True),
        (errors.status_error(500, {}, request_id="abc"), "server", True),
    ],
)
def test_each_failure_is_said(language: str, error: errors.ApiError, key: str, retry: bool) -> None:
    problem = explain(error, Strings(language), max_upload_bytes=25 * 2**20)
    assert problem.title == TABLES[language][f"problem.{key}"]
    assert problem.can_retry is retry
    assert "{" not in problem.advice
    if key == "busy":
        assert "3" in problem.advice
    if key == "too_large":
        assert "25" in problem.advice
    if key == "server":
        assert "abc" in problem.advice


@pytest.mark.parametrize(
    ("state", "key"),
    [("starting", "starting"), ("draining", "draining"), ("closing", "draining"), ("failed", "failed")],
)
def test_each_state_of_the_service_is_said(state: str, key: str) -> None:
    assert explain_state(state, None, Strings()).title == TABLES["en"][f"problem.{key}"]


@pytest.mark.parametrize("language", sorted(NAMES))
def test_decimals_are_those_of_the_language(language: str) -> None:
    strings, point = Strings(language), "." if language == "en" else ","
    shown = {
        duration(2.5, strings): f"2{point}5 {strings('unit.s')}",
        milliseconds(1.25, strings): f"1{point}25 {strings('unit.s')}",
        milliseconds(0.0041, strings): f"4{point}1 {strings('unit.ms')}",
        count(18_900_000, strings): f"18{point}9 M",
        count(0.5, strings): f"0{point}5",
    }
    assert list(shown) == list(shown.values())
    limit = explain(errors.status_error(413, {}), strings, max_upload_bytes=5 * 2**19).advice
    assert f"2{point}5" in limit
