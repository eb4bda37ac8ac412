"""What coordinator and owner hand each other: it reads as it was written, and nothing else is taken for it."""

import hashlib
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from common.errors import ConfigError
from common.kit import Kit, NodeRequest, check_host, grouped, node_id_of, public_key_pem, split_address
from server.deployment import Deployment, create


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    folder = tmp_path_factory.mktemp("kit") / "coordinator"
    create(Deployment(folder=folder, address="host.example.org:9092", listen="127.0.0.1:9092"))
    return Deployment.load(folder).kit("alice")


def peer_key() -> str:
    return X25519PrivateKey.generate().public_key().public_bytes_raw().hex()


def request(kit: Kit, key: ec.EllipticCurvePrivateKey | None = None) -> NodeRequest:
    return NodeRequest.create(kit, key or ec.generate_private_key(ec.SECP256R1()), peer_key())


def test_a_kit_reads_as_it_was_written(kit: Kit, tmp_path: Path) -> None:
    kit.write(tmp_path / "alice.kit.toml")
    assert Kit.from_file(tmp_path / "alice.kit.toml") == kit
    text = (tmp_path / "alice.kit.toml").read_text()
    assert set(tomllib.loads(text)) == {"name", "address", "ca", "signing-key"}
    assert "telephone" in text
    # Mail may end its lines otherwise.
    (tmp_path / "mailed.toml").write_bytes(text.replace("\n", "\r\n").encode())
    assert Kit.from_file(tmp_path / "mailed.toml") == kit


def test_the_fingerprint_is_that_of_whom_to_trust(kit: Kit) -> None:
    der = x509.load_pem_x509_certificate(kit.ca.encode()).public_bytes(serialization.Encoding.DER)
    parts = (b"visard kit 1", der, bytes.fromhex(kit.signing_key))
    naive = hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).hexdigest()
    assert kit.fingerprint == naive
    assert replace(kit, name="bob", address="[::1]:1").fingerprint == naive
    assert replace(kit, signing_key="ab" * 32).fingerprint != naive
    assert grouped(naive).split() == [naive[at : at + 4] for at in range(0, 64, 4)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda text: "", "lacks name"),
        (lambda text: text + "adress = 1\n", "unknown key adress"),
        (lambda text: text.replace('name = "alice"', "name = 3"), "no text for name"),
        (lambda text: text.replace('"alice"', '"../alice"'), "cannot name a node"),
        (lambda text: text.replace(":9092", ""), "write HOST:PORT"),
        (lambda text: text.replace("host.example.org", "0.0.0.0"), "no place that a node can dial"),
        (lambda text: text.replace("-----BEGIN", "-----BEG"), "no certificate in PEM"),
        (lambda text: text.replace("MII", "MIJ"), "no certificate in PEM"),
        (lambda text: text.replace('signing-key = "', 'signing-key = "f'), "64 hex digits"),
        (lambda text: text[:-5], "cannot read the kit"),
        (lambda text: text + "#" * 70_000, "more than 65,536 bytes"),
    ],
)
def test_what_is_no_kit_is_refused(kit: Kit, tmp_path: Path, change: Callable[[str], str], told: str) -> None:
    kit.write(path := tmp_path / "kit.toml")
    path.write_text(change(path.read_text()))
    with pytest.raises(ConfigError, match=told) as refused:
        Kit.from_file(path)
    assert "kit.toml" in str(refused.value)
    assert "visard coordinator invite" in str(refused.value)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot read"):
        Kit.from_file(path)


def test_several_authorities_are_not_one(kit: Kit) -> None:
    with pytest.raises(ConfigError, match="holds 2 certificates"):
        replace(kit, ca=kit.ca * 2)


def test_a_request_reads_as_it_was_written(kit: Kit, tmp_path: Path) -> None:
    asked = request(kit)
    asked.write(tmp_path / "alice.request.toml")
    assert NodeRequest.from_file(tmp_path / "alice.request.toml") == asked
    assert (asked.name, asked.coordinator) == ("alice", kit.fingerprint)


def test_a_request_s_fingerprint_is_the_same_however_often_it_is_signed(kit: Kit) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    peer = peer_key()
    one, other = (NodeRequest.create(kit, key, peer) for _ in range(2))
    assert one.fingerprint == other.fingerprint
    others = [
        NodeRequest.create(replace(kit, name="bob"), key, peer),
        NodeRequest.create(replace(kit, signing_key="ab" * 32), key, peer),
        NodeRequest.create(kit, key, peer_key()),
        request(kit),
    ]
    assert len({one.fingerprint, *(each.fingerprint for each in others)}) == 5


