"""What people do: drop files, listen, correct, take away, look things up."""

from __future__ import annotations

import io
import json
import re
import zipfile

from playwright.sync_api import expect

from tests.browser.page_server import (
    ENGLISH,
    Visit,
    choose,
    download,
    drop,
    expand,
    heard,
    words,
)
from tests.tiny_bundle import recite, sing, wav
from ui.strings import NAMES, TABLES

TEXT = "head bad cafe"


def test_dropping_a_file_is_all_it_takes(desk: Visit) -> None:
    drop(desk.page, ("song.wav", wav(sing(TEXT))))
    assert heard(desk.page) == TEXT
    expect(
        desk.page.get_by_role("heading", name=ENGLISH["result.title"].format(name="song.wav"))
    ).to_be_visible()
    desk.shot("result")


def test_a_click_on_a_word_plays_that_word_and_no_more(desk: Visit) -> None:
    drop(desk.page, ("song.wav", wav(sing(TEXT))))
    heard(desk.page)
    words(desk.page).nth(1).click()
    player = desk.page.locator(".player")
    start_s, end_s = (float(part) for part in str(player.get_attribute("data-part")).split("-"))
    assert 0 < start_s < end_s
    audio = desk.page.locator(".player audio")
    desk.page.wait_for_timeout(100)
    expect(desk.page.locator(".player .play .label")).to_have_text(ENGLISH["player.play"])
    stopped_s = audio.evaluate("node => node.currentTime")
    assert end_s <= stopped_s < end_s + 0.5


def test_segments_can_be_heard_and_the_text_copied(desk: Visit) -> None:
    drop(desk.page, ("two.wav", wav(recite([TEXT, "dad"]))))
    heard(desk.page)
    rows = desk.page.locator(".player tbody tr")
    assert rows.count() == 2
    rows.nth(1).get_by_role("button").click()
    assert float(str(desk.page.locator(".player").get_attribute("data-part")).split("-")[0]) > 1
    desk.page.get_by_role("button", name=ENGLISH["player.copy"]).click()
    expect(desk.page.locator(".player .told")).to_have_text(ENGLISH["player.copied"])


def test_a_long_text_keeps_to_its_box_and_follows_the_sound(desk: Visit) -> None:
    drop(desk.page, ("long.wav", wav(recite([" ".join("abcdefgh")] * 25, pause_s=0.3))))
    heard(desk.page)
    box = desk.page.locator(".player .text")
    assert box.evaluate("node => node.clientHeight") <= 480
    box.evaluate("node => { node.style.maxHeight = '6rem'; }")
    audio = desk.page.locator(".player audio")
    audio.evaluate("node => { node.currentTime = node.duration - 4; }")
    desk.page.locator(".player .play").click()
    desk.page.wait_for_function(
        """() => {
            const box = [...document.querySelectorAll("*")].map((node) => node.shadowRoot ?? node)
                .map((root) => root.querySelector?.(".player .text")).find(Boolean);
            return box.scrollTop > box.scrollHeight / 2;
        }"""
    )


def test_waveform_and_spectrogram_are_drawn(desk: Visit) -> None:
    drop(desk.page, ("song.wav", wav(sing(TEXT))))
    heard(desk.page)
    desk.page.wait_for_timeout(300)
    colours = """node => {
        const { data } = node.getContext("2d").getImageData(0, 0, node.width, node.height);
        const seen = new Set();
        for (let i = 0; i < data.length; i += 4) seen.add(data.slice(i, i + 4).join());
        return seen.size;
    }"""
    assert desk.page.locator(".player .wave").evaluate(colours) >= 2
    assert desk.page.locator(".player .mel").evaluate(colours) > 20


def test_a_correction_is_in_the_srt_that_is_downloaded(desk: Visit) -> None:
    drop(desk.page, ("song.wav", wav(sing(TEXT))))
    heard(desk.page)
    original = download(desk.page, "SRT").decode()
    cue = re.fullmatch(r"1\n(\S+) --> (\S+)\nhead bad cafe\n", original)
    assert cue is not None
    expand(desk.page, "result.correct")
    box = desk.page.get_by_label(ENGLISH["result.correct"]).last
    box.fill("head good cafe")  # which the box tells when the click takes the focus from it
    assert download(desk.page, "SRT").decode() == original.replace("bad", "good")
    expect(desk.page.get_by_text(ENGLISH["result.changed"])).to_be_visible()
    expect(words(desk.page)).to_have_text(["head", "good", "cafe"])
    desk.page.get_by_role("button", name=ENGLISH["player.copy"]).click()
    expect(desk.page.locator(".player .told")).to_have_text(ENGLISH["player.copied"])
    assert desk.page.evaluate("navigator.clipboard.readText()") == "head good cafe"
    assert b"head good cafe" in download(desk.page, "TXT")
    assert download(desk.page, "VTT").startswith(b"WEBVTT\n\n")
    assert json.loads(download(desk.page, "JSON"))["text"] == "head good cafe"
    desk.shot("corrected")


