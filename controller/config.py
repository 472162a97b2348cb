"""Settings: read once from the environment, validated, frozen. The only module that looks at the environment.

A missing or malformed value stops the start with one line: the variable, what it holds, what it may hold.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, FilePath, ValidationError


class ConfigError(Exception):
    """One line a person can act on."""


_NAME = r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"
_IMAGE = r"[a-z0-9][a-z0-9-]*=[A-Za-z0-9][A-Za-z0-9._:/-]*@sha256:[0-9a-f]{64}"
_PAIR = r"[A-Za-z0-9][A-Za-z0-9./_-]*=[A-Za-z0-9._-]*"
_TAINT = r"[A-Za-z0-9][A-Za-z0-9./_-]*(=[A-Za-z0-9._-]*)?:(NoSchedule|PreferNoSchedule|NoExecute)"


class Settings(BaseModel):
    """The names are the source documents'. Secrets are never shown."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    database_url: str = Field(
        alias="DATABASE_URL", repr=False, min_length=1, description="PostgreSQL, e.g. postgresql://user@host:5432/db"
    )
    database_url_worker: str | None = Field(
        None, alias="DATABASE_URL_WORKER", repr=False, description="the worker's own login"
    )
    random_seed: str = Field(
        alias="RANDOM_SEED", min_length=1, description="any text; the same seed gives the same retry jitter"
    )
    oc_mode: Literal["live", "record", "replay"] = Field(alias="OC_MODE", description="live, record or replay")
    oc_base_url: str | None = Field(None, alias="OC_BASE_URL", description="URL of the OpenCode daemon (live, record)")
    oc_server_port: int = Field(4096, alias="OC_SERVER_PORT", ge=1, le=65535)
    oc_server_password: str = Field("", alias="OPENCODE_SERVER_PASSWORD", repr=False)
    oc_fixtures: Path = Field(
        Path("opencode/fixtures"), alias="OC_FIXTURES", description="folder of recorded turns (replay, record)"
    )
    oc_config: Path = Field(
        Path("opencode/opencode.json"),
        alias="OC_CONFIG",
        description="the daemon's configuration; opencode.version is beside it",
    )
    oc_model: str = Field("", alias="OC_MODEL", description="name of the model behind the daemon, for recordings")
    oc_turn_seconds: float = Field(
        300.0, alias="OC_TURN_SECONDS", ge=1, le=3600, description="deadline of a whole turn"
    )
    oc_concurrency: int = Field(8, alias="OC_CONCURRENCY", ge=1, le=64, description="turns at once on one daemon")
    sbx_mode: Literal["live", "mock"] = Field(alias="SBX_MODE", description="live or mock")
    sbx_provider: Literal["e2b", "kubernetes", "local"] = Field(
        "e2b", alias="SBX_PROVIDER", description="e2b, kubernetes or local"
    )
    sbx_root: Path = Field(
        Path("/var/lib/sisu-kodo/sandboxes"), alias="SBX_ROOT", description="where local sandboxes keep their files"
    )
    sbx_toolchains: str = Field(
        "", alias="SBX_TOOLCHAINS", description="manifests of local toolchains, separated by ':'"
    )
    sbx_e2b_templates: str = Field(
        "",
        alias="SBX_E2B_TEMPLATES",
        pattern=r"^[a-z0-9][a-z0-9-]*=[A-Za-z0-9_-]+(,[a-z0-9][a-z0-9-]*=[A-Za-z0-9_-]+)*$",
        description="templates and their ids at E2B, e.g. python=abc123,base=def456 (SBX_PROVIDER=e2b)",
    )
    e2b_api_key: str = Field(
        "", alias="E2B_API_KEY", repr=False, description="the team's API key at E2B (SBX_PROVIDER=e2b)"
    )
    e2b_domain: str = Field("e2b.app", alias="E2B_DOMAIN", min_length=1, description="a host name, e.g. e2b.app")
    e2b_api_url: str | None = Field(
        None,
        alias="E2B_API_URL",
        pattern=r"^https?://\S+$",
        description="an http or https URL, e.g. https://api.e2b.app",
    )
    e2b_sandbox_url: str | None = Field(
        None, alias="E2B_SANDBOX_URL", pattern=r"^https?://\S+$", description="an http or https URL for all sandboxes"
    )
    sbx_kubernetes_templates: str = Field(
        "",
        alias="SBX_KUBERNETES_TEMPLATES",
        pattern=rf"^{_IMAGE}(,{_IMAGE})*$",
        description="templates and their images by digest, e.g. python=registry/image@sha256:… (SBX_PROVIDER=kubernetes)",
    )
    sbx_kubernetes_namespace: str = Field(
        "sisu-kodo-sandboxes",
        alias="SBX_KUBERNETES_NAMESPACE",
        pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$",
        description="where sandbox Pods are made: a namespace of their own",
    )
    sbx_kubernetes_runtime_class: str = Field("", alias="SBX_KUBERNETES_RUNTIME_CLASS", pattern=_NAME)
    sbx_kubernetes_pull_secrets: str = Field(
        "",
        alias="SBX_KUBERNETES_PULL_SECRETS",
        pattern=rf"{_NAME[:-1]}(,{_NAME[1:-1]})*$",
        description="names of Secrets in the sandboxes' namespace, separated by ','",
    )
    sbx_kubernetes_node_selector: str = Field(
        "",
        alias="SBX_KUBERNETES_NODE_SELECTOR",
        pattern=rf"^{_PAIR}(,{_PAIR})*$",
        description="labels of the nodes to use, e.g. pool=sandboxes",
    )
    sbx_kubernetes_tolerations: str = Field(
        "",
        alias="SBX_KUBERNETES_TOLERATIONS",
        pattern=rf"^{_TAINT}(,{_TAINT})*$",
        description="taints as kubectl writes them, e.g. pool=sandboxes:NoSchedule",
    )
    sbx_kubernetes_boot_seconds: float = Field(
        120.0, alias="SBX_KUBERNETES_BOOT_SECONDS", ge=5, le=3600, description="from a Pod's creation until it runs"
    )
    sbx_kubernetes_claims: bool = Field(
        False,
        alias="SBX_KUBERNETES_CLAIMS",
        description="take Pods from warm pools of agent-sandbox where one fits; true or false",
    )
    sbx_kubernetes_canary: str = Field(
        "api-server",
        alias="SBX_KUBERNETES_CANARY",
        pattern=r"^(api-server|off|([A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9a-fA-F:]+\]):[0-9]{1,5})$",
        description="what a Pod must not be able to connect to before its command begins: api-server, HOST:PORT or off",
    )
    sbx_start_log: Path | None = Field(
        None, alias="SBX_START_LOG", description="append one line per sandbox start to this file"
    )
    sbx_creates_per_second: float | None = Field(
        None,
        alias="SBX_CREATES_PER_SECOND",
        ge=0,
        le=1000,
        description="of all workers; 0 for no limit; e2b: 5, kubernetes: 10, others: 0",
    )
    sbx_max_concurrent: int | None = Field(
        None,
        alias="SBX_MAX_CONCURRENT",
        ge=0,
        le=100_000,
        description="of all workers; 0 for no limit; e2b and kubernetes: 100, others: 0",
    )
    orphan_grace_seconds: float = Field(60.0, alias="SBX_ORPHAN_GRACE_SECONDS", ge=1, le=86_400)
    workspace_root: Path = Field(
        Path("/var/lib/sisu-kodo/git"), alias="WORKSPACE_ROOT", description="cache of bare clones"
    )
    workspace_loopback_http: bool = Field(False, alias="WORKSPACE_ALLOW_LOOPBACK_HTTP", description="development only")
    workspace_secrets: bool = Field(
        False, alias="WORKSPACE_SECRETS", description="private repositories by secretRef; true or false"
    )
    https_proxy: str = Field("", alias="HTTPS_PROXY", repr=False, description="for git over https")
    no_proxy: str = Field("", alias="NO_PROXY")
    ssl_cert_file: str = Field("", alias="SSL_CERT_FILE", description="CA bundle for git over https")
    app_version: str = Field("v1", alias="DBOS__APPVERSION", min_length=1)
    admin_port: int = Field(
        3002, alias="ADMIN_PORT", ge=0, le=65535, description="health and metrics; 0 takes a free port"
    )
    admin_host: str = Field("0.0.0.0", alias="ADMIN_HOST")  # a pod's probes and scrapes come from outside its loopback
    admin_port_file: Path | None = Field(
        None, alias="ADMIN_PORT_FILE", description="where to write the port that was taken"
    )
    policy_file: Path = Field(alias="POLICY_FILE", description="the namespace policy of the release (policy.yaml)")
    kubeconfig: Path | None = Field(
        None, alias="KUBECONFIG", description="outside a cluster; in one, the service account is used"
    )
    namespace: str = Field("sisu-kodo-system", alias="POD_NAMESPACE", description="the release's own namespace")
    service_account: str = Field("sisu-kodo-controller", alias="SERVICE_ACCOUNT")
    pod_name: str = Field("controller", alias="POD_NAME", min_length=1)
    lease_ttl_seconds: float = Field(15.0, alias="LEASE_TTL_SECONDS", ge=1, le=300)
    poll_seconds: float = Field(0.05, alias="QUEUE_POLL_SECONDS", ge=0.01, le=60)
    intent_concurrency: int = Field(16, alias="INTENT_QUEUE_WORKER_CONCURRENCY", ge=1, le=256)
    sbx_concurrency: int = Field(32, alias="SBX_QUEUE_WORKER_CONCURRENCY", ge=1, le=256)
    resync_seconds: float = Field(300.0, alias="RESYNC_SECONDS", ge=1)
    log_format: Literal["json", "text"] = Field("text", alias="LOG_FORMAT")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", alias="LOG_LEVEL")

    @property
    def oc_version(self) -> str:
        """The pinned version of OpenCode. Raises ConfigError when the file beside OC_CONFIG is missing."""
        return _pinned(self.oc_config)

    @property
    def git_environ(self) -> dict[str, str]:
        """What git's transport needs from outside."""
        found = {"HTTPS_PROXY": self.https_proxy, "NO_PROXY": self.no_proxy, "GIT_SSL_CAINFO": self.ssl_cert_file}
        return {name: value for name, value in found.items() if value}

    @property
    def toolchains(self) -> tuple[Path, ...]:
        """SBX_TOOLCHAINS as paths."""
        return tuple(Path(one) for one in self.sbx_toolchains.split(":") if one)

    @property
    def e2b_templates(self) -> dict[str, str]:
        """SBX_E2B_TEMPLATES as our name → E2B's template id."""
        return _pairs(self.sbx_e2b_templates)

    @property
    def kubernetes_templates(self) -> dict[str, str]:
        """SBX_KUBERNETES_TEMPLATES as our name → image by digest."""
        return _pairs(self.sbx_kubernetes_templates)

    @property
    def kubernetes_node_selector(self) -> dict[str, str]:
        """SBX_KUBERNETES_NODE_SELECTOR as a Pod has it."""
        return _pairs(self.sbx_kubernetes_node_selector)

    @property
    def kubernetes_tolerations(self) -> tuple[dict[str, str], ...]:
        """SBX_KUBERNETES_TOLERATIONS as a Pod has them."""
        return tuple(_toleration(one) for one in self.sbx_kubernetes_tolerations.split(",") if one)


