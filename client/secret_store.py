"""The peer key, and what a client keeps on disk between the messages of secure sums, encrypted under that key.

One file a run, replaced as a whole and flushed to the disk before an answer leaves: a kill at any moment leaves the state
before a message or after it. What is no longer needed is left out of the next version; how long the disk keeps the blocks
of the old one is the file system's matter. Nothing is kept in memory, so several processes may take turns.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from common.errors import PrivacyError
from common.files import write_atomically
from common.privacy.masks import KEY_BYTES, DealTerms, context, seal, unseal
from common.secure_messages import PAIR_BYTES

# The name of the peer key's file in an owner's state folder.
PEER_KEY, SECRETS = "peer.key", "secure-sum"
# Runs whose secrets are kept. Of older ones the counters remain.
RUNS_KEPT = 4
# The mask key and the seed of a round.
OWN_BYTES = 2 * KEY_BYTES
_VERSION = 1
_LENGTH_BYTES = 4


@dataclass
class Held:
    """A deal's secrets from round `kept_from` on; whatever belonged to earlier rounds is gone.

    place: this client's. own: mask key and seed of each round, zeros where they were used. dealers, transcript: empty
    until confirmed by this client; agreed: the others' confirmations were verified. mask_keys, shares: of each dealer and
    round, 32 and 66 bytes; before the confirmation of this client alone. unmasked: digest of the unmask request that was
    answered in round `kept_from`, or empty.
    """

    terms: DealTerms
    place: int
    kept_from: int
    own: bytes
    mask_keys: dict[int, bytes]
    shares: dict[int, bytes]
    dealers: tuple[int, ...] = ()
    transcript: bytes = b""
    agreed: bool = False
    unmasked: str = ""

    def use(self, server_round: int) -> tuple[X25519PrivateKey, bytes]:
        """This round's own mask key and seed, which are then gone, as is all of earlier rounds."""
        past = server_round - self.kept_from
        used = self.own[past * OWN_BYTES : (past + 1) * OWN_BYTES]
        self.own = bytes(OWN_BYTES) + self.own[(past + 1) * OWN_BYTES :]
        self.mask_keys = {place: keys[past * KEY_BYTES :] for place, keys in self.mask_keys.items()}
        self.shares = {place: shares[past * PAIR_BYTES :] for place, shares in self.shares.items()}
        self.kept_from, self.unmasked = server_round, ""
        return X25519PrivateKey.from_private_bytes(used[:KEY_BYTES]), used[KEY_BYTES:]

    @property
    def rounds_left(self) -> int:
        """Rounds from `kept_from` to the deal's last."""
        return self.terms.first_round + self.terms.rounds - self.kept_from


@dataclass
class RunState:
    """deal: number of the last deal of the run, 0 for none. masked_round: the last round that was masked. held: the last
    deal's secrets, unless forgotten."""

    run_id: str
    deal: int = 0
    masked_round: int = 0
    held: Held | None = field(default=None)

    def to_bytes(self) -> bytes:
        """A header in JSON after its length, and the secrets of `held` in a fixed order."""
        header: dict[str, object] = {"version": _VERSION, "deal": self.deal, "masked_round": self.masked_round}
        blobs: list[bytes] = []
        if (held := self.held) is not None:
            terms = {f.name: getattr(held.terms, f.name) for f in fields(DealTerms) if f.name != "peers"}
            header["held"] = {
                "terms": terms,
                "place": held.place,
                "kept_from": held.kept_from,
                "shares_of": list(held.shares),
                "dealers": list(held.dealers),
                "transcript": held.transcript.hex(),
                "agreed": held.agreed,
                "unmasked": held.unmasked,
                "peers": [peer.hex() for peer in held.terms.peers],
            }
            blobs = [held.own, *held.mask_keys.values(), *held.shares.values()]
        text = json.dumps(header).encode()
        return b"".join([len(text).to_bytes(_LENGTH_BYTES, "big"), text, *blobs])

    @classmethod
    def from_bytes(cls, run_id: str, content: bytes) -> "RunState":
        """The inverse of `to_bytes`. Raises ValueError, KeyError or TypeError for what it did not write."""
        begin = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "big")
        header = json.loads(content[_LENGTH_BYTES:begin])
        if header["version"] != _VERSION:
            raise ValueError(f"version {header['version']}, not {_VERSION}")
        state = cls(run_id, header["deal"], header["masked_round"])
        if "held" not in header:
            return state
        kept = header["held"]
        terms = DealTerms(**kept["terms"], peers=tuple(bytes.fromhex(peer) for peer in kept["peers"]))
        shares_of: list[int] = kept["shares_of"]
        held = state.held = Held(
            terms, kept["place"], kept["kept_from"], b"", {}, {}, tuple(kept["dealers"]), agreed=kept["agreed"]
        )
        held.transcript, held.unmasked = bytes.fromhex(kept["transcript"]), kept["unmasked"]
        rounds = held.rounds_left
        blobs = _Blobs(content, begin)
        held.own = blobs.take(rounds * OWN_BYTES)
        held.mask_keys = {place: blobs.take(rounds * KEY_BYTES) for place in shares_of}
        held.shares = {place: blobs.take(rounds * PAIR_BYTES) for place in shares_of}
        if blobs.at != len(content):
            raise ValueError("another length than its header says")
        return state


