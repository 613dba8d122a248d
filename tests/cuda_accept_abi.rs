//! Acceptance through its launcher: what only the C ABI has, a status for each request and weights in e4m3.
#![cfg(feature = "cuda")]

mod common;

use common::Rng;
use common::raw::{check, device, download, rounded, upload};
use dspark::device::{Buffer, Device};
use dspark::ops::{Purpose, e4m3};
use dspark::reference::choices::{Choices, Draw, Philox};
use dspark::sys;
use half::f16;

const UNWRITTEN: i32 = -7;

/// A call on full chains, without filters.
struct Call {
    vocab_size: usize,
    draft_len: usize,
    rules: Vec<i32>,
    temperature: Vec<f32>,
    target: Vec<f32>,
    /// Logits, or base logits of a low-rank law.
    draft: Vec<f32>,
    tokens: Vec<i32>,
    low_rank: Option<LowRank>,
}

/// Weights in e4m3 with a scale for each row, latents in f16.
#[derive(Clone)]
struct LowRank {
    rank: usize,
    w2: Vec<u8>,
    scales: Vec<f32>,
    latents: Vec<f32>,
    log_normalizers: Vec<f32>,
}

#[derive(Clone, Debug, PartialEq)]
struct Answer {
    status: Vec<i32>,
    num_accepted: Vec<i32>,
    next_tokens: Vec<i32>,
    flags: Vec<i32>,
}

impl Answer {
    fn of(&self, r: usize, draft_len: usize) -> (i32, i32, i32, &[i32]) {
        let flags = &self.flags[r * draft_len..][..draft_len];
        (
            self.status[r],
            self.num_accepted[r],
            self.next_tokens[r],
            flags,
        )
    }
}

/// The buffers of a low-rank law.
struct Uploaded {
    w2: Buffer<u8>,
    scales: Buffer<f32>,
    latents: Buffer<f16>,
    log_normalizers: Buffer<f32>,
}

impl Uploaded {
    fn new(device: &Device, law: &LowRank) -> Self {
        let latents: Vec<f16> = law.latents.iter().copied().map(f16::from_f32).collect();
        Self {
            w2: upload(device, &law.w2),
            scales: upload(device, &law.scales),
            latents: upload(device, &latents),
            log_normalizers: upload(device, &law.log_normalizers),
        }
    }
}

impl Call {
    fn num_reqs(&self) -> usize {
        self.rules.len()
    }

    fn run(&self, device: &Device) -> Answer {
        let num_reqs = self.num_reqs();
        let num_rows = num_reqs * (self.draft_len + 1);
        let target = upload(device, &rounded(&self.target));
        let draft = upload(device, &self.draft);
        let tokens = upload(device, &self.tokens);
        let indptr: Vec<i32> = (0..=num_reqs)
            .map(|r| (r * (self.draft_len + 1)) as i32)
            .collect();
        let indptr = upload(device, &indptr);
        let positions = upload(device, &vec![0_i32; num_reqs]);
        let temperature = upload(device, &self.temperature);
        let rules = upload(device, &self.rules);
        let seeds = upload(device, &(0..num_reqs as u64).collect::<Vec<_>>());
        let law = self.low_rank.as_ref().map(|law| Uploaded::new(device, law));
        let unwritten = |len: usize| upload(device, &vec![UNWRITTEN; len]);
        let [mut status, mut accepted, mut next] = [0; 3].map(|_| unwritten(num_reqs));
        let mut flags = unwritten(num_reqs * self.draft_len);
        // SAFETY: integers, floats and pointers; 0 and NULL leave a part out.
        let mut params: sys::dspark_accept_params = unsafe { std::mem::zeroed() };
        params.struct_size = size_of::<sys::dspark_accept_params>() as u32;
        params.target_dtype = sys::DSPARK_DTYPE_BF16;
        params.draft_dtype = sys::DSPARK_DTYPE_F32;
        params.num_rows = num_rows as i32;
        params.num_reqs = num_reqs as i32;
        params.draft_len = self.draft_len as i32;
        params.vocab_size = self.vocab_size as i32;
        params.target_logits = target.ptr(0).cast();
        params.stride_target_row = self.vocab_size as i64;
        params.draft_logits = draft.ptr(0).cast();
        params.stride_draft_row = self.vocab_size as i64;
        if let (Some(law), Some(sizes)) = (&law, &self.low_rank) {
            params.draft_markov_w2 = law.w2.ptr(0).cast();
            params.draft_w2_scales = law.scales.ptr(0);
            params.draft_latents = law.latents.ptr(0).cast();
            params.draft_log_normalizers = law.log_normalizers.ptr(0);
            params.draft_w2_dtype = sys::DSPARK_DTYPE_E4M3;
            params.draft_markov_rank = sizes.rank as i32;
        }
        params.draft_tokens = tokens.ptr(0);
        params.qo_indptr = indptr.ptr(0);
        params.anchor_positions = positions.ptr(0);
        params.temperature = temperature.ptr(0);
        params.rules = rules.ptr(0);
        params.seeds = seeds.ptr(0);
        params.status = status.mut_ptr(0);
        params.num_accepted = accepted.mut_ptr(0);
        params.next_tokens = next.mut_ptr(0);
        params.accept_flags = flags.mut_ptr(0);
        let mut bytes = 0;
        // SAFETY: reads the sizes of `params` and writes one host integer.
        check(unsafe {
            sys::launch::dspark_accept_workspace_size_cu(&raw const params, &raw mut bytes)
        });
        let mut workspace = upload(device, &vec![0xA5_u8; bytes]);
        params.workspace = workspace.mut_ptr(0).cast();
        params.workspace_bytes = bytes;
        device.bind().unwrap();
        // SAFETY: every pointer is a live buffer of the shape that `params` says, on the stream of their uploads.
        check(unsafe {
            sys::launch::dspark_accept_cu(&raw const params, device.raw_stream().cast())
        });
        Answer {
            status: download(&status),
            num_accepted: download(&accepted),
            next_tokens: download(&next),
            flags: download(&flags),
        }
    }
}

