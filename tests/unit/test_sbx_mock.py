"""The mock's little language: what it knows, it does; what it does not know, it shows and does not guess."""

from __future__ import annotations

import pytest

from controller.core.contract import Egress, ErrCode, Limits, SBXReq, SBXRes
from controller.core.model import Owner
from controller.sbx.mock import MockProvider


def run(cmd: str, **env: str) -> SBXRes:
    provider = MockProvider()
    request = SBXReq(
        intent_id="i",
        run_id="r",
        step_id="s",
        task_id="t",
        generation=1,
        env_ref=provider.resolve("python"),
        cmd=cmd,
        files_in=(),
        env=env,
        workdir="/workspace",
        timeout_ms=1000,
        limits=Limits(),
        egress=Egress(),
    )
    owner = Owner(store_id="s", run_id="r", task_key="k", attempt=1, fence=1)
    return provider.run(request, owner=owner, files={}, emit=lambda _: None, canceled=lambda: False)[0]


@pytest.mark.parametrize(
    ("cmd", "status", "stdout"),
    [
        ("echo a && echo b; false && echo c; echo d", 0, "a\nb\nd\n"),
        ("echo 'x;y && z' \"q  r\"", 0, "x;y && z q  r\n"),
        ("echo; echo", 0, "\n\n"),
        ('echo "$WHO"; exit 4; echo no', 4, "me\n"),
        ('echo "$SISU_OUTPUT_DIR"', 0, "/output\n"),
        ("exit 256", 0, ""),
    ],
)
def test_known_commands(cmd: str, status: int, stdout: str) -> None:
    res = run(cmd, WHO="me")
    assert (res.exit, res.stdout) == (status, stdout)


@pytest.mark.parametrize(
    "cmd", ["pytest -q", "echo $HOME", "echo `id`", "true || false", "true &&", "exit 1 &", "echo a | cat", "echo -n"]
)
def test_unknown_commands_are_shown(cmd: str) -> None:
    assert (run(cmd).exit, run(cmd).stdout) == (0, f"{cmd}\n")


def test_what_it_is_given_for_another_provider_is_refused() -> None:
    provider = MockProvider(templates=("base",))
    assert provider.resolve("base") == "mock:base"
    assert run("true").err_code is ErrCode.NONE
