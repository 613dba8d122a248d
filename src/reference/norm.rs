//! Norms and elementwise operations. Each row is computed by itself, in one order.

#![allow(
    clippy::inline_always,
    reason = "vector code must be inlined into the function that has the machine's features"
)]

use pulp::{Arch, NullaryFnOnce};

use super::exp::exp;
use super::pool::Pool;

/// Elements of one unit of work of a thread.
const TILE_ELEMENTS: usize = 1 << 13;
/// A transcendental counts as this many multiply-adds.
const EXP_WORK: usize = 8;

/// `out = x * rsqrt(mean(x^2) + eps) * weight` of one row; the mean in f64.
pub(super) fn rms_norm_row(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = rms_scale(x, eps);
    for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * weight;
    }
}

/// [`rms_norm_row`] where the input is.
pub(super) fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = rms_scale(x, eps);
    for (x, &weight) in x.iter_mut().zip(weight) {
        *x = *x * scale * weight;
    }
}

#[allow(clippy::cast_possible_truncation, reason = "f64 is for the sum alone")]
fn rms_scale(x: &[f32], eps: f32) -> f32 {
    // Four sums side by side hide the latency of the additions.
    let mut sums = [0.0_f64; 4];
    let (quads, rest) = x.as_chunks::<4>();
    for quad in quads {
        for (sum, &x) in sums.iter_mut().zip(quad) {
            *sum += f64::from(x) * f64::from(x);
        }
    }
    for (sum, &x) in sums.iter_mut().zip(rest) {
        *sum += f64::from(x) * f64::from(x);
    }
    let mean = sums.iter().sum::<f64>() / x.len() as f64;
    (mean + f64::from(eps)).sqrt().recip() as f32
}

/// `out = x * rsqrt(mean(x^2) + eps) * weight` of all rows, `[rows, weight.len()]`.
pub(super) fn rms_norm(pool: &Pool, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let cols = weight.len().max(1);
    let tile = rows_per_tile(cols) * cols;
    let tiles = x.chunks(tile).zip(out.chunks_mut(tile)).collect();
    pool.for_each(
        x.len(),
        tiles,
        || (),
        |(), (x, out)| {
            for (x, out) in x.chunks_exact(cols).zip(out.chunks_exact_mut(cols)) {
                rms_norm_row(x, weight, eps, out);
            }
        },
    );
}

/// `residual += delta`.
pub(super) fn add(residual: &mut [f32], delta: &[f32]) {
    for (residual, &delta) in residual.iter_mut().zip(delta) {
        *residual += delta;
    }
}

/// `out [rows, ffn] = silu(gate) * up` of `gate_up [rows, 2 * ffn]`.
pub(super) fn silu_mul(pool: &Pool, gate_up: &[f32], ffn: usize, out: &mut [f32]) {
    if ffn == 0 {
        return;
    }
    let rows = rows_per_tile(ffn);
    let tiles = gate_up
        .chunks(2 * rows * ffn)
        .zip(out.chunks_mut(rows * ffn))
        .collect();
    let arch = Arch::new();
    pool.for_each(
        EXP_WORK * gate_up.len(),
        tiles,
        || (),
        |(), (gate_up, out)| {
            for (gate_up, out) in gate_up.chunks_exact(2 * ffn).zip(out.chunks_exact_mut(ffn)) {
                arch.dispatch(SiluMul { gate_up, out });
            }
        },
    );
}

/// One row of [`silu_mul`].
struct SiluMul<'a> {
    gate_up: &'a [f32],
    out: &'a mut [f32],
}

impl NullaryFnOnce for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let (gate, up) = self.gate_up.split_at(self.out.len());
        for ((out, &gate), &up) in self.out.iter_mut().zip(gate).zip(up) {
            *out = gate * sigmoid(gate) * up;
        }
    }
}

/// `1 / (1 + exp(-x))`.
#[inline(always)]
pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

fn rows_per_tile(cols: usize) -> usize {
    (TILE_ELEMENTS / cols).max(1)
}
