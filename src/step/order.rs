//! Sequences that draft stand first in a pass: the drafter's law then belongs to the first requests of the batch, and
//! the others have nothing to verify behind it.

use super::Sequence;

/// The indices of a batch, those that draft first.
pub(super) fn drafting_first(drafts: &[bool]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..drafts.len()).collect();
    order.sort_by_key(|&r| !drafts[r]);
    order
}

/// The sequences in this order.
pub(super) fn reordered<'a>(
    seqs: &'a mut [&mut Sequence],
    order: &[usize],
) -> Vec<&'a mut Sequence> {
    let mut seqs: Vec<Option<&mut Sequence>> =
        seqs.iter_mut().map(|seq| Some(&mut **seq)).collect();
    order.iter().filter_map(|&r| seqs[r].take()).collect()
}

/// What was done in `order`, in the batch's own order.
pub(super) fn in_order<T>(done: Vec<T>, order: &[usize]) -> Vec<T> {
    let mut done: Vec<(usize, T)> = order.iter().copied().zip(done).collect();
    done.sort_by_key(|(r, _)| *r);
    done.into_iter().map(|(_, done)| done).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_draft_come_first_and_results_go_back() {
        let order = drafting_first(&[false, true, false, true]);
        assert_eq!(order, [1, 3, 0, 2]);
        assert_eq!(
            in_order(vec!["b", "d", "a", "c"], &order),
            ["a", "b", "c", "d"]
        );
    }
}
