"""The operators in Triton: NVIDIA and AMD GPUs where no compiler is installed, and the CPU under the interpreter.

A file per operator holds its kernel, its launch and its function, which takes the arguments of the operator's schema.
A launch plan uses ``ema_scale_update.build_table`` once and ``ema_scale_update.launch`` at every step.
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
