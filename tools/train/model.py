"""The two drafters, with the parameter names of their released checkpoints.

`DSpark` (DeepSpec's Qwen3DSpark): an anchor at position a, embedded, followed by γ-1 mask tokens, makes one
block at positions a…a+γ-1. Its K and V come from the block *and* from H_ctx = hidden_norm(fc · taps) of all
positions p < a; inside the block attention goes both ways. Row k (1-based) predicts the token at a+k, and
the Markov head adds W2 · W1[x_{k-1}]. Training runs many blocks of a sequence at once, kept apart by the mask.

`MTP` (DeepSeek-V3's multi-token prediction, depth 1): slot s holds (h_s, x_{s+1}), causal, and predicts x_{s+2}.

Parameters are f32; compute runs in the dtype of the incoming activations.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from target import attention_backend, rope_tables, rotate

TAPS = [1, 8, 15, 21, 27]
MASK_TOKEN = "<empty_output>"  # in the vocabulary, never produced by the chat model


class Linear(nn.Linear):
    """nn.Linear without bias that computes in the input's dtype."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        nn.init.normal_(self.weight, std=inputs**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Qwen3 attention. `context`, when given, joins the keys and values in front of the rows' own."""

    def __init__(self, c: dict[str, Any]):
        super().__init__()
        d, self.dim = c["hidden_size"], c["head_dim"]
        self.heads, self.kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        self.q_proj = Linear(d, self.heads * self.dim)
        self.k_proj = Linear(d, self.kv_heads * self.dim)
        self.v_proj = Linear(d, self.kv_heads * self.dim)
        self.o_proj = Linear(self.heads * self.dim, d)
        self.q_norm, self.k_norm = RMSNorm(self.dim, c["rms_norm_eps"]), RMSNorm(self.dim, c["rms_norm_eps"])

    def forward(self, x, context, rope_q, rope_k, mask) -> torch.Tensor:
        batch, rows = x.shape[:2]
        source = x if context is None else torch.cat([context, x], 1)
        q = rotate(self.q_norm(self.q_proj(x).view(batch, rows, self.heads, self.dim)), *rope_q)
        k = rotate(self.k_norm(self.k_proj(source).view(batch, -1, self.kv_heads, self.dim)), *rope_k)
        v = self.v_proj(source).view(batch, -1, self.kv_heads, self.dim)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 2).transpose(1, 2) for t in (k, v))
        with attention_backend(x.device, masked=mask is not None):
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, is_causal=mask is None)
        return self.o_proj(out.transpose(1, 2).reshape(batch, rows, -1))


class MLP(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        d, inner = c["hidden_size"], c["intermediate_size"]
        self.gate_proj, self.up_proj, self.down_proj = Linear(d, inner), Linear(d, inner), Linear(inner, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])

    def forward(self, x, context, rope_q, rope_k, mask) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), context, rope_q, rope_k, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class MarkovHead(nn.Module):
    """Bias W2 · W1[x_prev] on the logits; starts at zero."""

    def __init__(self, vocab: int, rank: int):
        super().__init__()
        self.markov_w1, self.markov_w2 = nn.Embedding(vocab, rank), Linear(rank, vocab)
        nn.init.normal_(self.markov_w1.weight, std=0.2)
        nn.init.zeros_(self.markov_w2.weight)


class ConfidenceHead(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 1)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)


def _rope(model: nn.Module, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return model.cos[positions].unsqueeze(-2), model.sin[positions].unsqueeze(-2)


class DSpark(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.config, d, eps = c, c["hidden_size"], c["rms_norm_eps"]
        self.gamma, self.mask_id, self.taps = c["block_size"], c["mask_token_id"], c["target_layer_ids"]
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.fc, self.hidden_norm, self.norm = Linear(len(self.taps) * d, d), RMSNorm(d, eps), RMSNorm(d, eps)
        self.markov_head = MarkovHead(c["vocab_size"], c["markov_rank"])
        self.confidence_head = ConfidenceHead(d + c["markov_rank"])
        cos, sin = rope_tables(c["head_dim"], c["rope_theta"], c["max_position_embeddings"], torch.device("cpu"))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, taps: torch.Tensor, ids: torch.Tensor, anchors: torch.Tensor, embed: torch.Tensor) -> torch.Tensor:
        """taps [B, L, m·d], ids [B, L], anchors [B, A] -> normed block states h [B, A, γ, d]."""
        (batch, length), count = ids.shape, anchors.shape[1]
        rows = count * self.gamma
        context = self.hidden_norm(self.fc(taps))
        tokens = torch.full((batch, count, self.gamma), self.mask_id, device=ids.device, dtype=ids.dtype)
        tokens[:, :, 0] = ids.gather(1, anchors)
        x = embed[tokens.view(batch, rows)]
        positions = (anchors[..., None] + torch.arange(self.gamma, device=ids.device)).view(batch, rows)
        before = torch.arange(length, device=ids.device).expand(batch, -1)
        rope_q, rope_k = _rope(self, positions), _rope(self, torch.cat([before, positions], 1))
        mask = self._mask(anchors, length, x.dtype)
        for layer in self.layers:
            x = layer(x, context, rope_q, rope_k, mask)
        return self.norm(x).view(batch, count, self.gamma, -1)

    def _mask(self, anchors: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
        """Additive [B, 1, A·γ, L + A·γ]: context before the anchor, and the row's own block."""
        batch, count = anchors.shape
        block = torch.arange(count, device=anchors.device).repeat_interleave(self.gamma)
        own = (block[:, None] == block).expand(batch, -1, -1)
        seen = torch.arange(length, device=anchors.device) < anchors.repeat_interleave(self.gamma, 1)[..., None]
        allowed = torch.cat([seen, own], -1)[:, None]
        return torch.zeros(allowed.shape, device=anchors.device, dtype=dtype).masked_fill_(~allowed, -torch.inf)

    def previous(self, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """W1[x_{k-1}] in the compute dtype."""
        return self.markov_head.markov_w1(tokens).to(dtype)

    def confidence(self, h: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        """Confidence logits z = w · [h ; m] + b, f32."""
        p = self.confidence_head.proj
        return F.linear(torch.cat([h, m], -1), p.weight.to(h.dtype), p.bias.to(h.dtype)).squeeze(-1).float()


class MTP(nn.Module):
    def __init__(self, c: dict[str, Any]):
        super().__init__()
        self.config, d, eps = c, c["hidden_size"], c["rms_norm_eps"]
        self.mtp = nn.Module()
        self.mtp.fc = Linear(2 * d, d)
        self.mtp.pre_fc_norm_hidden, self.mtp.pre_fc_norm_embedding = RMSNorm(d, eps), RMSNorm(d, eps)
        self.mtp.layers, self.mtp.norm = nn.ModuleList([Layer(c)]), RMSNorm(d, eps)
        cos, sin = rope_tables(c["head_dim"], c["rope_theta"], c["max_position_embeddings"], torch.device("cpu"))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, embed: torch.Tensor) -> torch.Tensor:
        """hidden [B, L, d] (final-normed), ids [B, L] -> normed states [B, L-1, d]; row s predicts x_{s+2}."""
        m, e = self.mtp, embed[ids[:, 1:]]
        x = m.fc(torch.cat([m.pre_fc_norm_hidden(hidden[:, :-1]), m.pre_fc_norm_embedding(e)], -1))
        rope = _rope(self, torch.arange(x.shape[1], device=ids.device)[None])
        return m.norm(m.layers[0](x, None, rope, rope, None))


def _base_config(target: dict[str, Any]) -> dict[str, Any]:
    keys = ("hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim vocab_size rms_norm_eps "
            "rope_theta max_position_embeddings hidden_act attention_bias attention_dropout bos_token_id eos_token_id "
            "pad_token_id initializer_range").split()
    return {"model_type": "qwen3", "torch_dtype": "bfloat16", "tie_word_embeddings": False, "rope_scaling": None,
            "sliding_window": None, "use_sliding_window": False, **{k: target[k] for k in keys if k in target},
            "num_target_layers": target["num_hidden_layers"]}


def dspark_config(target: dict[str, Any], mask_token_id: int, taps: list[int] = TAPS, layers: int = 3, gamma: int = 7,
                  rank: int = 64, num_anchors: int = 64) -> dict[str, Any]:
    return _base_config(target) | {
        "architectures": ["Qwen3DSparkModel"], "num_hidden_layers": layers, "block_size": gamma, "target_layer_ids": taps,
        "mask_token_id": mask_token_id, "num_anchors": num_anchors, "markov_rank": rank, "markov_head_type": "vanilla",
        "enable_confidence_head": True, "confidence_head_with_markov": True, "layer_types": ["full_attention"] * layers}


def mtp_config(target: dict[str, Any]) -> dict[str, Any]:
    return _base_config(target) | {"architectures": ["Qwen3MTPModel"], "num_hidden_layers": 1,
                                   "num_nextn_predict_layers": 1, "layer_types": ["full_attention"]}


def build(config: dict[str, Any]) -> DSpark | MTP:
    return {"Qwen3DSparkModel": DSpark, "Qwen3MTPModel": MTP}[config["architectures"][0]](config)


def save(model: DSpark | MTP, path: Path) -> None:
    """config.json and a bf16 model.safetensors; the embedding and head stay with the target."""
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(model.config, indent=2) + "\n")
    tensors = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, str(path / "model.safetensors"), metadata={"format": "pt"})


def load(path: Path, device: torch.device, dtype: torch.dtype) -> DSpark | MTP:
    from safetensors.torch import load_file

    model = build(json.loads((path / "config.json").read_text()))
    model.load_state_dict(load_file(path / "model.safetensors"))
    cos, sin = model.cos, model.sin
    model = model.to(device, dtype)
    model.cos, model.sin = cos.to(device), sin.to(device)  # RoPE tables stay f32
    return model.eval().requires_grad_(False)
