"""A coordinator that asks for more than a secure sum gives it: an error, no share, no vector, no charge, and no face read.

All through the real ClientApp of an owner with the default policy, but for what it must say of its peers.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

import client.app
from client.app import create_app
from client.policy import OwnerPolicy
from client.secret_store import make_peer_key
from client.secure_round import secure_sum
from common.fields import Scalar
from common.messages import DiscriminatorUpdate, RoundInstructions
from common.models.discriminators import discriminator_of
from common.models.flat import get_flat
from common.privacy.ledger import Ledger
from common.privacy.masks import fingerprint
from common.secure_messages import (
    ConfirmAnswer,
    DealAnswer,
    DealRequest,
    KeyAnswer,
    KeyRequest,
    MaskRequest,
    UnmaskAnswer,
    UnmaskRequest,
    lattice_of,
)
from server.secure_sum import MaskedRound, SumDeal
from simulations.engine import InProcessGrid
from tests.secure_cohort import IN_MEMORY
from tests.support import RUN_ID, gradient_instructions, node_configs, random_faces, tiny_config

CONFIG = tiny_config(
    privacy_model="distributed", num_clients=5, num_rounds=4, moment_rounds=0, discriminator_width=1, survivors=4
)
WEIGHTS = get_flat(discriminator_of(CONFIG.model))
VICTIM, OTHER_RUN = 2, "e" * 32
STAGES = ("new", "dealt", "confirmed", "masked", "opened")


class Scene:
    """Five real owners, honestly led to a stage: keys dealt for rounds 1 to 3, confirmed, round 1 masked, and opened."""

    def __init__(self, folder: Path, stage: str) -> None:
        self.state_dirs = [folder / str(number) for number in range(5)]
        keys = [make_peer_key(state / "peer.key").public_key().public_bytes_raw() for state in self.state_dirs]
        self.peers = tuple(sorted(keys))
        self.place = self.peers.index(keys[0]) + 1
        self.node = {self.peers.index(key) + 1: node for node, key in enumerate(keys, VICTIM)}
        self.others = [place for place in self.node if place != self.place]
        self.configs: list[dict[str, Scalar]] = [
            {
                "data": f"procedural:persons=6,images=2,first={6 * number}",
                "state-dir": str(state),
                "max-epsilon": 10.0,
                "allowed-privacy-models": "distributed",
                "peers": fingerprint(keys),
                "max-deal-rounds": 50,
            }
            for number, state in enumerate(self.state_dirs)
        ]
        self.deal = SumDeal(DealRequest(RUN_ID, 1, 1, 3, self.peers, 4, 1))
        for step in STAGES[1 : STAGES.index(stage) + 1]:
            getattr(self, f"_{step}")()

    def ask(self, content: RecordDict, node: int = VICTIM, **policy: Scalar) -> Message:
        """What the real ClientApp answers, its policy as it is but for these keys; None leaves one out."""
        configs = [dict(config) for config in self.configs]
        configs[node - VICTIM] |= policy
        configs[node - VICTIM] = {key: value for key, value in configs[node - VICTIM].items() if value is not None}
        grid = InProcessGrid(create_app(), configs)
        (reply,) = grid.send_and_receive([Message(content, node, "train", ttl=60.0, group_id="1")])
        return reply

    def files(self) -> dict[str, bytes]:
        """All that the victim keeps, but for the empty file that is its lock."""
        state = self.state_dirs[0]
        found = {str(path.relative_to(state)): path for path in state.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in found.items() if name != "secure-sum/lock"}

    def masked(self, server_round: int = 1, **changes: Any) -> RecordDict:
        """The victim's masked round, with the instructions' fields changed; `privacy__peers` is that of a section."""
        record = honest(server_round).to_record()
        scalars = {**record["instructions"], **{key.replace("__", "."): value for key, value in changes.items()}}  # type: ignore[dict-item]
        record["instructions"] = ConfigRecord(scalars)
        return RecordDict({**record, **self.beside().to_record()})

    def beside(self, place: int | None = None) -> MaskRequest:
        return self.deal.mask_request(place or self.place, first=True)

    def request(self, survivors: tuple[int, ...] | None = None, dropped: tuple[int, ...] = ()) -> UnmaskRequest:
        everybody = tuple(sorted(self.node))
        return UnmaskRequest(RUN_ID, 1, 1, everybody if survivors is None else tuple(sorted(survivors)), dropped)

    def _dealt(self) -> None:
        for node in self.node.values():
            self.deal.add_dealt(DealAnswer.from_record(self.ask(self.deal.request.to_record(), node).content))
        self.deal.close_dealing()
        self.confirmation = self.deal.confirm_request(self.place)

    def _confirmed(self) -> None:
        for place, node in self.node.items():
            reply = self.ask(self.deal.confirm_request(place).to_record(), node)
            self.deal.add_confirmed(ConfirmAnswer.from_record(reply.content))
        self.deal.close_confirming()

    def _masked(self) -> None:
        reply = self.ask(self.masked())
        assert DiscriminatorUpdate.from_record(reply.content, honest(), len(WEIGHTS)).place == self.place

    def _opened(self) -> None:
        UnmaskAnswer.from_record(self.ask(self.request().to_record()).content)


def honest(server_round: int = 1) -> RoundInstructions:
    return gradient_instructions(CONFIG, WEIGHTS, server_round)


@pytest.fixture(scope="module")
def scenes() -> Iterator[Callable[[str], Scene]]:
    """The scene at a stage, made once: what is refused leaves no trace in it, as each test sees for itself."""
    with ExitStack() as stack:

        @functools.cache
        def scene(stage: str) -> Scene:
            return Scene(Path(stack.enter_context(tempfile.TemporaryDirectory(dir=IN_MEMORY))), stage)

        yield scene


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that were opened: the real door, and a note of who went through."""
    opened: list[str] = []
    real = client.app.load_faces

    def noting(source: Any, *given: Any, **named: Any) -> Any:
        opened.append(source.data)
        return real(source, *given, **named)

    monkeypatch.setattr(client.app, "load_faces", noting)
    client.app.open_faces.cache_clear()
    return opened


