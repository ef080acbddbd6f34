//! The reader: one pass over the header, every number checked before it is used.

#![warn(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use super::cursor::{Cursor, MAX_STRING};
use super::value::{Array, Value, ValueType};
use super::{
    Bytes, DEFAULT_ALIGNMENT, MAGIC, MAX_DIMS, MAX_KEY, MAX_NAME, VERSIONS, check_alignment,
    data_size, end_of, split,
};
use sha2::{Digest, Sha256};

use crate::bad_file;
use crate::error::{Error, Result, excerpt};
use crate::quant::{self, Type};

/// Most pairs, and most tensors, that a file may have. The table of either in memory is several
/// times as large as in the file, so the bytes that are left do not bound it well enough.
const MAX_COUNT: u64 = 1 << 17;

/// What ends the names of the two tensors that are an adapter of a third.
pub const HALVES: [&str; 2] = [".lora_a", ".lora_b"];

/// An open GGUF file, all its parts together: typed metadata and the table of tensors. Clones share the
/// data.
#[derive(Clone)]
pub struct Gguf {
    /// The version that the file states.
    pub version: u32,
    /// Things worth telling that do not prevent use.
    pub warnings: Vec<String>,
    /// Files of adapters of these tensors, which come in pairs named as a tensor with [`HALVES`] at the
    /// end, each with a factor.
    pub adapters: Vec<(Gguf, f32)>,
    parts: Vec<Bytes>,
    entries: Vec<Entry>,
    by_key: HashMap<String, usize>,
    tensors: Vec<Tensor>,
    by_name: HashMap<String, usize>,
    /// The hash of the file that this one was made of in memory.
    origin: Option<String>,
}

/// One metadata pair, as places in the first part.
#[derive(Clone)]
struct Entry {
    key: String,
    ty: ValueType,
    /// For an array: its element type and length.
    array: Option<(ValueType, usize)>,
    value: Range<usize>,
}

/// One line of the tensor table.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// The name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// The format of its elements.
    pub ty: &'static Type,
    /// Sizes, fastest-varying first, as GGUF has them: `[n_in, n_out]` for a matrix.
    pub dims: Vec<u64>,
    part: usize,
    range: Range<usize>,
}

impl Tensor {
    /// Number of elements.
    pub fn n_elements(&self) -> u64 {
        self.dims.iter().product()
    }

    /// Size of the data in bytes.
    pub fn n_bytes(&self) -> usize {
        self.range.len()
    }

    /// The index of the file, among the parts of a split model, and the place of the data in it.
    pub fn place(&self) -> (usize, Range<usize>) {
        (self.part, self.range.clone())
    }
}

impl Gguf {
    /// Maps the file at `path`, and the other parts if it is one of a split model.
    pub fn open(path: &Path) -> Result<Gguf> {
        let read = || -> Result<Gguf> {
            let first = Gguf::parse(Bytes::map(path)?)?;
            match split::other_parts(&first, path)? {
                Some(order) => first.join(order),
                None => Ok(first),
            }
        };
        read().map_err(|e| e.at(path))
    }

    /// Reads a complete, unsplit file from bytes.
    pub fn parse(bytes: Bytes) -> Result<Gguf> {
        let mut gguf = Gguf {
            version: 0,
            warnings: Vec::new(),
            adapters: Vec::new(),
            parts: vec![bytes.clone()],
            entries: Vec::new(),
            by_key: HashMap::new(),
            tensors: Vec::new(),
            by_name: HashMap::new(),
            origin: None,
        };
        let mut at = Cursor { bytes: &bytes, pos: 0 };
        let (version, n_tensors, n_kv) = header(&mut at)?;
        gguf.version = version;
        for _ in 0..n_kv {
            gguf.read_entry(&mut at)?;
        }
        let alignment = gguf.alignment()?;
        let mut infos = Vec::new();
        for _ in 0..n_tensors {
            infos.push(read_tensor(&mut at)?);
        }
        gguf.place_tensors(infos, at.pos, alignment, bytes.len())?;
        Ok(gguf)
    }

    /// Appends the tensors of the parts that follow this one; `order` also says where this one is.
    fn join(mut self, order: split::Parts) -> Result<Gguf> {
        let mut all: Vec<Tensor> = Vec::new();
        let mut parts = Vec::new();
        for part in order {
            let n = parts.len();
            let gguf = match part {
                split::Part::This => {
                    parts.extend(self.parts.first().cloned());
                    all.extend(self.tensors.drain(..).map(|t| Tensor { part: n, ..t }));
                    continue;
                }
                split::Part::Other(gguf) => gguf,
            };
            parts.extend(gguf.parts);
            self.warnings.extend(gguf.warnings);
            all.extend(gguf.tensors.into_iter().map(|t| Tensor { part: n, ..t }));
            // The first part carries the metadata of the model.
            if parts.len() == 1 {
                self.entries = gguf.entries;
                self.by_key = gguf.by_key;
            }
        }
        self.parts = parts;
        self.by_name.clear();
        for (i, tensor) in all.iter().enumerate() {
            if self.by_name.insert(tensor.name.clone(), i).is_some() {
                bad_file!(
                    "tensor \"{}\" is in two parts of the split model",
                    excerpt(&tensor.name)
                );
            }
        }
        self.tensors = all;
        Ok(self)
    }

