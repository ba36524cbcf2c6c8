"""The table of the `benchmark` stage."""

from __future__ import annotations

from training.benchmark import COLUMNS, Row, table
from training.evaluate import ErrorRates


def test_the_table_names_its_columns() -> None:
    row = Row("int8", 7_600_000, 3.26, 2.5, 0.00066, ErrorRates(1, 8, 0.125, 0.0, 0.25, 0.05))
    head, rule, line = table([row.columns()]).splitlines()
    assert head == f"| {' | '.join(COLUMNS)} |"
    assert rule == f"|{' --- |' * len(COLUMNS)}"
    assert line == "| int8 | 7.6 | 3.3 | 2.50 | 0.0007 | 12.50% | 5.00% |"
