"""In which proportion sources are read: from what is wished for to how often each source is read in an epoch."""

import math
from collections import Counter
from typing import Any

from buddygpt.cli.errors import UserError

FACTS = ("name", "language", "tokens", "documents", "text_bytes")


def collect_wishes(generations: list[dict[str, Any]], sources: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return of each source `language`, `epochs` and `weight` as the last config that names it has them.

    Args:
        generations: Of the manifest that is added to.
        sources: What the config says of the sources that it names.
    """
    wishes: dict[str, dict[str, Any]] = {}
    for named in (*(generation["sources"] for generation in generations), sources):
        wishes |= named
    return wishes


def achieve_mixture(sources: list[dict[str, Any]], languages: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """Return what the manifest says of each source: its facts, `epochs`, and its `share` of the tokens read.

    - With weights, sources are read in the proportion of these, and the one that is repeated most has one epoch.
    - Without, every source is read for the `epochs` given, once where none are.
    - `languages` then scales whole languages down until their tokens have the ratio wanted: the language that is
      scarcest keeps its epochs, or, with weights, the source that is repeated most has one epoch again.

    Args:
        sources: Of each `name`, `language`, `tokens`, `documents`, `text_bytes`, and `epochs` or `weight`, if any.
        languages: Wanted tokens by language, in any unit: {"zh": 3, "en": 1}.

    Raises:
        UserError: The wishes contradict each other or what there is.
    """
    weighted = _is_weighted(sources)
    languages = _positive(languages or {}, "languages")
    wished = _wished_epochs(sources, weighted)
    tokens = {source["name"]: source["tokens"] for source in sources}
    if languages:
        factors = _language_factors(sources, wished, languages)
        wished = {source["name"]: wished[source["name"]] * factors[source["language"]] for source in sources}
    if weighted:
        most = max(wished.values())
        wished = {name: epochs / most for name, epochs in wished.items()}
    total = sum(wished[name] * tokens[name] for name in tokens)
    if not total:
        raise UserError("the sources have no tokens to read; see what cleaning has left of them")
    return [
        {key: source.get(key) for key in FACTS}
        | {"epochs": wished[source["name"]], "share": wished[source["name"]] * source["tokens"] / total}
        for source in sources
    ]


def _is_weighted(sources: list[dict[str, Any]]) -> bool:
    without = [source["name"] for source in sources if source.get("weight") is None]
    if 0 < len(without) < len(sources):
        raise UserError(f"sources: {', '.join(without)} have no weight, others have; give every source one, or none")
    if not without:
        for source in sources:
            if source.get("epochs") not in (None, 1):
                raise UserError(f"source {source['name']}: weight and epochs contradict each other; give one of them")
            if not source["tokens"]:
                raise UserError(f"source {source['name']} has a weight and no tokens; take it out")
    return not without


def _wished_epochs(sources: list[dict[str, Any]], weighted: bool) -> dict[str, float]:
    if not weighted:
        given = {source["name"]: source.get("epochs") for source in sources}
        return _positive({name: 1.0 if epochs is None else epochs for name, epochs in given.items()}, "epochs of")
    weights = _positive({source["name"]: source["weight"] for source in sources}, "weight of")
    return {source["name"]: weights[source["name"]] / source["tokens"] for source in sources}


def _language_factors(
    sources: list[dict[str, Any]], epochs: dict[str, float], wanted: dict[str, float]
) -> dict[str, float]:
    """Return by what each language's epochs are multiplied: 1 for the scarcest, less for others."""
    amounts: Counter = Counter()
    for source in sources:
        if source.get("language") not in wanted:
            raise UserError(
                f"source {source['name']}: `languages` asks for {', '.join(wanted)}, and its language is "
                f"{source.get('language') or 'not given'}; name that in both places"
            )
        amounts[source["language"]] += epochs[source["name"]] * source["tokens"]
    for language in wanted:
        if not amounts[language]:
            raise UserError(f"languages: no source has tokens in `{language}`; add one, or take it out of `languages`")
    plenty = {language: amounts[language] / ratio for language, ratio in wanted.items()}
    return {language: min(plenty.values()) / plenty[language] for language in wanted}


def _positive(numbers: dict[str, Any], what: str) -> dict[str, float]:
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
            raise UserError(f"{what} {name} is {number}; write a number above 0")
    return numbers
