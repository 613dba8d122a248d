//! The rows of a verify pass: of each request its anchor, the drafts that are verified, and second choices beside them.
//!
//! The drafts are a chain, the *trunk*. Beside each of its first tokens may stand an *alternate*: what the drafter would have
//! drafted there next. It is tried where the trunk's token is turned down, and nothing follows it, so that at most one is
//! accepted, as the last draft of its round. Any choice is lossless as long as it depends on nothing but the drafts: the
//! token rule tries it against what the trunk's token left of the target's law, as a point mass; greedy and coupled
//! acceptance ask only whether it is the target's token.

use super::{Proposal, Sequence};
use crate::ops::{RowMap, Rule, SparseLaw};

/// Drafts of a batch, laid out for acceptance: `width` columns for each request, the trunk first, then the alternates.
pub(super) struct Drafts {
    /// Columns.
    pub width: usize,
    /// `[num_reqs * width]`.
    pub tokens: Vec<u32>,
    /// `[num_reqs]` drafts of the trunk that are verified.
    pub trunk_lens: Vec<usize>,
    /// `[num_reqs]`: the place on the trunk that each alternate is for.
    pub places: Vec<Vec<usize>>,
}

impl Drafts {
    /// The trunk alone.
    pub fn chains(proposal: &Proposal, trunk_lens: Vec<usize>) -> Self {
        Self {
            width: proposal.draft_len,
            tokens: proposal.tokens.clone(),
            places: vec![Vec::new(); trunk_lens.len()],
            trunk_lens,
        }
    }

    /// The trunk with alternates where there is one (of `[num_reqs * draft_len]`) and `room[r]` leaves space for it.
    pub fn with_alternates(
        proposal: &Proposal,
        trunk_lens: Vec<usize>,
        alternates: &[Option<u32>],
        room: &[usize],
    ) -> Self {
        let mut places = Vec::with_capacity(trunk_lens.len());
        for (r, &len) in trunk_lens.iter().enumerate() {
            let of_request = &alternates[r * proposal.draft_len..][..len];
            let there = of_request.iter().enumerate();
            let there = there.filter(|(_, alternate)| alternate.is_some());
            let first = there.map(|(place, _)| place).take(room[r]);
            places.push(first.collect::<Vec<usize>>());
        }
        let lens = trunk_lens.iter().zip(&places);
        let width = lens.map(|(len, places)| len + places.len()).max();
        let width = width.unwrap_or(0);
        let mut tokens = vec![0; trunk_lens.len() * width];
        for (r, row) in tokens.chunks_exact_mut(width.max(1)).enumerate() {
            let len = trunk_lens[r];
            row[..len].copy_from_slice(&proposal.tokens_of(r)[..len]);
            for (token, &place) in row[len..].iter_mut().zip(&places[r]) {
                *token = alternates[r * proposal.draft_len + place].unwrap_or(0);
            }
        }
        Self {
            width,
            tokens,
            trunk_lens,
            places,
        }
    }

    /// Drafts of request `r` that are verified.
    pub fn of(&self, r: usize) -> &[u32] {
        &self.tokens[r * self.width..][..self.len(r)]
    }

    /// How many these are.
    pub fn len(&self, r: usize) -> usize {
        self.trunk_lens[r] + self.places[r].len()
    }

    /// Whether draft k of a request stands where it does in `proposal`.
    pub fn is_laid_out_as(&self, proposal: &Proposal) -> bool {
        self.width == proposal.draft_len && !self.has_alternates()
    }

    pub fn has_alternates(&self) -> bool {
        self.places.iter().any(|places| !places.is_empty())
    }

    /// The row of its request that each draft follows; `None` for chains.
    pub fn parents(&self) -> Option<Vec<u32>> {
        self.has_alternates().then(|| {
            let mut parents = Vec::with_capacity(self.tokens.len());
            for (r, places) in self.places.iter().enumerate() {
                let trunk = 0..self.trunk_lens[r];
                let all = trunk.chain(places.iter().copied());
                parents.extend(all.map(|place| place as u32));
                parents.resize((r + 1) * self.width, 0);
            }
            parents
        })
    }

    /// Makes the trunk's map (from [`super::row_map`] over all rows) the tree's.
    pub fn make_tree(&self, map: &mut RowMap) {
        if !self.has_alternates() {
            return;
        }
        let mut masks = vec![0; map.num_rows()];
        for (r, places) in self.places.iter().enumerate() {
            let rows = map.rows_of(r);
            let trunk = 1 + self.trunk_lens[r];
            for i in 0..rows.len() {
                // Row i of the trunk has i ancestors, and an alternate as many as the token in whose place it stands.
                let ancestors = if i < trunk { i } else { 1 + places[i - trunk] };
                masks[rows.start + i] = (1_u64 << ancestors) - 1;
                map.positions[rows.start + i] = map.seq_lens[r] + ancestors as i32;
            }
        }
        map.tree = Some(masks);
    }

    /// `law`, of `[num_reqs * draft_len]` drafts, for these; an alternate has none, which is a point mass.
    pub fn law(&self, law: &SparseLaw, draft_len: usize) -> SparseLaw {
        let n = law.num_candidates;
        let num_pairs = self.tokens.len() * n;
        let mut laid_out = SparseLaw {
            num_candidates: n,
            tokens: vec![SparseLaw::NO_PAIR; num_pairs],
            logits: vec![f32::NEG_INFINITY; num_pairs],
        };
        for (r, &len) in self.trunk_lens.iter().enumerate() {
            let (from, to) = (r * draft_len * n, r * self.width * n);
            laid_out.tokens[to..][..len * n].copy_from_slice(&law.tokens[from..][..len * n]);
            laid_out.logits[to..][..len * n].copy_from_slice(&law.logits[from..][..len * n]);
        }
        laid_out
    }

