"""OpenCode: the live daemon, and recordings of it. The only package that talks to OpenCode (law 12)."""

from __future__ import annotations

from controller.oc.daemon import Daemon
from controller.oc.live import LiveAgent
from controller.oc.record import RecordingAgent
from controller.oc.replay import ReplayAgent

__all__ = ["Daemon", "LiveAgent", "RecordingAgent", "ReplayAgent"]
