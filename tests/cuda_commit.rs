//! The commit of token trees: the rows that stay stand together, in every layer, and nothing else changes.
#![cfg(feature = "cuda")]

mod common;

use common::raw::{check as check_status, device, download, upload};
use common::{
    Case, PagedRequests, Rng, Tolerance, append, check, e4m3_cache, gpu, mat, poisoned, read_all,
};
use dspark::Error;
use dspark::ops::{AttentionSpec, Ops, RowMap};
use dspark::sys;

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
const KV_COLS: usize = 2 * 2 * 64;

/// A pass over trees of which some rows stay, and a pass of one row each behind what stayed.
struct CommitThenAttend {
    page_size: usize,
    layer: usize,
    /// `(rows, seq_len)` of each request.
    requests: Vec<(usize, usize)>,
    kept: Vec<u64>,
    /// Keys and values of 8 bits.
    is_e4m3: bool,
    /// Instead of a commit, appends the rows that stay alone, as chains.
    as_chains: bool,
}

impl CommitThenAttend {
    fn label(&self) -> String {
        format!(
            "pages of {}, layer {}, e4m3 {}",
            self.page_size, self.layer, self.is_e4m3
        )
    }

    /// Appends the pass's rows to both layers, in place of `map` those that stay if they are to be chains.
    fn append_rows<O: Ops>(&self, ops: &mut O, rng: &mut Rng, map: &RowMap, kv: &mut O::KvCache) {
        for layer in 0..2 {
            let values = rng.normals(map.num_rows() * KV_COLS, 1.0);
            if !self.as_chains {
                append(ops, &SPEC, map, &values, kv, layer);
                continue;
            }
            let counts: Vec<usize> = self.kept.iter().map(|k| k.count_ones() as usize).collect();
            let (chains, first) = map.keep(&counts);
            let sources = map.gathered(&self.kept);
            let rows = first.iter().map(|&row| sources[row as usize] as usize);
            let values = rows.flat_map(|row| &values[row * KV_COLS..][..KV_COLS]);
            let values: Vec<f32> = values.copied().collect();
            append(ops, &SPEC, &chains, &values, kv, layer);
        }
    }
}

impl Case for CommitThenAttend {
    fn cols(&self) -> usize {
        COLS
    }

    fn run<O: Ops>(&self, ops: &mut O) -> Vec<f32> {
        let mut rng = Rng::new(11);
        let paged = PagedRequests::new(&mut rng, &SPEC, self.page_size, &self.requests);
        let committed = rng.normals(paged.num_committed() * KV_COLS, 1.0);
        let mut kv = if self.is_e4m3 {
            let kv = e4m3_cache(ops, &paged.geometry);
            paged.filled(ops, &SPEC, &committed, kv)
        } else {
            paged.cache(ops, &SPEC, &committed)
        };
        append(ops, &SPEC, &paged.map(true), &committed, &mut kv, 0);
        let map = paged.map(false);
        self.append_rows(ops, &mut rng, &map, &mut kv);
        let mut rows = ops.rows().unwrap();
        if !self.as_chains {
            ops.set_row_map(&mut rows, &map).unwrap();
            ops.commit_tree(&mut kv, &rows, &self.kept).unwrap();
        }

        // A request's last entry that stays is the next row's own: its keys are what is already there.
        let mut next = RowMap::new(map.max_pages_per_req);
        let requests = paged.pages.iter().zip(&self.requests).zip(&self.kept);
        for ((pages, &(_, seq_len)), kept) in requests {
            let len = seq_len + kept.count_ones() as usize;
            let num_rows = len.min(1);
            next.push(num_rows, len - num_rows, len - num_rows, pages)
                .unwrap();
        }
        ops.set_row_map(&mut rows, &next).unwrap();
        let q = mat(ops, COLS, &rng.normals(next.num_rows() * COLS, 1.0));
        let mut out = poisoned(ops, next.num_rows(), COLS);
        ops.verify_attention(&SPEC, &q, &kv, self.layer, &rows, &mut out)
            .unwrap();
        read_all(ops, out)
    }
}

