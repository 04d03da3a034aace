"""A pytest plugin: the library that MANPP_EMULATED names stands in for the compiled operators.

It holds the CUDA kernels compiled for the host, and serves CPU tensors with them, so that every test of the backend
``cpu`` runs them. Memory that PyTorch hands out is filled with NaN: what a kernel forgets to write, or reads too early,
shows in the result.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import torch


def _stand_in() -> None:
    spec = importlib.util.spec_from_file_location("manpp_kernels._C", os.environ["MANPP_EMULATED"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["manpp_kernels._C"] = module


torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = True
_stand_in()
