"""The one exception tree.

    VisardError
    |-- ConfigError            a key, value or combination that a run cannot use
    |-- DataError              faces that cannot be read or used as asked
    |-- PrivacyError           something that would break the promise to the face owners
    |   |-- BudgetExhausted    the charge would pass the owner's max_epsilon
    |   |-- LedgerCorrupt      the ledger on disk cannot be trusted
    |   |-- LedgerMoved        the ledger is a copy, or lies elsewhere than it says
    |   `-- LedgerUnwritable   the disk takes no more records, or none at all
    |-- ProtocolError          a message that does not fit the round
    |   |-- MalformedUpdate    wrong keys, shapes, dtypes or values
    |   |-- CohortTooSmall     fewer clients answered than the round needs
    |   |   |-- BudgetsSpent   because the budgets of the others are spent: the run is over
    |   |   `-- RoundVoid      to open a secure sum that was closed: this round is lost, the next may go on
    |   `-- RoundFailed        a client could not compute its answer; only its owner reads why
    `-- CheckpointError        a run's saved state cannot be read or written

Every message gives the value, the limit and the remedy. What a client sends back is the class name alone: never a path,
a count or a name (see `client.app`).
"""


class VisardError(Exception):
    """Base of every error that Visard raises on purpose."""


class ConfigError(VisardError):
    """A key, value or combination that a run cannot use."""


class DataError(VisardError):
    """Faces that cannot be read or used as asked."""


class PrivacyError(VisardError):
    """Something that would break the promise to the face owners."""


class BudgetExhausted(PrivacyError):
    """The charge would pass the owner's max_epsilon. Nothing was computed."""


class LedgerCorrupt(PrivacyError):
    """The ledger on disk cannot be trusted; the client trains no more."""


class LedgerMoved(PrivacyError):
    """The ledger lies elsewhere than it says: a copy. Its owner may adopt it; until then nothing is computed."""


class LedgerUnwritable(PrivacyError):
    """The disk refuses the ledger: read-only, full or failing. Nothing was released."""


class ProtocolError(VisardError):
    """A message that does not fit the round."""


class MalformedUpdate(ProtocolError):
    """An update with wrong keys, shapes, dtypes or values."""


class CohortTooSmall(ProtocolError):
    """Fewer clients answered in time than the round needs."""


class BudgetsSpent(CohortTooSmall):
    """Too few clients have a budget left for another round: the run ends here, and keeps what it has."""


class RoundVoid(CohortTooSmall):
    """A secure sum cannot be opened any more: its charges stand, and the run goes on with the next round."""


class RoundFailed(ProtocolError):
    """A client could not compute its answer. One name for every cause: after the charge the cause may depend on faces."""


class CheckpointError(VisardError):
    """A run's saved state cannot be read or written."""
