//! Graphs: what is computed of what. Operations are in `ops.rs`.

use std::ffi::{c_int, c_void};
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::store::context;
use crate::{Device, Result, Shape, Store, Type, sys};

/// A tensor of a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor {
    graph: u32,
    index: u32,
}

/// What is done with rows: the row's number, and its elements.
pub(crate) type RowTask = Box<dyn Fn(usize, &mut [f32]) + Send + Sync>;

/// A graph and the tensors in it.
pub struct Graph {
    id: u32,
    pub(crate) context: NonNull<sys::ggml_context>,
    pub(crate) raw: NonNull<sys::ggml_cgraph>,
    tensors: Vec<NonNull<sys::ggml_tensor>>,
    /// Stores whose tensors are used.
    stores: Vec<Arc<Store>>,
    /// What the processor does with rows; in boxes of their own, since nodes point at them.
    #[allow(clippy::vec_box)]
    tasks: Vec<Box<RowTask>>,
}

// SAFETY: used by one thread at a time, any of them; what it points at is its own or in stores.
unsafe impl Send for Graph {}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Graph of {} nodes", self.n_nodes())
    }
}

impl Graph {
    /// An empty graph with room for `n` tensors.
    pub fn new(n: usize) -> Result<Graph> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // SAFETY: constants, and a graph in a context with room for it.
        unsafe {
            let context = context(n, sys::ggml_graph_overhead_custom(n, false))?;
            let raw =
                NonNull::new_unchecked(sys::ggml_new_graph_custom(context.as_ptr(), n, false));
            let id = NEXT.fetch_add(1, Ordering::Relaxed);
            let (tensors, stores, tasks) = (Vec::new(), Vec::new(), Vec::new());
            Ok(Graph { id, context, raw, tensors, stores, tasks })
        }
    }

    /// Number of operations.
    pub fn n_nodes(&self) -> usize {
        // SAFETY: the graph lives as long as this.
        unsafe { sys::ggml_graph_n_nodes(self.raw.as_ptr()) as usize }
    }

    pub(crate) fn at(&self, tensor: Tensor) -> *mut sys::ggml_tensor {
        assert_eq!(tensor.graph, self.id, "a tensor of another graph");
        self.tensors[tensor.index as usize].as_ptr()
    }

    /// A handle for what an operation gave.
    pub(crate) fn put(&mut self, raw: *mut sys::ggml_tensor) -> Tensor {
        assert!(!raw.is_null(), "ggml gave no tensor");
        let index = self.tensors.len() as u32;
        self.tensors.extend(NonNull::new(raw));
        Tensor { graph: self.id, index }
    }

    /// A tensor that is filled before the graph runs.
    pub fn input(&mut self, shape: Shape) -> Tensor {
        let [a, b, c, d] = shape.dims.map(|n| n as i64);
        // SAFETY: ggml ends the program where the context is full.
        let raw = unsafe {
            let raw = sys::ggml_new_tensor_4d(self.context.as_ptr(), shape.ty.0, a, b, c, d);
            sys::ggml_set_input(raw);
            raw
        };
        self.put(raw)
    }

    /// A tensor of a store.
    pub fn stored(&mut self, store: &Arc<Store>, i: usize) -> Tensor {
        if !self.stores.iter().any(|known| Arc::ptr_eq(known, store)) {
            self.stores.push(store.clone());
        }
        self.put(store.raw(i).as_ptr())
    }

    /// Computes a tensor, and everything that it is made of, after what was asked for before.
    pub fn compute(&mut self, tensor: Tensor) {
        let raw = self.at(tensor);
        // SAFETY: a tensor of this graph.
        unsafe { sys::ggml_build_forward_expand(self.raw.as_ptr(), raw) };
    }

    /// The same, and keeps it for reading.
    pub fn output(&mut self, tensor: Tensor) {
        // SAFETY: a tensor of this graph.
        unsafe { sys::ggml_set_output(self.at(tensor)) };
        self.compute(tensor);
    }

    /// Type and sizes of a tensor.
    pub fn shape(&self, tensor: Tensor) -> Shape {
        // SAFETY: a tensor of this graph.
        let raw = unsafe { &*self.at(tensor) };
        Shape { ty: Type(raw.type_), dims: raw.ne.map(|n| n as usize) }
    }

    /// Bytes from one element to the next along each dimension.
    pub fn strides(&self, tensor: Tensor) -> [usize; 4] {
        // SAFETY: a tensor of this graph.
        unsafe { (*self.at(tensor)).nb }
    }

    /// A copy of a tensor of floats, on whose rows the processor works.
    pub fn rows(
        &mut self,
        a: Tensor,
        task: impl Fn(usize, &mut [f32]) + Send + Sync + 'static,
    ) -> Tensor {
        /// `task` points at a [`RowTask`] that the graph holds.
        unsafe extern "C" fn run(
            out: *mut sys::ggml_tensor,
            thread: c_int,
            n_threads: c_int,
            task: *mut c_void,
        ) {
            // SAFETY: both tensors are contiguous floats of one shape (asserted below), and have
            // memory when they are computed; each row belongs to one thread.
            unsafe {
                let (task, from) = (&*task.cast::<RowTask>(), (*out).src[0]);
                let [width, rest @ ..] = (*out).ne.map(|n| n as usize);
                let n_rows: usize = rest.iter().product();
                for row in (thread as usize..n_rows).step_by(n_threads as usize) {
                    let to = (*out).data.cast::<f32>().add(row * width);
                    let from = (*from).data.cast::<f32>().add(row * width);
                    to.copy_from_nonoverlapping(from, width);
                    task(row, std::slice::from_raw_parts_mut(to, width));
                }
            }
        }
        let raw = self.at(a);
        let [n0, n1, n2, n3] = self.shape(a).dims.map(|n| n as i64);
        let task: Box<RowTask> = Box::new(Box::new(task));
        let at = (&raw const *task).cast_mut().cast::<c_void>();
        self.tasks.push(task);
        // SAFETY: the task lives as long as the graph.
        let out = unsafe {
            assert!(
                (*raw).type_ == sys::GGML_TYPE_F32 && sys::ggml_is_contiguous(raw),
                "rows of floats"
            );
            let (ty, all) = (sys::GGML_TYPE_F32, sys::GGML_N_TASKS_MAX);
            let mut args = [raw];
            let args = args.as_mut_ptr();
            sys::ggml_custom_4d(
                self.context.as_ptr(),
                ty,
                n0,
                n1,
                n2,
                n3,
                args,
                1,
                Some(run),
                all,
                at,
            )
        };
        self.put(out)
    }

    /// Whether a device can compute a tensor.
    pub fn runs_on(&self, tensor: Tensor, device: Device) -> bool {
        // SAFETY: a tensor of this graph; devices stay.
        unsafe { sys::ggml_backend_dev_supports_op(device.0.as_ptr(), self.at(tensor)) }
    }

    /// Whether a tensor has memory of its own, or of what it is a view of.
    pub(crate) fn has_memory(&self, tensor: Tensor) -> bool {
        // SAFETY: a tensor of this graph.
        unsafe { !(*self.at(tensor)).buffer.is_null() }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: a scheduler drops its graph after its own use of it.
        unsafe { sys::ggml_free(self.context.as_ptr()) };
    }
}
