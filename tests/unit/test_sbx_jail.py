"""The bubblewrap command line holds what isolation rests on, whatever the request says."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.core.contract import Limits
from controller.sbx import jail
from controller.sbx.limits import CgroupTree, rlimits

texts = st.dictionaries(st.text(max_size=5), st.text(st.characters(codec="utf-8"), max_size=20), max_size=3)


def view(env: dict[str, str], workdir: str = "/workspace") -> jail.View:
    box = Path("/box")
    return jail.View(
        accounts=box / "etc",
        workspace=box / "w",
        output=box / "o",
        tmp=box / "t",
        binds=[(Path("/cache/venv"), "/opt/venv")],
        env=env,
        workdir=workdir,
    )


def options(args: bytes) -> list[str]:
    return args.decode().split("\0")[:-1]


def test_isolation_is_complete_and_sharing_is_absent() -> None:
    args = options(jail.arguments(view({})))
    for needed in (
        "--unshare-user",
        "--unshare-all",
        "--disable-userns",
        "--new-session",
        "--die-with-parent",
        "--clearenv",
    ):
        assert needed in args
    assert args[args.index("--cap-drop") + 1] == "ALL"
    assert "--share-net" not in args


def test_only_the_tasks_own_directories_are_writable_and_never_the_root() -> None:
    args = options(jail.arguments(view({})))
    binds = {
        args[i + 2]: (args[i], args[i + 1])
        for i, arg in enumerate(args)
        if arg in ("--bind", "--ro-bind", "--ro-bind-try")
    }
    assert {target for target, (kind, _) in binds.items() if kind == "--bind"} == {"/workspace", "/output", "/tmp"}
    assert all(source != "/" for _, source in binds.values())
    assert binds["/opt/venv"] == ("--ro-bind", "/cache/venv")
    assert args.index("--remount-ro") > max(
        i for i, arg in enumerate(args) if arg in ("--bind", "--tmpfs", "--ro-bind")
    )


@given(texts)
def test_a_value_is_a_value_or_refused(env: dict[str, str]) -> None:
    if any("\0" in text for pair in env.items() for text in pair):
        with pytest.raises(ValueError, match="NUL"):
            jail.arguments(view(env))
        return
    args = options(jail.arguments(view(env)))
    assert len(args) == len(options(jail.arguments(view({})))) + 3 * len(env)
    for name, value in env.items():
        assert any(args[i : i + 3] == ["--setenv", name, value] for i in range(len(args)))


def test_the_request_cannot_say_where_outputs_go() -> None:
    env = jail.environment({"A": "template"}, ["/opt/bin"], {"A": "request", "SISU_OUTPUT_DIR": "/etc"})
    assert env["SISU_OUTPUT_DIR"] == "/output"
    assert env["A"] == "request"
    assert env["PATH"].startswith("/opt/bin:")


def test_memory_is_an_rlimit_only_where_no_cgroup_holds_it() -> None:
    limits = Limits(memory_mb=100)
    assert not any(arg.startswith("--data") for arg in rlimits(limits, memory=False))
    assert f"--data={100 << 20}" in rlimits(limits, memory=True)


@pytest.mark.parametrize(
    ("version", "names", "expected"),
    [
        (2, ["one"], {"memory.max": "104857600", "pids.max": "36", "cpu.max": "150000 100000"}),
        (1, ["m", "p", "c"], {"memory.limit_in_bytes": "104857600", "pids.max": "36", "cpu.cfs_quota_us": "150000"}),
    ],
)
def test_cgroup_values_by_version(tmp_path: Path, version: int, names: list[str], expected: dict[str, str]) -> None:
    """Plain directories stand in for the kernel's; the real v1 ones are used by the integration tests."""
    for name in names:
        (tmp_path / name).mkdir()
    tree = CgroupTree(roots=tuple(tmp_path / name for name in names), version=version)
    group = tree.create("box", Limits(memory_mb=100, pids=32, cpu_millis=1500))
    assert {file.name: file.read_text() for file in tmp_path.glob("*/box/*")} == expected
    assert tree.leftovers() == ["box"]
    assert {path.name for path in group.procs} == {"cgroup.procs"}


def test_cgroup_counters_by_version(tmp_path: Path) -> None:
    (tmp_path / "box").mkdir()
    group = CgroupTree(roots=(tmp_path,), version=2).named("box")
    assert (group.oom_kills(), group.peak_mb(), group.cpu_ms()) == (0, None, None)
    (tmp_path / "box" / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 2\noom_kill 1\n")
    (tmp_path / "box" / "memory.peak").write_text("1048577\n")
    (tmp_path / "box" / "cpu.stat").write_text("usage_usec 2500000\nuser_usec 1\n")
    assert (group.oom_kills(), group.peak_mb(), group.cpu_ms()) == (1, 2, 2500)
