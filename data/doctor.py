"""Is this data fit to train on? Bad rows, languages, lengths, loss, duplicates, exam overlap, and two examples.

    python data/doctor.py alpaca.json --tokenizer outputs/tokenizer
    python data/doctor.py outputs/sft_train.jsonl --stage sft --tokenizer outputs/base --max_length 2048
    python data/doctor.py 'corpus/*.jsonl.gz' --stage pretrain --exams ../exams/cmmlu ../exams/gsm8k

Instruction, preference and labelled rows are judged as data/convert_chat.py would write them, pretraining text as it
stands. The recipes refuse what is not fit unless forced; overlap with exams, if they are given the same `exams`.

Exit status: 0 fit, 1 not fit, 2 the files cannot be examined.
"""

import argparse
import hashlib
import os
import re
import shlex
import sys
from itertools import islice
from pathlib import Path

from ftfy.badness import is_bad
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from buddygpt.cli.checkpoints import load_tokenizer
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import file_type, find_files
from buddygpt.data.chat.exams import open_exams, row_text
from buddygpt.data.chat.report import CONTROL, Findings, format_examples, format_findings, format_verdict
from buddygpt.data.chat.rules import FORMS, BadRow, count_remarks, special_tokens
from buddygpt.data.chat.schemas import ROWS_LOOKED_AT, SCHEMAS, Schema, convert, find_schema, recognise, require_schema
from buddygpt.data.chat.tokens import TokenSequence, tokenise
from buddygpt.data.text.rows import Row, progress_bar, read_rows

KINDS = {"sft": "sft", "dpo": "preference", "kto": "kto", "pretrain": "text"}  # stage: kind of row
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
LATIN = re.compile("[A-Za-z\u00c0-\u024f]")
LETTER = re.compile(r"[^\W\d_]")
SHARE_OF_AN_EXAMPLE = 0.9  # of its text that is in its language
LETTERS_OF_A_HAN = 3  # an English word has about three times as many letters as a Chinese word has characters


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("paths", metavar="PATH", nargs="+", help="files, globs or folders of one stage")
    parser.add_argument("--stage", choices=KINDS, help="what the rows are for (default: as they are recognised)")
    parser.add_argument("--schema", choices=SCHEMAS, metavar="NAME", help="instead of recognition by the rows' keys")
    parser.add_argument("--tokenizer", metavar="DIR", help="for lengths in tokens and, of chats, loss and examples")
    parser.add_argument("--max_length", type=int, default=1024, help="tokens kept of a row (default: %(default)s)")
    parser.add_argument("--exams", nargs="+", default=[], metavar="FOLDER", help="exams to look for in the rows")
    parser.add_argument(
        "--text_key", nargs="+", default=["text", "content"], help="column of pretraining text (default: text content)"
    )
    return parser.parse_args()


def find_language(text: str) -> tuple[str, float]:
    """Return the language by script, `zh` (Han), `en` (Latin) or `other`, and the share of the text that is in it."""
    han, latin, letters = (len(pattern.findall(text)) for pattern in (HAN, LATIN, LETTER))
    amounts = {"zh": han * LETTERS_OF_A_HAN, "en": latin, "other": letters - han - latin}
    language = max(amounts, key=amounts.get) if letters else "other"
    return language, amounts[language] / max(sum(amounts.values()), 1)


