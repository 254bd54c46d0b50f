"""White-beam Laue: from a frame to crystals with orientation, strain and a score."""
