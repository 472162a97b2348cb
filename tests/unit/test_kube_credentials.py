"""What a basic-auth Secret's data becomes, and what is said when it cannot be used: the key, never its content."""

from __future__ import annotations

import base64
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest

from controller import main
from controller.config import ConfigError, load
from controller.core.errors import Permanent, Unavailable
from controller.kube.credentials import KubeCredentials, pair
from tests.unit.test_core_config import GOOD


def data(**keys: str | bytes) -> dict[str, str]:
    return {k: base64.b64encode(v if isinstance(v, bytes) else v.encode()).decode() for k, v in keys.items()}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (data(username="me", password="s3cret"), "me:s3cret"),
        (data(password="s3cret"), "x-access-token:s3cret"),
        (data(username="", password="s3cret"), "x-access-token:s3cret"),
        (data(username="me", password="with:colons: and blanks"), "me:with:colons: and blanks"),
        (data(username="grüße", password="ß"), "grüße:ß"),
    ],
)
def test_user_and_password_become_a_pair(given: Mapping[str, str], expected: str) -> None:
    assert pair(given) == expected


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({}, "password"),
        (data(username="s3cret"), "password"),
        (data(username="me", password=""), "password"),
        (data(username="s3:cret", password="s3cret"), "username"),
        (data(username="me", password="s3cret\n"), "password"),
        (data(username="me\r\nX: y", password="s3cret"), "username"),
        (data(username="me", password="s3cret\0"), "password"),
        (data(username="me", password=b"s3cret\xff"), "password"),
        (data(username="me", password="s3cret" * 1000), "password"),
        ({"username": "!", "password": "s3cret"}, "username"),
    ],
)
def test_what_cannot_be_carried_is_refused_by_key_and_not_quoted(given: Mapping[str, str], key: str) -> None:
    with pytest.raises(ValueError, match=f"key {key}") as refused:
        pair(given)
    assert "s3" not in str(refused.value)


def test_a_start_without_a_way_to_the_api_server_says_so(tmp_path: Path) -> None:
    """No kubeconfig, no cluster, and a kubeconfig that is not there."""
    for kubeconfig in (None, tmp_path / "none"):
        with pytest.raises(Permanent, match="WORKSPACE_SECRETS is true, but there is no way to the API server"):
            KubeCredentials(kubeconfig).check()
        settings = load({**GOOD, "WORKSPACE_SECRETS": "true", "KUBECONFIG": str(kubeconfig or "")})
        with pytest.raises(ConfigError, match="set KUBECONFIG, or run in a cluster"):
            main._credentials(settings)
    assert main._credentials(load(GOOD)) is None


@pytest.mark.parametrize("answers", [False, True], ids=["nobody listens", "somebody who never answers"])
def test_an_api_server_that_does_not_answer_is_asked_again_later(tmp_path: Path, answers: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        if not answers:
            listener.close()
        kubeconfig = tmp_path / "kubeconfig"
        kubeconfig.write_text(
            f'{{"clusters": [{{"name": "c", "cluster": {{"server": "https://127.0.0.1:{port}"}}}}],'
            ' "users": [{"name": "u", "user": {"token": "t"}}],'
            ' "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}], "current-context": "x"}'
        )
        with pytest.raises(Unavailable, match="API server does not answer for Secret team/forge"):
            KubeCredentials(kubeconfig, seconds=0.5).git("team", "forge", "https://git.example/x")
