"""Caches with mlx-lm's interface: forks of a shared prefix, its segments, a cache that compresses itself."""
