//! Complete models of a few kilobytes, made in memory, with every part open to damage.

use qkov::gguf::{Value, ValueType, Writer};
use qkov::quant::{Type, type_of};

/// Tokens of the vocabulary: one per byte, and the end of the text.
pub const N_VOCAB: usize = 257;
/// The id of the token that ends a text.
pub const EOS: u32 = 256;

const N_EMBD: u64 = 8;
const N_FF: u64 = 16;
const N_CTX: u64 = 64;
const N_LAYER: u32 = 2;

/// A metadata value that owns what it holds.
#[derive(Clone)]
pub enum Kv {
    /// Anything but text and arrays.
    One(Value<'static>),
    /// A string.
    Text(Vec<u8>),
    /// An array of plain values.
    List(ValueType, Vec<Value<'static>>),
    /// An array of strings.
    Texts(Vec<String>),
}

impl From<u32> for Kv {
    fn from(value: u32) -> Kv {
        Kv::One(Value::U32(value))
    }
}

impl From<f32> for Kv {
    fn from(value: f32) -> Kv {
        Kv::One(Value::F32(value))
    }
}

impl From<Value<'static>> for Kv {
    fn from(value: Value<'static>) -> Kv {
        Kv::One(value)
    }
}

impl From<&str> for Kv {
    fn from(text: &str) -> Kv {
        Kv::Text(text.as_bytes().to_vec())
    }
}

/// A tensor with its data.
#[derive(Clone)]
pub struct Tensor {
    pub name: String,
    pub ty: &'static Type,
    pub dims: Vec<u64>,
    pub data: Vec<u8>,
}

/// A model file that is still in parts.
#[derive(Clone, Default)]
pub struct Tiny {
    pub keys: Vec<(String, Kv)>,
    pub tensors: Vec<Tensor>,
}

impl Tiny {
    /// Two layers in the shape of Llama, with grouped keys and values.
    pub fn llama() -> Tiny {
        Tiny::decoder("llama")
    }

    /// The same with the biases of Qwen 2.
    pub fn qwen2() -> Tiny {
        let mut tiny = Tiny::decoder("qwen2");
        for i in 0..N_LAYER {
            for (name, n) in [("attn_q", 8), ("attn_k", 4), ("attn_v", 4)] {
                tiny = tiny.tensor(&format!("blk.{i}.{name}.bias"), &[n]);
            }
        }
        tiny
    }

    /// Two layers in the shape of GPT-2.
    pub fn gpt2() -> Tiny {
        let mut tiny = Tiny::hparams("gpt2")
            .set("gpt2.attention.layer_norm_epsilon", 1e-5)
            .vocabulary()
            .tensor("token_embd.weight", &[N_EMBD, N_VOCAB as u64])
            .tensor("position_embd.weight", &[N_EMBD, N_CTX])
            .tensor("output_norm.weight", &[N_EMBD])
            .tensor("output_norm.bias", &[N_EMBD]);
        for i in 0..N_LAYER {
            for (name, n_in, n_out) in [
                ("attn_qkv", N_EMBD, 3 * N_EMBD),
                ("attn_output", N_EMBD, N_EMBD),
                ("ffn_up", N_EMBD, N_FF),
                ("ffn_down", N_FF, N_EMBD),
            ] {
                tiny = tiny
                    .tensor(&format!("blk.{i}.{name}.weight"), &[n_in, n_out])
                    .tensor(&format!("blk.{i}.{name}.bias"), &[n_out]);
            }
            for name in ["attn_norm", "ffn_norm"] {
                tiny = tiny
                    .tensor(&format!("blk.{i}.{name}.weight"), &[N_EMBD])
                    .tensor(&format!("blk.{i}.{name}.bias"), &[N_EMBD]);
            }
        }
        tiny
    }

    fn decoder(arch: &str) -> Tiny {
        let mut tiny = Tiny::hparams(arch)
            .set(&format!("{arch}.attention.head_count_kv"), 1)
            .set(&format!("{arch}.attention.layer_norm_rms_epsilon"), 1e-5)
            .set(&format!("{arch}.rope.dimension_count"), 4)
            .set(&format!("{arch}.rope.freq_base"), 10_000.0)
            .vocabulary()
            .tensor("token_embd.weight", &[N_EMBD, N_VOCAB as u64])
            .tensor("output_norm.weight", &[N_EMBD]);
        for i in 0..N_LAYER {
            for (name, dims) in [
                ("attn_norm", &[N_EMBD][..]),
                ("attn_q", &[N_EMBD, 8]),
                ("attn_k", &[N_EMBD, 4]),
                ("attn_v", &[N_EMBD, 4]),
                ("attn_output", &[8, N_EMBD]),
                ("ffn_norm", &[N_EMBD]),
                ("ffn_gate", &[N_EMBD, N_FF]),
                ("ffn_up", &[N_EMBD, N_FF]),
                ("ffn_down", &[N_FF, N_EMBD]),
            ] {
                tiny = tiny.tensor(&format!("blk.{i}.{name}.weight"), dims);
            }
        }
        tiny
    }

