//! Times one GGUF file in llama.cpp and in qkov, alternating, and prints the ratios.
//!
//! Both use the same number of threads, which must be pinned from outside for llama.cpp:
//! `OMP_PROC_BIND=true OMP_PLACES="{0},{1}" cargo run --release -- --shape llama-3.2-1b --type Q4_0`

use std::error::Error;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use llama_cpp_2::context::LlamaContext;
use llama_cpp_2::context::params::LlamaContextParams;
use llama_cpp_2::llama_backend::LlamaBackend;
use llama_cpp_2::llama_batch::LlamaBatch;
use llama_cpp_2::model::LlamaModel;
use llama_cpp_2::model::params::LlamaModelParams;
use llama_cpp_2::token::LlamaToken;
use qkov::engine::Threads;
use qkov::measure::latency::median;
use qkov::measure::shape;
use qkov::model::Model;
use qkov::session::{Options, Session};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[derive(Parser)]
#[command(about)]
struct Args {
    /// GGUF file
    #[arg(short, long, conflicts_with = "shape")]
    model: Option<PathBuf>,
    /// A synthetic model of this shape instead
    #[arg(long)]
    shape: Option<String>,
    /// Formats of the synthetic model
    #[arg(long = "type", default_value = "Q4_K_M")]
    mixture: String,
    /// Tokens of the prompt
    #[arg(short = 'p', long, default_value_t = 512)]
    n_prompt: usize,
    /// Tokens to generate
    #[arg(short = 'n', long, default_value_t = 64)]
    n_gen: usize,
    /// Tokens in the cache before
    #[arg(short = 'd', long, default_value_t = 0)]
    n_depth: usize,
    /// Rounds, in each of which both run everything once
    #[arg(short, long, default_value_t = 5)]
    rounds: usize,
    /// Threads
    #[arg(short, long, default_value_t = 2)]
    threads: usize,
}

/// Something that reads tokens.
trait Engine {
    fn forget(&mut self, n: usize) -> Result<()>;
    fn read(&mut self, tokens: &[u32]) -> Result<()>;
}

struct Peer<'a> {
    context: LlamaContext<'a>,
    n_past: usize,
}

impl Engine for Peer<'_> {
    fn forget(&mut self, n: usize) -> Result<()> {
        self.context.clear_kv_cache_seq(Some(0), Some(n as u32), None)?;
        self.n_past = n;
        Ok(())
    }

    fn read(&mut self, tokens: &[u32]) -> Result<()> {
        for part in tokens.chunks(512) {
            let mut batch = LlamaBatch::new(part.len(), 1);
            for (i, token) in part.iter().enumerate() {
                let position = (self.n_past + i) as i32;
                batch.add(LlamaToken(*token as i32), position, &[0], i + 1 == part.len())?;
            }
            self.context.decode(&mut batch)?;
            self.context.synchronize();
            self.n_past += part.len();
        }
        Ok(())
    }
}

struct Ours(Session);

impl Engine for Ours {
    fn forget(&mut self, n: usize) -> Result<()> {
        self.0.rewind(n);
        Ok(())
    }

    fn read(&mut self, tokens: &[u32]) -> Result<()> {
        Ok(self.0.feed(tokens)?)
    }
}

/// Tokens per second: of the prompt, and of generation.
fn round(engine: &mut dyn Engine, args: &Args, tokens: &[u32]) -> Result<[f64; 2]> {
    let mut rates = [f64::NAN; 2];
    if args.n_prompt > 0 {
        engine.forget(args.n_depth)?;
        let start = Instant::now();
        engine.read(&tokens[..args.n_prompt])?;
        rates[0] = args.n_prompt as f64 / start.elapsed().as_secs_f64();
    }
    if args.n_gen > 0 {
        engine.forget(args.n_depth)?;
        let start = Instant::now();
        for token in &tokens[..args.n_gen] {
            engine.read(std::slice::from_ref(token))?;
        }
        rates[1] = args.n_gen as f64 / start.elapsed().as_secs_f64();
    }
    Ok(rates)
}

fn main() -> Result<()> {
    let args = Args::parse();
    let path = match (&args.model, &args.shape) {
        (Some(path), _) => path.clone(),
        (None, Some(name)) => {
            let path = std::env::temp_dir().join(format!("qkov-{name}-{}.gguf", args.mixture));
            if !path.exists() {
                shape::file(shape::find(name)?, &args.mixture)?.write(&path)?;
            }
            path
        }
        (None, None) => return Err("a model is needed: --model or --shape".into()),
    };
    let n_ctx = args.n_depth + args.n_prompt.max(args.n_gen) + 8;

    // OpenMP has bound this thread to one core, which new threads inherit; ours need them all.
    let this = nix::unistd::Pid::from_raw(0);
    let bound = nix::sched::sched_getaffinity(this)?;
    let mut all = nix::sched::CpuSet::new();
    (0..std::thread::available_parallelism()?.get().max(args.threads)).for_each(|core| {
        // A core that does not exist is no loss.
        let _ = all.set(core);
    });
    nix::sched::sched_setaffinity(this, &all)?;
    let model = Arc::new(Model::open(&path)?);
    let n_vocab = model.hparams.n_vocab as u64;
    let options = Options { n_ctx: Some(n_ctx), n_threads: Threads { one: args.threads, batch: args.threads }, ..Options::default() };
    let mut ours = Ours(Session::new(model, &options)?);

    nix::sched::sched_setaffinity(this, &bound)?;

    let mut backend = LlamaBackend::init()?;
    backend.void_logs();
    let theirs = LlamaModel::load_from_file(&backend, &path, &LlamaModelParams::default())?;
    let params = LlamaContextParams::default()
        .with_n_ctx(NonZeroU32::new(n_ctx as u32))
        .with_n_batch(512)
        .with_n_ubatch(512)
        .with_n_threads(args.threads as i32)
        .with_n_threads_batch(args.threads as i32);
    let mut peer = Peer { context: theirs.new_context(&backend, params)?, n_past: 0 };

    let mut state = 1u64;
    let mut token = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % n_vocab) as u32
    };
    let tokens: Vec<u32> = (0..n_ctx).map(|_| token()).collect();
    let engines: [&mut dyn Engine; 2] = [&mut peer, &mut ours];
    let mut rates: [[Vec<f64>; 2]; 2] = Default::default();
    for engine in engines {
        engine.forget(0)?;
        engine.read(&tokens[..args.n_depth.max(1)])?;
    }
    for r in 0..=args.rounds {
        for (i, engine) in [&mut peer as &mut dyn Engine, &mut ours].into_iter().enumerate() {
            let [prompt, generation] = round(engine, &args, &tokens)?;
            // The first round warms up.
            if r > 0 {
                rates[i][0].push(prompt);
                rates[i][1].push(generation);
            }
        }
    }
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let depth = if args.n_depth > 0 { format!(" @ d{}", args.n_depth) } else { String::new() };
    for (kind, test) in [(0, format!("pp{}", args.n_prompt)), (1, format!("tg{}", args.n_gen))] {
        let [theirs, ours] = [&rates[0][kind], &rates[1][kind]];
        if theirs.iter().any(|x| x.is_nan()) {
            continue;
        }
        let mut ratios: Vec<f64> = ours.iter().zip(theirs).map(|(a, b)| a / b).collect();
        ratios.sort_by(f64::total_cmp);
        println!(
            "| {name} | {test}{depth} | {:.1} | {:.1} | {:.2} ({:.2} to {:.2}) |",
            median(theirs),
            median(ours),
            median(&ratios),
            ratios[0],
            ratios[ratios.len() - 1],
        );
    }
    Ok(())
}
