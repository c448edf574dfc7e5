"""Text to token shards and back to training blocks; chat and preference rows in their standard forms."""
