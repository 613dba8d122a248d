//! The law of whole rounds, enumerated exactly: whatever is drafted and however much of it is verified, the committed
//! tokens have the target's law to 1e-9. The same check must fail where a rule is broken on purpose.

mod fakes;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::rc::Rc;

use dspark::kv::PagePool;
use dspark::model::Drafter;
use dspark::ops::{HeadForm, Rule, SamplingParams};
use dspark::reference::Reference;
use dspark::reference::choices::enumerate;
use dspark::schedule::{Adapt, CostTable, Policy, Scheduler, StepCost};
use dspark::step::{DecodeStep, PrefillChunk, Proposal, Sequence};
use fakes::{
    ConfidenceSpec, DraftSpec, FakeDrafter, FakeTarget, LogitsOf, Sizes, linear_cost,
    random_logits, reference, sequence_law,
};

/// The largest difference from the target's law that counts as none.
const EXACT: f64 = 1e-9;

/// What a complete output is filled up with, here and in the law it is compared with.
const AFTER_THE_END: u32 = 0;

/// A broken rule must be off by at least this much.
const CAUGHT: f64 = 1e-3;

/// A schedule of the test's own: drafts and their number of requests to `verify_lens`.
type Plan = Rc<dyn Fn(&Proposal, usize) -> Vec<usize>>;

/// Tokens that may follow some; none: they are complete.
type GrammarOf = Rc<dyn Fn(&[u32]) -> Vec<u32>>;

/// Everything a round depends on.
#[derive(Clone)]
struct World {
    sizes: Sizes,
    law: LogitsOf,
    bonus_from: Option<LogitsOf>,
    draft: DraftSpec,
    draft_len: usize,
    scheduler: Scheduler,
    plan: Option<Plan>,
    /// The one slot that is drafted for; `None` for all of them.
    drafts_for: Option<usize>,
    requests: Vec<(Vec<u32>, SamplingParams)>,
    /// What every request may generate.
    grammar: Option<GrammarOf>,
    /// Second choices that are verified beside the drafts.
    alternates: usize,
    /// Second choices that were accepted.
    num_alternates: Rc<Cell<usize>>,
    /// Every plan that was made.
    plans: Rc<RefCell<BTreeSet<Vec<usize>>>>,
}

impl World {
    /// One sampled request on random laws, everything verified.
    fn new(vocab_size: usize, draft_len: usize, params: SamplingParams) -> Self {
        let salt = (vocab_size * 10 + draft_len) as u64;
        Self {
            sizes: Sizes::new(vocab_size),
            law: random_logits(vocab_size, salt, 1.5),
            bonus_from: None,
            draft: DraftSpec::random(vocab_size, salt + 100, draft_len),
            draft_len,
            scheduler: Scheduler::new(Policy::Fixed, None).unwrap(),
            plan: None,
            drafts_for: None,
            requests: vec![(vec![0, 1, 1], params)],
            grammar: None,
            alternates: 0,
            num_alternates: Rc::default(),
            plans: Rc::default(),
        }
    }

    fn policy(mut self, policy: Policy) -> Self {
        self.scheduler = Scheduler::new(policy, None).unwrap();
        self.scheduler.set_cost(linear_cost(0.3));
        self
    }

    fn plan(mut self, plan: impl Fn(&Proposal, usize) -> Vec<usize> + 'static) -> Self {
        self.plan = Some(Rc::new(plan));
        self
    }

    fn requests(mut self, requests: &[(&[u32], SamplingParams)]) -> Self {
        self.requests = requests.iter().map(|(p, s)| (p.to_vec(), *s)).collect();
        self
    }

