"""What the kubernetes provider makes of a cluster that fails: the right errCode, within its bound, and no Pod left behind.

The provider talks to tests/support/pods_server.py with one failure on purpose per test; commands really run, in jails.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.core.contract import Egress, ErrCode
from controller.core.errors import InvalidIntent, Unavailable
from controller.sbx.kubernetes import KubernetesProvider
from controller.sbx.kubernetes_life import MARGIN
from controller.sbx.kubernetes_pod import name_of
from tests.support.pods_server import IMAGE, PodsServer
from tests.support.sandbox_kit import (
    BOUNDS,
    PODS,
    STORE,
    Kit,
    archive,
    eventually,
    pods_kit,
    upload,
)

MANY = 10**6
SLACK = 5.0  # seconds that a loaded machine may add
FORBIDDEN = '{"kind": "Status", "message": "pods is forbidden: violates PodSecurity \\"restricted:latest\\""}'
QUOTA = '{"kind": "Status", "message": "pods \\"x\\" is forbidden: exceeded quota: sandboxes, requested: pods=1"}'


@pytest.fixture
def both(root: Path) -> Iterator[tuple[Kit, PodsServer]]:
    with pods_kit(root) as found:
        yield found


# --------------------------------------------------------------------------- what goes well here, too


def test_a_task_from_upload_to_artifacts(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    out = kit.run(
        'cat greeting; echo x > "$SISU_OUTPUT_DIR/a.txt"; echo "$WORD" >&2; exit 3',
        env={"WORD": 'it\'s "odd" $HOME'},
        **upload(("archive", archive({"greeting": b"hello\n"}))),
    )
    assert (out.res.err_code, out.res.exit, out.res.stdout) == (ErrCode.CMD_NONZERO, 3, "hello\n")
    assert out.res.stderr == 'it\'s "odd" $HOME\n'
    assert [(a.name, a.content) for a in out.artifacts] == [("a.txt", b"x\n")]
    assert server.pods == {}, "gone before the outcome is told"
    (asked,) = server.creates
    assert asked["spec"]["activeDeadlineSeconds"] == 20 + PODS.boot + MARGIN


def test_neither_command_nor_environment_is_in_a_url(both: tuple[Kit, PodsServer]) -> None:
    """An API server writes URLs into its audit log, and proxies cut them."""
    kit, server = both
    marker = "s3cr3t-for-the-audit-log"
    assert kit.run(f"echo {marker} $TOKEN", env={"TOKEN": marker}).res.stdout == f"{marker} {marker}\n"
    assert server.urls and not [url for url in server.urls if marker in url]


def test_all_pages_are_read(both: tuple[Kit, PodsServer]) -> None:
    kit, _ = both  # whose server answers two Pods a page
    owners = [kit.owner() for _ in range(5)]
    stranger = kit.owner(store="another store")
    joins = [kit.begin("echo x; sleep 30", owner=owner) for owner in (*owners, stranger)]
    eventually(lambda: len(kit.live) == 6, seconds=20)
    assert sorted(kit.provider.owned(STORE), key=lambda owner: owner.fence) == owners
    assert [kit.provider.kill(owner) for owner in (*owners, stranger)] == [1] * 6
    assert {join().res.err_code for join in joins} == {ErrCode.LOST}


# --------------------------------------------------------------------------- no Pod can be made


@pytest.mark.parametrize(
    "fault",
    [{"status": 429, "headers": {"Retry-After": "1"}}, {"status": 503}, {"status": 403, "body": QUOTA}],
    ids=["429", "503", "quota"],
)
@pytest.mark.parametrize("operation", ["create", "policy"])
def test_load_is_waited_out(both: tuple[Kit, PodsServer], fault: dict[str, Any], operation: str) -> None:
    kit, server = both
    server.fail(operation, **fault)
    out = kit.run("echo fine")
    assert (out.res.err_code, out.res.stdout) == (ErrCode.NONE, "fine\n")
    assert server.seen.count(operation) == 2


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"status": 429, "times": MANY, "headers": {"Retry-After": "60"}}, "429"),
        ({"status": 503, "times": MANY}, "on purpose"),
        ({"status": 403, "body": QUOTA, "times": MANY}, "exceeded quota: sandboxes"),
        ({"status": 403, "body": FORBIDDEN}, 'violates PodSecurity "restricted:latest"'),
        ({"status": 401}, "does not accept this worker's credentials"),
        ({"status": 422}, "on purpose"),
        ({"status": 500, "body": "oops", "times": MANY}, "500: oops"),
        ({"status": 200, "body": "oops", "times": MANY}, "502: oops"),
        ({"silent": True, "times": MANY}, "no answer within 1.5 s"),
    ],
    ids=["429", "503", "quota", "forbidden", "401", "422", "500-text", "200-text", "silent"],
)
def test_no_pod(both: tuple[Kit, PodsServer], fault: dict[str, Any], says: str) -> None:
    kit, server = both
    server.fail("create", **fault)
    out = kit.run("echo never")
    assert (out.res.err_code, out.res.exit) == (ErrCode.BOOT_FAIL, None)
    assert says in out.res.stderr
    assert out.seconds < BOUNDS.busy + 2 * BOUNDS.api + SLACK
    assert not kit.start_log.exists()


def test_an_api_server_that_cannot_be_reached_is_a_network_failure(root: Path) -> None:
    with pods_kit(root) as (kit, server):
        config = server.kubeconfig.read_text()
    server.kubeconfig.write_text(config.replace(config.partition("http://")[2].split("\n")[0], "127.0.0.1:1"))
    provider = KubernetesProvider(server.kubeconfig, templates={"base": IMAGE}, pods=PODS, bounds=BOUNDS)
    out = Kit(provider=provider, start_log=root / "starts").run("echo never")
    assert out.res.err_code is ErrCode.NET_FAIL
    assert BOUNDS.busy / 3 < out.seconds < BOUNDS.busy + SLACK, "a restart of the API server is waited out"
    for ask in (lambda: provider.owned(STORE), lambda: provider.kill(kit.owner())):
        with pytest.raises(Unavailable, match=r"Kubernetes: ClientConnectorError"):
            ask()
    provider.close()


@pytest.mark.parametrize(
    "fault",
    [{"late": 2.0}, {"status": 504, "done": True}, {"status": 500, "body": "oops", "done": True}],
    ids=["answered too late", "504", "500 that is not JSON"],
)
def test_a_pod_that_was_made_without_an_answer_is_the_one_that_is_used(
    both: tuple[Kit, PodsServer], fault: dict[str, Any]
) -> None:
    kit, server = both
    server.fail("create", **fault)
    out = kit.run("echo fine")
    assert (out.res.err_code, out.res.stdout) == (ErrCode.NONE, "fine\n")
    assert len(server.creates) == 1, "never two Pods of one attempt"


def test_a_pod_that_is_made_too_late_is_found_and_deleted(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    server.fail("create", silent=True, times=MANY)
    owner = kit.owner()
    out = kit.run("echo never", owner=owner)
    assert out.res.err_code is ErrCode.BOOT_FAIL
    other = kit.owner()
    join = kit.begin("echo never", owner=other)  # for its Pod's sake only
    server.plan.clear()
    eventually(lambda: name_of(other) in server.pods)
    late = {**server.pods[name_of(other)]}
    annotations = {**late["metadata"]["annotations"]}
    labels = {**late["metadata"]["labels"], "sisukodo.dev/fence": str(owner.fence)}
    late["metadata"] = {"name": name_of(owner), "uid": "late", "labels": labels, "annotations": annotations}
    server.pods[name_of(owner)] = late
    eventually(lambda: name_of(owner) not in server.pods, seconds=10)
    join()
    assert not kit.start_log.exists() or str(owner.fence) not in kit.start_log.read_text()


@pytest.mark.parametrize(
    "then",
    [{"status": 429, "headers": {"Retry-After": "60"}}, {"status": 403, "body": QUOTA}],
    ids=["429", "a quota that this very Pod uses up"],
)
def test_a_pod_that_was_made_without_an_answer_is_deleted_when_no_other_try_finds_it(
    both: tuple[Kit, PodsServer], then: dict[str, Any]
) -> None:
    kit, server = both
    server.fail("create", status=504, done=True)
    server.fail("create", times=MANY, **then)
    out = kit.run("echo never")
    assert out.res.err_code is ErrCode.BOOT_FAIL
    assert len(server.creates) == 1 and server.pods == {}, "gone before the outcome is told"
    assert not kit.start_log.exists()


def test_a_pod_of_somebody_else_is_left_alone(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    owner = kit.owner()
    name = name_of(owner)
    server.pods[name] = {"metadata": {"name": name, "uid": "theirs", "labels": {}}, "status": {"phase": "Running"}}
    out = kit.run("echo never", owner=owner)
    assert out.res.err_code is ErrCode.BOOT_FAIL and "already exists" in out.res.stderr
    assert kit.provider.kill(owner) == 0
    assert server.pods.pop(name)["metadata"]["uid"] == "theirs"


# --------------------------------------------------------------------------- a Pod that does not come up


def _waiting(reason: str) -> Callable[[dict[str, Any]], None]:
    state = {"waiting": {"reason": reason, "message": "in its own words"}}
    return lambda pod: pod["status"].update(containerStatuses=[{"name": "task", "state": state}])


def _unschedulable(pod: dict[str, Any]) -> None:
    unmet = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "in its own words"}
    pod["status"]["conditions"] = [unmet]


def _rejected(pod: dict[str, Any]) -> None:
    pod["status"].update(phase="Failed", reason="OutOfcpu", message="in its own words")


@pytest.mark.parametrize(
    ("change", "says", "seconds"),
    [
        (_waiting("ImagePullBackOff"), "ImagePullBackOff: in its own words", 1),
        (_waiting("ErrImageNeverPull"), "ErrImageNeverPull: in its own words", 1),
        (_waiting("CreateContainerError"), "CreateContainerError: in its own words", 1),
        (_waiting("ErrImagePull"), "did not start within 2 s: ErrImagePull: in its own words", 2),
        (_rejected, "OutOfcpu: in its own words", 1),
        (_unschedulable, "did not start within 2 s: Unschedulable: in its own words", 2),
    ],
    ids=["back-off", "never-pull", "create", "pull", "rejected", "unschedulable"],
)
def test_a_pod_that_does_not_start_says_why(
    both: tuple[Kit, PodsServer], change: Callable[[dict[str, Any]], None], says: str, seconds: float
) -> None:
    kit, server = both
    server.boot = 60
    join = kit.begin("echo never")
    change(eventually(lambda: next(iter(server.pods.values()), None)))
    out = join()
    assert out.res.err_code is ErrCode.BOOT_FAIL and says in out.res.stderr, out.res.stderr
    assert ("did not start within" in out.res.stderr) == (seconds == PODS.boot), (
        "what waits for a person is not waited for"
    )
    assert out.seconds < seconds + SLACK
    assert server.pods == {} and not kit.start_log.exists()


@pytest.mark.parametrize(
    ("image_id", "says"),
    [
        (f"registry.invalid/base@sha256:{'b' * 64}", f"is made of sha256:{'b' * 64}"),
        (f"sha256:{'a' * 64}", "made of no digest"),
        ("", "made of no digest"),
    ],
)
def test_a_pod_that_is_not_made_of_what_was_approved_runs_nothing(
    both: tuple[Kit, PodsServer], image_id: str, says: str
) -> None:
    kit, server = both
    server.image_id = image_id
    out = kit.run("echo never")
    assert out.res.err_code is ErrCode.BOOT_FAIL and says in out.res.stderr and IMAGE in out.res.stderr
    assert not kit.start_log.exists()


def test_looks_that_fail_while_it_starts_are_repeated(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    server.boot = 0.5
    server.fail("get", status=500, times=2)
    assert kit.run("echo fine").res.err_code is ErrCode.NONE


# --------------------------------------------------------------------------- networks


@pytest.mark.parametrize("mode", ["None", "Public"])
def test_without_its_network_policy_nothing_runs(both: tuple[Kit, PodsServer], mode: Any) -> None:
    kit, server = both
    name = f"sisu-kodo-egress-{mode.lower()}"
    shipped = server.policies.pop(name)
    out = kit.run("echo never", egress=Egress(mode=mode))
    assert out.res.err_code is ErrCode.BOOT_FAIL and f"NetworkPolicy {name} is missing" in out.res.stderr
    server.policies[name] = {**shipped, "spec": {**shipped["spec"], "egress": [{}]}}
    out = kit.run("echo never", egress=Egress(mode=mode))
    assert out.res.err_code is ErrCode.BOOT_FAIL and f"{name} is not the shipped one" in out.res.stderr
    assert server.creates == []
    server.policies[name] = shipped
    assert kit.run("echo fine", egress=Egress(mode=mode)).res.err_code is ErrCode.NONE
    assert server.creates[0]["metadata"]["labels"]["sisukodo.dev/egress"] == mode.lower()


def test_host_names_are_refused(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    egress = Egress(mode="Allow", allow=("files.example",))
    out = kit.run("echo never", egress=egress)
    assert out.res.err_code is ErrCode.BOOT_FAIL and "spec.sandbox.egress.mode" in out.res.stderr
    assert isinstance(kit.provider, KubernetesProvider)
    with pytest.raises(InvalidIntent):
        kit.provider.check(kit.request("true", egress=egress))
    assert server.seen == []


# --------------------------------------------------------------------------- a Pod that ends


PRESSURE = {"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet", "message": "low on memory"}


@pytest.mark.parametrize(
    ("how", "code", "says"),
    [
        ({"reason": "Evicted"}, ErrCode.CMD_NONZERO, "killed: more than 1024 MiB on disk"),
        ({"reason": "Evicted", "condition": PRESSURE}, ErrCode.LOST, "TerminationByKubelet: low on memory"),
        ({"container": {"reason": "OOMKilled"}}, ErrCode.OOM, "out of memory: more than 512 MiB"),
        ({"reason": "DeadlineExceeded"}, ErrCode.LOST, "DeadlineExceeded"),
        ({"container": {"exitCode": 143}}, ErrCode.CMD_NONZERO, "ended its own sandbox"),
        ({"container": {"exitCode": 137, "reason": "Error"}}, ErrCode.LOST, "the Pod ended: Error"),
    ],
    ids=["disk", "pressure", "oom", "deadline", "itself", "killed"],
)
def test_a_pod_that_ends_says_why(both: tuple[Kit, PodsServer], how: dict[str, Any], code: ErrCode, says: str) -> None:
    kit, server = both
    join = kit.begin("echo before; sleep 30")
    eventually(lambda: kit.live)
    (name,) = server.pods
    if condition := how.pop("condition", None):
        server.pods[name]["status"]["conditions"] = [condition]
    server.end(name, **how)
    out = join()
    assert (out.res.err_code, out.res.exit, out.res.stdout) == (code, None, "before\n")
    assert says in out.res.stderr, out.res.stderr
    assert out.seconds < SLACK + 5


def test_a_pod_that_is_gone_is_lost(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    join = kit.begin("echo before; sleep 30")
    eventually(lambda: kit.live)
    server.remove(next(iter(server.pods)))
    out = join()
    assert (out.res.err_code, out.res.exit, out.res.stdout) == (ErrCode.LOST, None, "before\n")


# --------------------------------------------------------------------------- streams


@pytest.mark.parametrize("how", ["cut", "mute"])
def test_a_stream_that_breaks_off_is_a_network_failure(both: tuple[Kit, PodsServer], how: str) -> None:
    kit, server = both
    server.fail("exec", match="echo before", **{how: True})
    out = kit.run("echo before; sleep 0.5; echo after", timeout_ms=1_000)
    assert (out.res.err_code, out.res.exit) == (ErrCode.NET_FAIL, None), out.res.stderr
    assert out.seconds < 3 + 3 * BOUNDS.grace + SLACK


def test_a_server_that_falls_silent_is_noticed_long_before_the_tasks_limit(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    join = kit.begin("echo before; sleep 60", timeout_ms=60_000)
    eventually(lambda: kit.live)
    server.fail("*", silent=True, times=MANY)
    out = join()
    assert (out.res.err_code, out.res.stdout) == (ErrCode.NET_FAIL, "before\n")
    assert out.seconds < 6 * BOUNDS.probe + 2 * BOUNDS.api + SLACK
    server.remove(next(iter(server.pods)))  # nobody could delete it; its own deadline does


def test_a_time_limit_that_nobody_confirms_is_no_timeout(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    server.fail("exec", match="echo before", mute=True)
    join = kit.begin("echo before; sleep 30", timeout_ms=500)
    eventually(lambda: kit.live)
    server.fail("get", silent=True, times=MANY)
    out = join()
    assert out.res.err_code is ErrCode.NET_FAIL


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"status": 500}, ErrCode.NET_FAIL),
        ({"status": 403}, ErrCode.UPLOAD_FAIL),
        ({"status": 404}, ErrCode.LOST),
        ({"match": "sha256sum", "says": '{"status": "Failure", "message": "no such shell"}'}, ErrCode.UPLOAD_FAIL),
        ({"match": "sha256sum", "says": "oops"}, ErrCode.UPLOAD_FAIL),
        ({"silent": True}, ErrCode.NET_FAIL),
    ],
    ids=["500", "403", "404", "runtime", "not JSON", "silent"],
)
def test_before_the_command(both: tuple[Kit, PodsServer], fault: dict[str, Any], code: ErrCode) -> None:
    kit, server = both
    server.fail("exec", **fault)
    out = kit.run("echo never", **upload(("archive", archive({"greeting": b"hello\n"}))))
    assert (out.res.err_code, out.res.stdout) == (code, ""), out.res.stderr
    assert out.seconds < BOUNDS.tool + SLACK
    assert not kit.start_log.exists()


@pytest.mark.parametrize(("cmd", "code"), [("exit 0", ErrCode.DOWNLOAD_FAIL), ("exit 3", ErrCode.CMD_NONZERO)])
def test_outputs_that_cannot_be_fetched(both: tuple[Kit, PodsServer], cmd: str, code: ErrCode) -> None:
    kit, server = both
    server.fail("exec", match="--files-from=-", says='{"status": "Failure", "message": "no such tar"}')
    out = kit.run(f'echo x > "$SISU_OUTPUT_DIR/a"; {cmd}')
    assert (out.res.err_code, out.artifacts) == (code, [])
    assert "no such tar" in out.res.stderr


# --------------------------------------------------------------------------- deleting


def test_a_delete_that_fails_is_repeated(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    server.fail("delete", status=500)
    assert kit.run("echo fine").res.err_code is ErrCode.NONE
    assert (server.seen.count("delete"), server.pods) == (2, {})


def test_kill_waits_until_the_pod_is_gone(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    server.linger = 0.6
    owner = kit.owner()
    join = kit.begin("echo before; sleep 30", owner=owner)
    eventually(lambda: kit.live)
    assert kit.provider.kill(owner) == 1
    assert server.pods == {}
    assert (join().res.err_code, kit.provider.kill(owner)) == (ErrCode.LOST, 0)


def test_a_pod_whose_node_does_not_confirm_is_deleted_by_force(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    server.linger = 3600
    started = time.monotonic()
    assert kit.run("echo fine").res.err_code is ErrCode.NONE
    assert BOUNDS.gone < time.monotonic() - started < BOUNDS.gone + SLACK


def test_when_nobody_tells_nobody_knows(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    for operation in ("list", "get"):
        server.fail(operation, silent=True, times=MANY)
    for ask in (lambda: kit.provider.owned(STORE), lambda: kit.provider.kill(kit.owner())):
        with pytest.raises(Unavailable, match=r"Kubernetes: Silent"):
            ask()


# --------------------------------------------------------------------------- stopped from our side


def test_a_cancel_while_the_pod_is_made_leaves_none(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    server.fail("create", late=1.0)
    flag = threading.Event()
    join = kit.begin("echo never", canceled=flag.is_set)
    eventually(lambda: server.pods)
    flag.set()
    assert join().res.err_code is ErrCode.CANCELED
    assert server.pods == {}, "gone before the task is told to be canceled"
    assert not kit.start_log.exists()


def test_a_cancel_while_the_pod_starts_leaves_none(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    server.boot = 60
    flag = threading.Event()
    join = kit.begin("echo never", canceled=flag.is_set)
    eventually(lambda: server.pods)
    flag.set()
    assert join().res.err_code is ErrCode.CANCELED
    assert server.pods == {} and not kit.start_log.exists()


def test_a_kill_while_the_pod_is_made_starts_nothing(both: tuple[Kit, PodsServer]) -> None:
    kit, server = both
    server.fail("create", late=1.0)
    owner = kit.owner()
    join = kit.begin("echo never", owner=owner)
    eventually(lambda: server.creates)
    server.fail("get", status=404)  # as if it did not show yet
    assert kit.provider.kill(owner) == 0
    assert join().res.err_code is ErrCode.LOST
    assert not kit.start_log.exists()
