"""When a run may end early: what is written is what is meant, and nothing else is taken."""

import pytest

from common.config import RunConfig
from common.errors import ConfigError
from common.stopping import FIGURES, StopCondition


@pytest.mark.parametrize(
    ("text", "figures", "met"),
    [
        ("frechet<20", {"frechet": 19.9}, True),
        ("frechet<20", {"frechet": 20.0}, False),
        (" frechet > 2e1 ", {"frechet": 20.5}, True),
        ("fake-accuracy>0.9", {"fake_accuracy": 0.95}, True),
        ("fake-accuracy>0.9", {"fake_accuracy": 0.9}, False),
        ("moment-loss<-0.5", {"moment_loss": -0.6}, True),
        ("moment_loss<1", {"moment_loss": 0.5}, True),
        ("moment-loss<1", {"generator_loss": 0.0}, False),
        ("moment-loss<1", {"moment_loss": float("nan")}, False),
        ("generator-loss>1", {"generator_loss": float("inf")}, False),
    ],
)
def test_a_figure_under_or_above_a_value(text: str, figures: dict[str, float], met: bool) -> None:
    assert StopCondition.parse(text).met(figures) is met


@pytest.mark.parametrize(
    "text",
    ["frechet", "frechet<", "<20", "frechet<=20", "fid<20", "frechet<nan", "frechet<inf", "frechet<20<30", "x y<2"],
)
def test_anything_else_is_refused_with_the_names(text: str) -> None:
    with pytest.raises(ConfigError, match=f"NAME one of {', '.join(FIGURES)}"):
        RunConfig.from_flat({"stop-when": text})


def test_frechet_needs_public_faces() -> None:
    with pytest.raises(ConfigError, match="give reference"):
        RunConfig.from_flat({"stop-when": "frechet<20"})
