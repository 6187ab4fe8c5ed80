"""The table that closes a run."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from rl.report import summary_table
from tests.rl.report.folders import summary


def test_the_closing_table_shows_result_mismatch_digest_time_and_paths(tmp_path: Path) -> None:
    found = summary(weights_digest="sha256:[red]9f86")
    (tmp_path / "policy").mkdir()
    (tmp_path / "report.html").touch()
    lines = table_lines(tmp_path, found)
    assert "avg@8, before 0.125 (95% interval 0.075 to 0.175) pass@8 0.875 cons@8 0.750" in lines
    assert "avg@8, after 0.625 (95% interval 0.575 to 0.675) pass@8 0.875 cons@8 0.750" in lines
    assert "mismatch 0 of 940,440 tokens" in lines
    assert "mismatch, whole vocabulary 0 of 80 rows" in lines
    assert "weights digest sha256:[red]9f86" in lines
    assert "time warm start 31.2 s, training 2 min 24 s, total 3 min 08 s" in lines
    assert f"report {tmp_path / 'report.html'}" in lines and f"policy {tmp_path / 'policy'}" in lines


def test_the_closing_table_of_a_run_that_failed_early(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    lines = table_lines(tmp_path, {"status": "failed"})
    assert lines[0] == "run failed" and f"metrics {tmp_path / 'metrics.jsonl'}" in lines
    assert not any(line.startswith(("report", "policy")) for line in lines)


def table_lines(run_dir: Path, found: dict[str, Any]) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=250).print(summary_table(run_dir, found))
    return [" ".join(line.replace("│", " ").split()) for line in output.getvalue().splitlines()]
