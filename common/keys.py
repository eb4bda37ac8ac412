"""Secret keys on disk: PEM (PKCS8) without a passphrase, in files that only their owner can read."""

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from common.errors import ConfigError
from common.files import write_atomically

# Mode bits that a key's file must not have.
OWNER_ALONE, NOT_EVERYBODY = 0o077, 0o007


def write_key(path: Path, key: PrivateKeyTypes) -> None:
    """Write it for the owner alone (0600). Raises OSError."""
    content = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_atomically(path, content, private=True)


def load_key(path: Path, *, refused_mode: int = OWNER_ALONE) -> PrivateKeyTypes:
    """Read a secret key. Raises ConfigError where it is missing, damaged or encrypted, or its mode has a refused bit."""
    try:
        content, mode = path.read_bytes(), path.stat().st_mode & 0o777
    except OSError as error:
        raise ConfigError(
            f"cannot read the secret key {path} ({error.strerror}): restore it from a copy, or correct the path"
        ) from error
    try:
        key = serialization.load_pem_private_key(content, None)
    except TypeError:
        raise ConfigError(
            f"the secret key {path} is encrypted: store it without a passphrase, for no one is there to type it"
        ) from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} holds no secret key in PEM ({error}): restore it from a copy") from error
    if mode & refused_mode:
        raise ConfigError(f"the secret key {path} has mode {mode:o} and others may read it: set it to 600")
    return key
