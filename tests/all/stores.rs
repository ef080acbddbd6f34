//! Models by name, in the folders of other programs, as they are and as they should not be.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::tiny::Tiny;

/// What says where stores are.
const VARIABLES: [&str; 8] = [
    "LLAMA_CACHE",
    "OLLAMA_MODELS",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_HOME",
    "XDG_CACHE_HOME",
    "XDG_STATE_HOME",
    "LOCALAPPDATA",
];

/// A home folder, with a folder to work in.
struct Home {
    dir: tempfile::TempDir,
    variables: Vec<(&'static str, PathBuf)>,
}

impl Home {
    fn new() -> Home {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("work")).unwrap();
        // Not what a service of this machine has.
        let variables = vec![("OLLAMA_MODELS", dir.path().join(".ollama/models"))];
        Home { dir, variables }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn put(&self, path: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.at(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        path
    }

    fn model(&self, path: &str) -> PathBuf {
        self.put(path, Tiny::llama().bytes())
    }

    /// A model of ollama's, with the digest `digit` repeated.
    fn ollama(&self, name: &str, digit: &str) -> PathBuf {
        let digest = digit.repeat(64);
        let layer = |kind: &str, digest: &str| {
            json!({"mediaType": format!("application/vnd.ollama.image.{kind}"),
                   "digest": format!("sha256:{digest}"), "size": 1})
        };
        let layers = [layer("template", &"f".repeat(64)), layer("model", &digest)];
        let manifest = json!({"schemaVersion": 2, "layers": layers}).to_string();
        self.put(&format!(".ollama/models/manifests/{name}"), manifest);
        self.model(&format!(".ollama/models/blobs/sha256-{digest}"))
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qkov"));
        for name in VARIABLES {
            command.env_remove(name);
        }
        command.envs(self.variables.iter().map(|(name, path)| (name, path)));
        let home = self.dir.path();
        let command = command.args(args).current_dir(home.join("work"));
        command.env("HOME", home).env("USERPROFILE", home).output().unwrap()
    }

    /// The one line with which a name is refused.
    fn error(&self, name: &str, code: i32) -> String {
        let output = self.run(&["inspect", "-m", name]);
        let line = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{name}: {line}");
        assert!(line.starts_with("error: ") && line.lines().count() == 1, "{line}");
        line
    }

    /// The file that a name stands for, as reports have it, and what is said on stderr.
    fn found(&self, name: &str) -> (String, String) {
        let output = self.run(&["inspect", "--json", "-m", name]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{name}: {said}");
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        (json["model_filename"].as_str().unwrap().to_string(), said)
    }

    fn assert_finds(&self, name: &str, path: &Path) {
        let (found, said) = self.found(name);
        // That of `work/models` is from there.
        assert_eq!(self.at("work").join(found), path, "{name}");
        assert_eq!(said, "", "{name}");
    }

    fn list(&self) -> Vec<Value> {
        let output = self.run(&["models", "--json"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn names(&self) -> Vec<String> {
        self.list().iter().map(|row| row["name"].as_str().unwrap().to_string()).collect()
    }
}

#[test]
fn every_store_is_looked_through() {
    let home = Home::new();
    let here = home.model("work/models/Here-1b-Q8_0.gguf");
    let flat = home.model(".cache/llama.cpp/some-one_Flat-1B-GGUF_flat-1b-q4_k_m.gguf");
    let newer =
        home.model(".cache/llama.cpp/models--some--newer-GGUF/snapshots/ab/newer-q8_0.gguf");
    home.ollama("registry.ollama.ai/library/llama3.2/1b", "a");
    home.ollama("registry.ollama.ai/library/plain/latest", "b");
    home.ollama("hf.co/someone/Other-GGUF/Q4_K_M", "c");
    let studio = home.model(".lmstudio/models/maker/Studio-GGUF/studio-q6_k.gguf");
    let old = home.model(".cache/lm-studio/models/maker/Old-GGUF/old-q6_k.gguf");
    let pointed = home.model("elsewhere/models/maker/Moved-GGUF/moved.gguf");
    home.put(".lmstudio-home-pointer", home.at("elsewhere").to_str().unwrap());
    let hub = ".cache/huggingface/hub/models--Org--Hub-GGUF";
    let hub = home.model(&format!("{hub}/snapshots/0123/hub-IQ4_NL.gguf"));
    for (name, path) in [
        ("Here-1b-Q8_0.gguf", &here),
        ("here-1B-q8_0", &here),
        ("some-one/Flat-1B-GGUF", &flat),
        ("some-one/flat-1b-gguf:Q4_K_M", &flat),
        ("some-one_flat-1b-gguf_flat-1b-q4_k_m", &flat),
        ("some/newer-gguf:q8_0", &newer),
        ("studio-q6_k", &studio),
        ("maker/studio-gguf", &studio),
        ("maker/Studio-GGUF/studio-q6_k.gguf", &studio),
        ("old-q6_k.gguf", &old),
        ("moved", &pointed),
        ("org/hub-gguf", &hub),
        ("org/hub-gguf:iq4_nl", &hub),
        ("HUB-iq4_nl", &hub),
    ] {
        home.assert_finds(name, path);
    }
    // What a blob is called says nothing, so its name is told.
    for (name, found) in [
        ("llama3.2:1b", "llama3.2:1b"),
        ("LLAMA3.2:1B", "llama3.2:1b"),
        ("plain", "plain:latest"),
        ("plain:latest", "plain:latest"),
        ("hf.co/someone/other-gguf:q4_k_m", "hf.co/someone/Other-GGUF:Q4_K_M"),
    ] {
        assert_eq!(home.found(name), (found.to_string(), String::new()));
    }
    // A part of a name is told what it stands for.
    let (found, said) = home.found("llama3");
    assert_eq!(
        (found.as_str(), said.as_str()),
        ("llama3.2:1b", "note: --model llama3: llama3.2:1b (ollama)\n")
    );
    let rows = home.list();
    assert_eq!(rows.len(), 10, "{rows:?}");
    for row in rows {
        assert_eq!((&row["kind"], &row["problem"]), (&"llama F32".into(), &Value::Null));
        let path = row["path"].as_str().unwrap();
        let size = std::fs::metadata(home.at("work").join(path)).unwrap().len();
        assert_eq!(row["n_bytes"], size);
        // What is listed is found.
        home.found(row["name"].as_str().unwrap());
    }
    let table = home.run(&["models"]);
    let (text, said) =
        (String::from_utf8(table.stdout).unwrap(), String::from_utf8(table.stderr).unwrap());
    assert!(text.lines().count() == 11 && text.starts_with("name  "), "{text}");
    assert!(
        said.starts_with("10 models in models, ") && said.contains("elsewhere/models"),
        "{said}"
    );
}

#[test]
fn variables_say_where_stores_are() {
    let mut home = Home::new();
    let model = |home: &Home, path: &str| home.model(&format!("{path}-q4_0.gguf"));
    let llama = model(&home, "a/flat");
    let hub = model(&home, "b/models--x--y/snapshots/0/hub");
    home.variables = vec![("LLAMA_CACHE", home.at("a")), ("HF_HUB_CACHE", home.at("b"))];
    home.assert_finds("flat-q4_0", &llama);
    home.assert_finds("x/y", &hub);
    let hub = model(&home, "c/hub/models--x--y/snapshots/0/hub");
    home.variables = vec![("HF_HOME", home.at("c")), ("HF_HUB_CACHE", PathBuf::new())];
    home.assert_finds("x/y", &hub);
    let hub = model(&home, "d/huggingface/hub/models--x--y/snapshots/0/hub");
    home.variables = vec![("XDG_CACHE_HOME", home.at("d"))];
    home.assert_finds("x/y", &hub);
    home.ollama("registry.ollama.ai/library/small/1b", "a");
    home.variables = vec![("OLLAMA_MODELS", home.at(".ollama/models"))];
    assert_eq!(home.found("small:1b").0, "small:1b");
    home.variables = vec![("OLLAMA_MODELS", home.at("nowhere"))];
    home.error("small:1b", 3);
}

#[test]
fn a_path_comes_first_and_stays_one() {
    let home = Home::new();
    home.model("work/models/same.gguf");
    let path = home.model("work/same.gguf");
    home.assert_finds("same.gguf", &path);
    // Of the same name in two stores, that which is called so alone.
    let stored = home.model(".lmstudio/models/maker/repo/other.gguf");
    let nearer = home.model("work/models/other.gguf");
    home.assert_finds("other.gguf", &nearer);
    home.assert_finds("maker/repo/other.gguf", &stored);
    for name in ["./other.gguf", "../other.gguf", "/other.gguf"] {
        let line = home.error(name, 3);
        assert!(line.ends_with("No such file or directory\n"), "{line}");
    }
    let line = home.error("models", 3);
    assert!(line.contains("is a directory"), "{line}");
}

#[test]
fn repositories_have_a_usual_format() {
    let home = Home::new();
    let repo = ".cache/huggingface/hub/models--Org--Tiny-GGUF/snapshots/0123";
    let usual = home.model(&format!("{repo}/tiny-Q4_K_M.gguf"));
    let other = home.model(&format!("{repo}/tiny-Q8_0.gguf"));
    home.model(&format!("{repo}/mmproj-tiny-Q8_0.gguf"));
    home.assert_finds("org/tiny-gguf", &usual);
    home.assert_finds("org/tiny-gguf:q8_0", &other);
    let line = home.error("org/tiny-gguf:q8", 3);
    assert!(line.contains("No such file, and no model of this name"), "{line}");
    std::fs::remove_file(usual).unwrap();
    home.model(&format!("{repo}/tiny-Q6_K.gguf"));
    let line = home.error("org/tiny-gguf", 2);
    assert!(
        line.contains("Org/Tiny-GGUF/tiny-Q6_K.gguf (Hugging Face), Org/Tiny-GGUF/tiny-Q8_0.gguf"),
        "{line}"
    );
}

#[test]
fn what_is_not_found_or_not_alone_is_told() {
    let home = Home::new();
    let line = home.error("tiny", 3);
    assert!(line.contains("there is none of models, ") && line.contains("lmstudio"), "{line}");
    std::fs::create_dir(home.at("work/models")).unwrap();
    let line = home.error("tiny", 3);
    assert!(line.ends_with("; there are no models in models\n"), "{line}");
    for i in 0..12 {
        home.model(&format!("work/models/tiny-{i:02}.gguf"));
    }
    let line = home.error("large", 3);
    assert!(line.contains("in models; found there: tiny-00.gguf, tiny-01.gguf, "), "{line}");
    assert!(line.ends_with("tiny-07.gguf and 4 more\n"), "{line}");
    let line = home.error("tiny", 2);
    assert!(line.contains("12 models match this name: tiny-00.gguf (models), "), "{line}");
    assert!(line.ends_with("tiny-07.gguf (models) and 4 more\n"), "{line}");
    // Files of one name are told apart by their paths.
    home.model("work/models/a/b/same.gguf");
    home.model(".lmstudio/models/a/b/same.gguf");
    let line = home.error("a/b/same.gguf", 2);
    assert!(line.contains("models/a/b/same.gguf, /"), "{line}");
}

#[test]
fn split_models_are_one() {
    let home = Home::new();
    let split = |tiny: Tiny, no: u32| tiny.set("split.no", no).set("split.count", 2);
    let (first, second) = (split(Tiny::llama(), 0).bytes(), split(Tiny::default(), 1).bytes());
    let path = home.put("work/models/two-00001-of-00002.gguf", &first);
    home.put("work/models/two-00002-of-00002.gguf", &second);
    home.model("work/models/late-00002-of-00002.gguf");
    let rows = home.list();
    assert_eq!(rows.len(), 1, "{rows:?}");
    assert_eq!(rows[0]["n_bytes"], first.len() + second.len());
    assert_eq!(rows[0]["problem"], Value::Null);
    home.assert_finds("two-00001-of-00002", &path);
}

#[test]
fn broken_stores_are_passed_over() {
    let home = Home::new();
    let manifests = ".ollama/models/manifests/registry.ollama.ai/library";
    let manifest = |digest: &str| {
        json!({"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": digest}]})
            .to_string()
    };
    home.ollama("registry.ollama.ai/library/good/1b", "a");
    home.put(&format!("{manifests}/broken/1b"), "{\"layers\": [");
    home.put(&format!("{manifests}/empty/1b"), "");
    home.put(&format!("{manifests}/binary/1b"), [0xff, 0, 0xfe]);
    home.put(&format!("{manifests}/other/1b"), "{\"layers\": {\"digest\": 7}}");
    home.put(&format!("{manifests}/huge/1b"), " ".repeat(2 << 20));
    home.put(&format!("{manifests}/gone/1b"), manifest(&format!("sha256:{}", "e".repeat(64))));
    home.put("secret.gguf", "secret");
    home.put(&format!("{manifests}/out/1b"), manifest("sha256:../../../secret.gguf"));
    home.put(&format!("{manifests}/deep/er/1b"), manifest(&format!("sha256:{}", "a".repeat(64))));
    home.put(&format!("{manifests}/stray"), "{}");
    let hub = ".cache/huggingface/hub";
    home.put(&format!("{hub}/models--a--b/snapshots/0/broken.gguf"), "GGUF");
    home.put(&format!("{hub}/models--/snapshots/0/x.txt"), "");
    home.put(&format!("{hub}/models--no--snapshots/refs/main"), [0xff]);
    home.put(".lmstudio-home-pointer", [0xff, 0xfe]);
    std::fs::create_dir_all(home.at("work/models/folder.gguf")).unwrap();
    home.model("work/models/1/2/3/4/within.gguf");
    home.model("work/models/1/2/3/4/5/too-deep.gguf");
    home.put(".cache/llama.cpp", "a file");
    let empty = Tiny::default().set("general.architecture", "llama");
    home.put("work/models/vocab.gguf", empty.bytes());
    let names = ["1/2/3/4/within.gguf", "vocab.gguf", "good:1b", "a/b/broken.gguf"];
    assert_eq!(home.names(), names);
    let rows = home.list();
    assert_eq!(rows[1]["kind"], "llama, no weights");
    assert_eq!(rows[3]["kind"], Value::Null);
    assert!(rows[3]["problem"].as_str().unwrap().contains("truncated"), "{}", rows[3]);
    assert_eq!(home.found("good:1b").0, "good:1b");
    let line = home.error("broken", 3);
    assert!(line.contains("truncated"), "{line}");
}

#[cfg(unix)]
#[test]
fn links_are_followed_and_end() {
    use std::os::unix::fs::symlink;
    let home = Home::new();
    let hub = ".cache/huggingface/hub/models--Org--Tiny-GGUF";
    let blob = home.model(&format!("{hub}/blobs/0a1b"));
    home.put(&format!("{hub}/refs/main"), "bb22\n");
    for revision in ["aa11", "bb22", "cc33"] {
        let folder = home.at(&format!("{hub}/snapshots/{revision}"));
        std::fs::create_dir_all(&folder).unwrap();
        symlink("../../blobs/0a1b", folder.join("tiny-q8_0.gguf")).unwrap();
        symlink("../../blobs/none", folder.join("dangling.gguf")).unwrap();
        symlink(".", folder.join("loop")).unwrap();
    }
    let main = home.at(&format!("{hub}/snapshots/bb22/tiny-q8_0.gguf"));
    home.assert_finds("org/tiny-gguf", &main);
    home.assert_finds("tiny-q8_0", &main);
    // The same file in another store is no other model.
    let folder = home.at(".lmstudio/models/org/tiny-gguf");
    std::fs::create_dir_all(&folder).unwrap();
    symlink(blob, folder.join("tiny-q8_0.gguf")).unwrap();
    home.assert_finds("tiny-q8_0", &folder.join("tiny-q8_0.gguf"));
    // A pipe would block who opens it.
    std::fs::create_dir(home.at("work/models")).unwrap();
    let made = Command::new("mkfifo").arg(home.at("work/models/pipe.gguf")).status();
    assert!(made.unwrap().success());
    assert!(!home.names().contains(&"pipe.gguf".to_string()));
    home.put("work/models/a\u{1b}]0;b.gguf", "GGUF");
    let table = String::from_utf8(home.run(&["models"]).stdout).unwrap();
    assert!(table.contains("a\\u{1b}]0;b.gguf") && !table.contains('\u{1b}'), "{table}");
}
