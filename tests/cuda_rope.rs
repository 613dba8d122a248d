//! Norms, rotation and append of queries, keys and values on CUDA against the plain Rust backend.
#![cfg(feature = "cuda")]

mod common;

use common::{
    Case, PagedRequests, Rng, SPARE_ROWS, Tolerance, check, gpu, mat, norm, poisoned, read_all,
    rope_spec, spec,
};
use dspark::ops::{AttentionSpec, KvSink, Ops};

/// q, and the block `[k | v]`, after norms and rotation.
struct Rotate {
    spec: AttentionSpec,
    with_norms: bool,
    with_q: bool,
}

impl Case for Rotate {
    fn cols(&self) -> usize {
        self.spec.head_dim
    }

    fn run<O: Ops>(&self, ops: &mut O) -> Vec<f32> {
        let spec = &self.spec;
        let (q_cols, kv_cols) = (
            spec.num_q_heads * spec.head_dim,
            spec.num_kv_heads * spec.head_dim,
        );
        let mut rng = Rng::new(23);
        let requests = PagedRequests::new(&mut rng, spec, 5, &[(3, 4000), (0, 9), (6, 0), (1, 77)]);
        let rope = ops.rope(&rope_spec(spec.head_dim)).unwrap();
        let mut rows = ops.rows().unwrap();
        ops.set_row_map(&mut rows, &requests.map(false)).unwrap();
        let num_rows = requests.num_rows();
        let in_cols = 2 * kv_cols + if self.with_q { q_cols } else { 0 };
        let qkv = mat(ops, in_cols, &rng.normals(num_rows * in_cols, 2.0));
        let q_norm = norm(ops, &rng.normals(spec.head_dim, 1.0));
        let k_norm = norm(ops, &rng.normals(spec.head_dim, 1.0));
        let norms = self.with_norms.then_some((&q_norm, &k_norm));
        let mut q_out = poisoned(ops, num_rows + SPARE_ROWS, q_cols);
        let mut block = poisoned(ops, num_rows + SPARE_ROWS, 2 * kv_cols);
        let q = self.with_q.then_some(&mut q_out);
        ops.qk_norm_rope(
            spec,
            &qkv,
            norms,
            &rope,
            &rows,
            q,
            KvSink::Block(&mut block),
        )
        .unwrap();
        let mut values = read_all(ops, q_out);
        values.extend(read_all(ops, block));
        values
    }
}

#[test]
fn qk_norm_rope() {
    let Some(mut cuda) = gpu() else { return };
    for spec in [spec(9, 3, 64), spec(8, 2, 128), spec(1, 1, 64)] {
        for (with_norms, with_q) in [(false, true), (true, true), (true, false)] {
            let case = Rotate {
                spec,
                with_norms,
                with_q,
            };
            let label = format!("qk_norm_rope {spec:?} norms {with_norms} q {with_q}");
            check(&mut cuda, &label, &case, Tolerance::bf16(1e-5));
        }
    }
}

/// Rotated keys through the cache into attention: positions, pages and the layer have to be right.
struct AppendThenAttend;

impl Case for AppendThenAttend {
    fn cols(&self) -> usize {
        6 * 64
    }

    fn run<O: Ops>(&self, ops: &mut O) -> Vec<f32> {
        let spec = spec(6, 2, 64);
        let mut rng = Rng::new(41);
        let paged = PagedRequests::new(&mut rng, &spec, 8, &[(9, 30), (1, 63), (4, 0)]);
        let committed = rng.normals(paged.num_committed() * 4 * 64, 1.0);
        let mut kv = paged.cache(ops, &spec, &committed);
        let rope = ops.rope(&rope_spec(64)).unwrap();
        let mut rows = ops.rows().unwrap();
        ops.set_row_map(&mut rows, &paged.map(false)).unwrap();
        let num_rows = paged.num_rows();
        let qkv = mat(ops, 10 * 64, &rng.normals(num_rows * 10 * 64, 1.0));
        let mut q = poisoned(ops, num_rows, self.cols());
        let sink = KvSink::Cache {
            kv: &mut kv,
            layer: 1,
        };
        ops.qk_norm_rope(&spec, &qkv, None, &rope, &rows, Some(&mut q), sink)
            .unwrap();
        let mut out = poisoned(ops, num_rows, self.cols());
        ops.verify_attention(&spec, &q, &kv, 1, &rows, &mut out)
            .unwrap();
        read_all(ops, out)
    }
}

#[test]
fn rotated_keys_reach_attention_through_the_cache() {
    let Some(mut cuda) = gpu() else { return };
    // q and k are rounded on the way, which moves the scores a little.
    check(
        &mut cuda,
        "append then attend",
        &AppendThenAttend,
        Tolerance::bf16(0.02),
    );
}
