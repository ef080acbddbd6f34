//! GGUF files in parts. They are written without any check, and damaged as an input says: most of what
//! comes of it is still a file, so that its metadata and its tensors are what is tried.

use qkov::gguf::{Gguf, Value};
use qkov::quant::type_of;

/// Numbers at which arithmetic breaks, also as floats of 32 bits.
const EDGES: [u64; 24] = [
    0,
    1,
    2,
    3,
    7,
    0x7F,
    0xFF,
    0xFFFF,
    0x1_0000,
    0x7FFF_FFFF,
    0x8000_0000,
    0xFFFF_FFFF,
    0x1_0000_0000,
    1 << 60,
    1 << 61,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
    0x3F80_0000,
    0x7F80_0000,
    0x7FC0_0000,
    0x7F7F_FFFF,
    0xBF80_0000,
    0x0000_0001_0000_0001,
];
/// Most changes that an input can ask for.
const MAX_CHANGES: usize = 16;
/// Most bytes of a tensor that is made.
const MAX_TENSOR: u64 = 1 << 18;

/// A tensor as it is written.
#[derive(Clone)]
pub struct Tensor {
    pub name: Vec<u8>,
    pub dims: Vec<u64>,
    pub ty: u32,
    pub data: Vec<u8>,
}

/// A file in parts.
#[derive(Clone, Default)]
pub struct File {
    /// Keys, and their values with the type in front, as they lie in a file.
    pub keys: Vec<(String, Vec<u8>)>,
    pub tensors: Vec<Tensor>,
}

fn put(out: &mut Vec<u8>, value: Value) {
    match value {
        Value::U8(n) => out.push(n),
        Value::I8(n) => out.extend(n.to_le_bytes()),
        Value::U16(n) => out.extend(n.to_le_bytes()),
        Value::I16(n) => out.extend(n.to_le_bytes()),
        Value::U32(n) => out.extend(n.to_le_bytes()),
        Value::I32(n) => out.extend(n.to_le_bytes()),
        Value::F32(n) => out.extend(n.to_le_bytes()),
        Value::U64(n) => out.extend(n.to_le_bytes()),
        Value::I64(n) => out.extend(n.to_le_bytes()),
        Value::F64(n) => out.extend(n.to_le_bytes()),
        Value::Bool(is) => out.push(is.into()),
        Value::String(text) => put_text(out, text),
        Value::Array(array) => {
            out.extend((array.element as u32).to_le_bytes());
            out.extend((array.len as u64).to_le_bytes());
            array.iter().for_each(|value| put(out, value));
        }
    }
}

fn put_text(out: &mut Vec<u8>, text: &[u8]) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text);
}

impl File {
    /// The parts of an open file.
    pub fn of(gguf: &Gguf) -> File {
        let keys = gguf.metadata().map(|(key, value)| {
            let mut bytes = (value.value_type() as u32).to_le_bytes().to_vec();
            put(&mut bytes, value);
            (key.to_string(), bytes)
        });
        let tensors = gguf.tensors().iter().map(|t| Tensor {
            name: t.name.clone().into(),
            dims: t.dims.clone(),
            ty: t.ty.id,
            data: gguf.data(t).to_vec(),
        });
        File { keys: keys.collect(), tensors: tensors.collect() }
    }

    /// Sets a text, or replaces it.
    pub fn set_text(&mut self, key: &str, text: &str) {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        put_text(&mut bytes, text.as_bytes());
        self.set(key, bytes);
    }

