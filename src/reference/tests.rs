//! Operations against naive loops, invariances, and laws. Row invariance is asserted bitwise.

mod accept_calls;
mod acceptance;
mod attention;
mod laws;

use super::philox::{philox4x32, uniform};
use super::*;
use crate::ops::{ConfidenceHead, DraftLaw, Dtype, HeadKind, KvScales, SamplingParams, e4m3};

/// Numbers in (-1, 1), the same for the same `stream`.
fn noise(stream: u32, len: usize) -> Vec<f32> {
    (0..len as u32)
        .map(|i| (2.0 * uniform(philox4x32([stream, 0xDA7A], [i, 0, 0, 0])[0]) - 1.0) as f32)
        .collect()
}

fn ops() -> Reference {
    Reference::new(Some(2)).unwrap()
}

fn mat(ops: &mut Reference, cols: usize, values: &[f32]) -> F32Matrix {
    let mut mat = poisoned(ops, values.len() / cols, cols);
    ops.write_mat(values, &mut mat).unwrap();
    mat
}

/// An output buffer full of NaN, with no rows in use.
fn poisoned(ops: &mut Reference, max_rows: usize, cols: usize) -> F32Matrix {
    let mut mat = ops.mat(max_rows, cols).unwrap();
    let poison = vec![f32::NAN; max_rows * cols];
    ops.write_mat(&poison, &mut mat).unwrap();
    mat.set_rows(0).unwrap();
    mat
}

fn encode(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Dtype::Bf16 => values
            .iter()
            .flat_map(|&v| half::bf16::from_f32(v).to_le_bytes())
            .collect(),
        Dtype::F16 => values
            .iter()
            .flat_map(|&v| half::f16::from_f32(v).to_le_bytes())
            .collect(),
    }
}

fn tensor<'a>(dtype: Dtype, shape: &[usize], bytes: &'a [u8]) -> HostTensor<'a> {
    HostTensor {
        name: "test".to_owned(),
        dtype,
        shape: shape.to_vec(),
        bytes,
    }
}

/// A weight and its elements as stored, widened.
fn weight(
    ops: &mut Reference,
    dtype: Dtype,
    shape: [usize; 2],
    values: &[f32],
) -> (Weight, Vec<f32>) {
    let bytes = encode(dtype, values);
    let tensor = tensor(dtype, &shape, &bytes);
    (
        ops.weight(std::slice::from_ref(&tensor)).unwrap(),
        tensor.to_f32(),
    )
}

fn assert_close(got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs();
        assert!(
            error <= tolerance * (1.0 + want.abs()),
            "[{i}]: {got} for {want}"
        );
    }
}

fn assert_argument<T>(result: Result<T>, field: &str) {
    match result {
        Err(Error::Argument { field: found, .. }) => assert_eq!(found, field),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("{field} was let through"),
    }
}

fn naive_linear(x: &[f32], w: &[f32], k: usize) -> Vec<f64> {
    let dot = |x: &[f32], w: &[f32]| -> f64 {
        x.iter()
            .zip(w)
            .map(|(&x, &w)| f64::from(x) * f64::from(w))
            .sum()
    };
    x.chunks(k)
        .flat_map(|x| w.chunks(k).map(move |w| dot(x, w)))
        .collect()
}

#[test]
fn linear_of_all_dtypes_and_ugly_sizes() {
    let mut ops = ops();
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        for (m, n, k) in [
            (1, 1, 1),
            (3, 31, 7),
            (7, 33, 128),
            (8, 65, 129),
            (17, 2, 300),
            (13, 4099, 37),
        ] {
            let (w, stored) = weight(&mut ops, dtype, [n, k], &noise(1, n * k));
            let x = mat(&mut ops, k, &noise(2, m * k));
            let mut out = poisoned(&mut ops, m, n);
            ops.linear(&x, &w, &mut out).unwrap();
            assert_close(out.values(), &naive_linear(x.values(), &stored, k), 1e-5);
        }
    }
}

#[test]
fn linear_rows_do_not_know_their_neighbours() {
    let (n, k) = (1000, 300);
    let (mut two, mut one) = (ops(), Reference::new(Some(1)).unwrap());
    let (w, _) = weight(&mut two, Dtype::Bf16, [n, k], &noise(1, n * k));
    let x = noise(2, 23 * k);
    let all = mat(&mut two, k, &x);
    let mut out = poisoned(&mut two, 23, n);
    two.linear(&all, &w, &mut out).unwrap();
    for m in 1..=23 {
        let first = 23 - m;
        let some = mat(&mut one, k, &x[first * k..]);
        let mut part = poisoned(&mut one, m, n);
        one.linear(&some, &w, &mut part).unwrap();
        assert_eq!(part.values(), &out.values()[first * n..], "{m} rows");
    }
}

