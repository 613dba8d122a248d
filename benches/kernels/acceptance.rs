//! Target law and acceptance: 8 target rows and 7 draft laws a request, logits in f32.
//!
//! Draft logits are target logits with noise and the drafts are drawn from them, so that requests stop where they would
//! in service. Greedy requests need no draft law; its logits are given but do not count.

use dspark::device::Buffer;
use dspark::sys;

use crate::lab::{Lab, Traffic, Work, check, struct_size};
use crate::random::Random;

const VOCAB_SIZE: usize = 151_936;
const DRAFT_LEN: usize = 7;
const NUM_ROWS: usize = DRAFT_LEN + 1;
const NUM_REQS: [usize; 4] = [1, 8, 32, 128];
/// Requests with logits of their own; the others repeat them under other seeds.
const DISTINCT: usize = 4;

/// Sampling parameters of all requests of a case.
struct Rule {
    name: &'static str,
    temperature: f32,
    top_k: i32,
    top_p: f32,
}

const RULES: [Rule; 3] = [
    Rule {
        name: "token T=1",
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
    },
    Rule {
        name: "greedy",
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
    },
    Rule {
        name: "top-k 50 top-p 0.9 T=0.7",
        temperature: 0.7,
        top_k: 50,
        top_p: 0.9,
    },
];

/// Host logits of [`DISTINCT`] requests, and drafts drawn from them.
struct Block {
    target: Vec<f32>,
    draft: Vec<f32>,
    tokens: Vec<i32>,
}

impl Block {
    fn new(random: &mut Random, temperature: f32) -> Self {
        let normals = random.normals(DISTINCT * NUM_ROWS * VOCAB_SIZE);
        let target: Vec<f32> = normals.iter().map(|x| 3.0 * x).collect();
        let noise = random.normals(DISTINCT * DRAFT_LEN * VOCAB_SIZE);
        let drafted = target
            .chunks_exact(NUM_ROWS * VOCAB_SIZE)
            .flat_map(|request| &request[..DRAFT_LEN * VOCAB_SIZE]);
        let draft: Vec<f32> = drafted.zip(noise).map(|(x, e)| x + 0.5 * e).collect();
        let tokens = draft
            .chunks_exact(VOCAB_SIZE)
            .map(|row| random.draw(row, temperature))
            .collect();
        Self {
            target,
            draft,
            tokens,
        }
    }
}

/// All cases.
pub fn run(lab: &mut Lab) -> anyhow::Result<()> {
    for rule in &RULES {
        let block = Block::new(&mut lab.random, rule.temperature);
        for num_reqs in NUM_REQS {
            let row = VOCAB_SIZE * size_of::<f32>();
            let needed = if rule.temperature > 0.0 {
                NUM_ROWS + DRAFT_LEN
            } else {
                NUM_ROWS
            };
            let traffic = Traffic::once(num_reqs * needed * row);
            let name = format!("reqs={num_reqs} {}", rule.name);
            lab.case(&name, traffic, |lab, copies| {
                Acceptance::new(lab, copies, num_reqs, rule, &block)
            })?;
        }
    }
    Ok(())
}

struct Acceptance {
    stream: sys::dspark_stream,
    num_reqs: usize,
    target_logits: Buffer<f32>,
    draft_logits: Buffer<f32>,
    draft_tokens: Buffer<i32>,
    qo_indptr: Buffer<i32>,
    anchor_positions: Buffer<i32>,
    temperature: Buffer<f32>,
    top_k: Buffer<i32>,
    top_p: Buffer<f32>,
    min_p: Buffer<f32>,
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
        rule: &Rule,
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
        let mut work = Self {
            stream: lab.stream(),
            num_reqs,
            target_logits: lab.tiled(requests * NUM_ROWS * VOCAB_SIZE, &block.target)?,
            draft_logits: lab.tiled(requests * DRAFT_LEN * VOCAB_SIZE, &block.draft)?,
            draft_tokens: lab.upload(&tokens)?,
            qo_indptr: lab.upload(&qo_indptr)?,
            anchor_positions: lab.upload(&vec![100; num_reqs])?,
            temperature: lab.upload(&vec![rule.temperature; num_reqs])?,
            top_k: lab.upload(&vec![rule.top_k; num_reqs])?,
            top_p: lab.upload(&vec![rule.top_p; num_reqs])?,
            min_p: lab.upload(&vec![0.0; num_reqs])?,
            seeds: lab.upload(&seeds)?,
            num_accepted: lab.upload(&vec![-1; requests])?,
            next_tokens: lab.upload(&vec![-1; requests])?,
            status: lab.upload(&vec![-1; requests])?,
            workspace: lab.empty(0)?,
        };
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
        sys::dspark_accept_params {
            struct_size: struct_size::<sys::dspark_accept_params>(),
            num_rows: (self.num_reqs * NUM_ROWS) as i32,
            num_reqs: self.num_reqs as i32,
            draft_len: DRAFT_LEN as i32,
            vocab_size: VOCAB_SIZE as i32,
            target_logits: self.target_logits.ptr(first * NUM_ROWS * VOCAB_SIZE),
            draft_logits: self.draft_logits.ptr(first * DRAFT_LEN * VOCAB_SIZE),
            draft_tokens: self.draft_tokens.ptr(first * DRAFT_LEN),
            qo_indptr: self.qo_indptr.ptr(0),
            anchor_positions: self.anchor_positions.ptr(0),
            temperature: self.temperature.ptr(0),
            top_k: self.top_k.ptr(0),
            top_p: self.top_p.ptr(0),
            min_p: self.min_p.ptr(0),
            seeds: self.seeds.ptr(first),
            num_accepted: self.num_accepted.mut_ptr(first),
            next_tokens: self.next_tokens.mut_ptr(first),
            status: self.status.mut_ptr(first),
            workspace: self.workspace.mut_ptr(0).cast(),
            workspace_bytes: self.workspace.len(),
            stride_target_row: VOCAB_SIZE as i64,
            stride_draft_row: VOCAB_SIZE as i64,
        }
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
