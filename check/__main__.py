"""Check that a causal language model computes what it should.

    python -m buddygpt.check buddygpt-0.1b              # a preset in its real size, with random weights
    python -m buddygpt.check buddygpt-0.1b --reduced    # the same structure with a few thousand parameters; seconds
    python -m buddygpt.check outputs/base               # a checkpoint
    python -m buddygpt.check Qwen/Qwen3-0.6B            # any causal language model of transformers

Exit status: 0 if all checks pass or do not apply, 1 if one fails, 2 if there is no such model.
"""

import argparse
import sys
import textwrap
import time

from tqdm import tqdm
from transformers.utils import logging

from buddygpt.cli.errors import ArgumentParser, run_script

from .advice import ADVICE
from .checks import CHECKS, Row, explain, run_check
from .subject import open_subject


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        prog="python -m buddygpt.check",
        description=__doc__,
        epilog="checks:\n" + "\n".join(f"  {name:24}{explain(name)}" for name in CHECKS),
    )
    parser.add_argument("model", metavar="MODEL", help="preset, config JSON, checkpoint folder or Hub repository")
    parser.add_argument("--reduced", action="store_true", help="check a small model of the same structure")
    parser.add_argument("--vocab_size", type=int, help="replace the vocabulary size of a model with random weights")
    parser.add_argument("--seed", type=int, default=0, help="seed of random weights and inputs (default: 0)")
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="CHECK", help="run only these checks")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with MODEL")
    return parser.parse_args()


def print_table(rows: list[Row]) -> None:
    print(f"{'check':24}{'':6}{'measured':>12}    tolerance")
    for row in rows:
        numbers = ""
        if row.measure is not None:
            sign = ">=" if row.measure.at_least else "<="
            numbers = f"{row.measure.value:12.2g}   {sign} {row.measure.tolerance:<8.2g}"
        print(f"{row.check:24}{row.status:6}{numbers}{row.note}".rstrip())


def print_advice(rows: list[Row]) -> None:
    """Print what each failure means and what to do."""
    for row in rows:
        if row.status == "FAIL":
            print(
                f"\n{row.check}\n{textwrap.fill(ADVICE[row.check], 115, initial_indent='  ', subsequent_indent='  ')}"
            )


def main() -> None:
    arguments = parse_arguments()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    start = time.perf_counter()
    subject = open_subject(
        arguments.model, arguments.reduced, arguments.vocab_size, arguments.seed, arguments.trust_remote_code
    )

    rows = []
    with tqdm(arguments.only or CHECKS, unit="check", leave=False) as names:
        for name in names:
            names.set_postfix_str(name)
            rows.append(run_check(name, subject))
    print_table(rows)

    counts = {status: sum(row.status == status for row in rows) for status in ("pass", "FAIL", "n/a")}
    reduced = " (reduced)" if arguments.reduced else ""
    print(
        f"{arguments.model}{reduced}, {subject.model.num_parameters():,} parameters: "
        f"{counts['pass']} hold, {counts['FAIL']} fail, {counts['n/a']} do not apply; "
        f"{time.perf_counter() - start:.0f} s"
    )
    print_advice(rows)
    sys.exit(1 if counts["FAIL"] else 0)


if __name__ == "__main__":
    run_script(main)
