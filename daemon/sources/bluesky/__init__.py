"""Bluesky documents from its 0MQ proxy, and what simulates them."""
