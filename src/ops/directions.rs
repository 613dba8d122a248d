//! What rows of a matrix have most in common: a few orthonormal directions near which most of them lie.
//!
//! The leading eigenvectors of the rows' second moments, by orthogonal iteration on a sample. They need not be exact: a bound that
//! is told them (`dspark_draft_bounds`) holds with any directions and is only wider with worse ones.

/// Sweeps of the iteration; eigenvalues a third apart are told apart to 1e-6.
const SWEEPS: usize = 40;

/// `[count, cols]`: orthonormal directions of `rows`, `[n, cols]`; zeros for those that the rows do not have.
pub(crate) fn leading_directions(rows: &[f32], cols: usize, count: usize) -> Vec<f32> {
    let moments = second_moments(rows, cols);
    let mut found: Vec<Vec<f64>> = Vec::new();
    for d in 0..count {
        // Anything that no direction is likely to be orthogonal to.
        let mut x: Vec<f64> = (0..cols)
            .map(|i| 1.0 + ((i * (2 * d + 7)) % 11) as f64)
            .collect();
        remove_parts(&mut x, &found);
        let mut is_there = normalize(&mut x);
        for _ in 0..SWEEPS {
            let mut next: Vec<f64> = moments.chunks_exact(cols).map(|row| dot(row, &x)).collect();
            remove_parts(&mut next, &found);
            is_there = is_there && normalize(&mut next);
            x = next;
        }
        if !is_there {
            x.fill(0.0);
        }
        found.push(x);
    }
    found
        .concat()
        .into_iter()
        .map(|value| value as f32)
        .collect()
}

/// Mean of `row^T row`.
fn second_moments(rows: &[f32], cols: usize) -> Vec<f64> {
    let mut moments = vec![0.0; cols * cols];
    for row in rows.chunks_exact(cols.max(1)) {
        for (&value, sums) in row.iter().zip(moments.chunks_exact_mut(cols)) {
            for (sum, &other) in sums.iter_mut().zip(row) {
                *sum += f64::from(value) * f64::from(other);
            }
        }
    }
    let num_rows = (rows.len() / cols.max(1)).max(1) as f64;
    for moment in &mut moments {
        *moment /= num_rows;
    }
    moments
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Takes the parts along `directions` out of `x`, twice against rounding.
fn remove_parts(x: &mut [f64], directions: &[Vec<f64>]) {
    for direction in directions.iter().chain(directions) {
        let part = dot(x, direction);
        for (value, e) in x.iter_mut().zip(direction) {
            *value -= part * e;
        }
    }
}

/// Makes the length 1; false where there is none to speak of.
fn normalize(x: &mut [f64]) -> bool {
    let length = dot(x, x).sqrt();
    if !(length > 1e-30 && length.is_finite()) {
        return false;
    }
    for value in x {
        *value /= length;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directions_are_those_the_rows_lie_along() {
        // Rows along (1, 1, 0, 0) and, shorter, (0, 0, 1, -1); every other sum is taken back by the next row.
        let rows: Vec<f32> = (0..40)
            .flat_map(|i| {
                let (a, b) = (3.0 + (i / 2) as f32, if i % 2 == 0 { 1.0 } else { -1.0 });
                [a, a, b, -b]
            })
            .collect();
        let found = leading_directions(&rows, 4, 3);
        let half = 0.5_f32.sqrt();
        for (got, want) in found[..8]
            .iter()
            .zip([half, half, 0.0, 0.0, 0.0, 0.0, half, -half])
        {
            assert!((got.abs() - want.abs()).abs() < 1e-5, "{found:?}");
        }
        let parts = |a: usize, b: usize| -> f32 {
            let (a, b) = (&found[4 * a..4 * a + 4], &found[4 * b..4 * b + 4]);
            a.iter().zip(b).map(|(a, b)| a * b).sum()
        };
        assert!((parts(0, 0) - 1.0).abs() < 1e-6 && (parts(1, 1) - 1.0).abs() < 1e-6);
        assert!(parts(0, 1).abs() < 1e-6 && parts(0, 2).abs() < 1e-6);
    }

    #[test]
    fn rows_of_zeros_have_no_directions() {
        assert_eq!(leading_directions(&[0.0; 24], 8, 3), [0.0; 24]);
    }
}
