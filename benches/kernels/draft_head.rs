//! The semi-autoregressive head over the whole vocabulary: 7 steps on bf16 base logits, W2 in bf16 or fp8, every kind of
//! head, and the form that skips rows of W2.
//!
//! W2 counts once for every step: a step's tokens decide the next step's latent, and W2 of the larger vocabularies does
//! not fit the L2. A figure above the copy's means that W2 stayed on chip. Where rows are skipped W2 does not count, and
//! the note says how much of it was read: the weights are scaled so that it is as much as with the demo drafter's.

use dspark::device::Buffer;
use dspark::sys;
use half::bf16;

use crate::lab::{Lab, Traffic, Work, check, struct_size};
use crate::random::Random;

const VOCAB_SIZES: [usize; 3] = [151_936, 129_280, 49_152];
const NUM_REQS: [usize; 6] = [1, 8, 16, 32, 64, 128];
/// A large batch, for the memory of its law.
const MANY_REQS: usize = 256;
const MOST_LAW_BYTES: usize = 16 << 20;
const DRAFT_LEN: usize = 7;
const RANK: usize = 256;
const HIDDEN_SIZE: usize = 2560;

/// All cases.
pub fn run(lab: &mut Lab) -> anyhow::Result<()> {
    for vocab_size in VOCAB_SIZES {
        for num_reqs in NUM_REQS {
            for fp8 in [false, true] {
                for mode in [Mode::Sampled, Mode::Greedy, Mode::Coupled] {
                    let spec = Spec::new(vocab_size, num_reqs, mode);
                    Spec { fp8, ..spec }.run(lab)?;
                }
            }
            for mode in [Mode::Greedy, Mode::Coupled] {
                let spec = Spec::new(vocab_size, num_reqs, mode);
                Spec {
                    skips: true,
                    ..spec
                }
                .run(lab)?;
            }
        }
    }
    for num_reqs in NUM_REQS {
        for head in [sys::DSPARK_HEAD_GATED, sys::DSPARK_HEAD_RNN] {
            let spec = Spec::new(VOCAB_SIZES[0], num_reqs, Mode::Sampled);
            Spec { head, ..spec }.run(lab)?;
        }
    }
    Spec::new(VOCAB_SIZES[0], MANY_REQS, Mode::Sampled).run(lab)
}

/// How every request draws.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Sampled,
    Greedy,
    Coupled,
}

/// What is asked of the head.
#[derive(Clone, Copy)]
struct Spec {
    vocab_size: usize,
    num_reqs: usize,
    mode: Mode,
    head: sys::dspark_head_kind,
    fp8: bool,
    skips: bool,
}

impl Spec {
    fn new(vocab_size: usize, num_reqs: usize, mode: Mode) -> Self {
        Self {
            vocab_size,
            num_reqs,
            mode,
            head: sys::DSPARK_HEAD_VANILLA,
            fp8: false,
            skips: false,
        }
    }

    fn num_rows(self) -> usize {
        self.num_reqs * DRAFT_LEN
    }

    /// Rows and columns of the projection.
    fn projection(self) -> (usize, usize) {
        match self.head {
            sys::DSPARK_HEAD_GATED => (RANK, HIDDEN_SIZE + RANK),
            sys::DSPARK_HEAD_RNN => (3 * RANK, 2 * RANK + HIDDEN_SIZE),
            _ => (0, 0),
        }
    }

