//! A target and a drafter whose laws are known exactly: functions of the token history, which both read back from
//! paged caches of their own. A wrong page, slot, position, kept row or anchor changes the history and so the law.
//!
//! The drafter gives base logits and hidden rows only; sampling, Markov bias and confidence are the backend's own head.

// Every test binary uses another part of this module.
#![allow(dead_code, unused_imports)]

mod harness;
mod laws;

pub use harness::*;
pub use laws::*;

use std::collections::HashMap;

use dspark::Result;
use dspark::model::{Drafter, Features, ProposeBatch, Target};
use dspark::ops::grammar::row_masks;
use dspark::ops::{
    ConfidenceHead, DraftBatch, DraftHead, DraftLaw, Drafted, Dtype, HeadForm, HeadKind,
    HostTensor, LowRankLaw, Ops, RowMap, SparseLaw,
};
use dspark::reference::Reference;

type Mat = <Reference as Ops>::Mat;
type Logits = <Reference as Ops>::Logits;

/// Sizes that target, drafter and engine share.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub vocab_size: usize,
    pub max_position: usize,
    pub max_rows: usize,
    pub num_pages: usize,
    pub page_size: usize,
}

impl Sizes {
    pub fn new(vocab_size: usize) -> Self {
        Self {
            vocab_size,
            max_position: 64,
            max_rows: 64,
            num_pages: 64,
            page_size: 3,
        }
    }
}

/// Paged token ids: what attention would see.
struct TokenCache {
    tokens: Vec<u32>,
    page_size: usize,
}

impl TokenCache {
    fn new(sizes: &Sizes) -> Self {
        Self {
            tokens: vec![u32::MAX; sizes.num_pages * sizes.page_size],
            page_size: sizes.page_size,
        }
    }

    fn index(&self, map: &RowMap, r: usize, slot: usize) -> usize {
        let page = map.page_table[r * map.max_pages_per_req + slot / self.page_size];
        assert!(page >= 0, "slot {slot} of request {r} has no page");
        page as usize * self.page_size + slot % self.page_size
    }

    fn write(&mut self, map: &RowMap, r: usize, slot: usize, token: u32) {
        let index = self.index(map, r, slot);
        self.tokens[index] = token;
    }

    fn history(&self, map: &RowMap, r: usize, len: usize) -> Vec<u32> {
        (0..len)
            .map(|slot| self.tokens[self.index(map, r, slot)])
            .collect()
    }
}

/// A target with logits `law(history)`; its hidden rows are the token ids.
pub struct FakeTarget {
    sizes: Sizes,
    law: LogitsOf,
    /// Negative control: the last row of a window of more than one row has these logits instead.
    bonus_from: Option<LogitsOf>,
    cache: TokenCache,
    logits: Logits,
    hidden: Mat,
}

impl FakeTarget {
    pub fn new(ops: &mut Reference, sizes: Sizes, law: LogitsOf) -> Self {
        Self {
            sizes,
            law,
            bonus_from: None,
            cache: TokenCache::new(&sizes),
            logits: ops.logits(sizes.max_rows, sizes.vocab_size).unwrap(),
            hidden: ops.mat(sizes.max_rows, 1).unwrap(),
        }
    }

    pub fn with_bonus_from(mut self, law: LogitsOf) -> Self {
        self.bonus_from = Some(law);
        self
    }
}

impl Target<Reference> for FakeTarget {
    fn vocab_size(&self) -> usize {
        self.sizes.vocab_size
    }

    fn max_position(&self) -> usize {
        self.sizes.max_position
    }

