//! Exact laws of acceptance: every rule, chains and trees, on random and on hard pairs of laws. Whatever is drafted, the
//! committed tokens, continued by the target alone, have the target's law.

use super::laws::sampling;
use super::*;
use crate::ops::{AcceptExtras, Purpose, Rule, SparseLaw, TokenEdits};
use crate::reference::choices::{Choices, Draw, Philox, enumerate};

const EXACT: f64 = 1e-11;
const VOCAB: usize = 4;
const INF: f32 = f32::INFINITY;

/// Logits after a prefix, which starts with the anchor.
type Logits<'a> = dyn Fn(&[u32]) -> Vec<f32> + 'a;

/// In which form the draft law is handed on.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Form {
    Dense,
    Sparse,
    /// Drafts are the argmax of q.
    Point,
}

/// What a round depends on.
struct World<'a> {
    target: &'a Logits<'a>,
    draft: &'a Logits<'a>,
    form: Form,
    params: SamplingParams,
    /// Row that each draft follows.
    parents: Vec<u32>,
    /// Drafts that are verified; the others were drafted in vain.
    verify_len: usize,
    /// Negative controls.
    slip: Slip,
    edits: Option<TokenEdits>,
    /// Token that ends the run.
    stop: Option<u32>,
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Slip {
    None,
    /// Acceptance sees the neighbouring row of q.
    DraftRow,
    /// The rows behind the last draft hold q.
    Bonus,
    /// The number of verified drafts depends on the last of them.
    Peek,
}

const ANCHOR: u32 = 1;

impl<'a> World<'a> {
    fn chain(target: &'a Logits<'a>, draft: &'a Logits<'a>, rule: Rule, len: usize) -> Self {
        Self {
            target,
            draft,
            form: Form::Dense,
            params: SamplingParams {
                rule,
                ..sampling(1.0)
            },
            parents: (0..len as u32).collect(),
            verify_len: len,
            slip: Slip::None,
            edits: None,
            stop: None,
        }
    }

    fn prefix(&self, tokens: &[u32], mut row: usize) -> Vec<u32> {
        let mut prefix = Vec::new();
        while row > 0 {
            prefix.push(tokens[row - 1]);
            row = self.parents[row - 1] as usize;
        }
        prefix.push(ANCHOR);
        prefix.reverse();
        prefix
    }

    fn depth(&self) -> usize {
        let rows = 0..=self.parents.len();
        let dummy = vec![0; self.parents.len()];
        rows.map(|row| self.prefix(&dummy, row).len())
            .max()
            .unwrap()
    }

