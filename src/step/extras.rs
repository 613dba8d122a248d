//! What sequences bring to acceptance besides their sampling: edits, grammars, stop tokens, log-probabilities.

use super::Sequence;
use crate::ops::grammar::{is_empty, mask_allows, mask_words};
use crate::ops::{AcceptExtras, Constraint, TokenEdits};

/// The extras of a batch, owned as far as they are made for it.
#[derive(Default)]
pub(super) struct Extras<'s> {
    edits: Option<Vec<TokenEdits>>,
    mask: Option<Vec<u32>>,
    stop_tokens: Option<Vec<&'s [u32]>>,
    logprobs: Option<usize>,
}

impl<'s> Extras<'s> {
    /// The extras of `seqs`; `mask` holds the masks of all rows.
    pub fn new(seqs: impl Iterator<Item = &'s Sequence> + Clone, mask: Option<Vec<u32>>) -> Self {
        let edited = |seq: &Sequence| seq.sampling.has_penalties() || !seq.logit_bias.is_empty();
        let stops = |seq: &Sequence| !seq.stop_tokens.is_empty();
        Self {
            edits: (seqs.clone().any(edited)).then(|| seqs.clone().map(Sequence::edits).collect()),
            mask,
            stop_tokens: (seqs.clone().any(stops))
                .then(|| seqs.clone().map(|seq| &*seq.stop_tokens).collect()),
            logprobs: seqs.filter_map(|seq| seq.logprobs).max(),
        }
    }

    /// As acceptance takes them.
    pub fn borrow(&self) -> AcceptExtras<'_> {
        AcceptExtras {
            parents: None,
            edits: self.edits.as_deref(),
            mask: self.mask.as_deref(),
            stop_tokens: self.stop_tokens.as_deref(),
            logprobs: self.logprobs,
        }
    }
}

/// The rows of a request under its grammar: no more than can matter.
pub(super) struct Window {
    /// Drafts that are verified.
    pub verify_len: usize,
    /// The last of them completes the output: nothing may follow it.
    pub completes: bool,
    /// `[1 + verify_len, words]`.
    pub masks: Vec<u32>,
}

impl Window {
    /// Ends `drafts` with the first that the grammar forbids, which is sure to be rejected, or that completes the output.
    /// Neither changes the law: a row behind such a draft is never reached, or what it decides does not belong to the
    /// output. The row right behind it is left open, so that it has a law.
    pub fn new(constraint: Option<Constraint<'_>>, drafts: &[u32], vocab_size: usize) -> Self {
        let mut window = Self {
            verify_len: drafts.len(),
            completes: false,
            masks: Vec::new(),
        };
        let open = vec![u32::MAX; mask_words(vocab_size)];
        let Some(constraint) = constraint else {
            window.masks = open.repeat(1 + drafts.len());
            return window;
        };
        for i in 0..=drafts.len() {
            let mask = constraint.mask_after(&drafts[..i], vocab_size);
            if i > 0 && is_empty(&mask) {
                (window.verify_len, window.completes) = (i, true);
                window.masks.extend(&open);
                break;
            }
            window.masks.extend(&mask);
            if drafts
                .get(i)
                .is_some_and(|&draft| !mask_allows(&mask, draft))
            {
                window.verify_len = i + 1;
                window.masks.extend(&open);
                break;
            }
        }
        window
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Grammar;

    /// `0 1 0 1 ...`, four tokens in all.
    struct Alternating;

    impl Grammar for Alternating {
        fn allow(&self, committed: &[u32], drafts: &[u32], mask: &mut [u32]) {
            let all = [committed, drafts].concat();
            let good = all.iter().enumerate().all(|(i, &t)| t as usize == i % 2);
            if good && all.len() < 4 {
                mask[0] = 1 << (all.len() % 2);
            }
        }
    }

    fn window(committed: &[u32], drafts: &[u32]) -> (usize, bool, Vec<u32>) {
        let grammar = &Alternating;
        let constraint = Constraint { grammar, committed };
        let window = Window::new(Some(constraint), drafts, 3);
        (window.verify_len, window.completes, window.masks)
    }

    const OPEN: u32 = u32::MAX;

    #[test]
    fn windows_end_with_the_first_draft_that_settles_the_rest() {
        assert_eq!(window(&[0], &[]), (0, false, vec![2]));
        assert_eq!(window(&[0], &[1, 0]), (2, false, vec![2, 1, 2]));
        assert_eq!(window(&[0], &[1, 1, 0]), (2, false, vec![2, 1, OPEN]));
        assert_eq!(window(&[0], &[2, 1, 0]), (1, false, vec![2, OPEN]));
        assert_eq!(window(&[0], &[1, 0, 1]), (3, true, vec![2, 1, 2, OPEN]));
        assert_eq!(window(&[0, 1, 0], &[1, 0]), (1, true, vec![2, OPEN]));
        let free = Window::new(None, &[2, 2], 3);
        assert_eq!((free.verify_len, free.completes), (2, false));
        assert_eq!(free.masks, [OPEN; 3]);
    }
}
