//! The engine of a session, with its cache: one of those that this build has.

use std::ops::Range;
use std::sync::Arc;

use super::Options;
use crate::bad_usage;
#[cfg(feature = "ggml")]
use crate::cpu::threads::cores;
use crate::cpu::{self, Fault, KvCache, Observer, Span};
#[cfg(feature = "ggml")]
use crate::engine::Kind;
use crate::engine::{Asked, CacheType, Threads};
use crate::error::Result;
#[cfg(feature = "ggml")]
use crate::ggml;
use crate::gguf::Bytes;
use crate::model::Model;

pub(super) enum Engine {
    Cpu {
        engine: Box<cpu::Engine>,
        cache: KvCache,
    },
    #[cfg(feature = "ggml")]
    Ggml(Box<ggml::Engine>),
}

impl Engine {
    /// Starts the engine that was asked for, with an empty cache of `n_ctx` positions.
    pub(super) fn new(model: &Model, options: &Options, n_ctx: usize) -> Result<Engine> {
        options.engine.check()?;
        match options.engine {
            #[cfg(feature = "ggml")]
            Kind::Ggml => {
                let n = options.n_threads.most();
                let cores: Vec<usize> = cores().iter().map(|core| core.id).collect();
                let pin = options.pin && n <= cores.len();
                let setup = ggml::Setup {
                    devices: options.devices.clone(),
                    n_threads: options.n_threads,
                    cores: if pin { cores } else { Vec::new() },
                    exact: options.exact,
                    n_ctx,
                    cache: options.cache,
                };
                Ok(Engine::Ggml(Box::new(ggml::Engine::new(model, setup)?)))
            }
            _ => {
                let geometry = model.attention.iter().map(|a| a.geometry.clone());
                let cache = KvCache::new(geometry, n_ctx, options.cache)?;
                let Options { n_threads, pin, exact, .. } = *options;
                let engine = Box::new(cpu::Engine::new(model, n_threads, pin, exact)?);
                Ok(Engine::Cpu { engine, cache })
            }
        }
    }

    /// The same with an empty cache, for the model in other forms.
    pub(super) fn again(&self, model: &Model) -> Result<Engine> {
        match self {
            Engine::Cpu { engine, cache } => {
                let geometry = model.attention.iter().map(|a| a.geometry.clone());
                let cache = KvCache::new(geometry, cache.n_ctx(), cache.types())?;
                let engine = Box::new(engine.again(model, &model.attention)?);
                Ok(Engine::Cpu { engine, cache })
            }
            #[cfg(feature = "ggml")]
            Engine::Ggml(engine) => Ok(Engine::Ggml(Box::new(engine.again(model)?))),
        }
    }

    pub(super) fn n_ctx(&self) -> usize {
        match self {
            Engine::Cpu { cache, .. } => cache.n_ctx(),
            #[cfg(feature = "ggml")]
            Engine::Ggml(engine) => engine.setup().n_ctx,
        }
    }

    pub(super) fn cache_types(&self) -> (CacheType, CacheType) {
        match self {
            Engine::Cpu { cache, .. } => cache.types(),
            #[cfg(feature = "ggml")]
            Engine::Ggml(engine) => engine.setup().cache,
        }
    }

    /// Bytes of the cache, and of what is made of it in passing.
    pub(super) fn cache_bytes(&self) -> usize {
        match self {
            Engine::Cpu { cache, .. } => cache.n_bytes(),
            #[cfg(feature = "ggml")]
            Engine::Ggml(engine) => engine.cache_bytes(),
        }
    }

    /// Bytes of the cache of a layer.
    pub(super) fn layer_bytes(&self, layer: usize) -> usize {
        match self {
            Engine::Cpu { cache, .. } => cache.layer_bytes(layer),
            #[cfg(feature = "ggml")]
            Engine::Ggml(engine) => engine.layer_bytes(layer),
        }
    }

    pub(super) fn weight_bytes(&self) -> usize {
        match self {
            Engine::Cpu { engine, .. } => engine.weight_bytes(),
            #[cfg(feature = "ggml")]
            Engine::Ggml(engine) => engine.weight_bytes(),
        }
    }

    pub(super) fn n_products(&self) -> usize {
        match self {
            Engine::Cpu { engine, .. } => engine.n_products(),
            #[cfg(feature = "ggml")]
            Engine::Ggml(engine) => engine.n_products(),
        }
    }

    pub(super) fn n_threads(&self) -> Threads {
        match self {
            Engine::Cpu { engine, .. } => engine.n_threads(),
            #[cfg(feature = "ggml")]
            Engine::Ggml(engine) => engine.setup().n_threads,
        }
    }

