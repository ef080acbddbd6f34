//! A session in a file: the tokens that were read and what is cached of them, so that they need not be
//! read again.
//!
//! The file is a GGUF. It says which model and plan it belongs to, for which alone its cache means
//! anything, and has a checksum over the rest.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::Session;
use super::timeline::Timeline;
use crate::arch::Scaling;
use crate::bad_file;
use crate::error::Result;
use crate::gguf::{Bytes, Data, Gguf, Writer};
use crate::model::Model;
use crate::quant::type_of;

const VERSION: u32 = 1;
/// Numbers of types among those of GGUF.
const I8: u32 = 24;
const I32: u32 = 26;

/// Keys of a file.
mod key {
    pub(super) const VERSION: &str = "qkov.session.version";
    pub(super) const MODEL: &str = "qkov.session.model";
    pub(super) const PLAN: &str = "qkov.session.plan";
    pub(super) const PLAN_HASH: &str = "qkov.session.plan_hash";
    pub(super) const CACHE: &str = "qkov.session.cache";
    pub(super) const PROMPTS: &str = "qkov.session.prompts";
    pub(super) const NOTE: &str = "qkov.session.note";
    pub(super) const CHECKSUM: &str = "qkov.session.sha256";
}

/// The name of the tensor with the tokens.
const TOKENS: &str = "tokens";

/// What a session is a session of.
struct Owner {
    model: String,
    /// For people.
    plan: String,
    /// For the program.
    plan_hash: String,
    cache: String,
}

impl Owner {
    fn new(session: &Session) -> Owner {
        let model = session.model();
        let (keys, values) = session.cache_types();
        let n_ctx = session.n_ctx();
        // Only in some models does what is cached depend on the length of the context.
        let is_long = |scaling: &Scaling| matches!(scaling, Scaling::Long { n_ctx_orig } if n_ctx > *n_ctx_orig);
        let length = match model.hparams.ropes.iter().any(|rope| is_long(&rope.scaling)) {
            true => ", long",
            false => "",
        };
        Owner {
            model: model.gguf.hash(),
            plan: model.plan.names().join(" / "),
            plan_hash: plan_hash(model),
            cache: format!("{}, {}{length}", keys.name(), values.name()),
        }
    }

    /// Refuses a file of another.
    fn check(&self, gguf: &Gguf) -> Result<()> {
        let text = |key: &str| -> Result<String> { Ok(gguf.str(key)?.unwrap_or("").to_string()) };
        let found = text(key::MODEL)?;
        if found != self.model {
            bad_file!("a session of another model: that of {found}; this one is {}", self.model);
        }
        if text(key::PLAN_HASH)? != self.plan_hash {
            let found = text(key::PLAN)?;
            bad_file!("a session with another plan: {found}; this one has {}", self.plan);
        }
        let found = text(key::CACHE)?;
        if found != self.cache {
            bad_file!("a session whose cache is of types {found}; this one has {}", self.cache);
        }
        Ok(())
    }
}

/// A number for how each layer attends: its plan, and both ends of its matrices, which forms change.
fn plan_hash(model: &Model) -> String {
    let mut hash = Sha256::new();
    for (plan, layer) in model.plan.layers.iter().zip(&model.layers) {
        hash.update(format!("{}; {}; ", plan.form.text(), plan.mask.text()));
        plan.normalizers.iter().for_each(|n| hash.update(format!("{}; ", n.text())));
        for mean in &plan.means {
            let mean = mean.iter().flat_map(|mean| mean.iter());
            mean.for_each(|x| hash.update(x.to_le_bytes()));
            hash.update(b";");
        }
        for linear in [&layer.attn_q, &layer.attn_k, &layer.attn_v, &layer.attn_output] {
            hash.update(linear.weight.row(0));
            hash.update(linear.weight.row(linear.weight.n_out - 1));
        }
    }
    hexadecimal(&hash.finalize())
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the checksum is of.
fn checksum<'a>(texts: [&'a str; 2], parts: impl Iterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in texts.map(str::as_bytes).into_iter().chain(parts) {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hexadecimal(&hash.finalize())
}

