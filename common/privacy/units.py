"""Whose privacy: the unit that is added or removed between neighbouring data sets."""

from enum import StrEnum


class PrivacyUnit(StrEnum):
    """Two data sets are neighbours when one unit is added or removed.

    IMAGE: one photograph. PERSON: all photographs of one person at a client (the default: a face owner is a person, not a file).
    A person is taken to appear at one client only.
    """

    IMAGE = "image"
    PERSON = "person"


class PrivacyModel(StrEnum):
    """Against whom the promise holds.

    LOCAL: each client adds the full noise; nobody is trusted. DISTRIBUTED: each adds a share, and the coordinator learns only
    the sum; it may collude with some clients. CENTRAL: the coordinator adds the noise and is trusted; for baselines. NONE:
    no noise, no promise; for baselines on public data only.
    """

    LOCAL = "local"
    DISTRIBUTED = "distributed"
    CENTRAL = "central"
    NONE = "none"
