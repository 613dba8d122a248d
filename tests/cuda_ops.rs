//! Every CUDA op of the layers against the plain Rust backend, on inputs that bf16 holds exactly.
#![cfg(feature = "cuda")]

mod common;

use common::{
    Case, PagedRequests, Rng, Tolerance, append, assert_close, check, gpu, mat, norm, poisoned,
    poisoned_logits, read_all, weight,
};
use dspark::Error;
use dspark::device::{Graph, reports};
use dspark::ops::cuda::Cuda;
use dspark::ops::{AttentionSpec, KvGeometry, KvSink, Matrix, Ops, RopeSpec, RowMap};

/// Rows past the ones in use that an op must leave alone.
const SPARE_ROWS: usize = 3;

struct RmsNorm {
    rows: usize,
    cols: usize,
    add: bool,
}

impl Case for RmsNorm {
    fn cols(&self) -> usize {
        self.cols
    }

    fn run<O: Ops>(&self, ops: &mut O) -> Vec<f32> {
        let &Self { rows, cols, add } = self;
        let mut rng = Rng::new((rows * cols) as u64);
        let mut x = mat(ops, cols, &rng.normals(rows * cols, 4.0));
        let delta = mat(ops, cols, &rng.normals(rows * cols, 0.5));
        let weight = norm(ops, &rng.normals(cols, 1.0));
        let mut out = poisoned(ops, rows + SPARE_ROWS, cols);
        if add {
            ops.add_rms_norm(&delta, &mut x, &weight, 1e-5, &mut out)
                .unwrap();
        } else {
            ops.rms_norm(&x, &weight, 1e-5, &mut out).unwrap();
        }
        assert_eq!(out.rows(), rows);
        let mut values = read_all(ops, out);
        values.extend(ops.read_mat(&x).unwrap());
        values
    }
}

#[test]
fn rms_norm() {
    let Some(mut cuda) = gpu() else { return };
    for (rows, cols) in [
        (1, 8),
        (3, 64),
        (7, 576),
        (129, 1032),
        (5, 2560),
        (2, 17408),
    ] {
        for add in [false, true] {
            let case = RmsNorm { rows, cols, add };
            let label = format!("rms_norm {rows}x{cols} add {add}");
            check(&mut cuda, &label, &case, Tolerance::bf16(0.0));
        }
    }
}

struct SiluMul {
    rows: usize,
    cols: usize,
}

impl Case for SiluMul {
    fn cols(&self) -> usize {
        self.cols
    }

    fn run<O: Ops>(&self, ops: &mut O) -> Vec<f32> {
        let &Self { rows, cols } = self;
        let mut rng = Rng::new(7);
        let mut values = rng.normals(rows * 2 * cols, 8.0);
        values[0] = -200.0; // silu underflows to zero, exp must not overflow to NaN
        let gate_up = mat(ops, 2 * cols, &values);
        let mut out = poisoned(ops, rows + SPARE_ROWS, cols);
        ops.silu_mul(&gate_up, &mut out).unwrap();
        read_all(ops, out)
    }
}

#[test]
fn silu_mul() {
    let Some(mut cuda) = gpu() else { return };
    for (rows, cols) in [(1, 8), (13, 1536), (129, 9728)] {
        let label = format!("silu_mul {rows}x{cols}");
        check(
            &mut cuda,
            &label,
            &SiluMul { rows, cols },
            Tolerance::bf16(1e-6),
        );
    }
}

/// Embedding, gather and both copies, one after the other.
struct Rows {
    cols: usize,
}

impl Case for Rows {
    fn cols(&self) -> usize {
        self.cols
    }

    fn run<O: Ops>(&self, ops: &mut O) -> Vec<f32> {
        let cols = self.cols;
        let mut rng = Rng::new(11);
        let table = weight(ops, [101, cols], &rng.normals(101 * cols, 1.0));
        let mut embedded = poisoned(ops, 5, cols);
        ops.embed(&table, &[100, 0, 57, 57, 1], &mut embedded)
            .unwrap();
        let mut gathered = poisoned(ops, 4 + SPARE_ROWS, cols);
        ops.gather_rows(&embedded, &[4, 4, 0, 2], &mut gathered)
            .unwrap();
        let mut wide = poisoned(ops, 7, 3 * cols + 1);
        ops.copy_into(&embedded, &mut wide, 1, 0).unwrap();
        ops.copy_into(&gathered, &mut wide, 3, 2 * cols + 1)
            .unwrap();
        let source = rng.normals(3 * cols, 1.0);
        let source = common::logits(ops, cols, &source);
        let mut logits = poisoned_logits(ops, 8, cols);
        ops.copy_logits(&source, &mut logits, 1, 3).unwrap();
        let mut values = read_all(ops, gathered);
        values.extend(read_all(ops, wide));
        values.extend(ops.read_logits(&logits).unwrap());
        values
    }
}

