"""The page's words in the language a person chose."""

from __future__ import annotations

from collections.abc import Mapping

from ui.locales import az, en, ru, tr, vi

TABLES: Mapping[str, Mapping[str, str]] = {
    "en": en.STRINGS,
    "vi": vi.STRINGS,
    "tr": tr.STRINGS,
    "az": az.STRINGS,
    "ru": ru.STRINGS,
}
NAMES: Mapping[str, str] = {
    "en": "English",
    "vi": "Tiếng Việt",
    "tr": "Türkçe",
    "az": "Azərbaycanca",
    "ru": "Русский",
}


class Strings:
    """Callable table: ``strings("result.edit")``; values in braces are filled from the keywords.

    Raises:
        KeyError: no such string, or a value that the string needs is missing.
    """

    def __init__(self, language: str = "en") -> None:
        self.language = language if language in TABLES else "en"
        self._table = TABLES[self.language]

    def __call__(self, key: str, **values: object) -> str:
        return self._table[key].format_map(values) if values else self._table[key]

    def number(self, value: float, form: str) -> str:
        """``value`` in Python's format ``form``, with the decimal sign that people of this language read."""
        return format(value, form).replace(".", self._table["unit.point"])


def language_for(locale: str | None) -> str:
    """The interface language for a browser's locale such as ``vi-VN``; English where there is none."""
    code = (locale or "").replace("_", "-").split("-")[0].lower()
    return code if code in TABLES else "en"


def language_name(code: str) -> str:
    """A spoken language's own name, or its code in capitals."""
    return NAMES.get(code, code.upper())
