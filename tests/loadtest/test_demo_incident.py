"""What the demonstration prints when Alertmanager notifies, without the eight minutes."""

from __future__ import annotations

import httpx
import pytest

from loadtest.demo_incident import Timeline, Webhooks


def test_a_notification_says_what_is_wrong_and_where_to_read_on(capsys: pytest.CaptureFixture[str]) -> None:
    timeline = Timeline()
    webhooks = Webhooks(timeline)
    notes = {"summary": "The queue is 97 % full", "runbook_url": "docs/runbooks/AsrQueueNearLimit.md"}
    alert = {"labels": {"alertname": "AsrQueueNearLimit"}, "annotations": notes}
    try:
        for status in ("firing", "firing", "resolved"):
            httpx.post(
                f"{webhooks.url}/ticket", json={"alerts": [{**alert, "status": status}]}
            ).raise_for_status()
    finally:
        webhooks.close()
    printed = capsys.readouterr().out
    assert printed.count("notification to `ticket`: AsrQueueNearLimit firing\n") == 1
    assert printed.count(notes["summary"]) == printed.count(f"runbook: {notes['runbook_url']}\n") == 1
    assert set(timeline.seen) == {
        "notification to `ticket`: AsrQueueNearLimit firing",
        "notification to `ticket`: AsrQueueNearLimit resolved",
    }