class _Blobs:
    def __init__(self, content: bytes, at: int) -> None:
        self._content, self.at = content, at

    def take(self, size: int) -> bytes:
        self.at += size
        return self._content[self.at - size : self.at]


class SecretStore:
    """The states of runs in `folder`, each encrypted and authenticated under the peer key."""

    def __init__(self, folder: Path, key: X25519PrivateKey) -> None:
        self._folder = folder
        self._key = key.private_bytes_raw()

    @contextmanager
    def opened(self, run_id: str) -> Iterator[RunState]:
        """A run's state, held against other processes until the end of the block.

        Raises PrivacyError where the disk refuses, here or within, or the state cannot be read.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (self._folder / "lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                for left in self._folder.glob(".*.tmp"):  # of a process that was killed: old secrets
                    left.unlink(missing_ok=True)
                yield self._load(run_id)
        except OSError as error:
            raise PrivacyError(
                f"the disk refuses the secrets of secure sums in {self._folder} ({error}): nothing was released. Make it "
                "writable, or make room, and go on"
            ) from error

    def save(self, state: RunState) -> None:
        """On the disk when this returns; call it within `opened`."""
        sealed = seal(self._key, state.to_bytes(), context("state", state.run_id))
        write_atomically(self._path(state.run_id), sealed, private=True)

    def forget_old_runs(self) -> None:
        """Keep the secrets of the RUNS_KEPT runs last written, and of the others the counters; call it within `opened`."""
        written = {path: path.stat().st_mtime_ns for path in self._folder.glob("*.run")}
        for path in sorted(written, key=written.__getitem__, reverse=True)[RUNS_KEPT:]:
            with suppress(PrivacyError):  # what cannot be read bars its own run alone
                state = self._load(path.stem)
                if state.held is not None:
                    state.held = None
                    self.save(state)
                    os.utime(path, ns=(written[path], written[path]))  # no newer than it was

    def _load(self, run_id: str) -> RunState:
        path = self._path(run_id)
        if not path.exists():
            return RunState(run_id)
        try:
            return RunState.from_bytes(run_id, unseal(self._key, path.read_bytes(), context("state", run_id)))
        except (ValueError, KeyError, TypeError) as error:
            raise PrivacyError(
                f"{path} cannot be read with this peer key ({error}): restore the key that wrote it, or remove the file and "
                "let the coordinator deal anew"
            ) from error

    def _path(self, run_id: str) -> Path:
        return self._folder / f"{run_id}.run"


def make_peer_key(path: Path) -> X25519PrivateKey:
    """Make the long-lived key by which the other clients know this one: 32 bytes, for the owner alone (0600).

    Raises PrivacyError where there is a key already, for a new one would be another client.
    """
    if path.exists():
        raise PrivacyError(f"{path} exists: use that peer key, or move it away first")
    key = X25519PrivateKey.generate()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, key.private_bytes_raw(), private=True)
    except OSError as error:
        raise PrivacyError(f"the disk refuses the peer key {path} ({error})") from error
    return key


def load_peer_key(path: Path) -> X25519PrivateKey:
    """Read a peer key. Raises PrivacyError where there is none, others may read it, or it is damaged."""
    try:
        content, mode = path.read_bytes(), path.stat().st_mode & 0o777
    except OSError as error:
        raise PrivacyError(
            f"the peer key {path} cannot be read ({error}): restore it, or make one with `visard client init --out ANOTHER.toml`"
        ) from error
    if mode & 0o077:
        raise PrivacyError(f"the peer key {path} has mode {mode:o} and others may read it: set it to 600")
    if len(content) != KEY_BYTES:
        raise PrivacyError(f"the peer key {path} has {len(content)} bytes, not {KEY_BYTES}: restore it from a copy")
    return X25519PrivateKey.from_private_bytes(content)
