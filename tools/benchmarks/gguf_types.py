"""Bits per byte of GGUF files on held-out text, in llama.cpp itself: what each number format costs.

    pip install xllamacpp
    python tools/benchmarks/gguf_types.py --files outputs/gguf/*.gguf --text outputs/quickstart/shards/eval.jsonl

llama.cpp's server, which runs in this process, gives the probability of each token after those before it. A token
costs one request: some milliseconds for small models and vocabularies.
"""

import json
import math
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from buddygpt.cli.arguments import parse_arguments
from buddygpt.cli.errors import UserError, run_script
from buddygpt.cli.files import find_files
from buddygpt.cli.tables import markdown_table


@dataclass
class GGUFTypesArguments:
    files: list[str] = field(metadata={"help": "GGUF files or globs."})
    text: str = field(metadata={"help": "JSONL file with held-out documents in `text`."})
    separator: str = field(default="<|endoftext|>", metadata={"help": "Token before each document in pretraining."})
    max_tokens: int = field(default=3000, metadata={"help": "Tokens to score, at most."})
    threads: int = field(default=1, metadata={"help": "Threads of llama.cpp."})


def main() -> None:
    (args,) = parse_arguments(GGUFTypesArguments, description=__doc__)
    lines = Path(args.text).read_text(encoding="utf-8").splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    rows = []
    for file in find_files(args.files):
        bits, size = bits_per_byte(Path(file), documents, args), Path(file).stat().st_size
        rows.append([Path(file).name, f"{size / 1e6:.2f}", f"{bits:.4f}"])
    print(markdown_table(["file", "MB", "bits per byte"], rows))


def bits_per_byte(file: Path, documents: list[str], args: GGUFTypesArguments) -> float:
    """Return the bits per byte of the first documents that have `args.max_tokens` tokens together."""
    try:
        import xllamacpp
    except ImportError as error:
        raise UserError("llama.cpp is not installed: pip install xllamacpp") from error
    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.hostnames, settings.port = ["127.0.0.1"], 0
    settings.n_parallel, settings.cpuparams.n_threads = 1, args.threads
    settings.warmup, settings.verbosity = False, -1
    server = xllamacpp.Server(settings)

    nats = scored_bytes = scored_tokens = 0
    with tqdm(total=args.max_tokens, desc=file.name) as progress:
        for document in documents:
            tokens = ask(server, "/tokenize", content=args.separator + document, parse_special=True)["tokens"]
            if scored_tokens + len(tokens) - 1 > args.max_tokens:
                break
            for end in range(1, len(tokens)):
                nats -= log_probability(server, tokens[:end], tokens[end])
            scored_tokens += len(tokens) - 1
            scored_bytes += len(document.encode())
            progress.update(len(tokens) - 1)
    if not scored_bytes:
        raise UserError(f"the first document has more than {args.max_tokens} tokens: raise --max_tokens")
    return nats / math.log(2) / scored_bytes


def log_probability(server, context: list[int], token: int) -> float:
    """Return the log-probability of `token` after `context`."""
    answer = ask(server, "/completion", prompt=context, n_predict=1, temperature=0, n_probs=1 << 20, cache_prompt=True)
    for each in answer["completion_probabilities"][0]["top_logprobs"]:
        if each["id"] == token:
            return each["logprob"]
    raise ValueError(f"llama.cpp left out token {token}")


def ask(server, path: str, **body) -> dict:
    """Post to the server and return its answer."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


if __name__ == "__main__":
    run_script(main)
