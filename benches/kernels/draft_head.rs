//! The vanilla semi-autoregressive head: 7 steps over the vocabulary, sampled or greedy.
//!
//! W2 counts once for every step: a step's tokens decide the next step's latent, and W2 of the larger vocabularies does
//! not fit the L2. A figure above the copy's means that W2 stayed on chip.

use dspark::device::Buffer;
use dspark::sys;
use half::bf16;

use crate::lab::{Lab, Traffic, Work, check, struct_size};

const VOCAB_SIZES: [usize; 3] = [151_936, 129_280, 49_152];
const NUM_REQS: [usize; 6] = [1, 8, 16, 32, 64, 128];
const DRAFT_LEN: usize = 7;
const RANK: usize = 256;

/// All cases.
pub fn run(lab: &mut Lab) -> anyhow::Result<()> {
    for vocab_size in VOCAB_SIZES {
        for num_reqs in NUM_REQS {
            for (mode, temperature) in [("sampled", 1.0), ("greedy", 0.0)] {
                let w2 = vocab_size * RANK * size_of::<bf16>();
                let logits = num_reqs * DRAFT_LEN * vocab_size * size_of::<f32>();
                let w1_rows = num_reqs * DRAFT_LEN * RANK * size_of::<bf16>();
                let traffic = Traffic {
                    bytes: DRAFT_LEN * w2 + 2 * logits + w1_rows,
                    footprint: w2 + logits,
                };
                let name = format!("V={vocab_size} reqs={num_reqs} {mode}");
                lab.case(&name, traffic, |lab, copies| {
                    DraftHead::new(lab, copies, vocab_size, num_reqs, temperature)
                })?;
            }
        }
    }
    Ok(())
}

struct DraftHead {
    stream: sys::dspark_stream,
    vocab_size: usize,
    num_reqs: usize,
    logits: Buffer<f32>,
    markov_w1: Buffer<bf16>,
    markov_w2: Buffer<bf16>,
    anchors: Buffer<i32>,
    anchor_positions: Buffer<i32>,
    temperature: Buffer<f32>,
    seeds: Buffer<u64>,
    draft_tokens: Buffer<i32>,
    workspace: Buffer<u8>,
}

impl DraftHead {
    fn new(
        lab: &mut Lab,
        copies: usize,
        vocab_size: usize,
        num_reqs: usize,
        temperature: f32,
    ) -> anyhow::Result<Self> {
        let anchors: Vec<i32> = (0..num_reqs)
            .map(|_| lab.random.below(vocab_size) as i32)
            .collect();
        let seeds: Vec<u64> = (0..num_reqs as u64).collect();
        let mut work = Self {
            stream: lab.stream(),
            vocab_size,
            num_reqs,
            logits: lab.normal_f32(copies * num_reqs * DRAFT_LEN * vocab_size, 3.0)?,
            markov_w1: lab.normal_bf16(vocab_size * RANK, 0.05)?,
            markov_w2: lab.normal_bf16(copies * vocab_size * RANK, 0.05)?,
            anchors: lab.upload(&anchors)?,
            anchor_positions: lab.upload(&vec![100; num_reqs])?,
            temperature: lab.upload(&vec![temperature; num_reqs])?,
            seeds: lab.upload(&seeds)?,
            draft_tokens: lab.upload(&vec![-1; num_reqs * DRAFT_LEN])?,
            workspace: lab.empty(0)?,
        };
        let mut bytes = 0;
        let params = work.params(0);
        // SAFETY: reads the sizes of `params` and writes one host integer.
        check(unsafe {
            sys::launch::dspark_draft_head_workspace_size_cu(&raw const params, &raw mut bytes)
        })?;
        work.workspace = lab.empty(bytes)?;
        Ok(work)
    }

    fn params(&mut self, copy: usize) -> sys::dspark_draft_head_params {
        let logits = copy * self.num_reqs * DRAFT_LEN * self.vocab_size;
        sys::dspark_draft_head_params {
            struct_size: struct_size::<sys::dspark_draft_head_params>(),
            dtype: sys::DSPARK_DTYPE_BF16,
            head: sys::DSPARK_HEAD_VANILLA,
            num_reqs: self.num_reqs as i32,
            draft_len: DRAFT_LEN as i32,
            vocab_size: self.vocab_size as i32,
            hidden_size: 0,
            markov_rank: RANK as i32,
            confidence_with_markov: 0,
            confidence_bias: 0.0,
            logits: self.logits.mut_ptr(logits),
            hidden: std::ptr::null(),
            markov_w1: self.markov_w1.ptr(0).cast(),
            markov_w2: self.markov_w2.ptr(copy * self.vocab_size * RANK).cast(),
            proj_weight: std::ptr::null(),
            proj_bias: std::ptr::null(),
            confidence_weight: std::ptr::null(),
            anchors: self.anchors.ptr(0),
            anchor_positions: self.anchor_positions.ptr(0),
            temperature: self.temperature.ptr(0),
            seeds: self.seeds.ptr(0),
            draft_tokens: self.draft_tokens.mut_ptr(0),
            confidence: std::ptr::null_mut(),
            workspace: self.workspace.mut_ptr(0).cast(),
            workspace_bytes: self.workspace.len(),
            stride_logits_row: self.vocab_size as i64,
            rules: std::ptr::null(),
            mask: std::ptr::null(),
        }
    }
}

impl Work for DraftHead {
    fn enqueue(&mut self, copy: usize) -> dspark::Result<()> {
        let params = self.params(copy);
        // SAFETY: every pointer is a window of a live buffer with the shape the params say, or null where the vanilla
        // head without confidences allows it.
        check(unsafe { sys::launch::dspark_draft_head_cu(&raw const params, self.stream) })
    }

    fn inspect(&mut self) -> anyhow::Result<Option<String>> {
        let mut tokens = vec![0; self.num_reqs * DRAFT_LEN];
        self.draft_tokens.download(0, &mut tokens)?;
        let vocab = 0..self.vocab_size as i32;
        anyhow::ensure!(
            tokens.iter().all(|token| vocab.contains(token)),
            "draft tokens: expected all below {}, found {tokens:?}",
            self.vocab_size
        );
        Ok(None)
    }
}
