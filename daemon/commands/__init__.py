"""The sub-commands that need the full distribution."""
