"""The compile check: every production kernel against the checked-in table, and each fault that it must find."""

import os
from typing import Any

import pytest

from benchmarks import compile_check
from benchmarks.compile_check import MISSING, OLDEST, Build, check, planned, problems, run_builds
from benchmarks.compile_inspect import DISASSEMBLED, Binary, violations
from benchmarks.compile_table import FOLDER, Result, differences, read_table, table_path, to_table, write_table
from benchmarks.operators.case import TARGETS, case_modules

SOUND = Binary(
    registers=46, stack=0, spills=0, shared=232448, matrix="HGMMA.64x128x16.F32.BF16", register_operands=0,
    arithmetic="div.rn.f32:1",
)  # fmt: skip
PLANTED = {
    "divides": "approximate division: div.full.f32:1; use tl.div_rn",
    "counts_rows": "integer rows is not named in jit(): some of its values get a binary of their own",
    "adds_by_chance": "floating-point atomics, whose order is by chance: atom.global.gpu.acq_rel.add.f32:1",
    "multiplies": 'HGMMA.64x128x8.F32.TF32 rounds FP32 operands to 10 bits; pass input_precision="ieee"',
    "spills": "instructions spill registers",
    "sound": "BLOCK follows the number of rows in planted tile by rows, T4096",
}


@pytest.fixture(scope="module")
def planted() -> Result:
    """The kernels of tests/ops/planted_kernels.py, built by the installed Triton."""
    newest = planned()[0]
    ((result,),) = run_builds([newest], ["tests.ops.planted_kernels"]).values()
    return result


@pytest.mark.parametrize(("kernel", "problem"), PLANTED.items(), ids=list(PLANTED))
def test_a_planted_fault_is_found(planted: Result, kernel: str, problem: str) -> None:
    names = [name for name in planted["problems"] if name.split()[0] == f"planted_kernels.{kernel}"]
    assert names and any(problem in found for name in names for found in planted["problems"][name])


def test_a_second_binary_for_an_address_is_found(planted: Result) -> None:
    (name,) = [name for name in planted["problems"] if "sound" in name and "BLOCK=512" in name]
    assert planted["problems"][name] == ["two binaries: the value or alignment of an argument decides"]


def test_a_sound_kernel_has_no_problem(planted: Result) -> None:
    name = "planted_kernels.sound types=fp32,fp32 BLOCK=128 warps=4 stages=2"
    assert name not in planted["problems"]
    assert planted["kernels"][name]["arithmetic"] == "div.rn.f32:1"
    assert planted["cases"][name] == "planted sound, T4096"
    assert planted["follows_rows"]["planted_kernels.sound"] == "BLOCK"


def test_problems_say_where_they_were_found(planted: Result) -> None:
    lines = problems([planted])
    assert len(lines) == sum(map(len, planted["problems"].values()))
    (line,) = [line for line in lines if line.startswith("sm_90 planted_kernels.divides ")]
    assert line.endswith("; use tl.div_rn (first launched by planted divides, T4096)")


@pytest.mark.parametrize(
    ("target", "change", "message"),
    [
        ("sm_90", {}, None),
        ("sm_90", {"shared": 232449}, "232449 bytes of shared memory, sm_90 has 232448"),
        ("gfx942", {}, "232448 bytes of shared memory, gfx942 has 65536"),
        ("sm_90", {"stack": 8}, "0 instructions spill registers, 8 bytes of stack"),
        ("sm_90", {"spills": 2}, "2 instructions spill registers, 0 bytes of stack"),
        ("sm_90", {"arithmetic": "div.approx.f32:3 div.rn.f32:1"}, "approximate division: div.approx.f32:3; use"),
        ("sm_90", {"matrix": "mma.sync.m16n8k8.f32.tf32"}, "mma.sync.m16n8k8.f32.tf32 rounds FP32 operands"),
        ("sm_90", {"atomics": "red.add.f32:1"}, "floating-point atomics, whose order is by chance: red.add.f32:1"),
    ],
)
def test_what_a_binary_must_not_be(target: str, change: dict[str, Any], message: str | None) -> None:
    found = violations(Binary(**{**vars(SOUND), **change}), target)
    assert found == [] if message is None else found[0].startswith(message)


