"""Optional steps of text preparation, imported only if the config names them."""
