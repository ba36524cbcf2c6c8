"""The small demonstration: one box for sound, one for text, through the same client as the page.

    python -m ui.gradio_demo

It needs `gradio` (group `dev`) and a running service at ``ASR_API_URL``. It listens on 127.0.0.1:7860.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from ui.background import Background
from ui.client import AudioFile, Options
from ui.errors import ApiError
from ui.exports import to_srt
from ui.problems import explain
from ui.settings import UiSettings
from ui.strings import Strings
from ui.views.options import parse_hotwords
from ui.work import State, Work

_LOOK_EVERY_S = 0.2


def build(settings: UiSettings, background: Background) -> Any:
    """The demonstration's blocks; models are asked for when a person opens it."""
    strings = Strings()

    def transcribe(path: str | None, model: str | None, hotwords: str) -> Iterator[tuple[str, str]]:
        """Text as it is found, then the text and its subtitles."""
        if path is None:
            return
        work = Work(background, settings.parallel_files)
        options = Options(model or None, hotwords=parse_hotwords(hotwords))
        (task,) = work.add([AudioFile(Path(path).name, Path(path).read_bytes())], options)
        try:
            while not work.wait(_LOOK_EVERY_S):
                yield task.text, ""
        finally:
            work.cancel_all()  # the person has left
        if task.state is State.DONE and task.transcript is not None:
            yield task.transcript.text or strings("result.silence"), to_srt(task.transcript)
        elif task.error is not None:
            problem = explain(task.error, strings)
            raise gr.Error(f"{problem.title} {problem.advice}", print_exception=False)

    def names() -> Any:
        try:
            found = [model.name for model in background.call(background.client.models())]
        except ApiError as error:
            problem = explain(error, strings)
            raise gr.Error(f"{problem.title} {problem.advice}", print_exception=False) from error
        return gr.Dropdown(choices=found, value=found[0] if found else None)

    with gr.Blocks(title=strings("page.title")) as blocks:
        gr.Markdown(f"# {strings('page.title')}\n{strings('page.subtitle')}")
        sound = gr.Audio(sources=["upload", "microphone"], type="filepath", label=strings("input.upload"))
        with gr.Row():
            model = gr.Dropdown(choices=[], label=strings("options.model"))
            hotwords = gr.Textbox(label=strings("options.hotwords"), info=strings("options.hotwords_help"))
        text = gr.Textbox(label=strings("player.text"), lines=4)
        subtitles = gr.Textbox(label="SRT", lines=4)
        sound.change(transcribe, [sound, model, hotwords], [text, subtitles], api_name="transcribe")
        blocks.load(names, outputs=model, api_name=False)
    return blocks


def main() -> None:
    """Serve until Ctrl-C."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    settings = UiSettings.from_env()
    background = Background(settings)
    try:
        build(settings, background).launch(server_name="127.0.0.1", inbrowser=False)
    finally:
        background.close()


if __name__ == "__main__":
    main()
