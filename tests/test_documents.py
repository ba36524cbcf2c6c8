"""What the documents name is there: links, make targets, modules, files, settings, metrics, error codes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from api import errors, server
from api.env_example import env_example

ROOT = Path(__file__).resolve().parent.parent
BOX = (
    "models/en-moonshine-tiny",
    "models/en-whisper-tiny",
    "models/en-whisper-tiny-ctc",
    "models/en-quartznet-small",
)
FOLDERS = ("docs", "training", "serverless", "samples", "ui", *BOX)
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
)
TEXTS = {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}
ALL = "\n".join(TEXTS.values())
FENCE = re.compile(r"```.*?```", re.DOTALL)
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def sources() -> Iterator[Path]:
    """Every file of ours that a variable or a metric may be read or set in, documents and tests apart."""
    for folder in (
        "api",
        "ui",
        "training",
        "loadtest",
        "serverless",
        "scripts",
        "docker",
        "k8s",
        "monitoring",
    ):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".sh", ".yml", ".yaml", ".env", ".Dockerfile"}:
                yield path
    yield from (ROOT / "Makefile", ROOT / "Jenkinsfile")
    yield from (ROOT / "tests" / "browser").glob("*.py")


SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in sources())


def anchors(text: str) -> set[str]:
    """The anchors that a Markdown page's headings get."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), flags=re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", TEXTS[path])):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text(encoding="utf-8")), target


@each_document
def test_commands_exist(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rules = re.findall(r"^([a-z0-9 -]+):", makefile, flags=re.MULTILINE)
    known = {name for rule in rules for name in rule.split()}
    commands = re.findall(r"`+[^`]+`+", TEXTS[path])
    for command in commands:
        assert set(re.findall(r"\bmake ([a-z][a-z0-9-]+)", command)) <= known, command
        for module in re.findall(r"python -m ((?:training|api|ui|loadtest|serverless)[\w.]*\w)", command):
            if not module.endswith(".NAME"):
                folder = ROOT / module.replace(".", "/")
                assert folder.with_suffix(".py").is_file() or (folder / "__main__.py").is_file(), module


@pytest.mark.parametrize(
    "path", [ROOT / "Makefile", *DOCUMENTS], ids=lambda path: str(path.relative_to(ROOT))
)
def test_arguments_of_make_are_quoted(path: Path) -> None:
    """`ARGS=--count 2000` asks make for a target called 2000."""
    assert re.findall(r"ARGS=--\S+ +\d+", path.read_text(encoding="utf-8")) == []


@each_document
def test_files_are_there(path: Path) -> None:
    top = {entry.name for entry in ROOT.iterdir()} - {"build", "runs", "data"}
    for named in re.findall(r"`([\w./-]+/(?:[\w.-]+\.\w+)?)`", FENCE.sub("", TEXTS[path])):
        if named.split("/")[0] in top:
            assert (ROOT / named).exists() or (path.parent / named).exists(), named


def test_variables_in_documents_are_read_somewhere() -> None:
    named = set(re.findall(r"\bASR_[A-Z0-9_]+[A-Z0-9]\b", ALL))
    read = set(re.findall(r"\bASR_[A-Z0-9_]+\b", SOURCE + env_example()))
    assert named - read == set()


def test_variables_of_compose_and_the_page_are_in_documents() -> None:
    scripts = {"ASR_API_IMAGE", "ASR_UI_IMAGE", "ASR_MONITORING", "ASR_NGINX_CONF", "ASR_NGINX_CONF_SUM"}
    scripts.add("ASR_STOP_GRACE_PERIOD")  # these are set by the Makefile and docker/*.sh, never by a person
    compose = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docker").glob("compose.*.yml"))
    page = (ROOT / "ui" / "settings.py").read_text(encoding="utf-8")
    asked = set(re.findall(r"\$\{(\w+_PORT|ASR_\w+)", compose)) | set(re.findall(r'"(ASR_\w+)"', page))
    assert asked - scripts - set(re.findall(r"\b[A-Z][A-Z0-9_]+\b", ALL + env_example())) == set()


def test_metrics_in_documents_are_declared() -> None:
    others = {"asr_prometheus", "asr_grafana", "asr_alertmanager"}  # volumes of Compose
    for name in set(re.findall(r"\basr_[a-z_]+[a-z]\b", ALL)) - others:
        base = re.sub(r"_(bucket|count|sum|total|info)$", "", name)
        assert re.search(rf"\b{base}", SOURCE), name


def classes(root: type[errors.AsrError]) -> Iterator[type[errors.AsrError]]:
    yield root
    for child in root.__subclasses__():
        yield from classes(child)


def test_the_table_of_status_codes_is_that_of_the_errors() -> None:
    assert server.__name__ == "api.server"  # imported for the errors that only it raises
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    told = {
        (int(status), code)
        for statuses, codes in re.findall(r"^\| (\d{3}(?:, \d{3})*) \| (.*?) \|", text, flags=re.MULTILINE)
        for status, some in zip(statuses.split(", "), codes.split(";"), strict=False)
        for code in re.findall(r"`(\w+)`", some)
    }
    internal = {errors.ClientDisconnected, errors.RetryLaterError}
    raised = {(kind.status, kind.default_code) for kind in set(classes(errors.AsrError)) - internal}
    assert raised <= told
    assert {code for _, code in told} <= set(re.findall(r'"(\w+)"', SOURCE))
    given = set(re.findall(r'\bcode="(\w+)"', SOURCE))
    assert given - {code for _, code in told} == {"input_audio_buffer_commit_empty"}  # an event
