"""The page through Streamlit's AppTest, the service through MockTransport."""

from __future__ import annotations

import asyncio
import io
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import timedelta, timezone
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from streamlit.testing.v1 import AppTest

from tests.ui.service import TRANSCRIPT, envelope, sse
from ui.background import Background
from ui.client import Options
from ui.problems import explain_state
from ui.session import Session
from ui.settings import UiSettings
from ui.strings import NAMES, TABLES, Strings
from ui.views.format import plain
from ui.views.overview import _recent
from ui.work import State, Task, Work

ENGLISH = TABLES["en"]
DONE = sse(
    {"type": "transcript.text.delta", "delta": "the quick", "end": 0.8},
    {
        "type": "transcript.text.done",
        **TRANSCRIPT,
        "timings": {"decode": 0.01, "inference": 0.05, "new": 0.001},
    },
)
METRICS = "asr_queue_audio_seconds 12\nasr_queue_limit_audio_seconds 900\nasr_worker_busy_ratio 0.5\n"
Answer = httpx.Response | Exception


class Service:
    """Answers of the service, to be changed during a test."""

    def __init__(self) -> None:
        self.health: Answer = httpx.Response(200, json={"status": "ready"})
        self.transcribe: Answer = httpx.Response(200, content=DONE, headers={"x-request-id": "req-9"})
        self.metrics: Answer = httpx.Response(200, text=METRICS)
        self.models: list[dict[str, Any]] = [
            {
                "name": "en-small",
                "languages": ["en"],
                "default": True,
                "parameters": 1_600_000,
                "graph": "int8",
            },
            {"name": "vi-tiny", "languages": ["vi", "en"], "default": False},
        ]
        self.key = ""
        self.max_upload_bytes = 26_214_400
        self.sent: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        answers: dict[str, Answer] = {
            "/health": self.health,
            "/models": httpx.Response(200, json={"models": self.models}),
            "/languages": httpx.Response(200, json={"languages": [{"code": "en", "models": ["en-small"]}]}),
            "/": httpx.Response(200, json={"limits": {"max_upload_bytes": self.max_upload_bytes}}),
            "/metrics": self.metrics,
            "/transcribe": self.transcribe,
        }
        if self.key and request.url.path != "/health":
            return envelope(401, "invalid_api_key")
        if request.method == "POST":
            self.sent.append(request)
        answer = answers[request.url.path]
        if isinstance(answer, Exception):
            raise answer
        return answer


def script(settings, background):  # its source is run by itself: no names from here, not even in hints
    from ui.page import render

    render(settings, background)


Opened = Callable[..., AppTest]


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def opened(service: Service) -> Iterator[Opened]:
    """Opens the page; ``query`` becomes the address's query."""
    settings = UiSettings(
        api_url="http://service.test",
        jaeger_url="http://jaeger.test",
        grafana_url="http://grafana.test/d/asr",
    )
    background = Background(settings, httpx.MockTransport(service))

    def open_page(**query: str) -> AppTest:
        page = AppTest.from_function(
            script, kwargs={"settings": settings, "background": background}, default_timeout=30
        )
        for name, value in query.items():
            page.query_params[name] = value
        return page.run()

    yield open_page
    background.close()


def button(page: AppTest, label: str) -> Any:
    return next(item for item in page.button if item.label == label)


def texts(page: AppTest) -> str:
    parts = [
        *page.markdown,
        *page.caption,
        *page.error,
        *page.warning,
        *page.info,
        *page.subheader,
        *page.title,
    ]
    return "\n".join(str(part.value) for part in parts)


def settle(page: AppTest) -> AppTest:
    """Run until nothing is in progress."""
    work = page.session_state["asr_session"].work
    work.wait()
    page.run()
    assert not list(work.running)
    assert not page.exception
    return page


def sample(page: AppTest) -> AppTest:
    button(page, ENGLISH["input.sample"]).click().run()
    return settle(page)


def only_task(page: AppTest) -> Any:
    (task,) = page.session_state["asr_session"].work.tasks
    return task


def test_first_sight(opened: Opened) -> None:
    page = opened()
    assert not page.exception
    assert page.title[0].value == ENGLISH["page.title"]
    assert not page.error
    assert not page.warning
    assert [box.label for box in page.selectbox] == [
        ENGLISH["page.language"],
        ENGLISH["options.model"],
        ENGLISH["options.language"],
    ]


