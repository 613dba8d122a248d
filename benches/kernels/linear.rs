//! The products of Qwen3-8B through cuBLASLt: `out[M, N] = x[M, K] W[N, K]^T` in bf16, logits in f32.

use dspark::device::{Buffer, Gemm, GemmOut};
use half::bf16;

use crate::lab::{Lab, Traffic, Work, inspect_output};

const NUM_ROWS: [usize; 3] = [1, 8, 64];
/// Name, K, N.
const SHAPES: [(&str, usize, usize); 5] = [
    ("qkv", 4096, 6144),
    ("o", 4096, 4096),
    ("gate_up", 4096, 24_576),
    ("down", 12_288, 4096),
    ("lm_head", 4096, 151_936),
];

/// All cases.
pub fn run(lab: &mut Lab) -> anyhow::Result<()> {
    for (name, k, n) in SHAPES {
        let to_logits = name == "lm_head";
        for m in NUM_ROWS {
            let out_bytes = if to_logits {
                size_of::<f32>()
            } else {
                size_of::<bf16>()
            };
            let traffic = Traffic::once((n * k + m * k) * size_of::<bf16>() + m * n * out_bytes);
            lab.case(&format!("{name} M={m}"), traffic, |lab, copies| {
                Linear::new(lab, copies, [m, n, k], to_logits)
            })?;
        }
    }
    Ok(())
}

enum Out {
    Bf16(Buffer<bf16>),
    F32(Buffer<f32>),
}

struct Linear {
    shape: [usize; 3],
    gemm: Gemm,
    x: Buffer<bf16>,
    weights: Vec<Buffer<bf16>>,
    out: Out,
}

impl Linear {
    fn new(
        lab: &mut Lab,
        copies: usize,
        [m, n, k]: [usize; 3],
        to_logits: bool,
    ) -> anyhow::Result<Self> {
        let weights = (0..copies).map(|_| lab.normal_bf16(n * k, 0.02));
        let weights = weights.collect::<dspark::Result<_>>()?;
        Ok(Self {
            shape: [m, n, k],
            gemm: Gemm::new(&lab.device)?,
            x: lab.normal_bf16(m * k, 1.0)?,
            weights,
            out: if to_logits {
                Out::F32(lab.empty(m * n)?)
            } else {
                Out::Bf16(lab.empty(m * n)?)
            },
        })
    }
}

impl Work for Linear {
    fn enqueue(&mut self, copy: usize) -> dspark::Result<()> {
        let out = match &mut self.out {
            Out::Bf16(out) => GemmOut::Bf16(out),
            Out::F32(out) => GemmOut::F32(out),
        };
        self.gemm.run(self.shape, &self.x, &self.weights[copy], out)
    }

    fn inspect(&mut self) -> anyhow::Result<Option<String>> {
        let [m, n, _] = self.shape;
        match &self.out {
            Out::Bf16(out) => inspect_output(out, m * n)?,
            Out::F32(out) => inspect_output(out, m * n)?,
        }
        Ok(None)
    }
}
