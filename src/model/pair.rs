//! Loading a target and the drafter made for it.

use std::path::Path;

use super::decoder::DecoderTarget;
use super::drafter_config::DrafterConfig;
use super::dspark::DSparkDrafter;
use super::mtp::MtpDrafter;
use super::stack::Limits;
use super::{Drafter, TargetConfig};
use crate::error::Result;
use crate::ops::{KvDtype, Ops};

/// A target and, unless it decodes alone, its drafter.
pub struct Pair<O: Ops> {
    /// Taps what the drafter reads.
    pub target: DecoderTarget<O>,
    /// On the target's embedding and head.
    pub drafter: Option<Box<dyn Drafter<O>>>,
}

impl<O: Ops + 'static> Pair<O> {
    /// Loads the target in `target` and the drafter in `draft`, whichever kind it is, for passes within `limits`.
    ///
    /// # Errors
    /// [`crate::Error::Checkpoint`] naming the file and field that do not fit, alone or together.
    pub fn load(ops: &mut O, target: &Path, draft: Option<&Path>, limits: &Limits) -> Result<Self> {
        Self::load_with_kv(ops, target, draft, limits, KvDtype::Native)
    }

    /// [`Pair::load`] with a cache of `kv_dtype` for the target ([`DecoderTarget::load_with_kv`]). A drafter's own cache is
    /// native: what it drafts is no part of the output.
    ///
    /// # Errors
    /// As [`Pair::load`] and [`DecoderTarget::load_with_kv`].
    pub fn load_with_kv(
        ops: &mut O,
        target: &Path,
        draft: Option<&Path>,
        limits: &Limits,
        kv_dtype: KvDtype,
    ) -> Result<Self> {
        let Some(draft) = draft else {
            return Ok(Self {
                target: DecoderTarget::load_with_kv(ops, target, limits, &[], kv_dtype)?,
                drafter: None,
            });
        };
        let config = DrafterConfig::read(draft)?;
        config.check_pair(draft, &TargetConfig::read(target)?)?;
        let taps = config.tap_ids();
        let target = DecoderTarget::load_with_kv(ops, target, limits, taps, kv_dtype)?;
        let drafter = load_drafter(ops, &target, draft, limits)?;
        Ok(Self {
            target,
            drafter: Some(drafter),
        })
    }
}

/// Loads the drafter in `dir`, whichever kind it is, for `target`, which must tap [`DrafterConfig::tap_ids`].
///
/// # Errors
/// [`crate::Error::Checkpoint`] naming what does not fit: in `dir`, or between the two.
pub fn load_drafter<O: Ops + 'static>(
    ops: &mut O,
    target: &DecoderTarget<O>,
    dir: &Path,
    limits: &Limits,
) -> Result<Box<dyn Drafter<O>>> {
    Ok(match DrafterConfig::read(dir)? {
        DrafterConfig::DSpark(_) => Box::new(DSparkDrafter::load(ops, target, dir, limits)?),
        DrafterConfig::Mtp(_) => Box::new(MtpDrafter::load(ops, target, dir, limits)?),
    })
}
