"""What every command needs: arguments, one-line errors, files, checkpoints given by name."""