    /// This file with the metadata of another one in place of its own, and that one's tensors in place
    /// of those of the same name, or after the last. Nothing is copied. What replaces a tensor has been
    /// made with the adapters of that.
    pub fn overlaid(&self, mut over: Gguf) -> Gguf {
        let is_replaced = |name: &str| over.by_name.contains_key(name);
        let is_gone =
            |name: &str| HALVES.iter().any(|h| name.strip_suffix(h).is_some_and(is_replaced));
        let rest = |(a, factor): &(Gguf, f32)| (a.without(is_gone), *factor);
        over.adapters = self.adapters.iter().map(rest).collect();
        let shift = over.parts.len();
        over.parts.extend(self.parts.iter().cloned());
        let mut tensors = Vec::new();
        let replaced = |t: &Tensor| over.tensor(&t.name).cloned();
        for tensor in &self.tensors {
            let own = || Tensor { part: tensor.part.saturating_add(shift), ..tensor.clone() };
            tensors.push(replaced(tensor).unwrap_or_else(own));
        }
        let new = over.tensors.iter().filter(|t| !self.by_name.contains_key(&t.name));
        tensors.extend(new.cloned());
        let names = tensors.iter().map(|t| t.name.clone());
        over.by_name = names.zip(0..).collect();
        over.tensors = tensors;
        over.warnings.clone_from(&self.warnings);
        over.version = self.version;
        over.origin = Some(self.hash());
        over
    }

    /// The same without some of its tensors.
    fn without(&self, is_gone: impl Fn(&str) -> bool) -> Gguf {
        let tensors: Vec<Tensor> =
            self.tensors.iter().filter(|t| !is_gone(&t.name)).cloned().collect();
        let by_name = tensors.iter().map(|t| t.name.clone()).zip(0..).collect();
        Gguf { tensors, by_name, ..self.clone() }
    }

    fn read_entry(&mut self, at: &mut Cursor) -> Result<()> {
        let start = at.pos;
        let key = at.string("key", MAX_KEY)?;
        if key.is_empty() {
            bad_file!("empty metadata key at byte {start}");
        }
        let key = match std::str::from_utf8(key) {
            Ok(key) => key.to_string(),
            Err(_) => bad_file!("metadata key at byte {start} is not UTF-8"),
        };
        let shown = excerpt(&key);
        let type_at = at.pos;
        let id = at.u32("value type")?;
        let Some(ty) = ValueType::from_id(id) else {
            bad_file!(
                "unknown value type {id} for key \"{shown}\" at byte {type_at}; allowed 0..=12"
            );
        };
        let mut array = None;
        let value = match ty {
            ValueType::String => {
                let text = at.string("string value", MAX_STRING)?;
                at.pos.saturating_sub(text.len())..at.pos
            }
            ValueType::Array => {
                let (element, len, range) = at.array(&shown)?;
                array = Some((element, len));
                range
            }
            _ => {
                let begin = at.pos;
                let bytes = at.take(ty.size().unwrap_or(0) as u64, "metadata value")?;
                if ty == ValueType::Bool && bytes.first().is_some_and(|b| *b > 1) {
                    bad_file!("key \"{shown}\" at byte {begin}: bool must be 0 or 1");
                }
                begin..at.pos
            }
        };
        if let Some(old) = self.by_key.get(&key) {
            let first = self.entries.get(*old).map_or(0, |e| e.value.start);
            bad_file!("duplicate key \"{shown}\" at byte {start}; first value at byte {first}");
        }
        self.by_key.insert(key.clone(), self.entries.len());
        self.entries.push(Entry { key, ty, array, value });
        Ok(())
    }

    fn alignment(&self) -> Result<u64> {
        let value = match self.get("general.alignment") {
            None => return Ok(DEFAULT_ALIGNMENT),
            Some(Value::U32(value)) => u64::from(value),
            Some(other) => bad_file!(
                "key \"general.alignment\": expected u32, found {}",
                other.value_type().name()
            ),
        };
        check_alignment(value).map_err(Error::File)?;
        Ok(value)
    }