/// Requests of every rule, some greedy, whose drafts are now and then what their rows say.
fn mixed(num_reqs: usize, vocab_size: usize) -> Call {
    let draft_len = 3;
    let mut rng = Rng::new(num_reqs as u64);
    let draft = rng.normals(num_reqs * draft_len * vocab_size, 2.0);
    let mut call = Call {
        vocab_size,
        draft_len,
        rules: (0..num_reqs as i32).map(|r| r % 3).collect(),
        temperature: (0..num_reqs).map(|r| [1.0, 0.8, 1.2, 0.0][r % 4]).collect(),
        target: Vec::new(),
        tokens: Vec::new(),
        draft,
        low_rank: None,
    };
    for (index, row) in call.draft.chunks(vocab_size).enumerate() {
        let best = (0..vocab_size).max_by(|&a, &b| row[a].total_cmp(&row[b]));
        call.tokens.push(best.unwrap() as i32);
        call.target.extend_from_slice(row);
        if index % draft_len == draft_len - 1 {
            call.target.extend(rng.normals(vocab_size, 2.0));
        }
    }
    call
}

#[test]
fn a_bad_row_costs_its_request_alone() {
    let Some(device) = device() else { return };
    let (num_reqs, vocab_size) = (24, 2500);
    let good = mixed(num_reqs, vocab_size).run(&device);
    assert!(good.status.iter().all(|&status| status == 0));
    assert!(good.num_accepted.iter().any(|&n| n > 0));
    let bad_rows = [
        (f32::NAN, 1),
        (f32::INFINITY, 1),
        (f32::NEG_INFINITY, vocab_size),
        (f32::NAN, vocab_size),
    ];
    for (value, width) in bad_rows {
        for bad in 0..num_reqs {
            let mut call = mixed(num_reqs, vocab_size);
            let first = bad * (call.draft_len + 1) * vocab_size;
            let at = first + if width == 1 { vocab_size - 1 } else { 0 };
            call.target[at..at + width].fill(value);
            let got = call.run(&device);
            let flags = vec![0; call.draft_len];
            assert_eq!(
                got.of(bad, call.draft_len),
                (1, 0, -1, &flags[..]),
                "{value} in request {bad}"
            );
            for r in (0..num_reqs).filter(|&r| r != bad) {
                assert_eq!(got.of(r, call.draft_len), good.of(r, call.draft_len));
            }
        }
    }
}

