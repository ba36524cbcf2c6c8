"""The catalogue and `asr models pull`, against a hub on loopback that serves tiny checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote

import numpy as np
import pytest

from api.bundle import verify_bundle
from api.catalog import CATALOG, Archive, CatalogEntry, Family, HubFiles
from api.decoding import decode
from api.engine import Engine
from api.pull import DOWNLOADS, PullError, find_entry, pull

REPOSITORY = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Files by path: ``repository/revision/file`` for the hub, anything else for plain addresses."""

    files: dict[str, bytes] = field(default_factory=dict)
    commits: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    cut_after: int | None = None
    url: str = ""

    def find(self, path: str) -> tuple[bytes, str] | None:
        match = re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path)
        if match:
            repository, revision, file = match.groups()
            content = self.files.get(f"{repository}/{revision}/{file}")
            return None if content is None else (content, revision)
        content = self.files.get(path.lstrip("/"))
        return None if content is None else (content, "")


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = unquote(self.path.split("?")[0])
            hub.requests.append((self.command, path, self.headers.get("Range")))
            match = re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path)
            if match and match[1] in hub.commits:
                card = {"id": match[1], "sha": hub.commits[match[1]], "siblings": [], "tags": []}
                self.send(200, json.dumps(card).encode(), {"Content-Type": "application/json"}, body)
                return
            found = hub.find(path)
            if found is None:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
                return
            content, commit = found
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
            start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            if start and int(start[1]) >= len(content):
                self.send(416, b"", headers, body)
            elif start:
                headers["Content-Range"] = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
                self.send(206, content[int(start[1]) :], headers, body)
            else:
                self.send(200, content, headers, body)

        def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if value:
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content[: hub.cut_after])
                if hub.cut_after is not None and hub.cut_after < len(content):
                    self.close_connection = True

    return Handler


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(made))
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


def run_pull(name: str, models_dir: Path, endpoint: str) -> subprocess.CompletedProcess[str]:
    """The command, as a person calls it."""
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("ASR_", "HF_"))},
        "ASR_MODELS_DIR": str(models_dir),
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(models_dir / "hf"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "api.cli", "models", "pull", name],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def serve(hub: Hub, source: HubFiles, folder: Path) -> None:
    """Every file of the source from the folder, under its pinned commit (or COMMIT, told by the API)."""
    revision = source.revision or COMMIT
    hub.commits[source.repository] = revision
    for file in (*source.files, *source.optional):
        if (folder / file).is_file():
            hub.files[f"{source.repository}/{revision}/{file}"] = (folder / file).read_bytes()


def test_entries_are_pinned_licensed_and_cover_the_languages() -> None:
    assert {language for entry in CATALOG.values() for language in entry.languages} >= {
        "az",
        "en",
        "ru",
        "tr",
        "vi",
    }
    for name, entry in CATALOG.items():
        assert name == entry.name
        assert entry.licence
        assert entry.page.startswith("https://")
        for source in entry.sources:
            if isinstance(source, Archive):
                assert source.url.startswith("https://")
                assert re.search(r"/versions/\d", source.url)
            else:
                assert source.revision is None or re.fullmatch(r"[0-9a-f]{40}", source.revision)


def test_every_family_has_a_converter_and_a_model() -> None:
    from training.convert import FAMILIES

    families = set(get_args(Family))
    assert families == FAMILIES.keys() == {entry.family for entry in CATALOG.values()}


@pytest.mark.parametrize(
    ("name", "languages", "licence", "repository"),
    [
        ("en-moonshine-base", ("en",), "MIT", "UsefulSensors/moonshine-base"),
        ("vi-moonshine-tiny", ("vi",), "Moonshine AI Community License", "UsefulSensors/moonshine-tiny-vi"),
    ],
)
def test_a_moonshine_is_pulled_with_its_tokenizer(
    name: str, languages: tuple[str, ...], licence: str, repository: str
) -> None:
    """Nothing else lies beside the weights that the converter asks for."""
    entry = CATALOG[name]
    assert (entry.languages, entry.family) == (languages, "moonshine")
    assert entry.licence.startswith(licence)
    assert not entry.needs_recordings
    (source,) = entry.sources
    assert isinstance(source, HubFiles)
    assert source.repository == repository
    assert entry.weights == "model.safetensors"
    assert {"config.json", "tokenizer.json"} <= set(source.files)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(PullError, match=r"tr-wav2vec2-xls-r-300m"):
        find_entry("nope")


