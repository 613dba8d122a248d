//! Passes recorded as CUDA graphs: the launches of a whole stack of layers become one.
//!
//! What a pass does is fixed by what its launches carry by value: the buffers of its models, the sizes of its row map and
//! where that lies. All of it is in its [`PassKey`]; lengths, positions and pages are read on the device, so that a recording
//! serves every pass of the same key. The first passes of a key run launch by launch, which also makes what may not be made
//! while recording (scratch memory, plans of products).

use std::collections::HashMap;

use super::{Cuda, Rows};
use crate::device::Graph;
use crate::error::Result;
use crate::ops::PassKey;

/// A key is recorded when it comes for the third time: it will come again.
const EAGER_PASSES: u32 = 2;

/// Keys that are remembered; beyond, all is forgotten and learnt again.
const MAX_KEYS: usize = 1024;

/// Larger passes are bound by their work, not by their launches.
const MAX_ROWS: usize = 1024;

/// What is known of the passes so far.
#[derive(Default)]
pub(super) struct Passes(HashMap<PassKey, Pass>);

enum Pass {
    /// Came so many times.
    Seen(u32),
    Recorded(Graph),
    /// Cannot be recorded.
    Eager,
}

impl Cuda {
    /// Whether passes that come again are recorded and replayed, as they are from the start.
    pub fn set_recording(&mut self, recording: bool) {
        self.recording = recording;
        self.passes.0.clear();
    }

    /// The method of the trait; see there.
    pub(super) fn key_of_pass(&self, rows: &Rows, work: u64) -> Option<PassKey> {
        if !self.recording || rows.num_rows() == 0 || rows.num_rows() > MAX_ROWS {
            return None;
        }
        let mut key = rows.identity().ok()?;
        let workspace = self.workspace.get();
        key.extend([
            work,
            u64::from(self.batch_invariant),
            workspace.ptr(0) as u64,
            workspace.len() as u64,
        ]);
        Some(PassKey(key))
    }

    /// The method of the trait; see there.
    pub(super) fn record_or_replay(
        &mut self,
        key: Option<PassKey>,
        work: &mut dyn FnMut(&mut Self) -> Result<()>,
    ) -> Result<bool> {
        let Some(key) = key else {
            return work(self).map(|()| false);
        };
        match self.passes.0.get_mut(&key) {
            Some(Pass::Recorded(graph)) => {
                self.device.bind()?;
                // SAFETY: the key names the buffers the recorded work touches by the stack of layers that owns them, whose
                // number no other stack ever has and which is there to ask for this pass, and the scratch memory by its
                // address; the caller's borrows are those of the work itself.
                unsafe { graph.launch()? };
                return Ok(true);
            }
            Some(Pass::Eager) => return work(self).map(|()| false),
            Some(Pass::Seen(times)) if *times < EAGER_PASSES => {
                *times += 1;
                return work(self).map(|()| false);
            }
            Some(Pass::Seen(_)) => {}
            None => {
                if self.passes.0.len() >= MAX_KEYS {
                    self.device.synchronize()?;
                    self.passes.0.clear();
                }
                self.passes.0.insert(key, Pass::Seen(1));
                return work(self).map(|()| false);
            }
        }
        let device = self.device.clone();
        device.bind()?;
        let Ok(graph) = Graph::capture(&device, || work(self)) else {
            self.passes.0.insert(key, Pass::Eager);
            return work(self).map(|()| false);
        };
        // SAFETY: as above.
        unsafe { graph.launch()? };
        self.passes.0.insert(key, Pass::Recorded(graph));
        Ok(true)
    }
}
