//! Compiles the CUDA kernels and makes the Rust view of the C ABI (feature `cuda`; without it there is nothing to do).
//!
//! Every `.cu` below `cuda/launch/` becomes one object (one nvcc call each, so that no relocatable device code is
//! needed), all objects one `libdspark_kernels.a`. An object is kept while its command and the files it was made from are
//! what they were. Objects lie in a folder of the profile's, not in `OUT_DIR`: clippy and rustc build this script apart,
//! with an `OUT_DIR` each, and would compile every kernel twice. The launchers carry the suffix `_cu`; `src/capi` exports
//! the public names. What ptxas says about registers and spills is kept beside the objects, for a test to read.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    if let Err(message) = cuda::build() {
        eprintln!("\nerror: {message}\n");
        std::process::exit(1);
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use std::env;
    use std::ffi::{OsStr, OsString};
    use std::fs;
    use std::hash::{DefaultHasher, Hash, Hasher};
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const HEADER: &str = "cuda/include/dspark.h";
    const LAUNCH_DIR: &str = "cuda/launch";
    const LAUNCHER_NAMES: &str = "-DDSPARK_FN(name)=name##_cu";
    const DEFAULT_ARCHS: &str = "90a,80";
    /// nvcc takes a gigabyte or so on the larger families.
    const MAX_JOBS: usize = 2;
    const NO_NVCC: &str = "no CUDA compiler (nvcc) was found. Three ways out:
  1. set CUDA_HOME to a CUDA 13 toolkit, or NVCC to its compiler;
  2. run tools/setup.sh, which installs NVIDIA's compiler wheels into target/cuda-toolkit (no root needed);
  3. build without the CUDA backend: cargo build --no-default-features";
    const NO_LIBCLANG: &str = "no libclang was found: set LIBCLANG_PATH to the directory that holds it, or run \
        tools/setup.sh, which installs it into target/cuda-toolkit";

    type Result<T> = std::result::Result<T, String>;

    pub fn build() -> Result<()> {
        for name in ["NVCC", "CUDA_HOME", "DSPARK_CUDA_ARCHS", "LIBCLANG_PATH"] {
            println!("cargo:rerun-if-env-changed={name}");
        }
        println!("cargo:rerun-if-changed=cuda");
        let out_dir = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
        let toolkit_dirs = toolkit_dirs(&out_dir);
        let nvcc = find_nvcc(&toolkit_dirs).ok_or(NO_NVCC)?;
        bindings(&out_dir, &toolkit_dirs)?;
        kernels(&nvcc, &kernel_dir(&out_dir))?;
        link_cudart(&nvcc);
        Ok(())
    }

    /// Where the set-up script puts its compiler: below this package's target directory, or the one in use.
    fn toolkit_dirs(out_dir: &Path) -> Vec<PathBuf> {
        let manifest = Some(PathBuf::from("target"));
        // <target>/<profile>/build/<package>/out
        let in_use = out_dir.ancestors().nth(4).map(Path::to_path_buf);
        [manifest, in_use]
            .into_iter()
            .flatten()
            .map(|target| target.join("cuda-toolkit"))
            .filter(|dir| dir.is_dir())
            .collect()
    }

    /// `<target>/<profile>/kernels` for `<target>/<profile>/build/<package>/out`; cargo's lock of the profile guards it.
    fn kernel_dir(out_dir: &Path) -> PathBuf {
        let profile = out_dir.ancestors().nth(3).unwrap_or(out_dir);
        profile.join("kernels")
    }

    fn find_nvcc(toolkit_dirs: &[PathBuf]) -> Option<PathBuf> {
        let set = |name| env::var_os(name).filter(|value: &OsString| !value.is_empty());
        if let Some(nvcc) = set("NVCC") {
            return Some(PathBuf::from(nvcc));
        }
        let home = set("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
        let path = env::var_os("PATH").unwrap_or_default();
        let wheels = toolkit_dirs.iter().map(|dir| dir.join("nvidia/cu13/bin"));
        home.into_iter()
            .chain(env::split_paths(&path))
            .chain(wheels)
            .map(|dir| dir.join("nvcc"))
            .find(|nvcc| nvcc.is_file())
    }

    /// `90a,80`: machine code for every architecture named; the lowest plain one also as PTX, for devices to come.
    fn gencode() -> Result<Vec<String>> {
        let archs = env::var("DSPARK_CUDA_ARCHS").unwrap_or_else(|_| DEFAULT_ARCHS.to_owned());
        let archs: Vec<&str> = archs.split(',').map(str::trim).collect();
        let number = |arch: &str| arch.trim_end_matches(['a', 'f']).parse::<u32>().ok();
        if archs.iter().any(|arch| number(arch).is_none_or(|n| n < 80)) {
            return Err(format!(
                "DSPARK_CUDA_ARCHS: expected architectures from 80 on such as \"90a,80\", found \"{}\"",
                archs.join(",")
            ));
        }
        let ptx = archs
            .iter()
            .filter_map(|arch| arch.parse::<u32>().ok())
            .min();
        Ok(archs
            .iter()
            .map(|arch| {
                let portable = ptx.is_some_and(|ptx| ptx.to_string() == **arch);
                let ptx = if portable {
                    format!(",compute_{arch}")
                } else {
                    String::new()
                };
                format!("-gencode=arch=compute_{arch},code=[sm_{arch}{ptx}]")
            })
            .collect())
    }

    fn find_sources(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
        let failed = |error| format!("{}: {error}", dir.display());
        for entry in fs::read_dir(dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.is_dir() {
                find_sources(&path, found)?;
            } else if path.extension().is_some_and(|extension| extension == "cu") {
                found.push(path);
            }
        }
        Ok(())
    }

    /// Compiles all launch files and archives them.
    fn kernels(nvcc: &Path, kernel_dir: &Path) -> Result<()> {
        let mut sources = Vec::new();
        find_sources(Path::new(LAUNCH_DIR), &mut sources)?;
        sources.sort();
        let reports = kernel_dir.join("ptxas");
        fs::create_dir_all(&reports).map_err(|error| format!("{}: {error}", reports.display()))?;
        let gencode = gencode()?;
        println!("cargo:rustc-env=DSPARK_NVCC={}", nvcc.display());
        println!("cargo:rustc-env=DSPARK_GENCODE={}", gencode.join(" "));
        let host = cc::Build::new()
            .cpp(true)
            .try_get_compiler()
            .map_err(|error| error.to_string())?;
        let next = AtomicUsize::new(0);
        let worker = || {
            let mut done = Vec::new();
            while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                done.push(compile(nvcc, host.path(), source, kernel_dir, &gencode)?);
            }
            Ok(done)
        };
        let compiled: Result<Vec<Vec<(PathBuf, String)>>> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..MAX_JOBS).map(|_| scope.spawn(worker)).collect();
            workers
                .into_iter()
                .map(|worker| {
                    worker
                        .join()
                        .map_err(|_| "a compile thread panicked".to_owned())?
                })
                .collect()
        });
        let compiled: Vec<_> = compiled?.into_iter().flatten().collect();
        let report: String = compiled.iter().map(|(_, report)| report.as_str()).collect();
        fs::write(reports.join("all.txt"), report).map_err(|error| error.to_string())?;
        println!("cargo:rustc-env=DSPARK_PTXAS_DIR={}", reports.display());
        cc::Build::new()
            .objects(compiled.iter().map(|(object, _)| object))
            .try_compile("dspark_kernels")
            .map_err(|error| error.to_string())
    }

    /// One launch file to its object and ptxas report.
    fn compile(
        nvcc: &Path,
        host_compiler: &Path,
        source: &Path,
        kernel_dir: &Path,
        gencode: &[String],
    ) -> Result<(PathBuf, String)> {
        let below = source.strip_prefix(LAUNCH_DIR).unwrap_or(source);
        let name = below.with_extension("").to_string_lossy().replace('/', "_");
        let object = kernel_dir.join(format!("{name}.o"));
        let dependencies = kernel_dir.join(format!("{name}.d"));
        let stamp = kernel_dir.join(format!("{name}.stamp"));
        let report_file = kernel_dir.join("ptxas").join(format!("{name}.txt"));
        let mut command = Command::new(nvcc);
        command
            .arg("-ccbin")
            .arg(host_compiler)
            .args(["-O3", "-std=c++17", "-Xcompiler=-fPIC,-Wall,-Wextra"])
            .args(["-Xptxas=-v,--warn-on-spills", LAUNCHER_NAMES])
            .args(["-Icuda/include", "-Icuda"])
            .args(gencode)
            .arg("-MD")
            .arg("-MF")
            .arg(&dependencies)
            .arg("-c")
            .arg(source)
            .arg("-o")
            .arg(&object);
        let key = || {
            let inputs = fs::read_to_string(&dependencies).ok()?;
            Some(fingerprint(&command, &inputs)?.to_string())
        };
        let unchanged =
            key().is_some_and(|key| fs::read_to_string(&stamp).is_ok_and(|was| was == key));
        if unchanged
            && object.is_file()
            && let Ok(report) = fs::read_to_string(&report_file)
        {
            return Ok((object, report));
        }
        // A failed or interrupted compilation must not look like a finished one.
        let _ = fs::remove_file(&stamp);
        let output = command
            .output()
            .map_err(|error| format!("{}: {error}", nvcc.display()))?;
        let report = String::from_utf8_lossy(&output.stderr).into_owned();
        if !output.status.success() {
            return Err(format!("nvcc {}:\n{report}", source.display()));
        }
        let report = format!("== {name}\n{report}");
        let write = |file: &Path, text: &str| {
            fs::write(file, text).map_err(|error| format!("{}: {error}", file.display()))
        };
        write(&report_file, &report)?;
        let inputs = fs::read_to_string(&dependencies).unwrap_or_default();
        if let Some(key) = fingerprint(&command, &inputs) {
            write(&stamp, &key.to_string())?;
        }
        Ok((object, report))
    }

    /// Of the command and of the content of all files in `dependencies` (a make rule); nothing where one is missing.
    fn fingerprint(command: &Command, dependencies: &str) -> Option<u64> {
        let mut hasher = DefaultHasher::new();
        command.get_program().hash(&mut hasher);
        // A build directory that was moved as a whole stays good.
        let moved = |argument: &&OsStr| Path::new(argument).is_absolute();
        for argument in command.get_args().filter(|argument| !moved(argument)) {
            argument.hash(&mut hasher);
        }
        let (_, files) = dependencies.split_once(':')?;
        for file in files.split_whitespace().filter(|file| *file != "\\") {
            fs::read(file).ok()?.hash(&mut hasher);
        }
        Some(hasher.finish())
    }

    /// The CUDA runtime goes in statically: the program then starts on a host that has only the driver, or nothing.
    fn link_cudart(nvcc: &Path) {
        let nvcc = nvcc.canonicalize().unwrap_or_else(|_| nvcc.to_owned());
        let root = nvcc.ancestors().nth(2).unwrap_or(Path::new("/usr"));
        for lib in ["lib64", "lib", "targets/x86_64-linux/lib"] {
            let dir = root.join(lib);
            println!("cargo:rustc-link-search=native={}", dir.display());
        }
        println!("cargo:rustc-link-lib=static=cudart_static");
        for lib in ["dl", "pthread", "rt", "stdc++"] {
            println!("cargo:rustc-link-lib=dylib={lib}");
        }
    }

    /// The header seen twice: types and public names, and the launchers under their suffixed names.
    fn bindings(out_dir: &Path, toolkit_dirs: &[PathBuf]) -> Result<()> {
        if env::var_os("LIBCLANG_PATH").is_none() {
            let wheels = toolkit_dirs.iter().map(|dir| dir.join("clang/native"));
            if let Some(dir) = wheels.into_iter().find(|dir| dir.is_dir()) {
                // SAFETY: no other thread runs yet.
                unsafe { env::set_var("LIBCLANG_PATH", dir) };
            }
        }
        // bindgen panics where it finds no libclang.
        std::panic::catch_unwind(bindgen::clang_version).map_err(|_| NO_LIBCLANG)?;
        let header = || {
            bindgen::Builder::default()
                .header(HEADER)
                .clang_args(compiler_headers())
                .rust_edition(bindgen::RustEdition::Edition2024)
                .default_macro_constant_type(bindgen::MacroTypeVariation::Signed)
                .allowlist_item("dspark_.*|DSPARK_.*")
        };
        let write = |builder: bindgen::Builder, name: &str| {
            let bindings = builder
                .generate()
                .map_err(|error| format!("{HEADER}: {error}"))?;
            let file = out_dir.join(name);
            bindings
                .write_to_file(&file)
                .map_err(|error| format!("{}: {error}", file.display()))
        };
        write(header(), "dspark.rs")?;
        let launchers = header()
            .clang_arg(LAUNCHER_NAMES)
            .with_codegen_config(bindgen::CodegenConfig::FUNCTIONS)
            .raw_line("use super::*;");
        write(launchers, "dspark_launch.rs")
    }

    /// libclang from a wheel comes without `stddef.h`; the C compiler's own serves.
    fn compiler_headers() -> Vec<String> {
        let found = Command::new("gcc").arg("-print-file-name=include").output();
        let dir = found.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
        dir.ok()
            .filter(|dir| Path::new(dir).is_dir())
            .map(|dir| vec!["-idirafter".to_owned(), dir])
            .unwrap_or_default()
    }
}
