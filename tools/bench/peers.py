#!/usr/bin/env python3
"""Times other projects' kernels on the cases of `benches/kernels`, for tools/bench/compare.py.

    tools/bench/peers.py --record peers.json [--case TEXT] [attention draft_head acceptance layers linear]

Needs torch and a GPU. FlashInfer, vLLM and SGLang are used where they can be imported; a peer or case that fails says
so in one line and is left out. The method is that of benches/kernels/lab.rs: calls on buffers of their own captured
into one CUDA graph, so many that a replay moves three times the L2; a replay enqueued ahead hides the launch; median
of 31. Peers that cannot be captured are timed as they run and carry "(eager)" in their name. Run it right before or
after the bench, on the same GPU.
"""
import argparse
import contextlib
import datetime
import importlib
import importlib.metadata
import itertools
import json
import math

import torch
import torch.nn.functional as F

DEVICE = "cuda"
BF16, F32, E4M3 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
REPLAYS, WARM_UPS, MAX_COPIES = 31, 3, 8192
ATTENTION_SHAPES = [(1, 1024), (1, 4096), (1, 32768), (8, 1024), (8, 4096), (32, 1024), (32, 4096), (128, 1024),
                    (128, 4096), (256, 512)]
NUM_Q_HEADS, NUM_KV_HEADS, PAGE_SIZE, MAX_ROWS = 32, 8, 16, 8
DRAFT_LEN, RANK = 7, 256


class Lab:
    """Timing and the rows of this run."""

    def __init__(self, asked=""):
        self.asked = asked
        self.l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self.rows = []

    def copies(self, footprint):
        return max(1, min(MAX_COPIES, math.ceil(3 * self.l2_bytes / footprint)))

    def case(self, family, case, peer, footprint, prepare, graph=True):
        """`prepare(copies)` returns the call as a function of the copy's index."""
        if self.asked not in case:
            return
        name = peer if graph else f"{peer} (eager)"
        try:
            copies = self.copies(footprint)
            call = prepare(copies)
            us, noise = self.time(call, copies, graph)
        except Exception as error:  # a peer's failure is no reason to lose the others
            text = str(error).strip().splitlines()
            print(f"left out: {family} | {case} | {name}: {type(error).__name__} {text[0][:160] if text else ''}")
            return
        finally:
            torch.cuda.empty_cache()
        self.rows.append(dict(family=family, case=case, peer=name, us=us, noise=noise))
        print(f"| {family} | {case} | {name} | {us:.2f} (±{noise * 100:.1f} %) |", flush=True)

    def time(self, call, copies, graph):
        def sweep():
            for copy in range(copies):
                call(copy)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                call(0)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        replay = sweep
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                sweep()
            replay = captured.replay
        for _ in range(WARM_UPS):
            replay()
        times = []
        for _ in range(REPLAYS):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            replay()
            start.record()
            replay()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) * 1e3 / copies)
        times.sort()
        at = lambda fraction: times[round((len(times) - 1) * fraction)]
        return at(0.5), (at(0.9) - at(0.1)) / 2 / at(0.5)


def optional(name):
    try:
        return importlib.import_module(name)
    except Exception as error:  # broken installations raise more than ImportError
        print(f"left out: {name}: {type(error).__name__}")
        return None


def normal(*shape, scale=1.0, dtype=BF16):
    """Normal numbers, made in slices so that no f32 copy of a large tensor exists."""
    out = torch.empty(shape, device=DEVICE, dtype=dtype)
    for piece in out.view(-1).split(1 << 26):
        piece.copy_(torch.randn(piece.shape, device=DEVICE).mul_(scale))
    return out


def e4m3(*shape):
    """Random numbers of magnitudes up to 3.75."""
    size = torch.randint(0, 0x48, shape, device=DEVICE, dtype=torch.uint8)
    sign = torch.randint(0, 2, shape, device=DEVICE, dtype=torch.uint8) << 7
    return (size | sign).view(E4M3)


