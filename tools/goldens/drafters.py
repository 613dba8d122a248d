"""Tiny DSpark and DFlash drafters and what DeepSpec's own inference code computes with them.

The models, the draft step, the confidence head and the speculative loop are DeepSpec's (deepspec.modeling.dspark,
deepspec.eval.dspark), imported from a checkout. This module only fits the tiny drafters for a moment, so that some
drafts are accepted and some are not, and records what DeepSpec returns, in f32 on the CPU.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import DynamicCache, Qwen3Config

from common import margins, normal, randomize, round_weights, seeded, write_json, write_tensors
from targets import greedy, load_target


def crop_to_length(cache: DynamicCache, length: int) -> None:
    """`DynamicCache.crop` as transformers 5.10 and older had it: a positive argument is the length to keep."""
    for layer in cache.layers:
        if length < 0:
            length = cache.get_seq_length() + length
        if layer.is_initialized and layer.keys.shape[-2] > length:
            layer.keys = layer.keys[..., :length, :]
            layer.values = layer.values[..., :length, :]


DynamicCache.crop = crop_to_length

from deepspec.eval.dspark.draft_ops import build_dspark_proposal, forward_dspark_draft_block  # noqa: E402
from deepspec.eval.dspark.evaluator import Qwen3DSparkEvaluator  # noqa: E402
from deepspec.modeling.dspark.common import extract_context_feature  # noqa: E402
from deepspec.modeling.dspark.qwen3 import Qwen3DSparkModel, build_draft_config  # noqa: E402
from deepspec.utils.config import ConfigNode  # noqa: E402

NUM_GENERATED = 32
ROLLOUT = 44
MIN_DRAFT_MARGIN = 5e-4
GAINS = {"q_norm": 1.4, "k_norm": 1.4, "markov_w1": 4.0, "markov_w2": 2.0, "proj.bias": 0.5}


@dataclass(frozen=True)
class DrafterSpec:
    """One tiny drafter. `num_steps` of fitting decide how often the target agrees with it."""

    name: str
    target: str
    seed: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    intermediate_size: int
    block_size: int
    target_layer_ids: tuple[int, ...]
    markov_head_type: str | None
    markov_rank: int
    confidence: bool
    confidence_with_markov: bool
    stores_embeddings: bool
    num_steps: int


DRAFTERS = (
    DrafterSpec("qwen3_vanilla", "qwen3_bf16", 201, 2, 2, 1, 32, 7, (0, 1, 2), "vanilla", 16, True, True, True, 120),
    DrafterSpec("qwen3_gated", "qwen3_bf16", 202, 1, 2, 1, 32, 4, (-1, 2), "gated", 16, True, False, False, 200),
    DrafterSpec("qwen3_rnn", "qwen3_bf16", 213, 1, 2, 1, 32, 7, (1, 2), "rnn", 16, True, True, False, 180),
    DrafterSpec("qwen3_dflash", "qwen3_bf16", 204, 1, 2, 1, 32, 7, (0, 2), None, 0, False, False, False, 160),
    DrafterSpec("llama_vanilla", "llama_bf16", 205, 1, 1, 1, 32, 5, (0,), "vanilla", 8, False, False, False, 70),
)


def build_drafter(spec: DrafterSpec, target: torch.nn.Module) -> Qwen3DSparkModel:
    """A drafter through DeepSpec's own `build_draft_config`; its head counts and ffn width are its own."""
    source = target.config
    sizes = Qwen3Config(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=spec.num_q_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=target.model.layers[0].self_attn.head_dim,
        rms_norm_eps=source.rms_norm_eps,
        rope_parameters=dict(source.rope_parameters),
        max_position_embeddings=source.max_position_embeddings,
    )
    args = ConfigNode(
        num_draft_layers=spec.num_layers,
        block_size=spec.block_size,
        target_layer_ids=list(spec.target_layer_ids),
        mask_token_id=source.vocab_size - 1,
        num_anchors=512,
        markov_rank=spec.markov_rank,
        confidence_head_alpha=1.0 if spec.confidence else 0.0,
    )
    if spec.confidence:
        args.confidence_head_with_markov = spec.confidence_with_markov
    if spec.markov_rank > 0:
        args.markov_head_type = spec.markov_head_type
    config = build_draft_config(sizes, args)
    config._attn_implementation = "eager"
    model = Qwen3DSparkModel(config)
    randomize(model, seeded(spec.seed), GAINS | ({"markov_w2": 6.0} if spec.markov_head_type == "gated" else {}))
    model.initialize_embeddings_and_head(embed_tokens=target.model.embed_tokens, lm_head=target.lm_head)
    return model


