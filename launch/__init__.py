"""What every script does before its own work: strict arguments, one-line errors, where to resume."""

from .arguments import UserError, parse_arguments, run_script
from .resume import last_checkpoint

__all__ = ["UserError", "last_checkpoint", "parse_arguments", "run_script"]
