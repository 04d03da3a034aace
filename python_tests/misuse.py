"""Every misuse of the operators: what is wrong, the type of the error, and what its message has to say."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

import manpp_kernels
from manpp_kernels import detach_copy, ema_scale_update, scale_bias_mix
from manpp_kernels.ops._checks import OverlapError

Arguments = dict[str, Any]


def valid() -> Arguments:
    """Arguments that work, with everything in use; each case below breaks one of them."""
    torch.manual_seed(0)
    return {
        "ema": [torch.randn(3), torch.randn(2, 4)],
        "params": [torch.randn(3), torch.randn(2, 4)],
        "momentum": 0.9,
        "scale": torch.tensor([1.0, 0.5]),
        "bias": [torch.randn(3), torch.randn(2, 4)],
        "groups": [0, 1],
    }


def replaced(name: str, value: Any, index: int | None = None) -> Callable[[Arguments], None]:
    def change(a: Arguments) -> None:
        if index is None:
            a[name] = value
        else:
            a[name][index] = value

    return change


def without(*names: str) -> Callable[[Arguments], None]:
    def change(a: Arguments) -> None:
        for name in names:
            del a[name]

    return change


def both(*changes: Callable[[Arguments], None]) -> Callable[[Arguments], None]:
    def change(a: Arguments) -> None:
        for c in changes:
            c(a)

    return change


def aliased(written: str, i: int, read: str, j: int) -> Callable[[Arguments], None]:
    def change(a: Arguments) -> None:
        a[written][i] = a[read][j].view(a[written][i].shape)

    return change


def _same_ema_twice(a: Arguments) -> None:
    ema = torch.randn(3)
    a["ema"], a["params"], a["bias"] = [ema, ema], [ema + 1, ema + 2], [ema + 3, ema + 4]


def _ema_is_params_elsewhere(a: Arguments) -> None:
    for name in ("ema", "params", "bias"):
        a[name][0] = torch.randn(8)
    a["ema"][1] = a["params"][0].view(2, 4)


def _overlapping_views(a: Arguments) -> None:
    base = torch.randn(16)
    a["ema"] = [base[5:8], base[7:15].view(2, 4)]


def _overlapping_params(a: Arguments) -> None:
    base = torch.randn(16)
    a["ema"][1], a["params"][1] = base[:8].view(2, 4), base[4:12].view(2, 4)


def _overlapping_by_one_byte_of_another_dtype(a: Arguments) -> None:
    base = torch.zeros(16)
    a["ema"][0] = base[:3]
    a["params"][0] = base.view(torch.bfloat16)[5:8]


def _column_crosses_row(a: Arguments) -> None:
    base = torch.randn(4, 4)
    a["ema"] = [base[2, :3], base[:, 1:3].T]


def _scale_is_in_ema(a: Arguments) -> None:
    a["scale"] = a["ema"][0][1:]


def _scale_reaches_into_ema(a: Arguments) -> None:
    base = torch.randn(4)
    a["scale"], a["ema"][0] = base[:2], base[1:]


def _momentum_is_in_ema(a: Arguments) -> None:
    a["momentum"] = a["ema"][1][0, 3]


def negated() -> Tensor:
    return torch.randn(3, dtype=torch.complex64).conj().imag


with warnings.catch_warnings():  # PyTorch means to give both up
    warnings.simplefilter("ignore")
    NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    NESTED_VOLUMES = torch.nested.nested_tensor([torch.ones(2, 2, 2, 2)] * 2)
    QUANTIZED = torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)
SPARSE = torch.eye(2, 4).to_sparse()
EMA_SCALE_UPDATE: dict[str, tuple[Callable[[Arguments], None], type[Exception], str]] = {
    "ema is no tensor": (replaced("ema", None), TypeError, r"ema .*NoneType"),
    "params is no tensor": (replaced("params", 3.5), TypeError, r"params .*float"),
    "bias is no list": (replaced("bias", 1), TypeError, r"bias .*int"),
    "ema[1] is no tensor": (replaced("ema", 1.5, 1), TypeError, r"ema\[1\].*float"),
    "params[0] is no tensor": (replaced("params", [1.0] * 3, 0), TypeError, r"params\[0\].*list"),
    "bias[1] is no tensor": (replaced("bias", None, 1), TypeError, r"bias\[1\].*NoneType"),
    "ema of integers": (replaced("ema", torch.arange(3), 0), TypeError, r"ema\[0\].*torch\.int64"),
    "params of integers": (replaced("params", torch.arange(3), 0), TypeError, r"params\[0\].*torch\.int64"),
    "bias of booleans": (replaced("bias", torch.ones(3, dtype=torch.bool), 0), TypeError, r"bias\[0\].*torch\.bool"),
    "ema complex": (replaced("ema", torch.ones(3, dtype=torch.cfloat), 0), TypeError, r"ema\[0\].*torch\.complex64"),
    "ema float8": (
        replaced("ema", torch.ones(3).to(torch.float8_e4m3fn), 0),
        TypeError,
        r"ema\[0\].*torch\.float8_e4m3fn",
    ),
    "ema sparse": (replaced("ema", SPARSE, 1), TypeError, r"ema\[1\].*torch\.sparse_coo"),
    "params sparse": (replaced("params", SPARSE, 1), TypeError, r"params\[1\].*torch\.sparse_coo"),
    "ema nested": (replaced("ema", NESTED, 1), TypeError, r"ema\[1\].*nested"),
    "params nested": (replaced("params", NESTED, 1), TypeError, r"params\[1\].*nested"),
    "bias nested": (replaced("bias", NESTED, 0), TypeError, r"bias\[0\].*nested"),
    "scale nested": (replaced("scale", NESTED), TypeError, r"scale.*nested"),
    "momentum nested": (replaced("momentum", NESTED), TypeError, r"momentum.*nested"),
    "ema a ZeroTensor": (replaced("ema", torch._efficientzerotensor(3), 0), TypeError, r"ema\[0\] is a ZeroTensor"),
    "params a ZeroTensor": (
        replaced("params", torch._efficientzerotensor(3), 0),
        TypeError,
        r"params\[0\] is a ZeroTensor.*clone",
    ),
    "bias a ZeroTensor": (replaced("bias", torch._efficientzerotensor(3), 0), TypeError, r"bias\[0\] is a ZeroTensor"),
    "scale a ZeroTensor": (replaced("scale", torch._efficientzerotensor(2)), TypeError, r"scale is a ZeroTensor"),
    "momentum a ZeroTensor": (
        replaced("momentum", torch._efficientzerotensor(())),
        TypeError,
        r"momentum is a ZeroTensor",
    ),
    "too few params": (replaced("params", [torch.ones(3)]), ValueError, r"params has 1 .*ema has 2"),
    "too many bias": (replaced("bias", [torch.ones(3)] * 3), ValueError, r"bias has 3 .*ema has 2"),
    "params of another shape": (
        replaced("params", torch.ones(4, 2), 1),
        ValueError,
        r"params\[1\].*\(4, 2\).*ema\[1\].*\(2, 4\)",
    ),
    "params that would broadcast": (replaced("params", torch.ones(1), 0), ValueError, r"params\[0\].*\(1,\).*\(3,\)"),
    "bias of another shape": (replaced("bias", torch.ones(8), 1), ValueError, r"bias\[1\].*\(8,\).*\(2, 4\)"),
    "params on another device": (
        replaced("params", torch.ones(3, device="meta"), 0),
        ValueError,
        r"params\[0\] is on meta, ema\[0\] on cpu",
    ),
    "bias on another device": (
        replaced("bias", torch.ones(2, 4, device="meta"), 1),
        ValueError,
        r"bias\[1\] is on meta, ema\[1\] on cpu",
    ),
    "scale on another device": (
        replaced("scale", torch.ones(2, device="meta")),
        ValueError,
        r"scale is on meta.*cpu",
    ),
    "momentum below": (replaced("momentum", -1e-9), ValueError, r"momentum.*\[0, 1\].*-1e-09"),
    "momentum above": (replaced("momentum", 1.0000001), ValueError, r"momentum.*\[0, 1\].*1\.0000001"),
    "momentum NaN": (replaced("momentum", float("nan")), ValueError, r"momentum.*\[0, 1\].*nan"),
    "momentum infinite": (replaced("momentum", float("inf")), ValueError, r"momentum.*\[0, 1\].*inf"),
    "momentum a string": (replaced("momentum", "0.9"), TypeError, r"momentum.*str"),
    "momentum None": (replaced("momentum", None), TypeError, r"momentum.*NoneType"),
    "momentum a bool": (replaced("momentum", True), TypeError, r"momentum.*bool"),
    "momentum of one entry": (replaced("momentum", torch.tensor([0.9])), ValueError, r"momentum.*0-dim.*\(1,\)"),
    "momentum an integer tensor": (replaced("momentum", torch.tensor(1)), TypeError, r"momentum.*torch\.int64"),
    "momentum on another device": (
        replaced("momentum", torch.tensor(0.9, device="meta")),
        ValueError,
        r"momentum is on meta, ema on cpu",
    ),
    "scale without bias": (without("bias", "groups"), ValueError, r"scale and bias.*bias is missing"),
    "bias without scale": (without("scale", "groups"), ValueError, r"scale and bias.*scale is missing"),
    "groups alone": (without("scale", "bias"), ValueError, r"groups.*no scale"),
    "scale a float": (replaced("scale", 1.0), TypeError, r"scale.*float"),
    "scale of integers": (replaced("scale", torch.ones(2, dtype=torch.int32)), TypeError, r"scale.*torch\.int32"),
    "scale of two dimensions": (replaced("scale", torch.ones(2, 1)), ValueError, r"scale.*\(2, 1\)"),
    "scale of several entries, no groups": (without("groups"), ValueError, r"scale has 2 entries.*groups"),
    "group beyond 64 bits": (replaced("groups", 2**64, 1), IndexError, rf"groups\[1\] is {2**64}.*scale has"),
    "group far below 0": (replaced("groups", -(2**64), 0), IndexError, rf"groups\[0\] is -{2**64}.*scale has"),
    "groups an int": (replaced("groups", 0), TypeError, r"groups has to be a sequence of ints, and is int"),
    "groups an array without dimensions": (replaced("groups", np.array(0)), TypeError, r"groups.*ndarray"),
    "groups an array of floats": (replaced("groups", np.array([0.0, 1.0])), TypeError, r"groups\[0\].*float64"),
    "groups an array of two dimensions": (replaced("groups", np.array([[0, 1]])), TypeError, r"groups\[0\].*ndarray"),
    "groups a tensor": (replaced("groups", torch.tensor([0, 1])), TypeError, r"groups\[0\].*Tensor.*tolist"),
    "too few groups": (replaced("groups", [0]), ValueError, r"groups has 1 .*ema has 2"),
    "group too large": (replaced("groups", 2, 1), IndexError, r"groups\[1\] is 2.*scale has 2"),
    "group negative": (replaced("groups", -1, 0), IndexError, r"groups\[0\] is -1.*scale has 2"),
    "group a bool": (replaced("groups", True, 1), TypeError, r"groups\[1\].*bool"),
    "group a float": (replaced("groups", 1.0, 1), TypeError, r"groups\[1\].*float"),
    "group out of an empty scale": (
        both(replaced("scale", torch.ones(0)), replaced("groups", [0, 0])),
        IndexError,
        r"groups\[0\] is 0.*scale has 0",
    ),
    "total NaN": (replaced("total", float("nan")), ValueError, r"total.*nan"),
    "total infinite": (replaced("total", float("inf")), ValueError, r"total.*inf"),
    "total a bool": (replaced("total", True), TypeError, r"total.*bool"),
    "total a string": (replaced("total", "2"), TypeError, r"total.*str"),
    "unknown rounding": (replaced("rounding", "up"), ValueError, r"rounding.*nearest, stochastic.*'up'"),
    "rounding None": (replaced("rounding", None), ValueError, r"rounding.*nearest, stochastic.*None"),
    "generator no generator": (
        both(replaced("rounding", "stochastic"), replaced("generator", 7)),
        TypeError,
        r"generator .*int",
    ),
    "ema requires grad": (replaced("ema", torch.ones(3, requires_grad=True), 0), RuntimeError, r"ema\[0\].*no_grad"),
    "a later ema requires grad": (
        replaced("ema", torch.ones(2, 4, requires_grad=True), 1),
        RuntimeError,
        r"ema\[1\].*no_grad",
    ),
    "ema twice": (_same_ema_twice, ValueError, r"ema\[[01]\] overlaps ema\[[01]\]"),
    "ema is params": (aliased("ema", 1, "params", 1), ValueError, r"ema\[1\] overlaps params\[1\]"),
    "ema is the params of another pair": (_ema_is_params_elsewhere, ValueError, r"ema\[1\] overlaps params\[0\]"),
    "ema is bias": (aliased("ema", 0, "bias", 0), ValueError, r"ema\[0\] overlaps bias\[0\]"),
    "ema is a later bias": (aliased("ema", 1, "bias", 1), ValueError, r"ema\[1\] overlaps bias\[1\]"),
    "ema holds the last entry of scale": (_scale_reaches_into_ema, ValueError, r"ema\[0\] overlaps scale in memory"),
    "ema holds scale": (_scale_is_in_ema, ValueError, r"ema\[0\] overlaps scale in memory"),
    "ema holds momentum": (_momentum_is_in_ema, ValueError, r"ema\[1\] overlaps momentum in memory"),
    "ema views overlap": (_overlapping_views, ValueError, r"ema\[[01]\] overlaps ema\[[01]\]"),
    "ema and params views overlap": (_overlapping_params, ValueError, r"ema\[1\] overlaps params\[1\]"),
    "overlap across dtypes": (_overlapping_by_one_byte_of_another_dtype, ValueError, r"ema\[0\] overlaps params\[0\]"),
    "a column crosses a row": (_column_crosses_row, ValueError, r"ema\[[01]\] overlaps ema\[[01]\]"),
    "ema lazily negated": (replaced("ema", negated(), 0), TypeError, r"ema\[0\].*lazily negated.*resolve_neg"),
    "ema a wrapper of tensors": (
        replaced("ema", TwoTensor(torch.randn(3), torch.randn(3)), 0),
        TypeError,
        r"ema\[0\] is a TwoTensor",
    ),
    "ema expanded": (replaced("ema", torch.ones(1).expand(3), 0), ValueError, r"ema\[0\].*share memory"),
    "ema strided over itself": (
        replaced("ema", torch.ones(16).as_strided((2, 4), (2, 1)), 1),
        ValueError,
        r"ema\[1\].*share memory",
    ),
}


def tensors_of(arguments: Arguments) -> list[Tensor]:
    found = []
    for value in arguments.values():
        for t in value if isinstance(value, list) else [value]:
            if isinstance(t, Tensor) and not t.is_meta and t.layout == torch.strided and not t.is_nested:
                found.append(t)
    return found


def same_bytes(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach().clone(memory_format=torch.contiguous_format), b.clone(memory_format=torch.contiguous_format)
    return torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def check_ema_scale_update(case: str, backend: str) -> None:
    """Raises as it has to, and writes nothing."""
    change, kind, message = EMA_SCALE_UPDATE[case]
    arguments = valid()
    change(arguments)
    tensors = tensors_of(arguments)
    before = [t.detach().clone() for t in tensors]
    versions = [t._version for t in tensors]
    with pytest.raises(kind) as error, manpp_kernels.use_backend(backend):
        ema_scale_update(**arguments)
    assert error.type is (OverlapError if " overlaps " in str(error.value) else kind)
    assert re.search(message, str(error.value)), str(error.value)
    for t, b, version in zip(tensors, before, versions, strict=True):
        assert same_bytes(t, b)
        assert t._version == version


X = torch.arange(6.0).view(2, 3)
BASE = torch.zeros(12)
DETACH_COPY: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "x no tensor": (([1.0],), {}, TypeError, "x .*list"),
    "x complex": ((X.cfloat(),), {}, TypeError, "complex64"),
    "x sparse": ((X.to_sparse(),), {}, TypeError, r"x .*torch\.sparse_coo"),
    "x nested": ((NESTED,), {}, TypeError, "x .*nested"),
    "x nested, laid out": ((NESTED_VOLUMES,), {"memory_format": torch.channels_last_3d}, TypeError, "x .*nested"),
    "x quantized": ((QUANTIZED,), {}, TypeError, r"x is quantized, of torch\.qint8.*dequantize"),
    "x quantized, to be cast": ((QUANTIZED,), {"dtype": torch.float32}, TypeError, "x is quantized"),
    "x a ZeroTensor": ((torch._efficientzerotensor(2, 3), torch.zeros(2, 3)), {}, TypeError, "x is a ZeroTensor"),
    "dtype quantized": ((X,), {"dtype": torch.qint8}, TypeError, r"dtype .*torch\.qint8"),
    "dtype complex": ((X,), {"dtype": torch.cdouble}, TypeError, "complex128"),
    "dtype no dtype": ((X,), {"dtype": "float32"}, TypeError, "dtype .*str"),
    "dtype an array": ((X,), {"dtype": np.ones(3)}, TypeError, "dtype .*ndarray"),
    "memory_format no format": ((X,), {"memory_format": "channels_last"}, TypeError, "memory_format .*str"),
    "channels_last of two dimensions": (
        (X,),
        {"memory_format": torch.channels_last},
        ValueError,
        r"memory_format.*channels_last.*\(2, 3\)",
    ),
    "out no tensor": ((X, 3), {}, TypeError, "out .*int"),
    "out complex": ((X, torch.zeros(2, 3, dtype=torch.cfloat)), {}, TypeError, "out .*complex64"),
    "out sparse": ((X, X.to_sparse()), {}, TypeError, r"out .*torch\.sparse_coo"),
    "out nested": ((X, NESTED), {}, TypeError, "out .*nested"),
    "out quantized": ((X, QUANTIZED), {}, TypeError, "out is quantized"),
    "out of another shape": ((X, torch.zeros(3, 2)), {}, ValueError, r"out .*\(3, 2\).*x \(2, 3\)"),
    "out that would broadcast": ((X[:1], torch.zeros(2, 3)), {}, ValueError, r"out .*\(2, 3\).*x \(1, 3\)"),
    "out on another device": ((X, X.to("meta")), {}, ValueError, "out is on meta, x on cpu"),
    "out and dtype": ((X, torch.zeros(2, 3)), {"dtype": torch.half}, ValueError, "out .*dtype"),
    "out and memory_format": (
        (X, torch.zeros(2, 3)),
        {"memory_format": torch.contiguous_format},
        ValueError,
        "out .*memory_format",
    ),
    "out is x": ((X, X), {}, ValueError, "out.* overlaps x"),
    "out overlaps x": ((BASE[:6], BASE[5:11]), {}, ValueError, "out.* overlaps x"),
    "out overlaps x from below": ((BASE[5:11], BASE[:6]), {}, ValueError, "out.* overlaps x"),
    "out expanded": ((X, torch.zeros(1).expand(2, 3)), {}, ValueError, "out.* share memory"),
    "out requires grad": ((X, torch.zeros(2, 3, requires_grad=True)), {}, RuntimeError, "out requires grad"),
}


def check_detach_copy(case: str, backend: str) -> None:
    arguments, options, kind, message = DETACH_COPY[case]
    before = [a.clone() if isinstance(a, Tensor) and not (a.is_sparse or a.is_nested) else None for a in arguments]
    with pytest.raises(kind, match=message) as error, manpp_kernels.use_backend(backend):
        detach_copy(*arguments, **options)
    assert error.type is (OverlapError if " overlaps " in str(error.value) else kind)
    for a, b in zip(arguments, before, strict=True):
        assert b is None or b.is_meta or torch.equal(a, b)


MAP = torch.ones(2, 3, 4)
SCALE_BIAS_MIX: dict[str, tuple[tuple[Any, Any, Any], dict[str, Any], type[Exception], str]] = {
    "lb_out no tensor": ((1.0, MAP, MAP), {}, TypeError, "lb_out .*float"),
    "ema_out no tensor": ((MAP, None, MAP), {}, TypeError, "ema_out .*NoneType"),
    "scale no tensor": ((MAP, MAP, 1.0), {}, TypeError, "scale .*float"),
    "lb_out of integers": ((MAP.int(), MAP, torch.tensor(1.0)), {}, TypeError, r"lb_out .*torch\.int32"),
    "ema_out of integers": ((MAP, MAP.long(), torch.tensor(1.0)), {}, TypeError, r"ema_out .*torch\.int64"),
    "scale of integers": ((MAP, MAP, torch.tensor(1)), {}, TypeError, r"scale .*torch\.int64"),
    "complex": ((MAP.cfloat(), MAP, torch.tensor(1.0)), {}, TypeError, r"lb_out .*torch\.complex64"),
    "float8": (
        (MAP.to(torch.float8_e5m2), MAP.to(torch.float8_e5m2), torch.tensor(1.0)),
        {},
        TypeError,
        r"lb_out .*torch\.float8_e5m2",
    ),
    "sparse": ((MAP.to_sparse(), MAP, torch.tensor(1.0)), {}, TypeError, r"lb_out .*torch\.sparse_coo"),
    "lb_out nested": ((NESTED, MAP, torch.tensor(1.0)), {}, TypeError, "lb_out .*nested"),
    "ema_out nested": ((MAP, NESTED, torch.tensor(1.0)), {}, TypeError, "ema_out .*nested"),
    "scale nested": ((MAP, MAP, NESTED), {}, TypeError, "scale .*nested"),
    "shapes": ((MAP, MAP[:1], torch.tensor(1.0)), {}, ValueError, r"ema_out .*\(1, 3, 4\).*\(2, 3, 4\)"),
    "device of ema_out": ((MAP, MAP.to("meta"), torch.tensor(1.0)), {}, ValueError, "ema_out is on meta.*cpu"),
    "device of scale": ((MAP, MAP, torch.tensor(1.0, device="meta")), {}, ValueError, "scale is on meta.*cpu"),
    "channels": ((MAP, MAP, torch.ones(4)), {}, ValueError, r"scale .*\(3,\).*\(4,\)"),
    "scale of two dimensions": ((MAP, MAP, torch.ones(3, 1)), {}, ValueError, r"scale .*\(3, 1\)"),
    "no channels": ((MAP[0, 0], MAP[0, 0], torch.ones(4)), {}, ValueError, r"scale .*\(4,\)"),
    "total NaN": ((MAP, MAP, torch.tensor(1.0)), {"total": math.nan}, ValueError, "total .*nan"),
    "total a string": ((MAP, MAP, torch.tensor(1.0)), {"total": "2"}, TypeError, "total .*str"),
}


def check_scale_bias_mix(case: str, backend: str) -> None:
    arguments, options, kind, message = SCALE_BIAS_MIX[case]
    with pytest.raises(kind, match=message) as error, manpp_kernels.use_backend(backend):
        scale_bias_mix(*arguments, **options)
    assert error.type is kind
