"""The e2b provider without E2B: its settings, its table of exceptions, its command line, its deadlines."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from connectrpc.code import Code
from connectrpc.errors import ConnectError
from e2b import exceptions as e2b

from controller import main
from controller.config import ConfigError, load
from controller.core.contract import Egress, ErrCode, Limits, SBXReq
from controller.core.errors import InvalidIntent
from controller.core.model import Owner
from controller.sbx import e2b_errors
from controller.sbx.e2b import E2BProvider
from controller.sbx.e2b_api import Account, mark, owner_of
from controller.sbx.e2b_box import command_line
from controller.sbx.loop import JobCanceled, Loop, Silent, within
from controller.sbx.remote import MAX_SCRIPT

ENVIRON = {
    "DATABASE_URL": "postgresql://u@h/d",
    "RANDOM_SEED": "1",
    "OC_MODE": "replay",
    "SBX_MODE": "live",
    "SBX_PROVIDER": "e2b",
    "POLICY_FILE": "/etc/policy.yaml",
    "E2B_API_KEY": "e2b_0123456789",
    "SBX_E2B_TEMPLATES": "python=abc123,base=def456",
}


def request(**changes: Any) -> SBXReq:
    values: dict[str, Any] = {"intent_id": "i", "run_id": "r", "step_id": "s", "task_id": "t", "generation": 1}
    values |= {"env_ref": "e2b:base@def456/b1", "cmd": "true", "files_in": (), "env": {}, "workdir": "/workspace"}
    values |= {"timeout_ms": 1000, "limits": Limits(), "egress": Egress()}
    return SBXReq(**(values | changes))


# --------------------------------------------------------------------------- settings


@pytest.mark.parametrize("name", ["E2B_API_KEY", "SBX_E2B_TEMPLATES"])
def test_what_e2b_needs_is_named_in_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is not set; SBX_PROVIDER=e2b needs it [^\n]*$"):
        main._sandboxes(load({**ENVIRON, name: ""}))


def test_a_mock_needs_no_key() -> None:
    assert main._sandboxes(load({**ENVIRON, "SBX_MODE": "mock", "E2B_API_KEY": ""})).name == "mock"


@pytest.mark.parametrize("templates", ["python", "python=", "=x", "a=b,", "a=b,,c=d", "a=b c", "a=name:tag", "a=b=c"])
def test_malformed_templates_are_refused(templates: str) -> None:
    with pytest.raises(ConfigError, match=r"^SBX_E2B_TEMPLATES holds "):
        load({**ENVIRON, "SBX_E2B_TEMPLATES": templates})


def test_the_key_is_never_shown() -> None:
    settings = load(ENVIRON)
    assert settings.e2b_templates == {"python": "abc123", "base": "def456"}
    assert "e2b_0123456789" not in repr(settings)
    assert "e2b_0123456789" not in repr(Account(key="e2b_0123456789", domain="e2b.app"))
    with pytest.raises(ConfigError) as refused:
        load({**ENVIRON, "E2B_API_URL": "ftp://secret"})
    assert "secret" not in str(refused.value)


def test_the_sdk_is_imported_on_first_use_only() -> None:
    code = "import sys, controller.sbx.e2b; print(sorted({'e2b', 'connectrpc', 'pyqwest'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# --------------------------------------------------------------------------- requests


@pytest.fixture
def provider() -> Iterator[E2BProvider]:
    made = E2BProvider(Account(key="k", domain="e2b.invalid"), templates={"base": "def456"})
    yield made
    made.close()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"env_ref": "local:base@sha256:0"}, "spec.sandbox.template"),
        ({"env_ref": "e2b:python@def456/b1"}, "spec.sandbox.template"),
        ({"env_ref": "e2b:base@another/b1"}, "spec.sandbox.template"),
        ({"env_ref": "e2b:base@def456"}, "spec.sandbox.template"),
        ({"egress": Egress(mode="Allow", allow=("h:443",))}, "spec.sandbox.egress.allow"),
        ({"egress": Egress(mode="Allow")}, "spec.sandbox.egress.allow"),
        ({"workdir": "/etc"}, "spec.sandbox"),
        ({"workdir": "/workspace/../etc"}, "spec.sandbox"),
        ({"env": {"A=B": "x"}}, "spec.sandbox"),
        ({"cmd": "a\0b"}, "spec.sandbox"),
        ({"cmd": "'" * (MAX_SCRIPT // 5)}, "spec.sandbox"),
    ],
)
def test_what_cannot_be_run_as_it_is_meant_is_refused(
    provider: E2BProvider, changes: dict[str, Any], field: str
) -> None:
    assert provider.check(request()) == ("def456", "b1")
    with pytest.raises(InvalidIntent) as refused:
        provider.check(request(**changes))
    assert refused.value.field == field


def test_the_mark_survives_the_way() -> None:
    owner = Owner(store_id="s 1", run_id="r", task_key="k", attempt=2, fence=7)
    assert owner_of(mark(owner)) == owner
    assert owner_of({**mark(owner), "sisu-kodo-fence": "x"}) is None
    assert owner_of({"sisu-kodo-store": "s 1"}) is None


@pytest.mark.parametrize("cmd", ["exit 7", "echo 'a b' \"$X\" `echo c`; exit 3", "kill -TERM $$"])
def test_the_script_ends_as_its_command(cmd: str) -> None:
    # Without what kills every other process of this user.
    text = command_line(request(cmd=cmd), memory=False).replace("kill -KILL -1 2> /dev/null; ", "")
    assert "kill -KILL" not in text
    env = {"PATH": "/usr/bin:/bin", "X": "d"}
    wrapped = subprocess.run(["/bin/bash", "-c", text], env=env, capture_output=True, check=False)
    plain = subprocess.run(
        ["/bin/bash", "-c", f"/bin/sh -c {_quoted(cmd)}; exit $?"], env=env, capture_output=True, check=False
    )
    assert (wrapped.returncode, wrapped.stdout) == (plain.returncode, plain.stdout)


def test_a_path_of_the_request_survives_the_login_shell() -> None:
    text = command_line(request(cmd="echo $PATH", env={"PATH": "/opt/x:/usr/bin"}), memory=False)
    text = text.replace("kill -KILL -1 2> /dev/null; ", "")
    env = {"PATH": "/opt/x:/usr/bin", "HOME": "/nonexistent"}
    done = subprocess.run(["/bin/bash", "-l", "-c", text], env=env, capture_output=True, check=True)
    assert done.stdout == b"/opt/x:/usr/bin\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\"'\"'") + "'"


# --------------------------------------------------------------------------- exceptions

RATE_LIMIT: Exception = e2b.RateLimitException("x")  # type: ignore[no-untyped-call]
NOT_JSON = json.JSONDecodeError("x", "", 0)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        # Both are TimeoutExceptions: their order decides.
        (e2b.SandboxNotRunningException("x"), ErrCode.LOST),
        (e2b.SandboxUnreachableException("x"), ErrCode.NET_FAIL),
        (e2b.SandboxNotFoundException("x"), ErrCode.LOST),
        (e2b.TimeoutException("x"), ErrCode.NET_FAIL),
        (RATE_LIMIT, ErrCode.NET_FAIL),
        (e2b.ServiceBusyException("x"), ErrCode.NET_FAIL),
        (httpx.ConnectError("x"), ErrCode.NET_FAIL),
        (httpx.ReadTimeout("x"), ErrCode.NET_FAIL),
        (ConnectError(Code.UNKNOWN, "x"), ErrCode.NET_FAIL),
        (ConnectionResetError("x"), ErrCode.NET_FAIL),
        (NOT_JSON, ErrCode.NET_FAIL),
        (Silent("x"), ErrCode.NET_FAIL),
        (e2b.FileNotFoundException("x"), ErrCode.UPLOAD_FAIL),
        (e2b.NotEnoughSpaceException("x"), ErrCode.UPLOAD_FAIL),
        (e2b.SandboxException("x"), ErrCode.UPLOAD_FAIL),
        (e2b.AuthenticationException("x"), ErrCode.UPLOAD_FAIL),
        (Exception("Command ended without an end event"), ErrCode.UPLOAD_FAIL),
    ],
)
def test_what_fails_in_a_box(error: Exception, code: ErrCode) -> None:
    assert e2b_errors.of_phase(error, otherwise=ErrCode.UPLOAD_FAIL).code is code


def test_a_directory_that_is_not_there_is_no_lost_box() -> None:
    assert e2b_errors.of_phase(e2b.InvalidArgumentException("cwd"), otherwise=ErrCode.LOST).code is ErrCode.BOOT_FAIL


@pytest.mark.parametrize(
    ("error", "code", "undecided"),
    [
        (RATE_LIMIT, ErrCode.BOOT_FAIL, False),
        (e2b.ServiceBusyException("x"), ErrCode.BOOT_FAIL, False),
        (e2b.AuthenticationException("x"), ErrCode.BOOT_FAIL, False),
        (e2b.SandboxException("x", status_code=400), ErrCode.BOOT_FAIL, False),
        (httpx.ConnectError("x"), ErrCode.NET_FAIL, False),
        (e2b.SandboxException("x", status_code=500), ErrCode.BOOT_FAIL, True),
        (e2b.SandboxException("x", status_code=504), ErrCode.BOOT_FAIL, True),
        (e2b.SandboxException("x"), ErrCode.BOOT_FAIL, True),
        (httpx.ReadTimeout("x"), ErrCode.BOOT_FAIL, True),
        (httpx.ReadError("x"), ErrCode.BOOT_FAIL, True),
        (NOT_JSON, ErrCode.BOOT_FAIL, True),
        (Silent("x"), ErrCode.BOOT_FAIL, True),
    ],
)
def test_what_fails_when_a_box_is_made(error: Exception, code: ErrCode, undecided: bool) -> None:
    assert (e2b_errors.of_create(error).code, e2b_errors.undecided(error)) == (code, undecided)


# --------------------------------------------------------------------------- deadlines


async def _stubborn() -> None:
    """As the SDK on 3.11: it does not end when it is canceled."""
    while True:
        try:
            await asyncio.sleep(0.3)
            return
        except asyncio.CancelledError:
            continue


def test_a_call_that_cannot_be_canceled_is_given_up() -> None:
    loop = Loop("test")
    started = time.monotonic()
    with pytest.raises(Silent, match=r"^it: no answer within 0\.05 s$"):
        loop.run(within(0.05, _stubborn(), "it"))
    assert time.monotonic() - started < 0.25
    loop.close()


def test_a_call_that_was_canceled_by_another_hand_does_not_cancel_its_caller() -> None:
    async def canceled() -> None:
        raise asyncio.CancelledError

    loop = Loop("test")
    with pytest.raises(Silent, match="taken back"):
        loop.run(within(1, canceled(), "it"))
    loop.close()


def test_a_canceled_job_cleans_up_first() -> None:
    done: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(30)
        finally:
            await asyncio.sleep(0.05)
            done.append("cleaned up")

    loop = Loop("test")
    job = loop.start(work())
    time.sleep(0.02)
    job.cancel()
    job.cancel()
    with pytest.raises(JobCanceled):
        job.result()
    assert done == ["cleaned up"]
    loop.close()