@torch.no_grad()
def rollouts(target: torch.nn.Module, prompts: list[list[int]], layer_ids: list[int], seed: int) -> list[SimpleNamespace]:
    """Greedy target continuations of the golden prompts and of random ones of the same lengths, with their taps."""
    groups = []
    for index, ids in enumerate(prompts):
        extra = torch.randint(0, target.config.vocab_size, (15, len(ids)), generator=seeded(seed * 10 + index))
        tokens = torch.cat([torch.tensor([ids]), extra])
        for _ in range(ROLLOUT):
            logits = target(tokens, use_cache=False).logits[:, -1]
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
        hidden = target(tokens, output_hidden_states=True, use_cache=False).hidden_states
        groups.append(SimpleNamespace(start=len(ids), tokens=tokens, taps=extract_context_feature(hidden, layer_ids)))
    return groups


def teacher_forced(model: Qwen3DSparkModel, group: SimpleNamespace, anchor: int) -> tuple[torch.Tensor, ...]:
    """(hidden, prev tokens, labels) of the block anchored at position `anchor`, for a batch of equal-length contexts."""
    gamma = model.block_size
    batch = group.tokens.shape[0]
    block = torch.full((batch, gamma), int(model.mask_token_id))
    block[:, 0] = group.tokens[:, anchor]
    hidden = model._forward_backbone(
        position_ids=torch.arange(anchor + gamma).unsqueeze(0).expand(batch, -1),
        noise_embedding=model.embed_tokens(block),
        target_hidden_states=group.taps[:, :anchor],
    )
    prev = group.tokens[:, anchor : anchor + gamma]
    return hidden, prev, group.tokens[:, anchor + 1 : anchor + 1 + gamma]


def fit(spec: DrafterSpec, model: Qwen3DSparkModel, groups: list[SimpleNamespace]) -> None:
    """A few AdamW steps of cross entropy on the rollouts, then a confidence head whose logits are spread out."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.0)
    gen = seeded(spec.seed + 5000)
    for _ in range(spec.num_steps):
        loss = torch.zeros(())
        for group in groups:
            anchor = group.start + int(torch.randint(0, ROLLOUT - spec.block_size, (1,), generator=gen))
            hidden, prev, labels = teacher_forced(model, group, anchor)
            logits = model.compute_logits(hidden)
            if model.markov_head is not None:
                logits = model.markov_head.apply_block_logits(
                    logits[:, None], token_ids=prev[:, None], hidden_states=hidden[:, None]
                )[:, 0]
            loss = loss + F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if model.confidence_head is not None:
        spread_confidence(model, groups, gen)


@torch.no_grad()
def spread_confidence(model: Qwen3DSparkModel, groups: list[SimpleNamespace], gen: torch.Generator) -> None:
    """Random confidence weights, scaled so that the logits have mean 0.4 and deviation 1.9 on the rollouts."""
    proj = model.confidence_head.proj
    width = model.config.hidden_size
    proj.weight.copy_(normal(tuple(proj.weight.shape), 1.0, gen))
    if model.confidence_head_with_markov:  # both inputs must matter
        rms = model.markov_head.markov_w1.weight.pow(2).mean().sqrt()
        proj.weight[:, width:] *= (width / model.config.markov_rank) ** 0.5 / rms
    proj.bias.zero_()
    samples = []
    for group in groups:
        for anchor in range(group.start, group.start + ROLLOUT - model.block_size, 5):
            hidden, prev, _ = teacher_forced(model, group, anchor)
            samples.append(model.predict_confidence_step(hidden, prev).flatten())
    logits = torch.cat(samples)
    scale = 1.9 / float(logits.std())
    proj.weight.mul_(scale)
    proj.bias.fill_(0.4 - scale * float(logits.mean()))


def save_drafter(spec: DrafterSpec, model: Qwen3DSparkModel, out: Path) -> None:
    """`save_pretrained` in bf16, as DeepSpec's checkpoint manager does; some drop the tensors the target also has."""
    model.config._attn_implementation = "flex_attention"  # what DeepSpec trains with; not written to the file
    model.to(torch.bfloat16).save_pretrained(out)
    if not spec.stores_embeddings:
        tensors = load_file(out / "model.safetensors")
        del tensors["embed_tokens.weight"], tensors["lm_head.weight"]
        write_tensors(out / "model.safetensors", tensors)


def load_drafter(out: Path, target: torch.nn.Module) -> Qwen3DSparkModel:
    """The saved drafter upcast to f32; embedding and head always come from the target (they are the same)."""
    model = Qwen3DSparkModel.from_pretrained(out, dtype=torch.float32, attn_implementation="eager")
    if "embed_tokens.weight" in (stored := load_file(out / "model.safetensors")):
        assert torch.equal(stored["embed_tokens.weight"].float(), target.model.embed_tokens.weight)
        assert torch.equal(stored["lm_head.weight"].float(), target.lm_head.weight)
    model.initialize_embeddings_and_head(embed_tokens=target.model.embed_tokens, lm_head=target.lm_head)
    return model.eval()


