"""Measure the quality of images: feature networks, and the metrics computed from their features."""
