"""A coordinator that asks a client's half of the secure sum for more than it may: a typed error, and not one share."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import ConfigRecord

from client.secure_sum import SecureSum
from common.errors import PrivacyError, ProtocolError
from common.privacy.masks import agree, context, derive, digest, fingerprint, seal
from common.privacy.secret_sharing import split
from common.secure_messages import ConfirmRequest, DealRequest, MaskRequest, UnmaskRequest
from server.secure_sum import SumDeal
from tests.secure_cohort import Cohort, from_bytes, random_vectors, to_bytes
from tests.support import RUN_ID

VICTIM, OTHER_RUN, OWNERS_ROUNDS = 2, "e" * 32, 50
ALL = (1, 2, 3, 4, 5)
VECTOR = np.ones(4, np.uint32)
Request = DealRequest | ConfirmRequest | MaskRequest | UnmaskRequest


class Scene:
    """An honest session of five (threshold 4), the victim's folder kept after each step.

    Deal 1 serves rounds 1 to 3, of which 1 is summed and 2 masked and unmasked. Deal 2 is for rounds 4 to 6. In another run
    the same clients dealt too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cohort = cohort = Cohort(folder / "clients", 5, 4)
        vectors = random_vectors(ALL, 4)
        deal = cohort.deal()
        self.keep("dealt")
        self.deal, self.confirm = deal.request, deal.confirm_request(VICTIM)
        self.confirm_of_3 = deal.confirm_request(3)
        cohort.confirm(deal)
        self.keep("confirmed")
        self.mask, self.mask_of_3 = deal.mask_request(VICTIM, first=True), deal.mask_request(3, first=True)
        cohort.sum(deal, 1, vectors)
        self.keep("summed")
        for place in ALL:
            cohort.mask(deal, 2, place, vectors[place])
        self.keep("masked")
        self.unmask = UnmaskRequest(RUN_ID, 1, 2, (1, 2, 3, 5), (4,))
        cohort.clients[VICTIM].unmask(self.unmask)
        self.keep("unmasked")
        elsewhere = cohort.deal(cohort.request(run_id=OTHER_RUN))
        self.confirm_elsewhere = elsewhere.confirm_request(VICTIM)
        self.mask_elsewhere = cohort.confirm(elsewhere).mask_request(VICTIM, first=True)
        again = cohort.deal(cohort.request(2, 4, 3))
        self.confirm_again = again.confirm_request(VICTIM)
        self.keep("dealt again")
        self.mask_again = cohort.confirm(again).mask_request(VICTIM, first=True)
        self.keep("confirmed again")

    def keep(self, stage: str) -> None:
        shutil.copytree(self.folder / "clients" / str(VICTIM), self.folder / stage)

    def victim(self, stage: str, folder: Path, pinned: str = "") -> SecureSum:
        """The victim as it was then."""
        shutil.copytree(self.folder / stage, folder)
        key = self.cohort.keys[VICTIM]
        return SecureSum(folder, key, pinned or fingerprint(self.cohort.peers), max_rounds=OWNERS_ROUNDS)

    def forged(self, secret: bytes, sender: int) -> bytes:
        """A confirmation by someone who does not know the channel's secret."""
        return derive(secret, context("confirmation", b"", sender, VICTIM))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"))


@dataclasses.dataclass
class Ask:
    """One hostile message: what it is, but for some fields as they then stand on the wire."""

    message: Callable[[Scene], Request]
    wire: dict[str, Any] = dataclasses.field(default_factory=dict)
    stage: str = "confirmed again"
    server_round: int = 4
    run_id: str = RUN_ID
    only_check: bool = False

    def send(self, scene: Scene, victim: SecureSum) -> object:
        message = self.message(scene)
        record = message.to_record()
        fields = {**record[message.name], **self.wire}  # type: ignore[dict-item]
        record[message.name] = ConfigRecord({key: value for key, value in fields.items() if value is not None})  # type: ignore[arg-type]
        got = type(message).from_record(from_bytes(to_bytes(record)))
        if isinstance(got, DealRequest):
            return victim.deal(got)
        if isinstance(got, ConfirmRequest):
            return victim.confirm(got)
        if isinstance(got, UnmaskRequest):
            return victim.unmask(got)
        if self.only_check:
            return victim.check(self.run_id, self.server_round, got.deal, got.confirmations)
        return victim.mask(self.run_id, self.server_round, got.deal, got.confirmations, VECTOR)


