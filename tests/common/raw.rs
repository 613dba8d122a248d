//! For tests that call a launcher themselves.

use std::ffi::CStr;

use cudarc::driver::DeviceRepr;
use dspark::device::{Buffer, Device};
use dspark::sys;
use half::bf16;

/// The first GPU, or a skip, as [`super::gpu`].
pub fn device() -> Option<Device> {
    super::gpu().map(|_| Device::open(0).expect("opened a moment ago"))
}

pub fn upload<T: DeviceRepr + Copy>(device: &Device, values: &[T]) -> Buffer<T> {
    let mut buffer = Buffer::zeros(device, values.len()).expect("memory");
    buffer.upload(0, values).expect("room for all");
    buffer
}

pub fn download<T: DeviceRepr + Copy + Default>(buffer: &Buffer<T>) -> Vec<T> {
    let mut values = vec![T::default(); buffer.len()];
    buffer.download(0, &mut values).expect("as long");
    values
}

pub fn rounded(values: &[f32]) -> Vec<bf16> {
    values.iter().copied().map(bf16::from_f32).collect()
}

/// Panics with the launcher's message unless it succeeded.
pub fn check(status: sys::dspark_status) {
    if status != sys::DSPARK_OK {
        // SAFETY: a NUL-terminated string of this thread, good until the next call.
        let message = unsafe { CStr::from_ptr(sys::launch::dspark_last_error_cu()) };
        panic!("status {status}: {}", message.to_string_lossy());
    }
}

/// Params of [`draft_full`] that name nothing yet, in bf16.
pub fn empty_full() -> sys::dspark_draft_full_params {
    // SAFETY: numbers and pointers, for all of which zero is a value.
    let empty: sys::dspark_draft_full_params = unsafe { std::mem::zeroed() };
    sys::dspark_draft_full_params {
        struct_size: size_of::<sys::dspark_draft_full_params>() as u32,
        dtype: sys::DSPARK_DTYPE_BF16,
        logits_dtype: sys::DSPARK_DTYPE_BF16,
        w2_dtype: sys::DSPARK_DTYPE_BF16,
        ..empty
    }
}

/// Runs the head over the whole vocabulary with a workspace of its own; every pointer is one into a live buffer of the
/// shape that the params say.
pub fn draft_full(device: &Device, mut params: sys::dspark_draft_full_params) {
    // SAFETY: reads the sizes of `params` and writes one host integer.
    check(unsafe {
        sys::launch::dspark_draft_full_workspace_size_cu(
            &raw const params,
            &raw mut params.workspace_bytes,
        )
    });
    let mut workspace = upload(device, &vec![0xFF_u8; params.workspace_bytes]);
    params.workspace = workspace.mut_ptr(0).cast();
    device.bind().unwrap();
    // SAFETY: the caller's promise.
    check(unsafe {
        sys::launch::dspark_draft_full_cu(&raw const params, device.raw_stream().cast())
    });
    device.synchronize().unwrap(); // the workspace goes
}
