//! Drafters against DeepSpec's own code (DSpark, DFlash) and an independent PyTorch run (MTP) on tiny random checkpoints.

mod model_support;

use dspark::model::{
    DSparkDrafter, DecoderTarget, Drafter, DrafterConfig, MtpDrafter, ProposeBatch, Target,
};
use dspark::ops::{DraftLaw, Drafted, Matrix, Ops, SamplingParams, W2};
use dspark::reference::Reference;
use model_support::*;
use serde_json::Value;

const TOLERANCE: f32 = 1e-3;

/// Request, anchor token and its position.
type Anchor = (usize, u32, usize);

struct Loaded {
    ops: Reference,
    target: DecoderTarget<Reference>,
    drafter: DSparkDrafter<Reference>,
    golden: Golden,
}

fn load(name: &str) -> Loaded {
    let (mut ops, dir) = (reference(), drafter_dir(name));
    let golden = Golden::read(&dir);
    let config = DrafterConfig::read(&dir).unwrap();
    let target = target_dir(golden.json["target"].as_str().unwrap());
    let target = DecoderTarget::load(&mut ops, &target, &limits(), config.tap_ids()).unwrap();
    let drafter = DSparkDrafter::load(&mut ops, &target, &dir, &limits()).unwrap();
    Loaded {
        ops,
        target,
        drafter,
        golden,
    }
}

/// Greedy drafts at the anchors of some requests.
fn propose(
    ops: &mut Reference,
    drafter: &mut dyn Drafter<Reference>,
    requests: &[Anchor],
    draft_len: usize,
) -> Drafted {
    let rows: Vec<_> = requests
        .iter()
        .map(|&(r, _, position)| (r, 1, position))
        .collect();
    let slots: Vec<_> = requests.iter().map(|&(r, ..)| r).collect();
    let anchors: Vec<_> = requests.iter().map(|&(_, anchor, _)| anchor).collect();
    let batch = ProposeBatch {
        slots: &slots,
        anchors: &anchors,
        map: &row_map(&rows),
        sampling: &vec![SamplingParams::default(); requests.len()],
        constraints: &[],
    };
    drafter.propose(ops, &batch, draft_len).unwrap()
}

/// The logits that the drafts were drawn from: base logits and W2 times latents.
fn law(ops: &mut Reference, drafter: &dyn Drafter<Reference>) -> Vec<f32> {
    let DraftLaw::LowRank { base, w2, law } = drafter.law() else {
        panic!("a law of the whole vocabulary");
    };
    let mut logits = ops.read_logits(base).unwrap();
    let Some(W2::Stored(w2)) = w2 else {
        return logits;
    };
    let ids: Vec<u32> = (0..w2.rows() as u32).collect();
    let mut rows = ops.mat(ids.len(), law.rank).unwrap();
    ops.embed(w2, &ids, &mut rows).unwrap();
    let w2 = ops.read_mat(&rows).unwrap();
    let drafts = logits.chunks_exact_mut(ids.len());
    for (row, latent) in drafts.zip(law.latents.chunks_exact(law.rank)) {
        for (logit, w2) in row.iter_mut().zip(w2.chunks_exact(law.rank)) {
            *logit += w2.iter().zip(latent).map(|(w, l)| w * l).sum::<f32>();
        }
    }
    logits
}

fn sigmoid(z: f32) -> f32 {
    1.0 / (1.0 + (-z).exp())
}

/// Prompts, and requests as [`propose`] takes them.
fn cases(golden: &Golden) -> (Vec<Vec<u32>>, Vec<Anchor>) {
    let list = golden.list("cases");
    let prompts: Vec<_> = list.iter().map(|c| ids(&c["prompt_ids"])).collect();
    let anchors = list.iter().enumerate().map(|(r, case)| {
        let number = |key: &str| case[key].as_u64().unwrap();
        (
            r,
            number("anchor_token") as u32,
            number("anchor_position") as usize,
        )
    });
    let anchors = anchors.collect();
    (prompts, anchors)
}

fn observe_all(loaded: &mut Loaded, prompts: &[Vec<u32>]) {
    let Loaded {
        ops,
        target,
        drafter,
        ..
    } = loaded;
    let map = prefill(ops, target, prompts);
    let kept: Vec<_> = prompts.iter().map(Vec::len).collect();
    let next = vec![0; map.num_rows()];
    drafter
        .observe(ops, &target.features(), &map, &[0, 1, 2], &kept, &next)
        .unwrap();
}

