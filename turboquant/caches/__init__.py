"""Caches with mlx-lm's interface: forks of a shared prefix, its segments, and a cache that compresses itself."""