@dataclasses.dataclass
class Ask:
    """A hostile message at a stage, to an owner whose policy says this."""

    stage: str
    content: Callable[[Scene], RecordDict]
    policy: dict[str, Any] = dataclasses.field(default_factory=dict)


def wire(record: RecordDict, **fields: Any) -> RecordDict:
    """A message of one record, with these fields as they stand on the wire; None leaves one out."""
    ((name, scalars),) = record.items()
    kept = {key: value for key, value in {**scalars, **fields}.items() if value is not None}  # type: ignore[dict-item]
    return RecordDict({name: ConfigRecord(kept)})


def deal(stage: str = "new", policy: dict[str, Any] | None = None, **fields: Any) -> Ask:
    """An honest deal 2 for rounds 2 to 4, but for these fields; a callable gets the scene."""

    def content(scene: Scene) -> RecordDict:
        found = {key: value(scene) if callable(value) else value for key, value in fields.items()}
        return wire(DealRequest(RUN_ID, 2, 2, 3, scene.peers, 4, 1).to_record(), **found)

    return Ask(stage, content, policy or {})


def confirm(change: Callable[[Scene], dict[str, Any]], stage: str = "dealt") -> Ask:
    return Ask(stage, lambda scene: wire(scene.confirmation.to_record(), **change(scene)))


def masked(stage: str = "confirmed", policy: dict[str, Any] | None = None, **changes: Any) -> Ask:
    return Ask(stage, lambda scene: scene.masked(**changes), policy or {})


def beside(stage: str = "confirmed", **fields: Any) -> Ask:
    """A masked round whose record beside the instructions has these fields; a callable gets the scene."""

    def content(scene: Scene) -> RecordDict:
        found = {key: value(scene) if callable(value) else value for key, value in fields.items()}
        return RecordDict({**scene.masked(), **wire(scene.beside().to_record(), **found)})

    return Ask(stage, content)


