//! Every CUDA op of the layers against the plain Rust backend, on inputs that bf16 holds exactly.
#![cfg(feature = "cuda")]

mod common;

use common::{
    Case, PagedRequests, Rng, SPARE_ROWS, Tolerance, check, gpu, mat, norm, poisoned,
    poisoned_logits, read_all, spec, weight,
};
use dspark::Error;
use dspark::device::Graph;
use dspark::ops::cuda::Cuda;
use dspark::ops::{AttentionSpec, Matrix, Ops};

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
        // Beside the tap's columns nothing is written.
        let mut taps = poisoned(ops, rows + SPARE_ROWS, cols + 16);
        if add {
            let tap = Some((&mut taps, 8));
            ops.add_rms_norm(&delta, &mut x, &weight, 1e-5, &mut out, tap)
                .unwrap();
        } else {
            ops.rms_norm(&x, &weight, 1e-5, &mut out).unwrap();
        }
        assert_eq!(out.rows(), rows);
        let mut values = read_all(ops, out);
        values.extend(ops.read_mat(&x).unwrap());
        for row in read_all(ops, taps).chunks(cols + 16) {
            let (before, rest) = row.split_at(8);
            let (tap, behind) = rest.split_at(cols);
            values.extend(tap);
            assert!(before.iter().chain(behind).all(|value| value.is_nan()));
        }
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
