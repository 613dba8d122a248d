//! `dspark doctor`: what was built, what can run, and whether a pair fits.

use std::io::Write as _;
use std::path::Path;

use anyhow::Result;
use dspark::device_is_available;
use dspark::engine::text::Tokenizer;
use dspark::model::selfcheck::self_check;
use dspark::model::{
    DSparkDrafter, DecoderTarget, DrafterConfig, Limits, Pair, TargetConfig, kv_scales,
};
use dspark::ops::Ops;

use crate::args::DoctorArgs;
use crate::session::{self, Job};

/// `println!` that returns the failure of a closed standard output instead of panicking.
macro_rules! say {
    ($($line:tt)*) => { writeln!(std::io::stdout(), $($line)*)? };
}

/// What the target continues in the self-check; plain prose that any language model goes on with.
const TEXT: &str = "The water cycle describes how water moves around the Earth. First, the sun";
/// Greedy tokens along which drafts are made.
const NUM_TOKENS: usize = 48;

pub fn run(args: &DoctorArgs) -> Result<()> {
    say!("dspark {}", env!("CARGO_PKG_VERSION"));
    build()?;
    devices()?;
    let Some(target) = &args.target else {
        return Ok(());
    };
    let config = TargetConfig::read(target)?;
    let decoder = &config.decoder;
    say!(
        "target   {:?}: {} layers, hidden {}, {}/{} heads x {}, vocabulary {}, context {}",
        config.family,
        decoder.num_layers,
        decoder.hidden_size,
        decoder.num_q_heads,
        decoder.num_kv_heads,
        decoder.head_dim,
        decoder.vocab_size,
        decoder.max_position
    );
    let scales = match kv_scales(target)? {
        Some(_) => "with the checkpoint's factors",
        None => "with factors of 1: the checkpoint brings none",
    };
    say!("KV cache native; fp8 where asked for (--kv-dtype fp8), {scales}");
    session::on_device(
        args.device,
        None,
        Check {
            target,
            draft: args.draft.as_deref(),
        },
    )
}

fn build() -> Result<()> {
    match (option_env!("DSPARK_NVCC"), option_env!("DSPARK_GENCODE")) {
        (Some(nvcc), Some(gencode)) => {
            say!("built    with CUDA kernels, {}", archs(gencode));
            say!("compiler {nvcc}");
        }
        _ => say!("built    without CUDA (feature `cuda` is off): the reference backend alone"),
    }
    Ok(())
}

/// The code each `-gencode=arch=...,code=[...]` asks for: "sm_90a sm_80 compute_80".
fn archs(gencode: &str) -> String {
    gencode
        .split(' ')
        .filter_map(|flag| flag.split_once("code=[")?.1.strip_suffix(']'))
        .collect::<Vec<_>>()
        .join(" ")
        .replace(',', " ")
}

fn devices() -> Result<()> {
    #[cfg(feature = "cuda")]
    match dspark::device::reports() {
        Ok(reports) => {
            for gpu in reports {
                say!(
                    "GPU {}    {}, compute capability {}.{}, driver {} (CUDA {}.{}), {:.1} of {:.1} GB free",
                    gpu.index,
                    gpu.name,
                    gpu.compute_capability.0,
                    gpu.compute_capability.1,
                    gpu.driver_version,
                    gpu.cuda_version.0,
                    gpu.cuda_version.1,
                    gpu.memory_free_bytes as f64 / 1e9,
                    gpu.memory_total_bytes as f64 / 1e9
                );
            }
        }
        Err(error) => say!("GPU      none: {error}"),
    }
    let backends = if device_is_available() {
        "cuda (default), cpu"
    } else {
        "cpu"
    };
    say!("can run  {backends}");
    Ok(())
}

/// Loads what was named and, for a DSpark pair, measures acceptance under every known layout slip.
struct Check<'a> {
    target: &'a Path,
    draft: Option<&'a Path>,
}

impl Job for Check<'_> {
    type Output = ();

    fn run<O: Ops + 'static>(self, mut ops: O) -> Result<()> {
        say!("device   {}", ops.describe());
        let limits = Limits {
            max_num_reqs: 8,
            max_rows: 256,
            max_logit_rows: 64,
            max_draft_len: 16,
            num_pages: 32,
            page_size: 16,
        };
        let Some(draft) = self.draft else {
            DecoderTarget::load(&mut ops, self.target, &limits, &[])?;
            say!("target   loads");
            return Ok(());
        };
        let DrafterConfig::DSpark(config) = DrafterConfig::read(draft)? else {
            Pair::load(&mut ops, self.target, Some(draft), &limits)?;
            say!("drafter  MTP: loads, and fits the target");
            return Ok(());
        };
        say!(
            "drafter  head {:?} (rank {}), block {}, taps {:?}, confidence head: {}",
            config.head,
            config.markov_rank,
            config.block_size,
            config.target_layer_ids,
            if config.confidence.is_some() {
                "yes"
            } else {
                "no"
            }
        );
        DrafterConfig::read(draft)?.check_pair(draft, &TargetConfig::read(self.target)?)?;
        let mut target =
            DecoderTarget::load(&mut ops, self.target, &limits, &config.target_layer_ids)?;
        let mut drafter = DSparkDrafter::load(&mut ops, &target, draft, &limits)?;
        let prompt = prompt(self.target)?;
        let check = self_check(
            &mut ops,
            &mut target,
            &mut drafter,
            &limits,
            &prompt,
            NUM_TOKENS,
        )?;
        say!("self-check, accepted drafts per block along {NUM_TOKENS} greedy tokens:");
        say!("  {:5.2}  as the checkpoint says", check.straight);
        for (slip, accepted) in &check.slips {
            say!("  {accepted:5.2}  with {slip}");
        }
        match check.suspect() {
            Some(slip) => say!("this pair looks like one with {slip}"),
            None => {
                say!("no layout slip explains more acceptance than the checkpoint as it is");
            }
        }
        Ok(())
    }
}

/// The text's ids, or the first ids of the vocabulary where there is no tokenizer.
fn prompt(target: &Path) -> Result<Vec<u32>> {
    if Tokenizer::exists(target) {
        return Ok(Tokenizer::load(target)?.encode(TEXT, true)?);
    }
    let vocab_size = TargetConfig::read(target)?.decoder.vocab_size as u32;
    Ok((1..17).map(|id| id % vocab_size).collect())
}

#[cfg(test)]
mod tests {
    #[test]
    fn architectures_are_read_from_the_compiler_flags() {
        let flags = "-gencode=arch=compute_90a,code=[sm_90a] -gencode=arch=compute_80,code=[sm_80,compute_80]";
        assert_eq!(super::archs(flags), "sm_90a sm_80 compute_80");
    }
}
