"""Where the seconds of a step go, and who waits for whom: from the metrics `time/*` of its record."""

from collections.abc import Mapping, Sequence
from statistics import median_low

from rl.monitor import Record
from rl.report.figures import Gantt, TimeBar
from rl.report.svg import Chart, Series

SAMPLING = ("rollout", "reward")
ENGINES, REWARDS, TRAINER = "engines", "rewards", "trainer"
KNOWN = ("rollout", "reward", "train", "check", "sync", "wait", "other")
"""Stages in the order of their colours. Any further stage of the metrics stands before "other"."""


def step_of(record: Record) -> float:
    step = record["step"]
    assert step is not None, "read_metrics checks the step"
    return step


def stage_names(records: Sequence[Record]) -> list[str]:
    """Every stage that a chart of these records can show, in the order of their colours."""
    names = dict.fromkeys(name.removeprefix("time/") for record in records for name in record if _is_stage(name))
    further = [name for name in names if name not in KNOWN]
    return [*KNOWN[:-1], *further, "other"]


def stage_chart(records: Sequence[Record], asynchronous: bool) -> Chart:
    """The seconds of every step, stacked. While an asynchronous run samples, it trains: its sampling is left out of the
    stack, which has the wait for it instead."""
    left_out = set(SAMPLING) if asynchronous else {"wait"}
    rows = [(step_of(record), _seconds(record, asynchronous)) for record in records]
    series = [
        Series(stage, [(step, seconds.get(stage)) for step, seconds in rows], colour)
        for colour, stage in enumerate(stage_names(records))
        if stage not in left_out
    ]
    shown = [one for one in series if any(value for _, value in one.points)]
    note = "sampling runs beside it" if asynchronous else ""
    return Chart("Time of a step, by stage", "seconds", shown, kind="area", note=note)


def sampling_chart(records: Sequence[Record], asynchronous: bool) -> Chart:
    """The seconds that making a batch took, where they are not part of the step."""
    series = [
        Series(stage, [(step_of(record), record.get(f"time/{stage}")) for record in records])
        for stage in (*SAMPLING, "wait")
    ]
    shown = [one for one in series if one.last is not None] if asynchronous else []
    return Chart("Sampling beside training", "seconds; wait is what the trainer waits for it", shown)


def step_gantt(records: Sequence[Record], asynchronous: bool) -> Gantt | None:
    """A step of ordinary length: who works when. None without a step that was timed."""
    usable = [index for index, record in enumerate(records) if record.get("time/step")]
    if asynchronous:
        usable = [index for index in usable if index + 1 < len(records)]
    if not usable:
        return None
    middle = median_low(records[index]["time/step"] or 0.0 for index in usable)
    chosen = next(index for index in usable if records[index]["time/step"] == middle)
    if asynchronous:
        bars = _overlapping(records[chosen], records[chosen + 1])
        rule = "Lengths are measured; the next batch is taken to begin when this one is handed over. "
    else:
        bars, rule = _in_a_row(records[chosen]), ""
    title = f"Step {step_of(records[chosen]):.0f}: what waits for what"
    return Gantt(title, "a step of ordinary length", bars, stage_names(records), note=rule + _idle(bars))


def _in_a_row(record: Record) -> list[TimeBar]:
    return _laid_end_to_end(_seconds(record, asynchronous=False))


def _overlapping(record: Record, following: Record) -> list[TimeBar]:
    """From the moment a batch is handed over to the moment the next one is."""
    sampling = {stage: following.get(f"time/{stage}") or 0.0 for stage in SAMPLING}
    training = {name: value for name, value in _seconds(record, asynchronous=True).items() if name not in SAMPLING}
    training.pop("wait", None)
    wait = {"wait": following.get("time/wait") or 0.0}
    return _laid_end_to_end(sampling) + _laid_end_to_end(training | wait)


def _laid_end_to_end(seconds: Mapping[str, float]) -> list[TimeBar]:
    bars, now = [], 0.0
    for stage, length in seconds.items():
        lane = {"rollout": ENGINES, "reward": REWARDS}.get(stage, TRAINER)
        if length > 0:
            bars.append(TimeBar(lane, stage, now, now + length))
        now += length
    return bars


def _seconds(record: Record, asynchronous: bool) -> dict[str, float]:
    """The stages of a step in the order they happen, with what none of them explains as "other"."""
    names = stage_names([record])
    found = {name: record.get(f"time/{name}") or 0.0 for name in names if record.get(f"time/{name}") is not None}
    if not asynchronous:
        found.pop("wait", None)  # for the sampling that it consists of
    within = sum(value for name, value in found.items() if not asynchronous or name not in SAMPLING)
    if total := record.get("time/step"):
        found["other"] = max(0.0, total - within)
    return found


def _idle(bars: Sequence[TimeBar]) -> str:
    end = max((bar.end for bar in bars), default=0.0)
    shares = []
    for lane in dict.fromkeys(bar.lane for bar in bars):
        busy = sum(bar.end - bar.start for bar in bars if bar.lane == lane and bar.stage != "wait")
        shares.append(f"{lane} {1 - busy / end:.0%}")
    return f"Waiting: {', '.join(shares)}" if shares else ""


def _is_stage(name: str) -> bool:
    return name.startswith("time/") and name != "time/step"
