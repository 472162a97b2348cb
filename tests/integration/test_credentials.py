"""The Credentials port: the contract against the twin in memory and the real API server, and what only a real one can refuse.

Every Secret here holds the same token, so that no answer may hold any of it.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from controller.core.errors import InvalidIntent, Unavailable
from controller.kube.credentials import KubeCredentials
from controller.ports import Credentials
from devcluster.cluster import ControlPlane
from tests.support.memory_credentials import MemoryCredentials, MemorySecret

pytestmark = pytest.mark.timeout(1500)  # the first run builds the control plane

TOKEN = "s3cret-token"
PAIR = f"reader:{TOKEN}"
PLACE = "https://git.example/org"
URL = f"{PLACE}/x.git"
ANNOTATION = "sisukodo.dev/git"
BASIC = "kubernetes.io/basic-auth"
# name → annotation; who reads them may read all of these, and nothing of namespace `other`
SECRETS: Mapping[str, str | None] = {
    "forge": PLACE,
    "bare": None,
    "prefix": "https://git.example/or",
    "host": "https://evil.example/org",
    "hostile": "https://git.example/org/..",
}


def secret(name: str, annotation: str | None, *, kind: str = BASIC, **data: str) -> str:
    annotations = {} if annotation is None else {ANNOTATION: annotation}
    metadata = {"name": name, "annotations": annotations}
    body = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": kind, "stringData": data}
    return json.dumps(body)


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("cluster")) as running:
        for namespace in ("team", "other"):
            running.kubectl("create", "namespace", namespace)
        for name, annotation in SECRETS.items():
            running.kubectl(
                "-n",
                "team",
                "create",
                "-f",
                "-",
                stdin=secret(name, annotation, username="reader", password=TOKEN),
            )
        running.kubectl("-n", "other", "create", "-f", "-", stdin=secret("forge", PLACE, password=TOKEN))
        grant(running, *SECRETS, "nowhere", "changing")
        yield running


def grant(plane: ControlPlane, *names: str) -> None:
    """Exactly these names, in namespace `team`, to the controller's account."""
    only = [f"--resource-name={name}" for name in names]
    account = "--serviceaccount=sisu-kodo-system:sisu-kodo-controller"
    plane.kubectl("-n", "team", "create", "role", "git", "--verb=get", "--resource=secrets", *only)
    plane.kubectl("-n", "team", "create", "rolebinding", "git", "--role=git", account)


@pytest.fixture
def real(plane: ControlPlane) -> KubeCredentials:
    """As the controller's service account."""
    return KubeCredentials(plane.kubeconfig("controller"))


@pytest.fixture(params=["memory", "api server"])
def either(request: pytest.FixtureRequest) -> Credentials:
    if request.param == "api server":
        found: Credentials = request.getfixturevalue("real")
        return found
    return MemoryCredentials(
        secrets={("team", name): MemorySecret(token=PAIR, annotation=one) for name, one in SECRETS.items()}
    )


def refused(credentials: Credentials, namespace: str, name: str, url: str = URL) -> str:
    with pytest.raises(InvalidIntent) as error:
        credentials.git(namespace, name, url)
    said = str(error.value)
    assert error.value.field == "spec.workspace.git.secretRef" and f"Secret {namespace}/{name}: " in said
    forms = (TOKEN, *(base64.b64encode(one.encode()).decode() for one in (TOKEN, PAIR)))
    chain: BaseException | None = error.value
    while chain is not None:
        assert not any(form in f"{chain!r} {chain.__dict__}" for form in forms)
        chain = chain.__cause__ or chain.__context__
    return said


# ------------------------------------------------------------------ the contract


@pytest.mark.parametrize("url", [URL, PLACE, "https://GIT.example:443/org/deep/er.git"])
def test_contract_what_the_secret_lets_go_there_is_a_pair(either: Credentials, url: str) -> None:
    assert either.git("team", "forge", url) == PAIR


@pytest.mark.parametrize(
    ("name", "url", "says"),
    [
        ("nowhere", URL, "there is none"),
        ("bare", URL, f"has no annotation {ANNOTATION}"),
        ("prefix", URL, "does not cover"),
        ("host", URL, "does not cover"),
        ("hostile", URL, "is not a place"),
        ("forge", "https://git.example/organ/x.git", "does not cover"),
        ("forge", "https://evil.example/org/x.git", "does not cover"),
        ("forge", "http://git.example/org/x.git", "does not cover"),
        ("forge", "https://git.example/org/../x.git", "spec.workspace.git.url"),
    ],
)
def test_contract_everything_else_is_refused_with_what_would_be_right(
    either: Credentials, name: str, url: str, says: str
) -> None:
    assert says in refused(either, "team", name, url)


