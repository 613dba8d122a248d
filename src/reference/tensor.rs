//! Matrices and the paged cache of the reference backend, and the shape checks.

use crate::error::{Error, Result};
use crate::ops::{
    AttentionSpec, HostTensor, KvGeometry, KvScales, Matrix, RowMap, e4m3, expect_room,
};

/// A row-major f32 matrix: activations and logits alike.
#[derive(Clone, Debug)]
pub struct F32Matrix {
    values: Vec<f32>,
    rows: usize,
    cols: usize,
    max_rows: usize,
}

impl F32Matrix {
    /// `max_rows x cols`, with no rows in use.
    pub(super) fn new(max_rows: usize, cols: usize) -> Self {
        Self {
            values: vec![0.0; max_rows * cols],
            rows: 0,
            cols,
            max_rows,
        }
    }

    /// The rows in use, `[rows * cols]`.
    pub fn values(&self) -> &[f32] {
        &self.values[..self.rows * self.cols]
    }

    /// The rows in use, to be written.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.rows * self.cols]
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.values()[i * self.cols..][..self.cols]
    }

    /// Row `i`, to be written.
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        let cols = self.cols;
        &mut self.values_mut()[i * cols..][..cols]
    }

    /// Takes `values` as all rows.
    pub(super) fn fill(&mut self, field: &str, values: &[f32]) -> Result<()> {
        let rows = values.len() / self.cols.max(1);
        if rows * self.cols != values.len() {
            let expected = format!("a multiple of {} values", self.cols);
            return Err(Error::argument(field, expected, values.len()));
        }
        self.set_rows(rows)?;
        self.values_mut().copy_from_slice(values);
        Ok(())
    }
}

impl Matrix for F32Matrix {
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

/// A vector `[n]` in f32.
pub(super) fn vector(tensor: &HostTensor<'_>) -> Result<Vec<f32>> {
    if tensor.shape.len() != 1 {
        let found = format!("{:?}", tensor.shape);
        return Err(Error::argument(&tensor.name, "shape [n]", found));
    }
    expect_bytes(tensor)?;
    Ok(tensor.to_f32())
}

/// Checks that a tensor has the bytes of its shape.
pub(super) fn expect_bytes(tensor: &HostTensor<'_>) -> Result<()> {
    let expected = tensor.len() * tensor.dtype.size();
    if tensor.bytes.len() != expected {
        let expected = format!("{expected} bytes");
        return Err(Error::argument(&tensor.name, expected, tensor.bytes.len()));
    }
    Ok(())
}

/// Paged keys and values in f32. Slot `s` of page `g` of a layer holds `[num_kv_heads, head_dim]` at
/// `(g * page_size + s) * num_kv_heads * head_dim`, keys and values alike. With scales a slot holds what the e4m3 numbers
/// in it stand for.
#[derive(Clone, Debug)]
pub struct KvCache {
    pub(super) geometry: KvGeometry,
    pub(super) layers: Vec<KvLayer>,
    scales: Option<KvScales>,
}

/// Keys and values of one layer, each `[num_pages, page_size, num_kv_heads, head_dim]`.
#[derive(Clone, Debug)]
pub(super) struct KvLayer {
    pub(super) keys: Vec<f32>,
    pub(super) values: Vec<f32>,
}

impl KvCache {
    pub(super) fn new(geometry: &KvGeometry, scales: Option<KvScales>) -> Result<Self> {
        if geometry.page_size == 0 {
            return Err(Error::argument("page_size", "at least 1", 0));
        }
        let slots = geometry.num_pages * geometry.page_size;
        let len = slots * geometry.num_kv_heads * geometry.head_dim;
        // NaN, so that reading a slot nobody wrote cannot pass unseen.
        let layer = KvLayer {
            keys: vec![f32::NAN; len],
            values: vec![f32::NAN; len],
        };
        Ok(Self {
            geometry: *geometry,
            layers: vec![layer; geometry.num_layers],
            scales,
        })
    }

    /// Checks that it is as the draft form reads it.
    pub(super) fn expect_native(&self) -> Result<()> {
        match self.scales {
            None => Ok(()),
            Some(_) => Err(Error::argument("kv", "a native cache", "one in e4m3")),
        }
    }