    /// The first `n` tokens of every request; a request leaves the batch when it has them.
    fn generate(&self, mut ops: Reference, n: usize) -> Vec<u32> {
        let mut target = FakeTarget::new(&mut ops, self.sizes, self.law.clone());
        if let Some(law) = &self.bonus_from {
            target = target.with_bonus_from(law.clone());
        }
        let drafter = FakeDrafter::new(&mut ops, self.sizes, self.draft.clone());
        let drafter: Option<Box<dyn Drafter<Reference>>> = Some(Box::new(drafter));
        let scheduler = self.scheduler.clone();
        let mut step =
            DecodeStep::new(Box::new(target), drafter, scheduler, self.draft_len).unwrap();
        step.set_alternates(self.alternates);
        let mut seqs = self.prefilled(&mut ops, &mut step);
        let mut outputs: Vec<Vec<u32>> = seqs.iter().map(|s| vec![s.anchor.unwrap()]).collect();
        loop {
            let is_open = |r: &usize| {
                let complete = |grammar: &GrammarOf| grammar(&outputs[*r]).is_empty();
                outputs[*r].len() < n && !self.grammar.as_ref().is_some_and(complete)
            };
            let open: Vec<usize> = (0..seqs.len()).filter(is_open).collect();
            if open.is_empty() {
                for tokens in &mut outputs {
                    tokens.resize(n, AFTER_THE_END);
                }
                return outputs.concat();
            }
            let mut batch: Vec<&mut Sequence> = seqs.iter_mut().collect();
            let mut r = 0;
            batch.retain(|_| {
                r += 1;
                open.contains(&(r - 1))
            });
            for (i, committed) in self
                .round(&mut ops, &mut step, &mut batch)
                .into_iter()
                .enumerate()
            {
                outputs[open[i]].extend(committed);
            }
        }
    }

    /// Sequences whose prompts went in by chunks of two.
    fn prefilled(&self, ops: &mut Reference, step: &mut DecodeStep<Reference>) -> Vec<Sequence> {
        let mut pool = PagePool::new(self.sizes.num_pages, self.sizes.page_size).unwrap();
        let mut seqs = Vec::new();
        for (slot, (_, params)) in self.requests.iter().enumerate() {
            let mut pages = pool.table();
            pool.reserve(&mut pages, 16).unwrap();
            let mut sequence = Sequence::new(slot, pages, *params);
            if let Some(grammar) = self.grammar.clone() {
                let allow = move |committed: &[u32], drafts: &[u32], mask: &mut [u32]| {
                    for v in grammar(&[committed, drafts].concat()) {
                        mask[0] |= 1 << v;
                    }
                };
                sequence.grammar = Some(Box::new(allow));
            }
            seqs.push(sequence);
        }
        while seqs.iter().any(|seq| seq.anchor.is_none()) {
            let open = seqs
                .iter_mut()
                .zip(&self.requests)
                .filter(|(s, _)| s.anchor.is_none());
            let mut chunks: Vec<PrefillChunk> = open
                .map(|(sequence, (prompt, _))| {
                    let rest = &prompt[sequence.seq_len()..];
                    let (tokens, after) = rest.split_at(rest.len().min(2));
                    let next = after.first().copied();
                    PrefillChunk {
                        sequence,
                        tokens,
                        next,
                    }
                })
                .collect();
            step.prefill(ops, &mut chunks).unwrap();
        }
        seqs
    }

    fn round(
        &self,
        ops: &mut Reference,
        step: &mut DecodeStep<Reference>,
        batch: &mut [&mut Sequence],
    ) -> Vec<Vec<u32>> {
        let rounds = match (&self.plan, self.drafts_for) {
            (None, None) => step.round(ops, batch).unwrap(),
            (None, Some(slot)) => {
                let drafts: Vec<bool> = batch.iter().map(|seq| seq.slot == slot).collect();
                let rounds = step.round_with(ops, batch, &drafts).unwrap();
                for (round, drafts) in rounds.iter().zip(drafts) {
                    assert_eq!(round.draft_tokens.is_empty(), !drafts, "{round:?}");
                }
                rounds
            }
            (Some(plan), _) => {
                let proposal = step.propose(ops, batch).unwrap();
                let lens = plan(&proposal, batch.len());
                let verified = step.verify(ops, batch, &proposal, &lens).unwrap();
                step.commit(ops, batch, &proposal, &verified).unwrap()
            }
        };
        let alternates = rounds.iter().filter(|round| round.alternate.is_some());
        self.num_alternates
            .set(self.num_alternates.get() + alternates.count());
        let lens = rounds.iter().map(|round| round.verify_len).collect();
        self.plans.borrow_mut().insert(lens);
        rounds.into_iter().map(|round| round.committed).collect()
    }

    /// Probability of each outcome of [`World::generate`].
    fn enumerated(&self, n: usize) -> HashMap<Vec<u32>, f64> {
        let mut law = HashMap::new();
        for (probability, tokens) in enumerate(|choices| {
            self.generate(reference().with_choices(Box::new(choices.clone())), n)
        }) {
            *law.entry(tokens).or_insert(0.0) += probability;
        }
        law
    }

