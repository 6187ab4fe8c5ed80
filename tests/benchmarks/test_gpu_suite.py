"""The GPU suite's logic, without a GPU: what it refuses to time, what it writes, how it reckons."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import ops
from benchmarks import gpu_checks, gpu_risks, gpu_suite
from benchmarks.gpu_checks import Outcome, read_tests, repeats_differ, rows_differ, run_tests, same_bits
from benchmarks.gpu_clock import Call
from benchmarks.gpu_measure import FAST, OURS, Bench, Effort, callable_on, measure, roofline
from benchmarks.gpu_report import result_table
from benchmarks.gpu_suite import run_suite, try_risks
from benchmarks.gpu_targets import BANDWIDTH, TARGETS, reached
from benchmarks.operators.case import Case, Rows, backward, case_modules, empty, rows_at

CPU, PASSED = torch.device("cpu"), Outcome(passed=3)
PEAKS = {"copy": 8e9, "bfloat16": 1e12, "float32": 1e11}


class SetClock:
    """Every call takes the milliseconds that it is given, in every round a quarter more."""

    def __init__(self, **milliseconds: float) -> None:
        self.given = milliseconds

    def milliseconds(self, calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
        return {name: [self.given[name] * (1 + 0.25 * i) for i in range(rounds)] for name in calls}


def bench(**milliseconds: float) -> Bench:
    return Bench(CPU, SetClock(**milliseconds), PEAKS, Effort(repeats=3, rounds=3))


def inputs(device: torch.device) -> tuple[Tensor]:
    return (torch.arange(24.0, device=device).view(12, 2),)


def case(run: Callable[..., object], rows: Rows | None = None, **more: Any) -> Case:
    return Case("scale", "forward", "T12 D2", inputs, run, rows=rows, **more)


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_what_repeats_and_keeps_its_rows_is_timed() -> None:
    record = measure(case(double, rows_at(12, 0)), PASSED, bench(lockstep=2.0))
    assert "refused" not in record
    assert record["milliseconds"] == {"median": 2.5, "quartiles": [2.0, 3.0]}


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (Outcome(), "it has no test that ran"),
        (Outcome(4, ["test_bits"]), "1 of 5 tests fail, the first test_bits"),
    ],
)
def test_an_operator_whose_tests_fail_is_not_timed(tests: Outcome, message: str) -> None:
    record = measure(case(double), tests, bench())
    assert record == {"operator": "scale", "name": "forward", "shape": "T12 D2", "refused": message}


def test_a_shape_that_does_not_repeat_is_not_timed() -> None:
    record = measure(case(lambda x: (x, x + torch.rand(12, 2))), PASSED, bench())
    assert record["refused"] == "output 1 of run 2 of 3 differs from the first"


def test_a_shape_whose_rows_follow_the_batch_is_not_timed() -> None:
    record = measure(case(lambda x: x + (len(x) == 6), rows_at(12, 0)), PASSED, bench())
    assert record["refused"] == "rows 0 to 5 of 12 differ when they are alone"


def test_a_shape_that_fails_is_not_timed_and_says_how() -> None:
    def run(x: Tensor) -> Tensor:
        return x.view(5)

    assert measure(case(run), PASSED, bench())["refused"].startswith("RuntimeError: shape '[5]' is invalid")


def test_a_cache_among_the_inputs_is_the_same_at_every_run_and_compared_after_it() -> None:
    assert repeats_differ(case(lambda x: x.add_(1.0)), CPU, 5) is None
    assert repeats_differ(case(lambda x: (x.uniform_(), None)[1]), CPU, 5) is not None


def test_gradients_repeat_because_the_gradient_given_does() -> None:
    both = case(backward(lambda x: x**3))
    assert repeats_differ(both, CPU, 3) is None
    (grad,) = both.run(*inputs(CPU))  # type: ignore[misc]
    assert torch.equal(grad, 3 * inputs(CPU)[0] ** 5)


def test_rows_of_sequences_are_compared_by_their_tokens() -> None:
    """Two outputs for each row of the input; the sum of all rows has no rows of its own."""
    seen: list[int] = []

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(x))
        return x.repeat_interleave(2, 0), x.sum()[None]

    sequences = Rows(12, rows_at(12, 0).take, outputs=2)
    assert rows_differ(case(run, sequences), CPU) is None
    assert seen == [12, 1, 1, 1, 8, 6, 6]
    with pytest.raises(AssertionError, match="no output of scale forward, T12 D2 has 12 rows"):
        rows_differ(case(run, rows_at(12, 0)), CPU)


def test_bits_are_compared_not_values() -> None:
    nan = torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_ratios_shares_and_what_is_missing() -> None:
    def not_here() -> Callable[..., object]:
        raise ImportError("No module named 'fla'\nat all")

    peers = {"torch": lambda: double, "fla": not_here, "strict": lambda: lambda x: x.view(5)}
    timed = case(double, bytes=8e6, flops=1e9, dtype="float32", peers=peers)
    record = measure(timed, PASSED, bench(lockstep=8.0, torch=12.0))
    assert record["peers"] == {"torch": {"milliseconds": 15.0, "quartiles": [12.0, 18.0], "ratio": 1.5}}
    assert record["missing"]["fla"] == "ImportError: No module named 'fla'"
    assert record["missing"]["strict"].startswith("RuntimeError: shape '[5]'")
    assert (record["bytes_per_second"], record["flops_per_second"]) == (8e8, 1e11)
    # 10 ms taken; arithmetic alone takes 1e9 / 1e11 = 10 ms, traffic 8e6 / 8e9 = 1 ms.
    assert record["roofline"] == {"bound": "arithmetic", "share": 1.0}
    assert json.loads(json.dumps(record)) == record


def test_roofline_is_the_larger_bound() -> None:
    assert roofline(case(double, bytes=8e6, flops=1e9), 4.0, PEAKS) == {"bound": "memory", "share": 0.25}
    assert roofline(case(double, flops=1e9, dtype="float8"), 4.0, PEAKS) is None


def test_the_unaligned_form_is_timed_beside_and_left_again() -> None:
    paths: list[str] = []

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        paths.append(ops.explain("rms_norm", x).split()[1])
        return ops.rms_norm(x, weight, 1e-6)

    one = Case("rms_norm", "forward", "T4 D8", lambda device: (torch.ones(4, 8), torch.ones(8)), norm)
    record = measure(one, PASSED, bench(**{OURS: 2.0, FAST: 1.0}))
    assert record["peers"][FAST]["ratio"] == 0.5
    assert paths == ["cpu"] * 3 + ["fast"]
    assert FAST not in callable_on(case(double), inputs(CPU))[0]
    assert ops.explain("rms_norm", torch.ones(1)).startswith("rms_norm: cpu")


def test_targets_stand_beside_what_is_reached() -> None:
    linear = Case("linear", "forward", "T8192 6144x2048", inputs, double)
    assert reached(linear, 2.0, 1.95, PEAKS) == [
        {"measure": "times the first peer's speed", "wanted": 0.95, "reached": 0.975, "met": True}
    ]
    assert reached(linear, 2.0, None, PEAKS)[0]["met"] is None
    gate = Case("rms_norm", "gated forward", "T8192 G4x512", inputs, double, bytes=8e6)
    share, linghe = reached(gate, 2.0, None, PEAKS | {"copy": 6.7e12})
    assert (share["measure"], share["wanted"], share["met"]) == (BANDWIDTH, 0.85, False)
    # 46.9 us at 3.35 TB/s are 23.45 us at 6.7 TB/s.
    assert linghe["reached"] == pytest.approx(0.02345 / 2.0) and linghe["met"] is False


def test_every_target_is_that_of_a_case() -> None:
    cases = [case for module in case_modules() for case in module.CASES]
    operators = {case.operator for case in cases}
    lost = [target for target in TARGETS if target.operator in operators and not any(map(target.fits, cases))]
    assert lost == []


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.ops.kernels.test_rope" name="test_a[1]" />
<testcase classname="tests.ops.kernels.test_rope" name="test_b"><failure message="no" /></testcase>
<testcase classname="tests.ops.kernels.test_swiglu" name="test_a"><skipped /></testcase>
<testcase classname="" name="tests.ops.kernels.test_fp8"><error message="collection failure" /></testcase>
</testsuite></testsuites>"""


