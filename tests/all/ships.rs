//! What the model that ships is for.

use crate::cli::ok;

/// A third each of one, two and three words.
const ASKED: [&[&str]; 30] = [
    &["lantern"],
    &["sea"],
    &["horse"],
    &["garden"],
    &["letter"],
    &["storm"],
    &["river"],
    &["king"],
    &["fire"],
    &["window"],
    &["captain", "ship"],
    &["forest", "night"],
    &["doctor", "house"],
    &["gold", "mountain"],
    &["dog", "door"],
    &["island", "boat"],
    &["train", "city"],
    &["mother", "child"],
    &["snow", "road"],
    &["soldier", "sword"],
    &["moon", "water", "tree"],
    &["table", "candle", "book"],
    &["horse", "river", "bridge"],
    &["castle", "king", "war"],
    &["rain", "street", "lamp"],
    &["church", "bell", "village"],
    &["ship", "wind", "sail"],
    &["hand", "face", "voice"],
    &["rock", "cave", "light"],
    &["winter", "fire", "kitchen"],
];

/// Several to each prompt, as a reply is drawn by lot.
const N_REPLIES: usize = 5 * ASKED.len();

fn joined(words: &[&str]) -> String {
    match words {
        [.., _, last] => {
            let before = words[..words.len() - 1].join(", the ");
            format!("the {before} and the {last}")
        }
        _ => format!("the {}", words.join("")),
    }
}

/// Of the words, those that a text has, in the plural perhaps.
fn found(text: &str, words: &[&str]) -> usize {
    let text = text.to_lowercase();
    let all: Vec<_> = text.split(|c: char| !c.is_alphabetic()).collect();
    words.iter().filter(|w| all.iter().any(|x| x == *w || x.strip_suffix('s') == Some(w))).count()
}

#[test]
fn passages_have_most_of_the_words_that_were_asked_for() {
    let (mut n_found, mut n_asked, mut n_whole) = (0, 0, 0);
    for (i, words) in ASKED.iter().cycle().take(N_REPLIES).enumerate() {
        let prompt = format!("Write a passage about {}.", joined(words));
        let seed = i.to_string();
        let reply = ok(&["chat", "-p", &prompt, "-n", "250", "--seed", &seed], "");
        let n = found(&reply, words);
        println!("{n} of {}: {prompt}\n    {reply}", words.len());
        n_found += n;
        n_asked += words.len();
        n_whole += usize::from(n == words.len());
    }
    println!("{n_found} of {n_asked} words; {n_whole} of {N_REPLIES} passages have all");
    assert!(3 * n_found >= 2 * n_asked, "{n_found} of {n_asked} words");
}