    /// The same by the target's law alone: requests are independent.
    fn exact(&self, n: usize) -> HashMap<Vec<u32>, f64> {
        let mut joint = HashMap::from([(Vec::new(), 1.0)]);
        for (prompt, params) in &self.requests {
            let own = sequence_law(&self.grammatical(prompt.len()), prompt, params, n);
            joint = joint
                .iter()
                .flat_map(|(before, p)| {
                    own.iter()
                        .map(move |(tokens, q)| ([&before[..], tokens].concat(), p * q))
                })
                .collect();
        }
        joint
    }

    /// The target's law without what the grammar forbids after a prompt of this length.
    fn grammatical(&self, prompt_len: usize) -> LogitsOf {
        let (law, Some(grammar)) = (self.law.clone(), self.grammar.clone()) else {
            return self.law.clone();
        };
        Rc::new(move |history| {
            let mut allowed = grammar(&history[prompt_len..]);
            if allowed.is_empty() {
                allowed.push(AFTER_THE_END);
            }
            let mut logits = law(history);
            for (v, logit) in (0..).zip(&mut logits) {
                if !allowed.contains(&v) {
                    *logit = f32::NEG_INFINITY;
                }
            }
            logits
        })
    }

    /// The largest difference of a probability from the target's law.
    fn distance(&self, n: usize) -> f64 {
        let (got, exact) = (self.enumerated(n), self.exact(n));
        let total: f64 = got.values().sum();
        assert!((total - 1.0).abs() < 1e-9, "probabilities sum to {total}");
        let at = |law: &HashMap<Vec<u32>, f64>, key| law.get(key).copied().unwrap_or(0.0);
        let keys = got.keys().chain(exact.keys());
        keys.map(|key| (at(&got, key) - at(&exact, key)).abs())
            .fold(0.0, f64::max)
    }

    #[track_caller]
    fn assert_exact(&self, n: usize) {
        let distance = self.distance(n);
        assert!(distance < EXACT, "off by {distance}");
    }

    #[track_caller]
    fn assert_caught(&self, n: usize) {
        let distance = self.distance(n);
        assert!(distance > CAUGHT, "a broken rule is off by {distance} only");
    }

    /// Different plans made so far.
    fn num_plans(&self) -> usize {
        self.plans.borrow().len()
    }
}

fn sampled(temperature: f32) -> SamplingParams {
    SamplingParams {
        temperature,
        ..SamplingParams::default()
    }
}

/// Filters alone and together.
fn filtered() -> [SamplingParams; 4] {
    let base = sampled(0.7);
    [
        SamplingParams { top_k: 2, ..base },
        SamplingParams { top_p: 0.7, ..base },
        SamplingParams { min_p: 0.5, ..base },
        SamplingParams {
            top_k: 3,
            top_p: 0.9,
            min_p: 0.1,
            ..base
        },
    ]
}

#[test]
fn all_drafts_verified() {
    for (vocab_size, draft_len, n) in [
        (2, 1, 4),
        (2, 2, 4),
        (2, 3, 3),
        (3, 1, 3),
        (3, 2, 3),
        (4, 3, 2),
    ] {
        World::new(vocab_size, draft_len, sampled(1.0)).assert_exact(n);
    }
}

#[test]
fn every_verify_len() {
    for verify_len in 0..=3 {
        World::new(2, 3, sampled(1.0))
            .plan(move |_, num_reqs| vec![verify_len; num_reqs])
            .assert_exact(3);
    }
}

#[test]
fn temperature_and_filters() {
    for params in filtered() {
        World::new(3, 2, params).assert_exact(3);
        World::new(4, 2, params)
            .policy(Policy::Algorithm1)
            .assert_exact(2);
    }
    World::new(3, 2, sampled(0.7)).assert_exact(3);
}

#[test]
fn thresholds() {
    for threshold in [0.2, 0.5, 0.8] {
        let world = World::new(3, 2, sampled(1.0)).policy(Policy::Threshold(threshold));
        world.assert_exact(3);
        assert!(world.num_plans() > 1, "the threshold never mattered");
    }
}

#[test]
fn adaptive_schedules() {
    let world = World::new(3, 2, sampled(1.0)).policy(Policy::Algorithm1);
    world.assert_exact(3);
    assert!(world.num_plans() > 1, "the schedule never mattered");
    let world = World::new(2, 3, sampled(0.7)).policy(Policy::Algorithm1);
    world.assert_exact(3);
    assert!(world.num_plans() > 1, "the schedule never mattered");
}

