//! Acceptance on the GPU: every rule, draft law and extra against the plain Rust backend.
#![cfg(feature = "cuda")]

mod common;

use common::{Rng, gpu, logits, reference};
use dspark::ops::{
    AcceptBatch, AcceptExtras, Accepted, DraftLaw, Ops, Rule, SamplingParams, SparseLaw, TokenEdits,
};
use dspark::reference::philox::token_exponential;

/// The draft law of a batch, in either form.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Form {
    Point,
    Dense,
    Sparse,
}

/// Requests with everything on somewhere.
struct Batch {
    vocab_size: usize,
    draft_len: usize,
    form: Form,
    qo_indptr: Vec<i32>,
    target: Vec<f32>,
    draft: Vec<f32>,
    sparse: SparseLaw,
    tokens: Vec<u32>,
    parents: Option<Vec<u32>>,
    positions: Vec<u32>,
    sampling: Vec<SamplingParams>,
    edits: Vec<TokenEdits>,
    mask: Vec<u32>,
    stops: Vec<Vec<u32>>,
    shaped: bool,
}

const CANDIDATES: usize = 6;

impl Batch {
    fn new(num_reqs: usize, vocab_size: usize, form: Form, tree: bool, shaped: bool) -> Self {
        let draft_len = 5;
        let seed = (num_reqs * vocab_size) as u64 + 7 * form as u64 + 100 * u64::from(tree);
        let mut rng = Rng::new(seed);
        let num_drafts = num_reqs * draft_len;
        let mut batch = Self {
            vocab_size,
            draft_len,
            form,
            qo_indptr: vec![0],
            target: Vec::new(),
            draft: rng.normals(num_drafts * vocab_size, 2.0),
            sparse: SparseLaw {
                num_candidates: CANDIDATES,
                ..SparseLaw::default()
            },
            tokens: Vec::new(),
            parents: tree.then(|| {
                (0..num_drafts)
                    .map(|i| rng.below(i % 5 + 1) as u32)
                    .collect()
            }),
            positions: (0..num_reqs).map(|_| rng.below(3000) as u32).collect(),
            // Without filters anywhere the coupled rule races in the read of the logits.
            sampling: (0..num_reqs)
                .map(|r| Self::params(r, tree, shaped, vocab_size != 1031))
                .collect(),
            edits: Vec::new(),
            mask: Vec::new(),
            stops: (0..num_reqs).map(|r| vec![1; r % 2]).collect(),
            shaped,
        };
        for r in 0..num_reqs {
            let rows = [draft_len + 1, 1, 3, draft_len + 1, 0][r % 5];
            batch.qo_indptr.push(batch.qo_indptr[r] + rows as i32);
            batch.draw_drafts(&mut rng, r);
            batch.push_rows(&mut rng, r, rows);
            let some: Vec<u32> = (0..8).map(|_| rng.below(vocab_size) as u32).collect();
            batch
                .edits
                .push(TokenEdits::new(&some[..3], &some[2..6], &[(some[7], -1.5)]));
        }
        batch
    }

    fn params(r: usize, tree: bool, shaped: bool, filtered: bool) -> SamplingParams {
        let rules = [Rule::Token, Rule::Coupled, Rule::Block];
        let filters = [(0, 1.0, 0.0), (9, 1.0, 0.0), (0, 0.9, 0.0), (20, 0.8, 0.02)];
        let (top_k, top_p, min_p) = filters[if filtered { r / 3 % 4 } else { 0 }];
        SamplingParams {
            temperature: [1.0, 0.7, 0.0, 1.3][r % 4],
            top_k,
            top_p,
            min_p,
            seed: 0xABCD_0000 + 97 * r as u64,
            rule: rules[r % if tree { 2 } else { 3 }],
            repetition_penalty: if shaped { 1.2 } else { 1.0 },
            presence_penalty: if shaped { 0.3 } else { 0.0 },
            frequency_penalty: if shaped { 0.2 } else { 0.0 },
        }
    }

    /// Drafts with the request's own noise, from the law that is handed on.
    fn draw_drafts(&mut self, rng: &mut Rng, r: usize) {
        for k in 0..self.draft_len {
            let index = r * self.draft_len + k;
            let first = rng.below(self.vocab_size);
            let step = 1 + rng.below(self.vocab_size / CANDIDATES);
            let candidates: Vec<usize> = (0..CANDIDATES)
                .map(|i| (first + i * step) % self.vocab_size)
                .collect();
            let row = &self.draft[index * self.vocab_size..][..self.vocab_size];
            self.sparse
                .tokens
                .extend(candidates.iter().map(|&v| v as u32));
            self.sparse
                .logits
                .extend(candidates.iter().map(|&v| row[v]));
            let all: Vec<usize> = match self.form {
                Form::Sparse => candidates,
                Form::Point | Form::Dense => (0..self.vocab_size).collect(),
            };
            let params = &self.sampling[r];
            let purpose = params.rule.draft_purpose() as u32;
            let position = self.positions[r] + 1 + k as u32;
            let score = |v: usize| {
                let e = token_exponential(params.seed, position, purpose, v);
                f64::from(row[v]) - f64::from(params.temperature) * e.ln()
            };
            let best = all.iter().max_by(|&&a, &&b| score(a).total_cmp(&score(b)));
            self.tokens.push(*best.unwrap() as u32);
        }
    }

