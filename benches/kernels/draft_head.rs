//! The vanilla semi-autoregressive head over the whole vocabulary: 7 steps on bf16 base logits, W2 in bf16 or fp8.
//!
//! W2 counts once for every step: a step's tokens decide the next step's latent, and W2 of the larger vocabularies does
//! not fit the L2. A figure above the copy's means that W2 stayed on chip.

use dspark::device::Buffer;
use dspark::sys;
use half::bf16;

use crate::lab::{Lab, Traffic, Work, check, struct_size};
use crate::random::Random;

const VOCAB_SIZES: [usize; 3] = [151_936, 129_280, 49_152];
const NUM_REQS: [usize; 6] = [1, 8, 16, 32, 64, 128];
const DRAFT_LEN: usize = 7;
const RANK: usize = 256;

/// All cases.
pub fn run(lab: &mut Lab) -> anyhow::Result<()> {
    for vocab_size in VOCAB_SIZES {
        for num_reqs in NUM_REQS {
            for fp8 in [false, true] {
                for mode in [Mode::Sampled, Mode::Greedy, Mode::Coupled] {
                    let w2 = vocab_size * RANK * if fp8 { 1 } else { 2 };
                    let logits = num_reqs * DRAFT_LEN * vocab_size * size_of::<bf16>();
                    let w1_rows = num_reqs * DRAFT_LEN * RANK * size_of::<bf16>();
                    let traffic = Traffic {
                        bytes: DRAFT_LEN * w2 + logits + w1_rows,
                        footprint: w2 + logits,
                    };
                    let mode_name = format!("{mode:?}").to_lowercase();
                    let w2_name = if fp8 { " W2=fp8" } else { "" };
                    let name = format!("V={vocab_size} reqs={num_reqs} {mode_name}{w2_name}");
                    lab.case(&name, traffic, |lab, copies| {
                        DraftHead::new(lab, copies, vocab_size, num_reqs, fp8, mode)
                    })?;
                }
            }
        }
    }
    Ok(())
}

/// How every request draws.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Sampled,
    Greedy,
    Coupled,
}

enum W2 {
    Bf16(Buffer<bf16>),
    Fp8(Buffer<u8>),
}

/// Bytes that are e4m3 numbers below 2.
fn finite_e4m3(random: &mut Random) -> Vec<u8> {
    (0..65_521)
        .map(|_| (random.below(256) & 0xBF) as u8)
        .collect()
}

struct DraftHead {
    stream: sys::dspark_stream,
    vocab_size: usize,
    num_reqs: usize,
    logits: Buffer<bf16>,
    markov_w1: Buffer<bf16>,
    markov_w2: W2,
    w2_scales: Buffer<f32>,
    anchors: Buffer<i32>,
    anchor_positions: Buffer<i32>,
    temperature: Buffer<f32>,
    seeds: Buffer<u64>,
    rules: Buffer<i32>,
    draft_tokens: Buffer<i32>,
    log_normalizers: Buffer<f32>,
    latents: Buffer<bf16>,
    workspace: Buffer<u8>,
}