def test_models_and_languages_are_those_the_service_serves(opened: Opened) -> None:
    page = opened()
    model, language = page.selectbox[1], page.selectbox[2]
    assert model.options == ["en-small", "vi-tiny"]
    assert language.options == [ENGLISH["options.any"], "English"]
    model.select("vi-tiny").run()
    assert page.selectbox[2].options == [ENGLISH["options.any"], "Tiếng Việt", "English"]


def test_the_sample_becomes_a_transcript(opened: Opened, service: Service) -> None:
    page = sample(opened())
    assert only_task(page).state is State.DONE
    assert ENGLISH["result.title"].format(name=plain("sample.flac")) in texts(page)
    assert page.text_area[0].value == "the quick brown fox"
    assert {code.value for code in page.code} >= {"req-9"}
    body = service.sent[0].content
    assert b'name="stream"' in body
    assert b"en-small" in body


@pytest.mark.parametrize(
    ("limit_bytes", "said"), [(26_214_400, "13:39"), (16_000_044, "8:20"), (64_044, "2.0 s")]
)
def test_the_longest_recording_is_told_beforehand(
    opened: Opened, service: Service, limit_bytes: int, said: str
) -> None:
    service.max_upload_bytes = limit_bytes
    assert ENGLISH["input.record_limit"].format(duration=said) in texts(opened())


def test_options_are_sent(opened: Opened, service: Service) -> None:
    page = opened()
    page.selectbox[1].select("vi-tiny").run()
    page.selectbox[2].set_value("vi").run()
    page.text_input[0].set_value("fox,  big  hound ; fox").run()
    sample(page)
    body = service.sent[0].content.decode("latin-1")
    assert body.count('name="hotwords[]"') == 2
    for part in ("vi-tiny", '"language"\r\n\r\nvi', "big hound"):
        assert part in body


def test_words_to_listen_for_are_not_offered_where_a_decoder_writes(opened: Opened, service: Service) -> None:
    service.models[1]["decoder"] = True
    page = opened()
    page.text_input[0].set_value("fox").run()
    page.selectbox[1].select("vi-tiny").run()
    assert page.text_input[0].disabled
    assert page.text_input[0].help == ENGLISH["options.hotwords_decoder"]
    sample(page)
    assert b"hotwords" not in service.sent[0].content


def test_other_options_offer_to_transcribe_again(opened: Opened, service: Service) -> None:
    page = sample(opened())
    assert ENGLISH["options.again"] not in [item.label for item in page.button]
    page.selectbox[1].select("vi-tiny").run()
    button(page, ENGLISH["options.again"]).click().run()
    settle(page)
    assert b"vi-tiny" in service.sent[1].content
    assert ENGLISH["options.again"] not in [item.label for item in page.button], "it was sent with these"
    first, second = page.session_state["asr_session"].work.tasks
    assert (first.state, second.state) == (State.DONE, State.DONE)


def test_a_text_and_its_correction_outlive_a_new_attempt_that_fails(opened: Opened, service: Service) -> None:
    page = sample(opened())
    page.text_area[0].set_value("the quick brown dog").run()
    page.selectbox[1].select("vi-tiny").run()
    service.transcribe = envelope(500, "internal_error")
    button(page, ENGLISH["options.again"]).click().run()
    settle(page)
    first, second = page.session_state["asr_session"].work.tasks
    assert (first.state, second.state) == (State.DONE, State.FAILED)
    assert page.text_area[0].value == "the quick brown dog"
    page.selectbox(key="choose").set_value(second.id).run()
    assert ENGLISH["problem.server"] in page.error[0].value


def test_a_file_that_is_dropped_is_sent_at_once(opened: Opened, service: Service) -> None:
    page = opened()
    page.file_uploader[0].set_value(
        [("a.wav", b"RIFF....", "audio/wav"), ("b.wav", b"RIFF,,,,", "audio/wav")]
    )
    settle(page.run())
    tasks = page.session_state["asr_session"].work.tasks
    assert [task.name for task in tasks] == ["a.wav", "b.wav"]
    assert len(service.sent) == 2
    choice = next(box for box in page.selectbox if box.label == ENGLISH["result.choose"])
    assert len(choice.options) == 2


