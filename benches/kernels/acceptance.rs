//! Acceptance: 8 rows of bf16 target logits a request, drafts from a law of 32 candidates, from dense f32 logits, from a
//! low-rank law (f32 base logits and latents of rank 256) or from none (point masses).
//!
//! Draft logits are target logits with noise and the drafts are drawn from them, so that requests stop where they would
//! in service.

use dspark::device::Buffer;
use dspark::ops;
use dspark::sys;
use half::bf16;

use crate::lab::{Lab, Traffic, Work, check, struct_size};
use crate::random::Random;

const VOCAB_SIZE: usize = 151_936;
const DRAFT_LEN: usize = 7;
const NUM_ROWS: usize = DRAFT_LEN + 1;
const NUM_CANDIDATES: usize = 32;
const RANK: usize = 256;
const NUM_REQS: [usize; 4] = [1, 8, 32, 128];
/// Requests with logits of their own; the others repeat them under other seeds.
const DISTINCT: usize = 4;

/// What all requests of a case do.
struct Case {
    name: &'static str,
    rule: ops::Rule,
    temperature: f32,
    /// top-k and top-p; without them the arrays are left out.
    filters: Option<(i32, f32)>,
    law: Law,
}

/// What the drafts are drawn from, and what acceptance is told of it.
#[derive(Clone, Copy, PartialEq)]
enum Law {
    Candidates,
    Point,
    Dense,
    LowRank,
}

impl Law {
    fn has_logits(self) -> bool {
        matches!(self, Self::Dense | Self::LowRank)
    }
}

const TOKEN: Case = Case {
    name: "token T=1",
    rule: ops::Rule::Token,
    temperature: 1.0,
    filters: None,
    law: Law::Candidates,
};

const CASES: [Case; 10] = [
    TOKEN,
    Case {
        name: "greedy",
        temperature: 0.0,
        ..TOKEN
    },
    Case {
        name: "token top-k 50 top-p 0.9 T=0.7",
        temperature: 0.7,
        filters: Some((50, 0.9)),
        ..TOKEN
    },
    Case {
        name: "token top-p 0.9 T=1",
        filters: Some((0, 0.9)),
        ..TOKEN
    },
    Case {
        name: "coupled top-k 50 top-p 0.9 T=0.7",
        rule: ops::Rule::Coupled,
        temperature: 0.7,
        filters: Some((50, 0.9)),
        ..TOKEN
    },
    Case {
        name: "block T=1",
        rule: ops::Rule::Block,
        ..TOKEN
    },
    Case {
        name: "coupled T=1",
        rule: ops::Rule::Coupled,
        ..TOKEN
    },
    Case {
        name: "token T=1, point masses",
        law: Law::Point,
        ..TOKEN
    },
    Case {
        name: "token T=1, low-rank drafts",
        law: Law::LowRank,
        ..TOKEN
    },
    Case {
        name: "token T=1, dense f32 drafts",
        law: Law::Dense,
        ..TOKEN
    },
];

/// Host logits of [`DISTINCT`] requests, and drafts drawn from them.
struct Block {
    target: Vec<bf16>,
    /// Draft logits, or base logits; empty unless the law has them.
    draft: Vec<f32>,
    /// Of a low-rank law; else empty.
    w2: Vec<bf16>,
    latents: Vec<bf16>,
    log_normalizers: Vec<f32>,
    candidate_tokens: Vec<i32>,
    candidate_logits: Vec<f32>,
    tokens: Vec<i32>,
}

