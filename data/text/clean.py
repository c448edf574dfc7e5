"""Cleaning: the operators of a profile, in its order, on every document; what they change and drop is counted.

A profile is a YAML file, by name one of data/profiles/:

    steps:
      - normalize_spaces: {collapse: true}    # a mapper changes the text
      - text_length: {min: 50, max: 100000}   # a measure drops the document outside of its bounds
      - han_share                             # without bounds it only keeps the score
      - language: {min_han: 0.2, max_accented: 0.01, keep: [zh, en]}

buddygpt.data.cleaning_operators holds the operators.
"""

import difflib
from collections import Counter
from dataclasses import dataclass
from operator import ne
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.writers.disk_base import DiskWriter

from buddygpt.cli.errors import UserError
from buddygpt.data.text.counts import RowCounts
from buddygpt.data.text.operators import MAPPERS, MEASURES

PROFILES = Path(__file__).parents[1] / "profiles"


@dataclass(frozen=True)
class Step:
    """An operator with its parameters and, of a measure, the bounds that a document has to keep."""

    operator: str
    parameters: dict[str, Any]
    bounds: dict[str, Any]

    def broken_rule(self, value: float | str) -> str | None:
        """Return the name that a document is dropped under, or None where the value is inside the bounds."""
        if value not in self.bounds.get("keep", [value]):
            return f"{self.operator}_{value}"
        if "min" in self.bounds and value < self.bounds["min"]:
            return f"{self.operator}_below"
        return f"{self.operator}_above" if "max" in self.bounds and value > self.bounds["max"] else None


@dataclass(frozen=True)
class Profile:
    """Steps in their order. Profiles that are equal clean alike; `asdict` of one is JSON, for manifests."""

    name: str
    steps: list[Step]


def load_profile(name_or_path: str) -> Profile:
    """Read a profile of data/profiles by its name, or any other by its path.

    Raises:
        UserError: There is no such file, it is no YAML, or an operator or parameter is unknown or has a wrong value.
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
    if not isinstance(content, dict) or set(content) != {"steps"} or not isinstance(content["steps"], list):
        raise UserError(f"{path}: a profile has one key, `steps`, with a list of operators")
    entries = enumerate(content["steps"], 1)
    return Profile(path.stem, [_read_step(entry, f"{path}: step {number}") for number, entry in entries])


def _read_step(entry: Any, where: str) -> Step:
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UserError(f"{where}: `{entry}` is no operator; write `- name` or `- name: {{parameter: value}}`")
    ((name, given),) = entry.items()
    function = {**MAPPERS, **MEASURES}.get(name)
    if not function:
        raise UserError(f"{where}: unknown operator `{name}`{_closest(str(name), {**MAPPERS, **MEASURES})}")
    where = f"{where}, {name}"
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise UserError(f"{where}: `{given}` is no parameters; write `{{parameter: value}}`")
    hints = get_type_hints(function)
    result = hints.pop("return")
    del hints["text"]
    bounds = {} if name in MAPPERS else {"keep": list[str]} if result is str else {"min": float, "max": float}
    for key in given:
        if key not in hints | bounds:
            raise UserError(f"{where}: unknown parameter `{key}`{_closest(str(key), hints | bounds)}")
    for key in hints:
        if key not in given:
            raise UserError(f"{where}: parameter `{key}` is missing")
    values = {key: _check(value, (hints | bounds)[key], f"{where}, {key}") for key, value in given.items()}
    step = Step(name, {key: values[key] for key in hints}, {key: values[key] for key in bounds if key in values})
    try:
        function("", **step.parameters)
    except Exception as error:  # of whatever library: a regular expression, an OpenCC configuration
        raise UserError(f"{where}: {error}") from error
    return step


def _check(value: Any, hint: type, where: str) -> Any:
    """Return the value where it has the type."""
    if get_origin(hint) is list:
        if not isinstance(value, list) or not value:
            raise UserError(f"{where} is `{value}`; give a list of {get_args(hint)[0].__name__}")
        return [_check(each, get_args(hint)[0], where) for each in value]
    allowed = (int, float) if hint is float else hint
    if not isinstance(value, allowed) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} is `{value}`; give a {hint.__name__}")
    return value


def _closest(name: str, names: dict[str, Any]) -> str:
    match = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean `{match[0]}`?" if match else f"; there are: {', '.join(names) or 'none'}"


class Cleaner(BaseFilter):
    """Cleans every document by the profile of its source, and drops it under the name of the first rule it breaks.

    Measures are kept as metadata. Counted are, for every mapper, the documents it changed (`changed_NAME`), dropped
    ones too, and the characters that are fewer, more or others then (`changed_chars_NAME`), and the documents that go
    on by language (`language_NAME`).
    """

    name = "clean"

    def __init__(self, profiles: dict[str, Profile], exclusion_writer: DiskWriter | None = None) -> None:
        super().__init__(exclusion_writer)
        self.profiles = profiles
        self.counts = RowCounts()

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
        """Return the first rule that the document breaks; count the characters that each mapper changes."""
        for step in self.profiles[doc.metadata["source"]].steps:
            if not doc.text or doc.text.isspace():
                return "empty"
            if step.operator in MAPPERS:
                before, doc.text = doc.text, MAPPERS[step.operator](doc.text, **step.parameters)
                if doc.text != before:
                    changed[step.operator] += abs(len(before) - len(doc.text)) or sum(map(ne, before, doc.text))
                continue
            value = MEASURES[step.operator](doc.text, **step.parameters)
            doc.metadata[step.operator] = round(value, 4) if isinstance(value, float) else value
            if rule := step.broken_rule(value):
                return rule
        return None if doc.text and not doc.text.isspace() else "empty"
