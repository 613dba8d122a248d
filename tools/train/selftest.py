#!/usr/bin/env python3
"""Checks of the training code on a random tiny model; seconds on a CPU, no checkpoint needed.

  python3 selftest.py                       everything, PyTorch twins of the kernels
  TRITON_INTERPRET=1 python3 selftest.py    the Triton kernels too, interpreted (on CUDA: compiled)
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import kernels
import model as drafters
from data import spread
from evaluate import follow_rounds
from generate import Decoder, Prompt
from loss import distill
from target import Target, rope_tables, rotate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = dict(hidden_size=48, intermediate_size=96, num_attention_heads=6, num_key_value_heads=2, head_dim=16, vocab_size=97, rms_norm_eps=1e-5,
              rope_theta=1e4, max_position_embeddings=256, num_hidden_layers=4, tie_word_embeddings=True, hidden_act="silu", eos_token_id=2)


def close(name: str, a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    error = (a.float() - b.float()).abs().max().item()
    print(f"{name}: max error {error:.2e}")
    assert error <= tolerance, f"{name}: {error} > {tolerance}"


def tiny_target(folder: Path) -> Target:
    from safetensors.torch import save_file

    c, d = CONFIG, CONFIG["hidden_size"]
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], d), "model.norm.weight": (d,)}
    for i in range(c["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (d,), p + "post_attention_layernorm.weight": (d,), p + "self_attn.q_proj.weight": (96, d),
                   p + "self_attn.k_proj.weight": (32, d), p + "self_attn.v_proj.weight": (32, d), p + "self_attn.o_proj.weight": (d, 96),
                   p + "mlp.gate_proj.weight": (96, d), p + "mlp.up_proj.weight": (96, d), p + "mlp.down_proj.weight": (d, 96)}
    save_file({k: torch.randn(s) * (0.3 if len(s) > 1 else 0.1) + (len(s) == 1) for k, s in shapes.items()}, str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(c))
    return Target(folder, DEVICE, torch.float32)


def naive_block(m: drafters.DSpark, taps: torch.Tensor, anchor: int, token: int, embed: torch.Tensor) -> torch.Tensor:
    """One block as an engine drafts it: context K/V from H_ctx[p < anchor], no mask at all. [γ, d]."""
    c, eps = m.config, m.config["rms_norm_eps"]
    dim, group = c["head_dim"], c["num_attention_heads"] // c["num_key_value_heads"]
    norm = lambda x, w: x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w
    positions = torch.arange(anchor + m.gamma, device=embed.device)
    angle = positions[:, None] * c["rope_theta"] ** (-torch.arange(0, dim, 2, device=embed.device) / dim)
    cos, sin = (torch.cat([f(angle)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))
    turn = lambda x, s: x * cos[s] + torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1) * sin[s]
    context = norm(taps[:anchor] @ m.fc.weight.T, m.hidden_norm.weight)
    x = embed[torch.tensor([token] + [m.mask_id] * (m.gamma - 1), device=embed.device)]
    for layer in m.layers:
        a, y = layer.self_attn, norm(x, layer.input_layernorm.weight)
        heads = lambda z, w: (z @ w.T).view(len(z), -1, dim)
        q = turn(norm(heads(y, a.q_proj.weight), a.q_norm.weight), slice(anchor, None))
        k = torch.cat([heads(context, a.k_proj.weight), heads(y, a.k_proj.weight)])
        k = turn(norm(k, a.k_norm.weight), slice(None)).repeat_interleave(group, 1)
        v = torch.cat([heads(context, a.v_proj.weight), heads(y, a.v_proj.weight)]).repeat_interleave(group, 1)
        p = (torch.einsum("qhd,khd->hqk", q, k) * dim**-0.5).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", p, v).reshape(m.gamma, -1) @ a.o_proj.weight.T
        y = norm(x, layer.post_attention_layernorm.weight)
        x = x + (F.silu(y @ layer.mlp.gate_proj.weight.T) * (y @ layer.mlp.up_proj.weight.T)) @ layer.mlp.down_proj.weight.T
    return norm(x, m.norm.weight)


@torch.no_grad()
def test_block(target: Target) -> None:
    config = drafters.dspark_config(CONFIG, 5, taps=[-1, 1, 2], layers=2, gamma=4, rank=8)
    m = drafters.build(config).to(DEVICE)
    for p in m.parameters():  # every norm weight matters
        p.add_(torch.randn_like(p) * 0.1)
    ids = torch.randint(0, 97, (2, 64), device=DEVICE)
    taps, _ = target.forward(ids, m.taps)
    anchors = torch.tensor([[3, 17, 17, 40], [1, 2, 30, 59]], device=DEVICE)
    h = m(taps, ids, anchors, target.embed)
    naive = torch.stack([torch.stack([naive_block(m, taps[b], int(a), int(ids[b, a]), target.embed) for a in anchors[b]]) for b in range(2)])
    close("block forward against one block at a time", h, naive, 2e-4)


@torch.no_grad()
def test_decoder(target: Target) -> None:
    """Slots that were reused give the same greedy text as full-sequence forwards."""
    head, rng = [7, 8, 9], np.random.default_rng(0)
    stream = [Prompt(head + rng.integers(10, 90, rng.integers(1, 6)).tolist(), 0.0, [11, 2, 12] if i % 3 == 0 else None) for i in range(9)]
    decoder = Decoder(target, 4, 120, (2, 0), user_cap=50, answer_cap=20, user_temperature=0.0)
    answers = decoder.run(stream, shared=3, every=4, stop_loops=False)
    assert sorted(a.tag for a in answers) == list(range(9))
    wrong = 0
    for a in answers:
        ids = torch.from_numpy(a.tokens.astype(np.int64)).to(DEVICE)[None]
        assert a.tokens[: len(stream[a.tag].ids)].tolist() == stream[a.tag].ids
        if a.answer:
            _, hidden = target.forward(ids, [])
            best = F.linear(hidden[0], target.head).argmax(-1)
            wrong += int((best[a.answer - 1 : -1] != ids[0, a.answer :]).sum())
    print(f"decoder: {sum(len(a.tokens) - a.answer for a in answers if a.answer)} greedy tokens, {wrong} differ from the full forward")
    assert wrong == 0


def test_loss() -> None:
    n, d, r, v = 37, 12, 5, 97
    h, m, w2 = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((n, d), (n, r), (v, r)))
    head, teacher, labels = torch.randn(v, d, device=DEVICE), torch.randn(n, d, device=DEVICE), torch.randint(0, v, (n,), device=DEVICE)
    weight = torch.rand(n, device=DEVICE)
    loss, _, l1 = distill(h, m, w2, head, teacher, labels, weight, chunk=16)
    grads = torch.autograd.grad(loss, (h, m, w2))
    logits = h @ head.T + m @ w2.T
    tv = (logits.softmax(-1) - (teacher @ head.T).softmax(-1)).abs().sum(-1)
    expect = (weight * (0.1 * F.cross_entropy(logits, labels, reduction="none") + 0.9 * tv)).sum()
    close("loss", loss, expect, 1e-4)
    close("l1", l1, tv, 1e-5)
    for name, a, b in zip(("dh", "dm", "dW2"), grads, torch.autograd.grad(expect, (h, m, w2))):
        close(name, a, b, 1e-4)


def test_kernels() -> None:
    """Triton against PyTorch, when Triton can run here."""
    if not kernels.USE_TRITON or not (kernels.INTERPRET or DEVICE.type == "cuda"):
        print("kernels: Triton cannot run here, skipped")
        return
    half = torch.float16 if kernels.INTERPRET else torch.bfloat16  # Triton's interpreter has no bf16 dot
    for dtype, tol in ((torch.float32, 3e-3), (half, 2e-2)):
        q, k, v = (torch.randn(s, device=DEVICE, dtype=dtype) for s in ((5, 9, 64), (5, 3, 150, 64), (5, 3, 150, 64)))
        pos = torch.tensor([0, 1, 63, 64, 149], device=DEVICE)
        logits, teacher = (3 * torch.randn(6, 9001, device=DEVICE)).to(dtype), (3 * torch.randn(6, 9001, device=DEVICE)).to(dtype)
        labels, weight = torch.tensor([0, 1, 4095, 4096, 9000, 17], device=DEVICE), torch.rand(6, device=DEVICE)
        results = []
        for use in (True, False):
            kernels.USE_TRITON = use
            grad = logits.clone()
            results.append((kernels.decode_attention(q, k, v, pos), *kernels.distill_rows(grad, teacher, labels, weight, 0.1, 0.9), grad))
        kernels.USE_TRITON = True
        for name, a, b in zip(("decode attention", "ce", "l1", "gradient"), *results):
            close(f"triton {dtype} {name}", a, b, tol)


def test_small() -> None:
    x = spread(torch.tensor([3, 10]), torch.tensor([4, 50]), 8)
    assert (x[0] == 3).all() and (x[1] >= 10).all() and (x[1] < 50).all() and len(set(x[1].tolist())) == 8
    hit = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 1], [1, np.nan, np.nan]], float)
    assert follow_rounds(hit) == (5, 3)  # 3 tokens, then anchor 3: 1 token, then anchor 4: 2 tokens (cut at the end)
    cos, sin = rope_tables(8, 1e4, 4, torch.device("cpu"))
    x = torch.randn(4, 8)
    close("rope keeps the norm", rotate(x, cos, sin).norm(dim=-1), x.norm(dim=-1), 1e-5)


def main() -> None:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder:
        target = tiny_target(Path(folder))
        test_small()
        test_block(target)
        test_loss()
        test_kernels()
        test_decoder(target)
    print("selftest: ok")


if __name__ == "__main__":
    main()
