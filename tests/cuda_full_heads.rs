//! Gated and rnn heads over the whole vocabulary: drafts, normalisers and confidences against the latents handed on (those
//! against the plain Rust backend: `cuda_head.rs`).
#![cfg(feature = "cuda")]

mod common;

use common::Rng;
use common::raw::{device, download, draft_full, empty_full, rounded, upload};
use dspark::device::{Buffer, Device};
use dspark::sys;
use half::bf16;

const DRAFT_LEN: usize = 3;
const VOCAB: usize = 1028;
const RANK: usize = 64;
const HIDDEN: usize = 96;

struct Inputs {
    num_reqs: usize,
    head: sys::dspark_head_kind,
    base: Vec<f32>,
    w2: Vec<f32>,
    weights: [Buffer<bf16>; 6],
    anchors: Buffer<i32>,
    positions: Buffer<i32>,
    temperature: Buffer<f32>,
    seeds: Buffer<u64>,
}

struct Drafts {
    tokens: Vec<i32>,
    confidence: Vec<f32>,
}

impl Inputs {
    fn new(device: &Device, head: sys::dspark_head_kind, num_reqs: usize) -> Self {
        let mut rng = Rng::new(num_reqs as u64);
        let rows = num_reqs * DRAFT_LEN;
        let (outputs, inputs) = match head {
            sys::DSPARK_HEAD_GATED => (RANK, HIDDEN + RANK),
            _ => (3 * RANK, 2 * RANK + HIDDEN),
        };
        let w2: Vec<f32> = rng.normals(VOCAB * RANK, 0.3);
        let w2: Vec<f32> = rounded(&w2).iter().map(|x| x.to_f32()).collect();
        let base = rounded(&rng.normals(rows * VOCAB, 2.0));
        Self {
            num_reqs,
            head,
            base: base.iter().map(|x| x.to_f32()).collect(),
            weights: [
                upload(device, &rounded(&rng.normals(rows * HIDDEN, 1.0))),
                upload(device, &rounded(&rng.normals(VOCAB * RANK, 1.0))),
                upload(device, &rounded(&w2)),
                upload(device, &rounded(&rng.normals(outputs * inputs, 0.1))),
                upload(device, &rounded(&rng.normals(outputs, 0.5))),
                upload(device, &rounded(&rng.normals(HIDDEN + RANK, 0.1))),
            ],
            w2,
            anchors: upload(device, &vec![5; num_reqs]),
            positions: upload(device, &vec![50; num_reqs]),
            temperature: upload(device, &vec![0.0; num_reqs]),
            seeds: upload(device, &vec![1; num_reqs]),
        }
    }

    fn rows(&self) -> usize {
        self.num_reqs * DRAFT_LEN
    }

    /// The full form: drafts, latents and normalisers, confidences' logits.
    fn full(&self, device: &Device) -> (Drafts, Vec<f64>, Vec<f32>, Vec<f32>) {
        let base = upload(device, &rounded(&self.base));
        let mut tokens = upload(device, &vec![-7; self.rows()]);
        let mut confidence = upload(device, &vec![f32::NAN; self.rows()]);
        let mut confidence_logits = upload(device, &vec![f32::NAN; self.rows()]);
        let mut log_normalizers = upload(device, &vec![f32::NAN; self.rows()]);
        let mut latents = upload(device, &vec![bf16::NAN; self.rows() * RANK]);
        let [hidden, w1, w2, proj_weight, proj_bias, confidence_weight] = &self.weights;
        let params = sys::dspark_draft_full_params {
            head: self.head,
            num_reqs: self.num_reqs as i32,
            draft_len: DRAFT_LEN as i32,
            vocab_size: VOCAB as i32,
            hidden_size: HIDDEN as i32,
            markov_rank: RANK as i32,
            confidence_with_markov: 1,
            confidence_bias: 0.25,
            logits: base.ptr(0).cast(),
            hidden: hidden.ptr(0).cast(),
            markov_w1: w1.ptr(0).cast(),
            markov_w2: w2.ptr(0).cast(),
            proj_weight: proj_weight.ptr(0).cast(),
            proj_bias: proj_bias.ptr(0).cast(),
            confidence_weight: confidence_weight.ptr(0).cast(),
            anchors: self.anchors.ptr(0),
            anchor_positions: self.positions.ptr(0),
            temperature: self.temperature.ptr(0),
            seeds: self.seeds.ptr(0),
            draft_tokens: tokens.mut_ptr(0),
            log_normalizers: log_normalizers.mut_ptr(0),
            latents: latents.mut_ptr(0).cast(),
            confidence: confidence.mut_ptr(0),
            confidence_logits: confidence_logits.mut_ptr(0),
            stride_logits_row: VOCAB as i64,
            ..empty_full()
        };
        draft_full(device, params);
        let drafts = Drafts {
            tokens: download(&tokens),
            confidence: download(&confidence),
        };
        let latents = download(&latents).iter().map(|x| x.to_f64()).collect();
        (
            drafts,
            latents,
            download(&log_normalizers),
            download(&confidence_logits),
        )
    }

    /// The logits of a row, in f64.
    fn logits(&self, row: usize, latents: &[f64]) -> Vec<f64> {
        let latent = &latents[row * RANK..][..RANK];
        let base = self.base[row * VOCAB..][..VOCAB].iter();
        base.zip(self.w2.chunks_exact(RANK))
            .map(|(&base, w2)| {
                let products = w2.iter().zip(latent);
                f64::from(base) + products.map(|(&a, b)| f64::from(a) * b).sum::<f64>()
            })
            .collect()
    }
}

#[test]
fn gated_and_rnn_hand_on_the_law_of_their_latents() {
    let Some(device) = device() else { return };
    for (head, num_reqs) in [
        (sys::DSPARK_HEAD_GATED, 5),
        (sys::DSPARK_HEAD_RNN, 5),
        (sys::DSPARK_HEAD_GATED, 133),
        (sys::DSPARK_HEAD_RNN, 140),
    ] {
        let inputs = Inputs::new(&device, head, num_reqs);
        let (got, latents, log_normalizers, confidence_logits) = inputs.full(&device);
        for r in 0..num_reqs {
            for row in r * DRAFT_LEN..(r + 1) * DRAFT_LEN {
                let logits = inputs.logits(row, &latents);
                let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = logits.iter().map(|l| (l - top).exp()).sum();
                let off = (top + sum.ln() - f64::from(log_normalizers[row])).abs();
                assert!(off < 5e-6, "row {row}: {off}");
                let regret = top - logits[got.tokens[row] as usize];
                assert!(regret < 1e-4, "row {row}: {regret}");
                let sigmoid = 1.0 / (1.0 + (-confidence_logits[row]).exp());
                assert!((got.confidence[row] - sigmoid).abs() < 1e-6);
            }
        }
    }
}
