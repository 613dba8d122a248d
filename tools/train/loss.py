"""Distillation through a large vocabulary without keeping logits.

Per row: loss = ce_w · CE(q, x) + l1_w · ‖q − p‖₁, where q = softmax(head·h + W2·m), p = softmax(head·teacher).
Rows go through the vocabulary a chunk at a time; each chunk's gradient is made while its logits exist,
so memory is chunk × V whatever the batch. `head` is frozen. `m = W1[x_prev]` and W2 are the Markov
head's two halves (None for drafters without one).
"""

from __future__ import annotations

import torch

from kernels import distill_rows


class Distill(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, m, w2, head, teacher, labels, weight, ce_w: float, l1_w: float, chunk: int):
        d = h.shape[1]
        x, table = h, head
        if m is not None:  # one product of width d + r does both terms
            x, table = torch.cat([h, m.to(h.dtype)], 1), torch.cat([head, w2.to(head.dtype)], 1)
        ce, l1 = (torch.empty(h.shape[0], device=h.device) for _ in range(2))
        dx = torch.empty_like(x)
        dw2 = torch.zeros_like(w2) if m is not None else None
        for i in range(0, h.shape[0], chunk):
            s = slice(i, i + chunk)
            logits = x[s] @ table.t()
            ce[s], l1[s] = distill_rows(logits, teacher[s] @ head.t(), labels[s], weight[s], ce_w, l1_w)
            torch.mm(logits, table, out=dx[s])
            if m is not None:
                dw2 += logits.t() @ x[s, d:]
        ctx.save_for_backward(dx, dw2)
        ctx.d = d
        ctx.mark_non_differentiable(ce, l1)
        return (weight * (ce_w * ce + l1_w * l1)).sum(), ce, l1

    @staticmethod
    def backward(ctx, grad, *_):
        dx, dw2 = ctx.saved_tensors
        d = ctx.d
        dm = dx[:, d:] * grad if dw2 is not None else None
        return dx[:, :d] * grad, dm, None if dw2 is None else dw2 * grad, *[None] * 7


def distill(h: torch.Tensor, m: torch.Tensor | None, w2: torch.Tensor | None, head: torch.Tensor, teacher: torch.Tensor,
            labels: torch.Tensor, weight: torch.Tensor, ce_w: float = 0.1, l1_w: float = 0.9,
            chunk: int = 4096) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weighted loss, ce [N], l1 [N]) for h, teacher [N, d], m [N, r], labels and weight [N]."""
    return Distill.apply(h, m, w2, head, teacher, labels, weight, ce_w, l1_w, chunk)
