"""When the OpenCode daemon is started, restarted or refused; and what its settings let through to it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.config import ConfigError, DaemonSettings, load_daemon
from controller.oc.upkeep import Action, Bounds, Launch, Reason, Refuse, Restart, Seen, State, Wait, decide
from tests.unit.test_docs import code, shown_default, table

PIN = "1.18.33"
BOUNDS = Bounds()
NEVER = State()
STARTING = State(launched=0.0)
WELL = State(launched=0.0, healthy=10.0)
GOOD = Seen(version=PIN, rss_mb=600)
SILENT = Seen(rss_mb=600)
HEAVY = Seen(version=PIN, rss_mb=1537)


def asked(state: State, seen: Seen, now: float) -> Action:
    return decide(state, seen, now, bounds=BOUNDS, version=PIN)[1]


def test_a_wedged_daemon_is_replaced_within_30_seconds() -> None:
    assert BOUNDS.replaced == 26.0


@pytest.mark.parametrize(
    ("state", "seen", "now", "action"),
    [
        pytest.param(NEVER, Seen(), 0.0, Launch(), id="nothing runs"),
        pytest.param(State(retry_at=9.0), Seen(), 8.5, Wait(0.5), id="backoff is not over"),
        pytest.param(State(retry_at=40.0), Seen(), 8.5, Wait(1.0), id="backoff is far from over"),
        pytest.param(State(retry_at=9.0), Seen(), 9.0, Launch(), id="backoff is over"),
        pytest.param(STARTING, Seen(rss_mb=90), 3.0, Wait(0.1), id="starting"),
        pytest.param(STARTING, Seen(rss_mb=90), 119.9, Wait(0.1), id="starting on a busy machine"),
        pytest.param(STARTING, Seen(rss_mb=90), 120.0, Restart(Reason.NOT_STARTED, 1.0), id="never healthy"),
        pytest.param(STARTING, Seen(exit=1), 0.2, Restart(Reason.CRASHED, 1.0), id="ended while starting"),
        pytest.param(STARTING, GOOD, 3.0, Wait(1.0), id="healthy for the first time"),
        pytest.param(STARTING, Seen(version="1.19.0"), 3.0, Refuse("…"), id="another version"),
        pytest.param(WELL, Seen(version="1.19.0"), 11.0, Refuse("…"), id="another version, later"),
        pytest.param(WELL, Seen(exit=-9), 11.0, Restart(Reason.CRASHED, 1.0), id="killed"),
        pytest.param(WELL, Seen(exit=0, version=PIN), 11.0, Restart(Reason.CRASHED, 1.0), id="exited after answering"),
        pytest.param(WELL, GOOD, 500.0, Wait(1.0), id="healthy"),
        pytest.param(WELL, SILENT, 14.0, Wait(1.0), id="one probe unanswered"),
        pytest.param(replace(WELL, misses=2), SILENT, 24.9, Wait(1.0), id="busy"),
        pytest.param(replace(WELL, misses=2), SILENT, 25.0, Restart(Reason.WEDGED, 1.0), id="wedged"),
        pytest.param(WELL, SILENT, 99.0, Wait(1.0), id="the supervisor was held up, not the daemon"),
        pytest.param(WELL, replace(HEAVY, rss_mb=1536), 11.0, Wait(1.0), id="at the limit"),
        pytest.param(WELL, replace(HEAVY, idle=False), 11.0, Wait(1.0), id="heavy in a turn"),
        pytest.param(WELL, HEAVY, 11.0, Wait(1.0), id="heavy, and nobody knows whether in a turn"),
        pytest.param(WELL, replace(HEAVY, idle=True), 11.0, Restart(Reason.MEMORY, 1.0), id="heavy between turns"),
        pytest.param(
            replace(WELL, heavy=11.0), replace(HEAVY, idle=False), 610.9, Wait(1.0), id="heavy for 10 minutes, nearly"
        ),
        pytest.param(
            replace(WELL, heavy=11.0),
            replace(HEAVY, idle=False),
            611.0,
            Restart(Reason.MEMORY_BUSY, 1.0),
            id="heavy for 10 minutes",
        ),
    ],
)
def test_what_is_seen_decides_what_is_done(state: State, seen: Seen, now: float, action: Action) -> None:
    found = asked(state, seen, now)
    if isinstance(action, Refuse):
        assert found == Refuse("OC_BINARY is OpenCode 1.19.0, but 1.18.33 is pinned")
    else:
        assert found == action


def test_an_answer_is_remembered() -> None:
    after, _ = decide(replace(WELL, misses=2), GOOD, 20.0, bounds=BOUNDS, version=PIN)
    assert (after.healthy, after.misses, after.starting) == (20.0, 0, False)
    after, _ = decide(WELL, SILENT, 20.0, bounds=BOUNDS, version=PIN)
    assert (after.healthy, after.misses) == (10.0, 1)


def test_the_ten_minutes_are_of_one_stretch_above_the_limit() -> None:
    heavy, _ = decide(WELL, replace(HEAVY, idle=False), 20.0, bounds=BOUNDS, version=PIN)
    assert heavy.heavy == 20.0
    assert decide(heavy, replace(HEAVY, idle=False), 30.0, bounds=BOUNDS, version=PIN)[0].heavy == 20.0
    assert decide(heavy, GOOD, 30.0, bounds=BOUNDS, version=PIN)[0].heavy is None


def test_crash_after_crash_waits_longer_and_a_long_life_is_forgiven() -> None:
    state, now, delays = NEVER, 0.0, []
    for _ in range(8):
        state, action = decide(state, Seen(), now, bounds=BOUNDS, version=PIN)
        assert action == Launch()
        state, action = decide(state, Seen(exit=1), now + 0.5, bounds=BOUNDS, version=PIN)
        assert isinstance(action, Restart) and state.launched is None
        delays.append(action.seconds)
        now += 0.5 + action.seconds
    assert delays == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    lived = State(launched=now, healthy=now + 59.0, failures=8)
    assert asked(lived, Seen(exit=1), now + 59.9) == Restart(Reason.CRASHED, 30.0)
    assert asked(lived, Seen(exit=1), now + 60.0) == Restart(Reason.CRASHED, 1.0)
    hung = State(launched=now, failures=8)
    assert asked(hung, SILENT, now + 120.0) == Restart(Reason.NOT_STARTED, 30.0), "never healthy is no life"


looks = st.builds(
    Seen,
    exit=st.sampled_from([None, None, None, 0, -9]),
    version=st.sampled_from([None, PIN]),
    rss_mb=st.integers(0, 4000),
    idle=st.sampled_from([None, True, False]),
)


@given(st.lists(st.tuples(looks, st.floats(0.01, 400)), max_size=60))
def test_whatever_happens_one_daemon_runs_at_a_time_and_waits_are_bounded(story: list[tuple[Seen, float]]) -> None:
    state, now, running = NEVER, 0.0, False
    for seen, later in story:
        now += later
        state, action = decide(state, seen, now, bounds=BOUNDS, version=PIN)
        if isinstance(action, Launch):
            assert not running
            running = True
        elif isinstance(action, Restart):
            assert running and 1.0 <= action.seconds <= 30.0
            running = False
        else:
            assert isinstance(action, Wait) and 0 < action.seconds <= 1.0
        assert (state.launched is not None) == running


# ------------------------------------------------------------------ settings

SECRET = "hunter2-do-not-show"


@pytest.fixture
def good(tmp_path: Path) -> dict[str, str]:
    """A complete environment, with what must not get through."""
    (tmp_path / "opencode").touch()
    (tmp_path / "opencode.json").touch()
    (tmp_path / "opencode.version").write_text("1.18.33\n")
    return {
        "OC_BINARY": str(tmp_path / "opencode"),
        "OC_CONFIG": str(tmp_path / "opencode.json"),
        "OPENCODE_SERVER_PASSWORD": SECRET,
        "OC_MODEL": "org/model-1.5:latest",
        "OC_MODEL_BASE_URL": f"https://user:{SECRET}@models.example/v1",
        "OC_MODEL_API_KEY": SECRET,
        "DATABASE_URL": "postgresql://x",
        "PATH": "/bin",
    }


def test_only_what_is_named_reaches_the_daemon(good: dict[str, str]) -> None:
    found = load_daemon(good)
    assert found.version == "1.18.33"
    assert found.child_environ() == {
        "OC_MODEL": "org/model-1.5:latest",
        "OC_MODEL_BASE_URL": good["OC_MODEL_BASE_URL"],
        "OC_MODEL_API_KEY": SECRET,
        "OC_STALL_MS": "20000",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    proxied = {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": ".svc", "SSL_CERT_FILE": "/ca.pem"}
    more = load_daemon(good | proxied).child_environ()
    assert {name: more[name] for name in proxied} == proxied | {"NO_PROXY": "127.0.0.1,localhost,.svc"}


def test_opencode_json_reads_nothing_else(good: dict[str, str]) -> None:
    text = (Path(__file__).parents[2] / "opencode" / "opencode.json").read_text()
    read = set(re.findall(r"\{env:(\w+)\}", text))
    assert read == set(load_daemon(good).child_environ()) - {"NO_PROXY"}


@pytest.mark.parametrize("name", ["OC_BINARY", "OPENCODE_SERVER_PASSWORD", "OC_MODEL", "OC_MODEL_BASE_URL"])
def test_what_is_missing_is_named(good: dict[str, str], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is not set; it may hold: \w+"):
        load_daemon(good | {name: ""})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OC_BINARY", "/no/such/file"),
        ("OC_CONFIG", "/no/such/file"),
        ("OC_SERVER_PORT", "0"),
        ("OC_STALL_MS", "30000"),
        ("OC_STALL_MS", "20s"),
        ("OC_MEMORY_MB", "0"),
        ("OC_MODEL_BASE_URL", f"ftp://{SECRET}"),
        ("OC_MODEL_BASE_URL", f'https://{SECRET}","apiKey":"x'),
        ("OC_MODEL_API_KEY", f'{SECRET}"'),
        ("OC_MODEL_API_KEY", f"{SECRET}\\n"),
        ("OC_MODEL_API_KEY", f"{SECRET}\n"),
        ("OC_MODEL", 'a","b":"c'),
        ("OC_MODEL", "{file:/etc/passwd}"),
        ("LOG_LEVEL", "LOUD"),
    ],
)
def test_what_is_malformed_is_named_and_no_secret_is_shown(good: dict[str, str], name: str, value: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_daemon(good | {name: value})
    text = str(refused.value)
    assert text.startswith(f"{name} holds ") and "\n" not in text and SECRET not in text


def test_a_configuration_without_its_version_is_refused(good: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "opencode.version").unlink()
    with pytest.raises(ConfigError, match=r"^OC_CONFIG holds .*opencode\.version"):
        _ = load_daemon(good).version


def test_no_secret_is_in_the_repr(good: dict[str, str]) -> None:
    assert SECRET not in repr(load_daemon(good))


def test_configuration_lists_every_variable_of_the_daemon_with_its_default() -> None:
    listed = {code(row[0]): row[1] for row in table("docs/configuration.md", "Variables of the daemon")}
    assert listed == {str(f.alias): shown_default(f) for f in DaemonSettings.model_fields.values()}
