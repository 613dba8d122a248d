//! Family schedule: survival of drafts from their confidences.

use std::ptr::null;

use super::arguments::Arguments;
use super::{Cuda, check, expect, int, struct_size};
use crate::error::Result;
use crate::sys;

impl Cuda {
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