/// The capacity of `delayed` comes from two steps before from the third round on; five tokens after the first are at
/// least three rounds.
#[test]
fn delayed_schedules() {
    for (vocab_size, draft_len, n) in [(2, 1, 7), (2, 2, 6), (3, 1, 5)] {
        let world = World::new(vocab_size, draft_len, sampled(1.0)).policy(Policy::Delayed);
        world.assert_exact(n);
        assert!(world.num_plans() > 1, "the schedule never mattered");
    }
    // Temperatures that follow the outcomes, and rounds that draft nothing because it did not pay.
    let mut learning = World::new(2, 1, sampled(1.0)).policy(Policy::Delayed);
    let draft = CostTable::new(vec![(1, 0.4)]).unwrap();
    let verify = CostTable::new(vec![(1, 1.0), (3, 1.2)]).unwrap();
    learning
        .scheduler
        .set_cost(StepCost::new(verify, Some(draft)));
    learning.scheduler.set_adapt(Adapt {
        cost: false,
        ..Adapt::ON
    });
    learning.assert_exact(7);
    assert!(learning.num_plans() > 1);
    let params = sampled(0.7);
    World::new(2, 1, params)
        .policy(Policy::Delayed)
        .requests(&[(&[0], params), (&[1, 1, 0, 1], sampled(1.0))])
        .assert_exact(4);
}

/// Drafts from candidates alone: the law they were drawn from is truncated, the target's is not.
#[test]
fn drafts_from_candidates() {
    for rule in [Rule::Token, Rule::Block] {
        for (num_top, draft_len) in [(1, 2), (2, 2), (3, 1), (2, 3)] {
            let params = SamplingParams {
                rule,
                ..sampled(0.9)
            };
            let mut world = World::new(4, draft_len, params);
            world.draft.form = HeadForm::Candidates(num_top, 0);
            world.assert_exact(2);
            let mut world = world.policy(Policy::Threshold(0.5));
            world.grammar = Some(Rc::new(no_ones_in_a_row));
            world.assert_exact(2);
        }
    }
    let mut world = World::new(4, 2, sampled(1.0));
    world.draft.form = HeadForm::Candidates(2, 0);
    world.draft.shift_law = true;
    world.assert_caught(2);
}

/// Candidates that the token before brings along, and laws cut down by the request's own filters.
#[test]
fn drafts_from_bigrams_and_filtered_candidates() {
    for rule in [Rule::Token, Rule::Block] {
        let params = SamplingParams {
            rule,
            ..sampled(0.9)
        };
        let filtered = SamplingParams {
            top_k: 3,
            top_p: 0.8,
            min_p: 0.1,
            ..params
        };
        for (params, form) in [
            (params, HeadForm::Candidates(1, 2)),
            (filtered, HeadForm::Candidates(2, 1)),
            (filtered, HeadForm::Candidates(3, 0)),
        ] {
            let mut world = World::new(4, 2, params);
            world.draft.form = form;
            world.assert_exact(2);
            world.policy(Policy::Threshold(0.5)).assert_exact(2);
        }
    }
    let mut world = World::new(4, 2, sampled(1.0));
    world.draft.form = HeadForm::Candidates(1, 1);
    world.draft.shift_law = true;
    world.assert_caught(2);
}

/// A law handed on as latents and normalisers, recomputed by acceptance; also in e4m3.
#[test]
fn laws_of_low_rank() {
    for form in [HeadForm::Full, HeadForm::FullFp8] {
        for rule in [Rule::Token, Rule::Block] {
            for (vocab_size, draft_len, n) in [(2, 2, 4), (3, 2, 3), (4, 3, 2)] {
                let params = SamplingParams {
                    rule,
                    ..sampled(0.9)
                };
                let mut world = World::new(vocab_size, draft_len, params);
                world.draft.form = form;
                world.assert_exact(n);
                world.policy(Policy::Threshold(0.5)).assert_exact(n);
            }
        }
        let mut world = World::new(3, 2, sampled(1.0));
        world.draft.form = form;
        world.grammar = Some(Rc::new(no_ones_in_a_row));
        world.assert_exact(3);
        let mut world = World::new(3, 2, sampled(1.0));
        world.draft.form = form;
        world.draft.shift_law = true;
        world.assert_caught(2);
    }
}

