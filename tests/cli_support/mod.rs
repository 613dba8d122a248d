//! Runs the built program and makes checkpoints for it.
#![allow(dead_code)] // Each test binary uses its own part.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// What the program said.
#[derive(Debug)]
pub struct Run {
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// The program with these arguments. What is expected of it is exact, so it generates on the CPU unless told otherwise.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dspark"));
    command.args(args).stdin(Stdio::null());
    let generates = matches!(args.first(), Some(&("generate" | "compare" | "invariance")));
    if generates && !args.contains(&"--device") {
        command.args(["--device", "cpu"]);
    }
    command
}

pub fn dspark(args: &[&str]) -> Run {
    let output = command(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Run {
        status: output.status.code(),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    }
}

/// What it printed, when all went well and without a word on standard error.
pub fn stdout(args: &[&str]) -> String {
    let run = dspark(args);
    assert_eq!((run.status, run.stderr.as_str()), (Some(0), ""), "{args:?}");
    run.stdout
}

/// One line `error: ...` with every part, status 2, nothing on standard output.
pub fn assert_refused(args: &[&str], parts: &[&str]) {
    let run = dspark(args);
    let args = args.join(" ");
    assert_eq!(run.status, Some(2), "{args}: {run:?}");
    assert_eq!(run.stdout, "", "{args}: something on standard output");
    let line = run.stderr.strip_suffix('\n').unwrap_or_default();
    assert!(
        line.starts_with("error: ") && !line.contains('\n'),
        "{args}: {run:?}"
    );
    for part in parts {
        assert!(line.contains(part), "{args}: no {part:?} in: {line}");
    }
}

pub fn target(name: &str) -> String {
    golden(&format!("targets/{name}"))
}

pub fn drafter(name: &str) -> String {
    golden(&format!("drafters/{name}"))
}

fn golden(path: &str) -> String {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    goldens.join(path).to_str().unwrap().to_owned()
}

/// A copy of a checkpoint, to be changed.
pub struct Copy {
    dir: TempDir,
}

impl Copy {
    pub fn of(dir: &str) -> Self {
        let copy = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, copy.path().join(path.file_name().unwrap())).unwrap();
        }
        Self { dir: copy }
    }

    pub fn path(&self) -> &str {
        self.dir.path().to_str().unwrap()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn edit_config(self, edit: impl FnOnce(&mut Map<String, Value>)) -> Self {
        let file = self.file("config.json");
        let mut map = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        edit(&mut map);
        std::fs::write(file, serde_json::to_vec(&map).unwrap()).unwrap();
        self
    }

    pub fn edit_bytes(self, edit: impl FnOnce(&mut Vec<u8>)) -> Self {
        let file = self.file("model.safetensors");
        let mut bytes = std::fs::read(&file).unwrap();
        edit(&mut bytes);
        std::fs::write(file, bytes).unwrap();
        self
    }

    /// Changes header and data of the weights as they stand, valid or not.
    pub fn edit_weights(self, edit: impl FnOnce(&mut Map<String, Value>, &mut [u8])) -> Self {
        self.edit_bytes(|bytes| {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let mut header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
            let mut data = bytes[8 + length..].to_vec();
            edit(&mut header, &mut data);
            let header = serde_json::to_vec(&header).unwrap();
            let length = (header.len() as u64).to_le_bytes();
            *bytes = [&length[..], &header, &data].concat();
        })
    }

    /// Adds a tokenizer whose token i is the word `w{i}`.
    pub fn with_words(self, vocab_size: usize) -> Self {
        let vocab: Map<String, Value> = (0..vocab_size)
            .map(|id| (format!("w{id}"), json!(id)))
            .collect();
        let tokenizer = json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null, "decoder": null,
            "truncation": null, "padding": null, "pre_tokenizer": {"type": "WhitespaceSplit"},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
        });
        std::fs::write(self.file("tokenizer.json"), tokenizer.to_string()).unwrap();
        self
    }
}

/// A file of these contents, in a directory that lives as long as the value.
pub struct TempFile {
    _dir: TempDir,
    path: String,
}

impl TempFile {
    pub fn new(contents: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file").to_str().unwrap().to_owned();
        std::fs::write(&path, contents).unwrap();
        Self { _dir: dir, path }
    }

    pub fn path(&self) -> &str {
        &self.path
    }
}
