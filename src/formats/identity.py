"""Whether an encoder is the one that a model was trained with."""

from collections.abc import Mapping
from typing import Any

from src.core.errors import UserError
from src.models.frozen_encoder import FrozenEncoder, identity_differences


def require_same_encoder(encoder: FrozenEncoder, stored: Mapping[str, Any], file: object) -> None:
    """`stored` is the identity kept with the model in `file`; where the weights lie may differ. UserError otherwise."""
    found = encoder.identity()
    differing = identity_differences(stored, found)
    if differing:
        raise UserError(
            f"{file} was trained with another encoder: {dict(stored)} there, {found} here ({', '.join(differing)} "
            "differ). "
            "Give the encoder that it was trained with."
        )


def is_untrained(identity: Mapping[str, Any]) -> bool:
    return str(identity["weights"]).startswith("untrained")
