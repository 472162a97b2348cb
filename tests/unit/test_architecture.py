"""What the linter and the import contracts do not see: size and docstring of modules, where SQL is, who starts processes."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
CONTROLLER = REPO / "controller"
MODULES = sorted(CONTROLLER.rglob("*.py"))
TESTS = sorted((REPO / "tests").rglob("*.py"))
MAX_LINES = 350
SQL = re.compile(
    r"\b(SELECT\s+\S.*\bFROM\b|SELECT\s+(1\b|pg_|app\.)|INSERT\s+INTO\s|UPDATE\s+\S+\s+SET\s|DELETE\s+FROM\s"
    r"|CREATE\s+(TABLE|SCHEMA|INDEX)\s)",
    re.DOTALL,
)
PROBE = "SELECT 1"  # asked by readiness, of the pool itself
STARTS = {"subprocess", "pty", "multiprocessing"}
OS_STARTS = {
    "system",
    "popen",
    "fork",
    "forkpty",
    "posix_spawn",
    "posix_spawnp",
    "execv",
    "execve",
    "execvp",
    "execvpe",
}
MAY_START = {"workspace", "sbx", "oc/daemon.py"}


def name(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def texts(module: ast.Module) -> Iterator[tuple[int, str]]:
    """String literals that are not docstrings; an f-string's pieces are put together with a placeholder."""
    prose = {id(n.value) for n in ast.walk(module) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    for node in ast.walk(module):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr):
            parts = [str(p.value) if isinstance(p, ast.Constant) else "x" for p in node.values]
            yield node.lineno, "".join(parts)


def imports(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_every_module_says_what_it_is_for_and_holds_one_idea(path: Path) -> None:
    doc = ast.get_docstring(tree(path))
    assert doc and len(doc) > 20, f"{name(path)} has no docstring that says what it is for"
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{name(path)} has {lines} lines; split it by idea"


def test_the_import_contracts_are_there_and_name_modules_that_exist() -> None:
    found = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["importlinter"]
    contracts = found["contracts"]
    layers = next(c for c in contracts if c["type"] == "layers")
    assert layers["containers"] == ["controller"] and layers["exhaustive"] is True
    order = [[m.strip() for m in layer.split("|")] for layer in layers["layers"]]
    flat = [m for layer in order for m in layer]
    here = {
        p.stem
        for p in CONTROLLER.iterdir()
        if (p.suffix == ".py" or p.is_dir()) and not p.name.startswith(("__init__", "__pyc", "."))
    }
    assert set(flat) == here, "every module of controller/ has a layer, and every layer is a module"
    below = [flat.index(m) for m in ("main", "kube", "workflows", "ports", "core")]
    assert below == sorted(below)
    adapters = next(layer for layer in order if "kube" in layer)
    assert {"kube", "oc", "sbx", "workspace", "db", "gateway"} <= set(adapters), "adapters do not know each other"

    forbidden = {
        target: set(c["source_modules"])
        for c in contracts
        if c["type"] == "forbidden"
        for target in c["forbidden_modules"]
    }
    for target in ("dbos", "kubernetes", "kopf", "psycopg", "httpx"):
        assert "controller.core" in forbidden[target], f"core may not import {target}"
    for sources in forbidden.values():
        for module in sources:
            path = REPO / module.replace(".", "/")
            assert path.is_dir() or path.with_suffix(".py").is_file(), f"{module} does not exist"


@pytest.mark.parametrize("path", TESTS, ids=name)
def test_tests_use_fakes_and_no_mocks(path: Path) -> None:
    mocks = [
        one for one in imports(tree(path)) if one == "mock" or one.startswith("unittest.mock") or one == "pytest_mock"
    ]
    assert not mocks


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent != CONTROLLER / "db"], ids=name)
def test_sql_is_only_in_db_and_migrations(path: Path) -> None:
    found = [f"line {line}: {text[:60]!r}" for line, text in texts(tree(path)) if SQL.search(text) and text != PROBE]
    assert not found, f"{name(path)} holds SQL"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_only_workspace_sandboxes_and_the_daemon_start_processes(path: Path) -> None:
    where = path.relative_to(CONTROLLER)
    if where.parts[0] in MAY_START or where.as_posix() in MAY_START:
        return
    module = tree(path)
    found = [one for one in imports(module) if one.split(".")[0] in STARTS]
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "os" and node.attr in OS_STARTS:
                found.append(f"os.{node.attr}")
            if node.value.id == "asyncio" and node.attr.startswith("create_subprocess"):
                found.append(f"asyncio.{node.attr}")
    assert not found, f"{name(path)} starts processes"


@pytest.mark.parametrize(
    ("text", "is_sql"),
    [
        ("SELECT id FROM app.runs", True),
        ("UPDATE app.runs SET a = 1", True),
        ("INSERT INTO x VALUES (1)", True),
        ("DELETE FROM x", True),
        ("SELECT pg_advisory_lock(1)", True),
        ("select one of the plans from the list", False),
        ("To UPDATE a plan, retry", False),
    ],
)
def test_the_search_for_sql_finds_sql(text: str, is_sql: bool) -> None:
    assert bool(SQL.search(text)) == is_sql
