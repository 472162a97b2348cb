"""Settings: a missing or malformed variable stops the start with one line that names it, and no secret is ever shown."""

from __future__ import annotations

import pytest

from controller.config import ConfigError, Settings, load

SECRET = "hunter2-do-not-show"
GOOD = {
    "DATABASE_URL": f"postgresql://user:{SECRET}@host/db",
    "DATABASE_URL_WORKER": f"postgresql://worker:{SECRET}@host/db",
    "OPENCODE_SERVER_PASSWORD": SECRET,
    "RANDOM_SEED": "1",
    "OC_MODE": "replay",
    "SBX_MODE": "mock",
    "POLICY_FILE": "/etc/policy.yaml",
}
REQUIRED = ["DATABASE_URL", "RANDOM_SEED", "OC_MODE", "SBX_MODE", "POLICY_FILE"]


def refusal(environ: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as refused:
        load(environ)
    text = str(refused.value)
    assert "\n" not in text, "one line"
    assert SECRET not in text
    return text


def test_a_good_environment_is_read() -> None:
    found = load({**GOOD, "SBX_TOOLCHAINS": "/a.json:/b.json", "PATH": "/bin"})
    assert (found.oc_mode, found.sbx_mode, found.database_url) == ("replay", "mock", GOOD["DATABASE_URL"])
    assert [str(p) for p in found.toolchains] == ["/a.json", "/b.json"]


@pytest.mark.parametrize("name", REQUIRED)
@pytest.mark.parametrize("how", ["absent", "empty"])
def test_a_missing_variable_is_named(name: str, how: str) -> None:
    environ = {k: v for k, v in GOOD.items() if k != name} | ({name: ""} if how == "empty" else {})
    text = refusal(environ)
    assert text.startswith(f"{name} is not set; it may hold: ")


@pytest.mark.parametrize(
    ("name", "value", "may"),
    [
        ("OC_MODE", "lively", "live, record or replay"),
        ("SBX_MODE", "real", "live or mock"),
        ("SBX_PROVIDER", "docker", "e2b, kubernetes or local"),
        ("OC_SERVER_PORT", "0", "greater than or equal to 1"),
        ("ADMIN_PORT", "65536", "less than or equal to 65535"),
        ("ADMIN_PORT", "http", "integer"),
        ("LEASE_TTL_SECONDS", "0.5", "greater than or equal to 1"),
        ("LEASE_TTL_SECONDS", "soon", "number"),
        ("QUEUE_POLL_SECONDS", "0", "0.01"),
        ("INTENT_QUEUE_WORKER_CONCURRENCY", "0", "1"),
        ("SBX_QUEUE_WORKER_CONCURRENCY", "1000", "256"),
        ("RESYNC_SECONDS", "0", "1"),
        ("WORKSPACE_ALLOW_LOOPBACK_HTTP", "perhaps", "boolean"),
        ("WORKSPACE_SECRETS", "sometimes", "boolean"),
        ("LOG_FORMAT", "xml", "json"),
        ("LOG_LEVEL", "LOUD", "DEBUG"),
    ],
)
def test_a_malformed_variable_is_named_with_what_it_holds_and_may_hold(name: str, value: str, may: str) -> None:
    text = refusal({**GOOD, name: value})
    assert text.startswith(f"{name} holds {value!r}") and may in text


@pytest.mark.parametrize("name", ["LEASE_TTL_SECONDS", "QUEUE_POLL_SECONDS", "RESYNC_SECONDS"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_number_of_seconds_is_a_number(name: str, value: str) -> None:
    assert refusal({**GOOD, name: value}).startswith(name)


def test_a_value_with_line_feeds_stays_on_one_line() -> None:
    assert refusal({**GOOD, "OC_MODE": "live\nnot"}).startswith("OC_MODE")


def test_secrets_are_not_in_the_settings_repr() -> None:
    found = load(GOOD)
    assert SECRET not in repr(found) and SECRET not in str(found)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(GOOD).oc_mode = "live"  # type: ignore[misc]


def test_every_variable_has_the_name_of_an_environment_variable() -> None:
    assert all(f.alias and f.alias == f.alias.upper() for f in Settings.model_fields.values())
