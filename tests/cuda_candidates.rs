//! The draft head over a candidate set against a plain f64 walk, and the law it draws from by chi-square.
#![cfg(feature = "cuda")]

mod common;

use common::Rng;
use common::raw::{check, device, download, rounded, upload};
use dspark::device::Device;
use dspark::ops::Purpose;
use dspark::reference::philox::token_exponential;
use dspark::sys;

/// Scores closer than this may be ordered either way.
const NEAR_TIE: f64 = 1e-4;
const NO_CANDIDATE: i32 = -1;

/// A call with the vanilla head.
struct Case {
    num_reqs: usize,
    draft_len: usize,
    vocab_size: usize,
    rank: usize,
    num_top: usize,
    num_bigram: usize,
    logits: Vec<f32>,
    markov_w1: Vec<f32>,
    markov_w2: Vec<f32>,
    bigrams: Vec<i32>,
    anchors: Vec<i32>,
    temperature: Vec<f32>,
    seeds: Vec<u64>,
    bf16_logits: bool,
    /// Whether a grammar forbids every token whose index has a remainder of 1 by 3.
    masked: bool,
    /// top-k, top-p and min-p of each request.
    filters: Vec<(i32, f32, f32)>,
}

#[derive(Debug, PartialEq)]
struct Walk {
    tokens: Vec<i32>,
    candidates: Vec<i32>,
    logits: Vec<f32>,
}

const ANCHOR_POSITION: u32 = 100;

impl Case {
    fn new(num_reqs: usize, draft_len: usize, vocab_size: usize, rank: usize) -> Self {
        let mut rng = Rng::new((num_reqs * vocab_size + rank) as u64);
        let mut case = Self {
            num_reqs,
            draft_len,
            vocab_size,
            rank,
            num_top: 64,
            num_bigram: 0,
            logits: rng.normals(num_reqs * draft_len * vocab_size, 2.0),
            markov_w1: rng.normals(vocab_size * rank, 1.0),
            markov_w2: rng.normals(vocab_size * rank, (rank as f32).sqrt().recip()),
            bigrams: Vec::new(),
            anchors: (0..num_reqs)
                .map(|_| rng.below(vocab_size) as i32)
                .collect(),
            temperature: (0..num_reqs).map(|r| [1.0, 0.0, 0.5][r % 3]).collect(),
            seeds: (0..num_reqs as u64).map(|r| 0xABCD_0000 + 13 * r).collect(),
            bf16_logits: false,
            masked: false,
            filters: vec![(0, 1.0, 0.0); num_reqs],
        };
        // bf16 numbers tie often by themselves; some that can never be drawn.
        for value in case.logits.iter_mut().step_by(17) {
            *value = f32::NEG_INFINITY;
        }
        case
    }

    fn top(mut self, num_top: usize) -> Self {
        self.num_top = num_top;
        self
    }

    fn bf16(mut self) -> Self {
        self.bf16_logits = true;
        self
    }

    fn masked(mut self) -> Self {
        self.masked = true;
        self
    }

    /// All base logits equal: the lowest indices are the top.
    fn flat(mut self) -> Self {
        self.logits.fill(1.5);
        self
    }

    /// Different filters from request to request; some have none.
    fn filtered(mut self) -> Self {
        let kinds = [
            (5, 1.0, 0.0),
            (0, 0.7, 0.0),
            (0, 1.0, 0.1),
            (12, 0.8, 0.02),
            (0, 1.0, 0.0),
        ];
        self.filters = (0..self.num_reqs).map(|r| kinds[r % kinds.len()]).collect();
        self.temperature.fill(0.9);
        self
    }

    /// What the filters of request r leave of the logits; -inf for the rest.
    fn filter(&self, r: usize, logits: &mut [f64]) {
        let (top_k, top_p, min_p) = self.filters[r];
        let temperature = f64::from(self.temperature[r]);
        if temperature == 0.0 {
            return;
        }
        let mut order: Vec<f64> = logits.to_vec();
        order.sort_by(|a, b| b.total_cmp(a));
        let last = if top_k > 0 {
            order[(top_k as usize).min(order.len()) - 1]
        } else {
            f64::NEG_INFINITY
        };
        order.retain(|&l| l >= last);
        let weight = |l: f64| ((l - order[0]) / temperature).exp();
        let all: f64 = order.iter().map(|&l| weight(l)).sum();
        for l in logits {
            let above: f64 = order.iter().filter(|&&o| o > *l).map(|&o| weight(o)).sum();
            let kept = *l >= last
                && (top_p >= 1.0 || above < f64::from(top_p) * all)
                && weight(*l) >= f64::from(min_p);
            if !kept {
                *l = f64::NEG_INFINITY;
            }
        }
    }

