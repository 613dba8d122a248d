//! `config.json` of a drafter, in DeepSpec's format, and what it must share with its target.

use std::path::Path;

use super::checkpoint::Checkpoint;
use super::config::{CONFIG_FILE, DecoderConfig, TargetConfig, architecture, config_error};
use super::fields::Fields;
use crate::error::Result;
use crate::ops::HeadKind;

/// A tensor that only an MTP module has.
pub(super) const MTP_FC: &str = "mtp.fc.weight";

/// The longest block that is believed: several times that of any released drafter.
const MAX_BLOCK_SIZE: usize = 64;

/// A drafter's configuration.
#[derive(Clone, Debug, PartialEq)]
pub enum DrafterConfig {
    /// DSpark, or DFlash when the head is [`HeadKind::None`].
    DSpark(DSparkConfig),
    /// One multi-token-prediction module.
    Mtp(MtpConfig),
}

/// `Qwen3DSparkModel` of DeepSpec.
#[derive(Clone, Debug, PartialEq)]
pub struct DSparkConfig {
    /// Sizes of the draft backbone.
    pub decoder: DecoderConfig,
    /// Rows of a draft block, and the most tokens it drafts (gamma).
    pub block_size: usize,
    /// Stands for every block row but the anchor's.
    pub mask_token_id: u32,
    /// Layers of the target it was trained on.
    pub num_target_layers: usize,
    /// Target layers whose residual stream it reads, strictly increasing; -1 is the embedding.
    pub target_layer_ids: Vec<i32>,
    /// Which sequential head.
    pub head: HeadKind,
    /// Markov rank r; 0 without a head.
    pub markov_rank: usize,
    /// `Some(with_markov)` with a confidence head: whether it sees `W1[x_{k-1}]`.
    pub confidence: Option<bool>,
}

/// An MTP-1 module, in a directory of its own or inside its target's.
#[derive(Clone, Debug, PartialEq)]
pub struct MtpConfig {
    /// Sizes of the module's one layer.
    pub decoder: DecoderConfig,
}

impl DrafterConfig {
    /// Reads `config.json` of `dir`. A target's own directory is an MTP drafter when its weights hold `mtp.*`.
    ///
    /// # Errors
    /// [`crate::Error::Checkpoint`] naming the field that does not fit.
    pub fn read(dir: &Path) -> Result<Self> {
        let config = Fields::read(&dir.join(CONFIG_FILE))?;
        for key in ["speculators_model_type", "speculators_config"] {
            if config.value(key).is_some() {
                return Err(
                    config.error(key, "a drafter in DeepSpec format, not speculators format")
                );
            }
        }
        match architecture(&config)?.as_str() {
            "Qwen3DSparkModel" => Ok(Self::DSpark(DSparkConfig::from_fields(&config)?)),
            "Qwen3MTPModel" => Ok(Self::Mtp(MtpConfig::from_fields(&config)?)),
            "Qwen3ForCausalLM" | "LlamaForCausalLM" if Checkpoint::open(dir)?.contains(MTP_FC) => {
                Ok(Self::Mtp(MtpConfig::from_fields(&config)?))
            }
            _ => Err(config.error(
                "architectures",
                "Qwen3DSparkModel, Qwen3MTPModel or a target with mtp.* weights",
            )),
        }
    }

    /// The target layers to tap for this drafter; none for MTP.
    pub fn tap_ids(&self) -> &[i32] {
        match self {
            Self::DSpark(config) => &config.target_layer_ids,
            Self::Mtp(_) => &[],
        }
    }

    /// Tokens of the longest draft it can make: `block_size`, or the longest chain of an MTP module.
    pub fn max_draft_len(&self) -> usize {
        match self {
            Self::DSpark(config) => config.block_size,
            Self::Mtp(_) => super::mtp::MAX_DRAFT_LEN,
        }
    }

    /// Sizes of the drafter's layers.
    pub fn decoder(&self) -> &DecoderConfig {
        match self {
            Self::DSpark(config) => &config.decoder,
            Self::Mtp(config) => &config.decoder,
        }
    }

