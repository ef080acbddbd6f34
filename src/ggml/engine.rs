//! Runs a model: weights and cache on devices, one graph after the other.

use std::ops::Range;
use std::sync::{Arc, RwLock};

use ggml::{Backend, Device, Kind, Scheduler, Shape, Store, Type};
use half::f16;

use super::fault;
use super::pass::{
    Batch, Inputs, LayerCache, Made, Mask, MaskKind, Pass, PerToken, Sizes, n_nodes,
};
use super::weights::{Target, Weights};
use crate::bad_usage;
use crate::engine::{Asked, CacheType, Devices, Threads};
use crate::error::{Error, Result};
use crate::model::Model;

/// Tokens that go through the layers together, unless they must see later ones.
const N_BATCH: usize = 512;
/// Cached keys that are computed with are a multiple of this, so that a graph serves many tokens.
const N_KEYS: usize = 256;

/// How an engine is set up.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Where it computes.
    pub devices: Devices,
    /// Threads of the processor.
    pub n_threads: Threads,
    /// Cores that they stay on, if they do.
    pub cores: Vec<usize>,
    /// Whether what is computed of weights is never rounded.
    pub exact: bool,
    /// Positions of the cache.
    pub n_ctx: usize,
    /// Types of cached keys and values.
    pub cache: (CacheType, CacheType),
}

/// A model on devices, with its cache.
pub struct Engine {
    setup: Setup,
    /// With the graph that ran last, which uses what is below.
    scheduler: Scheduler,
    last: Option<Last>,
    weights: Weights,
    cache: Vec<LayerCache>,
    /// Of each layer.
    devices: Vec<Device>,
    batch: Arc<RwLock<Batch>>,
    /// Layers in which the processor weighs, whatever their device.
    by_rows: Vec<usize>,
}

/// The graph that is loaded.
struct Last {
    sizes: Sizes,
    inputs: Inputs,
    out: Option<ggml::Tensor>,
}

/// Devices that layers may be on: those that were asked for, or else all that are not the processor's,
/// of this machine and of workers. The processor comes last.
fn chosen(wanted: &Devices) -> Result<Vec<Device>> {
    let mut found = Vec::new();
    for worker in &wanted.workers {
        found.extend(of_worker(worker)?);
    }
    let own: Vec<Device> = ggml::devices().into_iter().filter(|d| !d.is_remote()).collect();
    let all: Vec<Device> = own.iter().chain(&found).copied().collect();
    if wanted.names.is_empty() {
        let of = |kind| own.iter().filter(move |d| d.kind() == kind).copied();
        match of(Kind::Gpu).next() {
            Some(_) => found.extend(of(Kind::Gpu)),
            None => found.extend(of(Kind::IntegratedGpu).take(1)),
        }
    } else {
        found.clear();
    }
    for name in &wanted.names {
        match all.iter().find(|d| d.name().eq_ignore_ascii_case(name)) {
            Some(device) => found.push(*device),
            None => {
                let known: Vec<_> = all.iter().map(|d| d.name()).collect();
                bad_usage!("device \"{name}\" is not here; there are {}", known.join(", "));
            }
        }
    }
    found.retain(|d| !matches!(d.kind(), Kind::Cpu | Kind::Accelerator));
    if wanted.n_layers == Some(0) {
        found.clear();
    }
    found.push(Device::cpu().map_err(fault)?);
    Ok(found)
}

#[cfg(feature = "rpc")]
fn of_worker(address: &str) -> Result<Vec<Device>> {
    ggml::add_server(address).map_err(fault)
}

#[cfg(not(feature = "rpc"))]
fn of_worker(address: &str) -> Result<Vec<Device>> {
    bad_usage!("worker {address}: this build knows no workers; build with --features rpc")
}

