"""BuddyGPT: a small Chinese-English language model. Importing this package registers it with transformers' Auto classes."""
