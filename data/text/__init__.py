"""A document's journey from a source to a token shard."""
