//! Linear layers: `out = x W^T`.
//!
//! One kernel serves every number of rows. It walks a panel of [`PANEL`] outputs input by input, widens what the panel
//! has there in registers and multiplies it with a few rows of `x`, whose sums stay in registers; so the weight's bytes
//! cross the memory bus once for a window of rows, and few rows cost little more than one.
//!
//! **Row invariance.** Output `(m, n)` is the sum over chunks of [`DEPTH`] inputs, in order, of sums over the chunk in
//! order of `k`, each a fused multiply-add where the machine has one. This order depends on nothing else: not on the
//! other rows, not on the register block a row falls into, not on the threads, not on the width of the machine's
//! vectors. A row's result is bitwise the same alone, in a verify window or in a prefill.

#![allow(
    clippy::inline_always,
    reason = "vector code must be inlined into the function that has the machine's features"
)]

use pulp::{Arch, Simd, WithSimd};

use super::pool::Pool;
use super::weight::{HIGH_HALF, PANEL, Storage, Weight};
use crate::ops::Matrix;

/// Inputs per chunk: what a panel has for them stays in the L1 cache while all rows are multiplied with it.
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
    let work = num_rows * num_outputs * depth;
    pool.for_each(
        work,
        tiles,
        || (),
        |(), tile| arch.dispatch(TileProduct { x, weight, tile }),
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
}

impl WithSimd for TileProduct<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { x, weight, tile } = self;
        let Tile {
            first_panel,
            mut out,
        } = tile;
        let depth = weight.cols();
        let words = weight.storage().words();
        for panel in 0..out[0].len().div_ceil(PANEL) {
            let chunks = weight.panel(first_panel + panel).chunks(DEPTH * words);
            for (chunk, weights) in chunks.enumerate() {
                let chunk = Chunk {
                    weights,
                    storage: weight.storage(),
                    x,
                    depth,
                    start: chunk * DEPTH,
                    first_output: panel * PANEL,
                };
                // Vectors of a panel and rows of a register block, by the lanes and registers of the machine.
                match S::F32_LANES {
                    16 => chunk.add_rows::<S, 2, 8>(simd, &mut out),
                    8 => chunk.add_rows::<S, 4, 2>(simd, &mut out),
                    4 => chunk.add_rows::<S, 8, 2>(simd, &mut out),
                    _ => chunk.add_rows::<S, PANEL, 1>(simd, &mut out),
                }
            }
        }
    }
}

/// One panel over one chunk of inputs.
struct Chunk<'a> {
    /// [`Storage::words`] for each input.
    weights: &'a [u32],
    storage: Storage,
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

    /// Adds the chunk's products to rows `row .. row + BLOCK`.
    #[inline(always)]
    fn add_block<S: Simd, const VECTORS: usize, const BLOCK: usize>(
        &self,
        simd: S,
        row: usize,
        out: &mut [&mut [f32]],
    ) {
        let chunk = self;
        match self.storage {
            Storage::F32 => simd.vectorize(Block::<WideLoad, VECTORS, BLOCK> {
                chunk,
                row,
                out,
                load: WideLoad,
            }),
            Storage::Bf16 => simd.vectorize(Block::<PairLoad, VECTORS, BLOCK> {
                chunk,
                row,
                out,
                load: PairLoad,
            }),
        }
    }
}

/// How the words that a panel has for one input become vectors of its outputs.
trait Load: Copy {
    const STORAGE: Storage;

    fn load<S: Simd, const VECTORS: usize>(self, simd: S, words: &[S::u32s]) -> [S::f32s; VECTORS];
}

/// Of [`Storage::F32`].
#[derive(Clone, Copy)]
struct WideLoad;

impl Load for WideLoad {
    const STORAGE: Storage = Storage::F32;

    #[inline(always)]
    fn load<S: Simd, const VECTORS: usize>(self, simd: S, words: &[S::u32s]) -> [S::f32s; VECTORS] {
        let mut vectors = [simd.splat_f32s(0.0); VECTORS];
        for (vector, &word) in vectors.iter_mut().zip(words) {
            *vector = simd.transmute_f32s_u32s(word);
        }
        vectors
    }
}

/// Of [`Storage::Bf16`].
#[derive(Clone, Copy)]
struct PairLoad;

impl Load for PairLoad {
    const STORAGE: Storage = Storage::Bf16;

