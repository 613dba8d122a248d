//! How a kernel is timed.
//!
//! A case is one call of a launcher. It is captured `copies` times into one CUDA graph, each call on buffers of its
//! own, so many that a replay moves at least three times the L2: every call finds its inputs cold, as in a decode step
//! between whose calls gigabytes of weights pass. CUDA events stand around a replay; another replay runs before it, so
//! that the host's launch is done when the clock starts. The time of a case is the median over the replays divided by
//! the calls; its noise is half the distance between the 10th and the 90th percentile.

use std::ffi::CStr;

use anyhow::Context;
use cudarc::driver::DeviceRepr;
use cudarc::driver::result;
use cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE;
use dspark::Error;
use dspark::device::{Buffer, Device, Graph, Stopwatch};
use dspark::sys;
use half::bf16;

use crate::random::Random;
use crate::{Options, Report};

/// Graphs beyond this many calls gain nothing but set-up time.
const MAX_COPIES: usize = 8192;
const WARM_UPS: u32 = 3;
/// Random numbers made on the host; longer tensors repeat them. 16 MiB in f32, no multiple of a tensor's row.
const PATTERN_LEN: usize = (4 << 20) + 4096;
const CEILING_BYTES: usize = 2 << 30;
/// Row width of the copying kernel: what one of its CTAs moves.
const COPY_COLS: usize = 2048;

/// A call to be timed, with the buffers it works on.
pub trait Work {
    /// Enqueues the call on the buffers of `copy`. Allocates nothing once it has run for copy 0.
    fn enqueue(&mut self, copy: usize) -> dspark::Result<()>;

    /// Looks at the results of a finished run: an error when they cannot be right, else what a reader should know.
    fn inspect(&mut self) -> anyhow::Result<Option<String>> {
        Ok(None)
    }
}

/// What a call moves.
#[derive(Clone, Copy)]
pub struct Traffic {
    /// The floor: every input read once, every output written once.
    pub bytes: usize,
    /// Bytes of distinct memory touched, which decide how many copies make the L2 cold.
    pub footprint: usize,
}

impl Traffic {
    /// A call that touches every byte once.
    pub fn once(bytes: usize) -> Self {
        Self {
            bytes,
            footprint: bytes,
        }
    }
}

/// Time of one call.
#[derive(Clone, Copy)]
pub struct Timing {
    /// Median in microseconds.
    pub us: f64,
    /// Half the distance from the 10th to the 90th percentile, relative to the median.
    pub noise: f64,
}

/// The GPU, the random numbers and the report of this run.
pub struct Lab {
    pub device: Device,
    pub report: Report,
    pub random: Random,
    pattern: Vec<f32>,
    l2_bytes: usize,
    replays: u32,
    once: bool,
    case: Option<String>,
}

impl Lab {
    /// Measures the ceiling and opens the report.
    pub fn new(device: Device, options: &Options) -> anyhow::Result<Self> {
        device.bind()?;
        let mut random = Random::new(20_261_122);
        let l2_bytes = l2_bytes(device.ordinal())?;
        let mut lab = Self {
            pattern: random.normals(PATTERN_LEN),
            random,
            l2_bytes,
            replays: options.replays,
            once: options.once,
            case: options.case.clone(),
            report: Report::default(),
            device,
        };
        let ceiling = lab.copy_gb_per_s().context("device copy")?;
        lab.report = Report::open(&lab.device, ceiling, l2_bytes, options.replays)?;
        Ok(lab)
    }

    /// Times one call and reports it, unless the command line left it out. `prepare` makes the buffers for a number of
    /// copies.
    pub fn case<W: Work>(
        &mut self,
        name: &str,
        traffic: Traffic,
        prepare: impl FnOnce(&mut Self, usize) -> anyhow::Result<W>,
    ) -> anyhow::Result<()> {
        if self.case.as_ref().is_some_and(|part| !name.contains(part)) {
            return Ok(());
        }
        let measured = self.measure(traffic, prepare);
        if let Some((timing, note)) = measured.with_context(|| name.to_owned())? {
            self.report.add(name, traffic.bytes, timing, note);
        }
        Ok(())
    }

