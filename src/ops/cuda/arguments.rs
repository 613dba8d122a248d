//! Packing a call's host arrays into one upload.

use super::Cuda;
use crate::device::{Buffer, Growing};
use crate::error::Result;
use crate::ops::SamplingParams;

/// Host arrays of one call, as 32-bit words. Each array starts at a multiple of four words, so that 16-byte accesses
/// and 64-bit elements are aligned.
#[derive(Default)]
pub(super) struct Arguments {
    words: Vec<u32>,
}

/// Where an array of [`Arguments`] begins, in words.
#[derive(Clone, Copy, Default)]
pub(super) struct Offset(usize);

impl Offset {
    /// The device address of the array in `words`, where it was uploaded.
    pub fn of<T>(self, words: &Buffer<u32>) -> *const T {
        words.ptr(self.0).cast()
    }
}

/// An array that may be left out; it is NULL then.
#[derive(Clone, Copy, Default)]
pub(super) struct Optional(pub Option<Offset>);

impl Optional {
    /// As [`Offset::of`].
    pub fn of<T>(self, words: &Buffer<u32>) -> *const T {
        self.0.map_or(std::ptr::null(), |offset| offset.of(words))
    }
}

/// What the requests' filters take off their laws; an array that every request leaves off is not uploaded.
#[derive(Clone, Copy)]
pub(super) struct Filters {
    pub top_k: Optional,
    pub top_p: Optional,
    pub min_p: Optional,
}

impl Filters {
    pub fn pack(sampling: &[SamplingParams], arguments: &mut Arguments) -> Self {
        let top_k = sampling
            .iter()
            .any(|s| s.top_k > 0)
            .then(|| arguments.push(sampling.iter().map(|s| s.top_k.min(i32::MAX as u32))));
        Self {
            top_k: Optional(top_k),
            top_p: arguments.push_unless(sampling, 1.0, |s| s.top_p),
            min_p: arguments.push_unless(sampling, 0.0, |s| s.min_p),
        }
    }
}

impl Arguments {
    const ALIGN_WORDS: usize = 4;

    /// Adds an array of words.
    pub fn push(&mut self, words: impl IntoIterator<Item = u32>) -> Offset {
        let offset = self.words.len().next_multiple_of(Self::ALIGN_WORDS);
        self.words.resize(offset, 0);
        self.words.extend(words);
        Offset(offset)
    }

    /// Adds an array of 64-bit numbers, low word first.
    pub fn push_u64(&mut self, values: impl IntoIterator<Item = u64>) -> Offset {
        self.push(
            values
                .into_iter()
                .flat_map(|value| [value as u32, (value >> 32) as u32]),
        )
    }

    /// Adds an array of f32.
    pub fn push_f32(&mut self, values: impl IntoIterator<Item = f32>) -> Offset {
        self.push(values.into_iter().map(f32::to_bits))
    }

    /// Adds a number of each request, unless all of them are `off`.
    pub fn push_unless(
        &mut self,
        sampling: &[SamplingParams],
        off: f32,
        value: fn(&SamplingParams) -> f32,
    ) -> Optional {
        let on = sampling.iter().any(|s| value(s) != off);
        Optional(on.then(|| self.push_f32(sampling.iter().map(value))))
    }

    /// Uploads everything into `buffer` and returns it as it is then.
    pub fn upload<'a>(&self, buffer: &'a mut Growing<u32>) -> Result<&'a Buffer<u32>> {
        let buffer = buffer.at_least(self.words.len())?;
        buffer.upload(0, &self.words)?;
        Ok(buffer)
    }
}

impl Cuda {
    /// Uploads row indices.
    pub(super) fn upload_index(&mut self, index: &[u32]) -> Result<*const i32> {
        let mut arguments = Arguments::default();
        let offset = arguments.push(index.iter().copied());
        Ok(offset.of(arguments.upload(&mut self.arguments)?))
    }

    /// The first `len` words of the call's results, once the device has written them.
    pub(super) fn download_results(&self, len: usize) -> Result<Vec<u32>> {
        let mut words = vec![0; len];
        self.results.get().download(0, &mut words)?;
        Ok(words)
    }
}
