"""The verdict: rows in, violations out, each a line that shows the row. Pure; tests/unit/test_soak_judge.py plants what it must find."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from controller.core.model import Owner
from devcluster.soak.plan import Planned
from devcluster.soak.rows import Attempt, Causes, Check, Evidence, Failure, Interruption, Start, Stream, Task, Window

LARGEST = 64 * 1024
INFRASTRUCTURE = ("BOOT_FAIL", "NET_FAIL", "UPLOAD_FAIL", "DOWNLOAD_FAIL", "LOST")
ATTEMPTS = 3  # that a task may lose to infrastructure
WORKERS = 6  # that may die under a task: three beside other tasks, three with it alone
LATE = 2.0  # seconds: what was sent to PostgreSQL before its sender died may be carried out afterwards
SAID = ("stdout.txt", "stderr.txt")


def check(name: str, looked_at: int, found: Iterator[str]) -> Check:
    """One check; what looked at nothing has shown nothing."""
    violations = tuple(found) if looked_at else ("there was nothing to look at",)
    return Check(name=name, looked_at=looked_at, violations=violations)


def common(plan: Sequence[Planned], it: Evidence, causes: Causes, *, canceled: bool) -> list[Check]:
    """What is asked of every Intent."""
    return [
        check("one outcome accepted per task", len(it.tasks), accepted(plan, it.tasks, canceled=canceled)),
        check("the run was closed once", it.run.executions, closed(it, canceled=canceled)),
        check("journal: attempts in order, the last one counts", len(it.attempts), journal(it.tasks, it.attempts)),
        check("start log: every start is a journaled attempt", len(it.starts), started(it)),
        check("every attempt that did not count is explained", len(it.attempts), unexplained(it, causes)),
        check("receipts: nothing counted twice", len(it.tasks), receipts(it.tasks)),
        check("the Intent's JSON stays under 64 KiB", it.largest, oversized(it.largest)),
        check("status.tasks equals SQL", len(it.shown), miscounted(it.shown, it.tasks)),
    ]


def accepted(plan: Sequence[Planned], tasks: Sequence[Task], *, canceled: bool) -> Iterator[str]:
    """Every task of the plan, each key once, each with one fence-accepted outcome, or with none when it was canceled."""
    wanted, there = {one.task_id for one in plan}, Counter(one.task_id for one in tasks)
    yield from (f"task {missing} is missing" for missing in sorted(wanted - there.keys()))
    yield from (f"task {extra} is not in the plan" for extra in sorted(there.keys() - wanted))
    yield from (f"task {i} has {n} rows" for i, n in there.items() if n > 1)
    keys = Counter(one.task_key for one in tasks)
    yield from (f"task key {key} has {n} rows" for key, n in keys.items() if n > 1)
    for one in tasks:
        due = 0 if canceled and one.err_code == "CANCELED" else 1
        if one.outcomes != due:
            yield f"{one.task_id} has {one.outcomes} accepted outcomes instead of {due}: {one}"
        if one.status not in ("succeeded", "failed"):
            yield f"{one.task_id} is {one.status}"


def closed(it: Evidence, *, canceled: bool) -> Iterator[str]:
    """Once by the counter, by its transitions, by FinishWF and by ExecuteST's row."""
    run, finishes = it.run, 0 if canceled else 1
    if (run.executions, run.closed) != (1, 1):
        yield f"closed {run.closed} times in {run.executions} executions"
    if len(run.endings) != 1:
        yield f"it ended {len(run.endings)} times: {run.endings}"
    if run.finishers.count('"closed"') > finishes or len(run.finishers) < finishes:
        yield f"FinishWF ended with {run.finishers}"
    if run.steps != finishes:
        yield f"ExecuteST was written {run.steps} times instead of {finishes}"


def journal(tasks: Sequence[Task], attempts: Sequence[Attempt]) -> Iterator[str]:
    """Numbered from 1 with growing fences; the last is `done` and its fence the task's, or the task was canceled; no other counts."""
    by_key = _by_key(attempts)
    for one in tasks:
        mine = by_key.pop(one.task_key, [])
        numbers, fences = [a.attempt for a in mine], [a.fence for a in mine]
        if numbers != list(range(1, len(mine) + 1)) or fences != sorted(fences):
            yield f"{one.task_id}: attempts {list(zip(numbers, fences, strict=True))}"
        done = [a.fence for a in mine if a.state == "done"]
        if one.outcomes and (done != fences[-1:] or done != [one.fence]):
            yield f"{one.task_id}: accepted is fence {one.fence}, the journal's last is {fences[-1:]} and its done are {done}"
        if not one.outcomes and done:
            yield f"{one.task_id}: without an outcome, but the journal calls {done} done"
        yield from (f"{one.task_id}: attempt {a.attempt} has no end: {a}" for a in mine if a.state == "created")
    yield from (f"attempts of an unknown task: {mine}" for mine in by_key.values())