def test_a_name_is_shown_letter_by_letter(opened: Opened, service: Service) -> None:
    name = "*5* [$] a_b_ :smile: $x$ &amp; <b>.wav"
    page = opened()
    page.file_uploader[0].upload(name, b"RIFF....", "audio/wav")
    settle(page.run())
    assert page.subheader[0].value == ENGLISH["result.title"].format(name=plain(name))
    service.transcribe = envelope(400, "undecodable_audio", "Not *sound*.")
    page.file_uploader[0].upload(name, b"RIFF,,,,", "audio/wav")
    settle(page.run())
    assert plain(name) in page.warning[0].value
    button(page, ENGLISH["result.show"].format(name=plain(name), state=ENGLISH["state.failed"])).click().run()
    assert plain(name) in page.error[0].value
    assert plain("Not *sound*.") in page.error[0].value


def test_the_overview_tells_the_time_of_the_browser() -> None:
    task = Task("a.wav", None, Options(), created_at=1_767_225_600.0)  # 2026-01-01T00:00:00Z
    shown = _recent([task], Strings("en"), timezone(timedelta(hours=5, minutes=30)))
    assert "<td>05:30:00</td>" in shown


def test_a_correction_goes_into_the_downloads_and_can_be_undone(opened: Opened) -> None:
    page = sample(opened())
    session = page.session_state["asr_session"]
    page.text_area[0].set_value("the quick brown dog").run()
    assert ENGLISH["result.changed"] in texts(page)
    assert list(session.edits.values()) == ["the quick brown dog"]
    button(page, ENGLISH["result.undo"]).click().run()
    assert page.text_area[0].value == "the quick brown fox"
    assert ENGLISH["result.changed"] not in texts(page)


def test_word_error_rate_against_a_pasted_text(opened: Opened) -> None:
    page = sample(opened())
    box = next(area for area in page.text_area if area.label == ENGLISH["compare.reference"])
    box.set_value("The quick red fox jumps.").run()
    rate = next(metric for metric in page.metric if metric.label == ENGLISH["compare.wer"])
    assert rate.value == "40.0 %"
    assert ENGLISH["compare.errors"].format(changed=1, missing=1, extra=0, words=5) in texts(page)


def test_history_survives_reruns_and_can_be_removed(opened: Opened) -> None:
    page = sample(sample(opened()))
    work = page.session_state["asr_session"].work
    assert len(work.tasks) == 2
    page.run()
    assert len(page.session_state["asr_session"].work.tasks) == 2
    assert ENGLISH["result.clear"] not in [item.label for item in page.button], "one click does not do it"
    button(page, ENGLISH["result.clear_yes"].format(count=2)).click().run()
    assert work.tasks == []
    assert not page.subheader


def test_files_of_one_name_can_be_told_apart(opened: Opened) -> None:
    page = sample(sample(opened()))
    box = page.selectbox(key="choose")
    assert box.options == ["done – sample.flac (2)", "done – sample.flac"]
    first, second = page.session_state["asr_session"].work.tasks
    assert box.value == first.id
    assert box.set_value(second.id).run().selectbox(key="choose").value == second.id


def test_long_names_are_told_apart_by_their_ends(opened: Opened) -> None:
    page, beginning = opened(), "interview with the head of the department, "
    names = [f"{beginning}part {part}, 2026-01-0{part}.wav" for part in (1, 2)]
    page.file_uploader[0].set_value([(name, b"RIFF" + name.encode(), "audio/wav") for name in names])
    settle(page.run())
    assert page.selectbox(key="choose").options == [
        "done – interview with the …rt 2, 2026-01-02.wav",
        "done – interview with the …rt 1, 2026-01-01.wav",
    ]


def test_files_that_failed_are_counted_and_named(opened: Opened, service: Service) -> None:
    page = sample(sample(opened()))
    assert not page.warning
    service.transcribe = envelope(400, "undecodable_audio")
    page.file_uploader[0].set_value([(f"{name}.wav", b"RIFF", "audio/wav") for name in "abcd"])
    settle(page.run())
    assert page.warning[0].value == ENGLISH["result.failed"].format(
        failed=4, total=6, names=plain("a.wav, b.wav, c.wav …")
    )
    assert ENGLISH["result.download_zip"].format(count=2) in [
        item.label for item in page.get("download_button")
    ]


def slow(service: Service) -> threading.Event:
    """The next answer comes when the event is set."""
    go = threading.Event()

    async def slowly() -> AsyncIterator[bytes]:
        await asyncio.to_thread(go.wait, 30)
        yield DONE

    service.transcribe = httpx.Response(200, content=slowly())
    return go


