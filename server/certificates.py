"""TLS of a coordinator: an authority of its own that signs its certificate, or given files that are checked.

Nodes trust the authority in their kit and no other. A certificate is tried as nodes will try it: by a handshake in memory,
with the strict reading of RFC 5280 that Python has from 3.13 on.
"""

import contextlib
import ipaddress
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigError
from common.files import write_atomically
from common.keys import NOT_EVERYBODY, load_key, write_key
from common.kit import check_host, load_certificate

if TYPE_CHECKING:
    from server.deployment import Deployment

CA_DAYS, SERVER_DAYS, RENEW_DAYS = 3650, 825, 30
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# The clocks of nodes may be slow.
_EARLIER = timedelta(hours=1)
# Flights of a handshake, with some to spare.
_FLIGHTS = 10


def ensure_certificate(deployment: "Deployment") -> list[str]:
    """See to a certificate under which nodes can connect now.

    Under an own authority it is issued anew where it is missing or damaged, its names are not those of the settings, or
    RENEW_DAYS or less are left. Returns what the operator should know, a line each.

    Raises ConfigError where the authority or a given certificate will not do, with the remedy; OSError.
    """
    authority = load_certificate(read(deployment.ca), f"the authority {deployment.ca}")
    told = []
    if deployment.own_ca:
        if _left(authority) <= timedelta(0):
            raise ConfigError(
                f"the authority {deployment.ca} ended on {_end(authority)}: make a coordinator anew in another folder with `visard "
                "coordinator init`, and invite the nodes again"
            )
        if reason := _why_anew(deployment, authority):
            _issue(deployment, authority)
            told.append(f"a certificate was issued, until {_end(_leaf(deployment.certificate))}, for {reason}")
        if _left(authority) < timedelta(days=RENEW_DAYS):
            told.append(
                f"this coordinator's authority ends on {_end(authority)}: make another coordinator, and invite the nodes again"
            )
    check_certificate(deployment.certificate, deployment.key, deployment.ca, deployment.host)
    leaf = _leaf(deployment.certificate)
    if not deployment.own_ca and _left(leaf) < timedelta(days=RENEW_DAYS):
        told.append(f"the certificate {deployment.certificate} ends on {_end(leaf)}: renew it, and start again")
    return told


def check_certificate(certificate: Path, key: Path, ca: Path, host: str) -> None:
    """Try a certificate as a node will that dials `host` and trusts `ca`. Raises ConfigError with the remedy."""
    leaf, secret = _leaf(certificate), load_key(key, refused_mode=NOT_EVERYBODY)
    authority = load_certificate(read(ca), f"the authority {ca}")
    now = datetime.now(UTC)
    if not _same_key(leaf, secret):
        raise ConfigError(
            f"the key {key} is not that of the certificate {certificate}: give the key that it was made for"
        )
    if leaf.not_valid_after_utc <= now:
        raise ConfigError(f"the certificate {certificate} ended on {_end(leaf)}: renew it")
    if leaf.not_valid_before_utc > now:
        raise ConfigError(
            f"the certificate {certificate} holds from {leaf.not_valid_before_utc:%F %T} UTC on, and it is {now:%F %T}: set the clock, "
            "or wait"
        )
    client = ssl.create_default_context(cadata=authority.public_bytes(serialization.Encoding.PEM).decode())
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        server.load_cert_chain(certificate, key)
        _handshake(client, server, host)
    except ssl.SSLCertVerificationError as error:
        names = ", ".join(map(str, sorted(names_of(leaf)))) or "none"
        raise ConfigError(
            f"a node that dials {host} and trusts {ca} would refuse {certificate} ({error.verify_message.rstrip('.')}); "
            f"its names are {names}. Give one with {host} among them that this authority signed, or add what stands between to its file"
        ) from error
    except ssl.SSLError as error:
        raise ConfigError(f"TLS cannot use {certificate} with {key} ({error}): make them anew") from error


