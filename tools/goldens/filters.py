"""Sampling filters: random logits rows through transformers' own logits warpers, in the order `generate` applies them."""

from pathlib import Path

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common import seeded, write_json, write_tensors

VOCAB = 257
BOUNDARY = 1e-5

# temperature, top_k (0 = off), top_p (1 = off), min_p (0 = off)
CASES = (
    (1.0, 0, 1.0, 0.0),
    (0.5, 0, 1.0, 0.0),
    (1.7, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 20, 1.0, 0.0),
    (1.0, 1000, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.0, 0, 0.3, 0.0),
    (1.0, 0, 0.01, 0.0),
    (1.0, 0, 1.0, 0.05),
    (1.0, 0, 1.0, 0.5),
    (0.7, 20, 0.8, 0.0),
    (0.6, 20, 0.95, 0.1),
    (1.3, 50, 1.0, 0.02),
    (0.8, 0, 0.9, 0.1),
    (0.05, 5, 0.9, 0.0),
)


def rows(gen: torch.Generator) -> dict[str, torch.Tensor]:
    """Logits rows [257]: plain, peaked, with ties, with ties at the maximum, with -inf, one-hot, and constant."""
    plain = torch.randn(VOCAB, generator=gen) * 2
    peaked = torch.randn(VOCAB, generator=gen) * 6
    ties = (torch.randn(VOCAB, generator=gen) * 2).mul(2).round().div(2)
    top_tie = torch.randn(VOCAB, generator=gen)
    top_tie[[3, 17, 200]] = 5.0
    masked = torch.randn(VOCAB, generator=gen) * 2
    masked[torch.randperm(VOCAB, generator=gen)[:250]] = -torch.inf
    one_hot = torch.full((VOCAB,), -torch.inf)
    one_hot[256] = 1.5
    return {
        "plain": plain,
        "peaked": peaked,
        "ties": ties,
        "top_tie": top_tie,
        "masked": masked,
        "one_hot": one_hot,
        "constant": torch.zeros(VOCAB),
    }


def warpers(temperature: float, top_k: int, top_p: float, min_p: float) -> LogitsProcessorList:
    """The chain that `generate` builds: temperature, top-k, top-p, min-p; a filter that is off is left out."""
    chain = LogitsProcessorList()
    if temperature != 1.0:
        chain.append(TemperatureLogitsWarper(temperature))
    if top_k > 0:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        chain.append(TopPLogitsWarper(top_p))
    if min_p > 0.0:
        chain.append(MinPLogitsWarper(min_p))
    return chain


def fragile(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> bool:
    """True when rounding or the order of equal logits decides what top-p or min-p keeps."""
    before = warpers(temperature, top_k, 1.0, 0.0)(None, logits[None].double())[0]
    probs = before.softmax(-1).sort().values
    if top_p < 1.0:
        mass = probs.cumsum(-1)
        if (mass - (1 - top_p)).abs().min() < BOUNDARY:
            return True
        last_removed = int((mass <= 1 - top_p).sum()) - 1
        if last_removed >= 0 and probs[last_removed] == probs[last_removed + 1] > 0:
            return True
    return min_p > 0.0 and bool((probs / probs[-1] - min_p).abs().min() < BOUNDARY)


def dump(root: Path) -> None:
    """Writes filters/: every sound (row, filter) pair of the plain row, and a third of the others."""
    table = rows(seeded(401))
    names = list(table)
    cases, probs = [], []
    for row, logits in table.items():
        for temperature, top_k, top_p, min_p in CASES:
            if fragile(logits, temperature, top_k, top_p, min_p):
                continue
            warped = warpers(temperature, top_k, top_p, min_p)(None, logits[None].clone())[0]
            cases.append(
                {
                    "row": names.index(row),
                    "row_name": row,
                    "temperature": temperature,
                    "top_k": top_k,
                    "top_p": top_p,
                    "min_p": min_p,
                    "num_kept": int((warped > -torch.inf).sum()),
                }
            )
            probs.append(warped.softmax(-1))
    keep = [i for i, c in enumerate(cases) if c["row_name"] == "plain" or i % 3 == 0]
    out = root / "filters"
    write_json(out / "golden.json", {"rows": names, "cases": [cases[i] for i in keep]})
    tensors = {"logits": torch.stack(list(table.values())), "probs": torch.stack([probs[i] for i in keep])}
    write_tensors(out / "golden.safetensors", tensors)
    print(f"filters: {len(keep)} cases of {len(cases)} sound ones")
