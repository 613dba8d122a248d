//! Does a drafter fit its target, and if not, which layout slip does it look like?
//!
//! A checkpoint whose taps, block rows, Markov rows or positions are off by one loads without complaint and drafts tokens
//! that are never accepted. The check lets the target continue a text greedily, drafts at every position of that
//! continuation, and counts how many drafts the target would have accepted: as the checkpoint says, and under each slip.
//!
//! It names a slip only when undoing it clearly helps. In a deep target neighbouring layers are alike: there, taps off by
//! one layer may cost so little that nothing shows. The continuation does not stop at an end token, so keep it short.

use std::fmt;

use super::decoder::DecoderTarget;
use super::dspark::{DSparkDrafter, Layout};
use super::stack::Limits;
use super::{Drafter, ProposeBatch, Target};
use crate::error::{Error, Result};
use crate::ops::{HeadKind, Ops, RowMap, SamplingParams};

/// A known way for a checkpoint to be laid out differently from what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slip {
    /// Every tap one layer before the one named.
    TapsEarlier,
    /// Every tap one layer after the one named.
    TapsLater,
    /// The anchor's row predicts nothing.
    AnchorDrop,
    /// The Markov bias reads the token before the previous one.
    MarkovLag,
    /// Block rows stand one position earlier.
    PositionsEarlier,
    /// Block rows stand one position later.
    PositionsLater,
}

impl Slip {
    const ALL: [Self; 6] = [
        Self::TapsEarlier,
        Self::TapsLater,
        Self::AnchorDrop,
        Self::MarkovLag,
        Self::PositionsEarlier,
        Self::PositionsLater,
    ];

    fn tap_shift(self) -> i32 {
        match self {
            Self::TapsEarlier => -1,
            Self::TapsLater => 1,
            _ => 0,
        }
    }

    fn layout(self) -> Layout {
        Layout {
            position_shift: match self {
                Self::PositionsEarlier => -1,
                Self::PositionsLater => 1,
                _ => 0,
            },
            anchor_drop: self == Self::AnchorDrop,
            markov_lag: self == Self::MarkovLag,
        }
    }
}

impl fmt::Display for Slip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::TapsEarlier => "taps one layer earlier than target_layer_ids say",
            Self::TapsLater => "taps one layer later than target_layer_ids say",
            Self::AnchorDrop => "an anchor row that predicts nothing (anchor-drop)",
            Self::MarkovLag => "Markov rows shifted by one",
            Self::PositionsEarlier => "block positions one too early",
            Self::PositionsLater => "block positions one too late",
        })
    }
}

/// Accepted drafts per block, on average.
#[derive(Clone, Debug, PartialEq)]
pub struct SelfCheck {
    /// As the checkpoint says.
    pub straight: f64,
    /// Under each slip that this pair can have.
    pub slips: Vec<(Slip, f64)>,
}

impl SelfCheck {
    /// The slip the pair looks like: the best one, if it is accepted clearly more than the straight layout.
    pub fn suspect(&self) -> Option<Slip> {
        let best = self.slips.iter().max_by(|a, b| a.1.total_cmp(&b.1))?;
        let clearly = best.1 >= 1.5 * self.straight && best.1 >= self.straight + 0.25;
        clearly.then_some(best.0)
    }
}

/// Continues `prompt` by `num_tokens` greedy tokens of the target and drafts along them. The caches of both must be free.
///
/// # Errors
/// [`Error::Argument`] when the text is empty, does not leave one draft, or does not fit the caches of `limits`.
pub fn self_check<O: Ops>(
    ops: &mut O,
    target: &mut DecoderTarget<O>,
    drafter: &mut DSparkDrafter<O>,
    limits: &Limits,
    prompt: &[u32],
    num_tokens: usize,
) -> Result<SelfCheck> {
    let text = Text::generate(ops, target, limits, prompt, num_tokens)?;
    let tap_ids = drafter.config().target_layer_ids.clone();
    let head = drafter.config().head;
    let straight = text.accepted(ops, target, drafter, limits)?;
    let mut slips = Vec::new();
    for slip in Slip::ALL {
        // The recurrent head has no step by step form to lag.
        if slip == Slip::MarkovLag && !matches!(head, HeadKind::Vanilla | HeadKind::Gated) {
            continue;
        }
        let shifted: Vec<i32> = tap_ids.iter().map(|id| id + slip.tap_shift()).collect();
        if target.set_tap_ids(&shifted).is_err() {
            continue;
        }
        drafter.set_layout(slip.layout());
        let accepted = text.accepted(ops, target, drafter, limits);
        drafter.set_layout(Layout::default());
        target.set_tap_ids(&tap_ids)?;
        slips.push((slip, accepted?));
    }
    Ok(SelfCheck { straight, slips })
}