    fn set(&mut self, key: &str, bytes: Vec<u8>) {
        match self.keys.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = bytes,
            None => self.keys.push((key.into(), bytes)),
        }
    }

    /// The value of a key that is a text.
    pub fn text(&self, key: &str) -> Option<&str> {
        let (_, bytes) = self.keys.iter().find(|(k, _)| k == key)?;
        std::str::from_utf8(bytes.get(12..)?).ok()
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            put_text(&mut out, key.as_bytes());
            out.extend(value);
        }
        let mut offset = 0;
        for t in &self.tensors {
            put_text(&mut out, &t.name);
            out.extend((t.dims.len() as u32).to_le_bytes());
            t.dims.iter().for_each(|n| out.extend(n.to_le_bytes()));
            out.extend(t.ty.to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offset += t.data.len().next_multiple_of(32);
        }
        for t in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(&t.data);
        }
        out
    }

    /// Changes what an input says; `more` has keys and tensors that can be added.
    pub fn damage(&mut self, input: &mut Input, more: &[File]) {
        for _ in 0..MAX_CHANGES {
            if input.is_empty() {
                return;
            }
            match input.byte() % 10 {
                0 | 1 => self.change_value(input),
                2 => self.change_type(input),
                3 => self.add_key(input, more),
                4 => drop(remove(&mut self.keys, input)),
                5 => self.change_text(input),
                6 => self.change_shape(input),
                7 => self.change_data(input),
                8 => drop(remove(&mut self.tensors, input)),
                _ => self.add_tensor(input, more),
            }
        }
    }

    fn change_value(&mut self, input: &mut Input) {
        if let Some((_, value)) = input.one_of_mut(&mut self.keys) {
            input.overwrite(&mut value[4..]);
        }
    }

    fn change_type(&mut self, input: &mut Input) {
        let ty = u32::from(input.byte()) % 13;
        let number = input.number().to_le_bytes();
        if let Some((_, value)) = input.one_of_mut(&mut self.keys) {
            let width = [1, 1, 2, 2, 4, 4, 4, 1, 8, 8, 8, 8, 8][ty as usize];
            *value = [&ty.to_le_bytes()[..], &number[..width]].concat();
        }
    }

    /// A key of another family has the name of this one in front.
    fn add_key(&mut self, input: &mut Input, more: &[File]) {
        let Some(other) = input.one_of(more) else { return };
        let Some((key, value)) = input.one_of(&other.keys) else { return };
        let arch = |file: &File| file.text("general.architecture").unwrap_or("none").to_string();
        let key = match key.strip_prefix(&arch(other)) {
            Some(rest) => format!("{}{rest}", arch(self)),
            None => key.clone(),
        };
        self.set(&key, value.clone());
    }

    fn change_text(&mut self, input: &mut Input) {
        let n = usize::from(input.byte());
        let text = input.take(n).to_vec();
        if let Some((_, value)) = input.one_of_mut(&mut self.keys) {
            *value = 8u32.to_le_bytes().to_vec();
            put_text(value, &text);
        }
    }

    fn change_shape(&mut self, input: &mut Input) {
        let (way, number) = (input.byte(), input.number());
        let Some(tensor) = input.one_of_mut(&mut self.tensors) else { return };
        let at = usize::from(way >> 2) % tensor.dims.len().max(1);
        match (way % 4, tensor.dims.get_mut(at)) {
            (0 | 1, Some(n)) => *n = number,
            (2, _) => tensor.ty = (number % 44) as u32,
            (_, Some(_)) => drop(tensor.dims.remove(at)),
            (_, None) => tensor.dims.push(number),
        }
        let n = tensor.dims.iter().try_fold(1u64, |n, dim| n.checked_mul(*dim));
        if let (Some(n), Some(ty)) = (n.filter(|n| *n < 8 * MAX_TENSOR), type_of(tensor.ty)) {
            let n_bytes = n / ty.block_len as u64 * ty.block_bytes as u64;
            tensor.data.resize(n_bytes.min(MAX_TENSOR) as usize, 0x3C);
        }
    }

    fn change_data(&mut self, input: &mut Input) {
        if let Some(tensor) = input.one_of_mut(&mut self.tensors) {
            input.overwrite(&mut tensor.data);
        }
    }

    fn add_tensor(&mut self, input: &mut Input, more: &[File]) {
        let Some(other) = input.one_of(more) else { return };
        self.tensors.extend(input.one_of(&other.tensors).cloned());
    }
}

fn remove<T>(all: &mut Vec<T>, input: &mut Input) -> Option<T> {
    let i = input.index(all.len())?;
    Some(all.remove(i))
}

/// What is left of an input; behind its end there are zeros.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    pub fn take(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// One of the numbers at which arithmetic breaks, a small one, or any.
    pub fn number(&mut self) -> u64 {
        match self.byte() {
            n @ 0..100 => EDGES[usize::from(n) % EDGES.len()],
            n @ 100..=250 => u64::from(n - 100),
            _ => self.take(8).iter().fold(0, |n, byte| n << 8 | u64::from(*byte)),
        }
    }

    pub fn index(&mut self, n: usize) -> Option<usize> {
        let mut index = usize::from(self.byte());
        if n > 256 {
            index = index << 8 | usize::from(self.byte());
        }
        (n > 0).then(|| index % n)
    }

    pub fn one_of<'t, T>(&mut self, all: &'t [T]) -> Option<&'t T> {
        Some(&all[self.index(all.len())?])
    }

    pub fn one_of_mut<'t, T>(&mut self, all: &'t mut [T]) -> Option<&'t mut T> {
        let i = self.index(all.len())?;
        Some(&mut all[i])
    }

    /// Puts a number of 1, 2, 4 or 8 bytes somewhere.
    pub fn overwrite(&mut self, bytes: &mut [u8]) {
        let width = 1 << (self.byte() % 4);
        let number = self.number().to_le_bytes();
        let Some(at) = self.index(bytes.len()) else { return };
        let width = width.min(bytes.len() - at);
        bytes[at..at + width].copy_from_slice(&number[..width]);
    }
}