#[test]
fn blocks_agree_with_deepspec() {
    for name in DRAFTERS {
        let mut loaded = load(name);
        let (prompts, anchors) = cases(&loaded.golden);
        observe_all(&mut loaded, &prompts);
        let Loaded {
            mut ops,
            mut drafter,
            golden,
            ..
        } = loaded;
        let context = ops.read_mat(drafter.context()).unwrap();
        let expected: Vec<f32> = (0..3)
            .flat_map(|i| golden.tensor(&format!("case{i}.context")).to_vec())
            .collect();
        assert_close(&format!("{name} context"), &context, &expected, TOLERANCE);

        let draft_len = drafter.config().block_size;
        let drafted = propose(&mut ops, &mut drafter, &anchors, draft_len);
        let hidden = ops.read_mat(drafter.hidden()).unwrap();
        let logits = law(&mut ops, &drafter);
        for (i, case) in golden.list("cases").iter().enumerate() {
            let what = format!("{name} case{i}");
            let of_case = |all: &[f32]| all.chunks(all.len() / 3).nth(i).unwrap().to_vec();
            let tokens = &drafted.tokens[i * draft_len..][..draft_len];
            assert_eq!(tokens, ids(&case["draft_tokens"]), "{what}");
            let expected = golden.tensor(&format!("case{i}.hidden"));
            assert_close(
                &format!("{what} hidden"),
                &of_case(&hidden),
                expected,
                TOLERANCE,
            );
            let expected = golden
                .get(&format!("case{i}.logits"))
                .unwrap_or_else(|| golden.tensor(&format!("case{i}.base_logits")));
            assert_close(
                &format!("{what} logits"),
                &of_case(&logits),
                expected,
                TOLERANCE,
            );
            match golden.get(&format!("case{i}.confidence_logits")) {
                None => assert_eq!(drafted.confidence, None, "{what}"),
                Some(z) => {
                    let expected: Vec<f32> = z.iter().map(|&z| sigmoid(z)).collect();
                    let found = of_case(drafted.confidence.as_ref().unwrap());
                    assert_close(&format!("{what} confidence"), &found, &expected, TOLERANCE);
                }
            }
        }
    }
}

/// A shorter draft is the beginning of the long one: the whole block is run all the same.
#[test]
fn short_drafts_are_prefixes() {
    for name in DRAFTERS {
        let mut loaded = load(name);
        let (prompts, anchors) = cases(&loaded.golden);
        observe_all(&mut loaded, &prompts);
        let Loaded {
            mut ops,
            mut drafter,
            golden,
            ..
        } = loaded;
        let drafted = propose(&mut ops, &mut drafter, &anchors, 2);
        let expected: Vec<u32> = golden
            .list("cases")
            .iter()
            .flat_map(|case| ids(&case["draft_tokens"])[..2].to_vec())
            .collect();
        assert_eq!(drafted.tokens, expected, "{name}");
    }
}

/// DeepSpec's evaluator loop, round by round: what was accepted is observed, what was rejected leaves no trace.
#[test]
fn generations_agree_with_deepspec() {
    for name in DRAFTERS {
        let mut loaded = load(name);
        let (prompts, _) = cases(&loaded.golden);
        observe_all(&mut loaded, &prompts);
        let Loaded {
            mut ops,
            mut target,
            mut drafter,
            golden,
        } = loaded;
        for (r, prompt) in prompts.iter().enumerate() {
            let generation = &golden.list("generations")[r];
            assert_eq!(ids(&generation["prompt_ids"]), *prompt);
            for (i, round) in generation["rounds"].as_array().unwrap().iter().enumerate() {
                let what = format!("{name} generation {r} round {i}");
                run_round(&what, &mut ops, &mut target, &mut drafter, r, round);
            }
        }
    }
}

fn run_round(
    what: &str,
    ops: &mut Reference,
    target: &mut DecoderTarget<Reference>,
    drafter: &mut DSparkDrafter<Reference>,
    r: usize,
    round: &Value,
) {
    let anchor = round["anchor_token"].as_u64().unwrap() as u32;
    let position = round["anchor_position"].as_u64().unwrap() as usize;
    let expected = ids(&round["draft_tokens"]);
    let drafted = propose(ops, drafter, &[(r, anchor, position)], expected.len());
    assert_eq!(drafted.tokens, expected, "{what}");
    if let Some(z) = round["confidence_logits"].as_array() {
        let z = z.iter().map(|z| sigmoid(z.as_f64().unwrap() as f32));
        let found = drafted.confidence.unwrap();
        assert_close(what, &found, &z.collect::<Vec<_>>(), TOLERANCE);
    }
    let rows = [vec![anchor], drafted.tokens].concat();
    let map = row_map(&[(r, rows.len(), position)]);
    target.forward(ops, &rows, &map, None).unwrap();
    let best: Vec<u32> = logits(ops, target).iter().map(|row| argmax(row)).collect();
    let accepted = rows[1..]
        .iter()
        .zip(&best)
        .take_while(|(x, p)| x == p)
        .count();
    assert_eq!(
        accepted as u64,
        round["num_accepted"].as_u64().unwrap(),
        "{what}"
    );
    assert_eq!(best[..=accepted], ids(&round["committed"]), "{what}");
    drafter
        .observe(ops, &target.features(), &map, &[r], &[accepted + 1], &best)
        .unwrap();
}