def test_tests_are_counted_by_operator() -> None:
    found = read_tests(JUNIT)
    assert found == {
        "rope": Outcome(1, ["test_b"]),
        "swiglu": Outcome(),
        "fp8": Outcome(0, ["tests.ops.kernels.test_fp8"]),
    }
    assert found["swiglu"].problem == "it has no test that ran"


def test_the_tests_are_run_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_good.py").write_text("def test_a(): pass\n")
    (tmp_path / "test_bad.py").write_text("import warnings\ndef test_a(): pass\ndef test_b(): assert 0\n")
    monkeypatch.setattr(gpu_checks, "TESTS", tmp_path)
    assert run_tests(["good", "bad"], quick=True) == {"good": Outcome(1), "bad": Outcome(1, ["test_b"])}


def test_risks_pass_here_and_a_wrong_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_risks.integers_in_linear(CPU, rows=20, width=40, inner=64) is None
    assert gpu_risks.integers_in_fp8(CPU, rows=20, width=40, inner=256) is None
    assert gpu_risks.rows_at_a_power_of_two(CPU, rows=128, width=24) is None
    sound = ops.linear
    monkeypatch.setattr(ops, "linear", lambda x, weight, dtype: sound(x, weight, dtype) + 1000 * (len(x) == 17))
    message = gpu_risks.rows_at_a_power_of_two(CPU, rows=128, width=24)
    assert message == "torch.bfloat16, K = 512: rows 3 to 19 differ when they are alone"
    message = gpu_risks.integers_in_linear(CPU, rows=17, width=3, inner=32)
    assert message == "y in torch.bfloat16 is wrong in 51 numbers"


