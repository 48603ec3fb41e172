"""How good samples are: feature networks, and figures of their features."""
