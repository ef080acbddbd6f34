//! `qkov doctor`: what this machine does for a model, and what would help.

mod machine;

use clap::Args;
use serde_json::{Value, json};

use self::machine::{Machine, mb};
use super::memory::Footprint;
use super::options::RunArgs;
use super::terminal::{print, print_json};
use super::{Run, devices};
use crate::cpu::{KvCache, Needs};
use crate::engine::Kind;
use crate::error::{Result, escaped};
use crate::model::Model;
use crate::session::context;

#[derive(Args)]
pub(super) struct Doctor {
    #[command(flatten)]
    run: RunArgs,
    /// Prints everything as JSON
    #[arg(long)]
    json: bool,
}

/// One thing that was looked at.
struct Check {
    topic: &'static str,
    text: String,
    /// What helps, if something is not as it should be.
    remedy: Option<String>,
}

impl Check {
    fn ok(topic: &'static str, text: impl Into<String>) -> Check {
        Check { topic, text: text.into(), remedy: None }
    }

    fn warning(topic: &'static str, text: impl Into<String>, remedy: impl Into<String>) -> Check {
        Check { topic, text: text.into(), remedy: Some(remedy.into()) }
    }

    fn status(&self) -> &'static str {
        if self.remedy.is_some() { "warning" } else { "ok" }
    }

    fn line(&self) -> String {
        let remedy = self.remedy.iter().map(|remedy| format!("{:24}-> {remedy}\n", ""));
        let line = format!("{:9}{:15}{}\n", self.status(), self.topic, escaped(&self.text));
        line + &remedy.collect::<String>()
    }

    fn json(&self) -> Value {
        json!({"topic": self.topic, "status": self.status(), "text": self.text,
               "remedy": self.remedy})
    }
}

impl Run for Doctor {
    const NAME: &'static str = "doctor";
    const ABOUT: &'static str = "Tell what limits a model on this machine, and what would help";

    fn run(self) -> Result<()> {
        self.run.set_level()?;
        let (threads, engine) = (self.run.one_threads()?, self.run.one_engine()?);
        engine.check()?;
        // First, as what is wrong with it is worth more than what follows; of what is odd it warns.
        let model = self.run.open_any()?;
        let needs = Needs::of(&model, self.run.exact)?;
        let machine = Machine::look(threads.most(), self.run.pin())?;
        let mut checks = machine.checks(threads, self.run.pin());
        let devices = devices::all();
        checks.push(engines(engine, &devices));
        let patient = Patient::new(self.run.model.name(), &model, needs, &self.run)?;
        checks.extend(patient.checks(&machine));
        if self.json {
            let list: Vec<Value> = checks.iter().map(Check::json).collect();
            return print_json(&json!({
                "machine": machine.json(threads),
                "devices": devices,
                "model": patient.json(&machine),
                "checks": list,
            }));
        }
        let text: String = checks.iter().map(Check::line).collect();
        let verdict = match checks.iter().filter(|check| check.remedy.is_some()).count() {
            0 => "\nnothing to mend\n".to_string(),
            1 => "\n1 warning\n".to_string(),
            n => format!("\n{n} warnings\n"),
        };
        print((text + &verdict).as_bytes())
    }
}

/// What can compute, and what of it does.
fn engines(used: Kind, devices: &[Value]) -> Check {
    let text = |d: &Value, key: &str| d[key].as_str().unwrap_or_default().to_string();
    let others = devices.iter().filter(|d| d["engine"] != "cpu");
    let others: Vec<String> = others.map(|d| text(d, "name")).collect();
    let gpu = devices.iter().find(|d| text(d, "kind").to_lowercase().contains("gpu"));
    let line = match &others[..] {
        [] => format!("{}; ggml is not in this build", used.name()),
        list => format!("{}; ggml has {}", used.name(), list.join(", ")),
    };
    match gpu.filter(|_| used == Kind::Cpu) {
        Some(gpu) => {
            let name = text(gpu, "name");
            Check::warning("engine", line, format!("--engine ggml computes on {name}"))
        }
        None => Check::ok("engine", line),
    }
}

/// A model, and what a run of it would take. Sizes in bytes.
struct Patient<'a> {
    name: String,
    model: &'a Model,
    needs: Needs,
    exact: bool,
    /// Tokens of the context of such a run.
    n_ctx: usize,
    footprint: Footprint,
    /// What the last token of a full context reads of the cache.
    cache_read: f64,
}

