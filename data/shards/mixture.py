"""Turn requested weights, epochs and language ratios into epochs per source.

The manifest stores the result. Training reads it: in one mixture epoch, a source with 0.5 epochs shows half of its
blocks and a source with 2 epochs shows every block twice.
"""

import math
from collections import Counter
from typing import Any

from buddygpt.cli.errors import UserError

FACTS = ("name", "language", "tokens", "documents", "text_bytes")


def collect_requests(
    append_rounds: list[dict[str, Any]], sources: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return the requested `language`, `epochs` and `weight` of each source, from the last config that names it.

    Args:
        append_rounds: `generations` of the manifest that is appended to; empty for new shards.
        sources: What the current config requests, by source.
    """
    requests: dict[str, dict[str, Any]] = {}
    for append_round in append_rounds:
        requests.update(append_round["sources"])
    requests.update(sources)
    return requests


def resolve_mixture(sources: list[dict[str, Any]], languages: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """Return the manifest's entry for each source: its facts, its `epochs`, and its `share` of the tokens read.

    - With weights, tokens are read in proportion to the weights, and the most repeated source gets one epoch.
    - Without weights, each source gets the requested `epochs`, by default 1.
    - `languages` then scales whole languages down to the requested ratio of tokens. The scarcest language keeps its
      epochs. With weights, the most repeated source gets one epoch again.

    Args:
        sources: For each source `name`, `language`, `tokens`, `documents` and `text_bytes`, and `epochs` or `weight`
            if requested.
        languages: Requested tokens by language, in any unit: {"zh": 3, "en": 1}.

    Raises:
        UserError: The requests contradict each other or the text.
    """
    has_weights = _has_weights(sources)
    if languages:
        _require_positive(languages, "languages")
    epochs = _epochs_from_weights(sources) if has_weights else _requested_epochs(sources)

    if languages:
        factors = _language_factors(sources, epochs, languages)
        for source in sources:
            epochs[source["name"]] *= factors[source["language"]]
    if has_weights:
        most = max(epochs.values())
        epochs = {name: count / most for name, count in epochs.items()}

    tokens_read = {source["name"]: epochs[source["name"]] * source["tokens"] for source in sources}
    total = sum(tokens_read.values())
    if not total:
        raise UserError("no source has any tokens; see in the report what cleaning dropped")
    entries = []
    for source in sources:
        entry = {key: source.get(key) for key in FACTS}
        entry["epochs"] = epochs[source["name"]]
        entry["share"] = tokens_read[source["name"]] / total
        entries.append(entry)
    return entries


def _has_weights(sources: list[dict[str, Any]]) -> bool:
    """Return True if every source has a weight, False if none has; raise UserError for anything in between."""
    without = [source["name"] for source in sources if source.get("weight") is None]
    if len(without) == len(sources):
        return False
    if without:
        raise UserError(f"sources: {', '.join(without)} have no weight, others have; give every source one, or none")
    for source in sources:
        if source.get("epochs") not in (None, 1):
            raise UserError(f"source {source['name']}: weight and epochs contradict each other; give one of them")
        if not source["tokens"]:
            raise UserError(f"source {source['name']} has a weight and no tokens; remove it")
    return True


def _epochs_from_weights(sources: list[dict[str, Any]]) -> dict[str, float]:
    """Return numbers in the right proportion to each other; the caller scales them."""
    weights = {source["name"]: source["weight"] for source in sources}
    _require_positive(weights, "weight of")
    return {source["name"]: source["weight"] / source["tokens"] for source in sources}


def _requested_epochs(sources: list[dict[str, Any]]) -> dict[str, float]:
    epochs = {}
    for source in sources:
        requested = source.get("epochs")
        epochs[source["name"]] = 1.0 if requested is None else requested
    _require_positive(epochs, "epochs of")
    return epochs


def _language_factors(
    sources: list[dict[str, Any]], epochs: dict[str, float], requested: dict[str, float]
) -> dict[str, float]:
    """Return the factor for the epochs of each language: 1 for the scarcest, less for the others."""
    tokens: Counter = Counter()  # read in one mixture epoch without the factors
    for source in sources:
        language = source.get("language")
        if language not in requested:
            raise UserError(
                f"source {source['name']}: `languages` asks for {', '.join(requested)}, and its language is "
                f"{language or 'not given'}; use the same name in both places"
            )
        tokens[language] += epochs[source["name"]] * source["tokens"]
    for language in requested:
        if not tokens[language]:
            raise UserError(f"languages: no source has tokens in `{language}`; add one, or remove it from `languages`")
    available = {language: tokens[language] / ratio for language, ratio in requested.items()}
    scarcest = min(available.values())
    return {language: scarcest / available[language] for language in requested}


def _require_positive(numbers: dict[str, Any], what: str) -> None:
    for name, number in numbers.items():
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not 0 < number < math.inf:
            raise UserError(f"{what} {name} is {number}; write a number above 0")
