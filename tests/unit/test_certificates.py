"""TLS as nodes meet it: real handshakes, with the right and the wrong authority and name."""

import ipaddress
import socket
import ssl
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from common.errors import ConfigError
from common.keys import write_key
from server import certificates
from server.certificates import check_certificate, ensure_certificate, names_of
from server.deployment import Deployment, create

_TIMEOUT_S = 20.0


def made(folder: Path, **given: Any) -> Deployment:
    create(Deployment(**{"folder": folder, "address": "host.example.org:9092", "listen": "127.0.0.1:9092", **given}))
    return Deployment.load(folder)


@pytest.fixture
def own(tmp_path: Path) -> Deployment:
    return made(tmp_path / "own")


def dial(deployment: Deployment, host: str, ca: Path) -> dict[str, Any]:
    """A TLS connection over a pair of sockets. Returns the certificate that the client accepted; raises ssl.SSLError."""
    client = ssl.create_default_context(cafile=ca)
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(deployment.certificate, deployment.key)
    near, far = socket.socketpair()
    for end in (near, far):
        end.settimeout(_TIMEOUT_S)

    def serve() -> None:
        try:
            with server.wrap_socket(far, server_side=True) as end:
                end.sendall(b"here")
        except (ssl.SSLError, OSError):
            far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(near, server_hostname=host) as end:
            assert end.recv(4) == b"here"
            return dict(end.getpeercert() or {})
    finally:
        near.close()
        thread.join(_TIMEOUT_S)


def leaf(deployment: Deployment) -> x509.Certificate:
    return x509.load_pem_x509_certificate(deployment.certificate.read_bytes())


@pytest.mark.parametrize("host", ["host.example.org", "HOST.example.org", "localhost", "127.0.0.1", "::1"])
def test_nodes_accept_the_certificate_under_its_names(own: Deployment, host: str) -> None:
    assert dial(own, host, own.ca)["subject"]


@pytest.mark.parametrize("host", ["example.org", "a.host.example.org", "127.0.0.2", "::2", "localhost.localdomain"])
def test_nodes_refuse_it_under_others(own: Deployment, host: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"[Hh]ostname mismatch|IP address mismatch"):
        dial(own, host, own.ca)


def test_nodes_refuse_another_coordinator_of_the_same_name(own: Deployment, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        dial(own, "host.example.org", made(tmp_path / "other").ca)


def test_an_address_may_be_a_literal(tmp_path: Path) -> None:
    six = made(tmp_path / "six", address="[2001:DB8::7]:9092", names=("10.0.0.7", "Other.example"))
    assert names_of(leaf(six)) == {"2001:db8::7", "10.0.0.7", "other.example", "localhost", "127.0.0.1", "::1"}
    for host in ("2001:db8::7", "10.0.0.7", "other.example"):
        dial(six, host, six.ca)


def test_what_the_certificates_say(own: Deployment) -> None:
    authority = x509.load_pem_x509_certificate(own.ca.read_bytes())
    for certificate, days in ((authority, 3650), (leaf(own), 825)):
        left = certificate.not_valid_after_utc - datetime.now(UTC)
        assert timedelta(days=days, minutes=-5) < left <= timedelta(days=days)
        assert certificate.not_valid_before_utc < datetime.now(UTC) - timedelta(minutes=50)
        key = certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert isinstance(key.curve, ec.SECP256R1)
    found = {e.oid._name: e for e in leaf(own).extensions}
    assert set(found) == {
        *("basicConstraints", "keyUsage", "extendedKeyUsage"),
        *("subjectAltName", "subjectKeyIdentifier", "authorityKeyIdentifier"),
    }
    assert [name for name, e in found.items() if e.critical] == ["basicConstraints", "keyUsage"]
    limits = authority.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (limits.ca, limits.path_length) == (True, 0)
    assert not leaf(own).extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_good_certificate_stays(own: Deployment) -> None:
    before = own.certificate.read_bytes(), own.key.read_bytes()
    # The authority's key may lie elsewhere as long as nothing is to be signed.
    own.ca_key.unlink()
    assert ensure_certificate(own) == []
    assert (own.certificate.read_bytes(), own.key.read_bytes()) == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"names": ("10.0.0.7",)}, "the names host.example.org, 10.0.0.7, localhost"),
        ({"address": "else.example:1"}, "the names else.example, localhost"),
    ],
)
def test_other_names_are_another_certificate(own: Deployment, change: dict[str, Any], told: str) -> None:
    changed, serial = replace(own, **change), leaf(own).serial_number
    (line,) = ensure_certificate(changed)
    assert told in line
    assert leaf(own).serial_number != serial
    dial(changed, changed.host, own.ca)
    assert ensure_certificate(changed) == []


