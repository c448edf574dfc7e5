"""Convert instruction or preference data of many schemas to the standard form that the recipes read.

    python data/convert_chat.py --input alpaca.json 'sharegpt/*.jsonl' --output outputs/sft.jsonl
    python data/convert_chat.py --input dpo.parquet --output outputs/train.jsonl \
        --eval_fraction 0.02 --eval_output outputs/eval.jsonl
    python data/convert_chat.py --input identity.json --output outputs/me.jsonl --fill name=Buddy author=Us
    python data/convert_chat.py --input mine.csv --output outputs/sft.jsonl --map prompt=ask,completion=reply
    python data/convert_chat.py --input hf://HuggingFaceH4/ultrafeedback_binarized/train_prefs --output outputs/a.jsonl

The schema of a file is recognized by the keys of its rows. Every row is checked: roles alternate, no turn is empty,
the last turn is the assistant's, chosen differs from rejected. Text that looks like a special token gets spaces
(`<| im_end |>`), so that no row can open a turn. The hash of the first question decides which rows are held out.
`--kind kto` makes a good and a bad answer of each pair.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.checkpoints import load_tokenizer
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import ROW_TYPES, find_files, write_atomically
from buddygpt.data.chat.checker import ROWS_TO_RECOGNIZE, RowChecker, SchemaError, find_schema, require_schema
from buddygpt.data.chat.rules import count_remarks, fill_placeholders, select_turns, special_tokens
from buddygpt.data.chat.schemas import SCHEMAS, Schema, recognize
from buddygpt.data.chat.trees import join_replies
from buddygpt.data.text.hubs import find_source_files
from buddygpt.data.text.rows import Row, is_url, progress_bar, read_rows


@dataclass
class ConvertArguments:
    input: list[str] = field(
        metadata={
            "help": "Files or globs: .jsonl, .json, .parquet, .csv, also .gz. Of a hub, hf://OWNER/NAME or "
            "ms://OWNER/NAME, alone or with a file, folder, glob or split: hf://OWNER/NAME/train."
        }
    )
    output: str = field(metadata={"help": "The .jsonl file to write."})
    kind: Literal["sft", "preference", "kto"] | None = field(
        default=None,
        metadata={"help": "Instructions, pairs or labeled answers. Needed if the rows could be several of them."},
    )
    schema: str | None = field(
        default=None, metadata={"help": f"The schema, instead of recognizing it: {', '.join(SCHEMAS)}."}
    )
    map: str | None = field(
        default=None,
        metadata={
            "help": "Columns of an unknown schema, as in prompt=ask,completion=reply; or prompt, chosen and rejected; "
            "or prompt, completion and label. Also system, thinking, history, tools. Other columns are left out."
        },
    )
    on_bad_row: Literal["stop", "skip"] = field(
        default="stop", metadata={"help": "Stop at the first bad row, or skip and count bad rows."}
    )
    turns: Literal["all", "single", "first", "last"] = field(
        default="all",
        metadata={"help": "Instructions: keep all exchanges, only rows of one, only the first or only the last one."},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer to train with, if it has special tokens unlike <|...|>."}
    )
    fill: list[str] = field(default_factory=list, metadata={"help": "name=Buddy replaces {{name}} by Buddy."})
    exams: list[str] = field(
        default_factory=list, metadata={"help": "Folders of benchmarks. A row that contains an item of one is bad."}
    )
    eval_fraction: float = field(default=0.0, metadata={"help": "Share of the questions to hold out."})
    eval_output: str | None = field(default=None, metadata={"help": "The .jsonl file for the held-out rows."})

    def __post_init__(self):
        kinds = {self.kind, "preference"} if self.kind == "kto" else {self.kind}  # a pair is two labeled answers
        known = [name for name, entry in SCHEMAS.items() if self.kind is None or entry.kind in kinds]
        if self.schema is not None and self.schema not in known:
            of_kind = f" for kind {self.kind}" if self.kind else ""
            raise ValueError(f"schema `{self.schema}` is unknown{of_kind}; there are: {', '.join(known)}")
        if not 0 <= self.eval_fraction < 1 or (self.eval_fraction > 0) != (self.eval_output is not None):
            raise ValueError("eval_fraction (between 0 and 1) and eval_output go together")
        if self.map is not None:
            columns = self.mapped_columns()
            matches = recognize(dict.fromkeys(columns, ""), self.kind)
            if len(matches) != 1 and self.schema is None:
                raise ValueError(
                    f"map `{self.map}` names no known columns: give prompt=COLUMN,completion=COLUMN, or prompt, "
                    "chosen and rejected, or prompt, completion and label"
                )
            self.schema = self.schema or matches[0].name
        for entry in self.fill:
            key, equals, _ = entry.partition("=")
            if not equals or not key.isidentifier():
                raise ValueError(f"fill takes key=value, as in --fill name=Buddy; not `{entry}`")

    def mapped_columns(self) -> dict[str, str]:
        """Return `map` as a dict: known column -> column of the file."""
        pairs = [entry.partition("=") for entry in (self.map or "").split(",") if entry.strip()]
        if not all(known.strip() and column.strip() for known, _, column in pairs):
            raise ValueError(f"map takes KNOWN=COLUMN,..., as in prompt=question,completion=answer; not `{self.map}`")
        return {known.strip(): column.strip() for known, _, column in pairs}


def main() -> None:
    (args,) = parse_arguments(ConvertArguments, description=__doc__)
    inputs = find_inputs(args.input)
    outputs = [Path(name) for name in (args.output, args.eval_output) if name]
    paths = [path for path in inputs if isinstance(path, Path)] + outputs
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("the same file is named twice among input, output and eval_output")

    try:
        schemas = find_schemas(inputs, args)
        total = convert_files(schemas, outputs, args)
    except SchemaError as error:
        raise UserError(f"{error}. To read all rows by one schema, give --schema NAME") from error
    for path, name in zip(outputs, ("written", "held out"), strict=False):
        print(f"{path}: {total[name]:,} rows")


def find_inputs(patterns: list[str]) -> list[Path | str]:
    """Return the files that paths, globs and folders match, and the URLs of files of hubs, each once."""
    found: dict[Path | str, None] = {}
    for pattern in patterns:
        files = find_source_files(pattern, ROW_TYPES) if is_url(pattern) else find_files([pattern], ROW_TYPES)
        found.update(dict.fromkeys(file if is_url(file) else Path(file) for file in files))
    return list(found)


def find_schemas(paths: list[Path | str], args: ConvertArguments) -> dict[Path | str, Schema]:
    """Return the schema of every file. All must be of one kind."""
    for path in paths if args.map else ():
        row = first_good_row(path)
        missing = [column for column in args.mapped_columns().values() if row and column not in row.content]
        if row and missing:
            raise UserError(f"{path}: no column `{missing[0]}`; there are: {', '.join(row.content)}. Fix --map")
    if args.schema:
        return dict.fromkeys(paths, SCHEMAS[args.schema])
    schemas = {path: find_schema(path, kind_to_read(path, args.kind)) for path in paths}
    first_path, first = next(iter(schemas.items()))
    for path, schema in schemas.items():
        if schema.kind != first.kind:
            raise UserError(
                f"{path} holds {schema.kind} rows ({schema.name}), {first_path} holds {first.kind} rows "
                f"({first.name}). Convert them separately, or give --kind"
            )
    return schemas


def first_good_row(path: Path | str) -> Row | None:
    """Return the first row of a file that can be read. Only as many rows as recognition looks at are tried."""
    rows = islice(read_rows(path), ROWS_TO_RECOGNIZE)
    return next((row for row in rows if not row.error and row.content), None)


def kind_to_read(path: Path | str, kind: str | None) -> str | None:
    """Return the kind of a file that becomes rows of `kind`: a pair can become a good and a bad answer."""
    row = first_good_row(path)
    if kind == "kto" and row and not recognize(row.content, "kto") and recognize(row.content, "preference"):
        return "preference"
    return kind


def unpair(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the two labeled answers of a pair."""
    shared = {key: value for key, value in row.items() if key not in ("chosen", "rejected")}
    labels = (("chosen", True), ("rejected", False))
    return [shared | {"completion": row[answer], "label": label} for answer, label in labels]


