//! The engine's copy of a model's matrices: packed for the kernels, or read where they lie.
#![allow(unsafe_code)]

use std::sync::Arc;

use memmap2::MmapMut;
use rayon::prelude::*;

use super::kernels::{Activations, Copies, LANES, LAYOUTS, Panels, Scratch, layout_of, multiply};
use super::lora::LoraMatrix;
use super::threads::{Columns, Team};
use crate::attention::Attention;
use crate::error::{Error, Result};
use crate::model::{Ffn, Layer, Linear, Model, Weight};
use crate::simd;

/// Bytes at which every packed matrix begins, for whole vectors.
const ALIGNMENT: usize = 64;

/// A matrix with its bias and its adapters, ready to multiply.
pub(super) struct Matrix {
    /// Elements of a row.
    pub(super) n_in: usize,
    /// Rows.
    pub(super) n_out: usize,
    /// The copies of activations that it is multiplied with.
    pub(super) copies: Copies,
    pub(super) bias: Option<Vec<f32>>,
    pub(super) lora: Option<Box<LoraMatrix>>,
    place: Place,
}

enum Place {
    /// In panels, from a byte of the arena on.
    Packed { arena: Arc<MmapMut>, start: usize, layout: usize, stride: usize },
    /// In the file, packed panel by panel as it is read.
    Mapped { weight: Weight, layout: usize },
    /// In the file, for formats without a layout.
    File(Weight),
}

/// The matrices of one layer.
pub(super) struct LayerMatrices {
    pub(super) attn_q: Matrix,
    pub(super) attn_k: Matrix,
    /// Makes values of the layer's input, or of keys where those are what is cached.
    pub(super) attn_v: Matrix,
    pub(super) attn_output: Matrix,
    pub(super) latent: Option<LatentMatrices>,
    pub(super) ffn: Option<FfnMatrices>,
    pub(super) experts: Option<ExpertMatrices>,
}

/// Those of an FFN.
pub(super) struct FfnMatrices {
    pub(super) gate: Option<Matrix>,
    pub(super) up: Matrix,
    pub(super) down: Matrix,
    pub(super) share: Option<Matrix>,
}

/// Those of experts, which stay in the file, and what scores them.
pub(super) struct ExpertMatrices {
    pub(super) router: Matrix,
    pub(super) all: Vec<FfnMatrices>,
    n_used: usize,
}

/// What makes latents that queries, and keys and values, are made of.
pub(super) struct LatentMatrices {
    pub(super) q_a: Option<Matrix>,
    pub(super) kv_a: Matrix,
}

/// All matrices that are multiplied.
pub(super) struct Matrices {
    pub(super) layers: Vec<LayerMatrices>,
    pub(super) output: Option<Matrix>,
}

/// The matrices of a layer, in the order in which they are packed. `map`: what makes values, if they
/// are not made of the layer's input.
pub(super) fn linears<'a>(
    l: &'a Layer,
    map: &'a Option<Linear>,
) -> impl Iterator<Item = &'a Linear> {
    let v = map.as_ref().unwrap_or(&l.attn_v);
    let attention = [&l.attn_q, &l.attn_k, v, &l.attn_output].into_iter();
    let latent = l.latent.iter();
    let latents = latent.flat_map(|l| l.q_a.iter().map(|(q_a, _)| q_a).chain([&l.kv_a]));
    let ffn = l.ffn.iter();
    let ffn = ffn.flat_map(|f| f.gate.iter().chain([&f.up, &f.down]).chain(&f.share));
    attention.chain(latents).chain(ffn).chain(l.experts.iter().map(|e| &e.router))
}

/// What becomes of a weight: its layout, and the bytes of its packed copy; `None` for one that
/// stays in the file, such as one with rows of half a block. `exact`: only layouts that lose nothing
/// of the activations.
pub(super) fn packed(w: &Weight, exact: bool) -> Option<(usize, usize)> {
    let whole = |i: &usize| w.n_in.is_multiple_of(LAYOUTS[*i].block_len);
    let i = layout_of(w.format).filter(whole).filter(|i| !(exact && LAYOUTS[*i].integer))?;
    Some((i, LAYOUTS[i].panel_bytes(w.n_in) * w.n_out.div_ceil(LANES)))
}

