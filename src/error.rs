//! Every way the library can fail, with the field, what was expected and what came.

use std::path::PathBuf;

/// The library's result.
pub type Result<T> = std::result::Result<T, Error>;

/// The library's error. Its `Display` is one line, fit for a command line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A caller's argument is out of its domain.
    #[error("{field}: expected {expected}, found {found}")]
    Argument {
        /// The parameter or option, as the caller knows it.
        field: String,
        /// What would have been accepted.
        expected: String,
        /// What came.
        found: String,
    },
    /// A checkpoint file does not say what this crate needs.
    #[error("{}: {field}: expected {expected}, found {found}", file.display())]
    Checkpoint {
        /// The file.
        file: PathBuf,
        /// The tensor or config key.
        field: String,
        /// What would have been accepted.
        expected: String,
        /// What came.
        found: String,
    },
    /// A file could not be read or written.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A limit of this build or device; nothing was changed.
    #[error("{what} is not supported: {reason}")]
    Unsupported {
        /// The thing asked for.
        what: String,
        /// Why not.
        reason: String,
    },
    /// A CUDA call or kernel launcher failed.
    #[error("CUDA: {0}")]
    Cuda(String),
    /// The model produced numbers that are no law (NaN or only -inf logits).
    #[error("request {request}: the target's logits hold {found}; expected finite numbers")]
    BadLogits {
        /// Index of the request in the step.
        request: usize,
        /// What was seen.
        found: String,
    },
}

impl Error {
    /// An [`Error::Argument`].
    #[allow(clippy::needless_pass_by_value)] // call sites hand over literals and numbers
    pub fn argument(
        field: impl Into<String>,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> Self {
        Self::Argument {
            field: field.into(),
            expected: expected.into(),
            found: found.to_string(),
        }
    }

    /// An [`Error::Checkpoint`].
    #[allow(clippy::needless_pass_by_value)] // as above
    pub fn checkpoint(
        file: impl Into<PathBuf>,
        field: impl Into<String>,
        expected: impl Into<String>,
        found: impl ToString,
    ) -> Self {
        Self::Checkpoint {
            file: file.into(),
            field: field.into(),
            expected: expected.into(),
            found: found.to_string(),
        }
    }

    /// An [`Error::Io`].
    pub fn io(file: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::Io {
            file: file.into(),
            source,
        }
    }

    /// The same error with the step's index of a request turned into the caller's name for it.
    #[must_use]
    pub fn in_batch(self, name: impl FnOnce(usize) -> usize) -> Self {
        match self {
            Self::BadLogits { request, found } => Self::BadLogits {
                request: name(request),
                found,
            },
            other => other,
        }
    }
}