impl Block {
    fn new(random: &mut Random, case: &Case) -> Self {
        let normals = random.normals(DISTINCT * NUM_ROWS * VOCAB_SIZE);
        let target: Vec<f32> = normals.iter().map(|x| 3.0 * x).collect();
        let noise = random.normals(DISTINCT * DRAFT_LEN * VOCAB_SIZE);
        let drafted = target
            .chunks_exact(NUM_ROWS * VOCAB_SIZE)
            .flat_map(|request| &request[..DRAFT_LEN * VOCAB_SIZE]);
        let draft: Vec<f32> = drafted.zip(noise).map(|(x, e)| x + 0.5 * e).collect();
        let mut block = Self {
            target: target.iter().map(|&x| bf16::from_f32(x)).collect(),
            draft: Vec::new(),
            w2: Vec::new(),
            latents: Vec::new(),
            log_normalizers: Vec::new(),
            candidate_tokens: Vec::new(),
            candidate_logits: Vec::new(),
            tokens: Vec::new(),
        };
        for row in draft.chunks_exact(VOCAB_SIZE) {
            let mut order: Vec<usize> = (0..VOCAB_SIZE).collect();
            order.select_nth_unstable_by(NUM_CANDIDATES, |&a, &b| row[b].total_cmp(&row[a]));
            let candidates = &order[..NUM_CANDIDATES];
            let logits: Vec<f32> = candidates.iter().map(|&v| row[v]).collect();
            block.tokens.push(if case.law.has_logits() {
                random.draw(row, case.temperature)
            } else {
                candidates[random.draw(&logits, case.temperature) as usize] as i32
            });
            let candidates = candidates.iter().map(|&v| v as i32);
            block.candidate_tokens.extend(candidates);
            block.candidate_logits.extend(logits);
        }
        if case.law == Law::LowRank {
            block.split(random, &draft, case.temperature);
        } else if case.law == Law::Dense {
            block.draft = draft;
        }
        block
    }

    /// The logits `draft` as base logits and the bias of random latents and a random W2.
    fn split(&mut self, random: &mut Random, draft: &[f32], temperature: f32) {
        let scaled = |values: Vec<f32>, scale: f32| -> Vec<bf16> {
            let values = values.into_iter();
            values.map(|x| bf16::from_f32(x * scale)).collect()
        };
        self.w2 = scaled(random.normals(VOCAB_SIZE * RANK), 0.1);
        self.latents = scaled(random.normals(DISTINCT * DRAFT_LEN * RANK), 0.1);
        for (row, latent) in draft
            .chunks_exact(VOCAB_SIZE)
            .zip(self.latents.chunks_exact(RANK))
        {
            let scaled = |l: f32| f64::from(l / temperature);
            let max = row.iter().copied().map(scaled).fold(f64::MIN, f64::max);
            let sum: f64 = row.iter().map(|&l| (scaled(l) - max).exp()).sum();
            self.log_normalizers.push((max + sum.ln()) as f32);
            let rows = row.iter().zip(self.w2.chunks_exact(RANK));
            self.draft.extend(rows.map(|(logit, w2)| {
                let products = w2.iter().zip(latent).map(|(a, b)| a.to_f32() * b.to_f32());
                logit - products.sum::<f32>()
            }));
        }
    }
}

/// All cases.
pub fn run(lab: &mut Lab) -> anyhow::Result<()> {
    for case in &CASES {
        let block = Block::new(&mut lab.random, case);
        for num_reqs in NUM_REQS {
            let target = NUM_ROWS * VOCAB_SIZE * size_of::<bf16>();
            let draft = DRAFT_LEN * VOCAB_SIZE * size_of::<f32>();
            // Of a low-rank law only some logits and rows of W2 are looked at.
            let needed = target + if case.law == Law::Dense { draft } else { 0 };
            let traffic = Traffic::once(num_reqs * needed);
            let name = format!("reqs={num_reqs} {}", case.name);
            lab.case(&name, traffic, |lab, copies| {
                Acceptance::new(lab, copies, num_reqs, case, &block)
            })?;
        }
    }
    Ok(())
}

