"""Hold every rendered manifest against the Kubernetes schemas, strictly, for every supported version.

    .venv-infra/bin/python tests/infra/manifests.py

Strict means that an unknown or misspelt field is an error. An object that many combinations share is
checked once per version.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.infra.render import everything

VERSIONS = tuple(f"1.{minor}" for minor in range(29, 38))


def main() -> int:
    objects: dict[str, tuple[str, dict[str, Any]]] = {}
    rendered = 0
    for name, manifests in everything():
        rendered += 1
        identities = set()
        for document in yaml.safe_load_all(manifests):
            identity = (document["kind"], document["metadata"].get("namespace"), document["metadata"]["name"])
            if identity in identities:
                print(f"FAILED  {name}: {identity} comes twice")
                return 1
            identities.add(identity)
            digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
            objects.setdefault(digest, (name, document))
    failures = 0
    for version in VERSIONS:
        for name, document in objects.values():
            try:
                kubernetes_validate.validate(document, version, strict=True)
            except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
                failures += 1
                print(f"FAILED  {version} {name}: {document['kind']} {document['metadata']['name']}: {error}")
    checked = len(objects) * len(VERSIONS)
    print(
        f"{rendered} overlays and combinations, {len(objects)} different objects, "
        f"{len(VERSIONS)} versions ({VERSIONS[0]} to {VERSIONS[-1]}): {checked - failures} of {checked} valid"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
