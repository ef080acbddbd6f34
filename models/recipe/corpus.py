"""Books to tokens: prose, and chats made of it.

usage: corpus.py BOOKS.txt[.xz] TOKENS.bin [--passes N] [--seed N] [--words] [--show N]

A pass has every book once as prose, and chats about most of its longer paragraphs, other ones in every pass.
Documents begin with `<|end|>` and come in random order. TOKENS.bin holds them as 16-bit numbers, the highest bit of
which is set where an answer has a word that was asked for.
"""

import argparse
import concurrent.futures
import lzma
import pathlib
import random
import re
from collections import Counter

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import chats

HERE = pathlib.Path(__file__).parent
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
END, USER, ASSISTANT = range(3)
N_VOCAB = 4096
# The bit of tokens of words that were asked for.
ASKED = 1 << 15
# Of the paragraphs that a chat can be made of.
SHARE_IN_CHATS = 0.8
# Of the documents of prose, those at whose end a part of them comes again: books hardly repeat themselves, and what a
# model needs to find again what it has read would come late, or not at all.
SHARE_REPEATED = 0.3


def read(path):
    """The text of a file, which may be compressed."""
    path = pathlib.Path(path)
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode()


def tokenizer():
    """The vocabulary of all models. Training is not deterministic, so its result is kept."""
    return Tokenizer.from_file(str(HERE / "tokenizer.json"))


def train_tokenizer(text):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    t.train_from_iterator(text.split("\n"), trainer)
    t.save(str(HERE / "tokenizer.json"))


def books(text):
    """Of every book, its author and paragraphs."""
    out = []
    for book in re.split(r"(?m)^(?=# Title: )", text):
        paragraphs = [p.strip() for p in book.split("\n") if p.strip()]
        author = re.search(r"(?m)^## Author: (.+?)\.?$", book)
        author = author and author.group(1).strip()
        if paragraphs:
            out.append((None if author == "Various" else author, paragraphs))
    return out


class Encoder:
    def __init__(self):
        self.tokenizer = tokenizer()
        self.newline = self.ids("\n")

    def ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def many(self, texts):
        return [np.array(e.ids, np.uint16) for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def chat(self, messages, texts, ids):
        """A chat about paragraphs, which come as texts and as tokens."""
        out = [[END]]
        for i, parts in enumerate(messages):
            out.append([USER if i % 2 == 0 else ASSISTANT])
            for part in parts:
                if isinstance(part, str):
                    out.append(self.text(part))
                elif isinstance(part, chats.Answer):
                    out.append(self.answer(texts[part.paragraph], part.words))
                else:
                    out.append(ids[part])
            out.append([END])
        return np.concatenate([np.asarray(x, np.uint16) for x in out])

    def answer(self, text, words):
        """With the bit where each word is first."""
        e = self.tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(e.ids, np.uint16)
        for w in words:
            at = re.search(rf"(?<![A-Za-z]){w}(?![A-Za-z])", text)
            if at:
                for k, (a, b) in enumerate(e.offsets):
                    if a < at.end() and b > at.start():
                        ids[k] |= ASKED
        return ids

    def text(self, part):
        # In a whole text, line ends before a paragraph are tokens of their own.
        bare = part.strip("\n")
        before, after = len(part) - len(part.lstrip("\n")), len(part) - len(part.rstrip("\n"))
        return self.newline * before + (self.ids(bare) + self.newline * after if bare else [])


def documents(job):
    """All documents of one book, for every pass."""
    (author, paragraphs), words, seed, n_passes, words_only = job
    encoder = Encoder()
    ids = encoder.many(paragraphs)
    between = np.array(encoder.newline * 2, np.uint16)
    passes = []
    for p in range(n_passes):
        rng = random.Random(f"{seed} {p} {paragraphs[0]}")
        maker = chats.Maker(paragraphs, author, words, rng)
        if words_only:
            made = (maker.words_only(i) for i in range(len(paragraphs)))
            passes.append([encoder.chat(chat, paragraphs, ids) for chat in made if chat])
            continue
        docs, i = [], 0
        while i < len(paragraphs):
            # Texts of all lengths up to more than a context.
            size, n = int(300 * 15 ** rng.random()), 0
            parts = [np.array([END], np.uint16)]
            while i < len(paragraphs) and n < size:
                parts += [ids[i], between]
                n += len(paragraphs[i])
                i += 1
            if rng.random() < SHARE_REPEATED:
                first = 2 * rng.randrange(len(parts) // 2) + 1
                parts += parts[first : first + 2 * rng.randint(1, 3)]
            docs.append(np.concatenate(parts[:-1]))
        for i in range(len(paragraphs)):
            if rng.random() < SHARE_IN_CHATS:
                chat = maker.chat(i)
                if chat:
                    docs.append(encoder.chat(chat, paragraphs, ids))
                if rng.random() < 0.005:
                    docs.append(encoder.chat(maker.small_talk(), paragraphs, ids))
        passes.append(docs)
    return passes


def make(text, n_passes, seed, words_only=False):
    """The tokens of all passes."""
    all_books = books(text)
    with concurrent.futures.ProcessPoolExecutor() as pool:
        counted = list(pool.map(chats.counted, ["\n".join(p) for _, p in all_books]))
        words = chats.Words(*(sum(part, Counter()) for part in zip(*counted)))
        # The longest first, so that all processes end at the same time.
        order = sorted(range(len(all_books)), key=lambda i: -sum(map(len, all_books[i][1])))
        done = list(pool.map(documents, [(all_books[i], words, seed, n_passes, words_only) for i in order]))
    out = []
    for p in range(n_passes):
        docs = [doc for book in done for doc in book[p]]
        random.Random(f"{seed} {p}").shuffle(docs)
        out += docs
    return np.concatenate(out)


def main():
    args = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    args.add_argument("books")
    args.add_argument("out")
    args.add_argument("--passes", type=int, default=1)
    args.add_argument("--seed", type=int, default=0)
    args.add_argument("--words", action="store_true", help="only chats in which somebody asks for words")
    args.add_argument("--show", type=int, default=0, help="prints so many of the documents")
    args.add_argument("--train-tokenizer", action="store_true", help="makes tokenizer.json anew, before anything else")
    args = args.parse_args()
    text = read(args.books)
    if args.train_tokenizer:
        train_tokenizer(text)
    tokens = make(text, args.passes, args.seed, args.words)
    tokens.tofile(args.out)
    counts = f"{int((tokens == USER).sum())} begin a question, {int((tokens >= ASKED).sum())} are of words asked for"
    print(f"{len(tokens)} tokens; of them {counts}")
    tokens %= ASKED
    if args.show:
        t, starts = tokenizer(), np.flatnonzero(tokens[:200_000] == END)
        for a, b in zip(starts[: args.show], starts[1:]):
            print("-" * 80 + "\n" + t.decode(tokens[a:b].tolist(), skip_special_tokens=False))


if __name__ == "__main__":
    main()
