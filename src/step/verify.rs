//! The second half of a round: verify and commit.

use std::borrow::Cow;
use std::time::Instant;

use super::extras::{Extras, Window};
use super::rows::{self, Drafts};
use super::{DecodeStep, Proposal, Round, Sequence, anchors, check_context, row_map, sampling};
use crate::error::{Error, Result};
use crate::ops::{
    AcceptBatch, AcceptExtras, Accepted, DraftLaw, MAX_TREE_ROWS, Matrix, Ops, RowMap,
    TokenLogprobs,
};
use crate::schedule::Graded;

/// What a verify pass decided; the sequences' tables hold all its rows until [`DecodeStep::commit`].
#[derive(Debug)]
pub struct Verified {
    /// The pass.
    pub map: RowMap,
    /// `[num_reqs]`.
    pub runs: Vec<Run>,
}

/// What was decided about one request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Run {
    /// Drafts accepted.
    pub num_accepted: usize,
    /// Drafts verified, alternates not counted.
    pub verify_len: usize,
    /// An alternate accepted after them, and its row in its request.
    pub alternate: Option<(u32, usize)>,
    /// The recovered or bonus token; `None` where the last accepted draft ended the output.
    pub next_token: Option<u32>,
    /// Of the accepted drafts and the next token; empty unless a request of the batch asked for them.
    pub logprobs: Vec<TokenLogprobs>,
}

impl Run {
    /// Which rows stay: the anchor's, those of the accepted drafts, and that of an alternate, a bit each.
    fn kept_rows(&self) -> u64 {
        let trunk = u64::MAX >> (MAX_TREE_ROWS - 1 - self.num_accepted);
        self.alternate.map_or(trunk, |(_, row)| trunk | 1 << row)
    }
}

/// How far the drafts of a batch are verified, and how the grammars bound them.
struct Ends {
    /// `[num_reqs]`.
    verify_lens: Vec<usize>,
    /// `[num_reqs]` whether the last verified draft completes the output.
    completes: Vec<bool>,
    /// `[num_rows, words]`; `None` without grammars.
    masks: Option<Vec<u32>>,
}

impl Ends {
    fn new(
        seqs: &[&mut Sequence],
        proposal: &Proposal,
        verify_lens: &[usize],
        vocab_size: usize,
    ) -> Self {
        if seqs.iter().all(|seq| seq.grammar.is_none()) {
            return Self {
                verify_lens: verify_lens.to_vec(),
                completes: vec![false; seqs.len()],
                masks: None,
            };
        }
        let windows = seqs
            .iter()
            .zip(verify_lens)
            .enumerate()
            .map(|(r, (seq, &len))| {
                Window::new(seq.constraint(), &proposal.tokens_of(r)[..len], vocab_size)
            });
        let windows: Vec<Window> = windows.collect();
        Self {
            verify_lens: windows.iter().map(|window| window.verify_len).collect(),
            completes: windows.iter().map(|window| window.completes).collect(),
            masks: Some(
                windows
                    .into_iter()
                    .flat_map(|window| window.masks)
                    .collect(),
            ),
        }
    }

    /// What acceptance decided, without what follows a draft that ends the output.
    fn runs(&self, seqs: &[&mut Sequence], drafts: &Drafts, accepted: Accepted) -> Vec<Run> {
        let mut logprobs = accepted.logprobs.into_iter();
        let run = |r: usize| {
            let next = accepted.next_tokens[r];
            let (num_accepted, alternate) = drafts.kept(r, &accepted.flags);
            let trunk_len = drafts.trunk_lens[r];
            let (trunk, beside) = drafts.of(r).split_at(trunk_len);
            let mut run = Run {
                num_accepted,
                verify_len: trunk_len,
                alternate: alternate.map(|i| (beside[i], 1 + trunk_len + i)),
                next_token: Some(next),
                logprobs: logprobs.next().unwrap_or_default(),
            };
            let is_stop = run.alternate.is_none() && seqs[r].stop_tokens.contains(&next);
            if is_stop && trunk.get(num_accepted) == Some(&next) {
                run.num_accepted += 1;
                run.next_token = None;
            } else if self.completes[r] && num_accepted == trunk_len {
                run.next_token = None;
                run.logprobs.truncate(num_accepted);
            }
            run
        };
        (0..seqs.len()).map(run).collect()
    }
}

