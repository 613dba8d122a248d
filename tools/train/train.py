#!/usr/bin/env python3
"""Train one drafter (`dspark` or `mtp`) against the frozen target, for a fixed time.

Each step runs the target over a batch of corpus sequences, draws rows to learn from and distils:
DSpark takes random anchors in the answers (γ rows each, row k weighted exp(-(k-1)/4)); MTP takes random
slots. Loss per row: 0.1·CE + 0.9·‖q − p‖₁ (+ BCE of the confidence head against 1 − ½‖q − p‖₁), teacher-forced.
The learning rate follows the elapsed fraction of the time box: linear warm-up over 4 %, then a cosine to 0.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import model as drafters
from data import Batch, Corpus, spread
from loss import distill
from target import Target


def dspark_loss(drafter: drafters.DSpark, target: Target, batch: Batch, density: int, decay: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, statistics [γ + 2]): acceptance 1 − ½l1 for each position, then cross entropy and confidence error."""
    ids, gamma = batch.ids, drafter.gamma
    taps, hidden = target.forward(ids, drafter.taps)
    anchors = spread(batch.answer, batch.length - 1, ids.shape[1] // density)  # a and a+1 lie in the answer
    h = drafter(taps, ids, anchors, target.embed)
    label_at = anchors[..., None] + torch.arange(1, gamma + 1, device=ids.device)  # [B, A, γ]
    valid = label_at < batch.length[:, None, None]
    label_at = label_at.clamp_max(ids.shape[1] - 1)
    row = torch.arange(len(ids), device=ids.device)[:, None, None]
    labels, previous, teacher = ids[row, label_at], ids[row, label_at - 1], hidden[row, label_at - 1]
    weight = valid * torch.exp(-torch.arange(gamma, device=ids.device) / decay)
    weight = (weight / weight.sum()).flatten()
    h, m = h.flatten(0, 2), drafter.previous(previous.flatten(), h.dtype)
    loss, ce, l1 = distill(h, m, drafter.markov_head.markov_w2.weight, target.head, teacher.flatten(0, 2), labels.flatten(), weight)
    accept = (1 - 0.5 * l1).clamp(0, 1)
    z = drafter.confidence(h, m)
    loss = loss + (weight * F.binary_cross_entropy_with_logits(z, accept, reduction="none")).sum()
    with torch.no_grad():
        per_position = (accept.view(-1, gamma) * valid.view(-1, gamma)).sum(0) / valid.view(-1, gamma).sum(0).clamp_min(1)
        stats = torch.cat([per_position, torch.stack([(weight * ce).sum(), (weight * (z.sigmoid() - accept).abs()).sum()])])
    return loss, stats


def mtp_loss(drafter: drafters.MTP, target: Target, batch: Batch, density: int, decay: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As above with one position; slot s predicts x_{s+2}, so slots run from answer-1 to length-3."""
    ids = batch.ids
    _, hidden = target.forward(ids, [])
    h = drafter(hidden, ids, target.embed)
    slot = spread(batch.answer - 1, batch.length - 2, ids.shape[1] // density)
    row = torch.arange(len(ids), device=ids.device)[:, None]
    weight = torch.full((slot.numel(),), 1 / slot.numel(), device=ids.device)
    loss, ce, l1 = distill(h[row, slot].flatten(0, 1), None, None, target.head, hidden[row, slot + 1].flatten(0, 1),
                           ids[row, slot + 2].flatten(), weight)
    return loss, torch.stack([1 - 0.5 * l1.mean(), ce.mean(), torch.zeros_like(loss.detach())])


def learning_rate(fraction: float, peak: float) -> float:
    return peak * (fraction / 0.04 if fraction < 0.04 else 0.5 * (1 + math.cos(math.pi * min(1.0, (fraction - 0.04) / 0.96))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kind", choices=["dspark", "mtp"])
    parser.add_argument("--target", required=True)
    parser.add_argument("--corpus", type=Path, required=True, help="corpus.npz of generate.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the drafter; gets config.json, model.safetensors, train.json")
    parser.add_argument("--seconds", type=float, default=200, help="time box of the optimisation loop")
    parser.add_argument("--tokens", type=int, default=16384, help="target tokens per step")
    parser.add_argument("--density", type=int, help="one anchor (DSpark: 8) or slot (MTP: 2) per this many tokens of length")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--decay", type=float, default=4.0, help="position weight exp(-(k-1)/decay)")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--gamma", type=int, default=7)
    parser.add_argument("--max-len", type=int, default=640)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    from tokenizers import Tokenizer

    torch.manual_seed(args.seed)
    cuda = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    target = Target(args.target, device, dtype)
    tokenizer = Tokenizer.from_file(str(Path(args.target) / "tokenizer.json"))
    density = args.density or {"dspark": 8, "mtp": 2}[args.kind]
    if args.kind == "dspark":
        mask_id = tokenizer.token_to_id(drafters.MASK_TOKEN)
        config = drafters.dspark_config(target.config, mask_id, layers=args.layers, gamma=args.gamma, rank=args.rank, num_anchors=512 // density)
        step_loss = dspark_loss
    else:
        config, step_loss = drafters.mtp_config(target.config), mtp_loss
    drafter = drafters.build(config).to(device)
    final = drafter.norm if args.kind == "dspark" else drafter.mtp.norm
    with torch.no_grad():  # the target's head expects rows scaled like the target's own; half of that is not yet overconfident
        final.weight.copy_(0.5 * target.norm)
    corpus = Corpus(args.corpus, device, target.config["eos_token_id"], args.max_len)
    print(f"{args.kind}: {sum(p.numel() for p in drafter.parameters()) / 1e6:.1f} M parameters, corpus {len(corpus.ids)} sequences, "
          f"{corpus.tokens / 1e6:.2f} M tokens", flush=True)
    matrices = [p for n, p in drafter.named_parameters() if p.ndim == 2 and "markov_w1" not in n]
    others = [p for n, p in drafter.named_parameters() if p.ndim != 2 or "markov_w1" in n]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.95), eps=1e-10, fused=cuda)
    rng = np.random.default_rng(args.seed)
    began, step, epoch, tokens, curve, sums, count = time.monotonic(), 0, 0, 0, [], None, 0
    fraction, last_print = 0.0, 0.0
    try:
        while fraction < 1:
            for batch in corpus.batches(args.tokens, rng):
                fraction = (time.monotonic() - began) / args.seconds
                if fraction >= 1:
                    break
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(fraction, args.lr)
                loss, stats = step_loss(drafter, target, batch, density, args.decay)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
                optimizer.step()
                stats = torch.cat([loss.detach()[None], stats])
                sums, count = (stats if sums is None else sums + stats), count + 1
                step, tokens = step + 1, tokens + batch.ids.numel()
                if fraction - last_print >= 0.04 or step in (1, 8):
                    mean = [round(x, 4) for x in (sums / count).tolist()]  # waits for the device
                    took = time.monotonic() - began
                    curve.append({"step": step, "seconds": round(took, 1), "loss": mean[0], "acceptance": mean[1:-2], "ce": mean[-2], "confidence_error": mean[-1]})
                    print(f"{args.kind} {took:6.1f} s  step {step}  epoch {epoch}  {tokens / took / 1e3:.0f}k tok/s  loss {mean[0]:.4f}  "
                          f"accept {' '.join(f'{x:.3f}' for x in mean[1:-2])}  ce {mean[-2]:.3f}", flush=True)
                    sums, count, last_print = None, 0, fraction
            epoch += 1
    finally:  # whatever happens, what was learnt is kept
        if step:
            drafters.save(drafter, args.out)
    took = time.monotonic() - began
    record = {"kind": args.kind, "steps": step, "epochs": epoch, "seconds": round(took, 1), "tokens_seen": tokens, "tokens_per_second": round(tokens / took),
              "corpus_sequences": len(corpus.ids), "corpus_tokens": corpus.tokens, "curve": curve, "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
              "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
              "device": torch.cuda.get_device_name() if cuda else "cpu", "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if cuda else 0}
    (args.out / "train.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