def test_a_text_on_the_screen_stays_when_another_file_is_done(opened: Opened, service: Service) -> None:
    page = sample(opened())
    go = slow(service)
    button(page, ENGLISH["input.sample"]).click().run()
    first, second = page.session_state["asr_session"].work.tasks
    show = ENGLISH["result.show"].format(name=plain("sample.flac"), state=ENGLISH["state.done"])
    assert page.text_area[0].key.startswith(f"edit.{first.id}")
    assert show not in [item.label for item in page.button]
    go.set()
    settle(page)
    assert page.selectbox(key="choose").value == first.id
    assert page.text_area[0].key.startswith(f"edit.{first.id}")
    button(page, show).click().run()
    assert page.selectbox(key="choose").value == second.id
    assert page.text_area[0].key.startswith(f"edit.{second.id}")
    assert show not in [item.label for item in page.button]


def test_a_failure_on_the_screen_makes_way_for_the_file_that_is_done(
    opened: Opened, service: Service
) -> None:
    service.transcribe = envelope(500, "internal_error")
    page = sample(opened())
    go = slow(service)
    button(page, ENGLISH["input.sample"]).click().run()
    assert page.error
    go.set()
    settle(page)
    second = page.session_state["asr_session"].work.tasks[1]
    assert page.selectbox(key="choose").value == second.id


def test_another_session_sees_nothing_of_it(opened: Opened) -> None:
    sample(opened())
    assert opened().session_state["asr_session"].work.tasks == []


@pytest.mark.parametrize(
    ("answer", "key"),
    [
        (httpx.ConnectError("refused"), "problem.down"),
        (httpx.Response(200, text="<html>"), "problem.protocol"),
        (envelope(401, "invalid_api_key"), "problem.access"),
    ],
)
def test_a_service_that_cannot_be_used_is_said(
    opened: Opened, service: Service, answer: Answer, key: str
) -> None:
    service.health = answer
    page = opened()
    assert not page.exception
    assert ENGLISH[key] in page.error[0].value
    assert button(page, ENGLISH["input.sample"]).disabled


def test_a_service_that_hangs_does_not_hold_up_the_page() -> None:
    silent, answer = False, asyncio.Event()

    async def handler(request: httpx.Request) -> httpx.Response:
        if silent:
            await answer.wait()
            raise httpx.ReadTimeout("silent")
        return Service()(request)

    async def give_up() -> None:
        answer.set()

    settings = UiSettings(api_url="http://service.test")
    background = Background(settings, httpx.MockTransport(handler))
    session = Session(settings, background, Work(background, 1))
    assert session.look_at_service().usable
    silent = True
    assert session.look_at_service(max_age_s=0).usable, "as it was seen last"
    background.call(give_up())
    while (seen := session.look_at_service(max_age_s=0)).usable:  # pytest-timeout ends what never ends
        pass
    problem = explain_state(seen.state, seen.problem, Strings())
    assert (problem.title, problem.advice) == (ENGLISH["problem.late"], ENGLISH["problem.hung_do"])
    background.close()


@pytest.mark.parametrize("state", ["starting", "draining"])
def test_a_service_that_is_not_ready_is_a_warning_and_goes_away(
    opened: Opened, service: Service, state: str
) -> None:
    service.health = httpx.Response(503, json={"status": state})
    page = opened()
    assert ENGLISH[f"problem.{state}"] in page.warning[0].value
    service.health = httpx.Response(200, json={"status": "ready"})
    page.session_state["asr_session"].looked_at = 0.0  # a moment later
    page.run()
    assert not page.warning
    assert not button(page, ENGLISH["input.sample"]).disabled


@pytest.mark.parametrize(
    ("answer", "key", "can_retry"),
    [
        (envelope(429, "queue_full", **{"retry-after": "90"}), "problem.busy", True),
        (envelope(413, "upload_too_large"), "problem.too_large", False),
        (envelope(422, "audio_too_long"), "problem.too_long", False),
        (envelope(400, "undecodable_audio"), "problem.undecodable", False),
        (envelope(400, "no_audio_stream"), "problem.undecodable", False),
        (envelope(400, "no_audio_samples"), "problem.undecodable", False),
        (envelope(400, "not_finite_samples"), "problem.undecodable", False),
        (envelope(503, "out_of_resources", **{"retry-after": "90"}), "problem.busy", True),
        (envelope(503, "too_many_connections", **{"retry-after": "90"}), "problem.busy", True),
        (envelope(404, "model_not_found"), "problem.model", True),
        (envelope(500, "internal_error"), "problem.server", True),
        (httpx.ReadTimeout("slow"), "problem.late", True),
        (httpx.ConnectError("refused"), "problem.down", True),
        (envelope(503, "not_ready", **{"retry-after": "90"}), "problem.starting", True),
        (envelope(503, "draining", **{"retry-after": "90"}), "problem.draining", True),
    ],
)
def test_each_failure_of_a_file_is_said(
    opened: Opened, service: Service, answer: Answer, key: str, can_retry: bool
) -> None:
    service.transcribe = answer
    page = sample(opened())
    assert ENGLISH[key] in page.error[0].value
    assert (ENGLISH["problem.retry"] in [item.label for item in page.button]) is can_retry
    if key == "problem.busy":
        assert "90" in page.error[0].value
    if key in ("problem.down", "problem.starting", "problem.draining"):
        assert ENGLISH["problem.back_do"] in page.error[0].value
        assert "by itself" not in page.error[0].value, "no file is sent again by itself"


