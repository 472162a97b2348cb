"""The main job, end to end, on a real API server with real sandboxes: `make demo`. Cleans up after itself, also on Ctrl-C.

Nothing here is part of the product: it applies, reads, votes and looks, as a person with kubectl and psql would.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import psycopg
import typer
import yaml
from rich.console import Console
from rich.syntax import Syntax

from devcluster import ocdaemon
from devcluster.errors import DevclusterError
from devcluster.gitserver import GitServer
from devcluster.stack import ROOT, Stack, scratch

T = TypeVar("T")
EXAMPLE = ROOT / "examples" / "fix-median"
NAME = "fix-median"
PROOF = (
    "SELECT task_key, COUNT(*) FROM app.sbx_runs GROUP BY task_key HAVING COUNT(*) > 1",
    "SELECT COUNT(*) FROM app.mock_receipts WHERE seen_count > 1",
    "SELECT t.task_id, t.attempt, t.outcomes, r.seen_count FROM app.sbx_runs t"
    " JOIN app.mock_receipts r ON r.receipt_key LIKE t.task_key || ':%' ORDER BY t.idx",
)
out = Console(highlight=False, soft_wrap=True)


class Demo:
    """One run of the example. A provider's model may take its time: `patience` is how many seconds nothing may change."""

    def __init__(self, stack: Stack, *, url: str, yes: bool, patience: float) -> None:
        self.stack, self.url, self.yes, self.patience = stack, url, yes, patience

    def run(self) -> None:
        """apply → plan → approve → execute → outcome."""
        self.apply()
        waiting = self.follow(lambda s: s.get("phase") == "WaitingInput")
        self.show_plan(waiting["plan"]["approvalName"])
        self.decide(waiting["plan"]["approvalName"])
        self.follow_output()
        done = self.follow(lambda s: any(c["type"] == "Finished" and c["status"] == "True" for c in s["conditions"]))
        self.outcome(done)

    def kubectl(self, *args: str, user: str = "carol", stdin: str | None = None, show: bool = True) -> str:
        """Say the command, run it, return its output."""
        if show:
            out.print(f"[bold cyan]$ kubectl {' '.join(args)}[/]  [dim]# as {user}[/]")
        return self.stack.kubectl(*args, user=user, stdin=stdin).stdout

    def apply(self) -> None:
        """As carol, who may create Intents and may not approve."""
        step("carol applies an Intent")
        intent = yaml.safe_load((EXAMPLE / "intent.yaml").read_text())
        intent["spec"]["workspace"]["git"]["url"] = self.url
        out.print(Syntax(yaml.safe_dump(intent, sort_keys=False).strip(), "yaml", background_color="default"))
        out.print(self.kubectl("apply", "-f", "-", stdin=json.dumps(intent)).strip())

    def status(self) -> dict[str, Any]:
        """The Intent's status as it is now."""
        found: dict[str, Any] = (
            json.loads(self.kubectl("get", "intent", NAME, "-o", "json", show=False)).get("status") or {}
        )
        return found

    def follow(self, enough: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Print every change of phase and step until it is enough."""
        deadline, seen = time.monotonic() + self.patience, ""
        while True:
            status = self.status()
            line = f"{status.get('phase', '…')} {status.get('lastStep', '')} {status.get('tasks', {}).get('display', '')}".strip()
            if line != seen:
                seen = line
                out.print(
                    f"[dim]{clock()}[/] {line} [dim]({status.get('reason', 'not seen by the controller yet')})[/]"
                )
            if status.get("conditions") and enough(status):
                return status
            if any(c["type"] == "Finished" and c["status"] == "True" for c in status.get("conditions", ())):
                raise DevclusterError(f"the Intent ended as {status['phase']}: {status['conditions'][-1]['message']}")
            if time.monotonic() > deadline:
                raise DevclusterError(f"nothing new within {self.patience:.0f} s; the Intent is {line}")
            time.sleep(0.1)

    def show_plan(self, approval: str) -> None:
        """What people approve: read from the PlanApproval, not from the database."""
        step("the plan and its exact patch, as the PlanApproval shows them")
        spec = json.loads(self.kubectl("get", "planapproval", approval, "-o", "json", user="alice"))["spec"]
        plan = spec["plan"]
        out.print(f"[bold]{plan['summary']}[/]\ndigest {plan['digest']}\ncommit {plan['execution']['commit']}")
        for task in plan["tasks"]:
            out.print(f"  task [bold]{task['id']}[/]: {task['command']}", markup=True)
        out.print(Syntax(plan["patch"]["diff"].rstrip(), "diff", background_color="default"))

    def decide(self, approval: str) -> None:
        """alice, who may approve, by kubectl patch."""
        step("alice decides")
        approved = self.yes or typer.confirm("Approve this plan as alice?", default=True)
        verdict = "Approve" if approved else "Reject"
        patch = json.dumps([{"op": "add", "path": "/spec/decisions/-", "value": {"verdict": verdict}}])
        out.print(self.kubectl("patch", "planapproval", approval, "--type=json", "-p", patch, user="alice").strip())
        if verdict == "Reject":
            self.follow(lambda s: s.get("phase") == "Rejected")
            out.print("[yellow]rejected: nothing was executed[/]")
            sys.exit(0)

    def follow_output(self, *, seconds: float = 120) -> None:
        """The sandboxes' output from PostgreSQL, as it comes."""
        step("the sandboxes' output, as it comes")
        deadline, seen = time.monotonic() + seconds, set[tuple[str, int, int]]()
        query = (
            "SELECT c.task_key, c.attempt, c.seq, t.task_id, c.kind, c.data FROM app.chunks c JOIN app.sbx_runs t USING (task_key)"
            " ORDER BY c.created_at, c.task_key, c.attempt, c.seq"
        )
        with psycopg.connect(self.stack.database, autocommit=True) as c:
            while time.monotonic() < deadline:
                # Asked first: what was said before the end is then certainly read.
                ended = c.execute("SELECT 1 FROM app.runs WHERE finished_at IS NOT NULL").fetchone() is not None
                for key, attempt, seq, task, kind, data in c.execute(query).fetchall():
                    if (key, attempt, seq) not in seen:
                        seen.add((key, attempt, seq))
                        self._print_chunk(task, kind, bytes(data))
                if ended:
                    return
                time.sleep(0.1)

    @staticmethod
    def _print_chunk(task: str, kind: str, data: bytes) -> None:
        for line in data.decode("utf-8", "replace").splitlines():
            out.print(f"  [dim]{task}|[/] ", end="")
            out.print(line, markup=False, style="red" if kind == "stderr" else "")

    def outcome(self, status: dict[str, Any]) -> None:
        """What stands in Kubernetes and in SQL afterwards."""
        step("the outcome")
        out.print(self.kubectl("get", "intents").rstrip())
        junit = status.get("result", {}).get("junit")
        if status["phase"] != "Succeeded" or not junit or junit["failures"]:
            raise DevclusterError(f"the Intent ended as {status['phase']} with {junit}")
        out.print(f"[green]after: {junit['tests']} tests, {junit['failures']} failures[/] (before: see above)")
        step("SQL proves one effective execution")
        with psycopg.connect(self.stack.database, autocommit=True) as c:
            for query in PROOF:
                out.print(f"[bold cyan]# {query};[/]")
                for row in c.execute(query.encode()).fetchall() or [("(no rows)",)]:
                    out.print("  " + " | ".join(map(str, row)))


_BEGAN = time.monotonic()


def clock() -> str:
    """Seconds since the demo began."""
    return f"{time.monotonic() - _BEGAN:5.1f}s"


def step(text: str) -> None:
    """A heading."""
    out.print(f"\n[bold]{clock()} ── {text}[/]")


def check_machine() -> None:
    """Raises DevclusterError with one line that names what is missing and how to install it."""
    for program, install in (("git", "apt-get install git"), ("bwrap", "apt-get install bubblewrap")):
        if shutil.which(program) is None:
            raise DevclusterError(f"{program} is missing; install it with: {install}")
    probe = [
        "bwrap",
        "--unshare-user",
        "--ro-bind",
        "/usr",
        "/usr",
        "--symlink",
        "usr/lib64",
        "/lib64",
        "--symlink",
        "usr/lib",
        "/lib",
    ]
    tried = subprocess.run([*probe, "/usr/bin/true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        raise DevclusterError(
            f"bubblewrap cannot make a sandbox here ({tried.stderr.strip()}); allow unprivileged user namespaces, or run as root"
        )


def example() -> ModuleType:
    """examples/fix-median/make_repo.py, which is a script and not a package."""
    spec = importlib.util.spec_from_file_location("make_repo", EXAMPLE / "make_repo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def before(repository: Path, scratch: Path) -> None:
    """Run the repository's own tests as they are: they must fail."""
    step("the repository as it is: its tests")
    subprocess.run(["git", "clone", "-q", str(repository), str(scratch)], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=line"],
        cwd=scratch,
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        check=False,
    )
    out.print(done.stdout.strip(), markup=False)
    if done.returncode != 1:
        raise DevclusterError(
            f"the example's tests should fail before the change; pytest's exit code was {done.returncode}: {done.stderr}"
        )


def execute(stack: Stack, *, url: str, yes: bool) -> None:
    """The demo on a stack that runs, with the OpenCode that the caller's environment asks for."""
    patience = 600.0 if ocdaemon.provider(os.environ) else 120.0
    with ocdaemon.beside(stack.state, os.environ, report=note) as settings:
        note(
            f"OpenCode: {settings['OC_MODE']}" + (f" at {settings['OC_BASE_URL']}" if "OC_BASE_URL" in settings else "")
        )
        controller = stack.controller(SBX_MODE="live", SBX_PROVIDER="local", **settings)
        try:
            note("controller ready")
            Demo(stack, url=url, yes=yes, patience=patience).run()
        finally:
            controller.stop()


def note(text: str) -> None:
    """A line with the time."""
    out.print(f"[dim]{clock()}[/] {text}")


def main() -> None:
    """Run the demo."""
    yes = os.environ.get("YES") == "1" or not sys.stdin.isatty()
    # SIGTERM cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        check_machine()
        ocdaemon.mode(os.environ)
        with scratch() as home:
            repository = home / "repositories" / "fix-median.git"
            commit = example().make(repository)
            before(repository, home / "before")
            step("a control plane, PostgreSQL and the controller, from nothing")
            with (
                GitServer(home / "repositories") as server,
                Stack(home / "stack", database_url=os.environ.get("DATABASE_URL", "")) as stack,
            ):
                out.print(f"[dim]{clock()}[/] API server {stack.cluster.server}, repository at {commit[:12]}")
                execute(stack, url=server.url("fix-median.git"), yes=yes)
        out.print(f"\n[bold green]done in {clock().strip()}; everything that was started is stopped[/]")
    except (KeyboardInterrupt, typer.Abort):  # Abort: Ctrl-C at the question
        out.print("\ninterrupted; everything that was started is stopped")
        sys.exit(130)
    except DevclusterError as e:
        out.print(f"[bold red]demo: {e}[/]")
        sys.exit(1)


if __name__ == "__main__":
    main()