def test_a_risk_that_shows_counts_as_a_failed_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> str:
        raise RuntimeError("no kernel image")

    risks = {"one": ("linear", lambda device: "3 numbers"), "two": ("linear", broken), "three": ("fp8", broken)}
    monkeypatch.setattr(gpu_suite, "RISKS", risks)
    tests = {"linear": Outcome(passed=1)}
    assert try_risks(tests, CPU) == {"one": "3 numbers", "two": "RuntimeError: no kernel image"}
    assert tests["linear"].problem == "2 of 3 tests fail, the first one: 3 numbers"


def test_a_run_that_is_cut_short_leaves_its_records() -> None:
    saved: list[int] = []
    cases, tests = [case(double), case(double)], {"scale": PASSED}
    run_suite(cases, bench(lockstep=1.0), tests, lambda records: saved.append(len(records)))
    assert saved == [0, 1, 2]


def test_the_table_names_times_refusals_and_targets(capsys: pytest.CaptureFixture[str]) -> None:
    timed = Case("linear", "forward", "T12", inputs, double, bytes=8e6, peers={"torch": lambda: double})
    milliseconds = {OURS: 0.8, "torch": 0.4, FAST: 0.4}
    cases = [measure(timed, PASSED, bench(**milliseconds)), measure(case(double), Outcome(), bench())]
    report = {
        "gpu": {"gpu": "H200"}, "date": "2026-11-21", "commit": "abc", "risks": {"integers": None}, "cases": cases,
    }  # fmt: skip
    console = Console(width=200)
    console.print(result_table(report))
    shown = capsys.readouterr().out
    expected = {"1.00 ms", "100% memory", "torch 0.50x", "0.50 of 0.95 times", "not timed", "not here"}
    assert {text for text in expected if text in shown} == expected
    assert gpu_suite.print_report(report, Path("out.json")) == 1
    said = capsys.readouterr().out
    assert "scale forward, T12 D2: it has no test that ran" in said
    assert "1 shapes timed, 1 refused; out.json" in said


def test_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """With a clock, a GPU and two cases that are not there; a folder is made for the result."""
    path, asked = tmp_path / "new" / "found.json", []

    def tests(operators: list[str], quick: bool) -> dict[str, Outcome]:
        asked.append((operators, quick))
        return {"scale": Outcome(1)}

    monkeypatch.setattr("sys.argv", ["gpu_suite.py", "scale", "--quick", "--out", str(path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        gpu_suite, "case_modules", lambda: [SimpleNamespace(CASES=[case(double), case(torch.rand_like)])]
    )
    monkeypatch.setattr(gpu_suite, "run_tests", tests)
    monkeypatch.setattr(gpu_suite, "open_bench", lambda effort: Bench(CPU, SetClock(lockstep=1.0), PEAKS, effort))
    monkeypatch.setattr(gpu_suite, "describe", lambda bench: {"gpu": {"gpu": "none"}, "peaks": dict(bench.peaks)})
    assert gpu_suite.main() == 1
    written = json.loads(path.read_text())
    assert asked == [(["scale"], True)]
    assert {"date", "commit", "command", "device", "versions", "quick", "gpu", "peaks", "risks"} < set(written)
    assert written["command"] == f"python -m benchmarks.gpu_suite scale --quick --out {path}"
    assert written["versions"].keys() == {"python", "torch", "triton", "numpy"}
    assert written["tests"] == {"scale": {"passed": 1, "failed": []}}
    assert [set(each) & {"milliseconds", "refused"} for each in written["cases"]] == [{"milliseconds"}, {"refused"}]
    assert "1 shapes timed, 1 refused" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_suite.py", "rope"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main() == 2
    assert capsys.readouterr().out == gpu_suite.NO_GPU + "\n"


def test_an_operator_without_cases_is_refused(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_suite.py", "linaer"])
    with pytest.raises(SystemExit):
        gpu_suite.main()
    assert "no cases of linaer; there are cases of cross_entropy, " in capsys.readouterr().err


def test_inputs_are_the_same_each_time_and_cost_nothing_untouched() -> None:
    drawn = case(double)
    object.__setattr__(drawn, "inputs", lambda device: (torch.rand(3, device=device),))
    (one,), (two,) = (gpu_checks.make_inputs(drawn, CPU) for _ in range(2))
    assert torch.equal(one, two)
    assert empty(2, 3, dtype=torch.int32)(CPU).shape == (2, 3)