    /// Checks that the drafter in `dir` was made for `target`.
    ///
    /// # Errors
    /// [`crate::Error::Checkpoint`] naming the field in which they differ.
    pub fn check_pair(&self, dir: &Path, target: &TargetConfig) -> Result<()> {
        let (own, target) = (self.decoder(), &target.decoder);
        let mut pairs = vec![
            ("hidden_size", own.hidden_size, target.hidden_size),
            ("vocab_size", own.vocab_size, target.vocab_size),
        ];
        if let Self::DSpark(config) = self {
            pairs.push((
                "num_target_layers",
                config.num_target_layers,
                target.num_layers,
            ));
        }
        for (field, found, expected) in pairs {
            if found != expected {
                let expected = format!("the target's {expected}");
                return Err(config_error(dir, field, expected, found));
            }
        }
        Ok(())
    }
}

impl DSparkConfig {
    fn from_fields(config: &Fields) -> Result<Self> {
        let decoder = DecoderConfig::read(config)?;
        let mask_token_id = config.whole("mask_token_id")?;
        if mask_token_id >= decoder.vocab_size {
            let expected = format!("a token below vocab_size {}", decoder.vocab_size);
            return Err(config.error("mask_token_id", expected));
        }
        let num_target_layers = config.count("num_target_layers")?;
        let (head, markov_rank) = read_head(config)?;
        let confidence = if config.flag_required("enable_confidence_head")? {
            Some(config.flag_required("confidence_head_with_markov")?)
        } else {
            None
        };
        if confidence == Some(true) && head == HeadKind::None {
            return Err(config.error("confidence_head_with_markov", "false with markov_rank 0"));
        }
        Ok(Self {
            decoder,
            block_size: read_block_size(config)?,
            mask_token_id: mask_token_id as u32,
            num_target_layers,
            target_layer_ids: read_layer_ids(config, num_target_layers)?,
            head,
            markov_rank,
            confidence,
        })
    }
}

impl MtpConfig {
    fn from_fields(config: &Fields) -> Result<Self> {
        if config.count_or("num_nextn_predict_layers", 1)? != 1 {
            return Err(config.error("num_nextn_predict_layers", "1"));
        }
        let decoder = DecoderConfig::read(config)?;
        Ok(Self {
            decoder: DecoderConfig {
                num_layers: 1,
                ..decoder
            },
        })
    }
}

/// `block_size`: buffers are sized by it before any weight could contradict it.
fn read_block_size(config: &Fields) -> Result<usize> {
    let block_size = config.count("block_size")?;
    if block_size > MAX_BLOCK_SIZE {
        return Err(config.error("block_size", format!("at most {MAX_BLOCK_SIZE}")));
    }
    Ok(block_size)
}

fn read_head(config: &Fields) -> Result<(HeadKind, usize)> {
    let rank = config.whole("markov_rank")?;
    if rank == 0 {
        return Ok((HeadKind::None, 0));
    }
    let name = config.string_optional("markov_head_type")?.unwrap_or("");
    let kind = match name.to_ascii_lowercase().as_str() {
        "vanilla" => HeadKind::Vanilla,
        "gated" => HeadKind::Gated,
        "rnn" => HeadKind::Rnn,
        _ => return Err(config.error("markov_head_type", "vanilla, gated or rnn")),
    };
    Ok((kind, rank))
}

/// `target_layer_ids`: strictly increasing, -1 (embedding) to the last layer but one. The last layer is never tapped: what
/// Hugging Face calls its hidden state is already normed.
fn read_layer_ids(config: &Fields, num_target_layers: usize) -> Result<Vec<i32>> {
    let ids = config.integers("target_layer_ids")?;
    let tappable = -1..num_target_layers as i64 - 1;
    let valid = !ids.is_empty()
        && ids.iter().all(|id| tappable.contains(id))
        && ids.windows(2).all(|pair| pair[0] < pair[1]);
    if !valid {
        let last = num_target_layers as i64 - 2;
        let expected = format!("increasing layer ids from -1 (the embedding) to {last}");
        return Err(config.error("target_layer_ids", expected));
    }
    Ok(ids.into_iter().map(|id| id as i32).collect())
}
