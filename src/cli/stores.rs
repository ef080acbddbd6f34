//! Where models lie on this machine: `./models`, and what other programs have downloaded.
//!
//! Nothing in these folders is trusted: what cannot be read, or is not as its program writes it, is
//! passed over; walks have an end in depth and in number.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use serde_json::Value;

/// Folders below a store's, and entries of all of them, that are looked at.
const MAX_DEPTH: usize = 4;
const MAX_ENTRIES: usize = 20_000;
/// Largest manifest and pointer that are read, in bytes. Real ones have a few hundred.
const MAX_TEXT: u64 = 1 << 20;

/// A model file.
pub(super) struct Entry {
    /// The program whose it is.
    pub(super) store: &'static str,
    /// What it is called: no other file of the store is called so.
    pub(super) name: String,
    /// Its repository at the Hugging Face hub, `owner/repo`, where the store says.
    pub(super) repo: Option<String>,
    /// The file; of a split model, the first part.
    pub(super) path: PathBuf,
    /// Size of all parts.
    pub(super) n_bytes: u64,
}

/// Folders of a program, and what is in one of them.
struct Store {
    name: &'static str,
    folders: fn() -> Vec<PathBuf>,
    entries: fn(&Path) -> Vec<Entry>,
}

/// Every store, in the order in which they are shown.
static STORES: &[Store] = &[
    Store { name: "models", folders: || vec!["models".into()], entries: files },
    Store { name: "llama.cpp", folders: llama_cpp, entries: flat },
    Store { name: "ollama", folders: ollama, entries: manifests },
    Store { name: "LM Studio", folders: lm_studio, entries: files },
    Store { name: "Hugging Face", folders: hugging_face, entries: hub },
];

/// What was found.
pub(super) struct Stock {
    /// Folders that are here.
    pub(super) folders: Vec<PathBuf>,
    /// Folders that are not.
    pub(super) missing: Vec<PathBuf>,
    pub(super) entries: Vec<Entry>,
}

impl Stock {
    /// Looks through all stores.
    pub(super) fn take() -> Stock {
        let mut stock = Stock { folders: Vec::new(), missing: Vec::new(), entries: Vec::new() };
        let mut seen = HashSet::new();
        for store in STORES {
            for folder in (store.folders)() {
                if !folder.is_dir() {
                    stock.missing.push(folder);
                    continue;
                }
                let found = (store.entries)(&folder).into_iter();
                let new = found.filter(|entry| seen.insert(entry.path.clone()));
                stock.entries.extend(new.map(|entry| Entry { store: store.name, ..entry }));
                stock.folders.push(folder);
            }
        }
        stock
    }
}

