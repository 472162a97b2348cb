"""The Credentials port over the API server: one GET of one Secret when git is about to talk to a private repository.

Nothing here is kept: neither the connection nor what came over it. No message holds anything of the Secret but its name and type.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

import aiohttp
from kubernetes.aio import client
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.config import ConfigException

from controller.core import binding
from controller.core.errors import InvalidIntent, Permanent, Unavailable
from controller.kube.client import connect, message_of

DEADLINE_SECONDS = 10.0  # connection and answer
TYPE = "kubernetes.io/basic-auth"
ANY_USER = "x-access-token"  # with a bare token every known forge takes any user name
MAX_BYTES = 4096


class KubeCredentials:
    """As the service account of the process. `seconds` bounds one read, connection included."""

    def __init__(self, kubeconfig: Path | None, *, seconds: float = DEADLINE_SECONDS) -> None:
        self._kubeconfig, self._seconds = kubeconfig, seconds

    def check(self) -> None:
        """Raises Permanent where nothing says how to reach the API server. Asks nobody."""

        async def look() -> None:
            api = await connect(self._kubeconfig)
            await api.close()  # type: ignore[no-untyped-call]

        try:
            asyncio.run(look())
        except (ConfigException, OSError) as e:
            raise Permanent(
                f"WORKSPACE_SECRETS is true, but there is no way to the API server ({e});"
                " set KUBECONFIG, or run in a cluster with the service account's token mounted"
            ) from e

    def git(self, namespace: str, name: str, url: str) -> str:
        """See ports.Credentials."""
        try:
            secret = asyncio.run(asyncio.wait_for(self._read(namespace, name), self._seconds))
        except ApiException as e:
            raise _translated(e, namespace, name) from e
        except (aiohttp.ClientError, TimeoutError, ConfigException, OSError) as e:
            raise Unavailable(f"API server does not answer for Secret {namespace}/{name}: {type(e).__name__}") from e
        if secret.type != TYPE:
            raise _refused(namespace, name, f"is of type {str(secret.type)[:100]}; right would be {TYPE}")
        annotations = (secret.metadata.annotations if secret.metadata else None) or {}
        if (reason := binding.refusal(annotations.get(binding.ANNOTATION), url)) is not None:
            raise _refused(namespace, name, reason)
        try:
            return pair(secret.data or {})
        except ValueError as e:
            raise _refused(namespace, name, str(e)) from None  # the cause may quote what it could not read

    async def _read(self, namespace: str, name: str) -> client.V1Secret:
        api = await connect(self._kubeconfig)
        try:
            return await client.CoreV1Api(api).read_namespaced_secret(name, namespace)
        finally:
            await api.close()  # type: ignore[no-untyped-call]


def pair(data: Mapping[str, str | bytes]) -> str:
    """`user:password` of a basic-auth Secret's data (base64). Raises ValueError that names the key and holds nothing of it."""
    user, password = _text(data, "username"), _text(data, "password")
    if password == "":
        raise ValueError("its key password is missing or empty")
    if ":" in user:
        raise ValueError("its key username holds ':', which Basic authentication cannot carry")
    return f"{user or ANY_USER}:{password}"


def _text(data: Mapping[str, str | bytes], key: str) -> str:
    try:
        text = base64.b64decode(data.get(key) or "", validate=True).decode()
    except (binascii.Error, UnicodeDecodeError):
        raise ValueError(f"its key {key} is not UTF-8 text") from None
    if len(text) > MAX_BYTES or not text.isprintable():
        raise ValueError(
            f"its key {key} holds a line feed or another control character, or more than {MAX_BYTES} of any"
        )
    return text


def _refused(namespace: str, name: str, reason: str) -> InvalidIntent:
    return InvalidIntent(binding.FIELD, f"Secret {namespace}/{name}: {reason}")


def _translated(e: ApiException, namespace: str, name: str) -> Permanent | Unavailable:
    if e.status == 404:
        right = f"kubectl -n {namespace} create secret generic {name} --type={TYPE} --from-literal=password=TOKEN"
        return _refused(
            namespace, name, f"there is none; right would be: {right}, with the annotation {binding.ANNOTATION}"
        )
    if e.status == 403:
        return _refused(namespace, name, f"may not be read here; who may grant it runs: {_grant(e, namespace, name)}")
    if e.status in (401, 429) or e.status >= 500:
        return Unavailable(f"API server: Secret {namespace}/{name}: {e.status}")
    return Permanent(f"API server: Secret {namespace}/{name}: {e.status}: {message_of(e)}")


def _grant(e: ApiException, namespace: str, name: str) -> str:
    """Two lines of kubectl, for whom the API server says that we are."""
    user = (re.findall(r'User "([^"]+)"', message_of(e)) or ["the account that plans"])[0]
    account = re.fullmatch(r"system:serviceaccount:([a-z0-9-]+:[a-z0-9.-]+)", user)
    subject = f"--serviceaccount={account[1]}" if account else f"--user={shlex.quote(user)}"
    role = f"sisu-kodo-git-{name}"
    return (
        f"kubectl -n {namespace} create role {role} --verb=get --resource=secrets --resource-name={name}"
        f" && kubectl -n {namespace} create rolebinding {role} --role={role} {subject}"
    )
