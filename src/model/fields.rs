//! A JSON object of a checkpoint, read field by field, so that every error names the file, the key and what it held.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A JSON object and where it came from. `null` counts as absent, unknown keys are ignored.
#[derive(Clone, Debug)]
pub(super) struct Fields {
    file: PathBuf,
    /// Dotted path of this object in the file, with its trailing dot; empty at the top.
    prefix: String,
    map: Map<String, Value>,
}

impl Fields {
    /// Reads the JSON object in `file`.
    pub fn read(file: &Path) -> Result<Self> {
        let text = std::fs::read(file).map_err(|e| Error::io(file, e))?;
        let map = serde_json::from_slice(&text)
            .map_err(|e| Error::checkpoint(file, "JSON", "an object", e))?;
        Ok(Self {
            file: file.to_owned(),
            prefix: String::new(),
            map,
        })
    }

    /// An [`Error::Checkpoint`] about `key`, with what stands there.
    pub fn error(&self, key: &str, expected: impl Into<String>) -> Error {
        let found = self.value(key).map_or("nothing".into(), Value::to_string);
        Error::checkpoint(&self.file, format!("{}{key}", self.prefix), expected, found)
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// What stands at `key`, `null` excepted.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn required<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<T> {
        let value = self.value(key).and_then(read);
        value.ok_or_else(|| self.error(key, expected))
    }

    fn optional<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.value(key) {
            None => Ok(None),
            Some(_) => self.required(key, expected, read).map(Some),
        }
    }

    /// A count `>= 1`, at most `i32::MAX` since the kernels count in 32 bits.
    pub fn count(&self, key: &str) -> Result<usize> {
        self.required(key, COUNT, read_count)
    }

    /// A count that may be left out.
    pub fn count_or(&self, key: &str, default: usize) -> Result<usize> {
        Ok(self.optional(key, COUNT, read_count)?.unwrap_or(default))
    }

    /// A whole number `>= 0`.
    pub fn whole(&self, key: &str) -> Result<usize> {
        self.required(key, "a whole number >= 0", read_whole)
    }

    /// A whole number that may be left out.
    pub fn whole_optional(&self, key: &str) -> Result<Option<usize>> {
        self.optional(key, "a whole number >= 0", read_whole)
    }

    /// A finite number `> 0`.
    pub fn positive(&self, key: &str) -> Result<f64> {
        self.required(key, "a number > 0", read_positive)
    }

    /// A finite number `> 0` that may be left out.
    pub fn positive_optional(&self, key: &str) -> Result<Option<f64>> {
        self.optional(key, "a number > 0", read_positive)
    }

    /// A finite number `>= 0` that may be left out.
    pub fn number_optional(&self, key: &str) -> Result<Option<f64>> {
        let read = |v: &Value| v.as_f64().filter(|&x| x.is_finite() && x >= 0.0);
        self.optional(key, "a number >= 0", read)
    }

    /// A flag, false when left out.
    pub fn flag(&self, key: &str) -> Result<bool> {
        Ok(self
            .optional(key, "true or false", Value::as_bool)?
            .unwrap_or(false))
    }

    /// A flag that must be there.
    pub fn flag_required(&self, key: &str) -> Result<bool> {
        self.required(key, "true or false", Value::as_bool)
    }

    /// A string that may be left out.
    pub fn string_optional(&self, key: &str) -> Result<Option<&str>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(_) => Err(self.error(key, "a string")),
        }
    }

    /// A list of whole numbers, negative ones included.
    pub fn integers(&self, key: &str) -> Result<Vec<i64>> {
        let read = |v: &Value| v.as_array()?.iter().map(Value::as_i64).collect();
        self.required(key, "a list of whole numbers", read)
    }

    /// A list of strings, empty when left out.
    pub fn strings(&self, key: &str) -> Result<Vec<String>> {
        let read = |v: &Value| {
            let items = v.as_array()?.iter();
            items.map(|s| s.as_str().map(str::to_owned)).collect()
        };
        Ok(self
            .optional(key, "a list of strings", read)?
            .unwrap_or_default())
    }

    /// One token id or a list of them; empty when left out.
    pub fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let id = |v: &Value| u32::try_from(v.as_u64()?).ok();
        let read = |v: &Value| match v {
            Value::Array(items) => items.iter().map(id).collect(),
            single => id(single).map(|id| vec![id]),
        };
        Ok(self
            .optional(key, "a token id or a list of token ids", read)?
            .unwrap_or_default())
    }

    /// The object at `key`, if there is one.
    pub fn object_optional(&self, key: &str) -> Result<Option<Self>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self {
                file: self.file.clone(),
                prefix: format!("{}{key}.", self.prefix),
                map: map.clone(),
            })),
            Some(_) => Err(self.error(key, "an object")),
        }
    }
}

const COUNT: &str = "a whole number from 1 to 2147483647";

fn read_count(value: &Value) -> Option<usize> {
    let count = i32::try_from(value.as_u64()?).ok()?;
    (count >= 1).then_some(count as usize)
}

fn read_whole(value: &Value) -> Option<usize> {
    Some(i32::try_from(value.as_u64()?).ok()? as usize)
}

fn read_positive(value: &Value) -> Option<f64> {
    value.as_f64().filter(|&x| x.is_finite() && x > 0.0)
}