def deal(stage: str = "confirmed again", **wire: Any) -> Ask:
    """Deal 3, which nobody has answered, but for these fields."""
    return Ask(lambda s: dataclasses.replace(s.deal, deal=3, first_round=7), wire, stage)


def confirm(change: Callable[[Scene], dict[str, Any]] = lambda _: {}, stage: str = "dealt", **wire: Any) -> Ask:
    """The confirmation of deal 1, but for what `change` says."""
    return Ask(lambda s: dataclasses.replace(s.confirm, **change(s)), wire, stage)


def mask(
    change: Callable[[Scene], dict[str, Any]] = lambda _: {},
    stage: str = "confirmed",
    server_round: int = 1,
    run_id: str = RUN_ID,
    **wire: Any,
) -> Ask:
    """A masked round of deal 1, but for what `change` says."""
    return Ask(lambda s: dataclasses.replace(s.mask, **change(s)), wire, stage, server_round, run_id)


def unmask(
    survivors: tuple[int, ...] = (1, 2, 3, 5), dropped: tuple[int, ...] = (4,), stage: str = "masked", **wire: Any
) -> Ask:
    """The request to unmask round 2 of deal 1, but for these; the honest one leaves 4 out."""
    return Ask(lambda s: s.unmask, {"survivors": list(survivors), "dropped": list(dropped)} | wire, stage)


def put(items: tuple[Any, ...], at: int, item: Any) -> tuple[Any, ...]:
    return (*items[:at], item, *items[at + 1 :])


def swapped(items: tuple[Any, ...], one: int, other: int) -> tuple[Any, ...]:
    return put(put(items, one, items[other]), other, items[one])


def invented(rounds: int = 3) -> bytes:
    return b"".join(X25519PrivateKey.generate().public_key().public_bytes_raw() for _ in range(rounds))


def flipped(data: bytes, at: int = 40) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


