"""The stricter of request and policy wins, every default is filled in, and each refusal names its field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from controller.core.errors import InvalidIntent, Permanent
from controller.core.settings import (
    MAX_PARALLELISM,
    Policy,
    Recipe,
    Settings,
    cpu_millis,
    effective,
    memory_mb,
)
from controller.kube import spec
from controller.kube.policy import Policies
from tests.support.builders import POLICY, settings

WIDE = replace(
    POLICY,
    max_priority=10,
    egress=("None", "Public", "Allow"),
    templates=("python", "node"),
    recipes={"sandbox-default": Recipe(), "x": Recipe()},
)


def of(spec_: dict[str, Any], policy: Policy = POLICY) -> Settings:
    return effective(spec_, namespace="team", policy=policy)


def check(spec_: dict[str, Any], **changes: Any) -> Settings:
    given: dict[str, Any] = {"namespace": "team", "policy": POLICY, "allow_loopback_http": False, **changes}
    given.setdefault("private_repositories", False)
    return spec.check({"goal": "g", **spec_}, **given)


# ------------------------------------------------------------------ merging


def test_an_empty_spec_has_the_documented_defaults() -> None:
    assert of({}) == Settings(
        recipe="sandbox-default",
        partition="team/",
        priority=0,
        template="python",
        egress_mode="None",
        egress_allow=(),
        cpu_millis=1000,
        memory_mb=512,
        task_timeout_seconds=300,
        max_tasks=100,
        parallelism=10,
        timeout_seconds=7200,
        max_tokens=500_000,
        max_sandbox_minutes=60,
        required=1,
        allow_requester=True,
        expires_after_seconds=259_200,
        max_executions=3,
        policy_sha256="a" * 64,
    )


@pytest.mark.parametrize(("asked", "policy", "wins"), [(1, 2, 2), (3, 2, 3), (None, 2, 2), (2, 1, 2)])
def test_more_approvals_win_over_fewer(asked: int | None, policy: int, wins: int) -> None:
    wanted = {} if asked is None else {"approval": {"required": asked}}
    assert of(wanted, replace(POLICY, required=policy)).required == wins


def test_the_requester_cannot_let_themselves_vote() -> None:
    policy = replace(POLICY, allow_requester=False)
    assert of({"approval": {"required": 1, "allowRequester": True}}, policy).allow_requester is False


def test_a_window_is_finite() -> None:
    assert of({"limits": {"parallelism": 1000}}).parallelism == MAX_PARALLELISM


def test_the_partition_belongs_to_the_namespace() -> None:
    assert of({"queuePartitionKey": "t1"}).partition == "team/t1"


def test_settings_survive_the_way_through_the_database() -> None:
    whole = settings(egress_mode="Allow", egress_allow=("a.example", "b.example:443"))
    assert Settings.from_json(json.loads(json.dumps(whole.to_json()))) == whole


# ------------------------------------------------------------------ refusing


@pytest.mark.parametrize(
    ("wanted", "field", "said"),
    [
        ({"recipe": "mine"}, "spec.recipe", "sandbox-default"),
        ({"sandbox": {"template": "cobol"}}, "spec.sandbox.template", "python"),
        ({"sandbox": {"egress": {"mode": "Public"}}}, "spec.sandbox.egress.mode", "None"),
        ({"priority": 1}, "spec.priority", "cap of 0"),
        ({"sandbox": {"cpu": "much"}}, "spec.sandbox.cpu", "250m"),
        ({"sandbox": {"memory": "much"}}, "spec.sandbox.memory", "512Mi"),
    ],
)
def test_a_refusal_names_the_field_and_what_would_be_right(wanted: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(InvalidIntent) as refused:
        of(wanted)
    assert refused.value.field == field
    assert str(refused.value).startswith(f"{field}: ") and said in str(refused.value)


def test_what_the_policy_allows_is_not_refused() -> None:
    wanted = {"recipe": "x", "priority": 10, "sandbox": {"template": "node", "egress": {"mode": "Public"}}}
    assert of(wanted, WIDE).priority == 10


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ({"goal": ""}, "spec.goal"),
        ({"goal": "g" * 8193}, "spec.goal"),
        ({"golas": "typo"}, "spec.golas"),
        ({"inputs": {"a": "x" * 16_385}}, "spec.inputs"),
        ({"constraints": {"a": "\u20ac" * 6000}}, "spec.constraints"),
        ({"workspace": {"git": {"url": "http://127.0.0.1/x"}}}, "spec.workspace.git.url"),
        ({"workspace": {"git": {"url": "file:///etc"}}}, "spec.workspace.git.url"),
        ({"workspace": {"git": {"url": "https://u:p@host/x"}}}, "spec.workspace.git.url"),
        ({"workspace": {"git": {"url": "https://host/x", "ref": "--upload-pack=x"}}}, "spec.workspace.git.ref"),
        ({"workspace": {"git": {"url": "https://host/x", "secretRef": {"name": "s"}}}}, "spec.workspace.git.secretRef"),
        ({"limits": {"maxTasks": 0}}, "spec.limits.maxTasks"),
        ({"approval": {"required": 9}}, "spec.approval.required"),
        ({"sandbox": {"egress": {"mode": "Allow"}}}, "spec.sandbox.egress"),
        ({"retry": -1}, "spec.retry"),
    ],
)
def test_a_spec_that_cannot_be_carried_out_is_refused_by_field(wanted: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidIntent) as refused:
        check(wanted)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ({"goal": "a\0b"}, "spec.goal"),
        ({"inputs": {"log": "a\0b"}}, "spec.inputs"),
        ({"constraints": {"a\0b": 1}}, "spec.constraints"),
        ({"requestedBy": "a\0b"}, "spec.requestedBy"),
        ({"inputs": {"n": 2**53}}, "spec.inputs"),
    ],
)
def test_what_no_database_or_digest_can_carry_is_refused_before_anything_starts(
    wanted: dict[str, Any], field: str
) -> None:
    """The API server takes them; the first statement, or the first hash, would fail on them for ever."""
    with pytest.raises(InvalidIntent) as refused:
        check(wanted)
    assert refused.value.field == field


def test_a_goal_with_hidden_characters_is_refused_because_people_could_not_read_what_they_approve() -> None:
    with pytest.raises(InvalidIntent) as refused:
        check({"goal": "fix \u202eniamod"})
    assert refused.value.field == "spec.goal"


def test_http_to_loopback_is_a_development_setting() -> None:
    wanted = {"workspace": {"git": {"url": "http://127.0.0.1:8080/x"}}}
    assert check(wanted, allow_loopback_http=True).template == "python"


def private(url: str = "https://host/org/x", name: str = "forge-token") -> dict[str, Any]:
    return {"workspace": {"git": {"url": url, "secretRef": {"name": name}}}}


def test_private_repositories_are_refused_where_the_installation_does_not_have_them() -> None:
    with pytest.raises(InvalidIntent, match=r"not enabled in this installation.*WORKSPACE_SECRETS") as refused:
        check(private())
    assert refused.value.field == "spec.workspace.git.secretRef"
    assert check(private(), private_repositories=True) == check({})


@pytest.mark.parametrize(
    "url", ["https://host/a/../b", "https://host/a//b", "https://host/%2e%2e/b", "https://host/a;b"]
)
def test_urls_that_no_secret_may_go_to_are_refused_at_once(url: str) -> None:
    with pytest.raises(InvalidIntent) as refused:
        check(private(url), private_repositories=True)
    assert refused.value.field == "spec.workspace.git.url" and "credentials are not sent" in str(refused.value)
    assert check({"workspace": {"git": {"url": url}}}) == check({}), "without a Secret they are the server's business"


@pytest.mark.parametrize("name", ["../x", "a/b", "A", "a_b", "-a", "a.", "a..b", "a\n", "a%2fb", ""])
def test_what_is_no_name_of_a_secret_is_refused(name: str) -> None:
    with pytest.raises(InvalidIntent) as refused:
        check(private(name=name), private_repositories=True)
    assert refused.value.field == "spec.workspace.git.secretRef.name"


# ------------------------------------------------------------------ quantities


@pytest.mark.parametrize(("text", "value"), [("1", 1000), ("250m", 250), ("0.5", 500), ("1.5", 1500), ("999", 999_000)])
def test_cpu_quantities(text: str, value: int) -> None:
    assert cpu_millis(text) == value


@pytest.mark.parametrize("text", ["", "m", "1k", "one", "nan", "inf", "1e999", "0x1"])
def test_what_is_no_cpu_quantity_is_refused(text: str) -> None:
    with pytest.raises(InvalidIntent):
        cpu_millis(text)


@pytest.mark.parametrize(
    ("text", "value"), [("512Mi", 512), ("1Gi", 1024), ("2048Ki", 2), ("1Ki", 1), ("1000M", 953), ("1G", 953)]
)
def test_memory_quantities(text: str, value: int) -> None:
    assert memory_mb(text) == value


@pytest.mark.parametrize("text", ["", "Mi", "512", "-1Mi", "1.5Gi", "1Ti", "\u0661Mi ", "2097152Gi"])
def test_what_is_no_memory_quantity_is_refused(text: str) -> None:
    with pytest.raises(InvalidIntent):
        memory_mb(text)


def test_a_recipe_says_what_follows_a_failure_and_caps_the_limits() -> None:
    recipe = Recipe(on_failure="FailFast", max_tasks=5, parallelism=2, timeout_seconds=60, max_sandbox_minutes=3)
    policy = replace(POLICY, recipes={"small": recipe})
    capped = effective({"recipe": "small"}, namespace="team", policy=policy)
    assert capped.on_failure == "FailFast"
    assert (capped.max_tasks, capped.parallelism, capped.timeout_seconds, capped.max_sandbox_minutes) == (5, 2, 60, 3)
    less = {"recipe": "small", "limits": {"maxTasks": 4, "parallelism": 1, "timeoutSeconds": 9, "maxSandboxMinutes": 1}}
    asked = effective(less, namespace="team", policy=policy)
    assert (asked.max_tasks, asked.parallelism, asked.timeout_seconds, asked.max_sandbox_minutes) == (4, 1, 9, 1)


# ------------------------------------------------------------------ the policy file

FILE = """\
default: {required: 1, allowRequester: true, templates: [python], egress: [None], maxPriority: 0,
          recipes: [sandbox-default], maxExecutions: 3}
