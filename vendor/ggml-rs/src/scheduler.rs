//! Schedulers: run graphs on several devices.

use std::ffi::c_void;
use std::fmt;
use std::ptr::{NonNull, null_mut};

use crate::{Backend, Device, Error, Graph, Result, Tensor, sys};

/// Runs one graph after the other on devices, each part where its weights are, or where it can run.
pub struct Scheduler {
    raw: NonNull<sys::ggml_backend_sched>,
    /// The one that runs, or could: dropped before the backends.
    graph: Option<Graph>,
    backends: Vec<Backend>,
}

// SAFETY: used by one thread at a time, any of them.
unsafe impl Send for Scheduler {}

impl fmt::Debug for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Scheduler of {} backends", self.backends.len())
    }
}

impl Scheduler {
    /// Runs graphs of up to `n` tensors on these, the first preferred; the last is the processor's.
    pub fn new(backends: Vec<Backend>, n: usize) -> Result<Scheduler> {
        let mut raw: Vec<_> = backends.iter().map(|b| b.raw.as_ptr()).collect();
        let len = raw.len() as i32;
        // SAFETY: backends live as long as the scheduler.
        let raw = unsafe {
            sys::ggml_backend_sched_new(raw.as_mut_ptr(), null_mut(), len, n, false, false)
        };
        let raw = NonNull::new(raw).ok_or_else(|| Error("no scheduler".into()))?;
        Ok(Scheduler { raw, graph: None, backends })
    }

    /// The backends.
    pub fn backends_mut(&mut self) -> &mut [Backend] {
        &mut self.backends
    }

    /// Gives memory to a graph's tensors, and drops the last graph.
    pub fn load(&mut self, graph: Graph) -> Result<()> {
        self.unload();
        // SAFETY: nothing uses the last graph any more.
        let is_loaded =
            unsafe { sys::ggml_backend_sched_alloc_graph(self.raw.as_ptr(), graph.raw.as_ptr()) };
        if !is_loaded {
            self.unload();
            return Err(Error("no memory for what is computed".into()));
        }
        self.graph = Some(graph);
        Ok(())
    }

    /// Drops the graph.
    pub fn unload(&mut self) {
        // SAFETY: the graph's tensors are not used afterwards.
        unsafe { sys::ggml_backend_sched_reset(self.raw.as_ptr()) };
        self.graph = None;
    }

    fn loaded(&self) -> Result<&Graph> {
        self.graph.as_ref().ok_or_else(|| Error("no graph is loaded".into()))
    }

    /// Fills an input of the graph; nothing happens where nothing uses it.
    pub fn set(&mut self, tensor: Tensor, bytes: &[u8]) -> Result<()> {
        let graph = self.loaded()?;
        if graph.has_memory(tensor) {
            let raw = graph.at(tensor);
            // SAFETY: the tensor has memory, and as many bytes.
            unsafe {
                assert_eq!(bytes.len(), sys::ggml_nbytes(raw), "bytes of an input");
                sys::ggml_backend_tensor_set(raw, bytes.as_ptr().cast::<c_void>(), 0, bytes.len());
            }
        }
        Ok(())
    }

    /// Runs the graph.
    pub fn run(&mut self) -> Result<()> {
        let graph = self.loaded()?.raw.as_ptr();
        // SAFETY: the graph is loaded.
        match unsafe { sys::ggml_backend_sched_graph_compute(self.raw.as_ptr(), graph) } {
            sys::GGML_STATUS_SUCCESS => Ok(()),
            sys::GGML_STATUS_ALLOC_FAILED => Err(Error("out of memory".into())),
            status => Err(Error(format!("the graph failed with status {status}"))),
        }
    }

    /// Appends the floats of an output to `out`.
    pub fn get(&self, tensor: Tensor, out: &mut Vec<f32>) -> Result<()> {
        let graph = self.loaded()?;
        let raw = graph.at(tensor);
        let start = out.len();
        // SAFETY: floats that follow each other, in memory, as asserted.
        unsafe {
            let is_float = (*raw).type_ == sys::GGML_TYPE_F32 && sys::ggml_is_contiguous(raw);
            assert!(is_float && graph.has_memory(tensor), "an output of floats");
            let n = sys::ggml_nbytes(raw);
            out.resize(start + n / size_of::<f32>(), 0.0);
            sys::ggml_backend_tensor_get(raw, out[start..].as_mut_ptr().cast::<c_void>(), 0, n);
        }
        Ok(())
    }

    /// Where a tensor of the loaded graph is computed.
    pub fn device_of(&self, tensor: Tensor) -> Option<Device> {
        let raw = self.graph.as_ref()?.at(tensor);
        // SAFETY: a tensor of the loaded graph.
        unsafe {
            let backend = sys::ggml_backend_sched_get_tensor_backend(self.raw.as_ptr(), raw);
            let backend = NonNull::new(backend)?;
            NonNull::new(sys::ggml_backend_get_device(backend.as_ptr())).map(Device)
        }
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        self.unload();
        // SAFETY: the graph is gone, and backends are dropped after this.
        unsafe { sys::ggml_backend_sched_free(self.raw.as_ptr()) };
    }
}
