//! Weights, laid out for the products of [`super::gemm`].

use crate::error::{Error, Result};
use crate::ops::{Dtype, HostTensor, Matrix, expect_room};

use super::tensor::expect_bytes;

/// Outputs (weight rows) that lie side by side in memory.
pub(super) const PANEL: usize = 32;
/// Words of a [`Line`].
const LINE: usize = 16;

/// A weight `[out, in]`, in *panels* of 32 rows, the last one padded with zeros. What a panel has for one input
/// is contiguous, so that a product runs along the outputs with contiguous loads and without sums across lanes.
///
/// bf16 stays bf16, in one cache line per panel and input: word `i` holds row `i` in its low and row `16 + i` in its high
/// half, either of which becomes f32 by one instruction. Other types are held as f32, in two.
#[derive(Clone, Debug)]
pub struct Weight {
    lines: Vec<Line>,
    storage: Storage,
    rows: usize,
    cols: usize,
    max_rows: usize,
}

/// A cache line of words; vectors loaded from lines never cross two.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u32; LINE]);

/// What the words of a [`Weight`] are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Storage {
    /// One f32.
    F32,
    /// Two bf16.
    Bf16,
}

impl Storage {
    /// Words that a panel has for one input.
    pub(super) fn words(self) -> usize {
        match self {
            Self::F32 => PANEL,
            Self::Bf16 => PANEL / 2,
        }
    }
}

impl Weight {
    /// Stacks `parts` along their rows; bf16 stays bf16 if all parts are.
    pub(super) fn new(parts: &[HostTensor<'_>]) -> Result<Self> {
        let first = parts
            .first()
            .ok_or_else(|| Error::argument("weight", "at least one part", 0))?;
        let cols = *first.shape.get(1).unwrap_or(&0);
        let mut rows = 0;
        for part in parts {
            if part.shape.len() != 2 || part.shape[1] != cols {
                let expected = format!("shape [rows, {cols}]");
                let found = format!("{:?}", part.shape);
                return Err(Error::argument(&part.name, expected, found));
            }
            expect_bytes(part)?;
            rows += part.shape[0];
        }
        let storage = if parts.iter().all(|part| part.dtype == Dtype::Bf16) {
            Storage::Bf16
        } else {
            Storage::F32
        };
        let num_lines = rows.div_ceil(PANEL) * cols * storage.words() / LINE;
        let mut weight = Self {
            lines: vec![Line([0; LINE]); num_lines],
            storage,
            rows,
            cols,
            max_rows: rows,
        };
        let mut row = 0;
        for part in parts {
            let row_bytes = cols * part.dtype.size();
            for bytes in part.bytes.chunks_exact(row_bytes.max(1)) {
                weight.set_row(row, part.dtype, bytes);
                row += 1;
            }
        }
        Ok(weight)
    }

    pub(super) fn storage(&self) -> Storage {
        self.storage
    }

    /// The words of `panel`, [`Storage::words`] for each input.
    pub(super) fn panel(&self, panel: usize) -> &[u32] {
        let len = self.cols * self.storage.words();
        &bytemuck::cast_slice(&self.lines)[panel * len..][..len]
    }

    fn set_row(&mut self, row: usize, dtype: Dtype, bytes: &[u8]) {
        let at = self.word_of(row);
        let step = self.storage.words();
        let words: &mut [u32] = bytemuck::cast_slice_mut(&mut self.lines);
        let words = words[at..].iter_mut().step_by(step);
        for (word, element) in words.zip(bytes.chunks_exact(dtype.size())) {
            let bits = bits_as_f32(dtype, element);
            *word |= match self.storage {
                Storage::Bf16 if row % PANEL < LINE => bits >> 16,
                _ => bits,
            };
        }
    }

    /// Row `row` in f32 into `out [cols]`.
    pub(super) fn copy_row(&self, row: usize, out: &mut [f32]) {
        let words: &[u32] = bytemuck::cast_slice(&self.lines);
        let words = words[self.word_of(row)..]
            .iter()
            .step_by(self.storage.words());
        for (out, &word) in out.iter_mut().zip(words) {
            *out = f32::from_bits(match self.storage {
                Storage::F32 => word,
                Storage::Bf16 if row % PANEL < LINE => word << 16,
                Storage::Bf16 => word & HIGH_HALF,
            });
        }
    }

    /// The word that holds the first element of `row`.
    fn word_of(&self, row: usize) -> usize {
        let words = self.storage.words();
        row / PANEL * self.cols * words + row % words
    }
}

/// The half of a word that is a bf16 in place.
pub(super) const HIGH_HALF: u32 = 0xFFFF_0000;

/// The bits of a little-endian element as f32.
fn bits_as_f32(dtype: Dtype, b: &[u8]) -> u32 {
    match dtype {
        Dtype::F32 => u32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        Dtype::Bf16 => u32::from(u16::from_le_bytes([b[0], b[1]])) << 16,
        Dtype::F16 => half::f16::from_le_bytes([b[0], b[1]]).to_f32().to_bits(),
    }
}

impl Matrix for Weight {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn max_rows(&self) -> usize {
        self.max_rows
    }
    fn set_rows(&mut self, rows: usize) -> Result<()> {
        expect_room(rows, self.max_rows)?;
        self.rows = rows;
        Ok(())
    }
}
