//! The rules of the house that a compiler does not hold: imports go one way, nothing spills.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

/// The layers from the inside out: a module may import those of lower rank. Modules of one rank do not import each
/// other, except that `model`, `kv` and `schedule` are leaves beside one another, too.
const RANKS: [(&str, u32); 12] = [
    ("error", 0),
    ("sys", 1),
    ("device", 2),
    ("ops", 3),
    ("reference", 4),
    ("kv", 4),
    ("schedule", 4),
    ("model", 4),
    ("step", 5),
    ("engine", 6),
    ("capi", 7),
    ("bin", 7),
];

/// What has no device type in it.
const NO_DEVICE: [&str; 5] = ["reference", "schedule", "kv", "model", "step"];

fn rank(module: &str) -> Option<u32> {
    let known = RANKS.iter().find(|(name, _)| *name == module);
    known.map(|&(_, rank)| rank)
}

/// The imports of `source`, a file of `module`, that go the wrong way.
fn wrong_imports(module: &str, source: &str) -> Vec<String> {
    let own = rank(module);
    let imported = source
        .lines()
        .map(str::trim_start)
        .filter(|line| !line.starts_with("//"))
        .flat_map(|line| line.split("crate::").skip(1))
        .map(|rest| {
            rest.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                .next()
        });
    imported
        .flatten()
        .filter(|import| *import != module)
        .filter_map(|import| {
            let inner = rank(import)?;
            let upward = own.is_none_or(|own| inner >= own);
            let device = NO_DEVICE.contains(&module) && ["sys", "device"].contains(&import);
            (upward || device).then(|| format!("{module} imports {import}"))
        })
        .collect()
}

/// The `#include "…"` lines of `source`, the file `path` below `cuda/`, that cross between families or upward.
fn wrong_includes(path: &str, source: &str) -> Vec<String> {
    let family = |path: &str| {
        let mut parts = path.split('/');
        let room = parts.next().unwrap_or_default().to_owned();
        let name = parts.next().unwrap_or_default();
        (room, name.trim_end_matches(".cu").to_owned())
    };
    let (room, own) = family(path);
    source
        .lines()
        .filter_map(|line| {
            line.trim_start()
                .strip_prefix("#include \"")?
                .split('"')
                .next()
        })
        .filter(|include| {
            let (target, name) = family(include);
            match target.as_str() {
                "dspark.h" | "common" => false,
                "kernels" => !(room == "kernels" || room == "launch") || name != own,
                "launch" => room != "launch" || name != own,
                _ => true,
            }
        })
        .map(|include| format!("{path} includes {include}"))
        .collect()
}

fn files(dir: &Path, extensions: &[&str], found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap_or_else(|error| panic!("{}: {error}", dir.display())) {
        let path = entry.expect("a readable entry").path();
        if path.is_dir() {
            files(&path, extensions, found);
        } else if path
            .extension()
            .is_some_and(|e| extensions.iter().any(|known| e == *known))
        {
            found.push(path);
        }
    }
}

/// `(path below dir, text)` of the files below `dir` of the repository.
fn sources(dir: &str, extensions: &[&str]) -> Vec<(String, String)> {
    let root = env::var_os("CARGO_MANIFEST_DIR").unwrap_or(env!("CARGO_MANIFEST_DIR").into());
    let dir = PathBuf::from(root).join(dir);
    let mut found = Vec::new();
    files(&dir, extensions, &mut found);
    assert!(found.len() > 3, "{} has sources", dir.display());
    found
        .iter()
        .map(|path| {
            let below = path.strip_prefix(&dir).expect("below dir");
            let text = fs::read_to_string(path).expect("UTF-8");
            (below.to_string_lossy().into_owned(), text)
        })
        .collect()
}

