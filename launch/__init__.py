"""What every script does before its own work: strict arguments and one-line errors (`arguments`), where to resume (`resume`)."""

from .arguments import UserError, parse_arguments, run_script
from .resume import last_checkpoint


__all__ = ["UserError", "last_checkpoint", "parse_arguments", "run_script"]