    fn run(self, lab: &mut Lab) -> anyhow::Result<()> {
        let w2 = self.vocab_size * RANK * if self.fp8 { 1 } else { 2 };
        let logits = self.num_rows() * self.vocab_size * size_of::<bf16>();
        let w1_rows = self.num_rows() * RANK * size_of::<bf16>();
        let (outputs, inputs) = self.projection();
        let projection = outputs * inputs * size_of::<bf16>();
        let rows_of_w2 = if self.skips {
            self.vocab_size * size_of::<[f32; 4]>()
        } else {
            DRAFT_LEN * w2
        };
        let traffic = Traffic {
            bytes: rows_of_w2 + logits + w1_rows + projection,
            footprint: w2 + logits,
        };
        let mut name = format!(
            "V={} reqs={} {:?}",
            self.vocab_size, self.num_reqs, self.mode
        );
        for (is_so, part) in [
            (self.fp8, " W2=fp8"),
            (self.skips, " skip"),
            (self.head == sys::DSPARK_HEAD_GATED, " gated"),
            (self.head == sys::DSPARK_HEAD_RNN, " rnn"),
        ] {
            name += if is_so { part } else { "" };
        }
        name = name
            .replace("Sampled", "sampled")
            .replace("Greedy", "greedy")
            .replace("Coupled", "coupled");
        lab.case(&name, traffic, |lab, copies| {
            DraftHead::new(lab, copies, self)
        })
    }
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
    spec: Spec,
    stream: sys::dspark_stream,
    logits: Buffer<bf16>,
    hidden: Buffer<bf16>,
    markov_w1: Buffer<bf16>,
    markov_w2: W2,
    w2_scales: Buffer<f32>,
    proj_weight: Buffer<bf16>,
    proj_bias: Buffer<bf16>,
    w2_bounds: Buffer<f32>,
    w2_basis: Buffer<f32>,
    rows_read: Buffer<u64>,
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
    fn new(lab: &mut Lab, copies: usize, spec: Spec) -> anyhow::Result<Self> {
        let Spec {
            vocab_size,
            num_reqs,
            mode,
            ..
        } = spec;
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
        let num_rows = spec.num_rows();
        let (outputs, inputs) = spec.projection();
        let scale = if spec.skips { 0.16 } else { 0.05 };
        let mut work = Self {
            spec,
            stream: lab.stream(),
            logits: lab.normal_bf16(copies * num_rows * vocab_size, 3.0)?,
            hidden: lab.normal_bf16(num_rows * HIDDEN_SIZE, 1.0)?,
            markov_w1: lab.normal_bf16(vocab_size * RANK, scale)?,
            markov_w2: if spec.fp8 {
                let pattern = finite_e4m3(&mut lab.random);
                W2::Fp8(lab.tiled(copies * vocab_size * RANK, &pattern)?)
            } else {
                W2::Bf16(lab.normal_bf16(copies * vocab_size * RANK, scale)?)
            },
            w2_scales: lab.upload(&vec![1e-4; vocab_size])?,
            proj_weight: lab.normal_bf16((outputs * inputs).max(1), 0.02)?,
            proj_bias: lab.normal_bf16(outputs.max(1), 0.1)?,
            w2_bounds: lab.empty(copies * vocab_size * 4)?,
            w2_basis: lab.upload(&vec![0.0; 3 * RANK])?,
            rows_read: lab.upload(&vec![0; num_reqs])?,
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
        if spec.skips {
            work.find_bounds(copies)?;
        }
        let mut bytes = 0;
        let params = work.params(0);
        // SAFETY: reads the sizes of `params` and writes one host integer.
        check(unsafe {
            sys::launch::dspark_draft_full_workspace_size_cu(&raw const params, &raw mut bytes)
        })?;
        work.workspace = lab.empty(bytes)?;
        Ok(work)
    }

    /// Bounds of every copy of W2; random rows have no direction in common.
    fn find_bounds(&mut self, copies: usize) -> anyhow::Result<()> {
        let full = self.params(0);
        let params = sys::dspark_draft_bounds_params {
            struct_size: struct_size::<sys::dspark_draft_bounds_params>(),
            w2_dtype: full.w2_dtype,
            vocab_size: i32::try_from(copies * self.spec.vocab_size)?,
            markov_rank: full.markov_rank,
            markov_w2: full.markov_w2,
            w2_scales: full.w2_scales,
            basis: self.w2_basis.ptr(0),
            bounds: self.w2_bounds.mut_ptr(0),
        };
        // SAFETY: the copies of W2 stand one behind the other, and so do their bounds.
        check(unsafe { sys::launch::dspark_draft_bounds_cu(&raw const params, self.stream) })?;
        Ok(())
    }

    fn params(&mut self, copy: usize) -> sys::dspark_draft_full_params {
        let Spec {
            vocab_size,
            num_reqs,
            ..
        } = self.spec;
        let logits = copy * self.spec.num_rows() * vocab_size;
        let weights = copy * vocab_size * RANK;
        let (w2_dtype, markov_w2) = match &self.markov_w2 {
            W2::Bf16(w2) => (sys::DSPARK_DTYPE_BF16, w2.ptr(weights).cast()),
            W2::Fp8(w2) => (sys::DSPARK_DTYPE_E4M3, w2.ptr(weights).cast()),
        };
        sys::dspark_draft_full_params {
            struct_size: struct_size::<sys::dspark_draft_full_params>(),
            dtype: sys::DSPARK_DTYPE_BF16,
            logits_dtype: sys::DSPARK_DTYPE_BF16,
            w2_dtype,
            head: self.spec.head,
            num_reqs: num_reqs as i32,
            draft_len: DRAFT_LEN as i32,
            vocab_size: vocab_size as i32,
            hidden_size: HIDDEN_SIZE as i32,
            markov_rank: RANK as i32,
            confidence_with_markov: 0,
            confidence_bias: 0.0,
            logits: self.logits.ptr(logits).cast(),
            hidden: self.hidden.ptr(0).cast(),
            markov_w1: self.markov_w1.ptr(0).cast(),
            markov_w2,
            w2_scales: self.w2_scales.ptr(0),
            proj_weight: self.proj_weight.ptr(0).cast(),
            proj_bias: self.proj_bias.ptr(0).cast(),
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
            stride_logits_row: vocab_size as i64,
            w2_bounds: if self.spec.skips {
                self.w2_bounds.ptr(copy * vocab_size * 4)
            } else {
                std::ptr::null()
            },
            w2_basis: self.w2_basis.ptr(0),
            rows_read: self.rows_read.mut_ptr(0),
        }
    }

    /// Bytes that a request's acceptance needs of its drafts, for all requests.
    fn law_bytes(&self) -> usize {
        let rows = self.log_normalizers.len();
        rows * (size_of::<i32>() + size_of::<f32>() + RANK * size_of::<bf16>())
    }
}

impl Work for DraftHead {
    fn enqueue(&mut self, copy: usize) -> dspark::Result<()> {
        let params = self.params(copy);
        // SAFETY: every pointer is a window of a live buffer with the shape the params say, or null where the head without confidences allows it.
        check(unsafe { sys::launch::dspark_draft_full_cu(&raw const params, self.stream) })
    }

    fn inspect(&mut self) -> anyhow::Result<Option<String>> {
        let mut tokens = vec![0; self.spec.num_rows()];
        self.draft_tokens.download(0, &mut tokens)?;
        let vocab = 0..self.spec.vocab_size as i32;
        anyhow::ensure!(
            tokens.iter().all(|token| vocab.contains(token)),
            "draft tokens: expected all below {}, found {tokens:?}",
            self.spec.vocab_size
        );
        if self.spec.num_reqs == MANY_REQS {
            let bytes = self.law_bytes();
            anyhow::ensure!(bytes <= MOST_LAW_BYTES, "a law of {bytes} bytes");
            return Ok(Some(format!("law {:.1} MB", bytes as f64 / 1e6)));
        }
        if !self.spec.skips {
            return Ok(None);
        }
        let mut rows_read = vec![0; self.spec.num_reqs];
        self.rows_read.download(0, &mut rows_read)?;
        let all = self.spec.num_rows() * self.spec.vocab_size;
        let share = rows_read.iter().sum::<u64>() as f64 / all as f64;
        Ok(Some(format!("{:.2} % of W2's rows read", share * 100.0)))
    }
}
