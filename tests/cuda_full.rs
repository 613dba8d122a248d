//! The draft head over the whole vocabulary: the law it hands on against f64, its draws against that law, and what must not
//! change them.
#![cfg(feature = "cuda")]

mod common;

use std::ops::Range;

use common::Rng;
use common::raw::{check, device, download, e4m3, rounded, upload};
use dspark::device::Device;
use dspark::ops::Purpose;
use dspark::reference::philox::{exponential, key, philox4x32, token_exponential, uniform};
use dspark::sys;
use half::{bf16, f16};

const SPAN: usize = 64;
const ANCHOR_POSITION: u32 = 100;
const UNWRITTEN: i32 = -7;

/// A call with the vanilla head, or with none where the rank is 0.
#[derive(Clone)]
struct Case {
    num_reqs: usize,
    draft_len: usize,
    vocab_size: usize,
    rank: usize,
    f32_logits: bool,
    fp8: bool,
    masked: bool,
    base: Vec<f32>,
    markov_w1: Vec<f32>,
    /// bf16 numbers, or what the bytes of `w2_bytes` say.
    markov_w2: Vec<f32>,
    w2_bytes: Vec<u8>,
    scales: Vec<f32>,
    anchors: Vec<i32>,
    temperature: Vec<f32>,
    rules: Vec<i32>,
    draft_lens: Vec<i32>,
}

/// What a call hands on.
#[derive(Clone, Debug, PartialEq)]
struct Drafts {
    tokens: Vec<i32>,
    /// As bits: NaN must compare.
    log_normalizers: Vec<u32>,
    latents: Vec<u16>,
}

impl Case {
    fn new(num_reqs: usize, draft_len: usize, vocab_size: usize, rank: usize) -> Self {
        let mut rng = Rng::new((num_reqs * vocab_size + rank) as u64);
        let scale = (rank.max(1) as f32).sqrt().recip();
        let bf16_of = |values: Vec<f32>| -> Vec<f32> {
            let values = values.into_iter();
            values.map(|x| bf16::from_f32(x).to_f32()).collect()
        };
        let mut case = Self {
            num_reqs,
            draft_len,
            vocab_size,
            rank,
            f32_logits: false,
            fp8: false,
            masked: false,
            base: bf16_of(rng.normals(num_reqs * draft_len * vocab_size, 2.0)),
            markov_w1: bf16_of(rng.normals(vocab_size * rank, 1.0)),
            markov_w2: bf16_of(rng.normals(vocab_size * rank, scale)),
            w2_bytes: Vec::new(),
            scales: vec![1.0; vocab_size],
            anchors: (0..num_reqs)
                .map(|_| rng.below(vocab_size) as i32)
                .collect(),
            temperature: (0..num_reqs).map(|r| [1.0, 0.0, 0.6][r % 3]).collect(),
            rules: (0..num_reqs)
                .map(|r| [sys::DSPARK_RULE_TOKEN, sys::DSPARK_RULE_COUPLED][r / 3 % 2])
                .collect(),
            draft_lens: vec![draft_len as i32; num_reqs],
        };
        for row in case.base.chunks_mut(vocab_size) {
            // A tie on tokens far apart, and a token that can never be drawn.
            let top = row.iter().copied().fold(f32::MIN, f32::max);
            row[vocab_size - 1] = top;
            row[vocab_size / 3] = f32::NEG_INFINITY;
        }
        case
    }

    fn f32_logits(mut self) -> Self {
        self.f32_logits = true;
        let mut rng = Rng::new(77);
        for value in &mut self.base {
            *value += 0.001 * rng.normal();
        }
        self
    }

    fn fp8(mut self) -> Self {
        let mut rng = Rng::new(78);
        self.fp8 = true;
        self.w2_bytes = (0..self.vocab_size * self.rank)
            .map(|_| (rng.next() & 0xBF) as u8)
            .collect();
        self.markov_w2 = self.w2_bytes.iter().map(|&byte| e4m3(byte)).collect();
        let scale = (self.rank.max(1) as f32).sqrt().recip();
        self.scales = (0..self.vocab_size)
            .map(|_| scale * (0.5 + rng.uniform()))
            .collect();
        self
    }

    fn masked(mut self) -> Self {
        self.masked = true;
        self
    }

