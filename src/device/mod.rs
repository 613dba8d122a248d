//! The CUDA device under the backend: context, one stream, buffers, graphs, timing and cuBLASLt products.
//!
//! A thin layer over `cudarc`, which loads the driver and cuBLASLt at run time: nothing here panics or fails to start
//! where they are missing, [`Device::open`] and [`Gemm::new`] say so instead. All work goes to the device's one stream,
//! in the order of the calls, so that no event is needed between them; cudarc's own event tracking is off because it
//! would be hidden work inside a capture.

mod buffer;
mod gemm;
mod graph;
mod library;
mod report;

use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute;
use cudarc::driver::{CudaContext, CudaStream, DriverError, sys};

pub use buffer::{Buffer, Growing};
pub use gemm::{Gemm, GemmOut};
pub use graph::{Graph, Stopwatch};
pub use report::{DeviceReport, reports};

use crate::error::{Error, Result};

/// The oldest architecture the kernels are built for.
const MIN_COMPUTE_CAPABILITY: (i32, i32) = (8, 0);

/// A CUDA device with the one stream that all work of its users goes to. Clones share both.
#[derive(Clone, Debug)]
pub struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
}

impl Device {
    /// Devices that can be opened; 0 where there is no driver or no GPU.
    pub fn count() -> usize {
        // SAFETY: probing for a shared library runs only that library's own initialisers.
        if !unsafe { sys::is_culib_present() } {
            return 0;
        }
        cudarc::driver::result::init()
            .and_then(|()| CudaContext::device_count())
            .map_or(0, |count| usize::try_from(count).unwrap_or(0))
    }

    /// Opens device `ordinal` with a stream of its own.
    ///
    /// # Errors
    /// [`Error::Unsupported`] without a driver, such a device or a recent enough one; [`Error::Cuda`] when the driver
    /// fails.
    pub fn open(ordinal: usize) -> Result<Self> {
        let context = open_context(ordinal)?;
        let stream = context.new_stream().map_err(driver)?;
        Ok(Self { context, stream })
    }

    /// Opens device `ordinal` on a stream of the caller's.
    ///
    /// # Safety
    /// `stream` is a stream of the device's primary context and outlives the device, everything made from it and all
    /// work enqueued through it. Ordering with the owner's other streams is the owner's affair.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub unsafe fn open_on_stream(ordinal: usize, stream: sys::CUstream) -> Result<Self> {
        let context = open_context(ordinal)?;
        // SAFETY: the caller's promise is the one asked for here.
        let stream = unsafe { context.wrap_borrowed_stream(stream) };
        Ok(Self { context, stream })
    }

    /// Index of the device.
    pub fn ordinal(&self) -> usize {
        self.context.ordinal()
    }

    /// Marketing name, "NVIDIA H100 80GB HBM3".
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn name(&self) -> Result<String> {
        self.context.name().map_err(driver)
    }

    /// Waits for everything enqueued.
    ///
    /// # Errors
    /// [`Error::Cuda`], also for a failure of work enqueued earlier.
    pub fn synchronize(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(driver)?;
        self.stream.synchronize().map_err(driver)?;
        self.context.check_err().map_err(driver)
    }

    /// Makes the device's context current on this thread, as the launchers need it.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(driver)
    }

    /// The raw stream, for launchers; good while the device or a clone of it lives.
    pub fn raw_stream(&self) -> sys::CUstream {
        self.stream.cu_stream()
    }

    /// Refuses what must not be recorded into a graph: transfers from host memory that may be gone at replay, waits and
    /// allocations.
    fn refuse_in_capture(&self, what: &str) -> Result<()> {
        match self.stream.capture_status().map_err(driver)? {
            sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE => Ok(()),
            _ => Err(Error::Unsupported {
                what: format!("{what} during stream capture"),
                reason: "a graph can only hold work on device memory that exists already".into(),
            }),
        }
    }
}

fn open_context(ordinal: usize) -> Result<Arc<CudaContext>> {
    let unsupported = |reason: String| Error::Unsupported {
        what: format!("CUDA device {ordinal}"),
        reason,
    };
    let count = Device::count();
    if ordinal >= count {
        return Err(unsupported(format!(
            "this machine has {count} CUDA devices with a working driver"
        )));
    }
    let context = CudaContext::new(ordinal).map_err(driver)?;
    let capability = context.compute_capability().map_err(driver)?;
    if capability < MIN_COMPUTE_CAPABILITY {
        let (major, minor) = capability;
        return Err(unsupported(format!(
            "compute capability {major}.{minor}; the kernels need 8.0 or later"
        )));
    }
    let pools = context
        .attribute(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)
        .map_err(driver)?;
    if pools == 0 {
        return Err(unsupported("it has no stream-ordered memory pools".into()));
    }
    // SAFETY: every buffer of a `Device` is allocated, used and freed on that device's one stream, so that stream order
    // is all the synchronisation there is to do.
    unsafe { context.disable_event_tracking() };
    Ok(context)
}

/// A driver failure as the library's error.
#[allow(clippy::needless_pass_by_value)] // the shape `map_err` wants
fn driver(error: DriverError) -> Error {
    Error::Cuda(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_refused_by_number() {
        let message = Device::open(4096).unwrap_err().to_string();
        assert!(message.contains("CUDA device 4096"), "{message}");
    }

    #[test]
    fn the_report_never_panics() {
        if let Err(error) = reports() {
            assert!(matches!(error, Error::Unsupported { .. } | Error::Cuda(_)));
        }
    }
}
