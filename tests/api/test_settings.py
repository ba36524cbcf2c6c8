"""Settings: unsafe values refuse to start and say why, secrets stay secret, the example is in step."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import pytest
from pydantic import ValidationError

from api.env_example import env_example, in_force
from api.errors import SettingsError
from api.keys import ApiKey, find_key
from api.settings import Settings, _temporary_folder, load_settings, misspelt

ROOT = Path(__file__).resolve().parents[2]
SECRET = "correct-horse-battery"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"ASR_{name.upper()}", raising=False)
    monkeypatch.chdir(tmp_path)


def test_env_example_starts_with_every_variable_of_the_service() -> None:
    assert (ROOT / ".env.example").read_text().startswith(env_example()), "run: asr settings --env-example"


def test_env_example_as_an_environment_gives_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in env_example().splitlines():
        if line.startswith("#ASR_"):
            name, _, value = line.removeprefix("#").partition("=")
            monkeypatch.setenv(name, value)
    assert load_settings().model_dump(exclude={"spool_dir"}) == Settings().model_dump(exclude={"spool_dir"})


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ASR_PORT", "99999", ["ASR_PORT=99999", "65535"]),
        ("ASR_PORT", "eighty", ["ASR_PORT=eighty", "integer"]),
        ("ASR_MAX_UPLOAD_BYTES", "1", ["ASR_MAX_UPLOAD_BYTES=1", "1024"]),
        ("ASR_GRAPH", "int2", ["ASR_GRAPH=int2", "int8", "int4"]),
        ("ASR_MODELS", "../../etc", ["ASR_MODELS", "not a model name"]),
        ("ASR_MODELS", "a,a", ["ASR_MODELS", "twice"]),
        ("ASR_DEFAULT_MODEL", "other", ["ASR_DEFAULT_MODEL=other", "en-moonshine-tiny"]),
        ("ASR_HOST", "0.0.0.0", ["ASR_HOST=0.0.0.0", "ASR_API_KEYS", "ASR_ALLOW_ANONYMOUS=true"]),
        ("ASR_HOST", "::", ["ASR_HOST=::", "ASR_API_KEYS"]),
        ("ASR_MAX_BODY_BYTES", "2048", ["ASR_MAX_BODY_BYTES=2048", "26214400"]),
        ("ASR_HOST", "[::1]", ["ASR_HOST=[::1]", "neither an IP address nor a host name"]),
        ("ASR_HOST", "127.0.0.1:8000", ["ASR_HOST=127.0.0.1:8000", "ASR_PORT"]),
        ("ASR_HOST", "a..b", ["ASR_HOST=a..b", "host name"]),
        ("ASR_FORWARDED_ALLOW_IPS", "foo", ["ASR_FORWARDED_ALLOW_IPS=foo", "'foo'", "10.0.0.0/8"]),
        ("ASR_FORWARDED_ALLOW_IPS", "10.0.0.1,localhost", ["'localhost'", "only addresses"]),
        ("ASR_FORWARDED_ALLOW_IPS", "10.0.0.1/8", ["10.0.0.1/8", "host bits"]),
        ("ASR_FORWARDED_ALLOW_IPS", "*,10.0.0.1", ["ASR_FORWARDED_ALLOW_IPS=*,10.0.0.1", "stands alone"]),
        ("ASR_CORS_ORIGINS", "example.com", ["ASR_CORS_ORIGINS", "'example.com'", "scheme://host"]),
        ("ASR_CORS_ORIGINS", "https://a.example,https://b.example/", ["'https://b.example/'", "slash"]),
        ("ASR_CORS_ORIGINS", "https://a.example/app", ["'https://a.example/app'", "without a path"]),
        ("ASR_CORS_ORIGINS", "https://*.example", ["'https://*.example'", "scheme://host"]),
        ("ASR_CORS_ORIGINS", "https://App.example", ["'https://App.example'", "small letters"]),
        ("ASR_CORS_ORIGINS", "https://a.example:443", ["'https://a.example:443'", "leave out port 443"]),
        ("ASR_QUEUE_LIMIT_AUDIO_S", "0", ["ASR_QUEUE_LIMIT_AUDIO_S=0", "greater than 0"]),
    ],
)
def test_bad_values_name_variable_value_and_limit(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: list[str]
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ASR_HOST", "localhost"),
        ("ASR_HOST", "::1"),
        ("ASR_FORWARDED_ALLOW_IPS", "*"),
        ("ASR_FORWARDED_ALLOW_IPS", "10.0.0.0/8, 192.168.0.7,fd00::/8,::1,"),
        ("ASR_CORS_ORIGINS", "*"),
        ("ASR_CORS_ORIGINS", "null"),
        (
            "ASR_CORS_ORIGINS",
            "https://app.example, http://localhost:3000,http://[::1]:3000,https://127.0.0.1",
        ),
        ("ASR_CORS_ORIGINS", "https://xn--bcher-kva.example:8443,http://a_b.example:443"),
        (
            "ASR_CORS_ORIGINS",
            "chrome-extension://abcdefghijklmnop,safari-web-extension://0A1B-2C,tauri://localhost",
        ),
    ],
)
def test_addresses_and_origins_that_can_be_meant_are_taken(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    load_settings()


def test_a_host_that_is_none_is_not_taken_for_an_open_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    said = "ASR_HOST=not-a-host: is no address of this machine: Name or service not known"
    with pytest.raises(SettingsError, match=f"^{said}$"):
        load_settings(host="not-a-host")
    load_settings(host="not-a-host", allow_anonymous=True)  # `asr serve` says it when it listens


def test_two_bad_values_are_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASR_PORT", "-1")
    monkeypatch.setenv("ASR_MAX_BEAM", "0")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert not load_settings(host=host).has_keys


def test_other_addresses_need_keys_or_an_explicit_word() -> None:
    assert load_settings(host="0.0.0.0", allow_anonymous=True).host == "0.0.0.0"
    assert load_settings(host="0.0.0.0", api_keys=f"alice:{SECRET}").has_keys


def test_env_file_is_read_and_the_environment_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("ASR_PORT=9001\nASR_MAX_BEAM=32\n")
    monkeypatch.setenv("ASR_PORT", "9002")
    settings = load_settings()
    assert (settings.port, settings.max_beam) == (9002, 32)


def test_an_env_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"ASR_MODELS=caf\xe9\n")
    with pytest.raises(SettingsError, match=r"\.env: is not UTF-8 text"):
        load_settings(tmp_path / ".env")


def test_a_spool_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    load_settings(spool_dir=tmp_path).check_spool_dir()
    with pytest.raises(SettingsError, match=r"ASR_SPOOL_DIR=/no/such: no file can be made there: No such"):
        load_settings(spool_dir="/no/such").check_spool_dir()


def test_empty_values_mean_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASR_PORT", "")
    assert load_settings().port == 8000


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1


def test_keys_keep_only_their_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASR_API_KEYS", f"alice:{SECRET}, bob:sha256={'ab' * 32}")
    settings = load_settings()
    assert SECRET not in repr(settings)
    assert SECRET not in str(settings.model_dump())
    assert [key.name for key in settings.load_keys()] == ["alice", "bob"]


@pytest.mark.parametrize("entry", [SECRET, f":{SECRET}", "alice:short", "alice:sha256=abcd", f"a b:{SECRET}"])
def test_malformed_keys_refuse_to_start_without_showing_them(
    monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    monkeypatch.setenv("ASR_API_KEYS", entry)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert "ASR_API_KEYS" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_keys_file_adds_to_the_variable(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# team\ncarol:{SECRET}2\n\n")
    settings = load_settings(api_keys=f"alice:{SECRET}", api_keys_file=path)
    assert [key.name for key in settings.load_keys()] == ["alice", "carol"]


def test_keys_file_that_is_missing_or_empty_refuses_to_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="ASR_API_KEYS_FILE"):
        load_settings(api_keys_file=tmp_path / "none").load_keys()
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(SettingsError, match="holds no key"):
        load_settings(api_keys_file=tmp_path / "empty").load_keys()


def test_find_key_knows_its_own_and_no_other() -> None:
    keys = [ApiKey.parse(f"alice:{SECRET}"), ApiKey.parse(f"bob:{SECRET}bob")]
    found = find_key(keys, f"{SECRET}bob")
    assert found is not None
    assert found.name == "bob"
    assert find_key(keys, SECRET + "x") is None
    assert find_key([], SECRET) is None


def test_settings_in_force_give_themselves_again_and_keep_secrets(tmp_path: Path) -> None:
    key = ApiKey.parse(f"me:{SECRET}")
    changed = Settings(models=("one", "two"), calibrate=False, queue_limit_audio_s=12.5, api_keys=(key,))
    text = in_force(changed)
    assert SECRET not in text
    assert "# ASR_API_KEYS is set, and not shown: me\n" in text
    (tmp_path / ".env").write_text(text)
    again = load_settings(tmp_path / ".env")
    assert again.model_dump(exclude={"api_keys"}) == changed.model_dump(exclude={"api_keys"})


def test_no_folder_for_temporary_files_is_a_setting_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with a read-only root and without a /tmp."""

    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    assert _temporary_folder() == Path("/tmp")


def test_names_that_are_nearly_settings_are_found() -> None:
    given = [
        "ASR_WORKRES",
        "ASR_MODEL",
        "ASR_QUEUE_LIMIT",
        "ASR_WORKERS",
        "ASR_API_KEY",
        "ASR_API_CPUS",
        "PATH",
    ]
    assert misspelt([*given, "ASR_UI_TIMEOUT_S", "ASR_API_PORT_8000_TCP_ADDR", "ASR_SHARED_DIR"]) == {
        "ASR_WORKRES": "ASR_WORKERS",
        "ASR_MODEL": "ASR_MODELS",
        "ASR_QUEUE_LIMIT": "ASR_QUEUE_LIMIT_AUDIO_S",
    }
