//! What the GPU tests share: the device or a skip, seeded numbers, poisoned buffers, shuffled pages, comparisons.

#![allow(dead_code)] // every test binary uses its own part

pub mod full;
pub mod raw;

use dspark::ops::cuda::Cuda;
use dspark::ops::{
    AttentionSpec, Dtype, HostTensor, KvGeometry, KvScales, KvSink, Matrix, Ops, RopeSpec, RowMap,
};
use dspark::reference::Reference;
use half::bf16;

/// The first GPU; without one says `skipped` and returns `None`, or fails when `DSPARK_REQUIRE_GPU=1`.
pub fn gpu() -> Option<Cuda> {
    match Cuda::open(0) {
        Ok(cuda) => Some(cuda),
        Err(error) => {
            let required = std::env::var("DSPARK_REQUIRE_GPU").is_ok_and(|value| value == "1");
            assert!(!required, "DSPARK_REQUIRE_GPU=1, but: {error}");
            println!("skipped: no CUDA device ({error})");
            None
        }
    }
}

/// The oracle.
pub fn reference() -> Reference {
    Reference::new(Some(2)).expect("two threads")
}

/// SplitMix64: the same numbers on every machine.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1_u64 << 24) as f32
    }

    /// About normal, mean 0 and variance 1, exactly representable in bf16.
    pub fn normal(&mut self) -> f32 {
        let sum: f32 = (0..12).map(|_| self.uniform()).sum();
        round(sum - 6.0)
    }

    /// `len` values of [`Rng::normal`] times `scale` (a power of two keeps them exact).
    pub fn normals(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| round(self.normal() * scale)).collect()
    }

    pub fn shuffle<T>(&mut self, values: &mut [T]) {
        for i in (1..values.len()).rev() {
            values.swap(i, self.below(i + 1));
        }
    }
}

/// The nearest bf16.
pub fn round(value: f32) -> f32 {
    bf16::from_f32(value).to_f32()
}

/// A bf16 tensor that owns its bytes.
pub struct Tensor {
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Tensor {
    pub fn new(shape: &[usize], values: &[f32]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len());
        let bytes = values
            .iter()
            .flat_map(|&value| bf16::from_f32(value).to_le_bytes())
            .collect();
        Self {
            shape: shape.to_vec(),
            bytes,
        }
    }

    pub fn host(&self) -> HostTensor<'_> {
        HostTensor {
            name: "test".into(),
            dtype: Dtype::Bf16,
            shape: self.shape.clone(),
            bytes: &self.bytes,
        }
    }
}

/// A weight `[rows, cols]`.
pub fn weight<O: Ops>(ops: &mut O, shape: [usize; 2], values: &[f32]) -> O::Weight {
    let tensor = Tensor::new(&shape, values);
    ops.weight(&[tensor.host()]).expect("a weight")
}

/// A vector.
pub fn norm<O: Ops>(ops: &mut O, values: &[f32]) -> O::Norm {
    let tensor = Tensor::new(&[values.len()], values);
    ops.norm(&tensor.host()).expect("a vector")
}

/// A matrix of these rows.
pub fn mat<O: Ops>(ops: &mut O, cols: usize, values: &[f32]) -> O::Mat {
    let mut mat = ops.mat(values.len() / cols, cols).expect("a matrix");
    ops.write_mat(values, &mut mat).expect("whole rows");
    mat
}

/// Logits of these rows.
pub fn logits<O: Ops>(ops: &mut O, vocab_size: usize, values: &[f32]) -> O::Logits {
    let mut logits = ops
        .logits(values.len() / vocab_size, vocab_size)
        .expect("logits");
    ops.write_logits(values, &mut logits).expect("whole rows");
    logits
}

/// An output matrix full of NaN.
pub fn poisoned<O: Ops>(ops: &mut O, max_rows: usize, cols: usize) -> O::Mat {
    mat(ops, cols, &vec![f32::NAN; max_rows * cols])
}

/// Logits full of NaN.
pub fn poisoned_logits<O: Ops>(ops: &mut O, max_rows: usize, cols: usize) -> O::Logits {
    logits(ops, cols, &vec![f32::NAN; max_rows * cols])
}

/// All rows an output could hold: those beyond the ones in use must still be NaN.
pub fn read_all<O: Ops>(ops: &mut O, mut out: O::Mat) -> Vec<f32> {
    let rows = out.max_rows();
    out.set_rows(rows).expect("its own bound");
    ops.read_mat(&out).expect("a readable matrix")
}

/// How far a value may be from the oracle's.
#[derive(Clone, Copy)]
pub struct Tolerance {
    /// Explicit bits of the output type's mantissa.
    mantissa_bits: i32,
    /// Of the row's largest magnitude: what the order of a sum may change.
    row_share: f32,
}

