"""The cache keeps the newest version that was seen, whatever the order in which versions are seen."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from controller.kube.cache import Cache


def thing(version: int, *, uid: str = "u", name: str = "n", of: str = "i", **meta: Any) -> dict[str, Any]:
    metadata = {"uid": uid, "name": name, "namespace": "ns", "resourceVersion": str(version), **meta}
    return {"metadata": metadata, "spec": {"intent": {"uid": of}}, "status": {"v": version}}


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=6))
@hypothesis(max_examples=60, deadline=None)
def test_the_newest_version_wins_in_any_order(versions: list[int]) -> None:
    cache = Cache()
    for version in versions:
        cache.saw_intent(thing(version))
        cache.saw_approval(thing(version))
    for found in (cache.intent("u"), cache.approval("ns", "n")):
        assert found is not None and found["status"]["v"] == max(versions)


def test_only_a_newer_version_is_news_and_an_echo_is_not() -> None:
    cache = Cache()
    for saw in (cache.saw_intent, cache.saw_approval):
        assert [saw(thing(version)) for version in (5, 5, 4, 6)] == [True, False, False, True]


def test_versions_are_compared_as_numbers() -> None:
    cache = Cache()
    cache.saw_intent(thing(10))
    cache.saw_intent(thing(9))
    found = cache.intent("u")
    assert found is not None and found["status"]["v"] == 10


def test_managed_fields_are_not_kept() -> None:
    cache = Cache()
    cache.saw_intent(thing(1, managedFields=[{"manager": "kubectl"}]))
    found = cache.intent("u")
    assert found is not None and "managedFields" not in found["metadata"]


def test_an_approval_made_again_under_its_name_replaces_the_old_one() -> None:
    cache = Cache()
    cache.saw_approval(thing(5, uid="old"))
    cache.saw_approval(thing(6, uid="new"))
    found = cache.approval("ns", "n")
    assert found is not None and found["metadata"]["uid"] == "new"


def test_news_of_an_approval_that_was_replaced_come_too_late() -> None:
    """resourceVersions of one kind are comparable across objects (KEP-5504), so the older one is known to be older."""
    cache = Cache()
    cache.saw_approval(thing(6, uid="new"))
    cache.saw_approval(thing(5, uid="old"))
    found = cache.approval("ns", "n")
    assert found is not None and found["metadata"]["uid"] == "new"


def test_the_end_of_an_approval_that_was_replaced_does_not_drop_its_successor() -> None:
    cache = Cache()
    cache.saw_approval(thing(6, uid="new"))
    cache.lost_approval(thing(5, uid="old"))
    assert cache.approval("ns", "n") is not None


def test_what_is_lost_is_gone() -> None:
    cache = Cache()
    cache.saw_intent(thing(1))
    cache.saw_approval(thing(1))
    cache.lost_intent("u")
    cache.lost_approval(thing(2))
    assert cache.intent("u") is None and cache.approval("ns", "n") is None and list(cache.intents()) == []
    cache.lost_intent("u")


def approval(version: int, *, decisions: list[Any], decision: str = "Pending") -> dict[str, Any]:
    spec = {"intent": {"uid": "i"}, "plan": {"digest": "d", "design": ["long"]}, "policy": {}, "decisions": decisions}
    return {**thing(version), "spec": spec, "status": {"decision": decision}}


def test_a_plan_is_kept_in_full_only_while_votes_on_it_are_to_be_judged() -> None:
    cache = Cache()
    kept = []
    for version, (decisions, decision) in enumerate(
        [([], "Pending"), (["vote"], "Pending"), (["vote"], "Approved")], 1
    ):
        cache.saw_approval(approval(version, decisions=decisions, decision=decision))
        found = cache.approval("ns", "n")
        assert found is not None
        assert (found["spec"]["plan"]["digest"], found["spec"]["decisions"]) == ("d", decisions)
        kept.append("design" in found["spec"]["plan"])
    assert kept == [False, True, False]


def test_what_was_seen_is_known() -> None:
    cache = Cache()
    assert not cache.knows("intents", thing(1)) and not cache.knows("planapprovals", thing(1))
    cache.saw_intent(thing(1))
    cache.saw_approval(thing(1))
    assert cache.knows("intents", thing(2)) and cache.knows("planapprovals", thing(2))


def test_the_answer_to_our_own_write_tells_what_somebody_else_changed() -> None:
    cache = Cache()
    cache.saw_intent(thing(1, generation=1))
    assert not cache.wrote("intents", thing(2, generation=1))
    assert cache.wrote("intents", thing(4, generation=2))
    assert cache.wrote("intents", thing(6, generation=2, annotations={"a": "b"}))
    assert not cache.wrote("intents", thing(5, generation=3)), "the watch was first, and its event was news"