impl Session {
    /// Writes what was read and what is cached of it to a file, over one that is there, with a note.
    ///
    /// # Errors
    ///
    /// What cannot be written, and an engine whose cache is not at hand.
    pub fn save(&self, path: &Path, note: &str) -> Result<()> {
        let parts = self.engine.saved(self.tokens().len())?;
        let prompts = self.timeline.prompts_text();
        let tokens: Vec<u8> = self.tokens().iter().flat_map(|token| token.to_le_bytes()).collect();
        let bytes = std::iter::once(&tokens[..]).chain(parts.iter().map(|(_, bytes)| &bytes[..]));
        let sum = checksum([&prompts, note], bytes);
        let owner = Owner::new(self);
        let mut writer = Writer::new();
        // For those who take it for a model.
        writer.set("general.type", "session")?;
        writer.set("general.architecture", "session")?;
        writer.set(key::VERSION, VERSION)?;
        writer.set(key::MODEL, &owner.model[..])?;
        writer.set(key::PLAN, &owner.plan[..])?;
        writer.set(key::PLAN_HASH, &owner.plan_hash[..])?;
        writer.set(key::CACHE, &owner.cache[..])?;
        writer.set(key::PROMPTS, &prompts[..])?;
        writer.set(key::NOTE, note)?;
        writer.set(key::CHECKSUM, &sum[..])?;
        let mut tensor = |name: &str, id: u32, n: usize, bytes: Vec<u8>| match type_of(id) {
            Some(ty) => writer.tensor(name, ty, &[n as u64], Data::View(Bytes::from(bytes))),
            None => bad_file!("there is no type {id}"),
        };
        tensor(TOKENS, I32, self.tokens().len(), tokens)?;
        for (name, bytes) in parts {
            tensor(&name, I8, bytes.len(), bytes)?;
        }
        writer.write(path)
    }

    /// Goes on with the session in a file; the note that was saved with it.
    ///
    /// # Errors
    ///
    /// A file that is none, is damaged, does not fit the context, or belongs to another model or plan:
    /// then nothing changes, unless it was forged: then nothing is left.
    pub fn restore(&mut self, path: &Path) -> Result<String> {
        let gguf = Gguf::open(path)?;
        self.restored(&gguf).map_err(|e| e.at(path))
    }

    fn restored(&mut self, gguf: &Gguf) -> Result<String> {
        match gguf.u32(key::VERSION)? {
            Some(VERSION) => {}
            Some(found) => bad_file!("a session of version {found}; {VERSION} is known"),
            None => bad_file!("not a session"),
        }
        Owner::new(self).check(gguf)?;
        let data = |name: &str| gguf.tensor(name).map(|tensor| gguf.data(tensor));
        let Some(tokens) = data(TOKENS) else { bad_file!("damaged: it has no tokens") };
        let text = |key: &str| -> Result<&str> { Ok(gguf.str(key)?.unwrap_or("")) };
        let (prompts, note) = (text(key::PROMPTS)?, text(key::NOTE)?);
        let (words, rest) = tokens.as_chunks::<4>();
        let ids: Vec<u32> = words.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let names = self.engine.saved_names(ids.len())?;
        let parts: Vec<Bytes> = names.iter().filter_map(|name| data(name)).collect();
        let all = std::iter::once(&tokens[..]).chain(parts.iter().map(|part| &part[..]));
        if text(key::CHECKSUM)? != checksum([prompts, note], all) || !rest.is_empty() {
            bad_file!("damaged: the checksum is another one");
        }
        self.check_tokens(&ids)?;
        self.check_room(ids.len())?;
        let Some(timeline) = Timeline::of(ids, prompts) else {
            bad_file!("damaged: prompts \"{prompts}\"");
        };
        self.rewind(0);
        self.engine.restore(timeline.tokens().len(), &parts)?;
        self.timeline = timeline;
        Ok(note.to_string())
    }
}
