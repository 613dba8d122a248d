//! Attention, rotary embedding and the cache, against the formulas, on ragged batches and any pages.

use super::*;

/// A ragged batch: per request its rows, cached entries and pages.
struct Batch {
    spec: AttentionSpec,
    map: RowMap,
    page_size: usize,
}

fn batch(spec: AttentionSpec, page_size: usize, page_of: impl Fn(usize) -> i32) -> Batch {
    let mut map = RowMap::new(18);
    let mut next = 0;
    for (num_rows, seq_len) in [(1_usize, 0_usize), (5, 12), (0, 3), (3, 4), (2, 0), (1, 17)] {
        let pages: Vec<i32> = (0..(seq_len + num_rows).div_ceil(page_size))
            .map(|i| page_of(next + i))
            .collect();
        next += pages.len();
        map.push(num_rows, seq_len, seq_len + 2, &pages).unwrap();
    }
    Batch {
        spec,
        map,
        page_size,
    }
}

const SPEC: AttentionSpec = AttentionSpec {
    num_q_heads: 6,
    num_kv_heads: 2,
    head_dim: 10,
    scale: 0.31,
    norm_eps: 1e-6,
    window: 0,
    softcap: 0.0,
};

fn rope() -> RopeSpec {
    RopeSpec {
        inv_freq: vec![1.0, 0.3, 0.1, 0.02, 0.003],
        scale: 1.1,
    }
}

impl Batch {
    fn cache(&self, ops: &mut Reference) -> KvCache {
        ops.kv_cache(&KvGeometry {
            num_layers: 2,
            num_pages: 64,
            page_size: self.page_size,
            num_kv_heads: self.spec.num_kv_heads,
            head_dim: self.spec.head_dim,
        })
        .unwrap()
    }

    fn kv_cols(&self) -> usize {
        self.spec.num_kv_heads * self.spec.head_dim
    }

    /// Keys (or values, `stream + 1`) that request `r` has in its cache, written through the op itself, unrotated.
    fn fill(&self, ops: &mut Reference, kv: &mut KvCache) {
        let mut map = self.map.clone();
        map.qo_indptr = vec![0];
        map.positions.clear();
        for &len in &self.map.seq_lens {
            map.positions.extend((0..len).map(|_| 0));
            map.qo_indptr.push(map.positions.len() as i32);
        }
        map.seq_lens.fill(0);
        let cols = 2 * self.kv_cols();
        let context = mat(ops, cols, &noise(50, map.num_rows() * cols));
        let still = RopeSpec {
            scale: 1.0,
            ..rope()
        };
        let sink = KvSink::Cache { kv, layer: 1 };
        ops.qk_norm_rope(&self.spec, &context, None, &still, &map, None, sink)
            .unwrap();
    }

    /// Attention of every row from the words of the contract, in f64.
    fn naive(&self, q: &[f32], own: &[f32], causal: bool) -> Vec<f64> {
        let (d, kv_cols) = (self.spec.head_dim, self.kv_cols());
        let context = noise(
            50,
            self.map.seq_lens.iter().sum::<i32>() as usize * 2 * kv_cols,
        );
        let group = self.spec.num_q_heads / self.spec.num_kv_heads;
        let mut out = Vec::new();
        let mut first = 0;
        for r in 0..self.map.num_reqs() {
            let len = self.map.seq_lens[r] as usize;
            for (i, row) in self.map.rows_of(r).enumerate() {
                let place = self.map.positions[row] as usize - (len + 2);
                let sees = |j: usize| match &self.map.tree {
                    _ if !causal => true,
                    Some(masks) => j == i || masks[row] >> j & 1 == 1,
                    None => j <= i,
                };
                let near = |position: usize| {
                    self.spec.window == 0 || position + self.spec.window > len + place
                };
                let keys: Vec<&[f32]> = (0..len)
                    .filter(|&s| near(s))
                    .map(|s| &context[(first + s) * 2 * kv_cols..][..2 * kv_cols])
                    .chain(
                        (self.map.rows_of(r).enumerate())
                            .filter(|&(j, other)| {
                                let position = self.map.positions[other] as usize - 2;
                                sees(j) && (!causal || near(position))
                            })
                            .map(|(_, other)| &own[other * 2 * kv_cols..][..2 * kv_cols]),
                    )
                    .collect();
                for head in 0..self.spec.num_q_heads {
                    let q = &q[(row * self.spec.num_q_heads + head) * d..][..d];
                    let at = head / group * d;
                    let weights: Vec<f64> = keys
                        .iter()
                        .map(|k| {
                            let dot: f64 =
                                (0..d).map(|c| f64::from(q[c]) * f64::from(k[at + c])).sum();
                            let score = dot * f64::from(self.spec.scale);
                            let cap = f64::from(self.spec.softcap);
                            if cap == 0.0 {
                                score.exp()
                            } else {
                                (cap * (score / cap).tanh()).exp()
                            }
                        })
                        .collect();
                    let total: f64 = weights.iter().sum();
                    out.extend((0..d).map(|c| {
                        keys.iter()
                            .zip(&weights)
                            .map(|(k, w)| w * f64::from(k[kv_cols + at + c]))
                            .sum::<f64>()
                            / total
                    }));
                }
            }
            first += len;
        }
        out
    }