    fn forward(
        &mut self,
        ops: &mut Reference,
        ids: &[u32],
        map: &RowMap,
        logit_rows: Option<&[u32]>,
    ) -> Result<()> {
        assert_eq!(ids.len(), map.num_rows());
        let mut rows = Vec::new();
        for r in 0..map.num_reqs() {
            let window = map.rows_of(r);
            for (i, row) in window.clone().enumerate() {
                let committed = map.seq_lens[r] as usize;
                let slot = committed + i;
                assert!(slot < self.sizes.max_position, "past the context");
                self.cache.write(map, r, slot, ids[row]);
                let history = match &map.tree {
                    None => self.cache.history(map, r, slot + 1),
                    Some(masks) => {
                        let seen = (0..=i).filter(|j| (masks[row] | 1 << i) >> j & 1 == 1);
                        let own = seen.map(|j| ids[window.start + j]);
                        let before = self.cache.history(map, r, committed);
                        before.into_iter().chain(own).collect()
                    }
                };
                assert_eq!(map.positions[row] as usize + 1, history.len());
                rows.push(match &self.bonus_from {
                    Some(law) if i > 0 && i + 1 == window.len() => law(&history),
                    _ => (self.law)(&history),
                });
            }
        }
        let asked: Vec<f32> = match logit_rows {
            None => rows.concat(),
            Some(asked) => asked
                .iter()
                .flat_map(|&i| rows[i as usize].clone())
                .collect(),
        };
        ops.write_logits(&asked, &mut self.logits)?;
        let hidden: Vec<f32> = ids.iter().map(|&id| id as f32).collect();
        ops.write_mat(&hidden, &mut self.hidden)
    }

    fn logits(&self) -> &Logits {
        &self.logits
    }

    fn keep(&mut self, ops: &mut Reference, map: &RowMap, kept: &[u64]) -> Result<()> {
        let hidden = ops.read_mat(&self.hidden)?;
        let sources = map.gathered(kept).into_iter();
        let hidden: Vec<f32> = sources.map(|row| hidden[row as usize]).collect();
        for r in 0..map.num_reqs() {
            for (to, row) in map.rows_of(r).enumerate() {
                let slot = map.seq_lens[r] as usize + to;
                self.cache.write(map, r, slot, hidden[row] as u32);
            }
        }
        ops.write_mat(&hidden, &mut self.hidden)
    }

    fn features(&self) -> Features<'_, Reference> {
        Features {
            taps: None,
            hidden: &self.hidden,
            places: None,
        }
    }
}

/// What a fake drafter drafts.
#[derive(Clone)]
pub struct DraftSpec {
    /// Base logits of draft k (from 0) after history and anchor; the k-th of `draft_len` calls gets `[.., 100 + k]`.
    pub base: LogitsOf,
    /// `[vocab, vocab]`: bias of output token v after token x at `v * vocab + x`.
    pub markov: Vec<f32>,
    /// Logit of the confidence of draft k, from history and anchor and 100 + k.
    pub confidence: Option<ConfidenceSpec>,
    /// Negative control: hands on the law of the neighbouring row.
    pub shift_law: bool,
    /// How the head drafts.
    pub form: HeadForm,
    pub max_draft_len: usize,
}

/// Logit of a confidence: `base(history.., 100 + k)[0] + previous[x_{k-1}]`.
#[derive(Clone)]
pub struct ConfidenceSpec {
    pub base: LogitsOf,
    pub previous: Vec<f32>,
}

impl DraftSpec {
    /// Laws unlike the target's; confidences of any size that depend on the token before.
    pub fn random(vocab_size: usize, salt: u64, max_draft_len: usize) -> Self {
        let table = |salt: u64, n: usize, spread: f32| -> Vec<f32> {
            (0..n)
                .map(|i| spread * noise(salt, &[], i as u64))
                .collect()
        };
        Self {
            base: random_logits(vocab_size, salt, 1.0),
            markov: table(salt + 1, vocab_size * vocab_size, 1.0),
            confidence: Some(ConfidenceSpec {
                base: random_logits(1, salt + 2, 2.0),
                previous: table(salt + 3, vocab_size, 3.0),
            }),
            shift_law: false,
            form: HeadForm::Full,
            max_draft_len,
        }
    }

