"""From a create to the last look at a deleted Pod: load is waited out, an attempt never has two Pods, and none is left."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import chain, repeat
from typing import Any, TypeVar

from controller.core.contract import ErrCode
from controller.core.errors import Unavailable
from controller.core.model import Owner
from controller.sbx import kubernetes_errors, kubernetes_pod, kubernetes_policies
from controller.sbx.kubernetes_api import Api, Bounds
from controller.sbx.kubernetes_errors import ApiError
from controller.sbx.kubernetes_pod import PodSettings, name_of, owner_of
from controller.sbx.loop import Loop
from controller.sbx.patience import patiently
from controller.sbx.runs import Run
from controller.sbx.sweep import Sweep
from controller.sbx.task import Verdict

log = logging.getLogger(__name__)
MARGIN = (
    300  # seconds that a Pod may live beyond its boot and its task's time, for what comes before and after the command
)
POLICY_SECONDS = 30.0  # how long a look at a NetworkPolicy counts
Pod = dict[str, Any]
T = TypeVar("T")


class Lifecycle:
    """Of all Pods of one provider."""

    def __init__(self, api: Api, *, pods: PodSettings, bounds: Bounds, loop: Loop) -> None:
        self._api, self._pods, self._bounds, self._loop = api, pods, bounds, loop
        self._sweep = Sweep(loop, kill=self.kill, told=kubernetes_errors.told, pauses=bounds.sweeps)
        self._policies: dict[str, float] = {}  # egress label → until when its policy needs no look

    async def make(self, run: Run[str]) -> Pod | Verdict:
        """A Pod of this run, which need not run yet, or why there is none."""
        label = kubernetes_pod.egress_label(run.request)
        try:
            if complaint := await self._patiently(lambda: self._unprotected(label), run):
                return Verdict(code=ErrCode.BOOT_FAIL, note=complaint)
            return await self._patiently(lambda: self._create(run), run)
        except asyncio.CancelledError:
            await asyncio.wait({self._loop.spawn(self._sweep.now(run.owner))})
            raise
        except Exception as e:  # noqa: BLE001 - translated, whatever it is
            if kubernetes_errors.undecided(e):
                await asyncio.wait({self._loop.spawn(self._sweep.now(run.owner))})
            return kubernetes_errors.of_create(e)

    async def _patiently(self, ask: Callable[[], Awaitable[T]], run: Run[str]) -> T:
        """Asks again while that may help, for as long as load and restarts are waited out."""
        passing, seconds = kubernetes_errors.passing, self._bounds.busy
        return await patiently(ask, passing=passing, seconds=seconds, stopped=lambda: run.killed)

    async def _unprotected(self, label: str) -> str | None:
        """Why this label does not hold a task's network; looked at again every now and then."""
        if time.monotonic() < self._policies.get(label, 0.0):
            return None
        name = kubernetes_policies.policy_of(label)
        complaint = kubernetes_policies.complaint(name, await self._api.policy(name))
        if complaint is None:
            self._policies[label] = time.monotonic() + POLICY_SECONDS
        return complaint

    async def _create(self, run: Run[str]) -> Pod:
        """May be repeated: one that exists is the one of a create whose answer was lost. Nothing was started in it."""
        seconds = run.request.timeout_ms / 1000 + self._pods.boot + MARGIN
        wanted = kubernetes_pod.manifest(
            run.request, owner=run.owner, image=run.made_of, settings=self._pods, seconds=seconds
        )
        try:
            return await self._api.create(wanted)
        except ApiError as e:
            if e.status == 409 and (found := await self._api.get(name_of(run.owner))) and owner_of(found) == run.owner:
                return found
            raise

    async def boot(self, pod: Pod, run: Run[str]) -> Verdict | None:
        """None when the Pod runs, made of what was approved."""
        name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
        deadline, looks = time.monotonic() + self._pods.boot, _looks()
        while not kubernetes_pod.running(pod):
            if verdict := kubernetes_errors.of_boot(pod):
                return verdict
            if time.monotonic() > deadline:
                return kubernetes_errors.of_late_boot(pod, self._pods.boot)
            await asyncio.sleep(next(looks))
            try:
                found = await self._api.get(name)
            except Exception as e:  # noqa: BLE001 - translated, whatever it is
                if time.monotonic() > deadline or not kubernetes_errors.passing(e):
                    return kubernetes_errors.of_phase(e, otherwise=ErrCode.BOOT_FAIL)
                continue
            if found is None or found["metadata"]["uid"] != uid:
                return Verdict(code=ErrCode.LOST, note="the Pod was deleted before it ran")
            pod = found
        digest = kubernetes_pod.image_digest(pod)
        if digest is None or not run.made_of.endswith(f"@{digest}"):
            has = f"the node's runtime says that the Pod is made of {digest or 'no digest'}"
            return Verdict(code=ErrCode.BOOT_FAIL, note=f"{run.made_of} was approved; {has}")
        return None

    async def kill(self, owner: Owner) -> int:
        """How many there were. Returns when they are gone."""
        pod = await self._api.get(name_of(owner))
        if pod is None or not _same(owner_of(pod), owner):
            return 0
        await self._remove(name_of(owner), pod["metadata"]["uid"])
        return int("deletionTimestamp" not in pod["metadata"])

    async def _remove(self, name: str, uid: str) -> None:
        """Returns when the Pod is gone, which its node confirms; by force when the node does not. Raises Unavailable."""
        for force, seconds in ((False, self._bounds.gone), (True, self._bounds.api)):
            if force:
                log.warning("sandbox_deleted_by_force", extra={"pod": name})
            await self._api.delete(name, uid, force=force)
            deadline, looks = time.monotonic() + seconds, _looks()
            while time.monotonic() < deadline:
                pod = await self._api.get(name)
                if pod is None or pod["metadata"]["uid"] != uid:
                    return
                await asyncio.sleep(next(looks))
        raise Unavailable(f"Kubernetes: Pod {name} was deleted by force, and is there still")

    async def end(self, owner: Owner, uid: str) -> None:
        """Deletes the Pod. When that cannot be confirmed, its own deadline and the reaper do it."""
        for _ in range(2):
            try:
                await self._remove(name_of(owner), uid)
                return
            except Exception as e:  # noqa: BLE001 - told, and tried once more
                facts = {"pod": name_of(owner), "task_key": owner.task_key, "error": kubernetes_errors.told(e)}
                log.warning("sandbox_delete_unconfirmed", extra=facts)


def _same(found: Owner | None, owner: Owner) -> bool:
    return found is not None and (found.store_id, found.fence) == (owner.store_id, owner.fence)


def _looks() -> Iterator[float]:
    """Seconds between looks at a Pod that starts or ends."""
    return chain((0.1, 0.1, 0.15, 0.2, 0.3, 0.5), repeat(1.0))
