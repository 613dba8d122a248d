//! Requests in, tokens out: continuous batching over one [`DecodeStep`].
//!
//! Requests wait in order of submission. One is admitted when a slot is free and the worst case of its KV pages fits,
//! and then holds these pages to its end: nothing in flight can run out of memory, and a request behind one that does
//! not fit yet waits too. Each [`Engine::advance`] admits, runs one pass of prompt chunks and one decode round of all
//! prefilled requests; between two calls requests join and leave.
//!
//! What a request generates under greedy decoding depends on nothing but its prompt. Sampled, its random numbers are
//! keyed by (seed, position, purpose), so that its neighbours change nothing either, unless the schedule itself looks
//! at all requests (`algorithm1`, `delayed`): then the law stays and the sample may differ.

mod output;
mod prometheus;
mod request;
mod stats;
mod stop;
pub mod text;

pub use request::{Completion, Event, FinishReason, Piece, Request, RequestId, TextStream};
pub use stats::{RequestStats, RoundStats};

use std::collections::VecDeque;
use std::time::Instant;

use self::output::Output;
use crate::error::{Error, Result};
use crate::kv::PagePool;
use crate::model::{Drafter, Target};
use crate::ops::{Ops, TokenLogprobs};
use crate::schedule::{Adapt, Policy, Scheduler, StepCost};
use crate::step::{DecodeStep, PhaseTimes, PrefillChunk, Round, Sequence};

/// Sizes and rules of an engine.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Most requests in the batch; slots are `0 .. max_num_reqs`.
    pub max_num_reqs: usize,
    /// Pages of the caches the models were made with.
    pub num_pages: usize,
    /// Token slots of a page.
    pub page_size: usize,
    /// Most prompt tokens in one pass.
    pub prefill_chunk: usize,
    /// Tokens drafted per round; `None` is the drafter's longest. Without a drafter only `None` and 0 make sense.
    pub draft_len: Option<usize>,
    /// How many drafts are verified.
    pub policy: Policy,
    /// STS temperatures of the draft positions; `None` takes confidences as they are.
    pub sts_temperatures: Option<Vec<f32>>,
    /// What a step costs, where [`Policy::needs_cost`]; `None` measures it at start-up.
    pub cost: Option<StepCost>,
}

impl EngineConfig {
    /// The most rows of a target pass when `draft_len` tokens are drafted: what the models' buffers must hold.
    pub fn max_rows(&self, draft_len: usize) -> usize {
        self.prefill_chunk.max(self.max_num_reqs * (1 + draft_len))
    }

    /// Checks the sizes, before models are loaded for them.
    ///
    /// # Errors
    /// A size of zero.
    pub fn validate(&self) -> Result<()> {
        for (field, value) in [
            ("max_num_reqs", self.max_num_reqs),
            ("prefill_chunk", self.prefill_chunk),
            ("num_pages", self.num_pages),
            ("page_size", self.page_size),
        ] {
            if value == 0 {
                return Err(Error::argument(field, "at least 1", value));
            }
        }
        Ok(())
    }
}

/// A request on its way to the batch.
struct Waiting {
    id: RequestId,
    request: Request,
    num_entries: usize,
    submitted: Instant,
}

/// A request in the batch.
struct Active {
    id: RequestId,
    prompt_ids: Vec<u32>,
    sequence: Sequence,
    output: Output,
    rounds: Vec<Round>,
    stats: RequestStats,
    admitted: Instant,
    first_token: Instant,
}

impl Active {
    /// Adds tokens to the output, which the sequence has committed.
    fn push(
        &mut self,
        tokens: &[u32],
        logprobs: &[TokenLogprobs],
        num_drafted: usize,
        vocab_size: usize,
    ) -> Event {
        let constraint = self.sequence.constraint();
        let complete = constraint.is_some_and(|constraint| constraint.is_complete(vocab_size));
        Event::Tokens {
            request: self.id,
            pieces: self.output.push(tokens, logprobs, num_drafted, complete),
        }
    }
}