struct Acceptance {
    stream: sys::dspark_stream,
    num_reqs: usize,
    filtered: bool,
    ruled: bool,
    law: Law,
    target_logits: Buffer<bf16>,
    draft_logits: Buffer<f32>,
    w2: Buffer<bf16>,
    latents: Buffer<bf16>,
    log_normalizers: Buffer<f32>,
    candidate_tokens: Buffer<i32>,
    candidate_logits: Buffer<f32>,
    rules: Buffer<i32>,
    draft_tokens: Buffer<i32>,
    qo_indptr: Buffer<i32>,
    anchor_positions: Buffer<i32>,
    temperature: Buffer<f32>,
    top_k: Buffer<i32>,
    top_p: Buffer<f32>,
    seeds: Buffer<u64>,
    num_accepted: Buffer<i32>,
    next_tokens: Buffer<i32>,
    status: Buffer<i32>,
    workspace: Buffer<u8>,
}

impl Acceptance {
    fn new(
        lab: &mut Lab,
        copies: usize,
        num_reqs: usize,
        case: &Case,
        block: &Block,
    ) -> anyhow::Result<Self> {
        let requests = copies * num_reqs;
        let tokens: Vec<i32> = block
            .tokens
            .iter()
            .copied()
            .cycle()
            .take(requests * DRAFT_LEN)
            .collect();
        let qo_indptr: Vec<i32> = (0..=num_reqs).map(|r| (r * NUM_ROWS) as i32).collect();
        let seeds: Vec<u64> = (0..requests as u64).collect();
        let pairs = requests * DRAFT_LEN * NUM_CANDIDATES;
        let (top_k, top_p) = case.filters.unwrap_or((0, 1.0));
        let mut work = Self {
            stream: lab.stream(),
            num_reqs,
            filtered: case.filters.is_some(),
            ruled: case.rule != ops::Rule::Token,
            law: case.law,
            target_logits: lab.tiled(requests * NUM_ROWS * VOCAB_SIZE, &block.target)?,
            draft_logits: if case.law.has_logits() {
                lab.tiled(requests * DRAFT_LEN * VOCAB_SIZE, &block.draft)?
            } else {
                lab.empty(0)?
            },
            w2: lab.empty(0)?,
            latents: lab.empty(0)?,
            log_normalizers: lab.empty(0)?,
            candidate_tokens: lab.tiled(pairs, &block.candidate_tokens)?,
            candidate_logits: lab.tiled(pairs, &block.candidate_logits)?,
            rules: lab.upload(&vec![case.rule as i32; num_reqs])?,
            draft_tokens: lab.upload(&tokens)?,
            qo_indptr: lab.upload(&qo_indptr)?,
            anchor_positions: lab.upload(&vec![100; num_reqs])?,
            temperature: lab.upload(&vec![case.temperature; num_reqs])?,
            top_k: lab.upload(&vec![top_k; num_reqs])?,
            top_p: lab.upload(&vec![top_p; num_reqs])?,
            seeds: lab.upload(&seeds)?,
            num_accepted: lab.upload(&vec![-1; requests])?,
            next_tokens: lab.upload(&vec![-1; requests])?,
            status: lab.upload(&vec![-1; requests])?,
            workspace: lab.empty(0)?,
        };
        if case.law == Law::LowRank {
            work.w2 = lab.upload(&block.w2)?;
            work.latents = lab.tiled(requests * DRAFT_LEN * RANK, &block.latents)?;
            work.log_normalizers = lab.tiled(requests * DRAFT_LEN, &block.log_normalizers)?;
        }
        let mut bytes = 0;
        let params = work.params(0);
        // SAFETY: reads the sizes of `params` and writes one host integer.
        check(unsafe {
            sys::launch::dspark_accept_workspace_size_cu(&raw const params, &raw mut bytes)
        })?;
        work.workspace = lab.empty(bytes)?;
        Ok(work)
    }

