//! Attention on CUDA against the plain Rust backend: chains, trees and draft blocks over a cache that is NaN wherever no key
//! should be read, and what must stay the same to the bit.
#![cfg(feature = "cuda")]

mod common;

use common::{
    Case, PagedRequests, Rng, SPARE_ROWS, Tolerance, append, assert_close, bits, check, gpu,
    grow_tree, mat, poisoned, read_all, spec,
};
use dspark::device::{Graph, reports};
use dspark::ops::cuda::Cuda;
use dspark::ops::{AttentionSpec, KvGeometry, Ops, RowMap};

/// Attention over a poisoned cache; `block` for the draft form.
struct Attention {
    spec: AttentionSpec,
    page_size: usize,
    requests: Vec<(usize, usize)>,
    block: bool,
    page_seed: u64,
    tree: Option<Tree>,
    /// Of the queries, a power of two; the keys' is 1.
    q_scale: f32,
}

/// Shapes of the token trees.
#[derive(Clone, Copy, Debug)]
enum Tree {
    /// Every row hangs below the anchor.
    Star,
    Chain,
    /// Row i hangs below row (i - 1) / n.
    Fan(usize),
    /// A trunk of every other row, each with a leaf beside it.
    Comb,
    Random(u64),
}

/// From the shallowest to the deepest.
const TREES: [Tree; 9] = [
    Tree::Star,
    Tree::Fan(8),
    Tree::Fan(3),
    Tree::Fan(2),
    Tree::Random(77),
    Tree::Random(78),
    Tree::Random(79),
    Tree::Comb,
    Tree::Chain,
];

impl Tree {
    /// Ancestors of every row, and the rows' positions.
    fn grow(self, map: &mut RowMap) {
        let seed = if let Self::Random(seed) = self {
            seed
        } else {
            0
        };
        let mut rng = Rng::new(seed);
        grow_tree(map, |i| match self {
            Self::Star => 0,
            Self::Chain => i.saturating_sub(1),
            Self::Fan(n) => i.saturating_sub(1) / n,
            Self::Comb => i.saturating_sub(1) & !1,
            Self::Random(_) => rng.below(i.max(1)),
        });
    }
}

impl Case for Attention {
    fn cols(&self) -> usize {
        self.spec.num_q_heads * self.spec.head_dim
    }

    fn run<O: Ops>(&self, ops: &mut O) -> Vec<f32> {
        let spec = &self.spec;
        let kv_cols = 2 * spec.num_kv_heads * spec.head_dim;
        let paged = PagedRequests::new(
            &mut Rng::new(self.page_seed),
            spec,
            self.page_size,
            &self.requests,
        );
        let mut rng = Rng::new(31);
        let num_rows = paged.num_rows();
        let committed = rng.normals(paged.num_committed() * kv_cols, 1.0);
        let own = rng.normals(num_rows * kv_cols, 1.0);
        let q = mat(
            ops,
            self.cols(),
            &rng.normals(num_rows * self.cols(), self.q_scale),
        );
        let mut kv = paged.cache(ops, spec, &committed);
        let chains = paged.map(false);
        let mut map = chains.clone();
        if let Some(tree) = self.tree {
            tree.grow(&mut map);
        }
        let mut rows = ops.rows().unwrap();
        ops.set_row_map(&mut rows, &map).unwrap();
        let mut out = poisoned(ops, num_rows + SPARE_ROWS, self.cols());
        if self.block {
            let block = mat(ops, kv_cols, &own);
            ops.draft_attention(spec, &q, &kv, 1, &block, &rows, &mut out)
                .unwrap();
        } else {
            append(ops, spec, &chains, &own, &mut kv, 1);
            ops.verify_attention(spec, &q, &kv, 1, &rows, &mut out)
                .unwrap();
        }
        read_all(ops, out)
    }
}

