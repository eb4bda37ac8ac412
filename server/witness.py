"""The last head of every client's ledger that a coordinator has seen, over all of its runs.

Kept in `ledger-heads.json` in the folder of the runs, so that an older copy that took a ledger's place between two runs is
noticed in the next. The heads are signed by their ledgers (`common.privacy.chain`): nobody can put in another.
"""

import json
from pathlib import Path

from common.errors import CheckpointError
from common.files import write_atomically
from common.privacy.chain import Head, remember
from server.checkpoint import CoordinatorState

FILE_NAME = "ledger-heads.json"


class Witness:
    """An observer that keeps the file up to date. `state` begins with what the file holds."""

    def __init__(self, folder: Path, state: CoordinatorState) -> None:
        """Raises CheckpointError where the file is damaged."""
        self._path = folder / FILE_NAME
        self._merge_into(state)

    def fit_stepped(self, state: CoordinatorState) -> None:
        """Nothing comes from clients here."""

    def round_ended(self, state: CoordinatorState) -> None:
        """Write down what the round's replies carried; another run may have written too."""
        self._merge_into(state)
        write_atomically(self._path, json.dumps(state.ledger_heads).encode(), private=True)

    def _merge_into(self, state: CoordinatorState) -> None:
        if not self._path.exists():
            return
        try:
            for head in json.loads(self._path.read_text(encoding="utf-8")).values():
                remember(state.ledger_heads, Head.from_bytes(bytes.fromhex(head)))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self._path}, the heads of the clients' ledgers, is damaged ({error}): restore it, or delete it and lose the "
                "witness of earlier runs"
            ) from error
