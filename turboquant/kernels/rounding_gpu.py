"""Rounding in a metric on a GPU: one thread a vector, CUDA or Metal, from one text.

What it computes is rounding.py's; see there. The text is plain C++ but for ``VECTOR``, the number of the vector a
thread works on, so a C++ compiler can check it where there is no GPU. The matrices are read by all threads alike,
through the cache.
"""

from __future__ import annotations

import functools
from typing import Any

import mlx.core as mx

from turboquant.codebook import lloyd_max

THREADS = 128
INPUTS = ["unit", "factor", "pull", "metric", "levels", "code_of_bin", "sizes"]
OUTPUTS = ["codes", "scales"]

# Arrays as in rounding.round_in_metric; sizes holds H, T and the sweeps. DIM, FEEDBACK and BINS are compiled in.
SOURCE = """
    int tokens = sizes[1];
    int vector = VECTOR;
    if (vector >= sizes[0] * tokens) return;
    int head = vector / tokens, matrix = head * DIM * DIM;
    int base = head * DIM * tokens + vector % tokens;
    float u[DIM], error[DIM], chosen[DIM];
    for (int i = 0; i < DIM; ++i) {
        u[i] = unit[base + i * tokens];
        error[i] = 0;
    }
    for (int i = DIM - 1; i >= 0; --i) {
        float wanted = u[i];
        if (FEEDBACK) {
            for (int j = i + 1; j < DIM; ++j) wanted -= factor[matrix + i * DIM + j] * error[j];
        }
        float bin = wanted * (BINS / (2 * REACH)) + BINS / 2;
        bin = bin < 0 ? 0 : bin > BINS - 1 ? BINS - 1 : bin;
        int code = code_of_bin[int(bin)];
        chosen[i] = levels[code];
        error[i] = chosen[i] - u[i];
        codes[base + i * tokens] = code;
    }
    for (int sweep = 0; sweep <= sizes[2]; ++sweep) {
        float kept = 0, own = 0, whole = 0;
        for (int i = 0; i < DIM; ++i) {
            float of_unit = 0, of_chosen = 0;
            for (int j = 0; j < DIM; ++j) {
                float m = metric[matrix + i * DIM + j];
                of_unit += m * u[j];
                of_chosen += m * chosen[j];
            }
            kept += chosen[i] * of_unit;
            own += chosen[i] * of_chosen;
            whole += u[i] * of_unit;
        }
        bool last = sweep == sizes[2];
        float scale = last ? whole / (kept > 1e-9f ? kept : 1e-9f) : kept / own;
        scale = scale < 0.5f ? 0.5f : scale > 2.0f ? 2.0f : scale;
        if (last) {
            scales[vector] = scale;
            return;
        }
        for (int i = 0; i < DIM; ++i) error[i] = scale * chosen[i] - u[i];
        for (int i = 0; i < DIM; ++i) {
            float wanted = u[i];
            for (int j = 0; j < DIM; ++j) wanted -= pull[matrix + i * DIM + j] * error[j];
            float bin = wanted / scale * (BINS / (2 * REACH)) + BINS / 2;
            bin = bin < 0 ? 0 : bin > BINS - 1 ? BINS - 1 : bin;
            int code = code_of_bin[int(bin)];
            chosen[i] = levels[code];
            error[i] = scale * chosen[i] - u[i];
            codes[base + i * tokens] = code;
        }
    }
"""


def round_on_gpu(
    unit: mx.array,
    factor: mx.array,
    pull: mx.array,
    metric: mx.array,
    code_of_bin: mx.array,
    reach: float,
    feedback: bool,
    bits: int,
    sweeps: int,
) -> tuple[mx.array, mx.array]:
    """Codes (H, dim, T) uint8 and factors (H, T) for unit (H, dim, T) and matrices (H, dim, dim), all float32."""
    heads, dim, tokens = unit.shape
    codes, scales = _kernel(dim, feedback, code_of_bin.size, reach)(
        inputs=[
            unit,
            factor,
            pull,
            metric,
            mx.array(lloyd_max(bits).levels),
            code_of_bin,
            mx.array([heads, tokens, sweeps], mx.int32),
        ],
        grid=(-(-heads * tokens // THREADS) * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[unit.shape, (heads, tokens)],
        output_dtypes=[mx.uint8, mx.float32],
    )
    return codes, scales


def text(vector: str, dim: int, feedback: bool, bins: int, reach: float) -> str:
    """The kernel's body with its constants, ``vector`` being the expression for the number of a thread's vector."""
    constants = {"VECTOR": vector, "DIM": dim, "FEEDBACK": int(feedback), "BINS": bins, "REACH": f"{reach}f"}
    body = SOURCE
    for name, value in constants.items():
        body = body.replace(name, str(value))
    return body


@functools.cache
def _kernel(dim: int, feedback: bool, bins: int, reach: float) -> Any:
    name = f"round_in_metric_{dim}_{int(feedback)}"
    if mx.metal.is_available():
        body = text("int(thread_position_in_grid.x)", dim, feedback, bins, reach)
        return mx.fast.metal_kernel(name, INPUTS, OUTPUTS, body)
    body = text("int(blockIdx.x * blockDim.x + threadIdx.x)", dim, feedback, bins, reach)
    return mx.fast.cuda_kernel(name, INPUTS, OUTPUTS, body)
