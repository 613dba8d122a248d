//! The weights of a Hugging Face directory: one `model.safetensors`, or shards named by an index, memory-mapped.
//!
//! Nothing is copied here: a tensor is a window of the map. Everything a file claims is checked before it is believed,
//! and every weight is scanned for NaN and infinity when it is asked for, since a single one poisons all output.
//! A directory may also ask for random weights instead of having any ([`RandomWeights`]).

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::{Metadata, TensorInfo};

use super::random_weights::RandomWeights;
use crate::error::{Error, Result};
use crate::ops::{Dtype, HostTensor, MappedFile, Ops};

/// The file of an unsharded checkpoint.
const SINGLE_FILE: &str = "model.safetensors";
/// The index of a sharded checkpoint.
const INDEX_FILE: &str = "model.safetensors.index.json";
/// Bytes of the header length that a safetensors file starts with.
const HEADER_LENGTH_BYTES: usize = 8;
/// Bytes scanned per task; a multiple of every element size.
const SCAN_CHUNK: usize = 1 << 20;

/// Rows compared by [`Checkpoint::check_same_rows`].
const SAMPLED_ROWS: usize = 1024;

/// An opened checkpoint directory.
pub struct Checkpoint {
    shards: Vec<Shard>,
    /// Tensor name to index in `shards`.
    shard_of: HashMap<String, usize>,
    /// The file that says which tensors there are, for errors about missing ones.
    listing: PathBuf,
    /// In the place of files.
    random: Option<RandomWeights>,
}

impl Checkpoint {
    /// Maps the weights of `dir` and checks every header.
    ///
    /// # Errors
    /// [`Error::Io`] for unreadable files, [`Error::Checkpoint`] for files that are not what they claim.
    pub fn open(dir: &Path) -> Result<Self> {
        if let Some(random) = RandomWeights::of(dir)? {
            return Ok(Self {
                shards: Vec::new(),
                shard_of: HashMap::new(),
                listing: dir.to_owned(),
                random: Some(random),
            });
        }
        let (single, index) = (dir.join(SINGLE_FILE), dir.join(INDEX_FILE));
        if single.is_file() {
            return Self::open_single(single);
        }
        if index.is_file() {
            return Self::open_sharded(dir, index);
        }
        let expected = format!("{SINGLE_FILE} or {INDEX_FILE}");
        Err(Error::checkpoint(dir, "weights", expected, "neither"))
    }

    fn open_single(file: PathBuf) -> Result<Self> {
        let shard = Shard::open(file.clone())?;
        let shard_of = shard.metadata.tensors().into_keys();
        Ok(Self {
            shard_of: shard_of.map(|name| (name, 0)).collect(),
            shards: vec![shard],
            listing: file,
            random: None,
        })
    }

    fn open_sharded(dir: &Path, index: PathBuf) -> Result<Self> {
        let weight_map = read_weight_map(&index)?;
        let mut shards: Vec<Shard> = Vec::new();
        let mut opened: HashMap<String, usize> = HashMap::new();
        let mut shard_of = HashMap::new();
        for (name, file) in weight_map {
            let field = || format!("weight_map.{name}");
            let shard = if let Some(&shard) = opened.get(&file) {
                shard
            } else {
                let path = dir.join(&file);
                if Path::new(&file).file_name() != Some(file.as_ref()) || !path.is_file() {
                    let expected = format!("a file in {}", dir.display());
                    return Err(Error::checkpoint(index, field(), expected, file));
                }
                shards.push(Shard::open(path)?);
                opened.insert(file.clone(), shards.len() - 1);
                shards.len() - 1
            };
            if shards[shard].metadata.info(&name).is_none() {
                let expected = format!("a tensor of {file}");
                let found = "a file without it";
                return Err(Error::checkpoint(index, field(), expected, found));
            }
            shard_of.insert(name, shard);
        }
        Ok(Self {
            shards,
            shard_of,
            listing: index,
            random: None,
        })
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        match &self.random {
            Some(random) => random.contains(name),
            None => self.shard_of.contains_key(name),
        }
    }