impl<O: Ops> DecodeStep<O> {
    /// Runs anchor and first `verify_lens[r]` drafts of every sequence through the target and accepts a prefix.
    ///
    /// # Errors
    /// A `verify_len` beyond the draft, rows that pass the reserved pages or the model's context, logits that are no
    /// law. The sequences are then as they were.
    pub fn verify(
        &mut self,
        ops: &mut O,
        seqs: &mut [&mut Sequence],
        proposal: &Proposal,
        verify_lens: &[usize],
    ) -> Result<Verified> {
        let start = Instant::now();
        let lens: Vec<usize> = seqs.iter().map(|seq| seq.seq_len()).collect();
        let verified = self.verify_rows(ops, seqs, proposal, verify_lens);
        if verified.is_err() {
            for (seq, &len) in seqs.iter_mut().zip(&lens) {
                seq.pages.rollback(len);
            }
        }
        self.times.verify += start.elapsed();
        verified
    }

    fn verify_rows(
        &mut self,
        ops: &mut O,
        seqs: &mut [&mut Sequence],
        proposal: &Proposal,
        verify_lens: &[usize],
    ) -> Result<Verified> {
        let max_position = self.target.max_position();
        let anchors = anchors(seqs)?;
        let anchor_positions: Vec<u32> = seqs.iter().map(|seq| seq.seq_len() as u32).collect();
        if let Some(len) = verify_lens.iter().find(|&&len| len > proposal.draft_len) {
            let expected = format!("at most {} (the draft)", proposal.draft_len);
            return Err(Error::argument("verify_len", expected, len));
        }
        if proposal.num_drafted == 0 && !self.backlog.has_room(seqs.len()) {
            self.catch_up(ops, seqs)?;
        }
        let mut ends = Ends::new(seqs, proposal, verify_lens, self.target.vocab_size());
        let drafts = self.drafts(seqs, proposal, &ends);
        let mut map = row_map(seqs, |r| 1 + drafts.len(r))?;
        drafts.make_tree(&mut map);
        let mut ids = Vec::with_capacity(map.num_rows());
        for (r, seq) in seqs.iter_mut().enumerate() {
            ids.push(anchors[r]);
            ids.extend(drafts.of(r));
            seq.pages.append(1 + drafts.len(r))?;
            check_context(seq.seq_len(), max_position)?;
        }
        self.target.forward(ops, &ids, &map, None)?;
        if proposal.num_drafted == 0 && self.drafter.is_some() {
            self.backlog.stage(ops, &self.target.features())?;
        }
        let law = match &self.drafter {
            Some(drafter) if proposal.draft_len > 0 => drafter.law(),
            _ => DraftLaw::PointMass,
        };
        let num_drafts = proposal.tokens.len();
        let padded = match &law {
            DraftLaw::LowRank { law, .. } => Some(law.padded(num_drafts)),
            _ => None,
        };
        let laid_out = match &law {
            DraftLaw::Sparse(law) => {
                let law = law.padded(num_drafts);
                if drafts.is_laid_out_as(proposal) {
                    Some(law)
                } else {
                    Some(Cow::Owned(drafts.law(&law, proposal.draft_len)))
                }
            }
            _ => None,
        };
        let law = match (law, &padded, &laid_out) {
            (DraftLaw::LowRank { base, w2, .. }, Some(law), _) => {
                DraftLaw::LowRank { base, w2, law }
            }
            (DraftLaw::Sparse(_), _, Some(law)) => DraftLaw::Sparse(law),
            (law, ..) => law,
        };
        let parents = drafts.parents();
        let extras = Extras::new(seqs.iter().map(|seq| &**seq), ends.masks.take());
        let accepted = ops.accept(&AcceptBatch {
            target: self.target.logits(),
            qo_indptr: &map.qo_indptr,
            draft_tokens: &drafts.tokens,
            draft_len: drafts.width,
            law,
            anchor_positions: &anchor_positions,
            sampling: &sampling(seqs),
            extras: AcceptExtras {
                parents: parents.as_deref(),
                ..extras.borrow()
            },
        })?;
        drop(extras);
        Ok(Verified {
            runs: ends.runs(seqs, &drafts, accepted),
            map,
        })
    }

    /// The drafts of a pass: the trunk as far as `ends` goes, and alternates where the step has them.
    fn drafts(&self, seqs: &[&mut Sequence], proposal: &Proposal, ends: &Ends) -> Drafts {
        let trunk_lens = ends.verify_lens.clone();
        let law = self.drafter.as_ref().map(|drafter| drafter.law());
        let law = match law {
            Some(DraftLaw::Sparse(law)) if self.alternates > 0 && proposal.draft_len > 0 => law,
            _ => return Drafts::chains(proposal, trunk_lens),
        };
        let others = rows::second_choices(&law.padded(proposal.tokens.len()), &proposal.tokens);
        let trunks: usize = trunk_lens.iter().map(|len| 1 + len).sum();
        let free = self.target.logits().max_rows().saturating_sub(trunks);
        let most = self.alternates.min(free / seqs.len().max(1));
        let room = rows::room(seqs, &trunk_lens, most, self.target.max_position());
        Drafts::with_alternates(proposal, trunk_lens, &others, &room)
    }

