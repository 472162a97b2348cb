"""What an end-to-end test does to the product: apply as carol, vote as alice, kill the controller, ask SQL, count sandboxes."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import psycopg

from devcluster.stack import Controller, Stack

T = TypeVar("T")
APPROVE = '[{"op":"add","path":"/spec/decisions/-","value":{"verdict":"Approve"}}]'
REJECT = '[{"op":"add","path":"/spec/decisions/-","value":{"verdict":"Reject","reason":"too risky"}}]'


class Product:
    """One namespace, one database, any number of controllers one after the other."""

    def __init__(self, stack: Stack, *, name: str, title: str) -> None:
        self.stack, self.namespace, self.title = stack, name, title
        self.controllers: list[Controller] = []
        self.start_log = stack.state / f"{name}.starts"
        self.settled_log = stack.state / f"{name}.settled"

    def __enter__(self) -> Product:
        self.stack.kubectl("create", "namespace", self.namespace)
        assert self.stack.postgres is not None
        self.database = self.stack.postgres.create_database(self.namespace.replace("-", "_"))
        self.stack.migrate(self.database)
        return self

    def __exit__(self, *exc: object) -> None:
        for one in self.controllers:
            one.stop()
        # No controller holds the finalizers any more, so Intents go at once. All of them: the kind itself is deleted by some tests.
        patch = ("--type=merge", "-p", '{"metadata":{"finalizers":null}}')
        deadline = time.monotonic() + 20
        while held := [i["metadata"]["name"] for i in self.objects("intents") if i["metadata"].get("finalizers")]:
            for name in held:
                self.kubectl("patch", "intent", name, *patch, user="controller", check=False)
            assert time.monotonic() < deadline, f"{held} keep their finalizers"
        self.stack.kubectl("delete", "namespace", self.namespace, "--wait=false")

    # ------------------------------------------------------------------ the product

    def start(self, *, program: Sequence[str] = (), **settings: str) -> Controller:
        """A controller on this test's database. `SBX_MODE=live` runs bubblewrap, else the mock provider."""
        name = f"{self.namespace}-{len(self.controllers)}"
        one = self.stack.controller(
            name=name,
            program=program,
            **{
                "DATABASE_URL": self.database,
                "POD_NAME": "e2e",  # the same identity takes the leader Lease over at once
                "SBX_START_LOG": str(self.start_log),
                "SBX_ROOT": str(self.stack.state / f"{self.namespace}-sandboxes"),
                "LEASE_TTL_SECONDS": "3",
                "RESYNC_SECONDS": "20",
                **settings,
            },
        )
        self.controllers.append(one)
        return one

    def start_crashing(self, method: str, when: str, nth: int = 1) -> Controller:
        """A controller that is SIGKILLed before or after the nth call of this adapter method (tests/support/crash_main.py)."""
        marker = self.stack.state / f"{self.namespace}.crashed"
        program = ("-m", "tests.support.crash_main", method, when, str(nth), str(marker), str(self.settled_log))
        return self.start(program=program)

    # ------------------------------------------------------------------ people

    def kubectl(self, *args: str, user: str = "admin", stdin: str | None = None, check: bool = True) -> str:
        """kubectl in this test's namespace; its output."""
        return self.stack.kubectl("-n", self.namespace, *args, user=user, stdin=stdin, check=check).stdout

    def apply(self, name: str, goal: str, **spec: Any) -> str:
        """`kubectl apply` as carol; the Intent's uid."""
        body = {
            "apiVersion": "sisukodo.dev/v1alpha1",
            "kind": "Intent",
            "metadata": {"name": name},
            "spec": {"goal": goal, **spec},
        }
        self.kubectl("apply", "-f", "-", user="carol", stdin=json.dumps(body))
        return str(self.intent(name)["metadata"]["uid"])

    def patch_intent(self, name: str, spec: Mapping[str, Any], user: str = "carol") -> None:
        """A merge patch of the spec."""
        self.kubectl("patch", "intent", name, "--type=merge", "-p", json.dumps({"spec": spec}), user=user)

    def approval_of(self, name: str) -> str:
        """The PlanApproval's name."""
        return str(self.intent(name)["status"]["plan"]["approvalName"])

    def vote(self, name: str, *, user: str = "alice", patch: str = APPROVE, check: bool = True) -> Any:
        """`kubectl patch planapproval` as a person."""
        return self.stack.kubectl(
            "-n",
            self.namespace,
            "patch",
            "planapproval",
            self.approval_of(name),
            "--type=json",
            "-p",
            patch,
            user=user,
            check=check,
        )

    # ------------------------------------------------------------------ what is

    def objects(self, plural: str) -> list[dict[str, Any]]:
        """All of them in this namespace."""
        items: list[dict[str, Any]] = json.loads(self.kubectl("get", plural, "-o", "json"))["items"]
        return items

    def intent(self, name: str) -> dict[str, Any]:
        """As the API server has it."""
        found: dict[str, Any] = json.loads(self.kubectl("get", "intent", name, "-o", "json"))
        return found

    def status(self, name: str) -> dict[str, Any]:
        """Its status."""
        found: dict[str, Any] = self.intent(name).get("status") or {}
        return found

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        """One condition, or {}."""
        return next((c for c in self.status(name).get("conditions", ()) if c["type"] == kind), {})

    def wait_phase(self, name: str, *phases: str, seconds: float = 30) -> dict[str, Any]:
        """Until the Intent is in one of these phases."""
        return self.wait(
            lambda: s if (s := self.status(name)).get("phase") in phases else None, f"{name} in {phases}", seconds
        )

    def wait(self, probe: Callable[[], T | None], what: str, seconds: float = 30) -> T:
        """Poll until probe returns something true; fail with what was awaited and the controller's last lines."""
        deadline = time.monotonic() + seconds
        while True:
            found = probe()
            if found:
                return found
            if time.monotonic() > deadline:
                logs = "\n".join(c.log.read_text()[-3000:] for c in self.controllers[-1:])
                raise AssertionError(f"not within {seconds} s: {what}; last: {self.objects('intents')}\n{logs}")
            time.sleep(0.1)

    def sql(self, query: str, *params: Any) -> list[tuple[Any, ...]]:
        """All rows."""
        with psycopg.connect(self.database, autocommit=True) as c:
            return c.execute(query.encode(), params or None).fetchall()

    def rows(self) -> dict[str, int]:
        """How many rows this namespace's Intents have. A controller looks at all namespaces, so others may have some, too."""
        uids = [i["metadata"]["uid"] for i in self.objects("intents")]
        mine = "intent_id = ANY(%s)"
        return {
            "app.intents": self.sql("SELECT count(*) FROM app.intents WHERE id = ANY(%s)", uids)[0][0],
            "app.runs": self.sql(f"SELECT count(*) FROM app.runs WHERE {mine}", uids)[0][0],
            "app.opencode_calls": self.sql(
                f"SELECT count(*) FROM app.opencode_calls o JOIN app.runs r ON r.id = o.run_id WHERE {mine}", uids
            )[0][0],
            "dbos.workflow_status": self.sql(
                "SELECT count(*) FROM dbos.workflow_status WHERE split_part(workflow_uuid, ':', 1) = ANY(%s)", uids
            )[0][0],
        }

    def starts(self) -> Counter[str]:
        """How often a command of each task key was started, by the sandboxes' own count."""
        if not self.start_log.exists():
            return Counter()
        return Counter(line.split()[0] for line in self.start_log.read_text().splitlines())

    def assert_once(self) -> None:
        """The SQL that proves one effective execution."""
        assert self.sql("SELECT task_key, COUNT(*) FROM app.sbx_runs GROUP BY task_key HAVING COUNT(*) > 1") == []
        assert self.sql("SELECT seen_count, COUNT(*) FROM app.mock_receipts WHERE seen_count > 1 GROUP BY 1") == []
        assert self.sql("SELECT task_key FROM app.sbx_runs WHERE outcomes > 1") == []
        assert self.sql("SELECT id FROM app.runs WHERE closed > execution_no") == []