def convert_files(schemas: dict[Path | str, Schema], outputs: list[Path], args: ConvertArguments) -> Counter:
    """Convert all files into `outputs` (training rows, then held-out rows if any) and return the counts."""
    first_path, first = next(iter(schemas.items()))
    if args.turns != "all" and first.kind != "sft":
        raise UserError(f"--turns {args.turns} is for instructions; {first_path} holds {first.kind} rows")
    tokens = special_tokens(load_tokenizer(args.tokenizer)) if args.tokenizer else ()
    checker = RowChecker(first.kind, tokens, args.exams)
    total = Counter()
    with ExitStack() as stack:
        # The outputs appear only once all rows are converted.
        files = []
        for path in outputs:
            partial = stack.enter_context(write_atomically(path))
            files.append(stack.enter_context(open(partial, "w", encoding="utf-8", newline="\n")))
        train, held_out = files if len(files) == 2 else (files[0], None)
        for path, schema in schemas.items():
            total += convert_file(path, schema, checker, args, train, held_out)
        if not total["written"]:
            raise UserError(f"no row is left for {args.output}: {total['read']} read; see the reasons above")
    return total


def convert_file(
    path: Path | str, schema: Schema, checker: RowChecker, args: ConvertArguments, train: Any, held_out: Any
) -> Counter:
    """Write the rows of one file; print and return the counts."""
    counts, first_line = Counter(), {}
    for row in standard_rows(path, schema, checker, args, counts, first_line):
        split = held_out if held_out and is_held_out(row, args.eval_fraction) else train
        split.write(json.dumps(row, ensure_ascii=False) + "\n")
        counts["held out" if split is held_out else "written"] += 1
        for remark, count in count_remarks(row).items():
            counts[f"warning: {remark}"] += count
    print(f"{path} ({schema.name}, {schema.kind})")
    for name, count in counts.items():
        if count:
            place = f" (first at {path}:{first_line[name]})" if name in first_line else ""
            print(f"{count:>12,}  {name}{place}")
    return counts


