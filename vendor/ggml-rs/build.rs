//! Builds ggml and its bindings.
//!
//! The sources come with a crate that is only locked, not compiled (see Cargo.toml), or from the folder
//! that `QKOV_GGML_SRC` names. `QKOV_GGML_PORTABLE=1`: code for any processor of the target, not this
//! one's. `QKOV_GGML_LIB`: a folder with shared libraries of the same ggml, which are linked instead of
//! what is compiled here. `QKOV_GGML_CHECK=1`: bindings only, enough for `cargo check` for a target that nothing here
//! can compile C for.

use std::env;
use std::fs;
use std::panic;
use std::path::{Path, PathBuf};
use std::process::{self, Command};

/// What to install where something is missing.
const INSTALL: &str = "install it with: \
    apt install g++ cmake libclang-dev (Debian), \
    dnf install gcc-c++ cmake clang-devel (Fedora), \
    xcode-select --install; brew install cmake (macOS)";

type Result<T> = std::result::Result<T, String>;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=wrapper.h");
    for key in ["QKOV_GGML_SRC", "QKOV_GGML_PORTABLE", "QKOV_GGML_LIB", "QKOV_GGML_CHECK"] {
        println!("cargo::rerun-if-env-changed={key}");
    }
    if let Err(e) = build() {
        println!("cargo::error={e}");
    }
}

fn build() -> Result<()> {
    let source = source()?;
    let out = PathBuf::from(var("OUT_DIR")?);
    let is_checked_only = env::var_os("QKOV_GGML_CHECK").is_some();
    let system = is_checked_only.then(|| var("HOST")).transpose()?;
    bindings(&source.join("include"), &out, system)?;
    if let Ok(lib) = env::var("QKOV_GGML_LIB") {
        println!("cargo::rustc-link-search=native={lib}");
        for name in ["ggml", "ggml-cpu", "ggml-base"] {
            println!("cargo::rustc-link-lib=dylib={name}");
        }
    } else if !is_checked_only {
        let lib = compile(&source, &out)?;
        link(&lib)?;
    }
    Ok(())
}

fn var(key: &str) -> Result<String> {
    env::var(key).map_err(|e| format!("{key}: {e}"))
}

/// Whether this crate is built with a feature.
fn has(feature: &str) -> bool {
    env::var_os(format!("CARGO_FEATURE_{}", feature.to_uppercase())).is_some()
}

/// The folder with ggml's sources.
fn source() -> Result<PathBuf> {
    if let Some(path) = env::var_os("QKOV_GGML_SRC") {
        return Ok(path.into());
    }
    let metadata = Command::new(var("CARGO")?)
        .args(["metadata", "--format-version=1", "--locked"])
        .current_dir(var("CARGO_MANIFEST_DIR")?)
        .output()
        .map_err(|e| format!("cargo metadata: {e}"))?;
    if !metadata.status.success() {
        let e = String::from_utf8_lossy(&metadata.stderr);
        return Err(format!("cargo metadata: {}", e.trim().replace('\n', "; ")));
    }
    let metadata: serde_json::Value =
        serde_json::from_slice(&metadata.stdout).map_err(|e| format!("cargo metadata: {e}"))?;
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let carrier = packages.into_iter().find(|p| p["name"] == "llama-cpp-sys-2");
    let manifest = carrier.and_then(|p| p["manifest_path"].as_str()).map(Path::new);
    let folder = manifest.and_then(Path::parent).ok_or("ggml's sources are not in Cargo.lock")?;
    Ok(folder.join("llama.cpp/ggml"))
}

/// Compiles ggml; the folder with the libraries.
fn compile(source: &Path, out: &Path) -> Result<PathBuf> {
    for (tool, what) in [("cmake", "CMake"), (&cxx(), "a C++ compiler")] {
        let found = Command::new(tool).arg("--version").output().is_ok_and(|o| o.status.success());
        if !found {
            return Err(format!(
                "the feature ggml needs {what}, and \"{tool}\" is not here; {INSTALL}"
            ));
        }
    }
    // The sources are no project of their own: a file is missing that only such a project needs.
    let project = out.join("project");
    let text = "cmake_minimum_required(VERSION 3.14)\nproject(qkov_ggml C CXX)\n\
                add_subdirectory(\"${GGML_SOURCE}\" ggml)\n";
    fs::create_dir_all(&project).map_err(|e| format!("{}: {e}", project.display()))?;
    fs::write(project.join("CMakeLists.txt"), text).map_err(|e| e.to_string())?;

    let on = |yes: bool| if yes { "ON" } else { "OFF" };
    let is_native = var("HOST")? == var("TARGET")? && env::var_os("QKOV_GGML_PORTABLE").is_none();
    let mut config = cmake::Config::new(&project);
    config.profile("Release").define("GGML_SOURCE", source).define("CMAKE_INSTALL_LIBDIR", "lib");
    for (key, yes) in [
        ("BUILD_SHARED_LIBS", false),
        ("GGML_BLAS", false),
        ("GGML_CCACHE", false),
        ("GGML_CUDA", has("cuda")),
        ("GGML_CUDA_NCCL", false),
        ("GGML_LLAMAFILE", true),
        ("GGML_METAL", has("metal")),
        ("GGML_METAL_EMBED_LIBRARY", has("metal")),
        ("GGML_NATIVE", is_native),
        ("GGML_OPENMP", false),
        ("GGML_RPC", has("rpc")),
        ("GGML_VULKAN", has("vulkan")),
    ] {
        config.define(key, on(yes));
    }
    let built = panic::catch_unwind(panic::AssertUnwindSafe(|| config.build()));
    let Ok(built) = built else {
        println!("cargo::error=ggml could not be compiled; what CMake said follows");
        // Cargo shows it only then.
        process::exit(1);
    };
    Ok(built.join("lib"))
}

