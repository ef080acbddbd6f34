//! The writer: a file appears complete under its name, or not at all.

use std::collections::HashSet;
use std::path::Path;

use super::replace::replace_file;
use super::value::{Value, ValueType};
use super::{
    Bytes, DEFAULT_ALIGNMENT, Gguf, MAGIC, MAX_DIMS, MAX_KEY, MAX_NAME, Tensor, VERSIONS,
    check_alignment, data_size, end_of,
};
use crate::error::{Error, Result, excerpt};
use crate::quant::Type;

/// Where written bytes go, piece by piece.
pub type Sink<'s> = dyn FnMut(&[u8]) -> Result<()> + 's;

/// What makes the data of a tensor: it hands all bytes, in order, to the sink.
pub type Source<'a> = dyn FnOnce(&mut Sink) -> Result<()> + 'a;

/// The data of a tensor that is to be written, in the layout of its type.
pub enum Data<'a> {
    /// Bytes that lie somewhere already.
    Slice(&'a [u8]),
    /// Bytes of an open file.
    View(Bytes),
    /// Bytes that are made while the file is written, so that they need not lie in memory at once.
    Stream(Box<Source<'a>>),
}

/// A GGUF file in the making: metadata and tensors, in the order in which they are added.
pub struct Writer<'a> {
    metadata: Vec<(String, Vec<u8>)>,
    keys: HashSet<String>,
    tensors: Vec<Pending<'a>>,
    names: HashSet<String>,
    alignment: u64,
}

struct Pending<'a> {
    name: String,
    ty: &'static Type,
    dims: Vec<u64>,
    n_bytes: u64,
    data: Data<'a>,
}

/// `Err(Error::Runtime(format!(..)))`.
macro_rules! fail {
    ($($arg:tt)*) => { return Err(Error::Runtime(format!($($arg)*))) };
}

impl Default for Writer<'_> {
    fn default() -> Self {
        Self::new()
    }
}

