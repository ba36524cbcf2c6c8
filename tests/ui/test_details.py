"""Where the time went: shares of the time that passed, and none where the stages ran side by side."""

from __future__ import annotations

import re

import pytest

from ui.strings import TABLES, Strings
from ui.views.details import stages_html

ENGLISH = TABLES["en"]
ONE_PIECE = {"read": 0.1, "decode": 0.1, "queue": 0.1, "inference": 0.5, "ctc": 0.1}
# A recording of half an hour, as it was measured: 25 s in the service, 135 s in the queue.
MANY_PIECES = {"read": 0.5, "decode": 3.0, "queue": 135.0, "inference": 90.0, "ctc": 1.0}


def rows(html: str) -> dict[str, list[str]]:
    found = re.findall(r"<tr><td>(?:<span[^>]*></span>)?([^<]+)</td>(.*?)</tr>", html)
    return {label: re.findall(r">([^<]+)</td>", cells) for label, cells in found}


def test_shares_add_up_and_the_rest_is_sending() -> None:
    html = stages_html(ONE_PIECE, 1.0, 0.8, Strings())
    assert rows(html) == {
        ENGLISH["stage.read"]: ["100 ms", "10 %"],
        ENGLISH["stage.decode"]: ["100 ms", "10 %"],
        ENGLISH["stage.queue"]: ["100 ms", "10 %"],
        ENGLISH["stage.inference"]: ["500 ms", "50 %"],
        ENGLISH["stage.ctc"]: ["100 ms", "10 %"],
        ENGLISH["stage.upload"]: ["100 ms", "10 %"],
    }
    assert "asr-bar" in html
    assert ENGLISH["details.summed"] not in html


@pytest.mark.parametrize("total_s", [27.5, 300.0])  # also where the wait hides that the sum is too large
def test_pieces_that_ran_side_by_side_have_no_share(total_s: float) -> None:
    html = stages_html(MANY_PIECES, total_s, 25.0, Strings())
    shown = rows(html)
    assert shown[ENGLISH["stage.queue"]] == ["135.00 s"]
    assert shown[ENGLISH["stage.upload"]] == [f"{total_s - 25.5:.2f} s"]
    assert ENGLISH["details.summed"] in html
    assert ENGLISH["details.share"] not in html
    assert "asr-bar" not in html
    assert "%" not in html


def test_without_the_processing_time_the_wait_alone_tells_it() -> None:
    assert ENGLISH["details.summed"] in stages_html(MANY_PIECES, 25.0, 0.0, Strings())
    assert ENGLISH["stage.upload"] in rows(stages_html(ONE_PIECE, 1.0, 0.0, Strings()))


def test_rounding_is_no_overlap() -> None:
    html = stages_html({"decode": 0.100001, "inference": 0.4}, 0.5, 0.5, Strings())
    assert "asr-bar" in html


def test_units_are_those_of_the_pages_language() -> None:
    shown = rows(stages_html({"decode": 0.004, "inference": 1.5}, 1.504, 1.504, Strings("ru")))
    assert [cells[0] for cells in shown.values()] == ["4,0 мс", "1,50 с"]