    /// Turns offsets into places in the file. Each offset must be exactly where the tensors
    /// before it end, padded; so nothing overlaps and nothing lies outside.
    fn place_tensors(
        &mut self,
        infos: Vec<(Tensor, u64, u64)>,
        header_end: usize,
        alignment: u64,
        file_len: usize,
    ) -> Result<()> {
        let Some((_, data)) = end_of(0, header_end as u64, alignment) else {
            bad_file!("header does not end")
        };
        let mut start = data;
        for (i, (mut tensor, offset, n_bytes)) in infos.into_iter().enumerate() {
            let shown = excerpt(&tensor.name);
            let expected = start.saturating_sub(data);
            if offset != expected {
                bad_file!(
                    "tensor \"{shown}\": offset {offset}, but the data before it ends at {expected}"
                );
            }
            let Some((end, next)) = end_of(start, n_bytes, alignment) else {
                bad_file!("tensor \"{shown}\": byte {start} + {n_bytes} bytes overflows");
            };
            // A tensor without data may lie behind the last byte: its padding can be missing.
            if end > file_len as u64 && n_bytes > 0 {
                bad_file!(
                    "file is incomplete: tensor \"{shown}\" needs bytes {start}..{end}, the file has {file_len}"
                );
            }
            if n_bytes > 0 {
                tensor.range = start as usize..end as usize;
            }
            start = next;
            if self.by_name.insert(tensor.name.clone(), i).is_some() {
                bad_file!("duplicate tensor \"{shown}\"");
            }
            self.tensors.push(tensor);
        }
        let extra = (file_len as u64).saturating_sub(start);
        if extra > 0 {
            self.warnings.push(format!("{extra} bytes after the last tensor are ignored"));
        }
        Ok(())
    }

    /// The metadata value of `key`.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        self.value(self.entries.get(*self.by_key.get(key)?)?)
    }

    fn value(&self, entry: &Entry) -> Option<Value<'_>> {
        let bytes = self.parts.first()?.get(entry.value.clone())?;
        match (entry.ty, entry.array) {
            (ValueType::String, _) => Some(Value::String(bytes)),
            (_, Some((element, len))) => Some(Value::Array(Array { element, len, bytes })),
            (ty, None) => Value::fixed(ty, bytes),
        }
    }

    /// All metadata in the order of the file.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, Value<'_>)> {
        self.entries.iter().filter_map(|e| Some((e.key.as_str(), self.value(e)?)))
    }

    /// All tensors in the order of the file.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(*self.by_name.get(name)?)
    }

    /// The data of a tensor of this file, as a view.
    pub fn data(&self, tensor: &Tensor) -> Bytes {
        let part = self.parts.get(tensor.part).and_then(|p| p.slice(tensor.range.clone()));
        part.unwrap_or_else(|| Bytes::from(Vec::new()))
    }

    /// A number for the weights, in hexadecimal: SHA-256, cut to 128 bits, of the names, types, shapes
    /// and both ends of all tensors, with those of adapters. Reads two pages of each. What was made of a
    /// file in memory has the number of the file.
    pub fn hash(&self) -> String {
        if let Some(origin) = &self.origin {
            return origin.clone();
        }
        const END: usize = 4096;
        let mut hash = Sha256::new();
        for tensor in &self.tensors {
            hash.update(format!("{} {} {:?};", tensor.name, tensor.ty.name, tensor.dims));
            let data = self.data(tensor);
            hash.update(data.get(..END).unwrap_or(&data));
            hash.update(data.get(data.len().saturating_sub(END)..).unwrap_or_default());
        }
        for (adapter, factor) in &self.adapters {
            hash.update(format!("{} {factor};", adapter.hash()));
        }
        hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }

    /// An integer of any width that fits u32, if the key is there.
    pub fn u32(&self, key: &str) -> Result<Option<u32>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let Some(number) = value.integer() else {
            return Err(wrong_type(key, "an integer", value));
        };
        match u32::try_from(number) {
            Ok(number) => Ok(Some(number)),
            Err(_) => bad_file!("key \"{key}\" = {number}; allowed 0..={}", u32::MAX),
        }
    }

    /// A finite float, if the key is there.
    pub fn f32(&self, key: &str) -> Result<Option<f32>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let Some(number) = value.float() else { return Err(wrong_type(key, "a float", value)) };
        // After the conversion, so that an f64 beyond the range of f32 does not become infinite.
        match number as f32 {
            narrow if narrow.is_finite() => Ok(Some(narrow)),
            _ => bad_file!("key \"{key}\" = {number}; must be finite and fit f32"),
        }
    }

    /// A bool, if the key is there.
    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(wrong_type(key, "bool", other)),
        }
    }

    /// A UTF-8 string, if the key is there.
    pub fn str(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(value @ Value::String(_)) => match value.str() {
                Some(text) => Ok(Some(text)),
                None => bad_file!("key \"{key}\": the string is not UTF-8"),
            },
            Some(other) => Err(wrong_type(key, "string", other)),
        }
    }

    /// An array, if the key is there.
    pub fn array(&self, key: &str) -> Result<Option<Array<'_>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) => Ok(Some(array)),
            Some(other) => Err(wrong_type(key, "array", other)),
        }
    }
}

