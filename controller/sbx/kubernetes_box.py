"""One task in one Pod, in phases: upload, command, collect (remote.py has what is the same elsewhere). On the loop of kubernetes.py.

The image needs `timeout`, `head` and `mkfifo` beside what remote.py names: coreutils. A time limit is kept three times: by `timeout`
in the Pod, which works in a Pod that can start no process any more; by us some seconds later; by the Pod's own deadline.
"""

from __future__ import annotations

import asyncio
import shlex
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from controller.core.contract import ErrCode, SBXReq
from controller.core.model import Artifact
from controller.sbx import artifacts, kubernetes_errors, remote
from controller.sbx.jail import OUTPUT, WORKSPACE
from controller.sbx.kubernetes_api import PODS, Api, Bounds
from controller.sbx.kubernetes_canary import OFF, trial
from controller.sbx.kubernetes_errors import ExecFailed
from controller.sbx.limits import MIB, rlimits
from controller.sbx.loop import give_up, within
from controller.sbx.remote import FEED, LISTING, SAID, Said
from controller.sbx.task import Verdict, keep

MISSES = 3  # looks at the Pod without an answer, one after the other
LOOK = 0.2  # seconds between two looks at a Pod that should say why it ended
LATE = 2.0  # seconds that our own time limit leaves the Pod's
TIMED_OUT = (124, 137, 143)  # what `timeout` exits with, by its make and by the signal that worked
# A script on stdin and not in the URL, which is logged by API servers and cut by proxies.
READ_SCRIPT = 'eval "$(head -c {size})"'
# First what the command left running dies, should it have killed the shell that does it.
FACTS = (
    "kill -KILL -1 2> /dev/null; cd /sys/fs/cgroup || exit 0; for f in memory.events memory.peak cpu.stat memory/memory.oom_control"
    " memory/memory.max_usage_in_bytes cpuacct/cpuacct.usage cpu,cpuacct/cpuacct.usage;"
    ' do if [ -r "$f" ]; then while read -r line; do echo "$f $line"; done < "$f"; fi; done'
)


def command_line(request: SBXReq, *, grace: float) -> str:
    """What the Pod's shell is given to run. Raises InvalidIntent when it is too long."""
    limited = ["/usr/bin/timeout", "-k", f"{grace:g}", f"{request.timeout_ms / 1000:g}"]
    limited += rlimits(request.limits, memory=False, processes=False)
    exports = {**request.env, "SISU_OUTPUT_DIR": OUTPUT}
    prefix = "".join(f"export {name}={shlex.quote(value)}; " for name, value in exports.items())
    workdir = shlex.quote(request.workdir or WORKSPACE)
    return f"{prefix}cd {workdir} || exit 1; exec < /dev/null; {remote.script(request, limited)}"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the container's cgroup counted so far."""

    oom_kills: int = 0
    mem_peak_mb: int | None = None
    cpu_ms: int | None = None


