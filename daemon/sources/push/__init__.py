"""Images that other programs push, each acknowledged."""