    #[inline(always)]
    fn load<S: Simd, const VECTORS: usize>(self, simd: S, words: &[S::u32s]) -> [S::f32s; VECTORS] {
        let (half_width, high) = (simd.splat_u32s(16), simd.splat_u32s(HIGH_HALF));
        let mut vectors = [simd.splat_f32s(0.0); VECTORS];
        let (low_rows, high_rows) = vectors.split_at_mut(VECTORS / 2);
        for ((low_row, high_row), &word) in low_rows.iter_mut().zip(high_rows).zip(words) {
            *low_row = simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(word, half_width));
            *high_row = simd.transmute_f32s_u32s(simd.and_u32s(word, high));
        }
        vectors
    }
}

/// Adds a chunk's products to `BLOCK` rows from `row` on. A function of its own in the machine code, or the registers
/// would not suffice.
struct Block<'a, 'o, L: Load, const VECTORS: usize, const BLOCK: usize> {
    chunk: &'a Chunk<'a>,
    row: usize,
    /// The rows' windows; those past `BLOCK` are left alone.
    out: &'a mut [&'o mut [f32]],
    load: L,
}

impl<L: Load, const VECTORS: usize, const BLOCK: usize> WithSimd
    for Block<'_, '_, L, VECTORS, BLOCK>
{
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self {
            chunk,
            row,
            out,
            load,
        } = self;
        let (weights, _) = S::as_simd_u32s(chunk.weights);
        let weights = weights.chunks_exact(L::STORAGE.words() / S::U32_LANES);
        let mut x = [&chunk.x[..0]; BLOCK];
        for (i, x) in x.iter_mut().enumerate() {
            *x = &chunk.x[(row + i) * chunk.depth + chunk.start..][..weights.len()];
        }
        let mut sums = [[simd.splat_f32s(0.0); VECTORS]; BLOCK];
        for (k, words) in weights.enumerate() {
            let vectors: [S::f32s; VECTORS] = load.load(simd, words);
            for (sums, x) in sums.iter_mut().zip(&x) {
                let x = simd.splat_f32s(x[k]);
                for (sum, &vector) in sums.iter_mut().zip(&vectors) {
                    *sum = simd.mul_add_e_f32s(x, vector, *sum);
                }
            }
        }
        for (sums, out) in sums.iter().zip(out) {
            let mut lanes = [0.0; PANEL];
            S::as_mut_simd_f32s(&mut lanes).0.copy_from_slice(sums);
            for (out, lane) in out[chunk.first_output..].iter_mut().zip(lanes) {
                *out += lane;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{Dtype, HostTensor};
    use crate::reference::philox::{philox4x32, uniform};

    fn product<S: Simd>(simd: S, x: &[f32], weight: &Weight, num_rows: usize) -> Vec<f32> {
        let mut out = vec![0.0; num_rows * weight.rows()];
        let tile = Tile {
            first_panel: 0,
            out: out.chunks_exact_mut(weight.rows()).collect(),
        };
        simd.vectorize(TileProduct { x, weight, tile });
        out
    }

    /// The same bits from every width of vectors with a fused multiply-add, and nearly the same without.
    #[test]
    fn the_width_of_the_machine_does_not_show() {
        let (m, n, k) = (11, 70, 300);
        let noise = |stream: u32, len: usize| -> Vec<f32> {
            (0..len as u32)
                .map(|i| uniform(philox4x32([stream, 0], [i, 0, 0, 0])[0]) as f32 - 0.5)
                .collect()
        };
        let x = noise(1, m * k);
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let bytes: Vec<u8> = match dtype {
                Dtype::F32 => noise(2, n * k)
                    .iter()
                    .flat_map(|w| w.to_le_bytes())
                    .collect(),
                _ => noise(2, n * k)
                    .iter()
                    .flat_map(|&w| half::bf16::from_f32(w).to_le_bytes())
                    .collect(),
            };
            let weight = Weight::new(&[HostTensor {
                name: "test".to_owned(),
                dtype,
                shape: vec![n, k],
                bytes: &bytes,
            }])
            .unwrap();
            let mut own = vec![f32::NAN; m * n];
            linear(&Pool::new(Some(2)).unwrap(), &x, &weight, &mut own);
            let plain = product(pulp::Scalar, &x, &weight, m);
            assert!(own.iter().zip(&plain).all(|(a, b)| (a - b).abs() < 1e-4));
            #[cfg(target_arch = "x86_64")]
            {
                let v3 = pulp::x86::V3::try_new().map(|simd| product(simd, &x, &weight, m));
                let v4 = pulp::x86::V4::try_new().map(|simd| product(simd, &x, &weight, m));
                assert!(v3.is_none_or(|v3| v3 == own));
                assert!(v4.is_none_or(|v4| v4 == own));
            }
        }
    }
}
