//! Engines over the fakes, and a check of everything they say.

use std::collections::HashMap;
use std::rc::Rc;

use dspark::engine::{Completion, Engine, EngineConfig, Event, FinishReason};
use dspark::model::Drafter;
use dspark::reference::Reference;
use dspark::schedule::{CostTable, Policy, StepCost};
use dspark::{Error, Result};

use super::{DraftSpec, FakeDrafter, FakeTarget, LogitsOf, Sizes, greedy};

/// An [`Error::Argument`] of this field.
pub fn is_argument<T>(result: Result<T>, name: &str) -> bool {
    matches!(result, Err(Error::Argument { field, .. }) if field == name)
}

/// A backend on the calling thread alone.
pub fn reference() -> Reference {
    Reference::new(Some(1)).unwrap()
}

/// One second for a pass of one token, `slope` more for each further one.
pub fn linear_cost(slope: f64) -> StepCost {
    let points = vec![(1, 1.0), (101, 1.0 + 100.0 * slope)];
    StepCost::new(CostTable::new(points).unwrap(), None)
}

/// A drafter that always drafts the target's own greedy continuation.
pub fn agreeing_draft(law: &LogitsOf, vocab_size: usize, max_draft_len: usize) -> DraftSpec {
    let law = law.clone();
    DraftSpec {
        base: Rc::new(move |asked| {
            let (k, history) = asked.split_last().unwrap();
            let before = greedy(&law, history, *k as usize - 100);
            law(&[history, &before].concat())
        }),
        markov: vec![0.0; vocab_size * vocab_size],
        ..DraftSpec::random(vocab_size, 5, max_draft_len)
    }
}

/// Four slots, chunks of four tokens, the pool of `sizes`, the drafter's longest draft.
pub fn engine_config(sizes: &Sizes, policy: Policy) -> EngineConfig {
    EngineConfig {
        max_num_reqs: 4,
        num_pages: sizes.num_pages,
        page_size: sizes.page_size,
        prefill_chunk: 4,
        draft_len: None,
        policy,
        sts_temperatures: None,
        cost: Some(linear_cost(0.2)),
    }
}

/// An engine over the fakes.
pub fn engine(
    mut ops: Reference,
    sizes: Sizes,
    law: &LogitsOf,
    draft: Option<&DraftSpec>,
    config: EngineConfig,
) -> Result<Engine<Reference>> {
    let target = FakeTarget::new(&mut ops, sizes, law.clone());
    let drafter = draft.map(|spec| {
        Box::new(FakeDrafter::new(&mut ops, sizes, spec.clone())) as Box<dyn Drafter<Reference>>
    });
    Engine::new(ops, Box::new(target), drafter, config)
}

/// What a run of an engine said: completions by request, and what was streamed before.
#[derive(Default)]
pub struct Outcome {
    pub completions: HashMap<usize, Completion>,
    /// Requests in order of their first token.
    pub first_tokens: Vec<usize>,
    streamed: HashMap<usize, (Vec<u32>, String)>,
}

impl Outcome {
    /// Takes an event, checking that streams and completions say the same.
    pub fn take(&mut self, event: Event) {
        match event {
            Event::Tokens { request, pieces } => {
                assert!(!pieces.is_empty());
                assert!(!self.completions.contains_key(&request));
                if !self.streamed.contains_key(&request) {
                    self.first_tokens.push(request);
                    assert!(pieces.len() == 1 && !pieces[0].drafted);
                }
                let (tokens, text) = self.streamed.entry(request).or_default();
                tokens.extend(pieces.iter().map(|piece| piece.token));
                text.extend(pieces.iter().map(|piece| piece.text.as_str()));
            }
            Event::Finished {
                request,
                completion,
            } => {
                let (tokens, text) = &self.streamed[&request];
                assert_eq!((tokens, text), (&completion.tokens, &completion.text));
                check_trace(&completion);
                assert!(self.completions.insert(request, *completion).is_none());
            }
        }
    }

    /// Generated tokens of a request.
    pub fn tokens(&self, request: usize) -> &[u32] {
        &self.completions[&request].tokens
    }
}

/// Runs an engine to its end, which gives all pages back.
pub fn run(engine: &mut Engine<Reference>) -> Outcome {
    let mut outcome = Outcome::default();
    engine.run(|event| outcome.take(event)).unwrap();
    assert!(engine.is_idle());
    assert_eq!(
        engine.pool().num_free(),
        engine.pool().num_pages(),
        "pages were lost"
    );
    outcome
}

/// The first token and the rounds hold the output, and at most the last round goes on after its end.
fn check_trace(completion: &Completion) {
    let mut all = completion.tokens[..1].to_vec();
    // Whether the last round so far ended with a draft that ends the output.
    let mut ended = false;
    for round in &completion.rounds {
        let more = all.len() < completion.tokens.len() && !ended;
        assert!(more, "a round after the end");
        assert!(round.num_accepted <= round.verify_len);
        assert!(round.verify_len <= round.draft_tokens.len());
        let (drafts, next) = round.committed.split_at(round.num_accepted);
        assert_eq!(drafts, &round.draft_tokens[..round.num_accepted]);
        let (alternate, next) = next.split_at(usize::from(round.alternate.is_some()));
        assert!(alternate.first() == round.alternate.as_ref());
        ended = next.is_empty();
        assert!(ended || next.len() == 1);
        all.extend(&round.committed);
    }
    assert!(all.starts_with(&completion.tokens));
    if ended {
        // A grammar may be complete just where the output may not grow any more.
        let other = [FinishReason::StopString, FinishReason::Context];
        assert!(!other.contains(&completion.reason) && all == completion.tokens);
    }
    let stats = &completion.stats;
    assert_eq!(stats.num_generated, completion.tokens.len());
    assert_eq!(stats.rounds.num_rounds as usize, completion.rounds.len());
    assert_eq!(stats.rounds.num_committed as usize, all.len() - 1);
}
