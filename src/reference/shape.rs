//! What comes before the temperature: penalties, biases and the grammar mask.
//!
//! Each step is one f32 operation, the same on every backend, so that equal logits stay equal:
//!
//! ```text
//! l = l > 0 ? l / repetition : l * repetition    tokens of prompt and output
//! l = l - frequency * count                      tokens of the output
//! l = l - presence
//! l = l + bias
//! l = -inf                                       tokens the mask does not allow
//! ```

use std::borrow::Cow;

use crate::ops::{SamplingParams, TokenEdit, TokenEdits};

/// What shapes one row.
pub(super) struct Shape<'a> {
    pub(super) params: &'a SamplingParams,
    pub(super) edits: Option<&'a TokenEdits>,
    /// Drafts before the row, anchor not included: they count as output.
    pub(super) drafts: &'a [u32],
    /// Words of the row; empty allows everything.
    pub(super) mask: &'a [u32],
}

impl Shape<'_> {
    /// The shaped row; the row itself where nothing changes.
    pub(super) fn apply<'r>(&self, row: &'r [f32]) -> Cow<'r, [f32]> {
        let edits = self.edits.map_or(&[][..], TokenEdits::as_slice);
        let drafts = if self.params.has_penalties() {
            self.drafts
        } else {
            &[]
        };
        if edits.is_empty() && drafts.is_empty() && self.mask.is_empty() {
            return Cow::Borrowed(row);
        }
        let mut shaped = row.to_vec();
        for edit in edits {
            self.edit(&mut shaped, *edit);
        }
        for (i, &token) in drafts.iter().enumerate() {
            let known = edits.iter().any(|edit| edit.token == token);
            if !known && !drafts[..i].contains(&token) {
                let none = TokenEdit {
                    token,
                    count: None,
                    bias: 0.0,
                };
                self.edit(&mut shaped, none);
            }
        }
        if !self.mask.is_empty() {
            for (v, logit) in shaped.iter_mut().enumerate() {
                if self.mask[v / 32] >> (v % 32) & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        Cow::Owned(shaped)
    }

    fn edit(&self, row: &mut [f32], edit: TokenEdit) {
        let drafted = self.drafts.iter().filter(|&&t| t == edit.token).count() as u32;
        let count = match edit.count {
            None if drafted == 0 => None,
            count => Some(count.unwrap_or(0) + drafted),
        };
        let logit = &mut row[edit.token as usize];
        if let Some(count) = count {
            if *logit > 0.0 {
                *logit /= self.params.repetition_penalty;
            } else {
                *logit *= self.params.repetition_penalty;
            }
            if count > 0 {
                *logit -= self.params.frequency_penalty * count as f32;
                *logit -= self.params.presence_penalty;
            }
        }
        *logit += edit.bias;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shaped(
        params: SamplingParams,
        edits: &TokenEdits,
        drafts: &[u32],
        mask: &[u32],
    ) -> Vec<f32> {
        let shape = Shape {
            params: &params,
            edits: Some(edits),
            drafts,
            mask,
        };
        shape.apply(&[2.0, -2.0, 1.0, 0.0, 8.0]).into_owned()
    }

    #[test]
    fn penalties_biases_and_mask_follow_the_formulas() {
        let params = SamplingParams {
            repetition_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            ..SamplingParams::default()
        };
        // Prompt [0, 1], output [1, 1, 2], bias on 3 and twice on 2.
        let edits = TokenEdits::new(&[0, 1], &[1, 1, 2], &[(3, -1.5), (2, 1.0), (2, 1.0)]);
        assert_eq!(
            shaped(params, &edits, &[], &[]),
            [1.0, -5.0, 1.75, -1.5, 8.0]
        );
        // Drafts count as output: 1 a third time, 3 and 4 for the first, 4 twice.
        assert_eq!(
            shaped(params, &edits, &[1, 3, 4, 4], &[]),
            [1.0, -5.25, 1.75, -2.25, 3.0]
        );
        assert_eq!(
            shaped(params, &edits, &[], &[0b10010]),
            [
                f32::NEG_INFINITY,
                -5.0,
                f32::NEG_INFINITY,
                f32::NEG_INFINITY,
                8.0
            ]
        );
    }

    #[test]
    fn without_penalties_the_context_changes_nothing() {
        let edits = TokenEdits::new(&[0, 1], &[4], &[]);
        let params = SamplingParams::default();
        assert_eq!(
            shaped(params, &edits, &[2, 3], &[]),
            [2.0, -2.0, 1.0, 0.0, 8.0]
        );
    }
}
