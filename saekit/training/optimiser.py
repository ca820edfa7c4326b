"""Adam, for parameters whose transpose is contiguous in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Adam(torch.optim.Adam):
    """torch's Adam, bit for bit, without a copy. torch's fused kernel on the CPU copies tensors that are not contiguous back and
    forth. Adam works entry by entry, so here the kernel gets the transpose of what is transposed in memory, as W_enc is."""

    def _init_group(
        self,
        group: dict[str, Any],
        params_with_grad: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        *others: list[Tensor],
    ) -> bool:
        has_complex = super()._init_group(group, params_with_grad, grads, exp_avgs, exp_avg_sqs, *others)
        columns = (params_with_grad, grads, exp_avgs, exp_avg_sqs)
        for number, parameter in enumerate(params_with_grad):
            if parameter.dim() == 2 and not parameter.is_contiguous():
                for column in columns:
                    column[number] = column[number].t()
        return has_complex