    fn allows(&self, token: usize) -> bool {
        !self.masked || token % 3 != 1
    }

    fn mask(&self, num_rows: usize) -> Vec<i32> {
        let mut row = vec![0_u32; self.vocab_size.div_ceil(32)];
        for token in (0..self.vocab_size).filter(|&token| self.allows(token)) {
            row[token / 32] |= 1 << (token % 32);
        }
        let row: Vec<i32> = row.into_iter().map(u32::cast_signed).collect();
        row.repeat(num_rows)
    }

    fn seed(request: usize) -> u64 {
        0xABCD_0000_0000 + 13 * request as u64
    }

    fn all(&self, device: &Device) -> Drafts {
        self.run(device, 0..self.num_reqs)
    }

    fn run(&self, device: &Device, which: Range<usize>) -> Drafts {
        let num_reqs = which.len();
        let num_rows = num_reqs * self.draft_len;
        let row = self.draft_len * self.vocab_size;
        let base = &self.base[which.start * row..which.end * row];
        let base_f32 = upload(device, base);
        let base_bf16 = upload(device, &rounded(base));
        let w1 = upload(device, &rounded(&self.markov_w1));
        let w2 = upload(device, &rounded(&self.markov_w2));
        let w2_bytes = upload(device, &self.w2_bytes);
        let scales = upload(device, &self.scales);
        let anchors = upload(device, &self.anchors[which.clone()]);
        let positions = upload(device, &vec![ANCHOR_POSITION as i32; num_reqs]);
        let temperature = upload(device, &self.temperature[which.clone()]);
        let rules = upload(device, &self.rules[which.clone()]);
        let draft_lens = upload(device, &self.draft_lens[which.clone()]);
        let seeds = upload(device, &which.map(Self::seed).collect::<Vec<_>>());
        let mask = upload(device, &self.mask(num_rows));
        let mut tokens = upload(device, &vec![UNWRITTEN; num_rows]);
        let mut log_normalizers = upload(device, &vec![0xFFFF_FFFF_u32; num_rows]);
        let mut latents = upload(device, &vec![0xFFFF_u16; num_rows * self.rank]);
        let has_head = self.rank > 0;
        let mut params = sys::dspark_draft_full_params {
            struct_size: size_of::<sys::dspark_draft_full_params>() as u32,
            dtype: sys::DSPARK_DTYPE_BF16,
            logits_dtype: if self.f32_logits {
                sys::DSPARK_DTYPE_F32
            } else {
                sys::DSPARK_DTYPE_BF16
            },
            w2_dtype: if self.fp8 {
                sys::DSPARK_DTYPE_E4M3
            } else {
                sys::DSPARK_DTYPE_BF16
            },
            head: if has_head {
                sys::DSPARK_HEAD_VANILLA
            } else {
                sys::DSPARK_HEAD_NONE
            },
            num_reqs: num_reqs as i32,
            draft_len: self.draft_len as i32,
            vocab_size: self.vocab_size as i32,
            hidden_size: 0,
            markov_rank: self.rank as i32,
            confidence_with_markov: 0,
            confidence_bias: 0.0,
            logits: if self.f32_logits {
                base_f32.ptr(0).cast()
            } else {
                base_bf16.ptr(0).cast()
            },
            hidden: std::ptr::null(),
            markov_w1: w1.ptr(0).cast(),
            markov_w2: if self.fp8 {
                w2_bytes.ptr(0).cast()
            } else {
                w2.ptr(0).cast()
            },
            w2_scales: scales.ptr(0),
            proj_weight: std::ptr::null(),
            proj_bias: std::ptr::null(),
            confidence_weight: std::ptr::null(),
            anchors: anchors.ptr(0),
            anchor_positions: positions.ptr(0),
            draft_lens: draft_lens.ptr(0),
            temperature: temperature.ptr(0),
            seeds: seeds.ptr(0),
            rules: rules.ptr(0),
            mask: if self.masked {
                mask.ptr(0)
            } else {
                std::ptr::null()
            },
            draft_tokens: tokens.mut_ptr(0),
            log_normalizers: log_normalizers.mut_ptr(0).cast(),
            latents: latents.mut_ptr(0).cast(),
            confidence: std::ptr::null_mut(),
            confidence_logits: std::ptr::null_mut(),
            workspace: std::ptr::null_mut(),
            workspace_bytes: 0,
            stride_logits_row: self.vocab_size as i64,
        };
        // SAFETY: reads the sizes of `params` and writes one host integer.
        check(unsafe {
            sys::launch::dspark_draft_full_workspace_size_cu(
                &raw const params,
                &raw mut params.workspace_bytes,
            )
        });
        let mut workspace = upload(device, &vec![0xFF_u8; params.workspace_bytes]);
        params.workspace = workspace.mut_ptr(0).cast();
        device.bind().unwrap();
        // SAFETY: every pointer is a live buffer of the shape the params say.
        check(unsafe {
            sys::launch::dspark_draft_full_cu(&raw const params, device.raw_stream().cast())
        });
        let kept = if self.f32_logits {
            download(&base_f32)
        } else {
            download(&base_bf16).iter().map(|x| x.to_f32()).collect()
        };
        let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
        assert!(kept.iter().zip(base).all(same), "base logits were changed");
        Drafts {
            tokens: download(&tokens),
            log_normalizers: download(&log_normalizers),
            latents: download(&latents),
        }
    }

