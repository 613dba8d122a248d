//! Finding cuBLASLt at run time, also where the loader does not look.

use std::env;
use std::ffi::{CString, OsString, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

unsafe extern "C" {
    fn dlopen(file: *const c_char, flags: c_int) -> *mut c_void;
}

const RTLD_NOW: c_int = 2;

/// Makes cuBLASLt loadable: by the loader's own search, else from a CUDA toolkit (`CUDA_HOME`) or NVIDIA's wheels below
/// the target directory the program runs from.
///
/// A library opened here by path stays open; the loader then finds it by name.
///
/// # Errors
/// [`Error::Unsupported`] naming the places looked at.
pub(super) fn load_cublaslt() -> Result<()> {
    // SAFETY: probing for a shared library runs only that library's own initialisers.
    let present = || unsafe { cudarc::cublaslt::sys::is_culib_present() };
    if present() {
        return Ok(());
    }
    for dir in candidate_dirs() {
        for version in ["13", "12"] {
            open(&dir.join(format!("libcublasLt.so.{version}")));
        }
        if present() {
            return Ok(());
        }
    }
    Err(Error::Unsupported {
        what: "the CUDA backend on this machine".into(),
        reason: "libcublasLt was found neither by the loader nor below CUDA_HOME nor in target/cuda-toolkit \
                 (tools/setup.sh installs it)"
            .into(),
    })
}

fn candidate_dirs() -> Vec<PathBuf> {
    let home = env::var_os("CUDA_HOME")
        .into_iter()
        .filter(|home: &OsString| !home.is_empty())
        .map(PathBuf::from);
    let program = env::current_exe().unwrap_or_default();
    let wheels = program
        .ancestors()
        .skip(1)
        .take(4)
        .map(|dir| dir.join("cuda-toolkit/nvidia/cu13"))
        .collect::<Vec<_>>();
    home.chain(wheels)
        .flat_map(|root| [root.join("lib64"), root.join("lib")])
        .filter(|dir| dir.is_dir())
        .collect()
}

fn open(file: &Path) {
    if !file.is_file() {
        return;
    }
    if let Ok(path) = CString::new(file.as_os_str().as_bytes()) {
        // SAFETY: the path is a C string; opening runs NVIDIA's initialisers, and the handle is never closed.
        let _ = unsafe { dlopen(path.as_ptr(), RTLD_NOW) };
    }
}
