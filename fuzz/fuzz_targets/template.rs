//! Chat templates and messages: a template, and behind a line `---` the messages as JSON.

#![no_main]

use libfuzzer_sys::fuzz_target;
use qkov::error::Error;
use qkov::token::template::{Context, Template};
use qkov_fuzz::forgive;
use serde_json::{Value, json};

fn check(error: Error) {
    let text = error.to_string();
    assert!(!text.chars().any(char::is_control), "{text:?}");
}

fuzz_target!(init: forgive(&["minijinja"]), |data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (source, messages) = text.split_once("\n---\n").unwrap_or((text, ""));
    let template = match Template::new(source) {
        Ok(template) => template,
        Err(e) => return check(e),
    };
    let messages = serde_json::from_str(messages).unwrap_or_else(
        |_| json!([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]),
    );
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {}}}]);
    for tools in [None, Some::<Value>(tools)] {
        let context = Context {
            bos_token: "<s>".into(),
            eos_token: "</s>".into(),
            add_generation_prompt: tools.is_some(),
            tools,
            ..Context::default()
        };
        if let Err(e) = template.render(&messages, &context) {
            check(e);
        }
    }
});
