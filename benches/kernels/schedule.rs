//! How many drafts of each request are verified: calibration, survivals, ranking, search and lengths in one launch.
//!
//! The floor of bytes is tiny (4 for each draft, 4 for each price, 4 for each request): what counts is the time.

use dspark::device::Buffer;
use dspark::sys;

use crate::lab::{Lab, Traffic, Work, check, struct_size};

const SHAPES: [(usize, usize); 8] = [
    (1, 7),
    (8, 7),
    (32, 7),
    (128, 7),
    (256, 7),
    (512, 7),
    (1024, 7),
    (1024, 16),
];

const RULES: [(&str, i32); 3] = [
    ("algorithm1", sys::DSPARK_SCHEDULE_FIRST_FALL),
    ("delayed", sys::DSPARK_SCHEDULE_CAPACITY),
    ("global", sys::DSPARK_SCHEDULE_BEST),
];

/// All cases.
pub fn run(lab: &mut Lab) -> anyhow::Result<()> {
    for (num_reqs, draft_len) in SHAPES {
        for (name, rule) in RULES {
            let num_drafts = num_reqs * draft_len;
            let bytes = 4 * (2 * num_drafts + 1 + draft_len + 2 * num_reqs);
            let name = format!("reqs={num_reqs} drafts={draft_len} {name}");
            lab.case(&name, Traffic::once(bytes), |lab, copies| {
                Schedule::new(lab, copies, num_reqs, draft_len, rule)
            })?;
        }
    }
    Ok(())
}

struct Schedule {
    stream: sys::dspark_stream,
    num_reqs: usize,
    draft_len: usize,
    rule: i32,
    confidence: Buffer<f32>,
    temperature: Buffer<f32>,
    ticks: Buffer<u32>,
    capacity: Buffer<i32>,
    best: Buffer<i32>,
    verify_lens: Buffer<i32>,
}

impl Schedule {
    fn new(
        lab: &mut Lab,
        copies: usize,
        num_reqs: usize,
        draft_len: usize,
        rule: i32,
    ) -> anyhow::Result<Self> {
        let num_drafts = num_reqs * draft_len;
        let mut uniform = || lab.random.below(1 << 16) as f32 / 65_536.0;
        let confidence: Vec<f32> = (0..copies * num_drafts).map(|_| uniform().sqrt()).collect();
        let temperature: Vec<f32> = (0..draft_len).map(|_| 0.5 + uniform()).collect();
        // A step of all drafts costs twice that of none.
        let price = |n: usize| ((1 << 29) + (1 << 29) / num_drafts * n) as u32;
        let ticks: Vec<u32> = (0..=num_drafts).map(price).collect();
        Ok(Self {
            stream: lab.stream(),
            num_reqs,
            draft_len,
            rule,
            confidence: lab.upload(&confidence)?,
            temperature: lab.upload(&temperature)?,
            ticks: lab.upload(&ticks.repeat(copies))?,
            capacity: lab.upload(&[(num_drafts / 2) as i32, num_reqs as i32])?,
            best: lab.upload(&vec![-1; 2 * copies])?,
            verify_lens: lab.upload(&vec![-1; copies * num_reqs])?,
        })
    }
}

impl Work for Schedule {
    fn enqueue(&mut self, copy: usize) -> dspark::Result<()> {
        let num_drafts = self.num_reqs * self.draft_len;
        let params = sys::dspark_schedule_params {
            struct_size: struct_size::<sys::dspark_schedule_params>(),
            num_reqs: self.num_reqs as i32,
            draft_len: self.draft_len as i32,
            rule: self.rule,
            confidence: self.confidence.ptr(copy * num_drafts),
            temperature: self.temperature.ptr(0),
            limits: std::ptr::null(),
            num_live: std::ptr::null(),
            ticks: self.ticks.ptr(copy * (num_drafts + 1)),
            capacity: self.capacity.ptr(0),
            best: self.best.mut_ptr(2 * copy),
            verify_lens: self.verify_lens.mut_ptr(copy * self.num_reqs),
        };
        // SAFETY: every pointer is a window of a live buffer with the shape the params say, or null where that is
        // allowed.
        check(unsafe { sys::launch::dspark_schedule_cu(&raw const params, self.stream) })
    }

    fn inspect(&mut self) -> anyhow::Result<Option<String>> {
        let mut lens = vec![0; self.num_reqs];
        self.verify_lens.download(0, &mut lens)?;
        let most = self.draft_len as i32;
        anyhow::ensure!(
            lens.iter().all(|len| (0..=most).contains(len)),
            "verify_lens: expected 0 to {most}, found {lens:?}"
        );
        let sum: i32 = lens.iter().sum();
        let mean = f64::from(sum) / self.num_reqs as f64;
        Ok(Some(format!("{mean:.2} drafts a request")))
    }
}