/// Generates for many requests at once.
pub struct Engine<O: Ops> {
    ops: O,
    step: DecodeStep<O>,
    pool: PagePool,
    prefill_chunk: usize,
    free_slots: Vec<usize>,
    waiting: VecDeque<Waiting>,
    /// In order of admission.
    active: Vec<Active>,
    next_id: RequestId,
    totals: RoundStats,
}

impl<O: Ops> Engine<O> {
    /// An engine without requests. `target` and `drafter` must have been made for [`EngineConfig::max_rows`] rows,
    /// `max_num_reqs` slots and the pages of `config`. Where the policy needs a cost and none is given, passes are timed
    /// here.
    ///
    /// # Errors
    /// A size of zero; a draft length the drafter cannot make; a policy whose confidences the drafter does not give.
    pub fn new(
        mut ops: O,
        target: Box<dyn Target<O>>,
        drafter: Option<Box<dyn Drafter<O>>>,
        config: EngineConfig,
    ) -> Result<Self> {
        config.validate()?;
        let mut pool = PagePool::new(config.num_pages, config.page_size)?;
        let longest = drafter.as_ref().map_or(0, |d| d.max_draft_len());
        let draft_len = config.draft_len.unwrap_or(longest);
        let scheduler = Scheduler::new(config.policy, config.sts_temperatures)?;
        let mut step = DecodeStep::new(target, drafter, scheduler, draft_len)?;
        if config.policy.needs_cost() {
            let cost = match config.cost {
                Some(cost) => cost,
                None => {
                    step.measure_cost(&mut ops, &mut pool, config.max_num_reqs, &mut |_, _| ())?
                }
            };
            step.set_cost(cost);
        }
        Ok(Self {
            ops,
            step,
            pool,
            prefill_chunk: config.prefill_chunk,
            free_slots: (0..config.max_num_reqs).rev().collect(),
            waiting: VecDeque::new(),
            active: Vec::new(),
            next_id: 0,
            totals: RoundStats::default(),
        })
    }

    /// What of the schedule follows live outcomes from now on; nothing does before.
    pub fn set_adapt(&mut self, adapt: Adapt) {
        self.step.set_adapt(adapt);
    }

    /// Keeps a record of every step from now on ([`DecodeStep::records`]).
    pub fn record_steps(&mut self) {
        self.step.record_steps();
    }

    /// See [`DecodeStep::set_alternates`]. The models must have been made for as many rows more.
    ///
    /// # Errors
    /// Requests wait or run.
    pub fn set_alternates(&mut self, alternates: usize) -> Result<()> {
        self.check_idle("alternates")?;
        self.step.set_alternates(alternates);
        Ok(())
    }

    /// Runs steps of every size once, where the first of a size takes longer than the later ones
    /// ([`Ops::is_slow_at_first`]): nothing of that is left for the first requests to wait for.
    ///
    /// # Errors
    /// Requests wait or run; a failure of the backend.
    pub fn warm_up(&mut self) -> Result<()> {
        self.check_idle("warm_up")?;
        if !self.ops.is_slow_at_first() {
            return Ok(());
        }
        let max_num_reqs = self.free_slots.len();
        self.step
            .warm_up(&mut self.ops, &mut self.pool, max_num_reqs)
    }

    fn check_idle(&self, field: &str) -> Result<()> {
        if self.is_idle() {
            return Ok(());
        }
        let found = "requests in flight";
        Err(Error::argument(field, "an idle engine", found))
    }

    /// Measures what a step costs; `on_point` hears of every point to come and of all there are. The cost is not put to
    /// use.
    ///
    /// # Errors
    /// Requests wait or run; a failure of the backend.
    pub fn profile(&mut self, on_point: &mut dyn FnMut(usize, usize)) -> Result<StepCost> {
        self.check_idle("profile")?;
        let max_num_reqs = self.free_slots.len();
        self.step
            .measure_cost(&mut self.ops, &mut self.pool, max_num_reqs, on_point)
    }