# Places in lists for the victim, which leave it out: of 1, 3, 4, 5.
HOSTILE: dict[str, Ask] = {
    # Dealing.
    "deal: an invented peer in the cohort": Ask(
        lambda s: dataclasses.replace(s.deal, deal=3, first_round=7, peers=tuple(sorted((*s.deal.peers[:4], key(9)))))
    ),
    "deal: one peer more": Ask(
        lambda s: dataclasses.replace(s.deal, deal=3, first_round=7, peers=tuple(sorted((*s.deal.peers, key(9)))))
    ),
    "deal: one peer less": Ask(
        lambda s: dataclasses.replace(s.deal, deal=3, first_round=7, peers=s.deal.peers[:4], threshold=3)
    ),
    "deal: one client alone": Ask(
        lambda s: s.deal, {"deal": 3, "first_round": 7, "peers": [key(1)], "threshold": 1, "colluders": 0}
    ),
    "deal: a peer twice": Ask(lambda s: s.deal, {"deal": 3, "peers": [key(1), key(2), key(2), key(3), key(4)]}),
    "deal: peers in another order": Ask(lambda s: s.deal, {"deal": 3, "peers": [key(2), key(1), key(3)]}),
    "deal: no peers": deal(peers=[]),
    "deal: 10 000 peers": deal(peers=[key(i) for i in range(10_000)], threshold=9999),
    "deal: peers of 31 bytes": deal(peers=[key(i)[1:] for i in range(5)]),
    "deal: peers that are numbers": deal(peers=[1, 2, 3, 4, 5]),
    "deal: peers in one piece": deal(peers=b"\0" * 160),
    "deal: a low threshold": deal(threshold=3),
    "deal: a threshold of 1": deal(threshold=1),
    "deal: a threshold of 0": deal(threshold=0),
    "deal: a threshold over the cohort": deal(threshold=6),
    "deal: no colluders": deal(colluders=0),
    "deal: more colluders than the threshold bears": deal(colluders=3),
    "deal: colluders below zero": deal(colluders=-9),
    "deal: no rounds": deal(rounds=0),
    "deal: more rounds than the owner allows": deal(rounds=OWNERS_ROUNDS + 1),
    "deal: 1e12 rounds": deal(rounds=10**12),
    "deal: round 0": deal(first_round=0),
    "deal: a round that was masked": Ask(lambda s: s.deal, {"deal": 3, "first_round": 2}),
    "deal: the last masked round once more": Ask(lambda s: s.deal, {"deal": 3, "first_round": 1}, "summed"),
    "deal: the same number again": deal(deal=2),
    "deal: an older number": deal(deal=1),
    "deal: number 0": deal(deal=0),
    "deal: a path for a run": deal(run_id="../../../../etc/cron.d/x12345678"),
    "deal: a run in capitals": deal(run_id="ABCDEF01" * 4),
    "deal: a number as text": deal(deal="3"),
    "deal: a number as a fraction": deal(deal=3.0),
    "deal: yes for a number": deal(rounds=True),
    "deal: a field missing": deal(colluders=None),
    "deal: a field of its own": deal(secrets=True),
    # Confirming.
    "confirm: without the victim": confirm(
        lambda s: {
            "dealers": (1, 3, 4, 5),
            "mask_keys": (*s.confirm.mask_keys[:1], *s.confirm.mask_keys[2:]),
            "sealed": s.confirm.sealed[:3],
        }
    ),
    "confirm: fewer dealers than the threshold": confirm(
        lambda s: {"dealers": (1, 2, 3), "mask_keys": s.confirm.mask_keys[:3], "sealed": s.confirm.sealed[:2]}
    ),
    "confirm: the victim and one other": confirm(
        lambda s: {"dealers": (1, 2), "mask_keys": s.confirm.mask_keys[:2], "sealed": s.confirm.sealed[:1]}
    ),
    "confirm: a stranger dealt": confirm(
        lambda s: {
            "dealers": (*ALL, 6),
            "mask_keys": (*s.confirm.mask_keys, invented()),
            "sealed": (*s.confirm.sealed, s.confirm.sealed[0]),
        }
    ),
    "confirm: a stranger in a dealer's place": confirm(lambda _: {"dealers": (1, 2, 3, 4, 6)}),
    "confirm: a dealer twice": confirm(dealers=[1, 2, 3, 3, 5]),
    "confirm: dealers in another order": confirm(dealers=[2, 1, 3, 4, 5]),
    "confirm: place 0": confirm(dealers=[0, 1, 2, 3, 4]),
    "confirm: invented mask keys": confirm(lambda s: {"mask_keys": put(s.confirm.mask_keys, 3, invented())}),
    "confirm: one round's mask key invented": confirm(
        lambda s: {"mask_keys": put(s.confirm.mask_keys, 0, s.confirm.mask_keys[0][:64] + invented(1))}
    ),
    "confirm: two dealers' mask keys swapped": confirm(lambda s: {"mask_keys": swapped(s.confirm.mask_keys, 2, 3)}),
    "confirm: mask keys of another deal": confirm(
        lambda s: {"mask_keys": put(s.confirm.mask_keys, 0, s.confirm_again.mask_keys[0])}
    ),
    "confirm: a dealer's rounds in another order": confirm(
        lambda s: {"mask_keys": put(s.confirm.mask_keys, 0, s.confirm.mask_keys[0][32:] + s.confirm.mask_keys[0][:32])}
    ),
    "confirm: other mask keys for the victim": confirm(
        lambda s: {"mask_keys": put(s.confirm.mask_keys, 1, invented())}
    ),
    "confirm: one dealer's mask keys for two": confirm(
        lambda s: {"mask_keys": put(s.confirm.mask_keys, 3, s.confirm.mask_keys[0])}
    ),
    "confirm: the victim's mask keys for another": confirm(
        lambda s: {"mask_keys": put(s.confirm.mask_keys, 3, s.confirm.mask_keys[1])}
    ),
    "confirm: mask keys of zeros": confirm(lambda s: {"mask_keys": put(s.confirm.mask_keys, 3, bytes(96))}),
    "confirm: mask keys for fewer rounds": confirm(
        lambda s: {
            "mask_keys": tuple(keys[:64] for keys in s.confirm.mask_keys),
            "sealed": tuple(x[:-66] for x in s.confirm.sealed),
        }
    ),
    "confirm: mask keys of 31 bytes": confirm(mask_keys=[bytes(31)] * 5),
    "confirm: mask keys for one dealer less": confirm(mask_keys=[bytes(96)] * 4),
    "confirm: a share that was changed": confirm(
        lambda s: {"sealed": put(s.confirm.sealed, 1, flipped(s.confirm.sealed[1]))}
    ),
    "confirm: a share under another salt": confirm(
        lambda s: {"sealed": put(s.confirm.sealed, 1, flipped(s.confirm.sealed[1], 0))}
    ),
    "confirm: two dealers' shares swapped": confirm(lambda s: {"sealed": swapped(s.confirm.sealed, 0, 3)}),
    "confirm: shares for another client": confirm(
        lambda s: {"sealed": put(s.confirm.sealed, 0, s.confirm_of_3.sealed[0])}
    ),
    "confirm: the victim's own shares sent back": confirm(
        lambda s: {"sealed": put(s.confirm.sealed, 1, s.confirm_of_3.sealed[1])}
    ),
    "confirm: shares of another deal": confirm(lambda s: {"sealed": s.confirm_again.sealed}),
    "confirm: all of another deal under this number": confirm(
        lambda s: {"mask_keys": s.confirm_again.mask_keys, "sealed": s.confirm_again.sealed}
    ),
    "confirm: shares of another run": confirm(lambda s: {"sealed": s.confirm_elsewhere.sealed}),
    "confirm: an older deal's, replayed": confirm(stage="dealt again"),
    "confirm: one share missing": confirm(lambda s: {}, sealed=[bytes(246)] * 3),
    "confirm: shares of no length": confirm(sealed=[b""] * 4),
    "confirm: a deal that was never made": confirm(lambda _: {"deal": 2}),
    "confirm: a run that was never dealt": confirm(lambda _: {"run_id": "a" * 32}),
    "confirm: other dealers a second time": confirm(
        lambda s: {"dealers": (1, 2, 3, 4), "mask_keys": s.confirm.mask_keys[:4], "sealed": s.confirm.sealed[:3]},
        stage="confirmed",
    ),
    "confirm: other keys a second time": confirm(
        lambda s: {"mask_keys": put(s.confirm.mask_keys, 3, invented())}, stage="confirmed"
    ),
    # Masking.
    "mask: without confirmations": mask(lambda _: {"confirmations": ()}),
    "mask: one confirmation missing": mask(lambda s: {"confirmations": s.mask.confirmations[:3]}),
    "mask: one confirmation too many": mask(lambda s: {"confirmations": (*s.mask.confirmations, bytes(32))}),
    "mask: one confirmation of zeros": mask(lambda s: {"confirmations": put(s.mask.confirmations, 2, bytes(32))}),
    "mask: one confirmation changed": mask(
        lambda s: {"confirmations": put(s.mask.confirmations, 0, flipped(s.mask.confirmations[0], 31))}
    ),
    "mask: one confirmation forged": mask(
        lambda s: {"confirmations": put(s.mask.confirmations, 0, s.forged(bytes(32), 1))}
    ),
    "mask: confirmations in another order": mask(lambda s: {"confirmations": swapped(s.mask.confirmations, 0, 1)}),
    "mask: confirmations for another client": mask(lambda s: {"confirmations": s.mask_of_3.confirmations}),
    "mask: the victim's own confirmation for one of it": mask(
        lambda s: {"confirmations": put(s.mask.confirmations, 1, s.mask_of_3.confirmations[1])}
    ),
    "mask: confirmations of another deal": mask(lambda s: {"confirmations": s.mask_again.confirmations}),
    "mask: confirmations of another run": mask(lambda s: {"confirmations": s.mask_elsewhere.confirmations}),
    "mask: confirmations of 31 bytes": mask(confirmations=[bytes(31)] * 4),
    "mask: false confirmations after true ones": mask(
        lambda s: {"confirmations": swapped(s.mask.confirmations, 0, 1)}, stage="summed", server_round=2
    ),
    "mask: before the victim confirmed": mask(stage="dealt"),
    "mask: before the victim confirmed, and without confirmations": mask(
        lambda _: {"confirmations": ()}, stage="dealt"
    ),
    "mask: before it confirmed the new deal": mask(lambda s: {"deal": 2}, stage="dealt again", server_round=4),
    "mask: the same round again": mask(stage="masked", server_round=2),
    "mask: an older round": mask(stage="masked", server_round=1),
    "mask: a round before the deal": mask(
        lambda s: {"deal": 2, "confirmations": s.mask_again.confirmations}, stage="confirmed again", server_round=3
    ),
    "mask: a round after the deal": mask(server_round=4),
    "mask: round 0": mask(server_round=0),
    "mask: a negative round": mask(server_round=-1),
    "mask: an older deal": mask(stage="confirmed again", server_round=3),
    "mask: a deal that was never made": mask(lambda _: {"deal": 7}),
    "mask: another run": mask(run_id="a" * 32),
    # Unmasking.
    "unmask: a client both survives and has dropped": unmask((1, 2, 3, 4, 5), (4,)),
    "unmask: everybody both": unmask(ALL, ALL),
    "unmask: the victim both": unmask((1, 2, 3, 5), (2, 4)),
    "unmask: fewer survivors than the threshold": unmask((1, 2, 3), (4, 5)),
    "unmask: the victim alone": unmask((2,), (1, 3, 4, 5)),
    "unmask: all but the victim dropped, in order": unmask((2,), (1, 3, 4, 5), stage="summed", server_round=1),
    "unmask: nobody survives": unmask((), ALL),
    "unmask: nobody at all": unmask((), ()),
    "unmask: the victim has dropped": unmask((1, 3, 4, 5), (2,)),
    "unmask: the victim is not named": unmask((1, 3, 4, 5), ()),
    "unmask: a dealer in neither": unmask((1, 2, 3, 5), ()),
    "unmask: a stranger survives": unmask((1, 2, 3, 4, 5, 6), ()),
    "unmask: a stranger has dropped": unmask(ALL, (6,)),
    "unmask: a stranger for a dealer": unmask((1, 2, 3, 6), (4,)),
    "unmask: place 0": unmask((0, 1, 2, 3), (4, 5)),
    "unmask: a survivor twice": unmask((1, 2, 2, 3), (4, 5)),
    "unmask: a dropped client twice": unmask((1, 2, 3, 5), (4, 4)),
    "unmask: places as text": Ask(lambda s: s.unmask, {"survivors": ["1", "2", "3", "5"]}, "masked"),
    "unmask: yes for a place": Ask(lambda s: s.unmask, {"survivors": [2, 3, 4, 5], "dropped": [True]}, "masked"),
    "unmask: places in another order": unmask((5, 3, 2, 1), (4,)),
    "unmask: a round that was not masked": unmask(server_round=3),
    "unmask: an older round": unmask(server_round=1),
    "unmask: a round of no deal": unmask(server_round=99),
    "unmask: before any round was masked": unmask(stage="confirmed"),
    "unmask: the first round of a deal before it was masked": unmask(stage="confirmed", server_round=1),
    "unmask: the first round of the next deal before it was masked": unmask(
        stage="confirmed again", deal=2, server_round=4
    ),
    "unmask: the last round masked, with the shares of the next deal": unmask(
        stage="confirmed again", deal=2, server_round=2
    ),
    "unmask: the next round, before it was masked, with others": unmask((1, 2, 3, 4), (5,), server_round=3),
    "unmask: before the deal was confirmed": unmask(stage="dealt", server_round=1),
    "unmask: a second time with others": unmask((1, 2, 3, 4), (5,), stage="unmasked"),
    "unmask: a second time with everybody": unmask(ALL, (), stage="unmasked"),
    "unmask: the round before, its answer given": unmask(ALL, (), stage="unmasked", server_round=1),
    "unmask: the sets of one round, the number of another": unmask(
        (1, 2, 3, 4), (5,), stage="unmasked", server_round=1
    ),
    "unmask: after the next deal": unmask(stage="dealt again"),
    "unmask: after the next deal, under its number": unmask(stage="dealt again", deal=2),
    "unmask: a deal that was never made": unmask(deal=9),
    "unmask: another run": unmask(run_id=OTHER_RUN),
    "unmask: a run that was never dealt": unmask(run_id="a" * 32),
    "unmask: a long-lived key": unmask(peer_keys=[4]),
    "unmask: both secrets by name": unmask(seeds=[4], mask_keys=[4]),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_nothing_comes_back_but_an_error(name: str, scene: Scene, tmp_path: Path) -> None:
    hostile = HOSTILE[name]
    victim = scene.victim(hostile.stage, tmp_path / "victim")
    before = contents(tmp_path / "victim")
    with pytest.raises((ProtocolError, PrivacyError)) as refusal:
        hostile.send(scene, victim)
    assert type(refusal.value) in (ProtocolError, PrivacyError)
    assert contents(tmp_path / "victim") == before, "nothing was kept of it either"


@pytest.mark.parametrize("name", [name for name in HOSTILE if name.startswith("mask: ")])
def test_a_round_that_cannot_be_masked_is_known_before_it_is_charged(name: str, scene: Scene, tmp_path: Path) -> None:
    hostile = HOSTILE[name]
    victim = scene.victim(hostile.stage, tmp_path / "victim")
    before = contents(tmp_path / "victim")
    checked = dataclasses.replace(hostile, only_check=True)
    if name in ("mask: the same round again", "mask: an older round"):  # the ledger has its answer, and sends it again
        checked.send(scene, victim)
    else:
        with pytest.raises((ProtocolError, PrivacyError)):
            checked.send(scene, victim)
    assert contents(tmp_path / "victim") == before


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "honest",
    [
        deal(),
        confirm(),
        mask(),
        mask(stage="summed", server_round=2),
        mask(stage="summed", server_round=3),
        unmask(),
        unmask(stage="unmasked"),
    ],
    ids=["deal", "confirm", "mask", "mask 2", "mask 3", "unmask", "unmask again"],
)
def test_what_the_hostile_messages_are_made_of_is_answered(honest: Ask, scene: Scene, tmp_path: Path) -> None:
    """Each of the above is refused for what was changed."""
    assert honest.send(scene, scene.victim(honest.stage, tmp_path / "victim")) is not None


