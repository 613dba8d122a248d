//! Paged keys and values, and the commit of a token tree in them.

use std::ffi::c_void;
use std::ptr::null;

use half::bf16;

use super::rows::Reach;
use super::{Cuda, Rows, check, int, struct_size};
use crate::device::{Buffer, Device};
use crate::error::{Error, Result};
use crate::ops::{AttentionSpec, KvGeometry, KvScales};
use crate::sys;

/// Keys or values.
#[derive(Debug)]
enum Numbers {
    Bf16(Buffer<bf16>),
    E4m3(Buffer<u8>),
}

impl Numbers {
    fn zeros(device: &Device, len: usize, is_e4m3: bool) -> Result<Self> {
        Ok(if is_e4m3 {
            Self::E4m3(Buffer::zeros(device, len)?)
        } else {
            Self::Bf16(Buffer::zeros(device, len)?)
        })
    }

    fn ptr(&self, element: usize) -> *const c_void {
        match self {
            Self::Bf16(numbers) => numbers.ptr(element).cast(),
            Self::E4m3(numbers) => numbers.ptr(element).cast(),
        }
    }

    fn mut_ptr(&mut self, element: usize) -> *mut c_void {
        match self {
            Self::Bf16(numbers) => numbers.mut_ptr(element).cast(),
            Self::E4m3(numbers) => numbers.mut_ptr(element).cast(),
        }
    }
}

/// Keys and values of every layer, each `[num_layers][num_pages, page_size, num_kv_heads, head_dim]` in bf16, or in e4m3
/// with scales. Starts as zeros, so that a slot read before it is written is at worst wrong, never NaN.
#[derive(Debug)]
pub struct KvCache {
    k: Numbers,
    v: Numbers,
    /// `[2][num_layers][num_kv_heads]`, of keys and of values in e4m3.
    scales: Option<Buffer<f32>>,
    geometry: KvGeometry,
}

impl KvCache {
    /// A cache in bf16, or in e4m3 with `scales`.
    pub(super) fn new(
        device: &Device,
        geometry: &KvGeometry,
        scales: Option<&KvScales>,
    ) -> Result<Self> {
        if let Some(scales) = scales {
            scales.check(geometry)?;
        }
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
        let upload = |scales: &KvScales| {
            let scales = scales.all();
            let mut buffer = Buffer::uninit(device, scales.len())?;
            buffer.upload(0, &scales)?;
            Ok(buffer)
        };
        Ok(Self {
            k: Numbers::zeros(device, len, scales.is_some())?,
            v: Numbers::zeros(device, len, scales.is_some())?,
            scales: scales.map(upload).transpose()?,
            geometry: *geometry,
        })
    }

    /// Its shape.
    pub fn geometry(&self) -> &KvGeometry {
        &self.geometry
    }

    /// Addresses of a layer's keys and values.
    pub(super) fn layer(&self, layer: usize) -> (*const c_void, *const c_void) {
        let offset = layer * self.layer_len();
        (self.k.ptr(offset), self.v.ptr(offset))
    }

    /// Addresses of a layer's keys and values, to write there.
    pub(super) fn layer_mut(&mut self, layer: usize) -> (*mut c_void, *mut c_void) {
        let offset = layer * self.layer_len();
        (self.k.mut_ptr(offset), self.v.mut_ptr(offset))
    }

    /// Type of its elements.
    pub(super) fn dtype(&self) -> sys::dspark_dtype {
        match self.k {
            Numbers::Bf16(_) => sys::DSPARK_DTYPE_BF16,
            Numbers::E4m3(_) => sys::DSPARK_DTYPE_E4M3,
        }
    }

    /// Addresses of the factors of a layer's keys and values; null without any.
    pub(super) fn scales(&self, layer: usize) -> (*const f32, *const f32) {
        let KvGeometry {
            num_layers,
            num_kv_heads,
            ..
        } = self.geometry;
        self.scales.as_ref().map_or((null(), null()), |scales| {
            let keys = layer * num_kv_heads;
            let values = (num_layers + layer) * num_kv_heads;
            (scales.ptr(keys), scales.ptr(values))
        })
    }

    /// Refuses a cache that the draft form does not read.
    pub(super) fn expect_native(&self) -> Result<()> {
        match self.k {
            Numbers::Bf16(_) => Ok(()),
            Numbers::E4m3(_) => Err(Error::argument("kv", "a native cache", "one in e4m3")),
        }
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

impl Cuda {
    /// The method [`crate::ops::Ops::commit_tree`]; see there.
    pub(super) fn commit_rows(
        &mut self,
        kv: &mut KvCache,
        rows: &Rows,
        kept: &[u64],
    ) -> Result<()> {
        let map = rows.map();
        map.check_kept(kept)?;
        rows.check_pages(kv.geometry(), Reach::CommittedAndRows)?;
        let draft_len = map.max_rows_per_req().saturating_sub(1);
        if draft_len == 0 {
            return Ok(());
        }
        let flags = kept
            .iter()
            .flat_map(|bits| (1..=draft_len).map(move |row| (bits >> row & 1) as u32));
        let flags = self.upload_index(&flags.collect::<Vec<_>>())?;
        let raw = rows.raw()?;
        let geometry = kv.geometry;
        let kv_dtype = kv.dtype();
        let (page, slot, head) = kv.strides();
        let (k_cache, v_cache) = kv.layer_mut(0);
        let params = sys::dspark_commit_tree_params {
            struct_size: struct_size::<sys::dspark_commit_tree_params>(),
            kv_dtype,
            num_reqs: raw.num_reqs,
            num_layers: int("num_layers", geometry.num_layers)?,
            draft_len: int("draft_len", draft_len)?,
            num_kv_heads: int("num_kv_heads", geometry.num_kv_heads)?,
            head_dim: int("head_dim", geometry.head_dim)?,
            page_size: int("page_size", geometry.page_size)?,
            max_pages_per_req: raw.max_pages_per_req,
            reserved: 0,
            accept_flags: flags,
            seq_lens: raw.seq_lens,
            page_table: raw.page_table,
            k_cache,
            v_cache,
            stride_cache_layer: kv.layer_len() as i64,
            stride_cache_page: page,
            stride_cache_slot: slot,
            stride_cache_head: head,
        };
        self.device.bind()?;
        // SAFETY: the cache is live and borrowed mutably, with a page for every slot of the pass (checked above); one flag
        // for every draft row of every request was uploaded on this stream.
        check("commit_tree", unsafe {
            sys::launch::dspark_commit_tree_cu(&raw const params, self.stream())
        })
    }
}
