//! Operations of graphs. Sizes are given fastest first, as ggml has them.

use std::ffi::c_int;
use std::ptr::null_mut;

use crate::{Graph, Tensor, Type, sys};

/// What GELU is computed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gelu {
    /// The error function.
    Erf,
    /// A hyperbolic tangent close to it.
    Tanh,
    /// A sigmoid close to it.
    Quick,
}

/// A rotation of pairs of elements by positions.
#[derive(Debug, Clone, Copy)]
pub struct Rope {
    /// Elements that are rotated, from the first on.
    pub dim: usize,
    /// Whether the halves of the rotated part go together, not neighbours.
    pub halves: bool,
    /// What the result is multiplied with.
    pub scale: f32,
}

macro_rules! of_one {
    ($($(#[$doc:meta])* $name:ident = $raw:ident;)*) => {
        impl Graph { $(
            $(#[$doc])*
            pub fn $name(&mut self, a: Tensor) -> Tensor {
                let a = self.at(a);
                // SAFETY: tensors of this graph, in its context.
                let out = unsafe { sys::$raw(self.context.as_ptr(), a) };
                self.put(out)
            }
        )* }
    };
}

macro_rules! of_two {
    ($($(#[$doc:meta])* $name:ident = $raw:ident;)*) => {
        impl Graph { $(
            $(#[$doc])*
            pub fn $name(&mut self, a: Tensor, b: Tensor) -> Tensor {
                let (a, b) = (self.at(a), self.at(b));
                // SAFETY: tensors of this graph, in its context.
                let out = unsafe { sys::$raw(self.context.as_ptr(), a, b) };
                self.put(out)
            }
        )* }
    };
}

of_one! {
    /// Size of each element.
    abs = ggml_abs;
    /// A copy whose elements follow each other.
    cont = ggml_cont;
    /// `e` to each element.
    exp = ggml_exp;
    /// Each element, or 0 if that is more.
    relu = ggml_relu;
    /// `1 / (1 + exp(-x))`
    sigmoid = ggml_sigmoid;
    /// `x sigmoid(x)`
    silu = ggml_silu;
    /// `ln(1 + exp(x))`
    softplus = ggml_softplus;
    /// The square of each element.
    sqr = ggml_sqr;
    /// The root of each element.
    sqrt = ggml_sqrt;
    /// The sum of each row.
    sum_rows = ggml_sum_rows;
    /// The hyperbolic tangent of each element.
    tanh = ggml_tanh;
    /// Rows as columns.
    transpose = ggml_transpose;
}

of_two! {
    /// The sum; `b` repeats.
    add = ggml_add;
    /// The quotient; `b` repeats.
    div = ggml_div;
    /// The rows of `a` that `b` numbers.
    get_rows = ggml_get_rows;
    /// The product of elements; `b` repeats.
    mul = ggml_mul;
    /// The difference; `b` repeats.
    sub = ggml_sub;
    /// `silu(a) b`
    swiglu = ggml_swiglu_split;
}

impl Graph {
    /// Dot products of rows of `a` with rows of `b`, summed as floats: `[n, m, ..]` of `[k, n, ..]` and
    /// `[k, m, ..]`.
    pub fn mul_mat(&mut self, a: Tensor, b: Tensor) -> Tensor {
        let (a, b) = (self.at(a), self.at(b));
        // SAFETY: tensors of this graph, in its context.
        let out = unsafe {
            let out = sys::ggml_mul_mat(self.context.as_ptr(), a, b);
            sys::ggml_mul_mat_set_prec(out, sys::GGML_PREC_F32);
            out
        };
        self.put(out)
    }

    /// The same with the matrices of `a` that `ids` numbers: `[n, used, tokens]` of `[k, n, all]`,
    /// `[k, used or 1, tokens]` and `[used, tokens]`.
    pub fn mul_mat_id(&mut self, a: Tensor, b: Tensor, ids: Tensor) -> Tensor {
        let (a, b, ids) = (self.at(a), self.at(b), self.at(ids));
        // SAFETY: tensors of this graph, in its context.
        let out = unsafe { sys::ggml_mul_mat_id(self.context.as_ptr(), a, b, ids) };
        self.put(out)
    }

    /// `a` with the rows of `b` added that `ids` numbers.
    pub fn add_id(&mut self, a: Tensor, b: Tensor, ids: Tensor) -> Tensor {
        let (a, b, ids) = (self.at(a), self.at(b), self.at(ids));
        // SAFETY: tensors of this graph, in its context.
        let out = unsafe { sys::ggml_add_id(self.context.as_ptr(), a, b, ids) };
        self.put(out)
    }

    /// `factor a + offset`
    pub fn scale(&mut self, a: Tensor, factor: f32, offset: f32) -> Tensor {
        let a = self.at(a);
        // SAFETY: tensors of this graph, in its context.
        let out = unsafe { sys::ggml_scale_bias(self.context.as_ptr(), a, factor, offset) };
        self.put(out)
    }

    /// Each element, or the nearest within limits.
    pub fn clamp(&mut self, a: Tensor, least: f32, most: f32) -> Tensor {
        let a = self.at(a);
        // SAFETY: tensors of this graph, in its context. What is clamped is a copy: ggml works in place.
        let out = unsafe {
            let copy = sys::ggml_dup(self.context.as_ptr(), a);
            sys::ggml_clamp(self.context.as_ptr(), copy, least, most)
        };
        self.put(out)
    }

    /// GELU.
    pub fn gelu(&mut self, a: Tensor, by: Gelu) -> Tensor {
        let (context, a) = (self.context.as_ptr(), self.at(a));
        // SAFETY: tensors of this graph, in its context.
        let out = unsafe {
            match by {
                Gelu::Erf => sys::ggml_gelu_erf(context, a),
                Gelu::Tanh => sys::ggml_gelu(context, a),
                Gelu::Quick => sys::ggml_gelu_quick(context, a),
            }
        };
        self.put(out)
    }

    /// Rows less their mean, divided by the root of their mean square.
    pub fn norm(&mut self, a: Tensor, eps: f32) -> Tensor {
        let a = self.at(a);
        // SAFETY: tensors of this graph, in its context.
        let out = unsafe { sys::ggml_norm(self.context.as_ptr(), a, eps) };
        self.put(out)
    }

    /// Rows divided by the root of their mean square.
    pub fn rms_norm(&mut self, a: Tensor, eps: f32) -> Tensor {
        let a = self.at(a);
        // SAFETY: tensors of this graph, in its context.
        let out = unsafe { sys::ggml_rms_norm(self.context.as_ptr(), a, eps) };
        self.put(out)
    }

    /// Rotates elements of `[head, heads, tokens]` by positions, whose frequencies are `1 / divisors`.
    pub fn rope(&mut self, a: Tensor, positions: Tensor, divisors: Tensor, rope: Rope) -> Tensor {
        let (a, positions, divisors) = (self.at(a), self.at(positions), self.at(divisors));
        let mode = if rope.halves { sys::GGML_ROPE_TYPE_NEOX } else { sys::GGML_ROPE_TYPE_NORMAL };
        let (dim, mode) = (rope.dim as c_int, mode as c_int);
        let context = self.context.as_ptr();
        // SAFETY: tensors of this graph, in its context.
        let out = unsafe {
            sys::ggml_rope_ext(
                context, a, positions, divisors, dim, mode, 0, 1.0, 1.0, 0.0, rope.scale, 0.0, 0.0,
            )
        };
        self.put(out)
    }

    /// `softmax(scale a + mask)` of each row, where the mask of a head is multiplied with its slope.
    pub fn soft_max(&mut self, a: Tensor, mask: Tensor, scale: f32, max_bias: f32) -> Tensor {
        let (a, mask) = (self.at(a), self.at(mask));
        // SAFETY: tensors of this graph, in its context.
        let out =
            unsafe { sys::ggml_soft_max_ext(self.context.as_ptr(), a, mask, scale, max_bias) };
        self.put(out)
    }

    /// `softmax(a)` of each row.
    pub fn soft_max_plain(&mut self, a: Tensor) -> Tensor {
        let a = self.at(a);
        // SAFETY: tensors of this graph, in its context.
        let out = unsafe { sys::ggml_soft_max_ext(self.context.as_ptr(), a, null_mut(), 1.0, 0.0) };
        self.put(out)
    }

    /// Softmax attention in one operation: `[value, heads, queries]` of `q [key, queries, heads]`,
    /// `k [key, keys, kv heads]`, `v [value, keys, kv heads]`, with `mask [keys, queries]` of 16-bit
    /// floats added to scores that are `scale q k`, or `softcap tanh(scale q k / softcap)` where that is
    /// not 0.
    pub fn flash_attention(
        &mut self,
        [q, k, v, mask]: [Tensor; 4],
        scale: f32,
        max_bias: f32,
        softcap: f32,
    ) -> Tensor {
        let [q, k, v, mask] = [q, k, v, mask].map(|t| self.at(t));
        let context = self.context.as_ptr();
        // SAFETY: tensors of this graph, in its context.
        let out = unsafe {
            let out = sys::ggml_flash_attn_ext(context, q, k, v, mask, scale, max_bias, softcap);
            sys::ggml_flash_attn_ext_set_prec(out, sys::GGML_PREC_F32);
            out
        };
        self.put(out)
    }

    /// Adds logits, one of each head, to what [`Graph::flash_attention`] or [`Graph::soft_max`] gave:
    /// they take weight, and give nothing.
    pub fn add_sinks(&mut self, weights: Tensor, sinks: Tensor) {
        let (weights, sinks) = (self.at(weights), self.at(sinks));
        // SAFETY: tensors of this graph; the function is that of the operation.
        unsafe {
            match (*weights).op {
                sys::GGML_OP_FLASH_ATTN_EXT => sys::ggml_flash_attn_ext_add_sinks(weights, sinks),
                sys::GGML_OP_SOFT_MAX => sys::ggml_soft_max_add_sinks(weights, sinks),
                _ => {}
            }
        }
    }

    /// The numbers of the `k` largest elements of each row, largest first.
    pub fn top_k(&mut self, a: Tensor, k: usize) -> Tensor {
        let a = self.at(a);
        // SAFETY: tensors of this graph, in its context.
        let out = unsafe { sys::ggml_argsort_top_k(self.context.as_ptr(), a, k as c_int) };
        self.put(out)
    }

    /// Writes rows of `b` over those of `a` that `ids` numbers; what to compute for it to happen.
    pub fn set_rows(&mut self, a: Tensor, b: Tensor, ids: Tensor) -> Tensor {
        let (a, b, ids) = (self.at(a), self.at(b), self.at(ids));
        // SAFETY: tensors of this graph, in its context.
        let out = unsafe { sys::ggml_set_rows(self.context.as_ptr(), a, b, ids) };
        self.put(out)
    }

    /// `a` repeated to these sizes.
    pub fn repeat(&mut self, a: Tensor, dims: [usize; 4]) -> Tensor {
        let a = self.at(a);
        let [n0, n1, n2, n3] = dims.map(|n| n as i64);
        // SAFETY: tensors of this graph, in its context.
        let out = unsafe { sys::ggml_repeat_4d(self.context.as_ptr(), a, n0, n1, n2, n3) };
        self.put(out)
    }

    /// `a` followed by `b` along a dimension.
    pub fn concat(&mut self, a: Tensor, b: Tensor, along: usize) -> Tensor {
        let (a, b) = (self.at(a), self.at(b));
        // SAFETY: tensors of this graph, in its context.
        let out = unsafe { sys::ggml_concat(self.context.as_ptr(), a, b, along as c_int) };
        self.put(out)
    }

    /// `a` with `n` zeros after each row.
    pub fn pad(&mut self, a: Tensor, n: usize) -> Tensor {
        let a = self.at(a);
        // SAFETY: tensors of this graph, in its context.
        let out = unsafe { sys::ggml_pad(self.context.as_ptr(), a, n as c_int, 0, 0, 0) };
        self.put(out)
    }

    /// A copy in another type.
    pub fn cast(&mut self, a: Tensor, ty: Type) -> Tensor {
        let a = self.at(a);
        // SAFETY: tensors of this graph, in its context.
        let out = unsafe { sys::ggml_cast(self.context.as_ptr(), a, ty.0) };
        self.put(out)
    }

    /// The same elements with other sizes.
    pub fn reshape(&mut self, a: Tensor, dims: [usize; 4]) -> Tensor {
        let a = self.at(a);
        let [n0, n1, n2, n3] = dims.map(|n| n as i64);
        // SAFETY: tensors of this graph, in its context.
        let out = unsafe { sys::ggml_reshape_4d(self.context.as_ptr(), a, n0, n1, n2, n3) };
        self.put(out)
    }

    /// The same elements with dimension `i` as dimension `to[i]`.
    pub fn permute(&mut self, a: Tensor, to: [usize; 4]) -> Tensor {
        let a = self.at(a);
        let [t0, t1, t2, t3] = to.map(|n| n as c_int);
        // SAFETY: tensors of this graph, in its context.
        let out = unsafe { sys::ggml_permute(self.context.as_ptr(), a, t0, t1, t2, t3) };
        self.put(out)
    }

    /// Some of the elements: sizes, bytes between elements along dimensions after the first, and bytes
    /// before the first element.
    pub fn view(
        &mut self,
        a: Tensor,
        dims: [usize; 4],
        strides: [usize; 3],
        start: usize,
    ) -> Tensor {
        let ty = self.shape(a).ty;
        let a = self.at(a);
        let last: usize = dims[1..].iter().zip(strides).map(|(n, s)| (n - 1) * s).sum();
        // SAFETY: a tensor of this graph; within its bytes, as asserted.
        let out = unsafe {
            let end = start + last + ty.row_bytes(dims[0]);
            assert!(end <= sys::ggml_nbytes(a), "a view beyond its tensor");
            let ([n0, n1, n2, n3], [s1, s2, s3]) = (dims.map(|n| n as i64), strides);
            sys::ggml_view_4d(self.context.as_ptr(), a, n0, n1, n2, n3, s1, s2, s3, start)
        };
        self.put(out)
    }
}
