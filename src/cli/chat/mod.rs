//! `qkov chat`: talk to a model.

mod input;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;

use self::input::{Input, Source};
use super::Run;
use super::options::RunArgs;
use super::sampling::SamplingArgs;
use super::signals::{at_interrupt, leave};
use super::terminal::{note, print_text, progress, read_text};
use crate::bad_usage;
use crate::error::{Error, Result, escaped};
use crate::gguf::{Lock, replace_file};
use crate::session::Session;
use crate::session::chat::{self, End, Event, Message, Reply};

#[derive(Args)]
pub(super) struct Chat {
    #[command(flatten)]
    run: RunArgs,
    /// Says this, prints the reply and leaves
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    /// System prompt
    #[arg(short, long, value_name = "TEXT")]
    system: Option<String>,
    /// Chat template file instead of the model's own
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// Tokens of a reply at most [default: until the model ends]
    #[arg(short, long, value_name = "N")]
    n_predict: Option<usize>,
    /// File that keeps the conversation and what was read of it: goes on with it if it is there, and is
    /// written after every reply; for one process at a time
    #[arg(long, value_name = "FILE")]
    session: Option<PathBuf>,
    /// Tells times after every reply
    #[arg(short, long)]
    verbose: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// Whether a reply runs, and whether Ctrl-C asked it to stop.
static REPLYING: AtomicBool = AtomicBool::new(false);
static STOP: AtomicBool = AtomicBool::new(false);

/// Exit code after Ctrl-C, as shells have it.
const INTERRUPTED: i32 = 130;

impl Run for Chat {
    const NAME: &'static str = "chat";
    const ABOUT: &'static str = "Talk to a model";

    fn run(self) -> Result<()> {
        let _lock = self.session.as_deref().map(Lock::take).transpose()?;
        let model = self.run.open()?;
        let mut session = self.run.session(model.clone(), self.run.ctx)?;
        let messages = match self.session.as_deref().filter(|path| path.exists()) {
            Some(path) => kept(path, &session.restore(path)?)?,
            None => Vec::new(),
        };
        let template = self.template.as_deref().map(|path| read_text(Some(path))).transpose()?;
        let params = self.sampling.params(&model.tokenizer)?;
        let mut chat = chat::Chat::new(session, template.as_deref(), params)?;
        chat.set_messages(messages);
        let mut talk = Talk { chat, args: self, last: None };
        if let Some(system) = talk.args.system.clone() {
            talk.system(&system)?;
        }
        // It stops a reply; the second one, or one between replies, ends the chat.
        at_interrupt(|| REPLYING.load(Ordering::SeqCst) && !STOP.swap(true, Ordering::SeqCst));
        match talk.args.prompt.clone() {
            Some(prompt) => talk.reply(&prompt),
            None => talk.go_on(),
        }
    }
}

/// The messages of a conversation in a session file, from the note in it.
fn kept(path: &Path, note: &str) -> Result<Vec<Message>> {
    if note.is_empty() {
        return Ok(Vec::new());
    }
    let messages = serde_json::from_str(note);
    messages.map_err(|e| Error::File(format!("not a conversation: {e}")).at(path))
}

/// A command inside the chat.
struct Command {
    name: &'static str,
    argument: &'static str,
    about: &'static str,
    run: fn(&mut Talk, &str) -> Result<()>,
}

const fn command(
    name: &'static str,
    argument: &'static str,
    about: &'static str,
    run: fn(&mut Talk, &str) -> Result<()>,
) -> Command {
    Command { name, argument, about, run }
}

/// Every command inside the chat; `/exit` ends the loop that runs them.
static COMMANDS: &[Command] = &[
    command("/help", "", "this list", |talk, _| talk.help()),
    command("/clear", "", "forget the conversation, keep the system prompt", |talk, _| {
        talk.clear()
    }),
    command("/save", "FILE", "write the conversation to a file", Talk::save),
    command("/load", "FILE", "go on with a conversation from a file", Talk::load),
    command(
        "/system",
        "[TEXT]",
        "show or set the system prompt; \"-\" removes it",
        Talk::system_command,
    ),
    command("/regen", "", "another reply to the last message", |talk, _| talk.regenerate()),
    command("/stats", "", "model, context in use, times of the last reply", |talk, _| talk.stats()),
    command("/exit", "", "leave (also Ctrl-D)", |_, _| Ok(())),
];

/// A running chat.
struct Talk {
    chat: chat::Chat,
    args: Chat,
    last: Option<(Reply, Times)>,
}

/// How long the parts of a reply took.
#[derive(Clone, Copy)]
struct Times {
    first: Duration,
    rest: Duration,
}

impl Talk {
    /// Reads messages and commands until the end.
    fn go_on(&mut self) -> Result<()> {
        let mut source = Source::new(COMMANDS.iter().map(|c| c.name).collect())?;
        if source.is_terminal() {
            self.banner();
        }
        let mut interrupted = false;
        loop {
            let text = match source.next()? {
                Input::Text(text) => text,
                Input::End => break,
                Input::Interrupted if interrupted => {
                    source.close();
                    leave(INTERRUPTED);
                }
                Input::Interrupted => {
                    note("(Ctrl-C again, Ctrl-D or /exit to leave)");
                    interrupted = true;
                    continue;
                }
            };
            interrupted = false;
            if text.trim() == "/exit" {
                break;
            }
            let done = match text.starts_with('/') && !text.contains('\n') {
                true => self.command(&text),
                false => self.reply(&text),
            };
            if let Err(error) = done {
                // What went wrong with one message must not end the conversation.
                note(&format!("error: {error}"));
            }
        }
        source.close();
        Ok(())
    }

