"""A provider's limits over all workers, and the reaper of sandboxes that nobody waits for: real PostgreSQL, many threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from controller.core.errors import Unavailable
from controller.core.model import Owner
from controller.db.admission import PgAdmission
from controller.db.lease import PgLeaseStore
from controller.db.pool import Pool, open_pool
from controller.sbx.limits import Cgroup
from controller.sbx.mock import MockProvider
from controller.workflows.recovery import Reaper
from tests.support.builders import request

STORE = "11111111-1111-1111-1111-111111111111"


class Journal:
    """Attempts as begin_attempt leaves them."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.leases = PgLeaseStore(pool, app_version="v1")

    def begin(self, fence: int, *, executor: str = "alive") -> None:
        with self.pool.connection() as c:
            c.execute(
                "INSERT INTO app.sbx_attempts (fence, run_id, task_key, attempt, state, executor) VALUES (%s, 'r', %s, 1, 'created', %s)",
                (fence, f"key-{fence}", executor),
            )

    def end(self, fence: int) -> None:
        with self.pool.connection() as c:
            c.execute("UPDATE app.sbx_attempts SET state = 'done', ended_at = now() WHERE fence = %s", (fence,))


@pytest.fixture
def pool(database: str) -> Iterator[Pool]:
    opened = open_pool(database, size=12, name="limits")
    with opened.connection() as c:
        c.execute("TRUNCATE app.sbx_attempts, app.sandbox_buckets, app.executor_leases")
    yield opened
    opened.close()


@pytest.fixture
def journal(pool: Pool) -> Journal:
    made = Journal(pool)
    made.leases.take("alive", ttl=600)
    return made


def admission(pool: Pool, *, per_second: float = 0.0, concurrent: int = 0, provider: str = "e2b") -> PgAdmission:
    return PgAdmission(pool=pool, provider=provider, per_second=per_second, concurrent=concurrent)


def admitted(pool: Pool) -> int:
    with pool.connection() as c:
        row = c.execute("SELECT count(*) AS n FROM app.sbx_attempts WHERE admitted_by IS NOT NULL").fetchone()
    assert row is not None
    return int(row["n"])


# ------------------------------------------------------------------ limits


def test_without_limits_nothing_is_asked(journal: Journal) -> None:
    journal.begin(1)
    assert admission(journal.pool).wait(1) == 0.0
    assert admitted(journal.pool) == 0, "no statement for providers without limits"


