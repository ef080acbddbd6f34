//! Disks that are full, limits, and places where nothing can be written.

use std::io::Read;
use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use super::writes::{Kind, WRITES};
use super::{Place, line_of, text};

/// Commands that print much, or at all.
const PRINTING: &[&[&str]] = &[
    &["generate", "-m", "model.gguf", "-p", "A", "-n", "60", "--ignore-eos", "--seed", "1"],
    &["tokenize", "-m", "model.gguf", "-f", "text"],
    &["inspect", "-m", "model.gguf", "--tensors"],
    &["inspect", "-m", "model.gguf", "--json"],
    &["eval", "-m", "model.gguf", "-f", "text", "-c", "16"],
    &["eval", "-m", "model.gguf", "-f", "text", "-c", "16", "--json"],
    &["embed", "-m", "model.gguf", "The sea", "The storm"],
    &["norms"],
    &["masks"],
    &["forms"],
    &["completions", "bash"],
    &["man"],
];

/// An error is a line, and the old file stays.
fn fails(kind: &Kind, place: &Place, first: &str, cause: &str) {
    let old = std::fs::read(place.path(kind.out)).unwrap();
    let output = match kind.stdin {
        "" => place.shell(first, kind.then),
        words => {
            std::fs::write(place.path("stdin"), words).unwrap();
            place.shell(&format!("{first}; exec <stdin"), kind.then)
        }
    };
    // A conversation goes on after a command that failed.
    let line = match kind.stdin {
        "" => line_of(&output, 1),
        _ => line_of(&output, 0),
    };
    let file = kind.out.rsplit('/').next().unwrap();
    let folder = kind.out.split('/').next().unwrap();
    assert!(line.contains(file) || line.contains(folder), "{}: {line}", kind.name);
    assert!(line.contains(cause), "{}: {line}", kind.name);
    assert!(std::fs::read(place.path(kind.out)).unwrap() == old, "{}", kind.name);
    assert!(place.strays().is_empty(), "{}: {:?}", kind.name, place.strays());
}

#[test]
fn a_limit_of_file_size_is_an_error() {
    for kind in WRITES {
        let (place, _, new) = kind.prepare();
        // Blocks of 512 bytes, or of 1024. What fits is no failure.
        if new.len() > 1024 {
            fails(kind, &place, "ulimit -f 1", "cannot write: File too large");
        }
    }
}

/// On a disk of its own, where that may be made.
#[test]
fn a_full_disk_is_an_error() {
    let place = Place::new();
    let make = "mount -t tmpfs -o size=16k none disk && echo old > disk/p.npz && head -c 12000 /dev/zero > disk/rest";
    let tail = "echo \" code $?\" >&2; cat disk/p.npz; ls -A disk";
    let script = format!("{make} || exit 99; \"$@\"; {tail}");
    std::fs::create_dir(place.path("disk")).unwrap();
    let mut command = Command::new("unshare");
    command.current_dir(place.folder.path()).args(["-m", "sh", "-c", &script, "sh"]);
    command.arg(env!("CARGO_BIN_EXE_qkov"));
    command.args([
        "patterns",
        "-m",
        "model.gguf",
        "-p",
        "The storm, and the sea",
        "-o",
        "disk/p.npz",
    ]);
    let output = command.output().ok().filter(|output| output.status.code() != Some(99));
    let Some(output) = output.filter(|o| !text(&o.stderr).contains("unshare")) else {
        eprintln!("skipped: no disk can be mounted here");
        return;
    };
    let said = text(&output.stderr);
    assert!(said.contains("error: disk/p.npz: cannot write: No space left on device"), "{said}");
    assert!(said.contains(" code 1"), "{said}");
    assert_eq!(text(&output.stdout), "old\np.npz\nrest\n");
}