    /// Model and plan, in one line.
    fn model_line(&self) {
        let model = self.chat.session().model();
        let [norm, form, mask] = model.plan.names();
        note(&format!(
            "{} ({}, {:.1} M parameters), context {} tokens, {norm} / {form} / {mask}",
            escaped(&self.args.run.model.name()),
            model.kind(),
            model.n_params() as f64 / 1e6,
            self.chat.session().n_ctx(),
        ));
    }

    fn banner(&self) {
        self.model_line();
        if self.args.run.model.is_shipped() {
            note(
                "This tiny model has read old books, and writes like them. Try: Write a passage about the sea and a storm.",
            );
        }
        let n = self.chat.messages.iter().filter(|m| m.role != "system").count();
        if n > 0 {
            note(&format!("The conversation goes on after {n} messages."));
        }
        note("/help lists commands; Ctrl-C stops a reply; a line that ends with \\ goes on.\n");
    }

    fn command(&mut self, text: &str) -> Result<()> {
        let (name, argument) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        match COMMANDS.iter().find(|c| c.name == name) {
            Some(command) => (command.run)(self, argument.trim()),
            None => bad_usage!("{} is no command; /help lists them", escaped(name)),
        }
    }

    /// One message and its reply, streamed to stdout.
    fn reply(&mut self, text: &str) -> Result<()> {
        STOP.store(false, Ordering::SeqCst);
        REPLYING.store(true, Ordering::SeqCst);
        let start = Instant::now();
        let mut first = None;
        let mut failed = None;
        let bar = progress(0, "reading");
        let reply = self.chat.reply(text, self.args.n_predict, &mut |event| {
            match event {
                Event::Prompt { done, total } => {
                    bar.set_length(total as u64);
                    bar.set_position(done as u64);
                }
                Event::Text(text) => {
                    if first.is_none() {
                        bar.finish_and_clear();
                        first = Some(start.elapsed());
                    }
                    failed = failed.take().or(print_text(text).err());
                }
            }
            failed.is_none() && !STOP.load(Ordering::SeqCst)
        });
        REPLYING.store(false, Ordering::SeqCst);
        bar.finish_and_clear();
        let reply = reply?;
        print_text("\n")?;
        if let Some(error) = failed {
            return Err(error);
        }
        match reply.end {
            End::Model => {}
            End::Stopped => note("[stopped]"),
            End::Length => note("[the reply reached its limit; /regen or go on]"),
            End::ContextFull => note("[the context is full]"),
        }
        if reply.n_dropped > 0 {
            note(&format!("[context full: the oldest {} messages have left it]", reply.n_dropped));
        }
        let first = first.unwrap_or_else(|| start.elapsed());
        self.last = Some((reply, Times { first, rest: start.elapsed() - first }));
        if let Some(path) = &self.args.session {
            self.chat.session().save(path, &json!(self.chat.messages).to_string())?;
        }
        if self.args.verbose { self.times() } else { Ok(()) }
    }

