"""What coordinator and owner hand each other before a node may join: the kit one way, the request the other.

Neither file is secret. The kit tells a node whom to trust: the authority that signs the coordinator's TLS certificate, and
the Ed25519 key that signs its instructions. The request gives the coordinator the node's two public keys, and proves that
its sender holds the first. Whoever carries the files could exchange them, so both have a fingerprint to compare by telephone.

A node is known by its ECDSA P-256 public key, whose bytes are always its PEM (SubjectPublicKeyInfo) as OpenSSL writes it.
"""

import hashlib
import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from common.commented import commented, load_words
from common.errors import ConfigError
from common.fields import keys_of, require
from common.files import write_atomically

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
_KEY_HEX = re.compile(r"[0-9a-f]{64}")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.IGNORECASE)
_MAX_HOST = 253
_MAX_PORT = 65535
_ASK_KIT = "ask the coordinator for another, which `visard coordinator invite` makes"
_ASK_REQUEST = "ask its owner for another, which `visard client join` makes"


@dataclass(frozen=True)
class Kit:
    """What a node must know of its coordinator, all of it public.

    name: how the coordinator calls this node. address: "HOST:PORT" that the node dials. ca: the one certificate (PEM) under
    which the coordinator's TLS certificate must stand. signing_key: raw Ed25519 public key, 64 hex digits.

    Raises ConfigError where one of them is not of that kind.
    """

    name: str
    address: str
    ca: str
    signing_key: str

    def __post_init__(self) -> None:
        check_name(self.name)
        split_address(self.address, dialled=True)
        load_certificate(self.ca.encode(), "ca")
        require(
            _KEY_HEX.fullmatch(self.signing_key) is not None,
            f"signing-key = {self.signing_key!r}: an Ed25519 key has 64 hex digits",
        )

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Raises ConfigError, which names the file, where it is missing, damaged or no kit."""
        words = load_words(path, "kit", [key for _, key in keys_of(cls)], _ASK_KIT)
        try:
            return cls(**{name: words[key] for name, key in keys_of(cls)})
        except ConfigError as error:
            raise ConfigError(f"the kit {path}: {error}; {_ASK_KIT}") from error

    def write(self, path: Path) -> None:
        """Raises OSError."""
        write_atomically(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The file's content, the same for the same kit."""
        return commented(
            f"The kit of the node {self.name}, made by `visard coordinator invite`. Nothing in it is secret, but whoever "
            "changes it on its way becomes your coordinator: compare the fingerprint that `visard client join` tells by telephone.",
            [
                ("name", self.name, "How the coordinator calls this node."),
                ("address", self.address, "Where the node finds the coordinator."),
                (
                    "signing-key",
                    self.signing_key,
                    "Ed25519 public key: every instruction is signed with its secret half.",
                ),
                ("ca", self.ca, "The certificate under which the coordinator's own must stand."),
            ],
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the CA's certificate and the signing key: 64 hex digits, the same in all kits of a coordinator."""
        authority = load_certificate(self.ca.encode(), "ca").public_bytes(serialization.Encoding.DER)
        return hashlib.sha256(_packed("visard kit 1", authority, bytes.fromhex(self.signing_key))).hexdigest()


@dataclass(frozen=True)
class NodeRequest:
    """A node asks to be let in; all of it public.

    name: as in its kit. node_key: P-256 public key (PEM). peer_key: X25519 public key of secure sums, 64 hex digits.
    coordinator: fingerprint of the kit, so that the request is good for that coordinator alone. proof: ECDSA signature
    (SHA-256, hex) by the node key over the others.

    Raises ConfigError where one is not of that kind, and where the proof is wrong.
    """

    name: str
    node_key: str
    peer_key: str
    coordinator: str
    proof: str

    def __post_init__(self) -> None:
        check_name(self.name)
        key = load_node_public_key(self.node_key.encode())
        require(_KEY_HEX.fullmatch(self.peer_key) is not None, f"peer-key = {self.peer_key!r}: it has 64 hex digits")
        try:
            X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(self.peer_key)))
        except ValueError:
            raise ConfigError(
                f"peer-key = {self.peer_key}: of low order, so that everybody knows its secrets"
            ) from None
        require(
            _KEY_HEX.fullmatch(self.coordinator) is not None,
            f"coordinator = {self.coordinator!r}: a kit's fingerprint has 64 hex digits",
        )
        try:
            key.verify(bytes.fromhex(self.proof), self._claimed, ec.ECDSA(hashes.SHA256()))
        except (ValueError, InvalidSignature):
            raise ConfigError(
                "its proof is wrong: it was changed on its way, or its sender does not hold the node's key"
            ) from None

    @classmethod
    def create(cls, kit: Kit, private_key: ec.EllipticCurvePrivateKey, peer_key: str) -> Self:
        """The request of the kit's node. peer_key: its public peer key, 64 hex digits."""
        node_key = public_key_pem(private_key)
        claimed = _claim(kit.name, node_key, peer_key, kit.fingerprint)
        proof = private_key.sign(claimed, ec.ECDSA(hashes.SHA256())).hex()
        return cls(kit.name, node_key.decode(), peer_key, kit.fingerprint, proof)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Raises ConfigError, which names the file, where it is missing, damaged, no request, or its proof is wrong."""
        words = load_words(path, "request", [key for _, key in keys_of(cls)], _ASK_REQUEST)
        try:
            return cls(**{name: words[key] for name, key in keys_of(cls)})
        except ConfigError as error:
            raise ConfigError(f"the request {path}: {error}; {_ASK_REQUEST}") from error

    def write(self, path: Path) -> None:
        """Raises OSError."""
        content = commented(
            f"The request of the node {self.name}, made by `visard client join`, for the coordinator, who lets it in with `visard "
            "coordinator nodes --approve`. Nothing in it is secret.",
            [
                ("name", self.name, "How the coordinator calls this node."),
                ("node-key", self.node_key, "ECDSA P-256 public key by which the node is known."),
                ("peer-key", self.peer_key, "X25519 public key by which other nodes know it in secure sums."),
                ("coordinator", self.coordinator, "Fingerprint of the coordinator that is asked."),
                ("proof", self.proof, "Signature of the above by the node's key."),
            ],
        )
        write_atomically(path, content)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all but the proof: 64 hex digits, the same however often it is signed."""
        return hashlib.sha256(self._claimed).hexdigest()

    @property
    def _claimed(self) -> bytes:
        return _claim(self.name, self.node_key.encode(), self.peer_key, self.coordinator)