/// Every shape of what can stay: all rows, the first alone, every other one, the last, random ones; a request without rows,
/// trees of 64, lengths at the ends of pages, an empty cache.
fn cases() -> impl Iterator<Item = CommitThenAttend> {
    let requests = vec![
        (64, 30),
        (64, 0),
        (15, 31),
        (9, 15),
        (0, 13),
        (4, 0),
        (1, 47),
        (8, 16),
        (33, 1),
    ];
    let kept = vec![
        0x8421_0301_0110_8007,
        u64::MAX,
        0x4001,
        0x155,
        0,
        0b1001,
        1,
        0b101,
        0x1_5a5a_5a5b,
    ];
    let pages = [
        (1, false),
        (5, false),
        (16, false),
        (64, false),
        (16, true),
        (3, true),
    ];
    pages.into_iter().flat_map(move |(page_size, is_e4m3)| {
        let (requests, kept) = (requests.clone(), kept.clone());
        (0..2).map(move |layer| CommitThenAttend {
            page_size,
            layer,
            requests: requests.clone(),
            kept: kept.clone(),
            is_e4m3,
            as_chains: false,
        })
    })
}

/// The cache after a commit is, to the bit, that of a pass over chains of what stayed.
fn expect_chains<O: Ops>(ops: &mut O) {
    for case in cases() {
        let label = case.label();
        let got = case.run(ops);
        assert!(got.iter().all(|value| value.is_finite()), "{label}");
        let chains = CommitThenAttend {
            as_chains: true,
            ..case
        };
        assert_eq!(got, chains.run(ops), "{label}");
        // Had as many of the first rows stayed the result would be another: the comparison can fail.
        let first = |kept: &u64| u64::MAX.checked_shr(64 - kept.count_ones()).unwrap_or(0);
        let others = CommitThenAttend {
            kept: chains.kept.iter().map(first).collect(),
            as_chains: false,
            ..chains
        };
        assert_ne!(others.run(ops), got, "{label}");
    }
}

#[test]
fn a_committed_tree_is_a_chain_for_the_oracle() {
    expect_chains(&mut common::reference());
}

#[test]
fn a_committed_tree_is_a_chain() {
    let Some(mut cuda) = gpu() else { return };
    expect_chains(&mut cuda);
    for case in cases() {
        let label = case.label();
        check(&mut cuda, &label, &case, Tolerance::bf16(0.02));
    }
}

/// Rows that cannot stay are refused, and the cache's pages looked at, before anything moves.
fn expect_refusals<O: Ops>(ops: &mut O) {
    let mut rng = Rng::new(1);
    let requests = [(3, 5), (1, 2), (0, 4), (64, 0)];
    let paged = PagedRequests::new(&mut rng, &SPEC, 4, &requests);
    let mut kv = ops.kv_cache(&paged.geometry).unwrap();
    let mut rows = ops.rows().unwrap();
    let map = paged.map(false);
    ops.set_row_map(&mut rows, &map).unwrap();
    for bad in [
        &[1, 1, 0][..],   // one request short
        &[2, 1, 0, 1],    // the first row goes
        &[9, 1, 0, 1],    // a row that there is not
        &[1, 3, 0, 1],    // of the next request
        &[1, 1, 1, 1],    // of a request without any
        &[1, 0, 0, 1],    // none of a request's
        &[1, 1, 0, 1, 0], // one request too many
    ] {
        let refused = ops.commit_tree(&mut kv, &rows, bad);
        assert!(
            matches!(refused, Err(Error::Argument { field, .. }) if field == "kept"),
            "{bad:?}"
        );
    }
    ops.commit_tree(&mut kv, &rows, &[5, 1, 0, u64::MAX])
        .unwrap();
    let mut outside = map.clone();
    outside.page_table[0] = paged.geometry.num_pages as i32;
    ops.set_row_map(&mut rows, &outside).unwrap();
    let refused = ops.commit_tree(&mut kv, &rows, &[5, 1, 0, 1]);
    assert!(
        matches!(refused, Err(Error::Argument { field, .. }) if field == "page_table"),
        "a page outside the pool"
    );
    let mut long = RowMap::new(17);
    let pages: Vec<i32> = (0..17).collect();
    long.push(65, 0, 0, &pages).unwrap();
    ops.set_row_map(&mut rows, &long).unwrap();
    assert!(ops.commit_tree(&mut kv, &rows, &[1]).is_err(), "65 rows");
}

#[test]
fn rows_that_cannot_stay_are_refused_by_the_oracle() {
    expect_refusals(&mut common::reference());
}

