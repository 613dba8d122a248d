"""The frozen target: a small Llama in plain PyTorch.

Two ways to run it. `forward` takes whole right-padded sequences (causal, so the padding never reaches
a real token) and returns what drafters train on: the residual stream after the tapped layers and the
final-normed hidden state. Decoding one token per slot lives in `generate.py`, on the same weights.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def rope_tables(head_dim: int, theta: float, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and *signed* sin, f32 [length, head_dim]: rotated x = x·cos + swap_halves(x)·sin."""
    inv = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim)
    angle = torch.arange(length, device=device, dtype=torch.float64)[:, None] * inv
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1).float(), torch.cat([-sin, sin], -1).float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on the last axis, halves convention; cos and sin broadcast against x."""
    half = x.shape[-1] // 2
    swapped = torch.cat([x[..., half:], x[..., :half]], -1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)


def attention_backend(device: torch.device, masked: bool):
    """Keeps SDPA on CUDA to the kernels this code was made for; elsewhere PyTorch chooses."""
    allowed = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if not masked:
        allowed.insert(0, SDPBackend.FLASH_ATTENTION)
    return sdpa_kernel(allowed) if device.type == "cuda" else nullcontext()


class Target:
    """Weights and full-sequence forward of a Llama checkpoint directory."""

    def __init__(self, path: str | Path, device: torch.device, dtype: torch.dtype):
        from safetensors.torch import load_file

        path = Path(path)
        self.config = c = json.loads((path / "config.json").read_text())
        self.device, self.dtype = device, dtype
        self.hidden, self.heads, self.kv_heads = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
        self.head_dim, self.eps, self.vocab = c["head_dim"], c["rms_norm_eps"], c["vocab_size"]
        raw = {}
        for file in sorted(path.glob("*.safetensors")):
            raw |= load_file(file)
        w = {k.removeprefix("model."): v.to(device, dtype) for k, v in raw.items()}
        self.embed, self.norm = w["embed_tokens.weight"], w["norm.weight"]
        self.head = self.embed if c["tie_word_embeddings"] else w["lm_head.weight"]
        self.layers = []
        for i in range(c["num_hidden_layers"]):
            a, m = f"layers.{i}.self_attn.", f"layers.{i}.mlp."
            self.layers.append({
                "norm1": w[f"layers.{i}.input_layernorm.weight"],
                "qkv": torch.cat([w[a + f"{n}_proj.weight"] for n in "qkv"]),
                "o": w[a + "o_proj.weight"],
                "norm2": w[f"layers.{i}.post_attention_layernorm.weight"],
                "gate_up": torch.cat([w[m + "gate_proj.weight"], w[m + "up_proj.weight"]]),
                "down": w[m + "down_proj.weight"],
            })
        cos, sin = rope_tables(self.head_dim, c["rope_theta"], c["max_position_embeddings"], device)
        self.cos, self.sin = cos.to(dtype), sin.to(dtype)

    def rms(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (self.hidden,), weight, self.eps)

    def mlp(self, x: torch.Tensor, layer: dict[str, torch.Tensor]) -> torch.Tensor:
        gate, up = F.linear(self.rms(x, layer["norm2"]), layer["gate_up"]).chunk(2, -1)
        return F.linear(F.silu(gate) * up, layer["down"])

    @torch.no_grad()
    def forward(self, ids: torch.Tensor, taps: list[int]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """ids [B, L] -> (taps [B, L, m·d] or None, final-normed hidden [B, L, d])."""
        batch, length = ids.shape
        cos, sin = self.cos[:length, None], self.sin[:length, None]
        group = self.heads // self.kv_heads
        x, tapped = self.embed[ids], []
        if -1 in taps:
            tapped.append(x)
        for i, layer in enumerate(self.layers):
            qkv = F.linear(self.rms(x, layer["norm1"]), layer["qkv"])
            qkv = qkv.view(batch, length, self.heads + 2 * self.kv_heads, self.head_dim)
            qk = rotate(qkv[:, :, : self.heads + self.kv_heads], cos, sin)
            q = qk[:, :, : self.heads].transpose(1, 2)
            k = qk[:, :, self.heads :].repeat_interleave(group, 2).transpose(1, 2)
            v = qkv[:, :, self.heads + self.kv_heads :].repeat_interleave(group, 2).transpose(1, 2)
            with attention_backend(self.device, masked=False):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + F.linear(out.transpose(1, 2).reshape(batch, length, -1), layer["o"])
            x = x + self.mlp(x, layer)
            if i in taps:
                tapped.append(x)
        return (torch.cat(tapped, -1) if tapped else None), self.rms(x, self.norm)