    /// Keeps the accepted rows of the last verify pass, makes the next token the anchor, and shows the drafter the
    /// rows that stayed.
    ///
    /// # Errors
    /// What the drafter refuses; the sequences have moved on by then.
    pub fn commit(
        &mut self,
        ops: &mut O,
        seqs: &mut [&mut Sequence],
        proposal: &Proposal,
        verified: &Verified,
    ) -> Result<Vec<Round>> {
        let start = Instant::now();
        let predicted = self.predicted.take().unwrap_or_default();
        let mut next_tokens = vec![0; verified.map.num_rows()];
        let mut rounds = Vec::with_capacity(seqs.len());
        for (r, (seq, run)) in seqs.iter_mut().zip(&verified.runs).enumerate() {
            let mut committed = proposal.tokens_of(r)[..run.num_accepted].to_vec();
            let rows = verified.map.rows_of(r);
            committed.extend(run.alternate.map(|(token, _)| token));
            committed.extend(run.next_token);
            next_tokens[rows.start..][..committed.len()].copy_from_slice(&committed);
            seq.pages
                .rollback(verified.map.seq_lens[r] as usize + committed.len());
            seq.anchor = committed.last().copied();
            seq.output.extend(&committed);
            rounds.push(Round {
                draft_tokens: proposal.tokens_of(r).to_vec(),
                confidence: proposal.confidence_of(r).to_vec(),
                predicted: proposal.row_of(&predicted, r).to_vec(),
                verify_len: match run.next_token {
                    Some(_) => run.verify_len,
                    None => run.num_accepted,
                },
                num_accepted: run.num_accepted,
                alternate: run.alternate.map(|(token, _)| token),
                committed,
                logprobs: seq.asked_of(run.logprobs.clone()),
            });
        }
        if verified.runs.iter().any(|run| run.alternate.is_some()) {
            let kept: Vec<u64> = verified.runs.iter().map(Run::kept_rows).collect();
            self.target.keep(ops, &verified.map, &kept)?;
        }
        let graded = seqs.iter().zip(&rounds).map(|(seq, round)| Graded {
            verify_len: round.verify_len,
            num_accepted: round.num_accepted,
            excluded: !seq.calibrates,
        });
        self.scheduler.grade(&graded.collect::<Vec<_>>());
        let kept: Vec<usize> = rounds.iter().map(|round| round.committed.len()).collect();
        let plain = proposal.num_drafted == 0 && kept.iter().all(|&kept| kept == 1);
        if !(plain && self.put_aside(ops, seqs, &verified.map, &next_tokens)?) {
            self.catch_up(ops, seqs)?;
            self.observe(ops, seqs, &verified.map, &kept, &next_tokens)?;
        }
        self.times.commit += start.elapsed();
        Ok(rounds)
    }

    /// Puts the last pass's rows, one of each request, aside for the drafter; whether there was room.
    fn put_aside(
        &mut self,
        ops: &mut O,
        seqs: &[&mut Sequence],
        map: &RowMap,
        next_tokens: &[u32],
    ) -> Result<bool> {
        if self.drafter.is_none() {
            return Ok(false);
        }
        let slots: Vec<usize> = seqs.iter().map(|seq| seq.slot).collect();
        let features = self.target.features();
        self.backlog
            .push(ops, &features, (map, &slots, next_tokens))
    }

    /// Shows the drafter what was put aside of these sequences.
    pub(super) fn catch_up(&mut self, ops: &mut O, seqs: &[&mut Sequence]) -> Result<()> {
        if let Some(drafter) = &mut self.drafter {
            self.num_looked_at += self.backlog.show(ops, &mut **drafter, seqs)?;
        }
        Ok(())
    }

    /// Shows the drafter the first `kept[r]` rows of each request of the target's last pass.
    pub(super) fn observe(
        &mut self,
        ops: &mut O,
        seqs: &[&mut Sequence],
        map: &RowMap,
        kept: &[usize],
        next_tokens: &[u32],
    ) -> Result<()> {
        let Some(drafter) = &mut self.drafter else {
            return Ok(());
        };
        let slots: Vec<usize> = seqs.iter().map(|seq| seq.slot).collect();
        let features = self.target.features();
        self.num_looked_at += kept.iter().sum::<usize>();
        drafter.observe(ops, &features, map, &slots, kept, next_tokens)
    }
}
