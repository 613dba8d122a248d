//! What the README shows is what the repository has: its examples are the files, its options and scripts exist.

mod cli_support;

use std::collections::BTreeSet;
use std::path::Path;

use cli_support::stdout;

fn read(path: &str) -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Fenced blocks of a language, in order.
fn blocks<'a>(text: &'a str, language: &str) -> Vec<&'a str> {
    let open = format!("\n```{language}\n");
    let parts = text.split(&open).skip(1);
    parts
        .filter_map(|rest| Some(&rest[..=rest.find("\n```")?]))
        .collect()
}

/// What is wrong with the blocks of a language: each must be a run of lines of the file, and there must be one.
fn wrong_blocks(readme: &str, language: &str, path: &str, file: &str) -> Vec<String> {
    let shown = blocks(readme, language);
    if shown.is_empty() {
        return vec![format!("no ```{language} block; {path} should be shown")];
    }
    let differs = shown.iter().filter(|block| !contains_lines(file, block));
    differs
        .map(|block| {
            let lines: BTreeSet<&str> = file.lines().collect();
            let first = block.lines().find(|line| !lines.contains(line));
            let first = first.unwrap_or("the order of the lines");
            format!("a ```{language} block differs from {path}, first at: {first}")
        })
        .collect()
}

fn contains_lines(file: &str, block: &str) -> bool {
    file == block || file.starts_with(block) || file.contains(&format!("\n{block}"))
}

/// Long options of `dspark` command lines, with their subcommand; a backslash continues a line.
fn options(readme: &str) -> BTreeSet<(String, String)> {
    let mut found = BTreeSet::new();
    for line in readme.replace("\\\n", " ").lines() {
        let line = line.split(" #").next().unwrap_or_default();
        for command in ["generate", "compare", "doctor"] {
            let Some((before, rest)) = line.split_once(&format!("dspark {command} ")) else {
                continue;
            };
            if !before.is_empty() && !before.ends_with(['/', '`', ' ']) {
                continue;
            }
            let rest = rest.split('`').next().unwrap_or_default();
            let words = rest
                .split_whitespace()
                .filter(|word| word.starts_with("--"));
            found.extend(words.map(|word| {
                let name = word.split(['=', ',', ')', '.']).next().unwrap_or(word);
                (command.to_owned(), name.to_owned())
            }));
        }
    }
    found
}

/// Paths of this repository named in the text.
fn paths(readme: &str) -> BTreeSet<String> {
    let is_path = |c: char| c.is_ascii_alphanumeric() || "_-./*".contains(c);
    let roots = [
        "tools/",
        "examples/",
        "benches/",
        "tests/",
        "src/",
        "cuda/",
        ".ci/",
    ];
    readme
        .split(|c| !is_path(c))
        .map(|word| word.trim_end_matches(['.', '/']))
        .filter(|word| roots.iter().any(|root| word.starts_with(root)) && !word.contains('*'))
        .map(str::to_owned)
        .collect()
}

#[test]
fn examples_are_the_files() {
    let readme = read("README.md");
    for (language, path) in [
        ("rust", "examples/generate.rs"),
        ("c", "examples/verify_attention.c"),
    ] {
        let wrong = wrong_blocks(&readme, language, path, &read(path));
        assert!(wrong.is_empty(), "README.md: {}", wrong.join("; "));
    }
}

#[test]
fn options_exist() {
    let options = options(&read("README.md"));
    assert!(!options.is_empty(), "README.md shows no command line");
    for (command, option) in options {
        let help = stdout(&[&command, "--help"]);
        let known = help.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'));
        assert!(
            option == "--help" || known.into_iter().any(|word| word == option),
            "README.md: dspark {command} has no {option}"
        );
    }
}

#[test]
fn files_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let paths = paths(&read("README.md"));
    assert!(paths.contains("tools/demo.sh") && paths.contains("tools/test.sh"));
    for path in paths {
        assert!(root.join(&path).exists(), "README.md names {path}");
    }
}

#[test]
fn no_placeholder_is_left() {
    let readme = read("README.md");
    let placeholder = readme
        .lines()
        .find(|line| line.starts_with('@') && line.ends_with('@'));
    assert_eq!(placeholder, None);
}

/// The checks themselves find what is wrong.
#[test]
fn wrong_readmes_are_caught() {
    let file = "use a;\n\nfn main() {}\n";
    let readme = |body: &str| format!("Text\n```rust\n{body}```\nmore\n");
    let wrong = |body: &str| wrong_blocks(&readme(body), "rust", "a.rs", file);
    assert!(wrong(file).is_empty() && wrong("fn main() {}\n").is_empty());
    assert_eq!(wrong("fn main() { a() }\n").len(), 1);
    assert_eq!(wrong("fn main() {}\nuse a;\n").len(), 1);
    assert_eq!(wrong_blocks("none", "rust", "a.rs", file).len(), 1);

    let line = "target/release/dspark generate --target T \\\n    --temperature 0.7 # --no\n`dspark doctor --device cpu`";
    let found: Vec<String> = options(line)
        .into_iter()
        .map(|(command, option)| format!("{command} {option}"))
        .collect();
    assert_eq!(
        found,
        [
            "doctor --device",
            "generate --target",
            "generate --temperature"
        ]
    );
    let found = paths("run `tools/demo.sh`, then [this](tools/no.sh).");
    assert_eq!(
        found.into_iter().collect::<Vec<_>>(),
        ["tools/demo.sh", "tools/no.sh"]
    );
}
