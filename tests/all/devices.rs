//! What the program says of engines and devices, and how it lends them.

use crate::cli::{code_and_text, ok};

#[test]
fn version_names_engines() {
    let text = ok(&["--version"], "");
    let engines = text.lines().nth(1).unwrap();
    match cfg!(feature = "ggml") {
        true => assert!(engines.starts_with("engines: cpu, ggml 0."), "{text}"),
        false => assert_eq!(engines, "engines: cpu"),
    }
    assert_eq!(ok(&["-V"], "").lines().count(), 1);
}

#[test]
fn inspect_lists_devices() {
    let (code, text) = code_and_text(&["inspect", "--devices"]);
    assert_eq!(code, 0, "{text}");
    let json: serde_json::Value =
        serde_json::from_str(&ok(&["inspect", "--devices", "--json"], "")).unwrap();
    let devices = json.as_array().unwrap();
    assert_eq!((&devices[0]["engine"], &devices[0]["kind"]), (&"cpu".into(), &"CPU".into()));
    match cfg!(feature = "ggml") {
        true => {
            let cpu = devices.iter().find(|d| d["engine"] == "ggml" && d["name"] == "CPU").unwrap();
            let memory = |key: &str| cpu[key].as_u64().unwrap();
            assert!(memory("memory_total") >= memory("memory_free"), "{cpu}");
            assert!(memory("memory_total") > 1 << 28, "{cpu}");
            assert_eq!(text.lines().count(), 1 + devices.len(), "{text}");
        }
        false => {
            assert_eq!(devices.len(), 1);
            assert!(text.contains("cargo build --release --features ggml"), "{text}");
        }
    }
}

#[cfg(feature = "rpc")]
mod lent {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::process::{Command, Stdio};
    use std::thread::sleep;
    use std::time::Duration;

    use super::code_and_text;
    use crate::cli::{error, ok};

    #[test]
    fn what_cannot_be_lent() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port().to_string();
        let line = error(&["rpc-worker", "--port", &port], 1);
        assert_eq!(line.lines().count(), 1, "{line}");
        let part = format!("error: 127.0.0.1:{port} cannot be listened at: ");
        assert!(line.starts_with(&part), "{line}");
        let line = error(&["rpc-worker", "--port", &port, "--device", "CPU,NONE"], 2);
        assert!(
            line.contains("--device NONE: not here; allowed ") && line.contains("CPU"),
            "{line}"
        );
        let everywhere = TcpListener::bind("0.0.0.0:0").unwrap();
        let port = everywhere.local_addr().unwrap().port().to_string();
        let (code, text) = code_and_text(&["rpc-worker", "--host", "0.0.0.0", "--port", &port]);
        assert_eq!(code, 1, "{text}");
        assert!(text.starts_with("warning: whoever reaches 0.0.0.0:"), "{text}");
    }

    /// A worker at a free port of this machine.
    struct Worker(std::process::Child, String);

    impl Worker {
        fn start() -> Worker {
            let at = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
            let mut command = Command::new(env!("CARGO_BIN_EXE_qkov"));
            command.args(["rpc-worker", "-t", "1", "--port", &at.port().to_string()]);
            let worker = Worker(command.stdout(Stdio::null()).spawn().unwrap(), at.to_string());
            // A connection that says nothing is a client that leaves.
            while TcpStream::connect(at).is_err() {
                sleep(Duration::from_millis(20));
            }
            worker
        }
    }

    impl Drop for Worker {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn two_workers_share_a_model() {
        let workers = [Worker::start(), Worker::start()];
        let both = workers.each_ref().map(|w| &w.1[..]).join(",");
        let alone =
            ["generate", "-p", "The rain", "-n", "24", "--temp", "0", "-t", "1", "-c", "64"];
        let args = [&alone[..], &["--engine", "ggml", "--verbose", "--rpc", &both]].concat();
        let (code, text) = code_and_text(&args);
        assert_eq!(code, 0, "{text}");
        assert!(text.contains(&ok(&alone, "")), "{text}");
        for device in ["on RPC0", "on RPC1"] {
            assert!(text.contains(device), "{text}");
        }
    }

    #[test]
    fn the_processor_is_lent() {
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut worker = Command::new(env!("CARGO_BIN_EXE_qkov"))
            .args(["rpc-worker", "-t", "1", "--port", &free.port().to_string()])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let tries = (0..250).map(|_| {
            sleep(Duration::from_millis(20));
            ggml::add_server(&free.to_string())
        });
        let devices = tries.flatten().next();
        let memory = devices.as_ref().map(|d| d[0].memory());
        worker.kill().unwrap();
        worker.wait().unwrap();
        assert_eq!(devices.map(|d| d.len()), Some(1));
        assert!(memory.is_some_and(|(_, total)| total > 1 << 28), "{memory:?}");
    }

    #[test]
    fn a_program_says_that_its_worker_is_gone() {
        let args = [
            "generate",
            "-p",
            "The old man",
            "-t",
            "1",
            "--ignore-eos",
            "--engine",
            "ggml",
            "--rpc",
        ];
        assert!(error(&[&args[..], &["127.0.0.1:1"]].concat(), 1).contains("no worker answers"));
        let worker = Worker::start();
        let mut child = Command::new(env!("CARGO_BIN_EXE_qkov"))
            .args(args)
            .arg(&worker.1)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut some = [0; 20];
        child.stdout.as_mut().unwrap().read_exact(&mut some).unwrap();
        drop(worker);
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        let last = stderr.lines().last().unwrap();
        assert!(last.starts_with("error: ggml: Remote RPC server crashed"), "{stderr}");
    }
}
