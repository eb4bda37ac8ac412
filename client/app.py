"""The client's Flower app: charge, compute, answer. The one place where errors become replies."""

import logging
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from client.discriminator import check_weights, gradient_update
from client.moments import moment_update
from client.policy import OwnerPolicy
from client.secure_round import MaskedAnswer, answer_for_sum
from common.errors import DataError, RoundFailed, VisardError
from common.faces import FaceDataset, load_faces
from common.messages import DiscriminatorUpdate, RoundInstructions, Stage, witness_of
from common.privacy.ledger import Ledger
from common.privacy.randomness import SecureRandom
from common.privacy.units import PrivacyModel, PrivacyUnit
from common.sections import FaceSource

# Flower keeps codes below 100 for itself.
REFUSED = 100
# All that is said of a refusal where the owner does not disclose reasons.
UNDISCLOSED = "Refused"

log = logging.getLogger("visard.client")

NewRandom = Callable[[RoundInstructions, Context], SecureRandom]


def create_app(new_random: NewRandom = lambda _instructions, _context: SecureRandom()) -> ClientApp:
    """The ClientApp. `new_random` is for tests: the shipped app draws its noise from the operating system alone."""
    client_app = ClientApp()
    # Runs for which these faces turned out not to be fit: what was told once is told again, and costs nothing more.
    unfit: set[tuple[Path, str]] = set()

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        disclose = False  # until the owner's word on it is read
        try:
            policy = OwnerPolicy.from_context(context)
            disclose = policy.disclose_reason
            answer = answer_for_sum(policy, message.content, partial(_ledger_of, policy))
            if answer is None:
                answer = _answer(message.content, policy, context, new_random, unfit)
            return Message(answer, reply_to=message)
        except RoundFailed as error:
            kind = type(error).__name__
            log.error("round failed", exc_info=error.__cause__)
        except VisardError as error:
            # The owner reads why; the coordinator learns the kind of error at most, and nothing of the data.
            kind = type(error).__name__
            log.warning("round refused: %s: %s", kind, error)
        except Exception:
            kind = "InternalError"
            log.exception("round failed")
        return Message(Error(REFUSED, kind if disclose else UNDISCLOSED), reply_to=message)

    return client_app


def _answer(
    content: RecordDict, policy: OwnerPolicy, context: Context, new_random: NewRandom, unfit: set[tuple[Path, str]]
) -> RecordDict:
    instructions = RoundInstructions.from_record(content)
    policy.check(instructions)
    run = policy.state_dir, instructions.run_id
    if run in unfit:
        raise RoundFailed("these faces are not fit for this run, as was told before; nothing is charged")
    if instructions.stage is Stage.GRADIENTS:
        check_weights(instructions)  # before anything is charged
    masked = None
    if instructions.privacy.privacy_model is PrivacyModel.DISTRIBUTED:
        masked = MaskedAnswer.prepare(policy, instructions, content)
    ledger = _ledger_of(policy)
    ledger.check_witness(witness_of(content))
    random = new_random(instructions, context)
    try:
        if instructions.privacy.privacy_model is PrivacyModel.NONE:
            ledger.note_unprotected(instructions.run_id)
            vector = _update(policy, instructions, random)
        else:
            vector = _private_update(ledger, policy, instructions, random, masked)
    except RoundFailed as error:
        if isinstance(error.__cause__, DataError):
            unfit.add(run)
        raise
    place = 0 if masked is None else masked.place
    return DiscriminatorUpdate(instructions.run_id, instructions.server_round, vector, ledger.head(), place).to_record()


def _private_update(
    ledger: Ledger,
    policy: OwnerPolicy,
    instructions: RoundInstructions,
    random: SecureRandom,
    masked: MaskedAnswer | None,
) -> np.ndarray:
    """Charged on the disk before any face is touched; on the disk before it is sent; sent again as it was."""
    dtype = "<f4" if masked is None else "<u4"
    run = (instructions.run_id, instructions.server_round)
    unit = instructions.privacy.unit
    sent = ledger.charge(*run, instructions.release, instructions.plan, instructions.digest(), unit)
    if sent is not None:
        return np.frombuffer(sent, dtype=dtype)
    vector = _update(policy, instructions, random, masked)
    ledger.release(*run, vector.astype(dtype).tobytes())
    return vector


def _update(
    policy: OwnerPolicy, instructions: RoundInstructions, random: SecureRandom, masked: MaskedAnswer | None = None
) -> np.ndarray:
    model = instructions.model
    compute = moment_update if instructions.stage is Stage.MOMENTS else gradient_update
    try:
        faces = open_faces(policy.source, model.image_size, model.channels, policy.state_dir / "cache")
        vector = compute(instructions, faces, random)
        return vector if masked is None else masked.mask(vector, random)
    except Exception as error:
        raise RoundFailed("the round failed at this client") from error


@lru_cache(maxsize=1024)
def open_faces(source: FaceSource, image_size: int, channels: int, cache_dir: Path) -> FaceDataset:
    """This owner's faces, decoded once a process: restart the node after taking photographs away."""
    return load_faces(source, image_size, channels, cache_dir=cache_dir)


def _ledger_of(policy: OwnerPolicy) -> Ledger:
    return open_ledger(policy.state_dir, policy.max_epsilon, policy.delta, policy.unit, policy.ledger)


@lru_cache(maxsize=1024)
def open_ledger(state_dir: Path, max_epsilon: float, delta: float, unit: PrivacyUnit, public_key: str) -> Ledger:
    """This owner's ledger, parsed once a process; it takes in what other processes write."""
    return Ledger(state_dir, max_epsilon=max_epsilon, delta=delta, unit=unit, public_key=public_key)


app = create_app()