def test_a_service_that_dies_leaves_the_text_it_has_given(opened: Opened, service: Service) -> None:
    async def dying() -> AsyncIterator[bytes]:
        yield sse({"type": "transcript.text.delta", "delta": "the quick ", "end": 0.8})[
            : -len("data: [DONE]\n\n")
        ]
        raise httpx.ReadError("gone")

    service.transcribe = httpx.Response(200, content=dying())
    page = sample(opened())
    assert only_task(page).state is State.FAILED
    assert ENGLISH["result.heard"] in texts(page)
    assert [code.value for code in page.code] == ["the quick"]
    assert [item.label for item in page.get("download_button")] == ["TXT"]
    button(page, ENGLISH["problem.retry"])


def test_trying_again_after_a_failure(opened: Opened, service: Service) -> None:
    good, service.transcribe = service.transcribe, envelope(500, "internal_error")
    page = sample(opened())
    service.transcribe = good
    button(page, ENGLISH["problem.retry"]).click().run()
    settle(page)
    assert only_task(page).state is State.DONE
    assert not page.error


def test_silence_is_said(opened: Opened, service: Service) -> None:
    silent = {**TRANSCRIPT, "text": "", "words": [], "segments": [], "confidence": None}
    service.transcribe = httpx.Response(200, content=sse({"type": "transcript.text.done", **silent}))
    page = sample(opened())
    assert ENGLISH["result.silence"] in page.info[0].value
    assert not page.text_area


def test_a_warning_about_a_word_does_not_speak_of_the_file(opened: Opened, service: Service) -> None:
    warning = "The model cannot spell the hotword 'naïve'."
    event = {"type": "transcript.text.done", **TRANSCRIPT, "warnings": [warning]}
    service.transcribe = httpx.Response(200, content=sse(event))
    page = sample(opened())
    assert page.warning[0].value == ENGLISH["problem.said"].format(message=plain(warning))


def test_an_empty_file_is_said(opened: Opened, service: Service) -> None:
    service.transcribe = envelope(400, "undecodable_audio")
    page = opened()
    page.file_uploader[0].upload("empty.wav", b"", "audio/wav")
    settle(page.run())
    assert ENGLISH["problem.empty"] in page.error[0].value


@pytest.mark.parametrize("language", sorted(NAMES))
def test_every_language_draws_the_whole_page(opened: Opened, language: str) -> None:
    page = opened(lang=language)
    assert page.title[0].value == TABLES[language]["page.title"]
    assert page.selectbox(key="page_language").label == TABLES[language]["page.language"]
    button(page, TABLES[language]["input.sample"]).click().run()
    settle(page)
    assert TABLES[language]["result.title"].format(name=plain("sample.flac")) in texts(page)
    decimals = [str(metric.value) for metric in page.metric] + [texts(page)]
    assert any("0.040" in text for text in decimals) is (language == "en"), "the real-time factor"
    assert any("0,040" in text for text in decimals) is (language != "en")
    assert re.search(r"\d\.\d", "".join(decimals)) is None or language == "en"


def test_another_language_is_spoken_at_once_by_the_box_that_chose_it_too(opened: Opened) -> None:
    page = opened(lang="vi")
    box = page.selectbox(key="page_language").set_value("tr").run().selectbox(key="page_language")
    assert (box.value, box.label) == ("tr", TABLES["tr"]["page.language"])
    assert page.title[0].value == TABLES["tr"]["page.title"]


def test_a_spoken_language_that_was_chosen_is_kept_when_the_page_speaks_another(opened: Opened) -> None:
    page = opened()
    page.selectbox[2].set_value("en").run()
    for language in ("ru", "en"):
        page.selectbox(key="page_language").set_value(language).run()
        assert page.selectbox[2].label == TABLES[language]["options.language"]
        assert page.selectbox[2].value == "en"
    page.selectbox[1].select("vi-tiny").run()
    assert page.selectbox[2].value is None, "it was chosen for the other model"