fn wrong_type(key: &str, expected: &str, found: Value<'_>) -> Error {
    Error::File(format!("key \"{key}\": expected {expected}, found {}", found.value_type().name()))
}

/// Magic, version and the two counts, each bounded by the bytes that are left.
fn header(at: &mut Cursor) -> Result<(u32, u64, u64)> {
    let len = at.bytes.len();
    if !MAGIC.iter().zip(at.bytes).all(|(a, b)| a == b) {
        bad_file!("not a GGUF file: {}", found_instead(at.bytes));
    }
    if len < 24 {
        bad_file!("truncated header: it has 24 bytes, the file has {len}");
    }
    at.pos = 4;
    let version = at.u32("version")?;
    if VERSIONS.contains(&version.swap_bytes()) || version.swap_bytes() == 1 {
        bad_file!("big-endian GGUF; only little-endian files are supported");
    }
    if version == 1 {
        bad_file!("GGUF version 1 is too old (allowed 2..=3): convert the model again");
    }
    if !VERSIONS.contains(&version) {
        bad_file!("GGUF version {version} at byte 4; allowed 2..=3");
    }
    let n_tensors = at.u64("tensor count")?;
    let n_kv = at.u64("metadata count")?;
    // The shortest pair has 14 bytes, the shortest line of the tensor table 25.
    let left = at.left();
    for (name, count, min) in [("n_kv", n_kv, 14), ("n_tensors", n_tensors, 25)] {
        let fit = left.checked_div(min).unwrap_or(0).min(MAX_COUNT);
        if count > fit {
            bad_file!("{name} = {count}; in the remaining {left} bytes {fit} are allowed");
        }
    }
    Ok((version, n_tensors, n_kv))
}

/// Names what a file without the magic most likely is.
fn found_instead(bytes: &[u8]) -> String {
    let start = bytes.get(..64).unwrap_or(bytes);
    let is = |prefix: &[u8]| start.starts_with(prefix);
    if is(b"version https://git-lfs") {
        "this is a git-lfs pointer; download the real file".into()
    } else if is(b"<!DOC") || is(b"<html") {
        "this looks like a web page".into()
    } else if is(b"PK\x03\x04") {
        "this is a zip archive (a PyTorch file?); convert the model to GGUF first".into()
    } else if [b"lmgg", b"ggml", b"GGML", b"fmgg", b"tjgg", b"ggjt"].iter().any(|m| is(*m)) {
        "this is a GGML file from before GGUF; convert the model again".into()
    } else if start.get(8) == Some(&b'{') {
        "this looks like a safetensors file; convert the model to GGUF first".into()
    } else {
        let magic: Vec<String> = start.iter().take(4).map(|b| format!("{b:02x}")).collect();
        format!("it begins with {} instead of 47 47 55 46", magic.join(" "))
    }
}

/// One line of the tensor table: the tensor (still without place), its offset and its size.
fn read_tensor(at: &mut Cursor) -> Result<(Tensor, u64, u64)> {
    let start = at.pos;
    let name = at.string("tensor name", MAX_NAME)?;
    let name = match std::str::from_utf8(name) {
        Ok(name) => name.to_string(),
        Err(_) => bad_file!("tensor name at byte {start} is not UTF-8"),
    };
    let shown = excerpt(&name);
    let n_dims = at.u32("number of dimensions")?;
    if n_dims > MAX_DIMS {
        bad_file!("tensor \"{shown}\" has {n_dims} dimensions; allowed 0..={MAX_DIMS}");
    }
    let mut dims = Vec::new();
    for _ in 0..n_dims {
        dims.push(at.u64("dimension")?);
    }
    let type_at = at.pos;
    let id = at.u32("tensor type")?;
    let Some(ty) = quant::type_of(id) else {
        if matches!(id, 4 | 5 | 31..=33 | 36..=38) {
            bad_file!(
                "tensor \"{shown}\": type {id} was removed from GGUF; convert the model again"
            );
        }
        bad_file!("tensor \"{shown}\": unknown tensor type {id} at byte {type_at}");
    };
    let offset = at.u64("tensor offset")?;
    let n_bytes = data_size(ty, &dims)
        .map_err(|text| Error::File(format!("tensor \"{shown}\" at byte {start}: {text}")))?;
    Ok((Tensor { name, ty, dims, part: 0, range: 0..0 }, offset, n_bytes))
}
