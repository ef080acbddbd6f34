//! `qkov template`: messages to the text that a model reads.

use std::path::PathBuf;

use chrono::NaiveDateTime;
use clap::Args;
use serde_json::Value;

use super::Run;
use super::model_file::FileArgs;
use super::terminal::{print, read_text};
use crate::bad_usage;
use crate::error::{Error, Result};
use crate::session::chat::template_context;
use crate::token::Tokenizer;
use crate::token::template::{self, Context};

#[derive(Args)]
pub(super) struct Template {
    #[command(flatten)]
    model: FileArgs,
    /// A template file instead of the model's own
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Text of the token that begins a sequence [default: the model's, or empty with --file]
    #[arg(long, value_name = "S")]
    bos: Option<String>,
    /// Text of the token that ends a sequence [default: the model's, or empty with --file]
    #[arg(long, value_name = "S")]
    eos: Option<String>,
    /// The time that the template is told, such as 2026-11-24T12:00:00 [default: now]
    #[arg(long, value_name = "TIME")]
    now: Option<NaiveDateTime>,
    /// Ends with the beginning of a reply
    #[arg(long)]
    add_generation_prompt: bool,
    /// JSON file with the tools that the template is told of
    #[arg(long, value_name = "FILE")]
    tools: Option<PathBuf>,
}

impl Run for Template {
    const NAME: &'static str = "template";
    const ABOUT: &'static str = "Render messages, a JSON array on stdin, as the model reads them";

    fn run(self) -> Result<()> {
        let (source, mut context) = match &self.file {
            Some(file) => (read_text(Some(file))?, Context::default()),
            None => {
                let gguf = self.model.gguf()?;
                let tokenizer = Tokenizer::from_gguf(&gguf).map_err(|e| self.model.at(e))?;
                let Some(source) = gguf.str("tokenizer.chat_template")? else {
                    bad_usage!(
                        "{}: the model has no chat template; name one with --file",
                        self.model.name()
                    );
                };
                (source.to_string(), template_context(&tokenizer))
            }
        };
        let json = |text: String, what: &str| -> Result<Value> {
            serde_json::from_str(&text)
                .map_err(|e| Error::Usage(format!("{what} are not JSON: {e}")))
        };
        context.bos_token = self.bos.unwrap_or(context.bos_token);
        context.eos_token = self.eos.unwrap_or(context.eos_token);
        context.now = self.now.unwrap_or_else(|| chrono::Local::now().naive_local());
        context.add_generation_prompt = self.add_generation_prompt;
        if let Some(tools) = &self.tools {
            context.tools = Some(json(read_text(Some(tools))?, "the tools")?);
        }
        let messages = json(read_text(None)?, "the messages")?;
        if !messages.is_array() {
            bad_usage!("the messages are not a JSON array");
        }
        print(template::Template::new(&source)?.render(&messages, &context)?.as_bytes())
    }
}