def fingerprint(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class Doctor:
    """Examines rows one after the other; what stays in memory is two hashes and a length of each."""

    def __init__(
        self,
        kind: str,
        max_length: int = 1024,
        tokenizer: PreTrainedTokenizerBase | None = None,
        exams: tuple[str, ...] = (),
    ):
        self.kind, self.tokenizer = kind, tokenizer
        self.special_tokens = special_tokens(tokenizer) if tokenizer else ()
        self.findings = Findings(kind, max_length, tokenizer, list(exams))
        self.exams = open_exams(exams)

    def examine_chat(self, place: tuple, row: Row, schema: Schema) -> None:
        """Examine all that a row stands for, once converted; a bad row is noted with its place."""
        try:
            if row.error:
                raise BadRow(row.error)
            standard, neutralised = convert(row.content, schema, self.special_tokens)
            tokenised = [tokenise(each, self.kind, self.tokenizer) if self.tokenizer else [] for each in standard]
        except BadRow as error:
            self.findings.add_fault(str(error), place)
            return
        self.findings.remarks["texts spelt like a special token, which the converter neutralises"] += neutralised
        for each, sequences in zip(standard, tokenised, strict=True):
            keys = (*FORMS[self.kind], "tools")
            self.findings.not_standard += any((row.content.get(key) or None) != each.get(key) for key in keys)
            self.findings.remarks.update(count_remarks(each))
            question = next(turn["content"] for turn in each[keys[0]] if turn["role"] == "user")
            self.findings.add_text("questions", fingerprint(question.strip()), place)
            self._examine(place, row_text(each, self.kind), sequences)

    def examine_text(self, place: tuple, row: Row) -> None:
        """Examine a document; one that is empty or cannot be read is noted with its place."""
        if row.error or not row.content.strip():
            self.findings.add_fault(row.error or "empty", place)
            return
        text = row.content
        self.findings.remarks["documents with U+FFFD: an encoding was lost"] += "\ufffd" in text
        self.findings.remarks["documents in a wrong encoding (mojibake)"] += is_bad(text)
        self.findings.remarks["documents with control characters"] += bool(CONTROL.search(text.replace("\r", "")))
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] if self.tokenizer else []
        self._examine(place, text, [TokenSequence(ids, [1] * len(ids))] if self.tokenizer else [])

    def _examine(self, place: tuple, text: str, sequences: list[TokenSequence]) -> None:
        language, share = find_language(text)
        self.findings.rows += 1
        self.findings.languages[language] += 1
        self.findings.add_text("rows", fingerprint(text), place)
        for sequence in sequences:
            self.findings.add_sequence(*sequence)
        if not sequences:
            self.findings.lengths.append(len(text))
        if self.exams and (items := self.exams.find(text)):
            self.findings.exam_rows += 1
            self.findings.note("exams", (*place, items[0]))
        of = language if share >= SHARE_OF_AN_EXAMPLE else "other"
        self.findings.add_example(of, (place, text, sequences))


def find_schema_or_text(path: Path, args: argparse.Namespace) -> Schema | None:
    """Return the schema of a file's rows; None for pretraining text: what fits no schema and has a column of text."""
    if args.stage == "pretrain" or file_type(path) == ".txt":
        return None
    if args.schema:
        return SCHEMAS[args.schema]
    if args.stage is None:
        rows = [row.content for row in islice(read_rows(path), ROWS_LOOKED_AT) if not row.error]
        has_text = any(key in row for row in rows for key in args.text_key)
        if has_text and not any(recognise(row) for row in rows):
            return None
    return find_schema(path, read_rows(path), KINDS.get(args.stage))


def find_schemas(paths: list[Path], args: argparse.Namespace) -> dict[Path, Schema | None]:
    """Return the schema of every file, all of one kind."""
    schemas = {path: find_schema_or_text(path, args) for path in paths}
    kinds = {path: schema.kind if schema else "text" for path, schema in schemas.items()}
    asked = KINDS.get(args.stage, kinds[paths[0]])
    for path, kind in kinds.items():
        if kind != asked:
            raise UserError(f"{path} holds rows of kind {kind}, not {asked}. Examine it apart, or give --stage")
    return schemas


def refuse_shards(paths: list[str]) -> None:
    for path in paths:
        if (Path(path) / "manifest.json").exists():
            raise UserError(f"{path} is a folder of token shards. Run: python data/inspect_shards.py {path}")


def main() -> None:
    args = parse_arguments()
    if args.max_length < 1:
        raise UserError(f"--max_length is {args.max_length}, must be at least 1")
    refuse_shards(args.paths)
    logging.set_verbosity_error()
    paths = find_files(args.paths)
    schemas = find_schemas(paths, args)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    kind = schemas[paths[0]].kind if schemas[paths[0]] else "text"
    doctor = Doctor(kind, args.max_length, tokenizer, tuple(args.exams))
    for path, schema in schemas.items():
        with progress_bar([path], desc=path.name, leave=False) as bar:
            for row in read_rows(path, None if schema else args.text_key, bar):
                place = (path, row.number)
                if schema is None:
                    doctor.examine_text(place, row)
                    continue
                if not row.error and not args.schema:
                    require_schema(path, row, schema, KINDS.get(args.stage))
                doctor.examine_chat(place, row, schema)
        tqdm.write(f"file         {path} ({f'schema {schema.name}, kind {kind}' if schema else 'text'})")
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    command = f"python data/convert_chat.py --kind {kind} --input {shlex.join(args.paths)} --output NEW.jsonl"
    for name in ("schema", "tokenizer"):
        command += f" --{name} {shlex.quote(value)}" if (value := getattr(args, name)) else ""
    print("\n".join(format_findings(doctor.findings) + format_examples(doctor.findings, colour)))
    print("\n" + format_verdict(doctor.findings, command))
    sys.exit(1 if doctor.findings.reasons() else 0)


if __name__ == "__main__":
    run_script(main)
