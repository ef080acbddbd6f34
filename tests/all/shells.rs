//! What the program says of itself to shells, and in manual pages.

use crate::cli::{code_and_text, error, ok};

/// The commands that the help shows.
fn commands() -> Vec<String> {
    let help = ok(&["--help"], "");
    let list = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let names = list.lines().filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    let names: Vec<String> =
        names.map(|line| line.split_whitespace().next().unwrap().to_string()).collect();
    assert!(names.len() > 15 && names.contains(&"chat".to_string()), "{names:?}");
    names
}

#[test]
fn shells_complete_every_command() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = ok(&["completions", shell], "");
        for name in commands() {
            assert!(script.contains(&name), "{name} is not in what {shell} gets");
        }
        assert!(script.contains("cache-type-k"), "{shell}");
    }
    error(&["completions", "tcsh"], 2);
}

#[test]
fn every_command_has_a_manual_page() {
    let main = ok(&["man"], "");
    assert!(main.contains(".TH qkov 1"), "{main}");
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("man/man1");
    let (code, text) = code_and_text(&["man", "--out", folder.to_str().unwrap()]);
    assert_eq!(code, 0, "{text}");
    let pages = std::fs::read_dir(&folder).unwrap().count();
    assert_eq!(text, format!("{pages} pages written\n"));
    let mut commands = commands();
    commands.retain(|name| name != "help");
    assert_eq!(pages, commands.len() + 1);
    for name in commands {
        assert!(main.contains(&name.replace('-', "\\-")), "{name} is not in the page");
        let page = std::fs::read_to_string(folder.join(format!("qkov-{name}.1"))).unwrap();
        assert!(page.contains(".SH OPTIONS") || page.contains(".SH SYNOPSIS"), "{name}: {page}");
        assert!(page.contains(".TH qkov-"), "{name}: {page}");
    }
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let line = error(&["man", "--out", file.to_str().unwrap()], 1);
    assert!(line.contains("cannot write pages") && line.lines().count() == 1, "{line}");
}