#[test]
fn rows_are_copied_exactly() {
    let Some(mut cuda) = gpu() else { return };
    for cols in [1, 7, 64, 576, 1031] {
        check(
            &mut cuda,
            &format!("rows of {cols}"),
            &Rows { cols },
            Tolerance::EXACT,
        );
    }
}

struct Linear {
    shape: [usize; 3],
    logits: bool,
}

impl Case for Linear {
    fn cols(&self) -> usize {
        self.shape[1]
    }

    fn run<O: Ops>(&self, ops: &mut O) -> Vec<f32> {
        let [m, n, k] = self.shape;
        let mut rng = Rng::new((m * n + k) as u64);
        let x = mat(ops, k, &rng.normals(m * k, 1.0));
        // Two parts, as q/k/v and gate/up are stacked.
        let first = n / 2;
        let top = common::Tensor::new(&[first, k], &rng.normals(first * k, 0.125));
        let bottom = common::Tensor::new(&[n - first, k], &rng.normals((n - first) * k, 0.125));
        let weight = ops.weight(&[top.host(), bottom.host()]).unwrap();
        if self.logits {
            let mut out = poisoned_logits(ops, m + SPARE_ROWS, n);
            ops.linear_logits(&x, &weight, &mut out).unwrap();
            out.set_rows(m + SPARE_ROWS).unwrap();
            return ops.read_logits(&out).unwrap();
        }
        let mut out = poisoned(ops, m + SPARE_ROWS, n);
        ops.linear(&x, &weight, &mut out).unwrap();
        read_all(ops, out)
    }
}

#[test]
fn linear() {
    let Some(mut cuda) = gpu() else { return };
    for shape in [
        [1, 8, 8],
        [1, 960, 576],
        [7, 576, 1536],
        [33, 1030, 264],
        [129, 512, 2560],
    ] {
        for logits in [false, true] {
            let tolerance = if logits {
                Tolerance::f32(1e-5)
            } else {
                Tolerance::bf16(1e-5)
            };
            let label = format!("linear {shape:?} logits {logits}");
            check(&mut cuda, &label, &Linear { shape, logits }, tolerance);
        }
    }
}