/// A prompt and the target's greedy continuation, in the first pages of the caches.
struct Text {
    ids: Vec<u32>,
    prompt_len: usize,
    pages: Vec<i32>,
}

impl Text {
    fn generate<O: Ops>(
        ops: &mut O,
        target: &mut DecoderTarget<O>,
        limits: &Limits,
        prompt: &[u32],
        num_tokens: usize,
    ) -> Result<Self> {
        if prompt.is_empty() {
            return Err(Error::argument("prompt", "at least one token", 0));
        }
        if num_tokens < 2 {
            return Err(Error::argument("num_tokens", "at least 2", num_tokens));
        }
        let num_pages = (prompt.len() + num_tokens).div_ceil(limits.page_size);
        if num_pages > limits.num_pages {
            let expected = format!("a text of at most {} pages", limits.num_pages);
            return Err(Error::argument("num_tokens", expected, num_pages));
        }
        let mut text = Self {
            ids: prompt.to_vec(),
            prompt_len: prompt.len(),
            pages: (0..num_pages as i32).collect(),
        };
        let mut done = 0;
        while text.ids.len() < prompt.len() + num_tokens {
            let rows = (text.ids.len() - done).min(limits.max_rows);
            let map = text.rows(done, rows)?;
            let last = [rows as u32 - 1];
            target.forward(ops, &text.ids[done..done + rows], &map, Some(&last))?;
            done += rows;
            if done == text.ids.len() {
                text.ids.push(argmax(&ops.read_logits(target.logits())?));
            }
        }
        Ok(text)
    }

    /// The map of `rows` rows of the text from `first` on.
    fn rows(&self, first: usize, rows: usize) -> Result<RowMap> {
        let mut map = RowMap::new(self.pages.len());
        map.push(rows, first, first, &self.pages)?;
        Ok(map)
    }

    /// Drafts accepted per block, a block standing at each generated token but the last.
    ///
    /// The drafter takes in the whole text once; a block at position `a` is told of `a` cache entries and sees no later one.
    fn accepted<O: Ops>(
        &self,
        ops: &mut O,
        target: &mut DecoderTarget<O>,
        drafter: &mut DSparkDrafter<O>,
        limits: &Limits,
    ) -> Result<f64> {
        let last = self.ids.len() - 1;
        for first in (0..last).step_by(limits.max_rows) {
            let rows = (last - first).min(limits.max_rows);
            let (map, end) = (self.rows(first, rows)?, first + rows);
            target.forward(ops, &self.ids[first..end], &map, Some(&[]))?;
            let (features, next) = (target.features(), &self.ids[first + 1..=end]);
            drafter.observe(ops, &features, &map, &[0], &[rows], next)?;
        }
        let anchors: Vec<usize> = (self.prompt_len..last).collect();
        let mut accepted = 0;
        for batch in anchors.chunks(limits.max_num_reqs) {
            accepted += self.accepted_at(ops, drafter, batch)?;
        }
        Ok(accepted as f64 / anchors.len() as f64)
    }

    /// Drafts accepted in the blocks at the positions `anchors`.
    fn accepted_at<O: Ops>(
        &self,
        ops: &mut O,
        drafter: &mut DSparkDrafter<O>,
        anchors: &[usize],
    ) -> Result<usize> {
        let mut map = RowMap::new(self.pages.len());
        for &a in anchors {
            map.push(1, a, a, &self.pages)?;
        }
        let tokens: Vec<u32> = anchors.iter().map(|&a| self.ids[a]).collect();
        let batch = ProposeBatch {
            slots: &(0..anchors.len()).collect::<Vec<_>>(),
            anchors: &tokens,
            map: &map,
            sampling: &vec![SamplingParams::default(); anchors.len()],
            constraints: &[],
        };
        let draft_len = drafter.max_draft_len();
        let drafted = drafter.propose(ops, &batch, draft_len)?.tokens;
        let accepted = anchors
            .iter()
            .zip(drafted.chunks(draft_len))
            .map(|(&a, drafts)| {
                let text = &self.ids[a + 1..];
                drafts.iter().zip(text).take_while(|(x, y)| x == y).count()
            });
        Ok(accepted.sum())
    }
}

/// The lowest index of the largest number.
fn argmax(row: &[f32]) -> u32 {
    let mut best = 0;
    for (i, x) in row.iter().enumerate() {
        if *x > row[best] {
            best = i;
        }
    }
    best as u32
}
