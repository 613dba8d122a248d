//! The vanilla head over a candidate set: the top 64 of f32 or bf16 base logits, 7 steps, sampled.
//!
//! The floor is one read of the base logits and the gathered rows of W2.

use dspark::device::Buffer;
use dspark::sys;
use half::bf16;

use crate::lab::{Lab, Traffic, Work, check, struct_size};

const VOCAB_SIZES: [usize; 3] = [151_936, 129_280, 49_152];
const NUM_REQS: [usize; 6] = [1, 8, 16, 32, 64, 128];
const DRAFT_LEN: usize = 7;
const RANK: usize = 256;
const NUM_TOP: usize = 64;
/// A large batch, for the memory of its law.
const MANY_REQS: usize = 256;
const MOST_LAW_BYTES: usize = 16 << 20;

/// All cases.
pub fn run(lab: &mut Lab) -> anyhow::Result<()> {
    for vocab_size in VOCAB_SIZES {
        let many = (vocab_size == VOCAB_SIZES[0]).then_some(MANY_REQS);
        for num_reqs in NUM_REQS.into_iter().chain(many) {
            for (name, size) in [("f32", 4), ("bf16", 2)] {
                let num_rows = num_reqs * DRAFT_LEN;
                let rows_of_w2 = num_rows * NUM_TOP * RANK * size_of::<bf16>();
                let traffic = Traffic::once(num_rows * vocab_size * size + rows_of_w2);
                let name = format!("V={vocab_size} reqs={num_reqs} K={NUM_TOP} {name} logits");
                lab.case(&name, traffic, |lab, copies| {
                    Candidates::new(lab, copies, vocab_size, num_reqs, size == 2)
                })?;
            }
        }
    }
    Ok(())
}

enum Logits {
    F32(Buffer<f32>),
    Bf16(Buffer<bf16>),
}

struct Candidates {
    stream: sys::dspark_stream,
    vocab_size: usize,
    num_reqs: usize,
    logits: Logits,
    markov_w1: Buffer<bf16>,
    markov_w2: Buffer<bf16>,
    anchors: Buffer<i32>,
    anchor_positions: Buffer<i32>,
    temperature: Buffer<f32>,
    seeds: Buffer<u64>,
    draft_tokens: Buffer<i32>,
    candidate_tokens: Buffer<i32>,
    candidate_logits: Buffer<f32>,
    workspace: Buffer<u8>,
}

impl Candidates {
    fn new(
        lab: &mut Lab,
        copies: usize,
        vocab_size: usize,
        num_reqs: usize,
        bf16_logits: bool,
    ) -> anyhow::Result<Self> {
        let anchors: Vec<i32> = (0..num_reqs)
            .map(|_| lab.random.below(vocab_size) as i32)
            .collect();
        let seeds: Vec<u64> = (0..num_reqs as u64).collect();
        let num_rows = num_reqs * DRAFT_LEN;
        let num_logits = copies * num_rows * vocab_size;
        let mut work = Self {
            stream: lab.stream(),
            vocab_size,
            num_reqs,
            logits: if bf16_logits {
                Logits::Bf16(lab.normal_bf16(num_logits, 3.0)?)
            } else {
                Logits::F32(lab.normal_f32(num_logits, 3.0)?)
            },
            markov_w1: lab.normal_bf16(vocab_size * RANK, 0.05)?,
            markov_w2: lab.normal_bf16(vocab_size * RANK, 0.05)?,
            anchors: lab.upload(&anchors)?,
            anchor_positions: lab.upload(&vec![100; num_reqs])?,
            temperature: lab.upload(&vec![1.0; num_reqs])?,
            seeds: lab.upload(&seeds)?,
            draft_tokens: lab.upload(&vec![-1; num_rows])?,
            candidate_tokens: lab.upload(&vec![-1; num_rows * NUM_TOP])?,
            candidate_logits: lab.upload(&vec![0.0; num_rows * NUM_TOP])?,
            workspace: lab.empty(0)?,
        };
        let mut bytes = 0;
        let params = work.params(0);
        // SAFETY: reads the sizes of `params` and writes one host integer.
        check(unsafe {
            sys::launch::dspark_draft_candidates_workspace_size_cu(
                &raw const params,
                &raw mut bytes,
            )
        })?;
        work.workspace = lab.empty(bytes)?;
        Ok(work)
    }

