#!/usr/bin/env python3
"""Accepted length τ of trained drafters on given prompts (`{"turns": ["…"]}` a line, first turn only).

The target answers every prompt at T = 0 and at T = 1; drafters are then scored at every position of those
texts, teacher-forced, which is exact for both temperatures:
  T = 0: draft k counts when the drafter's argmax equals the text at 1…k (the prefix it drafts from is then the
         text itself). τ = tokens committed / rounds, following the rounds along the text.
  T = 1: the text is a draw from p, and a draw from p survives as a draft with probability min(1, q/p): so
         E[accepted at 1…k] = mean of Π_{j≤k} min(1, q_j(x_j)/p_j(x_j)), and τ = 1 + their sum, over all anchors.
         `tau_tf` is the smoother, commonly quoted 1 + Σ_k Π_{j≤k} (1 − ½‖q_j − p_j‖₁) on the same text.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import model as drafters
import prompts
from data import BUCKET
from generate import Decoder, Prompt, special_ids
from target import Target


@torch.no_grad()
def score_rows(h, m, w2, head, teacher, labels, chunk: int = 2048) -> torch.Tensor:
    """[N, 3] f32: argmax q == label, min(1, q(x)/p(x)), 1 − ½‖q − p‖₁."""
    out = []
    for i in range(0, len(h), chunk):
        s = slice(i, i + chunk)
        logits = F.linear(h[s], head).float()
        if m is not None:
            logits += F.linear(m[s], w2).float()
        log_q, log_p = logits.log_softmax(-1), F.linear(teacher[s], head).float().log_softmax(-1)
        x = labels[s, None]
        ratio = (log_q.gather(1, x) - log_p.gather(1, x)).clamp(max=0).exp()[:, 0]
        overlap = 1 - 0.5 * (log_q.exp() - log_p.exp()).abs().sum(-1)
        out.append(torch.stack([(logits.argmax(-1) == labels[s]).float(), ratio, overlap], 1))
    return torch.cat(out)


@torch.no_grad()
def score_sequence(drafter, target: Target, tokens: np.ndarray, answer: int, count: int = 64) -> np.ndarray:
    """[anchors, γ, 3] for every anchor of the answer; positions past the text's end are NaN."""
    n = len(tokens)
    ids = torch.from_numpy(np.pad(tokens.astype(np.int64), (0, -n % BUCKET))).to(target.device)[None]
    if isinstance(drafter, drafters.MTP):
        _, hidden = target.forward(ids, [])
        h = drafter(hidden, ids, target.embed)
        slot = torch.arange(answer - 1, n - 2, device=ids.device)
        return score_rows(h[0, slot], None, None, target.head, hidden[0, slot + 1], ids[0, slot + 2]).cpu().numpy()[:, None]
    taps, hidden = target.forward(ids, drafter.taps)
    scores = []
    for first in range(answer, n - 1, count):
        anchors = torch.arange(first, min(first + count, n - 1), device=ids.device)
        padded = F.pad(anchors, (0, count - len(anchors)), value=answer)  # one shape for every call
        h = drafter(taps, ids, padded[None], target.embed)[0, : len(anchors)]
        at = anchors[:, None] + torch.arange(1, drafter.gamma + 1, device=ids.device)
        inside, at = at < n, at.clamp_max(n - 1)
        m = drafter.previous(ids[0, at - 1].flatten(), h.dtype)
        s = score_rows(h.flatten(0, 1), m, drafter.markov_head.markov_w2.weight, target.head, hidden[0, at - 1].flatten(0, 1), ids[0, at].flatten())
        scores.append(s.view(len(anchors), drafter.gamma, 3).masked_fill(~inside[..., None], torch.nan).cpu().numpy())
    return np.concatenate(scores)