/// A variable that is set, and not to nothing.
fn set(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The folder that caches are in.
fn cache() -> Option<PathBuf> {
    set("XDG_CACHE_HOME").or_else(|| Some(std::env::home_dir()?.join(".cache")))
}

/// llama.cpp's `fs_get_cache_directory`.
fn llama_cpp() -> Vec<PathBuf> {
    let default = || match () {
        _ if cfg!(windows) => Some(set("LOCALAPPDATA")?.join("llama.cpp")),
        _ if cfg!(target_os = "macos") => {
            Some(std::env::home_dir()?.join("Library/Caches/llama.cpp"))
        }
        _ => Some(cache()?.join("llama.cpp")),
    };
    set("LLAMA_CACHE").or_else(default).into_iter().collect()
}

/// The user's, and that of the service that ollama's installer sets up on Linux.
fn ollama() -> Vec<PathBuf> {
    if let Some(folder) = set("OLLAMA_MODELS") {
        return vec![folder];
    }
    let own = std::env::home_dir().map(|home| home.join(".ollama/models"));
    let service = PathBuf::from("/usr/share/ollama/.ollama/models");
    own.into_iter().chain(Some(service).filter(|folder| folder.is_dir())).collect()
}

/// The present default, the one before, and where a file in the home folder points.
fn lm_studio() -> Vec<PathBuf> {
    let Some(home) = std::env::home_dir() else { return Vec::new() };
    let pointed = text(&home.join(".lmstudio-home-pointer"));
    let pointed = pointed.map(|path| PathBuf::from(path.trim())).filter(|path| path.is_absolute());
    let old = Some(home.join(".cache/lm-studio")).filter(|folder| folder.is_dir());
    let homes = pointed.into_iter().chain([home.join(".lmstudio")]).chain(old);
    let mut folders: Vec<PathBuf> = homes.map(|home| home.join("models")).collect();
    folders.dedup();
    folders
}

/// As `huggingface_hub` finds it.
fn hugging_face() -> Vec<PathBuf> {
    let folder = set("HF_HUB_CACHE")
        .or_else(|| set("HUGGINGFACE_HUB_CACHE"))
        .or_else(|| Some(set("HF_HOME")?.join("hub")))
        .or_else(|| Some(cache()?.join("huggingface/hub")));
    folder.into_iter().collect()
}

/// A small text file.
fn text(path: &Path) -> Option<String> {
    let meta = std::fs::metadata(path).ok().filter(|m| m.is_file() && m.len() <= MAX_TEXT)?;
    (meta.len() > 0).then(|| std::fs::read_to_string(path).ok()).flatten()
}

/// What is in a folder, by name, links followed; nothing if it cannot be read.
fn children(folder: &Path, left: &mut usize) -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<(String, PathBuf)> = entries
        .take(*left)
        .filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())))
        .collect();
    *left = left.saturating_sub(found.len().max(1));
    found.sort();
    found
}

/// Files below a folder, at most `depth` folders deep, with their paths from there on, `/` between.
fn below(folder: &Path, depth: usize, left: &mut usize) -> Vec<(String, PathBuf)> {
    let own = folder.canonicalize().unwrap_or_default();
    // A link to where it lies has no end.
    let is_loop = |path: &Path| {
        path.is_symlink() && path.canonicalize().is_ok_and(|target| own.starts_with(target))
    };
    let mut found = Vec::new();
    for (name, path) in children(folder, left) {
        // Asked of what a link points to; a broken one is passed over.
        match std::fs::metadata(&path) {
            Ok(meta) if meta.is_file() => found.push((name, path)),
            Ok(meta) if meta.is_dir() && depth > 0 && !is_loop(&path) => {
                let inner = below(&path, depth - 1, left).into_iter();
                found.extend(inner.map(|(rest, path)| (format!("{name}/{rest}"), path)));
            }
            _ => {}
        }
    }
    found
}

/// A file's number among those of a split model, and its name with that of the first in its place:
/// `NAME-00002-of-00003.gguf`.
fn part(name: &str) -> Option<(usize, String)> {
    let (stem, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, number) = stem.rsplit_once('-')?;
    let is_number = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    let number = number.parse().ok().filter(|_| is_number(number) && is_number(count))?;
    Some((number, format!("{stem}-00001-of-{count}.gguf")))
}

/// The GGUF files among `files`, but for what goes beside a model to read images or sounds; split models
/// once, if their first part is there.
fn models(files: Vec<(String, PathBuf)>) -> Vec<Entry> {
    let mut found: BTreeMap<String, (Option<PathBuf>, u64)> = BTreeMap::new();
    for (name, path) in files {
        let lower = name.to_lowercase();
        let file = lower.rsplit('/').next().unwrap_or_default();
        if !file.ends_with(".gguf") || file.contains("mmproj") {
            continue;
        }
        let n_bytes = std::fs::metadata(&path).map_or(0, |meta| meta.len());
        let (number, first) = part(&name).unwrap_or((1, name));
        let (at, size) = found.entry(first).or_default();
        *size += n_bytes;
        if number == 1 {
            *at = Some(path);
        }
    }
    let entry = |(name, (path, n_bytes)): (String, (Option<PathBuf>, u64))| {
        Some(Entry { store: "", name, repo: None, path: path?, n_bytes })
    };
    found.into_iter().filter_map(entry).collect()
}