def standard_rows(
    path: Path | str,
    schema: Schema,
    checker: RowChecker,
    args: ConvertArguments,
    counts: Counter,
    first_line: dict[str, int],
) -> Iterator[dict[str, Any]]:
    """Yield every good row of one file in standard form; fill `counts`, and the first line of each reason to skip."""
    values = dict(entry.split("=", 1) for entry in args.fill)
    columns = args.mapped_columns()
    with progress_bar([path], desc=PurePosixPath(path).name) as bar:
        for row in join_replies(read_rows(path, bar=bar), schema):
            counts["read"] += 1
            if not args.schema:
                require_schema(path, row, schema, schema.kind if args.kind else None)
            if columns and not row.error:
                content = {known: row.content[column] for known, column in columns.items() if column in row.content}
                row = row._replace(content=content)
            if values and not row.error:
                row = row._replace(content=fill_placeholders(row.content, values))

            checked = checker.check(row, schema)
            if reason := checked.reason_to_refuse:
                if args.on_bad_row == "stop":
                    raise UserError(f"{path}:{row.number}: {reason}. Fix the row, or give --on_bad_row skip")
                counts[f"skipped: {reason}"] += 1
                first_line.setdefault(f"skipped: {reason}", row.number)
                continue

            counts["special tokens escaped"] += checked.escaped
            counts.update(f"not read: {key}" for key in checked.unread)
            chosen = [select_turns(standard, args.turns) for standard in checked.standard]
            counts["left out: more than one exchange"] += chosen.count(None)
            for standard in chosen:
                if standard is not None:
                    yield from unpair(standard) if schema.kind == "preference" and args.kind == "kto" else [standard]


def is_held_out(row: dict[str, Any], fraction: float) -> bool:
    """Return True if the hash of the first question is in the first `fraction` of all hashes, so always the same."""
    messages = row.get("messages", row.get("prompt"))
    question = next(turn["content"] for turn in messages if turn["role"] == "user")
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") < fraction * 2**64


if __name__ == "__main__":
    run_script(main)