    /// Nothing when this run is for a profiler.
    fn measure<W: Work>(
        &mut self,
        traffic: Traffic,
        prepare: impl FnOnce(&mut Self, usize) -> anyhow::Result<W>,
    ) -> anyhow::Result<Option<(Timing, Option<String>)>> {
        let copies = if self.once {
            1
        } else {
            self.copies(traffic.footprint)
        };
        let mut work = prepare(self, copies)?;
        work.enqueue(0)?;
        self.device.synchronize()?;
        if self.once {
            return work.inspect().map(|_| None);
        }
        let timing = self.time(copies, &mut work)?;
        Ok(Some((timing, work.inspect()?)))
    }

    /// Calls whose buffers are together three times the L2.
    fn copies(&self, footprint: usize) -> usize {
        (3 * self.l2_bytes)
            .div_ceil(footprint.max(1))
            .clamp(1, MAX_COPIES)
    }

    /// `work` has run for copy 0: its kernels are loaded and its plans made, which a capture could not hold.
    fn time(&self, copies: usize, work: &mut dyn Work) -> dspark::Result<Timing> {
        let graph = Graph::capture(&self.device, || {
            (0..copies).try_for_each(|copy| work.enqueue(copy))
        })?;
        let replay = || {
            // SAFETY: `work` owns the buffers of the recorded calls and is borrowed until the last replay is over.
            unsafe { graph.launch() }
        };
        for _ in 0..WARM_UPS {
            replay()?;
        }
        let watch = Stopwatch::start(&self.device)?;
        let mut times = Vec::with_capacity(self.replays as usize);
        for _ in 0..self.replays {
            replay()?;
            watch.restart()?;
            replay()?;
            times.push(f64::from(watch.stop_ms()?) * 1e3 / copies as f64);
        }
        times.sort_by(f64::total_cmp);
        let at = |fraction: f64| times[((times.len() - 1) as f64 * fraction).round() as usize];
        Ok(Timing {
            us: at(0.5),
            noise: (at(0.9) - at(0.1)) / 2.0 / at(0.5),
        })
    }

    /// Bytes read and written each second by a device-to-device copy: the faster of the driver's and of a plain
    /// copying kernel, since the driver's falls behind on some sizes.
    fn copy_gb_per_s(&mut self) -> anyhow::Result<f64> {
        let mut best: f64 = 0.0;
        for with_kernel in [false, true] {
            let mut work = DeviceCopy {
                from: self.normal_f32(CEILING_BYTES / size_of::<f32>(), 1.0)?,
                to: self.empty(CEILING_BYTES / size_of::<f32>())?,
                device: self.device.clone(),
                with_kernel,
            };
            work.enqueue(0)?;
            let timing = self.time(1, &mut work)?;
            best = best.max(2.0 * CEILING_BYTES as f64 / timing.us / 1e3);
        }
        Ok(best)
    }

    /// Device memory for outputs.
    pub fn empty<T: DeviceRepr + Copy>(&self, len: usize) -> dspark::Result<Buffer<T>> {
        // No driver call takes an empty range.
        Buffer::zeros(&self.device, len.max(1))
    }

    /// Device memory with these values.
    pub fn upload<T: DeviceRepr + Copy>(&self, values: &[T]) -> dspark::Result<Buffer<T>> {
        let mut buffer = Buffer::zeros(&self.device, values.len())?;
        buffer.upload(0, values)?;
        Ok(buffer)
    }

    /// Normal numbers of deviation `scale`.
    pub fn normal_f32(&mut self, len: usize, scale: f32) -> dspark::Result<Buffer<f32>> {
        let pattern: Vec<f32> = self.window(len).iter().map(|x| x * scale).collect();
        self.tiled(len, &pattern)
    }

    /// Normal numbers of deviation `scale`, rounded to bf16.
    pub fn normal_bf16(&mut self, len: usize, scale: f32) -> dspark::Result<Buffer<bf16>> {
        let pattern: Vec<bf16> = self
            .window(len)
            .iter()
            .map(|x| bf16::from_f32(x * scale))
            .collect();
        self.tiled(len, &pattern)
    }

    /// `len` elements (or all there are) of the random numbers, from somewhere.
    fn window(&mut self, len: usize) -> &[f32] {
        let len = len.min(PATTERN_LEN);
        let start = self.random.below(PATTERN_LEN - len + 1);
        &self.pattern[start..start + len]
    }

