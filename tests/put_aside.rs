//! Plain rounds beside a drafter put its look at their rows off: what it drafts afterwards must be what it drafts after
//! having seen every row at once.

#![allow(clippy::needless_range_loop)] // A slot is a number of its own, not only a place.

mod end_to_end_support;
mod fakes;
mod model_support;

use dspark::kv::PagePool;
use dspark::model::{DrafterConfig, Limits, Pair};
use dspark::ops::SamplingParams;
use dspark::reference::Reference;
use dspark::schedule::{Policy, Scheduler};
use dspark::step::{DecodeStep, PhaseTimes, PrefillChunk, Sequence};
use end_to_end_support::Models;
use fakes::{DraftSpec, FakeDrafter, FakeTarget, Sizes, greedy, random_logits};
use model_support::{DRAFTERS, drafter_dir, reference, target_dir};

const PAGE_SIZE: usize = 4;
const MAX_ROWS: usize = 8;
const ENTRIES: usize = 40;

fn pool() -> PagePool {
    PagePool::new(64, PAGE_SIZE).unwrap()
}

/// A sequence that has seen `tokens`.
fn prefilled(
    ops: &mut Reference,
    step: &mut DecodeStep<Reference>,
    pool: &mut PagePool,
    slot: usize,
    tokens: &[u32],
) -> Sequence {
    let mut pages = pool.table();
    pool.reserve(&mut pages, ENTRIES).unwrap();
    let mut sequence = Sequence::new(slot, pages, SamplingParams::default());
    for (i, chunk) in tokens.chunks(MAX_ROWS).enumerate() {
        let next = tokens.get(i * MAX_ROWS + chunk.len()).copied();
        let mut chunks = [PrefillChunk {
            sequence: &mut sequence,
            tokens: chunk,
            next,
        }];
        step.prefill(ops, &mut chunks).unwrap();
    }
    sequence
}

fn model_step(ops: &mut Reference, drafter: &'static str) -> DecodeStep<Reference> {
    let target = target_dir(Models::of_drafter(drafter).target);
    let draft = drafter_dir(drafter);
    let draft_len = DrafterConfig::read(&draft).unwrap().max_draft_len().min(3);
    let limits = Limits {
        max_num_reqs: 3,
        max_rows: MAX_ROWS,
        max_logit_rows: MAX_ROWS,
        max_draft_len: draft_len,
        num_pages: 64,
        page_size: PAGE_SIZE,
    };
    let pair = Pair::load(ops, &target, Some(&draft), &limits).unwrap();
    let scheduler = Scheduler::new(Policy::Fixed, None).unwrap();
    DecodeStep::new(Box::new(pair.target), pair.drafter, scheduler, draft_len).unwrap()
}

/// Of each request the drafts and the bits of their confidences.
type Drafts = Vec<(Vec<u32>, Vec<u32>)>;

/// Drafts, with bits of the confidences, after `plain` rounds that drafted nothing, and what was put aside at most; then
/// those of sequences that were prefilled up to there.
fn drafts_after(drafter: &'static str, plain: usize) -> ([Drafts; 2], usize) {
    let prompts: [&[u32]; 3] = [&[3, 1, 4, 1, 5], &[9, 2], &[6, 5, 3, 5, 8, 9, 7, 9, 3, 2]];
    let mut ops = reference();
    let mut step = model_step(&mut ops, drafter);
    let mut pages = pool();
    let mut seqs: Vec<Sequence> = (0..)
        .zip(prompts)
        .map(|(slot, prompt)| prefilled(&mut ops, &mut step, &mut pages, slot, prompt))
        .collect();
    let mut most = 0;
    for _ in 0..plain {
        let mut batch: Vec<&mut Sequence> = seqs.iter_mut().collect();
        step.round_with(&mut ops, &mut batch, &[false; 3]).unwrap();
        most = most.max(step.num_put_aside());
    }
    let proposed =
        |ops: &mut Reference, step: &mut DecodeStep<Reference>, seqs: &mut [Sequence]| {
            let batch: Vec<&mut Sequence> = seqs.iter_mut().collect();
            let proposal = step.propose(ops, &batch).unwrap();
            assert_eq!(step.num_put_aside(), 0);
            let bits = |r| {
                proposal
                    .confidence_of(r)
                    .iter()
                    .map(|c| c.to_bits())
                    .collect()
            };
            (0..3)
                .map(|r| (proposal.tokens_of(r).to_vec(), bits(r)))
                .collect::<Vec<_>>()
        };
    let late = proposed(&mut ops, &mut step, &mut seqs);

    let mut ops = reference();
    let mut step = model_step(&mut ops, drafter);
    let mut pages = pool();
    let mut fresh = Vec::new();
    for (seq, prompt) in seqs.iter().zip(prompts) {
        let (anchor, seen) = seq.output.split_last().unwrap();
        let tokens = [prompt, seen].concat();
        let sequence = prefilled(&mut ops, &mut step, &mut pages, seq.slot, &tokens);
        assert_eq!(sequence.anchor, Some(*anchor));
        fresh.push(sequence);
    }
    ([late, proposed(&mut ops, &mut step, &mut fresh)], most)
}

#[test]
fn every_drafter_drafts_what_it_drafts_after_seeing_all_at_once() {
    for drafter in DRAFTERS.into_iter().chain(["qwen3_mtp"]) {
        for plain in [1, 2, 5] {
            let ([late, fresh], most) = drafts_after(drafter, plain);
            assert_eq!(late, fresh, "{drafter} after {plain} rounds");
            // Two rounds of three rows fit eight; the third round makes the drafter look.
            assert_eq!(most, 3 * plain.min(2), "{drafter}");
        }
    }
}