def unmask(change: Callable[[Scene], dict[str, Any]], stage: str = "masked") -> Ask:
    return Ask(stage, lambda scene: wire(scene.request().to_record(), **change(scene)))


def both(stage: str, *contents: Callable[[Scene], RecordDict]) -> Ask:
    return Ask(stage, lambda scene: RecordDict({k: v for content in contents for k, v in content(scene).items()}))


def with_peer(scene: Scene, instead_of: bytes | None = None) -> list[bytes]:
    invented = X25519PrivateKey.generate().public_key().public_bytes_raw()
    return sorted([*(peer for peer in scene.peers if peer != instead_of), invented])


def moved(items: tuple[bytes, ...], one: int, other: int) -> list[bytes]:
    found = list(items)
    found[one], found[other] = found[other], found[one]
    return found


def keys_of(scene: Scene, place: int, keys: bytes) -> dict[str, Any]:
    found = list(scene.confirmation.mask_keys)
    found[place - 1] = keys
    return {"mask_keys": found}


def invented_keys(rounds: int = 3) -> bytes:
    return b"".join(X25519PrivateKey.generate().public_key().public_bytes_raw() for _ in range(rounds))


def flipped(content: bytes) -> bytes:
    return bytes([content[0] ^ 1]) + content[1:]


def key_request(**fields: Any) -> RecordDict:
    return wire(KeyRequest(RUN_ID).to_record(), **fields)


def a_deal(scene: Scene) -> RecordDict:
    return deal().content(scene)


