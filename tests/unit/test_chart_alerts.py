"""The chart's alerts: promtool runs their tests, every metric in them is one that we export, each has a runbook that people find.

promtool comes from the machine, or from Debian's package, unpacked into the cache without root. Where neither can be had, its
tests are skipped, and say so.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from controller import metrics
from controller.core.contract import ErrCode
from controller.core.phases import TERMINAL, Status
from controller.kube.watch import KINDS
from devcluster.cache import cache_dir, locked

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "sisu-kodo"
ALERTS = CHART / "files" / "alerts.yaml"
TESTS = CHART / "tests" / "alerts_test.yaml"
QUERIES = ROOT / "controller" / "db" / "queries.sql"
RUNBOOKS = ROOT / "docs" / "runbooks.md"

RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
]
each_rule = pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])


# --------------------------------------------------------------------------- promtool


@pytest.fixture(scope="session")
def promtool() -> Path:
    """Path of promtool."""
    if found := shutil.which("promtool"):
        return Path(found)
    kept = cache_dir() / "promtool" / "promtool"
    with locked(kept.with_name("lock")):
        if not kept.exists():
            _fetch(kept)
    return kept


def _fetch(kept: Path) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        pytest.skip("promtool is missing, and this is not Debian: the alerts' own tests did NOT run")
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        got = subprocess.run(
            ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", "prometheus"],
            cwd=scratch,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        packages = list(Path(scratch).glob("prometheus_*.deb"))
        if got.returncode != 0 or not packages:
            pytest.skip(
                f"promtool cannot be downloaded, the alerts' own tests did NOT run: {got.stderr.strip()[-300:]}"
            )
        subprocess.run(["dpkg-deb", "-x", packages[0], Path(scratch) / "tree"], check=True, timeout=60)
        (Path(scratch) / "tree" / "usr" / "bin" / "promtool").rename(kept)


def _run(promtool: Path, *args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([promtool, *args], capture_output=True, text=True, check=False, timeout=60)


def test_rules_are_valid(promtool: Path) -> None:
    done = _run(promtool, "check", "rules", ALERTS)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_fire_and_do_not_fire(promtool: Path) -> None:
    done = _run(promtool, "test", "rules", TESTS)
    assert done.returncode == 0, done.stdout + done.stderr


WRONG = ({"expr": "vector(1)"}, {"for": "0s"}, {"for": "1h"})  # always, too early, never


def test_an_alert_that_is_wrong_is_found(promtool: Path, tmp_path: Path) -> None:
    """The tests can fail: with any alert's expression, or its patience, changed they do."""
    mutants = [(index, wrong) for index in range(len(RULES)) for wrong in WRONG]
    files = [_mutant(tmp_path / str(number), index, wrong) for number, (index, wrong) in enumerate(mutants)]
    reports = _run(promtool, "test", "rules", *files).stdout.split("Unit Testing:")[1:]
    survived = [
        (RULES[i]["alert"], wrong) for (i, wrong), text in zip(mutants, reports, strict=True) if "SUCCESS" in text
    ]
    assert survived == []


def _mutant(folder: Path, index: int, wrong: dict[str, str]) -> Path:
    for name in ("tests", "files"):
        (folder / name).mkdir(parents=True)
    rules = [{**rule, **wrong} if i == index else rule for i, rule in enumerate(RULES)]
    (folder / "files" / ALERTS.name).write_text(yaml.safe_dump({"groups": [{"name": "sisu-kodo", "rules": rules}]}))
    return Path(shutil.copy(TESTS, folder / "tests"))


# --------------------------------------------------------------------------- what they rest on


def _metrics_in(expression: str) -> set[str]:
    return {re.sub(r"_(bucket|count|sum)$", "", name) for name in re.findall(r"sisukodo_[a-z_]+", expression)}


@each_rule
def test_every_metric_exists(rule: dict[str, Any]) -> None:
    used = _metrics_in(rule["expr"])
    exported = metrics.names() | {f"{name}_total" for name in metrics.names()}
    assert used, "an alert rests on a metric of ours"
    assert used <= exported, f"controller/metrics.py has no {used - exported}"


def _labels(name: str) -> set[str]:
    """The values of a label that the alerts name."""
    found = (values for rule in RULES for values in re.findall(rf'\b{name}=~?"([^"]+)"', rule["expr"]))
    return {value for values in found for value in values.split("|")}


def test_labels_have_values_that_exist() -> None:
    assert _labels("outcome") == {code for code in ErrCode if code.retryable}
    assert _labels("kind") < set(KINDS)
    assert _labels("status") == {"ENQUEUED"} and "'ENQUEUED'" in QUERIES.read_text()


def test_phases_are_ours_and_open() -> None:
    """A misspelt phase would never fire; one that has ended would always fire."""
    assert _labels("phase") == {
        status.phase for status in Status if status not in TERMINAL
    }  # the words of controller.roles.control


@each_rule
def test_people_can_read_it(rule: dict[str, Any]) -> None:
    assert rule["alert"].startswith("Sisukodo")
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["for"], "a single bad scrape is no alert"
    notes = rule["annotations"]
    assert set(notes) == {"summary", "description", "runbook_url"}
    assert len(notes["summary"]) <= 100 and notes["summary"].endswith(".")


@each_rule
def test_it_is_tested_both_ways(rule: dict[str, Any]) -> None:
    cases = [
        bool(case.get("exp_alerts"))
        for test in yaml.safe_load(TESTS.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["alertname"] == rule["alert"]
    ]
    assert set(cases) == {True, False}


@each_rule
def test_it_has_a_runbook(rule: dict[str, Any]) -> None:
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert (ROOT / page) == RUNBOOKS
    chapters = _chapters()
    assert rule["alert"].lower() == anchor and anchor in chapters
    for part in ("**Means.**", "**Look.**", "**Do.**"):
        assert part in chapters[anchor], f"{rule['alert']}: {part} is missing"


def test_no_runbook_without_an_alert() -> None:
    assert set(_chapters()) == {rule["alert"].lower() for rule in RULES}


def _chapters() -> dict[str, str]:
    found = re.split(r"^## (\w+)$", RUNBOOKS.read_text(), flags=re.MULTILINE)[1:]
    return {name.lower(): text for name, text in zip(found[::2], found[1::2], strict=True)}