    /// Writes keys and values `[num_kv_heads, head_dim]` of one token to the place that starts at element `start`.
    pub(super) fn write(&mut self, layer: usize, start: usize, keys: &[f32], values: &[f32]) {
        let KvLayer {
            keys: all_keys,
            values: all_values,
        } = &mut self.layers[layer];
        let (k_scales, v_scales) = self.scales.as_ref().map(|s| s.of_layer(layer)).unzip();
        let head_dim = self.geometry.head_dim;
        for (all, new, scales) in [(all_keys, keys, k_scales), (all_values, values, v_scales)] {
            let slot = &mut all[start..start + new.len()];
            slot.copy_from_slice(new);
            for (head, scale) in slot
                .chunks_exact_mut(head_dim)
                .zip(scales.into_iter().flatten())
            {
                for x in head {
                    *x = scale * e4m3::decode(e4m3::encode(*x / scale));
                }
            }
        }
    }

    /// Checks that the heads are those of `spec`.
    pub(super) fn expect_heads(&self, spec: &AttentionSpec) -> Result<()> {
        let found = (self.geometry.num_kv_heads, self.geometry.head_dim);
        if found != (spec.num_kv_heads, spec.head_dim) {
            let expected = format!("{} kv heads of {}", spec.num_kv_heads, spec.head_dim);
            let found = format!("{} of {}", found.0, found.1);
            return Err(Error::argument("kv", expected, found));
        }
        Ok(())
    }

    /// Checks that every page that `rows` names is in the pool.
    pub(super) fn expect_pages(&self, rows: &RowMap) -> Result<()> {
        let num_pages = self.geometry.num_pages;
        match rows
            .page_table
            .iter()
            .find(|&&page| page >= num_pages as i32)
        {
            Some(page) => {
                let expected = format!("pages below {num_pages}");
                Err(Error::argument("page_table", expected, page))
            }
            None => Ok(()),
        }
    }

    /// Copies entry `from` of request `r` over its entry `to`, in every layer.
    pub(super) fn move_entry(
        &mut self,
        rows: &RowMap,
        r: usize,
        from: usize,
        to: usize,
    ) -> Result<()> {
        let KvGeometry {
            page_size,
            num_kv_heads,
            head_dim,
            ..
        } = self.geometry;
        let len = num_kv_heads * head_dim;
        let at = |slot| -> Result<usize> {
            let (page, slot) = rows.place_of(r, slot, page_size)?;
            Ok((page * page_size + slot) * len)
        };
        let (from, to) = (at(from)?, at(to)?);
        for layer in &mut self.layers {
            layer.keys.copy_within(from..from + len, to);
            layer.values.copy_within(from..from + len, to);
        }
        Ok(())
    }

    /// Checks that `layer` exists.
    pub(super) fn expect_layer(&self, layer: usize) -> Result<()> {
        if layer >= self.layers.len() {
            let expected = format!("below {}", self.layers.len());
            return Err(Error::argument("layer", expected, layer));
        }
        Ok(())
    }
}

/// Checks that `mat` is `[rows, cols]`.
pub(super) fn expect_shape(field: &str, mat: &impl Matrix, rows: usize, cols: usize) -> Result<()> {
    if (mat.rows(), mat.cols()) != (rows, cols) {
        let found = format!("[{}, {}]", mat.rows(), mat.cols());
        return Err(Error::argument(field, format!("[{rows}, {cols}]"), found));
    }
    Ok(())
}

/// Checks the columns of `mat`, an output whose rows are still to be set.
pub(super) fn expect_cols(field: &str, mat: &impl Matrix, cols: usize) -> Result<()> {
    if mat.cols() != cols {
        let expected = format!("{cols} columns");
        return Err(Error::argument(field, expected, mat.cols()));
    }
    Ok(())
}

/// Checks the length of a host slice.
pub(super) fn expect_len(field: &str, found: usize, expected: usize) -> Result<()> {
    if found != expected {
        return Err(Error::argument(field, format!("{expected} entries"), found));
    }
    Ok(())
}