impl Matrices {
    /// Packs all matrices of a model that attends so into one piece of memory.
    pub(super) fn new(
        model: &Model,
        attention: &[Attention],
        team: &Team,
        exact: bool,
    ) -> Result<Matrices> {
        let layers = attention.par_iter().enumerate();
        let maps = layers.map(|(i, attention)| model.value_map(i, attention, exact));
        // All, so that it is the first layer's error that is told.
        let maps: Vec<Result<Option<Linear>>> = maps.collect();
        let maps: Vec<Option<Linear>> = maps.into_iter().collect::<Result<_>>()?;
        let layers = || model.layers.iter().zip(&maps);
        let weights = layers().flat_map(|(l, map)| linears(l, map)).map(|l| &l.weight);
        let weights: Vec<&Weight> = weights.chain(&model.output).collect();
        let sizes = weights.iter().map(|w| packed(w, exact).map_or(0, |p| p.1));
        let sizes: Vec<usize> = sizes.map(|n| n.next_multiple_of(ALIGNMENT)).collect();
        let total: usize = sizes.iter().sum();
        let mut arena = MmapMut::map_anon(total.max(1)).map_err(|e| {
            Error::Runtime(format!("no memory for {} MB of weights: {e}", total / 1_000_000))
        })?;
        // Fewer page faults and look-ups; a system without them is only slower.
        #[cfg(all(target_os = "linux", not(miri)))]
        let _ = arena.advise(memmap2::Advice::HugePage);
        team.enter(team.n_threads(), |crew| {
            let mut rest = &mut arena[..];
            for (w, size) in weights.iter().zip(&sizes) {
                let (this, next) = rest.split_at_mut(*size);
                rest = next;
                let Some((layout, n_bytes)) = packed(w, exact) else { continue };
                let panel = LAYOUTS[layout].panel_bytes(w.n_in);
                crew.chunks(&mut this[..n_bytes], panel, |_, i, out| {
                    let rows = (i * LANES..w.n_out.min((i + 1) * LANES)).map(|r| w.row(r));
                    LAYOUTS[layout].pack_panel(rows, out);
                });
            }
        });
        let arena = Arc::new(arena);
        let (mut sizes, mut start) = (sizes.into_iter(), 0);
        let mut matrix = |w: &Weight, bias: Option<&Vec<f32>>| {
            let place = match packed(w, exact) {
                Some((layout, _)) => {
                    let stride = LAYOUTS[layout].panel_bytes(w.n_in);
                    Place::Packed { arena: arena.clone(), start, layout, stride }
                }
                None => Place::File(w.clone()),
            };
            start += sizes.next().unwrap_or(0);
            let copies = match place {
                Place::Packed { layout, .. } if !exact => Copies::of(layout),
                _ => Copies::default(),
            };
            let lora = LoraMatrix::of(w);
            Matrix { n_in: w.n_in, n_out: w.n_out, copies, bias: bias.cloned(), lora, place }
        };
        let mut linear = |l: &Linear| matrix(&l.weight, l.bias.as_ref());
        // In the order of `linears`.
        let layers = layers()
            .map(|(l, map)| LayerMatrices {
                attn_q: linear(&l.attn_q),
                attn_k: linear(&l.attn_k),
                attn_v: linear(map.as_ref().unwrap_or(&l.attn_v)),
                attn_output: linear(&l.attn_output),
                latent: l.latent.as_ref().map(|l| LatentMatrices {
                    q_a: l.q_a.as_ref().map(|(q_a, _)| linear(q_a)),
                    kv_a: linear(&l.kv_a),
                }),
                ffn: l.ffn.as_ref().map(|f| FfnMatrices {
                    gate: f.gate.as_ref().map(&mut linear),
                    up: linear(&f.up),
                    down: linear(&f.down),
                    share: f.share.as_ref().map(&mut linear),
                }),
                experts: l.experts.as_ref().map(|e| ExpertMatrices {
                    router: linear(&e.router),
                    all: e.all.iter().map(|f| FfnMatrices::mapped(f, exact)).collect(),
                    n_used: model.hparams.experts.map_or(0, |e| e.n_used),
                }),
            })
            .collect();
        Ok(Matrices { layers, output: model.output.as_ref().map(|w| matrix(w, None)) })
    }

    /// Every matrix.
    pub(super) fn all(&self) -> impl Iterator<Item = &Matrix> {
        self.layers.iter().flat_map(LayerMatrices::all).chain(&self.output)
    }
}

impl LayerMatrices {
    /// The copies of activations that queries, keys and values, or their latents, are made from.
    pub(super) fn qkv_copies(&self) -> Copies {
        match &self.latent {
            None => self.attn_q.copies | self.attn_k.copies | self.attn_v.copies,
            Some(l) => l.q_a.as_ref().unwrap_or(&self.attn_q).copies | l.kv_a.copies,
        }
    }

    /// Those that the feed-forward block reads.
    pub(super) fn ffn_copies(&self) -> Copies {
        let experts = self.experts.iter();
        let router = experts.clone().map(|e| e.router.copies);
        let experts = experts.flat_map(|e| e.all.first()).map(FfnMatrices::copies);
        let all = self.ffn.iter().map(FfnMatrices::copies).chain(router).chain(experts);
        all.fold(Copies::default(), |a, b| a | b)
    }

    fn all(&self) -> impl Iterator<Item = &Matrix> {
        let attention = [&self.attn_q, &self.attn_k, &self.attn_v, &self.attn_output].into_iter();
        let latents = self.latent.iter().flat_map(|l| l.q_a.iter().chain([&l.kv_a]));
        // As many of the experts as a token goes through.
        let used = self.experts.iter().flat_map(|e| &e.all[..e.n_used.min(e.all.len())]);
        let ffns = self.ffn.iter().chain(used).flat_map(FfnMatrices::all);
        attention.chain(latents).chain(self.experts.iter().map(|e| &e.router)).chain(ffns)
    }
}

