//! What NVIDIA's management library says about the machine's GPUs, for people.

use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::Clock;
use nvml_wrapper::error::NvmlError;

use crate::error::{Error, Result};

/// One GPU of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceReport {
    /// NVML's index; may differ from the CUDA ordinal under `CUDA_VISIBLE_DEVICES`.
    pub index: u32,
    /// "NVIDIA H100 80GB HBM3".
    pub name: String,
    /// Driver version, "580.65.06".
    pub driver_version: String,
    /// CUDA version the driver supports, (13, 0).
    pub cuda_version: (i32, i32),
    /// (9, 0) for Hopper.
    pub compute_capability: (i32, i32),
    /// Bytes.
    pub memory_total_bytes: u64,
    /// Bytes.
    pub memory_free_bytes: u64,
    /// Current SM clock in MHz, if it can be read.
    pub sm_clock_mhz: Option<u32>,
    /// Highest SM clock in MHz, if it can be read.
    pub max_sm_clock_mhz: Option<u32>,
    /// Current memory clock in MHz, if it can be read.
    pub memory_clock_mhz: Option<u32>,
}

/// All GPUs of the machine.
///
/// # Errors
/// [`Error::Unsupported`] without NVIDIA's management library; [`Error::Cuda`] when it fails.
pub fn reports() -> Result<Vec<DeviceReport>> {
    let nvml = Nvml::init().map_err(|error| Error::Unsupported {
        what: "the device report".into(),
        reason: format!("NVIDIA's management library: {error}"),
    })?;
    let count = nvml.device_count().map_err(management)?;
    (0..count)
        .map(|index| report(&nvml, index).map_err(management))
        .collect()
}

fn report(nvml: &Nvml, index: u32) -> std::result::Result<DeviceReport, NvmlError> {
    let device = nvml.device_by_index(index)?;
    let cuda = nvml.sys_cuda_driver_version()?;
    let capability = device.cuda_compute_capability()?;
    let memory = device.memory_info()?;
    Ok(DeviceReport {
        index,
        name: device.name()?,
        driver_version: nvml.sys_driver_version()?,
        cuda_version: (
            nvml_wrapper::cuda_driver_version_major(cuda),
            nvml_wrapper::cuda_driver_version_minor(cuda),
        ),
        compute_capability: (capability.major, capability.minor),
        memory_total_bytes: memory.total,
        memory_free_bytes: memory.free,
        sm_clock_mhz: device.clock_info(Clock::SM).ok(),
        max_sm_clock_mhz: device.max_clock_info(Clock::SM).ok(),
        memory_clock_mhz: device.clock_info(Clock::Memory).ok(),
    })
}

#[allow(clippy::needless_pass_by_value)] // the shape `map_err` wants
fn management(error: NvmlError) -> Error {
    Error::Cuda(format!("device report: {error}"))
}
