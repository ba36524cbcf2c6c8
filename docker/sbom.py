"""List what is inside an image as CycloneDX 1.6; run it *inside* the image, it is standard library only.

    docker run --rm --network none -v "$PWD/docker/sbom.py:/sbom.py:ro" --entrypoint python3 \
        IMAGE /sbom.py NAME VERSION

Components are the Python distributions of the running interpreter, the Debian packages of dpkg's status
file, and the model bundles with their files' SHA-256. The output is sorted and carries no time stamp, so two
equal images give equal documents.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import sys
from pathlib import Path

Component = dict[str, object]


def python_components() -> list[Component]:
    """One component per installed distribution, named as PyPI names it."""
    found: dict[str, Component] = {}
    for distribution in importlib.metadata.distributions():
        raw = distribution.metadata["Name"]
        name = re.sub(r"[-_.]+", "-", raw).lower()
        purl = f"pkg:pypi/{name}@{distribution.version}"
        found[purl] = {
            "type": "library",
            "bom-ref": purl,
            "name": name,
            "version": distribution.version,
            "purl": purl,
        }
        if "License-Expression" in distribution.metadata:
            found[purl]["licenses"] = [{"expression": distribution.metadata["License-Expression"]}]
    return [found[key] for key in sorted(found)]


def debian_components(status: Path = Path("/var/lib/dpkg/status")) -> list[Component]:
    """One component per installed Debian package; none on another system."""
    if not status.is_file():
        return []
    components: list[Component] = []
    for paragraph in status.read_text(encoding="utf-8").split("\n\n"):
        fields = dict(re.findall(r"^([A-Z][A-Za-z-]*): (.*)$", paragraph, flags=re.MULTILINE))
        if not fields.get("Status", "").endswith(" installed"):
            continue
        version = fields["Version"]
        purl = (
            f"pkg:deb/debian/{fields['Package']}@{version.replace('+', '%2B')}?arch={fields['Architecture']}"
        )
        components.append(
            {"type": "library", "bom-ref": purl, "name": fields["Package"], "version": version, "purl": purl}
        )
    return sorted(components, key=lambda component: str(component["bom-ref"]))


def model_components(models: Path = Path("/app/models")) -> list[Component]:
    """One component per bundle, with the digests that its manifest promises."""
    components: list[Component] = []
    for manifest_path in sorted(models.glob("*/manifest.json")):
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
        components.append(
            {
                "type": "machine-learning-model",
                "bom-ref": f"model:{manifest['name']}@{manifest['version']}",
                "name": manifest["name"],
                "version": manifest["version"],
                "licenses": [{"license": {"name": manifest["licence"]}}],
                "properties": [
                    {"name": f"sha256:{file}", "value": digest}
                    for file, digest in sorted(manifest["files"].items())
                ],
            }
        )
    return components


def document(name: str, version: str) -> dict[str, object]:
    """The whole bill of materials of the image that this runs in."""
    image = {"type": "container", "bom-ref": f"{name}@{version}", "name": name, "version": version}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": image,
            "properties": [{"name": "python", "value": platform.python_version()}],
        },
        "components": [*model_components(), *python_components(), *debian_components()],
    }


if __name__ == "__main__":
    json.dump(document(sys.argv[1], sys.argv[2]), sys.stdout, indent=1, sort_keys=True)
    print()