def started(it: Evidence) -> Iterator[str]:
    """Each start is an attempt, no fence starts twice, and what was accepted was started."""
    known = {Start(task_key=a.task_key, attempt=a.attempt, fence=a.fence) for a in it.attempts}
    seen = Counter(it.starts)
    yield from (f"a start that the journal does not know: {one}" for one in seen.keys() - known)
    fences = Counter(one.fence for one in it.starts)
    yield from (f"fence {fence} was started {n} times" for fence, n in fences.items() if n > 1)
    for one in it.tasks:
        if one.outcomes and one.err_code not in INFRASTRUCTURE and one.fence not in fences:
            yield f"{one.task_id}: accepted is fence {one.fence}, which was never started"


def unexplained(it: Evidence, causes: Causes) -> Iterator[str]:
    """An attempt counts, or its worker was interrupted while it ran, or its provider failed on purpose, or its Intent was canceled."""
    accepted = {one.fence for one in it.tasks if one.outcomes}
    ended = {one.task_key for one in it.tasks if one.err_code == "CANCELED"}
    started = {one.fence for one in it.starts}
    last = {key: mine[-1].fence for key, mine in _by_key(it.attempts).items()}
    for one in it.attempts:
        by_cancel = one.task_key in ended and last[one.task_key] == one.fence
        if one.fence not in accepted and not by_cancel and explanation(one, causes) is None:
            yield f"{'started' if one.fence in started else 'never started'} and unexplained: {one}"


def explanation(one: Attempt, causes: Causes) -> str | None:
    """Why this attempt's outcome is not the one that counts."""
    for cut in causes.interruptions:
        if cut.worker == one.worker and _within(one, cut):
            return f"{one.worker} was {cut.what}"
    for failure in causes.failures:
        if (failure.task_key, failure.attempt) == (one.task_key, one.attempt) and failure.err_code in INFRASTRUCTURE:
            for window in causes.windows:
                if _overlap(one, window):
                    return f"{failure.err_code} while {window.what}"
    return None


def _within(one: Attempt, cut: Interruption) -> bool:
    # What ends by itself has lost its lease before, and is seen to have ended a little later.
    return one.created <= cut.at + LATE and (cut.what == "ended" or one.ended is None or cut.at <= one.ended)


def _overlap(one: Attempt, window: Window) -> bool:
    return one.created <= window.ended and (one.ended is None or one.ended >= window.began)


def receipts(tasks: Sequence[Task]) -> Iterator[str]:
    """The oracle of the source documents: one receipt per outcome."""
    for one in tasks:
        if one.receipts != one.outcomes or one.receipts > 1:
            yield f"{one.task_id}: {one.receipts} receipts for {one.outcomes} outcomes"


def ordered(plan: Sequence[Planned], it: Evidence) -> Iterator[str]:
    """ExecuteST holds the plan's tasks in the plan's order, with SQL's statuses."""
    wanted = [one.task_id for one in plan]
    if [task_id for task_id, _ in it.run.result] != wanted:
        first = next((n for n, (a, b) in enumerate(zip(it.run.result, wanted, strict=False)) if a[0] != b), "the end")
        yield f"{len(it.run.result)} results for {len(wanted)} tasks; they differ at {first}"
    for (task_id, status), one in zip(it.run.result, it.tasks, strict=False):
        if (task_id, status) != (one.task_id, one.status):
            yield f"ExecuteST has {task_id} {status}, SQL has {one.task_id} {one.status}"


def oversized(largest: int) -> Iterator[str]:
    """Law 3."""
    if largest >= LARGEST:
        yield f"{largest} bytes"


def miscounted(shown: Mapping[str, int], tasks: Sequence[Task]) -> Iterator[str]:
    """What people see at the end."""
    states = Counter(one.status for one in tasks)
    counted = {"total": len(tasks), **{name: states[name] for name in ("queued", "running", "succeeded", "failed")}}
    counted["unknown"] = sum(one.err_code == "LOST" for one in tasks)
    for name, n in counted.items():
        if shown.get(name, 0) != n:
            yield f"status.tasks.{name} is {shown.get(name, 0)}, SQL counts {n}"


def outcomes(plan: Sequence[Planned], it: Evidence, causes: Causes) -> Iterator[str]:
    """The expected errCode, exit and JUnit; or an infrastructure failure after three attempts that we have spoiled, each of them."""
    expected, by_key = {one.task_id: one for one in plan}, _by_key(it.attempts)
    for one in it.tasks:
        wanted = expected.get(one.task_id)
        if wanted is None or one.err_code == "CANCELED":
            continue
        mine = by_key.get(one.task_key, [])
        if one.err_code in INFRASTRUCTURE and spent(mine, causes, by_us=one.err_code):
            continue
        has = (one.err_code, one.exit, dict(one.junit) if one.junit else None)
        due = (wanted.err_code, wanted.exit, dict(wanted.junit) if wanted.junit else None)
        if has != due:
            yield f"{one.task_id} ({wanted.kind}) has (errCode, exit, junit) {has} instead of {due}"


