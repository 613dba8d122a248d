//! The tables for people and the record for programs.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use dspark::device::{Device, reports};
use serde::Serialize;

use crate::lab::Timing;

/// What the figures were measured on.
#[derive(Default, Serialize)]
struct Header {
    gpu: String,
    driver: String,
    /// Under load, right after the device copy.
    sm_clock_mhz: Option<u32>,
    max_sm_clock_mhz: Option<u32>,
    memory_clock_mhz: Option<u32>,
    /// Of the sources, "-dirty" with uncommitted changes.
    commit: String,
    /// UTC.
    date: String,
    l2_bytes: usize,
    /// Reads and writes together.
    copy_gb_per_s: f64,
    replays: u32,
}

#[derive(Serialize)]
struct Row {
    family: String,
    case: String,
    us: f64,
    noise: f64,
    bytes: usize,
    gb_per_s: f64,
    copy_fraction: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
}

/// The rows of one run.
#[derive(Default, Serialize)]
pub struct Report {
    header: Header,
    rows: Vec<Row>,
    #[serde(skip)]
    family: String,
}

impl Report {
    /// A report without rows.
    pub fn open(
        device: &Device,
        copy_gb_per_s: f64,
        l2_bytes: usize,
        replays: u32,
    ) -> anyhow::Result<Self> {
        let gpu = device.name()?;
        // The management library numbers devices by itself; the GPUs of one machine are alike.
        let state = reports()
            .ok()
            .and_then(|all| all.into_iter().find(|report| report.name == gpu));
        let header = Header {
            gpu,
            driver: state
                .as_ref()
                .map_or_else(|| "unknown".into(), |s| s.driver_version.clone()),
            sm_clock_mhz: state.as_ref().and_then(|s| s.sm_clock_mhz),
            max_sm_clock_mhz: state.as_ref().and_then(|s| s.max_sm_clock_mhz),
            memory_clock_mhz: state.as_ref().and_then(|s| s.memory_clock_mhz),
            commit: commit(),
            date: utc_now(),
            l2_bytes,
            copy_gb_per_s,
            replays,
        };
        Ok(Self {
            header,
            ..Self::default()
        })
    }

    /// What everything below was measured on.
    pub fn header(&self) -> String {
        let h = &self.header;
        let mhz = |clock: Option<u32>| clock.map_or_else(|| "?".into(), |mhz| mhz.to_string());
        let mut text = String::new();
        let _ = write!(
            text,
            "{}, driver {}, SM {} of {} MHz, memory {} MHz, dspark {}, {}\n\
             device copy {:.0} GB/s (read + write); cold L2 ({} MB); median of {} graph replays",
            h.gpu,
            h.driver,
            mhz(h.sm_clock_mhz),
            mhz(h.max_sm_clock_mhz),
            mhz(h.memory_clock_mhz),
            h.commit,
            h.date,
            h.copy_gb_per_s,
            h.l2_bytes >> 20,
            h.replays
        );
        text
    }

    /// The rows to come are of this family.
    pub fn begin(&mut self, family: &str) {
        family.clone_into(&mut self.family);
        println!(
            "\n| {family} | us (p50, noise) | GB/s | % of copy | note |\n|---|---|---|---|---|"
        );
    }

    /// Takes and prints a row.
    pub fn add(&mut self, case: &str, bytes: usize, timing: Timing, note: Option<String>) {
        let gb_per_s = bytes as f64 / timing.us / 1e3;
        let copy_fraction = gb_per_s / self.header.copy_gb_per_s;
        println!(
            "| {case} | {:.2} (±{:.1} %) | {gb_per_s:.0} | {:.0} | {} |",
            timing.us,
            timing.noise * 100.0,
            copy_fraction * 100.0,
            note.as_deref().unwrap_or_default()
        );
        self.rows.push(Row {
            family: self.family.clone(),
            case: case.to_owned(),
            us: timing.us,
            noise: timing.noise,
            bytes,
            gb_per_s,
            copy_fraction,
            note,
        });
    }

    /// Writes the record as JSON.
    pub fn write(&self, file: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        fs::write(file, text + "\n").with_context(|| file.display().to_string())
    }
}

/// The commit told at build time (`DSPARK_COMMIT`), else that of the working directory.
fn commit() -> String {
    if let Some(commit) = option_env!("DSPARK_COMMIT") {
        return commit.to_owned();
    }
    let git = Command::new("git")
        .args(["describe", "--always", "--dirty", "--exclude=*"])
        .output();
    match git {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        }
        _ => "unknown".into(),
    }
}

/// "2026-11-22 02:34 UTC".
fn utc_now() -> String {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs());
    let (days, minutes) = (seconds / 86_400, seconds / 60 % 1440);
    // Years counted from March, so that the leap day ends one; eras of 400 years have 146,097 days.
    let since_march_0 = days + 719_468;
    let (era, day_of_era) = (since_march_0 / 146_097, since_march_0 % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!(
        "{year}-{month:02}-{day:02} {:02}:{:02} UTC",
        minutes / 60,
        minutes % 60
    )
}