fn attention_cases(block: bool) -> Vec<Attention> {
    let ragged = vec![
        (1, 0),
        (0, 40),
        (8, 127),
        (5, 128),
        (16, 3),
        (7, 129),
        (1, 1031),
    ];
    let specs = [
        spec(9, 3, 64),
        spec(16, 1, 128),
        spec(4, 4, 64),
        spec(10, 2, 128),
        spec(8, 2, 256),
        spec(3, 1, 256),
        spec(32, 2, 128),
    ];
    let mut cases: Vec<_> = specs
        .into_iter()
        .zip([16, 1, 7, 64, 16, 3, 32])
        .map(|(spec, page_size)| Attention {
            spec,
            page_size,
            requests: ragged.clone(),
            block,
            page_seed: 5,
            tree: None,
            q_scale: 2.0,
        })
        .collect();
    let alone_of = |spec, requests| Attention {
        spec,
        page_size: 16,
        requests,
        block,
        page_seed: 9,
        tree: None,
        q_scale: 2.0,
    };
    let alone = |requests| alone_of(spec(8, 2, 128), requests);
    cases.push(alone(vec![(1, 0)]));
    cases.push(alone(vec![(7, 2053)]));
    cases.push(alone(vec![(131, 301), (1, 5)]));
    // One long among many short, requests without rows, more requests than a warp looks at at once.
    let skewed = (0..70).map(|r| (r % 4, if r == 41 { 9001 } else { r * 13 % 130 }));
    cases.push(alone(skewed.collect()));
    // One request of so many KV heads that each has a cluster of CTAs: with keys for one of them, for some and for all,
    // and rows for some or all to write; without rows.
    for spec in [
        spec(32, 8, 128),
        spec(16, 8, 64),
        spec(20, 20, 128),
        spec(16, 8, 256),
    ] {
        for request in [(1, 0), (3, 120), (8, 200), (2, 1031), (0, 70)] {
            cases.push(alone_of(spec, vec![request]));
        }
        // A few: of about one length, with one that has no rows, and too uneven for clusters.
        cases.push(alone_of(spec, vec![(8, 200), (3, 180)]));
        cases.push(alone_of(spec, vec![(4, 300), (0, 40), (3, 330)]));
        cases.push(alone_of(spec, vec![(8, 30), (1, 0), (2, 900), (8, 20)]));
    }
    cases
}

/// Probabilities meet the values in bf16: half a unit of that, on the largest value.
const ATTENTION: f32 = 1.0 / 256.0;

#[test]
fn verify_attention() {
    let Some(mut cuda) = gpu() else { return };
    for case in attention_cases(false) {
        let label = format!(
            "verify {:?} page {} {:?}",
            case.spec, case.page_size, case.requests
        );
        check(&mut cuda, &label, &case, Tolerance::bf16(ATTENTION));
    }
}

#[test]
fn draft_attention() {
    let Some(mut cuda) = gpu() else { return };
    for case in attention_cases(true) {
        let label = format!(
            "draft {:?} page {} {:?}",
            case.spec, case.page_size, case.requests
        );
        check(&mut cuda, &label, &case, Tolerance::bf16(ATTENTION));
    }
}

#[test]
fn attention_within_a_window_and_under_a_cap() {
    let Some(mut cuda) = gpu() else { return };
    for block in [false, true] {
        for (window, softcap) in [(1, 0.0), (65, 0.0), (200, 5.0), (0, 2.0)] {
            for mut case in attention_cases(block) {
                case.spec.window = window;
                case.spec.softcap = softcap;
                let label = format!("block {block} {:?} {:?}", case.spec, case.requests);
                check(&mut cuda, &label, &case, Tolerance::bf16(ATTENTION));
            }
        }
    }
}

#[test]
fn trees_see_their_ancestors() {
    let Some(mut cuda) = gpu() else { return };
    let many = vec![(64, 0), (1, 63), (0, 9), (7, 127), (33, 1000), (64, 65)];
    let one = vec![(8, 300)];
    for tree in TREES {
        for (spec, window, page_size, requests) in [
            (spec(9, 3, 64), 0, 16, &many),
            (spec(8, 2, 128), 0, 1, &many),
            (spec(8, 2, 128), 0, 64, &many),
            (spec(4, 4, 64), 64, 16, &many),
            (spec(4, 2, 256), 0, 32, &many),
            (spec(16, 1, 128), 0, 7, &many),
            (spec(32, 8, 128), 0, 16, &one),
            (spec(16, 8, 256), 200, 16, &one),
        ] {
            let case = Attention {
                spec: AttentionSpec { window, ..spec },
                page_size,
                requests: requests.clone(),
                block: false,
                page_seed: 3,
                tree: Some(tree),
                q_scale: 2.0,
            };
            let label = format!("tree {tree:?} {spec:?} window {window} page {page_size}");
            check(&mut cuda, &label, &case, Tolerance::bf16(ATTENTION));
        }
    }
}

#[test]
fn keys_end_anywhere_about_pages_and_tiles() {
    let Some(mut cuda) = gpu() else { return };
    let edges = [
        1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 97, 127, 128, 129, 191, 257, 521, 1031,
    ];
    for block in [false, true] {
        for (spec, page_size) in [
            (spec(8, 2, 128), 16),
            (spec(8, 2, 64), 32),
            (spec(8, 2, 128), 64),
            (spec(4, 2, 256), 16),
            (spec(32, 2, 64), 1),
            (spec(3, 3, 128), 13),
        ] {
            // The rows' own keys are the last of as many, or as many are committed before them.
            let ends = edges.iter().enumerate().flat_map(|(i, &edge)| {
                let rows = 1 + i % 8;
                [(rows.min(edge), edge - rows.min(edge)), (rows, edge)]
            });
            let case = Attention {
                spec,
                page_size,
                requests: ends.collect(),
                block,
                page_seed: 12,
                tree: None,
                q_scale: 2.0,
            };
            let label = format!("edges, block {block} {spec:?} page {page_size}");
            check(&mut cuda, &label, &case, Tolerance::bf16(ATTENTION));
        }
    }
}