def _result(**kernels: dict[str, Any]) -> Result:
    return {
        "target": "sm_90", "triton": "3.9.0", "assembler": "13.4", "kernels": kernels, "follows_rows": {"k": "ALONE"},
        "cases": {}, "problems": {},
    }  # fmt: skip


def test_differences_are_readable() -> None:
    before = to_table([_result(a={"registers": 40, "matrix": "HGMMA HMMA"}, b={"registers": 8})])
    after = to_table([_result(a={"registers": 41, "matrix": "HGMMA QGMMA"}, c={"shared": 16}) | {"assembler": "13.5"}])
    assert differences(before, before) == []
    assert differences(before, after) == [
        "gone: sm_90 b",
        "new: sm_90 c: shared 16",
        "changed: sm_90 assembler: '13.4' -> '13.5'",
        "changed: sm_90 a: registers 40 -> 41; matrix HMMA -> QGMMA",
    ]


def test_a_table_is_read_as_it_was_written(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(compile_check, "table_path", lambda version: tmp_path / f"table-{version}.json")
    results, path = [_result(a={"registers": 40})], tmp_path / "table-3.9.0.json"
    assert check("3.9.0", results, write=False) == []
    assert not path.exists(), "a version without a table is held to the rules alone"
    assert check("3.9.0", results, write=True) == []
    assert read_table(path) == {
        "sm_90 assembler": "13.4",
        "sm_90 k follows rows": "ALONE",
        "sm_90 a": {"registers": 40},
    }
    assert len(path.read_text().splitlines()) == 5
    assert check("3.9.0", [_result(a={"registers": 41})], write=False) == ["changed: sm_90 a: registers 40 -> 41"]
    write_table(path, {})
    assert check("3.9.0", [_result()], write=False)[0] == "new: sm_90 assembler: '13.4'"


def test_a_build_that_fails_shows_its_log() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Triton .*, sm_90:.*No module named 'no_such_cases'"):
        run_builds([planned()[0]], ["no_such_cases"])


def test_the_oldest_triton_is_built_where_it_is_found(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LOCKSTEP_TRITON_360", str(tmp_path))
    assert [build.target for build in planned()] == [DISASSEMBLED, "sm_80", "sm_100", "gfx942"]
    (tmp_path / "triton").mkdir()
    assert planned()[1] == Build(OLDEST, tmp_path, DISASSEMBLED)
    assert {build.target for build in planned()} == set(TARGETS)
    monkeypatch.setattr("importlib.metadata.version", lambda name: OLDEST)
    assert planned() == [Build(OLDEST, None, DISASSEMBLED)]


def test_every_operator_with_a_kernel_has_cases() -> None:
    operators = {case.operator for module in case_modules() for case in module.CASES}
    tested = {path.stem.removeprefix("test_") for path in FOLDER.glob("test_*.py")}
    assert operators == tested - {"interpreter", "tiles"}


@pytest.fixture(scope="module")
def built() -> dict[str, list[Result]]:
    return run_builds(planned())


@pytest.mark.slow
def test_production_kernels_are_as_in_the_table(built: dict[str, list[Result]]) -> None:
    """Takes minutes, nearly all of it in the compilers."""
    newest = planned()[0].version
    assert check(newest, built[newest], write=False) == []
    assert table_path(newest).is_file() or os.environ.get("CI") != "true"


@pytest.mark.slow
def test_production_kernels_of_the_oldest_triton(built: dict[str, list[Result]]) -> None:
    if OLDEST not in built and os.environ.get("CI") != "true":
        pytest.skip(MISSING)
    assert OLDEST in built, MISSING
    assert check(OLDEST, built[OLDEST], write=False) == []
