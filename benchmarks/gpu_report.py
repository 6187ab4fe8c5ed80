"""The result of `benchmarks.gpu_suite` as a table: a line for each shape."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

COLUMNS = ("operator", "what", "shape", "time", "of roofline", "speed against", "target")


def result_table(report: Mapping[str, Any]) -> Table:
    """report: the JSON object that the suite writes."""
    gpu = report["gpu"]
    table = Table(
        *COLUMNS, title=f"{gpu['gpu']}, {report['date']}, commit {report['commit'][:12]}", title_justify="left"
    )
    for name, problem in report["risks"].items():
        table.add_row("reported risk", name, "", Text(problem or "not here", "red" if problem else ""))
    for case in report["cases"]:
        shape = [Text(case[key]) for key in ("operator", "name", "shape")]
        table.add_row(*shape, *([Text("not timed", "red")] if "refused" in case else _cells(case)))
    return table


def _cells(case: Mapping[str, Any]) -> list[Text]:
    bound = case["roofline"]
    peers = [f"{name} {found['ratio']:.2f}x" for name, found in case["peers"].items()]
    peers += [f"{name} not here" for name in case["missing"]]
    return [
        Text(time(case["milliseconds"]["median"])),
        Text(f"{bound['share']:.0%} {bound['bound']}" if bound else "-"),
        Text("\n".join(peers)),
        Text("\n").join(_target(each) for each in case["targets"]),
    ]


def _target(target: Mapping[str, Any]) -> Text:
    if target["reached"] is None:
        return Text(f"? of {_amount(target['wanted'])} {target['measure']}")
    text = f"{_amount(target['reached'])} of {_amount(target['wanted'])} {target['measure']}"
    return Text(text, "green" if target["met"] else "yellow")


def _amount(value: float) -> str:
    return f"{value / 1e12:.0f} T" if value > 1e9 else f"{value:.2f}"


def time(milliseconds: float) -> str:
    return f"{milliseconds:.2f} ms" if milliseconds >= 1 else f"{milliseconds * 1e3:.1f} us"
