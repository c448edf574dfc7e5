"""Shared by every command: arguments, one-line errors, files, Markdown tables, checkpoint names."""
