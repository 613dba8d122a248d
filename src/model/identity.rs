//! Names for models, so that a file measured with a pair can say with which.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use super::config::{DecoderConfig, TargetConfig};
use super::drafter_config::DrafterConfig;
use crate::error::{Error, Result};

/// Bytes of each weight file that enter a drafter's name, from its middle.
const SAMPLE: u64 = 1 << 16;

/// The target's family and shape, "Llama 30x576 9/3x64 ffn 1536 vocab 49152": fine-tuned variants share it.
///
/// # Errors
/// Those of [`TargetConfig::read`].
pub fn target_identity(dir: &Path) -> Result<String> {
    let config = TargetConfig::read(dir)?;
    Ok(format!("{:?} {}", config.family, shape(&config.decoder)))
}

/// The drafter's kind, shape and a hash of sizes and samples of its weight files: a retrained drafter has another.
///
/// # Errors
/// Those of [`DrafterConfig::read`]; unreadable weights.
pub fn drafter_identity(dir: &Path) -> Result<String> {
    let config = DrafterConfig::read(dir)?;
    let kind = match &config {
        DrafterConfig::DSpark(dspark) => {
            format!("block {} {:?} head", dspark.block_size, dspark.head)
        }
        DrafterConfig::Mtp(_) => "MTP".to_owned(),
    };
    let hash = weights_hash(dir)?;
    Ok(format!("{kind} {} {hash:016x}", shape(config.decoder())))
}

fn shape(config: &DecoderConfig) -> String {
    format!(
        "{}x{} {}/{}x{} ffn {} vocab {}",
        config.num_layers,
        config.hidden_size,
        config.num_q_heads,
        config.num_kv_heads,
        config.head_dim,
        config.intermediate_size,
        config.vocab_size
    )
}

/// FNV-1a over length and middle of every safetensors file, in order of their names.
fn weights_hash(dir: &Path) -> Result<u64> {
    let io = |file: &Path| {
        let file = file.to_owned();
        move |source| Error::io(file, source)
    };
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
        .map_err(io(dir))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    files.sort();
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |bytes: &[u8]| {
        for &byte in bytes {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for path in files {
        let mut file = File::open(&path).map_err(io(&path))?;
        let len = file.metadata().map_err(io(&path))?.len();
        add(&len.to_le_bytes());
        let middle = (len / 2).saturating_sub(SAMPLE / 2);
        file.seek(SeekFrom::Start(middle)).map_err(io(&path))?;
        let mut sample = Vec::new();
        file.take(SAMPLE)
            .read_to_end(&mut sample)
            .map_err(io(&path))?;
        add(&sample);
    }
    Ok(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_make_the_hash() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        let mut hashes = Vec::new();
        for (len, byte) in [(100, 1), (100, 2), (101, 1), (1 << 18, 1)] {
            std::fs::write(&file, vec![byte; len]).unwrap();
            hashes.push(weights_hash(dir.path()).unwrap());
        }
        std::fs::write(dir.path().join("config.json"), "{}").unwrap();
        assert_eq!(weights_hash(dir.path()).unwrap(), hashes[3]);
        hashes.sort_unstable();
        hashes.dedup();
        assert_eq!(hashes.len(), 4);
    }
}