@pytest.mark.parametrize("name", ["tr-wav2vec2-xls-r-300m", "az-wav2vec2-xls-r-300m"])
def test_a_published_wav2vec2_becomes_a_bundle_that_runs(name: str, hub: Hub, tmp_path: Path) -> None:
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    from training.recipes.rehearsal import tiny_wav2vec2

    entry = CATALOG[name]
    (source,) = entry.sources
    assert isinstance(source, HubFiles)
    published = tiny_wav2vec2(tmp_path / "published")
    letters = ["[PAD]", "[UNK]", "|", *"abcçdeəfgğhı"]
    torch.manual_seed(1)
    config = Wav2Vec2Config.from_pretrained(published, vocab_size=len(letters), pad_token_id=0)
    model = Wav2Vec2ForCTC(config)
    model.save_pretrained(published)
    if source.files[0] == "pytorch_model.bin":
        torch.save(model.state_dict(), published / "pytorch_model.bin")
    (published / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(letters)}))
    (published / "special_tokens_map.json").write_text('{"pad_token": "[PAD]", "unk_token": "[UNK]"}')
    serve(hub, source, published)
    models_dir = tmp_path / "models"
    done = run_pull(name, models_dir, hub.url)
    assert done.returncode == 0, done.stderr
    bundle = verify_bundle(models_dir, name)
    assert bundle.manifest.languages == entry.languages
    assert bundle.manifest.source.revision == source.revision
    assert bundle.manifest.licence == "Apache-2.0"
    assert not (models_dir / DOWNLOADS / name).exists()
    # It says what the published model says.
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    (found,) = Engine(bundle).run([noise], alone=False)
    normal = (noise - noise.mean()) / np.sqrt(noise.var() + 1e-7)
    with torch.inference_mode():
        logits = model.eval()(torch.tensor(normal)[None]).logits[0]
    np.testing.assert_allclose(found.whole(), torch.log_softmax(logits, -1).numpy(), atol=1e-3)
    assert bundle.vocabulary.decode([3, 2, 4, 1, 5]) == "a bc"


def test_a_published_fastconformer_becomes_a_bundle_that_runs(hub: Hub, tmp_path: Path) -> None:
    from tests.training.conformers import FAST, PIECES, archive_of, random_conformer
    from training.torch_inference import run_torch

    name = "ru-fastconformer-large"
    (source,) = CATALOG[name].sources
    assert isinstance(source, HubFiles)
    model = random_conformer(FAST)
    (tmp_path / "published").mkdir()
    archive_of(tmp_path / "published" / source.files[0], model)
    serve(hub, source, tmp_path / "published")
    done = run_pull(name, tmp_path / "models", hub.url)
    assert done.returncode == 0, done.stderr
    bundle = verify_bundle(tmp_path / "models", name)
    assert (bundle.manifest.languages, bundle.manifest.text_normalisation) == (("ru",), ("nfc",))
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    np.testing.assert_allclose(
        Engine(bundle).run([noise], alone=False)[0].whole(), run_torch(model, [noise])[0], atol=1e-4
    )
    assert bundle.vocabulary.decode([PIECES.index("\u2581Cd"), PIECES.index("e"), 0, 1]) == "Cde a"