    /// The tensor `name`, of exactly `shape`, every element finite.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] when it is missing, of another shape, of a type other than bf16, f16 or f32, or holds NaN or
    /// infinity.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<HostTensor<'_>> {
        let (file, tensor) = self.find(name, shape)?;
        if self.random.is_some() {
            return Ok(tensor);
        }
        match first_non_finite(&tensor) {
            None => Ok(tensor),
            Some(element) => {
                let found = format!("NaN or infinity at element {element}");
                Err(Error::checkpoint(file, name, "finite numbers", found))
            }
        }
    }

    /// Checks that the matrix `name` `[rows, cols]` is the same as `other_name` of `other`, which was loaded in its place. It
    /// is compared in `always` and up to [`SAMPLED_ROWS`] rows spread evenly: another training run differs everywhere, and
    /// reading all of a large vocabulary would cost as much as loading it.
    pub(super) fn check_same_rows(
        &self,
        name: &str,
        other: &Self,
        other_name: &str,
        [rows, cols]: [usize; 2],
        always: usize,
    ) -> Result<()> {
        let (file, own) = self.find(name, &[rows, cols])?;
        let (_, loaded) = other.find(other_name, &[rows, cols])?;
        let step = rows.div_ceil(SAMPLED_ROWS);
        let sampled = (0..rows).step_by(step).chain([always, rows - 1]);
        match sampled
            .into_iter()
            .find(|&row| row_of(&own, row, cols) != row_of(&loaded, row, cols))
        {
            None => Ok(()),
            Some(row) => {
                let expected = format!("the target's {other_name}");
                let found = format!("other numbers in row {row}");
                Err(Error::checkpoint(file, name, expected, found))
            }
        }
    }

    /// The shape of `name`, where a file has it.
    pub(super) fn shape_of(&self, name: &str) -> Option<Vec<usize>> {
        let shard = &self.shards[*self.shard_of.get(name)?];
        Some(shard.metadata.info(name)?.shape.clone())
    }

    /// The file that holds `name`, or the one that says that none does.
    pub(super) fn file_of(&self, name: &str) -> &Path {
        let shard = self.shard_of.get(name);
        shard.map_or(&self.listing, |&shard| &self.shards[shard].file)
    }

    /// That `name` is not there.
    pub(super) fn missing(&self, name: &str, expected: impl Into<String>) -> Error {
        Error::checkpoint(&self.listing, name, expected, "none")
    }

    /// The file and window of `name`, its numbers not looked at.
    fn find(&self, name: &str, shape: &[usize]) -> Result<(&Path, HostTensor<'_>)> {
        let random = self.random.as_ref();
        if let Some(tensor) = random.and_then(|random| random.tensor(name, shape)) {
            return Ok((&self.listing, tensor));
        }
        let Some(&shard) = self.shard_of.get(name) else {
            return Err(self.missing(name, format!("a tensor of shape {shape:?}")));
        };
        let shard = &self.shards[shard];
        Ok((&shard.file, shard.tensor(name, shape)?))
    }

    /// Refuses a checkpoint that holds `name`, which this crate would have to ignore.
    pub(super) fn refuse(&self, name: &str, why: &str) -> Result<()> {
        if !self.shard_of.contains_key(name) {
            return Ok(());
        }
        let expected = format!("no such tensor ({why})");
        Err(Error::checkpoint(self.file_of(name), name, expected, "one"))
    }

    /// The vector `name` of `len` elements, in the backend's form.
    pub(super) fn norm<O: Ops>(&self, ops: &mut O, name: &str, len: usize) -> Result<O::Norm> {
        ops.norm(&self.tensor(name, &[len])?)
    }

    /// One weight of `cols` columns, made of the matrices `parts` (name, rows) one below the other.
    pub(super) fn weight<O: Ops>(
        &self,
        ops: &mut O,
        parts: &[(&str, usize)],
        cols: usize,
    ) -> Result<O::Weight> {
        let parts = parts
            .iter()
            .map(|&(name, rows)| self.tensor(name, &[rows, cols]))
            .collect::<Result<Vec<_>>>()?;
        ops.weight(&parts)
    }
}

