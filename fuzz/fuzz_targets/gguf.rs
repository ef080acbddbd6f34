//! Any bytes as a GGUF file: what can be read of it, and whether it is the same when it is written again.

#![no_main]

use libfuzzer_sys::fuzz_target;
use qkov::gguf::{Bytes, Gguf, Value, Writer};
use qkov_fuzz as _;

fuzz_target!(|data: &[u8]| {
    let Ok(gguf) = Gguf::parse(Bytes::from(data.to_vec())) else { return };
    for (key, value) in gguf.metadata() {
        if let Value::Array(array) = value {
            assert_eq!(array.iter().count(), array.len, "{key:?}");
            array.strings().for_each(drop);
        }
        let _ = (gguf.u32(key), gguf.f32(key), gguf.bool(key), gguf.str(key), gguf.array(key));
    }
    for tensor in gguf.tensors() {
        assert_eq!(gguf.data(tensor).len(), tensor.n_bytes());
    }
    let mut writer = Writer::new();
    if writer.copy_metadata(&gguf).is_err() {
        return;
    }
    for tensor in gguf.tensors() {
        writer.copy_tensor(&gguf, tensor).unwrap();
    }
    let again = Gguf::parse(Bytes::from(writer.to_bytes().unwrap())).unwrap();
    assert_eq!(again.hash(), gguf.hash());
    assert_eq!(again.tensors().len(), gguf.tensors().len());
});