impl<'a> Writer<'a> {
    /// A file without metadata and tensors.
    pub fn new() -> Writer<'a> {
        Writer {
            metadata: Vec::new(),
            keys: HashSet::new(),
            tensors: Vec::new(),
            names: HashSet::new(),
            alignment: DEFAULT_ALIGNMENT,
        }
    }

    /// Adds a pair. The type in the file is that of `value`; `general.alignment` takes effect.
    ///
    /// Fails if the key is there already, or is no key that can be read back.
    pub fn set<'v>(&mut self, key: &str, value: impl Into<Value<'v>>) -> Result<()> {
        let value = value.into();
        if key == "general.alignment" {
            let Value::U32(alignment) = value else {
                fail!("key \"general.alignment\": expected u32, got {}", value.value_type().name());
            };
            check_alignment(alignment.into()).map_err(Error::Runtime)?;
            self.alignment = alignment.into();
        }
        let mut bytes = (value.value_type() as u32).to_le_bytes().to_vec();
        match value {
            Value::Array(array) => {
                bytes.extend((array.element as u32).to_le_bytes());
                bytes.extend((array.len as u64).to_le_bytes());
                bytes.extend(array.bytes);
            }
            plain => put_plain(&mut bytes, plain),
        }
        self.add(key, bytes)
    }

    /// Adds an array whose elements all have the type `element`, which cannot be an array itself.
    pub fn set_array<'v, V: Into<Value<'v>>>(
        &mut self,
        key: &str,
        element: ValueType,
        values: impl IntoIterator<Item = V>,
    ) -> Result<()> {
        let mut bytes = (ValueType::Array as u32).to_le_bytes().to_vec();
        bytes.extend((element as u32).to_le_bytes());
        let len_at = bytes.len();
        bytes.extend([0; 8]);
        let mut len = 0u64;
        for value in values {
            let value = value.into();
            let found = value.value_type();
            if found != element || found == ValueType::Array {
                fail!(
                    "key \"{}\": element {len} is {}, the array is of {}",
                    excerpt(key),
                    found.name(),
                    element.name()
                );
            }
            put_plain(&mut bytes, value);
            len += 1;
        }
        bytes[len_at..len_at + 8].copy_from_slice(&len.to_le_bytes());
        self.add(key, bytes)
    }

    fn add(&mut self, key: &str, bytes: Vec<u8>) -> Result<()> {
        if key.is_empty() || key.len() as u64 > MAX_KEY {
            fail!("metadata key of {} bytes; allowed 1..={MAX_KEY}", key.len());
        }
        if !self.keys.insert(key.to_string()) {
            fail!("key \"{}\" is set twice", excerpt(key));
        }
        self.metadata.push((key.to_string(), bytes));
        Ok(())
    }

    /// Takes a pair out, so that it can be set anew. Whether it was there.
    pub fn remove(&mut self, key: &str) -> bool {
        if key == "general.alignment" {
            self.alignment = DEFAULT_ALIGNMENT;
        }
        self.metadata.retain(|(k, _)| k != key);
        self.keys.remove(key)
    }

    /// Adds all metadata of an open file but `split.*`: what is written is one whole file.
    pub fn copy_metadata(&mut self, gguf: &Gguf) -> Result<()> {
        gguf.metadata()
            .filter(|(key, _)| !key.starts_with("split."))
            .try_for_each(|(key, value)| self.set(key, value))
    }

    /// Adds a tensor. `dims` are as in [`Tensor::dims`], fastest-varying first.
    ///
    /// Fails if the name is there already, if there can be no such tensor, or if `data` has
    /// another length than type and shape; for a stream, that shows when it is written.
    pub fn tensor(
        &mut self,
        name: &str,
        ty: &'static Type,
        dims: &[u64],
        data: impl Into<Data<'a>>,
    ) -> Result<()> {
        let (shown, data) = (excerpt(name), data.into());
        if name.len() as u64 > MAX_NAME {
            fail!("tensor \"{shown}\": name of {} bytes; allowed {MAX_NAME}", name.len());
        }
        if dims.len() > MAX_DIMS as usize {
            fail!("tensor \"{shown}\" has {} dimensions; allowed 0..={MAX_DIMS}", dims.len());
        }
        let n_bytes = data_size(ty, dims)
            .map_err(|text| Error::Runtime(format!("tensor \"{shown}\": {text}")))?;
        let found = match &data {
            Data::Slice(bytes) => Some(bytes.len()),
            Data::View(bytes) => Some(bytes.len()),
            Data::Stream(_) => None,
        };
        if let Some(found) = found.filter(|n| *n as u64 != n_bytes) {
            fail!("tensor \"{shown}\" got {found} bytes; {} {dims:?} has {n_bytes}", ty.name);
        }
        if !self.names.insert(name.to_string()) {
            fail!("tensor \"{shown}\" is added twice");
        }
        self.tensors.push(Pending {
            name: name.to_string(),
            ty,
            dims: dims.to_vec(),
            n_bytes,
            data,
        });
        Ok(())
    }

    /// Adds a tensor of an open file as it is.
    pub fn copy_tensor(&mut self, gguf: &Gguf, tensor: &Tensor) -> Result<()> {
        self.tensor(&tensor.name, tensor.ty, &tensor.dims, gguf.data(tensor))
    }

    /// Bytes of the complete file.
    pub fn n_bytes(&self) -> Result<u64> {
        let padded = |n: u64| n.checked_next_multiple_of(self.alignment);
        let mut sizes = self.tensors.iter().map(|tensor| padded(tensor.n_bytes));
        let header = padded(self.header()?.len() as u64);
        match sizes.try_fold(header, |all, n| Some(all?.checked_add(n?))) {
            Some(Some(n)) => Ok(n),
            _ => fail!("the file would be too long"),
        }
    }

    /// The complete file in memory.
    pub fn to_bytes(self) -> Result<Vec<u8>> {
        let (mut out, n) = (Vec::new(), self.n_bytes()?);
        if usize::try_from(n).ok().is_none_or(|n| out.try_reserve_exact(n).is_err()) {
            fail!("no memory for a file of {n} bytes");
        }
        self.emit(&mut |bytes| {
            out.extend_from_slice(bytes);
            Ok(())
        })?;
        Ok(out)
    }

    /// Writes the file, replacing one of this name, as [`replace_file`] does. The old file may be one
    /// that this writer borrows from.
    pub fn write(self, path: &Path) -> Result<()> {
        replace_file(path, |out| self.emit(out))
    }

    fn emit(self, out: &mut Sink) -> Result<()> {
        let header = self.header()?;
        out(&header)?;
        pad(header.len() as u64, self.alignment, out)?;
        for tensor in self.tensors {
            let n_bytes = tensor.n_bytes;
            tensor.emit(out)?;
            pad(n_bytes, self.alignment, out)?;
        }
        Ok(())
    }

    /// Everything before the padding in front of the data.
    fn header(&self) -> Result<Vec<u8>> {
        let mut out = MAGIC.to_vec();
        out.extend(VERSIONS.end().to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_string(&mut out, key.as_bytes());
            out.extend(value);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            put_string(&mut out, tensor.name.as_bytes());
            out.extend((tensor.dims.len() as u32).to_le_bytes());
            tensor.dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(tensor.ty.id.to_le_bytes());
            out.extend(offset.to_le_bytes());
            let Some((_, next)) = end_of(offset, tensor.n_bytes, self.alignment) else {
                fail!("tensor \"{}\": the file would be too long", excerpt(&tensor.name));
            };
            offset = next;
        }
        Ok(out)
    }
}