def test_a_pinned_set_without_the_client_itself(scene: Scene, tmp_path: Path) -> None:
    others = tuple(sorted((*(peer for peer in scene.deal.peers if peer != scene.deal.peers[VICTIM - 1]), key(9))))
    victim = scene.victim("confirmed again", tmp_path / "victim", pinned=fingerprint(others))
    with pytest.raises(PrivacyError, match="not in the peer set"):
        victim.deal(dataclasses.replace(scene.deal, deal=3, first_round=7, peers=others))


def test_a_pinned_key_of_low_order_gets_no_shares(scene: Scene, tmp_path: Path) -> None:
    """What is sealed for such a peer everybody could read."""
    peers = tuple(sorted((*scene.deal.peers[1:], key(0))))
    assert scene.cohort.peers[VICTIM - 1] in peers
    victim = scene.victim("confirmed again", tmp_path / "victim", pinned=fingerprint(peers))
    before = contents(tmp_path / "victim")
    with pytest.raises(PrivacyError, match="low order"):
        victim.deal(dataclasses.replace(scene.deal, deal=3, first_round=7, peers=peers))
    assert contents(tmp_path / "victim") == before


def colluding(cohort: Cohort, request: DealRequest, mask_keys: bytes) -> tuple[SumDeal, Callable[[SumDeal], bytes]]:
    """A deal of three in which the last deals these mask keys, rightly sealed; and its confirmation for the first."""
    deal, colluder = SumDeal(request), cohort.clients[3]
    for place in (1, 2):
        deal.add_dealt(cohort.clients[place].deal(request))
    honest = colluder.deal(request)
    shares = split([bytes(32)] * 2 * request.rounds, 3, 3)
    sealed = tuple(
        seal(
            agree(cohort.keys[3], request.peers[to - 1]),
            shares[to - 1],
            context("shares", request.digest, 3, to, digest("mask keys", mask_keys)),
        )
        for to in (1, 2)
    )
    deal.add_dealt(dataclasses.replace(honest, mask_keys=mask_keys, sealed=sealed))
    deal.close_dealing()
    channel = agree(cohort.keys[3], request.peers[0])
    return deal, lambda seen: derive(channel, context("confirmation", seen.transcript, 3, 1))