/// Scores beyond 1e4 of either sign: almost every probability is 0, and none is NaN.
#[test]
fn extreme_scores_pick_the_largest() {
    let Some(mut cuda) = gpu() else { return };
    for (block, tree) in [
        (false, None),
        (true, None),
        (false, Some(Tree::Star)),
        (false, Some(Tree::Fan(2))),
    ] {
        for (spec, window) in [
            (spec(8, 2, 128), 0),
            (spec(9, 3, 64), 64),
            (spec(4, 2, 256), 0),
        ] {
            let case = Attention {
                spec: AttentionSpec { window, ..spec },
                page_size: 16,
                requests: vec![(1, 0), (8, 127), (5, 300), (16, 3), (8, 2000)],
                block,
                page_seed: 2,
                tree,
                q_scale: 4096.0,
            };
            let label = format!("extreme, block {block} {tree:?} {spec:?} window {window}");
            // A score of 1e4 is known to some 1e-2: where two keys are that close, so are their shares.
            check(&mut cuda, &label, &case, Tolerance::bf16(0.03));
        }
    }
}

/// Verification rows of the requests of `map` over one cache, which holds something in every slot.
fn attend_all(cuda: &mut Cuda, spec: &AttentionSpec, map: &RowMap, q: &[f32]) -> Vec<f32> {
    let cols = spec.num_q_heads * spec.head_dim;
    let mut kv = cuda
        .kv_cache(&KvGeometry {
            num_layers: 1,
            num_pages: 400,
            page_size: 16,
            num_kv_heads: spec.num_kv_heads,
            head_dim: spec.head_dim,
        })
        .unwrap();
    let all: Vec<i32> = (0..400).collect();
    let mut whole = RowMap::new(all.len());
    whole.push(400 * 16, 0, 0, &all).unwrap();
    let values = Rng::new(8).normals(400 * 16 * 2 * spec.num_kv_heads * spec.head_dim, 1.0);
    append(cuda, spec, &whole, &values, &mut kv, 0);
    let q = mat(cuda, cols, q);
    let mut rows = cuda.rows().unwrap();
    cuda.set_row_map(&mut rows, map).unwrap();
    let mut out = poisoned(cuda, map.num_rows(), cols);
    cuda.verify_attention(spec, &q, &kv, 0, &rows, &mut out)
        .unwrap();
    cuda.read_mat(&out).unwrap()
}

#[test]
fn a_batch_invariant_request_does_not_see_its_neighbours() {
    let Some(mut cuda) = gpu() else { return };
    cuda.set_batch_invariant(true);
    let cols = 8 * 128;
    let spec = spec(8, 2, 128);
    let q = Rng::new(4).normals(90 * cols, 2.0);
    // The request of interest: 5 rows on 1500 keys, pages 0 to 94.
    let own_pages: Vec<i32> = (0..95).collect();
    let mut alone = RowMap::new(200);
    alone.push(5, 1500, 1500, &own_pages).unwrap();
    let want = attend_all(&mut cuda, &spec, &alone, &q[..5 * cols]);
    for neighbours in [&[(80, 300)][..], &[(1, 3100), (7, 0)], &[(16, 90); 5]] {
        let mut map = RowMap::new(200);
        for &(num_rows, seq_len) in neighbours {
            let pages: Vec<i32> = (100..300).collect();
            map.push(num_rows, seq_len, seq_len, &pages).unwrap();
        }
        let first = map.num_rows();
        map.push(5, 1500, 1500, &own_pages).unwrap();
        // The rows of interest have the same q, wherever they stand.
        let mut all = Rng::new(5).normals(map.num_rows() * cols, 2.0);
        all[first * cols..].copy_from_slice(&q[..5 * cols]);
        let got = attend_all(&mut cuda, &spec, &map, &all);
        assert_eq!(bits(&got[first * cols..]), bits(&want), "{neighbours:?}");
    }
}

#[test]
fn batch_invariant_attention_is_right() {
    let Some(mut cuda) = gpu() else { return };
    cuda.set_batch_invariant(true);
    for block in [false, true] {
        for case in attention_cases(block) {
            let label = format!(
                "invariant, block {block} {:?} {:?}",
                case.spec, case.requests
            );
            check(&mut cuda, &label, &case, Tolerance::bf16(ATTENTION));
        }
    }
}

