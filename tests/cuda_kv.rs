//! Caches of 8 bits on CUDA against the plain Rust backend: what is appended to one is what attention reads from it, in
//! chains, trees and prompts, and the whole engine over one.
#![cfg(feature = "cuda")]

mod common;
mod end_to_end_support;
mod model_support;

use common::{
    Case, PagedRequests, Rng, SPARE_ROWS, Tolerance, append, check, e4m3_cache, gpu, grow_tree,
    kv_scales, mat, poisoned, read_all, spec,
};
use dspark::Error;
use dspark::ops::cuda::Cuda;
use dspark::ops::{AttentionSpec, KvDtype, KvGeometry, Ops};
use dspark::schedule::Policy;
use end_to_end_support::*;
use model_support::{DRAFTERS, target_dir};

/// Rows appended to a cache that is NaN elsewhere, and attention over it.
struct AppendThenAttend {
    spec: AttentionSpec,
    page_size: usize,
    requests: Vec<(usize, usize)>,
    /// Row i hangs below row (i - 1) / 2.
    is_tree: bool,
    is_e4m3: bool,
}

impl AppendThenAttend {
    fn label(&self) -> String {
        format!(
            "{:?} page {} tree {} {:?}",
            self.spec, self.page_size, self.is_tree, self.requests
        )
    }
}

impl Case for AppendThenAttend {
    fn cols(&self) -> usize {
        self.spec.num_q_heads * self.spec.head_dim
    }

    fn run<O: Ops>(&self, ops: &mut O) -> Vec<f32> {
        let spec = &self.spec;
        let kv_cols = 2 * spec.num_kv_heads * spec.head_dim;
        let mut rng = Rng::new(51);
        let paged = PagedRequests::new(&mut rng, spec, self.page_size, &self.requests);
        let committed = rng.normals(paged.num_committed() * kv_cols, 1.0);
        let num_rows = paged.num_rows();
        let own = rng.normals(num_rows * kv_cols, 1.0);
        let q = mat(ops, self.cols(), &rng.normals(num_rows * self.cols(), 2.0));
        let mut kv = if self.is_e4m3 {
            let kv = e4m3_cache(ops, &paged.geometry);
            paged.filled(ops, spec, &committed, kv)
        } else {
            paged.cache(ops, spec, &committed)
        };
        let mut map = paged.map(false);
        append(ops, spec, &map, &own, &mut kv, 1);
        if self.is_tree {
            grow_tree(&mut map, |i| i.saturating_sub(1) / 2);
        }
        let mut rows = ops.rows().unwrap();
        ops.set_row_map(&mut rows, &map).unwrap();
        let mut out = poisoned(ops, num_rows + SPARE_ROWS, self.cols());
        ops.verify_attention(spec, &q, &kv, 1, &rows, &mut out)
            .unwrap();
        read_all(ops, out)
    }
}

fn cases() -> Vec<AppendThenAttend> {
    let ragged = vec![
        (1, 0),
        (0, 40),
        (8, 127),
        (5, 128),
        (16, 3),
        (7, 129),
        (1, 1031),
    ];
    let mut cases = Vec::new();
    for (spec, page_size) in [
        (spec(9, 3, 64), 16),
        (spec(16, 1, 128), 1),
        (spec(8, 2, 128), 16),
        (spec(10, 2, 128), 64),
        (spec(8, 2, 256), 32),
        (spec(3, 1, 256), 3),
    ] {
        for is_tree in [false, true] {
            cases.push(AppendThenAttend {
                spec,
                page_size,
                requests: ragged.clone(),
                is_tree,
                is_e4m3: true,
            });
        }
    }
    // A prompt in a chunk of its own; a window and a cap.
    let mut near = spec(8, 2, 128);
    (near.window, near.softcap) = (200, 5.0);
    for (spec, requests) in [
        (spec(8, 2, 128), vec![(131, 301), (1, 5)]),
        (near, ragged.clone()),
    ] {
        cases.push(AppendThenAttend {
            spec,
            page_size: 16,
            requests,
            is_tree: false,
            is_e4m3: true,
        });
    }
    cases
}

