"""When a run may end before its last round: one figure of its record has passed a value.

All that may be named is computed from released updates, fakes and public faces, so stopping on it costs no privacy.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from common.errors import ConfigError

# Each under the name that it has in rounds.jsonl, with a dash for its underscore.
FIGURES = {
    "frechet": "distance of fakes to the coordinator's public reference faces",
    "moment-loss": "distance of fakes to the released moments",
    "generator-loss": "adversarial loss of the generator",
    "fake-accuracy": "share of fakes that the discriminator sees through",
}


@dataclass(frozen=True)
class StopCondition:
    """`figure` under or above `value`."""

    figure: str
    below: bool
    value: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse NAME<VALUE or NAME>VALUE. Raises ConfigError."""
        found = re.fullmatch(r"\s*([a-z-]+)\s*([<>])\s*(\S+)\s*", text.replace("_", "-"))
        try:
            value = float(found[3]) if found else math.nan
        except ValueError:
            value = math.nan
        if found is None or found[1] not in FIGURES or not math.isfinite(value):
            raise ConfigError(
                f"stop-when = {text!r}: write NAME<VALUE or NAME>VALUE, such as frechet<20, NAME one of {', '.join(FIGURES)}"
            )
        return cls(found[1], found[2] == "<", value)

    @property
    def key(self) -> str:
        """The figure's name in rounds.jsonl."""
        return self.figure.replace("-", "_")

    def met(self, figures: Mapping[str, Any]) -> bool:
        """Whether a line of rounds.jsonl meets it; one without the figure does not."""
        value = figures.get(self.key)
        if value is None or not math.isfinite(value):
            return False
        return bool(value < self.value if self.below else value > self.value)
