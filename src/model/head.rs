//! A sequential head over the whole blocks of a batch, in any of its forms.

use super::ProposeBatch;
use crate::error::{Error, Result};
use crate::ops::grammar::mask_words;
use crate::ops::{
    DraftBatch, DraftHead, DraftLaw, Drafted, HeadForm, HeadKind, LowRankLaw, Matrix, Ops,
    SamplingParams, SparseLaw,
};

/// Tokens whose bigrams are looked for at a time.
const BIGRAM_ROWS: usize = 512;

/// The head of a drafter, what it reads and the law it leaves.
pub(super) struct BlockHead<O: Ops> {
    head: DraftHead<O>,
    form: HeadForm,
    /// `[num_reqs * draft_len, vocab]`: the base logits.
    logits: O::Logits,
    law: WalkLaw,
}

/// What a walk hands on besides the base logits.
enum WalkLaw {
    LowRank(LowRankLaw),
    Sparse(SparseLaw),
}

/// What a walk reads beside the weights of the head.
pub(super) struct BlockStates<'a, O: Ops> {
    /// `[num_reqs * draft_len, d]`: the states that predict.
    pub hidden: &'a O::Mat,
    /// `[vocab, d]`.
    pub lm_head: &'a O::Weight,
    /// `[num_reqs]`.
    pub anchor_positions: &'a [u32],
    /// Tokens to draft.
    pub draft_len: usize,
}

impl<O: Ops> BlockHead<O> {
    /// A head in its full form, for at most `max_drafts` drafts in a walk.
    pub fn new(
        ops: &mut O,
        head: DraftHead<O>,
        max_drafts: usize,
        vocab_size: usize,
    ) -> Result<Self> {
        Ok(Self {
            head,
            form: HeadForm::Full,
            logits: ops.fixed_logits(max_drafts, vocab_size)?,
            law: WalkLaw::LowRank(LowRankLaw::default()),
        })
    }

    /// Changes the form, and makes the copy or the table that it needs.
    pub fn set_form(&mut self, ops: &mut O, form: HeadForm) -> Result<()> {
        form.check(self.logits.cols())?;
        let w2 = self.head.markov_w2.as_ref();
        let needs_w2 = matches!(
            form,
            HeadForm::FullSkip | HeadForm::FullFp8 | HeadForm::Candidates(_, 1..)
        );
        let Some(w2) = w2.filter(|_| needs_w2) else {
            if needs_w2 {
                let expected = "full or candidates:K for a head without a bias";
                return Err(Error::argument("head_form", expected, form));
            }
            (self.head.w2_fp8, self.head.row_bounds) = (None, None);
            self.head.bigrams = None;
            self.form = form;
            return Ok(());
        };
        let (mut copy, mut row_bounds, mut bigrams) = (None, None, None);
        match form {
            HeadForm::Candidates(_, num_bigram) => {
                let tokens = find_bigrams(ops, &self.head, num_bigram)?;
                bigrams = Some(ops.token_table(&tokens, num_bigram)?);
            }
            HeadForm::FullSkip => row_bounds = Some(ops.row_bounds(w2)?),
            _ => copy = Some(ops.quantize(w2)?),
        }
        (self.head.w2_fp8, self.head.row_bounds) = (copy, row_bounds);
        self.head.bigrams = bigrams;
        self.form = form;
        Ok(())
    }

