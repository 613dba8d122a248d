//! The rules of acceptance, on exact laws.
//!
//! A request's rows are a tree: row 0 is the anchor's, row i the i-th draft's; a chain has one child each. The law of a
//! row decides the token behind it, at position `anchor + 1 + depth`.

use super::choices::Choices;
use super::law;
use super::verify::Window;
use crate::error::Result;
use crate::ops::{Purpose, Rule};

/// What was decided about one request.
pub(super) struct Walk {
    /// Rows of the accepted drafts, in order.
    pub(super) path: Vec<usize>,
    /// The token after them.
    pub(super) next: u32,
}

/// Decides a request with at least one row.
pub(super) fn decide(window: &Window<'_>, choices: &mut dyn Choices) -> Result<Walk> {
    let mut walk = match (window.params().temperature > 0.0, window.params().rule) {
        (false, _) => follow(window, |row| Ok(law::argmax(&window.logits(row)?)))?,
        (true, Rule::Coupled) => follow(window, |row| {
            let draw = window.draw(row, Purpose::Bonus, 0);
            Ok(choices.categorical(draw, &window.target_law(row)?))
        })?,
        (true, Rule::Token) => token_rule(window, choices)?,
        (true, Rule::Block) => block_rule(window, choices)?,
    };
    let stops = |&row: &usize| window.is_stop(window.token(row));
    if let Some(end) = walk.path.iter().position(stops) {
        walk.next = window.token(walk.path[end]);
        walk.path.truncate(end);
    }
    Ok(walk)
}

/// Keeps drafts as long as they are what the target says; greedy and coupled.
fn follow(window: &Window<'_>, mut target: impl FnMut(usize) -> Result<usize>) -> Result<Walk> {
    let (mut path, mut row) = (Vec::new(), 0);
    loop {
        let next = target(row)? as u32;
        match window
            .children(row)
            .find(|&child| window.token(child) == next)
        {
            Some(child) => row = child,
            None => return Ok(Walk { path, next }),
        }
        path.push(row);
    }
}

/// Keeps the first child `x` with `u * q(x) < p(x)`; each child turned down leaves the residual as the law for the next,
/// and in the end for the recovered token. Where rounding leaves no residual, the law stays.
fn token_rule(window: &Window<'_>, choices: &mut dyn Choices) -> Result<Walk> {
    let (mut path, mut row) = (Vec::new(), 0);
    'rows: loop {
        let target = window.target_law(row)?;
        let mut rest = target.clone();
        let mut refused = Vec::new();
        for child in window.children(row) {
            let token = window.token(child) as usize;
            let draft = window.draft_law(child);
            let draw = window.draw(row, Purpose::Accept, refused.len() as u32);
            if choices.accept(draw, rest[token], draft[token]) {
                path.push(child);
                row = child;
                continue 'rows;
            }
            rest = law::residual(1.0, &rest, &draft).unwrap_or(rest);
            refused.push(draft);
        }
        let next = match &refused[..] {
            [] => choices.sample(window.draw(row, Purpose::Bonus, 0), &target),
            [draft] => {
                let draw = window.draw(row, Purpose::Residual, 0);
                let rest = law::remainder(1.0, &target, draft);
                choices.residual(draw, window.num_tries(), &target, &rest)
            }
            // What several drafts leave is not bounded by the target's law.
            _ => choices.sample(
                window.draw(row, Purpose::Residual, window.num_tries()),
                &rest,
            ),
        };
        return Ok(Walk {
            path,
            next: next as u32,
        });
    }
}

/// Block verification of a chain (Sun et al., "Block verification accelerates speculative decoding", algorithm 2).
///
/// The joint ratio of the first i drafts is `r_i = min(1, r_{i-1} p(x_i) / q(x_i))`. Prefix i is accepted with probability
///
/// ```text
/// h_i = S_i / (S_i + 1 - r_i),   S_i = sum over v of max(r_i p(v) - q(v), 0) after x_1 .. x_i;   h_l = r_l
/// ```
///
/// by a uniform of its own, and the longest accepted prefix is kept: tested from the tail. What follows comes from
/// `max(r_i p - q, 0)`, or from p after all drafts.
fn block_rule(window: &Window<'_>, choices: &mut dyn Choices) -> Result<Walk> {
    let verify_len = window.num_rows() - 1;
    let mut ratios = vec![1.0];
    let mut laws = Vec::with_capacity(verify_len);
    for i in 0..verify_len {
        let token = window.token(i + 1) as usize;
        let (target, draft) = (window.target_law(i)?, window.draft_law(i + 1));
        let joint: f64 = ratios[i] * target[token];
        ratios.push(match (joint, draft[token]) {
            (joint, draft) if joint >= draft => f64::from(joint > 0.0),
            (joint, draft) => joint / draft,
        });
        laws.push((target, draft));
    }
    let bonus_law = window.target_law(verify_len)?;
    for i in (0..=verify_len).rev() {
        let ratio = ratios[i];
        let accept = match laws.get(i) {
            None => ratio,
            Some((target, draft)) => prefix_probability(ratio, target, draft),
        };
        if i > 0 && !choices.accept(window.draw(i - 1, Purpose::Accept, 0), accept, 1.0) {
            continue;
        }
        let next = match laws.get(i) {
            None => choices.sample(window.draw(i, Purpose::Bonus, 0), &bonus_law),
            Some((target, draft)) => {
                let share: Vec<f64> = target.iter().map(|&p| ratio * p).collect();
                let rest = law::remainder(ratio, target, draft);
                let draw = window.draw(i, Purpose::Residual, 0);
                choices.residual(draw, window.num_tries(), &share, &rest)
            }
        };
        return Ok(Walk {
            path: (1..=i).collect(),
            next: next as u32,
        });
    }
    unreachable!("the empty prefix is always accepted")
}

/// `h_i`; a prefix of ratio 1 is always good enough.
fn prefix_probability(ratio: f64, target: &[f64], draft: &[f64]) -> f64 {
    if ratio >= 1.0 {
        return 1.0;
    }
    let pairs = target.iter().zip(draft);
    let mass: f64 = pairs.map(|(p, q)| (ratio * p - q).max(0.0)).sum();
    mass / (mass + (1.0 - ratio))
}
