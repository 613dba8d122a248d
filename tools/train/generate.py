#!/usr/bin/env python3
"""Make the training corpus: the target writes conversations, many slots at a time.

Every slot holds one sequence in a static KV cache. One decode step (a CUDA graph) feeds each slot its token
at `pos` and fills `pos + 1`: with the prompt's own token while there is one, else with a sampled one. So
there is no separate prefill, and an *opened* user turn simply goes on: the target samples until it says
<|im_end|>, the step then writes the slot's `tail` (suffix and assistant header) in its place and the answer
begins. The host looks in every few steps, takes finished sequences out and puts new prompts in. All prompts
share the chat template's head; its KV rows stay valid, so a reused slot starts behind them.

Corpus (.npz): tokens uint16 (all sequences end to end), offset int64 [N+1], answer int32 [N] (where the
answer starts), greedy bool [N]. User turns are sampled at T = 0.8; answers at T = 0 or T = 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import prompts
from kernels import decode_attention
from target import Target, rotate

TAIL, LOOP_WINDOW, LOOP_PERIOD = 48, 96, 40
IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"


@dataclass
class Prompt:
    ids: list[int]
    temperature: float = 0.0
    tail: list[int] | None = None  # None: `ids` is complete and the answer follows


@dataclass
class Sequence:
    tokens: np.ndarray
    answer: int
    greedy: bool
    tag: int  # index of its prompt


class Decoder:
    """Continuous batching over `slots` static cache rows of `max_len` tokens."""

    def __init__(self, target: Target, slots: int, max_len: int, end_ids: tuple[int, int], user_cap: int = 160,
                 answer_cap: int = 448, user_temperature: float = 0.8):
        self.target, self.slots, self.max_len = target, slots, max_len
        self.im_end, self.end_of_text = end_ids
        self.user_cap, self.answer_cap = user_cap, answer_cap
        self.device = dev = target.device
        shape = (len(target.layers), slots, target.kv_heads, max_len, target.head_dim)
        self.k, self.v = (torch.zeros(shape, device=dev, dtype=target.dtype) for _ in range(2))
        self.seq = torch.full((slots, max_len + TAIL), -1, device=dev)
        self.tail = torch.full((slots, TAIL), -1, device=dev)
        self.pos, self.answer, self.length, self.tail_len = (torch.zeros(slots, device=dev, dtype=torch.long) for _ in range(4))
        self.temperature = torch.zeros(slots, device=dev)
        self.user_temperature = torch.full((slots,), user_temperature, device=dev)
        self.in_user = torch.zeros(slots, device=dev, dtype=torch.bool)
        self.done = torch.ones(slots, device=dev, dtype=torch.bool)
        self.rows, self.kv_ids = torch.arange(slots, device=dev), torch.arange(target.kv_heads, device=dev)
        self.tail_ids = torch.arange(TAIL, device=dev)
        self.graph = None

    def logits(self) -> torch.Tensor:
        """Target logits [slots, V] after each slot's token at `pos`; appends its KV rows."""
        t = self.target
        token = self.seq.gather(1, self.pos[:, None])[:, 0].clamp_min(0)
        cos, sin = t.cos[self.pos][:, None], t.sin[self.pos][:, None]
        where = (self.rows[:, None], self.kv_ids[None], self.pos[:, None])
        x = t.embed[token]
        for i, layer in enumerate(t.layers):
            qkv = F.linear(t.rms(x, layer["norm1"]), layer["qkv"]).view(self.slots, -1, t.head_dim)
            qk = rotate(qkv[:, : t.heads + t.kv_heads], cos, sin)
            self.k[i].index_put_(where, qk[:, t.heads :])
            self.v[i].index_put_(where, qkv[:, t.heads + t.kv_heads :])
            out = decode_attention(qk[:, : t.heads].contiguous(), self.k[i], self.v[i], self.pos)
            x = x + F.linear(out.reshape(self.slots, -1), layer["o"])
            x = x + t.mlp(x, layer)
        return F.linear(t.rms(x, t.norm), t.head)

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        """Gumbel-max per slot: argmax(logits / T − log E), E exponential; plain argmax at T = 0."""
        temperature = torch.where(self.in_user, self.user_temperature, self.temperature)[:, None]
        noise = torch.empty(logits.shape, device=self.device).exponential_().clamp_min_(1e-10).log_()
        return torch.addcmul(logits.float(), noise, temperature, value=-1).argmax(-1)

    @torch.no_grad()
    def step(self) -> None:
        sampled = self.sample(self.logits())
        here, active = (self.pos + 1)[:, None], ~self.done
        planned = self.seq.gather(1, here)[:, 0]
        free = active & (planned < 0)
        token = torch.where(free, sampled, planned)
        self.seq.scatter_(1, here, token[:, None])

        switch = free & self.in_user & (token == self.im_end)
        at = here + self.tail_ids
        at = at.clamp_max(self.seq.shape[1] - 1)
        self.seq.scatter_(1, at, torch.where(switch[:, None], self.tail, self.seq.gather(1, at)))
        self.answer.copy_(torch.where(switch, self.pos + 1 + self.tail_len, self.answer))
        self.in_user &= ~switch

        after = self.pos + 1
        said_end = free & ~switch & ((token == self.im_end) | (token == self.end_of_text))
        too_long = torch.where(self.in_user, after >= self.user_cap, after - self.answer >= self.answer_cap - 1)
        finish = active & (said_end | too_long | (after >= self.max_len - 1))
        self.length.copy_(torch.where(finish, after + 1, self.length))
        self.pos.copy_(torch.where(active & ~finish, after, self.pos))
        self.done |= finish

    def capture(self) -> None:
        """Records the step as a CUDA graph; without CUDA it stays eager."""
        if self.device.type != "cuda" or self.graph is not None:
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        self.graph = graph

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            self.graph.replay() if self.graph is not None else self.step()

    def stop_loops(self) -> None:
        """Ends answers whose last LOOP_WINDOW tokens repeat with a period of at most LOOP_PERIOD."""
        back = self.pos[:, None] - LOOP_WINDOW + 1 + torch.arange(LOOP_WINDOW, device=self.device)
        recent = self.seq.gather(1, back.clamp_min(0))
        loops = torch.zeros_like(self.done)
        for period in range(1, LOOP_PERIOD + 1):
            loops |= (recent[:, period:] == recent[:, :-period]).all(1)
        stop = loops & ~self.done & ~self.in_user & (self.pos - self.answer >= LOOP_WINDOW)
        self.length.copy_(torch.where(stop, self.pos + 1, self.length))
        self.done |= stop

    def put(self, free: torch.Tensor, batch: list[tuple[int, Prompt]], start: int) -> None:
        """Loads prompts into the slots `free` (host tensor of indices); their first fed token is `start`."""
        n = len(batch)
        seq = np.full((n, self.seq.shape[1]), -1, np.int64)
        tail = np.full((n, TAIL), -1, np.int64)
        for row, (_, p) in enumerate(batch):
            seq[row, : len(p.ids)] = p.ids
            tail[row, : len(p.tail or [])] = p.tail or []
        fields = [[0 if p.tail else len(p.ids) for _, p in batch], [len(p.tail or []) for _, p in batch]]
        to = lambda x: torch.as_tensor(x).to(self.device)
        slot = to(free[:n])
        self.seq[slot], self.tail[slot] = to(seq), to(tail)
        self.answer[slot], self.tail_len[slot] = to(fields[0]), to(fields[1])
        self.temperature[slot] = to([p.temperature for _, p in batch]).float()
        self.in_user[slot] = to([p.tail is not None for _, p in batch])
        self.pos[slot], self.length[slot] = start, 0
        self.done[slot] = False

    def run(self, source: Iterable[Prompt], deadline: float = float("inf"), shared: int = 1, every: int = 16,
            stop_loops: bool = True, log=None) -> list[Sequence]:
        """Answers every prompt of `source`, or as many as are finished by `deadline` (time.monotonic).

        `shared`: how many leading tokens all prompts have in common.
        """
        self.done.fill_(True)
        source, tags = enumerate(source), np.full(self.slots, -1)
        used = np.zeros(self.slots, bool)  # slots whose cache holds the shared head
        out: list[Sequence] = []
        self.capture()
        self.done.fill_(True)
        rounds = 0
        while True:
            done = self.done.cpu().numpy()
            ended = np.flatnonzero(done & (tags >= 0))
            if len(ended):
                pick = torch.from_numpy(ended).to(self.device)
                seq, length, answer, temperature = (t[pick].cpu().numpy() for t in (self.seq, self.length, self.answer, self.temperature))
                for row, slot in enumerate(ended):
                    out.append(Sequence(seq[row, : length[row]].astype(np.uint16), int(answer[row]), temperature[row] == 0, int(tags[slot])))
                tags[ended] = -1
            if time.monotonic() > deadline:
                return out
            for warm in (False, True):
                free = np.flatnonzero((tags < 0) & (used == warm))
                batch = list(itertools.islice(source, len(free)))
                if batch:
                    slots = free[: len(batch)]
                    self.put(torch.from_numpy(slots), batch, shared - 1 if warm else 0)
                    tags[slots], used[slots] = [tag for tag, _ in batch], True
            if (tags < 0).all():
                return out
            self.advance(every)
            rounds += 1
            if stop_loops and rounds % 2 == 0:
                self.stop_loops()
            if log and rounds % 32 == 0:
                log(rounds * every, out)


