"""A turn that has not begun can be canceled, too: in the queue behind others, and while the daemon is away. No daemon here."""

from __future__ import annotations

import socket
import threading

import pytest

from controller.core.errors import Permanent
from controller.core.model import TurnRequest
from controller.oc.live import LiveAgent


def request(session: str) -> TurnRequest:
    return TurnRequest(session=session, agent="a", schema={}, prompt="p", commit="0" * 40)


@pytest.fixture
def agent() -> LiveAgent:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return LiveAgent(f"http://127.0.0.1:{port}", password="p", version="1", concurrency=1, daemon_seconds=30)


def test_a_turn_is_canceled_while_the_daemon_is_away_and_gives_its_slot_back(agent: LiveAgent) -> None:
    with pytest.raises(Permanent, match="canceled"):
        agent.turn(request("first"), canceled=lambda: True)
    assert not agent._slots.locked()


def test_a_turn_is_canceled_in_the_queue_behind_others(agent: LiveAgent) -> None:
    begun, over = threading.Event(), threading.Event()

    def canceled() -> bool:
        begun.set()
        return over.is_set()

    def hold() -> None:
        with pytest.raises(Permanent, match="canceled"):
            agent.turn(request("first"), canceled=canceled)

    holding = threading.Thread(target=hold)
    holding.start()
    assert begun.wait(5)
    with pytest.raises(Permanent, match="canceled"):
        agent.turn(request("second"), canceled=lambda: True)
    assert holding.is_alive(), "the first one holds the only slot"
    over.set()
    holding.join()
