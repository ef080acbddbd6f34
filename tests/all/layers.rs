//! The layers of the house: imports point down only.

use std::path::{Path, PathBuf};

/// From the bottom up; modules of one row may use each other unless `APART` says otherwise.
const LAYERS: &[&[&str]] = &[
    &["error", "param", "simd"],
    &["gguf", "quant"],
    &["arch", "token"],
    &["normalizer", "merge", "mask"],
    &["attention", "plan"],
    &["model"],
    &["engine"],
    &["cpu", "ggml"],
    &["session"],
    &["measure"],
    &["cli", "serve"],
];

const APART: &[(&str, &str)] = &[("normalizer", "merge"), ("cpu", "ggml")];

/// Longest file, in lines.
const MAX_LINES: usize = 600;

fn sources(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => sources(&path, out),
            false if path.extension().is_some_and(|e| e == "rs") => out.push(path),
            false => {}
        }
    }
}

/// The top-level module that a file belongs to; none for `lib.rs` and `main.rs`.
fn module(root: &Path, path: &Path) -> Option<String> {
    let first = path.strip_prefix(root).unwrap().components().next().unwrap();
    let name = first.as_os_str().to_str().unwrap().trim_end_matches(".rs").to_string();
    (name != "lib" && name != "main").then_some(name)
}

fn level(module: &str) -> usize {
    LAYERS
        .iter()
        .position(|row| row.contains(&module))
        .unwrap_or_else(|| panic!("module {module} has no place in LAYERS"))
}

/// Modules of this crate that a source names, as `crate::NAME` or in `use crate::{..}`.
fn imports(source: &str) -> Vec<String> {
    let name = |text: &str| -> String {
        text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    };
    let mut found = Vec::new();
    for (at, _) in source.match_indices("crate::") {
        let rest = &source[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            Some(list) => {
                let end = list.find(';').unwrap_or(list.len());
                let mut depth = 0;
                let mut items = vec![String::new()];
                for c in list[..end].chars() {
                    match c {
                        '{' => depth += 1,
                        '}' => depth -= 1,
                        ',' if depth == 0 => items.push(String::new()),
                        c => items.last_mut().unwrap().push(c),
                    }
                }
                found.extend(items.iter().map(|i| name(i)).filter(|n| !n.is_empty()));
            }
            None => found.push(name(rest)),
        }
    }
    // Macros live at the root.
    found.retain(|n| !n.starts_with("bad_") && !n.is_empty());
    found
}

fn each_source(mut check: impl FnMut(&str, &Path, &str)) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut paths = Vec::new();
    sources(&root, &mut paths);
    assert!(paths.len() > 20);
    for path in paths {
        if let Some(module) = module(&root, &path) {
            check(&module, &path, &std::fs::read_to_string(&path).unwrap());
        }
    }
}

#[test]
fn imports_point_down() {
    each_source(|module, path, source| {
        for import in imports(source) {
            let apart = APART.iter().any(|(a, b)| {
                (module, import.as_str()) == (*a, *b) || (module, import.as_str()) == (*b, *a)
            });
            assert!(
                level(&import) <= level(module) && !apart,
                "{} of {module} uses {import}",
                path.display()
            );
        }
    });
}

#[test]
fn only_the_edges_touch_the_outside() {
    each_source(|module, path, source| {
        let code = source.split("#[cfg(test)]").next().unwrap();
        let has = |words: &[&'static str]| words.iter().copied().find(|w| code.contains(w));
        let edge = level(module) == LAYERS.len() - 1;
        if !edge {
            let found =
                has(&["println!", "eprintln!", "env::var", "env::args", "clap", "std::process"]);
            assert_eq!(found, None, "{}", path.display());
        }
        // Threads ask the system which cores are siblings.
        let reports = path.parent().is_some_and(|p| p.ends_with("measure/report"));
        if !edge && module != "gguf" && !reports && !path.ends_with("cpu/threads.rs") {
            let found = has(&["std::fs", "File::open", "File::create"]);
            assert_eq!(found, None, "{}", path.display());
        }
        // Handlers of signals are for programs, not for libraries.
        let handles = path.ends_with("cli/signals.rs");
        if !["gguf", "simd", "cpu", "ggml"].contains(&module) && !handles {
            assert_eq!(has(&["unsafe ", "allow(unsafe_code)"]), None, "{}", path.display());
        }
        if ["attention", "cpu"].contains(&module) {
            let words = source.to_lowercase();
            let mut words = words.split(|c: char| !c.is_alphanumeric() && c != '-');
            let found = words.find(|word| qkov::arch::ARCHS.iter().any(|a| a.name == *word));
            assert_eq!(found, None, "{} names an architecture", path.display());
        }
        if ["attention", "cpu", "model", "session"].contains(&module) {
            let names = qkov::arch::ARCHS.iter().map(|a| format!("\"{}\"", a.name));
            names.for_each(|n| assert!(!code.contains(&n), "{} names {n}", path.display()));
        }
    });
}

/// What runs on ggml is in one place, beside the types that it reads for all.
#[test]
fn one_place_names_ggml() {
    each_source(|module, path, source| {
        // Elsewhere, the name may stand for the module.
        let is_module =
            |before: &str| before.ends_with("crate::") || source.contains("use crate::ggml;");
        let mut names = source.match_indices("ggml::").map(|(at, _)| &source[..at]);
        let is_named = names.any(|before| !is_module(before)) || source.contains("use ggml");
        let may = module == "ggml" || path.ends_with("quant/rare.rs");
        assert!(may || !is_named, "{} names the crate ggml", path.display());
    });
}

#[test]
fn files_stay_readable() {
    each_source(|_, path, source| {
        let n = source.lines().count();
        assert!(n <= MAX_LINES, "{} has {n} lines; at most {MAX_LINES}", path.display());
        assert!(source.starts_with("//!"), "{} does not say what it is", path.display());
    });
}

/// Blocks and implementations that the compiler cannot check.
fn n_unsafe(source: &str) -> usize {
    let code = source.lines().filter(|line| !line.trim_start().starts_with("//"));
    code.map(|l| l.matches("unsafe {").count() + l.matches("unsafe impl").count()).sum()
}

/// `SECURITY.md` has a line for every place with unsafe code, which says how many blocks there are.
#[test]
fn unsafe_blocks_are_counted() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let told = std::fs::read_to_string(root.join("SECURITY.md")).unwrap();
    let mut paths = Vec::new();
    sources(&root.join("src"), &mut paths);
    sources(&root.join("vendor/ggml-rs/src"), &mut paths);
    let rows = told.lines().filter_map(|line| {
        let (place, n) = line.strip_prefix("| `")?.split_once("` | ")?;
        Some((place, n.split(' ').next()?.parse::<usize>().ok()?))
    });
    let rows: Vec<(&str, usize)> = rows.collect();
    let mut found = vec![0; rows.len()];
    for path in paths {
        let n = n_unsafe(&std::fs::read_to_string(&path).unwrap());
        let own = path.strip_prefix(root).unwrap();
        let at = (0..rows.len()).filter(|i| own.starts_with(rows[*i].0));
        match at.max_by_key(|i| rows[*i].0.len()) {
            Some(i) => found[i] += n,
            None => assert_eq!(n, 0, "{} is not told of", own.display()),
        }
    }
    for ((place, n), found) in rows.iter().zip(found) {
        assert_eq!(found, *n, "{place}");
    }
}