    pub(super) fn set_threads(&mut self, n_threads: Threads) {
        match self {
            Engine::Cpu { engine, .. } => engine.set_threads(n_threads),
            #[cfg(feature = "ggml")]
            Engine::Ggml(engine) => engine.set_threads(n_threads),
        }
    }

    /// Where numbers came up that are not finite, before position `n`, if it is known.
    pub(super) fn fault(&self, n: usize) -> Option<Fault> {
        match self {
            Engine::Cpu { cache, .. } => cache.fault(n),
            #[cfg(feature = "ggml")]
            Engine::Ggml(_) => None,
        }
    }

    /// Forgets such a place from position `n` on.
    pub(super) fn heal(&mut self, n: usize) {
        match self {
            Engine::Cpu { cache, .. } => cache.heal(n),
            #[cfg(feature = "ggml")]
            Engine::Ggml(_) => {}
        }
    }

    /// Fills the cache with zeros.
    pub(super) fn clear(&mut self) {
        match self {
            Engine::Cpu { cache, .. } => cache.clear(),
            #[cfg(feature = "ggml")]
            Engine::Ggml(engine) => engine.clear(),
        }
    }

    /// What is cached of the first `n` positions, in named parts.
    ///
    /// # Errors
    ///
    /// A cache that is on devices.
    pub(super) fn saved(&self, n: usize) -> Result<Vec<(String, Vec<u8>)>> {
        match self {
            Engine::Cpu { cache, .. } => Ok(cache.saved(n)),
            #[cfg(feature = "ggml")]
            Engine::Ggml(_) => not_at_hand(),
        }
    }

    /// The names of those parts.
    pub(super) fn saved_names(&self, n: usize) -> Result<Vec<String>> {
        match self {
            Engine::Cpu { cache, .. } => Ok(cache.saved_names(n)),
            #[cfg(feature = "ggml")]
            Engine::Ggml(_) => not_at_hand(),
        }
    }

    /// Takes such parts, in the order of their names.
    pub(super) fn restore(&mut self, n: usize, parts: &[Bytes]) -> Result<()> {
        match self {
            Engine::Cpu { cache, .. } => cache.restore(n, parts),
            #[cfg(feature = "ggml")]
            Engine::Ggml(_) => not_at_hand(),
        }
    }

    /// Hears that the model's plan changes.
    pub(super) fn forget(&mut self) {
        match self {
            Engine::Cpu { .. } => {}
            #[cfg(feature = "ggml")]
            Engine::Ggml(engine) => engine.forget(),
        }
    }

    /// See [`cpu::Engine::forward`].
    ///
    /// # Errors
    ///
    /// What a device could not do; and an observer, which only the engine cpu has.
    pub(super) fn forward(
        &mut self,
        model: &Model,
        batch: (&[u32], usize, &Range<usize>),
        wanted: Range<usize>,
        observer: Option<&dyn Observer>,
        asked: (Asked, &mut Vec<f32>),
    ) -> Result<()> {
        match self {
            Engine::Cpu { engine, cache, .. } => {
                let (tokens, n_past, prompt) = batch;
                let attention = &model.attention;
                let span = Span { tokens, n_past, prompt, wanted, attention, cache };
                engine.forward(model, &mut [span], observer, asked);
                Ok(())
            }
            #[cfg(feature = "ggml")]
            Engine::Ggml(_) if observer.is_some() => no_look(),
            #[cfg(feature = "ggml")]
            Engine::Ggml(engine) => engine.forward(model, batch, wanted, asked),
        }
    }

    /// See [`cpu::Engine::layer_by_layer`].
    pub(super) fn layer_by_layer(
        &mut self,
        model: &mut Arc<Model>,
        sequences: &[Vec<u32>],
        observer: &dyn Observer,
        change: &mut dyn FnMut(&mut Model, usize) -> Result<bool>,
    ) -> Result<()> {
        let Some(model) = Arc::get_mut(model) else {
            bad_usage!("layer by layer: the model is in use elsewhere");
        };
        match self {
            Engine::Cpu { engine, cache, .. } => {
                engine.layer_by_layer(model, cache, sequences, observer, change)
            }
            #[cfg(feature = "ggml")]
            Engine::Ggml(_) => no_look(),
        }
    }

    /// What is worth telling of how it computes; none before it has.
    pub(super) fn notes(&self) -> Vec<String> {
        match self {
            Engine::Cpu { .. } => Vec::new(),
            #[cfg(feature = "ggml")]
            Engine::Ggml(engine) => engine.notes(),
        }
    }
}

#[cfg(feature = "ggml")]
fn not_at_hand<T>() -> Result<T> {
    bad_usage!("engine ggml: its cache stays on its devices; sessions in files need the engine cpu")
}

#[cfg(feature = "ggml")]
fn no_look() -> Result<()> {
    bad_usage!("engine ggml: nobody can look into its layers; use the engine cpu for that")
}
