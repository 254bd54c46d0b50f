"""Where results go: one module an output."""