    /// The step, for its times, cost and schedule.
    pub fn step(&self) -> &DecodeStep<O> {
        &self.step
    }

    /// The backend.
    pub fn ops(&self) -> &O {
        &self.ops
    }

    /// The page pool: what is free, and how large it is.
    pub fn pool(&self) -> &PagePool {
        &self.pool
    }

    /// Time spent in each phase so far.
    pub fn times(&self) -> PhaseTimes {
        self.step.times()
    }

    /// All rounds so far.
    pub fn totals(&self) -> &RoundStats {
        &self.totals
    }

    /// Whether no request waits or runs.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.active.is_empty()
    }

    /// Puts a request at the end of the queue.
    ///
    /// # Errors
    /// A field out of its domain ([`Request::validate`]); a worst case of KV pages that the whole pool cannot hold.
    pub fn submit(&mut self, request: Request) -> Result<RequestId> {
        let target = self.step.target();
        request.validate(target.vocab_size(), target.max_position())?;
        self.step.check_sampling(&request.sampling)?;
        let prompt_len = request.prompt_ids.len();
        let max_tokens = request
            .max_new_tokens
            .min(target.max_position() - prompt_len);
        let num_entries = prompt_len + max_tokens + self.step.max_rows_per_req();
        if self.pool.pages_for(num_entries) > self.pool.num_pages() {
            let room = self.pool.num_pages() * self.pool.page_size();
            let expected = format!("prompt, output and draft of at most {room} tokens in all");
            return Err(Error::argument("num_pages", expected, num_entries));
        }
        let id = self.next_id;
        self.next_id += 1;
        self.waiting.push_back(Waiting {
            id,
            request,
            num_entries,
            submitted: Instant::now(),
        });
        Ok(id)
    }

    /// Runs until no request is left, handing every event to `on_event`.
    ///
    /// # Errors
    /// Those of [`Engine::advance`].
    pub fn run(&mut self, mut on_event: impl FnMut(Event)) -> Result<()> {
        while !self.is_idle() {
            self.advance()?.into_iter().for_each(&mut on_event);
        }
        Ok(())
    }

    /// Admits what fits, runs one pass of prompt chunks and one decode round, and says what happened.
    ///
    /// # Errors
    /// A failure of the backend, or logits that are no law (named by request id). The engine is not fit for use after.
    pub fn advance(&mut self) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        self.admit()?;
        self.prefill(&mut events)?;
        self.retire(&mut events);
        self.decode(&mut events)?;
        self.retire(&mut events);
        Ok(events)
    }

    /// Moves requests from the head of the queue into the batch while a slot and their worst case of pages are free.
    fn admit(&mut self) -> Result<()> {
        while let Some(next) = self.waiting.front() {
            let fits = self.pool.pages_for(next.num_entries) <= self.pool.num_free();
            if !fits || self.free_slots.is_empty() {
                break;
            }
            let (Some(mut waiting), Some(slot)) = (self.waiting.pop_front(), self.free_slots.pop())
            else {
                break;
            };
            let mut pages = self.pool.table();
            self.pool.reserve(&mut pages, waiting.num_entries)?;
            let prompt_ids = std::mem::take(&mut waiting.request.prompt_ids);
            let room = self.step.target().max_position() - prompt_ids.len();
            let mut sequence = Sequence::new(slot, pages, waiting.request.sampling);
            sequence.logit_bias = std::mem::take(&mut waiting.request.logit_bias);
            sequence
                .stop_tokens
                .clone_from(&waiting.request.stop_tokens);
            sequence.grammar = waiting.request.grammar.take();
            sequence.logprobs = waiting.request.logprobs;
            sequence.calibrates = !sequence.sampling.has_penalties()
                && sequence.logit_bias.is_empty()
                && sequence.grammar.is_none();
            let now = Instant::now();
            self.active.push(Active {
                id: waiting.id,
                sequence,
                output: Output::new(&mut waiting.request, room),
                prompt_ids,
                rounds: Vec::new(),
                stats: RequestStats {
                    wait_seconds: (now - waiting.submitted).as_secs_f64(),
                    ..RequestStats::default()
                },
                admitted: now,
                first_token: now,
            });
        }
        Ok(())
    }

    /// Runs the next chunks of unfinished prompts, oldest request first, in one pass.
    fn prefill(&mut self, events: &mut Vec<Event>) -> Result<()> {
        let mut budget = self.prefill_chunk;
        let mut members = Vec::new();
        let mut chunks = Vec::new();
        for (i, active) in self.active.iter_mut().enumerate() {
            if active.sequence.anchor.is_some() || budget == 0 {
                continue;
            }
            let rest = &active.prompt_ids[active.sequence.seq_len()..];
            let (tokens, after) = rest.split_at(rest.len().min(budget));
            budget -= tokens.len();
            members.push(i);
            chunks.push(PrefillChunk {
                sequence: &mut active.sequence,
                tokens,
                next: after.first().copied(),
            });
        }
        if chunks.is_empty() {
            return Ok(());
        }
        let vocab_size = self.step.target().vocab_size();
        let firsts = self.step.prefill(&mut self.ops, &mut chunks);
        drop(chunks);
        let firsts = firsts.map_err(|e| e.in_batch(|r| self.active[members[r]].id))?;
        for (i, first) in members.into_iter().zip(firsts) {
            let active = &mut self.active[i];
            if let Some(first) = first {
                active.first_token = Instant::now();
                let logprobs: Vec<_> = first.logprobs.into_iter().collect();
                events.push(active.push(&[first.token], &logprobs, 0, vocab_size));
            }
        }
        Ok(())
    }

    /// One round of every request whose prompt is done.
    fn decode(&mut self, events: &mut Vec<Event>) -> Result<()> {
        let (mut members, mut seqs) = (Vec::new(), Vec::new());
        for (i, active) in self.active.iter_mut().enumerate() {
            if active.sequence.anchor.is_some() {
                members.push(i);
                seqs.push(&mut active.sequence);
            }
        }
        if seqs.is_empty() {
            return Ok(());
        }
        let vocab_size = self.step.target().vocab_size();
        let rounds = self.step.round(&mut self.ops, &mut seqs);
        let rounds = rounds.map_err(|e| e.in_batch(|r| self.active[members[r]].id))?;
        for (i, round) in members.into_iter().zip(rounds) {
            let active = &mut self.active[i];
            self.totals.add(&round);
            active.stats.rounds.add(&round);
            let drafted = round.num_accepted + usize::from(round.alternate.is_some());
            let committed = &round.committed;
            events.push(active.push(committed, &round.logprobs, drafted, vocab_size));
            active.rounds.push(round);
        }
        Ok(())
    }

    /// Takes finished requests out of the batch; their pages and slots are free at once.
    fn retire(&mut self, events: &mut Vec<Event>) {
        for mut active in self.active.extract_if(.., |a| a.output.reason.is_some()) {
            let Some(reason) = active.output.reason else {
                continue;
            };
            self.pool.release(&mut active.sequence.pages);
            self.free_slots.push(active.sequence.slot);
            self.step.forget(active.sequence.slot);
            active.stats.num_generated = active.output.tokens.len();
            active.stats.prefill_seconds = (active.first_token - active.admitted).as_secs_f64();
            active.stats.decode_seconds = active.first_token.elapsed().as_secs_f64();
            events.push(Event::Finished {
                request: active.id,
                completion: Box::new(Completion {
                    prompt_ids: active.prompt_ids,
                    tokens: active.output.tokens,
                    logprobs: active.output.logprobs,
                    text: active.output.text,
                    reason,
                    rounds: active.rounds,
                    stats: active.stats,
                }),
            });
        }
    }
}
