"""Token shards on disk, and the blocks that training reads from them."""
