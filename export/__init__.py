"""Conversion between BuddyGPT checkpoints and equivalent stock architectures of transformers."""