    fn hparams(arch: &str) -> Tiny {
        let key = |name: &str| format!("{arch}.{name}");
        Tiny::default()
            .set("general.architecture", arch)
            .set(&key("block_count"), N_LAYER)
            .set(&key("context_length"), N_CTX as u32)
            .set(&key("embedding_length"), N_EMBD as u32)
            .set(&key("feed_forward_length"), N_FF as u32)
            .set(&key("attention.head_count"), 2)
    }

    /// GPT-2's alphabet of bytes (its `bytes_to_unicode`), and no merges.
    fn vocabulary(self) -> Tiny {
        let mut moved = 0..;
        let mut tokens: Vec<String> = (0..=255u8)
            .map(|byte| match byte {
                b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
                _ => char::from_u32(256 + moved.next().unwrap()).unwrap(),
            })
            .map(String::from)
            .collect();
        tokens.push("<|end|>".into());
        assert_eq!(tokens.len(), N_VOCAB);
        let mut types = vec![Value::I32(1); N_VOCAB];
        // A control token.
        types[EOS as usize] = Value::I32(3);
        self.set("tokenizer.ggml.model", "gpt2")
            .set("tokenizer.ggml.pre", "gpt-2")
            .set("tokenizer.ggml.tokens", Kv::Texts(tokens))
            .set("tokenizer.ggml.token_type", Kv::List(ValueType::I32, types))
            .set("tokenizer.ggml.merges", Kv::Texts(Vec::new()))
            .set("tokenizer.ggml.eos_token_id", EOS)
    }

    /// Sets a key, in its old place if it is there.
    pub fn set(mut self, key: &str, value: impl Into<Kv>) -> Tiny {
        let value = value.into();
        match self.keys.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = value,
            None => self.keys.push((key.to_string(), value)),
        }
        self
    }

    /// Takes keys out, all whose name begins so.
    pub fn without(mut self, prefix: &str) -> Tiny {
        self.keys.retain(|(k, _)| !k.starts_with(prefix));
        self
    }

    /// Adds an F32 tensor of small numbers, or replaces it.
    pub fn tensor(self, name: &str, dims: &[u64]) -> Tiny {
        let seed: u32 = name.bytes().fold(7, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
        let n = dims.iter().product::<u64>() as u32;
        let numbers = (0..n).map(|i| seed.wrapping_add(i).wrapping_mul(2_654_435_761) >> 16);
        let data = numbers.flat_map(|x| (x as f32 / 65_536.0 - 0.5).to_le_bytes()).collect();
        self.tensor_of(name, 0, dims, data)
    }

    /// Adds a tensor of the type with this number, or replaces it.
    pub fn tensor_of(mut self, name: &str, ty: u32, dims: &[u64], data: Vec<u8>) -> Tiny {
        let ty = type_of(ty).unwrap();
        let tensor = Tensor { name: name.to_string(), ty, dims: dims.to_vec(), data };
        match self.tensors.iter_mut().find(|t| t.name == name) {
            Some(old) => *old = tensor,
            None => self.tensors.push(tensor),
        }
        self
    }

    /// Takes a tensor out.
    pub fn without_tensor(mut self, name: &str) -> Tiny {
        let n = self.tensors.len();
        self.tensors.retain(|t| t.name != name);
        assert_eq!(self.tensors.len() + 1, n, "{name}");
        self
    }

    /// What writes this model.
    pub fn writer(&self) -> Writer<'_> {
        let mut writer = Writer::new();
        for (key, value) in &self.keys {
            match value {
                Kv::One(value) => writer.set(key, *value),
                Kv::Text(text) => writer.set(key, text.as_slice()),
                Kv::List(element, list) => writer.set_array(key, *element, list.iter().copied()),
                Kv::Texts(list) => {
                    writer.set_array(key, ValueType::String, list.iter().map(String::as_str))
                }
            }
            .unwrap();
        }
        for t in &self.tensors {
            writer.tensor(&t.name, t.ty, &t.dims, t.data.as_slice()).unwrap();
        }
        writer
    }

    /// The file.
    pub fn bytes(&self) -> Vec<u8> {
        self.writer().to_bytes().unwrap()
    }
}