    fn params(&mut self, copy: usize) -> sys::dspark_draft_candidates_params {
        let first = copy * self.num_reqs * DRAFT_LEN * self.vocab_size;
        let (logits_dtype, logits) = match &self.logits {
            Logits::F32(logits) => (sys::DSPARK_DTYPE_F32, logits.ptr(first).cast()),
            Logits::Bf16(logits) => (sys::DSPARK_DTYPE_BF16, logits.ptr(first).cast()),
        };
        sys::dspark_draft_candidates_params {
            struct_size: struct_size::<sys::dspark_draft_candidates_params>(),
            dtype: sys::DSPARK_DTYPE_BF16,
            logits_dtype,
            head: sys::DSPARK_HEAD_VANILLA,
            num_reqs: self.num_reqs as i32,
            draft_len: DRAFT_LEN as i32,
            vocab_size: self.vocab_size as i32,
            hidden_size: 0,
            markov_rank: RANK as i32,
            num_top: NUM_TOP as i32,
            num_bigram: 0,
            confidence_with_markov: 0,
            confidence_bias: 0.0,
            logits,
            hidden: std::ptr::null(),
            markov_w1: self.markov_w1.ptr(0).cast(),
            markov_w2: self.markov_w2.ptr(0).cast(),
            proj_weight: std::ptr::null(),
            proj_bias: std::ptr::null(),
            confidence_weight: std::ptr::null(),
            bigram_tokens: std::ptr::null(),
            anchors: self.anchors.ptr(0),
            anchor_positions: self.anchor_positions.ptr(0),
            temperature: self.temperature.ptr(0),
            seeds: self.seeds.ptr(0),
            draft_tokens: self.draft_tokens.mut_ptr(0),
            confidence: std::ptr::null_mut(),
            candidate_tokens: self.candidate_tokens.mut_ptr(0),
            candidate_logits: self.candidate_logits.mut_ptr(0),
            workspace: self.workspace.mut_ptr(0).cast(),
            workspace_bytes: self.workspace.len(),
            stride_logits_row: self.vocab_size as i64,
            rules: std::ptr::null(),
            mask: std::ptr::null(),
            top_k: std::ptr::null(),
            top_p: std::ptr::null(),
            min_p: std::ptr::null(),
        }
    }
}

impl Work for Candidates {
    fn enqueue(&mut self, copy: usize) -> dspark::Result<()> {
        let params = self.params(copy);
        // SAFETY: every pointer is a window of a live buffer with the shape the params say, or null where the vanilla
        // head without confidences and bigrams allows it.
        check(unsafe { sys::launch::dspark_draft_candidates_cu(&raw const params, self.stream) })
    }

    fn inspect(&mut self) -> anyhow::Result<Option<String>> {
        let mut tokens = vec![0; self.num_reqs * DRAFT_LEN];
        let mut candidates = vec![0; tokens.len() * NUM_TOP];
        self.draft_tokens.download(0, &mut tokens)?;
        self.candidate_tokens.download(0, &mut candidates)?;
        for (row, (token, of_row)) in tokens.iter().zip(candidates.chunks(NUM_TOP)).enumerate() {
            anyhow::ensure!(
                of_row.contains(token),
                "row {row}: expected a candidate, found {token}"
            );
        }
        if self.num_reqs < MANY_REQS {
            return Ok(None);
        }
        let bytes = size_of::<i32>() * tokens.len()
            + (size_of::<i32>() + size_of::<f32>()) * candidates.len();
        anyhow::ensure!(bytes <= MOST_LAW_BYTES, "a law of {bytes} bytes");
        Ok(Some(format!("law {:.1} MB", bytes as f64 / 1e6)))
    }
}
