//! The factors of a cache in e4m3, as far as a checkpoint brings them.
//!
//! Tools that calibrate a cache leave one number for a layer's keys and one for its values, or one for each head, with
//! vLLM's meaning, which is that of [`KvScales`]. They agree on no name, so that all are looked for. A checkpoint without
//! any gets factors of 1: keys and values are then rounded as they are, and cut at +-448.

use std::path::Path;

use super::checkpoint::Checkpoint;
use super::config::TargetConfig;
use crate::error::{Error, Result};
use crate::ops::{KvGeometry, KvScales};

/// What a target's tensors are called before the number of a layer.
pub(super) const TARGET_PREFIX: &str = "model.";

/// Names of a layer's factor of keys; of values with v for k. llm-compressor's and vLLM's own, ModelOpt's, Quark's.
const NAMES: [&str; 4] = [
    "self_attn.k_scale",
    "self_attn.attn.k_scale",
    "self_attn.k_proj.k_scale",
    "self_attn.k_proj.output_scale",
];

/// One factor for both, as they were once written.
const SHARED_NAME: &str = "self_attn.kv_scale";

/// The factors that the target in `dir` brings for a cache in e4m3; `None` where it brings none.
///
/// # Errors
/// [`Error::Checkpoint`] for factors that cannot be used, or not in every layer; what the directory is refused for.
pub fn kv_scales(dir: &Path) -> Result<Option<KvScales>> {
    let geometry = TargetConfig::read(dir)?.decoder.kv_geometry(1, 1);
    find(&Checkpoint::open(dir)?, TARGET_PREFIX, &geometry)
}

/// The factors of the layers `{prefix}layers.*`, which are 1 where the checkpoint has none.
pub(super) fn find_or_ones(
    weights: &Checkpoint,
    prefix: &str,
    geometry: &KvGeometry,
) -> Result<KvScales> {
    if let Some(scales) = find(weights, prefix, geometry)? {
        return Ok(scales);
    }
    let ones = vec![1.0; geometry.num_layers * geometry.num_kv_heads];
    KvScales::new(geometry, ones.clone(), ones)
}

/// The factors of the layers `{prefix}layers.*`; `None` where there are none.
fn find(weights: &Checkpoint, prefix: &str, geometry: &KvGeometry) -> Result<Option<KvScales>> {
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    let mut missing = None;
    for layer in 0..geometry.num_layers {
        let layer = format!("{prefix}layers.{layer}.");
        for (all, side) in [(&mut keys, 'k'), (&mut values, 'v')] {
            match of_layer(weights, &layer, side, geometry.num_kv_heads)? {
                Some(scales) => all.extend(scales),
                None => missing = missing.or(Some(name(&layer, NAMES[0], side))),
            }
        }
    }
    match missing {
        None => Ok(Some(KvScales::new(geometry, keys, values)?)),
        Some(_) if keys.is_empty() && values.is_empty() => Ok(None),
        Some(name) => Err(weights.missing(&name, "a factor in every layer, or in none")),
    }
}

/// `name`, of keys, as that of `side`.
fn name(layer: &str, name: &str, side: char) -> String {
    let name = if side == 'v' {
        name.replace("k_scale", "v_scale")
            .replace("k_proj", "v_proj")
    } else {
        name.to_owned()
    };
    format!("{layer}{name}")
}

/// The factors of one layer's keys or values, one for each head.
fn of_layer(
    weights: &Checkpoint,
    layer: &str,
    side: char,
    num_kv_heads: usize,
) -> Result<Option<Vec<f32>>> {
    let names = NAMES.iter().chain([&SHARED_NAME]);
    let Some(name) = names
        .map(|candidate| name(layer, candidate, side))
        .find(|name| weights.contains(name))
    else {
        return Ok(None);
    };
    let shape = weights.shape_of(&name).unwrap_or_default();
    let tensor = weights.tensor(&name, &shape)?;
    let scales = tensor.to_f32();
    let error = |expected: &str, found: String| {
        Error::checkpoint(weights.file_of(&name), &name, expected, found)
    };
    if let Some(scale) = scales.iter().find(|&&scale| !KvScales::is_scale(scale)) {
        return Err(error("normal numbers above 0", scale.to_string()));
    }
    match scales.len() {
        1 => Ok(Some(vec![scales[0]; num_kv_heads])),
        len if len == num_kv_heads => Ok(Some(scales)),
        _ => {
            let expected = format!("1 number or {num_kv_heads}, one for each head");
            Err(error(&expected, format!("shape {shape:?}")))
        }
    }
}