    fn allows(&self, token: usize) -> bool {
        !self.masked || token % 3 != 1
    }

    /// The grammar's words for `num_rows` rows.
    fn mask(&self, num_rows: usize) -> Vec<i32> {
        let mut row = vec![0_u32; self.vocab_size.div_ceil(32)];
        for token in (0..self.vocab_size).filter(|&token| self.allows(token)) {
            row[token / 32] |= 1 << (token % 32);
        }
        let row: Vec<i32> = row.into_iter().map(u32::cast_signed).collect();
        row.repeat(num_rows)
    }

    fn bigrams(mut self, num_bigram: usize) -> Self {
        let mut rng = Rng::new(99);
        self.num_bigram = num_bigram;
        for _ in 0..self.vocab_size {
            let first = rng.below(self.vocab_size);
            let row = (0..num_bigram).map(|i| ((first + 7 * i) % self.vocab_size) as i32);
            self.bigrams.extend(row);
        }
        self
    }

    fn num_candidates(&self) -> usize {
        self.num_top + self.num_bigram
    }

    /// Runs on the device the requests in `which`.
    fn run(&self, device: &Device, which: std::ops::Range<usize>) -> Walk {
        let num_reqs = which.len();
        let num_rows = num_reqs * self.draft_len;
        let num_pairs = num_rows * self.num_candidates();
        let row = self.draft_len * self.vocab_size;
        let base = &self.logits[which.start * row..which.end * row];
        let base_f32 = upload(device, base);
        let base_bf16 = upload(device, &rounded(base));
        let w1 = upload(device, &rounded(&self.markov_w1));
        let w2 = upload(device, &rounded(&self.markov_w2));
        let bigrams = upload(device, &self.bigrams);
        let anchors = upload(device, &self.anchors[which.clone()]);
        let positions = upload(device, &vec![ANCHOR_POSITION as i32; num_reqs]);
        let temperature = upload(device, &self.temperature[which.clone()]);
        let filters = &self.filters[which.clone()];
        let filters = (
            upload(device, &filters.iter().map(|f| f.0).collect::<Vec<_>>()),
            upload(device, &filters.iter().map(|f| f.1).collect::<Vec<_>>()),
            upload(device, &filters.iter().map(|f| f.2).collect::<Vec<_>>()),
        );
        let seeds = upload(device, &self.seeds[which]);
        let mask = upload(device, &self.mask(num_rows));
        let mut tokens = upload(device, &vec![-7; num_rows]);
        let mut candidates = upload(device, &vec![-7; num_pairs]);
        let mut logits = upload(device, &vec![f32::NAN; num_pairs]);
        let mut params = sys::dspark_draft_candidates_params {
            struct_size: size_of::<sys::dspark_draft_candidates_params>() as u32,
            dtype: sys::DSPARK_DTYPE_BF16,
            logits_dtype: if self.bf16_logits {
                sys::DSPARK_DTYPE_BF16
            } else {
                sys::DSPARK_DTYPE_F32
            },
            head: sys::DSPARK_HEAD_VANILLA,
            num_reqs: num_reqs as i32,
            draft_len: self.draft_len as i32,
            vocab_size: self.vocab_size as i32,
            hidden_size: 0,
            markov_rank: self.rank as i32,
            num_top: self.num_top as i32,
            num_bigram: self.num_bigram as i32,
            confidence_with_markov: 0,
            confidence_bias: 0.0,
            logits: if self.bf16_logits {
                base_bf16.ptr(0).cast()
            } else {
                base_f32.ptr(0).cast()
            },
            hidden: std::ptr::null(),
            markov_w1: w1.ptr(0).cast(),
            markov_w2: w2.ptr(0).cast(),
            proj_weight: std::ptr::null(),
            proj_bias: std::ptr::null(),
            confidence_weight: std::ptr::null(),
            bigram_tokens: bigrams.ptr(0),
            anchors: anchors.ptr(0),
            anchor_positions: positions.ptr(0),
            temperature: temperature.ptr(0),
            seeds: seeds.ptr(0),
            draft_tokens: tokens.mut_ptr(0),
            confidence: std::ptr::null_mut(),
            candidate_tokens: candidates.mut_ptr(0),
            candidate_logits: logits.mut_ptr(0),
            workspace: std::ptr::null_mut(),
            workspace_bytes: 0,
            stride_logits_row: self.vocab_size as i64,
            rules: std::ptr::null(),
            mask: if self.masked {
                mask.ptr(0)
            } else {
                std::ptr::null()
            },
            top_k: filters.0.ptr(0),
            top_p: filters.1.ptr(0),
            min_p: filters.2.ptr(0),
        };
        // SAFETY: reads the sizes of `params` and writes one host integer.
        check(unsafe {
            sys::launch::dspark_draft_candidates_workspace_size_cu(
                &raw const params,
                &raw mut params.workspace_bytes,
            )
        });
        let mut workspace = upload(device, &vec![0xFF_u8; params.workspace_bytes]);
        params.workspace = workspace.mut_ptr(0).cast();
        device.bind().unwrap();
        // SAFETY: every pointer is a live buffer of the shape the params say.
        check(unsafe {
            let stream = device.raw_stream().cast();
            sys::launch::dspark_draft_candidates_cu(&raw const params, stream)
        });
        Walk {
            tokens: download(&tokens),
            candidates: download(&candidates),
            logits: download(&logits),
        }
    }

