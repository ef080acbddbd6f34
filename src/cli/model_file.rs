//! `-m`: a model's file, by its path or by a name.

use std::borrow::Cow;
use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use clap::Args;

use super::stores::{Entry, Stock};
use super::terminal::note;
use crate::error::{Error, Result, escaped, excerpt};
use crate::gguf::{Bytes, Gguf};

/// The model that ships: 17.8 M parameters, trained on public-domain books and chats made of them.
static SHIPPED: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/models/books-18m-q5_k.gguf"));

/// What stands for the shipped model in reports.
const SHIPPED_NAME: &str = "books-18m-q5_k.gguf (built in)";

/// What is taken of several files of a repository unless another is asked for, as llama.cpp's `-hf`
/// does.
const USUAL: &str = "q4_k_m";

/// Models that an error names.
const MAX_NAMED: usize = 8;

#[derive(Args)]
pub(super) struct FileArgs {
    /// GGUF file of the model, of a split one any part; or its name among the models that llama.cpp,
    /// ollama, LM Studio and others keep here, such as llama3.2:1b, owner/repo:Q4_K_M, or a part of
    /// a file's name; see `models` [default: the small one built in]
    #[arg(short, long, value_name = "FILE")]
    model: Option<PathBuf>,
    /// What --model stands for, once it was looked for.
    #[arg(skip)]
    found: OnceLock<Result<Place>>,
}

/// Where a model is.
#[derive(Clone)]
struct Place {
    path: PathBuf,
    /// In reports.
    name: String,
}

impl FileArgs {
    /// The file, without a look at what kind of model it is.
    pub(super) fn gguf(&self) -> Result<Gguf> {
        start_threads()?;
        match self.path()? {
            Some(path) => Gguf::open(path),
            None => Gguf::parse(Bytes::from(SHIPPED)),
        }
    }

    /// The file's name in reports.
    pub(super) fn name(&self) -> String {
        match (&self.model, self.place()) {
            (_, Ok(Some(place))) => place.name.clone(),
            (Some(asked), _) => asked.to_string_lossy().into_owned(),
            (None, _) => SHIPPED_NAME.into(),
        }
    }

    /// The same without its folders.
    pub(super) fn short_name(&self) -> String {
        let name = self.name();
        let last = Path::new(&name).file_name().map(|last| last.to_string_lossy().into_owned());
        last.unwrap_or(name)
    }

    /// Names the file in an error about its content.
    pub(super) fn at(&self, error: Error) -> Error {
        match self.path() {
            Ok(Some(path)) => error.at(path),
            _ => error,
        }
    }

    /// The file; none is the model that is built in.
    pub(super) fn path(&self) -> Result<Option<&Path>> {
        Ok(self.place()?.map(|place| place.path.as_path()))
    }

    pub(super) fn is_shipped(&self) -> bool {
        self.model.is_none()
    }

    fn place(&self) -> Result<Option<&Place>> {
        let Some(asked) = &self.model else { return Ok(None) };
        match self.found.get_or_init(|| find(asked)) {
            Ok(place) => Ok(Some(place)),
            Err(error) => Err(error.clone()),
        }
    }
}

/// Starts the threads that take weights apart, which rayon would do at their first use, but not without
/// ending the program where it cannot.
fn start_threads() -> Result<()> {
    // They may have been started before, which is an error without a cause.
    match rayon::ThreadPoolBuilder::new().build_global().as_ref().map_err(|e| e.source()) {
        Err(Some(cause)) => Err(Error::Runtime(format!("cannot start threads: {cause}"))),
        _ => Ok(()),
    }
}

/// The file at a path, or else of this name.
fn find(asked: &Path) -> Result<Place> {
    let itself = || Place { path: asked.into(), name: asked.to_string_lossy().into_owned() };
    let starts = ["./", "../", "~"];
    match asked.to_str() {
        Some(text) if !asked.exists() && !asked.is_absolute() => {
            match starts.iter().any(|start| text.starts_with(start)) {
                true => Ok(itself()),
                false => named(text, &Stock::take()),
            }
        }
        // What is wrong with a path is told when it is opened.
        _ => Ok(itself()),
    }
}

/// The one model that a name stands for.
fn named(text: &str, stock: &Stock) -> Result<Place> {
    let asked = text.to_lowercase();
    let all: Vec<Names> = stock.entries.iter().map(Names::of).collect();
    for way in WAYS {
        let found = all.iter().filter(|names| !text.is_empty() && way.fits(names, &asked));
        let found = distinct(found.map(|names| names.entry));
        let chosen = match found[..] {
            [] => continue,
            [one] => one,
            _ => match usual(&found).filter(|_| way == Way::Repo) {
                Some(one) => one,
                None => return Err(several(text, &found)),
            },
        };
        if way == Way::Part {
            note(&format!("note: --model {}: {}", escaped(text), shown(chosen)));
        }
        let path = chosen.path.clone();
        // What a file is called by ollama says nothing.
        let is_telling = path.extension().is_some_and(|ext| ext.eq_ignore_ascii_case("gguf"));
        let name = if is_telling { path.to_string_lossy().into() } else { chosen.name.clone() };
        return Ok(Place { path, name });
    }
    Err(none(text, stock))
}

