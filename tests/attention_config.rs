//! The choice of the attention kernel and the cut of its work, compiled for the host: no GPU, no CUDA.

use std::path::PathBuf;
use std::process::Command;

#[test]
fn the_configuration_is_a_function_of_sizes() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("attention_config");
    let compiler = std::env::var_os("CXX").unwrap_or("c++".into());
    let built = Command::new(compiler)
        .args(["-std=c++17", "-Wall", "-Wextra", "-Werror", "-I"])
        .arg(root.join("cuda"))
        .arg(root.join("tests/attention_config.cpp"))
        .arg("-o")
        .arg(&program)
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "{stderr}");
    let output = Command::new(&program).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "ok\n");
}
