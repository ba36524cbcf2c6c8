"""Render the Kubernetes manifests as kustomize does: every overlay, and every combination of components."""

from __future__ import annotations

import itertools
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMPONENTS = tuple(sorted(path.parent.name for path in ROOT.glob("k8s/components/*/kustomization.yaml")))
OVERLAYS = tuple(sorted(path.parent.name for path in ROOT.glob("k8s/overlays/*/kustomization.yaml")))


def kustomize(folder: Path) -> str:
    """Manifests of a kustomization. Raises RuntimeError with kustomize's message."""
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{folder}: {done.stderr.strip()}")
    return done.stdout


def overlay(name: str) -> str:
    """Manifests of one overlay."""
    return kustomize(ROOT / "k8s" / "overlays" / name)


def combination(components: tuple[str, ...]) -> str:
    """Manifests of both bases with these components and nothing else."""
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as temporary:
        folder = Path(temporary)

        def relative(*parts: str) -> str:
            return os.path.relpath(ROOT.joinpath("k8s", *parts), folder)

        lines = ["apiVersion: kustomize.config.k8s.io/v1beta1", "kind: Kustomization", "resources:"]
        lines += [f"  - {relative(*parts)}" for parts in (("namespaces",), ("base", "api"), ("base", "ui"))]
        if components:
            lines += ["components:", *(f"  - {relative('components', name)}" for name in components)]
        (folder / "kustomization.yaml").write_text("\n".join(lines) + "\n")
        return kustomize(folder)


def everything() -> Iterator[tuple[str, str]]:
    """Name and manifests of every overlay and of every subset of the components."""
    for name in OVERLAYS:
        yield f"overlay {name}", overlay(name)
    for count in range(len(COMPONENTS) + 1):
        for chosen in itertools.combinations(COMPONENTS, count):
            yield f"components {'+'.join(chosen) or 'none'}", combination(chosen)