#[test]
fn rust_imports_go_one_way() {
    let wrong: Vec<String> = sources("src", &["rs"])
        .iter()
        .filter(|(path, _)| path != "lib.rs" && !path.contains("tests"))
        .flat_map(|(path, text)| {
            let module = path
                .split('/')
                .next()
                .unwrap_or_default()
                .trim_end_matches(".rs");
            let text = text.split("#[cfg(test)]").next().unwrap_or_default();
            wrong_imports(module, text)
        })
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn unsafe_stays_in_its_rooms() {
    let rooms = ["sys.rs", "device/", "ops/", "capi/"];
    let outside: Vec<String> = sources("src", &["rs"])
        .into_iter()
        .filter(|(path, _)| !rooms.iter().any(|room| path.starts_with(room)))
        .filter(|(_, text)| has_unsafe(text))
        .map(|(path, _)| path)
        .collect();
    assert!(outside.is_empty(), "{outside:?}");
    assert!(has_unsafe("let x = unsafe { *p };") && !has_unsafe("// unsafe { }\nlet safe = 1;"));
}

fn has_unsafe(source: &str) -> bool {
    let code = source
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    let keyword = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"];
    code.into_iter()
        .any(|line| keyword.iter().any(|k| line.contains(k)))
}

#[test]
fn includes_go_one_way() {
    let wrong: Vec<String> = sources("cuda", &["cu", "cuh", "h"])
        .iter()
        .flat_map(|(path, text)| wrong_includes(path, text))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn wrong_ways_are_seen() {
    assert_eq!(
        wrong_imports(
            "ops",
            "use crate::error::Result;\nuse crate::device::Device;"
        ),
        [""; 0]
    );
    assert_eq!(
        wrong_imports("ops", "use crate::model::Target;"),
        ["ops imports model"]
    );
    assert_eq!(
        wrong_imports("device", "    crate::ops::RowMap::new(1)"),
        ["device imports ops"]
    );
    assert_eq!(
        wrong_imports("schedule", "use crate::device::Device;"),
        ["schedule imports device"]
    );
    assert_eq!(
        wrong_imports("kv", "use crate::model::Target;"),
        ["kv imports model"]
    );
    assert_eq!(
        wrong_imports("new_room", "use crate::ops::Ops;"),
        ["new_room imports ops"]
    );

    let include = |target: &str| format!("#include <cuda.h>\n#include \"{target}\"\n");
    let good = [
        ("launch/draft/full.cu", "kernels/draft/span.cuh"),
        ("launch/draft/full.cu", "common/host.cuh"),
        ("kernels/draft/span.cuh", "kernels/draft/race.cuh"),
        ("common/host.cuh", "dspark.h"),
    ];
    for (path, target) in good {
        assert_eq!(wrong_includes(path, &include(target)), [""; 0]);
    }
    let bad = [
        ("launch/draft/full.cu", "kernels/verify/law.cuh"),
        ("kernels/draft/span.cuh", "kernels/verify/law.cuh"),
        ("common/vec.cuh", "kernels/norm/rows.cuh"),
        ("kernels/norm/rows.cuh", "launch/norm.cu"),
    ];
    for (path, target) in bad {
        assert_eq!(
            wrong_includes(path, &include(target)).len(),
            1,
            "{path} {target}"
        );
    }
}

/// Functions of a ptxas report that use local memory for spills, and its warnings of them.
#[cfg(feature = "cuda")]
fn spills(report: &str) -> Vec<String> {
    let mut function = "";
    let mut found = Vec::new();
    for line in report.lines() {
        if let Some((_, name)) = line.split_once("Function properties for ") {
            function = name.trim();
        }
        let spilled = line
            .split(',')
            .filter(|part| part.contains("bytes spill"))
            .any(|part| !part.trim_start().starts_with("0 "));
        if spilled || (line.contains("warning") && line.to_lowercase().contains("spill")) {
            found.push(format!("{function}: {}", line.trim()));
        }
    }
    found
}

#[cfg(feature = "cuda")]
#[test]
fn no_kernel_spills() {
    let report = include_str!(concat!(env!("DSPARK_PTXAS_DIR"), "/all.txt"));
    assert!(
        report.contains("bytes spill stores"),
        "the report holds kernels"
    );
    assert_eq!(spills(report), [""; 0]);
}

#[cfg(feature = "cuda")]
#[test]
fn a_spill_is_seen() {
    let report = "ptxas info    : Function properties for good_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for bad_kernel
    48 bytes stack frame, 0 bytes spill stores, 40 bytes spill loads
ptxas warning : Registers are spilled to local memory in function 'worse_kernel'";
    let found = spills(report);
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[0].starts_with("bad_kernel:"), "{found:?}");
}
