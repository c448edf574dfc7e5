"""Chat and preference rows: schemas, rules, tokens, loading."""
