"""The programs around the images: bill of materials, smoke test, and the project's own input to the build."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from api.settings import Settings
from tests.infra.render import ROOT


def program(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, ROOT / "docker" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_bill_of_materials_names_what_is_installed() -> None:
    document = program("sbom").document("asr-api", "1.2.3")
    components = {component["name"]: component for component in document["components"]}
    assert document["specVersion"] == "1.6"
    assert components["onnxruntime"]["purl"].startswith("pkg:pypi/onnxruntime@")
    references = [component["bom-ref"] for component in document["components"]]
    assert len(set(references)) == len(references)


def test_bill_of_materials_is_the_same_twice() -> None:
    command = [sys.executable, str(ROOT / "docker/sbom.py"), "asr-api", "1.2.3"]
    first, second = (subprocess.run(command, capture_output=True, check=True).stdout for _ in range(2))
    assert first == second
    assert json.loads(first)["metadata"]["component"]["version"] == "1.2.3"


def test_bill_of_materials_reads_debian_packages(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text(
        "Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nVersion: 2.36-9+deb12u7\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n"
    )
    (only,) = program("sbom").debian_components(status)
    assert only["purl"] == "pkg:deb/debian/libc6@2.36-9%2Bdeb12u7?arch=amd64"


def test_smoke_test_says_what_is_wrong_with_a_dead_address(tmp_path: Path) -> None:
    audio = tmp_path / "a.wav"
    audio.write_bytes(b"RIFF")
    command = [sys.executable, ROOT / "docker/smoke.py", "--url", "http://127.0.0.1:1", "--audio", audio]
    done = subprocess.run([*command, "--timeout-s", "0.1"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "not ready within" in done.stderr


def test_warm_up_tone_is_a_wave_file_of_the_asked_length() -> None:
    import io
    import wave

    with wave.open(io.BytesIO(program("warm_up").tone(48_000, 0.5))) as file:
        assert (file.getframerate(), file.getnframes(), file.getnchannels()) == (48_000, 24_000, 1)


@pytest.mark.parametrize(
    "name",
    ["docker/api.Dockerfile", "docker/ui.Dockerfile", "docker/training.Dockerfile", "serverless/Dockerfile"],
)
def test_what_a_dockerfile_copies_is_in_the_build_context(name: str) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:].split("/")[0] for line in lines if line.startswith("!")}
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("COPY ") and "--from=" not in line:
            source = next(word for word in line.split()[1:] if not word.startswith("--"))
            assert source.split("/")[0] in allowed


DOCKERFILES = {
    "docker/api.Dockerfile": "api",
    "docker/ui.Dockerfile": "ui",
    "serverless/Dockerfile": "serverless",
}


@pytest.mark.parametrize("dockerfile", DOCKERFILES)
def test_what_an_image_sets_is_what_the_code_reads(dockerfile: str) -> None:
    """A name that nobody reads is a promise that the image does not keep: its version, for one."""
    known = {f"ASR_{name.upper()}" for name in Settings.model_fields}
    for folder in {DOCKERFILES[dockerfile], "api"}:
        for path in (ROOT / folder).rglob("*.py"):
            known |= set(re.findall(r"environ(?:\.get\(|\[)\"(ASR_\w+)\"", path.read_text()))
            known |= set(re.findall(r"\((?:env|environ), \"(ASR_\w+)\"", path.read_text()))
            known |= set(re.findall(r"\benv\.get\(\"(ASR_\w+)\"", path.read_text()))
    final = (ROOT / dockerfile).read_text().split(" AS final")[1]
    names = set(re.findall(r"^(?:ENV)?\s+(ASR_\w+)=", final, flags=re.MULTILINE))
    assert names
    assert names <= known


def stages(dockerfile: str) -> dict[str, str]:
    """Instructions of each stage by its name."""
    text = re.sub(r"^#.*\n", "", (ROOT / dockerfile).read_text(), flags=re.MULTILINE)
    return dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM |\Z)", text, flags=re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("dockerfile", ["docker/api.Dockerfile", "serverless/Dockerfile"])
def test_decoders_and_kernels_are_compiled_for_the_image_and_their_compilers_stay_behind(
    dockerfile: str,
) -> None:
    found = stages(dockerfile)
    assert found["compiled"] == stages("docker/api.Dockerfile")["compiled"], "one way to compile them"
    assert "api.compiled.build --required" in found["compiled"]
    assert "kernels/build.py --required" in found["compiled"]
    copies = [line for stage in found.values() for line in stage.splitlines() if "--from=compiled" in line]
    # A folder: where there are no kernels to compile theirs is empty, and a missing file ends the build.
    assert copies == ["COPY --from=compiled /build/library/ /app/api/"]
    application = found["application"]
    order = ["COPY api ", copies[0], "prune.sh /opt/venv numba llvmlite", "warm_up.py\n"]
    places = [application.rindex(part) for part in order]
    assert places == sorted(places), "what is taken away is taken away before the image is tried"


@pytest.mark.parametrize(
    ("kind", "dockerfile"),
    [("api", "docker/api.Dockerfile"), ("ui", "docker/ui.Dockerfile"), ("lambda", "serverless/Dockerfile")],
)
def test_every_image_is_built_on_the_pinned_base(tmp_path: Path, kind: str, dockerfile: str) -> None:
    docker = tmp_path / "docker"
    docker.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/asked\n')
    docker.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "VERSION": "1.2.3", "MODEL": "some-model"}
    subprocess.run([str(ROOT / "docker/build.sh"), kind], env=environment, check=True)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[asked.index("--file") + 1] == dockerfile
    assert [word for word in asked if word.startswith("--tag")] == [f"--tag=asr-{kind}:1.2.3"]
    assert any(re.fullmatch(r"BASE_IMAGE=\S+@sha256:[0-9a-f]{64}", word) for word in asked)
    assert ("MODEL=some-model" in asked) == (kind != "ui")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("version", "tags"),
    [("1.2.3", ["1.2.3"]), (COMMIT, [COMMIT, COMMIT[:12]]), (COMMIT[:12], [COMMIT[:12]]), ("e2e", ["e2e"])],
)
@pytest.mark.parametrize("buildx", [True, False])
def test_only_a_build_that_is_named_by_its_commit_takes_the_commits_tag(
    tmp_path: Path, version: str, tags: list[str], buildx: bool
) -> None:
    """A release would push it once more, for another image than the one that was proved under it."""
    docker = tmp_path / "docker"
    docker.write_text(
        f"""#!/bin/sh
