//! A call of the draft head over the whole vocabulary, and what may come of it.

use std::ops::Range;

use dspark::device::{Buffer, Device};
use dspark::ops::{Purpose, e4m3};
use dspark::reference::philox::{exponential, key, philox4x32, token_exponential, uniform};
use dspark::sys;
use half::{bf16, f16};

use super::Rng;
use super::raw::{check, download, draft_full, empty_full, rounded, upload};

const SPAN: usize = 64;
const ANCHOR_POSITION: u32 = 100;
pub const UNWRITTEN: i32 = -7;

/// A call with the vanilla head, or with none where the rank is 0.
#[derive(Clone)]
pub struct Case {
    pub num_reqs: usize,
    pub draft_len: usize,
    pub vocab_size: usize,
    pub rank: usize,
    pub f32_logits: bool,
    pub fp8: bool,
    pub masked: bool,
    pub base: Vec<f32>,
    pub markov_w1: Vec<f32>,
    /// bf16 numbers, or what the bytes of `w2_bytes` say.
    pub markov_w2: Vec<f32>,
    pub w2_bytes: Vec<u8>,
    pub scales: Vec<f32>,
    pub anchors: Vec<i32>,
    pub temperature: Vec<f32>,
    pub rules: Vec<i32>,
    pub draft_lens: Vec<i32>,
    /// Rows of W2 that cannot win are skipped, with the lengths in their bounds times this: 1 is right.
    pub bounds: Option<f32>,
}

/// What a call hands on.
#[derive(Clone, Debug, PartialEq)]
pub struct Drafts {
    pub tokens: Vec<i32>,
    /// As bits: NaN must compare.
    pub log_normalizers: Vec<u32>,
    pub latents: Vec<u16>,
    /// Written where rows are skipped.
    pub rows_read: Vec<u64>,
}

impl Case {
    pub fn new(num_reqs: usize, draft_len: usize, vocab_size: usize, rank: usize) -> Self {
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
            bounds: None,
        };
        for row in case.base.chunks_mut(vocab_size) {
            // A tie on tokens far apart, and a token that can never be drawn.
            let top = row.iter().copied().fold(f32::MIN, f32::max);
            row[vocab_size - 1] = top;
            row[vocab_size / 3] = f32::NEG_INFINITY;
        }
        case
    }

    pub fn f32_logits(mut self) -> Self {
        self.f32_logits = true;
        let mut rng = Rng::new(77);
        for value in &mut self.base {
            *value += 0.001 * rng.normal();
        }
        self
    }

    pub fn fp8(mut self) -> Self {
        let mut rng = Rng::new(78);
        self.fp8 = true;
        self.w2_bytes = (0..self.vocab_size * self.rank)
            .map(|_| (rng.next() & 0xBF) as u8)
            .collect();
        self.markov_w2 = self
            .w2_bytes
            .iter()
            .map(|&byte| e4m3::decode(byte))
            .collect();
        let scale = (self.rank.max(1) as f32).sqrt().recip();
        self.scales = (0..self.vocab_size)
            .map(|_| scale * (0.5 + rng.uniform()))
            .collect();
        self
    }

    pub fn masked(mut self) -> Self {
        self.masked = true;
        self
    }

    /// As `self` with greedy and coupled requests alone.
    pub fn without_samples(mut self) -> Self {
        self.rules.fill(sys::DSPARK_RULE_COUPLED);
        self
    }

    /// As `self`, skipping rows of W2.
    pub fn skipping(&self, factor: f32) -> Self {
        Self {
            bounds: Some(factor),
            ..self.clone()
        }
    }

    /// Bounds of the rows with a basis of unit vectors.
    fn bounds(
        &self,
        device: &Device,
        full: &sys::dspark_draft_full_params,
        factor: f32,
    ) -> (Buffer<f32>, Buffer<f32>) {
        let mut basis = vec![0.0_f32; 3 * self.rank];
        (0..3).for_each(|i| basis[i * self.rank + i] = 1.0);
        let basis = upload(device, &basis);
        let mut bounds = upload(device, &vec![f32::NAN; 4 * self.vocab_size]);
        let params = sys::dspark_draft_bounds_params {
            struct_size: size_of::<sys::dspark_draft_bounds_params>() as u32,
            w2_dtype: full.w2_dtype,
            vocab_size: full.vocab_size,
            markov_rank: full.markov_rank,
            markov_w2: full.markov_w2,
            w2_scales: full.w2_scales,
            basis: basis.ptr(0),
            bounds: bounds.mut_ptr(0),
        };
        device.bind().unwrap();
        // SAFETY: every pointer is a live buffer of the shape the params say.
        check(unsafe {
            sys::launch::dspark_draft_bounds_cu(&raw const params, device.raw_stream().cast())
        });
        let mut values = download(&bounds);
        values
            .iter_mut()
            .skip(3)
            .step_by(4)
            .for_each(|length| *length *= factor);
        bounds.upload(0, &values).unwrap();
        (bounds, basis)
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

    pub fn all(&self, device: &Device) -> Drafts {
        self.run(device, 0..self.num_reqs)
    }

    pub fn run(&self, device: &Device, which: Range<usize>) -> Drafts {
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
        let mut rows_read = upload(device, &vec![u64::MAX; num_reqs]);
        let has_head = self.rank > 0;
        let mut params = sys::dspark_draft_full_params {
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
            markov_rank: self.rank as i32,
            logits: if self.f32_logits {
                base_f32.ptr(0).cast()
            } else {
                base_bf16.ptr(0).cast()
            },
            markov_w1: w1.ptr(0).cast(),
            markov_w2: if self.fp8 {
                w2_bytes.ptr(0).cast()
            } else {
                w2.ptr(0).cast()
            },
            w2_scales: scales.ptr(0),
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
            stride_logits_row: self.vocab_size as i64,
            ..empty_full()
        };
        let skipping = self
            .bounds
            .map(|factor| self.bounds(device, &params, factor));
        if let Some((bounds, basis)) = &skipping {
            params.w2_bounds = bounds.ptr(0);
            params.w2_basis = basis.ptr(0);
            params.rows_read = rows_read.mut_ptr(0);
        }
        draft_full(device, params);
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
            rows_read: download(&rows_read),
        }
    }

    /// The latent of a row as handed on, and that it is the row of W1.
    pub fn latent(&self, drafts: &Drafts, row: usize, previous: i32) -> Vec<f64> {
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
    pub fn logits(&self, row: usize, latent: &[f64]) -> Vec<f64> {
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
    pub fn objections(&self, drafts: &Drafts, shift: u32) -> usize {
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