#[test]
fn rows_that_cannot_stay_are_refused() {
    let Some(mut cuda) = gpu() else { return };
    expect_refusals(&mut cuda);
}

/// Slots of one request after a commit, by what is defined: slot `i` takes over the `i`-th accepted row.
fn committed(slots: &[u32], seq_len: usize, flags: &[i32]) -> Vec<u32> {
    let mut after = slots.to_vec();
    let accepted = flags.iter().enumerate().filter(|(_, flag)| **flag != 0);
    for (i, (draft, _)) in accepted.enumerate() {
        after[seq_len + 1 + i] = slots[seq_len + 1 + draft];
    }
    after
}

#[test]
fn accepted_rows_of_a_tree_move_together() {
    const LAYERS: usize = 3;
    const HEAD_DIM: usize = 64;
    const HEADS: usize = 3;
    const PAGES: usize = 12;
    let Some(device) = device() else { return };
    let mut rng = Rng::new(6);
    for (page_size, draft_len) in [(16, 9), (1, 2), (5, 30), (64, 63)] {
        let max_pages = (20 + 1 + draft_len as usize).div_ceil(page_size) + 1;
        let num_pages = PAGES.max(3 * max_pages);
        let mut order: Vec<i32> = (0..num_pages as i32).collect();
        rng.shuffle(&mut order);
        let table = &order[..3 * max_pages];
        let seq_lens = [0_i32, 20, 7];
        let mut flags: Vec<i32> = (0..3 * draft_len).map(|_| rng.below(2) as i32).collect();
        flags[..draft_len as usize].fill(1);
        let slot_len = HEADS * HEAD_DIM;
        let layer_len = num_pages * page_size * slot_len;
        // A slot's number in every element, so that a move of the wrong piece shows.
        let before: [Vec<u16>; 2] =
            [0, 1].map(|_| (0..LAYERS * layer_len).map(|_| rng.next() as u16).collect());
        let mut caches = before.each_ref().map(|cache| upload(&device, cache));
        let gpu_flags = upload(&device, &flags);
        let gpu_lens = upload(&device, &seq_lens);
        let gpu_table = upload(&device, table);
        let [k, v] = &mut caches;
        let params = sys::dspark_commit_tree_params {
            struct_size: size_of::<sys::dspark_commit_tree_params>() as u32,
            kv_dtype: sys::DSPARK_DTYPE_BF16,
            num_reqs: 3,
            num_layers: LAYERS as i32,
            draft_len,
            num_kv_heads: HEADS as i32,
            head_dim: HEAD_DIM as i32,
            page_size: page_size as i32,
            max_pages_per_req: max_pages as i32,
            reserved: 0,
            accept_flags: gpu_flags.ptr(0),
            seq_lens: gpu_lens.ptr(0),
            page_table: gpu_table.ptr(0),
            k_cache: k.mut_ptr(0).cast(),
            v_cache: v.mut_ptr(0).cast(),
            stride_cache_layer: layer_len as i64,
            stride_cache_page: (page_size * slot_len) as i64,
            stride_cache_slot: slot_len as i64,
            stride_cache_head: HEAD_DIM as i64,
        };
        let stream = device.raw_stream().cast();
        // SAFETY: every pointer is a live buffer with the shape the params say.
        check_status(unsafe { sys::launch::dspark_commit_tree_cu(&raw const params, stream) });
        device.synchronize().unwrap();
        for (cache, before) in caches.iter().zip(&before) {
            let after = download(cache);
            let mut want = before.clone();
            for (req, &seq_len) in seq_lens.iter().enumerate() {
                let num_slots = seq_len as usize + 1 + draft_len as usize;
                let place = |slot: usize| {
                    let page = table[req * max_pages + slot / page_size] as usize;
                    (page * page_size + slot % page_size) * slot_len
                };
                let slots: Vec<u32> = (0..num_slots as u32).collect();
                let own = &flags[req * draft_len as usize..][..draft_len as usize];
                for (slot, source) in committed(&slots, seq_len as usize, own)
                    .into_iter()
                    .enumerate()
                {
                    for layer in 0..LAYERS {
                        let from = layer * layer_len + place(source as usize);
                        let to = layer * layer_len + place(slot);
                        want[to..to + slot_len].copy_from_slice(&before[from..from + slot_len]);
                    }
                }
            }
            assert!(
                after == want,
                "page_size {page_size}, draft_len {draft_len}"
            );
        }
    }
}
