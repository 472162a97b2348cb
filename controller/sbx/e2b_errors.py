"""What the SDK raises, as an ErrCode. By type and HTTP status only; the order matters, for the SDK's types inherit oddly:

SandboxNotRunningException and SandboxUnreachableException ARE TimeoutExceptions, while a refused key, a busy service, a body
that is not JSON and a connection that fails are no SandboxExceptions at all.
"""

from __future__ import annotations

import json
from functools import cache

from controller.core.contract import ErrCode
from controller.core.errors import InvalidIntent, Permanent, SisuError, Unavailable
from controller.sbx.loop import Silent
from controller.sbx.task import Verdict

TEXT = 500  # characters of a foreign message that a note repeats


@cache
def _types() -> dict[str, tuple[type[Exception], ...]]:
    """Here and not above: importing the SDK takes 0.9 s and 50 MB."""
    import httpx
    from connectrpc.errors import ConnectError
    from e2b import exceptions as e2b

    return {
        "gone": (e2b.SandboxNotRunningException, e2b.SandboxNotFoundException),
        "busy": (e2b.RateLimitException, e2b.ServiceBusyException),
        "unreached": (httpx.ConnectError, httpx.ConnectTimeout, ConnectionRefusedError),
        "network": (
            e2b.SandboxUnreachableException,
            e2b.TimeoutException,
            e2b.RateLimitException,
            e2b.ServiceBusyException,
            httpx.TransportError,
            ConnectError,
            OSError,
            json.JSONDecodeError,
            Silent,
        ),
        "refused": (e2b.AuthenticationException, e2b.InvalidArgumentException, e2b.TemplateException),
        "status": (e2b.SandboxException,),
    }


def passing(error: Exception) -> bool:
    """429, 503 or no connection: nothing was done, and the same call may succeed in a moment."""
    return isinstance(error, (*_types()["busy"], *_types()["unreached"]))


def undecided(error: BaseException) -> bool:
    """Whether a create that ended so may have made a box all the same."""
    types = _types()
    if isinstance(error, (*types["busy"], *types["unreached"], *types["refused"])):
        return False
    status = getattr(error, "status_code", None)
    return not (isinstance(error, types["status"]) and status is not None and 400 <= status < 500)


def of_create(error: Exception) -> Verdict:
    """There is no box: NET_FAIL when E2B was not reached at all, else BOOT_FAIL."""
    code = ErrCode.NET_FAIL if isinstance(error, _types()["unreached"]) else ErrCode.BOOT_FAIL
    return Verdict(code=code, note=f"the sandbox could not be made: {told(error)}")


def of_phase(error: Exception, *, otherwise: ErrCode) -> Verdict:
    """In a box. `otherwise` is the phase's own failure, for what is neither a lost box nor the way to it."""
    types = _types()
    if isinstance(error, types["gone"]):
        return Verdict(code=ErrCode.LOST, note=f"the sandbox is gone: {told(error)}")
    if isinstance(error, types["network"]):
        return Verdict(code=ErrCode.NET_FAIL, note=f"the sandbox does not answer: {told(error)}")
    if isinstance(error, types["refused"]) and otherwise is ErrCode.LOST:
        return Verdict(code=ErrCode.BOOT_FAIL, note=f"the sandbox cannot run the command: {told(error)}")
    return Verdict(code=otherwise, note=told(error))


def of_template(error: Exception, template: str) -> SisuError:
    """For resolve()."""
    types = _types()
    if isinstance(error, types["refused"]):
        return Permanent(f"E2B refuses E2B_API_KEY: {told(error)}")
    status = getattr(error, "status_code", None)
    if isinstance(error, types["status"]) and not isinstance(error, types["busy"]) and status in (400, 403, 404):
        return InvalidIntent("spec.sandbox.template", f"E2B does not tell the build of {template}: {told(error)}")
    return Unavailable(f"E2B: {told(error)}")


def told(error: Exception) -> str:
    """Type and message, cut."""
    return f"{type(error).__name__}: {error}"[:TEXT]
