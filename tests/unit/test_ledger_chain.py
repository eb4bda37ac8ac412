"""Every flipped bit and every truncation is refused, or nothing that was acknowledged is lost by it."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from random import Random

import pytest

from common.errors import LedgerCorrupt, LedgerMoved, PrivacyError
from common.privacy import chain
from common.privacy.ledger import Ledger, adopt_ledger
from tests.unit.test_ledger import RUN, charge, fill, kinds, lines, open_ledger

FILES = ("ledger.jsonl", "ledger.head", "ledger.key", "released.bin")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger of 50 records, the last a charge, all acknowledged."""
    folder = tmp_path_factory.mktemp("fifty")
    fill(folder, 25)
    assert kinds(folder) == ["opened", *["charged", "released"] * 24, "charged"]
    return folder


def put(folder: Path, name: str, content: bytes) -> None:
    """In place: the same file, as the place in the ledger asks."""
    with (folder / name).open("r+b") as file:
        file.truncate(0)
        file.write(content)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def flips(content: bytes, bits: Iterable[int]) -> Iterable[bytes]:
    for bit in bits:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


def assert_refused(folder: Path, damages: Iterable[bytes]) -> int:
    path, found = folder / "ledger.jsonl", 0
    before = path.read_bytes()
    try:
        for damaged in damages:
            put(folder, "ledger.jsonl", damaged)
            with pytest.raises(LedgerCorrupt):
                open_ledger(folder)
            assert path.read_bytes() == damaged
            found += 1
    finally:
        put(folder, "ledger.jsonl", before)
    open_ledger(folder)
    return found


def test_a_sample_of_flipped_bits_is_refused(whole: Path) -> None:
    content = (whole / "ledger.jsonl").read_bytes()
    size, ends = 8 * len(content), [i for i, byte in enumerate(content) if byte == ord("\n")]
    bits = Random(0).sample(range(size), 400)
    bits += [8 * at + bit for at in (ends[-1], ends[-2], 0) for bit in range(8)]
    bits += Random(1).sample(range(8 * ends[-2], size), 150)
    assert assert_refused(whole, flips(content, bits)) == len(bits)


@pytest.mark.slow
@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_is_refused(whole: Path, bit: int) -> None:
    content = (whole / "ledger.jsonl").read_bytes()
    bits = range(bit, 8 * len(content), 8)
    assert assert_refused(whole, flips(content, bits)) == len(bits)