@dataclass(kw_only=True)
class PodTask:
    """Also the remote.Shell of its Pod. `say(kind, data)` gets the output and `note` lines of ours; neither may block.

    `canary`: what the Pod must not be able to connect to before its command begins (kubernetes_canary.py).
    `replaceable`: should the Pod be deleted, another of its name may take its place (agent-sandbox does that).
    """

    api: Api
    pod: str
    uid: str
    replaceable: bool = False
    request: SBXReq
    bounds: Bounds
    caps: artifacts.Caps
    say: Callable[[str, bytes], None]
    note: Callable[[str], None]
    log_start: Callable[[], None]
    canary: str = OFF
    facts: Facts = Facts()
    alive: bool = True  # whether its outputs can be fetched

    async def upload(self, files: Mapping[str, bytes]) -> Verdict | None:
        """What the request brings, whether the working directory is in it, and meanwhile whether its network is held."""
        held = asyncio.ensure_future(self._held())
        try:
            return await self._bring(files) or await held
        finally:
            give_up(held)

    async def _held(self) -> Verdict | None:
        if (text := trial(self.canary)) is None:
            return None
        return await remote.tried(self, text, ErrCode.BOOT_FAIL, "the network of the Pod is not held")

    async def _bring(self, files: Mapping[str, bytes]) -> Verdict | None:
        failed = await remote.upload(self, self.request, files)
        workdir = self.request.workdir or WORKSPACE
        if failed is not None or workdir == WORKSPACE:
            return failed
        why = f"the working directory {workdir} cannot be entered"
        return await remote.tried(self, f"cd {shlex.quote(workdir)}", ErrCode.BOOT_FAIL, why)

    async def command(self) -> Verdict:
        """The task itself. Watched by looks at the Pod, for a stream that has died looks like a command that prints nothing."""
        script = command_line(self.request, grace=self.bounds.grace).encode()
        argv = ["/bin/sh", "-c", READ_SCRIPT.format(size=len(script))]
        work = self.api.execute(self.pod, argv, stdin=script, feed=self.say, heartbeat=2 * self.bounds.probe)
        self.log_start()
        started = time.monotonic()
        running = asyncio.ensure_future(work)
        try:
            return await self._watch(running, started)
        finally:
            give_up(running)

    async def collect(self) -> tuple[list[Artifact], Verdict | None]:
        """What the command left in /output."""
        return await remote.collect(self, self.request, caps=self.caps, note=self.note)

    async def run(self, text: str, *, feed: bytes | None = None) -> Said:
        """See remote.Shell."""
        if feed is None:
            return await self._exec(text, stdin=b"", room=LISTING)
        return await self._exec(f"head -c {len(feed)} > {FEED} || exit 1; {text}", stdin=feed, room=LISTING)

    async def pipe(self, text: str, *, feed: bytes, room: int) -> Said:
        """See remote.Shell."""
        said = await self._exec(f"head -c {len(feed)} | {text}", stdin=feed, room=room + 1)
        if len(said.out) > room:
            raise tarfile.TarError(f"the packed outputs have more than {room} bytes")
        return said

    def blame(self, error: Exception, *, otherwise: ErrCode) -> Verdict:
        """See remote.Shell."""
        return kubernetes_errors.of_phase(error, otherwise=otherwise)

    async def _end(self) -> Verdict | None:
        """How the Pod ended, if it did."""
        pod = await within(self.bounds.probe, self.api.get(PODS, self.pod), "look at the Pod")
        if pod is None or pod["metadata"]["uid"] != self.uid:
            verdict: Verdict | None = Verdict(code=ErrCode.LOST, note="the Pod is gone")
        else:
            verdict = kubernetes_errors.of_pod(pod, self.request.limits)
        self.alive = verdict is None
        return verdict

    async def _exec(self, text: str, *, stdin: bytes, room: int) -> Said:
        """One short command of ours."""
        kept = {"stdout": bytearray(), "stderr": bytearray()}
        rooms = {"stdout": room, "stderr": SAID}
        work = self.api.execute(
            self.pod,
            ["/bin/sh", "-c", text],
            stdin=stdin,
            feed=lambda kind, data: keep(kept[kind], data, rooms[kind]),
        )
        code = await within(self.bounds.tool, work, "a command of ours")
        return Said(exit=code, out=bytes(kept["stdout"]), err=kept["stderr"].decode(errors="replace").strip())

    async def _watch(self, running: asyncio.Future[int], started: float) -> Verdict:
        seconds = self.request.timeout_ms / 1000
        deadline, misses = started + seconds + self.bounds.grace + LATE, 0
        while True:
            left = deadline - time.monotonic()
            await asyncio.wait({running}, timeout=max(0.0, min(self.bounds.probe, left)))
            if running.done():
                return await self._ended(running, late=time.monotonic() - started >= seconds)
            if left <= self.bounds.probe:
                return await self._time_out(running)
            try:
                verdict = await self._end()
            except Exception as e:  # noqa: BLE001 - whatever it is, that is the answer
                misses += 1
                if misses >= MISSES:
                    return self.blame(e, otherwise=ErrCode.NET_FAIL)
                continue
            misses = 0
            if verdict is not None:
                return verdict

    async def _ended(self, running: asyncio.Future[int], *, late: bool) -> Verdict:
        """From the exit code, if there is one; else, or when it may have been killed from outside, from the Pod."""
        try:
            code = running.result()
            if self.replaceable and (verdict := await self._end()):  # it may have run in another Pod, without its files
                return verdict
        except Exception as e:  # noqa: BLE001 - translated, whatever it is
            return await self._explained(e)
        try:
            self.facts = await self._facts()
        except Exception as e:  # noqa: BLE001 - translated, whatever it is
            if code != 0:
                return await self._explained(e)
        if code == 0:
            return Verdict(code=ErrCode.NONE, exit=0)
        if late and code in TIMED_OUT:
            return Verdict(code=ErrCode.TIMEOUT, note="ended: timeout")
        if self.facts.oom_kills:
            note = f"out of memory: more than {self.request.limits.memory_mb} MiB"
            return Verdict(code=ErrCode.OOM, exit=code, note=note)
        return Verdict(code=ErrCode.CMD_NONZERO, exit=code)

    async def _explained(self, error: Exception) -> Verdict:
        """The Pod may take a moment until it says why it ended."""
        deadline = time.monotonic() + self.bounds.reason
        while True:
            try:
                verdict = await self._end()
            except Exception as e:  # noqa: BLE001 - translated, whatever it is
                return self.blame(e, otherwise=ErrCode.NET_FAIL)
            if verdict is not None or time.monotonic() > deadline:
                return verdict or self.blame(error, otherwise=ErrCode.NET_FAIL)
            await asyncio.sleep(LOOK)

    async def _time_out(self, running: asyncio.Future[int]) -> Verdict:
        """TIMEOUT only when something of the task still ran: else the command may have ended in time, unheard."""
        try:
            if verdict := await self._end():
                return verdict
            killed = await within(self.bounds.grace, self._exec("kill -KILL -1", stdin=b"", room=0), "time limit")
            if killed.exit != 0:
                return Verdict(code=ErrCode.NET_FAIL, note="the command ended, but its end did not reach us")
        except ExecFailed as e:  # a container that can start nothing any more: it is deleted with all that is in it
            self.note(f"the command could not be killed: {e}")
        except Exception as e:  # noqa: BLE001 - whatever it is, that is the answer
            return self.blame(e, otherwise=ErrCode.NET_FAIL)
        await asyncio.wait({running}, timeout=self.bounds.grace)  # its last output
        return Verdict(code=ErrCode.TIMEOUT, note="ended: timeout")

    async def _facts(self) -> Facts:
        said = await self._exec(FACTS, stdin=b"", room=LISTING)
        return facts_of(said.out.decode(errors="replace"))


def facts_of(text: str) -> Facts:
    """From lines of FACTS: `file value` or `file key value`, cgroup v1 and v2."""
    found = dict(_numbers(text))

    def first(*names: str) -> int | None:
        return next((found[name] for name in names if name in found), None)

    peak = first("memory.peak", "memory/memory.max_usage_in_bytes")
    nanos = first("cpuacct/cpuacct.usage", "cpu,cpuacct/cpuacct.usage")
    micros = first("cpu.stat usage_usec") if nanos is None else nanos // 1000
    return Facts(
        oom_kills=first("memory.events oom_kill", "memory/memory.oom_control oom_kill") or 0,
        mem_peak_mb=None if peak is None else -(-peak // MIB),
        cpu_ms=None if micros is None else micros // 1000,
    )


def _numbers(text: str) -> Iterator[tuple[str, int]]:
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if value.isdecimal():
            yield name, int(value)
