"""An incident from beginning to end, on loopback: overload, alerts, notifications, recovery, timeline.

    make demo-incident            about eight minutes; MODEL=name and ASR_MODELS_DIR choose another model

The service, Prometheus with the project's own rules and alerts, and Alertmanager with the project's own
routes are real processes. Somebody uploads long recordings without pause while others send short clips: the
queue fills up, clips are refused, AsrRejectingRequests fires and reaches the receiver that its severity is
routed to (AsrAvailabilityBurnFast pages soon after). Then the uploads stop, and every alert must resolve;
that takes as long as the rules look back, five minutes. Changed for the demonstration: the scrape interval
(5 s), Alertmanager's waits between notifications, the receivers (webhooks of this program), and a small
queue. The last line is JSON; the exit status is 0 when the alert fired, was notified and resolved.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import numpy as np
import yaml

from loadtest.clips import speech, wav_clip
from loadtest.command import DEFAULT_MODEL
from loadtest.local_stack import MONITORING, LocalStack, MissingProgramError, PrometheusApi
from loadtest.processes import NotReadyError

ALERT = "AsrRejectingRequests"
QUEUE_LIMIT_AUDIO_S = 240
ARCHIVE_S = 600.0
CLIP_S = 4.0
ARCHIVISTS = 6
FIRING_TIMEOUT_S = 300.0
RESOLVED_TIMEOUT_S = 420.0


PLAN = f"""\
service {{api}}, Prometheus {{prometheus}}, Alertmanager {{alertmanager}}: open them meanwhile

Two callers send clips of {CLIP_S:.0f} s. {ARCHIVISTS} more upload recordings of {ARCHIVE_S / 60:.0f} minutes
without pause: the queue ({QUEUE_LIMIT_AUDIO_S} s of audio) fills up, and who comes then is refused.
An alert is pending for two minutes, then fires. `page` wakes somebody, `ticket` waits for
the morning. When both have been told the uploads stop, and every alert must end.
"""


class Timeline:
    """Events with the seconds since the start, printed as they come."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self._lock = threading.Lock()
        self.seen: dict[str, float] = {}

    def once(self, event: str, *details: str) -> None:
        """Print `event` if it is new, with `details` below it."""
        with self._lock:
            if event not in self.seen:
                self.seen[event] = round(time.monotonic() - self._start_s, 1)
                print(f"  {self.seen[event]:7.1f} s  {event}", *details, sep="\n             ", flush=True)


def says(alert: dict[str, Any]) -> tuple[str, str]:
    """What a notification tells the person on duty: what is wrong, and where to read on."""
    notes = alert["annotations"]
    return notes["summary"], f"runbook: {notes['runbook_url']}"


class Webhooks:
    """Alertmanager's receivers: POST /<receiver>."""

    def __init__(self, timeline: Timeline) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                for alert in body["alerts"]:
                    event = f"{alert['labels']['alertname']} {alert['status']}"
                    details = says(alert) if alert["status"] == "firing" else ()
                    timeline.once(f"notification to `{self.path[1:]}`: {event}", *details)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()


def alertmanager_config(webhooks_url: str) -> dict[str, Any]:
    """The project's routes and inhibitions, with webhooks for receivers and short waits."""
    path = MONITORING / "alertmanager" / "alertmanager.yml"
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    for route in (config["route"], *config["route"]["routes"]):
        route.update(group_wait="1s", group_interval="5s")
    config["receivers"] = [
        {"name": receiver["name"], "webhook_configs": [{"url": f"{webhooks_url}/{receiver['name']}"}]}
        for receiver in config["receivers"]
    ]
    return config


class Load:
    """Threads that send one recording over and over; `answers` counts statuses."""

    def __init__(self, url: str, content: bytes, clients: int, pause_s: float) -> None:
        self.answers: Counter[int] = Counter()
        self._stop = threading.Event()
        self._url, self._content, self._pause_s = url, content, pause_s
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        with httpx.Client(base_url=self._url, timeout=300.0) as client:
            while not self._stop.is_set():
                try:
                    status = client.post("/transcribe", files={"file": self._content}).status_code
                except httpx.HTTPError:
                    status = 0
                self.answers[status] += 1
                self._stop.wait(self._pause_s)

    def stop(self) -> None:
        """Let every thread finish the request it is in."""
        self._stop.set()
        for thread in self._threads:
            thread.join()


