"""The versions of packages and the kind of device that compute something, which are recorded beside it.

With another version, or on another kind of device, the same work may give other bytes. Fingerprints do not cover this,
or an upgrade would make stale all that was ever computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata

__version__ = "0.1.0"


@lru_cache
def package_versions() -> Mapping[str, str]:
    """Return the versions of the packages that decide the answers of a model, by name."""
    found = {name: metadata.version(name) for name in ("mlx", "mlx-lm", "tokenizers", "transformers")}
    return found | {"turboquant-pipeline": __version__}


@lru_cache
def computing_versions() -> Mapping[str, str]:
    """Return the same, and as ``device`` the kind of device that computes in this process: cpu, cuda or metal."""
    from turboquant.runtime.device import device_family  # imports MLX, which `pipeline --help` does not need

    return {**package_versions(), "device": device_family()}


def describe_difference(recorded: Mapping[str, str] | None, now: Mapping[str, str]) -> str:
    """Return how the versions of now differ from those that were recorded, or "" if they are equal.

    recorded: None if nothing was recorded. Names that only `recorded` has are not compared.

    >>> describe_difference({"mlx": "0.31.0", "device": "cpu"}, {"mlx": "0.32.4", "mlx-lm": "0.31.1"})
    'mlx was 0.31.0 and is 0.32.4; mlx-lm was not recorded'
    """
    recorded = recorded or {}
    changed = [
        f"{name} was {recorded[name]} and is {now[name]}" for name in now if recorded.get(name, now[name]) != now[name]
    ]
    if unknown := [name for name in now if name not in recorded]:
        changed.append(f"{', '.join(unknown)} {'were' if unknown[1:] else 'was'} not recorded")
    return "; ".join(changed)