    /// One round: the committed tokens.
    fn round(&self, choices: &mut (impl Choices + Clone + 'static)) -> Vec<u32> {
        let num_drafts = self.parents.len();
        let (mut tokens, mut draft_rows) = (Vec::new(), Vec::new());
        for k in 0..num_drafts {
            let prefix = self.prefix(&tokens, self.parents[k] as usize);
            let logits = (self.draft)(&prefix);
            let draw = Draw {
                seed: self.params.seed,
                position: prefix.len() as u32,
                purpose: self.params.rule.draft_purpose(),
                ordinal: 0,
            };
            tokens.push(match self.form {
                Form::Point => law::argmax(&logits),
                _ => choices.categorical(draw, &law::softmax(&logits, self.params.temperature)),
            } as u32);
            draft_rows.push(logits);
        }
        let verify_len = match self.slip {
            Slip::Peek => self.verify_len - usize::from(tokens[self.verify_len - 1] == 0),
            _ => self.verify_len,
        };
        let mut rows: Vec<Vec<f32>> = (0..=verify_len)
            .map(|row| (self.target)(&self.prefix(&tokens, row)))
            .collect();
        match self.slip {
            Slip::DraftRow => draft_rows.rotate_left(1),
            Slip::Bonus => rows[verify_len] = (self.draft)(&self.prefix(&tokens, verify_len)),
            Slip::None | Slip::Peek => {}
        }
        let mut ops = Reference::new(Some(1))
            .unwrap()
            .with_choices(Box::new(choices.clone()));
        let target = mat(&mut ops, VOCAB, &rows.concat());
        let draft = mat(&mut ops, VOCAB, &draft_rows.concat());
        // The candidates of a sparse law in an order of their own.
        let order = [2, 0, 3, 1];
        let sparse = SparseLaw {
            num_candidates: VOCAB,
            tokens: order.repeat(num_drafts),
            logits: draft_rows
                .iter()
                .flat_map(|row| order.map(|v| row[v as usize]))
                .collect(),
        };
        let stop: Vec<u32> = self.stop.into_iter().collect();
        let accepted = ops
            .accept(&AcceptBatch {
                target: &target,
                qo_indptr: &[0, 1 + verify_len as i32],
                draft_tokens: &tokens,
                draft_len: num_drafts,
                law: match self.form {
                    Form::Dense => DraftLaw::Logits(&draft),
                    Form::Sparse => DraftLaw::Sparse(&sparse),
                    Form::Point => DraftLaw::PointMass,
                },
                anchor_positions: &[0],
                sampling: &[self.params],
                extras: AcceptExtras {
                    parents: Some(&self.parents),
                    edits: self.edits.as_ref().map(std::slice::from_ref),
                    stop_tokens: Some(&[&stop]),
                    ..AcceptExtras::default()
                },
            })
            .unwrap();
        let kept = accepted
            .flags
            .iter()
            .zip(&tokens)
            .filter(|(kept, _)| **kept);
        let mut committed: Vec<u32> = kept.map(|(_, &token)| token).collect();
        assert_eq!(committed.len(), accepted.num_accepted[0] as usize);
        committed.push(accepted.next_tokens[0]);
        committed
    }

    fn outcomes(&self) -> Vec<(f64, Vec<u32>)> {
        enumerate(|choices| self.round(&mut choices.clone()))
    }

    /// The target's law after a prefix, edits written out by hand.
    fn law(&self, prefix: &[u32]) -> Vec<f64> {
        let mut logits = (self.target)(prefix);
        if self.edits.is_some() {
            for (v, logit) in logits.iter_mut().enumerate() {
                let count = prefix.iter().filter(|&&t| t as usize == v).count() as f32;
                if count > 0.0 {
                    *logit -= self.params.frequency_penalty * count;
                    *logit -= self.params.presence_penalty;
                }
            }
        }
        if self.params.temperature == 0.0 {
            return law::point_mass(law::argmax(&logits), VOCAB);
        }
        law::target_law(&logits, &self.params)
    }

    /// The largest difference of a sequence's probability from the target's.
    fn error(&self) -> f64 {
        let outcomes = self.outcomes();
        let total: f64 = outcomes.iter().map(|(p, _)| p).sum();
        assert!((total - 1.0).abs() < EXACT, "{total}");
        let horizon = self.depth();
        let mut worst = 0.0_f64;
        for code in 0..VOCAB.pow(horizon as u32) {
            let mut sequence = vec![ANCHOR];
            sequence.extend((0..horizon).map(|k| (code / VOCAB.pow(k as u32) % VOCAB) as u32));
            let probs: Vec<f64> = (1..=horizon)
                .map(|k| self.law(&sequence[..k])[sequence[k] as usize])
                .collect();
            let of_outcome = |(p, committed): &(f64, Vec<u32>)| {
                if sequence[1..].starts_with(committed) {
                    p * probs[committed.len()..].iter().product::<f64>()
                } else {
                    0.0
                }
            };
            let found: f64 = outcomes.iter().map(of_outcome).sum();
            worst = worst.max((found - probs.iter().product::<f64>()).abs());
        }
        worst
    }

    /// The mean number of accepted drafts.
    fn mean_accepted(&self) -> f64 {
        let outcomes = self.outcomes();
        let lens = outcomes.iter().map(|(p, c)| p * (c.len() - 1) as f64);
        lens.sum()
    }
}

fn hash(prefix: &[u32], salt: u32) -> u32 {
    prefix
        .iter()
        .fold(salt, |hash, &t| hash.wrapping_mul(31) + t + 1)
}

fn random(salt: u32, spread: f32) -> impl Fn(&[u32]) -> Vec<f32> {
    move |prefix| {
        let row = noise(hash(prefix, salt), VOCAB);
        row.iter().map(|l| spread * l).collect()
    }
}

/// Pairs of rows (target, draft) at which rules go wrong.
fn hard_pairs() -> Vec<(&'static str, [f32; VOCAB], [f32; VOCAB])> {
    let tiny = 1e-12_f32.ln();
    vec![
        ("equal", [0.3, -1.0, 0.5, 0.0], [0.3, -1.0, 0.5, 0.0]),
        ("q 0", [0.0, 1.0, 2.0, 0.5], [0.0, -INF, 1.0, 0.3]),
        ("p 0", [0.0, -INF, 2.0, 0.5], [0.0, 1.5, 1.0, 0.3]),
        ("p one-hot", [-INF, 1.0, -INF, -INF], [0.1, 0.2, 0.3, 0.4]),
        ("q one-hot", [0.1, 0.2, 0.3, 0.4], [-INF, 1.0, -INF, -INF]),
        (
            "both one-hot",
            [-INF, 1.0, -INF, -INF],
            [-INF, 1.0, -INF, -INF],
        ),
        ("disjoint", [0.0, 1.0, -INF, -INF], [-INF, -INF, 0.5, 0.0]),
        (
            "one-hot apart",
            [0.0, -INF, -INF, -INF],
            [-INF, -INF, -INF, 0.0],
        ),
        (
            "residual 1e-12",
            [0.0, 1.0, tiny, -INF],
            [0.0, 1.0, -INF, -INF],
        ),
        (
            "draft mass 1e-12",
            [0.0, 1.0, -INF, -INF],
            [0.0, 1.0, tiny, -INF],
        ),
        ("ties", [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]),
        ("flat", [0.0; VOCAB], [0.0; VOCAB]),
    ]
}

const RULES: [Rule; 3] = [Rule::Token, Rule::Block, Rule::Coupled];

#[test]
fn chains_have_the_targets_law() {
    for rule in RULES {
        for salt in 0..4 {
            for form in [Form::Dense, Form::Sparse, Form::Point] {
                for (len, verify_len) in [(1, 1), (2, 2), (3, 3), (3, 1), (2, 0)] {
                    let (target, draft) = (random(salt, 2.5), random(salt + 50, 2.0));
                    let mut world = World::chain(&target, &draft, rule, len);
                    (world.form, world.verify_len) = (form, verify_len);
                    let error = world.error();
                    assert!(
                        error < EXACT,
                        "{rule} {form:?} {len} {verify_len}: {error:e}"
                    );
                }
            }
        }
    }
}

#[test]
fn hard_pairs_have_the_targets_law_in_every_order() {
    let pairs = hard_pairs();
    for rule in RULES {
        for (name, p, q) in &pairs {
            for (next, p2, q2) in &pairs {
                for form in [Form::Dense, Form::Sparse] {
                    let target = |prefix: &[u32]| if prefix.len() == 1 { *p } else { *p2 }.to_vec();
                    let draft = |prefix: &[u32]| if prefix.len() == 1 { *q } else { *q2 }.to_vec();
                    let mut world = World::chain(&target, &draft, rule, 2);
                    world.form = form;
                    let error = world.error();
                    assert!(error < EXACT, "{rule} {form:?} {name}, {next}: {error:e}");
                }
            }
        }
    }
}

#[test]
fn filters_and_temperatures_keep_the_law_under_every_rule() {
    for rule in RULES {
        for (temperature, top_k, top_p, min_p) in [
            (0.7, 0, 1.0, 0.0),
            (1.0, 2, 1.0, 0.0),
            (0.7, 0, 0.8, 0.0),
            (1.3, 3, 0.9, 0.2),
            (0.0, 0, 1.0, 0.0),
        ] {
            let (target, draft) = (random(7, 2.0), random(8, 2.0));
            let mut world = World::chain(&target, &draft, rule, 2);
            world.params = SamplingParams {
                temperature,
                top_k,
                top_p,
                min_p,
                ..world.params
            };
            world.form = if temperature == 0.0 {
                Form::Point
            } else {
                Form::Dense
            };
            let error = world.error();
            assert!(error < EXACT, "{:?}: {error:e}", world.params);
        }
    }
}

#[test]
fn trees_have_the_targets_law() {
    let shapes: [&[u32]; 5] = [
        &[0, 0],
        &[0, 0, 0],
        &[0, 0, 1, 2],
        &[0, 1, 0, 1, 3],
        &[0, 1, 1, 0, 4],
    ];
    for rule in [Rule::Token, Rule::Coupled] {
        for parents in shapes {
            for form in [Form::Dense, Form::Sparse] {
                let (target, draft) = (random(3, 2.0), random(4, 1.5));
                let mut world = World::chain(&target, &draft, rule, parents.len());
                (world.parents, world.form) = (parents.to_vec(), form);
                let error = world.error();
                assert!(error < EXACT, "{rule} {parents:?} {form:?}: {error:e}");
            }
        }
        for (name, p, q) in &hard_pairs() {
            let (target, draft) = (|_: &[u32]| p.to_vec(), |_: &[u32]| q.to_vec());
            let mut world = World::chain(&target, &draft, rule, 3);
            world.parents = vec![0, 0, 1];
            let error = world.error();
            assert!(error < EXACT, "{rule} {name}: {error:e}");
        }
    }
}

#[test]
fn greedy_trees_follow_the_argmax() {
    let (target, draft) = (random(3, 2.0), random(4, 1.5));
    let mut world = World::chain(&target, &draft, Rule::Token, 5);
    world.parents = vec![0, 1, 0, 1, 3];
    world.params.temperature = 1.0;
    let sampled = world.mean_accepted();
    assert!(sampled > 0.0);
    let greedy = SamplingParams::default();
    let mut ops = ops();
    let one_hot = |token: usize| (0..VOCAB).map(move |v| if v == token { 1.0 } else { 0.0 });
    // The anchor's row says 2: the second child (row 3); that says 0: its child (row 5), which says 3.
    let rows: Vec<f32> = [2, 0, 0, 0, 0, 3].into_iter().flat_map(one_hot).collect();
    let target = mat(&mut ops, VOCAB, &rows);
    let accepted = ops
        .accept(&AcceptBatch {
            target: &target,
            qo_indptr: &[0, 6],
            draft_tokens: &[1, 0, 2, 3, 0],
            draft_len: 5,
            law: DraftLaw::PointMass,
            anchor_positions: &[0],
            sampling: &[greedy],
            extras: AcceptExtras {
                parents: Some(&[0, 1, 0, 1, 3]),
                ..AcceptExtras::default()
            },
        })
        .unwrap();
    assert_eq!(accepted.flags, [false, false, true, false, true]);
    assert_eq!((accepted.num_accepted[0], accepted.next_tokens[0]), (2, 3));
}

/// Row laws that do not depend on the prefix: the token rule keeps `sum over k of prod over i <= k of (1 - TV_i)`.
#[test]
fn the_token_rule_keeps_what_total_variation_says() {
    for salt in 0..20 {
        let target = |prefix: &[u32]| noise(salt * 10 + prefix.len() as u32, VOCAB);
        let draft = |prefix: &[u32]| noise(salt * 10 + 5 + prefix.len() as u32, VOCAB);
        let world = World::chain(&target, &draft, Rule::Token, 3);
        let (mut kept, mut mean) = (1.0, 0.0);
        for k in 1..=3 {
            let prefix = vec![0; k];
            let (p, q) = (
                law::softmax(&target(&prefix), 1.0),
                law::softmax(&draft(&prefix), 1.0),
            );
            kept *= p.iter().zip(&q).map(|(p, q)| p.min(*q)).sum::<f64>();
            mean += kept;
        }
        assert!((world.mean_accepted() - mean).abs() < EXACT);
    }
}

#[test]
fn the_block_rule_is_never_shorter_than_the_token_rule() {
    let mut longer = 0;
    for salt in 0..40 {
        let (target, draft) = (random(salt, 2.0), random(salt + 100, 2.0));
        for len in 1..=3 {
            let mean = |rule| World::chain(&target, &draft, rule, len).mean_accepted();
            let (token, block) = (mean(Rule::Token), mean(Rule::Block));
            assert!(
                block > token - EXACT,
                "salt {salt} len {len}: {block} {token}"
            );
            assert!(len > 1 || (block - token).abs() < EXACT);
            longer += u32::from(block > token + 1e-3);
        }
    }
    assert!(longer > 40, "the block rule was hardly ever longer");
    for (name, p, q) in &hard_pairs() {
        let (target, draft) = (|_: &[u32]| p.to_vec(), |_: &[u32]| q.to_vec());
        let mean = |rule| World::chain(&target, &draft, rule, 3).mean_accepted();
        let (token, block) = (mean(Rule::Token), mean(Rule::Block));
        assert!(block > token - EXACT, "{name}: {block} {token}");
    }
}

/// The example of the paper's introduction: V = 2, p = (1/3, 2/3), q = (2/3, 1/3), two drafts: 10/9 accepted by the token
/// rule, 11/9 by the block rule.
#[test]
fn the_papers_example() {
    let target = |_: &[u32]| vec![(1.0_f32 / 3.0).ln(), (2.0_f32 / 3.0).ln(), -INF, -INF];
    let draft = |_: &[u32]| vec![(2.0_f32 / 3.0).ln(), (1.0_f32 / 3.0).ln(), -INF, -INF];
    let mean = |rule| World::chain(&target, &draft, rule, 2).mean_accepted();
    assert!((mean(Rule::Token) - 10.0 / 9.0).abs() < 1e-6);
    assert!((mean(Rule::Block) - 11.0 / 9.0).abs() < 1e-6);
}

#[test]
fn broken_rules_are_caught() {
    let (target, draft) = (random(1, 2.0), random(2, 2.0));
    for rule in [Rule::Token, Rule::Block] {
        for slip in [Slip::DraftRow, Slip::Bonus, Slip::Peek] {
            let mut world = World::chain(&target, &draft, rule, 2);
            world.slip = slip;
            let error = world.error();
            assert!(error > 1e-3, "{rule} {slip:?}: {error:e}");
        }
    }
    // The coupled rule needs no q and may be peeked at.
    for (slip, harmless) in [
        (Slip::DraftRow, true),
        (Slip::Peek, true),
        (Slip::Bonus, false),
    ] {
        let mut world = World::chain(&target, &draft, Rule::Coupled, 2);
        world.slip = slip;
        let error = world.error();
        assert_eq!(error < EXACT, harmless, "{slip:?}: {error:e}");
    }
}

#[test]
fn penalties_see_the_drafts_before_a_row() {
    let (target, draft) = (random(11, 2.0), random(12, 2.0));
    for rule in RULES {
        let mut world = World::chain(&target, &draft, rule, 2);
        world.params.presence_penalty = 0.4;
        world.params.frequency_penalty = 0.9;
        world.edits = Some(TokenEdits::new(&[], &[ANCHOR], &[]));
        let error = world.error();
        assert!(error < EXACT, "{rule}: {error:e}");
    }
}

/// Cut at the first stop token, the output has the law of the target's output cut there.
#[test]
fn stop_tokens_end_the_run() {
    let (target, draft) = (random(5, 2.0), random(6, 2.0));
    for rule in RULES {
        let mut world = World::chain(&target, &draft, rule, 3);
        world.stop = Some(2);
        let mut laws = [0.0_f64; 2];
        for (p, committed) in world.outcomes() {
            let stop = committed.iter().position(|&t| t == 2);
            assert!(stop.is_none_or(|at| at + 1 == committed.len()));
            laws[0] += p * f64::from(u8::from(committed[0] == 2));
            laws[1] += p * f64::from(u8::from(committed.len() == 2 && committed[1] == 2));
        }
        assert!((laws[0] - world.law(&[ANCHOR])[2]).abs() < EXACT);
        assert!(laws[1] > 0.0);
        // What is not cut is committed as without stop tokens.
        let error = world.error();
        assert!(error < EXACT, "{rule}: {error:e}");
    }
}

/// With the real noise, shared between drafts and target: the output is the one of plain decoding.
#[test]
fn the_coupled_rule_says_what_plain_decoding_says() {
    let (target, draft) = (random(5, 3.0), random(5, 2.5));
    let mut kept = 0;
    for seed in 0..300 {
        let mut plain = vec![ANCHOR];
        for position in 1..=4 {
            let draw = Draw {
                seed,
                position,
                purpose: Purpose::Bonus,
                ordinal: 0,
            };
            plain.push(Philox.categorical(draw, &law::softmax(&target(&plain), 1.0)) as u32);
        }
        for parents in [vec![], vec![0], vec![0, 1, 2], vec![0, 0, 1, 1]] {
            let mut world = World::chain(&target, &draft, Rule::Coupled, parents.len());
            (world.params.seed, world.parents) = (seed, parents);
            let committed = world.round(&mut Philox.clone());
            assert_eq!(committed, plain[1..=committed.len()]);
            kept += committed.len() - 1;
        }
    }
    assert!(kept > 900, "shared noise should agree more often: {kept}");
}
