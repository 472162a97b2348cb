"""E2B's control plane through the SDK: which build a template is, create, look up by owner, kill. All on the loop of e2b.py."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from controller.core.contract import Egress
from controller.core.errors import InvalidIntent
from controller.core.model import Owner
from controller.sbx.e2b_calls import Bounds
from controller.sbx.loop import within

if TYPE_CHECKING:
    from e2b import AsyncSandbox, SandboxInfo

ALL_TRAFFIC = "0.0.0.0/0"
STORE, RUN, TASK, ATTEMPT, FENCE = (f"sisu-kodo-{name}" for name in ("store", "run", "task", "attempt", "fence"))


@dataclass(frozen=True, kw_only=True)
class Account:
    """Where E2B is and who we are there. Without URLs the SDK derives them from the domain."""

    key: str = field(repr=False)
    domain: str
    api_url: str | None = None
    sandbox_url: str | None = None


def mark(owner: Owner) -> dict[str, str]:
    """The owner as metadata, by which an orphan is found."""
    return {
        STORE: owner.store_id,
        RUN: owner.run_id,
        TASK: owner.task_key,
        ATTEMPT: str(owner.attempt),
        FENCE: str(owner.fence),
    }


def owner_of(metadata: Mapping[str, str]) -> Owner | None:
    """None for a mark that is not ours."""
    with contextlib.suppress(KeyError, ValueError):
        return Owner(
            store_id=metadata[STORE],
            run_id=metadata[RUN],
            task_key=metadata[TASK],
            attempt=int(metadata[ATTEMPT]),
            fence=int(metadata[FENCE]),
        )
    return None


def network(egress: Egress) -> dict[str, Any]:
    """The arguments of create. Raises InvalidIntent for what E2B does not enforce."""
    if egress.mode == "None":
        return {"allow_internet_access": False}
    if egress.mode == "Public":
        return {"allow_internet_access": True}
    for host in egress.allow:
        if ":" in host:
            raise InvalidIntent(
                "spec.sandbox.egress.allow", f"{host!r}: E2B allows hosts, not single ports; leave the port out"
            )
    if not egress.allow:
        raise InvalidIntent("spec.sandbox.egress.allow", "mode Allow needs at least one host")
    return {"network": {"allow_out": list(egress.allow), "deny_out": [ALL_TRAFFIC]}}


class Api:
    """Every method has its outer deadline. Raises what the SDK raises, and Silent."""

    def __init__(self, account: Account, *, bounds: Bounds) -> None:
        self._account, self._bounds = account, bounds

    async def build(self, template: str) -> str:
        """The id of the template's current build. The SDK has the endpoint, but no method for it that tells the build."""
        return await within(self._bounds.api, self._build(template), "template")

    async def create(self, template: str, *, owner: Owner, seconds: int, egress: Mapping[str, Any]) -> AsyncSandbox:
        """A box that ends by itself after `seconds`. Never repeated by the SDK: a 502 or 504 may have made one."""
        from e2b import AsyncSandbox

        work = AsyncSandbox.create(
            template,
            timeout=seconds,
            metadata=mark(owner),
            lifecycle={"on_timeout": "kill"},
            retries=0,
            **egress,
            **self._options(self._bounds.create),
        )
        return await within(self._bounds.create, work, "create")

    async def info(self, box: AsyncSandbox) -> SandboxInfo:
        """What E2B says about it."""
        return await within(self._bounds.api, box.get_info(request_timeout=self._bounds.api), "info")

    async def found(self, metadata: Mapping[str, str]) -> list[SandboxInfo]:
        """Every box that carries all of this metadata, on all pages."""
        from e2b import AsyncSandbox, SandboxQuery

        pages = AsyncSandbox.list(
            query=SandboxQuery(metadata=dict(metadata)), limit=100, **self._options(self._bounds.api)
        )
        boxes: list[SandboxInfo] = []
        while pages.has_next:
            boxes += await within(self._bounds.api, pages.next_items(), "list")
        return boxes

    async def kill(self, sandbox_id: str) -> bool:
        """False when it was gone."""
        from e2b import AsyncSandbox

        work = AsyncSandbox.kill(sandbox_id, **self._options(self._bounds.api))
        return await within(self._bounds.api, work, "kill")

    async def kill_marked(self, owner: Owner, *, known: str = "") -> int:
        """Kills what carries the owner's store and fence, and the box that we know of; how many lived."""
        boxes = await self.found({STORE: owner.store_id, FENCE: str(owner.fence)})
        ids = {known, *(box.sandbox_id for box in boxes)} - {""}
        return sum([await self.kill(sandbox_id) for sandbox_id in sorted(ids)])

    async def _build(self, template: str) -> str:
        from e2b.api import handle_api_exception
        from e2b.api.client_async import get_api_client
        from e2b.connection_config import ConnectionConfig

        client = get_api_client(ConnectionConfig(**self._options(self._bounds.api)))
        answer = await client.get_async_httpx_client().get(f"/templates/{template}", params={"limit": 1})
        if answer.status_code >= 300:
            raise handle_api_exception(answer)
        told = answer.json()
        build = told.get("buildID") if isinstance(told, dict) else None
        if not isinstance(build, str) or not build or told.get("templateID") != template:
            raise InvalidIntent(
                "spec.sandbox.template",
                f"E2B names no finished build of template id {template}, so that nothing fixed can be approved",
            )
        return build

    def _options(self, seconds: float) -> dict[str, Any]:
        account = self._account
        return {
            "api_key": account.key,
            "domain": account.domain,
            "api_url": account.api_url,
            "sandbox_url": account.sandbox_url,
            "debug": False,
            "request_timeout": seconds,
        }