    /// The candidates of a row after `previous`, in the order of the contract, and their logits.
    fn expected_pairs(&self, row: usize, previous: i32) -> Vec<(i32, f64)> {
        let base = &self.logits[row * self.vocab_size..][..self.vocab_size];
        let mut order: Vec<i32> = (0..self.vocab_size as i32)
            .filter(|&v| base[v as usize] > f32::NEG_INFINITY && self.allows(v as usize))
            .collect();
        order.sort_by(|&a, &b| {
            base[b as usize]
                .total_cmp(&base[a as usize])
                .then(a.cmp(&b))
        });
        order.truncate(self.num_top);
        let top = order.clone();
        order.resize(self.num_top, NO_CANDIDATE);
        let from = previous as usize * self.num_bigram;
        for &token in &self.bigrams[from..from + self.num_bigram] {
            let missing = top.contains(&token)
                || base[token as usize] == f32::NEG_INFINITY
                || !self.allows(token as usize);
            order.push(if missing { NO_CANDIDATE } else { token });
        }
        let weights = |table: &[f32], v: i32| table[v as usize * self.rank..][..self.rank].to_vec();
        let latent = weights(&self.markov_w1, previous);
        let logit = |v: i32| {
            let products = weights(&self.markov_w2, v);
            let products = products.iter().zip(&latent);
            let bias: f64 = products.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            f64::from(base[v as usize]) + bias
        };
        let mut logits: Vec<f64> = (order.iter())
            .map(|&v| {
                if v == NO_CANDIDATE {
                    f64::NEG_INFINITY
                } else {
                    logit(v)
                }
            })
            .collect();
        self.filter(row / self.draft_len, &mut logits);
        order.into_iter().zip(logits).collect()
    }

    fn score(&self, r: usize, k: usize, (token, logit): (i32, f64)) -> f64 {
        let temperature = f64::from(self.temperature[r]);
        if temperature == 0.0 || token < 0 {
            return logit;
        }
        let position = ANCHOR_POSITION + 1 + k as u32;
        let purpose = Purpose::Draft as u32;
        let e = token_exponential(self.seeds[r], position, purpose, token as usize);
        logit - temperature * e.ln()
    }

    /// Follows the tokens of `walk` and judges each step by itself.
    fn compare(&self, walk: &Walk) {
        for r in 0..self.num_reqs {
            let mut previous = self.anchors[r];
            for k in 0..self.draft_len {
                let row = r * self.draft_len + k;
                let pairs = self.expected_pairs(row, previous);
                let at = row * self.num_candidates();
                let got = &walk.candidates[at..at + pairs.len()];
                let want: Vec<i32> = pairs.iter().map(|pair| pair.0).collect();
                assert_eq!(got, want, "candidates of request {r}, draft {k}");
                for (i, (&got, &(_, want))) in walk.logits[at..].iter().zip(&pairs).enumerate() {
                    let close = f64::from(got) == want || (f64::from(got) - want).abs() < 1e-4;
                    assert!(close, "request {r}, draft {k}, pair {i}: {got} {want}");
                }
                let score = |pair: &(i32, f64)| self.score(r, k, *pair);
                let best = pairs.iter().map(score).fold(f64::NEG_INFINITY, f64::max);
                previous = walk.tokens[row];
                let drawn = pairs.iter().find(|pair| pair.0 == previous);
                let drawn = drawn.unwrap_or_else(|| panic!("request {r}, draft {k}: {previous}"));
                assert!(
                    best - score(drawn) < NEAR_TIE,
                    "request {r}, draft {k}: token {previous}"
                );
            }
        }
    }
}