class RecordingEvaluator(Qwen3DSparkEvaluator):
    """DeepSpec's evaluator on given models, writing down every round. The loop itself is DeepSpec's."""

    def __init__(self, target: torch.nn.Module, drafter: Qwen3DSparkModel, **args: float) -> None:
        self.target_model, self.draft_model = target, drafter
        self.args = SimpleNamespace(temperature=0.0, **args)
        self.confidence_head_recorder = None
        self.rounds: list[dict] = []

    def _propose(self, *, start: int, **kwargs):
        drafter = self.draft_model
        recorded = {}

        def sample(*args, **options):
            tokens, logits = type(drafter).sample_draft_tokens(drafter, *args, **options)
            recorded["logits"] = logits[0]
            return tokens, logits

        drafter.sample_draft_tokens = sample
        try:
            proposal = super()._propose(start=start, **kwargs)
        finally:
            del drafter.sample_draft_tokens
        self.rounds.append({"anchor_position": start, "draft_margins": margins(recorded["logits"])})
        return proposal

    def _post_verify(self, proposal, verification) -> None:
        sent = proposal.verify_input_ids[0].tolist()
        confidences = proposal.confidence_logits
        committed = sent[1 : verification.accepted_draft_tokens + 1]
        if not verification.terminated_by_stop_token:
            committed.append(int(verification.next_token))
        self.rounds[-1] |= {
            "anchor_token": sent[0],
            "draft_tokens": sent[1:],
            "confidence_logits": None if confidences is None else [round(x, 4) for x in confidences[0].tolist()],
            "num_accepted": verification.accepted_draft_tokens,
            "committed": committed,
            "terminated_by_stop_token": verification.terminated_by_stop_token,
            "target_margins": margins(verification.target_output.logits[0]),
        }


def generate(
    target: torch.nn.Module, drafter: Qwen3DSparkModel, ids: list[int], stop: list[int] | None, threshold: float
) -> dict:
    """DeepSpec's greedy speculative generation of one prompt, and its rounds."""
    evaluator = RecordingEvaluator(target, drafter, max_new_tokens=NUM_GENERATED, confidence_threshold=threshold)
    result = evaluator.generate_one_sample(input_ids=torch.tensor([ids]), stop_token_ids=stop)
    output = result.output_ids[0].tolist()[len(ids) :]
    plain, _ = greedy(target, ids, NUM_GENERATED)
    assert output == plain[: len(output)], "speculative decoding must equal plain greedy decoding"
    return {
        "stop_token_ids": stop,
        "confidence_threshold": threshold,
        "max_new_tokens": NUM_GENERATED,
        "first_token": plain[0],
        "output": output,
        "acceptance_lengths": result.acceptance_lengths,
        "proposal_lengths": result.proposal_lengths,
        "accepted_draft_lengths": result.accepted_draft_lengths,
        "rounds": evaluator.rounds,
    }