fn fake_step(ops: &mut Reference, max_rows: usize) -> DecodeStep<Reference> {
    let sizes = Sizes {
        max_rows,
        page_size: PAGE_SIZE,
        ..Sizes::new(6)
    };
    let target = FakeTarget::new(ops, sizes, random_logits(6, 1, 2.0));
    let drafter = FakeDrafter::new(ops, sizes, DraftSpec::random(6, 2, 3));
    let scheduler = Scheduler::new(Policy::Fixed, None).unwrap();
    DecodeStep::new(Box::new(target), Some(Box::new(drafter)), scheduler, 3).unwrap()
}

/// The fake drafter refuses rows out of order and anchors that it does not expect. Requests draft or not at random, some
/// rounds are of some requests only, and slots and pages go to new requests while rows of the old ones wait.
#[test]
fn rows_wait_through_any_order_of_rounds() {
    let law = random_logits(6, 1, 2.0);
    let mut ops = reference();
    let mut step = fake_step(&mut ops, 32);
    let mut pages = pool();
    let mut state = 7_u64;
    let mut random = |n: u64| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 33) % n
    };
    let prompt = |slot: usize, turn: u64| [slot as u32, (turn % 5) as u32, 2];
    let mut seqs: Vec<Option<(Sequence, u64)>> = vec![None, None, None];
    let (mut waited, mut drafted) = (0, 0);
    for turn in 0..400 {
        for slot in 0..3 {
            if seqs[slot].is_none() {
                let tokens = prompt(slot, turn);
                let seq = prefilled(&mut ops, &mut step, &mut pages, slot, &tokens);
                seqs[slot] = Some((seq, turn));
            }
        }
        // Mostly nobody drafts.
        let drafts = match random(6) {
            0 => [true; 3],
            1 => [random(2) == 0, random(2) == 0, random(2) == 0],
            _ => [false; 3],
        };
        let num_seqs = if random(4) == 0 { 2 } else { 3 };
        let live = seqs.iter_mut().flatten().take(num_seqs);
        let mut batch: Vec<&mut Sequence> = live.map(|(seq, _)| seq).collect();
        step.round_with(&mut ops, &mut batch, &drafts[..num_seqs])
            .unwrap();
        waited = waited.max(step.num_put_aside());
        drafted += usize::from(drafts.contains(&true));
        for slot in 0..3 {
            let ends = |(seq, _): &(Sequence, u64)| seq.seq_len() + 8 > ENTRIES;
            if seqs[slot].as_ref().is_some_and(ends) || random(40) == 0 {
                let (mut seq, since) = seqs[slot].take().unwrap();
                let output = greedy(&law, &prompt(slot, since), seq.output.len());
                assert_eq!(seq.output, output, "slot {slot} since turn {since}");
                pages.release(&mut seq.pages);
                step.forget(slot);
            }
        }
    }
    assert!(waited > 9 && drafted > 50, "{waited} {drafted}");
}

/// What waits of a request that has ended is not written into pages that are another's now.
#[test]
fn what_waits_of_an_ended_request_is_dropped() {
    let mut ops = reference();
    let mut step = fake_step(&mut ops, 32);
    let mut pages = pool();
    let mut ended = prefilled(&mut ops, &mut step, &mut pages, 0, &[1, 2]);
    let mut stays = prefilled(&mut ops, &mut step, &mut pages, 1, &[3]);
    step.round_with(&mut ops, &mut [&mut ended, &mut stays], &[false; 2])
        .unwrap();
    assert_eq!(step.num_put_aside(), 2);
    pages.release(&mut ended.pages);
    step.forget(0);
    assert_eq!(step.num_put_aside(), 1);
    let mut next = prefilled(&mut ops, &mut step, &mut pages, 0, &[4, 4]);
    step.round_with(&mut ops, &mut [&mut next, &mut stays], &[true; 2])
        .unwrap();
    assert_eq!(step.num_put_aside(), 0);
    let law = random_logits(6, 1, 2.0);
    assert_eq!(next.output, greedy(&law, &[4, 4], next.output.len()));
}

/// Steps and prompts of every size, run once, leave nothing behind: the fake drafter would see rows that are out of order.
#[test]
fn warming_up_leaves_no_trace() {
    let law = random_logits(6, 1, 2.0);
    for num_pages in [64, 4] {
        let mut ops = reference();
        let mut step = fake_step(&mut ops, 32);
        let mut pages = PagePool::new(num_pages, PAGE_SIZE).unwrap();
        step.warm_up(&mut ops, &mut pages, 3).unwrap();
        assert_eq!((pages.num_free(), step.num_put_aside()), (num_pages, 0));
        assert_eq!(step.times(), PhaseTimes::default());
        let mut table = pages.table();
        pages.reserve(&mut table, 16).unwrap();
        let mut seq = Sequence::new(0, table, SamplingParams::default());
        let chunk = PrefillChunk {
            sequence: &mut seq,
            tokens: &[1, 2],
            next: None,
        };
        step.prefill(&mut ops, &mut [chunk]).unwrap();
        for drafts in [true, false, true] {
            step.round_with(&mut ops, &mut [&mut seq], &[drafts])
                .unwrap();
        }
        assert_eq!(seq.output, greedy(&law, &[1, 2], seq.output.len()));
    }
}