@pytest.mark.parametrize("name", ["certificate", "key"])
@pytest.mark.parametrize("content", [None, b"", b"a word"])
def test_what_is_damaged_or_gone_is_issued_anew(own: Deployment, name: str, content: bytes | None) -> None:
    path = getattr(own, name)
    path.unlink() if content is None else path.write_bytes(content)
    (line,) = ensure_certificate(own)
    assert "issued" in line
    dial(own, own.host, own.ca)


def test_a_pair_that_does_not_match_is_issued_anew(own: Deployment, tmp_path: Path) -> None:
    """As a crash between its two files leaves it; and a certificate of another authority, as a mixed-up copy does."""
    other = made(tmp_path / "other")
    own.key.write_bytes(other.key.read_bytes())
    assert len(ensure_certificate(own)) == 1
    own.key.write_bytes(other.key.read_bytes())
    own.certificate.write_bytes(other.certificate.read_bytes())
    assert len(ensure_certificate(own)) == 1
    dial(own, own.host, own.ca)


def test_it_is_renewed_before_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "SERVER_DAYS", 29)
    soon = made(tmp_path / "soon")
    monkeypatch.undo()
    (line,) = ensure_certificate(soon)
    assert "the former ends on" in line
    assert leaf(soon).not_valid_after_utc > datetime.now(UTC) + timedelta(days=800)
    assert ensure_certificate(soon) == []


def test_an_authority_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certificates, "CA_DAYS", 20)
    soon = made(tmp_path / "soon")
    (line,) = ensure_certificate(soon)
    assert "this coordinator's authority ends on" in line, "and no certificate is issued, which would end with it"
    monkeypatch.setattr(certificates, "CA_DAYS", 0)
    with pytest.raises(ConfigError, match=r"ended on .* invite the nodes again"):
        made(tmp_path / "past")


def test_an_authority_without_its_key_cannot_sign(own: Deployment, tmp_path: Path) -> None:
    own.certificate.unlink()
    own.ca_key.chmod(0o640)
    with pytest.raises(ConfigError, match="others may read it"):
        ensure_certificate(own)
    own.ca_key.chmod(0o600)
    own.ca_key.write_bytes(made(tmp_path / "other").ca_key.read_bytes())
    with pytest.raises(ConfigError, match=r"is not the key of .*: restore both"):
        ensure_certificate(own)
    own.ca_key.unlink()
    with pytest.raises(ConfigError, match="restore it from a copy"):
        ensure_certificate(own)
    own.ca.unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*ca.crt"):
        ensure_certificate(own)


