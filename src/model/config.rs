//! `config.json` and `generation_config.json` of a target.

use std::path::Path;

use super::fields::Fields;
use super::rope::read_rope;
use crate::error::{Error, Result};
use crate::ops::{AttentionSpec, KvGeometry, RopeSpec};

/// Sizes of a stack of decoder layers: of a target, of a drafter's backbone or of an MTP module.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// Tokens.
    pub vocab_size: usize,
    /// Width of the residual stream (d).
    pub hidden_size: usize,
    /// Width of the feed-forward part.
    pub intermediate_size: usize,
    /// Layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_q_heads: usize,
    /// Key/value heads; divides `num_q_heads`.
    pub num_kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Epsilon of every norm.
    pub norm_eps: f32,
    /// Rotary frequencies.
    pub rope: RopeSpec,
    /// Positions the model was made for.
    pub max_position: usize,
}

impl DecoderConfig {
    /// Columns of q.
    pub fn q_size(&self) -> usize {
        self.num_q_heads * self.head_dim
    }

    /// Columns of k, and of v.
    pub fn kv_size(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Heads and scaling of each layer's attention.
    pub fn attention(&self) -> AttentionSpec {
        AttentionSpec {
            num_q_heads: self.num_q_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            scale: (self.head_dim as f32).sqrt().recip(),
            norm_eps: self.norm_eps,
            window: 0,
            softcap: 0.0,
        }
    }

    /// Size of the stack's cache in a pool of `num_pages` pages of `page_size` slots.
    pub fn kv_geometry(&self, num_pages: usize, page_size: usize) -> KvGeometry {
        KvGeometry {
            num_layers: self.num_layers,
            num_pages,
            page_size,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
        }
    }

    /// Reads the fields that Qwen3 and Llama share, refusing variants that compute something else.
    pub(super) fn read(config: &Fields) -> Result<Self> {
        refuse_variants(config)?;
        let hidden_size = config.count("hidden_size")?;
        let num_layers = config.count("num_hidden_layers")?;
        let num_q_heads = config.count("num_attention_heads")?;
        let num_kv_heads = config.count_or("num_key_value_heads", num_q_heads)?;
        if !num_q_heads.is_multiple_of(num_kv_heads) {
            let expected = format!("a divisor of num_attention_heads {num_q_heads}");
            return Err(config.error("num_key_value_heads", expected));
        }
        let head_dim = match config.whole_optional("head_dim")? {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(num_q_heads) => hidden_size / num_q_heads,
            None => {
                let expected = format!("a divisor of hidden_size {hidden_size}");
                return Err(config.error("num_attention_heads", expected));
            }
        };
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err(config.error("head_dim", "an even number above 0"));
        }
        let max_position = config.count("max_position_embeddings")?;
        Ok(Self {
            vocab_size: config.count("vocab_size")?,
            hidden_size,
            intermediate_size: config.count("intermediate_size")?,
            num_layers,
            num_q_heads,
            num_kv_heads,
            head_dim,
            norm_eps: config.positive("rms_norm_eps")? as f32,
            rope: read_rope(config, head_dim, max_position)?,
            max_position,
        })
    }
}

/// Refuses what would be computed wrongly in silence: biases, other activations, sliding windows, quantised weights.
fn refuse_variants(config: &Fields) -> Result<()> {
    for key in ["attention_bias", "mlp_bias"] {
        if config.flag(key)? {
            return Err(config.error(key, "false"));
        }
    }
    if config.string_optional("hidden_act")?.unwrap_or("silu") != "silu" {
        return Err(config.error("hidden_act", "silu"));
    }
    if !quantises_kv_alone(config)? {
        let expected = "none (bf16, f16 or f32 weights), or one of an fp8 KV cache alone";
        return Err(config.error("quantization_config", expected));
    }
    let window_in_use = match config.value("use_sliding_window") {
        Some(_) => config.flag("use_sliding_window")?,
        None => config.value("sliding_window").is_some(),
    };
    if window_in_use {
        return Err(config.error("sliding_window", "none in use"));
    }
    let layer_types = config.strings("layer_types")?;
    if layer_types.iter().any(|t| t != "full_attention") {
        return Err(config.error("layer_types", "full_attention in every layer"));
    }
    Ok(())
}

