"""kopf as an informer: its own thread and loop, `on.event` only, no write of any kind. The only importer of kopf."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import kopf

from controller.kube.client import PAGE, VERSION
from controller.kube.crd import GROUP

log = logging.getLogger(__name__)
KINDS = ("intents", "planapprovals")
SeenEvent = Callable[[str, str | None, Mapping[str, Any]], None]


class Watch:
    """Hands `(plural, type, object)` to `seen`, in kopf's thread; `failed(reason)` when kopf ends by itself."""

    def __init__(self, *, seen: SeenEvent, failed: Callable[[str], None], in_cluster: bool) -> None:
        self._seen, self._failed, self._in_cluster = seen, failed, in_cluster
        self._stop = threading.Event()
        self.ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kopf", daemon=True)

    def start(self) -> None:
        """Begin listing and watching."""
        self._thread.start()

    def stop(self) -> None:
        """Ask kopf to end and wait a little for it."""
        self._stop.set()
        self._thread.join(3)

    @property
    def alive(self) -> bool:
        """The thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        asyncio.run(self._operate())

    async def _operate(self) -> None:
        # Told from in here: once kopf has raised, asyncio.run() may wait for ever for kopf's thread that waits for our stop flag.
        try:
            await kopf.operator(
                registry=self._registry(),
                settings=self._settings(),
                clusterwide=True,
                stop_flag=self._stop,
                ready_flag=self.ready,
            )
        except Exception as e:  # whatever ends the watch ends the process: it must not live on deaf
            log.exception("watch ended")
            self._failed(f"watch ended: {e}")
        else:
            if not self._stop.is_set():
                self._failed("watch ended by itself")

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        login = kopf.login_with_service_account if self._in_cluster else kopf.login_with_kubeconfig
        kopf.on.login(registry=registry)(lambda **kwargs: login(**kwargs))
        for plural in KINDS:
            kopf.on.event(GROUP, VERSION, plural, registry=registry, id=f"seen-{plural}")(self._handler(plural))
        return registry

    def _handler(self, plural: str) -> Callable[..., Any]:
        async def handler(event: Mapping[str, Any], **_: Any) -> None:
            # Copied out: kopf's object is its own live memory.
            self._seen(plural, event["type"], dict(event["object"]))

        return handler

    @staticmethod
    def _settings() -> kopf.OperatorSettings:
        settings = kopf.OperatorSettings()
        settings.posting.enabled = False
        settings.peering.standalone = True
        settings.scanning.disabled = True
        settings.watching.server_timeout = 300
        settings.watching.client_timeout = 310
        # Without pages 10,000 objects of a kind are in memory at once, each with a task of its own: a gigabyte.
        settings.watching.chunk_size = PAGE
        settings.queueing.idle_timeout = 0.1  # one task per object: let it end soon
        return settings
