//! A model's weights as tensors of ggml, each where its layer is computed.

use std::sync::Arc;

use ggml::{BufferType, Device, Graph, Kind, Shape, Store, Tensor, Type};

use super::fault;
use crate::bad_usage;
use crate::error::{Error, Result};
use crate::gguf::Bytes;
use crate::merge::{Geometry, Kept, KvHead};
use crate::model::{ExpertLayer, Ffn, Layer, Linear, Model, NormWeight, Weight};

/// Where a tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// In memory of a kind, as one of many.
    Loaded { pool: usize, index: usize },
    /// Where it was, alone.
    Borrowed(usize),
}

/// What is added to the product of a matrix: `factor up down x`.
pub(super) struct LoraPlaces {
    pub(super) down: Place,
    pub(super) up: Place,
    pub(super) factor: f32,
}

/// A matrix, with its bias and its adapters.
pub(super) struct Matrix {
    pub(super) at: Place,
    pub(super) n_in: usize,
    pub(super) n_out: usize,
    pub(super) bias: Option<Place>,
    pub(super) loras: Vec<LoraPlaces>,
}

/// A norm's gain and bias.
pub(super) struct Norm {
    pub(super) weight: Place,
    pub(super) bias: Option<Place>,
}

/// Several kv heads in a row that are alike, and their query heads.
pub(super) struct Group {
    /// The first of them.
    pub(super) first: usize,
    pub(super) n: usize,
    pub(super) head: KvHead,
    /// What frequencies of its rotation divide 1 by, and planes of it.
    pub(super) divisors: Option<(Place, usize)>,
    /// Picks the elements of normed heads that are left of them. `[key_dim, score_dim]`
    pub(super) picked: Option<Place>,
}

/// What makes latents.
pub(super) struct Latents {
    pub(super) q_a: Option<(Matrix, Norm)>,
    pub(super) kv_a: Matrix,
    pub(super) kv_a_norm: Norm,
}

pub(super) struct FfnWeights {
    pub(super) gate: Option<Matrix>,
    pub(super) up: Matrix,
    pub(super) down: Matrix,
    pub(super) share: Option<Matrix>,
}

/// All experts in one tensor each, and biases of all.
pub(super) struct Stacked {
    pub(super) at: Place,
    pub(super) bias: Option<Place>,
}

pub(super) struct ExpertWeights {
    pub(super) router: Matrix,
    pub(super) preference: Option<Place>,
    pub(super) gate: Option<Stacked>,
    pub(super) up: Stacked,
    pub(super) down: Stacked,
}

/// The weights of one layer.
pub(super) struct LayerWeights {
    pub(super) attn_norm: Option<Norm>,
    pub(super) attn_q: Matrix,
    pub(super) attn_k: Matrix,
    /// Makes values of the layer's input, or of keys where those are what is cached.
    pub(super) attn_v: Matrix,
    pub(super) attn_output: Matrix,
    pub(super) latent: Option<Latents>,
    /// What multiplies queries instead of making keys of what is cached. `[made, width, n_head_kv]`
    pub(super) turned_k: Option<Place>,
    pub(super) qk_norm: Option<(Place, Place)>,
    pub(super) post_attention_norm: Option<Norm>,
    pub(super) ffn_norm: Option<Norm>,
    pub(super) ffn: Option<FfnWeights>,
    pub(super) experts: Option<ExpertWeights>,
    pub(super) post_ffw_norm: Option<Norm>,
    pub(super) groups: Vec<Group>,
}

pub(super) struct Weights {
    loaded: Vec<Arc<Store>>,
    borrowed: Vec<Arc<Store>>,
    pub(super) layers: Vec<LayerWeights>,
    pub(super) embedding_norm: Option<Norm>,
    pub(super) output_norm: Option<Norm>,
    pub(super) output: Option<Matrix>,
    /// Bytes and products that a token needs.
    pub(super) n_bytes: usize,
    pub(super) n_products: usize,
}