fn spec(num_q_heads: usize, num_kv_heads: usize, head_dim: usize) -> AttentionSpec {
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

fn rope_spec(head_dim: usize) -> RopeSpec {
    let inv_freq = (0..head_dim / 2)
        .map(|i| 1e4_f32.powf(-2.0 * i as f32 / head_dim as f32))
        .collect();
    RopeSpec {
        inv_freq,
        scale: 1.0,
    }
}

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

/// Attention over a poisoned cache; `block` for the draft form.
struct Attention {
    spec: AttentionSpec,
    page_size: usize,
    requests: Vec<(usize, usize)>,
    block: bool,
    page_seed: u64,
    tree: Option<Tree>,
}

/// Shapes of the token trees.
#[derive(Clone, Copy, Debug)]
enum Tree {
    Star,
    Chain,
    Random,
}

impl Tree {
    /// Ancestors of every row, and the rows' positions.
    fn grow(self, map: &mut RowMap) {
        let mut rng = Rng::new(77);
        let mut masks: Vec<u64> = Vec::new();
        for r in 0..map.num_reqs() {
            let first = map.rows_of(r).start;
            for (i, row) in map.rows_of(r).enumerate() {
                let parent = match self {
                    Self::Star => 0,
                    Self::Chain => i.saturating_sub(1),
                    Self::Random => rng.below(i.max(1)),
                };
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
        let q = mat(ops, self.cols(), &rng.normals(num_rows * self.cols(), 2.0));
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
        })
        .collect();
    let alone = |requests| Attention {
        spec: spec(8, 2, 128),
        page_size: 16,
        requests,
        block,
        page_seed: 9,
        tree: None,
    };
    cases.push(alone(vec![(1, 0)]));
    cases.push(alone(vec![(7, 2053)]));
    cases.push(alone(vec![(131, 301), (1, 5)]));
    // One long among many short, requests without rows, more requests than a warp looks at at once.
    let skewed = (0..70).map(|r| (r % 4, if r == 41 { 9001 } else { r * 13 % 130 }));
    cases.push(alone(skewed.collect()));
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
    let requests = vec![(64, 0), (1, 63), (0, 9), (7, 127), (33, 1000), (64, 65)];
    for tree in [Tree::Star, Tree::Chain, Tree::Random] {
        for (spec, window) in [
            (spec(9, 3, 64), 0),
            (spec(8, 2, 128), 0),
            (spec(4, 4, 64), 64),
        ] {
            let case = Attention {
                spec: AttentionSpec { window, ..spec },
                page_size: 16,
                requests: requests.clone(),
                block: false,
                page_seed: 3,
                tree: Some(tree),
            };
            let label = format!("tree {tree:?} {spec:?} window {window}");
            check(&mut cuda, &label, &case, Tolerance::bf16(ATTENTION));
        }
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
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
            }
            .run(&mut cuda)
        });
        assert_eq!(bits(&one), bits(&other), "block {block}");
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

#[test]
fn a_captured_layer_replays_on_new_values() {
    let Some(mut cuda) = gpu() else { return };
    let (rows, cols) = (5, 576);
    let mut rng = Rng::new(3);
    let values = [rng.normals(rows * cols, 1.0), rng.normals(rows * cols, 1.0)];
    let weight = norm(&mut cuda, &rng.normals(cols, 1.0));
    let mut x = mat(&mut cuda, cols, &values[0]);
    let mut out = poisoned(&mut cuda, rows, cols);
    let device = cuda.device().clone();
    let graph = Graph::capture(&device, || cuda.rms_norm(&x, &weight, 1e-6, &mut out)).unwrap();
    cuda.write_mat(&values[1], &mut x).unwrap();
    // SAFETY: x, weight and out are alive and not used until the graph has run.
    unsafe { graph.launch() }.unwrap();
    let replayed = cuda.read_mat(&out).unwrap();
    let mut eager = poisoned(&mut cuda, rows, cols);
    cuda.rms_norm(&x, &weight, 1e-6, &mut eager).unwrap();
    assert_eq!(replayed, cuda.read_mat(&eager).unwrap());
    let refused = Graph::capture(&device, || cuda.write_mat(&values[0], &mut x));
    assert!(matches!(refused.err(), Some(Error::Unsupported { .. })));
}

fn argument_error(result: dspark::Result<()>, field: &str) {
    match result {
        Err(Error::Argument { field: found, .. }) => assert!(found.contains(field), "{found}"),
        other => panic!("expected a refusal of {field}, got {other:?}"),
    }
}

#[test]
fn operands_that_do_not_fit_are_named() {
    let Some(mut cuda) = gpu() else { return };
    let spec = spec(4, 2, 64);
    let x = mat(&mut cuda, 64, &[1.0; 128]);
    let mut out = poisoned(&mut cuda, 2, 64);
    let mut narrow = poisoned(&mut cuda, 2, 32);
    let mut short = poisoned(&mut cuda, 1, 64);
    let weight_32 = weight(&mut cuda, [8, 32], &[0.0; 256]);
    let norm_32 = norm(&mut cuda, &[1.0; 32]);
    argument_error(cuda.rms_norm(&x, &norm_32, 1e-6, &mut out), "weight");
    argument_error(cuda.linear(&x, &weight_32, &mut out), "weight.cols");
    argument_error(cuda.silu_mul(&x, &mut out), "gate_up.cols");
    argument_error(cuda.gather_rows(&x, &[0, 2], &mut out), "index[1]");
    argument_error(cuda.gather_rows(&x, &[0], &mut narrow), "out.cols");
    argument_error(cuda.gather_rows(&x, &[0, 1], &mut short), "rows");
    argument_error(cuda.embed(&weight_32, &[8], &mut narrow), "ids[0]");
    argument_error(cuda.copy_into(&x, &mut out, 1, 0), "dst_row");
    argument_error(cuda.copy_into(&x, &mut out, 0, 1), "dst_col");
    refused_attention(&mut cuda, &spec);
}

fn refused_attention(cuda: &mut Cuda, spec: &AttentionSpec) {
    let paged = PagedRequests::new(&mut Rng::new(1), spec, 4, &[(2, 5)]);
    let kv = cuda.kv_cache(&paged.geometry).unwrap();
    let q = mat(cuda, 256, &[1.0; 512]);
    let mut out = poisoned(cuda, 2, 256);
    let mut rows = cuda.rows().unwrap();
    let mut map = paged.map(false);
    let mut attend = |cuda: &mut Cuda, map: &_, layer| {
        cuda.set_row_map(&mut rows, map)?;
        cuda.verify_attention(spec, &q, &kv, layer, &rows, &mut out)
    };
    attend(cuda, &map, 0).unwrap();
    argument_error(attend(cuda, &map, 2), "layer");
    map.page_table[1] = -1;
    argument_error(attend(cuda, &map, 0), "page_table of request 0");
    map.page_table[1] = paged.geometry.num_pages as i32;
    argument_error(attend(cuda, &map, 0), "page_table");
    map.qo_indptr[1] = 3;
    argument_error(attend(cuda, &map, 0), "qo_indptr");

    let odd = AttentionSpec {
        head_dim: 96,
        ..*spec
    };
    let paged = PagedRequests::new(&mut Rng::new(1), &odd, 4, &[(2, 5)]);
    let kv = cuda.kv_cache(&paged.geometry).unwrap();
    let q = mat(cuda, 4 * 96, &[1.0; 8 * 96]);
    let mut out = poisoned(cuda, 2, 4 * 96);
    let mut rows = cuda.rows().unwrap();
    cuda.set_row_map(&mut rows, &paged.map(false)).unwrap();
    let refused = cuda.verify_attention(&odd, &q, &kv, 0, &rows, &mut out);
    let message = refused.unwrap_err().to_string();
    assert!(
        message.contains("head_dim") && message.contains("96"),
        "{message}"
    );
}
