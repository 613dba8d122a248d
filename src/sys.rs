//! The C ABI as Rust sees it, made from `cuda/include/dspark.h` by bindgen.
//!
//! Types, constants and the public functions stand here; [`launch`] holds the same functions under the names the
//! kernel archive defines (`dspark_rms_norm_cu`). The public names are exported by `crate::capi`, which forwards to
//! the launchers; Rust code calls [`launch`] directly.

#![allow(missing_docs, non_camel_case_types, non_upper_case_globals)]
#![allow(clippy::all, clippy::pedantic)]

include!(concat!(env!("OUT_DIR"), "/dspark.rs"));

/// The launchers under the names of the kernel archive.
pub mod launch {
    include!(concat!(env!("OUT_DIR"), "/dspark_launch.rs"));
}
