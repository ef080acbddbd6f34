//! Chat templates: the Jinja program in a model file that turns messages into the text that the
//! model was trained on.
//!
//! A template is code from a stranger. It sees nothing but its variables, has no loader, and is
//! limited in size, nesting, work and output; every limit ends in an error.

mod functions;
mod json;
mod source;

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use chrono::NaiveDateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior};
use serde_json::{Map, Value};

use self::functions::Raised;
use crate::bad_file;
use crate::error::{Error, Result, escaped};

/// Longest output in bytes.
const MAX_OUTPUT: usize = 4 << 20;
/// Work that a template may do, in the engine's units: about one per instruction and per 64 bytes
/// made. It is enough for a thousand messages of a thousand bytes in every known template.
const FUEL: u64 = 1_000_000;
/// Stack of the thread that a template runs on. A value nested as deeply as the fuel allows must
/// be printed and dropped on it; untouched pages cost nothing.
const STACK_BYTES: usize = 512 << 20;
/// Time that a template may take. Real ones take milliseconds; fuel ends most others, but not the
/// printing of a value that holds itself many times over.
const MAX_TIME: Duration = Duration::from_secs(4);
/// The name under which the engine knows the template.
const NAME: &str = "chat template";

/// Whether one is still being rendered after its time.
static RUNS_ON: AtomicBool = AtomicBool::new(false);

/// Whether a template of this process runs on after its time, and may take more and more memory: only
/// the end of the process ends it.
pub fn runs_on() -> bool {
    RUNS_ON.load(Ordering::Relaxed)
}

/// What a template is told besides the messages.
#[derive(Debug, Clone, Default)]
pub struct Context {
    /// Text of the token that begins a sequence.
    pub bos_token: String,
    /// Text of the token that ends a sequence.
    pub eos_token: String,
    /// Whether the text ends with the beginning of a reply.
    pub add_generation_prompt: bool,
    /// The time that the template is told, local.
    pub now: NaiveDateTime,
    /// Tools that the model may call; `None` is told as Python's `None`.
    pub tools: Option<Value>,
    /// More variables.
    pub extra: Map<String, Value>,
}

/// A chat template, ready to render.
pub struct Template {
    environment: Environment<'static>,
}

impl Template {
    /// Compiles a template. An error is of the kind [`Error::File`].
    pub fn new(source: &str) -> Result<Template> {
        let source = source::prepare(source)?;
        on_own_thread(move || {
            let mut environment = environment()?;
            environment.add_template_owned(NAME, source)?;
            Ok(Template { environment })
        })
    }

    /// The text of these messages, an array of objects.
    ///
    /// A message that the template raises itself is an [`Error::Usage`] with its own text: it
    /// refuses the messages. Everything else that fails is an [`Error::File`].
    pub fn render(&self, messages: &Value, context: &Context) -> Result<String> {
        let variables = variables(messages, context);
        let (mut environment, now) = (self.environment.clone(), context.now);
        environment
            .add_function("strftime_now", move |format: &str| functions::strftime(now, format));
        on_own_thread(move || {
            let mut output = Output::default();
            let template = environment.get_template(NAME)?;
            let result = template.render_captured_to(variables, &mut output).map(|_| ());
            if output.full {
                let text = format!("the output is longer than {MAX_OUTPUT} bytes");
                return Err(minijinja::Error::new(ErrorKind::WriteFailure, text));
            }
            result?;
            Ok(String::from_utf8_lossy(&output.bytes).into_owned())
        })
    }
}

/// The variables of a template, as the Python package `transformers` passes them.
fn variables(messages: &Value, context: &Context) -> minijinja::Value {
    let mut all = Map::new();
    let mut set = |name: &str, value: Value| all.insert(name.into(), value);
    set("messages", messages.clone());
    set("tools", context.tools.clone().unwrap_or(Value::Null));
    set("documents", Value::Null);
    set("add_generation_prompt", context.add_generation_prompt.into());
    set("bos_token", context.bos_token.clone().into());
    set("eos_token", context.eos_token.clone().into());
    all.extend(context.extra.clone());
    json::to_engine(&Value::Object(all))
}

/// An engine that behaves as Jinja2 does with the settings of `transformers`.
fn environment() -> std::result::Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_undefined_behavior(UndefinedBehavior::Lenient);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(functions::method);
    environment.add_filter("tojson", json::tojson);
    environment.add_function("raise_exception", functions::raise_exception);
    Ok(environment)
}

/// Output up to the limit.
#[derive(Default)]
struct Output {
    bytes: Vec<u8>,
    full: bool,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_OUTPUT {
            self.full = true;
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Runs the engine where neither deep recursion nor endless work ends the process.
fn on_own_thread<T: Send + 'static>(
    run: impl FnOnce() -> std::result::Result<T, minijinja::Error> + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
    let thread = thread.spawn(move || {
        // Nobody listens after the time is over.
        let _ = sender.send(run().map_err(|e| explained(&e)));
    });
    thread.map_err(|e| Error::Runtime(format!("cannot start a thread for the template: {e}")))?;
    match receiver.recv_timeout(MAX_TIME) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => {
            RUNS_ON.store(true, Ordering::Relaxed);
            bad_file!("chat template: not done after {} s", MAX_TIME.as_secs())
        }
        Err(RecvTimeoutError::Disconnected) => bad_file!("chat template: the engine failed"),
    }
}

/// The engine's error as ours, on one line.
fn explained(error: &minijinja::Error) -> Error {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(inner) = cause {
        if let Some(Raised(text)) = inner.downcast_ref() {
            return Error::Usage(escaped(text));
        }
        cause = inner.source();
    }
    let line = error.line().map(|line| format!(" line {line}")).unwrap_or_default();
    let what = match error.kind() {
        ErrorKind::OutOfFuel => "does more work than is allowed".into(),
        kind => match error.detail() {
            Some(detail) => format!("{kind}: {}", escaped(detail)),
            None => kind.to_string(),
        },
    };
    Error::File(format!("chat template{line}: {what}"))
}
