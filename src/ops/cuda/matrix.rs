//! Matrices and vectors in device memory, and the way checkpoints get there.

use bytemuck::Zeroable;
use cudarc::driver::DeviceRepr;
use half::{bf16, f16};

use super::expect;
use crate::device::{Buffer, Device};
use crate::error::{Error, Result};
use crate::ops::{Dtype, HostTensor, Matrix, e4m3, expect_room};

/// Elements converted and uploaded at a time: bounds the host memory a large tensor needs.
const CHUNK: usize = 4 << 20;

/// A row-major contiguous matrix `[max_rows, cols]`, of which the first `rows` rows are in use.
#[derive(Debug)]
pub struct DeviceMatrix<T> {
    buffer: Buffer<T>,
    rows: usize,
    max_rows: usize,
    cols: usize,
}

impl<T: DeviceRepr + Copy + Zeroable> DeviceMatrix<T> {
    pub(super) fn new(device: &Device, max_rows: usize, cols: usize) -> Result<Self> {
        let len = max_rows
            .checked_mul(cols)
            .ok_or_else(|| Error::argument("max_rows", "rows * cols in usize", max_rows))?;
        Ok(Self {
            buffer: Buffer::zeros(device, len)?,
            rows: 0,
            max_rows,
            cols,
        })
    }

    /// The device address of an element.
    pub(super) fn ptr(&self, row: usize, col: usize) -> *const T {
        self.buffer.ptr(row * self.cols + col)
    }

    /// The device address of an element, to write there.
    pub(super) fn mut_ptr(&mut self, row: usize, col: usize) -> *mut T {
        self.buffer.mut_ptr(row * self.cols + col)
    }

    /// Elements between rows.
    pub(super) fn stride(&self) -> i64 {
        self.cols as i64
    }

    pub(super) fn buffer(&self) -> &Buffer<T> {
        &self.buffer
    }

    pub(super) fn buffer_mut(&mut self) -> &mut Buffer<T> {
        &mut self.buffer
    }

    /// Fills the rows in use from the host; the length sets how many there are.
    pub(super) fn write(&mut self, values: &[T]) -> Result<()> {
        if self.cols == 0 || !values.len().is_multiple_of(self.cols) {
            let expected = format!("whole rows of {}", self.cols);
            return Err(Error::argument("values", expected, values.len()));
        }
        self.set_rows(values.len() / self.cols)?;
        self.buffer.upload(0, values)
    }

    /// The rows in use.
    pub(super) fn read(&self) -> Result<Vec<T>> {
        let mut values = vec![T::zeroed(); self.rows * self.cols];
        self.buffer.download(0, &mut values)?;
        Ok(values)
    }
}

impl DeviceMatrix<bf16> {
    /// `parts` stacked along their rows.
    pub(super) fn from_parts(device: &Device, parts: &[HostTensor<'_>]) -> Result<Self> {
        let mut cols = None;
        let mut rows = 0;
        for part in parts {
            let &[part_rows, part_cols] = part.shape.as_slice() else {
                return Err(Error::argument(
                    &part.name,
                    "a matrix",
                    format!("shape {:?}", part.shape),
                ));
            };
            expect(&part.name, *cols.get_or_insert(part_cols), part_cols)?;
            rows += part_rows;
        }
        let cols = cols.ok_or_else(|| Error::argument("parts", "at least one tensor", 0))?;
        let mut buffer = Buffer::uninit(device, rows * cols)?;
        let mut offset = 0;
        for part in parts {
            upload_tensor(&mut buffer, offset, part)?;
            offset += part.len();
        }
        Ok(Self {
            buffer,
            rows,
            max_rows: rows,
            cols,
        })
    }
}

/// A weight in e4m3, with a factor for each row.
#[derive(Debug)]
pub struct Quantized {
    pub(super) numbers: DeviceMatrix<u8>,
    pub(super) scales: Buffer<f32>,
}

impl Quantized {
    /// A copy of `weight`, rounded on the host.
    pub(super) fn new(device: &Device, weight: &DeviceMatrix<bf16>) -> Result<Self> {
        let (rows, cols) = (weight.rows(), weight.cols());
        let mut numbers = DeviceMatrix::new(device, rows, cols)?;
        numbers.set_rows(rows)?;
        let mut scales = Vec::with_capacity(rows);
        let chunk_rows = (CHUNK / cols.max(1)).max(1);
        for first in (0..rows).step_by(chunk_rows) {
            let num_rows = chunk_rows.min(rows - first);
            let mut values = vec![bf16::ZERO; num_rows * cols];
            weight.buffer.download(first * cols, &mut values)?;
            let values: Vec<f32> = values.into_iter().map(bf16::to_f32).collect();
            let mut bytes = vec![0; values.len()];
            let rows = values.chunks_exact(cols).zip(bytes.chunks_exact_mut(cols));
            scales.extend(rows.map(|(row, bytes)| e4m3::quantize_row(row, bytes)));
            numbers.buffer.upload(first * cols, &bytes)?;
        }
        let mut on_device = Buffer::uninit(device, rows)?;
        on_device.upload(0, &scales)?;
        Ok(Self {
            numbers,
            scales: on_device,
        })
    }
}

impl<T> Matrix for DeviceMatrix<T> {
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

/// A bf16 vector.
#[derive(Debug)]
pub struct Norm {
    buffer: Buffer<bf16>,
}

impl Norm {
    pub(super) fn new(device: &Device, tensor: &HostTensor<'_>) -> Result<Self> {
        let mut buffer = Buffer::uninit(device, tensor.len())?;
        upload_tensor(&mut buffer, 0, tensor)?;
        Ok(Self { buffer })
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.buffer.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    pub(super) fn ptr(&self) -> *const bf16 {
        self.buffer.ptr(0)
    }
}

/// Rounds `tensor` to bf16 chunk by chunk on its way to `buffer`.
fn upload_tensor(buffer: &mut Buffer<bf16>, offset: usize, tensor: &HostTensor<'_>) -> Result<()> {
    let size = tensor.dtype.size();
    expect(&tensor.name, tensor.len() * size, tensor.bytes.len())?;
    let mut staging = Vec::with_capacity(CHUNK.min(tensor.len()));
    for (i, bytes) in tensor.bytes.chunks(CHUNK * size).enumerate() {
        staging.clear();
        let elements = bytes.chunks_exact(size);
        match tensor.dtype {
            Dtype::F32 => staging.extend(
                elements.map(|b| bf16::from_f32(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
            ),
            Dtype::Bf16 => staging.extend(elements.map(|b| bf16::from_le_bytes([b[0], b[1]]))),
            Dtype::F16 => staging.extend(
                elements.map(|b| bf16::from_f32(f16::from_le_bytes([b[0], b[1]]).to_f32())),
            ),
        }
        buffer.upload(offset + i * CHUNK, &staging)?;
    }
    Ok(())
}