fn load_mtp() -> (
    Reference,
    DecoderTarget<Reference>,
    MtpDrafter<Reference>,
    Golden,
) {
    let (mut ops, dir) = (reference(), drafter_dir("qwen3_mtp"));
    let target = target_dir("qwen3_bf16");
    let target = DecoderTarget::load(&mut ops, &target, &limits(), &[]).unwrap();
    let drafter = MtpDrafter::load(&mut ops, &target, &dir, &limits()).unwrap();
    (ops, target, drafter, Golden::read(&dir))
}

#[test]
fn mtp_agrees_with_pytorch() {
    let (mut ops, mut target, mut drafter, golden) = load_mtp();
    let list = golden.list("cases");
    let prompts: Vec<_> = list.iter().map(|c| ids(&c["prompt_ids"])).collect();
    let next: Vec<_> = list.iter().map(|c| ids(&c["next_ids"])).collect();
    let map = prefill(&mut ops, &mut target, &prompts);
    let kept: Vec<_> = prompts.iter().map(Vec::len).collect();
    let features = target.features();
    // Slots in another order than requests.
    drafter
        .observe(&mut ops, &features, &map, &[2, 0, 1], &kept, &next.concat())
        .unwrap();
    let hidden = ops.read_mat(drafter.hidden()).unwrap();
    let expected: Vec<f32> = (0..3)
        .flat_map(|i| golden.tensor(&format!("case{i}.hidden")).to_vec())
        .collect();
    assert_close("hidden", &hidden, &expected, TOLERANCE);

    let anchors: Vec<u32> = next.iter().map(|ids| *ids.last().unwrap()).collect();
    let rows: Vec<_> = kept.iter().enumerate().map(|(r, &n)| (r, 1, n)).collect();
    let batch = ProposeBatch {
        slots: &[2, 0, 1],
        anchors: &anchors,
        map: &row_map(&rows),
        sampling: &[SamplingParams::default(); 3],
        constraints: &[],
    };
    let drafted = drafter.propose(&mut ops, &batch, 1).unwrap();
    let logits = law(&mut ops, &drafter);
    for (i, case) in list.iter().enumerate() {
        let best = *ids(&case["argmax"]).last().unwrap();
        assert_eq!(drafted.tokens[i], best, "case{i}");
        let vocab = target.vocab_size();
        let expected = golden.tensor(&format!("case{i}.logits"));
        let expected = &expected[expected.len() - vocab..];
        assert_close(
            &format!("case{i} logits"),
            &logits[i * vocab..][..vocab],
            expected,
            TOLERANCE,
        );
    }
}

/// A chain starts with the single draft, leaves nothing behind, and its law has a row for every draft.
#[test]
fn mtp_chains_are_provisional() {
    let (mut ops, mut target, mut drafter, golden) = load_mtp();
    let case = &golden.list("cases")[2];
    let (prompt, next) = (ids(&case["prompt_ids"]), ids(&case["next_ids"]));
    let best = *ids(&case["argmax"]).last().unwrap();
    let map = row_map(&[(0, prompt.len(), 0)]);
    target.forward(&mut ops, &prompt, &map, None).unwrap();
    let features = target.features();
    let half = prompt.len() / 2;
    drafter
        .observe(&mut ops, &features, &map, &[1], &[half], &next)
        .unwrap();
    let chain = |ops: &mut Reference, drafter: &mut MtpDrafter<Reference>, rows, len| {
        let batch = ProposeBatch {
            slots: &[1],
            anchors: &[next[rows - 1]],
            map: &row_map(&[(0, 1, rows)]),
            sampling: &[SamplingParams::default()],
            constraints: &[],
        };
        drafter.propose(ops, &batch, len).unwrap().tokens
    };
    chain(&mut ops, &mut drafter, half, 5);

    let (rest, n) = (prompt.len() - half, prompt.len());
    let map = row_map(&[(0, rest, half)]);
    target
        .forward(&mut ops, &prompt[half..], &map, None)
        .unwrap();
    let features = target.features();
    drafter
        .observe(&mut ops, &features, &map, &[1], &[rest], &next[half..])
        .unwrap();
    let long = chain(&mut ops, &mut drafter, n, 4);
    assert_eq!(long[0], best);
    let rows = law(&mut ops, &drafter);
    for (token, row) in long.iter().zip(rows.chunks(target.vocab_size())) {
        assert_eq!(*token, argmax(row));
    }
    assert_eq!(chain(&mut ops, &mut drafter, n, 4), long);
    assert_eq!(chain(&mut ops, &mut drafter, n, 1), [best]);
}
