"""Models by name and version: which one serves, which one is tried in the shadow, who decided it."""