impl FfnMatrices {
    /// Matrices that stay in the file.
    fn mapped(f: &Ffn, exact: bool) -> FfnMatrices {
        let mapped = |l: &Linear| Matrix::mapped(l, exact);
        let [gate, share] = [&f.gate, &f.share].map(|l| l.as_ref().map(mapped));
        FfnMatrices { gate, up: mapped(&f.up), down: mapped(&f.down), share }
    }

    /// The copies of activations that it reads.
    pub(super) fn copies(&self) -> Copies {
        self.readers().chain(&self.share).fold(Copies::default(), |copies, w| copies | w.copies)
    }

    fn all(&self) -> impl Iterator<Item = &Matrix> {
        self.readers().chain([&self.down]).chain(&self.share)
    }

    /// Those that read its input.
    pub(super) fn readers(&self) -> impl Iterator<Item = &Matrix> + Clone {
        [&self.up].into_iter().chain(&self.gate)
    }
}

impl Matrix {
    /// One that stays in the file, and is packed as it is read.
    fn mapped(l: &Linear, exact: bool) -> Matrix {
        let w = &l.weight;
        let place = match packed(w, exact) {
            Some((layout, _)) => Place::Mapped { weight: w.clone(), layout },
            None => Place::File(w.clone()),
        };
        let copies = match place {
            Place::Mapped { layout, .. } if !exact => Copies::of(layout),
            _ => Copies::default(),
        };
        let lora = LoraMatrix::of(w);
        Matrix { n_in: w.n_in, n_out: w.n_out, copies, bias: l.bias.clone(), lora, place }
    }

    /// Bytes of its elements, and of its adapters.
    pub(super) fn n_bytes(&self) -> usize {
        let own = match &self.place {
            Place::Packed { stride, .. } => self.n_out.div_ceil(LANES) * stride,
            Place::File(w) | Place::Mapped { weight: w, .. } => {
                w.format.row_bytes(w.n_in) * w.n_out
            }
        };
        own + self.lora.as_ref().map_or(0, |lora| lora.n_bytes())
    }

    /// Products that a token needs.
    pub(super) fn n_products(&self) -> usize {
        self.n_in * self.n_out + self.rank() * (self.n_in + self.n_out)
    }

    /// `out[t][start..] = x W^T + b`, with adapters added to `W`, for `n_rows` rows from `row` on, a
    /// multiple of [`LANES`].
    ///
    /// # Safety
    /// Nobody else uses those parts of `out` meanwhile.
    pub(super) unsafe fn multiply(
        &self,
        (row, n_rows): (usize, usize),
        x: &Activations,
        scratch: &mut Scratch,
        out: Columns<f32>,
        start: usize,
    ) {
        match &self.place {
            Place::Packed { arena, start: at, layout, stride } => {
                let panels = Panels {
                    layout: *layout,
                    bytes: &arena[at + row / LANES * stride..],
                    stride: *stride,
                    n_in: self.n_in,
                    n_rows,
                };
                // SAFETY: the caller's promise.
                unsafe { multiply(&panels, x, scratch, out, start) };
            }
            Place::Mapped { weight: w, layout } => {
                let stride = LAYOUTS[*layout].panel_bytes(self.n_in);
                let mut panel = scratch.take_panel(stride);
                for first in (row..row + n_rows).step_by(LANES) {
                    let n_here = LANES.min(row + n_rows - first);
                    let rows = (first..self.n_out.min(first + LANES)).map(|r| w.row(r));
                    LAYOUTS[*layout].pack_panel(rows, panel.bytes(stride));
                    let panels = Panels {
                        layout: *layout,
                        bytes: panel.bytes(stride),
                        stride,
                        n_in: self.n_in,
                        n_rows: n_here,
                    };
                    // SAFETY: the caller's promise.
                    unsafe { multiply(&panels, x, scratch, out, start + first - row) };
                }
                scratch.put_panel(panel);
            }
            Place::File(w) => {
                let mut floats = vec![0.0f32; self.n_in];
                for r in 0..n_rows {
                    w.format.dequantize(w.row(row + r), &mut floats);
                    for t in 0..x.n {
                        let x = &x.floats[t * x.stride..t * x.stride + self.n_in];
                        // SAFETY: the caller's promise.
                        let out = unsafe { out.part(t, start + r, 1) };
                        out.fill(simd::dot(&floats, x));
                    }
                }
            }
        }
        if let Some(bias) = &self.bias {
            for t in 0..x.n {
                // SAFETY: the caller's promise.
                simd::add(unsafe { out.part(t, start, n_rows) }, &bias[row..row + n_rows]);
            }
        }
        if let Some(lora) = &self.lora {
            // SAFETY: the caller's promise.
            unsafe { lora.add((row, n_rows), x, scratch, out, start) };
        }
    }
}
