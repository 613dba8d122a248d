//! Device memory with a checked length.

use cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr};

use super::{Device, driver};
use crate::error::{Error, Result};

/// `len` elements of device memory, 256-byte aligned, freed in stream order.
#[derive(Debug)]
pub struct Buffer<T> {
    memory: CudaSlice<T>,
    len: usize,
    device: Device,
}

impl<T: DeviceRepr + Copy> Buffer<T> {
    /// Memory of `len` elements, every byte zero.
    ///
    /// # Errors
    /// [`Error::Cuda`] when there is not enough; [`Error::Unsupported`] during capture.
    pub fn zeros(device: &Device, len: usize) -> Result<Self> {
        let mut buffer = Self::uninit(device, len)?;
        buffer.fill_bytes(0)?;
        Ok(buffer)
    }

    /// Memory that the caller fills before anything reads it.
    pub(crate) fn uninit(device: &Device, len: usize) -> Result<Self> {
        device.refuse_in_capture("allocation")?;
        // The driver refuses empty allocations.
        // SAFETY: kernels and copies write what they and others read: the callers' buffers are outputs, workspaces or
        // filled by the next statement.
        let memory = unsafe { device.stream.alloc::<T>(len.max(1)) }.map_err(driver)?;
        Ok(Self {
            memory,
            len,
            device: device.clone(),
        })
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies `values` to elements `offset ..`.
    ///
    /// # Errors
    /// [`Error::Argument`] past the end; [`Error::Unsupported`] during capture; [`Error::Cuda`].
    pub fn upload(&mut self, offset: usize, values: &[T]) -> Result<()> {
        self.check_range("upload", offset, values.len())?;
        self.device.refuse_in_capture("upload")?;
        if values.is_empty() {
            return Ok(());
        }
        let mut window = self.memory.slice_mut(offset..offset + values.len());
        // Pageable memory is staged before the call returns, so `values` may go away.
        self.device
            .stream
            .memcpy_htod(values, &mut window)
            .map_err(driver)
    }

    /// Waits for the stream and copies elements `offset .. offset + values.len()` to the host.
    ///
    /// # Errors
    /// As [`Buffer::upload`], and failures of earlier work.
    pub fn download(&self, offset: usize, values: &mut [T]) -> Result<()> {
        self.check_range("download", offset, values.len())?;
        self.device.refuse_in_capture("download")?;
        if !values.is_empty() {
            let window = self.memory.slice(offset..offset + values.len());
            self.device
                .stream
                .memcpy_dtoh(&window, values)
                .map_err(driver)?;
        }
        self.device.synchronize()
    }

    /// Sets every byte.
    fn fill_bytes(&mut self, byte: u8) -> Result<()> {
        self.device.bind()?;
        let bytes = self.len * size_of::<T>();
        // SAFETY: the range is this buffer's own allocation, and the stream orders the write among its other uses.
        unsafe {
            cudarc::driver::result::memset_d8_async(
                self.address(0),
                byte,
                bytes,
                self.device.raw_stream(),
            )
        }
        .map_err(driver)
    }

    /// The device address of element `offset`, for a launcher; good while the buffer lives.
    ///
    /// # Panics
    /// `offset` past the end.
    pub fn ptr(&self, offset: usize) -> *const T {
        self.address(offset) as *const T
    }

    /// The device address of element `offset`, for a launcher that writes there; good while the buffer lives.
    ///
    /// # Panics
    /// `offset` past the end.
    pub fn mut_ptr(&mut self, offset: usize) -> *mut T {
        self.address(offset) as *mut T
    }

    fn address(&self, offset: usize) -> u64 {
        assert!(offset <= self.len, "offset {offset} in {}", self.len);
        // Nothing to synchronise: event tracking is off and there is one stream.
        let (base, _sync) = self.memory.device_ptr(&self.device.stream);
        base + (offset * size_of::<T>()) as u64
    }

    fn check_range(&self, what: &str, offset: usize, len: usize) -> Result<()> {
        if offset.checked_add(len).is_some_and(|end| end <= self.len) {
            return Ok(());
        }
        let expected = format!("a range in 0..{}", self.len);
        Err(Error::argument(
            what,
            expected,
            format!("{len} elements at {offset}"),
        ))
    }
}

/// A buffer that is replaced by a larger one when more is asked of it; contents do not survive that.
#[derive(Debug)]
pub struct Growing<T> {
    buffer: Buffer<T>,
}

impl<T: DeviceRepr + Copy> Growing<T> {
    /// Starts with `len` elements.
    ///
    /// # Errors
    /// As [`Buffer::zeros`].
    pub fn new(device: &Device, len: usize) -> Result<Self> {
        Ok(Self {
            buffer: Buffer::zeros(device, len)?,
        })
    }

    /// The buffer, with at least `len` elements. The old memory is freed behind the work that uses it.
    ///
    /// # Errors
    /// As [`Buffer::zeros`]; during capture when it would have to grow.
    pub fn at_least(&mut self, len: usize) -> Result<&mut Buffer<T>> {
        if len > self.buffer.len() {
            let device = self.buffer.device.clone();
            self.buffer = Buffer::uninit(&device, len.next_power_of_two())?;
        }
        Ok(&mut self.buffer)
    }

    /// The buffer as it is.
    pub fn get(&self) -> &Buffer<T> {
        &self.buffer
    }
}
