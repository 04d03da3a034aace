"""The specialisations of every kernel that count: what :mod:`aot` compiles.

An argument is a Triton type (``"*fp32"``, ``"i32"``), or the constant that the kernel is compiled for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton.language as tl

from manpp_kernels.backends.triton.detach_copy import CHUNK as CAST_CHUNK
from manpp_kernels.backends.triton.detach_copy import SIDE, TRANSPOSE_WARPS, cast_kernel, transpose_kernel
from manpp_kernels.backends.triton.detach_copy import WARPS as CAST_WARPS
from manpp_kernels.backends.triton.ema_scale_update import CHUNK as UPDATE_CHUNK
from manpp_kernels.backends.triton.ema_scale_update import OPTIONS as UPDATE_OPTIONS
from manpp_kernels.backends.triton.ema_scale_update import ema_scale_update_kernel
from manpp_kernels.backends.triton.ema_scale_update_backward import CHUNK as BACKWARD_CHUNK
from manpp_kernels.backends.triton.ema_scale_update_backward import OPTIONS as BACKWARD_OPTIONS
from manpp_kernels.backends.triton.ema_scale_update_backward import SLOTS as BACKWARD_SLOTS
from manpp_kernels.backends.triton.ema_scale_update_backward import ema_scale_update_backward_kernel
from manpp_kernels.backends.triton.scale_bias_mix import OPTIONS as MIX_OPTIONS
from manpp_kernels.backends.triton.scale_bias_mix import SLOTS as MIX_SLOTS
from manpp_kernels.backends.triton.scale_bias_mix import scale_bias_mix_backward_kernel, scale_bias_mix_kernel
from manpp_kernels.backends.triton.tables import ALL, NONE, SOME

F32, BF16, F16, F64 = 1, 2, 4, 8
ANY = F32 | BF16 | F16 | F64


@dataclass(frozen=True)
class Variant:
    """One specialisation of one kernel."""

    kernel: Any
    arguments: Mapping[str, Any]
    options: Mapping[str, Any]
    wide: bool  # whether everything it streams has to move 128 bits at a time
    unaligned: tuple[str, ...] = ("rows", "owners", "ranges", "counters", "partials", "scale", "grad_scale", "seed")


def _update(
    ema: int,
    params: int,
    bias: int = 0,
    *,
    double: int = NONE,
    aligned: int = ALL,
    stochastic: bool = False,
    tensor_momentum: bool = False,
    wide: bool = True,
) -> Variant:
    arguments = {
        "rows": "*i64",
        "owners": "*i32",
        "momentum_tensor": "*fp32" if tensor_momentum else None,
        "momentum_bits": "i64",
        "rest_bits": "i64",
        "scale": "*fp32" if bias else None,
        "scale_stride": "i32",
        "total_bits": "i64",
        "seed": "*i64" if stochastic else None,
        "EMA": ema,
        "PARAMS": params,
        "BIAS": bias,
        "OUT": bias,
        "DOUBLE": double,
        "ALIGNED": aligned,
        "CHUNK": UPDATE_CHUNK,
    }
    return Variant(ema_scale_update_kernel, arguments, UPDATE_OPTIONS, wide)


def _update_backward(
    dtype: int, *, ema: int | None = None, sums: bool = True, grad_bias: bool = True, double: int = NONE,
    aligned: int = ALL, wide: bool = True,
) -> Variant:  # fmt: skip
    arguments = {
        "rows": "*i64",
        "owners": "*i32",
        "ranges": "*i64" if sums else None,
        "counters": "*i32" if sums else None,
        "partials": ("*fp32" if double == NONE else "*fp64") if sums else None,
        "scale": "*fp32",
        "scale_stride": "i32",
        "grad_scale": "*fp32" if sums else None,
        "grad_scale_stride": "i32",
        "span": "i32",
        "GRAD": dtype,
        "BIAS": dtype if sums else 0,
        "EMA": (ema or dtype) if sums else 0,
        "GRAD_BIAS": dtype if grad_bias else 0,
        "DOUBLE": double,
        "ALIGNED": aligned,
        "SUM": tl.float32 if double == NONE else tl.float64,
        "CHUNK": BACKWARD_CHUNK,
        "SLOTS": BACKWARD_SLOTS,
    }
    return Variant(ema_scale_update_backward_kernel, arguments, BACKWARD_OPTIONS, wide)


def _tiling(inside: bool, block_x: int, vector: int, dtype: str) -> dict[str, Any]:
    return {
        "scale": "*fp32",
        "scale_stride": "i32",
        "total_bits": "i64",
        "rows": "i32",
        "channels": "i32",
        "inner": "i32",
        "tiles": "i32",
        "channel_blocks": "i32",
        "TO": tl.float64 if dtype == "*fp64" else tl.float32,
        "INSIDE": inside,
        "BLOCK_ROWS": 2048 // block_x,
        "BLOCK_X": block_x,
        "VEC": vector,
    }


def _mix(dtype: str, *, inside: bool = False, block_x: int = 1024, vector: int = 8) -> Variant:
    arguments = {"lb_out": dtype, "ema_out": dtype, "out": dtype, **_tiling(inside, block_x, vector, dtype)}
    return Variant(scale_bias_mix_kernel, arguments, MIX_OPTIONS, wide=vector == 8)


def _mix_backward(
    dtype: str, *, inside: bool = False, block_x: int = 1024, vector: int = 8, maps: bool = True, sums: bool = True
) -> Variant:
    arguments = {
        "grad": dtype,
        "lb_out": dtype if sums else None,
        "ema_out": dtype if sums else None,
        "grad_lb": dtype if maps else None,
        "grad_ema": dtype if maps else None,
        "grad_scale": "*fp32" if sums else None,
        "partials": ("*fp64" if dtype == "*fp64" else "*fp32") if sums else None,
        "counters": "*i32" if sums else None,
        "splits": "i32",
        "SLOTS": MIX_SLOTS,
        **_tiling(inside, block_x, vector, dtype),
    }
    return Variant(scale_bias_mix_backward_kernel, arguments, MIX_OPTIONS, wide=vector == 8 and maps)


def _cast(x: str, out: str) -> Variant:
    arguments = {"x": x, "out": out, "numel": "i32", "CHUNK": CAST_CHUNK}
    return Variant(cast_kernel, arguments, {"num_warps": CAST_WARPS}, wide=True)


def _transpose(x: str, out: str, vector: int = 8) -> Variant:
    arguments = {
        "x": x,
        "out": out,
        "a": "i32",
        "b": "i32",
        "blocks_a": "i32",
        "blocks_b": "i32",
        "VEC_A": vector,
        "VEC_B": vector,
        "SIDE": SIDE,
    }
    return Variant(transpose_kernel, arguments, {"num_warps": TRANSPOSE_WARPS}, wide=vector == 8)


VARIANTS: dict[str, Variant] = {
    "update f32": _update(F32, F32),
    "update f32, tensor momentum": _update(F32, F32, tensor_momentum=True),
    "update f32, some misaligned": _update(F32, F32, aligned=SOME),
    "update f32 from bf16": _update(F32, BF16),
    "update bf16": _update(BF16, BF16),
    "update bf16 from f32": _update(BF16, F32),
    "update bf16 from f32, stochastic": _update(BF16, F32, stochastic=True),
    "update f16 from f32, stochastic": _update(F16, F32, stochastic=True),
    "update f64": _update(F64, F64, double=ALL),
    "update of all dtypes": _update(ANY, ANY, double=SOME, aligned=SOME, stochastic=True),
    "update and weights f32": _update(F32, F32, F32),
    "update and weights f32, some misaligned": _update(F32, F32, F32, aligned=SOME),
    "update and weights bf16": _update(BF16, BF16, BF16),
    "update and weights of all dtypes": _update(ANY, ANY, ANY, double=SOME, aligned=SOME),
    "update backward f32": _update_backward(F32),
    "update backward f32, some misaligned": _update_backward(F32, aligned=SOME),
    "update backward f32, scale only": _update_backward(F32, grad_bias=False, wide=False),
    "update backward f32, bias only": _update_backward(F32, sums=False),
    "update backward bf16": _update_backward(BF16),
    "update backward of all dtypes": _update_backward(ANY, double=SOME, aligned=SOME),
    "mix f32, planes": _mix("*fp32"),
    "mix bf16, planes": _mix("*bf16"),
    "mix f32, small planes": _mix("*fp32", block_x=64),
    "mix f32, odd planes": _mix("*fp32", block_x=64, vector=1),
    "mix f32, channels last": _mix("*fp32", inside=True, block_x=64),
    "mix bf16, channels last": _mix("*bf16", inside=True, block_x=64),
    "mix backward f32, planes": _mix_backward("*fp32"),
    "mix backward bf16, planes": _mix_backward("*bf16"),
    "mix backward f64, planes": _mix_backward("*fp64"),
    "mix backward f32, maps only": _mix_backward("*fp32", sums=False),
    "mix backward f32, scale only": _mix_backward("*fp32", maps=False),
    "mix backward f32, channels last": _mix_backward("*fp32", inside=True, block_x=64),
    "mix backward bf16, channels last": _mix_backward("*bf16", inside=True, block_x=512),
    "cast f32 to bf16": _cast("*fp32", "*bf16"),
    "cast bf16 to f32": _cast("*bf16", "*fp32"),
    "transpose f32": _transpose("*fp32", "*fp32"),
    "transpose f32 to bf16": _transpose("*fp32", "*bf16"),
    "transpose bf16": _transpose("*bf16", "*bf16"),
    "transpose f32, odd": _transpose("*fp32", "*fp32", vector=1),
}
