//! Importance in files, as llama.cpp's `imatrix` tool writes them: a GGUF, or the older list of entries.

use std::collections::BTreeMap;
use std::path::Path;

use crate::bad_file;
use crate::error::{Result, excerpt};
use crate::gguf::{Bytes, Data, Gguf, MAGIC, Value, ValueType, Writer};
use crate::quant::format_named;

/// Ends of the names of an entry's two tensors.
const SQUARES: &str = ".in_sum2";
const COUNTS: &str = ".counts";

/// What the matrices of a tensor have read.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// Sums of squares of what each column was multiplied with. `[n_matrices, n_in]`
    pub squares: Vec<f32>,
    /// Tokens that went through each matrix. `[n_matrices]`
    pub counts: Vec<f32>,
}

/// What has been gathered over a text.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Gathered {
    /// Files of texts.
    pub datasets: Vec<String>,
    /// Chunks that were read, each of so many tokens.
    pub n_chunks: u32,
    /// Tokens of a chunk.
    pub chunk: u32,
    /// By names of tensors.
    pub entries: BTreeMap<String, Entry>,
}

impl Entry {
    /// Means of squares; ones for a matrix that nothing went through. `[n_matrices, n_in]`
    pub fn means(&self) -> Vec<f32> {
        let n_in = self.squares.len() / self.counts.len().max(1);
        let of = |(squares, n): (&[f32], &f32)| -> Vec<f32> {
            squares.iter().map(|sum| if *n > 0.0 { sum / n } else { 1.0 }).collect()
        };
        self.squares.chunks(n_in.max(1)).zip(&self.counts).flat_map(of).collect()
    }
}

impl Gathered {
    /// Means of squares by names of tensors.
    pub fn means(&self) -> impl Iterator<Item = (String, Vec<f32>)> {
        self.entries.iter().map(|(name, entry)| (name.clone(), entry.means()))
    }

    /// Writes a file, over one that is there.
    pub fn write(&self, path: &Path) -> Result<()> {
        self.writer()?.write(path)
    }