case "$1 $2" in
  'buildx version') exit {0 if buildx else 1} ;;
  'version --format') echo 20.10.24 ;;
  'buildx build' | 'build --file') printf "%s\\n" "$@" >{tmp_path}/asked ;;
  push*) echo "$2" >>{tmp_path}/pushed ;;
esac
"""
    )
    docker.chmod(0o755)
    for tool in ("bash", "dirname", "sed", "sort", "cut", "date", "mkdir"):  # and no docker of this machine
        (tmp_path / tool).symlink_to(shutil.which(tool) or "")
    environment = {"PATH": str(tmp_path), "VERSION": version, "REVISION": COMMIT[:12], "PUSH": "1"}
    subprocess.run([ROOT / "docker/build.sh", "api", "r.example/asr-api"], env=environment, check=True)
    expected = [f"r.example/asr-api:{tag}" for tag in tags]
    asked = (tmp_path / "asked").read_text().splitlines()
    assert [word.removeprefix("--tag=") for word in asked if word.startswith("--tag")] == expected
    if buildx:
        assert "--push" in asked
    else:
        assert (tmp_path / "pushed").read_text().split() == expected


def test_a_build_that_fails_says_how_to_take_another_base_or_a_mirror(tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\n[ "$2" = version ] || { echo "no such host" >&2; exit 17; }\n')
    docker.chmod(0o755)
    done = subprocess.run(
        [str(ROOT / "docker/build.sh"), "lambda"], env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 17
    told = done.stderr.splitlines()[-1]
    assert "BASE_IMAGE=" in told
    assert "PIP_CONF=" in told


def test_what_was_compiled_here_stays_out_of_the_build_context() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    after = lines[lines.index("!api/**") :]  # of the lines that match a file, the last one counts
    assert "**/*.so" in after


@pytest.mark.parametrize("dockerfile", ["docker/api.Dockerfile", "serverless/Dockerfile"])
def test_an_image_says_its_version_and_revision(dockerfile: str) -> None:
    final = (ROOT / dockerfile).read_text().split(" AS final")[1]
    for name in ("VERSION", "REVISION"):
        assert f"ARG {name}=" in final
        assert f"ASR_{name}=${{{name}}}" in final
        assert f'"ASR_{name}"' in (ROOT / "api/main.py").read_text()


def test_the_digests_of_all_pinned_images_are_asked_for(tmp_path: Path) -> None:
    """By the image's name alone: in the Compose files it stands behind ``${VARIABLE:-``."""
    asked = tmp_path / "asked"
    docker = tmp_path / "docker"
    docker.write_text(f'#!/bin/sh\necho "$4" >>{asked}\necho sha256:{"0" * 64}\n')
    docker.chmod(0o755)
    command = [str(ROOT / "docker/pin_images.sh"), "--check"]
    done = subprocess.run(
        command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr  # every digest differs
    names = set(asked.read_text().split())
    files = [ROOT / "docker" / f"compose.{part}.yml" for part in ("api", "monitoring")]
    pins = "".join(path.read_text() for path in files)
    assert set(re.findall(r":-([^@{}]+)@sha256", pins)) < names
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9./-]*:[\w.-]+", name) for name in names), names