@torch.no_grad()
def draft_case(target: torch.nn.Module, model: Qwen3DSparkModel, ids: list[int], seed: int) -> tuple[dict, dict]:
    """One draft block right after the prefill of `ids`: greedy drafting, and the same block with forced tokens."""
    gamma, anchor = model.block_size, len(ids)
    prefill = target(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    anchor_token = int(prefill.logits[0, -1].argmax())
    taps = extract_context_feature(prefill.hidden_states, model.target_layer_ids)
    block = torch.full((1, gamma), int(model.mask_token_id))
    block[0, 0] = anchor_token
    hidden = forward_dspark_draft_block(
        model,
        draft_input_ids=block,
        position_ids=torch.arange(anchor + gamma).unsqueeze(0),
        past_key_values_draft=DynamicCache(),
        target_hidden_states=taps,
        start=anchor,
        block_size=gamma,
    )
    proposal = build_dspark_proposal(
        model, draft_input_ids=block, block_hidden=hidden, block_size=gamma, temperature=0.0, confidence_threshold=0.0
    )
    base = model.compute_logits(hidden)
    tokens, corrected = model.sample_draft_tokens(
        base, first_prev_token_ids=block[:, 0], temperature=0.0, hidden_states=hidden
    )
    assert proposal.verify_input_ids[0].tolist() == [anchor_token, *tokens[0].tolist()]
    case = {
        "prompt_ids": ids,
        "anchor_position": anchor,
        "anchor_token": anchor_token,
        "draft_tokens": tokens[0].tolist(),
        "draft_margins": margins(corrected[0]),
        "base_argmax": base[0].argmax(-1).tolist(),
    }
    arrays = {"context": model.hidden_norm(model.fc(taps))[0], "hidden": hidden[0], "base_logits": base[0]}
    if model.markov_head is None:  # DFlash: the corrected logits are the base logits
        return case, arrays
    arrays["logits"] = corrected[0]
    forced = torch.randint(0, target.config.vocab_size, (1, gamma), generator=seeded(seed))
    prev = torch.cat([block[:, :1], forced[:, :-1]], dim=1)
    case["forced_tokens"] = forced[0].tolist()
    arrays["forced_logits"] = model.markov_head.apply_block_logits(
        base[:, None], token_ids=prev[:, None], hidden_states=hidden[:, None]
    )[0, 0]
    if model.confidence_head is not None:
        arrays["confidence_logits"] = proposal.confidence_logits[0]
        arrays["forced_confidence_logits"] = model.predict_confidence_step(hidden, prev)[0]
    if model.markov_head.markov_head_type == "rnn":
        arrays["rnn_states"] = rnn_states(model, hidden, torch.cat([block[:, :1], tokens[:, :-1]], dim=1))
    return case, arrays


def rnn_states(model: Qwen3DSparkModel, hidden: torch.Tensor, prev: torch.Tensor) -> torch.Tensor:
    """s_1 … s_γ of the rnn head, from DeepSpec's own step."""
    state = torch.zeros(1, model.config.markov_rank)
    states = []
    for k in range(hidden.shape[1]):
        state, _ = model.markov_head._rnn_step(state, model.markov_head.get_prev_embeddings(prev[:, k]), hidden[:, k])
        states.append(state[0])
    return torch.stack(states)


def dump_drafter(spec: DrafterSpec, root: Path) -> None:
    """Builds, fits, saves and reloads one drafter; writes its golden.json and golden.safetensors."""
    target_dir, out = root / "targets" / spec.target, root / "drafters" / spec.name
    shutil.rmtree(out, ignore_errors=True)
    target = load_target(target_dir).requires_grad_(False)
    prompts = [p["ids"] for p in json.loads((target_dir / "golden.json").read_text())["prompts"]]
    model = build_drafter(spec, target)
    fit(spec, model, rollouts(target, prompts, list(spec.target_layer_ids), spec.seed))
    round_weights(model, torch.bfloat16)
    save_drafter(spec, model, out)
    model = load_drafter(out, target)

    cases, generations, tensors = [], [], {}
    for index, ids in enumerate(prompts):
        case, arrays = draft_case(target, model, ids, spec.seed * 100 + index)
        cases.append({"name": f"case{index}"} | case)
        tensors |= {f"case{index}.{key}": value for key, value in arrays.items()}
        run = generate(target, model, ids, None, 0.0)
        generations.append({"name": f"generate{index}", "prompt_ids": ids} | run)
    stop = [generations[1]["output"][NUM_GENERATED // 2]]
    run = generate(target, model, prompts[1], stop, 0.0)
    generations.append({"name": "generate_stop", "prompt_ids": prompts[1]} | run)
    if spec.confidence:
        run = generate(target, model, prompts[2], None, 0.5)
        generations.append({"name": "generate_threshold", "prompt_ids": prompts[2]} | run)
    golden = {"target": spec.target, "has_embeddings": spec.stores_embeddings, "cases": cases}
    write_json(out / "golden.json", golden | {"generations": generations})
    write_tensors(out / "golden.safetensors", tensors)
    report(spec, cases, generations, tensors)


def report(spec: DrafterSpec, cases: list[dict], generations: list[dict], tensors: dict[str, torch.Tensor]) -> None:
    """Prints the numbers that say whether the goldens are worth having."""
    worst = min(min(c["draft_margins"]) for c in cases)
    changed = sum(a != b for c in cases for a, b in zip(c["base_argmax"], c["draft_tokens"]))
    conf = [tensors[k].sigmoid() for k in tensors if k.endswith(".confidence_logits")]
    spread = f"{torch.cat(conf).min():.2f}..{torch.cat(conf).max():.2f}" if conf else "none"
    base = torch.cat([tensors[f"{c['name']}.base_logits"] for c in cases])
    bias = torch.cat([tensors.get(f"{c['name']}.logits", tensors[f"{c['name']}.base_logits"]) for c in cases]) - base
    accepted = [g["accepted_draft_lengths"] for g in generations]
    near = min(min(r["target_margins"][: r["num_accepted"] + 1]) for g in generations for r in g["rounds"])
    print(
        f"{spec.name}: accepted {accepted} draft margin {worst:.4f} target margin {near:.4f} changed {changed} "
        f"std base {base.std():.2f} bias {bias.std():.2f} confidence {spread}"
    )
    rounds = [r for g in generations for r in g["rounds"]]
    worst = min([worst, *(min(r["draft_margins"]) for r in rounds)])
    print(f"  smallest draft margin of all rounds {worst:.4f}")
    assert worst >= MIN_DRAFT_MARGIN


def dump(root: Path) -> None:
    for spec in DRAFTERS:
        dump_drafter(spec, root)
