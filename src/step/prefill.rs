//! Prompts, run through the target in chunks.

use std::time::Instant;

use super::extras::Extras;
use super::{DecodeStep, Sequence, check_context, row_map};
use crate::error::{Error, Result};
use crate::ops::grammar::row_masks;
use crate::ops::{AcceptBatch, Constraint, DraftLaw, Ops, TokenLogprobs};

/// The next piece of a prompt of one sequence.
pub struct PrefillChunk<'a> {
    /// The sequence; its anchor is `None`.
    pub sequence: &'a mut Sequence,
    /// Prompt tokens that follow the ones already in the cache.
    pub tokens: &'a [u32],
    /// The prompt token after this chunk; `None` when the chunk ends the prompt.
    pub next: Option<u32>,
}

/// The first generated token of a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct FirstToken {
    /// The token.
    pub token: u32,
    /// Where the sequence asked for it.
    pub logprobs: Option<TokenLogprobs>,
}

impl<O: Ops> DecodeStep<O> {
    /// Runs chunks of several prompts in one pass. A chunk that ends its prompt yields the first generated token,
    /// drawn from the target's law, which becomes the anchor of its sequence; the others yield `None`.
    ///
    /// # Errors
    /// An empty chunk, a token the model does not know, a sequence that is already prefilled, rows that pass the
    /// reserved pages or the model's context, logits that are no law. The sequences are then as they were.
    pub fn prefill(
        &mut self,
        ops: &mut O,
        chunks: &mut [PrefillChunk<'_>],
    ) -> Result<Vec<Option<FirstToken>>> {
        let start = Instant::now();
        let lens: Vec<usize> = chunks.iter().map(|c| c.sequence.seq_len()).collect();
        for chunk in chunks.iter().filter(|c| c.sequence.seq_len() == 0) {
            self.forget(chunk.sequence.slot);
        }
        let firsts = self.prefill_rows(ops, chunks);
        match &firsts {
            Ok(firsts) => {
                for (chunk, first) in chunks.iter_mut().zip(firsts) {
                    chunk.sequence.anchor = first.as_ref().map(|first| first.token);
                    chunk.sequence.output.extend(chunk.sequence.anchor);
                }
            }
            Err(_) => {
                for (chunk, &len) in chunks.iter_mut().zip(&lens) {
                    chunk.sequence.pages.rollback(len);
                    chunk.sequence.prompt.truncate(len);
                }
            }
        }
        self.add_prefill_time(start.elapsed());
        firsts
    }

    fn prefill_rows(
        &mut self,
        ops: &mut O,
        chunks: &mut [PrefillChunk<'_>],
    ) -> Result<Vec<Option<FirstToken>>> {
        let vocab_size = self.target.vocab_size();
        let max_position = self.target.max_position();
        for chunk in chunks.iter() {
            check_chunk(chunk, vocab_size)?;
        }
        for chunk in chunks.iter_mut() {
            chunk.sequence.prompt.extend(chunk.tokens);
        }
        let lens: Vec<usize> = chunks.iter().map(|c| c.tokens.len()).collect();
        let ids: Vec<u32> = chunks.iter().flat_map(|c| c.tokens).copied().collect();
        let ends: Vec<bool> = chunks.iter().map(|c| c.next.is_none()).collect();
        let after: Vec<Option<u32>> = chunks.iter().map(|c| c.next).collect();
        let mut seqs: Vec<&mut Sequence> = chunks.iter_mut().map(|c| &mut *c.sequence).collect();
        let map = row_map(&seqs, |r| lens[r])?;
        for (seq, &len) in seqs.iter_mut().zip(&lens) {
            seq.pages.append(len)?;
            check_context(seq.seq_len(), max_position)?;
        }

        let last_rows: Vec<u32> = (0..seqs.len())
            .filter(|&r| ends[r])
            .map(|r| map.qo_indptr[r + 1] as u32 - 1)
            .collect();
        self.target.forward(ops, &ids, &map, Some(&last_rows))?;
        let mut drawn = self.first_tokens(ops, &seqs, &ends)?.into_iter();
        let firsts: Vec<Option<FirstToken>> = ends
            .iter()
            .map(|&end| if end { drawn.next() } else { None })
            .collect();

        // Each row's next token is the prompt's, and for the last row of a prompt the one just drawn.
        let mut next_tokens = ids;
        next_tokens.rotate_left(1);
        for r in 0..seqs.len() {
            let last = map.qo_indptr[r + 1] as usize - 1;
            let first = firsts[r].as_ref().map(|first| first.token);
            next_tokens[last] = after[r].or(first).unwrap_or(0);
        }
        self.observe(ops, &seqs, &map, &lens, &next_tokens)?;
        Ok(firsts)
    }

    /// One token for each sequence whose prompt ended in the last pass, from its last row.
    fn first_tokens(
        &mut self,
        ops: &mut O,
        seqs: &[&mut Sequence],
        ends: &[bool],
    ) -> Result<Vec<FirstToken>> {
        let ended = || seqs.iter().zip(ends).filter(|(_, end)| **end);
        let last_positions: Vec<u32> = ended().map(|(s, _)| s.seq_len() as u32 - 1).collect();
        if last_positions.is_empty() {
            return Ok(Vec::new());
        }
        let sampling: Vec<_> = ended().map(|(s, _)| s.sampling).collect();
        let qo_indptr: Vec<i32> = (0..=last_positions.len() as i32).collect();
        let ended_seqs: Vec<&Sequence> = ended().map(|(seq, _)| &**seq).collect();
        let constraints: Vec<Option<Constraint<'_>>> =
            ended_seqs.iter().map(|seq| seq.constraint()).collect();
        let mask = row_masks(&constraints, |_| &[], self.target.vocab_size());
        let extras = Extras::new(ended_seqs.iter().copied(), mask);
        let accepted = ops
            .accept(&AcceptBatch {
                target: self.target.logits(),
                qo_indptr: &qo_indptr,
                draft_tokens: &[],
                draft_len: 0,
                law: DraftLaw::PointMass,
                anchor_positions: &last_positions,
                sampling: &sampling,
                extras: extras.borrow(),
            })
            .map_err(|e| {
                e.in_batch(|i| (0..ends.len()).filter(|&r| ends[r]).nth(i).unwrap_or(i))
            })?;
        let mut logprobs = accepted.logprobs.into_iter();
        let tokens = accepted.next_tokens.into_iter().zip(ended_seqs);
        let first = |(token, seq): (u32, &Sequence)| FirstToken {
            token,
            logprobs: seq.asked_of(logprobs.next().unwrap_or_default()).pop(),
        };
        Ok(tokens.map(first).collect())
    }
}

fn check_chunk(chunk: &PrefillChunk<'_>, vocab_size: usize) -> Result<()> {
    if chunk.tokens.is_empty() {
        return Err(Error::argument("prompt", "at least one token", "none"));
    }
    if chunk.sequence.anchor.is_some() {
        let found = "one that already decodes";
        return Err(Error::argument("sequence", "one without an anchor", found));
    }
    match chunk.tokens.iter().find(|&&id| id as usize >= vocab_size) {
        Some(id) => {
            let expected = format!("token ids below {vocab_size}");
            Err(Error::argument("prompt", expected, id))
        }
        None => Ok(()),
    }
}
