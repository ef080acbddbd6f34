//! Tensors that stay: weights, and what graphs keep between runs.

use std::ffi::c_void;
use std::fmt;
use std::ptr::{NonNull, null_mut};

use crate::{BufferType, Error, Result, Type, sys};

/// A type and sizes, fastest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Of elements.
    pub ty: Type,
    /// Elements along each of four dimensions.
    pub dims: [usize; 4],
}

impl Shape {
    /// A matrix of `n_out` rows of `n_in` elements.
    pub fn matrix(ty: Type, n_in: usize, n_out: usize) -> Shape {
        Shape { ty, dims: [n_in, n_out, 1, 1] }
    }

    /// Bytes, without what a device adds to them.
    pub fn n_bytes(&self) -> usize {
        self.ty.row_bytes(self.dims[0]) * self.dims[1..].iter().product::<usize>()
    }
}

/// Tensors that stay. One that graphs write to belongs to a single scheduler.
pub struct Store {
    context: NonNull<sys::ggml_context>,
    buffers: Vec<NonNull<sys::ggml_backend_buffer>>,
    tensors: Vec<NonNull<sys::ggml_tensor>>,
    /// What the tensors' bytes are part of, where they are not the store's own.
    _owner: Option<Box<dyn AsRef<[u8]> + Send + Sync>>,
}

// SAFETY: changed through `&mut`, or by the graphs of the one scheduler that it belongs to.
unsafe impl Send for Store {}
unsafe impl Sync for Store {}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Store of {} tensors, {} bytes", self.tensors.len(), self.n_bytes())
    }
}

/// A context for `n` tensors without data.
pub(crate) fn context(n: usize, more: usize) -> Result<NonNull<sys::ggml_context>> {
    // SAFETY: ggml allocates as many bytes itself.
    let raw = unsafe {
        let mem_size = n * sys::ggml_tensor_overhead() + more;
        sys::ggml_init(sys::ggml_init_params { mem_size, mem_buffer: null_mut(), no_alloc: true })
    };
    NonNull::new(raw).ok_or_else(|| Error("out of memory".into()))
}

impl Store {
    fn described(shapes: &[Shape]) -> Result<Store> {
        let context = context(shapes.len(), 0)?;
        let (buffers, tensors) = (Vec::new(), Vec::new());
        let mut store = Store { context, buffers, tensors, _owner: None };
        for Shape { ty, dims } in shapes {
            if !dims[0].is_multiple_of(ty.block()) {
                let message = format!("{} elements are not whole blocks of {}", dims[0], ty.name());
                return Err(Error(message));
            }
            let [a, b, c, d] = dims.map(|n| n as i64);
            // SAFETY: the context has room for as many tensors as there are shapes.
            let raw = unsafe { sys::ggml_new_tensor_4d(context.as_ptr(), ty.0, a, b, c, d) };
            store.tensors.extend(NonNull::new(raw));
        }
        Ok(store)
    }

    /// Tensors in memory of their own, which holds anything at first. `weights`: graphs only read
    /// them, and products with them run where they are.
    pub fn new(memory: BufferType, shapes: &[Shape], weights: bool) -> Result<Store> {
        let mut store = Store::described(shapes)?;
        if shapes.is_empty() {
            return Ok(store);
        }
        // SAFETY: the context's tensors have no memory yet.
        let buffer = unsafe {
            let memory = memory.0.as_ptr();
            sys::ggml_backend_alloc_ctx_tensors_from_buft(store.context.as_ptr(), memory)
        };
        let Some(buffer) = NonNull::new(buffer) else {
            let n: usize = shapes.iter().map(Shape::n_bytes).sum();
            return Err(Error(format!("{}: no room for {n} bytes", memory.name())));
        };
        store.buffers.push(buffer);
        if weights {
            // SAFETY: the buffer was just made.
            unsafe {
                let usage = sys::GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
                sys::ggml_backend_buffer_set_usage(buffer.as_ptr(), usage);
            }
        }
        Ok(store)
    }

    /// A tensor whose bytes are those of `owner`, for the processor, which only reads them.
    pub fn borrowed(owner: Box<dyn AsRef<[u8]> + Send + Sync>, shape: Shape) -> Result<Store> {
        let mut store = Store::described(&[shape])?;
        let bytes = (*owner).as_ref();
        if bytes.len() != shape.n_bytes() {
            let (found, wanted) = (bytes.len(), shape.n_bytes());
            return Err(Error(format!("{found} bytes for a tensor of {wanted}")));
        }
        // ggml wants a buffer to begin at a multiple of this.
        let before = bytes.as_ptr() as usize % sys::GGML_MEM_ALIGN.max(64) as usize;
        // SAFETY: nothing is read or written before the tensor's bytes, which are never written, and
        // live as long as the store.
        unsafe {
            let data = bytes.as_ptr().cast_mut();
            let base = data.wrapping_sub(before).cast::<c_void>();
            let buffer = sys::ggml_backend_cpu_buffer_from_ptr(base, bytes.len() + before);
            let buffer = NonNull::new(buffer).ok_or_else(|| Error("no buffer".into()))?;
            store.buffers.push(buffer);
            let usage = sys::GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
            sys::ggml_backend_buffer_set_usage(buffer.as_ptr(), usage);
            let tensor = store.tensors[0].as_ptr();
            sys::ggml_backend_tensor_alloc(buffer.as_ptr(), tensor, data.cast::<c_void>());
        }
        store._owner = Some(owner);
        Ok(store)
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Bytes of memory.
    pub fn n_bytes(&self) -> usize {
        // SAFETY: buffers live as long as the store.
        let size = |b: &NonNull<_>| unsafe { sys::ggml_backend_buffer_get_size(b.as_ptr()) };
        self.buffers.iter().map(size).sum()
    }

    pub(crate) fn raw(&self, i: usize) -> NonNull<sys::ggml_tensor> {
        self.tensors[i]
    }

    /// Writes bytes of a tensor from one of them on; where a device arranges them, that is the first
    /// and they are all.
    pub fn set(&mut self, i: usize, start: usize, bytes: &[u8]) {
        assert!(self._owner.is_none(), "borrowed bytes are not written");
        let tensor = self.tensors[i].as_ptr();
        // SAFETY: the tensor has memory, and as many bytes.
        unsafe {
            assert!(start + bytes.len() <= sys::ggml_nbytes(tensor), "bytes of a tensor");
            let data = bytes.as_ptr().cast::<c_void>();
            sys::ggml_backend_tensor_set(tensor, data, start, bytes.len());
        }
    }

    /// Fills all tensors with zero bytes.
    pub fn clear(&mut self) {
        assert!(self._owner.is_none(), "borrowed bytes are not written");
        for buffer in &self.buffers {
            // SAFETY: buffers live as long as the store.
            unsafe { sys::ggml_backend_buffer_clear(buffer.as_ptr(), 0) };
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: graphs hold the stores whose tensors they use, so nothing uses these any more.
        unsafe {
            self.buffers.iter().for_each(|b| sys::ggml_backend_buffer_free(b.as_ptr()));
            sys::ggml_free(self.context.as_ptr());
        }
    }
}