def test_a_dealer_s_mask_key_of_low_order_masks_nothing(tmp_path: Path) -> None:
    """A colluder deals it; every client that would mask with it refuses the round."""
    cohort = Cohort(tmp_path, 3, 3)
    deal, confirmation = colluding(cohort, cohort.request(rounds=1), bytes(32))
    cohort.clients[1].confirm(deal.confirm_request(1))
    theirs = cohort.clients[2].confirm(deal.confirm_request(2))
    before = contents(tmp_path / "1")
    with pytest.raises(PrivacyError, match="low order"):
        cohort.clients[1].mask(RUN_ID, 1, 1, (theirs.tags[0], confirmation(deal)), VECTOR)
    assert contents(tmp_path / "1") == before


def test_a_dealer_s_mask_keys_serve_one_round_each(tmp_path: Path) -> None:
    cohort = Cohort(tmp_path, 3, 3)
    deal, confirmation = colluding(cohort, cohort.request(rounds=2), 2 * invented(1))
    with pytest.raises(PrivacyError, match="dealt twice"):
        cohort.clients[1].confirm(deal.confirm_request(1))
    deal, confirmation = colluding(cohort, cohort.request(2, rounds=2), invented(2))
    cohort.clients[1].confirm(deal.confirm_request(1))
    theirs = cohort.clients[2].confirm(deal.confirm_request(2))
    masked = cohort.clients[1].mask(RUN_ID, 1, 2, (theirs.tags[0], confirmation(deal)), VECTOR)
    assert masked.shape == VECTOR.shape, "two different keys are fine"


