"""What the e2b provider makes of an E2B that fails: the right errCode, within its outer bound, and no box left behind.

The unmodified SDK talks to devcluster/e2b with one failure on purpose per test; every test ends with an empty server.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from controller.core.contract import Egress, ErrCode, Limits, SBXReq
from controller.core.errors import Unavailable
from controller.sbx import e2b
from controller.sbx.e2b_api import Account
from controller.sbx.e2b_calls import Bounds
from devcluster.e2b.api import Server
from devcluster.e2b.faults import Fault
from tests.support.sandbox_kit import Kit, archive, e2b_kit, eventually, upload

BOUNDS = Bounds(
    create=2.5, api=1.5, transfer=1.5, tool=5.0, probe=0.4, busy=3.0, grace=1.0, sweeps=(0.3, 0.5, 1.0, 2.0, 2.0)
)
MANY = 10**6
FILES = upload(("archive", archive({"greeting": b"hello\n"})))
SLACK = 5.0  # seconds that a loaded machine may add


@pytest.fixture
def both(root: Path) -> Iterator[tuple[Kit, Server]]:
    with e2b_kit(root, bounds=BOUNDS) as (kit, server):
        yield kit, server
        server.faults.plan.clear()
        eventually(lambda: not server.host.sandboxes, seconds=10)


def plan(server: Server, **fault: Any) -> None:
    server.faults.plan.append(Fault(**fault))


# --------------------------------------------------------------------------- no box can be made


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_e2b_is_waited_out(both: tuple[Kit, Server], status: int) -> None:
    kit, server = both
    plan(server, operation="create", status=status, headers={"Retry-After": "1"})
    out = kit.run("echo fine")
    assert (out.res.err_code, out.res.stdout) == (ErrCode.NONE, "fine\n")
    assert server.faults.seen.count("create") == 2


@pytest.mark.parametrize(
    ("fault", "code", "says"),
    [
        ({"status": 429, "times": MANY, "headers": {"Retry-After": "60"}}, ErrCode.BOOT_FAIL, "RateLimitException"),
        ({"status": 503, "times": MANY}, ErrCode.BOOT_FAIL, "ServiceBusyException"),
        ({"status": 500}, ErrCode.BOOT_FAIL, "on purpose"),
        ({"status": 500, "body": "oops"}, ErrCode.BOOT_FAIL, "JSONDecodeError"),
        ({"status": 401}, ErrCode.BOOT_FAIL, "AuthenticationException"),
        ({"status": 404}, ErrCode.BOOT_FAIL, "404"),
        ({"silent": True}, ErrCode.BOOT_FAIL, "no answer within 2.5 s"),
    ],
    ids=["429", "503", "500", "500-text", "401", "404", "silent"],
)
def test_no_box(both: tuple[Kit, Server], fault: dict[str, Any], code: ErrCode, says: str) -> None:
    kit, server = both
    plan(server, operation="create", **fault)
    out = kit.run("echo never")
    assert (out.res.err_code, out.res.exit) == (code, None)
    assert says in out.res.stderr
    assert out.seconds < BOUNDS.create + BOUNDS.api + SLACK
    assert not kit.start_log.exists()


@pytest.mark.parametrize(
    "fault",
    [
        {"held": 3.0},
        {"late": 4.0},
        {"status": 502, "done": True},
        {"status": 500, "body": "oops", "done": True},
    ],
    ids=["made too late", "answered too late", "bad gateway", "500 that is not JSON"],
)
def test_a_box_that_was_made_without_an_answer_is_found_and_killed(
    both: tuple[Kit, Server], fault: dict[str, Any]
) -> None:
    kit, server = both
    plan(server, operation="create", **fault)
    out = kit.run("echo never")
    assert out.res.err_code is ErrCode.BOOT_FAIL
    assert server.faults.seen.count("create") == 1, "a create that may have been done is not repeated"
    assert eventually(lambda: server.faults.seen.count("kill") == 1 and not server.host.sandboxes, seconds=10)
    assert not kit.start_log.exists()


PATIENT = replace(BOUNDS, create=10.0, busy=60.0)  # the SDK itself tries to connect for 2.5 s


@pytest.fixture
def down(root: Path) -> Iterator[tuple[Kit, Server, str]]:
    """The third is the template's reference. All is well again at the end."""
    with e2b_kit(root, bounds=PATIENT) as (kit, server):
        ref = kit.provider.resolve("base")
        server.down()
        yield kit, server, ref


