"""Two Triton kernels and their plain PyTorch twins.

`decode_attention`: one query token per slot against a static KV cache, reading only the rows that
exist. `distill_rows`: softmax of draft and teacher logits, cross entropy, total variation and the
gradient of the loss, one row per program, gradient written over the draft logits.

CUDA tensors take the Triton kernels, everything else the twins; `DSPARK_NO_TRITON=1` forces the twins.
"""

from __future__ import annotations

import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

USE_TRITON = triton is not None and os.environ.get("DSPARK_NO_TRITON") != "1"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

if triton is not None:

    @triton.jit
    def decode_attention_kernel(q_ptr, k_ptr, v_ptr, pos_ptr, out_ptr, max_len, scale,
                                KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr):
        """Grid (slots, KV heads). q, out [slots, KV_HEADS·GROUP, DIM]; k, v [slots, KV_HEADS, max_len, DIM]."""
        slot, head = tl.program_id(0), tl.program_id(1)
        rows, dims, cols = tl.arange(0, 16), tl.arange(0, DIM), tl.arange(0, BLOCK)
        q_off = (slot * KV_HEADS + head) * GROUP * DIM + rows[:, None] * DIM + dims[None, :]
        q = tl.load(q_ptr + q_off, mask=rows[:, None] < GROUP, other=0.0)
        base = (slot * KV_HEADS + head).to(tl.int64) * max_len * DIM
        n = tl.load(pos_ptr + slot).to(tl.int32) + 1
        m = tl.full([16], -1.0e30, tl.float32)
        total = tl.zeros([16], tl.float32)
        acc = tl.zeros([16, DIM], tl.float32)
        for start in range(0, n, BLOCK):
            ok = (start + cols) < n
            kv_off = base + (start + cols)[:, None] * DIM + dims[None, :]
            k = tl.load(k_ptr + kv_off, mask=ok[:, None], other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            s = tl.where(ok[None, :], s, -1.0e30)
            m_new = tl.maximum(m, tl.max(s, 1))
            p = tl.exp(s - m_new[:, None])
            alpha = tl.exp(m - m_new)
            total = total * alpha + tl.sum(p, 1)
            v = tl.load(v_ptr + kv_off, mask=ok[:, None], other=0.0)
            acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            m = m_new
        out = acc / total[:, None]
        tl.store(out_ptr + q_off, out.to(out_ptr.dtype.element_ty), mask=rows[:, None] < GROUP)

    @triton.jit
    def distill_rows_kernel(l_ptr, t_ptr, label_ptr, weight_ptr, ce_ptr, l1_ptr, vocab, ce_w, l1_w, BLOCK: tl.constexpr):
        """Grid (rows,). l, t [rows, vocab]; l is overwritten by the gradient."""
        row = tl.program_id(0)
        cols = tl.arange(0, BLOCK)
        base = row.to(tl.int64) * vocab
        ml = tl.full([BLOCK], -1.0e30, tl.float32)
        mt = tl.full([BLOCK], -1.0e30, tl.float32)
        sl = tl.zeros([BLOCK], tl.float32)
        st = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            ok = (start + cols) < vocab
            a = tl.load(l_ptr + base + start + cols, mask=ok, other=-1.0e30).to(tl.float32)
            b = tl.load(t_ptr + base + start + cols, mask=ok, other=-1.0e30).to(tl.float32)
            na = tl.maximum(ml, a)
            nb = tl.maximum(mt, b)
            sl = sl * tl.exp(ml - na) + tl.where(ok, tl.exp(a - na), 0.0)
            st = st * tl.exp(mt - nb) + tl.where(ok, tl.exp(b - nb), 0.0)
            ml = na
            mt = nb
        top_l = tl.max(ml, 0)
        top_t = tl.max(mt, 0)
        sum_l = tl.sum(sl * tl.exp(ml - top_l), 0)
        sum_t = tl.sum(st * tl.exp(mt - top_t), 0)
        l1 = tl.zeros([BLOCK], tl.float32)
        qg = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab, BLOCK):
            ok = (start + cols) < vocab
            a = tl.load(l_ptr + base + start + cols, mask=ok, other=-1.0e30).to(tl.float32)
            b = tl.load(t_ptr + base + start + cols, mask=ok, other=-1.0e30).to(tl.float32)
            q = tl.where(ok, tl.exp(a - top_l) / sum_l, 0.0)
            p = tl.where(ok, tl.exp(b - top_t) / sum_t, 0.0)
            l1 += tl.abs(q - p)
            qg += tl.where(q > p, q, tl.where(q < p, -q, 0.0))
        mean_g = tl.sum(qg, 0)
        label = tl.load(label_ptr + row).to(tl.int32)
        weight = tl.load(weight_ptr + row)
        label_logit = tl.load(l_ptr + base + label).to(tl.float32)
        tl.store(ce_ptr + row, tl.log(sum_l) + top_l - label_logit)
        tl.store(l1_ptr + row, tl.sum(l1, 0))
        tl.debug_barrier()  # every read of the label's logit comes before it is overwritten
        for start in range(0, vocab, BLOCK):
            ok = (start + cols) < vocab
            a = tl.load(l_ptr + base + start + cols, mask=ok, other=-1.0e30).to(tl.float32)
            b = tl.load(t_ptr + base + start + cols, mask=ok, other=-1.0e30).to(tl.float32)
            q = tl.where(ok, tl.exp(a - top_l) / sum_l, 0.0)
            p = tl.where(ok, tl.exp(b - top_t) / sum_t, 0.0)
            g = tl.where(q > p, 1.0, tl.where(q < p, -1.0, 0.0))
            hot = tl.where((start + cols) == label, 1.0, 0.0)
            d = weight * (ce_w * (q - hot) + l1_w * q * (g - mean_g))
            tl.store(l_ptr + base + start + cols, d.to(l_ptr.dtype.element_ty), mask=ok)


