//! `qkov generate`: a prompt and its continuation, on stdout and nothing else there.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;

use super::Run;
use super::grammar::GrammarArgs;
use super::options::RunArgs;
use super::sampling::SamplingArgs;
use super::terminal::{note, print_text, read_text};
use crate::error::Result;
use crate::gguf::Lock;
use crate::session::sampler::Sampler;
use crate::token::StreamDecoder;

#[derive(Args)]
pub(super) struct Generate {
    #[command(flatten)]
    run: RunArgs,
    /// The prompt [default: stdin]
    #[arg(short, long, value_name = "TEXT", conflicts_with = "file")]
    prompt: Option<String>,
    /// Reads the prompt from a file
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Tokens to generate at most [default: until the model ends or the context is full]
    #[arg(short, long, value_name = "N")]
    n_predict: Option<usize>,
    /// Reads the names of special tokens in the prompt as these tokens
    #[arg(long)]
    parse_special: bool,
    /// Goes on after the model has ended
    #[arg(long, conflicts_with_all = ["json_schema", "grammar"])]
    ignore_eos: bool,
    /// File that keeps what was read, so that a prompt that begins alike need not be read again: read if
    /// it is there, and written at the end; for one process at a time
    #[arg(long, value_name = "FILE")]
    session: Option<PathBuf>,
    /// Tells times on stderr at the end
    #[arg(short, long)]
    verbose: bool,
    #[command(flatten)]
    grammar: GrammarArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
}

impl Run for Generate {
    const NAME: &'static str = "generate";
    const ABOUT: &'static str = "Continue a text";

    fn run(self) -> Result<()> {
        let _lock = self.session.as_deref().map(Lock::take).transpose()?;
        let prompt = match &self.prompt {
            Some(text) => text.clone(),
            None => read_text(self.file.as_deref())?,
        };
        let start = Instant::now();
        let model = self.run.open()?;
        let mut session = self.run.session(model.clone(), self.run.ctx)?;
        let tokenizer = &model.tokenizer;
        let mut sampler = Sampler::new(self.sampling.params(tokenizer)?, model.hparams.n_vocab)?;
        let mut grammar = self.grammar.open(tokenizer, model.hparams.n_vocab)?;
        let mut tokens = tokenizer.encode(&prompt, true, self.parse_special)?;
        if tokens.is_empty() {
            // Something must be read before anything can follow.
            tokens.extend(tokenizer.bos().or(tokenizer.eos()));
        }
        if let Some(path) = self.session.as_deref().filter(|path| path.exists()) {
            session.restore(path)?;
        }
        session.check_room(session.n_positions(&tokens, &[]))?;
        print_text(&prompt)?;
        tokens.iter().for_each(|t| sampler.accept(*t));
        session.become_tokens(&tokens, &[], &mut |_| true)?;
        let (prompt_time, mut n) = (start.elapsed(), 0);
        let start = Instant::now();
        let mut decoder = StreamDecoder::default();
        while self.n_predict.is_none_or(|max| n < max) {
            let token = match &mut grammar {
                Some(grammar) if grammar.is_over() => break,
                Some(grammar) => {
                    let mut logits = session.finite_logits()?.to_vec();
                    grammar.restrict(&mut logits)?;
                    let token = sampler.sample(&logits);
                    grammar.accept(token)?;
                    token
                }
                None => sampler.sample(session.finite_logits()?),
            };
            if tokenizer.is_eog(token) && !self.ignore_eos {
                break;
            }
            sampler.accept(token);
            n += 1;
            print_text(&decoder.push(tokenizer.piece(token, false)))?;
            if session.tokens().len() == session.n_ctx() {
                note(&format!("\nnote: the context of {} tokens is full", session.n_ctx()));
                break;
            }
            session.feed(&[token])?;
        }
        print_text(&decoder.finish())?;
        print_text("\n")?;
        if let Some(path) = &self.session {
            session.save(path, "")?;
        }
        if grammar.is_some_and(|g| !g.is_over()) {
            note("note: the text ends before the grammar does");
        }
        if self.verbose {
            session.notes().iter().for_each(|text| note(text));
            let seconds = start.elapsed().as_secs_f64();
            note(&format!(
                "start and prompt: {} tokens in {:.0} ms; generation: {n} tokens in {:.0} ms, {:.1} per second",
                tokens.len(),
                prompt_time.as_secs_f64() * 1e3,
                seconds * 1e3,
                n as f64 / seconds
            ));
        }
        Ok(())
    }
}
