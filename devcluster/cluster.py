"""A real control plane as three processes: etcd, kube-apiserver, kube-controller-manager; for a node, kube-scheduler too.

Everything it has lives in one state directory; ports are free ones of 127.0.0.1. Attached (tests), it ends with
the process that started it; detached (`up`), it stays until `stop` is called by whoever has the directory.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import shutil
import signal
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from devcluster import build
from devcluster.certs import NodePki, Pki, ensure_node_pki, ensure_pki
from devcluster.errors import DevclusterError
from devcluster.identities import (
    CONTROLLER_MANAGER,
    IDENTITIES,
    NAMESPACE,
    PROGRAMS,
    SCHEDULER,
    SERVICE_ACCOUNT,
    ensure_tokens,
    write_kubeconfig,
    write_private,
)
from devcluster.processes import Child, PortLost, free_ports, spawn, wait_ready

HERE = Path(__file__).parent
READY_SECONDS = 90.0
STOP_ORDER = ("kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd")
STOP_STEPS = ((signal.SIGTERM, 5.0),)
TOKEN_DURATION = "8760h"
# What an operator meets in any cluster and what costs little. Without a node no Pods run, so nothing that makes them.
CONTROLLERS = (
    "namespace-controller",
    "garbage-collector-controller",
    "serviceaccount-controller",
    "root-ca-certificate-publisher-controller",
    "clusterrole-aggregation-controller",
    "resourcequota-controller",
    "validatingadmissionpolicy-status-controller",
)
NODE_CONTROLLERS = ("node-lifecycle-controller", "taint-eviction-controller", "pod-garbage-collector-controller")


class ControlPlane:
    """One cluster in one directory. `node`: it schedules Pods, and speaks to the kubelet of `devcluster.node`."""

    def __init__(self, state: Path, *, kcp: Path | None = None, detach: bool = False, node: bool = False) -> None:
        self.state = state.absolute()
        self.logs = self.state / "logs"
        self._kcp = kcp
        self._detach = detach
        self.node = node
        self._record = self.state / "cluster.json"
        self._children: dict[str, Child] = {}
        self._port = 0
        if self._record.exists():
            self._load()

    @property
    def kcp(self) -> Path:
        """The binary; built when it is not there yet."""
        if self._kcp is None:
            self._kcp = build.ensure(build.KCP)
        return self._kcp

    @property
    def port(self) -> int:
        return self._port

    @property
    def server(self) -> str:
        return f"https://127.0.0.1:{self._port}"

    @property
    def children(self) -> dict[str, Child]:
        """By program name; ended ones too."""
        return dict(self._children)

    @property
    def running(self) -> bool:
        programs = len(STOP_ORDER) - (0 if self.node else 1)
        return len(self._children) == programs and all(child.alive() for child in self._children.values())

    def kubeconfig(self, name: str) -> Path:
        """Of `admin`, `alice`, `bob`, `carol` or `controller`."""
        return self.state / "kubeconfig" / name

    def kubeconfigs(self) -> dict[str, Path]:
        names = [*(i.name for i in IDENTITIES if i not in PROGRAMS), "controller"]
        return {name: self.kubeconfig(name) for name in names}

    def __enter__(self) -> ControlPlane:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when the API server is ready and all kubeconfigs work. Does nothing when it already runs."""
        if self.running:
            return
        self.stop()  # what is left of one that broke
        self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.logs.mkdir(exist_ok=True)
        pki = ensure_pki(self.state / "pki", now=dt.datetime.now(dt.UTC))
        tokens = ensure_tokens(self.state / "pki" / "tokens.csv")
        for attempt in range(5):
            try:
                self._launch(pki, tokens)
                break
            except PortLost:
                self.stop()
                self._port = 0
                if attempt == 4:
                    raise
            except BaseException:
                self.stop()
                raise

    def stop(self) -> None:
        """Ends the processes in order; nothing is left running. The state stays."""
        for name in STOP_ORDER:
            if name in self._children:
                self._children[name].stop(*STOP_STEPS)
        if self._children:
            self._children = {}
            self._save()

    def wipe(self) -> None:
        """Removes everything a stopped cluster has left in its directory."""
        if any(child.alive() for child in self._children.values()):
            raise DevclusterError("stop the control plane before removing its state")
        for name in ("etcd", "pki", "logs", "kubeconfig", "kubectl-cache"):
            shutil.rmtree(self.state / name, ignore_errors=True)
        self._record.unlink(missing_ok=True)

    def kubectl(
        self, *args: str | Path, identity: str = "admin", stdin: str | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Runs kubectl as somebody. Raises DevclusterError with its words unless it succeeds or `check` is off."""
        command: list[str | Path] = [self.kcp, "kubectl", "--kubeconfig", self.kubeconfig(identity)]
        # The default discovery cache is keyed by host and port, and our ports come back for other clusters.
        command += ["--cache-dir", self.state / "kubectl-cache" / identity, *args]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
        if check and done.returncode != 0:
            words = " ".join(map(str, args))
            raise DevclusterError(f"kubectl {words} as {identity} failed: {done.stderr.strip() or done.stdout.strip()}")
        return done

    def _launch(self, pki: Pki, tokens: dict[str, str]) -> None:
        client_port, peer_port, fresh_port = free_ports(3)
        # The port of the last time, so that kubeconfigs people have open stay right.
        self._port = self._port or fresh_port
        self._start_etcd(pki, client_port, peer_port)
        node = ensure_node_pki(self.state / "pki", now=dt.datetime.now(dt.UTC)) if self.node else None
        self._start_apiserver(pki, tokens["admin"], client_port, node)
        for identity in IDENTITIES:
            write_kubeconfig(
                self.kubeconfig(identity.name),
                server=self.server,
                ca=pki.ca,
                user=identity.user,
                token=tokens[identity.name],
            )
        self._start_controller_manager(pki)
        if self.node:
            self._spawn("kube-scheduler", _of_a_program(self.kubeconfig(SCHEDULER.name)))
        self._make_controller_identity(pki)

    def _start_etcd(self, pki: Pki, client_port: int, peer_port: int) -> None:
        client, peer = f"https://127.0.0.1:{client_port}", f"https://127.0.0.1:{peer_port}"
        flags = [
            f"--data-dir={self.state / 'etcd'}",
            "--unsafe-no-fsync",
            # Alone, it has nobody to wait for.
            "--heartbeat-interval=50",
            "--election-timeout=500",
            "--logger=zap",
            "--log-level=warn",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
        ]
        # With certificates: without, every local user could write past RBAC and admission, straight to the store.
        for kind in ("", "peer-"):
            flags += [f"--{kind}client-cert-auth", f"--{kind}trusted-ca-file={pki.ca}"]
            flags += [f"--{kind}cert-file={pki.etcd_cert}", f"--{kind}key-file={pki.etcd_key}"]
        child = self._spawn("etcd", flags)
        context = ssl.create_default_context(cafile=str(pki.ca))
        context.load_cert_chain(pki.etcd_cert, pki.etcd_key)
        wait_ready(child, lambda: _ok(f"{client}/health", context), log=self._log("etcd"), timeout=READY_SECONDS)

    def _start_apiserver(self, pki: Pki, token: str, etcd_port: int, node: NodePki | None) -> None:
        flags = [
            f"--etcd-servers=https://127.0.0.1:{etcd_port}",
            f"--etcd-cafile={pki.ca}",
            f"--etcd-certfile={pki.etcd_cert}",
            f"--etcd-keyfile={pki.etcd_key}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={self._port}",
            f"--tls-cert-file={pki.apiserver_cert}",
            f"--tls-private-key-file={pki.apiserver_key}",
            f"--token-auth-file={self.state / 'pki' / 'tokens.csv'}",
            f"--authorization-mode={'Node,RBAC' if node else 'RBAC'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={pki.service_account_key}",
            f"--service-account-signing-key-file={pki.service_account_key}",
            "--service-cluster-ip-range=10.0.0.0/24",
            # One server behind a loopback address: nobody needs the endpoints of `kubernetes`.
            "--endpoint-reconciler-type=none",
            "--profiling=false",
            f"--audit-policy-file={HERE / 'audit.yaml'}",
            f"--audit-log-path={self.logs / 'audit.log'}",
        ]
        if node is not None:
            flags += [
                "--enable-admission-plugins=NodeRestriction",
                "--kubelet-preferred-address-types=InternalIP",
                f"--kubelet-certificate-authority={node.ca}",
                f"--kubelet-client-certificate={node.client_cert}",
                f"--kubelet-client-key={node.client_key}",
            ]
        child = self._spawn("kube-apiserver", flags)
        context = ssl.create_default_context(cafile=str(pki.ca))
        wait_ready(
            child,
            lambda: _ok(f"{self.server}/readyz", context, token),
            log=self._log("kube-apiserver"),
            timeout=READY_SECONDS,
        )

    def _start_controller_manager(self, pki: Pki) -> None:
        controllers = (*CONTROLLERS, *(NODE_CONTROLLERS if self.node else ()))
        flags = [
            *_of_a_program(self.kubeconfig(CONTROLLER_MANAGER.name)),
            f"--root-ca-file={pki.ca}",
            f"--controllers={','.join(controllers)}",
            "--use-service-account-credentials",
        ]
        self._spawn("kube-controller-manager", flags)

    def _make_controller_identity(self, pki: Pki) -> None:
        """Namespace, ServiceAccount and a kubeconfig with a token that the API server itself issued."""
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", HERE / "system.yaml")
        done = self.kubectl("create", "token", SERVICE_ACCOUNT, "--namespace", NAMESPACE, "--duration", TOKEN_DURATION)
        write_kubeconfig(
            self.kubeconfig("controller"),
            server=self.server,
            ca=pki.ca,
            user=f"system:serviceaccount:{NAMESPACE}:{SERVICE_ACCOUNT}",
            token=done.stdout.strip(),
        )
        # The controller-manager gives each namespace its `default` account: the sign that it works.
        deadline = time.monotonic() + READY_SECONDS
        while self.kubectl("get", "serviceaccount", "default", "--namespace", NAMESPACE, check=False).returncode != 0:
            if time.monotonic() > deadline or not self._children["kube-controller-manager"].alive():
                log = self._log("kube-controller-manager")
                raise DevclusterError(f"kube-controller-manager does not do its work; see {log}")
            time.sleep(0.1)

    def _spawn(self, name: str, flags: Sequence[str]) -> Child:
        log = self._log(name)
        log.unlink(missing_ok=True)
        # No proxy of the environment between us, a node and our own loopback.
        env = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        child = spawn(name, [self.kcp, name, *flags], log=log, detach=self._detach, cwd=self.state, env=env)
        self._children[name] = child
        self._save()
        return child

    def _log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def _save(self) -> None:
        record = {
            "port": self._port,
            "node": self.node,
            "processes": [child.record() for child in self._children.values()],
        }
        write_private(self._record, json.dumps(record))

    def _load(self) -> None:
        record = json.loads(self._record.read_text())
        self._port = record["port"]
        self._children = {child["name"]: Child.from_record(child) for child in record["processes"]}
        if any(child.alive() for child in self._children.values()):
            self.node = record.get("node", False)  # as it runs, whatever was asked for now


def _of_a_program(kubeconfig: Path) -> list[str]:
    """Flags of a control loop that is alone and listens nowhere."""
    kinds = ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")
    named = [f"--{kind}={kubeconfig}" for kind in kinds]
    return [*named, "--leader-elect=false", "--secure-port=0", "--profiling=false"]


def _ok(url: str, context: ssl.SSLContext, token: str = "") -> bool:
    """Whether a GET answers 200. Our own authority is asked for, so a foreign server on the port is not ready."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    # No proxy of the environment between us and our own loopback.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(request, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False