def test_an_outage_is_waited_out_by_one_attempt(down: tuple[Kit, Server, str]) -> None:
    kit, server, ref = down
    threading.Timer(5.0, server.up).start()
    out = kit.run("echo fine", env_ref=ref)
    assert (out.res.err_code, out.res.stdout) == (ErrCode.NONE, "fine\n"), out.res.stderr
    assert out.seconds > 5 and server.faults.seen.count("create") == 1


@pytest.mark.parametrize("stop", ["cancel", "kill"])
def test_an_outage_that_is_waited_out_holds_up_neither_cancel_nor_kill(
    down: tuple[Kit, Server, str], stop: str
) -> None:
    kit, server, ref = down
    owner, flag = kit.owner(), threading.Event()
    join = kit.begin("echo never", owner=owner, env_ref=ref, canceled=flag.is_set)
    time.sleep(4.0)
    stopped = time.monotonic()
    if stop == "cancel":
        flag.set()
    else:
        with pytest.raises(Unavailable):
            kit.provider.kill(owner)
    assert join().res.err_code is (ErrCode.CANCELED if stop == "cancel" else ErrCode.LOST)
    assert time.monotonic() - stopped < 2.5 + 2
    assert server.faults.seen.count("create") == 0
    server.up()


def test_an_api_that_cannot_be_reached_is_a_network_failure(root: Path) -> None:
    nowhere = "http://127.0.0.1:1"
    account = Account(key="k", domain="e2b.invalid", api_url=nowhere, sandbox_url=nowhere)
    provider = e2b.E2BProvider(account, templates={"base": "tmplbase"}, bounds=Bounds(create=5.0, api=5.0, busy=3.0))
    kit = Kit(provider=provider, start_log=root / "starts")
    with pytest.raises(Unavailable):
        provider.resolve("base")
    started = time.monotonic()
    res, _ = provider.run(request("true"), owner=kit.owner(), files={}, emit=lambda _: None, canceled=lambda: False)
    assert res.err_code is ErrCode.NET_FAIL
    assert 1 < time.monotonic() - started < 3 + SLACK, "waited for, but not for ever"
    provider.close()


def request(cmd: str, *, ref: str = "e2b:base@tmplbase/build", **changes: Any) -> SBXReq:
    """Without asking E2B for the template's build."""
    values: dict[str, Any] = {"intent_id": "i", "run_id": "r", "step_id": "s", "task_id": "t", "generation": 1}
    values |= {"env_ref": ref, "cmd": cmd, "files_in": (), "env": {}, "workdir": "/workspace", "timeout_ms": 20_000}
    return SBXReq(**{**values, "limits": Limits(), "egress": Egress(), **changes})


# --------------------------------------------------------------------------- a box that fails


def test_a_box_that_is_killed_from_outside_is_lost(both: tuple[Kit, Server]) -> None:
    kit, server = both
    join = kit.begin("echo before; sleep 30")
    eventually(lambda: kit.live)
    server.kill(next(iter(server.host.sandboxes)))
    out = join()
    assert (out.res.err_code, out.res.exit, out.res.stdout) == (ErrCode.LOST, None, "before\n")
    assert out.seconds < SLACK + 5


def test_a_box_ends_by_itself_when_its_time_is_over(both: tuple[Kit, Server]) -> None:
    kit, server = both
    join = kit.begin("echo before; sleep 30", timeout_ms=20_500)
    eventually(lambda: kit.live)
    (box,) = server.host.sandboxes.values()
    assert box.end_at - box.started == 21 + e2b.MARGIN
    box.end_at = time.time()
    assert join().res.err_code is ErrCode.LOST


@pytest.mark.parametrize("how", ["cut", "mute"])
def test_a_stream_that_breaks_off_is_a_network_failure(both: tuple[Kit, Server], how: str) -> None:
    kit, server = both
    plan(server, operation="start", match="echo before", **{how: True})
    out = kit.run("echo before; sleep 0.5; echo after")
    assert (out.res.err_code, out.res.exit) == (ErrCode.NET_FAIL, None), out.res.stderr
    assert out.seconds < 5 * BOUNDS.probe + SLACK, "long before the task's own limit"


def test_a_server_that_falls_silent_is_noticed_long_before_the_tasks_limit(both: tuple[Kit, Server]) -> None:
    kit, server = both
    join = kit.begin("echo before; sleep 60", timeout_ms=60_000)
    eventually(lambda: kit.live)
    plan(server, operation="*", silent=True, times=MANY)
    out = join()
    assert (out.res.err_code, out.res.stdout) == (ErrCode.NET_FAIL, "before\n")
    assert out.seconds < 6 * BOUNDS.probe + 2 * BOUNDS.api + SLACK
    (box,) = server.host.sandboxes.values()  # nobody could kill it
    box.end_at = time.time()  # its own limit does