@pytest.mark.parametrize("name", ["name", "node_key", "peer_key", "coordinator", "proof"])
def test_whatever_was_changed_on_its_way_makes_the_proof_wrong(kit: Kit, name: str) -> None:
    asked, other = request(kit), request(replace(kit, name="bob", signing_key="cd" * 32))
    with pytest.raises(ConfigError, match="its proof is wrong"):
        replace(asked, **{name: getattr(other, name)})


@pytest.mark.parametrize("proof", ["", "zz", "00", "é"])
def test_what_is_no_signature_proves_nothing(kit: Kit, proof: str) -> None:
    with pytest.raises(ConfigError, match="proof is wrong"):
        replace(request(kit), proof=proof)


def test_another_kind_of_key_names_no_node(kit: Kit) -> None:
    asked = request(kit)
    kinds = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    for other in (ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()):
        with pytest.raises(ConfigError, match="no P-256 public key"):
            replace(asked, node_key=other.public_key().public_bytes(*kinds).decode())
    with pytest.raises(ConfigError, match="no P-256 public key"):
        replace(asked, node_key="a word")
    # One key has one spelling, for the id follows from the bytes.
    for spelling in (asked.node_key + "\n", "# mine\n" + asked.node_key, asked.node_key.replace("\n", "\r\n")):
        with pytest.raises(ConfigError, match="as OpenSSL writes it"):
            replace(asked, node_key=spelling)


@pytest.mark.parametrize("peer", ["00" * 32, "01" + "00" * 31])
def test_a_peer_key_whose_secrets_everybody_knows_is_refused(kit: Kit, peer: str) -> None:
    with pytest.raises(ConfigError, match="of low order"):
        NodeRequest.create(kit, ec.generate_private_key(ec.SECP256R1()), peer)


def test_a_node_s_id_follows_from_its_key() -> None:
    for _ in range(20):
        pem = public_key_pem(ec.generate_private_key(ec.SECP256R1()))
        naive = int(hashlib.sha256(pem).hexdigest()[:16], 16) % 2**63
        assert node_id_of(pem) == naive
        assert 2 <= naive < 2**63


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("host:1", ("host", 1)),
        ("Coordinator.Example.ORG:65535", ("coordinator.example.org", 65535)),
        ("xn--bcher-kva.example:80", ("xn--bcher-kva.example", 80)),
        ("10.0.0.7:9092", ("10.0.0.7", 9092)),
        ("[::1]:9092", ("::1", 9092)),
        ("[2001:DB8:0:0::1]:9092", ("2001:db8::1", 9092)),
    ],
)
def test_addresses(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address, dialled=True) == parts


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("", "write HOST:PORT"),
        ("host", "write HOST:PORT"),
        (":9092", "write HOST:PORT"),
        ("https://host:9092", "leave out https://"),
        ("::1:9092", "stands in brackets"),
        ("::1", "stands in brackets"),
        ("[::1]", "stands in brackets"),
        ("host:", r"outside \[1, 65535\]"),
        ("host:0", r"outside \[1, 65535\]"),
        ("host:65536", r"outside \[1, 65535\]"),
        ("host:-1", r"outside \[1, 65535\]"),
        ("host:٣", r"outside \[1, 65535\]"),
        ("host:" + "9" * 5000, r"outside \[1, 65535\]"),
        ("[10.0.0.7]:9092", "only IPv6 literals"),
        ("[host]:9092", "no IPv6 address"),
        ("[fe80::1%eth0]:9092", "no IPv6 address"),
        ("10.0.0.700:9092", "neither a DNS name nor an IP address"),
        ("ho st:9092", "neither a DNS name"),
        ("host..example:9092", "neither a DNS name"),
        ("-host:9092", "neither a DNS name"),
        ("a" * 64 + ":9092", "neither a DNS name"),
        ("bücher.example:9092", "beginning with xn--"),
        ("0.0.0.0:9092", "no place that a node can dial"),
        ("[::]:9092", "no place that a node can dial"),
    ],
)
def test_addresses_that_are_none(address: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        split_address(address, "listen", dialled=True)
    assert "listen" in str(refused.value)


def test_one_listens_where_nobody_dials() -> None:
    assert (split_address("0.0.0.0:1"), split_address("[::]:1")) == (("0.0.0.0", 1), ("::", 1))
    assert check_host("::1", "names") == "::1"