impl Pending<'_> {
    fn emit(self, out: &mut Sink) -> Result<()> {
        let make = match self.data {
            Data::Slice(bytes) => return out(bytes),
            Data::View(bytes) => {
                bytes.check().map_err(|e| bytes.at(e))?;
                return out(&bytes);
            }
            Data::Stream(make) => make,
        };
        let (name, n_bytes) = (excerpt(&self.name), self.n_bytes);
        let mut n = 0u64;
        make(&mut |bytes: &[u8]| {
            n = n.saturating_add(bytes.len() as u64);
            if n > n_bytes {
                fail!("tensor \"{name}\" got more than its {n_bytes} bytes");
            }
            out(bytes)
        })?;
        if n < n_bytes {
            fail!("tensor \"{name}\" got {n} of its {n_bytes} bytes");
        }
        Ok(())
    }
}

/// Zeros from `n` to the next multiple of `alignment`.
fn pad(n: u64, alignment: u64, out: &mut Sink) -> Result<()> {
    const ZEROS: [u8; 256] = [0; 256];
    let mut left = (alignment - n % alignment) % alignment;
    while left > 0 {
        let step = left.min(ZEROS.len() as u64);
        out(&ZEROS[..step as usize])?;
        left -= step;
    }
    Ok(())
}

fn put_string(out: &mut Vec<u8>, text: &[u8]) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text);
}

/// A value of any type but `Array`.
fn put_plain(out: &mut Vec<u8>, value: Value<'_>) {
    match value {
        Value::U8(v) => out.extend(v.to_le_bytes()),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push(v.into()),
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
        Value::String(bytes) => put_string(out, bytes),
        Value::Array(_) => {}
    }
}

impl<'a> Data<'a> {
    /// Data that `make` hands to the sink in order while the file is written.
    pub fn stream(make: impl FnOnce(&mut Sink) -> Result<()> + 'a) -> Data<'a> {
        Data::Stream(Box::new(make))
    }
}

impl<'a> From<&'a [u8]> for Data<'a> {
    fn from(bytes: &'a [u8]) -> Data<'a> {
        Data::Slice(bytes)
    }
}

impl From<Bytes> for Data<'_> {
    fn from(bytes: Bytes) -> Self {
        Data::View(bytes)
    }
}
