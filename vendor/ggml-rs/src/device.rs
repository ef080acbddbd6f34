//! Devices: what there is, and what runs graphs on it.

use std::ffi::{CString, c_int, c_void};
use std::ptr::NonNull;

use crate::{Error, Graph, Result, Shape, Type, sys, text};

/// Something that computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device(pub(crate) NonNull<sys::ggml_backend_device>);

// SAFETY: a device is an entry of a table that stays; its functions may be called from any thread.
unsafe impl Send for Device {}
unsafe impl Sync for Device {}

/// What kind of thing a device is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The processor.
    Cpu,
    /// A processor for graphics, with memory of its own.
    Gpu,
    /// One that shares the memory.
    IntegratedGpu,
    /// What helps the processor.
    Accelerator,
}

/// All devices.
pub fn devices() -> Vec<Device> {
    // SAFETY: indices are within the count.
    let all = unsafe { (0..sys::ggml_backend_dev_count()).map(|i| sys::ggml_backend_dev_get(i)) };
    all.filter_map(NonNull::new).map(Device).collect()
}

impl Device {
    /// The processor.
    pub fn cpu() -> Result<Device> {
        let cpu = devices().into_iter().find(|d| d.kind() == Kind::Cpu);
        cpu.ok_or_else(|| Error("ggml was built without the CPU".into()))
    }

    /// Its name: `CPU`, `CUDA0`.
    pub fn name(self) -> String {
        // SAFETY: devices stay.
        text(unsafe { sys::ggml_backend_dev_name(self.0.as_ptr()) })
    }

    /// What it is.
    pub fn description(self) -> String {
        // SAFETY: devices stay.
        text(unsafe { sys::ggml_backend_dev_description(self.0.as_ptr()) })
    }

    /// Bytes of memory: free, and in all.
    pub fn memory(self) -> (usize, usize) {
        let (mut free, mut total) = (0, 0);
        // SAFETY: devices stay.
        unsafe { sys::ggml_backend_dev_memory(self.0.as_ptr(), &mut free, &mut total) };
        (free, total)
    }

    /// What kind of thing it is.
    pub fn kind(self) -> Kind {
        // SAFETY: devices stay.
        match unsafe { sys::ggml_backend_dev_type(self.0.as_ptr()) } {
            sys::GGML_BACKEND_DEVICE_TYPE_CPU => Kind::Cpu,
            sys::GGML_BACKEND_DEVICE_TYPE_GPU => Kind::Gpu,
            sys::GGML_BACKEND_DEVICE_TYPE_IGPU => Kind::IntegratedGpu,
            _ => Kind::Accelerator,
        }
    }

    /// Whether it is a worker's.
    pub fn is_remote(self) -> bool {
        // SAFETY: devices and registries stay.
        let name = unsafe {
            let reg = sys::ggml_backend_dev_backend_reg(self.0.as_ptr());
            text(sys::ggml_backend_reg_name(reg))
        };
        name == "RPC"
    }

    /// Memory of this device.
    pub fn buffer_type(self) -> Result<BufferType> {
        // SAFETY: devices stay.
        let ty = unsafe { sys::ggml_backend_dev_buffer_type(self.0.as_ptr()) };
        NonNull::new(ty).map(BufferType).ok_or_else(|| Error(format!("{}: no memory", self.name())))
    }

    /// Memory in which the device arranges weights so that products are faster.
    pub fn arranged(self) -> Vec<BufferType> {
        // SAFETY: the function behind this name has this type, and its list ends with null.
        unsafe {
            let reg = sys::ggml_backend_dev_backend_reg(self.0.as_ptr());
            let name = c"ggml_backend_dev_get_extra_bufts";
            let found = sys::ggml_backend_reg_get_proc_address(reg, name.as_ptr());
            if found.is_null() {
                return Vec::new();
            }
            let list =
                std::mem::transmute::<*mut c_void, sys::ggml_backend_dev_get_extra_bufts_t>(found);
            let mut next = list.map_or(std::ptr::null_mut(), |list| list(self.0.as_ptr()));
            let mut all = Vec::new();
            while !next.is_null() && !(*next).is_null() {
                all.extend(NonNull::new(*next).map(BufferType));
                next = next.add(1);
            }
            all
        }
    }
}

/// A kind of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BufferType(pub(crate) NonNull<sys::ggml_backend_buffer_type>);

