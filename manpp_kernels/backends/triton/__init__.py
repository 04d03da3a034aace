"""The operators in Triton: NVIDIA and AMD GPUs where no compiler is installed, and the CPU under the interpreter.

A file per operator holds its kernel, its launch and its function, which takes the arguments of the operator's schema.
A launch plan calls ``build_table`` once and ``launch`` at every step, both from the module ``ema_scale_update`` (by
``from manpp_kernels.backends.triton.ema_scale_update import …``: in this package the name stands for the function).
"""

from manpp_kernels.backends.triton.detach_copy import detach_copy
from manpp_kernels.backends.triton.ema_scale_update import ema_scale_update
from manpp_kernels.backends.triton.ema_scale_update_backward import ema_scale_update_backward
from manpp_kernels.backends.triton.scale_bias_mix import scale_bias_mix, scale_bias_mix_backward

__all__ = [
    "detach_copy",
    "ema_scale_update",
    "ema_scale_update_backward",
    "scale_bias_mix",
    "scale_bias_mix_backward",
]
