//! Rows of a tree that take the places of rows before them: their keys and values, in every layer, and nothing else.
#![cfg(feature = "cuda")]

mod common;

use common::{
    Case, PagedRequests, Rng, Tolerance, append, check, gpu, identity_rope, mat, poisoned, read_all,
};
use dspark::Error;
use dspark::ops::{AttentionSpec, KvSink, Ops, RowMap, RowMove};

const SPEC: AttentionSpec = AttentionSpec {
    num_q_heads: 6,
    num_kv_heads: 2,
    head_dim: 64,
    scale: 0.125,
    norm_eps: 1e-6,
    window: 0,
    softcap: 0.0,
};
const COLS: usize = 6 * 64;

/// A verify pass whose requests keep some rows and move one, and the pass of one row each behind what was kept.
struct MoveThenAttend {
    page_size: usize,
    layer: usize,
    /// `(rows, seq_len)` of each request.
    requests: Vec<(usize, usize)>,
    moves: Vec<RowMove>,
}

impl Case for MoveThenAttend {
    fn cols(&self) -> usize {
        COLS
    }

    fn run<O: Ops>(&self, ops: &mut O) -> Vec<f32> {
        let mut rng = Rng::new(11);
        let paged = PagedRequests::new(&mut rng, &SPEC, self.page_size, &self.requests);
        let committed = rng.normals(paged.num_committed() * 4 * 64, 1.0);
        let mut kv = paged.cache(ops, &SPEC, &committed);
        append(ops, &SPEC, &paged.map(true), &committed, &mut kv, 0);
        let map = paged.map(false);
        let rope = ops.rope(&identity_rope(64)).unwrap();
        let mut rows = ops.rows().unwrap();
        ops.set_row_map(&mut rows, &map).unwrap();
        for layer in 0..2 {
            let values = rng.normals(paged.num_rows() * 4 * 64, 1.0);
            let own = mat(ops, 4 * 64, &values);
            let sink = KvSink::Cache { kv: &mut kv, layer };
            ops.qk_norm_rope(&SPEC, &own, None, &rope, &rows, None, sink)
                .unwrap();
        }
        ops.move_kv(&mut kv, &rows, &self.moves).unwrap();

        // Up to the row that moved in, or two where none did; each request's last entry is the next row's own.
        let kept = |r: usize| {
            let step = self.moves.iter().find(|step| step.request == r);
            step.map_or(2.min(self.requests[r].0), |step| step.to + 1)
        };
        let mut next = RowMap::new(map.max_pages_per_req);
        for (r, (pages, &(_, seq_len))) in paged.pages.iter().zip(&self.requests).enumerate() {
            let len = seq_len + kept(r) - 1;
            next.push(1, len, len, pages).unwrap();
        }
        ops.set_row_map(&mut rows, &next).unwrap();
        let q = mat(ops, COLS, &rng.normals(next.num_rows() * COLS, 1.0));
        let mut out = poisoned(ops, next.num_rows(), COLS);
        ops.verify_attention(&SPEC, &q, &kv, self.layer, &rows, &mut out)
            .unwrap();
        read_all(ops, out)
    }
}

fn step(request: usize, from: usize, to: usize) -> RowMove {
    RowMove { request, from, to }
}

#[test]
fn moved_rows_are_seen_where_they_went() {
    let Some(mut cuda) = gpu() else { return };
    for page_size in [1, 5, 16] {
        for layer in 0..2 {
            let case = MoveThenAttend {
                page_size,
                layer,
                requests: vec![(15, 30), (9, 15), (4, 0), (2, 47), (8, 16)],
                moves: vec![step(0, 14, 3), step(1, 8, 1), step(2, 3, 2), step(4, 2, 1)],
            };
            let label = format!("moves, pages of {page_size}, layer {layer}");
            check(&mut cuda, &label, &case, Tolerance::bf16(0.02));
            // Without them the result is another: the comparison can fail.
            let still = MoveThenAttend {
                moves: Vec::new(),
                requests: case.requests.clone(),
                ..case
            };
            let moved = case.run(&mut cuda);
            assert_ne!(still.run(&mut cuda), moved, "{label}");
        }
    }
}

#[test]
fn moves_that_are_none_are_refused() {
    let Some(mut cuda) = gpu() else { return };
    let mut rng = Rng::new(1);
    let paged = PagedRequests::new(&mut rng, &SPEC, 4, &[(3, 5), (1, 2)]);
    let mut kv = cuda.kv_cache(&paged.geometry).unwrap();
    let mut rows = cuda.rows().unwrap();
    cuda.set_row_map(&mut rows, &paged.map(false)).unwrap();
    for bad in [
        &[step(0, 3, 1)][..],
        &[step(0, 1, 1)],
        &[step(0, 1, 2)],
        &[step(2, 1, 0)],
        &[step(0, 2, 1), step(0, 1, 0)],
    ] {
        let refused = cuda.move_kv(&mut kv, &rows, bad);
        assert!(
            matches!(refused, Err(Error::Argument { field, .. }) if field == "moves"),
            "{bad:?}"
        );
    }
    cuda.move_kv(&mut kv, &rows, &[]).unwrap();
}
