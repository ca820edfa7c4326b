"""The two divergences that unlearning trains with, in nats for each position.

With p the edited model's distribution over a vocabulary of V, b the base model's, and q that of a model which does not know:

    forget text:  KL(p || q) = sum_v p_v (log p_v - log q_v), and for the uniform q: log V - H(p), H(p) = -sum_v p_v log p_v
    retain text:  KL(b || p) = sum_v b_v (log b_v - log p_v)

On forget text only the positions that predict the answer count, on retain text all that predict a token.
"""

from __future__ import annotations

import math

from torch import Tensor


def forget_kl(edited: Tensor, unknowing: Tensor | None = None) -> Tensor:
    """KL(edited || unknowing), or KL(edited || uniform) without it: logits [..., vocab] -> [...].

    unknowing: logits, or log probabilities, of a model that does not know the answer, such as the oracle."""
    log_p = edited.log_softmax(-1)
    if unknowing is None:
        return math.log(edited.shape[-1]) + (log_p.exp() * log_p).sum(-1)
    return (log_p.exp() * (log_p - unknowing.log_softmax(-1))).sum(-1)


def retain_kl(base: Tensor, edited: Tensor) -> Tensor:
    """KL(base || edited): logits [..., vocab] -> [...]. No gradient reaches the base."""
    log_b = base.detach().log_softmax(-1)
    return (log_b.exp() * (log_b - edited.log_softmax(-1))).sum(-1)