def prompt_stream(tokenizer, seed: int, greedy_share: float) -> Iterable[Prompt]:
    """Prompts without end, tokenised in blocks."""
    rng, turns = np.random.default_rng(seed), prompts.turns(seed)
    while True:
        block = list(itertools.islice(turns, 1024))
        heads = tokenizer.encode_batch([prompts.PREFIX + t.text + ("" if t.open else t.tail + prompts.SUFFIX) for t in block], add_special_tokens=False)
        tails = tokenizer.encode_batch([t.tail + prompts.SUFFIX for t in block], add_special_tokens=False)
        for t, head, tail, greedy in zip(block, heads, tails, rng.random(len(block)) < greedy_share):
            if len(head.ids) <= 320:
                yield Prompt(head.ids, 0.0 if greedy else 1.0, tail.ids if t.open else None)


def special_ids(tokenizer) -> tuple[int, int]:
    return tokenizer.token_to_id(IM_END), tokenizer.token_to_id(END_OF_TEXT)


def save_corpus(path: Path, sequences: list[Sequence], min_answer: int) -> dict[str, float]:
    """Keeps sequences with an answer worth training on; returns counts."""
    bad = {1, *range(3, 17)}  # control tokens have no place inside an answer
    keep = [s for s in sequences if s.answer > 0 and len(s.tokens) - s.answer >= min_answer and not bad & set(s.tokens[s.answer :].tolist())]
    offset = np.concatenate([[0], np.cumsum([len(s.tokens) for s in keep])]).astype(np.int64)
    answer = np.array([s.answer for s in keep], np.int32)
    tokens = np.concatenate([s.tokens for s in keep]) if keep else np.zeros(0, np.uint16)
    greedy = np.array([s.greedy for s in keep], bool)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, tokens=tokens, offset=offset, answer=answer, greedy=greedy)
    return {"sequences": len(keep), "dropped": len(sequences) - len(keep), "tokens": int(offset[-1]),
            "answer_tokens": int(offset[-1] - answer.sum()), "greedy_share": float(greedy.mean()) if keep else 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", required=True, help="Hugging Face directory of the target")
    parser.add_argument("--out", type=Path, required=True, help="folder for corpus.npz and generate.json")
    parser.add_argument("--gen-seconds", type=float, default=140, help="decode this long (default: %(default)s)")
    parser.add_argument("--slots", type=int, default=2048, help="sequences at a time (default: %(default)s)")
    parser.add_argument("--max-len", type=int, default=640)
    parser.add_argument("--answer-cap", type=int, default=448, help="longest answer in tokens")
    parser.add_argument("--greedy-share", type=float, default=0.4, help="answers decoded at T = 0; the others at T = 1")
    parser.add_argument("--min-answer", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--show", type=int, default=3, help="print this many sequences")
    args = parser.parse_args()
    from tokenizers import Tokenizer

    torch.manual_seed(args.seed)
    cuda = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if cuda else (torch.device("cpu"), torch.float32)
    tokenizer = Tokenizer.from_file(str(Path(args.target) / "tokenizer.json"))
    target = Target(args.target, device, dtype)
    decoder = Decoder(target, args.slots, args.max_len, special_ids(tokenizer), answer_cap=args.answer_cap)
    shared = len(tokenizer.encode(prompts.PREFIX, add_special_tokens=False).ids)
    began = time.monotonic()

    def log(steps: int, out: list[Sequence]) -> None:
        took = time.monotonic() - began
        print(f"generate {took:6.1f} s  {steps} steps  {steps * args.slots / took / 1e3:.0f}k steps·slots/s  "
              f"{len(out)} sequences  {sum(len(s.tokens) for s in out) / 1e6:.2f} M tokens", flush=True)

    sequences = decoder.run(prompt_stream(tokenizer, args.seed, args.greedy_share), began + args.gen_seconds, shared, log=log)
    took = time.monotonic() - began
    stats = save_corpus(args.out / "corpus.npz", sequences, args.min_answer)
    stats |= {"seconds": round(took, 1), "tokens_per_second": round(stats["tokens"] / took), "args": vars(args) | {"out": str(args.out)}}
    (args.out / "generate.json").write_text(json.dumps(stats, indent=2) + "\n")
    print(json.dumps(stats))
    for s in sequences[:: max(1, len(sequences) // max(1, args.show))][: args.show]:
        print(f"--- {'T=0' if s.greedy else 'T=1'}, answer at {s.answer}\n{tokenizer.decode(s.tokens.tolist(), skip_special_tokens=False)}")


if __name__ == "__main__":
    main()