impl Tolerance {
    pub const EXACT: Self = Self {
        mantissa_bits: 0,
        row_share: -1.0,
    };

    pub fn bf16(row_share: f32) -> Self {
        Self {
            mantissa_bits: 7,
            row_share,
        }
    }

    pub fn f16(row_share: f32) -> Self {
        Self {
            mantissa_bits: 10,
            row_share,
        }
    }

    pub fn f32(row_share: f32) -> Self {
        Self {
            mantissa_bits: 23,
            row_share,
        }
    }

    fn allows(self, got: f32, want: f32, row_max: f32) -> bool {
        if want.is_nan() || got.is_nan() {
            return want.is_nan() && got.is_nan();
        }
        if self.row_share < 0.0 || want.is_infinite() {
            return got == want;
        }
        let exponent = want.abs().max(f32::MIN_POSITIVE).log2().floor();
        let ulp = (exponent - self.mantissa_bits as f32).exp2();
        // Twice what rounding the exact answer would cost, and two units in the last place.
        let rounded = if self.mantissa_bits == 7 {
            (round(want) - want).abs()
        } else {
            0.0
        };
        (got - want).abs() <= 2.0 * rounded + 2.0 * ulp + self.row_share * row_max
    }
}

/// Compares rows of `cols`, naming the first coordinate that is off.
pub fn assert_close(label: &str, got: &[f32], want: &[f32], cols: usize, tolerance: Tolerance) {
    assert_eq!(got.len(), want.len(), "{label}: length");
    for (row, (got, want)) in got.chunks(cols).zip(want.chunks(cols)).enumerate() {
        let finite = want.iter().filter(|value| value.is_finite());
        let row_max = finite.fold(0.0_f32, |max, value| max.max(value.abs()));
        for (col, (&got, &want)) in got.iter().zip(want).enumerate() {
            assert!(
                tolerance.allows(got, want, row_max),
                "{label}: row {row}, column {col}: got {got}, the reference has {want} (row's largest {row_max})"
            );
        }
    }
}

/// A computation both backends can do.
pub trait Case {
    /// Columns of the result, for coordinates in messages.
    fn cols(&self) -> usize;
    /// All rows of the output, the unused ones included.
    fn run<O: Ops>(&self, ops: &mut O) -> Vec<f32>;
}

/// Runs `case` on both backends and compares.
pub fn check<O: Ops>(ops: &mut O, label: &str, case: &impl Case, tolerance: Tolerance) {
    let got = case.run(ops);
    let want = case.run(&mut reference());
    assert_close(label, &got, &want, case.cols(), tolerance);
}

/// RoPE that turns nothing: keys enter the cache exactly as they are.
pub fn identity_rope(head_dim: usize) -> RopeSpec {
    RopeSpec {
        inv_freq: vec![0.0; head_dim / 2],
        scale: 1.0,
    }
}

/// Makes the rows of every request a tree: row `i` hangs below row `parent_of(i)`, row 0 below the committed tokens.
pub fn grow_tree(map: &mut RowMap, mut parent_of: impl FnMut(usize) -> usize) {
    let mut masks: Vec<u64> = Vec::new();
    for r in 0..map.num_reqs() {
        let first = map.rows_of(r).start;
        for (i, row) in map.rows_of(r).enumerate() {
            let parent = parent_of(i);
            let ancestors = match i {
                0 => 0,
                _ => masks[first + parent] | 1 << parent,
            };
            map.positions[row] = map.seq_lens[r] + ancestors.count_ones() as i32;
            masks.push(ancestors);
        }
    }
    map.tree = Some(masks);
}

/// A cache whose every slot is NaN, and requests with shuffled pages, holes in the pool and `-1` past their last page.
pub struct PagedRequests {
    pub geometry: KvGeometry,
    /// Pages of each request.
    pub pages: Vec<Vec<i32>>,
    /// `(rows, seq_len)` of each request.
    pub requests: Vec<(usize, usize)>,
}

impl PagedRequests {
    pub fn new(
        rng: &mut Rng,
        spec: &AttentionSpec,
        page_size: usize,
        requests: &[(usize, usize)],
    ) -> Self {
        let needed = |&(rows, seq_len): &(usize, usize)| (rows + seq_len).div_ceil(page_size);
        let num_pages = requests.iter().map(needed).sum::<usize>() * 3 / 2 + 2;
        let mut pool: Vec<i32> = (0..num_pages as i32).collect();
        rng.shuffle(&mut pool);
        let pages = requests
            .iter()
            .map(|r| pool.split_off(pool.len() - needed(r)))
            .collect();
        Self {
            geometry: KvGeometry {
                num_layers: 2,
                num_pages,
                page_size,
                num_kv_heads: spec.num_kv_heads,
                head_dim: spec.head_dim,
            },
            pages,
            requests: requests.to_vec(),
        }
    }

