"""Every setting of the service: one frozen class, read once, prefix ``ASR_``.

``.env.example`` is generated from this file (``asr settings --env-example``); a test keeps the two together.
Traces follow OpenTelemetry's own ``OTEL_*`` variables and are not repeated here.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import socket
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from api.errors import SettingsError
from api.keys import ApiKey
from api.manifest import GraphChoice

MODEL_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
HOST_NAME = re.compile(r"[\w-]{1,63}(\.[\w-]{1,63})*\.?")
ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[A-Za-z0-9_.-]+)(:(?P<port>[0-9]{1,5}))?"
)


def _split(value: object) -> object:
    """A comma-separated variable as a list without empty entries."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _temporary_folder() -> Path:
    """The system's; where none can be written to, the one of which ``check_spool_dir`` then complains."""
    try:
        return Path(tempfile.gettempdir())
    except FileNotFoundError:
        return Path("/tmp")  # noqa: S108


Names = Annotated[tuple[str, ...], NoDecode]


ENV_FILE = Path(".env")
"""Read in the folder where the service is started; the environment wins."""


class Settings(BaseSettings):
    """Values are checked together at start; an unsafe or impossible one refuses to start, by name."""

    model_config = SettingsConfigDict(
        env_prefix="ASR_", frozen=True, extra="ignore", env_ignore_empty=True, populate_by_name=True
    )

    # --- where it listens
    env: Literal["development", "production"] = Field(
        "development", description="Name of the environment, shown in logs, metrics and traces."
    )
    host: str = Field(
        "127.0.0.1",
        description="Address to listen on. 127.0.0.1 keeps the service to this machine; 0.0.0.0 (containers) "
        "needs ASR_API_KEYS, or ASR_ALLOW_ANONYMOUS=true said explicitly.",
    )
    port: int = Field(8000, ge=0, le=65535, description="TCP port; 0 lets the system choose a free one.")
    max_connections: int = Field(
        2048,
        ge=8,
        le=65536,
        description="Open connections; above it new ones get 503. Keep 128 below `ulimit -Hn`.",
    )
    keep_alive_s: int = Field(
        75,
        ge=1,
        le=3600,
        description="Idle seconds before a kept connection closes; above the load balancer's.",
    )
    head_timeout_s: float = Field(
        15.0,
        gt=0,
        le=600,
        description="Seconds for a request's head before the connection closes: slowloris.",
    )
    forwarded_allow_ips: str = Field(
        "127.0.0.1",
        description="Proxies whose X-Forwarded-* headers are believed: the balancer's addresses or networks "
        "(10.0.0.0/8), comma list, or *.",
    )

    # --- models
    models_dir: Path = Field(
        Path("models"), description="Folder that holds the bundles, one folder per model."
    )
    models: Names = Field(
        ("en-moonshine-tiny",),
        description="Models to load, comma list. Each costs its size in memory, twice where small.",
    )
    default_model: str = Field(
        "",
        description="Model that answers when none is named, and `whisper-1`; empty: the first of ASR_MODELS.",
    )
    graph: GraphChoice = Field(
        "auto",
        description="Graph of the bundle to load; auto takes the manifest's default, or the one that it has "
        "for processors without VNNI.",
    )
    provider: Literal["auto", "cpu", "cuda", "openvino"] = Field(
        "auto",
        description="ONNX Runtime execution provider; auto takes CUDA where it really works, else the CPU.",
    )
    kernels: Literal["auto", "off"] = Field(
        "auto",
        description="Our own INT8 and 4-bit kernels on CPUs with AVX2 or VNNI; off: ONNX Runtime's alone.",
    )

    # --- engine; 0 lets calibration at start choose from the cgroup's CPU limit
    workers: int = Field(
        0,
        ge=0,
        le=256,
        description="Inference threads of all models together; 0: one per CPU core allowed.",
    )
    threads_per_worker: int = Field(
        0,
        ge=0,
        le=64,
        description="Threads inside one inference; 0: one on CPUs, where that gives most throughput.",
    )
    max_batch: int = Field(
        0,
        ge=0,
        le=256,
        description="Utterances per batch; 0: calibrated (1 or 2 win on CPUs, large ones on GPUs).",
    )
    max_batch_audio_s: float = Field(
        60.0, gt=0, le=3600, description="Padded audio-seconds per batch; bounds the memory of one inference."
    )
    calibrate: bool = Field(
        True,
        description="Measure batch sizes at start and log the choice; false takes the defaults.",
    )

    # --- queue
    queue_limit_audio_s: float = Field(
        900.0,
        gt=0,
        le=1e6,
        description="Audio-seconds that may wait; wait you accept times measured throughput.",
    )
    request_timeout_s: float = Field(
        600.0,
        gt=0,
        le=86400,
        description="Deadline of one request, queue included; above the longest file's time.",
    )
    max_segments_in_flight: int = Field(
        8, ge=1, le=256, description="Segments of one file in the queue at once; low values keep turns fair."
    )

    # --- input
    max_upload_bytes: int = Field(
        26_214_400,
        ge=1024,
        le=2**40,
        description="Bytes of one file; above is 413. 25 MiB is OpenAI's limit.",
    )
    max_audio_s: float = Field(
        7200.0, gt=0, le=86400, description="Decoded seconds of one file, counted on samples; above is 422."
    )
    max_batch_files: int = Field(16, ge=1, le=1000, description="Files in one POST /transcribe/batch.")
    max_body_bytes: int = Field(
        268_435_456,
        ge=1024,
        le=2**42,
        description="Bytes of a whole batch request; disk for spooling must hold it.",
    )
    upload_idle_timeout_s: float = Field(
        20.0,
        gt=0,
        le=3600,
        description="Seconds without a byte of an upload before 408: ends stalled clients.",
    )
    upload_timeout_s: float = Field(
        300.0,
        gt=0,
        le=86400,
        description="Seconds for a whole upload before 408: ends clients that drip bytes.",
    )
    spool_dir: Path = Field(
        _temporary_folder(),
        description="Folder for uploads over 1 MiB while they are decoded; fast, local.",
    )
    decode_threads: int = Field(
        0, ge=0, le=64, description="Threads that decode audio; 0: one per CPU core allowed, at most four."
    )
    max_beam: int = Field(
        64, ge=1, le=1024, description="Largest `beam` a request may ask for; cost grows with it."
    )
    noise_confidence: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Segments of single letters below this confidence give no text: that is how noise reads "
        "(0.4 to 0.5 on QuartzNet15x5, spelled letters 0.8 and more). Below 0.3 of it words give none, "
        "either, a word by itself below 0.6 of it; 0 keeps all.",
    )
    max_hotwords: int = Field(1000, ge=0, le=4000, description="Hotwords one request may send.")

    # --- live sessions (WebSockets)
    max_streams: int = Field(
        64,
        ge=0,
        le=65536,
        description="Live sessions (WebSockets) at once; above it 429. `make bench-live` says how many a "
        "machine carries: about 12 per core with the default model, 7 on processors without VNNI.",
    )
    stream_idle_timeout_s: float = Field(
        300.0, gt=0, le=86400, description="Seconds without a message before a live session ends."
    )
    stream_max_s: float = Field(3600.0, gt=0, le=86400, description="Seconds that a live session may last.")

    # --- stopping
    drain_grace_s: float = Field(
        0.0,
        ge=0,
        le=300,
        description="Seconds to go on accepting after SIGTERM while readiness fails; on Kubernetes "
        "longer than the readiness probe's period times its failure threshold.",
    )
    drain_timeout_s: float = Field(
        30.0,
        ge=0,
        le=3600,
        description="Seconds for accepted requests to finish; below terminationGracePeriod.",
    )

    # --- access
    api_keys: Annotated[tuple[ApiKey, ...], NoDecode] = Field(
        (),
        description="Keys as name:secret or name:sha256=<hex>, comma list; empty: open to all who reach it.",
    )
    api_keys_file: Path | None = Field(
        None, description="File with one such key per line, for mounted secrets; adds to ASR_API_KEYS."
    )
    allow_anonymous: bool = Field(
        False,
        description="true allows serving without keys on a non-loopback address: behind a gateway only.",
    )
    rate_limit_per_minute: int = Field(
        0,
        ge=0,
        le=10**6,
        description="Work requests per key (or address) and minute, bursts of a tenth; 0: no limit.",
    )
    cors_origins: Names = Field(
        (),
        description="Web origins whose pages may call the API, as browsers write them (https://app.example, "
        "http://localhost:3000), comma list, or *, without keys only; empty: none.",
    )
    docs_enabled: bool = Field(True, description="Serve /docs and /openapi.json.")
    metrics_enabled: bool = Field(True, description="Serve /metrics; false where the port is public.")

    # --- telemetry
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe level logged."
    )
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="json for machines, console for people; auto: console on a terminal, else json."
    )
    log_text: bool = Field(
        False, description="true writes transcripts into the log: personal data, debugging only."
    )

    @field_validator("models", "cors_origins", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        return _split(value)

    @field_validator("api_keys", mode="before")
    @classmethod
    def _parse_keys(cls, value: object) -> object:
        entries = _split(value)
        if isinstance(entries, list | tuple):
            return tuple(
                entry if isinstance(entry, ApiKey) else ApiKey.parse(str(entry)) for entry in entries
            )
        return entries

    @field_validator("models")
    @classmethod
    def _safe_model_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError("name at least one model")
        if len(set(names)) != len(names):
            raise ValueError("a model is named twice")
        for name in names:
            if not MODEL_NAME.match(name):
                raise ValueError(f"{name!r} is not a model name (letters, digits, dot, dash, underscore)")
        return names

    @field_validator("host")
    @classmethod
    def _address_or_name(cls, host: str) -> str:
        if _ip_address(host) is None and not HOST_NAME.fullmatch(host):
            raise ValueError(
                "is neither an IP address nor a host name (IPv6 has no brackets, and the port is ASR_PORT)"
            )
        return host

    @field_validator("forwarded_allow_ips")
    @classmethod
    def _addresses_or_networks(cls, value: str) -> str:
        """uvicorn takes anything, and what is no address is then the name of no peer."""
        for entry in [part.strip() for part in value.split(",") if part.strip()]:
            if entry == "*" and value != "*":
                raise ValueError("* believes everybody, and stands alone")
            try:
                if entry != "*":
                    _ = ipaddress.ip_network(entry) if "/" in entry else ipaddress.ip_address(entry)
            except ValueError as error:
                raise ValueError(f"only addresses, networks such as 10.0.0.0/8, or *: {error}") from None
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins_that_browsers_send(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin not in ("*", "null") and (problem := _origin_problem(origin)):
                raise ValueError(f"{origin!r} matches no page: {problem}")
        return origins

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if self.default_model and self.default_model not in self.models:
            problems.append(
                f"ASR_DEFAULT_MODEL={self.default_model}: is not one of ASR_MODELS ({', '.join(self.models)})"
            )
        if not self.has_keys and not self.allow_anonymous and not is_loopback(self.host):
            unknown = _unknown_name(self.host)
            problems.append(
                f"ASR_HOST={self.host}: is no address of this machine: {unknown}"
                if unknown
                else f"ASR_HOST={self.host}: is reachable from other machines without API keys; set "
                "ASR_API_KEYS, or ASR_ALLOW_ANONYMOUS=true to say that this is meant"
            )
        if "*" in self.cors_origins and self.has_keys:
            problems.append(
                "ASR_CORS_ORIGINS=*: any web page could use the keys of its visitors; list the origins"
            )
        if self.max_body_bytes < self.max_upload_bytes:
            problems.append(
                f"ASR_MAX_BODY_BYTES={self.max_body_bytes}: must be at least ASR_MAX_UPLOAD_BYTES "
                f"({self.max_upload_bytes})"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def has_keys(self) -> bool:
        """Whether requests need a key."""
        return bool(self.api_keys) or self.api_keys_file is not None

    @property
    def default_model_name(self) -> str:
        """Name of the model behind an empty ``model`` field and behind ``whisper-1``."""
        return self.default_model or self.models[0]

    def key_file_entries(self) -> list[str]:
        """Keys of the file as they are written there, none without a file. Raises OSError, UnicodeError."""
        if self.api_keys_file is None:
            return []
        lines = self.api_keys_file.read_text(encoding="utf-8").splitlines()
        return [line.strip() for line in lines if line.strip() and not line.startswith("#")]

    def check_spool_dir(self) -> None:
        """Raise SettingsError where no file can be made in ``spool_dir``: only large uploads would notice."""
        try:
            with tempfile.TemporaryFile(dir=self.spool_dir):
                pass
        except OSError as error:
            raise SettingsError(
                f"ASR_SPOOL_DIR={self.spool_dir}: no file can be made there: {error.strerror}"
            ) from error

    def load_keys(self) -> tuple[ApiKey, ...]:
        """Keys from the variable and the file. Raises SettingsError when the file is unreadable or empty."""
        if self.api_keys_file is None:
            return self.api_keys
        try:
            keys = tuple(ApiKey.parse(entry) for entry in self.key_file_entries())
        except (OSError, ValueError) as error:
            raise SettingsError(f"ASR_API_KEYS_FILE={self.api_keys_file}: {error}") from error
        if not keys:
            raise SettingsError(f"ASR_API_KEYS_FILE={self.api_keys_file}: holds no key")
        return self.api_keys + keys


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _unknown_name(host: str) -> str | None:
    """Why this name has no address, None where it has one (or is one)."""
    if _ip_address(host) is not None:
        return None
    try:
        socket.getaddrinfo(host, None, socket.AF_INET)
    except OSError as error:
        return error.strerror or str(error)
    except UnicodeError as error:
        return str(error)
    return None


def _origin_problem(origin: str) -> str | None:
    """Why no browser sends this as its ``Origin``: it is compared letter by letter."""
    found = ORIGIN.fullmatch(origin)
    if found is None:
        return "an origin is scheme://host or scheme://host:port, without a path, a slash at its end or a *"
    if found["scheme"] not in ("http", "https"):
        return None
    if origin != origin.lower():
        return "browsers write host names in small letters"
    if found["port"] == {"http": "80", "https": "443"}[found["scheme"]]:
        return f"browsers leave out port {found['port']} after {found['scheme']}://"
    return None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    address = _ip_address(host)
    return address is not None and address.is_loopback


def load_settings(env_file: Path | str | None = ENV_FILE, **overrides: Any) -> Settings:
    """Read the environment (and ``.env``), or raise SettingsError with one line per bad variable."""
    try:
        return Settings(_env_file=env_file, **overrides)  # type: ignore[call-arg]  # known to pydantic-settings
    except ValidationError as error:
        raise SettingsError("\n".join(_problem_line(problem) for problem in error.errors())) from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{env_file}: is not UTF-8 text ({error.reason} at byte {error.start})") from None


def misspelt(names: Iterable[str]) -> dict[str, str]:
    """Variables that are no setting but nearly the name of one -> that name.

    Not every other ``ASR_*``: Compose, the page and clients have some of their own.
    """
    settings = [f"ASR_{name.upper()}" for name in Settings.model_fields]
    found = {}
    for name in names:
        if not name.startswith("ASR_") or name.startswith("ASR_UI_") or name in (*settings, "ASR_API_KEY"):
            continue
        longer = [setting for setting in settings if setting.startswith(f"{name}_")]
        if likely := longer or difflib.get_close_matches(name, settings, 1, 0.85):
            found[name] = likely[0]
    return found


def _problem_line(problem: Any) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0])
    variable = name.upper() if name.upper().startswith("ASR_") else f"ASR_{name.upper()}"
    if "KEY" in variable:
        return f"{variable}: {message}"
    return f"{variable}={problem['input']}: {message}"
