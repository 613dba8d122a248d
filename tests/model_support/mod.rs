//! Goldens and passes for the model tests.
#![allow(dead_code)] // Each test binary uses its own part.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use dspark::model::{DecoderTarget, Limits, Target};
use dspark::ops::{Ops, RowMap};
use dspark::reference::Reference;
use serde_json::Value;

pub const TARGETS: [&str; 5] = [
    "qwen3_bf16",
    "qwen3_f32",
    "llama_bf16",
    "llama_f32",
    "llama3_rope_bf16",
];
pub const DRAFTERS: [&str; 5] = [
    "qwen3_vanilla",
    "qwen3_gated",
    "qwen3_rnn",
    "qwen3_dflash",
    "llama_vanilla",
];
const PAGE_SIZE: usize = 4;
const PAGES_PER_REQ: usize = 24;

pub fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

pub fn target_dir(name: &str) -> PathBuf {
    goldens().join("targets").join(name)
}

pub fn drafter_dir(name: &str) -> PathBuf {
    goldens().join("drafters").join(name)
}

pub fn limits() -> Limits {
    Limits {
        max_num_reqs: 3,
        max_rows: 64,
        max_logit_rows: 64,
        max_draft_len: 7,
        num_pages: 3 * PAGES_PER_REQ,
        page_size: PAGE_SIZE,
    }
}

pub fn reference() -> Reference {
    Reference::new(Some(1)).unwrap()
}

/// `golden.json` and `golden.safetensors` of a directory.
pub struct Golden {
    pub json: Value,
    tensors: HashMap<String, Vec<f32>>,
}

impl Golden {
    pub fn read(dir: &Path) -> Self {
        let json = std::fs::read(dir.join("golden.json")).unwrap();
        let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
        let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let floats = |data: &[u8]| {
            let items = data.chunks_exact(4);
            items
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .collect()
        };
        Self {
            json: serde_json::from_slice(&json).unwrap(),
            tensors: tensors
                .iter()
                .map(|(name, tensor)| (name.to_owned(), floats(tensor.data())))
                .collect(),
        }
    }

    pub fn tensor(&self, name: &str) -> &[f32] {
        self.tensors
            .get(name)
            .unwrap_or_else(|| panic!("no golden {name}"))
    }

    pub fn get(&self, name: &str) -> Option<&[f32]> {
        self.tensors.get(name).map(Vec::as_slice)
    }

    pub fn list(&self, key: &str) -> &[Value] {
        self.json[key].as_array().unwrap()
    }
}

pub fn ids(value: &Value) -> Vec<u32> {
    let items = value.as_array().unwrap().iter();
    items.map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Pages of request `r`, in an order that is not the pool's.
pub fn pages(r: usize) -> Vec<i32> {
    let first = r * PAGES_PER_REQ;
    (0..PAGES_PER_REQ)
        .map(|i| (first + i * 7 % PAGES_PER_REQ) as i32)
        .collect()
}

/// A pass of `rows` rows after `seq_len` cached ones, for each request given as `(request, rows, seq_len)`.
pub fn row_map(requests: &[(usize, usize, usize)]) -> RowMap {
    let mut map = RowMap::new(PAGES_PER_REQ);
    for &(r, rows, seq_len) in requests {
        map.push(rows, seq_len, seq_len, &pages(r)).unwrap();
    }
    map
}

/// One pass over all of `prompts`, request `r` being prompt `r`.
pub fn prefill(
    ops: &mut Reference,
    target: &mut DecoderTarget<Reference>,
    prompts: &[Vec<u32>],
) -> RowMap {
    let requests: Vec<_> = prompts
        .iter()
        .enumerate()
        .map(|(r, p)| (r, p.len(), 0))
        .collect();
    let map = row_map(&requests);
    target.forward(ops, &prompts.concat(), &map, None).unwrap();
    map
}

/// All rows of the target's logits.
pub fn logits(ops: &mut Reference, target: &DecoderTarget<Reference>) -> Vec<Vec<f32>> {
    let all = ops.read_logits(target.logits()).unwrap();
    all.chunks(target.vocab_size())
        .map(<[f32]>::to_vec)
        .collect()
}

pub fn argmax(row: &[f32]) -> u32 {
    (0..row.len())
        .rev()
        .max_by(|&a, &b| row[a].total_cmp(&row[b]))
        .unwrap() as u32
}

/// Fails, with the worst coordinate, unless `|found - expected| <= tolerance (1 + |expected|)` everywhere.
pub fn assert_close(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    let error = |i: usize| (found[i] - expected[i]).abs() / (1.0 + expected[i].abs());
    assert!(found.iter().all(|x| x.is_finite()), "{what}: not finite");
    let worst = (0..found.len()).max_by(|&a, &b| error(a).total_cmp(&error(b)));
    if let Some(i) = worst {
        let (f, e) = (found[i], expected[i]);
        assert!(
            error(i) <= tolerance,
            "{what}[{i}]: found {f}, expected {e}"
        );
    }
}
