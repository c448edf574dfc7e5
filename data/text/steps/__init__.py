"""Optional steps of text preparation, imported only if the config names them."""

# Version of the hashes of `ngrams` and of what the steps make of them. Work that another version left is not resumed,
# and an index of fingerprints that another version made is refused.
FINGERPRINTS = 3