class Authority:
    """Somebody else's: root, an intermediate where asked for, and certificates of any kind below."""

    def __init__(self, folder: Path, *, between: bool = False) -> None:
        self.folder = folder
        self.root_key = ec.generate_private_key(ec.SECP256R1())
        self.root = self.signed("root", self.root_key, None, ca=True)
        self.ca = folder / "root.crt"
        self.ca.write_bytes(self.root.public_bytes(serialization.Encoding.PEM))
        self.key, self.issuer, self.chain = self.root_key, self.root, b""
        if between:
            self.key = ec.generate_private_key(ec.SECP256R1())
            self.issuer = self.signed("between", self.key, (self.root, self.root_key), ca=True)
            self.chain = self.issuer.public_bytes(serialization.Encoding.PEM)

    def signed(
        self,
        name: str,
        key: Any,
        issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None,
        *,
        ca: bool = False,
        begins: float = -1,
        ends: float = 100,
        names: tuple[str, ...] = (),
    ) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        by, by_key = issuer if issuer is not None else (None, key)
        now = datetime.now(UTC)
        identifier = x509.SubjectKeyIdentifier.from_public_key(by_key.public_key())
        usage = {"key_cert_sign": ca, "crl_sign": ca, "digital_signature": not ca}
        built = (
            x509.CertificateBuilder(
                by.subject if by is not None else subject, subject, key.public_key(), x509.random_serial_number()
            )
            .not_valid_before(now + timedelta(days=begins))
            .not_valid_after(now + timedelta(days=ends))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(certificates._usage(**usage), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        )
        if names:
            said = [
                x509.IPAddress(ipaddress.ip_address(n)) if n[0].isdigit() or ":" in n else x509.DNSName(n)
                for n in names
            ]
            built = built.add_extension(x509.SubjectAlternativeName(said), critical=False)
        return built.sign(by_key, hashes.SHA256())

    def given(self, key: Any = None, **how: Any) -> dict[str, Path]:
        """Files of a certificate, as `Deployment` takes them."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        how.setdefault("names", ("host.example.org",))
        certificate = self.signed("server", key, (self.issuer, self.key), **how)
        paths = {"certificate": self.folder / "given.crt", "key": self.folder / "given.key", "ca": self.ca}
        paths["certificate"].write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + self.chain)
        write_key(paths["key"], key)
        return paths


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("names", [("host.example.org",), ("*.example.org", "10.0.0.7")])
def test_a_given_certificate_is_used_where_it_lies(tmp_path: Path, between: bool, names: tuple[str, ...]) -> None:
    given = Authority(tmp_path, between=between).given(names=names)
    found = made(tmp_path / "c", **given)
    assert not found.own_ca
    assert {name: getattr(found, name) for name in given} == given
    assert sorted(path.name for path in found.folder.iterdir()) == ["coordinator.toml", "signing.key"]
    assert found.kit("alice").ca == given["ca"].read_text()
    assert ensure_certificate(found) == []
    dial(found, "host.example.org", given["ca"])


def test_an_rsa_certificate_will_do(tmp_path: Path) -> None:
    found = made(tmp_path / "c", **Authority(tmp_path).given(rsa.generate_private_key(65537, 2048)))
    dial(found, "host.example.org", found.ca)


def test_a_given_certificate_that_ends_soon_is_told(tmp_path: Path) -> None:
    found = made(tmp_path / "c", **Authority(tmp_path).given(ends=29))
    (line,) = ensure_certificate(found)
    assert "given.crt ends on" in line


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"ends": -0.5}, r"given.crt ended on .*: renew it"),
        ({"begins": 1}, "set the clock, or wait"),
        ({"names": ()}, r"its names are none. Give one with host.example.org"),
        ({"names": ("other.example", "10.0.0.7")}, "its names are 10.0.0.7, other.example"),
    ],
)
def test_a_given_certificate_that_nodes_would_refuse(tmp_path: Path, how: dict[str, Any], told: str) -> None:
    given = Authority(tmp_path).given(**how)
    with pytest.raises(ConfigError, match=told):
        made(tmp_path / "c", **given)
    assert not (tmp_path / "c").exists()


def test_given_files_that_do_not_go_together(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    one, other = Authority(tmp_path / "one").given(), Authority(tmp_path / "other", between=True).given()

    def refused(**files: Path) -> str:
        with pytest.raises(ConfigError) as error:
            check_certificate(**(one | files), host="host.example.org")
        return str(error.value)

    check_certificate(**one, host="host.example.org")
    assert "is not that of the certificate" in refused(key=other["key"])
    assert "would refuse" in refused(ca=other["ca"])
    assert "no certificate in PEM" in refused(ca=one["key"])
    assert "no certificate in PEM" in refused(certificate=one["key"])
    assert "no secret key in PEM" in refused(key=one["ca"])
    # What stands between is left out, or stands where the root belongs.
    chain = other["certificate"].read_text()
    first = chain[: chain.index("-----END") + len("-----END CERTIFICATE-----\n")]
    (alone := tmp_path / "alone.crt").write_text(first)
    (between := tmp_path / "between.crt").write_text(chain.removeprefix(first))
    assert "would refuse" in refused(certificate=alone, key=other["key"], ca=other["ca"])
    assert "would refuse" in refused(certificate=alone, key=other["key"], ca=between)
    (both := tmp_path / "both.crt").write_text(one["ca"].read_text() + other["ca"].read_text())
    assert "holds 2 certificates" in refused(ca=both)


def test_a_given_key_that_will_not_do(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    given = Authority(tmp_path).given(key)
    given["key"].chmod(0o640)
    check_certificate(**given, host="host.example.org")
    given["key"].chmod(0o644)
    with pytest.raises(ConfigError, match="set it to 600"):
        check_certificate(**given, host="host.example.org")
    given["key"].chmod(0o600)
    locked = serialization.BestAvailableEncryption(b"word")
    kinds = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    given["key"].write_bytes(key.private_bytes(*kinds, locked))
    with pytest.raises(ConfigError, match="is encrypted"):
        check_certificate(**given, host="host.example.org")


def test_a_weak_key_is_refused_as_tls_refuses_it(tmp_path: Path) -> None:
    given = Authority(tmp_path).given(rsa.generate_private_key(65537, 1024))
    with pytest.raises(ConfigError, match="TLS cannot use"):
        made(tmp_path / "c", **given)
