//! Family schedule: survival of drafts from their confidences, and how many of them are verified.

use std::ptr::null;

use super::arguments::Arguments;
use super::{Cuda, check, expect, int, struct_size};
use crate::error::Result;
use crate::ops::{ScheduleInputs, ScheduleRule, Scheduled};
use crate::sys;

/// Drafts from which on the device decides sooner than the host, the way there and back included.
const LEAST_DRAFTS: usize = 1024;

/// The most drafts and requests of a launch.
const MOST_DRAFTS: usize = 16_384;
const MOST_REQS: usize = 8192;

impl Cuda {
    /// [`Cuda::schedule`] where that is sooner done than on the host.
    pub(super) fn schedule_if_many(
        &mut self,
        inputs: &ScheduleInputs<'_>,
    ) -> Result<Option<Scheduled>> {
        let (drafts, reqs) = (inputs.confidence.len(), inputs.limits.len());
        if !(LEAST_DRAFTS..=MOST_DRAFTS).contains(&drafts) || reqs > MOST_REQS {
            return Ok(None);
        }
        self.schedule(inputs).map(Some)
    }

    /// How many drafts of each request are verified: the decisions of the host's `Ranking`, bit for bit.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] when the lengths do not fit; [`crate::Error::Cuda`].
    pub fn schedule(&mut self, inputs: &ScheduleInputs<'_>) -> Result<Scheduled> {
        let num_reqs = inputs.limits.len();
        let draft_len = inputs.confidence.len().checked_div(num_reqs).unwrap_or(0);
        expect("confidence", num_reqs * draft_len, inputs.confidence.len())?;
        expect("ticks", num_reqs * draft_len + 1, inputs.ticks.len())?;
        if let Some(temperature) = inputs.temperature {
            expect("temperature", draft_len, temperature.len())?;
        }
        if num_reqs == 0 {
            return Ok(Scheduled {
                verify_lens: Vec::new(),
                best: 0,
            });
        }
        let (rule, capacity) = match inputs.rule {
            ScheduleRule::FirstFall => (sys::DSPARK_SCHEDULE_FIRST_FALL, [0, 1]),
            ScheduleRule::Capacity(drafts, reqs) => (
                sys::DSPARK_SCHEDULE_CAPACITY,
                [int("capacity", drafts)?, int("capacity", reqs)?],
            ),
            ScheduleRule::Best => (sys::DSPARK_SCHEDULE_BEST, [0, 1]),
        };
        let mut arguments = Arguments::default();
        let confidence = arguments.push_f32(inputs.confidence.iter().copied());
        let temperature = inputs
            .temperature
            .map(|t| arguments.push_f32(t.iter().copied()));
        let limits = arguments.push(inputs.limits.iter().map(|&l| l.min(draft_len) as u32));
        let ticks = arguments.push(inputs.ticks.iter().copied());
        let capacity = arguments.push(capacity.map(i32::cast_unsigned));
        let words = arguments.upload(&mut self.arguments)?;
        let results = self.results.at_least(num_reqs + 2)?;
        let params = sys::dspark_schedule_params {
            struct_size: struct_size::<sys::dspark_schedule_params>(),
            num_reqs: int("requests", num_reqs)?,
            draft_len: int("draft_len", draft_len)?,
            rule,
            confidence: confidence.of(words),
            temperature: temperature.map_or(null(), |offset| offset.of(words)),
            limits: limits.of(words),
            num_live: null(),
            ticks: ticks.of(words),
            capacity: capacity.of(words),
            best: results.mut_ptr(num_reqs).cast(),
            verify_lens: results.mut_ptr(0).cast(),
        };
        self.device.bind()?;
        // SAFETY: the inputs were uploaded on this stream with the lengths the params say; the output has room for one
        // word per request and the two of `best`.
        check("schedule", unsafe {
            sys::launch::dspark_schedule_cu(&raw const params, self.stream())
        })?;
        let words = self.download_results(num_reqs + 2)?;
        Ok(Scheduled {
            verify_lens: words[..num_reqs].iter().map(|&l| l as usize).collect(),
            best: words[num_reqs] as usize,
        })
    }

    /// `survival[r, k] = prod over i <= k of sigmoid(logit(confidence[r, i]) / temperature[i])`, `[num_reqs, draft_len]`;
    /// `temperature [draft_len]`, `None` for all 1.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] when the lengths do not fit; [`crate::Error::Cuda`].
    pub fn survival(
        &mut self,
        confidence: &[f32],
        temperature: Option<&[f32]>,
        draft_len: usize,
    ) -> Result<Vec<f32>> {
        if let Some(temperature) = temperature {
            expect("temperature", draft_len, temperature.len())?;
        }
        let num_reqs = confidence.len().checked_div(draft_len).unwrap_or(0);
        expect("confidence", num_reqs * draft_len, confidence.len())?;
        if confidence.is_empty() {
            return Ok(Vec::new());
        }
        let mut arguments = Arguments::default();
        let confidences = arguments.push_f32(confidence.iter().copied());
        let calibration = temperature.map(|t| arguments.push_f32(t.iter().copied()));
        let words = arguments.upload(&mut self.arguments)?;
        let params = sys::dspark_survival_params {
            struct_size: struct_size::<sys::dspark_survival_params>(),
            num_reqs: int("requests", num_reqs)?,
            draft_len: int("draft_len", draft_len)?,
            confidence: confidences.of(words),
            temperature: calibration.map_or(null(), |offset| offset.of(words)),
            survival: self.results.at_least(confidence.len())?.mut_ptr(0).cast(),
        };
        self.device.bind()?;
        // SAFETY: the inputs were uploaded on this stream with the lengths the params say; the output has room for one
        // f32 per confidence.
        check("survival", unsafe {
            sys::launch::dspark_survival_cu(&raw const params, self.stream())
        })?;
        let survival = self.download_results(confidence.len())?;
        Ok(survival.into_iter().map(f32::from_bits).collect())
    }
}