// SAFETY: as devices.
unsafe impl Send for BufferType {}
unsafe impl Sync for BufferType {}

impl BufferType {
    /// Its name.
    pub fn name(self) -> String {
        // SAFETY: types of memory stay.
        text(unsafe { sys::ggml_backend_buft_name(self.0.as_ptr()) })
    }

    /// Whether a device multiplies matrices of this shape in this memory; with `n_used`, as many of
    /// several for each token.
    pub fn multiplies(self, device: Device, shape: Shape, n_used: Option<usize>) -> Result<bool> {
        let mut graph = Graph::new(8)?;
        let [n_in, ..] = shape.dims;
        let weight = graph.input(shape);
        let input = |dims| Shape { ty: Type::F32, dims };
        let product = match n_used {
            None => {
                let x = graph.input(input([n_in, 512, 1, 1]));
                graph.mul_mat(weight, x)
            }
            Some(n) => {
                let x = graph.input(input([n_in, n, 512, 1]));
                let ids = graph.input(Shape { ty: Type::I32, dims: [n, 512, 1, 1] });
                graph.mul_mat_id(weight, x, ids)
            }
        };
        // SAFETY: the weight is in an empty buffer of this memory while the device is asked.
        unsafe {
            let raw = graph.at(weight);
            let buffer = sys::ggml_backend_buft_alloc_buffer(self.0.as_ptr(), 0);
            (*raw).buffer = buffer;
            let yes = graph.runs_on(product, device);
            (*raw).buffer = std::ptr::null_mut();
            sys::ggml_backend_buffer_free(buffer);
            Ok(yes)
        }
    }
}

/// What runs graphs on a device.
#[derive(Debug)]
pub struct Backend {
    pub(crate) raw: NonNull<sys::ggml_backend>,
    device: Device,
    threads: Option<Threads>,
}

// SAFETY: used by one thread at a time, any of them.
unsafe impl Send for Backend {}

/// A pool of threads of the processor.
#[derive(Debug)]
struct Threads(NonNull<sys::ggml_threadpool>);

impl Drop for Threads {
    fn drop(&mut self) {
        // SAFETY: made by `ggml_threadpool_new`; the backend that used it is gone or has another.
        unsafe { sys::ggml_threadpool_free(self.0.as_ptr()) };
    }
}

impl Backend {
    /// Starts a device.
    pub fn new(device: Device) -> Result<Backend> {
        let none = CString::default();
        // SAFETY: devices stay; parameters are an empty string.
        let raw = unsafe { sys::ggml_backend_dev_init(device.0.as_ptr(), none.as_ptr()) };
        match NonNull::new(raw) {
            Some(raw) => Ok(Backend { raw, device, threads: None }),
            None => Err(Error(format!("{} cannot be started", device.name()))),
        }
    }

    /// Its device.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Starts threads, each on a core of its own if those are given; only the processor's backend has
    /// threads.
    pub fn start_threads(&mut self, n: usize, cores: &[usize]) -> Result<()> {
        if self.device.kind() != Kind::Cpu {
            return Ok(());
        }
        // SAFETY: parameters come from ggml; the old pool is freed when the backend has the new one.
        unsafe {
            let mut params = sys::ggml_threadpool_params_default(n as c_int);
            for core in cores.iter().take(n) {
                if let Some(is_in) = params.cpumask.get_mut(*core) {
                    *is_in = true;
                }
            }
            params.strict_cpu = !cores.is_empty();
            let pool = NonNull::new(sys::ggml_threadpool_new(&mut params));
            let pool =
                Threads(pool.ok_or_else(|| Error(format!("{n} threads cannot be started")))?);
            sys::ggml_backend_cpu_set_n_threads(self.raw.as_ptr(), n as c_int);
            sys::ggml_backend_cpu_set_threadpool(self.raw.as_ptr(), pool.0.as_ptr());
            self.threads = Some(pool);
        }
        Ok(())
    }

    /// Computes with some of the threads that were started.
    pub fn use_threads(&mut self, n: usize) {
        if self.device.kind() == Kind::Cpu {
            // SAFETY: the processor's backend.
            unsafe { sys::ggml_backend_cpu_set_n_threads(self.raw.as_ptr(), n as c_int) };
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        // SAFETY: made by `ggml_backend_dev_init`, and used by nothing else.
        unsafe { sys::ggml_backend_free(self.raw.as_ptr()) };
    }
}