HOSTILE: dict[str, Ask] = {
    "a peer nobody knows": deal(peers=lambda s: with_peer(s, s.peers[s.others[0] - 1])),
    "one more peer": deal(peers=with_peer),
    "a peer too few": deal(peers=lambda s: [peer for peer in s.peers if peer != s.peers[s.others[0] - 1]]),
    "without this client": deal(peers=lambda s: with_peer(s, s.peers[s.place - 1])),
    "a peer twice": deal(peers=lambda s: sorted([*s.peers[1:], s.peers[-1]])),
    "peers out of order": deal(peers=lambda s: list(reversed(s.peers))),
    "no peers": deal(peers=[]),
    "a threshold that opens both secrets": deal(threshold=3),
    "a threshold of nobody": deal(threshold=0),
    "a threshold over the peers": deal(threshold=6),
    "no colluders": deal(colluders=0),
    "colluders that open a sum": deal(colluders=4),
    "fewer colluders than the owner fears": deal(policy={"min-colluders": 2}),
    "fewer noise shares than the owner wants": deal(policy={"min-noise-shares": 4}),
    "fewer peers than the owner wants": deal(policy={"min-cohort": 6}),
    "more rounds than the owner keeps": deal(rounds=51),
    "a million rounds": deal(rounds=10**6),
    "no rounds": deal(rounds=0),
    "rounds to the end of time": deal(first_round=10**8),
    "a deal without a number": deal(deal=0),
    "a deal from round 0": deal(first_round=0),
    "a run with a path": deal(run_id="../../../../../../etc/passwd0000"),
    "a deal and a policy without peers": deal(policy={"peers": ""}),
    "a deal and a policy with other peers": deal(policy={"peers": "ab" * 32}),
    "a deal and a policy without the model": deal(policy={"allowed-privacy-models": "local"}),
    "a deal with a key of its own": deal(allow="distributed"),
    "a deal without a key": deal(colluders=None),
    "a threshold in words": deal(threshold="4"),
    "a threshold that is a flag": deal(colluders=True),
    "peers in words": deal(peers=lambda s: [peer.hex() for peer in s.peers]),
    "a deal in arrays": Ask("new", lambda _: RecordDict({DealRequest.name: ArrayRecord()})),
    "a deal and arrays": both("new", a_deal, lambda _: RecordDict({"arrays": ArrayRecord()})),
    "a deal and a round": both("confirmed", a_deal, Scene.masked),
    "a deal and a key request": both("new", a_deal, lambda _: key_request()),
    "a deal and an unmask request": both("masked", a_deal, lambda s: s.request().to_record()),
    "a key request and a policy without peers": Ask("new", lambda _: key_request(), {"peers": ""}),
    "a key request and a policy without the model": Ask(
        "new", lambda _: key_request(), {"allowed-privacy-models": "local,central"}
    ),
    "a key request with more": Ask("new", lambda _: key_request(private=True)),
    "a key request for no run": Ask("new", lambda _: key_request(run_id="")),
    "a key request and a round": both("confirmed", lambda _: key_request(), Scene.masked),
    "the same deal again": Ask("dealt", lambda s: s.deal.request.to_record()),
    "an older deal": deal(stage="dealt", deal=1, first_round=4),
    "confirmed keys swapped": confirm(
        lambda s: {"mask_keys": moved(s.confirmation.mask_keys, s.others[0] - 1, s.others[1] - 1)}
    ),
    "keys of nobody's": confirm(lambda s: keys_of(s, s.others[0], invented_keys())),
    "other keys of this client's": confirm(lambda s: keys_of(s, s.place, invented_keys())),
    "a peer with this client's keys": confirm(lambda s: keys_of(s, s.others[0], s.confirmation.mask_keys[s.place - 1])),
    "keys for fewer rounds": confirm(lambda s: {"mask_keys": [k[:32] for k in s.confirmation.mask_keys]}),
    "sealed shares swapped": confirm(lambda s: {"sealed": moved(s.confirmation.sealed, 0, 1)}),
    "sealed shares altered": confirm(
        lambda s: {"sealed": [flipped(s.confirmation.sealed[0]), *s.confirmation.sealed[1:]]}
    ),
    "another's sealed shares": confirm(lambda s: {"sealed": list(s.deal.confirm_request(s.others[0]).sealed)}),
    "three dealers": confirm(
        lambda s: {
            "dealers": (three := sorted([s.place, *s.others[:2]])),
            "mask_keys": [s.confirmation.mask_keys[place - 1] for place in three],
            "sealed": list(s.confirmation.sealed[:2]),
        }
    ),
    "dealers without this client": confirm(
        lambda s: {
            "dealers": sorted(s.others),
            "mask_keys": [s.confirmation.mask_keys[place - 1] for place in sorted(s.others)],
            "sealed": list(s.confirmation.sealed[:3]),
        }
    ),
    "a dealer beyond the cohort": confirm(lambda _: {"dealers": [1, 2, 3, 4, 6]}),
    "dealers out of order": confirm(lambda _: {"dealers": [2, 1, 3, 4, 5]}),
    "a deal that was not dealt": confirm(lambda _: {"deal": 2}),
    "a deal of another run": confirm(lambda _: {"run_id": OTHER_RUN}),
    "places in words": confirm(lambda _: {"dealers": ["1", "2", "3", "4", "5"]}),
    "a confirmation before any deal": Ask("new", lambda _: NobodysDeal.record),
    "a round before the keys are confirmed": Ask(
        "dealt", lambda _: RecordDict({**honest().to_record(), **MaskRequest(1, ()).to_record()})
    ),
    "a round before any deal": Ask(
        "new", lambda _: RecordDict({**honest().to_record(), **MaskRequest(1, ()).to_record()})
    ),
    "confirmed with fewer than before": confirm(
        lambda s: {
            "dealers": (four := sorted([s.place, *s.others[:3]])),
            "mask_keys": [s.confirmation.mask_keys[place - 1] for place in four],
            "sealed": list(s.confirmation.sealed[:3]),
        },
        "confirmed",
    ),
    "a round without a deal": Ask("confirmed", lambda _: honest().to_record()),
    "a round of another deal": beside(deal=2),
    "a round of no deal": beside(deal=0),
    "a round without confirmations": beside(confirmations=[]),
    "forged confirmations": beside(confirmations=[bytes(32)] * 4),
    "one forged confirmation": beside(
        confirmations=lambda s: [*s.beside().confirmations[:-1], flipped(s.beside().confirmations[-1])]
    ),
    "confirmations in another order": beside(confirmations=lambda s: list(reversed(s.beside().confirmations))),
    "another's confirmations": beside(confirmations=lambda s: list(s.beside(s.others[0]).confirmations)),
    "a confirmation too few": beside(confirmations=lambda s: list(s.beside().confirmations[1:])),
    "a confirmation of a byte": beside(confirmations=[b"x"]),
    "a deal's number in words": beside(deal="1"),
    "a deal's record with more": beside(noise=0),
    "more peers than were dealt to": masked(privacy__peers=6, privacy__survivors=4),
    "fewer peers than were dealt to": masked(privacy__peers=4),
    "more survivors than were dealt for": masked(privacy__survivors=5),
    "more colluders than were dealt for": masked(privacy__survivors=5, privacy__colluders=2),
    "survivors that open both secrets": masked(privacy__survivors=3),
    "a round with no peers": masked(privacy__peers=0),
    "a round with no survivors": masked(privacy__survivors=0),
    "no colluders in a round": masked(privacy__colluders=0),
    "a round of a run without a deal": masked(run_id=OTHER_RUN),
    "a round after the deal's last": masked(server_round=4),
    "a round without noise": masked(privacy__noise_multiplier=0.0),
    "a round with too little noise": masked(privacy__noise_multiplier=0.2),
    "a round of several steps": masked(local_steps=2),
    "a masked round of a cohort of 1": masked(min_clients=1),
    "a sum without room in 32 bits": masked(privacy__expected_batch=1e8),
    "an image at a time": masked(privacy__unit="image"),
    "a round with clear sums": masked(privacy__privacy_model="central"),
    "a round without any privacy": masked(privacy__privacy_model="none"),
    "a round of local noise": masked(privacy__privacy_model="local"),
    "a round and a policy without peers": masked(policy={"peers": ""}),
    "a round and a policy that pinned others since": masked(policy={"peers": "ab" * 32}),
    "a round and a policy without the model": masked(policy={"allowed-privacy-models": "local,central"}),
    "a round and a policy with more shares": masked(policy={"min-noise-shares": 4}),
    "a round and a policy with more colluders": masked(policy={"min-colluders": 2}),
    "other weights than the model's": masked(model__discriminator_width=2),
    "a witness that is none": both(
        "masked", lambda s: s.masked(2), lambda _: RecordDict({"witness": ConfigRecord({"heads": [b"x"]})})
    ),
    "a round and a deal": both("confirmed", Scene.masked, a_deal),
    "a round and an unmask request": both("masked", Scene.masked, lambda s: s.request().to_record()),
    "a confirmation and a round": both("confirmed", lambda s: s.confirmation.to_record(), Scene.masked),
    "an unmask request before its round": unmask(lambda _: {}, "confirmed"),
    "an unmask request before any deal": unmask(lambda _: {}, "new"),
    "three survivors": unmask(
        lambda s: {"survivors": sorted([s.place, *s.others[:2]]), "dropped": sorted(s.others[2:])}
    ),
    "survivors without this client": unmask(lambda s: {"survivors": sorted(s.others), "dropped": [s.place]}),
    "four and nobody dropped": unmask(lambda s: {"survivors": sorted([s.place, *s.others[:3]])}),
    "a survivor beyond the cohort": unmask(lambda _: {"survivors": [1, 2, 3, 4, 5, 6]}),
    "dropped beyond the cohort": unmask(lambda _: {"dropped": [6]}),
    "survived and dropped": unmask(lambda s: {"dropped": [s.others[0]]}),
    "no survivors": unmask(lambda _: {"survivors": [], "dropped": [1, 2, 3, 4, 5]}),
    "survivors twice": unmask(lambda _: {"survivors": [1, 1, 2, 3, 4, 5]}),
    "the next round's shares": unmask(lambda _: {"server_round": 2}),
    "shares of round 0": unmask(lambda _: {"server_round": 0}),
    "shares of a deal that was not dealt": unmask(lambda _: {"deal": 2}),
    "shares of another run": unmask(lambda _: {"run_id": OTHER_RUN}),
    "survivors in words": unmask(lambda _: {"survivors": "1,2,3,4,5"}),
    "an unmask request with more": unmask(lambda _: {"secrets": True}),
    "an unmask request and a policy without peers": Ask("masked", lambda s: s.request().to_record(), {"peers": ""}),
    "an unmask request and a policy that pinned others since": Ask(
        "masked", lambda s: s.request().to_record(), {"peers": "ab" * 32}
    ),
    "an unmask request and arrays": both(
        "masked", lambda s: s.request().to_record(), lambda _: RecordDict({"arrays": ArrayRecord()})
    ),
    "an unmask request beside a mask record": both(
        "masked", lambda s: s.request().to_record(), lambda s: s.beside().to_record()
    ),
    "a deal anew for a masked round": deal(stage="masked", first_round=1),
    "a masked round with other weights": Ask(
        "masked",
        lambda s: RecordDict(
            {**gradient_instructions(CONFIG, np.zeros_like(WEIGHTS)).to_record(), **s.beside().to_record()}
        ),
    ),
    "a masked round with other noise": masked(stage="masked", privacy__noise_multiplier=7.0),
    "opened again without one": unmask(
        lambda s: {"survivors": sorted([s.place, *s.others[:3]]), "dropped": [s.others[3]]}, "opened"
    ),
    "a record of an unknown kind": Ask("confirmed", lambda _: RecordDict({"secure_dump_request": ConfigRecord()})),
}