    /// `[vocab, num_bigram]`: the tokens that each biases most, and as the last of several none.
    fn bigrams(&self, num_bigram: usize) -> Vec<u32> {
        let vocab_size = self.markov.len().isqrt();
        let mut table = Vec::new();
        for x in 0..vocab_size {
            let bias = |v: u32| self.markov[v as usize * vocab_size + x];
            let mut tokens: Vec<u32> = (0..vocab_size as u32).collect();
            tokens.sort_by(|&a, &b| bias(b).total_cmp(&bias(a)));
            tokens.truncate(num_bigram);
            if num_bigram > 1 {
                tokens[num_bigram - 1] = SparseLaw::NO_PAIR;
            }
            table.extend(tokens);
        }
        table
    }
}

/// A drafter after a [`DraftSpec`], which checks what it is shown.
pub struct FakeDrafter {
    sizes: Sizes,
    spec: DraftSpec,
    head: DraftHead<Reference>,
    cache: TokenCache,
    /// The committed token after the last observed row of each slot.
    expected_anchor: HashMap<usize, (usize, u32)>,
    logits: Logits,
    hidden: Mat,
    sparse: Option<SparseLaw>,
    low_rank: LowRankLaw,
}

impl FakeDrafter {
    pub fn new(ops: &mut Reference, sizes: Sizes, spec: DraftSpec) -> Self {
        let v = sizes.vocab_size;
        let identity: Vec<f32> = (0..v * v)
            .map(|i| f32::from(u8::from(i / v == i % v)))
            .collect();
        let w2 = weight(ops, &spec.markov, v);
        let copy = ops.quantize(&w2).unwrap();
        let num_bigram = match spec.form {
            HeadForm::Candidates(_, n) if n > 0 => Some(n),
            _ => None,
        };
        let head = DraftHead {
            kind: HeadKind::Vanilla,
            rank: v,
            markov_w1: Some(weight(ops, &identity, v)),
            markov_w2: Some(w2),
            row_bounds: None,
            w2_fp8: (spec.form == HeadForm::FullFp8).then_some(copy),
            bigrams: num_bigram.map(|n| ops.token_table(&spec.bigrams(n), n).unwrap()),
            proj_weight: None,
            proj_bias: None,
            confidence: spec.confidence.as_ref().map(|confidence| ConfidenceHead {
                weight: weight(ops, &[&[1.0], &confidence.previous[..]].concat(), v + 1),
                bias: 0.0,
                with_markov: true,
            }),
        };
        Self {
            head,
            cache: TokenCache::new(&sizes),
            expected_anchor: HashMap::new(),
            logits: ops.logits(sizes.max_rows, v).unwrap(),
            hidden: ops.mat(sizes.max_rows, 1).unwrap(),
            sparse: None,
            low_rank: LowRankLaw::default(),
            sizes,
            spec,
        }
    }
}

fn weight(ops: &mut Reference, values: &[f32], cols: usize) -> <Reference as Ops>::Weight {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    ops.weight(&[HostTensor {
        name: "fake".into(),
        dtype: Dtype::F32,
        shape: vec![values.len() / cols, cols],
        bytes: &bytes,
    }])
    .unwrap()
}

impl Drafter<Reference> for FakeDrafter {
    fn max_draft_len(&self) -> usize {
        self.spec.max_draft_len
    }

    fn has_confidence(&self) -> bool {
        self.spec.confidence.is_some()
    }

