//! A conversation: messages in, a streamed reply out, the oldest turns leave when space runs out.
//!
//! To masks that treat prompts differently, a turn's prompt is what must be read for it: from where
//! the conversation, as the template writes it, differs from what was read before, up to the reply.
//! So a turn sees those before it, and its own; what is read again after turns have left, or after
//! another conversation was loaded, is one prompt.

use serde_json::{Value, json};

use super::Session;
use super::sampler::{Sampler, SamplerParams};
use crate::bad_usage;
use crate::error::Result;
use crate::token::template::{Context, Template};
use crate::token::{StreamDecoder, Tokenizer};

/// Tokens kept free for a reply when the prompt is fitted.
const MIN_REPLY: usize = 64;

/// One message.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Its text.
    pub content: String,
}

impl Message {
    /// A message of this role.
    pub fn new(role: &str, content: impl Into<String>) -> Message {
        Message { role: role.into(), content: content.into() }
    }
}

/// A conversation with a model.
pub struct Chat {
    session: Session,
    template: Template,
    params: SamplerParams,
    sampler: Sampler,
    /// All messages, also those that no longer fit the context.
    pub messages: Vec<Message>,
    n_left_out: usize,
}

/// Why a reply ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The model ended it.
    Model,
    /// The caller stopped it.
    Stopped,
    /// It reached the limit on its length.
    Length,
    /// The context is full, and nothing older is left to leave.
    ContextFull,
}

/// What a reply was.
#[derive(Debug, Clone)]
pub struct Reply {
    /// Why it ended.
    pub end: End,
    /// Tokens of the prompt that had to be read.
    pub n_prompt: usize,
    /// Tokens of the reply.
    pub n_reply: usize,
    /// Messages that left the context for this reply.
    pub n_dropped: usize,
}

/// What a caller is told during a reply; it returns false to stop.
pub enum Event<'a> {
    /// The prompt was read up to here.
    Prompt {
        /// Tokens read.
        done: usize,
        /// Tokens to read.
        total: usize,
    },
    /// More of the reply, complete characters only.
    Text(&'a str),
}

impl Chat {
    /// A conversation without messages. `template`: another one than the model's own.
    pub fn new(session: Session, template: Option<&str>, params: SamplerParams) -> Result<Chat> {
        let own = session.model().gguf.str("tokenizer.chat_template")?;
        let Some(source) = template.or(own) else {
            bad_usage!(
                "this model has no chat template; use generate, or name one with --template"
            );
        };
        let template = Template::new(source)?;
        let sampler = Sampler::new(params.clone(), session.model().hparams.n_vocab)?;
        Ok(Chat { session, template, params, sampler, messages: Vec::new(), n_left_out: 0 })
    }

    /// The timeline behind the conversation.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Replaces all messages.
    pub fn set_messages(&mut self, messages: Vec<Message>) {
        self.messages = messages;
        self.n_left_out = 0;
    }

    /// The system prompt, if there is one.
    pub fn system(&self) -> Option<&str> {
        self.messages.first().filter(|m| m.role == "system").map(|m| m.content.as_str())
    }

    /// Sets or, with an empty text, removes the system prompt. False if the template ignores it.
    pub fn set_system(&mut self, text: &str) -> Result<bool> {
        if self.system().is_some() {
            self.messages.remove(0);
        }
        if text.is_empty() {
            return Ok(true);
        }
        self.messages.insert(0, Message::new("system", text));
        let probe = |messages: &[Message]| self.render(messages.iter());
        let user = Message::new("user", "?");
        let [with, without] = [vec![Message::new("system", text), user.clone()], vec![user]];
        Ok(probe(&with)? != probe(&without)?)
    }

    /// Tokens of the present conversation, as the next reply would read them.
    pub fn n_tokens(&self) -> Result<usize> {
        Ok(self.prompt(self.n_left_out)?.len())
    }

    /// Removes the last reply and the message before it, which is returned.
    pub fn take_last_turn(&mut self) -> Option<String> {
        let at = self.messages.iter().rposition(|m| m.role == "user")?;
        let text = self.messages.get(at)?.content.clone();
        self.messages.truncate(at);
        self.n_left_out = self.n_left_out.min(at - usize::from(self.system().is_some()).min(at));
        Some(text)
    }

    /// Adds a user message and the reply to it, at most `max_tokens` long.
    ///
    /// A reply that was stopped is kept as far as it came; after an error, nothing is added.
    pub fn reply(
        &mut self,
        text: &str,
        max_tokens: Option<usize>,
        on: &mut dyn FnMut(Event) -> bool,
    ) -> Result<Reply> {
        self.messages.push(Message::new("user", text));
        let (n_messages, left_out) = (self.messages.len(), self.n_left_out);
        let mut content = String::new();
        let result = self.stream(&mut content, max_tokens, on);
        match &result {
            Ok(_) => self.messages.push(Message::new("assistant", content)),
            Err(_) => {
                self.messages.truncate(n_messages - 1);
                self.n_left_out = left_out;
            }
        }
        result
    }

