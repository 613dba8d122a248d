//! Algorithm 1 of the paper: greedy admission of drafts by survival, stopped at the first fall of throughput.

/// `verify_len` of each request by Algorithm 1.
///
/// All `(r, j)` with `j <= limits[r]` are sorted by `survival[r * draft_len + j]` descending, ties by r, then j. From
/// `tau = B = num_reqs` on, each is admitted (`B += 1`, `tau += survival`) while `tau * steps_per_second(B)` rises; the
/// first that does not raise it ends the search, even if a later one would. Ending there is what keeps the step
/// lossless: whether x_j is verified then depends on nothing that was computed from x_j. A tie counts as no rise: it
/// must be decided on the spot, and fewer rows are cheaper.
///
/// `survival [num_reqs, draft_len]` must not rise along a request, so that what is admitted is a prefix.
pub fn schedule_prefixes(
    survival: &[f32],
    draft_len: usize,
    limits: &[usize],
    steps_per_second: impl Fn(usize) -> f64,
) -> Vec<usize> {
    let num_reqs = limits.len();
    let at = |r: usize, j: usize| survival[r * draft_len + j];
    let mut order: Vec<(usize, usize)> = (0..num_reqs)
        .flat_map(|r| (0..limits[r].min(draft_len)).map(move |j| (r, j)))
        .collect();
    // Stable: equal survivals stay in order of r, then j.
    order.sort_by(|a, b| at(b.0, b.1).total_cmp(&at(a.0, a.1)));

    let mut verify_lens = vec![0; num_reqs];
    let mut num_tokens = num_reqs;
    let mut tau = num_reqs as f64;
    let mut best = tau * steps_per_second(num_tokens);
    for (r, j) in order {
        tau += f64::from(at(r, j));
        num_tokens += 1;
        let throughput = tau * steps_per_second(num_tokens);
        if throughput <= best {
            break;
        }
        best = throughput;
        verify_lens[r] = j + 1;
    }
    verify_lens
}