def test_two_views_of_who_dealt_are_not_masked(tmp_path: Path) -> None:
    """Some are told that all five dealt, others that four did: whoever is told one thing lacks the others' confirmation."""
    cohort = Cohort(tmp_path, 5, 4)
    deal = cohort.deal()
    asked = {place: deal.confirm_request(place) for place in ALL}
    fewer = {
        place: dataclasses.replace(
            asked[place], dealers=ALL[:4], mask_keys=asked[place].mask_keys[:4], sealed=asked[place].sealed[:3]
        )
        for place in (1, 2)
    }
    tags = {
        place: dict(_addressed(place, cohort.clients[place].confirm(fewer.get(place, asked[place])))) for place in ALL
    }
    for place, told in ((1, ALL[:4]), (3, ALL)):
        confirmations = [tags[other][place] for other in told if other != place]
        with pytest.raises(PrivacyError, match="has not confirmed"):
            cohort.clients[place].mask(RUN_ID, 1, 1, confirmations, VECTOR)
    with pytest.raises(PrivacyError, match="with other dealers"):
        cohort.clients[1].confirm(asked[1])


def _addressed(place: int, answer: Any) -> list[tuple[int, bytes]]:
    others = [other for other in ALL if other != place]
    return list(zip(others, answer.tags, strict=False))


@pytest.mark.parametrize(
    "vector",
    [np.ones(4), np.ones(4, np.int32), np.ones(4, np.uint64), np.ones((2, 2), np.uint32), np.ones(0, np.uint32)],
    ids=["floats", "signed", "wide", "two dimensions", "nothing"],
)
def test_only_words_are_masked(vector: np.ndarray, scene: Scene, tmp_path: Path) -> None:
    victim = scene.victim("confirmed", tmp_path / "victim")
    with pytest.raises(ProtocolError, match="want uint32"):
        victim.mask(RUN_ID, 1, 1, scene.mask.confirmations, vector)
    assert victim.mask(RUN_ID, 1, 1, scene.mask.confirmations, VECTOR).shape == (4,), "the round is not lost"