/// Second choices beside the drafts: a tree, under the rules that have trees, for one request and for two of different
/// lengths.
#[test]
fn second_choices() {
    for (num_top, draft_len, alternates, n) in
        [(2, 1, 1, 3), (3, 2, 1, 3), (3, 2, 2, 3), (2, 3, 3, 3)]
    {
        for params in [
            sampled(0.9),
            SamplingParams {
                top_k: 2,
                ..sampled(0.7)
            },
            sampled(0.0),
        ] {
            let mut world = World::new(3, draft_len, params);
            world.draft.form = HeadForm::Candidates(num_top, 0);
            world.alternates = alternates;
            world.assert_exact(n);
            assert!(
                world.num_alternates.get() > 0 || params.temperature == 0.0,
                "no second choice was ever accepted"
            );
            let world = world.policy(Policy::Threshold(0.5));
            world.assert_exact(n);
        }
    }
    let params = sampled(0.8);
    let mut world =
        World::new(2, 2, params).requests(&[(&[0], params), (&[1, 1, 0], sampled(0.0))]);
    world.draft.form = HeadForm::Candidates(2, 0);
    world.alternates = 2;
    world.assert_exact(3);
    // A law one row off is caught.
    let mut world = World::new(3, 2, sampled(1.0));
    world.draft.form = HeadForm::Candidates(3, 0);
    world.alternates = 2;
    world.draft.shift_law = true;
    world.assert_caught(2);
}

/// After token 1 never 1 again; complete with the second 2.
fn no_ones_in_a_row(tokens: &[u32]) -> Vec<u32> {
    let forbidden = |pair: &[u32]| pair == [1, 1];
    let twos = tokens.iter().filter(|&&t| t == 2).count();
    if twos >= 2 || tokens.windows(2).any(forbidden) {
        return Vec::new();
    }
    match tokens.last() {
        Some(1) => vec![0, 2],
        _ => vec![0, 1, 2],
    }
}

#[test]
fn grammars() {
    for rule in [Rule::Token, Rule::Block] {
        let params = SamplingParams {
            rule,
            ..sampled(0.8)
        };
        for policy in [Policy::Fixed, Policy::Threshold(0.5), Policy::Algorithm1] {
            for draft_len in [1, 2] {
                let mut world = World::new(3, draft_len, params).policy(policy);
                world.grammar = Some(Rc::new(no_ones_in_a_row));
                world.assert_exact(4);
            }
        }
        let mut world = World::new(3, 3, params);
        world.grammar = Some(Rc::new(no_ones_in_a_row));
        world.assert_exact(3);
    }
    // Another grammar's law is told apart.
    let mut world = World::new(3, 2, sampled(0.8));
    world.grammar = Some(Rc::new(no_ones_in_a_row));
    let got = world.enumerated(3);
    world.grammar = Some(Rc::new(|tokens| vec![0, 1, 2, 2 - tokens.len() as u32 % 2]));
    let free = world.exact(3);
    let gap = |tokens: &Vec<u32>| (got.get(tokens).unwrap_or(&0.0) - free[tokens]).abs();
    assert!(free.keys().any(|tokens| gap(tokens) > CAUGHT));
}

#[test]
fn global_is_refused_where_it_would_bias_the_law() {
    let mut world = World::new(2, 2, sampled(1.0)).policy(Policy::Global);
    let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.enumerated(3)));
    assert!(refused.is_err());
    // Greedy output does not depend on what is verified.
    world.requests = vec![(vec![0, 1, 1], sampled(0.0))];
    world.assert_exact(6);
}

#[test]
fn several_requests() {
    let params = sampled(0.7);
    for policy in [Policy::Fixed, Policy::Threshold(0.5), Policy::Algorithm1] {
        let world = World::new(2, 2, params)
            .policy(policy)
            .requests(&[(&[0], params), (&[1, 1, 0, 1], sampled(1.0))]);
        world.assert_exact(2);
        assert!(policy == Policy::Fixed || world.num_plans() > 2);
        World::new(2, 1, params)
            .policy(policy)
            .requests(&[(&[0], params), (&[1, 1], params), (&[0, 1, 0], params)])
            .assert_exact(2);
    }
}

