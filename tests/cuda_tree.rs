//! Why a text with second choices may differ from plain decoding where one without them does not, even when attention is
//! batch-invariant: the row of a second choice sums the same keys as in a chain, its own among them from another slot.
#![cfg(feature = "cuda")]

mod common;

use common::{Rng, append, bits, gpu, mat, poisoned, spec};
use dspark::ops::cuda::Cuda;
use dspark::ops::{KvGeometry, Ops, RowMap};

const HEADS: (usize, usize, usize) = (8, 2, 64);
const Q_COLS: usize = HEADS.0 * HEADS.2;
const KV_COLS: usize = 2 * HEADS.1 * HEADS.2;
const PAGE_SIZE: usize = 16;
const PAGES: usize = 8;

/// Contexts that end anywhere about a tile of keys.
const NUM_REQS: usize = 64;
fn seq_len(r: usize) -> usize {
    20 + r
}

/// A row of a pass: which of a request's tokens it is, and the rows before it that are its ancestors.
type Row = (usize, u64);

const ANCHOR: usize = 0;
const CHOICE: usize = 1;
const DRAFT: usize = 2;
const AFTER: usize = 5;
const NUM_TOKENS: usize = 6;

/// Every token has its query, key and value, the same in whichever row it stands.
fn values(rng_seed: u64, cols: usize) -> Vec<f32> {
    Rng::new(rng_seed).normals(NUM_REQS * NUM_TOKENS * cols, 1.0)
}

fn rows_of(all: &[f32], cols: usize, rows: &[Row]) -> Vec<f32> {
    let of = |r: usize, token: usize| &all[(r * NUM_TOKENS + token) * cols..][..cols];
    (0..NUM_REQS)
        .flat_map(|r| rows.iter().flat_map(move |&(token, _)| of(r, token)))
        .copied()
        .collect()
}

struct Scene {
    cuda: Cuda,
    kv: <Cuda as Ops>::KvCache,
    queries: Vec<f32>,
    keys: Vec<f32>,
}

impl Scene {
    fn new(mut cuda: Cuda) -> Self {
        cuda.set_batch_invariant(true);
        let spec = spec(HEADS.0, HEADS.1, HEADS.2);
        let num_pages = NUM_REQS * PAGES;
        let mut kv = cuda
            .kv_cache(&KvGeometry {
                num_layers: 1,
                num_pages,
                page_size: PAGE_SIZE,
                num_kv_heads: spec.num_kv_heads,
                head_dim: spec.head_dim,
            })
            .unwrap();
        let all: Vec<i32> = (0..num_pages as i32).collect();
        let mut whole = RowMap::new(all.len());
        whole.push(num_pages * PAGE_SIZE, 0, 0, &all).unwrap();
        let context = Rng::new(1).normals(num_pages * PAGE_SIZE * KV_COLS, 1.0);
        append(&mut cuda, &spec, &whole, &context, &mut kv, 0);
        Self {
            cuda,
            kv,
            queries: values(2, Q_COLS),
            keys: values(3, KV_COLS),
        }
    }

    /// The pass of these rows of every request, `committed` entries after its context.
    fn map(rows: &[Row], committed: usize) -> RowMap {
        let mut map = RowMap::new(PAGES);
        for r in 0..NUM_REQS {
            let pages: Vec<i32> = (r * PAGES..(r + 1) * PAGES).map(|p| p as i32).collect();
            let len = seq_len(r) + committed;
            map.push(rows.len(), len, len, &pages).unwrap();
        }
        let masks = rows.iter().map(|&(_, ancestors)| ancestors);
        map.tree = Some(masks.cycle().take(map.num_rows()).collect());
        for row in 0..map.num_rows() {
            let depth = rows[row % rows.len()].1.count_ones() as i32;
            map.positions[row] = map.seq_lens[row / rows.len()] + depth;
        }
        map
    }

    /// Bits of what attention makes of `token`, for every request.
    fn attend(&mut self, rows: &[Row], committed: usize, token: usize) -> Vec<Vec<u32>> {
        let spec = spec(HEADS.0, HEADS.1, HEADS.2);
        let map = Self::map(rows, committed);
        let keys = rows_of(&self.keys, KV_COLS, rows);
        append(&mut self.cuda, &spec, &map, &keys, &mut self.kv, 0);
        let cuda = &mut self.cuda;
        let q = mat(cuda, Q_COLS, &rows_of(&self.queries, Q_COLS, rows));
        let mut on_device = cuda.rows().unwrap();
        cuda.set_row_map(&mut on_device, &map).unwrap();
        let mut out = poisoned(cuda, map.num_rows(), Q_COLS);
        cuda.verify_attention(&spec, &q, &self.kv, 0, &on_device, &mut out)
            .unwrap();
        let out = cuda.read_mat(&out).unwrap();
        let place = rows.iter().position(|row| row.0 == token).unwrap();
        let of = |r: usize| bits(&out[(r * rows.len() + place) * Q_COLS..][..Q_COLS]);
        (0..NUM_REQS).map(of).collect()
    }

    /// Keeps these rows of the pass just attended to.
    fn keep(&mut self, rows: &[Row], kept: u64) {
        let mut on_device = self.cuda.rows().unwrap();
        let map = Self::map(rows, 0);
        self.cuda.set_row_map(&mut on_device, &map).unwrap();
        let kept = vec![kept; NUM_REQS];
        self.cuda
            .commit_tree(&mut self.kv, &on_device, &kept)
            .unwrap();
    }
}

fn num_different(a: &[Vec<u32>], b: &[Vec<u32>]) -> usize {
    a.iter().zip(b).filter(|(a, b)| a != b).count()
}

#[test]
fn a_second_choice_differs_by_the_slot_of_its_key_alone() {
    let Some(cuda) = gpu() else { return };
    let mut scene = Scene::new(cuda);
    let chain = [(ANCHOR, 0), (CHOICE, 1)];
    // Beside a draft and behind the rest of its chain, as a step lays it out; and in the draft's place.
    let beside = [
        (ANCHOR, 0),
        (DRAFT, 1),
        (DRAFT + 1, 3),
        (DRAFT + 2, 7),
        (CHOICE, 1),
    ];
    let first = [
        (ANCHOR, 0),
        (CHOICE, 1),
        (DRAFT, 1),
        (DRAFT + 1, 5),
        (DRAFT + 2, 13),
    ];
    let in_chain = scene.attend(&chain, 0, CHOICE);
    let next = scene.attend(&[(AFTER, 0)], 2, AFTER);
    let in_first = scene.attend(&first, 0, CHOICE);
    assert_eq!(num_different(&in_chain, &in_first), 0, "the same slot");
    let in_beside = scene.attend(&beside, 0, CHOICE);
    let different = num_different(&in_chain, &in_beside);
    println!("a later slot: {different} of {NUM_REQS} rows differ by some bit");
    assert!(different > 0, "a later slot");
    // Once it is kept its key stands where a chain's does, and what follows is the chain's again.
    scene.keep(&beside, 0b1_0001);
    let after = scene.attend(&[(AFTER, 0)], 2, AFTER);
    assert_eq!(num_different(&next, &after), 0, "after the commit");
}