/// Whether no weight is quantised: nothing is, or as llm-compressor writes it the cache alone, which it then is where
/// that is asked for ([`crate::ops::KvDtype`]).
fn quantises_kv_alone(config: &Fields) -> Result<bool> {
    let Some(quantised) = config.object_optional("quantization_config")? else {
        return Ok(true);
    };
    let Some(scheme) = quantised.object_optional("kv_cache_scheme")? else {
        return Ok(false);
    };
    let no_weights = match quantised.object_optional("config_groups")? {
        Some(groups) => groups.is_empty(),
        None => true,
    };
    let is_e4m3 = scheme.whole_optional("num_bits")? == Some(8)
        && scheme.string_optional("type")? == Some("float");
    let is_compressed = quantised.string_optional("quant_method")? == Some("compressed-tensors");
    Ok(is_compressed && no_weights && is_e4m3 && !scheme.flag("dynamic")?)
}

/// Target families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetFamily {
    /// `Qwen3ForCausalLM`: per-head norms of q and k.
    Qwen3,
    /// `LlamaForCausalLM`.
    Llama,
}

/// `config.json` of a target.
#[derive(Clone, Debug, PartialEq)]
pub struct TargetConfig {
    /// Which family.
    pub family: TargetFamily,
    /// Sizes.
    pub decoder: DecoderConfig,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
}

impl TargetConfig {
    /// Reads `config.json` of `dir`.
    ///
    /// # Errors
    /// [`Error::Io`] when there is none, [`Error::Checkpoint`] naming the field that does not fit.
    pub fn read(dir: &Path) -> Result<Self> {
        let config = Fields::read(&dir.join(CONFIG_FILE))?;
        let family = match architecture(&config)?.as_str() {
            "Qwen3ForCausalLM" => TargetFamily::Qwen3,
            "LlamaForCausalLM" => TargetFamily::Llama,
            _ => {
                let expected = "Qwen3ForCausalLM or LlamaForCausalLM";
                return Err(config.error("architectures", expected));
            }
        };
        Ok(Self {
            family,
            decoder: DecoderConfig::read(&config)?,
            tie_word_embeddings: config.flag("tie_word_embeddings")?,
        })
    }
}

/// The configuration every Hugging Face directory has.
pub(super) const CONFIG_FILE: &str = "config.json";

/// The one entry of `architectures`.
pub(super) fn architecture(config: &Fields) -> Result<String> {
    match <[String; 1]>::try_from(config.strings("architectures")?) {
        Ok([name]) => Ok(name),
        Err(_) => Err(config.error("architectures", "a list of one name")),
    }
}

/// How a target's authors want it sampled and stopped: `generation_config.json`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end an answer; empty when no file names one.
    pub eos_token_ids: Vec<u32>,
    /// Default temperature: 0 when the file asks for greedy decoding, `None` when it says nothing.
    pub temperature: Option<f32>,
    /// Default top-k.
    pub top_k: Option<u32>,
    /// Default top-p.
    pub top_p: Option<f32>,
}

impl GenerationConfig {
    /// Reads `generation_config.json` of `dir`, or, without one, the stop tokens of `config.json`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] naming the field that does not fit.
    pub fn read(dir: &Path) -> Result<Self> {
        let file = dir.join("generation_config.json");
        let config = Fields::read(&dir.join(CONFIG_FILE))?;
        let fallback = config.token_ids("eos_token_id")?;
        if !file.is_file() {
            return Ok(Self {
                eos_token_ids: fallback,
                ..Self::default()
            });
        }
        let fields = Fields::read(&file)?;
        let eos_token_ids = match fields.value("eos_token_id") {
            Some(_) => fields.token_ids("eos_token_id")?,
            None => fallback,
        };
        let greedy = fields.value("do_sample").is_some() && !fields.flag("do_sample")?;
        let top_p = fields.number_optional("top_p")?.map(|p| p as f32);
        if top_p.is_some_and(|p| !(p > 0.0 && p <= 1.0)) {
            return Err(fields.error("top_p", "a number in (0, 1]"));
        }
        Ok(Self {
            eos_token_ids,
            temperature: if greedy {
                Some(0.0)
            } else {
                fields.number_optional("temperature")?.map(|t| t as f32)
            },
            top_k: fields.whole_optional("top_k")?.map(|k| k as u32),
            top_p,
        })
    }
}

/// An [`Error::Checkpoint`] about `field` of the `config.json` in `dir`.
pub(super) fn config_error(
    dir: &Path,
    field: &str,
    expected: impl Into<String>,
    found: impl ToString,
) -> Error {
    Error::checkpoint(dir.join(CONFIG_FILE), field, expected, found)
}