def make_ca(deployment: "Deployment") -> None:
    """A new authority of its own for the deployment: ca.key (0600) and ca.crt, in its folder. Raises OSError."""
    key = ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    name = _name(f"Visard coordinator's authority {identifier.digest.hex()[:8]}")
    usage = _usage(key_cert_sign=True, crl_sign=True)
    certificate = (
        _begun(name, name, key.public_key(), datetime.now(UTC) + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    write_key(deployment.ca_key, key)
    write_atomically(deployment.folder / deployment.ca, certificate.public_bytes(serialization.Encoding.PEM))


def certificate_names(deployment: "Deployment") -> list[str]:
    """The names that an own certificate has: the address' host, those of the settings, and this machine's own."""
    given = [deployment.host, *(check_host(name, "names") for name in deployment.names), *LOOPBACK]
    return list(dict.fromkeys(given))


def names_of(certificate: x509.Certificate) -> set[str]:
    """The DNS names (in lower case) and IP addresses under which a certificate may be used."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return set()
    return {name.lower() for name in found.get_values_for_type(x509.DNSName)} | {
        str(address) for address in found.get_values_for_type(x509.IPAddress)
    }


def read(path: Path) -> bytes:
    """A file of a deployment. Raises ConfigError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read {path} ({error.strerror}): restore it from a copy, or correct the path"
        ) from error


def _why_anew(deployment: "Deployment", authority: x509.Certificate) -> str:
    """Why the own certificate must be issued anew, or nothing."""
    wanted = certificate_names(deployment)
    if not deployment.certificate.exists():
        return ", ".join(wanted)
    try:
        leaf = _leaf(deployment.certificate)
        leaf.verify_directly_issued_by(authority)
        matches = _same_key(leaf, load_key(deployment.key))
    except (ConfigError, ValueError, TypeError, InvalidSignature):
        matches = False
    if not matches:
        return "the former was damaged or another authority's"
    if names_of(leaf) != set(wanted):
        return f"the names {', '.join(wanted)}"
    # A certificate cannot outlive its authority: then there is no use in another.
    if _left(leaf) < timedelta(days=RENEW_DAYS) and leaf.not_valid_after_utc < authority.not_valid_after_utc:
        return f"the former ends on {_end(leaf)}"
    return ""


def _issue(deployment: "Deployment", authority: x509.Certificate) -> None:
    """A new key, and a certificate for it. Raises ConfigError where the authority's key is missing or another's."""
    ca_key = load_key(deployment.ca_key)
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey) or not _same_key(authority, ca_key):
        raise ConfigError(f"{deployment.ca_key} is not the key of {deployment.ca}: restore both from a copy")
    key = ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = []
    for name in certificate_names(deployment):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            names.append(x509.DNSName(name))
    end = min(datetime.now(UTC) + timedelta(days=SERVER_DAYS), authority.not_valid_after_utc)
    issuer = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        _begun(_name("Visard coordinator"), authority.subject, key.public_key(), end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    # A crash between the two leaves a pair that does not match: the next start issues anew.
    write_key(deployment.key, key)
    write_atomically(deployment.certificate, certificate.public_bytes(serialization.Encoding.PEM))


def _begun(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder(issuer, subject, key, x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - _EARLIER)
        .not_valid_after(end)
    )


def _usage(**allowed: bool) -> x509.KeyUsage:
    uses = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign"
    )
    return x509.KeyUsage(**{use: allowed.get(use, False) for use in [*uses.split(), "encipher_only", "decipher_only"]})


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _leaf(path: Path) -> x509.Certificate:
    """The first certificate of a file, which is the server's own."""
    try:
        return x509.load_pem_x509_certificates(read(path))[0]
    except ValueError as error:
        raise ConfigError(f"{path} holds no certificate in PEM ({error}): restore it, or give another") from error


def _same_key(certificate: x509.Certificate, key: PrivateKeyTypes) -> bool:
    kinds = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return certificate.public_key().public_bytes(*kinds) == key.public_key().public_bytes(*kinds)


def _left(certificate: x509.Certificate) -> timedelta:
    return certificate.not_valid_after_utc - datetime.now(UTC)


def _end(certificate: x509.Certificate) -> str:
    return certificate.not_valid_after_utc.date().isoformat()


def _handshake(client: ssl.SSLContext, server: ssl.SSLContext, host: str) -> None:
    """Both ends of TLS, without a network. Raises ssl.SSLError where the client refuses, or they cannot agree."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(_FLIGHTS):
        for end in ends:
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
