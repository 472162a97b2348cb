"""From a create to the last look at a deleted Pod: load is waited out, an attempt never has two Pods, and none is left.

What is made for an attempt is a Pod, or a claim for a Pod of a warm pool (kubernetes_claims.py) where one fits.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any, TypeVar

from controller.core.contract import ErrCode
from controller.core.errors import Unavailable
from controller.core.model import Owner
from controller.sbx import kubernetes_claims, kubernetes_errors, kubernetes_pod, kubernetes_policies
from controller.sbx.kubernetes_api import PODS, POLICIES, Api, Bounds, Kind
from controller.sbx.kubernetes_claims import CLAIMS, POOLS, TEMPLATES
from controller.sbx.kubernetes_errors import ApiError
from controller.sbx.kubernetes_pod import PodSettings, name_of, owner_of
from controller.sbx.loop import Loop
from controller.sbx.patience import patiently
from controller.sbx.runs import Run
from controller.sbx.sweep import Sweep
from controller.sbx.task import Verdict

log = logging.getLogger(__name__)
# Seconds that a Pod may live beyond its boot and its task's time, for what comes before and after the command.
MARGIN = 300
LOOK_SECONDS = 30.0  # how long a look at NetworkPolicies and pools counts
Object = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Made:
    """What stands for an attempt in the cluster."""

    kind: Kind
    name: str
    uid: str


class Lifecycle:
    """Of all Pods of one provider."""

    def __init__(self, api: Api, *, pods: PodSettings, bounds: Bounds, loop: Loop) -> None:
        self._api, self._pods, self._bounds, self._loop = api, pods, bounds, loop
        self._kinds = (CLAIMS, PODS) if pods.claims else (PODS,)
        self._sweep = Sweep(loop, kill=self.kill, told=kubernetes_errors.told, pauses=bounds.sweeps)
        self._policies: dict[str, float] = {}  # egress label → until when its policy needs no look
        self._pools: dict[str, Object] = {}  # name of a SandboxWarmPool → its SandboxTemplate
        self._pools_until = 0.0
        self._unfit: set[tuple[str, str]] = set()  # what was said about pools since then

    async def make(self, run: Run[str]) -> Made | Verdict:
        """What was made for this run, which need not run yet, or why there is nothing."""
        template = self._template(run)
        label = kubernetes_pod.egress_label(run.request.egress)
        unsure = False  # of any try: the Pod of a create without an answer may be why all later ones are refused

        async def create() -> Made:
            nonlocal unsure
            try:
                return await self._create(run, template, pool)
            except Exception as e:
                unsure = unsure or kubernetes_errors.undecided(e)
                raise

        try:
            if complaint := await self._patiently(lambda: self._unprotected(label), run):
                return Verdict(code=ErrCode.BOOT_FAIL, note=complaint)
            pool = await self._patiently(lambda: self._pool(template), run) if self._pods.claims else None
            return await self._patiently(create, run)
        except asyncio.CancelledError:
            await asyncio.wait({self._loop.spawn(self._sweep.now(run.owner))})
            raise
        except Exception as e:  # noqa: BLE001 - translated, whatever it is
            if unsure:
                await asyncio.wait({self._loop.spawn(self._sweep.now(run.owner))})
            return kubernetes_errors.of_create(e)

    def _template(self, run: Run[str]) -> Object:
        request = run.request
        return kubernetes_pod.template(request.limits, request.egress, image=run.made_of, settings=self._pods)

    async def _patiently(self, ask: Callable[[], Awaitable[T]], run: Run[str]) -> T:
        """Asks again while that may help, for as long as load and restarts are waited out."""
        passing, seconds = kubernetes_errors.passing, self._bounds.busy
        return await patiently(ask, passing=passing, seconds=seconds, stopped=lambda: run.killed)

    async def _unprotected(self, label: str) -> str | None:
        """Why this label does not hold a task's network; looked at again every now and then."""
        if time.monotonic() < self._policies.get(label, 0.0):
            return None
        name = kubernetes_policies.policy_of(label)
        complaint = kubernetes_policies.complaint(name, await self._api.get(POLICIES, name))
        if complaint is None:
            self._policies[label] = time.monotonic() + LOOK_SECONDS
        return complaint

    async def _pool(self, template: Object) -> str | None:
        """A warm pool whose Pods are what was approved; None where there is none, or no agent-sandbox."""
        if time.monotonic() > self._pools_until:
            templates = {one["metadata"]["name"]: one for one in await self._api.list_all(TEMPLATES)}
            pools = [(one["metadata"]["name"], one["spec"]) for one in await self._api.list_all(POOLS)]
            named = {name: templates.get(spec["sandboxTemplateRef"]["name"]) for name, spec in sorted(pools)}
            self._pools = {name: found for name, found in named.items() if found is not None}
            self._pools_until = time.monotonic() + LOOK_SECONDS
            self._unfit.clear()
        for name, found in self._pools.items():
            if (why := kubernetes_claims.unfit(found, template)) is None:
                return name
            if (name, why) not in self._unfit:
                self._unfit.add((name, why))
                log.info("sandbox_pool_does_not_fit", extra={"pool": name, "why": why})
        return None

    async def _create(self, run: Run[str], template: Object, pool: str | None) -> Made:
        """May be repeated: one that exists is the one of a create whose answer was lost. Nothing was started in it."""
        seconds = run.request.timeout_ms / 1000 + self._pods.boot + MARGIN
        if pool is None:
            kind = PODS
            wanted = kubernetes_pod.manifest(template, owner=run.owner, settings=self._pods, seconds=seconds)
        else:
            end = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=seconds)
            kind = CLAIMS
            wanted = kubernetes_claims.claim(run.owner, pool=pool, settings=self._pods, end=end)
        name = name_of(run.owner)
        try:
            found = await self._api.create(kind, wanted)
        except ApiError as e:
            lost = await self._api.get(kind, name) if e.status == 409 else None
            if lost is None or owner_of(lost) != run.owner:
                raise
            found = lost
        return Made(kind=kind, name=name, uid=found["metadata"]["uid"])

    async def boot(self, made: Made, run: Run[str]) -> Object | Verdict:
        """The Pod when it runs, made of what was approved."""
        deadline, looks = time.monotonic() + self._pods.boot, _looks()
        while True:
            late = time.monotonic() > deadline
            try:
                found, pod = await self._look(made)
            except Exception as e:  # noqa: BLE001 - translated, whatever it is
                if late or not kubernetes_errors.passing(e):
                    return kubernetes_errors.of_phase(e, otherwise=ErrCode.BOOT_FAIL)
            else:
                if found is None or found["metadata"]["uid"] != made.uid:
                    return Verdict(code=ErrCode.LOST, note="the Pod was deleted before it ran")
                look = kubernetes_claims.of_claim(found) if pod is None else kubernetes_errors.of_boot(pod)
                if look is not None:
                    return look
                if pod is not None and kubernetes_pod.running(pod):
                    return self._unapproved(made, pod, run) or pod
                if late:
                    return kubernetes_errors.of_late_boot(pod or found, self._pods.boot)
            await asyncio.sleep(next(looks))

    async def _look(self, made: Made) -> tuple[Object | None, Object | None]:
        """What was made, and its Pod."""
        found = await self._api.get(made.kind, made.name)
        if found is None or made.kind is PODS:
            return found, found
        name = kubernetes_claims.pod_of(found)
        return found, await self._api.get(PODS, name) if name else None

    def _unapproved(self, made: Made, pod: Object, run: Run[str]) -> Verdict | None:
        """Why nothing may be started in this Pod."""
        if made.kind is CLAIMS and (why := kubernetes_claims.strange(pod, self._template(run))):
            return Verdict(code=ErrCode.BOOT_FAIL, note=f"the pool's Pod is not what was approved: {why}")
        digest = kubernetes_pod.image_digest(pod)
        if digest is None or not run.made_of.endswith(f"@{digest}"):
            has = f"the node's runtime says that the Pod is made of {digest or 'no digest'}"
            return Verdict(code=ErrCode.BOOT_FAIL, note=f"{run.made_of} was approved; {has}")
        return None

    async def owned(self, store_id: str) -> list[Owner]:
        """Of everything of this store."""
        listed = [await self._api.list_all(kind, kubernetes_pod.selector(store_id)) for kind in self._kinds]
        owners = {owner_of(one) for one in chain.from_iterable(listed)}
        return [owner for owner in owners if owner is not None and owner.store_id == store_id]

    async def kill(self, owner: Owner) -> int:
        """How many there were. Returns when they are gone."""
        killed = 0
        for kind in self._kinds:
            found = await self._api.get(kind, name_of(owner))
            if found is not None and _same(owner_of(found), owner):
                await self._remove(Made(kind=kind, name=name_of(owner), uid=found["metadata"]["uid"]))
                killed += "deletionTimestamp" not in found["metadata"]
        return killed

    async def _remove(self, made: Made) -> None:
        """Returns when the Pod is gone, which its node confirms; by force when the node does not. Raises Unavailable."""
        for force, seconds in ((False, self._bounds.gone), (True, self._bounds.api)):
            if force:
                log.warning("sandbox_deleted_by_force", extra={"pod": made.name})
                found, pod = await self._look(made)
                if pod is not None and found is not None and found["metadata"]["uid"] == made.uid:
                    await self._api.delete(PODS, pod["metadata"]["name"], pod["metadata"]["uid"], force=True)
            else:
                await self._api.delete(made.kind, made.name, made.uid)
            deadline, looks = time.monotonic() + seconds, _looks()
            while time.monotonic() < deadline:
                found = await self._api.get(made.kind, made.name)
                if found is None or found["metadata"]["uid"] != made.uid:
                    return
                await asyncio.sleep(next(looks))
        raise Unavailable(f"Kubernetes: {made.name} was deleted by force, and is there still")

    async def end(self, owner: Owner, made: Made) -> None:
        """Deletes what was made. When that cannot be confirmed, its own deadline and the reaper do it."""
        for _ in range(2):
            try:
                await self._remove(made)
                return
            except Exception as e:  # noqa: BLE001 - told, and tried once more
                facts = {"pod": made.name, "task_key": owner.task_key, "error": kubernetes_errors.told(e)}
                log.warning("sandbox_delete_unconfirmed", extra=facts)


def _same(found: Owner | None, owner: Owner) -> bool:
    return found is not None and (found.store_id, found.fence) == (owner.store_id, owner.fence)


def _looks() -> Iterator[float]:
    """Seconds between looks at a Pod that starts or ends."""
    return chain((0.1, 0.1, 0.15, 0.2, 0.3, 0.5), repeat(1.0))