def test_a_time_limit_that_nobody_confirms_is_no_timeout(both: tuple[Kit, Server]) -> None:
    kit, server = both
    plan(server, operation="processes", silent=True, times=MANY)
    out = kit.run("echo before; sleep 30", timeout_ms=300)
    assert out.res.err_code is ErrCode.NET_FAIL
    assert out.seconds < 3 * BOUNDS.grace + SLACK


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"operation": "write", "status": 507}, ErrCode.UPLOAD_FAIL),
        ({"operation": "write", "status": 500}, ErrCode.UPLOAD_FAIL),
        ({"operation": "write", "cut": True}, ErrCode.UPLOAD_FAIL),
        ({"operation": "write", "silent": True}, ErrCode.NET_FAIL),
        ({"operation": "info", "status": 500}, ErrCode.BOOT_FAIL),
        ({"operation": "template", "silent": True, "times": MANY}, ErrCode.NET_FAIL),
        ({"operation": "start", "status": 500}, ErrCode.BOOT_FAIL),
    ],
    ids=["full", "500", "damaged", "silent", "info", "template", "prepare"],
)
def test_before_the_command(both: tuple[Kit, Server], fault: dict[str, Any], code: ErrCode) -> None:
    kit, server = both
    ref = kit.provider.resolve("base")
    plan(server, **fault)
    started = time.monotonic()
    res, _ = kit.provider.run(
        request("echo never", ref=ref, files_in=FILES["files_in"]),
        owner=kit.owner(),
        files=FILES["files"],
        emit=lambda _: None,
        canceled=lambda: False,
    )
    assert (res.err_code, res.stdout) == (code, ""), res.stderr
    assert time.monotonic() - started < BOUNDS.transfer + BOUNDS.api + SLACK
    assert not kit.start_log.exists()


@pytest.mark.parametrize(("cmd", "code"), [("exit 0", ErrCode.DOWNLOAD_FAIL), ("exit 3", ErrCode.CMD_NONZERO)])
def test_outputs_that_cannot_be_fetched(both: tuple[Kit, Server], cmd: str, code: ErrCode) -> None:
    kit, server = both
    plan(server, operation="read", status=500)
    out = kit.run(f'echo x > "$SISU_OUTPUT_DIR/a"; {cmd}')
    assert (out.res.err_code, out.artifacts) == (code, [])
    assert "cannot read" in out.res.stderr or "on purpose" in out.res.stderr


def test_a_kill_that_fails_is_repeated(both: tuple[Kit, Server]) -> None:
    kit, server = both
    plan(server, operation="kill", status=500)
    assert kit.run("echo fine").res.err_code is ErrCode.NONE
    assert (server.faults.seen.count("kill"), server.host.sandboxes) == (2, {})


# --------------------------------------------------------------------------- stopped from our side


def test_a_cancel_while_the_box_is_made_leaves_none(both: tuple[Kit, Server]) -> None:
    kit, server = both
    plan(server, operation="create", late=1.0)
    flag = threading.Event()
    join = kit.begin("echo never", canceled=flag.is_set)
    eventually(lambda: server.host.sandboxes)
    flag.set()
    out = join()
    assert out.res.err_code is ErrCode.CANCELED
    assert server.host.sandboxes == {}, "gone before the task is told to be canceled"
    assert not kit.start_log.exists()


def test_a_kill_while_the_box_is_made_starts_nothing(both: tuple[Kit, Server]) -> None:
    kit, server = both
    plan(server, operation="create", late=1.0)
    owner = kit.owner()
    join = kit.begin("echo never", owner=owner)
    eventually(lambda: server.creates)
    plan(server, operation="list", status=200, body="[]")  # as if the box did not show yet
    assert kit.provider.kill(owner) == 0
    assert join().res.err_code is ErrCode.LOST
    assert not kit.start_log.exists()


def test_a_kill_does_not_depend_on_a_list_that_lags_behind(both: tuple[Kit, Server]) -> None:
    kit, server = both
    owner = kit.owner()
    join = kit.begin("echo before; sleep 30", owner=owner)
    eventually(lambda: kit.live)
    plan(server, operation="list", status=200, body="[]")
    assert kit.provider.kill(owner) == 1
    assert join().res.err_code is ErrCode.LOST
