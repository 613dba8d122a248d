//! The threads of the reference backend.

use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Result};

/// Work below this many multiply-adds is not worth waking another thread for.
const MIN_SHARED_WORK: usize = 1 << 16;

/// A fixed set of threads of which the caller is one.
pub(super) struct Pool {
    /// The threads besides the caller; `None` when there are none.
    helpers: Option<rayon::ThreadPool>,
    num_threads: usize,
}

impl Pool {
    /// `None` takes one thread for each available core.
    pub(super) fn new(num_threads: Option<usize>) -> Result<Self> {
        let num_threads = num_threads.unwrap_or_else(|| {
            std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get)
        });
        if num_threads == 0 {
            return Err(Error::argument("num_threads", "at least 1", num_threads));
        }
        let helpers = (num_threads > 1)
            .then(|| {
                rayon::ThreadPoolBuilder::new()
                    .num_threads(num_threads - 1)
                    .thread_name(|i| format!("dspark-reference-{i}"))
                    .build()
                    .map_err(|error| Error::Unsupported {
                        what: format!("num_threads {num_threads}"),
                        reason: error.to_string(),
                    })
            })
            .transpose()?;
        Ok(Self {
            helpers,
            num_threads,
        })
    }

    /// Threads, the caller included.
    pub(super) fn num_threads(&self) -> usize {
        self.num_threads
    }

    /// Calls `f` once for each item, in any order on any thread, with a scratch that `init` makes once per thread.
    /// `work` is the number of multiply-adds of the whole call; a small one stays on the calling thread.
    pub(super) fn for_each<T: Send, S>(
        &self,
        work: usize,
        items: Vec<T>,
        init: impl Fn() -> S + Sync,
        f: impl Fn(&mut S, T) + Sync,
    ) {
        let shared = match &self.helpers {
            Some(helpers) if work >= MIN_SHARED_WORK && items.len() > 1 => helpers,
            _ => {
                let mut scratch = init();
                for item in items {
                    f(&mut scratch, item);
                }
                return;
            }
        };
        let num_helpers = (self.num_threads - 1).min(items.len() - 1);
        let queue = Mutex::new(items.into_iter());
        let drain = || {
            let mut scratch = init();
            loop {
                // The queue stays whole when `f` panics elsewhere: `next` is all that runs under the lock.
                let item = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
                match item {
                    Some(item) => f(&mut scratch, item),
                    None => break,
                }
            }
        };
        shared.in_place_scope(|scope| {
            for _ in 0..num_helpers {
                scope.spawn(|_| drain());
            }
            drain();
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_seen_once_on_any_number_of_threads() {
        for num_threads in [1, 2, 3, 8] {
            let pool = Pool::new(Some(num_threads)).unwrap();
            for (work, n) in [(0, 5), (usize::MAX, 0), (usize::MAX, 1), (usize::MAX, 1000)] {
                let mut seen = vec![0_u32; n];
                pool.for_each(
                    work,
                    seen.iter_mut().collect(),
                    || (),
                    |(), slot| *slot += 1,
                );
                assert!(seen.iter().all(|&count| count == 1));
            }
        }
        assert!(Pool::new(Some(0)).is_err());
    }
}