impl<'a> Patient<'a> {
    fn new(name: String, model: &'a Model, needs: Needs, run: &RunArgs) -> Result<Patient<'a>> {
        /// Positions of a cache that is made to be looked at.
        const N: usize = 1024;
        let geometry = model.attention.iter().map(|a| a.geometry.clone());
        let cache = KvCache::new(geometry, N, run.cache_types())?;
        // It has a line of its own where it is too long.
        let n_ctx = context(model, run.ctx, &mut Vec::new())?;
        let layers = model.attention.iter().enumerate();
        let seen = layers.map(|(i, attention)| {
            let n = attention.visible(n_ctx.saturating_sub(1), &(0..0)).len();
            cache.layer_bytes(i) as f64 / N as f64 * n as f64
        });
        let (exact, cache_read) = (run.exact, seen.sum());
        let footprint = Footprint::new(model, &needs, run.cache_types())?;
        Ok(Patient { name, model, needs, exact, n_ctx, footprint, cache_read })
    }

    /// Tokens whose keys and values fit beside the weights.
    fn room(&self, machine: &Machine) -> u64 {
        self.footprint.room(machine.memory_available)
    }

    /// Tokens per second at most: after nothing, after a full context, and of a prompt.
    fn rates(&self, machine: &Machine) -> [f64; 3] {
        let limits = machine.most();
        let weights = self.needs.weight_bytes as f64;
        let ops = 2.0 * self.needs.n_products as f64;
        [
            limits.read_bytes / weights,
            limits.read_bytes / (weights + self.cache_read),
            limits.int8_ops / ops,
        ]
    }

    fn checks(&self, machine: &Machine) -> Vec<Check> {
        let file = format!(
            "{}: {}, {:.1} M parameters, {} MB",
            self.name,
            self.model.kind(),
            self.model.n_params() as f64 / 1e6,
            mb(self.model.n_bytes())
        );
        let mut checks = vec![Check::ok("model", file)];
        checks.extend([self.formats(), self.fits(machine), self.context(machine)]);
        if self.model.hparams.must_predict().is_ok() {
            checks.push(self.tokens(machine));
        }
        let [_, _, prompt] = self.rates(machine);
        let floats = match 2 * self.needs.n_integer < self.needs.n_products {
            true => ", if these were 8-bit integers; products of floats are slower",
            false => "",
        };
        checks.push(Check::ok(
            "prompts",
            format!(
                "{prompt:.0} tokens a second at most, as each is {:.1} M products{floats}",
                self.needs.n_products as f64 / 1e6
            ),
        ));
        checks
    }

    /// How fast tokens can be written.
    fn tokens(&self, machine: &Machine) -> Check {
        let [empty, full, _] = self.rates(machine);
        let cached = machine.cache.filter(|cache| self.needs.weight_bytes as u64 <= *cache);
        let but = match (cached, self.needs.decoded.is_empty()) {
            (_, false) => "; far fewer in formats without kernels".to_string(),
            (Some(cache), _) => {
                format!("; weights fit the processor's cache of {} MB, which is faster", mb(cache))
            }
            (None, _) => String::new(),
        };
        Check::ok(
            "tokens",
            format!(
                "{empty:.0} a second at most from memory, as each reads {} MB; {full:.0} after \
                 {} tokens{but}",
                mb(self.needs.weight_bytes as u64),
                self.n_ctx
            ),
        )
    }

    /// Formats that are slow here.
    fn formats(&self) -> Check {
        let Needs { decoded, weight_bytes, .. } = &self.needs;
        if decoded.is_empty() {
            return Check::ok("formats", "all have kernels here");
        }
        if self.exact {
            return Check::warning(
                "formats",
                "--exact: quantized weights become floats again for every product",
                "leave out --exact",
            );
        }
        let names: Vec<&str> = decoded.iter().map(|(name, _)| *name).collect();
        let bytes: usize = decoded.iter().map(|(_, bytes)| bytes).sum();
        Check::warning(
            "formats",
            format!(
                "{} of what a token reads is in {}, which become floats again for every product",
                percent(bytes as f64 / *weight_bytes as f64),
                names.join(", ")
            ),
            "a file in a format with kernels, such as Q4_K_M, is several times as fast here",
        )
    }

    /// Whether weights and cache fit memory.
    fn fits(&self, machine: &Machine) -> Check {
        let cache = self.footprint.cache(self.n_ctx);
        let weights = self.footprint.weights();
        let all = weights + cache;
        let text = format!(
            "weights {} MB, cache of {} tokens {} MB; {} MB are available",
            mb(weights),
            self.n_ctx,
            mb(cache),
            mb(machine.memory_available)
        );
        match self.room(machine) {
            _ if all <= machine.memory_available => Check::ok("fits", text),
            0 => Check::warning(
                "fits",
                text,
                "a smaller file (fewer bits, fewer parameters), or end other programs",
            ),
            room => Check::warning("fits", text, format!("-c {room}, or less")),
        }
    }

    fn context(&self, machine: &Machine) -> Check {
        let trained = self.model.hparams.n_ctx_train;
        let text = format!(
            "{:.0} bytes of cache a token; memory has room for {} tokens, trained for {trained}",
            self.footprint.per_token,
            self.room(machine)
        );
        match self.n_ctx > trained {
            true => Check::warning("context", text, format!("-c {trained}, or less")),
            false => Check::ok("context", text),
        }
    }

    fn json(&self, machine: &Machine) -> Value {
        let [empty, full, prompt] = self.rates(machine);
        let decoded = self.needs.decoded.iter();
        json!({
            "model_filename": self.name,
            "model_type": self.model.kind(),
            "model_size": self.model.n_bytes(),
            "n_params": self.model.n_params(),
            "n_ctx": self.n_ctx,
            "n_ctx_train": self.model.hparams.n_ctx_train,
            "n_ctx_memory": self.room(machine),
            "weight_bytes_per_token": self.needs.weight_bytes,
            "cache_bytes_per_token": self.footprint.per_token,
            "memory_bytes": self.footprint.weights() + self.footprint.cache(self.n_ctx),
            "n_products": self.needs.n_products,
            "decoded": decoded.map(|(name, bytes)| json!({"format": name, "bytes": bytes}))
                .collect::<Vec<_>>(),
            "max_tokens_s": empty,
            "max_tokens_s_full": full,
            "max_prompt_tokens_s": prompt,
        })
    }
}

fn percent(share: f64) -> String {
    format!("{:.0} %", 100.0 * share)
}