const VOCAB: usize = 6;
const RANK: usize = 16;
const NUM_DRAWS: usize = 1 << 20;

/// The law of two drafts over a small vocabulary: base logits and [`LowRank`].
fn small_law() -> (Vec<f32>, LowRank) {
    let mut rng = Rng::new(11);
    let law = LowRank {
        rank: RANK,
        w2: (0..VOCAB * RANK)
            .map(|_| (rng.next() & 0xBF) as u8)
            .collect(),
        scales: (0..VOCAB).map(|_| 0.3 + 0.2 * rng.uniform()).collect(),
        latents: rng.normals(2 * RANK, 0.5),
        log_normalizers: Vec::new(),
    };
    (rng.normals(2 * VOCAB, 1.0), law)
}

fn softmax(row: &[f64]) -> (Vec<f64>, f64) {
    let max = row.iter().copied().fold(f64::MIN, f64::max);
    let total: f64 = row.iter().map(|l| (l - max).exp()).sum();
    (
        row.iter().map(|l| (l - max).exp() / total).collect(),
        max + total.ln(),
    )
}

/// The chi-square of the first committed token over the limit that it passes once in 1e9 times. `shifted`: acceptance
/// sees the latents of the neighbouring draft.
fn e4m3_ratio(device: &Device, rule: sys::dspark_rule, shifted: bool) -> f64 {
    let (base, mut law) = small_law();
    let row = |k: usize| -> Vec<f64> {
        let latent = &law.latents[k * RANK..][..RANK];
        let logit = |v: usize| {
            let weights = law.w2[v * RANK..][..RANK].iter().zip(latent);
            let dot: f64 = weights.map(|(&w, &x)| f64::from(e4m3::decode(w) * x)).sum();
            f64::from(base[k * VOCAB + v]) + f64::from(law.scales[v]) * dot
        };
        (0..VOCAB).map(logit).collect()
    };
    let laws = [0, 1].map(|k| softmax(&row(k)));
    let mut tokens = Vec::with_capacity(2 * NUM_DRAWS);
    for seed in 0..NUM_DRAWS as u64 {
        for (k, (probs, _)) in laws.iter().enumerate() {
            let draw = Draw {
                seed,
                position: 1 + k as u32,
                purpose: Purpose::Draft,
                ordinal: 0,
            };
            tokens.push(Philox.categorical(draw, probs) as i32);
        }
    }
    law.log_normalizers = [laws[0].1 as f32, laws[1].1 as f32].repeat(NUM_DRAWS);
    if shifted {
        law.latents.rotate_left(RANK);
    }
    law.latents = law.latents.repeat(NUM_DRAWS);
    let target = Rng::new(12).normals(3 * VOCAB, 1.0);
    let call = Call {
        vocab_size: VOCAB,
        draft_len: 2,
        rules: vec![rule; NUM_DRAWS],
        temperature: vec![1.0; NUM_DRAWS],
        target: target.repeat(NUM_DRAWS),
        draft: base.repeat(NUM_DRAWS),
        tokens,
        low_rank: Some(law),
    };
    let answer = call.run(device);
    let mut counts = [0.0; VOCAB];
    for r in 0..NUM_DRAWS {
        let kept = answer.num_accepted[r] > 0;
        let first = if kept {
            call.tokens[2 * r]
        } else {
            answer.next_tokens[r]
        };
        counts[first as usize] += 1.0;
    }
    let first_row: Vec<f64> = target[..VOCAB].iter().map(|&l| f64::from(l)).collect();
    let terms = counts.iter().zip(softmax(&first_row).0).map(|(count, p)| {
        let mean = p * NUM_DRAWS as f64;
        (count - mean).powi(2) / mean
    });
    terms.sum::<f64>() / 50.0 // 5 degrees of freedom: the 1 - 1e-9 quantile
}

#[test]
fn a_million_draws_from_e4m3_weights_have_the_targets_law() {
    let Some(device) = device() else { return };
    for rule in [sys::DSPARK_RULE_TOKEN, sys::DSPARK_RULE_BLOCK] {
        let right = e4m3_ratio(&device, rule, false);
        assert!(right < 1.0, "rule {rule}: {right}");
        let wrong = e4m3_ratio(&device, rule, true);
        assert!(wrong > 1.0, "rule {rule}, shifted: {wrong}");
    }
}
