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

/// What an e4m3 byte stands for.
pub fn e4m3(byte: u8) -> f32 {
    let mantissa = f32::from(byte & 7) / 8.0;
    let value = match byte >> 3 & 15 {
        0 => mantissa * 2.0_f32.powi(-6),
        exponent => (1.0 + mantissa) * 2.0_f32.powi(i32::from(exponent) - 7),
    };
    if byte & 0x80 == 0 { value } else { -value }
}

/// Panics with the launcher's message unless it succeeded.
pub fn check(status: sys::dspark_status) {
    if status != sys::DSPARK_OK {
        // SAFETY: a NUL-terminated string of this thread, good until the next call.
        let message = unsafe { CStr::from_ptr(sys::launch::dspark_last_error_cu()) };
        panic!("status {status}: {}", message.to_string_lossy());
    }
}