    fn params(&mut self, copy: usize) -> sys::dspark_accept_params {
        let first = copy * self.num_reqs;
        let drafts = first * DRAFT_LEN;
        // SAFETY: integers, floats and pointers; 0 and NULL leave a part out.
        let mut params: sys::dspark_accept_params = unsafe { std::mem::zeroed() };
        params.struct_size = struct_size::<sys::dspark_accept_params>();
        params.target_dtype = sys::DSPARK_DTYPE_BF16;
        params.draft_dtype = sys::DSPARK_DTYPE_F32;
        params.num_rows = (self.num_reqs * NUM_ROWS) as i32;
        params.num_reqs = self.num_reqs as i32;
        params.draft_len = DRAFT_LEN as i32;
        params.vocab_size = VOCAB_SIZE as i32;
        params.target_logits = self.target_logits.ptr(first * NUM_ROWS * VOCAB_SIZE).cast();
        params.stride_target_row = VOCAB_SIZE as i64;
        if self.law.has_logits() {
            params.draft_logits = self.draft_logits.ptr(drafts * VOCAB_SIZE).cast();
            params.stride_draft_row = VOCAB_SIZE as i64;
        }
        if self.law == Law::LowRank {
            params.draft_log_normalizers = self.log_normalizers.ptr(drafts);
            params.draft_markov_w2 = self.w2.ptr(0).cast();
            params.draft_latents = self.latents.ptr(drafts * RANK).cast();
            params.draft_w2_dtype = sys::DSPARK_DTYPE_BF16;
            params.draft_markov_rank = RANK as i32;
        }
        if self.law == Law::Candidates {
            params.num_candidates = NUM_CANDIDATES as i32;
            params.candidate_tokens = self.candidate_tokens.ptr(drafts * NUM_CANDIDATES);
            params.candidate_logits = self.candidate_logits.ptr(drafts * NUM_CANDIDATES);
        }
        params.draft_tokens = self.draft_tokens.ptr(drafts);
        params.qo_indptr = self.qo_indptr.ptr(0);
        params.anchor_positions = self.anchor_positions.ptr(0);
        params.temperature = self.temperature.ptr(0);
        if self.filtered {
            params.top_k = self.top_k.ptr(0);
            params.top_p = self.top_p.ptr(0);
        }
        if self.ruled {
            params.rules = self.rules.ptr(0);
        }
        params.seeds = self.seeds.ptr(first);
        params.num_accepted = self.num_accepted.mut_ptr(first);
        params.next_tokens = self.next_tokens.mut_ptr(first);
        params.status = self.status.mut_ptr(first);
        params.workspace = self.workspace.mut_ptr(0).cast();
        params.workspace_bytes = self.workspace.len();
        params
    }
}

impl Work for Acceptance {
    fn enqueue(&mut self, copy: usize) -> dspark::Result<()> {
        let params = self.params(copy);
        // SAFETY: every pointer is a window of a live buffer with the shape the params say; qo_indptr ends at num_rows
        // and drafts are below the vocabulary.
        check(unsafe { sys::launch::dspark_accept_cu(&raw const params, self.stream) })
    }

    /// The mean number of committed tokens of the calls that ran.
    fn inspect(&mut self) -> anyhow::Result<Option<String>> {
        let read = |buffer: &Buffer<i32>| -> dspark::Result<Vec<i32>> {
            let mut values = vec![0; buffer.len()];
            buffer.download(0, &mut values)?;
            Ok(values)
        };
        let status = read(&self.status)?;
        let accepted = read(&self.num_accepted)?;
        let next = read(&self.next_tokens)?;
        anyhow::ensure!(
            status.iter().all(|&s| s == 0) && next.iter().all(|&t| t >= 0),
            "status: expected 0 and a next token for every request, found {status:?}, {next:?}"
        );
        let mean = accepted.iter().map(|&n| f64::from(n)).sum::<f64>() / accepted.len() as f64;
        Ok(Some(format!("{:.2} tokens committed", mean + 1.0)))
    }
}
