"""How good images are: feature networks, and the figures that are computed from features."""