def spent(mine: Sequence[Attempt], causes: Causes, *, by_us: str) -> bool:
    """Whether a task has used up its attempts, and each for a reason that is ours. The last one wrote its failure, and no log line."""
    if len(mine) < ATTEMPTS:
        return False
    last = mine[-1]
    told = Failure(task_key=last.task_key, attempt=last.attempt, err_code=by_us)
    more = Causes(interruptions=causes.interruptions, failures=(*causes.failures, told), windows=causes.windows)
    lost = by_us == "LOST" and len(mine) > WORKERS  # the attempt after those is not run: it writes LOST
    return all(explanation(a, more) is not None for a in (mine[:-1] if lost else mine))


def kept(plan: Sequence[Planned], it: Evidence) -> Iterator[str]:
    """Artifacts: exactly the expected ones, of the accepted attempt alone, their blobs' bytes as hashed, and the output among them."""
    number = {a.fence: a.attempt for a in it.attempts}
    counted = {one.task_id: one for one in it.tasks if one.outcomes and one.err_code not in INFRASTRUCTURE}
    found: dict[str, dict[str, str]] = {}
    for art in it.kept:
        if art.sha256 != art.content_sha256:
            yield f"{art.task_id}: the blob of {art.name} is not what its name says: {art}"
        task = next((one for one in it.tasks if one.task_id == art.task_id), None)
        if task is None or not task.outcomes or number.get(task.fence or 0) != art.attempt:
            yield f"{art.task_id}: an artifact of an attempt that did not count: {art}"
        found.setdefault(art.task_id, {})[art.name] = art.content_sha256
    for planned in plan:
        if planned.task_id in counted:
            yield from _kept(planned, found.get(planned.task_id, {}))


def _kept(planned: Planned, found: Mapping[str, str]) -> Iterator[str]:
    files = {name: sha for name, sha in found.items() if name not in SAID}
    due = {name: hashlib.sha256(content).hexdigest() for name, content in planned.files.items()}
    if files != due:
        yield f"{planned.task_id} ({planned.kind}): files {files} instead of {due}"
    if planned.stdout is not None:
        said = hashlib.sha256(planned.stdout).hexdigest() if planned.stdout else None
        if found.get("stdout.txt") != said:
            yield f"{planned.task_id} ({planned.kind}): stdout.txt is {found.get('stdout.txt')} instead of {said}"


def streamed(plan: Sequence[Planned], it: Evidence) -> Iterator[str]:
    """The accepted attempt's stream holds all of stdout and ends with its one mark."""
    streams = {(one.task_key, one.attempt): one for one in it.streams}
    number, expected = {a.fence: a.attempt for a in it.attempts}, {one.task_id: one for one in plan}
    for one in it.tasks:
        if not one.outcomes or one.err_code in INFRASTRUCTURE or one.task_id not in expected:
            continue
        stdout, stream = expected[one.task_id].stdout, streams.get((one.task_key, number.get(one.fence or 0, 0)))
        if stream is None:
            yield f"{one.task_id}: no stream"
        elif (stream.marks, stream.last) != (1, "stream_closed") or not _whole(stream, stdout):
            yield f"{one.task_id}: {stream}, due are {'any' if stdout is None else len(stdout)} bytes"


def _whole(stream: Stream, stdout: bytes | None) -> bool:
    return stdout is None or stream.stdout_bytes == len(stdout)


def happened(planned: Sequence[str], done: Sequence[str]) -> Iterator[str]:
    """A soak that did not do what it was to do has shown nothing."""
    missing = Counter(planned) - Counter(done)
    yield from (f"{n} × {what} did not happen" for what, n in missing.items())


def ended(codes: Mapping[str, int | None], interruptions: Sequence[Interruption]) -> Iterator[str]:
    """Exit codes of workers that were not killed: a zombie fences itself off (75), and nothing else may end by itself."""
    cut = {one.worker: one.what for one in interruptions}
    for worker, code in codes.items():
        if cut.get(worker) != "killed" and code != 75:
            yield f"{worker} ({cut.get(worker, 'not interrupted')}) ended with {code} instead of 75"


def doubled(starts: Sequence[Start], alive: Sequence[Owner]) -> Iterator[Owner]:
    """Sandboxes whose command was started, that live although a newer command of their task was started.

    A box in which nothing was started may be there: one that was made after its worker had died, and waits for the reaper.
    """
    newest: dict[str, int] = {}
    for one in starts:
        newest[one.task_key] = max(one.fence, newest.get(one.task_key, 0))
    fences = {one.fence for one in starts}
    return (one for one in alive if one.fence in fences and one.fence < newest[one.task_key])


def lines(rows: Sequence[object]) -> Iterator[str]:
    """Rows that should not be there."""
    return (str(row) for row in rows)


def spoiled(it: Evidence, causes: Causes) -> int:
    """How many attempts did not count."""
    counted = {one.fence for one in it.tasks if one.outcomes}
    return sum(one.fence not in counted and explanation(one, causes) is not None for one in it.attempts)


def _by_key(attempts: Sequence[Attempt]) -> dict[str, list[Attempt]]:
    found: dict[str, list[Attempt]] = {}

    for one in sorted(attempts, key=lambda a: a.attempt):
        found.setdefault(one.task_key, []).append(one)
    return found