fn cases() -> Vec<Case> {
    vec![
        Case::new(1, 7, 49_152, 64),
        Case::new(3, 7, 20_003, 256).top(256).bigrams(32),
        Case::new(9, 2, 1031, 33).top(5).bigrams(3),
        Case::new(4, 3, 8192, 64).bf16(),
        Case::new(5, 3, 9001, 64).top(100).bigrams(16).bf16(),
        Case::new(7, 2, 5, 8).bigrams(2),
        Case::new(64, 2, 1028, 64).top(8),
        Case::new(2, 2, 8193, 8).top(1),
        Case::new(3, 3, 9001, 64).bigrams(16).masked(),
        Case::new(2, 3, 20_003, 64).top(200).bf16().masked(),
        Case::new(10, 3, 9001, 64).filtered(),
        Case::new(6, 2, 1031, 256)
            .top(100)
            .bigrams(9)
            .bf16()
            .filtered(),
        // Rows of a request for more CTAs than a cluster has, all parts of the rank, few requests and many.
        Case::new(1, 9, 12_800, 256),
        Case::new(12, 9, 12_800, 256).bf16().filtered(),
        Case::new(40, 7, 3203, 128).top(256).bf16().masked(),
        // More than one row's worth of equal logits, read by whoever judges them and before.
        Case::new(2, 2, 40_000, 32).top(64).flat(),
        Case::new(20, 4, 40_000, 32).top(64).flat(),
    ]
}

#[test]
fn candidates_and_tokens() {
    let Some(device) = device() else { return };
    for case in cases() {
        case.compare(&case.run(&device, 0..case.num_reqs));
    }
}

#[test]
fn a_request_walks_the_same_alone_and_in_company() {
    let Some(device) = device() else { return };
    for case in cases() {
        let all = case.run(&device, 0..case.num_reqs);
        let pairs = case.draft_len * case.num_candidates();
        for r in 0..case.num_reqs {
            let alone = case.run(&device, r..r + 1);
            let tokens = &all.tokens[r * case.draft_len..][..case.draft_len];
            assert_eq!(alone.tokens, tokens);
            assert_eq!(alone.candidates, all.candidates[r * pairs..][..pairs]);
            assert_eq!(alone.logits, all.logits[r * pairs..][..pairs]);
        }
    }
}

#[test]
fn a_row_without_candidates_drafts_token_zero() {
    let Some(device) = device() else { return };
    let mut case = Case::new(3, 2, 9001, 64).bigrams(4);
    let dead = 3 * case.vocab_size..4 * case.vocab_size;
    case.logits[dead].fill(f32::NEG_INFINITY);
    let walk = case.run(&device, 0..3);
    assert_eq!(walk.tokens[3], 0);
    let pairs = &walk.candidates[3 * case.num_candidates()..][..case.num_candidates()];
    assert!(pairs.iter().all(|&token| token == NO_CANDIDATE));
}

/// Chi-square of `counts` against `law`, in degrees of freedom.
fn chi_square(counts: &[f64], law: &[f64]) -> f64 {
    let total: f64 = counts.iter().sum();
    let terms = counts.iter().zip(law);
    let sum: f64 = terms
        .map(|(count, p)| (count - total * p).powi(2) / (total * p))
        .sum();
    sum / (law.len() - 1) as f64
}

#[test]
fn tokens_follow_the_law_handed_on_and_no_other() {
    const DRAWS: usize = 8192;
    let Some(device) = device() else { return };
    let mut case = Case::new(DRAWS, 1, 12, 8).top(5).bigrams(2);
    case.temperature = vec![0.8; DRAWS];
    case.anchors = vec![3; DRAWS];
    let first: Vec<f32> = (0..12).map(|v| (v * 5 % 12) as f32 * 0.25).collect();
    case.logits = first.repeat(DRAWS);
    let walk = case.run(&device, 0..DRAWS);

    let pairs = case.expected_pairs(0, 3);
    let weights: Vec<f64> = pairs.iter().map(|pair| (pair.1 / 0.8).exp()).collect();
    let total: f64 = weights.iter().sum();
    let kept = |&i: &usize| pairs[i].0 >= 0;
    let kept: Vec<usize> = (0..pairs.len()).filter(kept).collect();
    let law: Vec<f64> = kept.iter().map(|&i| weights[i] / total).collect();
    let count = |i: &usize| walk.tokens.iter().filter(|&&t| t == pairs[*i].0).count() as f64;
    let counts: Vec<f64> = kept.iter().map(count).collect();
    assert!((counts.iter().sum::<f64>() - DRAWS as f64).abs() < 0.5);
    // At 4 or more degrees of freedom a true law exceeds 12 each about once in 10^9.
    let ratio = chi_square(&counts, &law);
    assert!(ratio < 12.0, "{ratio}: {counts:?} {law:?}");
    let mut shifted = law.clone();
    shifted.rotate_left(1);
    let ratio = chi_square(&counts, &shifted);
    assert!(ratio > 12.0, "a shifted law passes: {ratio}");
}