# opencode.json takes these values in as they are, and looks for {env:…} and {file:…} in the result.
_PLAIN = r'^[^"\\\s{}\x00-\x1f\x7f]*$'


class DaemonSettings(BaseModel):
    """What `python -m controller oc-daemon` reads. Only child_environ() reaches the daemon itself."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    binary: FilePath = Field(alias="OC_BINARY", description="the pinned daemon's executable (opencode/install.py)")
    config: FilePath = Field(
        Path("opencode/opencode.json"),
        alias="OC_CONFIG",
        description="the daemon's configuration; opencode.version is beside it",
    )
    state: Path = Field(
        Path("/var/lib/sisu-kodo/opencode"), alias="OC_STATE", description="a private folder; emptied at each start"
    )
    port: int = Field(4096, alias="OC_SERVER_PORT", ge=1, le=65535)
    password: str = Field(
        alias="OPENCODE_SERVER_PASSWORD", repr=False, min_length=1, description="what the worker's HTTP calls carry"
    )
    model: str = Field(
        alias="OC_MODEL", min_length=1, pattern=_PLAIN, description="the model's name, as the provider knows it"
    )
    model_base_url: str = Field(
        alias="OC_MODEL_BASE_URL",
        repr=False,
        pattern=r"^https?://" + _PLAIN[1:],
        description="an OpenAI-compatible endpoint, e.g. https://models.example/v1",
    )
    model_api_key: str = Field(
        "", alias="OC_MODEL_API_KEY", repr=False, pattern=_PLAIN, description="the provider's key"
    )
    stall_ms: int = Field(
        20_000, alias="OC_STALL_MS", ge=100, lt=30_000, description="silence of the model that counts as a stall"
    )
    memory_mb: int = Field(1536, alias="OC_MEMORY_MB", ge=64, description="restart between turns above it")
    https_proxy: str = Field("", alias="HTTPS_PROXY", repr=False, description="on the way to the provider")
    no_proxy: str = Field("", alias="NO_PROXY")
    ssl_cert_file: str = Field("", alias="SSL_CERT_FILE", description="CA bundle for the provider")
    log_format: Literal["json", "text"] = Field("text", alias="LOG_FORMAT")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", alias="LOG_LEVEL")

    @property
    def version(self) -> str:
        """The pinned version of OpenCode. Raises ConfigError when the file beside OC_CONFIG is missing."""
        return _pinned(self.config)

    def child_environ(self) -> dict[str, str]:
        """What opencode.json reads by {env:…}, and what its way to the provider needs."""
        found = {
            "OC_MODEL": self.model,
            "OC_MODEL_BASE_URL": self.model_base_url,
            "OC_MODEL_API_KEY": self.model_api_key,
            "OC_STALL_MS": str(self.stall_ms),
            "HTTPS_PROXY": self.https_proxy,
            # What it must not do goes to loopback, where nobody answers: by a proxy it would wait.
            "NO_PROXY": ",".join(("127.0.0.1", "localhost", *filter(None, [self.no_proxy]))),
            "SSL_CERT_FILE": self.ssl_cert_file,
        }
        return {name: value for name, value in found.items() if value or name == "OC_MODEL_API_KEY"}


def load(environ: Mapping[str, str] | None = None) -> Settings:
    """Read and validate. Raises ConfigError with one line that names the first bad variable."""
    return _load(Settings, environ)


def load_daemon(environ: Mapping[str, str] | None = None) -> DaemonSettings:
    """The same for the daemon's supervisor."""
    return _load(DaemonSettings, environ)


