"""Holding results to their manifests, and making them again."""
