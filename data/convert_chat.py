"""Convert instruction or preference data of many schemas to the standard form that the recipes read.

    python data/convert_chat.py --input alpaca.json 'sharegpt/*.jsonl' --output outputs/sft.jsonl
    python data/convert_chat.py --input dpo.parquet --output outputs/train.jsonl \
        --eval_fraction 0.02 --eval_output outputs/eval.jsonl
    python data/convert_chat.py --input identity.json --output outputs/me.jsonl --fill name=Buddy author=Us

The schema of each file is recognised by the keys of its rows. Every row is checked: roles alternate, no turn is
empty, the last turn is the assistant's, chosen differs from rejected. Text spelt like a special token gets spaces
(`<| im_end |>`), so that no row can open a turn. A hash of the first question alone decides which rows are held out.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.checkpoints import load_tokenizer
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import find_files
from buddygpt.data.chat.exams import open_exams, refuse_exam_items
from buddygpt.data.chat.rules import BadRow, count_remarks, fill_placeholders, select_turns, special_tokens
from buddygpt.data.chat.schemas import SCHEMAS, Schema, convert, find_schema, require_schema
from buddygpt.data.text.rows import progress_bar, read_rows


@dataclass
class ConvertArguments:
    input: list[str] = field(metadata={"help": "Files or globs: .jsonl, .json, .parquet, .csv, also .gz."})
    output: str = field(metadata={"help": "The .jsonl file to write."})
    kind: Literal["sft", "preference", "kto"] | None = field(
        default=None, metadata={"help": "Instructions, pairs or labelled answers; where rows are several, which."}
    )
    schema: str | None = field(default=None, metadata={"help": f"Instead of recognition: {', '.join(SCHEMAS)}."})
    on_bad_row: Literal["stop", "skip"] = field(default="stop", metadata={"help": "What a bad row does."})
    turns: Literal["all", "single", "first", "last"] = field(
        default="all",
        metadata={"help": "Of instructions: all exchanges, rows of a single one, the first or the last alone."},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder of the one to train with, if it has special tokens unlike <|...|>."}
    )
    fill: list[str] = field(default_factory=list, metadata={"help": "name=Buddy puts Buddy where {{name}} stands."})
    exams: list[str] = field(
        default_factory=list, metadata={"help": "Folders of exams; a row that holds an item of theirs is a bad row."}
    )
    eval_fraction: float = field(default=0.0, metadata={"help": "Share of the questions that is held out."})
    eval_output: str | None = field(default=None, metadata={"help": "The .jsonl file for the held-out rows."})

    def __post_init__(self):
        known = [name for name, entry in SCHEMAS.items() if self.kind in (None, entry.kind)]
        if self.schema is not None and self.schema not in known:
            of_kind = f" for kind {self.kind}" if self.kind else ""
            raise ValueError(f"schema `{self.schema}` is unknown{of_kind}; there are: {', '.join(known)}")
        if not 0 <= self.eval_fraction < 1 or (self.eval_fraction > 0) != (self.eval_output is not None):
            raise ValueError("eval_fraction (between 0 and 1) and eval_output go together")
        if wrong := [entry for entry in self.fill if not entry.partition("=")[0].isidentifier() or "=" not in entry]:
            raise ValueError(f"fill takes key=value, as in --fill name=Buddy; not `{wrong[0]}`")


def is_held_out(row: dict[str, Any], fraction: float) -> bool:
    """Whether the hash of the first question lies in the first `fraction` of all hashes: the same in every run."""
    question = next(turn["content"] for turn in row.get("messages", row.get("prompt")) if turn["role"] == "user")
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") < fraction * 2**64


def make_converter(args: ConvertArguments) -> Callable[[dict[str, Any], Schema], tuple[list[dict[str, Any]], int]]:
    """Return `convert` with the placeholders, tokenizer and exams of the arguments, each read once."""
    values = dict(entry.split("=", 1) for entry in args.fill)
    tokens = special_tokens(load_tokenizer(args.tokenizer)) if args.tokenizer else ()
    exams = open_exams(args.exams)

    def convert_row(row: dict[str, Any], schema: Schema) -> tuple[list[dict[str, Any]], int]:
        standard, neutralised = convert(fill_placeholders(row, values) if values else row, schema, tokens)
        for each in standard:
            refuse_exam_items(each, schema.kind, exams)
        return standard, neutralised

    return convert_row


def standard_rows(
    path: Path,
    schema: Schema,
    args: ConvertArguments,
    convert_row: Callable,
    counts: Counter,
    first_line: dict[str, int],
) -> Iterator[dict[str, Any]]:
    """Yield every good row of one file in standard form; count them all, and note where each reason comes first."""
    with progress_bar([path], desc=path.name) as bar:
        for row in read_rows(path, bar=bar):
            counts["read"] += 1
            try:
                if row.error:
                    raise BadRow(row.error)
                if not args.schema:
                    require_schema(path, row, schema, args.kind)
                standard, neutralised = convert_row(row.content, schema)
            except BadRow as error:
                if args.on_bad_row == "stop":
                    raise UserError(
                        f"{path}:{row.number}: {error}. Mend the row, or give --on_bad_row skip"
                    ) from error
                counts[f"skipped: {error}"] += 1
                first_line.setdefault(f"skipped: {error}", row.number)
                continue
            counts["special tokens neutralised"] += neutralised
            if args.turns != "all":
                standard = [select_turns(each, args.turns) for each in standard]
            counts["left out: more than one exchange"] += standard.count(None)
            yield from filter(None, standard)


def convert_file(
    path: Path, schema: Schema, args: ConvertArguments, convert_row: Callable, train: Any, held_out: Any
) -> Counter:
    """Write the rows of one file, print and return the counts."""
    counts, first_line = Counter(), {}
    for row in standard_rows(path, schema, args, convert_row, counts, first_line):
        split = held_out if held_out and is_held_out(row, args.eval_fraction) else train
        split.write(json.dumps(row, ensure_ascii=False) + "\n")
        counts["held out" if split is held_out else "written"] += 1
        counts.update({f"warning: {name}": count for name, count in count_remarks(row).items()})
    print(f"{path} ({schema.name}, {schema.kind})")
    for name, count in (+counts).items():
        print(f"{count:>12,}  {name}" + (f" (first at {path}:{first_line[name]})" if name in first_line else ""))
    return counts


def find_schemas(paths: list[Path], args: ConvertArguments) -> list[Schema]:
    """Return the schema of every file, all of one kind."""
    if args.schema:
        return [SCHEMAS[args.schema]] * len(paths)
    schemas = [find_schema(path, read_rows(path), args.kind) for path in paths]
    for path, schema in zip(paths, schemas, strict=True):
        if schema.kind != schemas[0].kind:
            raise UserError(
                f"{path} holds {schema.kind} rows ({schema.name}), {paths[0]} holds {schemas[0].kind} rows "
                f"({schemas[0].name}). Convert them apart, or give --kind"
            )
    return schemas


def main() -> None:
    (args,) = parse_arguments(ConvertArguments, description=__doc__)
    inputs = find_files(args.input)
    outputs = [Path(name) for name in (args.output, args.eval_output) if name]
    if len({path.resolve() for path in inputs + outputs}) < len(inputs) + len(outputs):
        raise UserError("the same file is named twice among input, output and eval_output")
    schemas = find_schemas(inputs, args)
    if args.turns != "all" and schemas[0].kind != "sft":
        raise UserError(f"--turns {args.turns} is for instructions; {inputs[0]} holds {schemas[0].kind} rows")
    convert_row = make_converter(args)
    partials = [path.with_name(path.name + ".partial") for path in outputs]
    total = Counter()
    try:
        with ExitStack() as stack:
            files = []
            for path in partials:
                path.parent.mkdir(parents=True, exist_ok=True)
                files.append(stack.enter_context(open(path, "w", encoding="utf-8", newline="\n")))
            for path, schema in zip(inputs, schemas, strict=True):
                total += convert_file(path, schema, args, convert_row, files[0], files[1] if len(files) > 1 else None)
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
