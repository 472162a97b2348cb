"""The cluster's own certificate authority, its certificates and the key that signs service account tokens.

Everything a client connects to is proven by this authority, so a foreign process on our port is noticed.
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


def _make(pki: Pki, now: dt.datetime) -> None:
    ca_key = ec.generate_private_key(ec.SECP256R1())
    ca_name = _name("sisu-kodo-dev-ca")
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
    ca = (
        _builder(ca_name, ca_name, ca_key.public_key(), ca_key.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    _write(pki.ca, ca.public_bytes(serialization.Encoding.PEM))
    for name, cert_path, key_path in (
        ("kube-apiserver", pki.apiserver_cert, pki.apiserver_key),
        ("etcd", pki.etcd_cert, pki.etcd_key),
    ):
        key = ec.generate_private_key(ec.SECP256R1())
        cert = _leaf(_builder(_name(name), ca_name, key.public_key(), ca_key.public_key(), now))
        _write(cert_path, cert.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        _write(key_path, _pem(key))
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


def _leaf(builder: x509.CertificateBuilder) -> x509.CertificateBuilder:
    addresses = [x509.IPAddress(ipaddress.ip_address(one)) for one in ADDRESSES]
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .add_extension(x509.SubjectAlternativeName([*map(x509.DNSName, HOSTS), *addresses]), critical=False)
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