def _triton(x: torch.Tensor) -> bool:
    return USE_TRITON and (x.is_cuda or INTERPRET)


def decode_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
    """q [S, H, D], k and v [S, KVH, max_len, D], pos [S]: attends to rows 0..pos. Returns [S, H, D]."""
    slots, heads, dim = q.shape
    kv_heads, max_len = k.shape[1], k.shape[2]
    group, scale = heads // kv_heads, dim**-0.5
    if _triton(q):
        assert group <= 16 and k.is_contiguous() and v.is_contiguous()
        q, out = q.contiguous(), torch.empty(slots, heads, dim, device=q.device, dtype=q.dtype)
        decode_attention_kernel[(slots, kv_heads)](q, k, v, pos, out, max_len, scale, KV_HEADS=kv_heads, GROUP=group,
                                                   DIM=dim, BLOCK=64, num_warps=4)
        return out
    s = torch.matmul(q.view(slots, kv_heads, group, dim), k.transpose(-1, -2)).float() * scale
    s = s.masked_fill(torch.arange(max_len, device=q.device) > pos[:, None, None, None], -torch.inf)
    return torch.matmul(s.softmax(-1).to(v.dtype), v).view(slots, heads, dim)


def distill_rows(logits: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor,
                 ce_w: float, l1_w: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-row cross entropy and ‖q − p‖₁, f32 [N]; `logits` [N, V] becomes d(Σ weight·(ce_w·ce + l1_w·l1))/d logits.

    d ce = q − onehot and d l1 = q·(sign(q − p) − Σ q·sign(q − p)).
    """
    rows, vocab = logits.shape
    if _triton(logits):
        assert logits.is_contiguous() and teacher.is_contiguous()
        ce = torch.empty(rows, device=logits.device, dtype=torch.float32)
        l1 = torch.empty_like(ce)
        distill_rows_kernel[(rows,)](logits, teacher, labels.contiguous(), weight.float().contiguous(), ce, l1, vocab,
                                     ce_w, l1_w, BLOCK=2048, num_warps=8)
        return ce, l1
    log_q = logits.float().log_softmax(-1)
    q, p = log_q.exp(), teacher.float().softmax(-1)
    ce, l1 = -log_q.gather(1, labels[:, None])[:, 0], (q - p).abs().sum(-1)
    g = (q - p).sign()
    grad = ce_w * q + l1_w * q * (g - (q * g).sum(-1, keepdim=True))
    grad.scatter_add_(1, labels[:, None], torch.full_like(labels[:, None], -ce_w, dtype=grad.dtype))
    logits.copy_(grad * weight[:, None])
    return ce, l1
