"""Tiny random Hugging Face targets and their goldens, computed by transformers in f32 with eager attention."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from common import margins, randomize, round_weights, seeded, write_json, write_tensors

PROMPT_LENS = (1, 7, 33)
NUM_GREEDY = 24
NUM_CHECKED = 44  # the drafters' generations run past the golden continuation: no near-tie there either
LOGIT_ROWS = 8
MIN_MARGIN = 0.015
GAINS = {"embed_tokens": 1.0, "lm_head": 2.5, "q_norm": 1.6, "k_norm": 1.6, "q_proj": 1.5, "k_proj": 1.5}


@dataclass(frozen=True)
class TargetSpec:
    """One tiny target: its config.json, the dtype on disk, how many shards, and the residual-stream taps to dump."""

    name: str
    seed: int
    config: dict
    dtype: torch.dtype
    tap_ids: tuple[int, ...]
    num_shards: int = 1


def base_config(arch: str, **fields: object) -> dict:
    """The config.json fields that do not differ between the tiny targets. No eos: generation never stops early."""
    common = {
        "architectures": [arch],
        "model_type": "qwen3" if arch.startswith("Qwen3") else "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 2048,
        "use_cache": True,
    }
    return common | fields


TARGETS = (
    TargetSpec(
        "qwen3_bf16",
        101,
        base_config(
            "Qwen3ForCausalLM",
            vocab_size=331,
            hidden_size=96,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            rms_norm_eps=1e-6,
            rope_theta=1000000,
            rope_scaling=None,
            sliding_window=None,
            use_sliding_window=False,
            max_window_layers=4,
            tie_word_embeddings=False,
            torch_dtype="bfloat16",
        ),
        torch.bfloat16,
        (-1, 0, 1, 2),
    ),
    TargetSpec(
        "qwen3_f32",
        102,
        base_config(
            "Qwen3ForCausalLM",
            vocab_size=257,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=128,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
            layer_types=["full_attention"] * 3,
            sliding_window=None,
            use_sliding_window=False,
            max_window_layers=3,
            tie_word_embeddings=True,
            dtype="float32",
        ),
        torch.float32,
        (-1, 0, 1),
        num_shards=2,
    ),
    TargetSpec(
        "llama_bf16",
        103,
        base_config(
            "LlamaForCausalLM",
            vocab_size=131,
            hidden_size=192,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            rms_norm_eps=1e-5,
            rope_theta=100000,
            rope_scaling=None,
            mlp_bias=False,
            tie_word_embeddings=True,
            torch_dtype="bfloat16",
        ),
        torch.bfloat16,
        (-1, 0),
    ),
    TargetSpec(
        "llama_f32",
        104,
        base_config(
            "LlamaForCausalLM",
            vocab_size=101,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
            mlp_bias=False,
            tie_word_embeddings=False,
            dtype="float32",
        ),
        torch.float32,
        (-1,),
    ),
    TargetSpec(
        "llama3_rope_bf16",
        105,
        base_config(
            "LlamaForCausalLM",
            vocab_size=101,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,
            rms_norm_eps=1e-5,
            rope_theta=500.0,
            rope_scaling={
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 64,
                "rope_type": "llama3",
            },
            mlp_bias=False,
            tie_word_embeddings=False,
            torch_dtype="bfloat16",
        ),
        torch.bfloat16,
        (-1, 0),
    ),
)


def build_target(spec: TargetSpec) -> torch.nn.Module:
    """The random model of `spec`, in f32, with weights rounded through the storage dtype."""
    qwen = spec.config["model_type"] == "qwen3"
    config = (Qwen3Config if qwen else LlamaConfig)(**spec.config)
    model = (Qwen3ForCausalLM if qwen else LlamaForCausalLM)(config)
    # Tied: one matrix is both, so it needs the scale that spreads the logits.
    gains = GAINS | ({"embed_tokens": 2.5} if config.tie_word_embeddings else {})
    randomize(model, seeded(spec.seed), gains)
    if not config.tie_word_embeddings:
        with torch.no_grad():  # embeddings of unit RMS
            model.model.embed_tokens.weight.mul_(config.hidden_size**0.5)
    round_weights(model, spec.dtype)
    return model


def save_target(spec: TargetSpec, model: torch.nn.Module, out: Path) -> None:
    """Writes the released layout: config.json, then one safetensors file or shards with an index."""
    write_json(out / "config.json", spec.config)
    tensors = {k: v.to(spec.dtype) for k, v in model.state_dict().items()}
    if spec.config["tie_word_embeddings"]:
        tensors.pop("lm_head.weight", None)
    if spec.num_shards == 1:
        write_tensors(out / "model.safetensors", tensors)
        return
    names = list(tensors)
    per_shard = -(-len(names) // spec.num_shards)
    weight_map = {}
    for shard in range(spec.num_shards):
        file = f"model-{shard + 1:05d}-of-{spec.num_shards:05d}.safetensors"
        part = names[shard * per_shard : (shard + 1) * per_shard]
        write_tensors(out / file, {n: tensors[n] for n in part})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(out / "model.safetensors.index.json", index)


def load_target(path: Path) -> torch.nn.Module:
    """A target as transformers loads it from disk, upcast to f32."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def greedy(model: torch.nn.Module, ids: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """Greedy continuation without a KV cache (the whole sequence again each step) and the logits rows behind it."""
    sequence, rows = list(ids), []
    for _ in range(count):
        rows.append(model(torch.tensor([sequence]), use_cache=False).logits[0, -1])
        sequence.append(int(rows[-1].argmax()))
    return sequence[len(ids) :], torch.stack(rows)


def pick_prompt(model: torch.nn.Module, length: int, seed: int) -> tuple[list[int], list[int], torch.Tensor]:
    """The first seeded prompt whose greedy continuation has no near-tie and visits several tokens."""
    vocab = model.config.vocab_size
    for attempt in range(400):
        ids = torch.randint(0, vocab, (length,), generator=seeded(seed * 1000 + attempt)).tolist()
        for count in (4, NUM_CHECKED):  # most prompts fail early
            tokens, rows = greedy(model, ids, count)
            if min(margins(rows)) < MIN_MARGIN:
                break
        else:
            if len(set(tokens[:NUM_GREEDY])) >= 6:
                return ids, tokens[:NUM_GREEDY], rows[:NUM_GREEDY]
    raise RuntimeError(f"no prompt of length {length} with margin {MIN_MARGIN}")


@torch.no_grad()
def dump_target(spec: TargetSpec, root: Path) -> None:
    """Writes the checkpoint directory of `spec` with golden.json and golden.safetensors."""
    out = root / spec.name
    save_target(spec, build_target(spec), out)
    model = load_target(out)
    tensors, prompts = {}, []
    for index, length in enumerate(PROMPT_LENS):
        ids, tokens, rows = pick_prompt(model, length, spec.seed + index)
        result = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        first = max(0, length - LOGIT_ROWS)
        key = f"prompt{index}"
        tensors[f"{key}.logits"] = result.logits[0, first:]
        tensors[f"{key}.taps"] = torch.stack([result.hidden_states[i + 1][0] for i in spec.tap_ids])
        tensors[f"{key}.final_hidden"] = result.hidden_states[-1][0]
        prompts.append(
            {
                "name": key,
                "ids": ids,
                "logits_first_position": first,
                "greedy": tokens,
                "greedy_logits": [round(float(x), 4) for x in rows.max(-1).values],
                "greedy_margins": margins(rows),
            }
        )
    rope = dict(model.config.rope_parameters)
    head_dim = model.model.layers[0].self_attn.head_dim
    resolved = {"rope_parameters": rope, "head_dim": head_dim}
    tensors["inv_freq"] = model.model.rotary_emb.inv_freq.float()
    write_json(out / "golden.json", {"tap_ids": list(spec.tap_ids), "resolved": resolved, "prompts": prompts})
    write_tensors(out / "golden.safetensors", tensors)
    distinct = [len(set(p["greedy"])) for p in prompts]
    worst = min(min(p["greedy_margins"]) for p in prompts)
    print(f"{spec.name}: rope {rope} head_dim {head_dim} distinct {distinct} min margin {worst:.3f}")


def dump(root: Path) -> None:
    for spec in TARGETS:
        dump_target(spec, root / "targets")