    /// What writes it.
    pub fn writer(&self) -> Result<Writer<'static>> {
        let mut writer = Writer::new();
        writer.set("general.type", "imatrix")?;
        let datasets = self.datasets.iter().map(|d| Value::String(d.as_bytes()));
        writer.set_array("imatrix.datasets", ValueType::String, datasets)?;
        writer.set("imatrix.chunk_count", self.n_chunks)?;
        writer.set("imatrix.chunk_size", self.chunk)?;
        let Some(floats) = format_named("F32") else { bad_file!("no format of floats") };
        let mut add = |name: String, n_in: usize, data: &[f32]| {
            // One matrix is a vector here, as ggml writes it.
            let n = (data.len() / n_in.max(1)) as u64;
            let dims = [n_in as u64, n];
            let dims = if n == 1 { &dims[..1] } else { &dims[..] };
            let bytes: Vec<u8> = data.iter().flat_map(|x| x.to_le_bytes()).collect();
            writer.tensor(&name, floats.ty, dims, Data::View(Bytes::from(bytes)))
        };
        for (name, entry) in &self.entries {
            let n_in = entry.squares.len() / entry.counts.len().max(1);
            add(format!("{name}{SQUARES}"), n_in, &entry.squares)?;
            add(format!("{name}{COUNTS}"), 1, &entry.counts)?;
        }
        Ok(writer)
    }

    /// Reads a file of either kind.
    pub fn open(path: &Path) -> Result<Gathered> {
        let read = || Gathered::parse(Bytes::map(path)?);
        read().map_err(|e| e.at(path))
    }

    /// Reads the bytes of such a file.
    pub fn parse(bytes: Bytes) -> Result<Gathered> {
        let gathered = match bytes.starts_with(&MAGIC) {
            true => Gathered::of_gguf(&Gguf::parse(bytes)?)?,
            false => Gathered::of_list(&bytes)?,
        };
        for (name, entry) in &gathered.entries {
            let mut all = entry.squares.iter().chain(&entry.counts);
            if !all.all(|x| x.is_finite() && *x >= 0.0) {
                bad_file!("importance of \"{}\": all must be finite and >= 0", excerpt(name));
            }
        }
        Ok(gathered)
    }

    fn of_gguf(gguf: &Gguf) -> Result<Gathered> {
        let found = gguf.str("general.type")?;
        if found != Some("imatrix") {
            bad_file!("key \"general.type\" is not \"imatrix\": not an importance matrix");
        }
        let datasets = gguf.array("imatrix.datasets")?.map_or(Vec::new(), |all| {
            all.strings().map(|d| String::from_utf8_lossy(d).into_owned()).collect()
        });
        let floats = |name: &str| -> Result<Vec<f32>> {
            let Some(tensor) = gguf.tensor(name).filter(|t| t.ty.name == "F32") else {
                bad_file!("no tensor \"{}\" of type F32", excerpt(name));
            };
            let data = gguf.data(tensor);
            Ok(data.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect())
        };
        let mut entries = BTreeMap::new();
        for name in gguf.tensors().iter().filter_map(|t| t.name.strip_suffix(SQUARES)) {
            let squares = floats(&format!("{name}{SQUARES}"))?;
            let counts = floats(&format!("{name}{COUNTS}"))?;
            if counts.is_empty() || !squares.len().is_multiple_of(counts.len()) {
                let (n, m) = (squares.len(), counts.len());
                bad_file!("\"{}\": {n} sums for {m} matrices", excerpt(name));
            }
            entries.insert(name.to_string(), Entry { squares, counts });
        }
        Ok(Gathered {
            datasets,
            n_chunks: gguf.u32("imatrix.chunk_count")?.unwrap_or(0),
            chunk: gguf.u32("imatrix.chunk_size")?.unwrap_or(0),
            entries,
        })
    }

    /// A count of entries; each a name after its length, a count of chunks, a count of columns and, for
    /// each of these, a mean of squares times the number of chunks. Then chunks, and the text's name
    /// after its length, which may be missing.
    fn of_list(bytes: &[u8]) -> Result<Gathered> {
        let mut list = List { bytes };
        let mut entries = BTreeMap::new();
        for _ in 0..list.count("the number of entries")? {
            let name = list.text("the name of an entry")?;
            let n_chunks = list.count("the number of chunks")?;
            let n = list.count("the number of columns")?;
            let data = list.take(4 * n, "an entry")?;
            let squares = data.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
            entries.insert(name, Entry { squares, counts: vec![n_chunks.max(1) as f32] });
        }
        let (mut n_chunks, mut datasets) = (0, Vec::new());
        if !list.bytes.is_empty() {
            n_chunks = list.count("the number of chunks")? as u32;
            datasets.push(list.text("the name of the text")?);
        }
        Ok(Gathered { datasets, n_chunks, chunk: 0, entries })
    }
}

/// What is left of a list.
struct List<'a> {
    bytes: &'a [u8],
}

impl<'a> List<'a> {
    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8]> {
        let Some((taken, rest)) = self.bytes.split_at_checked(n) else {
            bad_file!("not an importance matrix, or truncated at {what}");
        };
        self.bytes = rest;
        Ok(taken)
    }

    fn count(&mut self, what: &str) -> Result<usize> {
        let bytes = self.take(4, what)?.try_into().unwrap_or_default();
        match usize::try_from(i32::from_le_bytes(bytes)) {
            Ok(n) => Ok(n),
            Err(_) => bad_file!("not an importance matrix: {what} is negative"),
        }
    }

    fn text(&mut self, what: &str) -> Result<String> {
        let n = self.count(what)?;
        Ok(String::from_utf8_lossy(self.take(n, what)?).into_owned())
    }
}