def test_no_more_at_once_however_many_workers_ask(journal: Journal) -> None:
    """40 attempts in 10 threads want in, 7 may; as one ends, one comes in."""
    for fence in range(40):
        journal.begin(fence)
    gate = admission(journal.pool, concurrent=7)
    passed: list[int] = []

    def worker(fences: range) -> None:
        passed.extend(fence for fence in fences if gate.wait(fence) == 0)

    threads = [threading.Thread(target=worker, args=(range(n, 40, 10),)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passed) == 7 == admitted(journal.pool)
    waiting = next(fence for fence in range(40) if fence not in passed)
    assert gate.wait(waiting) > 0
    journal.end(passed[0])
    assert gate.wait(waiting) == 0


def test_an_attempt_whose_admission_was_not_heard_of_does_not_wait_for_itself(journal: Journal) -> None:
    """The answer to a statement that was committed is lost with its connection; whoever repeats it is in already."""
    journal.begin(1)
    journal.begin(2)
    gate = admission(journal.pool, concurrent=1)
    assert [gate.wait(1), gate.wait(1)] == [0, 0]
    assert gate.wait(2) > 0
    journal.end(1)
    assert gate.wait(2) == 0


def test_no_more_per_second_however_many_workers_ask(journal: Journal) -> None:
    """8 threads for 1.5 s at 20 per second: the burst of 20 and 30 more, give or take one."""
    gate, passed, until = admission(journal.pool, per_second=20), list[float](), time.monotonic() + 1.5
    lock, fences = threading.Lock(), iter(range(10_000))

    def worker() -> None:
        while time.monotonic() < until:
            with lock:
                fence = next(fences)
            journal.begin(fence)
            while (seconds := gate.wait(fence)) > 0 and time.monotonic() < until:
                assert seconds <= 0.05 + 1e-6, "no longer than until the next one is due"
                time.sleep(seconds)
            if seconds == 0:
                passed.append(time.monotonic())

    threads = [threading.Thread(target=worker) for _ in range(8)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    most = 20 + 20 * (max(passed) - began) + 1
    assert 21 <= len(passed) <= most


def test_the_sandboxes_of_a_dead_worker_do_not_count(journal: Journal) -> None:
    journal.leases.take("dies", ttl=1)
    journal.begin(1, executor="dies")
    journal.begin(2)
    gate = admission(journal.pool, concurrent=1)
    assert gate.wait(1) == 0 and gate.wait(2) > 0
    time.sleep(1.1)
    assert gate.wait(2) == 0


def test_providers_have_limits_of_their_own(journal: Journal) -> None:
    journal.begin(1)
    journal.begin(2)
    assert admission(journal.pool, concurrent=1).wait(1) == 0
    assert admission(journal.pool, concurrent=1, provider="kubernetes").wait(2) == 0


# ------------------------------------------------------------------ the reaper


class Wheel:
    """A Clock that the test turns."""

    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.at += seconds


class Yard:
    """A provider with sandboxes in it, and the reaper that looks at them."""

    def __init__(self, journal: Journal) -> None:
        self.journal, self.provider, self.clock = journal, MockProvider(), Wheel()
        self.threads: list[threading.Thread] = []
        self.seen: list[tuple[int, int]] = []
        self.reaper = Reaper(
            self.provider,
            journal.leases,
            store_id=STORE,
            clock=self.clock,
            grace=60,
            observe=lambda live, killed: self.seen.append((live, killed)),
        )

    def sandbox(self, fence: int, *, store: str = STORE) -> None:
        owner = Owner(store_id=store, run_id="r", task_key=f"key-{fence}", attempt=1, fence=fence)
        wanted = request(cmd="sleep 30", env_ref="mock:python", files_in=())
        thread = threading.Thread(
            target=self.provider.run,
            args=(wanted,),
            kwargs={"owner": owner, "files": {}, "emit": lambda chunk: None, "canceled": lambda: False},
        )
        thread.start()
        self.threads.append(thread)
        while fence not in self.fences(store):
            time.sleep(0.01)

    def fences(self, store: str = STORE) -> set[int]:
        return {owner.fence for owner in self.provider.owned(store)}

    def look(self, seconds: float = 0.0) -> None:
        self.clock.at += seconds
        self.reaper.look()
        time.sleep(0.3)  # a killed run ends within a tick


@pytest.fixture
def yard(journal: Journal) -> Iterator[Yard]:
    made = Yard(journal)
    yield made
    for store in (STORE, "another"):
        for owner in made.provider.owned(store):
            made.provider.kill(owner)
    for thread in made.threads:
        thread.join()


def test_only_orphans_of_this_store_die_and_only_after_the_grace_period(yard: Yard) -> None:
    yard.journal.begin(1)
    yard.journal.begin(2)
    yard.journal.end(2)
    yard.journal.begin(3, executor="long dead")
    for fence in (1, 2, 3, 4):  # 4: the journal knows nothing of it
        yard.sandbox(fence)
    yard.sandbox(5, store="another")
    yard.look()
    yard.look(59)
    assert yard.fences() == {1, 2, 3, 4}, "none before the grace period is over"
    yard.look(2)
    assert yard.fences() == {1} and yard.fences("another") == {5}
    assert yard.seen == [(4, 0), (4, 0), (4, 3)]


def test_one_orphan_that_cannot_be_killed_keeps_no_other_alive(yard: Yard) -> None:
    """As a claim that nobody deletes behind its finalizer, or a Pod of a node that is gone."""
    for fence in (1, 2, 3):
        yard.sandbox(fence)
    kill = yard.provider.kill

    def stuck(owner: Owner) -> int:
        if owner.fence == 1:
            raise Unavailable("it was deleted by force, and is there still")
        return kill(owner)

    yard.provider.kill = stuck  # type: ignore[method-assign]
    yard.look()
    yard.look(61)
    yard.provider.kill = kill  # type: ignore[method-assign]
    assert yard.fences() == {1}
    assert yard.seen == [(3, 0), (3, 2)], "and what lives is told"


def test_the_grace_period_begins_when_the_owner_is_gone(yard: Yard) -> None:
    yard.journal.begin(1)
    yard.sandbox(1)
    yard.look()
    yard.look(300)
    yard.journal.end(1)
    yard.look(10)
    assert yard.fences() == {1}
    yard.look(61)
    assert yard.fences() == set()


def test_a_cgroup_that_stays_busy_for_a_while_is_removed_all_the_same(tmp_path: Path) -> None:
    """As when a killed process takes a second to end; here something in it stands for that process."""
    group, member = tmp_path / "group", tmp_path / "group" / "member"
    member.mkdir(parents=True)
    threading.Timer(1.0, member.rmdir).start()
    Cgroup(directories=(group,), version=1).remove()
    assert not group.exists()
