"""The corpus on the training device, and batches of nearly equal length.

Sequences are grouped by length rounded up to 64, so a batch of `tokens` tokens is [B, L] with B = tokens // L and
little padding; the set of shapes is small. Everything stays on the device: there is no loader to wait for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

BUCKET = 64


@dataclass
class Batch:
    ids: torch.Tensor  # [B, L] int64, right-padded with the end token
    answer: torch.Tensor  # [B] first answer token
    length: torch.Tensor  # [B]


class Corpus:
    def __init__(self, path: Path, device: torch.device, pad: int, max_len: int = 640):
        z = np.load(path)
        offset, answer = z["offset"], z["answer"]
        length = np.minimum(np.diff(offset), max_len)
        width = -(-max_len // BUCKET) * BUCKET
        ids = np.full((len(length), width), pad, np.int32)
        column = np.arange(width)
        inside = column[None] < length[:, None]
        ids[inside] = z["tokens"][(offset[:-1, None] + column[None])[inside]]
        ok = length - answer >= 8
        self.ids, self.answer, self.length = (torch.from_numpy(x[ok]).to(device) for x in (ids, answer.astype(np.int64), length))
        self.host_length = length[ok]
        self.tokens = int(self.host_length.sum())

    def batches(self, tokens: int, rng: np.random.Generator) -> Iterator[Batch]:
        """One shuffled epoch."""
        rounded = -(-self.host_length // BUCKET) * BUCKET
        order, plan = rng.permutation(len(rounded)), []
        for size in np.unique(rounded):
            members = order[rounded[order] == size]
            per = max(1, tokens // int(size))
            plan += [(int(size), members[i : i + per]) for i in range(0, len(members), per)]
        for i in rng.permutation(len(plan)):
            size, members = plan[i]
            pick = torch.from_numpy(members).to(self.ids.device)
            yield Batch(self.ids[pick, :size].long(), self.answer[pick], self.length[pick])


def spread(first: torch.Tensor, stop: torch.Tensor, count: int) -> torch.Tensor:
    """`count` random positions a row from [first, stop), one in each of `count` equal strata. [B, count]."""
    u = torch.rand(len(first), count, device=first.device) + torch.arange(count, device=first.device)
    width = (stop - first)[:, None]
    return first[:, None] + (u * width / count).long().clamp(max=width - 1)