# ------------------------------------------------------------------ the real one


def test_without_the_right_the_lines_that_grant_it_are_told_and_work(
    plane: ControlPlane, real: KubeCredentials
) -> None:
    """In another namespace, for a Secret of the same name: the right is for this one only."""
    said = refused(real, "other", "forge")
    _, _, lines = said.partition("who may grant it runs: ")
    commands = lines.split(" && ")
    assert len(commands) == 2 and all(one.startswith("kubectl -n other create role") for one in commands), said
    assert commands[1].endswith("--serviceaccount=sisu-kodo-system:sisu-kodo-controller")
    for command in commands:
        plane.kubectl(*command.split()[1:])
    deadline = time.monotonic() + 10  # the authorizer's own watch
    while time.monotonic() < deadline:
        try:
            assert real.git("other", "forge", URL) == f"x-access-token:{TOKEN}"
            break
        except InvalidIntent:
            time.sleep(0.1)
    else:
        raise AssertionError(said)
    answer = plane.kubectl("-n", "other", "auth", "can-i", "list", "secrets", identity="controller", check=False)
    assert answer.stdout.strip() == "no"
    assert "may not be read here" in refused(real, "team", "not-granted"), "whether there is one is not told"


@pytest.mark.parametrize(
    ("kind", "annotation", "data", "says"),
    [
        ("Opaque", PLACE, {"username": "reader", "password": TOKEN}, f"is of type Opaque; right would be {BASIC}"),
        ("Opaque", None, {"password": TOKEN}, "is of type Opaque"),
        (BASIC, PLACE, {"username": TOKEN}, "its key password is missing or empty"),
        (BASIC, PLACE, {"password": f"{TOKEN}\n"}, "its key password holds a line feed"),
        (BASIC, PLACE, {"username": f"{TOKEN}:", "password": TOKEN}, "its key username holds ':'"),
        (BASIC, "https://elsewhere.example", {"username": TOKEN}, "does not cover"),
    ],
)
def test_a_secret_that_is_not_what_it_must_be_is_refused_by_name(
    plane: ControlPlane, real: KubeCredentials, kind: str, annotation: str | None, data: Mapping[str, str], says: str
) -> None:
    plane.kubectl("-n", "team", "create", "-f", "-", stdin=secret("changing", annotation, kind=kind, **data))
    try:
        assert says in refused(real, "team", "changing")
    finally:
        plane.kubectl("-n", "team", "delete", "secret", "changing")


def test_every_read_is_a_fresh_one(plane: ControlPlane, real: KubeCredentials) -> None:
    """Rotated, annotated anew, and gone: each counts at the next read."""
    plane.kubectl("-n", "team", "create", "-f", "-", stdin=secret("changing", PLACE, password="one"))
    assert real.git("team", "changing", URL) == "x-access-token:one"
    plane.kubectl("-n", "team", "patch", "secret", "changing", "-p", '{"stringData": {"password": "two"}}')
    assert real.git("team", "changing", URL) == "x-access-token:two"
    plane.kubectl("-n", "team", "annotate", "secret", "changing", f"{ANNOTATION}-")
    assert "has no annotation" in refused(real, "team", "changing")
    plane.kubectl("-n", "team", "delete", "secret", "changing")
    assert "there is none" in refused(real, "team", "changing")


def test_a_worker_whose_own_token_is_not_taken_asks_again_later(plane: ControlPlane, tmp_path: Path) -> None:
    text = plane.kubeconfig("controller").read_text()
    old = next(line for line in text.splitlines() if "token: " in line)
    stale = tmp_path / "kubeconfig"
    stale.write_text(text.replace(old, old.partition("token: ")[0] + "token: no-longer"))
    with pytest.raises(Unavailable, match="Secret team/forge: 401"):
        KubeCredentials(stale).git("team", "forge", URL)


def test_zz_an_api_server_that_is_gone_is_asked_again_later(plane: ControlPlane, real: KubeCredentials) -> None:
    """The last test of this file: it stops the cluster."""
    assert real.git("team", "forge", URL) == PAIR
    plane.stop()
    with pytest.raises(Unavailable, match="does not answer"):
        real.git("team", "forge", URL)
