"""What a recogniser is and how it is trained: one flat section, kept beside its weights."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from common.errors import ConfigError
from common.fields import between, convert, keys_of, listed, one_of, option, require
from common.sections import AUGMENTATIONS, CHANNELS, DETECT, IMAGE_SIZES, AugmentationConfig

# As common.models.recogniser has them, which takes torch to import; a test compares.
NETWORKS = ("cnn", "resnet")
LOSSES = ("softmax", "cosface", "arcface")
GOALS = ("verify", "identify")
USES = ("none", "pretrain", "identities", "balance", "variation")


@dataclass(frozen=True, kw_only=True)
class RecognitionConfig:
    """A recogniser and its training. Raises ConfigError where a value cannot be."""

    image_size: int = option(64, "side of the square faces in pixels: 28, 32, 64 or 128")
    channels: int = option(3, "1 for grey, 3 for colour")
    crop: float = option(
        1.0, "share of the shorter side that the centre crop keeps; with detect, of the square around a face"
    )
    detect: str = option("none", "find faces and level their eyes: none or largest")
    network: str = option("resnet", "cnn or resnet")
    width: int = option(24, "channels of the first of four stages")
    embedding: int = option(128, "dimension of the embedding")
    dropout: float = option(0.3, "share of the features that is dropped before the dense layer")
    loss: str = option("softmax", "softmax, cosface or arcface: how persons are told apart")
    margin: float = option(
        0.2, "cosface: taken off the cosine of the right person; arcface: added to the angle, in radians"
    )
    scale: float = option(16.0, "what cosines are multiplied by")
    epochs: int = option(30, "passes over the photographs at most")
    patience: int = option(
        0, "epochs without a better validation figure after which training ends; 0: never before epochs"
    )
    batch: int = option(64, "photographs a step")
    lr: float = option(2e-3, "highest learning rate of AdamW; rises over the first 15 %, then falls as a cosine")
    weight_decay: float = option(5e-4, "of AdamW")
    augment: str = option(
        "flip,rotation,colour,erase",
        f"done to what is trained on, comma-separated, of {', '.join(AUGMENTATIONS)}; empty: nothing",
    )
    goal: str = option(
        "verify",
        "verify (anybody; some persons are kept for validation) or identify (these persons; some photographs)",
    )
    smallest: int = option(2, "photographs that a person must have to be trained on")
    validation: float = option(
        0.1, "share of the persons (verify), or of each person's photographs (identify), kept for validation"
    )
    learn_attributes: str = option("", "attributes to learn beside who it is, comma-separated, such as gender,race")
    attribute_weight: float = option(0.5, "of their cross-entropy in the loss")
    use: str = option("none", f"what synthetic faces are for: {', '.join(USES)}")
    synthetic: int = option(
        1000, "faces to learn from before any photograph (pretrain), synthetic persons (identities)"
    )
    variations: int = option(4, "faces of each synthetic person, or of each photograph (variation)")
    spread: float = option(0.3, "how far these lie from one another: share of a latent's length that is drawn anew")
    pretrain_epochs: int = option(10, "passes over the faces of pretrain")
    seed: int = option(0, "of the weights, the order and the augmentation")

    def __post_init__(self) -> None:
        one_of(self, "image_size", IMAGE_SIZES)
        one_of(self, "channels", CHANNELS)
        one_of(self, "detect", [name for name in DETECT if name != "all"])
        one_of(self, "network", NETWORKS)
        one_of(self, "loss", LOSSES)
        one_of(self, "use", USES)
        one_of(self, "goal", GOALS)
        between(self, ["crop"], 0.05, 1.0)
        between(self, ["width"], 4, 512)
        between(self, ["embedding"], 2, 4096)
        between(self, ["dropout", "validation"], 0, 0.9)
        between(self, ["margin"], 0, 1.5)
        between(self, ["scale", "lr"], 0, 1000, open_low=True)
        between(self, ["epochs", "batch", "smallest"], 1, 10**6)
        between(self, ["patience", "pretrain_epochs"], 0, 10**6)
        between(self, ["synthetic", "variations"], 1, 10**6)
        between(self, ["spread"], 0, 1)
        AugmentationConfig(augment=self.augment)
        between(self, ["weight_decay", "attribute_weight"], 0, 100)
        between(self, ["seed"], 0, 2**31)
        require(self.batch > 1, "batch = 1: batch normalisation needs two photographs or more")

    @property
    def attribute_names(self) -> list[str]:
        """`learn_attributes`, parsed."""
        return listed(self.learn_attributes)

    def to_flat(self) -> dict[str, Any]:
        """Flat keys."""
        return {key: getattr(self, name) for name, key in keys_of(type(self))}

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> Self:
        """From flat keys. Raises ConfigError on an unknown key or a value of another type."""
        require(isinstance(flat, Mapping), f"{flat!r} are no options of a recogniser: give keys with values")
        fields = {key: name for name, key in keys_of(cls)}
        types = {f.name: f.type for f in dataclasses.fields(cls)}
        unknown = sorted(flat.keys() - fields.keys())
        if unknown:
            raise ConfigError(f"unknown options of a recogniser: {', '.join(unknown)}; known are {', '.join(fields)}")
        kinds = {"int": int, "float": float, "str": str, "bool": bool}
        return cls(
            **{
                fields[key]: convert(key, value, kinds.get(str(types[fields[key]]), types[fields[key]]))  # type: ignore[arg-type]
                for key, value in flat.items()
            }
        )