impl Weights {
    /// A tensor in a graph.
    pub(super) fn tensor(&self, graph: &mut Graph, at: Place) -> Tensor {
        match at {
            Place::Loaded { pool, index } => graph.stored(&self.loaded[pool], index),
            Place::Borrowed(store) => graph.stored(&self.borrowed[store], 0),
        }
    }

    /// Loads a model: layer `i` for `targets[placed[i]]`, what follows the layers for the last of
    /// `placed`. `reserved`: bytes that are needed beside the weights, of each target. `exact`: what is
    /// computed of weights is not rounded.
    pub(super) fn new(
        model: &Model,
        (targets, placed): (&[Target], &[usize]),
        reserved: &[usize],
        (n_ctx, exact): (usize, bool),
    ) -> Result<Weights> {
        let used = model.hparams.experts.map_or((0, 1), |e| (e.n_used, e.n));
        let (pools, borrowed) = (Vec::new(), Vec::new());
        let mut loader =
            Loader { targets, pools, borrowed, target: 0, n_bytes: 0, n_products: 0, used };
        loader.target = placed.first().copied().unwrap_or(0);
        let embedding_norm = loader.norm_if(&model.embedding_norm)?;
        let mut layers = Vec::new();
        for (i, target) in placed.iter().enumerate().take(model.layers.len()) {
            loader.target = *target;
            layers.push(loader.layer(model, i, n_ctx, exact)?);
        }
        loader.target = placed.last().copied().unwrap_or(0);
        let output_norm = loader.norm_if(&model.output_norm)?;
        let product = Use::Product(None);
        let output = model.output.as_ref().map(|w| loader.matrix(w, None, product)).transpose()?;
        loader.check_room(reserved)?;
        let (n_bytes, n_products) = (loader.n_bytes, loader.n_products);
        let [loaded, borrowed] = loader.load()?;
        Ok(Weights {
            loaded,
            borrowed,
            layers,
            embedding_norm,
            output_norm,
            output,
            n_bytes,
            n_products,
        })
    }
}

/// A device that computes layers, and its memory.
pub(super) struct Target {
    pub(super) device: Device,
    memory: BufferType,
    arranged: Vec<BufferType>,
}

impl Target {
    pub(super) fn new(device: Device) -> Result<Target> {
        let memory = device.buffer_type().map_err(fault)?;
        Ok(Target { device, memory, arranged: device.arranged() })
    }

    pub(super) fn memory(&self) -> BufferType {
        self.memory
    }
}

/// The bytes of a tensor to be.
enum Data {
    Bytes(Bytes),
    Floats(Vec<f32>),
}

impl Data {
    fn write(&self, store: &mut Store, index: usize) {
        match self {
            Data::Bytes(bytes) => store.set(index, 0, bytes),
            Data::Floats(floats) => {
                let bytes: Vec<u8> = floats.iter().flat_map(|x| x.to_le_bytes()).collect();
                store.set(index, 0, &bytes);
            }
        }
    }
}

/// What a tensor is for.
#[derive(Clone, Copy)]
enum Use {
    /// Products of the whole matrix, or of several for each token.
    Product(Option<usize>),
    /// Anything else.
    Other,
}

/// Tensors to be of one kind of memory.
struct Pool {
    memory: BufferType,
    shapes: Vec<Shape>,
    data: Vec<Data>,
}

/// Collects what goes where, and loads it.
struct Loader<'a> {
    targets: &'a [Target],
    pools: Vec<Pool>,
    /// Tensors whose bytes stay where they are.
    borrowed: Vec<Store>,
    /// The target of what is put next.
    target: usize,
    n_bytes: usize,
    n_products: usize,
    /// Experts that a token goes through, of how many.
    used: (usize, usize),
}