/// `owner/repo/file.gguf`, or files in any other folders.
fn files(folder: &Path) -> Vec<Entry> {
    let mut found = models(below(folder, MAX_DEPTH, &mut { MAX_ENTRIES }));
    for entry in &mut found {
        let mut parts = entry.name.splitn(3, '/');
        if let (Some(owner), Some(repo), Some(_)) = (parts.next(), parts.next(), parts.next()) {
            entry.repo = Some(format!("{owner}/{repo}"));
        }
    }
    found
}

/// `owner_repo_file.gguf`; newer versions keep a cache like the hub's in the same place.
fn flat(folder: &Path) -> Vec<Entry> {
    let mut found = models(below(folder, 0, &mut { MAX_ENTRIES }));
    found.extend(hub(folder));
    found
}

/// `models--owner--repo/snapshots/REVISION/file.gguf`, links to blobs. Of a file in several revisions,
/// the one of the branch `main`.
fn hub(folder: &Path) -> Vec<Entry> {
    let mut left = MAX_ENTRIES;
    let mut found = Vec::new();
    for (name, path) in children(folder, &mut left) {
        let Some(repo) = name.strip_prefix("models--").map(|name| name.replacen("--", "/", 1))
        else {
            continue;
        };
        let main = text(&path.join("refs/main")).unwrap_or_default();
        let mut revisions = children(&path.join("snapshots"), &mut left);
        revisions.sort_by_key(|(revision, _)| revision != main.trim());
        let mut seen = HashSet::new();
        for (_, snapshot) in revisions {
            for mut entry in models(below(&snapshot, MAX_DEPTH, &mut left)) {
                if seen.insert(entry.name.clone()) {
                    entry.name = format!("{repo}/{}", entry.name);
                    entry.repo = Some(repo.clone());
                    found.push(entry);
                }
            }
        }
    }
    found
}

/// `manifests/HOST/NAMESPACE/NAME/TAG`, which name blobs; some versions write `manifest-v2` beside.
fn manifests(folder: &Path) -> Vec<Entry> {
    let mut found: Vec<Entry> = Vec::new();
    for manifests in ["manifests", "manifest-v2"] {
        let all = below(&folder.join(manifests), 3, &mut { MAX_ENTRIES });
        for (name, path) in all {
            let parts: Vec<&str> = name.split('/').collect();
            let name = match parts[..] {
                ["registry.ollama.ai" | "ollama.com", "library", name, tag] => {
                    format!("{name}:{tag}")
                }
                ["registry.ollama.ai" | "ollama.com", space, name, tag] => {
                    format!("{space}/{name}:{tag}")
                }
                [host, space, name, tag] => format!("{host}/{space}/{name}:{tag}"),
                _ => continue,
            };
            let Some((path, n_bytes)) = blob(folder, &path) else { continue };
            if found.iter().all(|entry| entry.name != name) {
                found.push(Entry { store: "", name, repo: None, path, n_bytes });
            }
        }
    }
    found
}

/// The file of the model that a manifest of ollama names, and its size.
fn blob(folder: &Path, manifest: &Path) -> Option<(PathBuf, u64)> {
    let manifest: Value = serde_json::from_str(&text(manifest)?).ok()?;
    let is_model = |layer: &&Value| layer["mediaType"] == "application/vnd.ollama.image.model";
    let layer = manifest["layers"].as_array()?.iter().find(is_model)?;
    let digest = layer["digest"].as_str()?.strip_prefix("sha256:")?;
    // Nothing that could lead elsewhere.
    let is_digest = digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit());
    let path = folder.join("blobs").join(format!("sha256-{digest}"));
    let meta = std::fs::metadata(&path).ok().filter(|meta| is_digest && meta.is_file())?;
    Some((path, meta.len()))
}
