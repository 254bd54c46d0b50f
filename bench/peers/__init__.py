"""The programs that this one is measured against, each in an environment of its own."""