class NobodysDeal:
    """A well-formed confirmation of what nobody dealt."""

    record = RecordDict(
        {
            "secure_confirm_request": ConfigRecord(
                {
                    "run_id": RUN_ID,
                    "deal": 1,
                    "dealers": [1, 2, 3, 4, 5],
                    "mask_keys": [invented_keys() for _ in range(5)],
                    "sealed": [bytes(3 * 66 + 48)] * 4,
                }
            )
        }
    )


@pytest.mark.parametrize("name", list(HOSTILE))
def test_nothing_comes_back_but_an_error(name: str, scenes: Callable[[str], Scene], reads: list[str]) -> None:
    asked = HOSTILE[name]
    scene = scenes(asked.stage)
    before = scene.files()
    reads.clear()
    client.app.open_faces.cache_clear()
    reply = scene.ask(asked.content(scene), **asked.policy)
    assert reply.has_error()
    assert not reply.has_content()
    assert reply.error.reason in ("PrivacyError", "ProtocolError", "ConfigError")
    assert reads == []
    assert scene.files() == before, "nothing was opened, charged or dealt"


@pytest.mark.parametrize("name", ["one more peer", "forged confirmations", "three survivors"])
def test_an_owner_may_keep_the_reason(name: str, scenes: Callable[[str], Scene]) -> None:
    asked = HOSTILE[name]
    scene = scenes(asked.stage)
    assert scene.ask(asked.content(scene), **{"disclose-reason": False}).error.reason == "Refused"