#[test]
fn what_cannot_be_written_to_is_one_line() {
    let place = Place::new();
    std::fs::create_dir(place.path("folder")).unwrap();
    let targets = [
        ("none/p.npz", "No such file or directory"),
        ("folder/x.npz/p.npz", "No such file or directory"),
        ("text/p.npz", "Not a directory"),
        ("/proc/p.npz", "No such file or directory"),
        ("/sys/p.npz", "cannot write: "),
    ];
    let patterns = ["patterns", "-m", "model.gguf", "-p", "The sea", "-o"];
    for (target, cause) in targets {
        let output = place.command(&[&patterns[..], &[target]].concat()).output().unwrap();
        let line = line_of(&output, 1);
        assert!(line.contains(target) && line.contains(cause), "{line}");
    }
    std::fs::create_dir(place.path("folder.npz")).unwrap();
    let output = place.command(&[&patterns[..], &["folder.npz"]].concat()).output().unwrap();
    assert!(line_of(&output, 1).contains("folder.npz: is not a regular file"));
    // A link stays one.
    place.ok(&[&patterns[..], &["folder/real.npz"]].concat());
    let whole = std::fs::read(place.path("folder/real.npz")).unwrap();
    std::fs::write(place.path("folder/real.npz"), "old").unwrap();
    symlink("folder/real.npz", place.path("link.npz")).unwrap();
    place.ok(&[&patterns[..], &["link.npz"]].concat());
    assert!(place.path("link.npz").is_symlink());
    assert!(std::fs::read(place.path("folder/real.npz")).unwrap() == whole);
    assert!(place.strays().is_empty());
}

/// A disk that may only be read, where one may be mounted.
#[test]
fn a_disk_that_is_read_only_is_one_line() {
    let place = Place::new();
    std::fs::create_dir(place.path("disk")).unwrap();
    let script = "mount -t tmpfs -o ro none disk || exit 99; exec \"$@\"";
    for args in [
        &["patterns", "-m", "model.gguf", "-p", "The sea", "-o", "disk/p.npz"][..],
        &["generate", "-m", "model.gguf", "-p", "A", "-n", "2", "--session", "disk/s"],
        &["man", "-o", "disk/man"],
    ] {
        let mut command = Command::new("unshare");
        command.current_dir(place.folder.path()).args(["-m", "sh", "-c", script, "sh"]);
        let output = command.arg(env!("CARGO_BIN_EXE_qkov")).args(args).output();
        let Some(output) = output
            .ok()
            .filter(|o| o.status.code() == Some(1) && !text(&o.stderr).contains("unshare"))
        else {
            eprintln!("skipped: no disk can be mounted here");
            return;
        };
        let line = line_of(&output, 1);
        assert!(line.contains("disk/") && line.contains("Read-only file system"), "{line}");
    }
}

#[test]
fn a_full_stdout_is_an_error() {
    let place = Place::new();
    for args in PRINTING {
        let output = place.shell("exec >/dev/full", args);
        let line = line_of(&output, 1);
        assert!(
            line.contains("cannot write to stdout: No space left on device"),
            "{args:?}: {line}"
        );
    }
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let place = Place::new();
    let helps = [&["--help"][..], &["bench", "--help"], &["help", "compare"]];
    for args in PRINTING.iter().chain(&helps) {
        for n in [0, 1] {
            let mut child = place.command(args).spawn().unwrap();
            let mut out = child.stdout.take().unwrap();
            let _ = out.read(&mut [0; 1][..n]).unwrap();
            drop(out);
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(0), "{args:?}");
            let said = text(&output.stderr);
            let is_quiet = !said.contains("error") && !said.contains("panicked");
            assert!(is_quiet, "{args:?}: {said}");
        }
    }
}

/// What it says goes nowhere, and it serves on.
#[test]
fn a_server_goes_on_without_a_place_for_messages() {
    let place = Place::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut command = place.command(&["serve", "-m", "model.gguf", "-t", "1", "--no-pin"]);
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    command.args(["--port", &port.to_string()]).stderr(full).stdout(Stdio::null());
    let mut child = command.spawn().unwrap();
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], port));
    let is_there = || std::net::TcpStream::connect(address).is_ok();
    assert!(super::until(&mut child, is_there));
    let body = serde_json::json!({"prompt": "A", "max_tokens": 4});
    for _ in 0..3 {
        let response = crate::serve::http::post(address, "/v1/completions", &body);
        assert_eq!(response.status, 200, "{}", response.body);
    }
    super::signal(&child, "-TERM");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_chat_needs_no_home_and_no_terminal() {
    let place = Place::new();
    std::fs::write(place.path("template"), "{% for m in messages %}{{ m.content }}|{% endfor %}")
        .unwrap();
    let args = ["chat", "-m", "model.gguf", "--template", "template", "-n", "4", "-p", "Hi"];
    let homes = [None, Some("/proc"), Some("/nowhere/at/all")];
    for home in homes {
        let mut command = place.command(&args);
        command.env_remove("XDG_STATE_HOME").env_remove("TERM").env("LANG", "C");
        match home {
            Some(home) => command.env("HOME", home),
            None => command.env_remove("HOME"),
        };
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
}
