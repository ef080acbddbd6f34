//! Faults of processes and files: kills, full disks, files that change, signals, limits.

#![cfg(unix)]

mod cuts;
mod disks;
mod ends;
mod kills;
mod limits;
mod locks;
mod writes;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::tiny::Tiny;

/// Longest that anything here may take, on a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(60);

/// A folder with a model and a text.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Place {
        let folder = tempfile::tempdir().unwrap();
        Tiny::llama().writer().write(&folder.path().join("model.gguf")).unwrap();
        let text = "The sea was calm, and nobody spoke of the storm. ".repeat(12);
        std::fs::write(folder.path().join("text"), text).unwrap();
        Place { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The program in this folder, with `MODEL` and `TEXT` in its arguments replaced.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qkov"));
        command.current_dir(self.folder.path()).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// The same under a shell that first does something, such as setting a limit.
    fn shell(&self, first: &str, args: &[&str]) -> Output {
        let mut command = Command::new("sh");
        command.current_dir(self.folder.path()).args(["-c", &format!("{first}; exec \"$@\"")]);
        command.arg("sh").arg(env!("CARGO_BIN_EXE_qkov")).args(args).stdin(Stdio::null());
        command.output().unwrap()
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.command(args).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Files that only writers and locks leave.
    fn strays(&self) -> Vec<String> {
        names(self.folder.path()).into_iter().filter(|n| is_stray(n)).collect()
    }
}

fn is_stray(name: &str) -> bool {
    name.starts_with('.') && (name.ends_with(".tmp") || name.ends_with(".lock"))
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    // What is there one moment may be gone the next.
    entries.flatten().map(|e| e.file_name().into_string().unwrap()).collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The one line of a failure with this exit code.
fn line_of(output: &Output, code: i32) -> String {
    let line = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{:?}: {line}", output.status);
    let errors = line.lines().filter(|line| line.starts_with("error: ")).count();
    assert!(errors == 1 && !line.contains("panicked"), "{line}");
    line
}

/// Waits for something to become true, or for the child to end: whether it did.
fn until(child: &mut Child, is_true: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if is_true() {
            return true;
        }
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        assert!(start.elapsed() < PATIENCE, "it neither came nor ended");
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Waits for the first bytes on stdout.
fn begun(child: &mut Child) {
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 4]).unwrap();
}

fn signal(child: &Child, name: &str) {
    let kill = Command::new("kill").args([name, &child.id().to_string()]).status();
    assert!(kill.unwrap().success());
}

/// Numbers that are the same in every run.
struct Random(u64);

impl Random {
    /// From 0 to 1.
    fn next(&mut self) -> f64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f64 / (1u64 << 24) as f64
    }
}