    fn times(&self) -> Result<()> {
        self.chat.session().notes().iter().for_each(|text| note(&format!("[{text}]")));
        if let Some((reply, times)) = &self.last {
            let rate = reply.n_reply.saturating_sub(1) as f64 / times.rest.as_secs_f64();
            note(&format!(
                "[{} tokens of prompt; first token after {:.0} ms; {} tokens, {rate:.1} per second]",
                reply.n_prompt,
                times.first.as_secs_f64() * 1e3,
                reply.n_reply,
            ));
        }
        Ok(())
    }

    fn help(&mut self) -> Result<()> {
        for c in COMMANDS {
            note(&format!("  {:16} {}", format!("{} {}", c.name, c.argument), c.about));
        }
        note("Several lines: end each but the last with \\, or put \"\"\" before and after.");
        Ok(())
    }

    fn clear(&mut self) -> Result<()> {
        let system = self.chat.system().map(|text| Message::new("system", text));
        self.chat.set_messages(system.into_iter().collect());
        Ok(())
    }

    fn system(&mut self, text: &str) -> Result<()> {
        if !self.chat.set_system(text)? {
            note("warning: this model's template ignores system prompts");
        }
        Ok(())
    }

    fn system_command(&mut self, text: &str) -> Result<()> {
        match text {
            "" => note(self.chat.system().unwrap_or("(none)")),
            "-" => self.system("")?,
            text => self.system(text)?,
        }
        Ok(())
    }

    fn regenerate(&mut self) -> Result<()> {
        match self.chat.take_last_turn() {
            Some(text) => self.reply(&text),
            None => bad_usage!("there is no message to reply to yet"),
        }
    }

    fn save(&mut self, file: &str) -> Result<()> {
        if file.is_empty() {
            bad_usage!("/save needs the name of a file");
        }
        let value = json!({"model": self.args.run.model.name(), "messages": self.chat.messages});
        let text = format!("{value:#}\n");
        replace_file(Path::new(file), |out| out(text.as_bytes()))?;
        note(&format!("{} messages saved", self.chat.messages.len()));
        Ok(())
    }

    fn load(&mut self, file: &str) -> Result<()> {
        #[derive(serde::Deserialize)]
        struct Saved {
            messages: Vec<Message>,
        }
        let path = Path::new(file);
        let saved: Saved = serde_json::from_str(&read_text(Some(path))?)
            .map_err(|e| Error::File(format!("not a saved conversation: {e}")).at(path))?;
        self.chat.set_messages(saved.messages);
        note(&format!("{} messages loaded", self.chat.messages.len()));
        Ok(())
    }

    fn stats(&mut self) -> Result<()> {
        let session: &Session = self.chat.session();
        self.model_line();
        note(&format!(
            "{} messages; {} of {} tokens of context in use, cache {:.1} MB, {} threads",
            self.chat.messages.len(),
            session.tokens().len(),
            session.n_ctx(),
            session.cache_bytes() as f64 / 1e6,
            session.n_threads().one,
        ));
        self.times()
    }
}