/// How a name may stand for a model.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// As the list of models has it.
    Whole,
    /// The name of its file, or without what goes without saying.
    Short,
    /// Its repository, and maybe the format.
    Repo,
    /// Any part of what the list has.
    Part,
}

/// Every way; the first that fits any model counts.
const WAYS: [Way; 4] = [Way::Whole, Way::Short, Way::Repo, Way::Part];

impl Way {
    fn fits(self, names: &Names, text: &str) -> bool {
        match self {
            Way::Whole => names.full == text,
            Way::Short => names.is(text),
            Way::Repo => names.is_of_repo(text),
            Way::Part => names.full.contains(text),
        }
    }
}

/// An entry's names in lower case.
struct Names<'a> {
    entry: &'a Entry,
    /// As the list of models has it.
    full: String,
    repo: Option<String>,
}

impl<'a> Names<'a> {
    fn of(entry: &'a Entry) -> Names<'a> {
        let repo = entry.repo.as_ref().map(|repo| repo.to_lowercase());
        Names { entry, full: entry.name.to_lowercase(), repo }
    }

    /// The name of the file alone.
    fn file(&self) -> &str {
        self.full.rsplit('/').next().unwrap_or_default()
    }

    /// Whether the file has this name, or the same without its end; for ollama, without the tag
    /// `latest`.
    fn is(&self, text: &str) -> bool {
        let short = |name: &str| name.strip_suffix(".gguf").is_some_and(|stem| stem == text);
        let names = [&self.full, self.file()];
        let latest = self.full.strip_suffix(":latest") == Some(text);
        latest || names.iter().any(|name| *name == text || short(name))
    }

    /// Whether the file is one of this repository, and in the format after a colon, if there is one.
    fn is_of_repo(&self, text: &str) -> bool {
        let (repo, quant) = match text.split_once(':') {
            Some((repo, quant)) => (repo, Some(quant)),
            None => (text, None),
        };
        // llama.cpp's older versions put both into the file's name.
        let flat = format!("{}_", repo.replace('/', "_"));
        let is_repo = self.repo.as_deref() == Some(repo)
            || self.repo.is_none() && repo.contains('/') && self.full.starts_with(&flat);
        is_repo && quant.is_none_or(|quant| has_part(self.file(), quant))
    }
}

/// Whether a name has this part, as a whole: `q4_k` is no part of `model-q4_k_m.gguf`.
fn has_part(name: &str, part: &str) -> bool {
    !part.is_empty()
        && name.match_indices(part).any(|(at, _)| {
            let before = name[..at].chars().next_back();
            let after = name[at + part.len()..].chars().next();
            before.is_none_or(|c| !c.is_alphanumeric())
                && after.is_none_or(|c| !c.is_alphanumeric() && c != '_')
        })
}

/// One entry for each file: links may lead to the same.
fn distinct<'a>(entries: impl Iterator<Item = &'a Entry>) -> Vec<&'a Entry> {
    let mut seen = std::collections::HashSet::new();
    let file = |entry: &Entry| entry.path.canonicalize().unwrap_or_else(|_| entry.path.clone());
    entries.filter(|entry| seen.insert(file(entry))).collect()
}

/// Of several files of one repository, the one that llama.cpp takes.
fn usual<'a>(found: &[&'a Entry]) -> Option<&'a Entry> {
    let is_one = found.iter().all(|entry| entry.repo.is_some() && entry.repo == found[0].repo);
    let mut usual = found.iter().filter(|entry| has_part(&entry.name.to_lowercase(), USUAL));
    let one = usual.next().filter(|_| is_one)?;
    usual.next().is_none().then_some(*one)
}

fn shown(entry: &Entry) -> String {
    format!("{} ({})", escaped(&entry.name), entry.store)
}

/// The first few of many names.
fn few<'a>(names: impl ExactSizeIterator<Item = Cow<'a, str>>) -> String {
    let more = names.len().saturating_sub(MAX_NAMED);
    let names: Vec<Cow<str>> = names.take(MAX_NAMED).collect();
    match more {
        0 => names.join(", "),
        more => format!("{} and {more} more", names.join(", ")),
    }
}

fn several(text: &str, found: &[&Entry]) -> Error {
    let is_alone = |entry: &Entry| found.iter().filter(|e| e.name == entry.name).count() == 1;
    let names = found.iter().map(|entry| match is_alone(entry) {
        true => Cow::from(shown(entry)),
        false => escaped(&entry.path.to_string_lossy()).into(),
    });
    Error::Usage(format!(
        "--model {}: No such file, and {} models match this name: {}",
        excerpt(text),
        found.len(),
        few(names)
    ))
}

fn none(text: &str, stock: &Stock) -> Error {
    let start = format!("--model {}: No such file, and no model of this name", excerpt(text));
    let folders = |list: &[PathBuf]| -> String {
        list.iter().map(|f| escaped(&f.to_string_lossy())).collect::<Vec<_>>().join(", ")
    };
    Error::File(match (&stock.folders[..], stock.entries.is_empty()) {
        ([], _) => format!("{start}; there is none of {}", folders(&stock.missing)),
        (here, true) => format!("{start}; there are no models in {}", folders(here)),
        (here, false) => {
            let found = few(stock.entries.iter().map(|entry| escaped(&entry.name).into()));
            format!("{start} in {}; found there: {found}", folders(here))
        }
    })
}