    /// `pattern` over and over up to `len` elements. The copies run on the device.
    pub fn tiled<T: DeviceRepr + Copy>(
        &self,
        len: usize,
        pattern: &[T],
    ) -> dspark::Result<Buffer<T>> {
        let mut buffer = Buffer::zeros(&self.device, len)?;
        let mut filled = pattern.len().min(len);
        buffer.upload(0, &pattern[..filled])?;
        while filled < len {
            let count = filled.min(len - filled);
            let to = buffer.mut_ptr(filled);
            copy_async(&self.device, to, buffer.ptr(0), count)?;
            filled += count;
        }
        Ok(buffer)
    }

    /// The stream as the launchers take it.
    pub fn stream(&self) -> sys::dspark_stream {
        self.device.raw_stream().cast()
    }
}

struct DeviceCopy {
    from: Buffer<f32>,
    to: Buffer<f32>,
    device: Device,
    with_kernel: bool,
}

impl Work for DeviceCopy {
    fn enqueue(&mut self, _copy: usize) -> dspark::Result<()> {
        let (to, from) = (self.to.mut_ptr(0), self.from.ptr(0));
        if !self.with_kernel {
            return copy_async(&self.device, to, from, self.from.len());
        }
        let num_rows = (self.from.len() / COPY_COLS) as i32;
        let params = sys::dspark_gather_rows_params {
            struct_size: struct_size::<sys::dspark_gather_rows_params>(),
            dtype: sys::DSPARK_DTYPE_F32,
            num_rows,
            num_cols: COPY_COLS as i32,
            num_src_rows: num_rows,
            src: from.cast(),
            index: std::ptr::null(),
            out: to.cast(),
            stride_src_row: COPY_COLS as i64,
            stride_out_row: COPY_COLS as i64,
        };
        let stream = self.device.raw_stream().cast();
        // SAFETY: both buffers hold `num_rows * COPY_COLS` elements.
        check(unsafe { sys::launch::dspark_gather_rows_cu(&raw const params, stream) })
    }
}

/// Copies `len` elements between two windows of device memory that do not overlap.
fn copy_async<T>(device: &Device, to: *mut T, from: *const T, len: usize) -> dspark::Result<()> {
    let bytes = len * size_of::<T>();
    // SAFETY: both callers pass windows of live buffers with room for `len` elements each, used on this stream only.
    unsafe { result::memcpy_dtod_async(to as u64, from as u64, bytes, device.raw_stream()) }
        .map_err(|error| Error::Cuda(error.to_string()))
}

fn l2_bytes(ordinal: usize) -> anyhow::Result<usize> {
    let device = result::device::get(i32::try_from(ordinal)?)?;
    // SAFETY: the device was just returned by the driver.
    let bytes = unsafe { result::device::get_attribute(device, CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE) };
    Ok(usize::try_from(bytes?)?)
}

/// Refuses the first `len` elements of an output that are all zero, not finite, or larger on average than random inputs
/// can make them.
pub fn inspect_output<T>(output: &Buffer<T>, len: usize) -> anyhow::Result<()>
where
    T: DeviceRepr + Copy + Default + Into<f32>,
{
    const LARGEST_MEAN: f32 = 1e3;
    let mut values = vec![T::default(); len];
    output.download(0, &mut values)?;
    let sum: f32 = values.iter().map(|&value| value.into().abs()).sum();
    let mean = sum / len as f32;
    anyhow::ensure!(
        mean > 0.0 && mean < LARGEST_MEAN,
        "output: expected a mean magnitude in (0, {LARGEST_MEAN}), found {mean}"
    );
    Ok(())
}

/// A launcher's status as a result.
pub fn check(status: sys::dspark_status) -> dspark::Result<()> {
    if status == sys::DSPARK_OK {
        return Ok(());
    }
    // SAFETY: a NUL-terminated string that stays valid until this thread's next call.
    let message = unsafe { CStr::from_ptr(sys::launch::dspark_last_error_cu()) };
    Err(Error::Cuda(message.to_string_lossy().into_owned()))
}

/// The first member of every params struct.
pub fn struct_size<T>() -> u32 {
    size_of::<T>() as u32
}
