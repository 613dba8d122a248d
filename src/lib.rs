//! `dspark`: CUDA kernels and a thin runtime for DSpark speculative decoding.
//!
//! One decode round drafts `draft_len` tokens semi-autoregressively, scores each with a confidence, decides how many
//! to verify, verifies them in one ragged target pass, accepts a prefix without changing the target's law and commits.
//! The round is written once ([`step`]) over the [`ops::Ops`] trait; two backends implement it: hand-written CUDA
//! kernels (`ops::cuda`, feature `cuda`) and plain Rust ([`mod@reference`]).
//!
//! Layers, from the outside in; imports go one way:
//! `capi, bin -> engine -> step -> {model, kv, schedule} -> ops -> device -> sys`.

pub mod engine;
pub mod error;
pub mod kv;
pub mod model;
pub mod ops;
pub mod reference;
pub mod schedule;
pub mod step;

#[cfg(feature = "cuda")]
pub mod capi;
#[cfg(feature = "cuda")]
pub mod device;
#[cfg(feature = "cuda")]
pub mod sys;

pub use error::{Error, Result};

/// Whether a CUDA device can be opened in this build on this machine.
pub fn device_is_available() -> bool {
    #[cfg(feature = "cuda")]
    return device::Device::count() > 0;
    #[cfg(not(feature = "cuda"))]
    false
}
