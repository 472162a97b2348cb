"""The cluster's own certificate authority, its certificates and the key that signs service account tokens.

Everything a client connects to is proven by this authority, so a foreign process on our port is noticed. A node has an
authority of its own, for what API server and kubelet say to each other.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID = dt.timedelta(days=3650)
HOSTS = ("localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc")
ADDRESSES = ("127.0.0.1", "10.0.0.1")
# Whom a kubelet sees when the API server calls it; node/access.yaml lets this user do it.
KUBELET_CLIENT = "sisu-kodo-dev-apiserver"


@dataclass(frozen=True)
class Pki:
    """Paths of PEM files."""

    ca: Path
    apiserver_cert: Path
    apiserver_key: Path
    etcd_cert: Path
    etcd_key: Path
    service_account_key: Path


def ensure_pki(folder: Path, *, now: dt.datetime) -> Pki:
    """The files under `folder`, made when they are not all there yet. The authority's own key is not kept."""
    pki = Pki(
        ca=folder / "ca.crt",
        apiserver_cert=folder / "apiserver.crt",
        apiserver_key=folder / "apiserver.key",
        etcd_cert=folder / "etcd.crt",
        etcd_key=folder / "etcd.key",
        service_account_key=folder / "service-account.key",
    )
    if not all(path.exists() for path in vars(pki).values()):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _make(pki, now)
    return pki


@dataclass(frozen=True)
class Authority:
    """Signs certificates. Its key is in memory only."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, name: str, *, now: dt.datetime) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        usage = x509.KeyUsage(
            digital_signature=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        certificate = (
            _builder(_name(name), _name(name), key.public_key(), key.public_key(), now)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key)

    @classmethod
    def load(cls, certificate: Path, key: Path) -> Authority:
        loaded = serialization.load_pem_private_key(key.read_bytes(), password=None)
        assert isinstance(loaded, ec.EllipticCurvePrivateKey)
        return cls(x509.load_pem_x509_certificate(certificate.read_bytes()), loaded)

    def save(self, certificate: Path, key: Path | None = None) -> None:
        """Writes the certificate, and the key only where it is asked for."""
        _write(certificate, self.certificate.public_bytes(serialization.Encoding.PEM))
        if key is not None:
            _write(key, _pem(self.key))

    def issue(
        self, name: str, certificate: Path, key: Path, *, now: dt.datetime, addresses: tuple[str, ...] = ADDRESSES
    ) -> None:
        """Writes a certificate for server and client use, and its new key."""
        fresh = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_name(name), self.certificate.subject, fresh.public_key(), self.key.public_key(), now)
        signed = _leaf(builder, addresses).sign(self.key, hashes.SHA256())
        _write(certificate, signed.public_bytes(serialization.Encoding.PEM))
        _write(key, _pem(fresh))


@dataclass(frozen=True)
class NodePki:
    """Paths of PEM files. The node's address is known only when it starts, so this authority's key is kept."""

    ca: Path
    ca_key: Path
    client_cert: Path
    client_key: Path
    kubelet_cert: Path
    kubelet_key: Path


def ensure_node_pki(folder: Path, *, now: dt.datetime) -> NodePki:
    """The authority and the API server's certificate under `folder`, made when absent. The kubelet's is not made here."""
    pki = NodePki(
        ca=folder / "node-ca.crt",
        ca_key=folder / "node-ca.key",
        client_cert=folder / "kubelet-client.crt",
        client_key=folder / "kubelet-client.key",
        kubelet_cert=folder / "kubelet.crt",
        kubelet_key=folder / "kubelet.key",
    )
    if not all(path.exists() for path in (pki.ca, pki.ca_key, pki.client_cert, pki.client_key)):
        authority = Authority.make("sisu-kodo-dev-node-ca", now=now)
        authority.save(pki.ca, pki.ca_key)
        authority.issue(KUBELET_CLIENT, pki.client_cert, pki.client_key, now=now)
    return pki


def issue_kubelet(pki: NodePki, address: str, *, now: dt.datetime) -> None:
    """The certificate that a kubelet at `address` shows."""
    authority = Authority.load(pki.ca, pki.ca_key)
    authority.issue("kubelet", pki.kubelet_cert, pki.kubelet_key, now=now, addresses=(address,))


def _make(pki: Pki, now: dt.datetime) -> None:
    authority = Authority.make("sisu-kodo-dev-ca", now=now)
    authority.save(pki.ca)
    authority.issue("kube-apiserver", pki.apiserver_cert, pki.apiserver_key, now=now)
    authority.issue("etcd", pki.etcd_cert, pki.etcd_key, now=now)
    _write(pki.service_account_key, _pem(ec.generate_private_key(ec.SECP256R1())))


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    now: dt.datetime,
) -> x509.CertificateBuilder:
    """What every certificate has. The key identifiers are what strict verifiers (Python 3.13) ask for."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + VALID)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _leaf(builder: x509.CertificateBuilder, addresses: tuple[str, ...]) -> x509.CertificateBuilder:
    numbers = [x509.IPAddress(ipaddress.ip_address(one)) for one in addresses]
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName([*map(x509.DNSName, HOSTS), *numbers]), critical=False)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)
