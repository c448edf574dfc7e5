"""Byte-level BPE tokenizer training."""
