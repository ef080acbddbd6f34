//! Memory that is not there.

use std::os::unix::process::ExitStatusExt;

use super::{Place, Random, line_of, text};

const COMMON: [&str; 5] = ["-m", "model.gguf", "-t", "1", "--no-pin"];

/// The three numbers of the line: needed, available, and the context that fits.
fn sizes(line: &str) -> [u64; 3] {
    let number = |before: &str| -> u64 {
        let rest = line.split(before).nth(1).unwrap_or_else(|| panic!("{line}"));
        rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse().unwrap()
    };
    [number("not enough memory: "), number("tokens; "), number("--ctx ")]
}

#[test]
fn a_context_that_memory_does_not_hold_is_refused_before_loading() {
    let place = Place::new();
    let n = "1000000000000";
    let cases: &[&[&str]] = &[
        &["generate", "-p", "A", "-c", n],
        &["chat", "-p", "A", "-c", n],
        &["embed", "A", "-c", n],
        &["bench", "-p", n, "-n", "0"],
        &["bench", "-d", n, "-p", "1"],
        &["serve", "--port", "0", "-c", n],
    ];
    for args in cases {
        let output = place.command(&[*args, &COMMON].concat()).output().unwrap();
        let line = line_of(&output, 2);
        let [needed, available, fits] = sizes(&line);
        assert!(needed > available && fits > 0, "{args:?}: {line}");
        assert!(output.stdout.is_empty(), "{args:?}");
        assert!(line.contains(" for a context of 10000000"), "{args:?}: {line}");
    }
    // Those that read a text want one of that length first.
    for args in [
        &["eval", "-f", "text", "-c", n][..],
        &["compare", "-f", "text", "--norm", "relu", "-c", n],
    ] {
        line_of(&place.command(&[args, &COMMON].concat()).output().unwrap(), 2);
    }
}

/// What is said to fit does, and a little more does not.
#[test]
fn a_limit_of_addresses_counts() {
    let place = Place::new();
    let kib = 2_000_000;
    let run = |n_ctx: u64| {
        let n_ctx = n_ctx.to_string();
        let args = ["generate", "-p", "A", "-n", "2", "--ignore-eos", "-c", &n_ctx];
        place.shell(&format!("ulimit -v {kib}"), &[&args[..], &COMMON].concat())
    };
    let line = line_of(&run(1 << 40), 2);
    let [_, available, fits] = sizes(&line);
    assert!(available < kib * 1024 && fits > 1000, "{line}");
    // Threads and buffers come on top.
    let output = run(fits * 3 / 4);
    assert!(output.status.success(), "{}", text(&output.stderr));
    line_of(&run(fits + fits / 8), 2);
}

/// Before any of it is made.
#[test]
fn a_model_that_memory_does_not_hold_is_refused() {
    let place = Place::new();
    let args = ["bench", "--shape", "llama-3.1-8b", "--type", "Q4_K_M", "-t", "1", "--no-pin"];
    let line = line_of(&place.shell("ulimit -v 1000000", &args), 1);
    let number = |before: &str| -> u64 {
        let rest = line.split(before).nth(1).unwrap_or_else(|| panic!("{line}"));
        rest.split(' ').next().unwrap().parse().unwrap()
    };
    let (needed, available) = (number("not enough memory: "), number("model; "));
    assert!(needed > 4_000_000_000 && available < 1_024_000_000, "{line}");
}

/// Wherever memory ends, the program ends with a line, or does what it is asked.
#[test]
fn no_limit_of_addresses_kills() {
    let place = Place::new();
    let mut random = Random(11);
    let (mut n_done, mut n_refused) = (0, 0);
    // With less, the system does not start it at all.
    let starts = |kib: &u64| {
        place.shell(&format!("ulimit -v {kib} && exec 2>&1"), &["--version"]).status.success()
    };
    let least = (20_000..).step_by(10_000).find(starts).unwrap();
    for _ in 0..30 {
        let kib = least + 10_000 + (150_000.0 * random.next()) as u64;
        let args = ["generate", "-p", "A", "-n", "2", "--ignore-eos", "-c", "1000000"];
        let output = place.shell(&format!("ulimit -v {kib}"), &[&args[..], &COMMON].concat());
        assert_eq!(output.status.signal(), None, "{kib}: {}", text(&output.stderr));
        match output.status.code() {
            Some(0) => n_done += 1,
            _ => {
                n_refused += 1;
                let said = text(&output.stderr);
                assert!(said.contains("error: ") && !said.contains("panicked"), "{kib}: {said}");
            }
        }
    }
    eprintln!("{n_done} limits leave room, {n_refused} do not");
    assert!(n_done > 0 && n_refused > 0, "{n_done} {n_refused}");
}