impl DraftHead {
    fn new(
        lab: &mut Lab,
        copies: usize,
        vocab_size: usize,
        num_reqs: usize,
        fp8: bool,
        mode: Mode,
    ) -> anyhow::Result<Self> {
        let anchors: Vec<i32> = (0..num_reqs)
            .map(|_| lab.random.below(vocab_size) as i32)
            .collect();
        let seeds: Vec<u64> = (0..num_reqs as u64).collect();
        let temperature = if mode == Mode::Greedy { 0.0 } else { 1.0 };
        let rule = if mode == Mode::Coupled {
            sys::DSPARK_RULE_COUPLED
        } else {
            sys::DSPARK_RULE_TOKEN
        };
        let num_rows = num_reqs * DRAFT_LEN;
        let mut work = Self {
            stream: lab.stream(),
            vocab_size,
            num_reqs,
            logits: lab.normal_bf16(copies * num_rows * vocab_size, 3.0)?,
            markov_w1: lab.normal_bf16(vocab_size * RANK, 0.05)?,
            markov_w2: if fp8 {
                let pattern = finite_e4m3(&mut lab.random);
                W2::Fp8(lab.tiled(copies * vocab_size * RANK, &pattern)?)
            } else {
                W2::Bf16(lab.normal_bf16(copies * vocab_size * RANK, 0.05)?)
            },
            w2_scales: lab.upload(&vec![1e-4; vocab_size])?,
            anchors: lab.upload(&anchors)?,
            anchor_positions: lab.upload(&vec![100; num_reqs])?,
            temperature: lab.upload(&vec![temperature; num_reqs])?,
            seeds: lab.upload(&seeds)?,
            rules: lab.upload(&vec![rule; num_reqs])?,
            draft_tokens: lab.upload(&vec![-1; num_rows])?,
            log_normalizers: lab.upload(&vec![0.0; num_rows])?,
            latents: lab.upload(&vec![bf16::ZERO; num_rows * RANK])?,
            workspace: lab.empty(0)?,
        };
        let mut bytes = 0;
        let params = work.params(0);
        // SAFETY: reads the sizes of `params` and writes one host integer.
        check(unsafe {
            sys::launch::dspark_draft_full_workspace_size_cu(&raw const params, &raw mut bytes)
        })?;
        work.workspace = lab.empty(bytes)?;
        Ok(work)
    }

    fn params(&mut self, copy: usize) -> sys::dspark_draft_full_params {
        let logits = copy * self.num_reqs * DRAFT_LEN * self.vocab_size;
        let weights = copy * self.vocab_size * RANK;
        let (w2_dtype, markov_w2) = match &self.markov_w2 {
            W2::Bf16(w2) => (sys::DSPARK_DTYPE_BF16, w2.ptr(weights).cast()),
            W2::Fp8(w2) => (sys::DSPARK_DTYPE_E4M3, w2.ptr(weights).cast()),
        };
        sys::dspark_draft_full_params {
            struct_size: struct_size::<sys::dspark_draft_full_params>(),
            dtype: sys::DSPARK_DTYPE_BF16,
            logits_dtype: sys::DSPARK_DTYPE_BF16,
            w2_dtype,
            head: sys::DSPARK_HEAD_VANILLA,
            num_reqs: self.num_reqs as i32,
            draft_len: DRAFT_LEN as i32,
            vocab_size: self.vocab_size as i32,
            hidden_size: 0,
            markov_rank: RANK as i32,
            confidence_with_markov: 0,
            confidence_bias: 0.0,
            logits: self.logits.ptr(logits).cast(),
            hidden: std::ptr::null(),
            markov_w1: self.markov_w1.ptr(0).cast(),
            markov_w2,
            w2_scales: self.w2_scales.ptr(0),
            proj_weight: std::ptr::null(),
            proj_bias: std::ptr::null(),
            confidence_weight: std::ptr::null(),
            anchors: self.anchors.ptr(0),
            anchor_positions: self.anchor_positions.ptr(0),
            draft_lens: std::ptr::null(),
            temperature: self.temperature.ptr(0),
            seeds: self.seeds.ptr(0),
            rules: self.rules.ptr(0),
            mask: std::ptr::null(),
            draft_tokens: self.draft_tokens.mut_ptr(0),
            log_normalizers: self.log_normalizers.mut_ptr(0),
            latents: self.latents.mut_ptr(0).cast(),
            confidence: std::ptr::null_mut(),
            confidence_logits: std::ptr::null_mut(),
            workspace: self.workspace.mut_ptr(0).cast(),
            workspace_bytes: self.workspace.len(),
            stride_logits_row: self.vocab_size as i64,
            w2_bounds: std::ptr::null(),
            w2_basis: std::ptr::null(),
            rows_read: std::ptr::null_mut(),
        }
    }
}

impl Work for DraftHead {
    fn enqueue(&mut self, copy: usize) -> dspark::Result<()> {
        let params = self.params(copy);
        // SAFETY: every pointer is a window of a live buffer with the shape the params say, or null where the vanilla head without confidences allows it.
        check(unsafe { sys::launch::dspark_draft_full_cu(&raw const params, self.stream) })
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