def node_id_of(public_key_pem: bytes) -> int:
    """Flower's id of the node with this key, in [2, 2^63): the same at every start of the coordinator."""
    number = int.from_bytes(hashlib.sha256(public_key_pem).digest()[:8], "big") & ((1 << 63) - 1)
    return max(number, 2)  # 0 and 1 have a meaning in Flower


def public_key_pem(private_key: ec.EllipticCurvePrivateKey) -> bytes:
    """The bytes by which the key's holder is known."""
    return private_key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def load_node_public_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    """Read a node's public key. Raises ConfigError for another kind of key, and for another spelling of this one."""
    told = "node-key is no P-256 public key in PEM"
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{told}: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(told)
    # The id follows from the bytes: one key has one spelling.
    written = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    require(written == pem, f"{told} as OpenSSL writes it")
    return key


def load_certificate(pem: bytes, what: str) -> x509.Certificate:
    """The one certificate in `pem`. Raises ConfigError, with `what` it should be, for none and for several."""
    try:
        found = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigError(f"{what} holds no certificate in PEM: {error}") from error
    require(len(found) == 1, f"{what} holds {len(found)} certificates: give the authority's own alone")
    return found[0]


def grouped(fingerprint: str) -> str:
    """A fingerprint as it is read over the telephone: groups of four."""
    return " ".join(fingerprint[at : at + 4] for at in range(0, len(fingerprint), 4))


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` may be a node's."""
    require(
        _NAME.fullmatch(name) is not None,
        f"{name!r} cannot name a node: up to 63 of a-z, 0-9, '-' and '.', beginning with a letter or digit",
    )


def split_address(address: str, key: str = "address", *, dialled: bool = False) -> tuple[str, int]:
    """(host, port) of "HOST:PORT"; an IPv6 literal has brackets there and none in what is returned.

    key: for the message. dialled: an address to listen on, such as 0.0.0.0, will not do. Raises ConfigError.
    """
    told = f"{key} = {address!r}"
    require("://" not in address, f"{told}: leave out {address.partition('://')[0]}://, write HOST:PORT")
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    require(
        bracketed or address.count(":") < 2,
        f"{told}: an IPv6 literal stands in brackets, such as [::1]:9092",
    )
    require(bool(colon and host), f"{told}: write HOST:PORT, such as coordinator.example.org:9092")
    require(
        port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= _MAX_PORT,
        f"{told}: the port {port!r} is outside [1, {_MAX_PORT}]",
    )
    host = check_host(host[1:-1] if bracketed else host, key, six=bracketed)
    require(
        not dialled or host not in ("0.0.0.0", "::"),  # noqa: S104  # compared, not bound
        f"{told}: {host} is no place that a node can dial; give the name or address of this machine that nodes reach",
    )
    return host, int(port)


def check_host(host: str, key: str, *, six: bool | None = None) -> str:
    """A DNS name (in lower case) or an IP literal (as it is usually written). six: whether it must be IPv6; None: either.

    Raises ConfigError with `key` in its message.
    """
    told = f"{key}: {host!r}"
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:
        literal = None
    if literal is not None and "%" not in host:
        require(
            six in (None, literal.version == 6), f"{told}: only IPv6 literals stand in brackets, such as [::1]:9092"
        )
        return str(literal)
    require(not six, f"{told} is no IPv6 address")
    require(
        host.isascii(),
        f"{told} has letters outside ASCII: write it as DNS has it, beginning with xn--",
    )
    labels = host.split(".")
    require(
        len(host) <= _MAX_HOST and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdigit(),
        f"{told} is neither a DNS name nor an IP address",
    )
    return host.lower()


def _claim(name: str, node_key: bytes, peer_key: str, coordinator: str) -> bytes:
    return _packed("visard request 1", name.encode(), node_key, bytes.fromhex(peer_key), bytes.fromhex(coordinator))


def _packed(purpose: str, *parts: bytes) -> bytes:
    """Each part after its length: other parts never give the same."""
    return b"".join(len(part).to_bytes(8, "big") + part for part in (purpose.encode(), *parts))