    /// The latent of a row as handed on, and that it is the row of W1.
    fn latent(&self, drafts: &Drafts, row: usize, previous: i32) -> Vec<f64> {
        let latent = &drafts.latents[row * self.rank..][..self.rank];
        let want = &self.markov_w1[previous as usize * self.rank..][..self.rank];
        let pairs = latent.iter().zip(want);
        pairs
            .map(|(&bits, &want)| {
                let want_bits = if self.fp8 {
                    f16::from_f32(want).to_bits()
                } else {
                    bf16::from_f32(want).to_bits()
                };
                assert_eq!(bits, want_bits, "latent of row {row}");
                if self.fp8 {
                    f16::from_bits(bits).to_f64()
                } else {
                    bf16::from_bits(bits).to_f64()
                }
            })
            .collect()
    }

    /// The logits of a row, in f64.
    fn logits(&self, row: usize, latent: &[f64]) -> Vec<f64> {
        (0..self.vocab_size)
            .map(|v| {
                let weights = &self.markov_w2[v * self.rank..][..self.rank];
                let products = weights.iter().zip(latent);
                let dot: f64 = products.map(|(&a, b)| f64::from(a) * b).sum();
                let base = f64::from(self.base[row * self.vocab_size + v]);
                if self.allows(v) {
                    base + dot * f64::from(self.scales[v])
                } else {
                    f64::NEG_INFINITY
                }
            })
            .collect()
    }

    /// Why `token` cannot have been drawn from `logits` as draft k (from 0) of request r at `position`, if it cannot.
    fn objection(&self, r: usize, position: u32, logits: &[f64], token: usize) -> Option<String> {
        const NEAR: f64 = 1e-4;
        let temperature = f64::from(self.temperature[r]);
        let coupled = self.rules[r] == sys::DSPARK_RULE_COUPLED;
        if temperature == 0.0 || coupled {
            let score = |v: usize| {
                if temperature == 0.0 {
                    return logits[v];
                }
                let e = token_exponential(Self::seed(r), position, Purpose::Bonus as u32, v);
                logits[v] - temperature * e.ln()
            };
            let best = (0..logits.len())
                .map(score)
                .fold(f64::NEG_INFINITY, f64::max);
            let regret = best - score(token);
            return (regret > NEAR).then(|| format!("regret {regret}"));
        }
        let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = logits
            .iter()
            .map(|l| ((l - top) / temperature).exp())
            .collect();
        let words = |span: usize| {
            let counter = [span as u32, position, Purpose::Draft as u32, 2];
            philox4x32(key(Self::seed(r)), counter)
        };
        let arrival = |span: usize| {
            let weight: f64 = weights.chunks(SPAN).nth(span).unwrap().iter().sum();
            exponential(words(span)[0]) / weight
        };
        let num_spans = weights.len().div_ceil(SPAN);
        let first = (0..num_spans).map(arrival).fold(f64::INFINITY, f64::min);
        let late = arrival(token / SPAN) / first - 1.0;
        if late > NEAR {
            return Some(format!("its span arrives {late} late"));
        }
        let span = &weights[token / SPAN * SPAN..weights.len().min(token / SPAN * SPAN + SPAN)];
        let all: f64 = span.iter().sum();
        let below: f64 = span[..token % SPAN].iter().sum::<f64>() / all;
        let above = below + span[token % SPAN] / all;
        let u = uniform(words(token / SPAN)[1]);
        let inside = below - NEAR * 0.1 <= u && u <= above + NEAR * 0.1;
        (!inside || span[token % SPAN] == 0.0).then(|| format!("{u} not in {below}..{above}"))
    }

