//! Every kind of file that the program writes.

use std::io::Write;
use std::process::{Child, Stdio};

use super::Place;

/// A command that writes a file.
pub struct Kind {
    pub name: &'static str,
    /// The file.
    pub out: &'static str,
    /// What makes the file that is there before.
    pub first: &'static [&'static str],
    /// What replaces it.
    pub then: &'static [&'static str],
    /// What it reads.
    pub stdin: &'static str,
}

const fn write(
    name: &'static str,
    out: &'static str,
    first: &'static [&'static str],
    then: &'static [&'static str],
) -> Kind {
    Kind { name, out, first, then, stdin: "" }
}

macro_rules! args {
    ($command:literal $(, $arg:literal)*) => {
        &[$command, "-m", "model.gguf", "-t", "1", "--no-pin" $(, $arg)*]
    };
}

/// A comparison that takes little time.
macro_rules! compare {
    ($($arg:literal),*) => {
        args!(
            "compare", "-f", "text", "-c", "16", "-n", "4", "--windows", "2", "--trials", "0", "--rounds",
            "0", "--no-yardsticks" $(, $arg)*
        )
    };
}

/// All of them.
pub static WRITES: &[Kind] = &[
    write(
        "session of generate",
        "s.session",
        args!("generate", "-p", "The sea", "-n", "8", "--session", "s.session"),
        args!("generate", "-p", "The storm", "-n", "30", "--seed", "1", "--session", "s.session"),
    ),
    write(
        "session of chat",
        "c.session",
        args!(
            "chat",
            "--template",
            "template",
            "-p",
            "Hi",
            "-n",
            "3",
            "--seed",
            "1",
            "--session",
            "c.session"
        ),
        args!(
            "chat",
            "--template",
            "template",
            "-p",
            "So",
            "-n",
            "5",
            "--seed",
            "1",
            "--session",
            "c.session"
        ),
    ),
    Kind {
        name: "saved conversation",
        out: "talk.json",
        first: args!("chat", "--template", "template", "-n", "3", "--seed", "1"),
        then: args!("chat", "--template", "template", "-n", "9", "--seed", "1"),
        stdin: "Hi\n/save talk.json\n",
    },
    write(
        "base of log-probabilities",
        "base.kld",
        args!("eval", "-f", "text", "-c", "16", "--save-base", "base.kld"),
        args!("eval", "-f", "text", "-c", "32", "--save-base", "base.kld"),
    ),
    write(
        "patterns, npz",
        "p.npz",
        args!("patterns", "-p", "The sea", "-o", "p.npz"),
        args!("patterns", "-p", "The storm, and the sea after it", "-o", "p.npz"),
    ),
    write(
        "patterns, safetensors",
        "p.safetensors",
        args!("patterns", "-p", "The sea", "-o", "p.safetensors"),
        args!("patterns", "-p", "The storm, and the sea after it", "-o", "p.safetensors"),
    ),
    write(
        "products of a head",
        "head.npz",
        &["inspect", "-m", "model.gguf", "--dense", "0.0", "-o", "head.npz"],
        &["inspect", "-m", "model.gguf", "--dense", "1.1", "-o", "head.npz"],
    ),
    write(
        "page of heads",
        "heads.html",
        &["inspect", "-m", "model.gguf", "--heads", "--layer", "0", "--html", "heads.html"],
        &["inspect", "-m", "model.gguf", "--heads", "--html", "heads.html"],
    ),
    write(
        "plan",
        "plan.toml",
        args!(
            "calibrate",
            "-f",
            "text",
            "--norm",
            "relu",
            "-c",
            "16",
            "--rows",
            "16",
            "-o",
            "plan.toml"
        ),
        args!(
            "calibrate",
            "-f",
            "text",
            "--norm",
            "sigmoid",
            "-c",
            "16",
            "--rows",
            "16",
            "-o",
            "plan.toml"
        ),
    ),
    write(
        "comparison",
        "c.json",
        compare!("--norm", "relu", "-o", "c.json"),
        compare!("--norm", "relu", "--norm", "sigmoid", "-o", "c.json"),
    ),
    write(
        "page of a comparison",
        "c.html",
        compare!("--norm", "relu", "--html", "c.html"),
        compare!("--norm", "sigmoid", "--html", "c.html"),
    ),
    write(
        "model in another form",
        "m.gguf",
        args!("merge", "--form", "lowrank:qk=2", "--form-text", "text", "--force", "-o", "m.gguf"),
        args!("merge", "--form", "lowrank:ov=2", "--form-text", "text", "--force", "-o", "m.gguf"),
    ),
    write(
        "what heads make of a text",
        "kept.grams",
        args!(
            "generate",
            "-p",
            "A",
            "-n",
            "1",
            "--form",
            "lowrank:qk=2",
            "--form-text",
            "text",
            "--form-tokens",
            "200",
            "--form-grams",
            "kept.grams"
        ),
        args!(
            "generate",
            "-p",
            "A",
            "-n",
            "1",
            "--form",
            "lowrank:qk=2",
            "--form-text",
            "text",
            "--form-tokens",
            "300",
            "--form-grams",
            "kept.grams"
        ),
    ),
    write(
        "importance of columns",
        "i.gguf",
        args!("imatrix", "-f", "text", "-c", "16", "--chunks", "1", "--force", "-o", "i.gguf"),
        args!("imatrix", "-f", "text", "-c", "16", "--force", "-o", "i.gguf"),
    ),
    #[cfg(feature = "ggml")]
    write(
        "model of fewer bits",
        "q.gguf",
        &["quantize", "-m", "model.gguf", "--type", "Q8_0", "--force", "-o", "q.gguf"],
        &["quantize", "-m", "model.gguf", "--type", "F16", "--force", "-o", "q.gguf"],
    ),
    write("manual page", "man/qkov-chat.1", &["man"], &["man", "-o", "man"]),
];

impl Kind {
    /// A folder in which the file has been written: its bytes, and those that replace them.
    pub fn prepare(&self) -> (Place, Vec<u8>, Vec<u8>) {
        let place = Place::new();
        std::fs::write(
            place.path("template"),
            "{% for m in messages %}{{ m.content }}|{% endfor %}",
        )
        .unwrap();
        if self.out.starts_with("man/") {
            std::fs::create_dir(place.path("man")).unwrap();
            std::fs::write(place.path(self.out), "old").unwrap();
        } else {
            self.run(&place, self.first);
        }
        let old = std::fs::read(place.path(self.out)).unwrap();
        self.run(&place, self.then);
        let new = std::fs::read(place.path(self.out)).unwrap();
        assert!(old != new && !old.is_empty() && !new.is_empty(), "{}", self.name);
        std::fs::write(place.path(self.out), &old).unwrap();
        (place, old, new)
    }

    pub fn start(&self, place: &Place, args: &[&str]) -> Child {
        let mut child = place.command(args).stdin(Stdio::piped()).spawn().unwrap();
        // One that has been killed reads nothing.
        let _ = child.stdin.take().unwrap().write_all(self.stdin.as_bytes());
        child
    }

    pub fn run(&self, place: &Place, args: &[&str]) {
        let output = self.start(place, args).wait_with_output().unwrap();
        let stderr = super::text(&output.stderr);
        assert!(output.status.success() && !stderr.contains("error"), "{}: {stderr}", self.name);
    }
}
