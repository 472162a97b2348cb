"""Read a JUnit report into two numbers. The file comes from a sandbox, so it is parsed defensively."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from xml.etree.ElementTree import ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

MOST = 2**31 - 1  # int32 in the Intent's status: with more in it the API server refuses all of it


def added(reports: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """{tests, failures} of all of them, bounded."""
    total = {"tests": 0, "failures": 0}
    for report in reports:
        total = {key: min(MOST, value + report[key]) for key, value in total.items()}
    return total


def summary(report: bytes) -> Mapping[str, int] | None:
    """{tests, failures} of the outermost suites, which count their inner ones; None when it is not a JUnit report.

    Errors count as failures.
    """
    try:
        root = fromstring(report.decode("utf-8", "replace"))
    except (ParseError, DefusedXmlException, ValueError):
        return None
    suites = [root] if root.tag == "testsuite" else root.findall("testsuite") if root.tag == "testsuites" else []
    if not suites:
        return None
    return added(
        {"tests": _count(s.get("tests")), "failures": _count(s.get("failures")) + _count(s.get("errors"))}
        for s in suites
    )


def _count(text: str | None) -> int:
    return min(int(text), 10_000_000) if text is not None and text.isascii() and text.isdigit() and len(text) < 9 else 0
