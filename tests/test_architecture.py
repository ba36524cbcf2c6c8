"""The import rule of docs/architecture.md: training may import api, api neither; ui speaks HTTP only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"api", "ui", "training", "serverless", "loadtest"}
MAY_IMPORT = {
    "api": {"api"},
    "ui": {"ui"},
    "training": {"training", "api"},
    "serverless": {"serverless", "api"},
}
TRAINING_ONLY = {"torch", "lightning", "transformers", "datasets", "onnx", "streamlit"}


def imported_roots(path: Path) -> set[str]:
    """Top-level names of every absolute import in one file, those inside functions included."""
    roots: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            roots.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            roots.add(node.module.split(".")[0])
    return roots


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_packages_import_only_what_the_house_allows(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package} has no Python file: the rule would pass by looking at nothing"
    for path in files:
        forbidden = (imported_roots(path) & OURS) - MAY_IMPORT[package]
        assert not forbidden, f"{path.relative_to(ROOT)} imports {sorted(forbidden)}"


def test_the_service_needs_nothing_that_belongs_to_training_or_the_page() -> None:
    for path in sorted((ROOT / "api").rglob("*.py")):
        forbidden = imported_roots(path) & TRAINING_ONLY
        assert not forbidden, f"{path.relative_to(ROOT)} imports {sorted(forbidden)}"


def test_torch_is_in_no_lock_of_the_service() -> None:
    for lock in ("api.txt", "ui.txt"):
        names = {
            line.split("==")[0]
            for line in (ROOT / "requirements" / lock).read_text().splitlines()
            if "==" in line
        }
        assert "fastapi" in names or "streamlit" in names
        assert not names & {"torch", "lightning", "transformers"}, lock


def test_rule_would_notice_a_forbidden_import(tmp_path: Path) -> None:
    file = tmp_path / "sly.py"
    file.write_text("def later():\n    from training.export import export\n    import torch.nn\n")
    assert imported_roots(file) == {"training", "torch"}