/// Which of `n_devices` each layer is on, the processor being the last, and what follows the layers.
/// The processor has the first layers, as far as it has any; others have shares by their free memory.
fn placed(n_layers: usize, on_devices: Option<usize>, devices: &[Device]) -> Vec<usize> {
    let cpu = devices.len() - 1;
    let n = if cpu == 0 { 0 } else { on_devices.unwrap_or(n_layers).min(n_layers) };
    let free: Vec<f64> = devices[..cpu].iter().map(|d| d.memory().0.max(1) as f64).collect();
    let total: f64 = free.iter().sum();
    let mut placed = vec![cpu; n_layers - n];
    for i in 0..n {
        let share = (i as f64 + 0.5) / n as f64 * total;
        let mut end = 0.0;
        let at = free.iter().position(|free| {
            end += free;
            share < end
        });
        placed.push(at.unwrap_or(cpu));
    }
    placed.push(placed.last().copied().unwrap_or(cpu));
    placed
}

fn type_of(cache: CacheType) -> Result<Type> {
    let found = crate::quant::format_named(&cache.name().to_uppercase());
    let found = found.and_then(|format| Type::from_id(format.ty.id));
    found.ok_or_else(|| Error::Runtime(format!("ggml has no type {}", cache.name())))
}

/// What is cached of each layer, in rows: keys, and values if there are any.
fn shapes(model: &Model, setup: &Setup) -> Result<Vec<Vec<Shape>>> {
    let types = [setup.cache.0, setup.cache.1];
    let n_rows = setup.n_ctx.next_multiple_of(N_KEYS);
    let mut all = Vec::new();
    for attention in &model.attention {
        let stored = attention.geometry.stored();
        let heads = stored.iter().flat_map(|head| [(0, head.score_dim), (1, head.value_dim)]);
        let mut widths = [0, 0];
        for (which, dim) in heads {
            if types[which].is_rounded() && !dim.is_multiple_of(type_of(types[which])?.block()) {
                bad_usage!(
                    "cache type {}: heads have {dim} elements, which are not whole blocks; the engine cpu \
                     fills them up, the engine ggml needs f16 or f32",
                    types[which].name()
                );
            }
            widths[which] += dim;
        }
        let mut own = Vec::new();
        for (width, ty) in widths.into_iter().zip(types).filter(|(width, _)| *width > 0) {
            own.push(Shape::matrix(type_of(ty)?, width, n_rows));
        }
        all.push(own);
    }
    Ok(all)
}

impl Engine {
    /// Loads a model.
    ///
    /// # Errors
    ///
    /// Devices that are not there, or whose memory is too small.
    pub fn new(model: &Model, setup: Setup) -> Result<Engine> {
        let all = chosen(&setup.devices)?;
        let placed = placed(model.layers.len(), setup.devices.n_layers, &all);
        let targets: Vec<Target> = all.iter().map(|d| Target::new(*d)).collect::<Result<_>>()?;
        let shapes = shapes(model, &setup)?;
        let mut reserved = vec![0; targets.len()];
        for (own, at) in shapes.iter().zip(&placed) {
            reserved[*at] += own.iter().map(Shape::n_bytes).sum::<usize>();
        }
        let at = (setup.n_ctx, setup.exact);
        let weights = Weights::new(model, (&targets, &placed), &reserved, at)?;
        let mut cache = Vec::new();
        for (own, at) in shapes.iter().zip(&placed) {
            let mut store = Store::new(targets[*at].memory(), own, false).map_err(fault)?;
            // What is not written yet is multiplied with zeros, which numbers must be for.
            store.clear();
            let values = (own.len() > 1).then_some(1);
            cache.push(LayerCache { store: Arc::new(store), keys: 0, values });
        }
        let mut backends = Vec::new();
        for device in &all {
            let mut backend = Backend::new(*device).map_err(fault)?;
            backend.start_threads(setup.n_threads.most(), &setup.cores).map_err(fault)?;
            backends.push(backend);
        }
        let scheduler = Scheduler::new(backends, n_nodes(model)).map_err(fault)?;
        let devices = placed[..model.layers.len()].iter().map(|at| all[*at]).collect();
        let (batch, last) = (Arc::default(), None);
        let by_rows = Vec::new();
        Ok(Engine { setup, scheduler, last, weights, cache, devices, batch, by_rows })
    }