    fn stream(
        &mut self,
        content: &mut String,
        max_tokens: Option<usize>,
        on: &mut dyn FnMut(Event) -> bool,
    ) -> Result<Reply> {
        let model = self.session.model().clone();
        let left_out = self.n_left_out;
        let mut prompt = self.fitted(MIN_REPLY.min(self.session.n_ctx() / 4), 0)?;
        let n_prompt = prompt.len();
        self.restart_sampler(&prompt)?;
        let mut decoder = StreamDecoder::default();
        let mut reply: Vec<u32> = Vec::new();
        let end = loop {
            let total = self.session.n_positions(&prompt, &reply);
            let mut go_on = |done| on(Event::Prompt { done, total });
            if !self.session.become_tokens(&prompt, &reply, &mut go_on)? {
                break End::Stopped;
            }
            let end = self.sample(&model.tokenizer, &mut reply, max_tokens, &mut |bytes| {
                let text = decoder.push(bytes);
                content.push_str(&text);
                text.is_empty() || on(Event::Text(&text))
            })?;
            if end != End::ContextFull || !self.drop_turn() {
                break end;
            }
            // The reply goes on from a shorter prompt.
            prompt = self.fitted(MIN_REPLY.min(self.session.n_ctx() / 4), reply.len())?;
        };
        let rest = decoder.finish();
        content.push_str(&rest);
        on(Event::Text(&rest));
        let n_dropped = self.n_left_out - left_out;
        Ok(Reply { end, n_prompt, n_reply: reply.len(), n_dropped })
    }

    /// Samples tokens into `reply` until it ends or the context is full.
    fn sample(
        &mut self,
        tokenizer: &Tokenizer,
        reply: &mut Vec<u32>,
        max_tokens: Option<usize>,
        emit: &mut dyn FnMut(&[u8]) -> bool,
    ) -> Result<End> {
        loop {
            if max_tokens.is_some_and(|max| reply.len() >= max) {
                return Ok(End::Length);
            }
            let token = self.sampler.sample(self.session.finite_logits()?);
            if tokenizer.is_eog(token) {
                return Ok(End::Model);
            }
            self.sampler.accept(token);
            reply.push(token);
            if !emit(tokenizer.piece(token, false)) {
                return Ok(End::Stopped);
            }
            if self.session.tokens().len() == self.session.n_ctx() {
                return Ok(End::ContextFull);
            }
            self.session.feed(&[token])?;
        }
    }

    /// The random sequence goes on over the conversation; penalties look at the present prompt.
    fn restart_sampler(&mut self, prompt: &[u32]) -> Result<()> {
        self.sampler.forget();
        let skip = prompt.len().saturating_sub(self.params.n_history());
        prompt[skip..].iter().for_each(|token| self.sampler.accept(*token));
        Ok(())
    }

    /// The tokens of the conversation with `n_free` and `n_reply` tokens to spare, for which the
    /// oldest turns leave.
    fn fitted(&mut self, n_free: usize, n_reply: usize) -> Result<Vec<u32>> {
        loop {
            let tokens = self.prompt(self.n_left_out)?;
            let n = self.session.n_positions(&tokens, &[]);
            if n + n_free + n_reply <= self.session.n_ctx() {
                return Ok(tokens);
            }
            if !self.drop_turn() {
                bad_usage!(
                    "the message takes {n} tokens with its frame; the context holds {}, less {n_free} for the reply",
                    self.session.n_ctx()
                );
            }
        }
    }

    /// Leaves out the oldest user message and what answers it. False if only the last is left.
    fn drop_turn(&mut self) -> bool {
        let start = usize::from(self.system().is_some());
        let users = |m: &Message| m.role == "user";
        let rest = self.messages.get(start + self.n_left_out..).unwrap_or_default();
        match rest.iter().skip(1).position(users) {
            Some(n) => {
                self.n_left_out += n + 1;
                true
            }
            None => false,
        }
    }

    fn prompt(&self, n_left_out: usize) -> Result<Vec<u32>> {
        let n_system = usize::from(self.system().is_some());
        let system = self.messages.iter().take(n_system);
        let text = self.render(system.chain(self.messages.iter().skip(n_system + n_left_out)))?;
        encode_rendered(&self.session.model().tokenizer, &text)
    }

    fn render<'a>(&self, messages: impl Iterator<Item = &'a Message>) -> Result<String> {
        let messages: Vec<Value> =
            messages.map(|m| json!({"role": m.role, "content": m.content})).collect();
        self.template
            .render(&Value::Array(messages), &template_context(&self.session.model().tokenizer))
    }
}

/// The tokens of what a template has written. One that writes the first token itself must not get a
/// second one.
pub fn encode_rendered(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let bos = tokenizer.bos().map(|id| tokenizer.text(id));
    let has_bos = bos.is_some_and(|b| !b.is_empty() && text.as_bytes().starts_with(b));
    tokenizer.encode(text, tokenizer.add_bos() && !has_bos, true)
}

/// What the model's template is told besides the messages.
pub fn template_context(tokenizer: &Tokenizer) -> Context {
    let text = |id: Option<u32>| {
        id.map(|id| String::from_utf8_lossy(tokenizer.text(id)).into_owned()).unwrap_or_default()
    };
    Context {
        bos_token: text(tokenizer.bos()),
        eos_token: text(tokenizer.eos()),
        add_generation_prompt: true,
        now: chrono::Local::now().naive_local(),
        tools: None,
        extra: Default::default(),
    }
}
