"""The reconcile decision: a table of situations, and what holds in all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from controller.core import plan
from controller.core import status as projection
from controller.core.phases import TERMINAL, TRANSITIONS, Event, Stage, Status, retry_event
from controller.core.plan import World, decide
from controller.core.run import Approval, Intent, Run, TaskFailure, Tasks, Vote
from tests.support.builders import DEADLINE, NOW, STORE, approval, intent, planned_run, run, settings, vote

CAROL = "carol@corp"  # requests all Intents of these tests
DECISIONS = (plan.StartRun, plan.Consume, plan.Reject, plan.Expire, plan.Cancel, plan.Adjust, plan.Retry)
# health: generating worlds is slow on a busy machine, which says nothing about the code
quick = hypothesis(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def world(of: Intent | None = None, started: Run | None = None, /, **changes: Any) -> World:
    plain = World(
        intent=of or intent(has_finalizer=started is not None),
        run=started,
        approval=None,
        settings=settings() if started is None else None,
        problem=None,
        store_id=STORE,
        identity_problem=None,
        now=NOW,
    )
    return replace(plain, **changes)


def waiting(*votes: Vote, allow_requester: bool = True, required: int = 1, **changes: Any) -> World:
    """A run that waits for people, whose status is already written as it is before anybody voted."""
    started = planned_run(settings=settings(allow_requester=allow_requester, required=required))
    at = world(intent(has_finalizer=True), started, approval=approval(started, *votes))
    return replace(at, **changes)


def kinds(actions: tuple[plan.Action, ...]) -> list[str]:
    return [type(a).__name__ for a in actions]


def written(actions: tuple[plan.Action, ...]) -> Any:
    return next(a.status for a in actions if isinstance(a, plan.WriteStatus))


# ------------------------------------------------------------------ before a run exists


def test_a_new_intent_gets_a_finalizer_then_its_store_then_a_run() -> None:
    actions = decide(world())
    assert kinds(actions) == ["AddFinalizer", "WriteStatus", "StartRun"]
    assert written(actions)["storeId"] == STORE and written(actions)["phase"] == "Queued"
    assert "runId" not in written(actions)


def test_an_intent_with_its_status_written_is_only_started() -> None:
    queued = projection.held(intent(), reason="Queued", store_id=STORE, now=NOW)
    assert kinds(decide(world(intent(has_finalizer=True, status=queued)))) == ["StartRun"]


def test_a_suspended_intent_is_accepted_and_nothing_starts() -> None:
    actions = decide(world(intent({"suspend": True})))
    assert kinds(actions) == ["WriteStatus"]
    assert (written(actions)["phase"], written(actions)["reason"]) == ("Queued", "Suspended")


def test_an_intent_canceled_before_its_start_ends_without_a_run() -> None:
    actions = decide(world(intent({"cancel": True, "suspend": True})))
    assert kinds(actions) == ["WriteStatus"]
    assert (written(actions)["phase"], written(actions)["reason"]) == ("Canceled", "Canceled")
    finished = next(c for c in written(actions)["conditions"] if c["type"] == "Finished")
    assert finished["status"] == "True"


def test_an_invalid_spec_is_refused_with_the_words_of_the_problem() -> None:
    actions = decide(world(settings=None, problem="spec.priority: 7 is above this namespace's cap of 0"))
    assert kinds(actions) == ["WriteStatus"]
    accepted = next(c for c in written(actions)["conditions"] if c["type"] == "Accepted")
    assert accepted["status"] == "False" and "spec.priority" in accepted["message"]


# ------------------------------------------------------------------ the store


@pytest.mark.parametrize(
    ("status", "started"),
    [
        ({"storeId": "another", "phase": "Queued"}, None),
        ({"storeId": "another", "phase": "Running", "runId": "run-1"}, run(Status.RUNNING)),
        ({"storeId": STORE, "phase": "Running", "runId": "run-1"}, None),
    ],
    ids=["another store, no row", "another store, a row", "this store, but the row is gone"],
)
def test_a_past_of_another_store_stalls_until_a_person_acknowledges(
    status: dict[str, Any], started: Run | None
) -> None:
    of = intent(status=status, has_finalizer=True)
    actions = decide(world(of, started))
    assert kinds(actions) == ["WriteStatus"]
    assert written(actions)["phase"] == status["phase"] and written(actions)["reason"] == "StoreBehind"
    stalled = written(actions)["conditions"][-1]
    assert (stalled["type"], stalled["status"]) == ("Stalled", "True") and STORE in stalled["message"]
    assert decide(world(replace(of, status=written(actions)), started)) == ()

    other = decide(world(replace(of, acknowledged_store="another one"), started))
    assert kinds(other) == ["WriteStatus"], "only the id of this store is an acknowledgement"
    allowed = decide(world(replace(of, acknowledged_store=STORE), started))
    assert ("StartRun" in kinds(allowed)) == (started is None)
    assert written(allowed)["storeId"] == STORE and written(allowed)["reason"] != "StoreBehind"


def test_a_consumed_approval_is_never_consumed_again() -> None:
    """Law 10: a database restored from a backup has the same store id, and waits for what was approved and run long ago."""
    before = {"decision": "Approved", "consumedBy": {"workflowId": "u:execute:1", "at": "2026-03-04T05:06:07Z"}}
    at = waiting(vote())
    assert at.approval is not None
    consumed = replace(at, approval=replace(at.approval, status=before))
    assert "Consume" not in kinds(decide(consumed))


# ------------------------------------------------------------------ waiting for people


def test_waiting_without_a_recorded_object_creates_it() -> None:
    actions = decide(world(intent(has_finalizer=True), planned_run(approval_uid=None)))
    assert kinds(actions) == ["CreateApproval", "WriteStatus"]


def test_waiting_for_an_object_that_is_gone_creates_it_again() -> None:
    assert kinds(decide(waiting(approval=None)))[0] == "CreateApproval"


def test_another_object_under_the_approvals_name_is_adopted_by_recording_it_before_any_vote_counts() -> None:
    """The controller died between creating the object again and recording its uid."""
    at = waiting(vote())
    assert at.approval is not None
    actions = decide(replace(at, approval=replace(at.approval, uid="another")))
    assert "Consume" not in kinds(actions)
    assert kinds(actions)[0] == "CreateApproval"


@pytest.mark.parametrize(
    ("votes", "options", "counted"),
    [
        ([], {}, None),
        ([vote()], {}, ["alice@corp"]),
        ([vote(CAROL)], {}, [CAROL]),
        ([vote(CAROL)], {"allow_requester": False}, None),
        ([vote(CAROL), vote()], {"allow_requester": False}, ["alice@corp"]),
        ([vote()], {"required": 2}, None),
        ([vote(), vote()], {"required": 2}, None),
        ([vote(), vote("bob@corp")], {"required": 2}, ["alice@corp", "bob@corp"]),
        ([vote(), vote(CAROL)], {"required": 2, "allow_requester": False}, None),
    ],
    ids=[
        "no vote",
        "one",
        "the requester",
        "the requester is excluded",
        "the requester is excluded and somebody else voted",
        "one of two",
        "one person twice",
        "two of two",
        "one and the excluded requester",
    ],
)
def test_which_votes_make_a_quorum(votes: list[Vote], options: dict[str, Any], counted: list[str] | None) -> None:
    actions = decide(waiting(*votes, **options))
    consumed = next((a for a in actions if isinstance(a, plan.Consume)), None)
    assert (None if consumed is None else [v.approver for v in consumed.votes]) == counted


def test_nobody_counts_when_the_requester_is_excluded_and_unknown() -> None:
    at = waiting(vote(), allow_requester=False)
    assert at.run is not None
    assert "Consume" not in kinds(decide(replace(at, run=replace(at.run, requested_by=""))))


def test_one_rejection_wins_over_a_quorum() -> None:
    actions = decide(waiting(vote(), vote("bob@corp", "Reject", "no")))
    assert actions == (plan.Reject(votes=(vote("bob@corp", "Reject", "no"),)),)


@pytest.mark.parametrize("late", [timedelta(0), timedelta(seconds=1), timedelta(days=30)])
def test_votes_after_the_deadline_do_not_count(late: timedelta) -> None:
    for at in (waiting(vote()), waiting(vote(verdict="Reject")), waiting()):
        assert decide(replace(at, now=DEADLINE + late)) == (plan.Expire(),)


def test_a_moment_before_the_deadline_they_do() -> None:
    assert kinds(decide(waiting(vote(), now=DEADLINE - timedelta(seconds=1)))) == ["Consume"]


@pytest.mark.parametrize("verdict", ["Approve", "Reject"])
def test_on_a_tampered_approval_nothing_counts_and_people_are_told(verdict: str) -> None:
    at = waiting(vote(verdict=verdict))
    assert at.approval is not None
    actions = decide(replace(at, approval=replace(at.approval, problem="spec.plan is not what was stored")))
    assert kinds(actions) == ["WriteStatus", "WriteApprovalStatus"]
    assert written(actions)["reason"] == "ApprovalTampered"


def test_without_proven_identity_nothing_is_consumed_and_people_are_told() -> None:
    actions = decide(waiting(vote(), identity_problem="a binding is missing"))
    assert "Consume" not in kinds(actions)
    assert written(actions)["reason"] == "IdentityNotEnforced"
    assert any("a binding is missing" in c["message"] for c in written(actions)["conditions"])


# ------------------------------------------------------------------ cancel, delete, finalizer, retry


@pytest.mark.parametrize("status", sorted(set(Status) - TERMINAL - {Status.CANCELING}))
def test_cancel_stops_every_open_run_once(status: Status) -> None:
    assert decide(world(intent({"cancel": True}, has_finalizer=True), run(status))) == (plan.Cancel(reason="Canceled"),)
    canceling = decide(world(intent({"cancel": True}, has_finalizer=True), run(Status.CANCELING)))
    assert kinds(canceling) == ["WriteStatus"]


def test_cancel_comes_before_a_quorum_and_before_expiry() -> None:
    at = waiting(vote())
    canceled = replace(at, intent=intent({"cancel": True}, has_finalizer=True))
    assert kinds(decide(canceled)) == ["Cancel"]
    assert kinds(decide(replace(canceled, now=DEADLINE))) == ["Cancel"]


@pytest.mark.parametrize("status", sorted(set(Status) - TERMINAL - {Status.CANCELING}))
def test_deleting_an_intent_cancels_its_open_run_and_keeps_the_finalizer(status: Status) -> None:
    actions = decide(world(intent(has_finalizer=True, deleting=True), run(status)))
    assert actions[0] == plan.Cancel(reason="Deleted") and "RemoveFinalizer" not in kinds(actions)


@pytest.mark.parametrize("status", sorted(TERMINAL))
def test_deleting_an_intent_whose_run_has_ended_lets_it_go(status: Status) -> None:
    assert decide(world(intent(has_finalizer=True, deleting=True), run(status))) == (plan.RemoveFinalizer(),)
    assert decide(world(intent(deleting=True), run(status))) == ()


def test_deleting_an_intent_that_never_started_lets_it_go() -> None:
    assert decide(world(intent(has_finalizer=True, deleting=True))) == (plan.RemoveFinalizer(),)


def test_a_missing_finalizer_of_an_open_run_is_put_back() -> None:
    assert kinds(decide(world(intent(), run(Status.RUNNING))))[0] == "AddFinalizer"


def test_the_finalizer_goes_when_the_run_has_ended() -> None:
    assert kinds(decide(world(intent(has_finalizer=True), run(Status.SUCCEEDED, Stage.FINISH))))[-1] == (
        "RemoveFinalizer"
    )


@pytest.mark.parametrize(
    ("status", "stage", "retried"),
    [
        (Status.FAILED, Stage.PLAN, True),
        (Status.FAILED, Stage.FINISH, True),
        (Status.RETRIES_EXCEEDED, Stage.FINISH, True),
        (Status.REJECTED, Stage.APPROVE, True),
        (Status.EXPIRED, Stage.APPROVE, True),
        (Status.SUCCEEDED, Stage.FINISH, False),
        (Status.CANCELED, Stage.EXECUTE, False),
        (Status.RUNNING, Stage.EXECUTE, False),
    ],
)
def test_a_retry_reopens_what_may_be_reopened(status: Status, stage: Stage, retried: bool) -> None:
    actions = decide(world(intent({"retry": 1}, has_finalizer=True), run(status, stage)))
    assert (plan.Retry(count=1) in actions) == retried
    assert "Retry" not in kinds(
        decide(world(intent({"retry": 1}, has_finalizer=True), run(status, stage, retry_count=1)))
    )


@pytest.mark.parametrize(
    ("stage", "partition"), [(Stage.PLAN, "team/new"), (Stage.EXECUTE, "team/"), (Stage.FINISH, "team/")]
)
def test_a_changed_priority_and_until_tasks_exist_a_changed_partition_are_taken_over(
    stage: Stage, partition: str
) -> None:
    of, wanted = intent(has_finalizer=True), settings(priority=-7, partition="team/new")
    started = run(Status.RUNNING, stage)
    assert decide(world(of, started, settings=wanted)) == (plan.Adjust(partition=partition, priority=-7),)
    taken = replace(started, settings=replace(started.settings, partition=partition, priority=-7))
    assert "Adjust" not in kinds(decide(world(of, taken, settings=wanted)))
    assert "Adjust" not in kinds(decide(world(of, started, settings=None, problem="no longer allowed")))


@pytest.mark.parametrize("status", sorted(TERMINAL))
def test_nothing_is_taken_over_when_the_run_has_ended(status: Status) -> None:
    at = world(intent(has_finalizer=True), run(status, Stage.FINISH), settings=settings(priority=-7))
    assert "Adjust" not in kinds(decide(at))


def test_a_retry_waits_for_the_finalizer() -> None:
    assert kinds(decide(world(intent({"retry": 1}), run(Status.FAILED))))[0] == "AddFinalizer"


def test_a_canceled_intent_is_not_retried() -> None:
    actions = decide(world(intent({"retry": 1, "cancel": True}, has_finalizer=True), run(Status.FAILED)))
    assert "Retry" not in kinds(actions)


def test_a_status_that_says_it_all_is_not_written_again() -> None:
    at = waiting()
    first = decide(at)
    assert kinds(first) == ["WriteStatus", "WriteApprovalStatus"]
    assert decide(_apply_all(at, first)) == ()


# ------------------------------------------------------------------ what always holds


STAGES = {
    Status.QUEUED: [Stage.PLAN],
    Status.RUNNING: [Stage.PLAN, Stage.EXECUTE, Stage.FINISH],
    Status.WAITING_INPUT: [Stage.APPROVE],
    Status.CANCELING: [Stage.PLAN, Stage.EXECUTE, Stage.FINISH],
    Status.REPAIRING: [Stage.PLAN],
    Status.SUCCEEDED: [Stage.FINISH],
    Status.FAILED: [Stage.PLAN, Stage.EXECUTE, Stage.FINISH],
    Status.RETRIES_EXCEEDED: [Stage.FINISH],
    Status.CANCELED: list(Stage),
    Status.REJECTED: [Stage.APPROVE],
    Status.EXPIRED: [Stage.APPROVE],
}
votes = st.lists(
    st.builds(
        vote, st.sampled_from(["alice@corp", "bob@corp", CAROL]), st.sampled_from(["Approve", "Approve", "Reject"])
    ),
    max_size=4,
)
counts = st.builds(
    Tasks,
    total=st.integers(1, 9),
    succeeded=st.integers(0, 9),
    failed=st.integers(0, 9),
    failures=st.lists(
        st.builds(TaskFailure, task=st.just("t0"), err_code=st.just("OOM"), message=st.text()), max_size=3
    ).map(tuple),
)


@st.composite
def runs(draw: st.DrawFn) -> Run:
    status = draw(st.sampled_from(list(Status)))
    stage = draw(st.sampled_from(STAGES[status]))
    changes: dict[str, Any] = {
        "settings": settings(required=draw(st.integers(1, 2)), allow_requester=draw(st.booleans())),
        "retry_count": draw(st.integers(0, 1)),
        "execution_no": draw(st.integers(0, 3)),
        "error": draw(st.none() | st.text(max_size=20)),
    }
    if stage is Stage.PLAN:
        return run(status, stage, **changes)
    if status is Status.WAITING_INPUT and draw(st.booleans()):
        changes["approval_uid"] = None
    return planned_run(status, stage, tasks=draw(st.just(Tasks()) | counts), **changes)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    started = draw(st.none() | runs())
    spec = {
        **draw(st.sampled_from([{}, {"cancel": True}, {"suspend": True}])),
        **draw(st.sampled_from([{}, {"retry": 1}, {"retry": 2}])),
    }
    status: dict[str, Any] = draw(
        st.sampled_from([{}, {"storeId": STORE}, {"storeId": STORE, "runId": "r"}, {"storeId": "other", "runId": "r"}])
    )
    if "runId" in status:
        status = {**status, "phase": draw(st.sampled_from(Status)).phase, "observedRetry": draw(st.integers(0, 2))}
    of = intent(
        spec,
        status=status,
        has_finalizer=draw(st.booleans()),
        deleting=draw(st.booleans()),
        acknowledged_store=draw(st.sampled_from([None, STORE])),
    )
    if of.deleting:
        of = replace(of, has_finalizer=True)
    seen: Approval | None = None
    if started is not None and started.approval_uid is not None and draw(st.integers(0, 4)) > 0:
        seen = approval(started, *draw(votes), problem=draw(st.sampled_from([None, None, "tampered"])))
    refused = draw(st.booleans())
    return World(
        intent=of,
        run=started,
        approval=seen,
        settings=None if refused else settings(priority=draw(st.sampled_from([0, 0, -3])), partition="team/"),
        problem="spec.recipe: no" if refused else None,
        store_id=STORE,
        identity_problem=draw(st.sampled_from([None, None, "a policy is missing"])),
        now=draw(st.sampled_from([NOW, DEADLINE + timedelta(seconds=1)])),
    )


def _apply_all(at: World, actions: tuple[plan.Action, ...]) -> World:
    for action in actions:
        at = _apply(at, action)
    return at


def _moved(at: World, event: Event, **changes: Any) -> World:
    assert at.run is not None and at.run.status in TRANSITIONS[event].sources, f"{event} from {at.run}"
    to = TRANSITIONS[event]
    return replace(at, run=replace(at.run, status=to.target, stage=to.stage or at.run.stage, **changes))


def _canceled(at: World) -> World:
    assert at.run is not None
    idle = at.run.status in TRANSITIONS[Event.CANCEL_IDLE].sources
    return _moved(at, Event.CANCEL_IDLE if idle else Event.CANCEL_BUSY, reason="Canceled")


def _retried(at: World, count: int) -> World:
    assert at.run is not None
    event = retry_event(at.run.status, at.run.stage)
    assert event is not None
    if event is Event.RESUME and at.run.execution_no >= at.run.settings.max_executions:
        return replace(at, run=replace(at.run, retry_count=count))
    if event is Event.RESUME:
        return _moved(at, event, retry_count=count, execution_no=at.run.execution_no + 1)
    at = _moved(at, event, retry_count=count)
    assert at.run is not None
    forgotten: dict[str, Any] = dict.fromkeys(
        ("digest", "plan", "record", "approval_name", "approval_uid", "approval_deadline")
    )
    return replace(at, run=replace(at.run, **forgotten), approval=None)


def _apply(at: World, action: plan.Action) -> World:
    """What the adapters do, on values."""
    of, run_ = at.intent, at.run
    effects: dict[type, Callable[[], World]] = {
        plan.AddFinalizer: lambda: replace(at, intent=replace(of, has_finalizer=True)),
        plan.RemoveFinalizer: lambda: replace(at, intent=replace(of, has_finalizer=False)),
        plan.WriteStatus: lambda: replace(at, intent=replace(of, status=getattr(action, "status", {}))),
        plan.StartRun: lambda: _begun(at),
        plan.Consume: lambda: _moved(at, Event.APPROVE, execution_no=run_.execution_no + 1 if run_ else 0),
        plan.Reject: lambda: _moved(at, Event.REJECT, reason="Rejected"),
        plan.Expire: lambda: _moved(at, Event.EXPIRE, reason="Expired"),
        plan.Cancel: lambda: _canceled(at),
        plan.Adjust: lambda: _adjusted(at, getattr(action, "partition", ""), getattr(action, "priority", 0)),
        plan.Retry: lambda: _retried(at, getattr(action, "count", 0)),
        plan.CreateApproval: lambda: _created(at),
        plan.WriteApprovalStatus: lambda: _said(at, getattr(action, "status", {})),
    }
    return effects[type(action)]()


def _begun(at: World) -> World:
    assert at.settings is not None
    return replace(at, run=run(retry_count=at.intent.spec.get("retry", 0), settings=at.settings))


def _adjusted(at: World, partition: str, priority: int) -> World:
    assert at.run is not None and not at.run.status.terminal
    kept = partition if at.run.stage in (Stage.PLAN, Stage.APPROVE) else at.run.settings.partition
    return replace(at, run=replace(at.run, settings=replace(at.run.settings, partition=kept, priority=priority)))


def _created(at: World) -> World:
    assert at.run is not None
    recorded = replace(at.run, approval_uid="new")
    return replace(at, run=recorded, approval=approval(recorded))


def _said(at: World, status: Any) -> World:
    if at.approval is None:  # a retry in the same round has let go of it
        return at
    return replace(at, approval=replace(at.approval, status=status))


@given(worlds())
@quick
def test_applying_its_actions_leads_to_an_empty_plan(at: World) -> None:
    seen = []
    for _ in range(8):
        actions = decide(at)
        seen.append(kinds(actions))
        if not actions:
            return
        at = _apply_all(at, actions)
    raise AssertionError(f"does not settle: {seen}")


@given(worlds())
@quick
def test_at_most_one_action_decides_and_equal_worlds_decide_alike(at: World) -> None:
    actions = decide(at)
    assert sum(isinstance(a, DECISIONS) for a in actions) <= 1
    assert decide(at) == actions


@given(worlds())
@quick
def test_what_has_ended_stays_so_without_a_retry(at: World) -> None:
    if at.run is None or not at.run.status.terminal:
        return
    actions = decide(at)
    decisions = [a for a in actions if isinstance(a, (*DECISIONS, plan.CreateApproval))]
    wanted = at.intent.spec.get("retry", 0) > at.run.retry_count and not at.intent.spec.get("cancel")
    assert not decisions or (wanted and [type(a) for a in decisions] == [plan.Retry])


@given(worlds())
@quick
def test_nothing_is_consumed_without_identity_integrity_and_quorum(at: World) -> None:
    for action in decide(at):
        if isinstance(action, plan.Consume):
            assert at.run is not None and at.approval is not None
            assert at.identity_problem is None and at.approval.problem is None
            assert at.approval.uid == at.run.approval_uid
            assert at.run.status is Status.WAITING_INPUT and at.now < DEADLINE
            people = {v.approver for v in action.votes}
            assert len(people) == len(action.votes) >= at.run.settings.required
            assert at.run.settings.allow_requester or CAROL not in people
            assert all(v.verdict == "Approve" for v in at.approval.votes)


@given(worlds())
@quick
def test_the_status_carries_the_store_before_anything_starts(at: World) -> None:
    known = at.intent.status.get("storeId")
    for action in decide(at):
        if isinstance(action, plan.WriteStatus):
            known = action.status.get("storeId")
        if isinstance(action, plan.StartRun):
            assert known == STORE
