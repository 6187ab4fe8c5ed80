"""The report: it shows what the run recorded, stays small, and nothing from model or data becomes an element."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from rl.monitor import Record
from rl.report import duration, summary_table, write_report
from rl.report_charts import build_charts, mismatch_totals
from rl.report_rollouts import MAX_COMPLETIONS, MAX_GROUPS, MAX_TOKENS, read_groups
from rl.report_svg import Chart, Series, tick_label, ticks
from tests.rl.page import HOSTILE, Page


def evaluation(score: float) -> dict[str, Any]:
    length = {"mean": 41.25, "p50": 40.0, "p90": 60.0, "max": 96}
    return {
        "avg@8": score,
        "pass@8": 0.875,
        "cons@8": 0.75,
        "ci95": {"avg@8": [score - 0.05, score + 0.05], "pass@8": [0.8, 0.9], "cons@8": [0.7, 0.8]},
        "problems": 200,
        "samples": 8,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 96,
        "seed": 0,
        "length": {"all": length, "correct": length, "incorrect": None},
        "truncated_fraction": 0.02,
        "no_answer_fraction": 0.03,
        "verifier_failures": 0,
        "by_family": {"addition": score},
    }


def summary(**changes: Any) -> dict[str, Any]:
    return {
        "status": "completed",
        "steps": 40,
        "evaluation": {"before": evaluation(0.125), "after": evaluation(0.625)},
        "mismatch": {"tokens_compared": 940440, "tokens_unequal": 0, "full_vocab_rows": 80, "full_vocab_unequal": 0},
        "weights_digest": "sha256:9f86d081",
        "durations": {"warm_start": 31.2, "training": 144.0, "total": 188.0},
        "versions": {"torch": "2.13.0"},
        "parameters": 1204224,
        "regime": "aligned",
        **changes,
    }


def metrics(step: int) -> Record:
    return {
        "step": step,
        "reward/mean": 0.5,
        "length/mean": 40.0,
        "length/max": 96.0,
        "policy/entropy": 0.5,
        "policy/grad_norm": 0.25,
        "mismatch/tokens_compared": 100,
        "mismatch/tokens_unequal": 0,
        "mismatch/log_prob_diff_max": 0.0,
        "time/rollout": 2.0,
        "time/train": 1.0,
        "rollout/tokens_per_second": 9000.0,
    }


def group(step: int, completions: int = 2, tokens: int = 3, text: Callable[[str], str] = str) -> dict[str, Any]:
    completion = {
        "text": text("the sum is 7"),
        "tokens": [text(" seven")] * tokens,
        "rollout_log_probs": [-0.5] * tokens,
        "log_probs": [-0.5] * tokens,
        "reward": 1.0,
        "reason": text("correct"),
        "extracted": text("7"),
        "finish_reason": text("stop"),
        "advantage": 0.5,
    }
    return {
        "step": step,
        "prompt_id": text("add-1"),
        "prompt": text("3 + 4?"),
        "gold": text("7"),
        "completions": [completion] * completions,
    }


def run_folder(run_dir: Path, **files: Any) -> Path:
    """A run folder with a recipe and, where given, `summary`, `metrics` and `rollouts` (groups by step)."""
    (run_dir / "rollouts").mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(files.get("recipe", "name: quickstart\nseed: 7\n"))
    if "summary" in files:
        (run_dir / "summary.json").write_text(json.dumps(files["summary"]))
    if "metrics" in files:
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in files["metrics"]))
    for step, groups in files.get("rollouts", {}).items():
        path = run_dir / "rollouts" / f"step_{step:06d}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in groups))
    return run_dir


def report(run_dir: Path) -> Page:
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


def full_run(run_dir: Path, text: Callable[[str], str] = str) -> Path:
    """A run with something in every part of the page, each text changed by `text`."""
    found = summary(
        status=text("completed"),
        weights_digest=text("sha256:9f86d081"),
        regime=text("aligned"),
        versions={text("torch"): text("2.13.0")},
        durations={text("training"): 144.0, "total": 188.0},
    )
    for stage in found["evaluation"].values():
        stage["by_family"] = {text("addition"): 0.5}
    return run_folder(
        run_dir,
        recipe=f"name: {json.dumps(text('quickstart'))}\n",
        summary=found,
        metrics=[metrics(step) for step in range(1, 41)],
        rollouts={1: [group(1, text=text)], 40: [group(40, text=text)]},
    )


def test_no_text_of_model_or_data_becomes_an_element_or_attribute(tmp_path: Path) -> None:
    plain = report(full_run(tmp_path / "plain"))
    hostile = report(full_run(tmp_path / "hostile", text=lambda text: text + HOSTILE))
    assert hostile.elements == plain.elements
    assert [(tag, name) for tag, name, _ in hostile.attributes] == [(tag, name) for tag, name, _ in plain.attributes]
    assert "script" not in hostile.elements and "img" not in hostile.elements
    for shown in ("quickstart", "add-1", "3 + 4?", "the sum is 7", " seven", "correct", "stop", "addition", "torch"):
        assert shown.strip() + HOSTILE in hostile.words
    tooltips = [value for tag, name, value in hostile.attributes if (tag, name) == ("span", "title")]
    assert all(json.dumps(" seven" + HOSTILE) in (tooltip or "") for tooltip in tooltips) and len(tooltips) == 12


@pytest.fixture(scope="module")
def plain_page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    rollouts = {1: [group(1, completions=1)]}
    return report(run_folder(tmp_path_factory.mktemp("plain") / "run", rollouts=rollouts))


@settings(max_examples=20, deadline=None)
@given(st.text(st.characters()))
def test_any_completion_is_shown_as_text(tmp_path_factory: pytest.TempPathFactory, plain_page: Page, text: str) -> None:
    rollouts = {1: [group(1, completions=1, text=lambda _: text)]}
    page = report(run_folder(tmp_path_factory.mktemp("any") / "run", rollouts=rollouts))
    assert page.elements == plain_page.elements
    assert [name for _, name, _ in page.attributes] == [name for _, name, _ in plain_page.attributes]


def test_half_of_a_surrogate_pair_is_shown_and_does_not_stop_the_report(tmp_path: Path) -> None:
    page = report(run_folder(tmp_path, rollouts={1: [group(1, text=lambda _: "half \ud83d")]}))
    assert "half \\ud83d" in page.words


def test_the_page_asks_for_nothing_and_forbids_scripts(tmp_path: Path) -> None:
    page = report(full_run(tmp_path))
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert page.requests == []
    assert (
        "url(" not in (tmp_path / "report.html").read_text() and "@import" not in (tmp_path / "report.html").read_text()
    )


def test_the_headline_says_result_mismatch_digest_and_time(tmp_path: Path) -> None:
    words = report(run_folder(tmp_path, summary=summary())).words
    assert "0.125 → 0.625 before → after training; 95% interval 0.575 to 0.675" in words
    assert "0 of 940,440 sampled tokens" in words and "over the whole vocabulary 0 of 80 rows" in words
    assert "sha256:9f86d081" in words
    assert "3 min 08 s warm start 31.2 s, training 2 min 24 s" in words
    assert "completed aligned 40 steps · 1,204,224 parameters" in words


def test_the_evaluations_stand_side_by_side(tmp_path: Path) -> None:
    words = report(run_folder(tmp_path, summary=summary())).words
    assert "avg@8 0.1250 (95% interval 0.0750 to 0.1750) 0.6250 (95% interval 0.5750 to 0.6750)" in words
    assert "sampling" + 2 * " temperature 1.0, top_p 1.0, at most 96 tokens, seed 0" in words
    assert "length, correct" + 2 * " mean 41.2, p50 40, p90 60, max 96" in words and "incorrect" not in words


def test_a_mismatch_is_marked(tmp_path: Path) -> None:
    counts = {"tokens_compared": 100, "tokens_unequal": 3}
    page = report(run_folder(tmp_path, summary=summary(mismatch=counts)))
    assert ("div", "class", "card headline wrong") in page.attributes
    assert "3 of 100 sampled tokens" in page.words


def test_a_run_under_way_is_shown_as_far_as_it_got(tmp_path: Path) -> None:
    lines = [metrics(1), {"step": 2, "reward/mean": None}, {**metrics(3), "mismatch/tokens_unequal": 2}]
    words = report(run_folder(tmp_path, metrics=lines)).words
    assert "unfinished 3 steps" in words
    assert "2 of 200 sampled tokens" in words


def test_a_folder_with_a_recipe_only_is_a_run_that_has_not_begun(tmp_path: Path) -> None:
    page = report(run_folder(tmp_path))
    assert "No step has been recorded yet." in page.words and "svg" not in page.elements


def test_a_failed_run_has_no_score_after_training(tmp_path: Path) -> None:
    found = summary(status="failed", evaluation={"before": evaluation(0.125), "after": None})
    words = report(run_folder(tmp_path, summary=found)).words
    assert "failed aligned" in words and "0.125 before training" in words


def test_a_folder_that_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no recipe\.yaml"):
        write_report(tmp_path)


def test_a_damaged_summary_is_refused_by_name(tmp_path: Path) -> None:
    (run_folder(tmp_path) / "summary.json").write_text('{"status"')
    with pytest.raises(ValueError, match=r"summary\.json must be a JSON object"):
        write_report(tmp_path)


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    full_run(tmp_path)
    assert write_report(tmp_path).read_bytes() == write_report(tmp_path).read_bytes()


def test_a_long_run_of_long_completions_stays_small_and_says_what_it_left_out(tmp_path: Path) -> None:
    groups = {step: [group(step, completions=16, tokens=1000)] * 8 for step in (1, 250, 500)}
    lines = [{**metrics(step), "reward/mean": step / 700, "time/rollout": step / 300} for step in range(1, 501)]
    run_folder(tmp_path, summary=summary(), metrics=lines, rollouts=groups)
    page = report(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    assert "8 of 16 completions shown" in page.words
    assert "The first 256 of 1,000 tokens." in page.words


def test_groups_come_from_the_first_the_middle_and_the_last_step(tmp_path: Path) -> None:
    rollouts = {step: [group(step, completions=20, tokens=900)] * 9 for step in (1, 2, 3, 4, 9)}
    groups = read_groups(run_folder(tmp_path, rollouts=rollouts))
    assert [shown.record["step"] for shown in groups] == [1, 1, 3, 3, 9, 9] and len(groups) <= MAX_GROUPS
    assert {len(shown.completions) for shown in groups} == {MAX_COMPLETIONS}
    assert {len(completion.tokens) for shown in groups for completion in shown.completions} == {MAX_TOKENS}


def test_a_token_shows_both_log_probs_their_difference_and_its_shade(tmp_path: Path) -> None:
    record = group(1, completions=1, tokens=4)
    record["completions"][0].update(
        tokens=["a", "\n", "", "d"],
        rollout_log_probs=[0.0, math.log(0.5) - 0.01, math.log(0.005), -0.5],
        log_probs=[0.0, math.log(0.5) - 0.01, math.log(0.005)],
    )
    record["completions"][0]["log_probs"][0] = -0.25
    tokens = read_groups(run_folder(tmp_path, rollouts={1: [record]}))[0].completions[0].tokens
    assert [token.text for token in tokens] == ["a", "⏎\n", "∅", "d"]
    assert [token.shade for token in tokens] == [0, 4, 7, 3]
    assert [token.unequal for token in tokens] == [True, False, False, False]
    assert tokens[0].tooltip == (
        'token 0: "a"\nrollout log-prob 0 (probability 1)\ntrainer log-prob -0.25\ndifference -0.25'
    )
    assert tokens[3].tooltip.endswith("trainer log-prob not recorded\ndifference not recorded")


def test_a_chart_breaks_its_line_where_a_value_is_missing() -> None:
    points = [(0.0, 0.0), (1.0, 1.0), (2.0, None), (3.0, 0.0)]
    chart = Chart("Entropy", "nats", [Series("entropy", points)])
    line = next(path.get("d") for path in paths(chart) if path.get("class") == "line s0")
    # From (56, 190), where 0 lies, to 1 at 1/1.05 of the height; then a dot alone at the right edge.
    assert line == "M56.0 190.0h0L192.0 20.5M464.0 190.0h0"


def test_stages_are_stacked_and_a_missing_stage_counts_as_zero() -> None:
    first, second = Series("rollout", [(1.0, 2.0), (2.0, 2.0)]), Series("train", [(1.0, None), (2.0, 2.0)])
    areas = {path.get("class"): path.get("d") for path in paths(Chart("Time", "s", [first, second], kind="area"))}
    # 4.2 seconds (the highest sum, 4, and a margin) span the 178 units from 190 up to 12.
    assert areas["area s0"] == "M56.0 105.2L464.0 105.2L464.0 190.0L56.0 190.0Z"
    assert areas["area s1"] == "M56.0 105.2L464.0 20.5L464.0 105.2L56.0 105.2Z"


def test_a_flat_zero_has_no_scale_but_the_zero() -> None:
    chart = Chart("Tokens unequal", "tokens", [Series("unequal", [(1.0, 0.0), (2.0, 0.0)])])
    labels = [text.text for text in ElementTree.fromstring(chart.svg).iter("text") if text.get("class") == "y"]
    assert labels == ["0"]
    assert [text.get("d") for text in paths(chart) if text.get("class") == "line s0"] == ["M56.0 190.0h0L464.0 190.0"]


def test_every_chart_of_a_run_of_one_step_can_be_drawn() -> None:
    charts = build_charts([metrics(1)], {})
    assert all(len(ElementTree.fromstring(chart.svg)) > 0 for chart in charts) and len(charts) == 8


def test_components_have_a_chart_of_their_own_where_a_recipe_names_any() -> None:
    """Values before weighting; the mean reward then has the correct answers beside it."""
    plain = build_charts([metrics(1) | {"reward/correct_fraction": 0.5}], {})
    assert [series.label for series in plain[0].series] == ["reward"]
    parts = {"reward/correct_fraction": 0.25, "reward/format_mean": 1.0, "reward/overlong_mean": -0.5}
    total, components, *_ = build_charts([metrics(1) | parts], {})
    assert [(series.label, series.last) for series in total.series] == [("reward", 0.5), ("correct", 0.25)]
    assert components.title == "Reward by component"
    assert [(series.label, series.last) for series in components.series] == [("format", 1.0), ("overlong", -0.5)]


def test_a_completion_shows_its_components_and_that_it_has_no_reward(tmp_path: Path) -> None:
    failed = {"reward": None, "reason": "timeout", "components": {"correctness": None, "overlong": -0.25}}
    record = group(1, completions=1)
    record["completions"].append(record["completions"][0] | failed)
    words = report(run_folder(tmp_path, rollouts={1: [record]})).words
    assert "reward 1.0 correct" in words
    assert "no reward correctness - overlong -0.250 timeout" in words


def test_evaluations_stand_at_their_steps() -> None:
    records: list[Record] = [
        {"step": 5, "reward/mean": 0.5},
        {"step": 10, "eval/avg@8": 0.25},
        {"step": 15, "reward/mean": 0.5},
    ]
    chart = build_charts(records, {"before": {"avg@8": 0.125}, "after": {"avg@8": 0.375}})[0]
    assert chart.series[1].points == [(0.0, 0.125), (10, 0.25), (15, 0.375)]


def test_mismatch_totals_sum_the_steps() -> None:
    records: list[Record] = [metrics(1), {"step": 2, "mismatch/tokens_unequal": 3, "mismatch/tokens_compared": None}]
    assert mismatch_totals(records) == {
        "tokens_compared": 100,
        "tokens_unequal": 3,
        "full_vocab_rows": 0,
        "full_vocab_unequal": 0,
    }


@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e9))
def test_ticks_are_few_inside_and_even(low: float, span: float) -> None:
    high = low + span
    if high - low < 1e-9 * max(abs(low), abs(high)):
        return
    marks = ticks(low, high)
    assert 1 <= len(marks) <= 5
    assert low - 1e-6 * span <= marks[0] and marks[-1] <= high + 1e-6 * span


@pytest.mark.parametrize(
    ("value", "label"), [(0.0, "0"), (0.25, "0.25"), (1500.0, "1,500"), (20000.0, "20k"), (3e6, "3M"), (1e-7, "1e-07")]
)
def test_tick_labels_are_short(value: float, label: str) -> None:
    assert tick_label(value) == label


@pytest.mark.parametrize(
    ("seconds", "shown"), [(2.94, "2.9 s"), (59.94, "59.9 s"), (151.0, "2 min 31 s"), (3725.0, "1 h 02 min")]
)
def test_durations_read_as_people_say_them(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


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


def paths(chart: Chart) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(chart.svg).iter("path"))
