//! Weights made up on the spot, for models of which only the shape matters: what a step costs does not depend on what
//! the weights are.
//!
//! A directory whose `config.json` says `"random_weights": true` needs no weight file. Its matrices are windows of one
//! repeated pattern of normal numbers, its norms are ones; the same name always gives the same numbers.

use std::path::Path;

use super::config::{CONFIG_FILE, architecture};
use super::fields::Fields;
use crate::error::Result;
use crate::ops::{Dtype, HostTensor};

/// Numbers drawn; what is longer repeats them. No multiple of a row, so that rows differ.
const PERIOD: usize = (1 << 22) + 4099;

/// Standard deviation of a weight.
const DEVIATION: f64 = 0.02;

/// The weights of such a directory.
pub(super) struct RandomWeights {
    /// bf16 numbers, as many as the largest matrix has and a period more.
    pattern: Vec<u8>,
    /// bf16 ones, as many as the longest norm has.
    ones: Vec<u8>,
    /// Whether the family norms q and k.
    qk_norm: bool,
}

impl RandomWeights {
    /// The weights of `dir`; `None` where its `config.json` does not ask for them.
    ///
    /// # Errors
    /// A `config.json` that asks for them and is no model's.
    pub(super) fn of(dir: &Path) -> Result<Option<Self>> {
        let file = dir.join(CONFIG_FILE);
        if !file.is_file() {
            return Ok(None);
        }
        let config = Fields::read(&file)?;
        if !config.flag("random_weights")? {
            return Ok(None);
        }
        let hidden = config.count("hidden_size")?;
        let rank = config.whole_optional("markov_rank")?.unwrap_or(0);
        let taps = match config.value("target_layer_ids") {
            Some(_) => config.integers("target_layer_ids")?.len(),
            None => 0,
        };
        let inner = config.count("intermediate_size")?;
        // A drafter's embedding and head are its target's.
        let table = if taps > 0 { rank } else { hidden };
        let largest = [
            config.count("vocab_size")?.saturating_mul(table),
            hidden.saturating_mul(inner.max(taps.max(4) * hidden)),
        ];
        let largest = largest.into_iter().fold(0, usize::max);
        Ok(Some(Self {
            pattern: pattern(largest.saturating_add(PERIOD)),
            ones: half::bf16::ONE.to_le_bytes().repeat(hidden.max(inner)),
            qk_norm: architecture(&config)? != "LlamaForCausalLM",
        }))
    }

    /// Whether a model of the family has a tensor of this name; only the optional ones are ever asked for.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.qk_norm && (name.ends_with("q_norm.weight") || name.ends_with("k_norm.weight"))
    }

    /// The tensor `name`; `None` when it is larger than any that a model of this shape has.
    pub(super) fn tensor(&self, name: &str, shape: &[usize]) -> Option<HostTensor<'_>> {
        let len: usize = shape.iter().product();
        let bytes = if name.ends_with("norm.weight") {
            self.ones.get(..2 * len)?
        } else {
            let start = name.bytes().fold(0_usize, |hash, byte| {
                (hash * 131 + usize::from(byte)) % PERIOD
            });
            self.pattern.get(2 * start..2 * (start + len))?
        };
        Some(HostTensor {
            name: name.to_owned(),
            dtype: Dtype::Bf16,
            shape: shape.to_vec(),
            bytes,
        })
    }
}

/// `len` bf16 numbers: sums of twelve uniform ones, which are normal enough.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f64 / f64::from(1 << 24) - 0.5
    };
    let mut bytes = Vec::with_capacity(2 * len);
    for _ in 0..PERIOD.min(len) {
        let normal: f64 = (0..12).map(|_| uniform()).sum();
        bytes.extend(half::bf16::from_f64(DEVIATION * normal).to_le_bytes());
    }
    while bytes.len() < 2 * len {
        let more = bytes.len().min(2 * len - bytes.len());
        bytes.extend_from_within(..more);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(config: &str) -> Result<Option<RandomWeights>> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(CONFIG_FILE), config).unwrap();
        RandomWeights::of(dir.path())
    }

    #[test]
    fn only_directories_that_ask_for_them_have_any() {
        assert!(weights("{}").unwrap().is_none());
        assert!(weights(r#"{"random_weights": false}"#).unwrap().is_none());
        let error = weights(r#"{"random_weights": true}"#).err().unwrap();
        assert!(error.to_string().contains("hidden_size"), "{error}");
        assert!(weights(r#"{"random_weights": 3}"#).is_err());
    }

    #[test]
    fn matrices_are_normal_differ_by_name_and_norms_are_ones() {
        let weights = weights(
            r#"{"random_weights": true, "architectures": ["Qwen3ForCausalLM"], "vocab_size": 300,
                "hidden_size": 64, "intermediate_size": 96}"#,
        );
        let weights = weights.unwrap().unwrap();
        let numbers = |name: &str| weights.tensor(name, &[300, 64]).unwrap().to_f32();
        let a = numbers("a.weight");
        assert_eq!(a, numbers("a.weight"));
        assert_ne!(a, numbers("b.weight"));
        let square = a.iter().map(|x| f64::from(x * x)).sum::<f64>() / a.len() as f64;
        assert!((square.sqrt() / DEVIATION - 1.0).abs() < 0.05, "{square}");
        let norm = weights.tensor("x.q_norm.weight", &[64]).unwrap().to_f32();
        assert_eq!(norm, vec![1.0; 64]);
        assert!(weights.contains("x.q_norm.weight") && !weights.contains("embed_tokens.weight"));
        assert!(weights.tensor("c", &[1 << 20, 1 << 10]).is_none());
    }
}
