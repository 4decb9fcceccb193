"""What lies behind the local store: objects anywhere, signed, leased, promised; never trusted."""
