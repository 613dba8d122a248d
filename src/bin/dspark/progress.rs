//! Progress on standard error, where that is a terminal.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar over `len` of `what`.
pub fn bar(what: &'static str, len: usize) -> ProgressBar {
    let bar = ProgressBar::new(len as u64).with_message(what);
    match ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}, {elapsed} of about {duration}")
    {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
