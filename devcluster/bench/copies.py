"""More waiting Intents than can be planned in a bounded time: Intents of people, with copied rows of runs that were really planned.

Everything in Kubernetes but the Intents' spec is left to the controller: it finds a run that waits, without a recorded PlanApproval,
and makes the object and both statuses, as after a restored backup. Equal specs have equal records, so the copied digest is right.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import psycopg

from devcluster.bench.people import HELLO, IN_FLIGHT
from devcluster.errors import DevclusterError
from devcluster.stack import ROOT, Stack
from devcluster.trial.api import Api

PLAN_BYTES = 4096
LINE = "The greeting is written once, by one task, into one file, and nothing else in the workspace is touched or read ({}). "
# Each statement copies the rows of the run {template} for every (uid, name) in the temporary table `copies`.
# jsonb_populate_record takes the row as it is, but for the columns named in the object.
ROWS = {
    "app.intents": ("t.id = %(uid)s", "jsonb_build_object('id', c.uid, 'name', c.name)"),
    "app.runs": (
        "t.intent_id = %(uid)s",
        """jsonb_build_object('id', c.run_id, 'intent_id', c.uid, 'workflow_id', c.uid, 'approval_uid', null,
           'approval_name', c.name || '-' || substr(t.digest, 8, 16))""",
    ),
    "app.run_steps": ("t.run_id = %(run_id)s", "jsonb_build_object('run_id', c.run_id)"),
    "app.opencode_calls": (
        "t.run_id = %(run_id)s",
        "jsonb_build_object('run_id', c.run_id, 'op_key', t.op_key || ':' || c.name)",
    ),
    "app.artifacts": (
        "t.run_id = %(run_id)s",
        "jsonb_build_object('run_id', c.run_id, 'uri', replace(t.uri, t.run_id, c.run_id))",
    ),
    "dbos.workflow_status": ("t.workflow_uuid = %(uid)s", "jsonb_build_object('workflow_uuid', c.uid)"),
    "dbos.workflow_input": (
        "t.workflow_uuid = %(uid)s",
        "jsonb_build_object('workflow_uuid', c.uid, 'inputs', replace(t.inputs, %(uid)s, c.uid))",
    ),
    "dbos.workflow_output": ("t.workflow_uuid = %(uid)s", "jsonb_build_object('workflow_uuid', c.uid)"),
}


def four_kib_fixtures(directory: Path) -> Path:
    """A folder with one recorded turn, that of `say hello`, its design lengthened until the plan's JSON has 4 KiB."""
    directory.mkdir()
    for path in (ROOT / "opencode" / "fixtures").glob("*.json"):
        content = json.loads(path.read_text())
        plan = (content["reply"]["structured"] or {}).get("plan")
        if plan is not None and plan["goal"] == HELLO:
            while len(json.dumps(plan)) < PLAN_BYTES:
                room = PLAN_BYTES - len(json.dumps(plan))
                plan["design"].append(LINE.format(len(plan["design"]))[: max(1, room - 4)] * 2)
            (directory / path.name).write_text(json.dumps(content))
            return directory
    raise DevclusterError(f"opencode/fixtures has no recording of {HELLO!r}")


async def create(stack: Stack, namespace: str, names: Sequence[str]) -> dict[str, str]:
    """Intents by carol, 16 requests in flight; uid by name."""
    slots = asyncio.Semaphore(IN_FLIGHT)
    uids: dict[str, str] = {}
    async with Api(stack.kubeconfig("carol")) as carol:

        async def one(name: str) -> None:
            async with slots:
                made = await carol.create_intent(namespace, name, {"goal": HELLO})
            uids[name] = made["metadata"]["uid"]

        await asyncio.gather(*(one(name) for name in names))
    return uids


def copy_rows(database: str, template: str, uids: dict[str, str]) -> None:
    """The rows of the Intent `template` (a uid), for each of these Intents; one transaction."""
    with psycopg.connect(database) as c:
        found = c.execute("SELECT id FROM app.runs WHERE intent_id = %s", (template,)).fetchone()
        if found is None:
            raise DevclusterError(f"{template} has no run")
        c.execute("CREATE TEMPORARY TABLE copies (uid text, name text, run_id text) ON COMMIT DROP")
        with c.cursor() as cursor, cursor.copy("COPY copies (uid, name) FROM STDIN") as copy:
            for name, uid in uids.items():
                copy.write_row((uid, name))
        c.execute("UPDATE copies SET run_id = 'run-' || left(encode(sha256(convert_to(uid, 'UTF8')), 'hex'), 32)")
        for table, (which, changed) in ROWS.items():
            query = f"""INSERT INTO {table} SELECT n.* FROM {table} t CROSS JOIN copies c
                        CROSS JOIN LATERAL jsonb_populate_record(t, {changed}) AS n WHERE {which}"""
            c.execute(query.encode(), {"uid": template, "run_id": found[0]})
    with psycopg.connect(database, autocommit=True) as c:
        c.execute("ANALYZE")