#[test]
fn attention_is_the_same_from_run_to_run() {
    let Some(mut cuda) = gpu() else { return };
    for block in [false, true] {
        for case in attention_cases(block) {
            let first = bits(&case.run(&mut cuda));
            assert_eq!(first, bits(&case.run(&mut cuda)), "{:?}", case.requests);
        }
    }
}

#[test]
fn captured_attention_replays_for_other_lengths() {
    let Some(mut cuda) = gpu() else { return };
    let spec = spec(8, 2, 128);
    let map_of = |requests: &[(usize, usize)]| {
        let mut map = RowMap::new(130);
        for (r, &(num_rows, seq_len)) in requests.iter().enumerate() {
            let pages: Vec<i32> = (0..130).map(|page| (page * 3 + r as i32) % 400).collect();
            map.push(num_rows, seq_len, seq_len, &pages).unwrap();
        }
        map
    };
    let is_hopper = reports().unwrap()[0].compute_capability.0 == 9;
    // As many rows, as many words on the device: only the contents differ.
    let captured = map_of(&[(8, 2000), (8, 500), (8, 30), (0, 0)]);
    for replayed in [
        map_of(&[(8, 2000), (8, 500), (8, 30), (0, 0)]),
        map_of(&[(8, 3), (0, 900), (8, 1999), (8, 64)]),
        map_of(&[(7, 0), (8, 0), (8, 0), (1, 0)]),
    ] {
        let cols = spec.num_q_heads * spec.head_dim;
        let mut kv = cuda
            .kv_cache(&KvGeometry {
                num_layers: 1,
                num_pages: 400,
                page_size: 16,
                num_kv_heads: 2,
                head_dim: 128,
            })
            .unwrap();
        let all: Vec<i32> = (0..400).collect();
        let mut whole = RowMap::new(400);
        whole.push(6400, 0, 0, &all).unwrap();
        append(
            &mut cuda,
            &spec,
            &whole,
            &Rng::new(8).normals(6400 * 512, 1.0),
            &mut kv,
            0,
        );
        let q = mat(&mut cuda, cols, &Rng::new(9).normals(24 * cols, 1.0));
        let mut rows = cuda.rows().unwrap();
        cuda.set_row_map(&mut rows, &captured).unwrap();
        let mut out = poisoned(&mut cuda, 24, cols);
        // Grows the workspace, which capture may not.
        cuda.verify_attention(&spec, &q, &kv, 0, &rows, &mut out)
            .unwrap();
        let device = cuda.device().clone();
        let graph = Graph::capture(&device, || {
            cuda.verify_attention(&spec, &q, &kv, 0, &rows, &mut out)
        })
        .unwrap();
        cuda.write_mat(&vec![f32::NAN; 24 * cols], &mut out)
            .unwrap();
        cuda.set_row_map(&mut rows, &replayed).unwrap();
        // SAFETY: every operand is alive and not used until the graph has run.
        unsafe { graph.launch() }.unwrap();
        let got = cuda.read_mat(&out).unwrap();
        // The captured launch is sized by the captured lengths. The streaming kernel of sm_90 cuts its work by the
        // lengths that it finds, the other one's sums may be ordered otherwise.
        let mut eager = poisoned(&mut cuda, 24, cols);
        cuda.verify_attention(&spec, &q, &kv, 0, &rows, &mut eager)
            .unwrap();
        let want = cuda.read_mat(&eager).unwrap();
        assert_close("replay", &got, &want, cols, Tolerance::bf16(ATTENTION));
        if is_hopper {
            assert_eq!(bits(&got), bits(&want));
        }
    }
}

#[test]
fn the_comparison_fails_on_a_slip_of_one_position() {
    let mut oracle = common::reference();
    for block in [false, true] {
        let [right, shifted] = [(7, 40), (7, 41)].map(|request| {
            let case = Attention {
                spec: spec(4, 2, 64),
                page_size: 16,
                requests: vec![request],
                block,
                page_seed: 9,
                tree: None,
                q_scale: 2.0,
            };
            (case.cols(), case.run(&mut oracle))
        });
        let compare = || {
            assert_close(
                "slip",
                &shifted.1,
                &right.1,
                right.0,
                Tolerance::bf16(ATTENTION),
            );
        };
        assert!(std::panic::catch_unwind(compare).is_err());
    }
}

#[test]
fn attention_does_not_depend_on_which_pages_hold_the_keys() {
    let Some(mut cuda) = gpu() else { return };
    for block in [false, true] {
        let [one, other] = [1, 2].map(|page_seed| {
            let requests = vec![(5, 300), (3, 17)];
            let spec = spec(8, 2, 64);
            Attention {
                spec,
                page_size: 16,
                requests,
                block,
                page_seed,
                tree: None,
                q_scale: 2.0,
            }
            .run(&mut cuda)
        });
        assert_eq!(bits(&one), bits(&other), "block {block}");
    }
}
