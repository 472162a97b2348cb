"""The documentation says what the code says: settings, metrics, reasons, phases, make targets, links and the form of ADRs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.metrics import MetricWrapperBase
from pydantic.fields import FieldInfo

from controller import metrics
from controller.config import Settings
from controller.core import status
from controller.core.contract import ErrCode
from controller.core.phases import Stage, Status
from tests.support import builders

REPO = Path(__file__).parents[2]
ADRS = sorted((REPO / "docs" / "adr").glob("*.md"))
PAGES = sorted({*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md"), *(REPO / "examples").rglob("*.md")})
MAKEFILE = re.findall(r"^([a-z0-9-]+):[^#\n]*## ", (REPO / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
SOURCES = sorted(p for folder in ("controller", "devcluster", "opencode") for p in (REPO / folder).rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def prose(text: str) -> str:
    """Without fenced blocks."""
    return re.sub(r"^[ ]*```.*?^[ ]*```[^\n]*$", "", text, flags=re.DOTALL | re.MULTILINE)


def table(page: str, heading: str | None = None) -> list[list[str]]:
    """The cells of the table rows of a page, or of the section under one heading, that begin with a code span."""
    text = (REPO / page).read_text(encoding="utf-8")
    if heading is not None:
        found = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
        assert found, f"{page} has no heading {heading!r}"
        text = found[1]
    rows = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows if "`" in line_of(row)]


def line_of(row: list[str]) -> str:
    return " ".join(row)


def code(cell: str) -> str:
    """The text of a cell that is one code span."""
    return cell.strip("`")


def shown_default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed always"
    value: Any = field.default
    if value is None:
        return "none"
    if value == "":
        return "empty"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def test_configuration_lists_every_variable_with_its_default() -> None:
    listed = {code(row[0]): row[1] for row in table("docs/configuration.md", "Variables")}
    assert listed == {str(f.alias): shown_default(f) for f in Settings.model_fields.values()}


def test_metrics_lists_every_family_with_its_type_and_labels() -> None:
    listed = {code(row[0]): (row[1], row[2]) for row in table("docs/metrics.md")}
    declared = {}
    for one in vars(metrics).values():
        if isinstance(one, MetricWrapperBase):
            family = next(iter(one.describe()))
            labels = ", ".join(f"`{label}`" for label in one._labelnames) or "none"
            declared[family.name + ("_total" if family.type == "counter" else "")] = (family.type, labels)
    assert listed == declared
    assert {n.removesuffix("_total") for n in listed} == metrics.names()


def test_reasons_lists_the_closed_list() -> None:
    listed = [code(row[0]) for row in table("docs/reasons.md", "Reasons")]
    assert listed == list(status.REASONS), "the same reasons in the same order"


def test_reasons_lists_phases_and_error_codes() -> None:
    assert [code(row[0]) for row in table("docs/reasons.md", "Phases")] == [s.phase for s in Status]
    assert [code(row[0]) for row in table("docs/reasons.md", "Error codes of tasks")] == [c.value for c in ErrCode]


def test_reasons_lists_the_conditions_that_are_written() -> None:
    run = builders.run(status=Status.WAITING_INPUT, stage=Stage.APPROVE)
    approval = builders.approval(run)
    written = status.of_run(
        builders.intent(), run, approval=approval, store_id=builders.STORE, identity="no policy", now=builders.NOW
    )
    on_approval = status.of_approval(approval, run, identity="no policy", now=builders.NOW)
    found = {("Intent", c["type"]) for c in written["conditions"]}
    found |= {("PlanApproval", c["type"]) for c in on_approval["conditions"]}
    assert {(row[0], code(row[1])) for row in table("docs/reasons.md", "Conditions")} == found


def test_the_readme_lists_every_make_target() -> None:
    listed = [code(row[0]).removeprefix("make ") for row in table("README.md", "Make targets")]
    assert listed == MAKEFILE, "the same targets in the same order as in the Makefile"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_make_target_that_is_named_exists(page: Path) -> None:
    named = re.findall(r"(?:^|`|&& )make ([a-z][a-z0-9-]*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert not set(named) - set(MAKEFILE)


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def links(page: Path) -> Iterator[str]:
    yield from re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{name(page)} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{name(page)} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_name_no_folder_of_one_machine(page: Path) -> None:
    assert not re.search(r"(?<![\w.~-])/(work|root|home|tmp/\w)", page.read_text(encoding="utf-8"))


def test_pages_that_the_code_names_exist() -> None:
    named = {(name(p), page) for p in SOURCES for page in re.findall(r"docs/[\w/.-]+\.md", p.read_text("utf-8"))}
    assert not [f"{source}: {page}" for source, page in sorted(named) if not (REPO / page).exists()]


@pytest.mark.parametrize("page", ADRS, ids=name)
def test_every_adr_is_one_page_with_the_three_headings(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert headings[:3] == ["Context", "Decision", "Consequences"]
    assert text.startswith(f"# {page.name[:4]} "), "the title begins with the number"
    assert len(text.splitlines()) <= 60, "one page"


def test_adrs_are_numbered_without_gaps() -> None:
    assert [p.name[:4] for p in ADRS] == [f"{n:04d}" for n in range(1, len(ADRS) + 1)]