    /// What acceptance kept of request `r`: drafts of the trunk, and the place of an alternate after them.
    pub fn kept(&self, r: usize, flags: &[bool]) -> (usize, Option<usize>) {
        let flags = &flags[r * self.width..][..self.len(r)];
        let (trunk, alternates) = flags.split_at(self.trunk_lens[r]);
        let on_trunk = trunk.iter().filter(|&&kept| kept).count();
        (on_trunk, alternates.iter().position(|&kept| kept))
    }
}

/// Whether a request may have alternates: not under a grammar, whose windows are chains, nor under the block rule.
pub(super) fn takes_alternates(seq: &Sequence) -> bool {
    let chains_only = seq.sampling.rule == Rule::Block && seq.sampling.temperature > 0.0;
    seq.grammar.is_none() && !chains_only
}

/// The likeliest pair of each draft's law beside the draft.
pub(super) fn second_choices(law: &SparseLaw, drafts: &[u32]) -> Vec<Option<u32>> {
    let n = law.num_candidates.max(1);
    let rows = law.tokens.chunks_exact(n).zip(law.logits.chunks_exact(n));
    rows.zip(drafts)
        .map(|((tokens, logits), draft)| {
            let pairs = tokens.iter().zip(logits);
            let others =
                pairs.filter(|(token, logit)| *token != draft && **logit > f32::NEG_INFINITY);
            let best = others.max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(a.0)));
            best.map(|(token, _)| *token)
        })
        .collect()
}

/// Space for alternates in each request's reserved pages and in the model's context, beside its trunk.
pub(super) fn room(
    seqs: &[&mut Sequence],
    trunk_lens: &[usize],
    most: usize,
    max_position: usize,
) -> Vec<usize> {
    let of = |(seq, len): (&&mut Sequence, &usize)| {
        let slots = seq.pages.capacity().min(max_position);
        let free = slots.saturating_sub(seq.seq_len() + 1 + len);
        if takes_alternates(seq) {
            free.min(most)
        } else {
            0
        }
    };
    seqs.iter().zip(trunk_lens).map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proposal() -> Proposal {
        Proposal {
            draft_len: 3,
            tokens: vec![10, 11, 12, 20, 21, 22],
            num_drafted: 2,
            confidence: None,
        }
    }

    fn drafts() -> Drafts {
        let alternates = [Some(15), None, Some(17), Some(25), Some(26), Some(27)];
        Drafts::with_alternates(&proposal(), vec![3, 2], &alternates, &[2, 1])
    }

    #[test]
    fn alternates_stand_behind_the_trunk_as_far_as_there_is_room() {
        let drafts = drafts();
        assert_eq!(
            (drafts.of(0), drafts.of(1)),
            (&[10, 11, 12, 15, 17][..], &[20, 21, 25][..])
        );
        assert_eq!(drafts.parents().unwrap(), [0, 1, 2, 0, 2, 0, 1, 0, 0, 0]);
        let chains = Drafts::chains(&proposal(), vec![3, 0]);
        assert!(chains.parents().is_none() && chains.len(1) == 0);
        let none = Drafts::with_alternates(&proposal(), vec![1, 0], &[None; 6], &[3, 3]);
        assert!(!none.has_alternates() && none.of(0) == [10]);
    }

    #[test]
    fn rows_see_their_ancestors_alone() {
        let drafts = drafts();
        let mut map = RowMap::new(1);
        map.push(6, 4, 4, &[0]).unwrap();
        map.push(4, 9, 9, &[1]).unwrap();
        drafts.make_tree(&mut map);
        assert_eq!(map.positions, [4, 5, 6, 7, 5, 7, 9, 10, 11, 10]);
        let masks = [0, 1, 3, 7, 1, 7, 0, 1, 3, 1];
        assert_eq!(map.tree.unwrap(), masks);
    }

    #[test]
    fn laws_and_flags_find_their_drafts() {
        let drafts = drafts();
        let law = SparseLaw {
            num_candidates: 1,
            tokens: vec![10, 11, 12, 20, 21, 22],
            logits: vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
        };
        let laid_out = drafts.law(&law, 3);
        let none = SparseLaw::NO_PAIR;
        assert_eq!(
            laid_out.tokens,
            [10, 11, 12, none, none, 20, 21, none, none, none]
        );
        assert_eq!(laid_out.logits[6], 4.0);
        let flags = [
            true, true, false, false, true, true, false, false, false, false,
        ];
        assert_eq!(drafts.kept(0, &flags), (2, Some(1)));
        assert_eq!(drafts.kept(1, &flags), (1, None));
    }

    #[test]
    fn second_choices_are_the_likeliest_others() {
        let law = SparseLaw {
            num_candidates: 3,
            tokens: vec![4, 2, 9, 7, SparseLaw::NO_PAIR, SparseLaw::NO_PAIR],
            logits: vec![1.0, 3.0, 3.0, 0.5, f32::NEG_INFINITY, f32::NEG_INFINITY],
        };
        assert_eq!(second_choices(&law, &[4, 7]), [Some(2), None]);
        assert_eq!(second_choices(&law, &[2, 1]), [Some(9), Some(7)]);
    }
}
