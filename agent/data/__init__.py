"""Artifacts and placement: content-addressed blobs, who holds what, and the acts that keep each at its count."""
