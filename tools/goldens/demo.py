"""Goldens of the demo target (SmolLM2-135M-Instruct): tokenizer, chat template, last-position logits, greedy tokens."""

import hashlib
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from common import margins, write_json
from targets import greedy, load_target

TOP = 20
NUM_GREEDY = 16
QUESTIONS = (
    "What is gravity?",
    "Write a Python function that adds two numbers.",
    "Tom has 3 boxes with 12 pencils each. He gives away 7. How many pencils are left?",
)
STRINGS = (
    "",
    " ",
    "Hello, world!",
    "  two leading spaces and a trailing one ",
    "tabs\tand\nnew\r\nlines\n\n\n",
    "naïve café, Übergröße, façade",
    "Ελληνικά, русский, עברית, العربية",
    "日本語のテキストと中文字符、한국어",
    "emoji 😀👩‍👩‍👧‍👦🇩🇪👍🏽 end",
    "e\u0301 against \u00e9, ﬁ ligature, non\u00a0breaking, zero\u200bwidth",
    "1234567890 3.14159 1,000,000 007 2²",
    "fn main() {\n    let x = vec![1, 2];\n    println!(\"{:?}\", x);\n}\n",
    "if a<=b && c!=d: return {'k': [1,2,3]}  # why?",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "don't I'LL we've they'RE",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "\u0000\u0007 control \ufffd",
)
CHATS = (
    [{"role": "user", "content": "Hi!"}],
    [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "Capital of France?"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "And of Peru?\n"},
    ],
)


@torch.no_grad()
def dump(root: Path, model_dir: Path) -> None:
    """Writes demo_target.json for the Hugging Face directory `model_dir`."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = load_target(model_dir)
    prompts = []
    for question in QUESTIONS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens, rows = greedy(model, ids, NUM_GREEDY)
        top = rows[0].topk(TOP)
        prompts.append(
            {
                "question": question,
                "text": text,
                "ids": ids,
                "top_ids": top.indices.tolist(),
                "top_logits": [round(float(x), 4) for x in top.values],
                "logsumexp": round(float(rows[0].double().logsumexp(-1)), 5),
                "greedy": tokens,
                "greedy_margins": margins(rows),
                "greedy_text": tokenizer.decode(tokens),
            }
        )
    strings = []
    for text in STRINGS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        skipped = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        strings.append({"text": text, "ids": ids, "decoded": decoded, "decoded_skip_special": skipped})
    chats = [
        {
            "messages": messages,
            "add_generation_prompt": generation,
            "text": tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation),
        }
        for messages in CHATS
        for generation in (False, True)
    ]
    config = json.loads((model_dir / "config.json").read_text())
    digest = hashlib.sha256((model_dir / "model.safetensors").read_bytes()).hexdigest()
    golden = {"model_sha256": digest, "config": config, "prompts": prompts, "strings": strings, "chats": chats}
    write_json(root / "demo_target.json", golden)
    for prompt in prompts:
        print(f"demo: {prompt['greedy_text']!r} min margin {min(prompt['greedy_margins'])}")