    /// The same for the model in other forms.
    pub fn again(&self, model: &Model) -> Result<Engine> {
        Engine::new(model, self.setup.clone())
    }

    /// How it is set up.
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// Uses other numbers of threads, at most as many as were started.
    pub fn set_threads(&mut self, n_threads: Threads) {
        self.setup.n_threads = n_threads;
    }

    /// Bytes of weights that a token reads.
    pub fn weight_bytes(&self) -> usize {
        self.weights.n_bytes
    }

    /// Products of weights and activations that a token needs.
    pub fn n_products(&self) -> usize {
        self.weights.n_products
    }

    /// Bytes of the cache.
    pub fn cache_bytes(&self) -> usize {
        (0..self.cache.len()).map(|layer| self.layer_bytes(layer)).sum()
    }

    /// Bytes of the cache of a layer.
    pub fn layer_bytes(&self, layer: usize) -> usize {
        self.cache[layer].store.n_bytes()
    }

    /// The device of each layer.
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// What is worth telling of the last pass: which devices have layers, and where the processor turned
    /// scores into weights because their device cannot.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let runs = self.devices.chunk_by(|a, b| a == b);
        let mut first = 0;
        for run in runs {
            let last = first + run.len() - 1;
            notes.push(format!("layers {first}-{last}: on {}", run[0].name()));
            first = last + 1;
        }
        if !self.by_rows.is_empty() {
            let layers: Vec<_> = self.by_rows.iter().map(usize::to_string).collect();
            let layers = layers.join(", ");
            notes.push(format!("scores become weights on the processor in layers {layers}"));
        }
        notes
    }

    /// Drops what was made for the model's present plan.
    pub fn forget(&mut self) {
        self.scheduler.unload();
        self.last = None;
    }

    /// Fills the cache with zeros.
    pub fn clear(&mut self) {
        self.forget();
        for layer in &mut self.cache {
            if let Some(store) = Arc::get_mut(&mut layer.store) {
                store.clear();
            }
        }
    }

    /// Runs `tokens` at the positions from `n_past` on, which must fit the cache, and appends to `out`
    /// what is asked of the tokens in `wanted`, indices into `tokens`: `[wanted, n_vocab]` or
    /// `[wanted, n_embd]`. Positions in `prompt` are those of a prompt; if its tokens see later ones,
    /// those must be in `tokens` too.
    pub fn forward(
        &mut self,
        model: &Model,
        (tokens, n_past, prompt): (&[u32], usize, &Range<usize>),
        wanted: Range<usize>,
        (asked, out): (Asked, &mut Vec<f32>),
    ) -> Result<()> {
        let n_threads = self.setup.n_threads;
        let n = if tokens.len() == 1 { n_threads.one } else { n_threads.batch };
        self.scheduler.backends_mut().iter_mut().for_each(|b| b.use_threads(n));
        let size = (tokens.len(), N_BATCH);
        for (part, wanted) in model.batches(size, (n_past, prompt), wanted) {
            let batch = Batch { n_past: n_past + part.start, prompt: prompt.clone() };
            self.run(model, &tokens[part], batch, (wanted, asked), out)?;
        }
        Ok(())
    }

    fn run(
        &mut self,
        model: &Model,
        tokens: &[u32],
        batch: Batch,
        (wanted, asked): (Range<usize>, Asked),
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let n_keys = (batch.n_past + tokens.len()).next_multiple_of(N_KEYS);
        let sizes = Sizes { n: tokens.len(), n_keys, wanted, asked };
        if self.last.as_ref().is_none_or(|last| last.sizes != sizes) {
            self.load(model, sizes)?;
        }
        let Some(last) = &self.last else { return Ok(()) };
        let scheduler = &mut self.scheduler;
        fill(scheduler, last, (model, tokens, &batch)).map_err(fault)?;
        if let Ok(mut shared) = self.batch.write() {
            *shared = batch;
        }
        scheduler.run().map_err(fault)?;
        match last.out {
            Some(tensor) => scheduler.get(tensor, out).map_err(fault),
            None => Ok(()),
        }
    }

    /// Makes the graph for batches of these sizes.
    fn load(&mut self, model: &Model, sizes: Sizes) -> Result<()> {
        self.forget();
        let parts = (model, &self.weights, &self.cache[..]);
        let pass = Pass::new(parts, sizes.clone(), &self.batch, &self.devices)?;
        let Made { graph, inputs, out, by_rows } = pass.make()?;
        self.by_rows = by_rows;
        self.scheduler.load(graph).map_err(fault)?;
        self.last = Some(Last { sizes, inputs, out });
        Ok(())
    }
}

