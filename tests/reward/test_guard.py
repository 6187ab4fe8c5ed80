"""The shut process: whatever would open, run or reach something ends it first, and text is never evaluated."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reward.config import RewardConfig
from reward.pool import RewardPool

ROOT = Path(__file__).parents[2]
# Each is tried in a process of its own, after the doors are shut. They work in {folder}, where `victim` is a file.
ATTACKS = {
    "write": "open('{folder}/touched', 'w')",
    "append": "open('{folder}/victim', 'a').write('x')",
    "os.open": "os.open('{folder}/touched', os.O_CREAT | os.O_WRONLY)",
    "read": "open('/etc/passwd').read()",
    "read a link": "open(sys.prefix + '/../../../../../../etc/passwd').read()",
    "pathlib": "pathlib.Path('{folder}/touched').touch()",
    "remove": "os.remove('{folder}/victim')",
    "rename": "os.rename('{folder}/victim', '{folder}/touched')",
    "mkdir": "os.mkdir('{folder}/touched')",
    "truncate": "os.truncate('{folder}/victim', 0)",
    "chmod": "os.chmod('{folder}/victim', 0)",
    "link": "os.symlink('{folder}/victim', '{folder}/touched')",
    "list": "os.listdir('{folder}')",
    "system": "os.system('touch {folder}/touched')",
    "popen": "os.popen('touch {folder}/touched')",
    "subprocess": "subprocess.run(['touch', '{folder}/touched'])",
    "fork": "os.fork()",
    "exec": "os.execv('/bin/touch', ['touch', '{folder}/touched'])",
    "spawn": "os.posix_spawn('/bin/touch', ['touch', '{folder}/touched'], {{}})",
    "kill": "os.kill(os.getppid(), 0)",
    "socket": "socket.socket()",
    "connect": "socket.create_connection(('127.0.0.1', 9))",
    "lookup": "socket.getaddrinfo('localhost', 80)",
    "library": "ctypes.CDLL('libc.so.6')",
    "eval": "eval('1 + 1')",
    "eval an import": "eval(\"__import__('os').system('touch {folder}/touched')\")",
    "exec text": "exec('x = 1')",
    "compile": "compile('1 + 1', '<string>', 'eval')",
    "memory limit": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "trace": "sys.settrace(print)",
    "hook": "sys.addaudithook(print)",
}
# What a verification needs.
HARMLESS = {
    "compute": "sympy.simplify(sympy.sin(x) ** 2 + sympy.cos(x) ** 2)",
    "import": "importlib.import_module('sympy.physics.mechanics')",
    "classes": "collections.namedtuple('Pair', 'a b')",
    "polynomials": "sympy.factor(x ** 5 - 1)",
    "numbers": "sympy.Number('12'), sympy.Number('1.5')",
    "files of no size": "assert resource.getrlimit(resource.RLIMIT_FSIZE) == (0, 0)",
    "no processes": "assert resource.getrlimit(resource.RLIMIT_NPROC) == (0, 0)",
    "few descriptors": "assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 32",
    "own limit": "resource.setrlimit(resource.RLIMIT_CPU, (60, 60))",
}
# Text that sympy would evaluate; here it is refused with an error and nothing ends.
REFUSED = {
    "sympify": "sympy.sympify(\"__import__('os').system('touch {folder}/touched')\")",
    "sympify names": "sympy.sympify('x + 1')",
    "number": "sympy.Number('1+1')",
    "parse_expr": "sympy.parsing.sympy_parser.parse_expr('2*x')",
}
PROGRAM = """
import collections, ctypes, importlib, json, os, pathlib, resource, socket, subprocess, sys, types
import sympy, sympy.parsing.sympy_parser
from reward.guard import shut

x = sympy.Symbol("x")
sympy.simplify(sympy.sin(x) ** 2 + sympy.cos(x) ** 2)
outcomes = {}
for name, code in json.load(sys.stdin).items():
    reading, writing = os.pipe()
    attack = types.FunctionType(compile(code, "<attack>", "exec"), globals())
    child = os.fork()
    if child == 0:
        try:
            shut(writing)
            attack()
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}".encode())
            os._exit(3)
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    outcomes[name] = [os.waitstatus_to_exitcode(status), os.read(reading, 4096).decode()]
    os.close(reading)
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit status and last words of every attempt; what it left behind fails the test here."""
    folder = tmp_path_factory.mktemp("guard")
    (folder / "victim").write_text("whole")
    program = {name: code.format(folder=folder) for name, code in {**ATTACKS, **HARMLESS, **REFUSED}.items()}
    done = subprocess.run(  # as a worker is: in a folder that Python may import from, where `<string>` is no file
        [sys.executable, "-P", "-c", PROGRAM],
        input=json.dumps(program),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert os.listdir(folder) == ["victim"] and (folder / "victim").read_text() == "whole"
    assert (folder / "victim").stat().st_mode & 0o400
    outcomes: dict[str, tuple[int, str]] = json.loads(done.stdout)
    return outcomes


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_ends_the_process_before_it_happens(name: str, outcomes: dict[str, tuple[int, str]]) -> None:
    status, words = outcomes[name]
    assert status == 1, words
    reply = json.loads(words)
    assert (reply["reason"], reply["retire"]) == ("forbidden", True)
    assert reply["message"].startswith("the verifier was led to ")


@pytest.mark.parametrize("name", HARMLESS)
def test_what_a_verification_needs_goes_on(name: str, outcomes: dict[str, tuple[int, str]]) -> None:
    assert outcomes[name] == [0, ""]


@pytest.mark.parametrize("name", REFUSED)
def test_no_text_is_evaluated(name: str, outcomes: dict[str, tuple[int, str]]) -> None:
    status, error = outcomes[name]
    assert (status, error) in [(3, "SympifyError"), (3, "ValueError")]


def test_completions_that_hold_programs_touch_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch = f"touch {tmp_path}/touched"
    programs = [
        f"__import__('os').system('{touch}')",
        f'__import__("subprocess").run(["touch", "{tmp_path}/touched"])',
        f"open('{tmp_path}/touched', 'w')",
        "__import__('socket').create_connection(('127.0.0.1', 9))",
        "().__class__.__base__.__subclasses__()",
        "lambda: 0",
        "exec('x=1')",
        "\\input{/etc/passwd}",
        f"\\write18{{{touch}}}",
        "$(touch touched)",
        "`touch touched`",
        "{{7*7}}",
    ]
    wrapped = ["{}", "\\text{{{}}}", "\\mathrm{{{}}}", "\\operatorname{{{}}}(x)", "x_{{{}}}", "1+{}", "\\sqrt{{{}}}"]
    items = [(f"\\boxed{{{form.format(program)}}}", "x^2+1") for program in programs for form in wrapped]
    with RewardPool(RewardConfig(timeout_seconds=60.0)) as pool:
        results = pool.score(items)
    assert [result.score for result in results] == [0.0] * len(items)
    assert [(item, result) for item, result in zip(items, results, strict=True) if result.is_failure] == []
    assert os.listdir(tmp_path) == []
