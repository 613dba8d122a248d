//! Target and drafter families, and what they hand to each other.
//!
//! A [`Target`] runs rows through the model, appends their keys and values and leaves logits and [`Features`]. A
//! [`Drafter`] sees the features of the rows that survived ([`Drafter::observe`]) and proposes tokens, a law and
//! confidences ([`Drafter::propose`]); nothing else crosses.
//!
//! One page table serves all caches of a request: slot `s` of the target's cache and of the drafter's belong to position
//! `s`. The anchor (last committed token, position `a`) has not been run through the target: all caches hold the `a`
//! positions before it.

mod checkpoint;
mod config;
mod decoder;
mod drafter_config;
mod dspark;
mod fields;
mod head;
mod head_weights;
mod identity;
mod kv_scales;
mod mtp;
mod pair;
mod random_weights;
mod rope;
pub mod selfcheck;
mod stack;

pub use checkpoint::Checkpoint;
pub use config::{DecoderConfig, GenerationConfig, TargetConfig, TargetFamily};
pub use decoder::DecoderTarget;
pub use drafter_config::{DSparkConfig, DrafterConfig, MtpConfig};
pub use dspark::{DSparkDrafter, Layout};
pub use identity::{drafter_identity, target_identity};
pub use kv_scales::kv_scales;
pub use mtp::MtpDrafter;
pub use pair::{Pair, load_drafter};
pub use stack::Limits;

use crate::error::{Error, Result};
use crate::ops::grammar::row_masks;
use crate::ops::{Constraint, DraftLaw, Drafted, HeadForm, Ops, RowMap, SamplingParams};

/// What a target pass leaves for the drafter, one row for each row of the pass.
pub struct Features<'a, O: Ops> {
    /// `[rows, num_taps * hidden_size]` residual stream after the tapped layers, in the drafter's order; `None` when the
    /// target was loaded without taps.
    pub taps: Option<&'a O::Mat>,
    /// `[rows, hidden_size]` final-normed hidden states.
    pub hidden: &'a O::Mat,
    /// Where each row of the pass stands in both; `None`: in order.
    pub places: Option<&'a [u32]>,
}

impl<O: Ops> Features<'_, O> {
    /// Where the flat rows `index` of the pass stand.
    fn places_of(&self, index: &[u32]) -> Vec<u32> {
        let place = |&row: &u32| self.places.map_or(row, |places| places[row as usize]);
        index.iter().map(place).collect()
    }
}

/// A target model with its own paged cache.
pub trait Target<O: Ops> {
    /// Tokens the model knows.
    fn vocab_size(&self) -> usize;
    /// Positions the model was made for.
    fn max_position(&self) -> usize;
    /// Runs `ids` (one per row of `map`), appends their keys and values, and computes the logits of the flat rows
    /// `logit_rows` (`None`: all).
    fn forward(
        &mut self,
        ops: &mut O,
        ids: &[u32],
        map: &RowMap,
        logit_rows: Option<&[u32]>,
    ) -> Result<()>;
    /// Logits of the last pass, one row per asked row.
    fn logits(&self) -> &O::Logits;
    /// The rows of the last pass, `map`, that stay of its trees ([`Ops::commit_tree`]) become the first rows of their
    /// requests, in the cache and in the features.
    fn keep(&mut self, ops: &mut O, map: &RowMap, kept: &[u64]) -> Result<()>;
    /// Features of all rows of the last pass.
    fn features(&self) -> Features<'_, O>;
}

/// The requests of a propose call, one entry each.
pub struct ProposeBatch<'a> {
    /// Stable slot of the request, `0 .. max_num_reqs`.
    pub slots: &'a [usize],
    /// Last committed token.
    pub anchors: &'a [u32],
    /// One row per request, at the anchor's position (= its cache length).
    pub map: &'a RowMap,
    /// Sampling parameters.
    pub sampling: &'a [SamplingParams],
    /// What the requests may generate: drafts that are not allowed are not worth making. Empty where no request has a
    /// grammar.
    pub constraints: &'a [Option<Constraint<'a>>],
}

impl ProposeBatch<'_> {
    /// The masks of the next step after `steps`, which hold one draft of every request each; `None` where no request has
    /// a grammar.
    fn masks_after(&self, steps: &[Drafted], vocab_size: usize) -> Option<Vec<u32>> {
        let drafts = |r: usize| {
            steps
                .iter()
                .map(|step| step.tokens[r])
                .collect::<Vec<u32>>()
        };
        let drafts: Vec<Vec<u32>> = (0..self.anchors.len()).map(drafts).collect();
        row_masks(self.constraints, |r| &drafts[r], vocab_size)
    }
}

/// A drafter with its own paged cache.
pub trait Drafter<O: Ops> {
    /// The longest draft it can make ("block_size").
    fn max_draft_len(&self) -> usize;
    /// Whether [`Drafted::confidence`] will be there.
    fn has_confidence(&self) -> bool;
    /// Takes in the rows of the target's last pass that are committed: the first `kept[r]` rows of each request of
    /// `map` (the pass's own map). `slots [num_reqs]`; `next_tokens [map.num_rows()]` is the committed token that
    /// follows each row, meaningful for kept rows.
    fn observe(
        &mut self,
        ops: &mut O,
        features: &Features<'_, O>,
        map: &RowMap,
        slots: &[usize],
        kept: &[usize],
        next_tokens: &[u32],
    ) -> Result<()>;
    /// Drafts `draft_len` tokens for each request. Cache pages must reach `draft_len` slots past the anchor.
    fn propose(
        &mut self,
        ops: &mut O,
        batch: &ProposeBatch<'_>,
        draft_len: usize,
    ) -> Result<Drafted>;
    /// Drafts by another form of its head from now on.
    ///
    /// # Errors
    /// A form the drafter does not have.
    fn set_head_form(&mut self, _ops: &mut O, form: HeadForm) -> Result<()> {
        match form {
            HeadForm::Full => Ok(()),
            HeadForm::FullSkip | HeadForm::FullFp8 | HeadForm::Candidates(..) => {
                Err(Error::argument("head_form", "full for this drafter", form))
            }
        }
    }
    /// The law the last proposal was sampled from.
    fn law(&self) -> DraftLaw<'_, O>;
}
