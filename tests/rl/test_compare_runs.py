"""Runs side by side: what differs, what is equal in every bit, and what cannot be compared."""

import json
from pathlib import Path
from typing import Any

import pytest

from rl.compare_runs import compare_runs, comparison_charts, read_runs, write_comparison
from rl.eval_compare import compare
from tests.rl.command import lockstep, refusal
from tests.rl.page import Page


def evaluation(correct: list[int]) -> dict[str, Any]:
    """Of 4 samples a problem."""
    rows = [{"id": f"p{place}", "answer": "1", "correct": count} for place, count in enumerate(correct)]
    mean = sum(correct) / 4 / len(correct)
    settings = {"samples": 4, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "problems_digest": "d"}
    return {"avg@4": mean, "ci95": {"avg@4": [0.0, 1.0]}, **settings, "rows": rows}


def make_run(
    path: Path, reward: float, correct: list[int] | None = None, digest: str = "aa" * 32, recipe: str = "seed: 0\n"
) -> Path:
    (path / "evaluation").mkdir(parents=True)
    (path / "recipe.yaml").write_text(f"name: maths\n{recipe}")
    records = [
        {"step": step, "reward/mean": reward, "time/step": step + 0.5, "mismatch/tokens_compared": 100,
         "mismatch/tokens_unequal": 0}
        for step in (1, 2, 3)
    ]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    summary: dict[str, Any] = {"status": "completed", "regime": "aligned", "weights_digest": digest}
    if correct:
        found = evaluation(correct)
        (path / "evaluation" / "step_000003.json").write_text(json.dumps(found))
        summary["evaluation"] = {"after": {key: value for key, value in found.items() if key != "rows"}}
    (path / "summary.json").write_text(json.dumps(summary))
    return path


FIRST, SECOND = [1, 2, 3, 0, 4, 1], [4, 4, 3, 2, 4, 3]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        make_run(tmp_path / "a", 0.25, FIRST),
        make_run(tmp_path / "b", 0.5, SECOND, "bb" * 32, "seed: 1\nloop: {steps: 3}\n"),
        make_run(tmp_path / "c", 0.25, digest="aa" * 32),
    ]


def test_results_stand_side_by_side(runs: list[Path]) -> None:
    rows = dict(compare_runs(read_runs(runs)).rows)
    assert rows["steps"] == ["3"] * 3
    assert rows["seconds a step, median"] == ["2.50"] * 3
    assert rows["mismatch"] == ["0 of 300 tokens"] * 3
    assert rows["after training"] == ["avg@4 0.4583 (0.0000 to 1.0000)", "avg@4 0.8333 (0.0000 to 1.0000)", "-"]
    assert "tokens/s sampled, median" not in rows and "before training" not in rows


def test_the_last_evaluations_are_tested_in_pairs(runs: list[Path]) -> None:
    found = compare_runs(read_runs(runs))
    rows, expected = dict(found.rows), compare(evaluation(FIRST), evaluation(SECOND))
    assert rows["p-value, paired, exact"] == ["-", f"{expected['p_value']:.2g}", "-"]
    assert rows["last evaluation against the first run's"][1].startswith("+0.3750 (")
    assert found.notes == ["c has no evaluation, so c is not tested against a"]


def test_other_problems_are_not_tested(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / "a", 0.5, FIRST), make_run(tmp_path / "b", 0.5, FIRST[:-1])]
    found = compare_runs(read_runs(paths))
    assert found.notes == [
        "b is not tested against a: the two evaluations are of different problems: 1 only in the first (p5); "
        "evaluate both policies on one data set"
    ]
    assert "p-value, paired, exact" not in dict(found.rows)


def test_recipes_are_shown_where_they_differ(runs: list[Path]) -> None:
    assert compare_runs(read_runs(runs)).recipe == [("seed", ["0", "1", "0"]), ("loop.steps", ["-", "3", "-"])]


def test_equal_weights_are_named(runs: list[Path]) -> None:
    assert compare_runs(read_runs(runs)).same_weights == "a and c ended in the same weights, bit for bit"
    assert compare_runs(read_runs(runs[:2])).same_weights == "no two of them ended in the same weights"


def test_a_run_has_one_colour_in_every_chart(runs: list[Path]) -> None:
    charts = {chart.title: chart for chart in comparison_charts(read_runs(runs))}
    assert list(charts) == ["Reward", "Evaluation", "Tokens unequal", "Time of a step"]
    assert [(one.label, one.colour) for one in charts["Reward"].series] == [("a", 0), ("b", 1), ("c", 2)]
    assert [(one.label, one.colour, one.points) for one in charts["Evaluation"].series] == [
        ("a", 0, [(3.0, pytest.approx(11 / 24))]),
        ("b", 1, [(3.0, pytest.approx(20 / 24))]),
    ]


def test_details_of_a_mismatch_are_drawn_where_there_is_one(runs: list[Path]) -> None:
    for run, difference in zip(runs, (0.0, 0.0, 0.25), strict=True):
        (run / "metrics.jsonl").write_text(f'{{"step": 1, "mismatch/log_prob_diff_max": {difference}}}\n')
    title = "Largest log-prob difference"
    assert [title in {chart.title for chart in comparison_charts(read_runs(some))} for some in (runs[:2], runs)] == [
        False,
        True,
    ]


def test_folders_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / parent / "run", 0.5) for parent in ("x", "y")]
    assert [run.name for run in read_runs(paths)] == ["x/run", "y/run"]
    with pytest.raises(ValueError, match="is given twice; compare different runs"):
        read_runs([paths[0], paths[0]])


def test_the_page_shows_hostile_names_as_text(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / name, 0.5, recipe=f"note: {name}\n") for name in ("<b>bold<script>", "plain")]
    write_comparison(tmp_path / "page.html", compare_runs(read_runs(paths)))
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and "&lt;b&gt;bold&lt;script&gt;" in page


def test_the_command(runs: list[Path], tmp_path: Path) -> None:
    result = lockstep("compare", *runs, "--page", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "a and c ended in the same weights, bit for bit" in result.stdout
    assert Page((tmp_path / "page.html").read_text()).words.count("Evaluation") == 1
    assert refusal("compare", runs[0]) == "1 runs given; a comparison is of 2 to 8"
    assert refusal("compare", runs[0], tmp_path).endswith("holds no run (no recipe.yaml); give the folders of runs")