def tree_mask(contexts, rows):
    """Which keys a row sees: those before the pass, itself and what is above it, row i hanging below row (i - 1) / 2."""
    masks = []
    for context, count in zip(contexts, rows):
        mask = torch.ones(count, context, dtype=torch.bool)
        own = torch.eye(count, dtype=torch.bool)
        for i in range(1, count):
            own[i] |= own[(i - 1) // 2]
        mask[:, context - count:] = own
        masks.append(mask.flatten())
    return torch.cat(masks).to(DEVICE)


def flashinfer_attention(wrapper, contexts, rows, head_dim, form):
    """What prepares FlashInfer's attention of requests with `contexts` keys and `rows` rows: form "", "tree", "e4m3" or,
    with queries of 8 bits too, "e4m3 queries"."""
    def prepare(copies):
        ints = lambda values: torch.tensor(values, dtype=torch.int32, device=DEVICE)
        sums = lambda counts: ints([0, *itertools.accumulate(counts)])
        pages = [context // PAGE_SIZE for context in contexts]
        numbers = e4m3 if form.startswith("e4m3") else normal
        cache = numbers(copies, sum(pages), 2, PAGE_SIZE, NUM_KV_HEADS, head_dim)
        q = (e4m3 if form == "e4m3 queries" else normal)(copies, sum(rows), NUM_Q_HEADS, head_dim)
        out = torch.empty(q.shape, device=DEVICE, dtype=BF16)
        seen = dict(custom_mask=tree_mask(contexts, rows)) if form == "tree" else dict(causal=True)
        wrapper.plan(sums(rows), sums(pages), torch.randperm(sum(pages), device=DEVICE, dtype=torch.int32),
                     ints([PAGE_SIZE] * len(contexts)), NUM_Q_HEADS, NUM_KV_HEADS, head_dim, PAGE_SIZE,
                     q_data_type=q.dtype, kv_data_type=cache.dtype, o_data_type=BF16, **seen)
        # FlashInfer's kernel of 8-bit queries takes a factor for each head of all three; ours has one for each KV head.
        ones = lambda count: torch.ones(count, device=DEVICE)
        scales = [ones(NUM_Q_HEADS), ones(NUM_KV_HEADS), ones(NUM_KV_HEADS)] if q.dtype == E4M3 else []
        return lambda copy: wrapper.run(q[copy], cache[copy], *scales, out=out[copy])

    return prepare


def attention(lab):
    flashinfer = optional("flashinfer")
    if flashinfer is None:
        return
    scratch = torch.empty(512 << 20, dtype=torch.uint8, device=DEVICE)

    def case(name, contexts, rows, head_dim, form="", backend="fa2"):
        key_bytes = 1 if form.startswith("e4m3") else 2
        footprint = (key_bytes * sum(contexts) * 2 * NUM_KV_HEADS + 4 * sum(rows) * NUM_Q_HEADS) * head_dim
        peer = f"FlashInfer {backend}" + (", e4m3 queries" if form == "e4m3 queries" else "")
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(scratch, "NHD", backend=backend)
        lab.case("attention", name, peer, footprint, flashinfer_attention(wrapper, contexts, rows, head_dim, form))

    for head_dim in (128, 64, 256):
        for num_reqs, context in ATTENTION_SHAPES:
            name, contexts = f"D={head_dim} reqs={num_reqs} context={context}", [context] * num_reqs
            full = [MAX_ROWS] * num_reqs
            case(f"{name} q=8", contexts, full, head_dim)
            case(f"{name} q=1-8", contexts, [1 + r * 5 % MAX_ROWS for r in range(num_reqs)], head_dim)
            if head_dim == 128:
                case(f"{name} q=8 tree", contexts, full, head_dim, "tree")
                case(f"{name} q=8 e4m3", contexts, full, head_dim, "e4m3")
                case(f"{name} q=8 e4m3", contexts, full, head_dim, "e4m3 queries", "fa3")
        skewed = [65536 if r == 17 else 512 for r in range(64)]
        case(f"D={head_dim} reqs=64 context=512,one=65536 q=8", skewed, [MAX_ROWS] * 64, head_dim)


def draft_head(lab):
    gumbel = optional("vllm.v1.worker.gpu.sample.gumbel")
    markov = optional("sglang.kernels.ops.speculative.dspark.markov_sample")
    for vocab in (151936, 129280, 49152):
        w1 = normal(vocab, RANK, scale=0.05)
        for num_reqs in (1, 8, 16, 32, 64, 128):
            anchors = torch.randint(0, vocab, (num_reqs,), device=DEVICE)
            footprint = vocab * RANK * 2 + num_reqs * DRAFT_LEN * vocab * 2

            def block(copies, step):
                """The loop all peers share: bias by two lookups and a product, then `step` picks the token."""
                base = normal(copies, num_reqs, DRAFT_LEN, vocab, scale=3.0)
                w2 = normal(copies, vocab, RANK, scale=0.05)

                def call(copy):
                    tokens = anchors
                    for k in range(DRAFT_LEN):
                        tokens = step(k, base[copy, :, k], F.linear(F.embedding(tokens, w1), w2[copy]))

                return call

            for mode in ("sampled", "greedy"):
                sampled = mode == "sampled"
                case = f"V={vocab} reqs={num_reqs} {mode}"

                def torch_loop(copies):
                    race = torch.empty(num_reqs, vocab, device=DEVICE)

                    def step(k, base, bias):
                        logits = base + bias
                        if not sampled:
                            return logits.argmax(-1)
                        return (torch.softmax(logits.float(), -1) / race.exponential_()).argmax(-1)

                    return block(copies, step)

                lab.case("draft_head", case, "PyTorch loop, bf16 logits", footprint, torch_loop)
                if gumbel:
                    def vllm_loop(copies):
                        kept = torch.empty(num_reqs, DRAFT_LEN, vocab, device=DEVICE, dtype=BF16)
                        index = torch.arange(num_reqs, device=DEVICE, dtype=torch.int32)
                        seeds = torch.arange(num_reqs, device=DEVICE)
                        ones = torch.ones(num_reqs, device=DEVICE)
                        columns = torch.arange(DRAFT_LEN, device=DEVICE, dtype=torch.int32)

                        def step(k, base, bias):
                            if not sampled:
                                return (base + bias).argmax(-1)
                            return gumbel.gumbel_sample(base + bias, index, ones, seeds, seeds, True, True,
                                                        logits_cache=kept, logits_cache_col=columns[k])

                        return block(copies, step)

                    lab.case("draft_head", case, "vLLM, bf16 logits", footprint, vllm_loop)
                if markov:
                    def sglang_loop(copies):
                        kept = torch.empty(num_reqs, DRAFT_LEN, vocab, device=DEVICE, dtype=BF16)
                        temperature = torch.full((num_reqs,), float(sampled), device=DEVICE)
                        offset = torch.zeros(1, dtype=torch.int64, device=DEVICE)

                        def step(k, base, bias):
                            return markov.MarkovSampleStep.triton(
                                base_logits=base, bias=bias, temperatures=temperature, key=7, offset=offset, step=k,
                                step_dtype=BF16, logits_out=kept[:, k] if sampled else None, has_sampled_rows=sampled)

                        return block(copies, step)

                    lab.case("draft_head", case, "SGLang, bf16 logits", footprint, sglang_loop)


def acceptance(lab):
    vocab = 151936
    flashinfer = optional("flashinfer")
    vllm = optional("vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils")
    sglang = optional("sglang.kernels.ops.speculative.dspark.blockwise_rejection")
    rules = (("token T=1", 1.0, None, None), ("greedy", 0.0, None, None), ("token top-k 50 top-p 0.9 T=0.7", 0.7, 50, 0.9))
    for name, temperature, top_k, top_p in rules:
        for num_reqs in (1, 8, 32, 128):
            case, greedy, filtered = f"reqs={num_reqs} {name}", temperature == 0.0, top_k is not None

            def logits(copies, dtype):
                """Target rows, draft rows near them and drafts drawn from these."""
                target = normal(copies, num_reqs, DRAFT_LEN + 1, vocab, scale=3.0, dtype=dtype)
                draft = torch.empty(copies, num_reqs, DRAFT_LEN, vocab, device=DEVICE, dtype=dtype)
                drafts = torch.empty(copies, num_reqs, DRAFT_LEN, device=DEVICE, dtype=torch.int64)
                for copy in range(copies):
                    for r in range(num_reqs):
                        row = target[copy, r, :DRAFT_LEN].float() + 0.5 * torch.randn(DRAFT_LEN, vocab, device=DEVICE)
                        draft[copy, r] = row
                        drafts[copy, r] = row.argmax(-1) if greedy else torch.multinomial(
                            torch.softmax(row / temperature, -1), 1).squeeze(-1)
                return target, draft, drafts

            def footprint(dtype):
                return num_reqs * (DRAFT_LEN + 1 + (0 if greedy else DRAFT_LEN)) * vocab * dtype.itemsize

            if flashinfer and not greedy:
                def flashinfer_chain(copies):
                    target, draft, drafts = logits(copies, F32)
                    laws = torch.softmax(draft / temperature, -1)
                    del draft
                    tokens = drafts.int()
                    sampling = flashinfer.sampling

                    def call(copy):
                        law = sampling.softmax(target[copy].view(-1, vocab), temperature=temperature)
                        if filtered:
                            law = sampling.top_p_renorm_probs(sampling.top_k_renorm_probs(law, top_k), top_p)
                        sampling.chain_speculative_sampling(laws[copy], tokens[copy],
                                                            law.view(num_reqs, DRAFT_LEN + 1, vocab))

                    return call

                # Its sampler reads the generator's state on the host, which a capture refuses.
                lab.case("acceptance", case, "FlashInfer, f32", footprint(F32), flashinfer_chain, graph=False)
            if vllm and not filtered:
                for label, dtype in (("f32", F32), ("bf16", BF16)):
                    def vllm_rejection(copies, dtype=dtype):
                        target, draft, drafts = logits(copies, dtype)
                        rows = num_reqs * (DRAFT_LEN + 1)
                        tokens = torch.zeros(copies, num_reqs, DRAFT_LEN + 1, dtype=torch.int64, device=DEVICE)
                        tokens[:, :, 1:] = drafts
                        starts = torch.arange(num_reqs + 1, device=DEVICE, dtype=torch.int32) * (DRAFT_LEN + 1)
                        index = torch.arange(num_reqs, device=DEVICE, dtype=torch.int32)
                        row_index = index.repeat_interleave(DRAFT_LEN + 1)
                        step = torch.arange(DRAFT_LEN + 1, device=DEVICE, dtype=torch.int32).repeat(num_reqs)
                        positions = torch.arange(rows, device=DEVICE)
                        heat = torch.full((num_reqs,), temperature, device=DEVICE)
                        seeds = torch.arange(num_reqs, device=DEVICE)
                        return lambda copy: vllm.rejection_sample(
                            target[copy].view(rows, vocab), draft[copy], tokens[copy].view(-1), starts, positions,
                            index, row_index, step, heat, seeds, DRAFT_LEN, use_block_verification=False)

                    lab.case("acceptance", case, f"vLLM, {label}", footprint(dtype), vllm_rejection)
            if sglang and not filtered and not greedy:
                def sglang_blockwise(copies):
                    target, draft, drafts = logits(copies, BF16)
                    candidates = torch.zeros(copies, num_reqs, DRAFT_LEN + 1, dtype=torch.int64, device=DEVICE)
                    candidates[:, :, 1:] = drafts
                    heat = torch.full((num_reqs,), temperature, device=DEVICE)
                    noise = sglang.make_rejection_noise(3, DEVICE)
                    return lambda copy: sglang.blockwise_rejection_triton(
                        candidates=candidates[copy], target_logits=target[copy].view(-1, vocab),
                        draft_logits=draft[copy], target_temperatures=heat, draft_temperatures=heat, noise=noise)

                lab.case("acceptance", case, "SGLang, bf16", footprint(BF16), sglang_blockwise)


def layers(lab):
    flashinfer = optional("flashinfer")
    if flashinfer is None:
        return
    hidden, ffn, head_dim, eps = 4096, 12288, 128, 1e-6
    q_size, kv_size = NUM_Q_HEADS * head_dim, NUM_KV_HEADS * head_dim
    for rows in (1, 8, 64, 512):
        def rms_norm(copies):
            x, weight = normal(copies, rows, hidden), normal(copies, hidden)
            out = torch.empty_like(x)
            return lambda copy: flashinfer.norm.rmsnorm(x[copy], weight[copy], eps, out=out[copy])

        def add_rms_norm(copies):
            x, residual, weight = normal(copies, rows, hidden), normal(copies, rows, hidden), normal(copies, hidden)
            return lambda copy: flashinfer.norm.fused_add_rmsnorm(x[copy], residual[copy], weight[copy], eps)

        def silu_mul(copies):
            gate_up = normal(copies, rows, 2 * ffn)
            out = torch.empty(copies, rows, ffn, device=DEVICE, dtype=BF16)
            return lambda copy: flashinfer.activation.silu_and_mul(gate_up[copy], out=out[copy])

        def rope_append(copies, dtype=BF16):
            num_reqs = math.ceil(rows / MAX_ROWS)
            qkv = normal(copies, rows, q_size + 2 * kv_size)
            cache = torch.zeros(copies, num_reqs, 2, PAGE_SIZE, NUM_KV_HEADS, head_dim, device=DEVICE, dtype=dtype)
            weight = normal(2, head_dim)
            row = torch.arange(rows, device=DEVICE, dtype=torch.int32)
            positions = 5 + row % MAX_ROWS
            pages = torch.randperm(num_reqs, device=DEVICE, dtype=torch.int32)
            indptr = torch.arange(num_reqs + 1, device=DEVICE, dtype=torch.int32)
            last = torch.full((num_reqs,), 5 + min(rows, MAX_ROWS), device=DEVICE, dtype=torch.int32)

            def call(copy):
                q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in qkv[copy].split([q_size, kv_size, kv_size], -1))
                q, k = flashinfer.norm.rmsnorm(q, weight[0], eps), flashinfer.norm.rmsnorm(k, weight[1], eps)
                flashinfer.rope.apply_rope_pos_ids_inplace(q, k, positions, rope_theta=1e6)
                if dtype == E4M3:
                    k, v = (k / 0.02).to(dtype), (v / 0.01).to(dtype)
                flashinfer.page.append_paged_kv_cache(k, v, row // MAX_ROWS, positions, cache[copy], pages, indptr,
                                                      last)

            return call

        rotated = rows * (q_size + 2 * kv_size)
        lab.case("layers", f"qk_norm_rope_append rows={rows} e4m3", "FlashInfer, separate ops",
                 4 * rotated - 2 * rows * kv_size, lambda copies: rope_append(copies, E4M3))
        for name, elements, prepare, peer in (
                ("rms_norm", (2 * rows + 1) * hidden, rms_norm, "FlashInfer"),
                ("add_rms_norm", (4 * rows + 1) * hidden, add_rms_norm, "FlashInfer"),
                ("qk_norm_rope_append", 2 * rotated, rope_append, "FlashInfer, separate ops"),
                ("silu_mul", 3 * rows * ffn, silu_mul, "FlashInfer")):
            lab.case("layers", f"{name} rows={rows}", peer, 2 * elements, prepare)


def linear(lab):
    for name, k, n in (("qkv", 4096, 6144), ("o", 4096, 4096), ("gate_up", 4096, 24576), ("down", 12288, 4096),
                       ("lm_head", 4096, 151936)):
        for m in (1, 8, 64):
            def prepare(copies):
                x, weight = normal(m, k), normal(copies, n, k, scale=0.02)
                return lambda copy: F.linear(x, weight[copy])

            lab.case("linear", f"{name} M={m}", "PyTorch", 2 * (n * k + m * k + m * n), prepare)


FAMILIES = dict(attention=attention, draft_head=draft_head, acceptance=acceptance, layers=layers, linear=linear)


def header():
    versions = {"torch": torch.__version__}
    for package in ("flashinfer-python", "vllm", "sglang"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    now = datetime.datetime.now(datetime.timezone.utc)
    return dict(gpu=torch.cuda.get_device_name(), date=now.strftime("%Y-%m-%d %H:%M UTC"), versions=versions,
                replays=REPLAYS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="family", help=f"some of {', '.join(FAMILIES)}; default all")
    parser.add_argument("--case", metavar="TEXT", default="", help="only the cases whose name contains this text")
    parser.add_argument("--record", metavar="FILE", help="write the rows as JSON")
    options = parser.parse_args()
    unknown = [name for name in options.families if name not in FAMILIES]
    if unknown:
        parser.error(f"families: expected some of {', '.join(FAMILIES)}, found {unknown[0]}")
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return
    torch.manual_seed(1)
    lab = Lab(options.case)
    for name in options.families or FAMILIES:
        FAMILIES[name](lab)
        if options.record:  # after every family: a peer may take the process down
            with open(options.record, "w") as file:
                json.dump(dict(header=header(), rows=lab.rows), file, indent=1)


if __name__ == "__main__":
    main()
