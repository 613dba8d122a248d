//! The examples do what the README says of them.

mod cli_support;

use std::path::PathBuf;
use std::process::Command;

use cli_support::{Copy, drafter, target};

/// A file that cargo put beside this test: under `examples/`, or a library.
fn built(file: &str) -> Option<PathBuf> {
    let test = std::env::current_exe().unwrap();
    let dirs = test.ancestors().skip(1).take(2);
    dirs.map(|dir| dir.join(file)).find(|path| path.is_file())
}

fn run(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_rust_example_streams_an_answer() {
    let Some(program) = built("examples/generate") else {
        // `cargo test` builds it; `cargo test --test examples` does not.
        eprintln!("skipped 1: examples are not built");
        return;
    };
    let target = Copy::of(&target("qwen3_bf16")).with_words(331);
    let draft = drafter("qwen3_vanilla");
    let text = run(Command::new(program).args([target.path(), &draft, "w1 w2 w3"]));
    let (answer, length) = text.trim_end().rsplit_once('\n').unwrap();
    assert_eq!(answer.split_whitespace().count(), 256, "{answer}");
    assert!(length.ends_with("tokens per round)"), "{length}");
}

#[cfg(feature = "cuda")]
#[test]
fn the_c_example_sizes_a_workspace_and_shows_an_error() {
    let tool = |variable: &str, default: &str| {
        Command::new(std::env::var_os(variable).unwrap_or(default.into()))
    };
    let repository = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = tempfile::tempdir().unwrap();
    let (object, program) = (dir.path().join("example.o"), dir.path().join("example"));
    run(tool("CC", "cc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", "-c"])
        .arg("-I")
        .arg(repository.join("cuda/include"))
        .arg(repository.join("examples/verify_attention.c"))
        .arg("-o")
        .arg(&object));
    run(tool("CXX", "c++")
        .arg(&object)
        .arg(built("libdspark.a").expect("the static library"))
        .args(["-ldl", "-lpthread", "-lrt", "-lm", "-o"])
        .arg(&program));
    let text = run(&mut Command::new(&program));
    let (size, error) = text.trim_end().split_once('\n').unwrap();
    assert!(
        size.starts_with("dspark 0.") && size.contains("workspace of "),
        "{text}"
    );
    assert!(!size.contains("workspace of 0 bytes"), "{text}");
    assert!(
        error.starts_with("DSPARK_ERROR_NULL_POINTER: ") && error.contains('q'),
        "{text}"
    );
}
