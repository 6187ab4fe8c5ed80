"""Where the seconds of a step go: worked by hand for a synchronous and an asynchronous run."""

from xml.etree import ElementTree

import pytest

from rl.monitor import Record
from rl.report.figures import TimeBar
from rl.report.timeline import sampling_chart, stage_chart, step_gantt

STEP: Record = {
    "step": 1,
    "time/rollout": 2.0,
    "time/reward": 0.5,
    "time/wait": 2.5,
    "time/train": 1.0,
    "time/check": 0.25,
    "time/sync": 0.25,
    "time/step": 4.5,
}


def test_in_a_synchronous_run_everything_waits_for_one_thing_at_a_time() -> None:
    gantt = step_gantt([STEP], asynchronous=False)
    assert gantt is not None and list(gantt.bars) == [
        TimeBar("engines", "rollout", 0.0, 2.0),
        TimeBar("rewards", "reward", 2.0, 2.5),
        TimeBar("trainer", "train", 2.5, 3.5),
        TimeBar("trainer", "check", 3.5, 3.75),
        TimeBar("trainer", "sync", 3.75, 4.0),
        TimeBar("trainer", "other", 4.0, 4.5),
    ]
    assert gantt.note == "Waiting: engines 56%, rewards 89%, trainer 56%"
    assert [key for _, key in gantt.keys] == ["rollout", "reward", "train", "check", "sync", "other"]


def test_in_an_asynchronous_run_the_next_batch_is_sampled_while_a_step_trains() -> None:
    """The second record says how long the batch took that was sampled beside the first one's training."""
    first = STEP | {"time/wait": 0.0, "time/step": 1.5}
    second = STEP | {"step": 2, "time/wait": 1.0, "time/step": 2.5}
    gantt = step_gantt([first, second], asynchronous=True)
    assert gantt is not None and list(gantt.bars) == [
        TimeBar("engines", "rollout", 0.0, 2.0),
        TimeBar("rewards", "reward", 2.0, 2.5),
        TimeBar("trainer", "train", 0.0, 1.0),
        TimeBar("trainer", "check", 1.0, 1.25),
        TimeBar("trainer", "sync", 1.25, 1.5),
        TimeBar("trainer", "wait", 1.5, 2.5),
    ]
    assert gantt.note.endswith("Waiting: engines 20%, rewards 80%, trainer 40%")


def test_a_step_of_ordinary_length_is_shown() -> None:
    records = [STEP | {"step": step, "time/step": seconds} for step, seconds in ((1, 90.0), (2, 5.0), (3, 4.5))]
    gantt = step_gantt(records, asynchronous=False)
    assert gantt is not None and gantt.title == "Step 2: what waits for what"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_without_a_step_that_was_timed_there_is_no_timeline(asynchronous: bool) -> None:
    assert step_gantt([{"step": 1, "time/step": None}], asynchronous) is None


def test_the_stack_of_a_step_adds_up_to_its_length() -> None:
    chart = stage_chart([STEP], asynchronous=False)
    assert sum(one.last or 0.0 for one in chart.series) == 4.5
    assert "wait" not in [one.label for one in chart.series]
    chart = stage_chart([STEP], asynchronous=True)
    assert {one.label: one.last for one in chart.series} == {
        "train": 1.0,
        "check": 0.25,
        "sync": 0.25,
        "wait": 2.5,
        "other": 0.5,
    }


def test_a_stage_keeps_its_colour_in_every_chart() -> None:
    gantt = step_gantt([STEP], asynchronous=False)
    assert gantt is not None
    colours = {stage: colour for colour, stage in gantt.keys}
    for chart in (stage_chart([STEP], asynchronous=False), stage_chart([STEP], asynchronous=True)):
        assert all(
            colours.get(one.label, colour) == colour for colour, one in zip(chart.colours, chart.series, strict=True)
        )


def test_a_stage_that_nobody_told_the_report_of_is_shown() -> None:
    chart = stage_chart([STEP | {"time/metrics": 0.125}], asynchronous=False)
    assert {one.label: one.last for one in chart.series}["metrics"] == 0.125


def test_sampling_has_a_chart_of_its_own_only_where_it_runs_beside_training() -> None:
    assert sampling_chart([STEP], asynchronous=False).series == []
    assert [one.label for one in sampling_chart([STEP], asynchronous=True).series] == ["rollout", "reward", "wait"]


def test_bars_lie_where_their_seconds_are() -> None:
    gantt = step_gantt([STEP], asynchronous=False)
    assert gantt is not None
    bars = [bar for bar in ElementTree.fromstring(gantt.svg).iter("rect") if (bar.get("class") or "").startswith("bar")]
    # 4.5 seconds span the 380 units from 84 to 464, three lanes of 44 begin at 12.
    assert [bar.get("x") for bar in bars[:3]] == ["84.0", "252.9", "295.1"]
    assert [bar.get("y") for bar in bars[:3]] == ["20.0", "64.0", "108.0"]