def test_what_an_honest_coordinator_asks_is_answered_at_every_stage(tmp_path: Path) -> None:
    """So that none of the above is refused for another reason; asked again, the answers are the same."""
    scene = Scene(tmp_path, "new")
    assert KeyAnswer.from_record(scene.ask(key_request()).content).public_key == scene.peers[scene.place - 1]
    scene._dealt()
    scene._confirmed()
    again = ConfirmAnswer.from_record(scene.ask(scene.confirmation.to_record()).content)
    assert again.tags == scene.deal._tags[scene.place]
    masked_round = MaskedRound(scene.deal, 1, len(WEIGHTS), asked=honest().digest())
    vectors = [scene.ask(scene.masked()).content.array_records["arrays"]["vector"].data for _ in range(2)]
    assert vectors[0] == vectors[1]
    for place, node in scene.node.items():
        reply = scene.ask(RecordDict({**honest().to_record(), **scene.beside(place).to_record()}), node)
        masked_round.add(place, DiscriminatorUpdate.from_record(reply.content, honest(), len(WEIGHTS)).vector)
    for node in scene.node.values():
        answers = [UnmaskAnswer.from_record(scene.ask(masked_round.close().to_record(), node).content) for _ in "12"]
        assert answers[0] == answers[1]
        masked_round.add_unmasked(answers[0])
    assert masked_round.total().dtype == np.uint32
    # Once more, under a new deal.
    reply = scene.ask(a_deal(scene))
    assert DealAnswer.from_record(reply.content).deal == 2
    ledger = Ledger(scene.state_dirs[0], max_epsilon=10.0, delta=1e-5)
    assert [release.mechanism for release in ledger.releases] == ["secure-gradients"]


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_vectors_of_those_who_were_asked_other_things_give_no_sum(tmp_path: Path, noise: float) -> None:
    """Else the victim's share would be in a sum with less noise than it was charged for."""
    scene = Scene(tmp_path, "confirmed")
    masked_round = MaskedRound(scene.deal, 1, len(WEIGHTS), asked=honest().digest())
    for place, node in scene.node.items():
        changes = {"privacy__noise_multiplier": noise} if noise and place != scene.place else {}
        record = RecordDict({**scene.masked(**changes), **scene.beside(place).to_record()})
        reply = scene.ask(record, node)
        masked_round.add(place, DiscriminatorUpdate.from_record(reply.content, honest(), len(WEIGHTS)).vector)
    for node in scene.node.values():
        shares = scene.ask(masked_round.close().to_record(), node)
        masked_round.add_unmasked(UnmaskAnswer.from_record(shares.content))
    lattice = lattice_of(honest(), len(WEIGHTS))
    fill = lattice.fill(lattice.decode(masked_round.total()))
    assert fill > 0.99 if noise else fill < 0.5, "every value is as likely as any other"


