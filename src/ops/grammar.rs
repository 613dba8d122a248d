//! What a request may generate, as bitmasks over the vocabulary.

/// A grammar over the tokens of one request.
///
/// A mask has bit `v % 32` of word `v / 32` set where token `v` is allowed, `ceil(vocab / 32)` words in all.
/// Implementations that keep the state of a parse do so behind a cell: `committed` only grows, and `drafts` are tried
/// and forgotten.
pub trait Grammar {
    /// Sets in `mask`, which comes all zero, the tokens that may follow `committed` (what was generated so far) and then
    /// `drafts`. Nothing where the output is complete, nor where `drafts` are not allowed themselves.
    fn allow(&self, committed: &[u32], drafts: &[u32], mask: &mut [u32]);
}

impl<F: Fn(&[u32], &[u32], &mut [u32])> Grammar for F {
    fn allow(&self, committed: &[u32], drafts: &[u32], mask: &mut [u32]) {
        self(committed, drafts, mask);
    }
}

/// Words of a mask.
pub fn mask_words(vocab_size: usize) -> usize {
    vocab_size.div_ceil(32)
}

/// Whether `mask` allows `token`.
pub fn mask_allows(mask: &[u32], token: u32) -> bool {
    let word = mask.get(token as usize / 32);
    word.is_some_and(|word| word >> (token % 32) & 1 == 1)
}

/// The grammar of a request and the tokens it has generated.
#[derive(Clone, Copy)]
pub struct Constraint<'a> {
    /// What it may generate.
    pub grammar: &'a dyn Grammar,
    /// What it has generated.
    pub committed: &'a [u32],
}

impl Constraint<'_> {
    /// The tokens that may follow `drafts`.
    pub fn mask_after(&self, drafts: &[u32], vocab_size: usize) -> Vec<u32> {
        let mut mask = vec![0; mask_words(vocab_size)];
        self.grammar.allow(self.committed, drafts, &mut mask);
        clear_past(&mut mask, vocab_size);
        mask
    }

    /// Whether nothing may follow.
    pub fn is_complete(&self, vocab_size: usize) -> bool {
        is_empty(&self.mask_after(&[], vocab_size))
    }
}

/// Whether `mask` allows nothing.
pub fn is_empty(mask: &[u32]) -> bool {
    mask.iter().all(|&word| word == 0)
}

/// A mask of more bits than tokens must not look as if it allowed something.
fn clear_past(mask: &mut [u32], vocab_size: usize) {
    if let (Some(last), bits @ 1..) = (mask.last_mut(), vocab_size % 32) {
        *last &= (1 << bits) - 1;
    }
}

/// The masks of one row of every request, `[num_reqs, words]`, after the drafts that `drafts_of` gives; all ones for a
/// request without a constraint. `None` where no request has one.
pub fn row_masks<'d>(
    constraints: &[Option<Constraint<'_>>],
    drafts_of: impl Fn(usize) -> &'d [u32],
    vocab_size: usize,
) -> Option<Vec<u32>> {
    constraints.iter().any(Option::is_some).then(|| {
        let of = |(r, constraint): (usize, &Option<Constraint<'_>>)| match constraint {
            Some(constraint) => constraint.mask_after(drafts_of(r), vocab_size),
            None => vec![u32::MAX; mask_words(vocab_size)],
        };
        constraints.iter().enumerate().flat_map(of).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Allows everything, and then bits past the vocabulary.
    struct Careless;

    impl Grammar for Careless {
        fn allow(&self, committed: &[u32], drafts: &[u32], mask: &mut [u32]) {
            let last = if committed.len() + drafts.len() < 2 {
                u32::MAX
            } else {
                u32::MAX << 5
            };
            *mask.last_mut().unwrap() = last;
        }
    }

    #[test]
    fn bits_past_the_vocabulary_allow_nothing() {
        let constraint = |committed| Constraint {
            grammar: &Careless,
            committed,
        };
        assert!(!constraint(&[]).is_complete(37));
        assert!(constraint(&[1, 2]).is_complete(37));
        assert!(constraint(&[1]).mask_after(&[2], 37) == [0, 0]);
        assert_eq!(constraint(&[]).mask_after(&[], 37), [0, 0b11111]);
        assert_eq!(constraint(&[]).mask_after(&[], 32), [u32::MAX]);
        assert!(mask_allows(&[0, 2], 33) && !mask_allows(&[0, 2], 32) && !mask_allows(&[1], 32));
    }

    #[test]
    fn requests_without_a_grammar_are_free() {
        let constraint = Constraint {
            grammar: &Careless,
            committed: &[],
        };
        let masks = |constraints: &[Option<Constraint<'_>>]| row_masks(constraints, |_| &[9], 32);
        assert_eq!(masks(&[None, None]), None);
        assert_eq!(masks(&[None, Some(constraint)]), Some(vec![u32::MAX; 2]));
    }
}
