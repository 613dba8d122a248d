//! A file's bytes without reading them: the memory map that weights are uploaded from.

use std::fs::File;
use std::ops::Deref;
use std::path::Path;

use crate::error::{Error, Result};

/// A read-only memory map of a whole file.
pub struct MappedFile(memmap2::Mmap);

impl MappedFile {
    /// Maps `path`. The file must not be truncated while the map lives: the system then ends the process.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be opened or mapped (an empty file maps to no bytes).
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        // SAFETY: the map is read-only and `u8` has no invalid values, so whatever another process writes to the file
        // stays a valid `[u8]`; every reader here checks lengths before it slices. What cannot be excluded is a
        // file that shrinks under the map (SIGBUS), which is said above.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        Ok(Self(map))
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