def test_a_round_is_masked_once_and_never_after_a_later_one(tmp_path: Path, reads: list[str]) -> None:
    scene = Scene(tmp_path, "confirmed")
    assert scene.ask(scene.masked(2)).has_content()
    before = scene.files()
    reads.clear()
    client.app.open_faces.cache_clear()
    assert scene.ask(scene.masked(1)).error.reason == "PrivacyError"
    assert scene.ask(scene.request().to_record()).error.reason == "PrivacyError", "round 1 was never masked"
    assert (reads, scene.files()) == ([], before)


def test_a_round_that_was_masked_and_not_released_is_not_opened(tmp_path: Path) -> None:
    """As where the client was killed in between: its charge or its answer is not in the ledger."""
    scene = Scene(tmp_path, "confirmed")
    sums = secure_sum(OwnerPolicy.from_config(scene.configs[0]))
    sums.mask(RUN_ID, 1, 1, scene.beside().confirmations, np.zeros(4, np.uint32))
    reply = scene.ask(scene.request().to_record())
    assert (reply.error.reason, reply.has_content()) == ("PrivacyError", False)
    assert Ledger(scene.state_dirs[0], max_epsilon=10.0, delta=1e-5).releases == []


def test_a_run_of_local_noise_has_nothing_to_unmask(tmp_path: Path) -> None:
    scene = Scene(tmp_path, "confirmed")
    allowed = {"allowed-privacy-models": "local,distributed"}
    local = wire_instructions(scene, run_id=OTHER_RUN, privacy__privacy_model="local")
    assert scene.ask(local, **allowed).has_content()
    before = scene.files()
    for run_id in (OTHER_RUN, RUN_ID):
        request = wire(scene.request().to_record(), run_id=run_id)
        assert scene.ask(request, **allowed).error.reason in ("ProtocolError", "PrivacyError")
    assert scene.files() == before
    # Nor can a local round be asked again as a masked one.
    again = scene.masked(run_id=OTHER_RUN)
    assert scene.ask(again, **allowed).error.reason == "ProtocolError"
    ledger = Ledger(scene.state_dirs[0], max_epsilon=10.0, delta=1e-5)
    assert [release.mechanism for release in ledger.releases] == ["gradients"]


