//! CUDA graphs and timing by events.

use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaEvent, CudaGraph};

use super::{Device, driver};
use crate::error::{Error, Result};

/// Work recorded once and launched many times.
pub struct Graph {
    graph: CudaGraph,
}

impl Graph {
    /// Records what `work` enqueues on the device's stream; nothing of it runs yet.
    ///
    /// # Errors
    /// `work`'s own, after ending the capture; [`Error::Cuda`] when the recording is no graph.
    pub fn capture(device: &Device, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let stream = &device.stream;
        stream
            .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .map_err(driver)?;
        let worked = work();
        let ended = stream
            .end_capture(CUgraphInstantiate_flags(0))
            .map_err(driver);
        worked?;
        match ended? {
            Some(graph) => Ok(Self { graph }),
            None => Err(Error::Cuda("the capture recorded no graph".into())),
        }
    }

    /// Enqueues the recorded work.
    ///
    /// # Safety
    /// Every buffer the recorded work touches still exists and is not borrowed in a way that the work contradicts.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub unsafe fn launch(&self) -> Result<()> {
        self.graph.launch().map_err(driver)
    }
}

/// Device time between two points of the stream.
#[derive(Debug)]
pub struct Stopwatch {
    start: CudaEvent,
    stop: CudaEvent,
    device: Device,
}

impl Stopwatch {
    /// A stopwatch, already started.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn start(device: &Device) -> Result<Self> {
        let event = || {
            let flags = Some(CUevent_flags::CU_EVENT_DEFAULT);
            device.context.new_event(flags).map_err(driver)
        };
        let watch = Self {
            start: event()?,
            stop: event()?,
            device: device.clone(),
        };
        watch.restart()?;
        Ok(watch)
    }

    /// Marks the beginning here.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn restart(&self) -> Result<()> {
        self.start.record(&self.device.stream).map_err(driver)
    }

    /// Marks the end here, waits for it and returns the milliseconds since the beginning.
    ///
    /// # Errors
    /// [`Error::Cuda`].
    pub fn stop_ms(&self) -> Result<f32> {
        self.stop.record(&self.device.stream).map_err(driver)?;
        self.stop.synchronize().map_err(driver)?;
        self.start.elapsed_ms(&self.stop).map_err(driver)
    }
}