    /// Both attentions after the step's own rows `kv` have been written.
    fn attend(&self, ops: &mut Reference, q: &F32Matrix, own: &F32Matrix) -> (Vec<f32>, Vec<f32>) {
        let mut kv = self.cache(ops);
        self.fill(ops, &mut kv);
        let mut out = poisoned(ops, self.map.num_rows(), q.cols());
        ops.draft_attention(&self.spec, q, &kv, 1, own, &self.map, &mut out)
            .unwrap();
        let draft = out.values().to_vec();
        let mut still = self.map.clone();
        still.positions.fill(0);
        let rope = RopeSpec {
            scale: 1.0,
            ..rope()
        };
        let sink = KvSink::Cache {
            kv: &mut kv,
            layer: 1,
        };
        ops.qk_norm_rope(&self.spec, own, None, &rope, &still, None, sink)
            .unwrap();
        ops.verify_attention(&self.spec, q, &kv, 1, &self.map, &mut out)
            .unwrap();
        (draft, out.values().to_vec())
    }
}

#[test]
fn attention_of_a_ragged_batch_on_any_pages() {
    let mut ops = ops();
    let mut before = None;
    for page_size in [1, 3, 16] {
        for permute in [1, 37] {
            // 37 is odd: a permutation of the 64 pages.
            let batch = batch(SPEC, page_size, |page| (page * permute % 64) as i32);
            let rows = batch.map.num_rows();
            let q = mat(
                &mut ops,
                60,
                &noise(60, rows * 60)
                    .iter()
                    .map(|q| q * 5.0)
                    .collect::<Vec<_>>(),
            );
            let own = mat(&mut ops, 40, &noise(61, rows * 40));
            let (draft, verify) = batch.attend(&mut ops, &q, &own);
            assert_close(&draft, &batch.naive(q.values(), own.values(), false), 1e-5);
            assert_close(&verify, &batch.naive(q.values(), own.values(), true), 1e-5);
            let before = before.get_or_insert_with(|| (draft.clone(), verify.clone()));
            assert_eq!(
                *before,
                (draft, verify),
                "page size {page_size}, step {permute}"
            );
        }
    }
}

/// Rows become trees: of every request, row j hangs below row `parent_of(j)`, row 0 below the committed tokens.
fn grow_tree(map: &mut RowMap, parent_of: impl Fn(usize) -> usize) {
    let mut masks: Vec<u64> = Vec::new();
    for r in 0..map.num_reqs() {
        let first = map.rows_of(r).start;
        for (i, row) in map.rows_of(r).enumerate() {
            let ancestors = match i {
                0 => 0,
                _ => masks[first + parent_of(i)] | 1 << parent_of(i),
            };
            masks.push(ancestors);
            map.positions[row] = map.seq_lens[r] + 2 + ancestors.count_ones() as i32;
        }
    }
    map.tree = Some(masks);
}

#[test]
fn attention_within_a_window_and_under_a_cap() {
    let mut ops = ops();
    for (window, softcap) in [(1, 0.0), (4, 0.0), (9, 0.7), (400, 0.0), (0, 0.3)] {
        let spec = AttentionSpec {
            window,
            softcap,
            ..SPEC
        };
        let batch = batch(spec, 3, |page| page as i32);
        let rows = batch.map.num_rows();
        let q = mat(&mut ops, 60, &noise(60, rows * 60));
        let own = mat(&mut ops, 40, &noise(61, rows * 40));
        let (draft, verify) = batch.attend(&mut ops, &q, &own);
        assert_close(&draft, &batch.naive(q.values(), own.values(), false), 1e-5);
        assert_close(&verify, &batch.naive(q.values(), own.values(), true), 1e-5);
    }
}