class Watch:
    """Looks at Prometheus and Alertmanager and writes what it sees into the timeline."""

    def __init__(self, timeline: Timeline, prometheus: PrometheusApi, alertmanager_url: str) -> None:
        self._timeline = timeline
        self._prometheus = prometheus
        self._alertmanager = httpx.Client(base_url=alertmanager_url, timeout=10.0)
        self.states: dict[str, str] = {}
        self.active: set[str] = set()

    def look(self) -> None:
        """Once."""
        fill = self._prometheus.value("max(instance:asr_queue_audio_seconds:ratio)") or 0.0
        if fill >= 0.8:
            self._timeline.once("the queue is at 80 % of its limit")
        if (self._prometheus.value('sum(asr_rejections_total{reason="queue_full"})') or 0) > 0:
            self._timeline.once("first request refused: 429 queue_full")
        states = {
            alert["labels"]["alertname"]: alert["state"] for alert in self._prometheus.get("alerts")["alerts"]
        }
        for name, state in states.items():
            self._timeline.once(f"Prometheus: {name} {state}")
        for name in set(self.states) - set(states):
            self._timeline.once(f"Prometheus: {name} inactive")
        self.states = states
        self.active = {
            alert["labels"]["alertname"]
            for alert in self._alertmanager.get("/api/v2/alerts").json()
            if alert["status"]["state"] == "active"
        }
        for name in self.active:
            self._timeline.once(f"Alertmanager: {name} active")

    def until(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Look every second until `done`, or `timeout_s` have passed."""
        until_s = time.monotonic() + timeout_s
        while time.monotonic() < until_s:
            self.look()
            if done():
                return True
            time.sleep(1.0)
        return False

    def close(self) -> None:
        """Close the connections."""
        self._alertmanager.close()


def wait_for_scrape(prometheus: PrometheusApi, timeout_s: float = 60.0) -> None:
    """Until Prometheus has seen the service: before that it takes it for down, which is no part of this."""
    until_s = time.monotonic() + timeout_s
    while not prometheus.query('up{job="asr-api"} == 1') or prometheus.get("alerts")["alerts"]:
        if time.monotonic() > until_s:
            raise NotReadyError("Prometheus does not reach the service")
        time.sleep(0.5)


def service_settings(model: str) -> dict[str, str]:
    """One worker and a queue of four minutes of audio."""
    return {
        "ASR_MODELS_DIR": os.environ.get("ASR_MODELS_DIR", "models"),
        "ASR_MODELS": model,
        "ASR_WORKERS": "1",
        "ASR_CALIBRATE": "false",
        "ASR_QUEUE_LIMIT_AUDIO_S": str(QUEUE_LIMIT_AUDIO_S),
    }


def run(model: str) -> dict[str, Any]:
    """The whole incident; returns what the JSON line says. Raises MissingProgramError, NotReadyError."""
    samples, source = speech(60.0)
    seconds = len(samples) / 16_000
    archive = wav_clip("archive", np.tile(samples, round(ARCHIVE_S / seconds)))
    clip = wav_clip("clip", samples[: round(CLIP_S * 16_000)])
    print(f"speech: {source}, {seconds:.0f} s; starting the service, Prometheus and Alertmanager", flush=True)
    with LocalStack() as stack:
        api = stack.api(service_settings(model))
        timeline = Timeline()
        webhooks = Webhooks(timeline)
        alertmanager = stack.alertmanager(alertmanager_config(webhooks.url))
        monitor = stack.prometheus({"asr-api": [api.address]}, interval_s=5.0, alertmanager=alertmanager)
        prometheus = PrometheusApi(monitor.url)
        wait_for_scrape(prometheus)
        print(PLAN.format(api=api.url, prometheus=monitor.url, alertmanager=alertmanager.url), flush=True)
        watch = Watch(timeline, prometheus, alertmanager.url)
        users = Load(api.url, clip.content, clients=2, pause_s=0.5)
        watch.until(lambda: users.answers[200] >= 5, 60.0)
        timeline.once("calm: clips are answered")
        archivists = Load(api.url, archive.content, clients=ARCHIVISTS, pause_s=0.0)
        timeline.once(f"{ARCHIVISTS} clients begin to upload long recordings without pause")
        fired = watch.until(
            lambda: ALERT in watch.active and f"notification to `ticket`: {ALERT} firing" in timeline.seen,
            FIRING_TIMEOUT_S,
        )
        watch.until(lambda: "AsrAvailabilityBurnFast" in watch.active, 30.0)
        timeline.once("the uploads are stopped")
        archivists.stop()
        timeline.once("the last long recording is done")
        refused, answered = users.answers[429], users.answers[200]
        served_again = watch.until(lambda: users.answers[200] >= answered + 5, 60.0)
        timeline.once("calm again: clips are answered", "the alerts look back five minutes, and end then")
        resolved = watch.until(
            lambda: (
                "firing" not in watch.states.values()
                and f"notification to `ticket`: {ALERT} resolved" in timeline.seen
            ),
            RESOLVED_TIMEOUT_S,
        )
        users.stop()
        webhooks.close()
        watch.close()
        prometheus.close()
    return {
        "alert": ALERT,
        "fired": fired,
        "resolved": resolved,
        "served_again": served_again,
        "clips_refused": refused,
        "timeline_s": timeline.seen,
    }


def main() -> int:
    """Run it; 0 when all went as it should, 1 when not, 2 where a program is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="bundle under ASR_MODELS_DIR")
    try:
        outcome = run(parser.parse_args().model)
    except MissingProgramError as missing:
        print(f"demo-incident: {missing}", file=sys.stderr)
        return 2
    print(json.dumps(outcome))
    return 0 if outcome["fired"] and outcome["resolved"] and outcome["served_again"] else 1


if __name__ == "__main__":
    sys.exit(main())