def follow_rounds(hit: np.ndarray) -> tuple[int, int]:
    """(tokens, rounds) of greedy speculation along a text; hit [anchors, γ], NaN past the end."""
    run = np.nan_to_num(hit).cumprod(1).sum(1).astype(int)
    at = rounds = 0
    while at < len(run):
        at, rounds = at + 1 + run[at], rounds + 1
    return min(at, len(run)), rounds


def conditional(survive: np.ndarray) -> list[float]:
    """Acceptance at k given 1…k-1, from joint survivals [anchors, γ]."""
    joint = np.concatenate([[1.0], survive.mean(0)])
    return [round(float(b / max(a, 1e-9)), 4) for a, b in zip(joint, joint[1:])]


def summarise(greedy: list[np.ndarray], sampled: list[np.ndarray]) -> dict[str, object]:
    rounds = np.array([follow_rounds(s[..., 0]) for s in greedy]).sum(0)
    whole = lambda scores, i: np.concatenate([s[~np.isnan(s[..., 0]).any(1), :, i] for s in scores])
    exact = whole(sampled, 1).cumprod(1)
    smooth = whole(sampled, 2).cumprod(1)
    return {"T=0": {"tau": round(float(rounds[0] / max(1, rounds[1])), 3), "rounds": int(rounds[1]), "conditional": conditional(whole(greedy, 0).cumprod(1))},
            "T=1": {"tau": round(float(1 + exact.mean(0).sum()), 3), "tau_tf": round(float(1 + smooth.mean(0).sum()), 3), "anchors": len(exact),
                    "conditional": conditional(exact)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--drafter", type=Path, action="append", required=True, help="drafter folder; repeat for several")
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="JSONL files")
    parser.add_argument("--limit", type=int, default=80, help="prompts per file")
    parser.add_argument("--max-new", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, rewritten after every result")
    parser.add_argument("--seconds", type=float, default=60, help="start no further prompt set after this long")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    from tokenizers import Tokenizer

    torch.manual_seed(args.seed)
    began, cuda = time.monotonic(), torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    target = Target(args.target, device, dtype)
    tokenizer = Tokenizer.from_file(str(Path(args.target) / "tokenizer.json"))
    models = {d.name: drafters.load(d, device, dtype) for d in args.drafter if (d / "model.safetensors").is_file()}
    stream, owner = [], []
    for path in args.prompts:
        for line in path.read_text().splitlines()[: args.limit]:
            text = prompts.PREFIX + json.loads(line)["turns"][0] + prompts.SUFFIX
            ids = tokenizer.encode(text, add_special_tokens=False).ids[:700]
            stream += [Prompt(ids, 0.0), Prompt(ids, 1.0)]
            owner += [path.stem] * 2
    longest = max(len(p.ids) for p in stream)
    decoder = Decoder(target, min(len(stream), 1024), longest + args.max_new + 1, special_ids(tokenizer), answer_cap=args.max_new)
    answers = decoder.run(stream, stop_loops=False)
    print(f"evaluate: {len(answers)} answers in {time.monotonic() - began:.1f} s", flush=True)
    del decoder
    results: dict[str, dict[str, object]] = {name: {} for name in models}
    for path in args.prompts:
        for name, drafter in models.items():
            if time.monotonic() - began > args.seconds:
                print(f"evaluate: out of time before {name} on {path.stem}")
                continue
            mine = [s for s in answers if owner[s.tag] == path.stem and len(s.tokens) - s.answer >= 10]
            scores = [(s.greedy, score_sequence(drafter, target, s.tokens, s.answer)) for s in mine]
            results[name][path.stem] = summarise([x for g, x in scores if g], [x for g, x in scores if not g])
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"limit": args.limit, "max_new": args.max_new, "results": results}, indent=1) + "\n")
            r = results[name][path.stem]
            print(f"evaluate {name} {path.stem}: T=0 tau {r['T=0']['tau']}  T=1 tau {r['T=1']['tau']} (tf {r['T=1']['tau_tf']})  "
                  f"conditional T=1 {r['T=1']['conditional']}", flush=True)


if __name__ == "__main__":
    main()
