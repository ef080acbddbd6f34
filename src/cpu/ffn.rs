//! The feed-forward network.
#![allow(unsafe_code)]

use super::forward::{Buffers, Pass};
use super::kernels::{Activations, Scratch};
use super::lora::{give_back, lower};
use super::ops::{activate, activate_product};
use super::products::{products, rows_per_task};
use super::rows::Parts;
use super::threads::Columns;
use super::weights::FfnMatrices;
use crate::simd;

impl Buffers {
    /// `act(gate) * up`, or `act(up)`, times what the token takes of it.
    pub(super) fn ffn(&mut self, pass: &Pass, w: &FfnMatrices, n: usize) {
        let Buffers { normed, gate, up, shares, threads, .. } = self;
        let n_ff = w.up.n_out;
        up.resize(n, n_ff);
        gate.resize(if w.gate.is_some() { n * n_ff } else { 0 }, 0.0);
        let x = normed.view();
        shares.clear();
        if let Some(share) = &w.share {
            shares.resize(n, 0.0);
            products(pass.crew, &[(share, Columns::new(shares, 1))], &x, threads);
            shares.iter_mut().for_each(|s| *s = 1.0 / (1.0 + libm::expf(-*s)));
        }
        let shares = &shares[..];
        let (gate, up) = (Columns::new(gate, n_ff), up.parts(w.down.copies));
        let low = lower(pass.crew, w.readers().map(|w| (w, x)), threads);
        let n_rows = rows_per_task(pass.crew, n_ff).next_multiple_of(32);
        pass.crew.each_with(threads, n_ff.div_ceil(n_rows), |own, task| {
            let start = task * n_rows;
            let len = n_rows.min(n_ff - start);
            // SAFETY: tasks have rows of their own.
            unsafe {
                ffn_rows(pass, w, (start, len), (&x, &low, shares), &mut own.scratch, (gate, &up))
            };
        });
        give_back(threads, low);
    }
}

/// Elements of the activated product of an FFN's gate and what it is multiplied with, for all tokens.
/// `low`: what [`lower`] makes of `x`; `shares`: factors of tokens, if they have any.
///
/// # Safety
/// Nobody else uses those elements meanwhile.
pub(super) unsafe fn ffn_rows(
    pass: &Pass,
    w: &FfnMatrices,
    (start, len): (usize, usize),
    (x, mut low, shares): (&Activations, &[f32], &[f32]),
    scratch: &mut Scratch,
    (gate, up): (Columns<f32>, &Parts),
) {
    let activation = pass.model.hparams.activation;
    // SAFETY: the caller's promise.
    unsafe {
        let x_up = w.up.lowered(x, &mut low);
        w.up.multiply((start, len), &x_up, scratch, up.floats, start);
        if let Some(w) = &w.gate {
            w.multiply((start, len), &w.lowered(x, &mut low), scratch, gate, start);
        }
        for t in 0..x.n {
            let up = up.floats.part(t, start, len);
            match w.gate {
                Some(_) => activate_product(activation, gate.part(t, start, len), up),
                None => activate(activation, up),
            }
            if let Some(share) = shares.get(t) {
                simd::scale(up, *share);
            }
        }
        up.round(0..x.n, start, len);
    }
}