fn bytes<T: Copy, const N: usize>(x: impl Iterator<Item = T>, f: fn(T) -> [u8; N]) -> Vec<u8> {
    x.flat_map(f).collect()
}

/// Fills what the graph is computed from.
fn fill(
    scheduler: &mut Scheduler,
    Last { sizes, inputs, .. }: &Last,
    (model, tokens, batch): (&Model, &[u32], &Batch),
) -> ggml::Result<()> {
    let n_embd = model.hparams.n_embd;
    let positions = || batch.n_past..batch.n_past + sizes.n;
    let mut x = vec![0.0; n_embd * sizes.n];
    for ((row, token), position) in x.chunks_exact_mut(n_embd).zip(tokens).zip(positions()) {
        model.embed(*token, position, row);
    }
    scheduler.set(inputs.x, &bytes(x.into_iter(), f32::to_le_bytes))?;
    let narrow = |p: usize| (p as i32).to_le_bytes();
    scheduler.set(inputs.positions, &positions().flat_map(narrow).collect::<Vec<_>>())?;
    scheduler.set(inputs.rows, &bytes(positions().map(|p| p as i64), i64::to_le_bytes))?;
    if let Some(tensor) = inputs.key_positions {
        scheduler.set(tensor, &(0..sizes.n_keys).flat_map(narrow).collect::<Vec<_>>())?;
    }
    if let Some(tensor) = inputs.scales {
        let scale = |p: usize| model.attention[0].scale(p).to_le_bytes();
        scheduler.set(tensor, &positions().flat_map(scale).collect::<Vec<_>>())?;
    }
    for (tensor, x) in &inputs.constants {
        scheduler.set(*tensor, &bytes(x.iter().copied(), f32::to_le_bytes))?;
    }
    for PerToken { layer, f, tensor } in &inputs.per_token {
        let attention = &model.attention[*layer];
        let number = |p: usize| f(attention.visible(p, &batch.prompt).len(), p).to_le_bytes();
        scheduler.set(*tensor, &positions().flat_map(number).collect::<Vec<_>>())?;
    }
    for mask in &inputs.masks {
        scheduler.set(mask.tensor, &elements(mask, sizes, (model, batch)))?;
    }
    Ok(())
}

/// The elements of a mask.
fn elements(mask: &Mask, sizes: &Sizes, (model, batch): (&Model, &Batch)) -> Vec<u8> {
    let attention = &model.attention[mask.layer];
    let loses = !attention.slopes().is_empty();
    let (hidden, size) = match mask.kind {
        MaskKind::Added => (f16::NEG_INFINITY.to_le_bytes().to_vec(), size_of::<f16>()),
        MaskKind::Seen => (0.0f32.to_le_bytes().to_vec(), size_of::<f32>()),
    };
    let mut all = hidden.repeat(sizes.n_keys * sizes.n);
    for (row, position) in all.chunks_exact_mut(size * sizes.n_keys).zip(batch.n_past..) {
        for key in attention.visible(position, &batch.prompt).ranges().iter().cloned().flatten() {
            let distance = if loses { position.abs_diff(key) as f32 } else { 0.0 };
            let element = &mut row[key * size..(key + 1) * size];
            match mask.kind {
                MaskKind::Added => {
                    element.copy_from_slice(&f16::from_f32(-distance).to_le_bytes());
                }
                MaskKind::Seen => element.copy_from_slice(&1.0f32.to_le_bytes()),
            }
        }
    }
    all
}