/// Probabilities meet the values in 16 bits.
const ATTENTION: f32 = 1.0 / 256.0;

#[test]
fn attention_reads_what_was_appended_in_8_bits() {
    let Some(mut cuda) = gpu() else { return };
    for case in cases() {
        check(&mut cuda, &case.label(), &case, Tolerance::bf16(ATTENTION));
    }
}

#[test]
fn the_comparison_tells_a_cache_of_8_bits_from_one_of_16() {
    let mut oracle = common::reference();
    let [rounded, exact] = [true, false].map(|is_e4m3| {
        let case = AppendThenAttend {
            is_e4m3,
            ..cases().remove(4)
        };
        case.run(&mut oracle)
    });
    let cols = cases()[4].cols();
    let compare =
        || common::assert_close("8 bits", &rounded, &exact, cols, Tolerance::bf16(ATTENTION));
    assert!(std::panic::catch_unwind(compare).is_err());
}

/// A draft block over a cache of 8 bits, and factors of another cache's shape.
fn expect_refusals<O: Ops>(ops: &mut O) {
    let spec = spec(4, 2, 64);
    let paged = PagedRequests::new(&mut Rng::new(1), &spec, 4, &[(3, 5)]);
    let kv = e4m3_cache(ops, &paged.geometry);
    let mut rows = ops.rows().unwrap();
    ops.set_row_map(&mut rows, &paged.map(false)).unwrap();
    let q = mat(ops, 256, &[0.0; 3 * 256]);
    let block = mat(ops, 256, &[0.0; 3 * 256]);
    let mut out = poisoned(ops, 3, 256);
    let refused = ops.draft_attention(&spec, &q, &kv, 1, &block, &rows, &mut out);
    assert!(matches!(refused, Err(Error::Argument { field, .. }) if field == "kv"));

    let other = KvGeometry {
        num_layers: 3,
        ..paged.geometry
    };
    let refused = ops.kv_cache_e4m3(&paged.geometry, &kv_scales(&other));
    assert!(matches!(refused, Err(Error::Argument { field, .. }) if field == "scales"));
}

#[test]
fn what_a_cache_of_8_bits_cannot_do_is_refused() {
    expect_refusals(&mut common::reference());
    let Some(mut cuda) = gpu() else { return };
    expect_refusals(&mut cuda);
}

#[test]
fn greedy_text_over_8_bits_is_that_of_plain_decoding() {
    let Some(cuda) = gpu() else { return };
    let device = cuda.device().clone();
    let open = || Cuda::new(device.clone()).unwrap();
    for drafter in DRAFTERS.into_iter().chain(["qwen3_mtp"]) {
        let models = Models::of_drafter(drafter);
        let target = target_dir(models.target);
        let on = (&*target, KvDtype::Fp8);
        let prompts = golden_prompts(models.target);
        let asks: Vec<Ask> = prompts
            .iter()
            .map(|(prompt, _)| Ask::greedy(prompt.clone(), 24))
            .collect();
        let run = |setting: Setting| {
            let engine = setting.engine_on(open(), &asks, on);
            tokens(&setting.run_on(engine, &asks, |_, _| ()))
        };
        let expected = run(Setting::plain(models.target));
        for draft_len in models.draft_lens() {
            let setting = Setting {
                models,
                draft_len,
                policy: Policy::Fixed,
                batch: Batch::Together,
            };
            for (i, found) in run(setting).iter().enumerate() {
                let both = [&**found, &*expected[i]];
                let context = format!("{drafter}, {draft_len} drafts");
                Judge::Regret(0.03).check_on(&open, &context, on, &prompts[i].0, both);
            }
        }
    }
}
