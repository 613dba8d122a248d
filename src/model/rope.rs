//! Rotary frequencies as `config.json` describes them, in the old spelling (`rope_theta`, `rope_scaling`) and the new one
//! (`rope_parameters`).

use std::f64::consts::TAU;

use super::fields::Fields;
use crate::error::Result;
use crate::ops::RopeSpec;

/// What transformers assumes for a config without `rope_theta`.
const DEFAULT_THETA: f64 = 10_000.0;

/// Reads the rope fields of `config`.
///
/// # Errors
/// A `rope_type` other than default, linear and llama3, or a partial rotation.
pub(super) fn read_rope(config: &Fields, head_dim: usize, max_position: usize) -> Result<RopeSpec> {
    let parameters = match config.object_optional("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => config.object_optional("rope_scaling")?,
    };
    let scope = parameters.as_ref().unwrap_or(config);
    let theta = match scope.positive_optional("rope_theta")? {
        Some(theta) => theta,
        None => config
            .positive_optional("rope_theta")?
            .unwrap_or(DEFAULT_THETA),
    };
    for fields in [scope, config] {
        if fields
            .positive_optional("partial_rotary_factor")?
            .unwrap_or(1.0)
            != 1.0
        {
            return Err(fields.error("partial_rotary_factor", "1"));
        }
    }
    let pairs = head_dim / 2;
    let plain = (0..pairs).map(|i| theta.powf(-(i as f64) / pairs as f64));
    let inv_freq: Vec<f64> = match &parameters {
        None => plain.collect(),
        Some(parameters) => scale_frequencies(parameters, plain, max_position)?,
    };
    Ok(RopeSpec {
        inv_freq: inv_freq.into_iter().map(|f| f as f32).collect(),
        scale: 1.0,
    })
}

fn scale_frequencies(
    parameters: &Fields,
    plain: impl Iterator<Item = f64>,
    max_position: usize,
) -> Result<Vec<f64>> {
    let key = if parameters.value("rope_type").is_some() {
        "rope_type"
    } else {
        "type"
    };
    match parameters.string_optional(key)?.unwrap_or("default") {
        "default" => Ok(plain.collect()),
        "linear" => {
            let factor = parameters.positive("factor")?;
            Ok(plain.map(|f| f / factor).collect())
        }
        "llama3" => {
            let factor = parameters.positive("factor")?;
            let low = parameters.positive("low_freq_factor")?;
            let high = parameters.positive("high_freq_factor")?;
            if high <= low {
                let expected = format!("a number above low_freq_factor {low}");
                return Err(parameters.error("high_freq_factor", expected));
            }
            let original =
                parameters.count_or("original_max_position_embeddings", max_position)? as f64;
            // Turns over the original context: few (below `low`) are interpolated, many (above `high`) are kept, and
            // between the two both are blended.
            Ok(plain
                .map(|f| {
                    let turns = original * f / TAU;
                    let keep = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    keep * f + (1.0 - keep) * f / factor
                })
                .collect())
        }
        _ => Err(parameters.error(key, "default, linear or llama3")),
    }
}