impl Loader<'_> {
    fn put(&mut self, shape: Shape, data: Data, purpose: Use) -> Result<Place> {
        let target = &self.targets[self.target];
        let mut memory = target.memory;
        if let Use::Product(n_used) = purpose {
            for arranged in &target.arranged {
                if arranged.multiplies(target.device, shape, n_used).map_err(fault)? {
                    memory = *arranged;
                    break;
                }
            }
        }
        if let (Data::Bytes(bytes), Kind::Cpu) = (&data, target.device.kind())
            && memory == target.memory
        {
            let store = Store::borrowed(Box::new(bytes.clone()), shape).map_err(fault)?;
            self.borrowed.push(store);
            return Ok(Place::Borrowed(self.borrowed.len() - 1));
        }
        let at = match self.pools.iter().position(|pool| pool.memory == memory) {
            Some(i) => i,
            None => {
                self.pools.push(Pool { memory, shapes: Vec::new(), data: Vec::new() });
                self.pools.len() - 1
            }
        };
        let pool = &mut self.pools[at];
        pool.shapes.push(shape);
        pool.data.push(data);
        Ok(Place::Loaded { pool: at, index: pool.shapes.len() - 1 })
    }

    fn floats(&mut self, x: Vec<f32>, dims: [usize; 4]) -> Result<Place> {
        self.put(Shape { ty: Type::F32, dims }, Data::Floats(x), Use::Other)
    }

    fn vector(&mut self, x: &[f32]) -> Result<Place> {
        self.floats(x.to_vec(), [x.len(), 1, 1, 1])
    }

    fn weight(&mut self, w: &Weight, purpose: Use) -> Result<Place> {
        let shape = Shape::matrix(type_of(w)?, w.n_in, w.n_out);
        self.put(shape, Data::Bytes(w.bytes().clone()), purpose)
    }

    fn matrix(&mut self, w: &Weight, bias: Option<&Vec<f32>>, purpose: Use) -> Result<Matrix> {
        self.n_bytes += w.bytes().len();
        self.n_products += w.n_in * w.n_out;
        let mut loras = Vec::new();
        for lora in &w.loras {
            let down = self.weight(&lora.down, Use::Other)?;
            let up = self.weight(&lora.up, Use::Other)?;
            self.n_bytes += lora.down.bytes().len() + lora.up.bytes().len();
            self.n_products += lora.rank() * (w.n_in + w.n_out);
            loras.push(LoraPlaces { down, up, factor: lora.factor });
        }
        let at = self.weight(w, purpose)?;
        let bias = bias.map(|bias| self.vector(bias)).transpose()?;
        Ok(Matrix { at, n_in: w.n_in, n_out: w.n_out, bias, loras })
    }

    fn linear(&mut self, l: &Linear) -> Result<Matrix> {
        self.matrix(&l.weight, l.bias.as_ref(), Use::Product(None))
    }

    fn norm(&mut self, norm: &NormWeight) -> Result<Norm> {
        let bias = norm.bias.as_ref().map(|bias| self.vector(bias)).transpose()?;
        Ok(Norm { weight: self.vector(&norm.weight)?, bias })
    }

    fn norm_if(&mut self, norm: &Option<NormWeight>) -> Result<Option<Norm>> {
        norm.as_ref().map(|norm| self.norm(norm)).transpose()
    }

    fn ffn(&mut self, ffn: &Ffn) -> Result<FfnWeights> {
        let gate = ffn.gate.as_ref().map(|l| self.linear(l)).transpose()?;
        let (up, down) = (self.linear(&ffn.up)?, self.linear(&ffn.down)?);
        let share = ffn.share.as_ref().map(|l| self.linear(l)).transpose()?;
        Ok(FfnWeights { gate, up, down, share })
    }

    fn stacked(&mut self, all: &[&Linear]) -> Result<Stacked> {
        let [first, .., last] = all else {
            bad_usage!("engine ggml: a single expert is not supported; use the engine cpu")
        };
        if all.iter().any(|l| !l.weight.loras.is_empty()) {
            bad_usage!("engine ggml: adapters of experts are not supported; use the engine cpu");
        }
        let w = &first.weight;
        let shape = Shape { ty: type_of(w)?, dims: [w.n_in, w.n_out, all.len(), 1] };
        let bytes = w.bytes().through(last.weight.bytes());
        let Some(bytes) = bytes.filter(|bytes| bytes.len() == shape.n_bytes()) else {
            return Err(Error::Runtime("experts do not follow each other in memory".into()));
        };
        let (n_used, n) = self.used;
        self.n_bytes += bytes.len() / n * n_used;
        self.n_products += w.n_in * w.n_out * n_used;
        let at = self.put(shape, Data::Bytes(bytes), Use::Product(Some(n_used)))?;
        let biases: Option<Vec<_>> = all.iter().map(|l| l.bias.clone()).collect();
        let bias =
            biases.map(|b| self.floats(b.concat(), [w.n_out, all.len(), 1, 1])).transpose()?;
        Ok(Stacked { at, bias })
    }

    fn experts(&mut self, experts: &ExpertLayer) -> Result<ExpertWeights> {
        let of = |pick: fn(&Ffn) -> Option<&Linear>| -> Vec<&Linear> {
            experts.all.iter().filter_map(pick).collect()
        };
        let gates = of(|f| f.gate.as_ref());
        Ok(ExpertWeights {
            router: self.linear(&experts.router)?,
            preference: experts.preference.as_ref().map(|p| self.vector(p)).transpose()?,
            gate: (!gates.is_empty()).then(|| self.stacked(&gates)).transpose()?,
            up: self.stacked(&of(|f| Some(&f.up)))?,
            down: self.stacked(&of(|f| Some(&f.down)))?,
        })
    }

    fn groups(&mut self, model: &Model, i: usize, n_ctx: usize) -> Result<Vec<Group>> {
        let geometry = &model.attention[i].geometry;
        let rope = model.hparams.rope(i);
        let is_picked = model.layers[i].qk_norm.is_some()
            && rope.is_some()
            && model.hparams.layers[i].rewritten.is_some();
        let mut groups: Vec<Group> = Vec::new();
        for (first, head) in geometry.kv.iter().enumerate() {
            if let Some(last) = groups.last_mut().filter(|g| g.head == *head) {
                last.n += 1;
                continue;
            }
            let (mut divisors, mut picked) = (None, None);
            if let Some(rope) = rope {
                let all = rope.frequencies(model.rope_divisors(n_ctx)).0;
                let planes: Vec<usize> = match &head.planes {
                    Some(planes) => planes.clone(),
                    None => (0..all.len()).collect(),
                };
                let inverse: Vec<f32> = planes.iter().map(|p| (1.0 / all[*p]) as f32).collect();
                if !planes.is_empty() {
                    divisors = Some((self.vector(&inverse)?, planes.len()));
                }
                if is_picked {
                    let (width, n) = (model.hparams.key_dim, all.len());
                    let mut pick = vec![0.0; width * head.score_dim];
                    let mut from: Vec<usize> = (0..head.score_dim).collect();
                    for (to, plane) in planes.iter().enumerate() {
                        let at = rope.pairing.pair(to, planes.len());
                        let of = rope.pairing.pair(*plane, n);
                        (from[at[0]], from[at[1]]) = (of[0], of[1]);
                    }
                    let rest = from.iter_mut().skip(2 * planes.len()).enumerate();
                    rest.for_each(|(i, from)| *from = 2 * n + i);
                    from.iter().enumerate().for_each(|(to, from)| pick[to * width + from] = 1.0);
                    picked = Some(self.floats(pick, [width, head.score_dim, 1, 1])?);
                }
            }
            groups.push(Group { first, n: 1, head: head.clone(), divisors, picked });
        }
        Ok(groups)
    }

    fn layer(
        &mut self,
        model: &Model,
        i: usize,
        n_ctx: usize,
        exact: bool,
    ) -> Result<LayerWeights> {
        let layer: &Layer = &model.layers[i];
        let geometry: &Geometry = &model.attention[i].geometry;
        let map = model.value_map(i, &model.attention[i], exact)?;
        let turned_k = match geometry.kept {
            Kept::Latent { .. } => {
                let (n, w) = (geometry.n_head_kv(), &layer.attn_k.weight);
                let turned = w.turned(n)?;
                let bytes = Data::Bytes(turned.bytes().clone());
                let shape = Shape { ty: Type::F32, dims: [w.n_out / n, w.n_in, n, 1] };
                Some(self.put(shape, bytes, Use::Other)?)
            }
            _ => None,
        };
        // Views of these have other sizes than the device arranges them for.
        let of_values = match geometry.kept {
            Kept::KeysAndValues => Use::Product(None),
            _ => Use::Other,
        };
        let v = map.as_ref().unwrap_or(&layer.attn_v);
        let latent = layer.latent.as_ref().map(|l| -> Result<Latents> {
            let q_a = l
                .q_a
                .as_ref()
                .map(|(q_a, norm)| -> Result<_> { Ok((self.linear(q_a)?, self.norm(norm)?)) });
            let q_a = q_a.transpose()?;
            Ok(Latents { q_a, kv_a: self.linear(&l.kv_a)?, kv_a_norm: self.norm(&l.kv_a_norm)? })
        });
        let latent = latent.transpose()?;
        let qk_norm = match &layer.qk_norm {
            Some((q, k)) => Some((self.vector(&q.weight)?, self.vector(&k.weight)?)),
            None => None,
        };
        Ok(LayerWeights {
            attn_norm: self.norm_if(&layer.attn_norm)?,
            attn_q: self.linear(&layer.attn_q)?,
            attn_k: self.linear(&layer.attn_k)?,
            attn_v: self.matrix(&v.weight, v.bias.as_ref(), of_values)?,
            attn_output: self.linear(&layer.attn_output)?,
            latent,
            turned_k,
            qk_norm,
            post_attention_norm: self.norm_if(&layer.post_attention_norm)?,
            ffn_norm: self.norm_if(&layer.ffn_norm)?,
            ffn: layer.ffn.as_ref().map(|ffn| self.ffn(ffn)).transpose()?,
            experts: layer.experts.as_ref().map(|e| self.experts(e)).transpose()?,
            post_ffw_norm: self.norm_if(&layer.post_ffw_norm)?,
            groups: self.groups(model, i, n_ctx)?,
        })
    }

    /// Refuses more than fits the memory of a device other than the processor.
    fn check_room(&self, reserved: &[usize]) -> Result<()> {
        for (target, reserved) in self.targets.iter().zip(reserved) {
            let is_here = |pool: &&Pool| {
                pool.memory == target.memory || target.arranged.contains(&pool.memory)
            };
            let shapes = self.pools.iter().filter(is_here).flat_map(|pool| &pool.shapes);
            let need = reserved + shapes.map(Shape::n_bytes).sum::<usize>();
            let (free, _) = target.device.memory();
            if target.device.kind() != Kind::Cpu && need > free {
                let name = target.device.name();
                let [need, free] = [need, free].map(|n| n as f64 / 1e6);
                return Err(Error::Runtime(format!(
                    "device {name}: weights and cache need {need:.0} MB, and {free:.0} MB are free; \
                     fewer --gpu-layers or a shorter --ctx need less"
                )));
            }
        }
        Ok(())
    }

    /// Loads everything: what goes to memory of its own, and what stays where it is.
    fn load(self) -> Result<[Vec<Arc<Store>>; 2]> {
        let mut loaded = Vec::new();
        for pool in self.pools {
            let mut store = Store::new(pool.memory, &pool.shapes, true).map_err(fault)?;
            pool.data.iter().enumerate().for_each(|(i, data)| data.write(&mut store, i));
            loaded.push(Arc::new(store));
        }
        Ok([loaded, self.borrowed.into_iter().map(Arc::new).collect()])
    }
}

/// The number of a weight's type is ggml's.
fn type_of(w: &Weight) -> Result<Type> {
    let id = w.format.ty.id;
    let found = Type::from_id(id);
    found.ok_or_else(|| Error::Runtime(format!("ggml has no type {}", w.format.ty.name)))
}
