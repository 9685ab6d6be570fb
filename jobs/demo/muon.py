"""Muon for a small transformer's matrices and AdamW for the rest, in few kernels.

It knows weights by shape, and the two update rules. It knows no model, no loss and no schedule. Weights of one
shape are kept as one stacked array, their group, so that a step is a handful of kernels whatever the depth.
"""

from __future__ import annotations

import mlx.core as mx

Weights = dict[str, mx.array]
Groups = dict[str, list[str]]
"""A group's name -> the names of the weights that are stacked in it, in order."""

ADAM_GROUPS = ("embedding", "norms")
MUON_RATE, ADAM_RATE, WEIGHT_DECAY = 0.02, 0.003, 0.05


def grouped(weights: Weights) -> Groups:
    """Which weights to stack: the matrices by shape, the norms together, the embedding alone."""
    groups: Groups = {}
    for name, weight in weights.items():
        if "embed" in name:
            groups["embedding"] = [name]
        else:
            group = "norms" if weight.ndim == 1 else "x".join(map(str, weight.shape))
            groups.setdefault(group, []).append(name)
    return groups


def stacked(weights: Weights, groups: Groups) -> Weights:
    """The groups as float32 stacks. (n, *shape of one)"""
    return {group: mx.stack([weights[name].astype(mx.float32) for name in names]) for group, names in groups.items()}


def unstacked(stacks: Weights, groups: Groups, dtype: mx.Dtype) -> list[tuple[str, mx.array]]:
    """(name, weight) pairs, in the given dtype."""
    halves = {group: stack.astype(dtype) for group, stack in stacks.items()}
    return [(name, halves[group][index]) for group, names in groups.items() for index, name in enumerate(names)]


def first_moments(stacks: Weights) -> Weights:
    moments = {f"{group}.first": mx.zeros_like(stack) for group, stack in stacks.items()}
    return moments | {f"{group}.second": mx.zeros_like(stacks[group]) for group in ADAM_GROUPS}


def updated(
    stacks: Weights, gradients: Weights, moments: Weights, rate: mx.array, step: mx.array
) -> tuple[Weights, Weights]:
    """One step of Muon on the layers' matrices and of AdamW on the rest: (stacks, moments)."""
    new_stacks, new_moments = {}, {}
    for name, gradient in gradients.items():
        first = moments[f"{name}.first"]
        if name in ADAM_GROUPS:
            first = 0.9 * first + 0.1 * gradient
            second = 0.95 * moments[f"{name}.second"] + 0.05 * gradient * gradient
            new_moments[f"{name}.second"] = second
            direction = (first / (1 - 0.9**step)) / (mx.sqrt(second / (1 - 0.95**step)) + 1e-8)
            new_stacks[name] = stacks[name] - ADAM_RATE * rate * direction
        else:
            first = 0.95 * first + gradient
            _, rows, columns = gradient.shape
            direction = orthogonalize(gradient + 0.95 * first) * max(1.0, rows / columns) ** 0.5
            kept = stacks[name] * (1 - MUON_RATE * WEIGHT_DECAY * rate)
            new_stacks[name] = kept - MUON_RATE * rate * direction
        new_moments[f"{name}.first"] = first
    return new_stacks, new_moments


def orthogonalize(gradients: mx.array) -> mx.array:
    """Newton-Schulz iteration towards the nearest orthogonal matrices. (n, rows, columns)

    Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradients.astype(mx.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    x = x.swapaxes(-1, -2) if tall else x
    x = x / (mx.sqrt((x * x).astype(mx.float32).sum((-1, -2), keepdims=True)) + 1e-7).astype(x.dtype)
    for _ in range(5):
        square = x @ x.swapaxes(-1, -2)
        x = a * x + (b * square + c * square @ square) @ x
    x = x.swapaxes(-1, -2) if tall else x
    return x.astype(mx.float32)
