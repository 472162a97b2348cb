"""Who may be in this process beside whom."""

from __future__ import annotations

from controller.workflows.room import Room


def test_attempts_usually_run_beside_each_other() -> None:
    room = Room()
    assert room.enter(1, alone=False) and room.enter(2, alone=False)


def test_who_wants_to_be_alone_waits_and_keeps_newcomers_out() -> None:
    room = Room()
    assert room.enter(1, alone=False)
    assert not room.enter(2, alone=True)
    assert not room.enter(3, alone=False), "or it would wait for ever"
    room.leave(1)
    assert not room.enter(3, alone=False)
    assert room.enter(2, alone=True)
    assert not room.enter(3, alone=False) and not room.enter(4, alone=True)
    room.leave(2)
    assert not room.enter(3, alone=False), "4 waits"
    assert room.enter(4, alone=True)
    room.leave(4)
    assert room.enter(3, alone=False)


def test_who_gives_up_waiting_is_forgotten() -> None:
    room = Room()
    assert room.enter(1, alone=False) and not room.enter(2, alone=True)
    room.leave(2)
    assert room.enter(3, alone=False)