#[test]
fn trees_see_their_ancestors() {
    let mut ops = ops();
    let parents: [fn(usize) -> usize; 3] = [|i| i - 1, |_| 0, |i| (i - 1) / 2];
    for (shape, parent_of) in parents.into_iter().enumerate() {
        for window in [0, 6] {
            let spec = AttentionSpec { window, ..SPEC };
            let mut batch = batch(spec, 3, |page| page as i32);
            let rows = batch.map.num_rows();
            let q = mat(&mut ops, 60, &noise(60, rows * 60));
            let own = mat(&mut ops, 40, &noise(61, rows * 40));
            let (_, chain) = batch.attend(&mut ops, &q, &own);
            grow_tree(&mut batch.map, parent_of);
            let (_, tree) = batch.attend(&mut ops, &q, &own);
            assert_close(&tree, &batch.naive(q.values(), own.values(), true), 1e-5);
            assert_eq!(
                tree == chain,
                shape == 0,
                "a tree is a chain if and only if"
            );
        }
    }
    let mut bad = batch(SPEC, 3, |page| page as i32);
    bad.map.tree = Some(vec![0; 3]);
    let kv = bad.cache(&mut ops);
    let q = mat(&mut ops, 60, &noise(1, bad.map.num_rows() * 60));
    let mut out = poisoned(&mut ops, 12, 60);
    let found = ops.verify_attention(&SPEC, &q, &kv, 0, &bad.map, &mut out);
    assert_argument(found, "tree");
}

#[test]
fn attention_asks_for_the_pages_it_sees() {
    let mut ops = ops();
    let mut batch = batch(SPEC, 3, |page| page as i32);
    let kv = batch.cache(&mut ops);
    let q = mat(&mut ops, 60, &noise(1, batch.map.num_rows() * 60));
    let mut out = poisoned(&mut ops, 12, 60);
    let last = batch.map.rows_of(0).start;
    batch.map.page_table[last] = -1;
    let found = ops.verify_attention(&SPEC, &q, &kv, 0, &batch.map, &mut out);
    assert_argument(found, "page_table of request 0");
    batch.map.page_table[last] = 64;
    let found = ops.verify_attention(&SPEC, &q, &kv, 0, &batch.map, &mut out);
    assert_argument(found, "page_table");
    assert_argument(
        ops.verify_attention(&SPEC, &q, &kv, 2, &batch.map, &mut out),
        "layer",
    );
}

#[test]
fn qk_norm_rope_against_the_formula() {
    let mut ops = ops();
    let batch = batch(SPEC, 3, |page| 63 - page as i32);
    let rows = batch.map.num_rows();
    let (q_norm, k_norm) = (noise(1, 10), noise(2, 10));
    let qkv = mat(&mut ops, 100, &noise(3, rows * 100));
    let want = |row: usize, head: usize, norm: Option<&Vec<f32>>| -> Vec<f64> {
        let x: Vec<f64> = qkv.row(row)[head * 10..][..10]
            .iter()
            .map(|&x| f64::from(x))
            .collect();
        let scale = (x.iter().map(|x| x * x).sum::<f64>() / 10.0 + 1e-6).sqrt();
        let x: Vec<f64> = match norm {
            Some(w) => (0..10).map(|c| x[c] / scale * f64::from(w[c])).collect(),
            None => x,
        };
        (0..10)
            .map(|c| {
                let freq = rope().inv_freq[c % 5];
                let angle = f64::from(batch.map.positions[row] as f32 * freq);
                let other = if c < 5 { -x[c + 5] } else { x[c - 5] };
                (x[c] * angle.cos() + other * angle.sin()) * f64::from(1.1_f32)
            })
            .collect()
    };
    for norms in [None, Some((&q_norm, &k_norm))] {
        let (mut q_out, mut block) = (poisoned(&mut ops, rows, 60), poisoned(&mut ops, rows, 40));
        let mut kv = batch.cache(&mut ops);
        for cached in [false, true] {
            let sink = if cached {
                KvSink::Cache {
                    kv: &mut kv,
                    layer: 0,
                }
            } else {
                KvSink::Block(&mut block)
            };
            ops.qk_norm_rope(
                &SPEC,
                &qkv,
                norms,
                &rope(),
                &batch.map,
                Some(&mut q_out),
                sink,
            )
            .unwrap();
        }
        let mut written = 0;
        for r in 0..batch.map.num_reqs() {
            for (i, row) in batch.map.rows_of(r).enumerate() {
                let q: Vec<f64> = (0..6)
                    .flat_map(|h| want(row, h, norms.map(|n| n.0)))
                    .collect();
                assert_close(q_out.row(row), &q, 1e-5);
                let k: Vec<f64> = (6..8)
                    .flat_map(|h| want(row, h, norms.map(|n| n.1)))
                    .collect();
                assert_close(&block.row(row)[..20], &k, 1e-5);
                assert_eq!(block.row(row)[20..], qkv.row(row)[80..]);
                let slot = batch.map.seq_lens[r] as usize + i;
                let page =
                    batch.map.page_table[r * batch.map.max_pages_per_req + slot / 3] as usize;
                let at = (page * 3 + slot % 3) * 20;
                assert_eq!(kv.layers[0].keys[at..at + 20], block.row(row)[..20]);
                assert_eq!(kv.layers[0].values[at..at + 20], block.row(row)[20..]);
                written += 20;
            }
        }
        let finite = kv.layers[0]
            .keys
            .iter()
            .filter(|key| key.is_finite())
            .count();
        assert_eq!(finite, written, "nothing else was written");
    }
}