def test_the_overview_shows_models_load_and_what_was_sent(opened: Opened) -> None:
    page = sample(opened())
    page.session_state["tabs.en"] = ENGLISH["tab.overview"]
    page.run()
    assert not page.exception
    shown = {metric.label: metric.value for metric in page.metric}
    assert shown[ENGLISH["overview.queue"]] == "12 / 900 s"
    assert shown[ENGLISH["overview.busy"]] == "50 %"
    assert shown[ENGLISH["overview.state"]] == "ready"


def test_the_overview_says_failures_in_the_words_of_the_page(opened: Opened, service: Service) -> None:
    service.transcribe = envelope(422, "audio_too_long")
    page = opened(lang="vi")
    strings = TABLES["vi"]
    button(page, strings["input.sample"]).click().run()
    settle(page)
    page.session_state["tabs.vi"] = strings["tab.overview"]
    page.run()
    table = next(item.proto.body for item in page.get("html") if "sample.flac" in item.proto.body)
    assert f"{strings['state.failed']}: {strings['problem.too_long']}" in table


@pytest.mark.parametrize(
    ("health", "metrics", "state"),
    [
        (httpx.Response(200, json={"status": "ready"}), envelope(404, "not_found"), "overview.ready"),
        (httpx.Response(503, json={"status": "draining"}), httpx.ReadTimeout("slow"), "overview.draining"),
        (httpx.ConnectError("refused"), httpx.ConnectError("refused"), "overview.down"),
        (httpx.ReadTimeout("slow"), httpx.ReadTimeout("slow"), "overview.late"),
    ],
)
def test_the_overview_tells_the_state_without_the_metrics(
    opened: Opened, service: Service, health: Answer, metrics: Answer, state: str
) -> None:
    """The gateway of the Compose stack keeps ``/metrics`` to itself, and a setting turns it off."""
    service.health, service.metrics = health, metrics
    page = opened()
    page.session_state["tabs.en"] = ENGLISH["tab.overview"]
    page.run()
    shown = {metric.label: metric.value for metric in page.metric}
    assert shown[ENGLISH["overview.state"]] == ENGLISH[state]
    for key in ("queue", "inflight", "busy", "requests", "rejections", "speed"):
        assert shown[ENGLISH[f"overview.{key}"]] == "–"


def test_the_overview_says_that_the_key_is_wrong_though_health_needs_none(
    opened: Opened, service: Service
) -> None:
    service.key = "sesame"
    page = opened()
    assert ENGLISH["problem.access"] in page.error[0].value
    page.session_state["tabs.en"] = ENGLISH["tab.overview"]
    page.run()
    shown = {metric.label: metric.value for metric in page.metric}
    assert shown[ENGLISH["overview.state"]] == ENGLISH["overview.access"]


def test_word_error_rates_say_how_they_were_decoded(opened: Opened, service: Service) -> None:
    service.models[0]["evaluation"] = [
        {"test_set": "an4", "wer": 0.1953, "decoding": "greedy, int8"},
        {"test_set": "an4", "wer": 0.1113, "decoding": "beam 32 with language model, int8"},
        {"test_set": "ocean", "wer": 0.6938, "decoding": "greedy, int8"},
        {"test_set": "ocean", "wer": 0.4807, "decoding": "beam 32 with language model, int8"},
    ]
    service.models[1]["evaluation"] = [{"test_set": "vivos", "wer": 0.25}]
    page = opened()
    page.session_state["tabs.en"] = ENGLISH["tab.overview"]
    page.run()
    table = next(item.proto.body for item in page.get("html") if "en-small" in item.proto.body)
    assert "greedy, int8: an4\xa019.5\xa0%, ocean\xa069.4\xa0%\nbeam 32" in table
    assert "beam 32 with language model, int8: an4\xa011.1\xa0%, ocean\xa048.1\xa0%<" in table
    assert ">vivos\xa025.0\xa0%<" in table


def test_pictures_need_no_runtime(opened: Opened) -> None:
    out = io.BytesIO()
    soundfile.write(out, np.zeros(8000, np.float32), 16_000, format="WAV")
    page = opened()
    page.file_uploader[0].upload("quiet.wav", out.getvalue(), "audio/wav")
    settle(page.run())
    assert only_task(page).picture is not None
