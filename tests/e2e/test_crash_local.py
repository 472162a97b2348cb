"""SIGKILL of the controller inside the local provider, between any two things that it does on the host.

After a restart: one effective outcome, and nothing is left of the sandbox that was there, neither files nor processes nor a cgroup.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from controller.sbx.limits import CgroupTree
from tests.e2e.product import Product
from tests.e2e.test_crash_points import assert_explained

DRAFT, BOX = r"/boxes/\.new-\w+", r"/boxes/\w+"
CGROUP = r"^/sys/fs/cgroup/.*sisu-kodo/\w+"
# point → audit event, path, which of them; how many commands have been started by then
# Jails of one task, in order: unpack the archive, apply the patch, keep what is there, the command, write what changed.
# Each opens the gate first and is recorded after its start.
POINTS = {
    "the command runs": ("open", f"{BOX}/jail.json$", 3, 1),  # without a patch to apply
    "a box has no mark": ("open", f"{DRAFT}/owner.json$", 1, 0),
    "a box has no lock": ("open", f"{DRAFT}/alive$", 1, 0),
    "a box has no name": ("os.rename", DRAFT, 1, 0),
    "a box has no cgroup": ("os.mkdir", CGROUP, 1, 0),
    "a box has half its cgroups": ("os.mkdir", CGROUP, 2, 0),
    "before the upload": ("open", f"{BOX}/gate$", 1, 0),
    "the archive is being unpacked": ("open", f"{BOX}/jail.json$", 1, 0),
    "the patch is being applied": ("open", f"{BOX}/jail.json$", 2, 0),
    "what is there is being kept": ("open", f"{BOX}/jail.json$", 3, 0),
    "between upload and command": ("open", f"{BOX}/gate$", 4, 0),
    "the command is about to start": ("open", r"\.starts$", 1, 0),
    "what changed is being written": ("open", f"{BOX}/jail.json$", 5, 1),
    "the command has ended": ("os.scandir", f"{BOX}/rw/output$", 1, 1),
    "its cgroup is being removed": ("os.rmdir", CGROUP, 1, 1),
    "half its cgroups are removed": ("os.rmdir", CGROUP, 2, 1),
    "its files are being removed": ("shutil.rmtree", f"{BOX}$", 1, 1),
    "half its files are removed": ("os.rmdir", r"^workspace$", 1, 1),
}
NEEDS_CGROUPS = {name for name, point in POINTS.items() if point[1] == CGROUP}
EVERY_COMMIT = "the command runs"


def leftovers(root: Path, names: Sequence[str]) -> list[str]:
    """What this host still has of these sandboxes: files, cgroups, and processes that have their files mounted."""
    found = [str(one) for one in (root / "boxes").iterdir() if one.name.removeprefix(".new-") in names]
    found += [str(group / name) for group in CgroupTree.find().roots for name in names if (group / name).exists()]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            mounts = (process / "mountinfo").read_text()
        except OSError:
            continue  # it has ended, or it is nobody's business
        found += [f"{process}: {name}" for name in names if name in mounts]
    return found


def gone(root: Path, names: Sequence[str]) -> None:
    deadline = time.monotonic() + 2
    while (left := leftovers(root, names)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


@pytest.mark.parametrize(
    "point", [pytest.param(p, marks=() if p == EVERY_COMMIT else (pytest.mark.slow,), id=p) for p in POINTS]
)
def test_a_kill_inside_a_sandbox_leaves_one_outcome_and_nothing_else(product: Product, point: str) -> None:
    event, pattern, nth, begun = POINTS[point]
    if point in NEEDS_CGROUPS and not CgroupTree.find().roots:
        pytest.skip("this host gives no cgroups")
    root, marker = (
        product.stack.state / f"{product.namespace}-sandboxes",
        product.stack.state / f"{product.namespace}.crashed",
    )
    program = ("-m", "tests.support.crash_at", event, pattern, str(nth), str(marker))
    crashing = product.start(program=program, SBX_MODE="live")
    product.apply("k", "wait a while" if point == EVERY_COMMIT else "say hello")
    product.wait_phase("k", "WaitingInput")
    product.vote("k")
    product.wait(lambda: not crashing.child.alive(), f"the kill when {point}")
    names = marker.read_text().split()
    assert len(names) == 1, "the kill was where it should be: one sandbox, some of it"
    assert sum(product.starts().values()) == begun

    product.start(SBX_MODE="live")
    gone(root, names)  # long before a command of five seconds would have ended by itself
    assert product.wait_phase("k", "Succeeded", "Failed", "RetriesExceeded", seconds=40)["phase"] == "Succeeded"
    assert sum(product.starts().values()) == begun + 1
    assert product.sql("SELECT attempt, state FROM app.sbx_attempts ORDER BY attempt") == [(1, "unknown"), (2, "done")]
    assert product.sql("SELECT outcomes, attempt, status FROM app.sbx_runs") == [(1, 2, "succeeded")]
    product.assert_once()
    assert_explained(product)
    gone(root, names)
