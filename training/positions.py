"""More positions for a trained model: check `model_init_kwargs`, and fill in what the checkpoint knows.

model_init_kwargs: {max_position_embeddings: 4096, rope_parameters: {rope_type: yarn}}
"""

import json
import sys
from contextlib import suppress
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from buddygpt.cli.errors import UserError, did_you_mean

STRETCHED = ("linear", "yarn")  # `factor` x the trained length is the new length
WITH_ORIGINAL_LENGTH = ("yarn", "llama3", "longrope")
KEYS = set(RopeParameters.__annotations__)


def parse_model_kwargs(value: dict[str, Any] | str | None) -> dict[str, Any]:
    """Return `model_init_kwargs` as a dictionary. On the command line it is JSON."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"`model_init_kwargs` is {value}; write a mapping, such as '{{\"key\": 1}}'")
    return dict(value or {})


def require_positions(key: str, length: int | None, limit: int | None) -> None:
    """Raise UserError if rows may have more tokens than the model has positions; warn if they have no limit.

    Args:
        key: The name of the option that limits rows, for the message.
        length: Its value.
        limit: The model's `max_position_embeddings`; None if it has none.
    """
    if limit is None:
        return
    if length is None:
        print(f"warning: {key} is null: rows may be longer than the {limit} positions of the model", file=sys.stderr)
    elif length > limit:
        raise UserError(
            f"{key} is {length}, but the model has only {limit} positions (max_position_embeddings). Use at most "
            f"{limit}; or extend a checkpoint with model_init_kwargs: {{max_position_embeddings: {length}, "
            "rope_parameters: {rope_type: yarn}}, and a new model in the JSON of its config"
        )


def extend_positions(config: PreTrainedConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """Return `model_init_kwargs` with `rope_parameters` that are complete and fit the new number of positions.

    Missing are taken from the checkpoint: `rope_theta`, the trained length and, from it and the new length, `factor`.
    Without `max_position_embeddings`, the new length follows from `factor`. A model that was extended before is
    stretched from the length that its angles were first trained for.

    Args:
        config: The config of the checkpoint.
        changes: Keyword arguments of `from_pretrained`.

    Raises:
        UserError: A key or type is unknown, or factor and length do not fit.
    """
    old = getattr(config, "rope_parameters", None)
    present = getattr(config, "max_position_embeddings", None)
    if not isinstance(old, dict) or "rope_type" not in old or not present:  # no RoPE, or one for each kind of layer
        return changes
    length = changes.get("max_position_embeddings", present)
    if type(length) is not int or length < 1:
        raise UserError(f"max_position_embeddings is {length}; give a number of tokens")
    if "rope_parameters" not in changes:
        if length > present:
            print(
                f"warning: positions {present:,} to {length - 1:,} are new to the model. Give rope_parameters, too, "
                "such as {rope_type: yarn}, or train long enough",
                file=sys.stderr,
            )
        return changes

    rope = _checked(changes["rope_parameters"])
    kind = rope["rope_type"]
    rope.setdefault("rope_theta", old["rope_theta"])
    trained = _trained_length(old, present)
    if kind in WITH_ORIGINAL_LENGTH:
        trained = rope.setdefault("original_max_position_embeddings", trained)
    if kind == "dynamic" and length > present:
        raise UserError(
            "rope_type: dynamic computes its angles from max_position_embeddings as trained, so it stays as it is: "
            "remove it, and use the model at any length without training; or train with rope_type: yarn"
        )
    if kind in STRETCHED:
        if "max_position_embeddings" not in changes and "factor" in rope:
            length = max(present, int(trained * rope["factor"]))
        factor = rope.setdefault("factor", length / trained)
        if factor <= 1 or trained * factor < length:
            raise UserError(
                f"rope_type: {kind} with factor {factor:g} stretches the {trained:,} trained positions to "
                f"{int(trained * factor):,}, but max_position_embeddings is {length:,}; raise one of them, or leave "
                "one of them out"
            )
    return changes | {"max_position_embeddings": length, "rope_parameters": rope}


def _checked(rope: Any) -> dict[str, Any]:
    """Return a copy of `rope_parameters`; transformers ignores keys and types that it does not know."""
    if not isinstance(rope, dict) or not rope:
        raise UserError(f"rope_parameters is {rope}; write a mapping, such as {{rope_type: yarn}}")
    for key in rope.keys() - KEYS:
        raise UserError(f"rope_parameters has an unknown key {key}; did you mean {did_you_mean(key, KEYS) or KEYS}?")
    kinds = ["default", *ROPE_INIT_FUNCTIONS]
    if rope.get("rope_type", "default") not in kinds:
        raise UserError(f"rope_type is {rope['rope_type']}; use one of {', '.join(kinds)}")
    for key in ("factor", "rope_theta", "original_max_position_embeddings"):
        if key in rope and (type(rope[key]) not in (int, float) or not 1 <= rope[key] < 1e12):
            raise UserError(f"{key} of rope_parameters is {rope[key]}; give a number, at least 1")
    return {"rope_type": "default", **rope}


def _trained_length(rope: dict[str, Any], present: int) -> int:
    """Return the length at which the angles of a checkpoint were first trained."""
    if rope["rope_type"] in WITH_ORIGINAL_LENGTH:
        return rope["original_max_position_embeddings"]
    return round(present / rope["factor"]) if rope["rope_type"] == "linear" else present