    /// The law of the last walk.
    pub fn law(&self) -> DraftLaw<'_, O> {
        match &self.law {
            WalkLaw::LowRank(law) => DraftLaw::LowRank {
                base: &self.logits,
                w2: self.head.w2(),
                law,
            },
            WalkLaw::Sparse(law) => DraftLaw::Sparse(law),
        }
    }

    /// Drafts for every request. Under a grammar each step has the mask that the drafts before it leave, except in an rnn
    /// head, whose state lives within one walk: there only the first step has one.
    pub fn walk(
        &mut self,
        ops: &mut O,
        states: &BlockStates<'_, O>,
        batch: &ProposeBatch<'_>,
    ) -> Result<Drafted> {
        let constrained = batch.constraints.iter().any(Option::is_some);
        if constrained && self.head.kind != HeadKind::Rnn {
            return self.walk_stepwise(ops, states, batch, 1);
        }
        ops.linear_logits(states.hidden, states.lm_head, &mut self.logits)?;
        let mask = self.first_masks(batch, states.draft_len);
        let walk = DraftBatch {
            anchors: batch.anchors,
            anchor_positions: states.anchor_positions,
            sampling: batch.sampling,
            draft_len: states.draft_len,
            mask: mask.as_deref(),
        };
        let (drafted, law) = self.run(ops, &self.logits, states.hidden, &walk)?;
        self.law = law;
        Ok(drafted)
    }

    /// The same one step at a time. The bias of a step reads the token `lag` steps before it: 1 in a sound checkpoint.
    pub fn walk_stepwise(
        &mut self,
        ops: &mut O,
        states: &BlockStates<'_, O>,
        batch: &ProposeBatch<'_>,
        lag: usize,
    ) -> Result<Drafted> {
        let (num_reqs, draft_len) = (batch.anchors.len(), states.draft_len);
        let vocab_size = self.logits.cols();
        let mut hidden = ops.mat(num_reqs, states.hidden.cols())?;
        let mut logits = ops.fixed_logits(num_reqs, vocab_size)?;
        self.logits.set_rows(num_reqs * draft_len)?;
        let (mut steps, mut laws) = (Vec::<Drafted>::new(), Vec::new());
        for k in 0..draft_len {
            let rows: Vec<u32> = (0..num_reqs).map(|r| (r * draft_len + k) as u32).collect();
            ops.gather_rows(states.hidden, &rows, &mut hidden)?;
            ops.linear_logits(&hidden, states.lm_head, &mut logits)?;
            let at = states.anchor_positions.iter().map(|p| p + k as u32);
            let positions: Vec<u32> = at.collect();
            let mask = batch.masks_after(&steps, vocab_size);
            let step = DraftBatch {
                anchors: match k.checked_sub(lag) {
                    Some(before) => &steps[before].tokens,
                    None => batch.anchors,
                },
                anchor_positions: &positions,
                sampling: batch.sampling,
                draft_len: 1,
                mask: mask.as_deref(),
            };
            let (drafted, law) = self.run(ops, &logits, &hidden, &step)?;
            if matches!(law, WalkLaw::LowRank(_)) {
                ops.copy_logits(&logits, &mut self.logits, k, draft_len)?;
            }
            steps.push(drafted);
            laws.push(law);
        }
        self.law = WalkLaw::interleave(laws, num_reqs);
        Ok(interleave(&steps, num_reqs))
    }

    /// One call of the head in its form.
    fn run(
        &self,
        ops: &mut O,
        logits: &O::Logits,
        hidden: &O::Mat,
        batch: &DraftBatch<'_>,
    ) -> Result<(Drafted, WalkLaw)> {
        match self.form {
            HeadForm::Full | HeadForm::FullSkip | HeadForm::FullFp8 => {
                let (drafted, law) = ops.draft_full(&self.head, logits, hidden, batch)?;
                Ok((drafted, WalkLaw::LowRank(law)))
            }
            HeadForm::Candidates(num_top, _) => {
                let (drafted, law) =
                    ops.draft_candidates(&self.head, logits, hidden, batch, num_top)?;
                Ok((drafted, WalkLaw::Sparse(law)))
            }
        }
    }

    /// The masks of a walk in one go: the first step's are known, and the later ones' are left open.
    fn first_masks(&self, batch: &ProposeBatch<'_>, draft_len: usize) -> Option<Vec<u32>> {
        let first = batch.masks_after(&[], self.logits.cols())?;
        let words = mask_words(self.logits.cols());
        let mut masks = vec![u32::MAX; first.len() * draft_len];
        let rows = masks.chunks_exact_mut(words * draft_len);
        for (row, first) in rows.zip(first.chunks_exact(words)) {
            row[..words].copy_from_slice(first);
        }
        Some(masks)
    }
}

impl WalkLaw {
    /// The laws of single steps, which are of one form.
    fn interleave(steps: Vec<Self>, num_reqs: usize) -> Self {
        let (mut low_rank, mut sparse) = (Vec::new(), Vec::new());
        for step in steps {
            match step {
                Self::LowRank(law) => low_rank.push(law),
                Self::Sparse(law) => sparse.push(law),
            }
        }
        if sparse.is_empty() {
            Self::LowRank(LowRankLaw::interleave(&low_rank, num_reqs))
        } else {
            Self::Sparse(SparseLaw::interleave(&sparse, num_reqs))
        }
    }
}

/// `[vocab, num_bigram]`: for each token those that its row of W1 alone biases most. A gated or rnn head bends the row by
/// the state of the block, so that there they are a guess.
fn find_bigrams<O: Ops>(ops: &mut O, head: &DraftHead<O>, num_bigram: usize) -> Result<Vec<u32>> {
    let (Some(w1), Some(w2)) = (&head.markov_w1, &head.markov_w2) else {
        return Ok(Vec::new());
    };
    let vocab_size = w2.rows();
    let rows = BIGRAM_ROWS.min(vocab_size);
    let mut embedded = ops.mat(rows, head.rank)?;
    let mut bias = ops.logits(rows, vocab_size)?;
    let none = DraftHead::none();
    let mut tokens = Vec::with_capacity(vocab_size * num_bigram);
    for first in (0..vocab_size).step_by(rows) {
        let ids: Vec<u32> = (first..vocab_size.min(first + rows))
            .map(|v| v as u32)
            .collect();
        ops.embed(w1, &ids, &mut embedded)?;
        ops.linear_logits(&embedded, w2, &mut bias)?;
        let batch = DraftBatch {
            anchors: &ids,
            anchor_positions: &ids,
            sampling: &vec![SamplingParams::default(); ids.len()],
            draft_len: 1,
            mask: None,
        };
        let (_, law) = ops.draft_candidates(&none, &bias, &embedded, &batch, num_bigram)?;
        tokens.extend(law.tokens);
    }
    Ok(tokens)
}

/// The drafts of single steps, `[num_reqs]` each, as `[num_reqs * steps]`.
pub(super) fn interleave(steps: &[Drafted], num_reqs: usize) -> Drafted {
    let tokens = (0..num_reqs).flat_map(|r| steps.iter().map(move |step| step.tokens[r]));
    let confidence = (0..num_reqs).flat_map(|r| {
        steps
            .iter()
            .map(move |step| Some(step.confidence.as_ref()?[r]))
    });
    Drafted {
        tokens: tokens.collect(),
        confidence: confidence.collect(),
    }
}
