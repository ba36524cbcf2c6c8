"""The table of one product in every form; what it measures is checked, not how long it takes."""

from __future__ import annotations

import sys

import pytest

from api.kernels import instructions
from training import bench_products


def test_every_form_gives_the_product(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_products, "SHAPES", ((256, 64), (128, 20_000)))
    monkeypatch.setattr(sys, "argv", ["bench_products", "--rows", "1,3", "--rounds", "1"])
    assert bench_products.main() == 0
    _, _, *lines = capsys.readouterr().out.splitlines()
    ours = "" if instructions() == "onnxruntime" else " four bits, ours |"
    assert lines[0] == f"| product | float32 | INT8 | four bits | four bits, widened |{ours}"
    assert [line.split(" |")[0] for line in lines[2:]] == [
        "| 1 x 256 by 256 x 64",
        "| 1 x 128 by 128 x 20000",
        "| 3 x 256 by 256 x 64",
    ], "tokens are told one at a time"