namespaces:
  payments: {required: 2, allowRequester: false}
"""


def policies(path: Path, text: str) -> Policies:
    file = path / "policy.yaml"
    file.write_text(text)
    return Policies(file)


def test_a_namespace_overrides_only_what_it_names(tmp_path: Path) -> None:
    found = policies(tmp_path, FILE)
    assert found.of("team").required == 1 and found.of("payments").required == 2
    assert found.of("payments").templates == ("python",) and not found.of("payments").allow_requester
    assert found.of("payments").sha256 == found.of("team").sha256


def test_another_byte_in_the_policy_file_is_another_policy(tmp_path: Path) -> None:
    assert policies(tmp_path, FILE).of("team") != policies(tmp_path, FILE + "\n").of("team")


RECIPES = "recipes: {small: {onFailure: FailFast, parallelism: 2}}\n"


def test_recipes_of_the_file_are_the_only_ones(tmp_path: Path) -> None:
    found = policies(tmp_path, RECIPES + FILE.replace("sandbox-default", "small"))
    assert found.of("team").recipes == {"small": Recipe(on_failure="FailFast", parallelism=2)}
    with pytest.raises(Permanent, match=r"default\.recipes: sandbox-default: not among `recipes:` \(small\)"):
        policies(tmp_path, RECIPES + FILE)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("recipes: {x: {onFailure: Never}}\n" + FILE, "recipes.x.onFailure"),
        ("recipes: {x: {}}\n" + FILE, "recipes.x.onFailure"),
        ("recipes: {x: 1}\n" + FILE, "recipes.x"),
        ("recipes: {x: {onFailure: RunAll, parallelism: 0}}\n" + FILE, "recipes.x.parallelism"),
        ("recipes: {x: {onFailure: RunAll, tasks: 1}}\n" + FILE, "recipes.x.tasks"),
        ("", "default.required"),
        (FILE.replace("required: 2", "required: two"), "payments.required"),
        (FILE.replace("allowRequester: false", "allowRequester: 1"), "payments.allowRequester"),
        (FILE.replace("templates: [python]", "templates: python"), "default.templates"),
        (FILE.replace("maxExecutions: 3", "x: 3"), "default.maxExecutions"),
        (FILE.replace("required: 2", "required: true"), "payments.required"),
        (FILE.replace("required: 2", "required: 0"), "payments.required"),
        (FILE.replace("required: 2", "requird: 2"), "payments.requird"),
        ("[", "POLICY_FILE"),
        ("- a list", "POLICY_FILE"),
    ],
)
def test_a_bad_policy_stops_the_start_and_names_the_field(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(Permanent, match=named):
        policies(tmp_path, text)


def test_a_missing_policy_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(Permanent, match="POLICY_FILE"):
        Policies(tmp_path / "nowhere.yaml")
