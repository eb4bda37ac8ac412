"""A ledger's files: the chain of lines, its signing key and its head; locked, flushed, and whole after every crash.

    ledger.jsonl   append only, one signed record a line (`common.privacy.chain`)
    ledger.key     32 bytes, the Ed25519 key, for the owner alone; made before the first line
    ledger.head    two slots, each a signed head, written in turn after each line: whichever is further counts

An append is a line, its flush to the disk, then the head, then the acknowledgement. The head is written in place and not
flushed: a kill leaves it whole, and a power cut can only make it lag, never lead, which is allowed. So at opening

- fewer lines than the head says, or another line where it points: LedgerCorrupt, acknowledged lines are gone;
- a last line without its end, all that the head vouches for being there: it was never acknowledged, and is taken away;
- anything else that does not fit the chain: LedgerCorrupt.

The first line names the place where the ledger lies; at another place it is a copy, and refused (LedgerMoved).
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import LedgerCorrupt, LedgerMoved, LedgerUnwritable
from common.files import flush_folder
from common.privacy.chain import (
    GENESIS,
    HEAD_BYTES,
    Head,
    check_signature,
    line_hash,
    place_of,
    public_bytes,
    seal,
    unseal,
)

FILE_NAME, HEAD_NAME, KEY_NAME = "ledger.jsonl", "ledger.head", "ledger.key"
VERSION = 1
# One disk block each, so that writing one cannot harm the other.
_SLOT_BYTES = 4096
_RESTORE = (
    "this client trains no more until its owner restores the ledger from a copy that is not older than the last round"
)


class LedgerFile:
    """The chain in `directory`. `take_in` gets every record in order, also those that other processes wrote.

    key_path: the signing key's place, where it is not beside the ledger. adopt: accept a ledger that lies at another
    place than it says, or whose head is gone or unreadable; the caller must then append an `adopted` record.
    """

    def __init__(
        self,
        directory: Path,
        take_in: Callable[[dict[str, Any]], None],
        key_path: Path | None = None,
        *,
        adopt: bool = False,
    ) -> None:
        self.path = directory / FILE_NAME
        self._head_path = directory / HEAD_NAME
        self._key_path = key_path or directory / KEY_NAME
        self._take_in = take_in
        self._adopt = adopt
        self._key: Ed25519PrivateKey | None = None
        self._public_key = b""
        self._size = self._slot = 0
        self._digests: list[bytes] = []
        self._place: dict[str, Any] = {}
        self.headless = False  # adopted without a head to compare with
        self._damage: LedgerCorrupt | None = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the file against other processes, and take in what they wrote.

        Raises LedgerUnwritable where the disk refuses, here or within; what was not acknowledged has then not happened.
        """
        try:
            with self.path.open("a+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._file: FileIO = file
                self._catch_up()
                yield
        except OSError as error:
            raise LedgerUnwritable(
                f"the disk refuses the ledger in {self.path.parent} ({error}): nothing was released. Make it writable, or make "
                "room, and go on"
            ) from error

    def head(self) -> Head:
        """The signed head of all that was taken in; call it within `locked`."""
        return Head.sign(self._signing_key(), len(self._digests), self._digests[-1])

    @property
    def public_key(self) -> bytes:
        """The public key that names this ledger: 32 bytes."""
        return self._public_key

    @property
    def place(self) -> dict[str, Any]:
        """Where the file lies now; call it within `locked`."""
        return place_of(self.public_key, os.fstat(self._file.fileno()).st_ino)

    @property
    def moved(self) -> bool:
        """Whether the file lies elsewhere than its records say; call it within `locked`."""
        return self._place != self.place

    def holds(self, head: Head) -> bool:
        """Whether a head is on this chain."""
        return 1 <= head.count <= len(self._digests) and self._digests[head.count - 1] == head.digest

    def append(self, record: dict[str, Any]) -> None:
        """Write one record; on the disk when this returns. Call it within `locked`."""
        key = self._signing_key()
        previous = self._digests[-1] if self._digests else GENESIS
        line = seal(record, len(self._digests) + 1, previous, key)
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
            os.fsync(self._file.fileno())
        except OSError:
            # Should this fail too, the next opening takes the torn line away, or counts a whole one: never too little.
            with suppress(OSError):
                self._file.truncate(self._size)
            raise
        self._take(line[:-1], record)
        self._write_head()

    def _catch_up(self) -> None:
        if self._damage is not None:
            raise self._damage
        try:
            size = os.fstat(self._file.fileno()).st_size
            if size < self._size:
                raise LedgerCorrupt(f"{self.path} has shrunk from {self._size} to {size} bytes: {_RESTORE}")
            if size != self._size or not size:
                self._read_on()
        except LedgerCorrupt as error:
            self._damage = error  # what was taken in before it showed is not to be used
            raise
        if self.moved and not self._adopt:
            same = self._place["machine"] == self.place["machine"]
            raise LedgerMoved(
                f"{self.path} says that it lies {'in another file' if same else 'on another machine'}: it is a copy, and two ledgers "
                "for the same faces could spend the budget twice. Use the original. If it is gone for good, and this copy is not older "
                f"than its last round: visard ledger adopt {self.path.parent}"
            )

    def _read_on(self) -> None:
        self._file.seek(self._size)
        *lines, torn = self._file.readall().split(b"\n")
        if not lines and not self._digests:
            self._create()
            return
        self._public_key = public_bytes(self._signing_key())
        records, digests = self._follow(lines)
        head = self._read_head()
        vouched = 0 if head is None else head.count
        if head is not None and (head.count > len(digests) or digests[head.count - 1] != head.digest):
            raise LedgerCorrupt(
                f"{self.path} has {len(digests)} lines and its head vouches for {head.count}, the last of which is "
                f"{'missing' if head.count > len(digests) else 'another'}: {_RESTORE}"
            )
        for line, record in zip(lines, records, strict=True):
            with self._blame(len(self._digests) + 1):
                if len(self._digests) >= vouched:
                    check_signature(line, self.public_key)
                self._take(line, record)
        if torn:
            self._file.truncate(self._size)
            os.fsync(self._file.fileno())

    def _follow(self, lines: list[bytes]) -> tuple[list[dict[str, Any]], list[bytes]]:
        """The records in new lines, of which nothing is believed yet but that they follow each other; all lines'
        hashes."""
        records, digests = [], list(self._digests)
        for number, line in enumerate(lines, start=len(digests) + 1):
            with self._blame(number):
                record = unseal(line, number, digests[-1] if digests else GENESIS)
                if number == 1:
                    check_opening(record, self.public_key.hex())
            records.append(record)
            digests.append(line_hash(line))
        return records, digests

    @contextmanager
    def _blame(self, number: int) -> Iterator[None]:
        try:
            yield
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise LedgerCorrupt(f"line {number} of {self.path} is damaged ({error}): {_RESTORE}") from error

    def _take(self, line: bytes, record: dict[str, Any]) -> None:
        self._take_in(record)
        if record["type"] in ("opened", "adopted"):
            self._place = record["place"]
        self._digests.append(line_hash(line))
        self._size += len(line) + 1

    def _create(self) -> None:
        """Head, key, first line: in this order, so that a key without a head is never what a crash left."""
        head = self._head_path.read_bytes() if self._head_path.exists() else b""
        key = self._key_path.read_bytes() if self._key_path.exists() else b""
        if any(head) or (len(key) == 32 and not head):
            raise LedgerCorrupt(
                f"{self.path} is empty and {self._head_path if any(head) else self._key_path} says that there was a ledger (each "
                f"ledger has a key of its own): {_RESTORE}"
            )
        self._file.truncate(0)
        flush_folder(self.path.parent)
        if len(head) != 2 * _SLOT_BYTES:
            _write_new(self._head_path, bytes(2 * _SLOT_BYTES))
        if len(key) != 32:
            key = Ed25519PrivateKey.generate().private_bytes_raw()
            _write_new(self._key_path, key)
        self._public_key = public_bytes(self._signing_key())
        self.append({"type": "opened", "version": VERSION, "public_key": self.public_key.hex(), "place": self.place})

    def _signing_key(self) -> Ed25519PrivateKey:
        if self._key is None:
            try:
                self._key = Ed25519PrivateKey.from_private_bytes(self._key_path.read_bytes())
            except (FileNotFoundError, ValueError) as error:
                raise LedgerCorrupt(
                    f"{self._key_path} does not hold this ledger's key ({error}): {_RESTORE}"
                ) from error
        return self._key

    def _read_head(self) -> Head | None:
        """The further of the two slots; None where nothing was written yet, or where an owner adopts the ledger
        without."""
        content = self._head_path.read_bytes() if self._head_path.exists() else b""
        found = read_heads(content, self.public_key)
        if found:
            newest, head = max(found, key=lambda slot_head: slot_head[1].count)
            self._slot = 1 - newest
            return head
        if content != bytes(2 * _SLOT_BYTES) and not self._adopt:
            raise LedgerCorrupt(
                f"{self._head_path} is missing or damaged, so nobody can tell whether lines are missing from the ledger: restore it. If "
                f"it is gone for good, and no line is missing: visard ledger adopt {self.path.parent}"
            )
        self.headless = content != bytes(2 * _SLOT_BYTES)
        return None

    def _write_head(self) -> None:
        if self.headless:
            _write_new(self._head_path, bytes(2 * _SLOT_BYTES))
            self.headless = False
        with self._head_path.open("r+b", buffering=0) as file:
            file.seek(self._slot * _SLOT_BYTES)
            file.write(self.head().to_bytes())
        self._slot = 1 - self._slot


def check_opening(record: dict[str, Any], public_key: str) -> None:
    """Raises ValueError where a first record is not that of a ledger with this public key (hex)."""
    if record["type"] != "opened" or record["version"] != VERSION:
        raise ValueError(f"a ledger of version {VERSION} does not begin like this")
    if record["public_key"] != public_key:
        raise ValueError(f"it was opened with the key {record['public_key']}, and this is {public_key}")


def read_heads(content: bytes, public_key: bytes) -> list[tuple[int, Head]]:
    """The slots of a head file that hold a head signed by this ledger, and these heads."""
    found = []
    for slot in (0, 1):
        with suppress(ValueError):
            head = Head.from_bytes(content[slot * _SLOT_BYTES : slot * _SLOT_BYTES + HEAD_BYTES])
            if head.public_key == public_key:
                found.append((slot, head))
    return found


def _write_new(path: Path, content: bytes) -> None:
    """For the owner alone; its content and its name are on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(file, content)
        os.fsync(file)
    finally:
        os.close(file)
    flush_folder(path.parent)