#[test]
fn requests_with_and_without_a_draft() {
    let (params, other) = (sampled(0.7), sampled(1.0));
    for policy in [Policy::Fixed, Policy::Threshold(0.5), Policy::Delayed] {
        for slot in 0..3 {
            let mut world = World::new(2, 2, params).policy(policy).requests(&[
                (&[0], params),
                (&[1, 1, 0], other),
                (&[0, 1], params),
            ]);
            world.drafts_for = Some(slot);
            world.assert_exact(2);
        }
    }
}

#[test]
fn greedy_and_sampled_requests_together() {
    for policy in [Policy::Fixed, Policy::Threshold(0.5), Policy::Algorithm1] {
        World::new(3, 2, sampled(1.0))
            .policy(policy)
            .requests(&[(&[0], sampled(0.0)), (&[1, 2, 0], sampled(1.0))])
            .assert_exact(3);
    }
}

/// Appendix A of the paper: one request, two drafts from (1/2, 1/2), c_1 = 0.8, c_2 = 0.9 after token 0 and 0 after
/// token 1, SPS(1, 2, 3) = 1.0, 0.5, 0.45. The first output token is always 0; the second has the law (0.7, 0.3).
fn appendix_a() -> World {
    let logit = |p: f32| (p / (1.0 - p)).ln();
    let mut world = World::new(2, 2, sampled(1.0)).requests(&[(&[1], sampled(1.0))]);
    world.law = Rc::new(|history| match history.len() {
        1 => vec![0.0, f32::NEG_INFINITY],
        _ => vec![0.7_f32.ln(), 0.3_f32.ln()],
    });
    world.draft = DraftSpec {
        base: Rc::new(|_| vec![0.0, 0.0]),
        markov: vec![0.0; 4],
        confidence: Some(ConfidenceSpec {
            base: Rc::new(move |asked| match asked[asked.len() - 1] {
                100 => vec![logit(0.8)],
                _ => vec![logit(0.9)],
            }),
            // Token 0 is x_0 of the first round; only token 1 changes what follows it.
            previous: vec![0.0, -1e4],
        }),
        shift_law: false,
        form: HeadForm::Full,
        max_draft_len: 2,
    };
    world
}

fn appendix_a_sps() -> StepCost {
    let seconds = vec![(1, 1.0), (2, 1.0 / 0.5), (3, 1.0 / 0.45)];
    StepCost::new(CostTable::new(seconds).unwrap(), None)
}

/// The unconstrained best length: it looks at c_2, which depends on x_1, before it chooses whether to verify x_1.
fn peek(proposal: &Proposal, sps: &dyn Fn(usize) -> f64) -> Vec<usize> {
    let survival = dspark::schedule::survival(proposal.confidence_of(0), proposal.draft_len);
    let throughput = |len: usize| {
        let tau = 1.0 + survival[..len].iter().map(|&a| f64::from(a)).sum::<f64>();
        tau * sps(1 + len)
    };
    let best = (0..=proposal.draft_len).max_by(|&a, &b| throughput(a).total_cmp(&throughput(b)));
    vec![best.unwrap()]
}

#[test]
fn appendix_a_is_lossless_with_algorithm_1() {
    let mut world = appendix_a();
    world.scheduler = Scheduler::new(Policy::Algorithm1, None).unwrap();
    world.scheduler.set_cost(appendix_a_sps());
    world.assert_exact(2);
    assert!((world.enumerated(2)[&vec![0, 0]] - 0.7).abs() < 1e-6);
}

#[test]
fn appendix_a_catches_a_peeking_scheduler() {
    let world = appendix_a()
        .plan(|proposal, _| peek(proposal, &|b| appendix_a_sps().steps_per_second(1, b)));
    world.assert_caught(2);
    assert!((world.enumerated(2)[&vec![0, 0]] - 0.85).abs() < 1e-6);
}

#[test]
fn a_peeking_scheduler_is_caught_on_random_laws() {
    World::new(3, 2, sampled(1.0))
        .plan(|proposal, _| peek(proposal, &|b| [1.0, 0.5, 0.45][b - 1]))
        .assert_caught(2);
}

#[test]
fn a_draft_law_one_row_off_is_caught() {
    let mut world = World::new(3, 2, sampled(1.0));
    world.draft.shift_law = true;
    world.assert_caught(2);
}

#[test]
fn a_bonus_token_from_the_draft_law_is_caught() {
    let mut world = World::new(3, 1, sampled(1.0));
    let base = world.draft.base.clone();
    world.bonus_from = Some(Rc::new(move |history| base(&[history, &[100]].concat())));
    world.assert_caught(3);
}