    /// Follows the tokens of `drafts` and judges each step by itself; `shift` moves the noise's position. The number of
    /// steps that cannot be.
    fn objections(&self, drafts: &Drafts, shift: u32) -> usize {
        let mut objections = 0;
        for r in 0..self.num_reqs {
            let mut previous = self.anchors[r];
            for k in 0..self.draft_lens[r] as usize {
                let row = r * self.draft_len + k;
                let logits = self.logits(row, &self.latent(drafts, row, previous));
                let temperature = f64::from(self.temperature[r]);
                let t = if temperature == 0.0 { 1.0 } else { temperature };
                let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = logits.iter().map(|l| ((l - top) / t).exp()).sum();
                let want = top / t + sum.ln();
                let got = f64::from(f32::from_bits(drafts.log_normalizers[row]));
                let off = (got - want).abs();
                assert!(
                    off < 3e-6 * (1.0 + want.abs() / 8.0),
                    "row {row}: {got} {want}"
                );
                previous = drafts.tokens[row];
                assert!((0..self.vocab_size as i32).contains(&previous), "row {row}");
                let position = ANCHOR_POSITION + 1 + k as u32 + shift;
                let objection = self.objection(r, position, &logits, previous as usize);
                if let Some(objection) = objection {
                    objections += 1;
                    if shift == 0 {
                        println!("request {r}, draft {k}: token {previous}: {objection}");
                    }
                }
            }
        }
        objections
    }
}

fn cases() -> Vec<Case> {
    vec![
        Case::new(1, 7, 49_152, 256),
        Case::new(3, 7, 1031, 64),
        Case::new(9, 3, 4100, 128).f32_logits(),
        Case::new(5, 16, 260, 16),
        Case::new(17, 2, 9001, 240).fp8(),
        Case::new(33, 2, 1028, 256),
        Case::new(65, 2, 132, 64).fp8().f32_logits(),
        Case::new(130, 2, 520, 256),
        Case::new(70, 3, 17_008, 256).fp8(),
        Case::new(128, 3, 16_391, 192),
        Case::new(6, 3, 4, 32),
        Case::new(6, 3, 1031, 64).masked(),
        Case::new(20, 2, 8192, 128).fp8().masked(),
        Case::new(4, 3, 1031, 0),
        Case::new(3, 2, 151_936, 32).fp8(),
    ]
}

#[test]
fn the_law_handed_on_is_the_one_drawn_from() {
    let Some(device) = device() else { return };
    for case in cases() {
        let label = format!("{} reqs, vocab {}", case.num_reqs, case.vocab_size);
        assert_eq!(case.objections(&case.all(&device), 0), 0, "{label}");
    }
}

#[test]
fn draws_with_noise_shifted_by_a_position_are_told_apart() {
    let Some(device) = device() else { return };
    let case = Case::new(12, 3, 1031, 64);
    let hot = case.temperature.iter().filter(|&&t| t > 0.0).count() * case.draft_len;
    let objections = case.objections(&case.all(&device), 1);
    assert!(objections > hot / 2, "{objections} of {hot}");
}

#[test]
fn a_request_drafts_the_same_alone_and_in_company() {
    let Some(device) = device() else { return };
    for case in cases() {
        let all = case.all(&device);
        for r in 0..case.num_reqs {
            let alone = case.run(&device, r..r + 1);
            let rows = r * case.draft_len..(r + 1) * case.draft_len;
            assert_eq!(alone.tokens, all.tokens[rows.clone()], "request {r}");
            assert_eq!(alone.log_normalizers, all.log_normalizers[rows.clone()]);
            let latents = rows.start * case.rank..rows.end * case.rank;
            assert_eq!(alone.latents, all.latents[latents]);
        }
    }
}