#[test]
fn stacked_weights_are_stacked_rows() {
    let mut ops = ops();
    let (a, b) = (noise(1, 5 * 9), noise(2, 40 * 9));
    for (first, second) in [(Dtype::Bf16, Dtype::Bf16), (Dtype::F16, Dtype::F32)] {
        let (a_bytes, b_bytes) = (encode(first, &a), encode(second, &b));
        let parts = [
            tensor(first, &[5, 9], &a_bytes),
            tensor(second, &[40, 9], &b_bytes),
        ];
        let stacked = ops.weight(&parts).unwrap();
        let rows = [parts[0].to_f32(), parts[1].to_f32()].concat();
        let mut out = poisoned(&mut ops, 45, 9);
        let ids: Vec<u32> = (0..45).rev().collect();
        ops.embed(&stacked, &ids, &mut out).unwrap();
        for (i, &id) in ids.iter().enumerate() {
            assert_eq!(out.row(i), &rows[id as usize * 9..][..9]);
        }
    }
    let bytes = encode(Dtype::F32, &a);
    let parts = [
        tensor(Dtype::F32, &[5, 9], &bytes),
        tensor(Dtype::F32, &[9, 5], &bytes),
    ];
    assert_argument(ops.weight(&parts), "test");
    assert_argument(ops.weight(&[tensor(Dtype::F32, &[5, 8], &bytes)]), "test");
}

#[test]
fn mismatched_shapes_are_named() {
    let mut ops = ops();
    let (w, _) = weight(&mut ops, Dtype::F32, [4, 3], &noise(1, 12));
    let x = mat(&mut ops, 3, &noise(2, 6));
    let mut narrow = poisoned(&mut ops, 9, 3);
    let mut short = poisoned(&mut ops, 1, 4);
    assert_argument(ops.linear(&x, &w, &mut narrow), "out");
    assert_argument(ops.linear(&x, &w, &mut short), "rows");
    assert_argument(ops.embed(&w, &[0, 4], &mut narrow), "token id");
    assert_argument(ops.gather_rows(&x, &[2], &mut narrow), "row index");
    assert_argument(ops.rms_norm(&x, &vec![1.0; 4], 0.0, &mut narrow), "x");
    assert_argument(ops.copy_into(&x, &mut short, 0, 0), "src");
}

#[test]
fn copies_land_where_they_should() {
    let mut ops = ops();
    let src = mat(&mut ops, 2, &[1.0, 2.0, 3.0, 4.0]);
    let mut dst = mat(&mut ops, 4, &[0.0; 16]);
    ops.copy_into(&src, &mut dst, 1, 2).unwrap();
    assert_eq!(
        dst.values()[4..12],
        [0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 3.0, 4.0]
    );
    assert_argument(ops.copy_into(&src, &mut dst, 3, 0), "src");
    assert_argument(ops.copy_into(&src, &mut dst, 0, 3), "src");
    let mut dst = mat(&mut ops, 2, &[0.0; 8]);
    ops.copy_logits(&src, &mut dst, 1, 2).unwrap();
    assert_eq!(dst.values(), [0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 3.0, 4.0]);
    assert_argument(ops.copy_logits(&src, &mut dst, 2, 2), "src");
    let mut out = poisoned(&mut ops, 3, 2);
    ops.gather_rows(&src, &[1, 1, 0], &mut out).unwrap();
    assert_eq!(out.values(), [3.0, 4.0, 3.0, 4.0, 1.0, 2.0]);
}

#[test]
fn norms_and_silu() {
    let mut ops = ops();
    for (m, d) in [(1, 1), (3, 7), (300, 65)] {
        let (x, delta, w) = (noise(1, m * d), noise(2, m * d), noise(3, d));
        let eps = 1e-5;
        let norm = |x: &[f64]| -> Vec<f64> {
            let mean = x.iter().map(|x| x * x).sum::<f64>() / d as f64;
            let scale = (mean + f64::from(eps)).sqrt();
            x.iter()
                .zip(&w)
                .map(|(x, &w)| x / scale * f64::from(w))
                .collect()
        };
        let wide: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        let want: Vec<f64> = wide.chunks(d).flat_map(norm).collect();
        let mut residual = mat(&mut ops, d, &x);
        let mut out = poisoned(&mut ops, m, d);
        ops.rms_norm(&residual, &w, eps, &mut out).unwrap();
        assert_close(out.values(), &want, 1e-6);

        let sum: Vec<f64> = x
            .iter()
            .zip(&delta)
            .map(|(x, d)| f64::from(x + d))
            .collect();
        let want: Vec<f64> = sum.chunks(d).flat_map(norm).collect();
        let delta = mat(&mut ops, d, &delta);
        ops.add_rms_norm(&delta, &mut residual, &w, eps, &mut out, None)
            .unwrap();
        assert_close(residual.values(), &sum, 0.0);
        assert_close(out.values(), &want, 1e-6);

        let gate_up = mat(
            &mut ops,
            2 * d,
            &noise(4, 2 * m * d)
                .iter()
                .map(|x| x * 90.0)
                .collect::<Vec<_>>(),
        );
        let want: Vec<f64> = gate_up
            .values()
            .chunks(2 * d)
            .flat_map(|row| (0..d).map(|i| (f64::from(row[i]), f64::from(row[d + i]))))
            .map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
            .collect();
        ops.silu_mul(&gate_up, &mut out).unwrap();
        assert_close(out.values(), &want, 1e-5);
    }
}
