"""OpenCode's supervisor (`python -m controller oc-daemon`) beside the controller, with a provider or the scripted model behind it.

The caller's environment says what is wanted: OC_MODE, and OC_MODEL_BASE_URL with OC_MODEL and OC_MODEL_API_KEY for a provider.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from devcluster.cache import Report, say
from devcluster.errors import DevclusterError
from devcluster.identities import write_private
from devcluster.processes import Child, free_ports, spawn, this_process, wait_ready
from opencode.install import CONFIG, InstallError, ensure
from opencode.scenarios import load
from opencode.scripted_model import ScriptedModel

ROOT = Path(__file__).resolve().parent.parent
MODES = ("replay", "live", "record")
RECORD = "oc-daemon.json"
LEFTOVERS = (RECORD, "oc-daemon.log")
HOME = "opencode"
START_SECONDS = 120.0
WAY = ("HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE")


@dataclass(frozen=True)
class OcDaemon:
    """A supervisor that runs. `settings` are the controller's: where the daemon is and its password."""

    child: Child
    settings: Mapping[str, str]

    def stop(self) -> None:
        """SIGTERM: it ends its daemon first."""
        self.child.stop((signal.SIGTERM, 8.0))

    def save(self, state: Path) -> None:
        """For `running`, by another process."""
        body = {"child": self.child.record(), "settings": dict(self.settings)}
        write_private(state / RECORD, json.dumps(body))


def mode(environ: Mapping[str, str]) -> str:
    """OC_MODE, replay when it is absent. Raises DevclusterError for what cannot work.

    Recordings need a folder of the caller's: the checkout's belong to `make record`.
    """
    wanted = environ.get("OC_MODE") or "replay"
    if wanted not in MODES:
        raise DevclusterError(f"OC_MODE holds {wanted!r}; it may hold: {', '.join(MODES)}")
    if wanted == "record" and not environ.get("OC_FIXTURES"):
        raise DevclusterError("OC_MODE=record needs OC_FIXTURES: a folder that gets the recorded turns")
    if wanted != "replay":
        provider(environ)
    return wanted


def fixtures(environ: Mapping[str, str]) -> dict[str, str]:
    """OC_FIXTURES, if the caller has set it."""
    folder = environ.get("OC_FIXTURES")
    return {"OC_FIXTURES": str(Path(folder).absolute())} if folder else {}


def provider(environ: Mapping[str, str]) -> dict[str, str]:
    """What the daemon needs for the provider that the caller's environment names; empty when it names none."""
    if not environ.get("OC_MODEL_BASE_URL"):
        return {}
    if not environ.get("OC_MODEL"):
        raise DevclusterError("OC_MODEL is not set: the model's name, as the provider at OC_MODEL_BASE_URL knows it")
    return {
        name: environ[name] for name in ("OC_MODEL", "OC_MODEL_BASE_URL", "OC_MODEL_API_KEY", *WAY) if name in environ
    }


@contextmanager
def model(environ: Mapping[str, str], *, report: Report = say) -> Iterator[dict[str, str]]:
    """What the daemon needs for its model: the caller's provider, else the scripted model, served here as long as this lasts."""
    found = provider(environ)
    if found:
        report(f"model: {found['OC_MODEL']} of the provider at OC_MODEL_BASE_URL")
        yield found
        return
    with ScriptedModel(load()) as scripted:
        report("model: scripted (opencode/scenarios), on loopback; OC_MODEL_BASE_URL would name a provider")
        yield scripted.environ()


@contextmanager
def beside(state: Path, environ: Mapping[str, str], *, report: Report = say) -> Iterator[dict[str, str]]:
    """The controller's OC_* settings for the mode that is wanted, with a daemon as long as this lasts if it needs one."""
    wanted = mode(environ)
    if wanted == "replay":
        yield {"OC_MODE": wanted, **fixtures(environ)}
        return
    with model(environ, report=report) as behind:
        daemon = start(state, behind=behind, detach=False)
        try:
            yield {"OC_MODE": wanted, **fixtures(environ), **daemon.settings}
        finally:
            daemon.stop()


def daemon_environ(state: Path, behind: Mapping[str, str], *, port: str, password: str) -> dict[str, str]:
    """The supervisor's settings. Raises DevclusterError when the daemon cannot be installed."""
    try:
        binary = ensure()
    except InstallError as e:
        raise DevclusterError(str(e)) from e
    return {
        "OC_BINARY": str(binary),
        "OC_CONFIG": str(CONFIG),
        "OC_STATE": str(state / HOME),
        "OC_SERVER_PORT": port,
        "OPENCODE_SERVER_PASSWORD": password,
        **behind,
    }


def controller_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The other side of daemon_environ()."""
    return {
        "OC_BASE_URL": f"http://127.0.0.1:{environ['OC_SERVER_PORT']}",
        "OPENCODE_SERVER_PASSWORD": environ["OPENCODE_SERVER_PASSWORD"],
        "OC_MODEL": environ["OC_MODEL"],
    }


def start(state: Path, *, behind: Mapping[str, str], detach: bool) -> OcDaemon:
    """Start a supervisor and wait until its daemon is healthy. `behind` is what model() or provider() gave."""
    environ = daemon_environ(state, behind, port=str(free_ports(1)[0]), password=secrets.token_hex(16))
    healthy, log = state / HOME / "healthy", state / "oc-daemon.log"
    healthy.unlink(missing_ok=True)
    child = spawn(
        "opencode",
        [sys.executable, "-m", "controller", "oc-daemon"],
        log=log,
        detach=detach,
        cwd=ROOT,
        death=signal.SIGTERM,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environ},
    )
    daemon = OcDaemon(child, controller_settings(environ))
    try:
        wait_ready(child, healthy.exists, log=log, timeout=START_SECONDS)
    except BaseException:
        daemon.stop()
        raise
    return daemon


def running(state: Path) -> OcDaemon | None:
    """The one that was saved in `state`, if it lives."""
    if not (state / RECORD).exists():
        return None
    found = json.loads((state / RECORD).read_text())
    child = Child.from_record(found["child"])
    return OcDaemon(child, found["settings"]) if child.alive() else None


def foreground(state: Path, environ: Mapping[str, str]) -> int:
    """Supervise in this process until Ctrl-C; its exit code. Meanwhile `running` finds it."""
    from controller import config, log
    from controller.oc import supervise

    if running(state) is not None:
        raise DevclusterError("a daemon runs already; `make down` ends the one of `make up`")
    with model(environ) as behind:
        password = environ.get("OPENCODE_SERVER_PASSWORD") or secrets.token_hex(16)
        port = environ.get("OC_SERVER_PORT") or "4096"
        settings = daemon_environ(state, behind, port=port, password=password)
        optional = {
            name: environ[name]
            for name in ("OC_STALL_MS", "OC_MEMORY_MB", "LOG_FORMAT", "LOG_LEVEL")
            if name in environ
        }
        try:
            loaded = config.load_daemon({**settings, **optional})
        except config.ConfigError as e:
            raise DevclusterError(str(e)) from e
        log.configure(as_json=loaded.log_format == "json", level=loaded.log_level)
        state.mkdir(parents=True, exist_ok=True)
        OcDaemon(this_process("opencode"), controller_settings(settings)).save(state)
        say(f"port {port}; `OC_MODE=live make start` finds it, and its password in {state / RECORD}")
        try:
            return supervise.run(loaded)
        finally:
            (state / RECORD).unlink(missing_ok=True)
