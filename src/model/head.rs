//! A sequential head over the whole blocks of a batch, in either of its forms.

use super::ProposeBatch;
use crate::error::Result;
use crate::ops::grammar::mask_words;
use crate::ops::{
    DraftBatch, DraftHead, DraftLaw, Drafted, HeadForm, HeadKind, Matrix, Ops, SparseLaw,
};

/// The head of a drafter, what it reads and the law it leaves.
pub(super) struct BlockHead<O: Ops> {
    head: DraftHead<O>,
    form: HeadForm,
    /// `[num_reqs * draft_len, vocab]`: the base logits; over the whole vocabulary they become the law.
    logits: O::Logits,
    /// The law over candidates.
    sparse: SparseLaw,
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
            logits: ops.logits(max_drafts, vocab_size)?,
            sparse: SparseLaw::default(),
        })
    }

    /// Changes the form.
    pub fn set_form(&mut self, ops: &mut O, form: HeadForm) -> Result<()> {
        form.check(self.logits.cols())?;
        self.logits = buffer(ops, form, self.logits.max_rows(), self.logits.cols())?;
        self.form = form;
        Ok(())
    }

    /// The law of the last walk.
    pub fn law(&self) -> DraftLaw<'_, O> {
        match self.form {
            HeadForm::Full => DraftLaw::Logits(&self.logits),
            HeadForm::Candidates(_) => DraftLaw::Sparse(&self.sparse),
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
        match self.form {
            HeadForm::Full => ops.draft_head(&self.head, &mut self.logits, states.hidden, &walk),
            HeadForm::Candidates(num_top) => {
                let (head, logits) = (&self.head, &self.logits);
                let (drafted, law) =
                    ops.draft_candidates(head, logits, states.hidden, &walk, num_top)?;
                self.sparse = law;
                Ok(drafted)
            }
        }
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
        let mut logits = buffer(ops, self.form, num_reqs, vocab_size)?;
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
            let drafted = match self.form {
                HeadForm::Full => {
                    let drafted = ops.draft_head(&self.head, &mut logits, &hidden, &step)?;
                    ops.copy_logits(&logits, &mut self.logits, k, draft_len)?;
                    drafted
                }
                HeadForm::Candidates(num_top) => {
                    let (drafted, law) =
                        ops.draft_candidates(&self.head, &logits, &hidden, &step, num_top)?;
                    laws.push(law);
                    drafted
                }
            };
            steps.push(drafted);
        }
        self.sparse = SparseLaw::interleave(&laws, num_reqs);
        Ok(interleave(&steps, num_reqs))
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

/// A buffer for the base logits of a walk.
fn buffer<O: Ops>(
    ops: &mut O,
    form: HeadForm,
    max_rows: usize,
    vocab_size: usize,
) -> Result<O::Logits> {
    match form {
        HeadForm::Full => ops.logits(max_rows, vocab_size),
        HeadForm::Candidates(_) => ops.fixed_logits(max_rows, vocab_size),
    }
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