    fn observe(
        &mut self,
        ops: &mut Reference,
        features: &Features<'_, Reference>,
        map: &RowMap,
        slots: &[usize],
        kept: &[usize],
        next_tokens: &[u32],
    ) -> Result<()> {
        let hidden = ops.read_mat(features.hidden)?;
        let tokens: Vec<u32> = match features.places {
            None => hidden.iter().map(|&t| t as u32).collect(),
            Some(places) => places.iter().map(|&p| hidden[p as usize] as u32).collect(),
        };
        assert_eq!(
            (tokens.len(), next_tokens.len()),
            (map.num_rows(), map.num_rows())
        );
        for (r, &slot) in slots.iter().enumerate() {
            let rows = map.rows_of(r);
            let seq_len = map.seq_lens[r] as usize;
            if seq_len == 0 {
                self.expected_anchor.remove(&slot);
            }
            for (i, row) in rows.take(kept[r]).enumerate() {
                if let Some(expected) = self.expected_anchor.get(&slot) {
                    assert_eq!(
                        *expected,
                        (seq_len + i, tokens[row]),
                        "next_tokens of slot {slot}"
                    );
                }
                self.cache.write(map, r, seq_len + i, tokens[row]);
                self.expected_anchor
                    .insert(slot, (seq_len + i + 1, next_tokens[row]));
            }
        }
        Ok(())
    }

    fn propose(
        &mut self,
        ops: &mut Reference,
        batch: &ProposeBatch<'_>,
        draft_len: usize,
    ) -> Result<Drafted> {
        let (mut base, mut hidden) = (Vec::new(), Vec::new());
        for r in 0..batch.slots.len() {
            let position = batch.map.seq_lens[r] as usize;
            assert_eq!(batch.map.positions[r] as usize, position);
            assert_eq!(
                self.expected_anchor.get(&batch.slots[r]),
                Some(&(position, batch.anchors[r]))
            );
            // The contract: pages reach `draft_len` slots past the anchor.
            self.cache.index(batch.map, r, position + draft_len);
            let mut history = self.cache.history(batch.map, r, position);
            history.push(batch.anchors[r]);
            for k in 0..draft_len {
                history.push(100 + k as u32);
                base.extend((self.spec.base)(&history));
                let z = self.spec.confidence.as_ref().map(|c| (c.base)(&history)[0]);
                hidden.push(z.unwrap_or(0.0));
                history.pop();
            }
        }
        ops.write_logits(&base, &mut self.logits)?;
        ops.write_mat(&hidden, &mut self.hidden)?;
        let positions: Vec<u32> = batch.map.positions.iter().map(|&p| p as u32).collect();
        // The masks of the first drafts are known before the walk, those of the others are left open.
        let first = row_masks(batch.constraints, |_| &[], self.sizes.vocab_size);
        let mask: Option<Vec<u32>> = first.map(|first| {
            let rows = first.chunks(first.len() / batch.anchors.len());
            let open = |row: &[u32]| vec![u32::MAX; row.len() * (draft_len - 1)];
            rows.flat_map(|row| [row.to_vec(), open(row)].concat())
                .collect()
        });
        let walk = DraftBatch {
            anchors: batch.anchors,
            anchor_positions: &positions,
            sampling: batch.sampling,
            draft_len,
            mask: mask.as_deref(),
        };
        match self.spec.form {
            HeadForm::Candidates(num_top, _) => {
                let (drafted, mut law) =
                    ops.draft_candidates(&self.head, &self.logits, &self.hidden, &walk, num_top)?;
                if self.spec.shift_law {
                    law.tokens.rotate_left(law.num_candidates);
                    law.logits.rotate_left(law.num_candidates);
                }
                self.sparse = Some(law);
                Ok(drafted)
            }
            HeadForm::Full | HeadForm::FullSkip | HeadForm::FullFp8 => {
                let (drafted, mut law) =
                    ops.draft_full(&self.head, &self.logits, &self.hidden, &walk)?;
                if self.spec.shift_law {
                    law.latents.rotate_left(law.rank);
                    law.log_normalizers.rotate_left(1);
                }
                self.low_rank = law;
                Ok(drafted)
            }
        }
    }

    fn law(&self) -> DraftLaw<'_, Reference> {
        match &self.sparse {
            Some(law) => DraftLaw::Sparse(law),
            None => DraftLaw::LowRank {
                base: &self.logits,
                w2: self.head.w2(),
                law: &self.low_rank,
            },
        }
    }
}