def wire_instructions(scene: Scene, **changes: Any) -> RecordDict:
    record = scene.masked(**changes)
    return RecordDict({name: part for name, part in record.items() if name != MaskRequest.name})


def test_a_budget_that_is_spent_masks_nothing(tmp_path: Path, reads: list[str]) -> None:
    scene = Scene(tmp_path, "confirmed")
    before = scene.files()
    client.app.open_ledger.cache_clear()
    reply = scene.ask(scene.masked(), **{"max-epsilon": 1e-3})
    assert (reply.error.reason, reads) == ("BudgetExhausted", [])
    secrets = {name: content for name, content in scene.files().items() if name.startswith("secure-sum")}
    assert secrets.items() <= before.items()


def test_clients_that_are_asked_for_less_noise_do_not_take_it_off_the_sum(tmp_path: Path) -> None:
    """One client is asked for sigma 5 and charges for it, the others for 0.3: their sum must not open, or 5 was a lie."""
    config = tiny_config(privacy_model="distributed", num_clients=3, noise_multiplier=1.0, epsilon=1e6, sample_rate=0.1)
    shares = [random_faces(4, 2, seed=number) for number in range(3)]
    configs = node_configs(tmp_path, config, shares)
    grid = InProcessGrid(create_app(), configs)

    def send(records: dict[int, RecordDict]) -> dict[int, RecordDict]:
        messages = [Message(record, node, "train", ttl=60.0, group_id="1") for node, record in records.items()]
        return {reply.metadata.src_node_id: reply.content for reply in grid.send_and_receive(messages)}

    nodes = grid.get_node_ids()
    keys = [
        KeyAnswer.from_record(r).public_key for r in send(dict.fromkeys(nodes, KeyRequest(RUN_ID).to_record())).values()
    ]
    deal = SumDeal(DealRequest(RUN_ID, 1, 1, 2, tuple(sorted(keys)), config.privacy.survivors, 1))
    answers = send(dict.fromkeys(nodes, deal.request.to_record()))
    places = {deal.add_dealt(DealAnswer.from_record(record)): node for node, record in answers.items()}
    deal.close_dealing()
    for record in send({node: deal.confirm_request(place).to_record() for place, node in places.items()}).values():
        deal.add_confirmed(ConfirmAnswer.from_record(record))
    weights = get_flat(discriminator_of(config.model))
    for server_round, others, opens in ((1, 5.0, True), (2, 0.3, False)):
        asked = {place: gradient_instructions(config, weights, server_round) for place in places}
        for place, one in asked.items():
            sigma = 5.0 if place == 1 else others
            asked[place] = dataclasses.replace(one, privacy=dataclasses.replace(one.privacy, noise_multiplier=sigma))
        sums = MaskedRound(deal, server_round, len(weights), asked=asked[1].digest())
        records = {
            node: RecordDict({**asked[place].to_record(), **deal.mask_request(place, first=True).to_record()})
            for place, node in places.items()
        }
        for node, record in send(records).items():
            place = next(place for place, held in places.items() if held == node)
            sums.add(place, DiscriminatorUpdate.from_record(record, asked[place], len(weights)).vector)
        for record in send(dict.fromkeys(nodes, sums.close().to_record())).values():
            sums.add_unmasked(UnmaskAnswer.from_record(record))
        lattice = lattice_of(asked[1], len(weights))
        noise = float(lattice.decode(sums.total()).std()) / config.privacy.max_grad_norm
        honest = lattice.noise_deviation(3)
        assert (noise == pytest.approx(honest, rel=0.1)) == opens
        assert opens or noise > 50 * honest, "uniform: nothing is open"
