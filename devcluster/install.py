"""Puts our chart and the three people into a running cluster, rendered with real helm, applied by kubectl.

Not `helm install`: nothing schedules Pods here, and hooks would wait for Jobs that never run.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import yaml

from devcluster import build
from devcluster.cluster import ControlPlane
from devcluster.errors import DevclusterError
from devcluster.identities import NAMESPACE

HERE = Path(__file__).parent
CHART = HERE.parent / "charts" / "sisu-kodo"
RELEASE = "sisu-kodo"
FIELD_MANAGER = "sisu-kodo-devcluster"
ESTABLISH_SECONDS = 30.0


def render_chart(*, chart: Path = CHART, values: Sequence[Path] = (), sets: Sequence[str] = ()) -> str:
    """The chart's manifests as YAML. `values` are files, `sets` are `key=value`; hooks and tests are left out."""
    if not (chart / "Chart.yaml").exists():
        raise DevclusterError(f"no chart at {chart}")
    command: list[str | Path] = [build.ensure(build.HELM), "template", RELEASE, chart, "--namespace", NAMESPACE]
    # Offline, helm knows neither our server's version nor its newer kinds.
    command += ["--kube-version", build.KUBERNETES, "--include-crds", "--no-hooks", "--skip-tests"]
    command += ["--api-versions", "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy"]
    for path in values:
        command += ["--values", path]
    # Nothing schedules Pods here; a caller's own value comes later and wins.
    for one in ("controller.enabled=false", *sets):
        command += ["--set", one]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DevclusterError(f"helm template {chart} failed: {done.stderr.strip()}")
    return done.stdout


def apply_chart(
    cluster: ControlPlane, *, chart: Path = CHART, values: Sequence[Path] = (), sets: Sequence[str] = ()
) -> str:
    """Applies the chart as admin and waits until its CRDs are established. Returns what was applied.

    Admission policies take effect some seconds later still: wait for a denied dry-run, not for this.
    """
    manifests = render_chart(chart=chart, values=values, sets=sets)
    apply(cluster, manifests)
    objects = [one for one in yaml.safe_load_all(manifests) if one]
    crds = [one["metadata"]["name"] for one in objects if one["kind"] == "CustomResourceDefinition"]
    wait_established(cluster, crds)
    return manifests


def apply_people(cluster: ControlPlane) -> None:
    """Binds alice, bob and carol to the chart's roles."""
    apply(cluster, (HERE / "people.yaml").read_text())


def apply(cluster: ControlPlane, manifests: str) -> None:
    """Server-side apply as admin, under one field manager, so that repeating it is harmless."""
    cluster.kubectl(
        "apply", "--server-side", "--force-conflicts", f"--field-manager={FIELD_MANAGER}", "-f", "-", stdin=manifests
    )


def wait_established(cluster: ControlPlane, crds: Sequence[str]) -> None:
    """Waits until every named CRD is served."""
    if not crds:
        return
    deadline = time.monotonic() + ESTABLISH_SECONDS
    names = [f"crd/{name}" for name in crds]
    # `kubectl wait` gives up at once on an object without status, hence the loop.
    while (
        left := cluster.kubectl("wait", "--for=condition=Established", "--timeout=10s", *names, check=False)
    ).returncode != 0:
        if time.monotonic() > deadline:
            raise DevclusterError(f"CRDs not established after {ESTABLISH_SECONDS:.0f} s: {left.stderr.strip()}")
        time.sleep(0.1)