def test_words_that_are_being_typed_outlive_another_file(desk: Visit) -> None:
    drop(desk.page, ("a.wav", wav(sing("head"))))
    heard(desk.page)
    expand(desk.page, "result.correct")
    box = desk.page.get_by_label(ENGLISH["result.correct"]).last
    box.press_sequentially(" my")  # and the box is not left
    drop(desk.page, ("b.wav", wav(sing("dad"))))
    show = desk.page.get_by_role("button", name="b.wav: done")
    expect(show).to_be_visible()
    box.press_sequentially(" cafe")
    expect(box).to_have_value("head my cafe")
    desk.shot("news")
    show.click()
    expect(words(desk.page)).to_have_text(["dad"])
    desk.page.get_by_label(ENGLISH["result.choose"], exact=True).click()
    desk.page.get_by_role("option", name=re.compile("a.wav")).click()
    expect(words(desk.page)).to_have_text(["head", "my", "cafe"])


def test_many_files_come_as_one_zip(desk: Visit) -> None:
    texts = ["head", "bad", "cafe", "dad"]
    drop(desk.page, *[(f"{text}.wav", wav(sing(text))) for text in texts], ("broken.wav", b"no sound"))
    choice = desk.page.get_by_label(ENGLISH["result.choose"], exact=True)
    expect(choice).to_be_visible()
    expect(desk.page.get_by_role("button", name=ENGLISH["progress.cancel"])).to_have_count(0)
    archive = zipfile.ZipFile(io.BytesIO(download(desk.page, ENGLISH["result.download_zip"].format(count=4))))
    assert sorted(archive.namelist()) == sorted(
        f"{t}.{e}" for t in texts for e in ("txt", "srt", "vtt", "json")
    )
    assert {archive.read(f"{text}.txt").decode().strip() for text in texts} == set(texts)
    desk.shot("many")
    choice.click()
    desk.page.get_by_role("option", name=re.compile("dad.wav")).click()
    expect(words(desk.page)).to_have_text(["dad"])


def test_what_is_typed_survives_another_file_and_another_tab(desk: Visit) -> None:
    drop(desk.page, ("a.wav", wav(sing("head"))))
    heard(desk.page)
    expand(desk.page, "compare.title")
    box = desk.page.get_by_label(ENGLISH["compare.reference"])
    box.fill("dead")
    box.press("Control+Enter")
    expect(desk.page.get_by_text("100.0 %")).to_be_visible()
    desk.page.get_by_role("tab", name=ENGLISH["tab.overview"]).click()
    expect(desk.page.get_by_role("cell", name="a.wav")).to_be_visible()
    expect(desk.page.get_by_text("tiny (default)")).to_be_visible()
    state = desk.page.get_by_test_id("stMetricValue").filter(has_text=ENGLISH["overview.ready"])
    expect(state).to_be_visible()
    desk.shot("overview")
    desk.page.get_by_role("tab", name=ENGLISH["tab.transcribe"]).click()
    expect(desk.page.get_by_text("100.0 %")).to_be_visible()


def test_the_model_is_chosen_from_what_is_served(desk: Visit) -> None:
    expand(desk.page, "options.title")
    choose(desk.page, "options.model", "other", offered=["tiny", "other"])
    drop(desk.page, ("song.wav", wav(sing(TEXT))))
    heard(desk.page)
    expect(desk.page.get_by_text("· other ·")).to_be_visible()


def test_the_spoken_language_outlives_another_language_of_the_page(desk: Visit) -> None:
    russian = TABLES["ru"]
    expand(desk.page, "options.title")
    box = desk.page.get_by_role("combobox", name=ENGLISH["options.language"], exact=True)
    expect(box).to_have_value(ENGLISH["options.any"])
    desk.page.get_by_role("combobox", name=ENGLISH["page.language"], exact=True).press("ArrowDown")
    desk.page.get_by_role("option", name=NAMES["ru"]).click()
    desk.page.locator("summary", has_text=russian["options.title"]).click()
    box = desk.page.get_by_role("combobox", name=russian["options.language"], exact=True)
    expect(box).to_have_value(russian["options.any"])
    drop(desk.page, ("song.wav", wav(sing(TEXT))))
    heard(desk.page)
    expect(box).to_have_value(russian["options.any"])


def test_timings_identifiers_and_links(desk: Visit) -> None:
    drop(desk.page, ("song.wav", wav(sing(TEXT))))
    heard(desk.page)
    expand(desk.page, "details.title")
    table = desk.page.locator(".asr-table")
    for stage in ("decode", "queue", "inference", "ctc"):
        expect(table).to_contain_text(ENGLISH[f"stage.{stage}"])
    codes = desk.page.get_by_test_id("stCode").all_inner_texts()
    assert [bool(re.fullmatch(r"[0-9a-f]{32}", code.strip())) for code in codes] == [True, True]
    link = desk.page.get_by_role("link", name=ENGLISH["details.jaeger"])
    assert link.get_attribute("href") == f"http://jaeger.test/trace/{codes[1].strip()}"
    assert desk.page.get_by_role("link", name=ENGLISH["details.grafana"]).count() == 1
    desk.shot("timings")
