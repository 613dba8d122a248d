//! Paged keys and values.

use half::bf16;

use crate::device::{Buffer, Device};
use crate::error::{Error, Result};
use crate::ops::{AttentionSpec, KvGeometry};

/// Keys and values of every layer, each `[num_layers][num_pages, page_size, num_kv_heads, head_dim]` in bf16. Starts as
/// zeros, so that a slot read before it is written is at worst wrong, never NaN.
#[derive(Debug)]
pub struct KvCache {
    k: Buffer<bf16>,
    v: Buffer<bf16>,
    geometry: KvGeometry,
}

impl KvCache {
    pub(super) fn new(device: &Device, geometry: &KvGeometry) -> Result<Self> {
        let sides = [
            ("num_layers", geometry.num_layers),
            ("num_pages", geometry.num_pages),
            ("page_size", geometry.page_size),
            ("num_kv_heads", geometry.num_kv_heads),
            ("head_dim", geometry.head_dim),
        ];
        let mut len = 1_usize;
        for (field, side) in sides {
            len = match len.checked_mul(side) {
                Some(len) if side > 0 => len,
                _ => return Err(Error::argument(field, "a size that fits memory", side)),
            };
        }
        Ok(Self {
            k: Buffer::zeros(device, len)?,
            v: Buffer::zeros(device, len)?,
            geometry: *geometry,
        })
    }

    /// Its shape.
    pub fn geometry(&self) -> &KvGeometry {
        &self.geometry
    }

    /// Addresses of a layer's keys and values.
    pub(super) fn layer(&self, layer: usize) -> (*const bf16, *const bf16) {
        let offset = layer * self.layer_len();
        (self.k.ptr(offset), self.v.ptr(offset))
    }

    /// Addresses of a layer's keys and values, to write there.
    pub(super) fn layer_mut(&mut self, layer: usize) -> (*mut bf16, *mut bf16) {
        let offset = layer * self.layer_len();
        (self.k.mut_ptr(offset), self.v.mut_ptr(offset))
    }

    /// Of the keys, then of the values: the address of all of them and, to write there, of element `offset`.
    pub(super) fn sides(&mut self, offset: usize) -> [(*const bf16, *mut bf16); 2] {
        let of = |side: &mut Buffer<bf16>| (side.ptr(0), side.mut_ptr(offset));
        [of(&mut self.k), of(&mut self.v)]
    }

    /// Refuses a layer or heads this cache does not have.
    pub(super) fn check(&self, spec: &AttentionSpec, layer: usize) -> Result<()> {
        if layer >= self.geometry.num_layers {
            let expected = format!("below {}", self.geometry.num_layers);
            return Err(Error::argument("layer", expected, layer));
        }
        super::expect(
            "num_kv_heads",
            self.geometry.num_kv_heads,
            spec.num_kv_heads,
        )?;
        super::expect("head_dim", self.geometry.head_dim, spec.head_dim)
    }

    /// Elements between pages, slots and heads.
    pub(super) fn strides(&self) -> (i64, i64, i64) {
        let head = self.geometry.head_dim as i64;
        let slot = head * self.geometry.num_kv_heads as i64;
        (slot * self.geometry.page_size as i64, slot, head)
    }

    fn layer_len(&self) -> usize {
        let g = &self.geometry;
        g.num_pages * g.page_size * g.num_kv_heads * g.head_dim
    }
}
