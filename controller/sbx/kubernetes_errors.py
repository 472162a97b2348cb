"""What the API server and the state of a Pod mean, as an ErrCode. By type, HTTP status and the reasons that Kubernetes documents.

| seen | errCode |
|---|---|
| no connection while the Pod is created | NET_FAIL |
| any other refusal or silence while it is created; image, admission, quota, scheduling | BOOT_FAIL |
| an answer that does not come, 429, 5xx, a stream that breaks off, and the Pod lives | NET_FAIL |
| the Pod is gone, deleted, evicted by its node, preempted, past its deadline | LOST |
| evicted for what it wrote itself | CMD_NONZERO |
| OOMKilled | OOM |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import aiohttp

from controller.core.contract import ErrCode, Limits
from controller.sbx.kubernetes_pod import STOPPED
from controller.sbx.loop import Silent
from controller.sbx.task import Verdict

TEXT = 500  # characters of a foreign message that a note repeats
# A container that waits for one of these waits for a person.
IMAGE = ("ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "ImageInspectError", "SignatureValidationFailed")
CREATE = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError", "CrashLoopBackOff")

Object = Mapping[str, Any]


class ApiError(Exception):
    """An answer that is not 2xx. `retry_after`: seconds that the server asked for."""

    def __init__(self, status: int, message: str, *, retry_after: float = 0.0) -> None:
        hint = ": the API server does not accept this worker's credentials" if status == 401 else ""
        super().__init__(f"{status}{hint}: {message}")
        self.status, self.message, self.retry_after = status, message, retry_after


class ExecFailed(Exception):
    """The node could not run a command in the container; the API server's words."""


class StreamCut(Exception):
    """The stream ended, and how the command ended did not reach us."""


UNREACHED = (aiohttp.ClientConnectorError, ConnectionRefusedError)
NETWORK = (aiohttp.ClientError, OSError, Silent, StreamCut)


def busy(error: Exception) -> bool:
    """Nothing was done, and the same create may succeed in a moment: 429, 503, or a quota that others use up now.

    A quota has no reason of its own but its words; they decide only how long we wait.
    """
    if not isinstance(error, ApiError):
        return False
    return error.status in (429, 503) or (error.status == 403 and "exceeded quota" in error.message)


def undecided(error: Exception) -> bool:
    """Whether a create that ended so may have made a Pod all the same."""
    if isinstance(error, UNREACHED):
        return False
    return error.status >= 500 if isinstance(error, ApiError) else isinstance(error, NETWORK)


def passing(error: Exception) -> bool:
    """Whether the same request is worth another try: load, silence, or an API server that is being restarted."""
    return busy(error) or undecided(error) or isinstance(error, UNREACHED)


def of_create(error: Exception) -> Verdict:
    """There is no Pod: NET_FAIL when the API server was not reached at all, else BOOT_FAIL."""
    code = ErrCode.NET_FAIL if isinstance(error, UNREACHED) else ErrCode.BOOT_FAIL
    return Verdict(code=code, note=f"the Pod could not be made: {told(error)}")


def of_phase(error: Exception, *, otherwise: ErrCode) -> Verdict:
    """With a Pod. `otherwise` is the phase's own failure, for what is neither a lost Pod nor the way to it."""
    if isinstance(error, ApiError) and error.status == 404:
        return Verdict(code=ErrCode.LOST, note=f"the Pod is gone: {told(error)}")
    if isinstance(error, ApiError) and error.status in (401, 403):
        code = ErrCode.BOOT_FAIL if otherwise is ErrCode.LOST else otherwise
        return Verdict(code=code, note=f"the Pod cannot be used: {told(error)}")
    if isinstance(error, (ApiError, *NETWORK)):
        return Verdict(code=ErrCode.NET_FAIL, note=f"the Pod does not answer: {told(error)}")
    return Verdict(code=otherwise, note=told(error))


def of_pod(pod: Object, limits: Limits) -> Verdict | None:
    """How a Pod that was Running ended; None while it runs."""
    status = pod.get("status") or {}
    if "deletionTimestamp" in pod["metadata"]:
        return Verdict(code=ErrCode.LOST, note=f"the Pod was deleted{_disruption(status)}")
    if status.get("phase") not in ("Failed", "Succeeded"):
        return None  # a container may have ended by now; the phase comes later, and with it the reason
    ended = next((one["state"]["terminated"] for one in _containers(status) if "terminated" in one["state"]), None)
    reason = str(status.get("reason") or "")
    # A node under pressure marks whom it evicts; who went over a limit of its own is not marked.
    if reason == "Evicted" and not _disruption(status):
        return Verdict(code=ErrCode.CMD_NONZERO, note=f"killed: more than {limits.disk_mb} MiB on disk")
    if ended is not None and ended.get("reason") == "OOMKilled":
        return Verdict(code=ErrCode.OOM, note=f"out of memory: more than {limits.memory_mb} MiB")
    if ended is not None and not reason and not _disruption(status) and ended.get("exitCode") == STOPPED:
        return Verdict(code=ErrCode.CMD_NONZERO, note="the command ended its own sandbox")
    said = reason or str((ended or {}).get("reason") or status.get("phase"))
    return Verdict(code=ErrCode.LOST, note=f"the Pod ended: {said}: {_cut(status.get('message'))}{_disruption(status)}")


def of_boot(pod: Object) -> Verdict | None:
    """Why a Pod will never be Running; None while it may."""
    status = pod.get("status") or {}
    if "deletionTimestamp" in pod["metadata"]:
        return Verdict(code=ErrCode.LOST, note=f"the Pod was deleted before it ran{_disruption(status)}")
    for one in _containers(status):
        state = one["state"]
        found = state.get("terminated") or state.get("waiting") or {}
        if "terminated" in state or found.get("reason") in (*IMAGE, *CREATE):
            said = f"{found.get('reason')}: {_cut(found.get('message'))}"
            return Verdict(code=ErrCode.BOOT_FAIL, note=f"the Pod does not start: {said}")
    if status.get("phase") in ("Failed", "Succeeded"):
        said = f"{status.get('reason') or status['phase']}: {_cut(status.get('message'))}"
        return Verdict(code=ErrCode.BOOT_FAIL, note=f"the Pod does not start: {said}")
    return None


def of_late_boot(pod: Object, seconds: float) -> Verdict:
    """It had its time to start. Says what it waits for."""
    status = pod.get("status") or {}
    waiting = [one["state"]["waiting"] for one in _containers(status) if "waiting" in one["state"]]
    unmet = [one for one in status.get("conditions") or () if one.get("status") == "False"]
    said = [f"{one.get('reason')}: {_cut(one.get('message'))}" for one in (*waiting, *unmet)]
    why = said[0] if said else str(status.get("phase"))
    return Verdict(code=ErrCode.BOOT_FAIL, note=f"the Pod did not start within {seconds:g} s: {why}")


def told(error: Exception) -> str:
    """Type and message, cut."""
    return f"{type(error).__name__}: {error}"[:TEXT]


def _containers(status: Object) -> Iterator[Object]:
    yield from (one for one in status.get("containerStatuses") or () if one.get("state"))


def _disruption(status: Object) -> str:
    """` (reason: message)` where the cluster says that it ends the Pod for reasons of its own, else nothing."""
    for one in status.get("conditions") or ():
        if one.get("type") == "DisruptionTarget" and one.get("status") == "True":
            return f" ({one.get('reason')}: {_cut(one.get('message'))})"
    return ""


def _cut(text: object) -> str:
    return str(text or "no message")[:TEXT]