#[test]
fn requests_that_draft_less_write_less_and_change_nobody() {
    let Some(device) = device() else { return };
    let whole = Case::new(40, 4, 1028, 64);
    let mut ragged = whole.clone();
    ragged.draft_lens = (0..40).map(|r| r % 5).collect();
    let (want, got) = (whole.all(&device), ragged.all(&device));
    for row in 0..40 * 4 {
        let drafted = ((row % 4) as i32) < ragged.draft_lens[row / 4];
        let token = if drafted { want.tokens[row] } else { UNWRITTEN };
        assert_eq!(got.tokens[row], token, "row {row}");
        if drafted {
            assert_eq!(got.log_normalizers[row], want.log_normalizers[row]);
        } else {
            assert_eq!(got.log_normalizers[row], 0xFFFF_FFFF);
        }
    }
}

#[test]
fn a_mask_is_base_logits_of_minus_infinity() {
    let Some(device) = device() else { return };
    for case in [
        Case::new(6, 3, 1031, 64),
        Case::new(35, 2, 260, 128).fp8(),
        Case::new(3, 2, 1028, 0),
    ] {
        let mut forbidden = case.clone();
        for (i, value) in forbidden.base.iter_mut().enumerate() {
            if i % case.vocab_size % 3 == 1 {
                *value = f32::NEG_INFINITY;
            }
        }
        let free = case.all(&device);
        let got = case.masked().all(&device);
        assert_eq!(got, forbidden.all(&device));
        assert_ne!(got.tokens, free.tokens, "the mask changed nothing");
    }
}

#[test]
fn a_row_without_a_law_drafts_token_zero() {
    let Some(device) = device() else { return };
    let mut case = Case::new(7, 2, 1028, 64);
    for (row, value) in [
        (0, f32::NEG_INFINITY),
        (3, f32::NAN),
        (7, f32::NEG_INFINITY),
    ] {
        case.base[row * 1028..(row + 1) * 1028].fill(value);
    }
    let drafts = case.all(&device);
    for row in [0, 3, 7] {
        assert_eq!(drafts.tokens[row], 0, "row {row}");
        let normalizer = f32::from_bits(drafts.log_normalizers[row]);
        assert!(!normalizer.is_finite(), "row {row}: {normalizer}");
    }
}

/// Chi-square of `counts` against `law`, in degrees of freedom.
fn chi_square(counts: &[f64], law: &[f64]) -> f64 {
    let total: f64 = counts.iter().sum();
    let terms = counts.iter().zip(law).filter(|(_, p)| **p > 0.0);
    let sum: f64 = terms
        .map(|(count, p)| (count - total * p).powi(2) / (total * p))
        .sum();
    sum / (law.len() - 1) as f64
}

#[test]
fn tokens_have_the_frequencies_of_the_law_and_of_no_other() {
    const DRAWS: usize = 16_384;
    const VOCAB: usize = 130;
    let Some(device) = device() else { return };
    for (fp8, rule) in [
        (false, sys::DSPARK_RULE_TOKEN),
        (true, sys::DSPARK_RULE_TOKEN),
        (false, sys::DSPARK_RULE_COUPLED),
    ] {
        let mut case = Case::new(DRAWS, 1, VOCAB, 16);
        if fp8 {
            case = case.fp8();
        }
        case.temperature = vec![0.8; DRAWS];
        case.rules = vec![rule; DRAWS];
        case.anchors = vec![3; DRAWS];
        let first: Vec<f32> = (0..VOCAB).map(|v| (v * 5 % 12) as f32 * 0.25).collect();
        case.base = first.repeat(DRAWS);
        let drafts = case.all(&device);
        let logits = case.logits(0, &case.latent(&drafts, 0, 3));
        let weights: Vec<f64> = logits.iter().map(|l| (l / 0.8).exp()).collect();
        let total: f64 = weights.iter().sum();
        let law: Vec<f64> = weights.iter().map(|w| w / total).collect();
        let mut counts = vec![0.0; VOCAB];
        for &token in &drafts.tokens {
            counts[token as usize] += 1.0;
        }
        // At 129 degrees of freedom a true law exceeds 1.9 each about once in 10^9.
        let ratio = chi_square(&counts, &law);
        assert!(ratio < 1.9, "{ratio}");
        let mut shifted = law.clone();
        shifted.rotate_left(1);
        let ratio = chi_square(&counts, &shifted);
        assert!(ratio > 1.9, "a shifted law passes: {ratio}");
    }
}
