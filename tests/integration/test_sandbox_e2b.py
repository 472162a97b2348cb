"""What the e2b provider promises beyond the common contract: owners, templates, limits, egress, and what a task may do in a box."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from controller.core.contract import Egress, ErrCode, Limits
from controller.core.errors import InvalidIntent, Permanent, Unavailable
from controller.sbx import templates
from controller.sbx.e2b_box import command_line
from devcluster.e2b.api import Server
from tests.integration.test_e2b_failures import MANY, both, plan, request
from tests.support.sandbox_kit import STORE, Kit, eventually, upload

__all__ = ["both"]

# --------------------------------------------------------------------------- whose boxes


def test_all_pages_are_read(both: tuple[Kit, Server]) -> None:
    kit, _ = both  # whose server answers two boxes a page
    owners = [kit.owner() for _ in range(5)]
    stranger = kit.owner(store="another store")
    joins = [kit.begin("echo x; sleep 30", owner=owner) for owner in (*owners, stranger)]
    eventually(lambda: len(kit.live) == 6, seconds=20)
    found = kit.provider.owned(STORE)
    assert sorted(found, key=lambda owner: owner.fence) == owners
    assert [kit.provider.kill(owner) for owner in (*owners, stranger)] == [1] * 6
    assert {join().res.err_code for join in joins} == {ErrCode.LOST}


def test_when_e2b_does_not_tell_nobody_knows(both: tuple[Kit, Server]) -> None:
    kit, server = both
    plan(server, operation="list", silent=True, times=MANY)
    for ask in (lambda: kit.provider.owned(STORE), lambda: kit.provider.kill(kit.owner())):
        with pytest.raises(Unavailable, match=r"E2B: Silent"):
            ask()


# --------------------------------------------------------------------------- templates, limits, egress


def test_a_template_that_was_built_again_after_approval_runs_nothing(both: tuple[Kit, Server]) -> None:
    kit, server = both
    approved = kit.request("echo never")
    server.host.templates["tmplbase"] = templates.Template(name="base", ref="rebuilt")
    res, _ = kit.provider.run(approved, owner=kit.owner(), files={}, emit=lambda _: None, canceled=lambda: False)
    assert res.err_code is ErrCode.BOOT_FAIL
    assert f"{approved.env_ref} was approved" in res.stderr
    assert not kit.start_log.exists()


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"status": 404}, InvalidIntent),
        ({"status": 200, "body": '{"templateID": "tmplbase", "buildID": ""}'}, InvalidIntent),
        ({"status": 200, "body": '{"templateID": "another", "buildID": "b"}'}, InvalidIntent),
        ({"status": 401}, Permanent),
        ({"status": 503, "times": MANY}, Unavailable),
        ({"silent": True}, Unavailable),
        ({"status": 200, "body": "oops"}, Unavailable),
    ],
)
def test_a_template_without_a_known_build_is_not_offered(
    both: tuple[Kit, Server], fault: dict[str, Any], error: type[Exception]
) -> None:
    kit, server = both
    plan(server, operation="template", **fault)
    with pytest.raises(error):
        kit.provider.resolve("base")


@pytest.mark.parametrize("limits", [Limits(memory_mb=513), Limits(cpu_millis=2001)])
def test_more_than_the_template_has_is_refused(both: tuple[Kit, Server], limits: Limits) -> None:
    kit, _ = both
    out = kit.run("echo never", limits=limits)
    assert out.res.err_code is ErrCode.BOOT_FAIL
    assert "template tmplbase has 2 CPUs and 512 MiB" in out.res.stderr


def test_memory_processes_and_files_are_limited_in_the_box(both: tuple[Kit, Server]) -> None:
    kit, _ = both
    out = kit.run("ulimit -d; ulimit -f; ulimit -c", limits=Limits(memory_mb=64, disk_mb=32))
    assert out.res.stdout.split() == ["65536", "65536", "0"]


@pytest.mark.parametrize(
    ("egress", "sent"),
    [
        (Egress(mode="Public"), {"allow_internet_access": True}),
        (
            Egress(mode="Allow", allow=("files.example", "more.example")),
            {"network": {"allowOut": ["files.example", "more.example"], "denyOut": ["0.0.0.0/0"]}},
        ),
    ],
)
def test_egress_is_what_create_asks_for(both: tuple[Kit, Server], egress: Egress, sent: dict[str, Any]) -> None:
    kit, server = both
    assert kit.run("echo never", egress=egress).res.err_code is ErrCode.BOOT_FAIL  # the server has no network
    (asked,) = server.creates
    assert {name: asked[name] for name in ("allow_internet_access", "network") if name in asked} == sent


@pytest.mark.parametrize("allow", [("files.example:443",), ()])
def test_egress_that_cannot_be_enforced_makes_no_box(both: tuple[Kit, Server], allow: tuple[str, ...]) -> None:
    kit, server = both
    out = kit.run("echo never", egress=Egress(mode="Allow", allow=allow))
    assert out.res.err_code is ErrCode.BOOT_FAIL
    assert "spec.sandbox.egress.allow" in out.res.stderr
    assert server.creates == []


def test_the_create_carries_the_owner_and_no_network(both: tuple[Kit, Server]) -> None:
    kit, server = both
    owner = kit.owner(attempt=2)
    kit.run("true", owner=owner)
    (asked,) = server.creates
    assert asked["metadata"] == {
        "sisu-kodo-store": STORE,
        "sisu-kodo-run": "r",
        "sisu-kodo-task": "k" * 64,
        "sisu-kodo-attempt": "2",
        "sisu-kodo-fence": str(owner.fence),
    }
    assert (asked["allow_internet_access"], asked["autoPause"]) == (False, False)


# --------------------------------------------------------------------------- what a task may do


def test_the_shell_around_the_command_can_be_killed(both: tuple[Kit, Server]) -> None:
    kit, _ = both
    out = kit.run("kill -KILL $PPID; sleep 1")
    assert (out.res.err_code, out.res.exit) == (ErrCode.CMD_NONZERO, 137)


def test_what_the_command_left_running_dies_with_it() -> None:
    """In a PID namespace of its own, for the script kills every process that its user has."""
    inside = 'bash -c "$0"; echo "code $?"; sleep 0.2; grep -l "^Name:.sleep" /proc/[0-9]*/status | wc -l'
    text = command_line(request("setsid sleep 30 & sleep 30 & exit 3"), memory=False)
    argv = ["bwrap", "--unshare-user", "--unshare-pid", "--as-pid-1", "--dev-bind", "/", "/", "--proc", "/proc"]
    done = subprocess.run(
        [*argv, "/bin/sh", "-c", inside, text], capture_output=True, text=True, check=True, timeout=20
    )
    assert done.stdout.split("\n") == ["code 3", "0", ""]


@pytest.mark.parametrize(
    ("kind", "content"), [("archive", b"not a tar"), ("patch", b"--- a/no\n+++ b/no\n@@ -1 +1 @@\n-x\n+y\n")]
)
def test_what_does_not_unpack_or_apply_is_an_upload_failure(
    both: tuple[Kit, Server], kind: str, content: bytes
) -> None:
    kit, _ = both
    out = kit.run("echo never", **upload((kind, content)))
    assert out.res.err_code is ErrCode.UPLOAD_FAIL
    assert f"the {kind} could not be taken in" in out.res.stderr
    assert not kit.start_log.exists()
