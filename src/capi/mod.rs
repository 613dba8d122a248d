//! The C ABI under its public names.
//!
//! A `cdylib` hides what an archive defines, so every function of `cuda/include/dspark.h` is defined here and forwards to
//! the launcher of the same name with the suffix `_cu`. The contracts stand in the header. There is nothing in a
//! forward that could panic, so no unwinding has to be stopped here; the launchers are C++ compiled to throw nothing.
//!
//! The constant beside each function holds the exported function and the header's declaration in one array: a
//! signature that drifts from the header does not compile.

#![allow(clippy::missing_safety_doc)] // the contract blocks of the header are the safety sections

use std::ffi::c_char;

use crate::sys;

macro_rules! export {
    ($($(#[$doc:meta])* $name:ident => $launcher:ident($($arg:ident: $ty:ty),*) -> $ret:ty;)*) => {$(
        $(#[$doc])*
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $ty),*) -> $ret {
            // SAFETY: the caller keeps the header's contract, which is the launcher's.
            unsafe { sys::launch::$launcher($($arg),*) }
        }

        const _: [unsafe extern "C" fn($($ty),*) -> $ret; 2] = [sys::$name, $name];
    )*};
}

export! {
    /// "0.1.0".
    dspark_version => dspark_version_cu() -> *const c_char;
    /// The short name of a status.
    dspark_status_name => dspark_status_name_cu(status: sys::dspark_status) -> *const c_char;
    /// Message of this thread's last failed call.
    dspark_last_error => dspark_last_error_cu() -> *const c_char;
    /// RMSNorm, with or without a residual update.
    dspark_rms_norm => dspark_rms_norm_cu(params: *const sys::dspark_rms_norm_params, stream: sys::dspark_stream) -> sys::dspark_status;
    /// Rows by index, or a strided copy.
    dspark_gather_rows => dspark_gather_rows_cu(params: *const sys::dspark_gather_rows_params, stream: sys::dspark_stream) -> sys::dspark_status;
    /// SwiGLU's elementwise part.
    dspark_silu_mul => dspark_silu_mul_cu(params: *const sys::dspark_silu_mul_params, stream: sys::dspark_stream) -> sys::dspark_status;
    /// Per-head norms, RoPE and the append to the paged cache.
    dspark_qk_norm_rope_append => dspark_qk_norm_rope_append_cu(params: *const sys::dspark_qk_norm_rope_append_params, stream: sys::dspark_stream) -> sys::dspark_status;
    /// Workspace of both attentions.
    dspark_attention_workspace_size => dspark_attention_workspace_size_cu(params: *const sys::dspark_attention_params, bytes: *mut usize) -> sys::dspark_status;
    /// Causal attention of verification rows.
    dspark_verify_attention => dspark_verify_attention_cu(params: *const sys::dspark_attention_params, stream: sys::dspark_stream) -> sys::dspark_status;
    /// Attention of a draft block.
    dspark_draft_attention => dspark_draft_attention_cu(params: *const sys::dspark_attention_params, stream: sys::dspark_stream) -> sys::dspark_status;
    /// Moves the accepted rows of a tree together in the cache.
    dspark_commit_tree => dspark_commit_tree_cu(params: *const sys::dspark_commit_tree_params, stream: sys::dspark_stream) -> sys::dspark_status;
    /// Workspace of the head over the whole vocabulary.
    dspark_draft_full_workspace_size => dspark_draft_full_workspace_size_cu(params: *const sys::dspark_draft_full_params, bytes: *mut usize) -> sys::dspark_status;
    /// The head over the whole vocabulary, base logits only read.
    dspark_draft_full => dspark_draft_full_cu(params: *const sys::dspark_draft_full_params, stream: sys::dspark_stream) -> sys::dspark_status;
    /// What bounds the bias of each token.
    dspark_draft_bounds => dspark_draft_bounds_cu(params: *const sys::dspark_draft_bounds_params, stream: sys::dspark_stream) -> sys::dspark_status;
    /// Workspace of the head over a candidate set.
    dspark_draft_candidates_workspace_size => dspark_draft_candidates_workspace_size_cu(params: *const sys::dspark_draft_candidates_params, bytes: *mut usize) -> sys::dspark_status;
    /// The head over a candidate set.
    dspark_draft_candidates => dspark_draft_candidates_cu(params: *const sys::dspark_draft_candidates_params, stream: sys::dspark_stream) -> sys::dspark_status;
    /// Survival of drafts.
    dspark_survival => dspark_survival_cu(params: *const sys::dspark_survival_params, stream: sys::dspark_stream) -> sys::dspark_status;
    /// How many drafts of each request are verified.
    dspark_schedule => dspark_schedule_cu(params: *const sys::dspark_schedule_params, stream: sys::dspark_stream) -> sys::dspark_status;
    /// Workspace of acceptance.
    dspark_accept_workspace_size => dspark_accept_workspace_size_cu(params: *const sys::dspark_accept_params, bytes: *mut usize) -> sys::dspark_status;
    /// Target law and acceptance.
    dspark_accept => dspark_accept_cu(params: *const sys::dspark_accept_params, stream: sys::dspark_stream) -> sys::dspark_status;
    /// Accepted drafts become committed tokens.
    dspark_commit => dspark_commit_cu(params: *const sys::dspark_commit_params, stream: sys::dspark_stream) -> sys::dspark_status;
}