    fn push_rows(&mut self, rng: &mut Rng, r: usize, rows: usize) {
        for k in 0..rows {
            for v in 0..self.vocab_size {
                let base = if k < self.draft_len {
                    self.draft[(r * self.draft_len + k) * self.vocab_size + v]
                } else {
                    0.0
                };
                let logit = base + 0.5 * rng.normal();
                self.target
                    .push(if r % 4 == 3 { logit.round() } else { logit });
            }
            let words = self.vocab_size.div_ceil(32);
            self.mask.extend((0..words).map(|_| !(1 << rng.below(32))));
        }
    }

    fn run<O: Ops>(&self, ops: &mut O) -> Accepted {
        let target = logits(ops, self.vocab_size, &self.target);
        let draft = logits(ops, self.vocab_size, &self.draft);
        let stops: Vec<&[u32]> = self.stops.iter().map(Vec::as_slice).collect();
        ops.accept(&AcceptBatch {
            target: &target,
            qo_indptr: &self.qo_indptr,
            draft_tokens: &self.tokens,
            draft_len: self.draft_len,
            law: match self.form {
                Form::Point => DraftLaw::PointMass,
                Form::Dense => DraftLaw::Logits(&draft),
                Form::Sparse => DraftLaw::Sparse(&self.sparse),
            },
            anchor_positions: &self.positions,
            sampling: &self.sampling,
            extras: AcceptExtras {
                parents: self.parents.as_deref(),
                edits: self.shaped.then_some(&self.edits[..]),
                mask: self.shaped.then_some(&self.mask[..]),
                stop_tokens: Some(&stops),
                logprobs: Some(3),
            },
        })
        .unwrap()
    }
}

/// Requests decided differently.
fn mismatches(got: &Accepted, want: &Accepted, draft_len: usize) -> Vec<usize> {
    let flags = |a: &Accepted, r: usize| a.flags[r * draft_len..][..draft_len].to_vec();
    (0..want.next_tokens.len())
        .filter(|&r| got.next_tokens[r] != want.next_tokens[r] || flags(got, r) != flags(want, r))
        .collect()
}

#[test]
fn every_rule_law_and_extra_decides_as_the_reference_does() {
    let Some(mut cuda) = gpu() else { return };
    let (mut requests, mut off) = (0, 0);
    for (num_reqs, vocab_size) in [(120, 37), (60, 1031), (20, 5003)] {
        for form in [Form::Point, Form::Dense, Form::Sparse] {
            for (tree, shaped) in [(false, false), (false, true), (true, false), (true, true)] {
                let batch = Batch::new(num_reqs, vocab_size, form, tree, shaped);
                let got = batch.run(&mut cuda);
                let want = batch.run(&mut reference());
                let differ = mismatches(&got, &want, batch.draft_len);
                for &r in &differ {
                    println!(
                        "vocab {vocab_size} {form:?} tree {tree} {:?}",
                        batch.sampling[r]
                    );
                }
                for r in (0..num_reqs).filter(|r| !differ.contains(r)) {
                    let pairs = got.logprobs[r].iter().zip(&want.logprobs[r]);
                    assert_eq!(got.logprobs[r].len(), want.logprobs[r].len());
                    for (got, want) in pairs {
                        let close = |a: f32, b: f32| (a - b).abs() < 1e-4 * (1.0 + b.abs());
                        assert!(close(got.logprob, want.logprob), "{got:?} {want:?}");
                        assert_eq!(got.top.len(), want.top.len());
                        for (got, want) in got.top.iter().zip(&want.top) {
                            assert!(got.0 == want.0 && close(got.1, want.1), "{got:?} {want:?}");
                        }
                    }
                }
                requests += num_reqs;
                off += differ.len();
            }
        }
    }
    // f32 laws against f64: about one decision in 10^5 is too close to call.
    assert!(off <= 2, "{off} of {requests} requests decided differently");
}

#[test]
fn a_request_is_decided_the_same_alone_and_in_company() {
    let Some(mut cuda) = gpu() else { return };
    let batch = Batch::new(40, 5003, Form::Dense, false, false);
    let all = batch.run(&mut cuda);
    for r in 0..40 {
        let rows = batch.qo_indptr[r] as usize..batch.qo_indptr[r + 1] as usize;
        let drafts = r * 5..(r + 1) * 5;
        let target = logits(
            &mut cuda,
            5003,
            &batch.target[rows.start * 5003..rows.end * 5003],
        );
        let draft = &batch.draft[drafts.start * 5003..drafts.end * 5003];
        let draft = logits(&mut cuda, 5003, draft);
        let alone = cuda
            .accept(&AcceptBatch {
                target: &target,
                qo_indptr: &[0, rows.len() as i32],
                draft_tokens: &batch.tokens[drafts.clone()],
                draft_len: 5,
                law: DraftLaw::Logits(&draft),
                anchor_positions: &batch.positions[r..=r],
                sampling: &batch.sampling[r..=r],
                extras: AcceptExtras {
                    stop_tokens: Some(&[&batch.stops[r]]),
                    logprobs: Some(3),
                    ..AcceptExtras::default()
                },
            })
            .unwrap();
        assert_eq!(alone.next_tokens[0], all.next_tokens[r]);
        assert_eq!(alone.flags, all.flags[drafts]);
        assert_eq!(alone.logprobs[0], all.logprobs[r]);
    }
}