/// A cache of 8 bits holds of each key and value the nearest that its head's factor can be multiplied to, and no other head
/// of any layer is touched.
#[test]
fn an_e4m3_cache_holds_the_nearest_numbers() {
    let mut ops = ops();
    let batch = batch(SPEC, 3, |page| 63 - page as i32);
    let rows = batch.map.num_rows();
    let own: Vec<f32> = (noise(7, rows * 40).iter().enumerate())
        .map(|(i, x)| x * 4_f32.powi(i as i32 % 9 - 3))
        .collect();
    let own = mat(&mut ops, 40, &own);
    let geometry = batch.cache(&mut ops).geometry;
    let keys = vec![0.5, 0.5, 0.07, 0.003];
    let values = vec![0.5, 0.5, 1.0, 0.3];
    let scales = KvScales::new(&geometry, keys, values).unwrap();
    let mut kv = ops.kv_cache_e4m3(&geometry, &scales).unwrap();
    let still = RopeSpec {
        inv_freq: vec![0.0; 5],
        scale: 1.0,
    };
    let sink = KvSink::Cache {
        kv: &mut kv,
        layer: 1,
    };
    ops.qk_norm_rope(&SPEC, &own, None, &still, &batch.map, None, sink)
        .unwrap();
    let numbers: Vec<f32> = (0..=255)
        .map(e4m3::decode)
        .filter(|x| !x.is_nan())
        .collect();
    let nearest = |x: f32, scale: f32| {
        let distance = |n: f32| (f64::from(n) * f64::from(scale) - f64::from(x)).abs();
        let by_distance = |a: &&f32, b: &&f32| distance(**a).total_cmp(&distance(**b));
        let nearest = numbers.iter().min_by(by_distance).unwrap();
        scale * nearest
    };
    let (k_scales, v_scales) = scales.of_layer(1);
    let mut cut = 0;
    for r in 0..batch.map.num_reqs() {
        for (i, row) in batch.map.rows_of(r).enumerate() {
            let (page, slot) = (batch.map)
                .place_of(r, batch.map.seq_lens[r] as usize + i, 3)
                .unwrap();
            let at = (page * 3 + slot) * 20;
            for c in 0..20 {
                let [k, v] = [0, 20].map(|first| own.row(row)[first + c]);
                let (k_scale, v_scale) = (k_scales[c / 10], v_scales[c / 10]);
                assert_eq!(kv.layers[1].keys[at + c], nearest(k, k_scale), "{k}");
                assert_eq!(kv.layers[1].values[at + c], nearest(v, v_scale), "{v}");
                cut += usize::from(k.abs() > e4m3::MAX * k_scale);
            }
        }
    }
    assert!(cut > 0, "no key lay beyond the largest");
    assert!(kv.layers[0].keys.iter().all(|key| key.is_nan()));

    let q = mat(&mut ops, 60, &noise(1, rows * 60));
    let mut out = poisoned(&mut ops, rows, 60);
    let refused = ops.draft_attention(&SPEC, &q, &kv, 1, &own, &batch.map, &mut out);
    assert_argument(refused, "kv");
}

#[test]
fn row_maps_are_checked() {
    let mut ops = ops();
    let good = batch(SPEC, 3, |page| page as i32).map;
    let mut rows = ops.rows().unwrap();
    ops.set_row_map(&mut rows, &good).unwrap();
    let mut bad = good.clone();
    bad.qo_indptr[1] = 9;
    assert_argument(ops.set_row_map(&mut rows, &bad), "qo_indptr");
    let mut bad = good.clone();
    bad.positions.pop();
    assert_argument(ops.set_row_map(&mut rows, &bad), "positions");
    let mut bad = good.clone();
    bad.seq_lens[0] = -1;
    assert_argument(ops.set_row_map(&mut rows, &bad), "seq_lens");
    assert_eq!(rows, good);
}
