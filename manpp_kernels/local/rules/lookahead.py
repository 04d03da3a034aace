"""Look-ahead: a rule of this package. The local head looks at the features through the next unit itself.

With u the first unit of the next block and theta_u its parameters, as they are, not copied::

    y_j = u(x_j; theta_u)
    L_j = host's loss on y_j

L_j trains block j and, by its share, u, which its own block's loss trains as well: neighbouring blocks overlap by one
unit, and each learns what the one behind it needs. There is no copy, no EMA and no scale: what is trained beside the
network is the host's head alone. Overlapping local losses are known from LoCo (Xiong et al., "LoCo: Local Contrastive
Representation Learning", NeurIPS 2020) and BackLink (Guo et al., arXiv 2205.07141); MAN's transform is the same
place with copies in it.

As two losses train a unit, its gradients are complete at the end of a step: the order has to be "published".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from manpp_kernels.local.auxiliary import Auxiliary, Site, copy_unit
from manpp_kernels.local.rules import Hosted, HostedOptions, register


class SharedUnit(nn.Module):
    """``u(x; theta_u)`` with the user's own parameters, which it trains but does not own.

    Batch normalisations normalise by the batch, as in every copy: running statistics are moved by the user's own
    forward pass alone, and not a second time from here.
    """

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        form = copy_unit(unit, "copy", lambda _: None, trainable=False).to("meta")
        # In lists, so that neither the user's unit nor the empty form its tensors are put into is registered here.
        self._unit, self._form = [unit], [form]
        self._buffers_read = {name for name, _ in form.named_buffers()}

    def forward(self, x: Tensor) -> Tensor:
        (unit,), (form,) = self._unit, self._form
        tensors: dict[str, Tensor] = dict(unit.named_parameters())
        tensors |= {name: buffer for name, buffer in unit.named_buffers() if name in self._buffers_read}
        return torch.func.functional_call(form, tensors, (x,))


@register("lookahead")
class Lookahead(Hosted):
    """The next unit itself in front of the host's local head."""

    Options = HostedOptions
    overlapping = True

    def auxiliary(self, site: Site) -> Auxiliary:
        units = site.ahead(self.options.units)
        return self.hosted(site, [SharedUnit(unit.module) for unit in units], units[-1].shape)
