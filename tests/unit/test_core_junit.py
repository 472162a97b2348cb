"""JUnit reports come from sandboxes: read into two numbers, or into nothing, and never into trouble."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from controller.core.junit import summary
from controller.core.work import TaskResult
from controller.workflows.finish import _junit

LAUGHS = (
    b'<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "ha">'
    + b"".join(b'<!ENTITY %c "%s">' % (c + 1, b"&%c;" % c * 10) for c in range(ord("a"), ord("k")))
    + b']><testsuite tests="1">&k;</testsuite>'
)
EXTERNAL = b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><testsuite tests="1" name="n"><p>&e;</p></testsuite>'


@pytest.mark.parametrize(
    ("report", "tests", "failures"),
    [
        ('<testsuite tests="3" failures="1" errors="1"/>', 3, 2),
        ('<testsuites><testsuite tests="2"/><testsuite tests="3" failures="1"/></testsuites>', 5, 1),
        ('<?xml version="1.0" encoding="utf-8"?>\n<testsuites>\n<testsuite tests="1"/></testsuites>', 1, 0),
        ('<testsuite tests="lots" failures="-1" errors="1e9"/>', 0, 0),
        ('<testsuite tests="999999999999999999"/>', 0, 0),
        ("<testsuite/>", 0, 0),
        ('<testsuite tests="2"><testcase/><testcase><failure/></testcase></testsuite>', 2, 0),
    ],
)
def test_suites_are_added_up(report: str, tests: int, failures: int) -> None:
    assert summary(report.encode()) == {"tests": tests, "failures": failures}


@pytest.mark.parametrize(
    "report",
    [
        '<testsuites><testsuite tests="3" failures="1"><testsuite tests="2"/><testsuite tests="1" failures="1"/></testsuite></testsuites>',
        '<testsuite tests="3" failures="1"><testsuite tests="2"/><testsuite tests="1" failures="1"/></testsuite>',
    ],
)
def test_a_suite_that_already_counts_its_nested_suites_is_counted_once(report: str) -> None:
    assert summary(report.encode()) == {"tests": 3, "failures": 1}


# Harmless in size, so that no limit of the parser itself refuses it: a document that defines entities is not read at all.
ENTITY = b'<!DOCTYPE x [<!ENTITY a "7">]><testsuite tests="&a;"/>'


@pytest.mark.parametrize(
    "report",
    [
        b"",
        b"hello",
        b"<testsuite",
        b"<html/>",
        b"<testsuites/>",
        b"\x00\xff",
        b"\x1f\x8b\x08",
        LAUGHS,
        EXTERNAL,
        ENTITY,
    ],
    ids=["empty", "text", "cut", "html", "no suites", "binary", "gzip", "billion laughs", "external entity", "entity"],
)
def test_what_is_no_report_gives_nothing(report: bytes) -> None:
    assert summary(report) is None


def test_deep_nesting_is_no_trouble() -> None:
    assert summary(b'<testsuite tests="1">' + b"<a>" * 5000 + b"</a>" * 5000 + b"</testsuite>") is not None


@given(
    st.binary(max_size=100) | st.text(max_size=100).map(lambda t: f"<testsuite tests={t}".encode("utf-8", "replace"))
)
@hypothesis(max_examples=200, deadline=None)
def test_garbage_never_raises(report: bytes) -> None:
    found = summary(report)
    assert found is None or found.keys() == {"tests", "failures"}


def test_law_13_however_many_tests_reports_claim_the_sum_fits_the_status() -> None:
    """The API server refuses a status whose int32 is larger, and then nobody is told how the run ended."""
    suites = "<testsuite tests='9999999' failures='9999999' errors='9999999'/>" * 1000
    one = summary(f"<testsuites>{suites}</testsuites>".encode())
    assert one is not None
    results = [
        TaskResult(
            task_id="t", task_key="k", status="succeeded", err_code=None, attempt=1, exit=0, wall_ms=1, junit=one
        )
    ] * 3
    for found in (one, _junit(results)):
        assert found == {"tests": 2**31 - 1, "failures": 2**31 - 1}
