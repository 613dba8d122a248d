"""A tiny MTP-1 drafter (DeepSeek-V3 style, tensor names as Qwen3-Next's `mtp.*`) and an independent PyTorch run of it.

Slot s takes the target's final-normed hidden state of position s and the token at position s + 1, and predicts the
token at position s + 2. RoPE position s; causal over the slots.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RMSNorm, Qwen3RotaryEmbedding

from common import margins, randomize, round_weights, seeded, write_json, write_tensors
from targets import load_target

SEED = 301
TARGET = "qwen3_bf16"
CONFIG = {
    "architectures": ["Qwen3MTPModel"],
    "model_type": "qwen3",
    "vocab_size": 331,
    "hidden_size": 96,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "attention_bias": False,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
GAINS = {"q_norm": 1.6, "k_norm": 1.6, "mtp.fc": 2.0}


class Mtp(nn.Module):
    """One MTP module over a target's hidden states and embeddings; the target's lm_head makes the logits."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        config._attn_implementation = "eager"
        width, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(2 * width, width, bias=False)
        self.pre_fc_norm_hidden = Qwen3RMSNorm(width, eps)
        self.pre_fc_norm_embedding = Qwen3RMSNorm(width, eps)
        self.layers = nn.ModuleList([Qwen3DecoderLayer(config, 0)])
        self.norm = Qwen3RMSNorm(width, eps)
        self.rotary = Qwen3RotaryEmbedding(config)

    def forward(self, hidden: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """[n, d] final-normed target states and [n, d] embeddings of the next tokens to [n, d] normed states."""
        n = hidden.shape[0]
        x = self.fc(torch.cat([self.pre_fc_norm_hidden(hidden), self.pre_fc_norm_embedding(embeddings)], -1))[None]
        rope = self.rotary(x, torch.arange(n)[None])
        mask = torch.full((n, n), -torch.inf).triu(1)[None, None]
        return self.norm(self.layers[0](x, attention_mask=mask, position_embeddings=rope))[0]


@torch.no_grad()
def dump(root: Path) -> None:
    """Writes drafters/qwen3_mtp: the checkpoint and, for the target's golden prompts, the MTP states and logits."""
    target = load_target(root / "targets" / TARGET)
    prompts = json.loads((root / "targets" / TARGET / "golden.json").read_text())["prompts"]
    out = root / "drafters" / "qwen3_mtp"
    model = nn.ModuleDict({"mtp": Mtp(Qwen3Config(**CONFIG))})
    randomize(model, seeded(SEED), GAINS)
    round_weights(model, torch.bfloat16)
    write_json(out / "config.json", CONFIG)
    write_tensors(out / "model.safetensors", {k: v.bfloat16() for k, v in model.state_dict().items()})
    model.load_state_dict({k: v.float() for k, v in load_file(out / "model.safetensors").items()})

    cases, tensors = [], {}
    for index, prompt in enumerate(prompts):
        ids = prompt["ids"]
        hidden = target.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        shifted = [*ids[1:], prompt["greedy"][0]]
        states = model["mtp"](hidden, target.model.embed_tokens(torch.tensor(shifted)))
        logits = target.lm_head(states)[-8:]
        first = max(0, len(ids) - 8)
        cases.append(
            {
                "name": f"case{index}",
                "prompt_ids": ids,
                "next_ids": shifted,
                "logits_first_slot": first,
                "argmax": logits.argmax(-1).tolist(),
                "margins": margins(logits),
            }
        )
        tensors |= {f"case{index}.logits": logits, f"case{index}.hidden": states}
    write_json(out / "golden.json", {"target": TARGET, "cases": cases})
    write_tensors(out / "golden.safetensors", tensors)
    worst = min(min(c["margins"]) for c in cases)
    print(f"qwen3_mtp: smallest margin {worst:.4f}")