def test_a_sample_of_truncations_is_refused(whole: Path) -> None:
    content = (whole / "ledger.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    lengths = {*ends[:-1], *(end - 1 for end in ends), 0, *Random(0).sample(range(len(content)), 200)}
    assert assert_refused(whole, (content[:length] for length in lengths)) == len(lengths)


@pytest.mark.slow
def test_every_truncation_is_refused(whole: Path) -> None:
    content = (whole / "ledger.jsonl").read_bytes()
    assert assert_refused(whole, (content[:length] for length in range(len(content)))) == len(content)


def test_lines_cannot_be_dropped_swapped_repeated_or_put_in(whole: Path, tmp_path: Path) -> None:
    content = (whole / "ledger.jsonl").read_bytes()
    parts = content.splitlines(keepends=True)
    fill(tmp_path, 25)  # another owner's, of the same length
    other = (tmp_path / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    junk = [
        b"\n",
        b"{}\n",
        b"[]\n",
        b"null\n",
        b"17\n",
        b'"charged"\n',
        b"\x00\x00\n",
        b"\xff\n",
        b"[" * 100_000 + b"\n",
    ]
    damages = [b"".join(other), content + other[-1], b"".join([*other[:-1], parts[-1]])]
    for at in (0, 1, 30, 49):
        damages += [b"".join([*parts[:at], *new, *parts[at + 1 :]]) for new in ([], [other[at]], [parts[at - 1]])]
        damages += [b"".join([*parts[:at], text, *parts[at + 1 :]]) for text in junk]
        damages += [b"".join([*parts[:at], text, *parts[at:]]) for text in (*junk, parts[at])]
        damages += [b"".join([*parts[:at], parts[at].replace(b": ", b":  ", 1), *parts[at + 1 :]])]
    assert_refused(whole, damages)


def crashed_after_the_line(folder: Path) -> tuple[bytes, bytes]:
    """The ledger as a kill between line and head leaves it: whole content, and the content that the head vouches for."""
    ledger = fill(folder, 25)
    head, before = (folder / "ledger.head").read_bytes(), (folder / "ledger.jsonl").read_bytes()
    charge(ledger, 26)
    put(folder, "ledger.head", head)
    return (folder / "ledger.jsonl").read_bytes(), before


def test_what_was_never_acknowledged_is_taken_away_wherever_it_tore(tmp_path: Path) -> None:
    after, before = crashed_after_the_line(tmp_path)
    head = (tmp_path / "ledger.head").read_bytes()
    for length in range(len(before), len(after) + 1, 3):
        put(tmp_path, "ledger.jsonl", after[:length])
        put(tmp_path, "ledger.head", head)
        assert len(open_ledger(tmp_path).releases) == 25
        assert (tmp_path / "ledger.jsonl").read_bytes() == before
    put(tmp_path, "ledger.jsonl", after)  # a whole line counts, acknowledged or not
    ledger = open_ledger(tmp_path)
    assert len(ledger.releases) == 26
    assert charge(ledger, 26) is None
    assert charge(ledger, 27) is None
    assert [record["number"] for record in lines(tmp_path)] == list(range(1, 53))
    open_ledger(tmp_path)


def test_bits_flipped_after_the_head_are_found_by_the_signature(tmp_path: Path) -> None:
    after, before = crashed_after_the_line(tmp_path)
    head = (tmp_path / "ledger.head").read_bytes()
    line = after[len(before) :]
    for damaged in flips(line, Random(0).sample(range(8 * len(line) - 8), 200)):
        put(tmp_path, "ledger.jsonl", before + damaged)
        put(tmp_path, "ledger.head", head)
        with pytest.raises(LedgerCorrupt):
            open_ledger(tmp_path)


@pytest.mark.parametrize("name", ["ledger.head", "ledger.key", "released.bin"])
def test_bits_flipped_in_the_files_beside_it(whole: Path, name: str) -> None:
    before = contents(whole)
    used = [bit for bit in range(8 * len(before[name])) if name != "ledger.head" or bit // 8 % 4096 < chain.HEAD_BYTES]
    for damaged in flips(before[name], Random(0).sample(used, min(len(used), 150))):
        put(whole, name, damaged)
        if name == "ledger.key":
            with pytest.raises(LedgerCorrupt):
                open_ledger(whole)
            continue
        ledger = open_ledger(whole)  # the other slot, one line behind, vouches for the rest
        assert len(ledger.releases) == 25
        if name == "released.bin":
            with pytest.raises(PrivacyError, match="no longer kept"):
                charge(ledger, 24)
    put(whole, name, before[name])
    assert contents(whole) == before


@pytest.mark.parametrize("missing", ["ledger.head", "ledger.key", "ledger.jsonl"])
def test_a_missing_file_is_no_fresh_start(tmp_path: Path, missing: str) -> None:
    fill(tmp_path)
    (tmp_path / missing).unlink()
    for _ in range(2):
        with pytest.raises(LedgerCorrupt):
            open_ledger(tmp_path)
    # What is left of it does not begin a new ledger either.
    if missing != "ledger.head":
        (tmp_path / "ledger.key").unlink(missing_ok=True)
        (tmp_path / "ledger.jsonl").unlink(missing_ok=True)
        with pytest.raises(LedgerCorrupt):
            open_ledger(tmp_path)


def test_a_crash_while_a_ledger_is_made_leaves_one_that_can_be_made(tmp_path: Path) -> None:
    fill(tmp_path / "whole", 1)
    key, first = (tmp_path / "whole" / "ledger.key").read_bytes(), (tmp_path / "whole" / "ledger.jsonl").read_bytes()
    empty_head = bytes(8192)
    for number, found in enumerate(
        [{}, {"head": b""}, {"head": bytes(100)}, {"head": empty_head}, {"head": empty_head, "key": b""}]
        + [{"head": empty_head, "key": key[:17]}, {"head": empty_head, "key": key}]
        + [{"head": empty_head, "key": key, "jsonl": first[:length]} for length in (1, 100)]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "ledger.jsonl").write_bytes(b"")
        for name, content in found.items():
            (folder / f"ledger.{name}").write_bytes(content)
        assert len(fill(folder).releases) == len(open_ledger(folder).releases) == 3
    assert (folder / "ledger.key").read_bytes() == key


def test_the_key_is_for_the_owner_alone_and_may_lie_elsewhere(tmp_path: Path) -> None:
    fill(tmp_path / "here")
    assert (tmp_path / "here" / "ledger.key").stat().st_mode & 0o077 == 0
    key = tmp_path / "keys" / "faces.key"

    def opened(folder: str) -> Ledger:
        return Ledger(tmp_path / folder, max_epsilon=10.0, delta=1e-5, key_path=key)

    charge(opened("there"), 1)
    assert key.stat().st_mode & 0o077 == 0
    assert not (tmp_path / "there" / "ledger.key").exists()
    assert len(opened("there").releases) == 1
    with pytest.raises(LedgerCorrupt, match=r"ledger\.key does not hold"):
        open_ledger(tmp_path / "there")
    with pytest.raises(LedgerCorrupt, match="a key of its own"):
        opened("another")


def test_a_copy_is_refused_until_it_is_adopted(tmp_path: Path) -> None:
    ledger = fill(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for _ in range(2):
        with pytest.raises(LedgerMoved, match=r"visard ledger adopt .*two"):
            open_ledger(tmp_path / "two")
    assert charge(ledger, 4) is None  # the original goes on
    assert adopt_ledger(tmp_path / "two")
    assert not adopt_ledger(tmp_path / "two")
    copy = open_ledger(tmp_path / "two")
    assert copy.epsilon < ledger.epsilon
    assert kinds(tmp_path / "two")[-1] == "adopted"
    assert charge(copy, 2) == b"reply 2"
    assert charge(copy, 4) is None
    # A renamed folder is the same ledger.
    (tmp_path / "two").rename(tmp_path / "three")
    assert len(open_ledger(tmp_path / "three").releases) == 4


def test_another_machine_is_another_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = tmp_path / "machine-id"
    monkeypatch.setattr(chain, "_MACHINE_ID", machine)
    machine.write_text("0123456789abcdef" * 2 + "\n")
    fill(tmp_path / "ledger")
    assert "0123456789abcdef" not in (tmp_path / "ledger" / "ledger.jsonl").read_text()
    open_ledger(tmp_path / "ledger")
    for other in ("f" * 32, "uninitialized", ""):
        machine.write_text(other)
        with pytest.raises(LedgerMoved, match="on another machine"):
            open_ledger(tmp_path / "ledger")
    machine.unlink()
    assert adopt_ledger(tmp_path / "ledger")  # a machine without an id is told by the file alone
    open_ledger(tmp_path / "ledger")
    assert lines(tmp_path / "ledger")[-1]["place"]["machine"] == ""


def test_adopting_mends_a_lost_head_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "ledger.head").unlink()
    with pytest.raises(LedgerCorrupt, match="visard ledger adopt"):
        open_ledger(tmp_path)
    assert adopt_ledger(tmp_path)
    assert len(open_ledger(tmp_path).releases) == 3
    put(tmp_path, "ledger.head", b"\x01" * 8192)
    assert adopt_ledger(tmp_path)
    content = (tmp_path / "ledger.jsonl").read_bytes()
    for damaged in (b"".join(content.splitlines(keepends=True)[:-1]), content.replace(b'"steps": 1', b'"steps": 2', 1)):
        put(tmp_path, "ledger.jsonl", damaged)
        with pytest.raises(LedgerCorrupt):
            adopt_ledger(tmp_path)
    put(tmp_path, "ledger.jsonl", content)
    with pytest.raises(LedgerCorrupt, match="nothing to adopt"):
        adopt_ledger(tmp_path / "nowhere")
    assert open_ledger(tmp_path).charge(RUN, 9, open_ledger(tmp_path).releases[0], [], "x") is None
