"""Publish a checkpoint, native export or adapter on Hugging Face and ModelScope.

    python export/publish.py outputs/quickstart/dpo --to hf:USER/NAME --dry_run
    python export/publish.py outputs/quickstart/dpo --to hf:USER/NAME --to modelscope:USER/NAME --native --gguf

The command lists what it would send and what it leaves out, and asks first. Log in once: `hf auth login`,
`modelscope login --token TOKEN`. If the connection breaks, run the same command again.
"""

import argparse
import io
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from buddygpt.cli.errors import ArgumentParser, UserError, run_script
from buddygpt.export.hubs import HUB_NAME, Target, parse_target, send
from buddygpt.export.packing import GGUF, Parcel, address_card, pack, write_gguf_card

TO_GGUF = Path(__file__).resolve().parents[1] / "tools" / "to_gguf.py"  # a command: nothing imports the tools


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a finished run, native export or adapter")
    parser.add_argument("--to", action="append", required=True, metavar="HUB:USER/NAME", help="hf: or modelscope:")
    parser.add_argument("--native", action="store_true", help="also publish the native export, as USER/NAME-native")
    parser.add_argument("--gguf", action="store_true", help="also publish a GGUF file (f16), as USER/NAME-GGUF")
    parser.add_argument("--base", metavar="USER/NAME", help="published name of the base model of an adapter")
    parser.add_argument("--private", action="store_true", help="make new repositories private")
    parser.add_argument("--dry_run", action="store_true", help="list the files and send nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    targets = [parse_target(text) for text in dict.fromkeys(args.to)]
    checkpoint = Path(args.checkpoint)
    require_model(checkpoint)
    if args.base and not HUB_NAME.fullmatch(args.base):
        raise UserError(f"--base {args.base}: give the name under which others find the model, USER/NAME")

    with tempfile.TemporaryDirectory(prefix="buddygpt-publish-") as folder:
        work = Path(folder)
        parcels = [pack(checkpoint, work / "model", "", args.base)]
        name = targets[0].name.split("/")[1]
        if args.native:
            parcels.append(pack(export_native(checkpoint, work / f"{name}-native"), work / "native", "-native"))
        if args.gguf:
            parcels.append(pack(export_gguf(checkpoint, work / name), work / "gguf", GGUF))

        show(parcels, targets, args.private)
        if args.dry_run or not (args.yes or confirm()):
            print("nothing was sent")
            return
        for target in targets:
            for parcel in parcels:
                address_card(parcel, target)
                repository = Target(target.hub, f"{target.name}{parcel.suffix}")
                print(f"published {send(repository, parcel.folder, args.private)}", flush=True)


def require_model(folder: Path) -> None:
    """Raise UserError unless a folder holds a finished model or adapter."""
    if not folder.is_dir():
        raise UserError(f"no such checkpoint folder: {folder}")
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"{folder} is not a checkpoint: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} holds no weights (*.safetensors); let the run finish first")


def export_native(checkpoint: Path, output: Path) -> Path:
    """Write the native export of a checkpoint, with its own model card, and return its folder."""
    from buddygpt.export.to_native import export  # imports transformers, which other uploads do not need

    with redirect_stdout(io.StringIO()):  # names a folder that is deleted at the end
        export(str(checkpoint), output)
    return output


def export_gguf(checkpoint: Path, output: Path) -> Path:
    """Run tools/to_gguf.py and return its output folder, with a model card.

    Raises:
        UserError: The tool refuses the model.
    """
    command = [sys.executable, str(TO_GGUF), "--checkpoint", str(checkpoint), "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(last.removeprefix("error: "))
    write_gguf_card(output, checkpoint)
    return output


def show(parcels: list[Parcel], targets: list[Target], private: bool) -> None:
    """Print the files that would be sent, with their sizes, and what is left out."""
    for parcel in parcels:
        names = " and ".join(f"{target}{parcel.suffix}" for target in targets)
        files = {
            path.relative_to(parcel.folder): path.stat().st_size for path in parcel.folder.rglob("*") if path.is_file()
        }
        visible = "private" if private else "public"
        print(f"{names}, {visible} if new: {len(files)} files, {as_size(sum(files.values()))}")
        for path in sorted(files):
            print(f"{as_size(files[path]):>12}  {path.as_posix()}")
        for path, reason in parcel.left_out.items():
            print(f"    left out  {path} ({reason})")
        if not parcel.card:
            print("warning: without a README.md, the page says nothing about the model")


def as_size(size: int) -> str:
    """Return a number of bytes in the units of hubs: 4.0 MB is 4,000,000 bytes."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def confirm() -> bool:
    """Ask whether to send. Raises UserError if nobody can answer."""
    try:
        return input("Send these files? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError as error:
        raise UserError("nobody is there to confirm; add --yes to send, or --dry_run to look only") from error


if __name__ == "__main__":
    run_script(main)
