"""Clean documents with the operators of a profile, in its order, and count what they change and drop.

A profile is a YAML file of data/profiles/ by name, or any other by path:

    steps:
      - normalize_spaces: {collapse: true}    # a mapper changes the text
      - text_length: {min: 50, max: 100000}   # a measure drops the document if the value is out of bounds
      - han_share                             # without bounds, the value is only kept as metadata
      - language: {min_han: 0.2, max_accented: 0.01, keep: [zh, en]}

Longer texts than `max_chars`, by default five million, are first split at line ends. mappers.py and measures.py
have the operators.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.disk_base import DiskWriter

from buddygpt.cli.errors import UserError, did_you_mean
from buddygpt.data.text.counts import RowCounts
from buddygpt.data.text.mappers import MAPPERS
from buddygpt.data.text.measures import MEASURES

MAX_CHARS = 5_000_000  # of a document: memory grows with the longest
PROFILES = Path(__file__).parents[1] / "profiles"


@dataclass(frozen=True)
class Step:
    """An operator with its parameters. A measure also has bounds: `min` and `max`, or `keep` for labels."""

    operator: str
    parameters: dict[str, Any]
    bounds: dict[str, Any]

    def broken_rule(self, value: float | str) -> str | None:
        """Return the name of the rule that drops a document with this value, or None if it is within the bounds."""
        if "keep" in self.bounds and value not in self.bounds["keep"]:
            return f"{self.operator}_{value}"
        if "min" in self.bounds and value < self.bounds["min"]:
            return f"{self.operator}_below"
        if "max" in self.bounds and value > self.bounds["max"]:
            return f"{self.operator}_above"
        return None


@dataclass(frozen=True)
class Profile:
    """The steps of cleaning, in order. Equal profiles clean alike. `asdict` of a profile is JSON for the manifest."""

    name: str
    steps: list[Step]
    max_chars: int | None = None  # longer texts are split; None: than `MAX_CHARS`


FIRST_STEP = Step("normalize_line_ends", {}, {})  # of every profile


def load_profile(name_or_path: str) -> Profile:
    """Read a profile of data/profiles by name, or any other by path.

    Raises:
        UserError: The file does not exist or is not YAML, an operator or parameter is unknown, or a value is wrong.
    """
    path = PROFILES / f"{name_or_path}.yaml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        names = ", ".join(sorted(path.stem for path in PROFILES.glob("*.yaml")))
        raise UserError(f"clean: there is no profile `{name_or_path}`; use one of {names}, or the path of a YAML file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    keys = set(content) if isinstance(content, dict) else set()
    if not {"steps"} <= keys <= {"steps", "max_chars"} or not isinstance(content["steps"], list):
        raise UserError(f"{path}: a profile has one key, `steps`, with a list of operators, and may have `max_chars`")
    max_chars = content.get("max_chars")
    if max_chars is not None and (type(max_chars) is not int or max_chars < 1):
        raise UserError(f"{path}: max_chars is `{max_chars}`; give a number of characters, at least 1")
    steps = []
    for number, entry in enumerate(content["steps"], start=1):
        steps.append(_read_step(entry, f"{path}: step {number}"))
    return Profile(path.stem, steps, max_chars)


def _read_step(entry: Any, where: str) -> Step:
    """Return a step of a profile.

    Args:
        entry: `NAME`, or `{NAME: {PARAMETER: VALUE}}`.
        where: File and number of the step, for error messages.
    """
    # The name of the operator, and its parameters as they are given.
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UserError(f"{where}: `{entry}` is not an operator; write `- name` or `- name: {{parameter: value}}`")
    ((name, given),) = entry.items()
    operators = MAPPERS | MEASURES
    if name not in operators:
        raise UserError(f"{where}: unknown operator `{name}`{_suggestion(str(name), operators)}")
    where = f"{where}, {name}"
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise UserError(f"{where}: `{given}` are not parameters; write `{{parameter: value}}`")

    # The function's type hints say which parameters there are. A measure also has bounds.
    function = operators[name]
    parameters = get_type_hints(function)
    result = parameters.pop("return")
    del parameters["text"]
    bounds = {}
    if name in MEASURES:
        bounds = {"keep": list[str]} if result is str else {"min": float, "max": float}
    known = parameters | bounds
    for key in given:
        if key not in known:
            raise UserError(f"{where}: unknown parameter `{key}`{_suggestion(str(key), known)}")
    for key in parameters:
        if key not in given and key not in (function.__kwdefaults__ or {}):
            raise UserError(f"{where}: parameter `{key}` is missing")
    for key, value in given.items():
        _check_value(value, known[key], f"{where}, {key}")
    step = Step(
        operator=name,
        parameters={key: given[key] for key in parameters if key in given},
        bounds={key: given[key] for key in bounds if key in given},
    )

    # Try it once: libraries check regular expressions and OpenCC configurations only now, with errors of any type.
    try:
        function("", **step.parameters)
    except Exception as error:
        raise UserError(f"{where}: {error}") from error
    return step


def _check_value(value: Any, hint: type, where: str) -> None:
    """Raise UserError if the value does not have the type. An int is also a float; a bool is not a number."""
    if get_origin(hint) is list:
        (item,) = get_args(hint)
        if not isinstance(value, list) or not value:
            raise UserError(f"{where} is `{value}`; give a list of {item.__name__}")
        for each in value:
            _check_value(each, item, where)
        return
    allowed = (int, float) if hint is float else hint
    if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} is `{value}`; give a {hint.__name__}")


def _suggestion(name: str, known: dict[str, Any]) -> str:
    """Return the end of an error message about an unknown name: the most similar one, or all there are."""
    match = did_you_mean(name, known)
    return f"; did you mean `{match}`?" if match else f"; there are: {', '.join(known) or 'none'}"


class Cleaner(BaseFilter):
    """Cleans every document with the profile of its source, and drops it under the first rule that it breaks.

    The values of measures are kept as metadata. Counts for every mapper the documents it changed, also those that are
    dropped later (`changed_NAME`), and the characters it changed (`changed_chars_NAME`); and the documents kept for
    every language (`language_NAME`).
    """

    name = "clean"

    def __init__(self, profiles: dict[str, Profile], exclusion_writer: DiskWriter | None = None) -> None:
        super().__init__(exclusion_writer)
        self.profiles = profiles
        self.counts = RowCounts()

    def run(self, data: Iterator[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        parts = (part for document in data for part in self._split(document))
        return super().run(parts, rank, world_size)

    def _split(self, doc: Document) -> Iterator[Document]:
        """Yield the document or, if it is longer than its profile allows, its parts: ID#1, ID#2, ..."""
        limit = self.profiles[doc.metadata["source"]].max_chars or MAX_CHARS
        if len(doc.text) <= limit:
            yield doc
            return
        for number, part in enumerate(split_text(doc.text, limit), start=1):
            yield Document(part, id=f"{doc.id}#{number}", metadata=dict(doc.metadata))

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        changed: Counter = Counter()
        rule = self._clean(doc, changed)
        for operator, chars in changed.items():
            self.counts.add("changed", operator)
            self.counts.add("changed_chars", operator, chars)
        if rule:
            self.counts.add("dropped", rule)
            return False, rule
        if "language" in doc.metadata:
            self.counts.add("language", doc.metadata["language"])
        return True

    def _clean(self, doc: Document, changed: Counter) -> str | None:
        """Return the first rule that the document breaks. Add to `changed` the characters that each mapper changes."""
        for step in (FIRST_STEP, *self.profiles[doc.metadata["source"]].steps):
            if _is_blank(doc.text):
                return "empty"
            if step.operator in MAPPERS:
                before = doc.text
                doc.text = MAPPERS[step.operator](before, **step.parameters)
                if doc.text != before:
                    changed[step.operator] += _changed_characters(before, doc.text)
            else:
                value = MEASURES[step.operator](doc.text, **step.parameters)
                doc.metadata[step.operator] = round(value, 4) if isinstance(value, float) else value
                if rule := step.broken_rule(value):
                    return rule
        return "empty" if _is_blank(doc.text) else None


def split_text(text: str, limit: int) -> Iterator[str]:
    """Yield parts of at most `limit` characters and similar lengths, cut after a line or sentence if possible."""
    start = 0
    while (left := len(text) - start) > limit:
        size = -(-left // -(-left // limit))
        cuts = (text.rfind(end, start + size // 2, start + size) for end in ("\n", "。", ". "))
        cut = next((cut + 1 for cut in cuts if cut >= 0), start + size)
        yield text[start:cut]
        start = cut
    yield text[start:]


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def _changed_characters(before: str, after: str) -> int:
    """Return by how much the length changed or, if it did not, how many characters differ."""
    if len(before) != len(after):
        return abs(len(before) - len(after))
    return sum(old != new for old, new in zip(before, after, strict=True))