/// `weight_map` of an index file: tensor name to file name, sorted so that the first error is always the same.
fn read_weight_map(index: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = std::fs::read(index).map_err(|e| Error::io(index, e))?;
    let parsed: Index = serde_json::from_slice(&text).map_err(|e| {
        let expected = "an object of tensor names to file names";
        Error::checkpoint(index, "weight_map", expected, e)
    })?;
    Ok(parsed.weight_map)
}

/// One safetensors file.
struct Shard {
    file: PathBuf,
    map: MappedFile,
    metadata: Metadata,
    /// Offset of the first tensor's bytes.
    data_start: usize,
}

impl Shard {
    /// Maps `file` and checks its header: its length, that tensors neither overlap nor leave holes, that shapes fit their
    /// bytes and that the file ends where the last tensor does.
    fn open(file: PathBuf) -> Result<Self> {
        let map = MappedFile::open(&file)?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|e| {
            let found = format!("{e} ({} bytes)", map.len());
            Error::checkpoint(&file, "header", "a complete safetensors file", found)
        })?;
        Ok(Self {
            file,
            map,
            metadata,
            data_start: HEADER_LENGTH_BYTES + header,
        })
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<HostTensor<'_>> {
        let error = |expected: String, found: String| {
            Err(Error::checkpoint(&self.file, name, expected, found))
        };
        let Some(info) = self.metadata.info(name) else {
            return error(format!("a tensor of shape {shape:?}"), "none".into());
        };
        if info.shape != shape {
            return error(format!("shape {shape:?}"), format!("{:?}", info.shape));
        }
        let dtype = match info.dtype {
            safetensors::Dtype::F32 => Dtype::F32,
            safetensors::Dtype::BF16 => Dtype::Bf16,
            safetensors::Dtype::F16 => Dtype::F16,
            other => return error("dtype BF16, F16 or F32".into(), format!("{other:?}")),
        };
        Ok(HostTensor {
            name: name.to_owned(),
            dtype,
            shape: info.shape.clone(),
            bytes: self.bytes_of(info),
        })
    }

    fn bytes_of(&self, info: &TensorInfo) -> &[u8] {
        let (start, end) = info.data_offsets;
        &self.map[self.data_start + start..self.data_start + end]
    }
}

/// Index of the first element whose exponent bits are all ones (NaN or infinity).
fn first_non_finite(tensor: &HostTensor<'_>) -> Option<usize> {
    let mask: u16 = match tensor.dtype {
        Dtype::F32 | Dtype::Bf16 => 0x7f80,
        Dtype::F16 => 0x7c00,
    };
    let size = tensor.dtype.size();
    // Sign, exponent and the first fraction bits are the last two bytes of a little-endian element.
    let bad = |b: &[u8]| u16::from_le_bytes([b[size - 2], b[size - 1]]) & mask == mask;
    let chunks = tensor.bytes.par_chunks(SCAN_CHUNK).enumerate();
    chunks
        .filter_map(|(c, chunk)| {
            let element = chunk.chunks_exact(size).position(bad)?;
            Some(c * SCAN_CHUNK / size + element)
        })
        .min()
}

/// One row of a matrix as numbers.
fn row_of(matrix: &HostTensor<'_>, row: usize, cols: usize) -> Vec<f32> {
    let size = cols * matrix.dtype.size();
    let row = HostTensor {
        shape: vec![cols],
        bytes: &matrix.bytes[row * size..][..size],
        ..matrix.clone()
    };
    row.to_f32()
}
