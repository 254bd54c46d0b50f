"""The sub-commands of the client wheel."""
