//! What can compute here: engines and their devices.

use std::sync::LazyLock;

use serde_json::{Value, json};

use super::terminal::{print, print_json};
use crate::cpu::threads::default_threads;
use crate::error::Result;
use crate::simd;

/// How the other engine comes in.
#[cfg(not(feature = "ggml"))]
const MISSING: &str = "ggml is not built in: cargo build --release --features ggml, or \
    cuda, metal, vulkan, rpc in place of ggml, builds it";

/// The program's version, and its engines.
pub(super) static VERSION: LazyLock<String> = LazyLock::new(|| {
    let (version, revision) = (env!("CARGO_PKG_VERSION"), env!("QKOV_REVISION"));
    format!("{version} ({revision})\nengines: cpu{}", ggml())
});

#[cfg(feature = "ggml")]
fn ggml() -> String {
    format!(", ggml {}", crate::ggml::devices::version())
}

#[cfg(not(feature = "ggml"))]
fn ggml() -> &'static str {
    ""
}

/// The devices of ggml; memory in bytes.
#[cfg(feature = "ggml")]
fn of_ggml() -> Vec<Value> {
    let json = |d: crate::ggml::devices::Found| {
        json!({"engine": "ggml", "name": d.name, "description": d.description, "kind": d.kind,
               "memory_free": d.memory_free, "memory_total": d.memory_total})
    };
    crate::ggml::devices::devices().into_iter().map(json).collect()
}

#[cfg(not(feature = "ggml"))]
fn of_ggml() -> Vec<Value> {
    Vec::new()
}

/// Every device of every engine.
pub(super) fn all() -> Vec<Value> {
    let own = json!({"engine": "cpu", "name": "cpu", "kind": "CPU",
        "description": format!("{}, {} threads", simd::level().name(), default_threads()),
        "memory_free": null, "memory_total": null});
    [own].into_iter().chain(of_ggml()).collect()
}

/// Prints them.
pub(super) fn show(as_json: bool) -> Result<()> {
    let all = all();
    #[cfg(not(feature = "ggml"))]
    super::terminal::note(MISSING);
    if as_json {
        return print_json(&all);
    }
    let mut text =
        "engine  name      kind            free of memory, MB  description\n".to_string();
    for device in all {
        let column = |key: &str| device[key].as_str().unwrap_or_default();
        let memory = match (device["memory_free"].as_u64(), device["memory_total"].as_u64()) {
            (Some(free), Some(total)) => format!("{} of {}", free / 1_000_000, total / 1_000_000),
            _ => String::new(),
        };
        text += &format!(
            "{:6}  {:8}  {:14}  {memory:>18}  {}\n",
            column("engine"),
            column("name"),
            column("kind"),
            column("description")
        );
    }
    print(text.as_bytes())
}
