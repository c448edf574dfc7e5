"""Conversion between BuddyGPT checkpoints and stock architectures."""
