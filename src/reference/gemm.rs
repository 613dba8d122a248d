//! Linear layers: `out = x W^T`.
//!
//! One kernel serves every number of rows. A panel of [`PANEL`] outputs is widened to f32, [`DEPTH`] inputs at a time,
//! into a scratch that stays in the L1 cache, and all rows of `x` are multiplied with it; so the weight's bytes cross
//! the memory bus once, whatever the number of rows, and few rows cost hardly more than one.
//!
//! **Row invariance.** Output `(m, n)` is the sum over chunks of [`DEPTH`] inputs, in order, of sums over the chunk in
//! order of `k`, each a fused multiply-add where the machine has one. This order depends on nothing else: not on the
//! other rows, not on the register block a row falls into, not on the threads, not on the width of the machine's
//! vectors. A row's result is bitwise the same alone, in a verify window or in a prefill.

use pulp::{Arch, Simd, WithSimd};

use super::pool::Pool;
use super::tensor::{PANEL, Weight};
use crate::ops::Matrix;

/// Inputs per chunk: `DEPTH * PANEL` f32 are 16 KiB.
const DEPTH: usize = 128;
/// Weight elements in one unit of work of a thread.
const TILE_ELEMENTS: usize = 1 << 15;

/// `out [rows, weight.rows] = x [rows, weight.cols] weight^T`.
pub(super) fn linear(pool: &Pool, x: &[f32], weight: &Weight, out: &mut [f32]) {
    out.fill(0.0);
    let (num_outputs, depth) = (weight.rows(), weight.cols());
    if out.is_empty() || depth == 0 {
        return;
    }
    let num_rows = out.len() / num_outputs;
    let panels_per_tile = (TILE_ELEMENTS / (PANEL * depth)).max(1);
    let mut tiles: Vec<Tile> = (0..num_outputs.div_ceil(panels_per_tile * PANEL))
        .map(|i| Tile {
            first_panel: i * panels_per_tile,
            out: Vec::with_capacity(num_rows),
        })
        .collect();
    for row in out.chunks_exact_mut(num_outputs) {
        for (tile, window) in tiles
            .iter_mut()
            .zip(row.chunks_mut(panels_per_tile * PANEL))
        {
            tile.out.push(window);
        }
    }
    let arch = Arch::new();
    pool.for_each(
        num_rows * num_outputs * depth,
        tiles,
        || vec![0.0_f32; DEPTH * PANEL],
        |scratch, tile| {
            arch.dispatch(TileProduct {
                x,
                weight,
                tile,
                scratch,
            });
        },
    );
}

/// The outputs of a few panels, in all rows.
struct Tile<'o> {
    first_panel: usize,
    out: Vec<&'o mut [f32]>,
}

struct TileProduct<'a, 'o> {
    x: &'a [f32],
    weight: &'a Weight,
    tile: Tile<'o>,
    scratch: &'a mut [f32],
}

impl WithSimd for TileProduct<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            x,
            weight,
            mut tile,
            scratch,
        } = self;
        let depth = weight.cols();
        let num_panels = tile.out[0].len().div_ceil(PANEL);
        for panel in 0..num_panels {
            for start in (0..depth).step_by(DEPTH) {
                let end = (start + DEPTH).min(depth);
                let chunk = Chunk {
                    weights: weight.panel(tile.first_panel + panel, start..end, scratch),
                    x,
                    depth,
                    start,
                    first_output: panel * PANEL,
                };
                // Vectors of a panel and rows of a register block, by the lanes and registers of the machine.
                match S::F32_LANES {
                    16 => chunk.add_rows::<S, 2, 8>(simd, &mut tile.out),
                    8 => chunk.add_rows::<S, 4, 2>(simd, &mut tile.out),
                    4 => chunk.add_rows::<S, 8, 2>(simd, &mut tile.out),
                    _ => chunk.add_rows::<S, PANEL, 1>(simd, &mut tile.out),
                }
            }
        }
    }
}

/// One panel over one chunk of inputs.
struct Chunk<'a> {
    /// `[inputs of the chunk, PANEL]`.
    weights: &'a [f32],
    /// `[rows, depth]`.
    x: &'a [f32],
    depth: usize,
    /// First input of the chunk.
    start: usize,
    /// First output of the panel in the tile's windows.
    first_output: usize,
}

impl Chunk<'_> {
    /// Adds the chunk's products to all rows, `BLOCK` rows at a time as long as there are so many.
    #[inline(always)]
    fn add_rows<S: Simd, const VECTORS: usize, const BLOCK: usize>(
        &self,
        simd: S,
        out: &mut [&mut [f32]],
    ) {
        let mut row = 0;
        while out.len() - row >= BLOCK {
            self.add_block::<S, VECTORS, BLOCK>(simd, row, &mut out[row..]);
            row += BLOCK;
        }
        if BLOCK > 4 && out.len() - row >= 4 {
            self.add_block::<S, VECTORS, 4>(simd, row, &mut out[row..]);
            row += 4;
        }
        if BLOCK > 2 && out.len() - row >= 2 {
            self.add_block::<S, VECTORS, 2>(simd, row, &mut out[row..]);
            row += 2;
        }
        if row < out.len() {
            self.add_block::<S, VECTORS, 1>(simd, row, &mut out[row..]);
        }
    }

    /// Adds the chunk's products to rows `row .. row + BLOCK`, whose sums stay in registers.
    #[inline(always)]
    fn add_block<S: Simd, const VECTORS: usize, const BLOCK: usize>(
        &self,
        simd: S,
        row: usize,
        out: &mut [&mut [f32]],
    ) {
        let len = self.weights.len() / PANEL;
        let mut x = [&self.x[..0]; BLOCK];
        for (i, x) in x.iter_mut().enumerate() {
            *x = &self.x[(row + i) * self.depth + self.start..][..len];
        }
        let (vectors, _) = S::as_simd_f32s(self.weights);
        let (vectors, _) = vectors.as_chunks::<VECTORS>();
        let mut sums = [[simd.splat_f32s(0.0); VECTORS]; BLOCK];
        for (k, vectors) in vectors[..len].iter().enumerate() {
            for (sums, x) in sums.iter_mut().zip(&x) {
                let x = simd.splat_f32s(x[k]);
                for (sum, &vector) in sums.iter_mut().zip(vectors) {
                    *sum = simd.mul_add_e_f32s(x, vector, *sum);
                }
            }
        }
        for (sums, out) in sums.iter().zip(out) {
            let mut lanes = [0.0; PANEL];
            S::as_mut_simd_f32s(&mut lanes).0.copy_from_slice(sums);
            for (out, lane) in out[self.first_output..].iter_mut().zip(lanes) {
                *out += lane;
            }
        }
    }
}
