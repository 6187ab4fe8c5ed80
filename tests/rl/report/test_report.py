"""The report: it shows what the run recorded, stays small, and nothing from model or data becomes an element."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.events import EventLog
from rl.page import duration, visible
from rl.report import write_report
from tests.rl.page import HOSTILE, Page, digest
from tests.rl.report.folders import evaluation, full_run, group, metrics, report, run_folder, summary


def test_no_text_of_model_or_data_becomes_an_element_or_attribute(tmp_path: Path) -> None:
    plain = report(full_run(tmp_path / "plain"))
    hostile = report(full_run(tmp_path / "hostile", text=lambda text: text + HOSTILE))
    assert hostile.elements == plain.elements
    assert [(tag, name) for tag, name, _ in hostile.attributes] == [(tag, name) for tag, name, _ in plain.attributes]
    assert hostile.elements["script"] == 2 and "img" not in hostile.elements
    for shown in ("quickstart", "addition", "torch"):
        assert shown + HOSTILE in hostile.words
    group = hostile.data[0]
    assert (group["id"], group["prompt"], group["gold"]) == tuple(text + HOSTILE for text in ("add-1", "3 + 4?", "7"))
    completion = group["completions"][0]
    assert completion["text"] == "the sum is 7" + HOSTILE and completion["tokens"][0] == " seven" + HOSTILE


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x07", "␛[31mred␇"),
        ("a\u202etxt.exe", "a⟨U+202E⟩txt.exe"),
        ("zero\u200bwidth\ufeff", "zero⟨U+200B⟩width⟨U+FEFF⟩"),
        ("tab\tline\nreturn\r", "tab\tline\nreturn␍"),
        ("\x7f\x9b", "␡⟨U+009B⟩"),
        ("\U000e0041", "⟨U+E0041⟩"),
        ("ordinary é 中 \u00ad", "ordinary é 中 ⟨U+00AD⟩"),
    ],
)
def test_characters_that_steer_or_hide_are_shown(tmp_path: Path, text: str, shown: str) -> None:
    assert visible(text) == shown
    page = report(run_folder(tmp_path, rollouts={1: [group(1, text=lambda _: text)]}, summary=summary(regime=text)))
    assert page.data[0]["completions"][0]["text"] == shown
    assert " ".join(shown.split()) in page.words


@settings(max_examples=20, deadline=None)
@given(text=st.text(st.characters()))
def test_any_completion_is_data_and_nothing_else(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    run = run_folder(tmp_path_factory.mktemp("any") / "run", rollouts={1: [group(1, text=lambda _: text)]})
    page = report(run)
    assert page.elements["script"] == 2 and page.requests == []
    assert page.data[0]["completions"][0]["text"] == visible(text)


def test_half_of_a_surrogate_pair_is_shown_and_does_not_stop_the_report(tmp_path: Path) -> None:
    half = summary(regime="half \ud83d")
    page = report(run_folder(tmp_path, rollouts={1: [group(1, text=lambda _: "half \ud83d")]}, summary=half))
    assert "half \\ud83d" in page.words and page.data[0]["completions"][0]["text"] == "half \ud83d"


def test_the_page_asks_for_nothing_and_runs_nothing_but_its_own_script(tmp_path: Path) -> None:
    page = report(full_run(tmp_path))
    assert page.requests == []
    data, script = page.code["script"]
    assert page.rules == {
        "default-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "style-src": " ".join(map(digest, page.code["style"])),
        "script-src": digest(script),
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert ("script", "type", "application/json") in page.attributes and "<" not in data
    assert not any(name == "style" for _, name, _ in page.attributes)
    assert "url(" not in "".join(page.code["style"]) and "@import" not in "".join(page.code["style"])


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
    groups = {step: [group(step, completions=16, tokens=1000, text=lambda text: 8 * text)] * 8 for step in (1, 500)}
    lines = [{**metrics(step), "reward/mean": step / 700, "time/rollout": step / 300} for step in range(1, 501)]
    run_folder(tmp_path, summary=summary(), metrics=lines, rollouts=groups)
    page = report(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    assert 0 < len(page.data) < 16 and f"{len(page.data)} of the 16 groups recorded at 2 of 2 steps" in page.words


def test_events_are_listed_and_the_oldest_of_many_left_out(tmp_path: Path) -> None:
    run, events = run_folder(tmp_path, metrics=[metrics(1)]), EventLog(tmp_path)
    for step in range(1, 204):
        events.step = step
        events.append("restart", f"engine died at {step}")
    words = report(run).words
    assert "The last 200 of 203." in words
    assert "4 restart engine died at 4 " in words and "3 restart engine died at 3 " not in words


def test_the_recipe_is_shown_against_a_base(tmp_path: Path) -> None:
    run, other = run_folder(tmp_path / "run"), run_folder(tmp_path / "other", recipe="name: other\nseed: 3\n")
    page = Page(write_report(run, other).read_text(encoding="utf-8"))
    assert f'changed against {other} base this run name "other" "quickstart" seed 3 7' in page.words
    assert 'changed against the defaults base this run name - "quickstart" seed 0 7' in report(run).words


def test_a_run_that_promised_nothing_is_not_blamed(tmp_path: Path) -> None:
    counts = {"tokens_compared": 100, "tokens_unequal": 3}
    found = summary(mismatch=counts, regime="not aligned: fast linear")
    lines = [metrics(1) | {"mismatch/log_prob_diff_max": 0.125}]
    words = report(run_folder(tmp_path, summary=found, metrics=lines)).words
    assert "Trainer and sampler: not aligned, as its recipe says 3 of 100" in words
    assert "largest difference of log-probs 0.125" in words


@pytest.mark.parametrize(
    ("seconds", "shown"), [(2.94, "2.9 s"), (59.94, "59.9 s"), (151.0, "2 min 31 s"), (3725.0, "1 h 02 min")]
)
def test_durations_read_as_people_say_them(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