/// The C++ compiler that CMake takes.
fn cxx() -> String {
    env::var("CXX").unwrap_or_else(|_| "c++".into())
}

/// Says what to link. Each library comes before those that it needs.
fn link(lib: &Path) -> Result<()> {
    println!("cargo::rustc-link-search=native={}", lib.display());
    let devices = ["cuda", "metal", "rpc", "vulkan"].into_iter().filter(|name| has(name));
    println!("cargo::rustc-link-lib=static=ggml");
    for name in ["cpu"].into_iter().chain(devices).chain(["base"]) {
        println!("cargo::rustc-link-lib=static=ggml-{name}");
    }
    if has("cuda") {
        let root = env::var("CUDA_PATH").unwrap_or_else(|_| "/usr/local/cuda".into());
        println!("cargo::rerun-if-env-changed=CUDA_PATH");
        println!("cargo::rustc-link-search=native={root}/lib64");
        println!("cargo::rustc-link-search=native={root}/lib64/stubs");
        for name in ["cudart_static", "culibos"] {
            println!("cargo::rustc-link-lib=static={name}");
        }
        for name in ["cublas", "cuda", "dl", "rt", "pthread"] {
            println!("cargo::rustc-link-lib={name}");
        }
    }
    if has("vulkan") {
        println!("cargo::rustc-link-lib=vulkan");
    }
    let os = var("CARGO_CFG_TARGET_OS")?;
    match os.as_str() {
        "macos" => {
            let metal: &[&str] = if has("metal") { &["Metal", "MetalKit"] } else { &[] };
            for name in ["Accelerate", "Foundation"].iter().chain(metal) {
                println!("cargo::rustc-link-lib=framework={name}");
            }
            println!("cargo::rustc-link-lib=c++");
        }
        "windows" => println!("cargo::rustc-link-lib=advapi32"),
        _ => {
            println!("cargo::rustc-link-lib=stdc++");
            println!("cargo::rustc-link-lib=m");
        }
    }
    Ok(())
}

/// Writes bindings of everything that headers name. `system`: whose headers of C are read, if that is
/// not the target, for which there may be none here.
fn bindings(include: &Path, out: &Path, system: Option<String>) -> Result<()> {
    let make = || {
        let mut builder = bindgen::Builder::default()
            .header("wrapper.h")
            .clang_arg(format!("-I{}", include.display()))
            .allowlist_item("(ggml|GGML|RPC_PROTO)_.*")
            .opaque_type("_IO_FILE|FILE|ggml_cgraph|ggml_gallocr|ggml_backend_graph_copy")
            .blocklist_item("GGML_RESTRICT")
            .generate_comments(false)
            .layout_tests(false)
            .merge_extern_blocks(true)
            .prepend_enum_name(false);
        if has("rpc") {
            builder = builder.clang_arg("-DQKOV_RPC");
        }
        if let Some(system) = &system {
            builder = builder.clang_arg(format!("--target={system}"));
        }
        // A libclang alone has no headers of its own; a compiler that is here has them.
        for compiler in ["clang", "gcc"] {
            let found = Command::new(compiler).arg("-print-file-name=include").output();
            if let Ok(output) = found {
                let folder = String::from_utf8_lossy(&output.stdout);
                builder = builder.clang_arg(format!("-idirafter{}", folder.trim()));
            }
        }
        builder.generate().map_err(|e| format!("bindings of ggml: {e}"))
    };
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let made = panic::catch_unwind(make);
    panic::set_hook(hook);
    let made = made.map_err(|_| format!("the feature ggml needs libclang; {INSTALL}"))??;
    made.write_to_file(out.join("bindings.rs")).map_err(|e| format!("bindings of ggml: {e}"))
}
