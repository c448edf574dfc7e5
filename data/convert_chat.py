"""Convert instruction or preference data of many schemas to the standard form that the recipes read.

    python data/convert_chat.py --kind sft --input alpaca.json 'sharegpt/*.jsonl' --output outputs/sft.jsonl
    python data/convert_chat.py --kind preference --input dpo.parquet --output outputs/train.jsonl \
        --eval_fraction 0.02 --eval_output outputs/eval.jsonl

The schema of each file is recognised by the keys of its first row. Every row is checked: roles alternate, no turn is
empty, the last turn is the assistant's, chosen differs from rejected. Text spelt like a special token gets spaces
(`<| im_end |>`), so that no row can open a turn. A hash of the first question alone decides which rows are held out.
"""

import hashlib
import json
import os
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from buddygpt.data.chat_schemas import SCHEMAS, BadRow, Schema, check_row, neutralise, recognise
from buddygpt.data.text_files import find_files, progress_bar, read_rows
from buddygpt.launch import UserError, parse_arguments, run_script


@dataclass
class ConvertArguments:
    input: list[str] = field(metadata={"help": "Files or globs: .jsonl, .json, .parquet, .csv, also .gz."})
    output: str = field(metadata={"help": "The .jsonl file to write."})
    kind: Literal["sft", "preference"] = field(metadata={"help": "Instructions or preference pairs."})
    schema: str | None = field(default=None, metadata={"help": f"Instead of recognition: {', '.join(SCHEMAS)}."})
    on_bad_row: Literal["stop", "skip"] = field(default="stop", metadata={"help": "What a bad row does."})
    eval_fraction: float = field(default=0.0, metadata={"help": "Share of the questions that is held out."})
    eval_output: str | None = field(default=None, metadata={"help": "The .jsonl file for the held-out rows."})

    def __post_init__(self):
        known = [name for name, entry in SCHEMAS.items() if entry.kind == self.kind]
        if self.schema is not None and self.schema not in known:
            raise ValueError(f"schema `{self.schema}` is unknown for kind {self.kind}; there are: {', '.join(known)}")
        if not 0 <= self.eval_fraction < 1 or (self.eval_fraction > 0) != (self.eval_output is not None):
            raise ValueError("eval_fraction (between 0 and 1) and eval_output go together")


def find_schema(path: Path, row: dict[str, Any], args: ConvertArguments) -> Schema:
    """Return the schema asked for, or the only one that the file's first row fits."""
    if args.schema:
        return SCHEMAS[args.schema]
    matches = recognise(row, args.kind)
    if len(matches) == 1:
        return matches[0]
    fault = f"fits several schemas ({', '.join(entry.name for entry in matches)})" if matches else "fits no schema"
    known = [f"{s.name} ({', '.join(sorted(s.keys))})" for s in SCHEMAS.values() if s.kind == args.kind]
    raise UserError(f"{path}:1: {fault}; its keys: {', '.join(row)}. Give --schema, one of: {'; '.join(known)}")


def convert(row: dict[str, Any], schema: Schema) -> tuple[dict[str, Any], int]:
    """Return the row in its standard form and how many special tokens were neutralised; BadRow where it is not fit."""
    if missing := schema.keys - row.keys():
        raise BadRow(f"no key {' and '.join(sorted(missing))}, unlike the schema {schema.name}")
    try:
        standard = schema.read(row)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, BadRow):
            raise
        raise BadRow(f"does not have the types of the schema {schema.name}") from error
    standard, neutralised = neutralise(standard)
    check_row(standard, schema.kind)
    return standard, neutralised


def is_held_out(row: dict[str, Any], fraction: float) -> bool:
    """Whether the hash of the first question lies in the first `fraction` of all hashes: the same in every run."""
    question = next(turn["content"] for turn in row.get("messages", row.get("prompt")) if turn["role"] == "user")
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") < fraction * 2**64


def convert_file(path: Path, args: ConvertArguments, train: Any, held_out: Any) -> Counter:
    """Write every good row of one file, print and return the counts, with the first place of every fault."""
    counts, first_line, schema = Counter(), {}, None
    with progress_bar([path], desc=path.name) as bar:
        for number, row, fault in read_rows(path, bar=bar):
            counts["read"] += 1
            try:
                if fault:
                    raise BadRow(fault)
                schema = schema or find_schema(path, row, args)
                standard, neutralised = convert(row, schema)
            except BadRow as error:
                if args.on_bad_row == "stop":
                    raise UserError(f"{path}:{number}: {error}. Mend the row, or give --on_bad_row skip") from error
                counts[f"skipped: {error}"] += 1
                first_line.setdefault(f"skipped: {error}", number)
                continue
            split = held_out if held_out and is_held_out(standard, args.eval_fraction) else train
            split.write(json.dumps(standard, ensure_ascii=False) + "\n")
            counts["held out" if split is held_out else "written"] += 1
            counts["special tokens neutralised"] += neutralised
    if schema is None:
        raise UserError(f"{path} has no row that can be read: {dict(counts)}" if counts else f"{path} is empty")
    print(f"{path} ({schema.name})")
    for name, count in counts.items():
        print(f"{count:>12,}  {name}" + (f" (first at {path}:{first_line[name]})" if name in first_line else ""))
    return counts


def main() -> None:
    (args,) = parse_arguments(ConvertArguments, description=__doc__)
    inputs = find_files(args.input)
    outputs = [Path(name) for name in (args.output, args.eval_output) if name]
    if len({path.resolve() for path in inputs + outputs}) < len(inputs) + len(outputs):
        raise UserError("the same file is named twice among input, output and eval_output")
    partials = [path.with_name(path.name + ".partial") for path in outputs]
    total = Counter()
    try:
        with ExitStack() as stack:
            files = []
            for path in partials:
                path.parent.mkdir(parents=True, exist_ok=True)
                files.append(stack.enter_context(open(path, "w", encoding="utf-8", newline="\n")))
            for path in inputs:
                total += convert_file(path, args, files[0], files[1] if len(files) > 1 else None)
        if not total["written"]:
            raise UserError(f"no row is left for {args.output}: {total['read']} read; see the reasons above")
        for partial, path in zip(partials, outputs, strict=True):
            os.replace(partial, path)
    finally:
        for partial in partials:
            partial.unlink(missing_ok=True)
    for path, name in zip(outputs, ("written", "held out"), strict=False):
        print(f"{path}: {total[name]:,} rows")


if __name__ == "__main__":
    run_script(main)