M = TypeVar("M", bound=BaseModel)


def _load(model: type[M], environ: Mapping[str, str] | None) -> M:
    values = {k: v for k, v in (os.environ if environ is None else environ).items() if v != ""}
    try:
        return model.model_validate(values)
    except ValidationError as e:
        first = e.errors()[0]
        name = str(first["loc"][0])
        field = next((f for f in model.model_fields.values() if f.alias == name), None)
        may = f"; it may hold: {field.description}" if field is not None and field.description else ""
        held = "is not set" if first["type"] == "missing" else f"holds {_shown(name, values)}: {first['msg']}"
        raise ConfigError(f"{name} {held}{may}") from None


def _pairs(text: str) -> dict[str, str]:
    """`a=b,c=d`; a value may hold more `=`."""
    pairs = (one.split("=", 1) for one in text.split(",") if one)
    return {name: value for name, value in pairs}


def _toleration(taint: str) -> dict[str, str]:
    name, effect = taint.rsplit(":", 1)
    key, given, value = name.partition("=")
    found = {"operator": "Equal", "value": value} if given else {"operator": "Exists"}
    return {"key": key, **found, "effect": effect}


def _pinned(config: Path) -> str:
    path = config.with_name("opencode.version")
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError as e:
        raise ConfigError(f"OC_CONFIG holds {str(config)!r}: {path} cannot be read: {e.strerror}") from e


def _shown(name: str, values: Mapping[str, str]) -> str:
    secret = any(word in name for word in ("URL", "PASSWORD", "KEY", "PROXY"))
    return "a value that is not shown" if secret else repr(values.get(name))