def test_recordings_that_are_not_there_are_named_before_the_download(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(PullError, match=r"none\.jsonl: no such manifest"):
        pull(CATALOG["ru-fastconformer-large"], tmp_path, calibration=tmp_path / "none.jsonl")
    assert not hub.requests


def test_a_model_that_is_too_large_for_float32_asks_for_recordings_first(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(PullError, match=r"vi-parakeet-ctc-0\.6b has too many weights.*--calibration"):
        pull(CATALOG["vi-parakeet-ctc-0.6b"], tmp_path)
    assert not hub.requests


def test_four_bits_ask_for_recordings_first(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(PullError, match=r"--four-bits needs recordings \(--calibration\)"):
        pull(CATALOG["ru-fastconformer-large"], tmp_path, four_bits=True)
    assert not hub.requests


def test_phowhisper_records_the_commit_it_found(hub: Hub, tmp_path: Path) -> None:
    import torch
    from transformers import WhisperConfig

    from training.recipes.rehearsal import tiny_whisper
    from training.recipes.whisper_ctc.model import EncoderConfig, WhisperCtc
    from training.tokenizer import load_tokenizer

    name = "vi-phowhisper-tiny-ctc"
    head, base = CATALOG[name].sources
    assert isinstance(head, HubFiles)
    assert isinstance(base, HubFiles)
    assert head.revision is None
    published = tiny_whisper(tmp_path / "published", "vi")
    config = EncoderConfig.from_transformers(WhisperConfig.from_pretrained(published))
    network = WhisperCtc(config, len(load_tokenizer(str(published))), hidden=40, fixed=True)
    state = {k: v for k, v in network.state_dict().items() if k.startswith(("encoder.", "ctc_head."))}
    torch.save({"epoch": 1, "state_dict": state}, published / head.files[0])
    serve(hub, head, published)
    serve(hub, base, published)
    models_dir = tmp_path / "models"
    done = run_pull(name, models_dir, hub.url)
    assert done.returncode == 0, done.stderr
    assert verify_bundle(models_dir, name).manifest.source.revision == COMMIT
    pins = json.loads((models_dir / DOWNLOADS / "pins.json").read_text())
    assert pins == {head.repository: COMMIT}


def test_a_whisper_with_its_decoder_becomes_a_bundle_that_writes_one_language(
    hub: Hub, tmp_path: Path
) -> None:
    import torch
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    from training.recipes.rehearsal import tiny_whisper
    from training.tokenizer import load_tokenizer

    name = "az-whisper-base"
    (source,) = CATALOG[name].sources
    assert isinstance(source, HubFiles)
    published = tiny_whisper(tmp_path / "published", "az")
    serve(hub, source, published)
    done = run_pull(name, tmp_path / "models", hub.url)
    assert done.returncode == 0, done.stderr
    bundle = verify_bundle(tmp_path / "models", name)
    assert (bundle.manifest.languages, bundle.manifest.max_window_s) == (("az",), 30.0)
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    (found,) = Engine(bundle).run([noise], alone=False)
    blank = bundle.vocabulary.blank_id
    said = [token for token in found.whole().argmax(axis=1).tolist() if token != blank]
    model = WhisperForConditionalGeneration.from_pretrained(published).eval()
    features = WhisperFeatureExtractor.from_pretrained(published)(
        noise, sampling_rate=16_000, return_tensors="pt"
    ).input_features
    known = load_tokenizer(str(published)).get_vocab()
    names = ("<|startoftranscript|>", "<|az|>", "<|transcribe|>", "<|notimestamps|>")
    prompt, special = torch.tensor([[known[name] for name in names]]), bundle.vocabulary.special_ids
    with torch.inference_mode():
        logits = model(features, decoder_input_ids=prompt).logits[0, -1]
    best = [token for token in logits.argsort(descending=True).tolist() if token not in special]
    assert said[0] == best[0]


def test_a_published_moonshine_becomes_a_bundle_that_runs(hub: Hub, tmp_path: Path) -> None:
    import torch
    from transformers import MoonshineForConditionalGeneration

    from tests.training.moonshine.conftest import tiny_moonshine

    name = "vi-moonshine-tiny"
    (source,) = CATALOG[name].sources
    assert isinstance(source, HubFiles)
    (tmp_path / "published").mkdir()
    published = tiny_moonshine(tmp_path / "published")
    serve(hub, source, published)
    done = run_pull(name, tmp_path / "models", hub.url)
    assert done.returncode == 0, done.stderr
    bundle = verify_bundle(tmp_path / "models", name)
    assert (bundle.manifest.languages, bundle.manifest.max_window_s) == (("vi",), 30.0)
    assert bundle.manifest.source.revision == COMMIT
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    (found,) = Engine(bundle).run([noise], alone=False)
    said = decode(found, bundle, 0).token_ids.tolist()
    model = MoonshineForConditionalGeneration.from_pretrained(published).eval()
    with torch.inference_mode():
        wanted = model.generate(torch.from_numpy(noise)[None], max_new_tokens=1, do_sample=False)
    assert said[:1] == wanted[0, 1:].tolist()


def test_a_recorded_commit_is_asked_for_whatever_the_hub_has_by_now(hub: Hub, tmp_path: Path) -> None:
    name = "vi-phowhisper-tiny-ctc"
    head = CATALOG[name].sources[0]
    assert isinstance(head, HubFiles)
    hub.commits[head.repository] = "f" * 40
    (tmp_path / DOWNLOADS).mkdir()
    (tmp_path / DOWNLOADS / "pins.json").write_text(json.dumps({head.repository: COMMIT}))
    done = run_pull(name, tmp_path, hub.url)
    assert "answered 404" in done.stderr
    asked = [path for _, path, _ in hub.requests]
    assert any(f"/{head.repository}/resolve/{COMMIT}/" in path for path in asked), asked
    assert not any("f" * 40 in path for path in asked)


def test_without_a_network_it_says_so_in_one_line(tmp_path: Path) -> None:
    done = run_pull("tr-wav2vec2-xls-r-300m", tmp_path / "models", "http://127.0.0.1:9")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("asr: mpoyraz/wav2vec2-xls-r-300m-cv8-turkish: cannot be fetched from 127.0.0.1:9")
    assert not (tmp_path / "models" / "tr-wav2vec2-xls-r-300m").exists()


def test_what_the_hub_does_not_have_is_one_line(hub: Hub, tmp_path: Path) -> None:
    done = run_pull("az-wav2vec2-xls-r-300m", tmp_path / "models", hub.url)
    assert done.returncode == 1
    assert "answered 404" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_model_and_one_that_is_there_already(tmp_path: Path) -> None:
    done = run_pull("nope", tmp_path, "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "the catalogue has no model 'nope'" in done.stderr
    (tmp_path / "ru-quartznet15x5").mkdir()
    with pytest.raises(PullError, match="already there"):
        pull(CATALOG["ru-quartznet15x5"], tmp_path)


def test_without_torch_it_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(PullError, match="run `make setup` in the repository"):
        pull(CATALOG["ru-quartznet15x5"], tmp_path)


def tiny_nemo(folder: Path) -> bytes:
    from tests.training.networks import CONFIGS, random_network
    from tests.training.test_nemo import archive_of

    return archive_of(folder / "tiny.nemo", random_network(CONFIGS["quartznet"])).read_bytes()


def archive_entry(hub: Hub, sha256: str | None = None) -> CatalogEntry:
    source = Archive(f"{hub.url}/versions/1/tiny.nemo", "tiny.nemo", sha256)
    return CatalogEntry("en-tiny", "Tiny", ("en",), "Apache-2.0", "nemo", (source,), "https://example.org")


def test_an_archive_is_resumed_checked_and_converted(hub: Hub, tmp_path: Path) -> None:
    content = tiny_nemo(tmp_path)
    hub.files["versions/1/tiny.nemo"] = content
    entry = archive_entry(hub, hashlib.sha256(content).hexdigest())
    hub.cut_after = 1000
    with pytest.raises(PullError, match=r"pull again|cannot be fetched"):
        pull(entry, tmp_path, say=lambda _: None)
    partial = tmp_path / DOWNLOADS / "en-tiny" / "tiny.nemo.partial"
    assert partial.stat().st_size == 1000
    hub.cut_after = None
    bundle = pull(entry, tmp_path, say=lambda _: None)
    assert hub.requests[-1] == ("GET", "/versions/1/tiny.nemo", "bytes=1000-")
    assert bundle.manifest.graphs.keys() == {"float32"}
    assert not partial.exists()


def test_an_archive_that_changed_is_refused_and_deleted(hub: Hub, tmp_path: Path) -> None:
    hub.files["versions/1/tiny.nemo"] = b"not what it was"
    with pytest.raises(PullError, match="sha256"):
        pull(archive_entry(hub, "0" * 64), tmp_path, say=lambda _: None)
    assert not (tmp_path / DOWNLOADS / "en-tiny" / "tiny.nemo").exists()
    assert not (tmp_path / "en-tiny").exists()


def test_the_first_pull_of_an_archive_that_becomes_a_bundle_pins_it_for_the_next(
    hub: Hub, tmp_path: Path
) -> None:
    content = tiny_nemo(tmp_path)
    hub.files["versions/1/tiny.nemo"] = content
    bundle = pull(archive_entry(hub), tmp_path, say=lambda _: None)
    sha256 = hashlib.sha256(content).hexdigest()
    assert bundle.manifest.source.revision == sha256
    pins = tmp_path / DOWNLOADS / "pins.json"
    assert json.loads(pins.read_text()) == {f"{hub.url}/versions/1/tiny.nemo": sha256}
    shutil.rmtree(tmp_path / "en-tiny")
    hub.files["versions/1/tiny.nemo"] = b"another one"
    with pytest.raises(PullError, match=f"expected {sha256} .recorded in {re.escape(str(pins))}"):
        pull(archive_entry(hub), tmp_path, say=lambda _: None)


def test_what_is_no_archive_is_not_trusted_and_not_in_the_way_of_the_right_one(
    hub: Hub, tmp_path: Path
) -> None:
    """A page to log in arrives with status 200."""
    hub.files["versions/1/tiny.nemo"] = b"<html>Please log in</html>"
    with pytest.raises(PullError, match="converter failed"):
        pull(archive_entry(hub), tmp_path, say=lambda _: None)
    assert not (tmp_path / DOWNLOADS / "pins.json").exists()
    hub.files["versions/1/tiny.nemo"] = tiny_nemo(tmp_path)
    assert pull(archive_entry(hub), tmp_path, say=lambda _: None).name == "en-tiny"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "models").write_text("a file is in the way")
    with pytest.raises(PullError, match="cannot write"):
        pull(archive_entry(hub), tmp_path / "models", say=lambda _: None)
