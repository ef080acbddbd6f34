//! SIGKILL while files are written.

use std::process::Child;
use std::time::{Duration, Instant};

use super::writes::{Kind, WRITES};
use super::{Place, Random, names, until};

/// Kills in all, spread over all kinds of files; `QKOV_KILLS` says how many of each kind instead.
const N_KILLS: usize = 200;

/// What the kills of a kind met.
#[derive(Default)]
struct Met {
    /// A file that was half written.
    n_within: usize,
    n_old: usize,
    n_new: usize,
}

/// Kills the program: every other time at any moment of its run, else soon after it began to write.
fn kill(kind: &Kind, place: &Place, i: usize, time: Duration, random: &mut Random) -> bool {
    let folder = place.path(kind.out).parent().unwrap().to_path_buf();
    let strays = names(&folder).into_iter().filter(|name| name.ends_with(".tmp"));
    strays.for_each(|name| std::fs::remove_file(folder.join(name)).unwrap());
    let mut child = kind.start(place, kind.then);
    let is_writing = || names(&folder).iter().any(|name| name.ends_with(".tmp"));
    match i % 2 {
        0 => std::thread::sleep(time.mul_f64(1.1 * random.next())),
        // A write that is over before it is seen is one that was not met.
        _ if until(&mut child, is_writing) => {
            std::thread::sleep(Duration::from_millis(1).mul_f64(random.next()));
        }
        _ => {}
    }
    end(&mut child);
    is_writing()
}

fn end(child: &mut Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

fn check(kind: &Kind, random: &mut Random, n: usize) -> Met {
    let (place, old, new) = kind.prepare();
    let start = Instant::now();
    kind.run(&place, kind.then);
    let time = start.elapsed();
    let mut met = Met::default();
    for i in 0..n {
        std::fs::write(place.path(kind.out), &old).unwrap();
        // What an interrupted fit leaves is whole as well.
        let partial = place.path("plan.toml.partial");
        if let Ok(text) = std::fs::read(&partial) {
            assert!(serde_json::from_slice::<serde_json::Value>(&text).is_ok(), "kill {i}");
            std::fs::remove_file(&partial).unwrap();
        }
        met.n_within += usize::from(kill(kind, &place, i, time, random));
        let found = std::fs::read(place.path(kind.out)).unwrap();
        assert!(found == old || found == new, "{}, kill {i}: {} bytes", kind.name, found.len());
        if found == old {
            met.n_old += 1;
        } else {
            met.n_new += 1;
        }
    }
    // What the killed have left is removed by the next one.
    std::fs::write(place.path(kind.out), &old).unwrap();
    kind.run(&place, kind.then);
    assert!(std::fs::read(place.path(kind.out)).unwrap() == new, "{}", kind.name);
    let folder = place.path(kind.out).parent().unwrap().to_path_buf();
    let strays: Vec<String> = names(&folder).into_iter().filter(|n| super::is_stray(n)).collect();
    assert!(strays.is_empty(), "{}: {strays:?}", kind.name);
    met
}

#[test]
fn a_kill_leaves_the_old_file_or_the_new_one() {
    let mut random = Random(7);
    let asked = std::env::var("QKOV_KILLS").ok().map(|n| n.parse().unwrap());
    let n = asked.unwrap_or(N_KILLS.div_ceil(WRITES.len()));
    let mut within = 0;
    for kind in WRITES {
        let met = check(kind, &mut random, n);
        eprintln!(
            "{:28} {n} kills: {} within the write, {} left the old file, {} the new one",
            kind.name, met.n_within, met.n_old, met.n_new
        );
        within += met.n_within;
    }
    eprintln!("{} kills, {within} within a write", n * WRITES.len());
    // A third on a disk; few where a file system need not wait for one.
    assert!(within > 0);
}

/// However many writers have been killed, the next one writes.
#[test]
fn strays_of_any_number_are_removed() {
    let kind = &WRITES[0];
    let (place, _, new) = kind.prepare();
    for i in 0..150 {
        std::fs::write(place.path(&format!(".qkov-{}-{}.tmp", 1 + i / 100, i % 100)), "cut")
            .unwrap();
    }
    // Files of others that are called nearly so stay.
    let others = [".qkov-x-1.tmp", ".qkov-1.tmp", "qkov-1-1.tmp", ".qkov-1-1.tmp2"];
    others.iter().for_each(|name| std::fs::write(place.path(name), "mine").unwrap());
    std::fs::create_dir(place.path(".qkov-7-7.tmp")).unwrap();
    // One that is being written stays, too.
    let busy = std::fs::File::create(place.path(".qkov-8-8.tmp")).unwrap();
    busy.lock().unwrap();
    kind.run(&place, kind.then);
    assert!(std::fs::read(place.path(kind.out)).unwrap() == new);
    let mut left = place.strays();
    left.sort();
    assert_eq!(left, [".qkov-1.tmp", ".qkov-7-7.tmp", ".qkov-8-8.tmp", ".qkov-x-1.tmp"]);
}

/// Two that write the same file, and clean up after others, do not meet.
#[test]
fn two_writers_do_not_mix() {
    let kind = WRITES.iter().find(|kind| kind.out == "p.npz").unwrap();
    let (place, old, new) = kind.prepare();
    for i in 0..20 {
        std::fs::write(place.path(&format!(".qkov-9-{i}.tmp")), "cut").unwrap();
        let both = [kind.start(&place, kind.first), kind.start(&place, kind.then)];
        for child in both {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", super::text(&output.stderr));
        }
        let found = std::fs::read(place.path(kind.out)).unwrap();
        assert!(found == old || found == new, "round {i}");
        assert!(place.strays().is_empty(), "round {i}: {:?}", place.strays());
    }
}
