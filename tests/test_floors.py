"""The house rules that a reader of one file cannot see: who may import whom, and how large a file may grow."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT: dict[str, set[str]] = {
    "ops": set(),
    "policy": {"ops"},
    "rollout": {"policy", "ops"},
    "trainer": {"policy", "ops"},
    "reward": set(),
    "rl": {"ops", "policy", "rollout", "trainer", "reward"},
}
# Outside packages that only some floors may use.
BELONGS_TO = {"ray": {"rl"}, "triton": {"ops"}}
REWARD_WITHOUT = {"torch", "ray", "numpy"}
MAX_FUNCTION_LINES = 80
SOURCES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def max_lines(package: str) -> int:
    return 700 if package == "ops" else 500


def imported_modules(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names of every import in the file, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = f"{package}.{node.module or ''}".rstrip(".") if node.level else str(node.module)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def import_violations(source: str, package: str) -> list[str]:
    return [line for name in imported_modules(ast.parse(source), package) if (line := _violation(name, package))]


def _violation(name: str, package: str) -> str | None:
    top, *rest = name.split(".")
    if top in MAY_IMPORT and top != package and top not in MAY_IMPORT[package]:
        return f"{package} must not import {name}"
    if top == "ops" and package != "ops" and rest and (ROOT / "ops" / f"{rest[0]}.py").exists():
        return f"{name} is inside ops; import the public name from ops"
    if package not in BELONGS_TO.get(top, {package}):
        return f"{package} must not import {top}"
    if package == "reward" and top in REWARD_WITHOUT:
        return f"reward must not import {top}"
    return None


def size_violations(source: str, package: str) -> list[str]:
    lines = len(source.splitlines())
    violations = [f"{lines} lines, more than {max_lines(package)}"] if lines > max_lines(package) else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                violations.append(f"{node.name} has {length} lines, more than {MAX_FUNCTION_LINES}")
    return violations


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_keeps_the_house_rules(path: Path) -> None:
    package, source = path.relative_to(ROOT).parts[0], path.read_text()
    assert import_violations(source, package) + size_violations(source, package) == []
    assert path.stem not in sys.stdlib_module_names


@pytest.mark.parametrize(
    ("package", "source", "message"),
    [
        ("ops", "import policy", "ops must not import policy"),
        ("policy", "from rollout.config import RolloutConfig", "policy must not import rollout"),
        ("rollout", "from trainer import loss", "rollout must not import trainer"),
        ("trainer", "def f():\n    import reward.pool", "trainer must not import reward.pool"),
        ("reward", "import numpy as np", "reward must not import numpy"),
        ("rollout", "import ray.util", "rollout must not import ray"),
        ("policy", "import triton.language as tl", "policy must not import triton"),
        ("policy", "from ops.layout import ChunkLayout", "ops.layout.ChunkLayout is inside ops"),
        ("policy", "from ops import layout", "ops.layout is inside ops"),
    ],
)
def test_forbidden_import_is_found(package: str, source: str, message: str) -> None:
    (violation,) = import_violations(source, package)
    assert violation.startswith(message)


def test_allowed_imports_pass() -> None:
    assert import_violations("import ray\nfrom trainer.config import TrainerConfig\nimport torch", "rl") == []
    assert import_violations("from ops import ChunkLayout\nfrom .config import Config", "policy") == []
    assert import_violations("from .layout import ChunkLayout\nimport triton", "ops") == []


def test_oversized_code_is_found() -> None:
    long_function = "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES
    assert size_violations(long_function, "rl") == ["f has 81 lines, more than 80"]
    assert size_violations("x = 1\n" * 501, "rl") == ["501 lines, more than 500"]
    assert size_violations("x = 1\n" * 501, "ops") == []


@pytest.mark.parametrize("module", ["reward.pool", "rl.config"])
def test_light_module_loads_neither_torch_nor_ray(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'ray'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")
