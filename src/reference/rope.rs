//! Per-head norms, rotary embedding and the way of keys and values into the cache.

use super::Reference;
use super::norm::rms_norm_in_place;
use super::tensor::{F32Matrix, KvCache, expect_cols, expect_len, expect_shape};
use crate::error::{Error, Result};
use crate::ops::{AttentionSpec, KvSink, Matrix, RopeSpec, RowMap};

/// cos and sin of one position, `[head_dim / 2]` each: of the f32 angle, in f32, as Hugging Face computes them.
#[derive(Default)]
struct Rotation {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rotation {
    #[allow(
        clippy::cast_precision_loss,
        reason = "positions are multiplied in f32"
    )]
    fn set(&mut self, rope: &RopeSpec, position: i32) {
        let angles = rope.inv_freq.iter().map(|freq| position as f32 * freq);
        self.cos.clear();
        self.cos
            .extend(angles.clone().map(|angle| angle.cos() * rope.scale));
        self.sin.clear();
        self.sin
            .extend(angles.map(|angle| angle.sin() * rope.scale));
    }

    /// Turns pairs `(i, i + head_dim / 2)` of every head.
    fn apply(&self, head: &mut [f32]) {
        let (low, high) = head.split_at_mut(self.cos.len());
        for (((low, high), cos), sin) in low.iter_mut().zip(high).zip(&self.cos).zip(&self.sin) {
            (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
        }
    }
}

/// Arguments of [`crate::ops::Ops::qk_norm_rope`].
pub(super) struct QkNormRope<'a> {
    pub(super) spec: &'a AttentionSpec,
    pub(super) qkv: &'a F32Matrix,
    pub(super) norms: Option<(&'a Vec<f32>, &'a Vec<f32>)>,
    pub(super) rope: &'a RopeSpec,
    pub(super) rows: &'a RowMap,
    pub(super) q_out: Option<&'a mut F32Matrix>,
    pub(super) sink: KvSink<'a, Reference>,
}

impl QkNormRope<'_> {
    pub(super) fn run(mut self) -> Result<()> {
        self.check()?;
        let head_dim = self.spec.head_dim;
        let (q_norm, k_norm) = self.norms.unzip();
        let kv_cols = self.spec.num_kv_heads * head_dim;
        let q_cols = self.qkv.cols() - 2 * kv_cols;
        let mut rotation = Rotation::default();
        let mut keys = vec![0.0; kv_cols];
        for r in 0..self.rows.num_reqs() {
            for (i, row) in self.rows.rows_of(r).enumerate() {
                rotation.set(self.rope, self.rows.positions[row]);
                let (q, kv) = self.qkv.row(row).split_at(q_cols);
                if let Some(q_out) = &mut self.q_out {
                    let out = q_out.row_mut(row);
                    out.copy_from_slice(q);
                    self.spec.norm_and_rotate(q_norm, &rotation, out);
                }
                let (k, values) = kv.split_at(kv_cols);
                keys.copy_from_slice(k);
                self.spec.norm_and_rotate(k_norm, &rotation, &mut keys);
                match &mut self.sink {
                    KvSink::Cache { kv, layer } => {
                        append(kv, *layer, self.rows, (r, i), &keys, values);
                    }
                    KvSink::Block(block) => {
                        let (k_out, v_out) = block.row_mut(row).split_at_mut(kv_cols);
                        k_out.copy_from_slice(&keys);
                        v_out.copy_from_slice(values);
                    }
                }
            }
        }
        Ok(())
    }

    /// Checks every shape and sets the rows of the outputs.
    fn check(&mut self) -> Result<()> {
        let AttentionSpec {
            num_q_heads,
            num_kv_heads,
            head_dim,
            ..
        } = *self.spec;
        let num_rows = self.rows.num_rows();
        let q_heads = if self.q_out.is_some() { num_q_heads } else { 0 };
        let cols = (q_heads + 2 * num_kv_heads) * head_dim;
        expect_shape("qkv", self.qkv, num_rows, cols)?;
        if let Some((q_norm, k_norm)) = self.norms {
            expect_len("q_norm", q_norm.len(), head_dim)?;
            expect_len("k_norm", k_norm.len(), head_dim)?;
        }
        if head_dim != 2 * self.rope.inv_freq.len() {
            let expected = format!("{head_dim} / 2 entries");
            return Err(Error::argument(
                "inv_freq",
                expected,
                self.rope.inv_freq.len(),
            ));
        }
        if let Some(q_out) = &mut self.q_out {
            expect_cols("q_out", *q_out, num_q_heads * head_dim)?;
            q_out.set_rows(num_rows)?;
        }
        match &mut self.sink {
            KvSink::Cache { kv, layer } => {
                kv.expect_layer(*layer)?;
                kv.expect_heads(self.spec)?;
                kv.expect_pages(self.rows)
            }
            KvSink::Block(block) => {
                expect_cols("block", *block, 2 * num_kv_heads * head_dim)?;
                block.set_rows(num_rows)
            }
        }
    }
}

impl AttentionSpec {
    fn norm_and_rotate(&self, norm: Option<&Vec<f32>>, rotation: &Rotation, heads: &mut [f32]) {
        for head in heads.chunks_exact_mut(self.head_dim) {
            if let Some(norm) = norm {
                rms_norm_in_place(head, norm, self.norm_eps);
            }
            rotation.apply(head);
        }
    }
}

/// Writes row `i` of request `r` to its slot. A slot without a page is not written.
fn append(
    kv: &mut KvCache,
    layer: usize,
    rows: &RowMap,
    (r, i): (usize, usize),
    keys: &[f32],
    values: &[f32],
) {
    let slot = rows.seq_lens[r] as usize + i;
    let page_size = kv.geometry.page_size;
    let pages = &rows.page_table[r * rows.max_pages_per_req..][..rows.max_pages_per_req];
    let Some(&page) = pages.get(slot / page_size).filter(|&&page| page >= 0) else {
        return;
    };
    let start = (page as usize * page_size + slot % page_size) * keys.len();
    kv.write(layer, start, keys, values);
}