    /// The map of the pass itself, or of the pass that committed what came before it.
    pub fn map(&self, committed: bool) -> RowMap {
        let columns = self.pages.iter().map(Vec::len).max().unwrap_or(0) + 1;
        let mut map = RowMap::new(columns);
        for (pages, &(rows, seq_len)) in self.pages.iter().zip(&self.requests) {
            let (rows, seq_len) = if committed {
                (seq_len, 0)
            } else {
                (rows, seq_len)
            };
            map.push(rows, seq_len, seq_len, pages).expect("pages fit");
        }
        map
    }

    pub fn num_rows(&self) -> usize {
        self.requests.iter().map(|&(rows, _)| rows).sum()
    }

    pub fn num_committed(&self) -> usize {
        self.requests.iter().map(|&(_, seq_len)| seq_len).sum()
    }

    /// A NaN cache holding `committed [num_committed, 2 Hkv D]` in layer 1.
    pub fn cache<O: Ops>(
        &self,
        ops: &mut O,
        spec: &AttentionSpec,
        committed: &[f32],
    ) -> O::KvCache {
        let kv = ops.kv_cache(&self.geometry).expect("a cache");
        self.filled(ops, spec, committed, kv)
    }

    /// An empty cache of this geometry as [`PagedRequests::cache`] leaves it.
    pub fn filled<O: Ops>(
        &self,
        ops: &mut O,
        spec: &AttentionSpec,
        committed: &[f32],
        mut kv: O::KvCache,
    ) -> O::KvCache {
        let all: Vec<i32> = (0..self.geometry.num_pages as i32).collect();
        let slots = all.len() * self.geometry.page_size;
        let mut whole = RowMap::new(all.len());
        whole.push(slots, 0, 0, &all).expect("pages fit");
        let cols = 2 * spec.num_kv_heads * spec.head_dim;
        for layer in 0..self.geometry.num_layers {
            append(
                ops,
                spec,
                &whole,
                &vec![f32::NAN; slots * cols],
                &mut kv,
                layer,
            );
        }
        append(ops, spec, &self.map(true), committed, &mut kv, 1);
        kv
    }
}

/// Factors of every layer and head, no two alike.
pub fn kv_scales(geometry: &KvGeometry) -> KvScales {
    let scales = |first: f32| {
        (0..geometry.num_layers * geometry.num_kv_heads)
            .map(|head| first * (1.0 + 0.3 * head as f32))
            .collect()
    };
    KvScales::new(geometry, scales(0.011), scales(0.37)).expect("factors")
}

/// An empty cache of 8 bits with these factors.
pub fn e4m3_cache<O: Ops>(ops: &mut O, geometry: &KvGeometry) -> O::KvCache {
    ops.kv_cache_e4m3(geometry, &kv_scales(geometry))
        .expect("a cache")
}

/// Appends `[k | v]` rows as they are, or as near as the cache can hold them.
pub fn append<O: Ops>(
    ops: &mut O,
    spec: &AttentionSpec,
    map: &RowMap,
    values: &[f32],
    kv: &mut O::KvCache,
    layer: usize,
) {
    let rope = ops
        .rope(&identity_rope(spec.head_dim))
        .expect("frequencies");
    let mut rows = ops.rows().expect("rows");
    ops.set_row_map(&mut rows, map).expect("a consistent map");
    let kv_rows = mat(ops, 2 * spec.num_kv_heads * spec.head_dim, values);
    let sink = KvSink::Cache { kv, layer };
    ops.qk_norm_rope(spec, &kv_rows, None, &rope, &rows, None, sink)
        .expect("an append");
}

/// Rows past the ones in use that an op must leave alone.
pub const SPARE_ROWS: usize = 3;

/// Heads of a model without window or cap.
pub fn spec(num_q_heads: usize, num_kv_heads: usize, head_dim: usize) -> AttentionSpec {
    AttentionSpec {
        num_q_heads,
        num_kv_heads,
        head_dim,
        scale: (head_dim as f32).sqrt().recip(),
        norm_eps: 1e-6,
        window: 0,
        softcap: 0.0,
    }
}

/// Frequencies of base 10,000.
pub fn rope_spec(head_dim: usize) -> RopeSpec {
    let inv_freq = (0..head_dim / 2)
        .map(|i| 1e4_f32.powf(-2.0 * i as f32 / head_dim as f32))
        .collect();
    RopeSpec {
        inv_freq,
        scale: 1.0,
    }
}

/// For comparisons to the bit, NaN and the sign of zero included.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
