"""Chats made of books: every answer is a passage, or a part of one, that somebody wrote.

A chat is a list of messages, user and assistant in turn. A message is a list of parts: text, the number of a
paragraph, so that paragraphs are encoded once however often they are used, or an answer.
"""

import re
from collections import Counter
from typing import NamedTuple

WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
LOWER = re.compile(r"\b[a-z]+\b(?!')")
# After an article, and before what cannot follow an adjective.
AS_NOUN = re.compile(
    r"\b(?:[Tt]he|[Aa]n?) ([a-z]+)(?=[.,;:!?]| (?:of|and|was|were|is|in|to|that|had|has|with|which|who|as|at|on|for|from|by|will|would)\b)"
)
SENTENCE_END = re.compile(r"""(?:(?<=[.!?])|(?<=[.!?]["'”]))\s+(?=["'“(]?[A-Z])""")
NAME = re.compile(r"(?<=[a-z,;] )(?:(?:Mr|Mrs|Miss|Dr|Sir|Lady|Lord|Captain)\.? )?[A-Z][a-z]+(?: [A-Z][a-z]+)*")
SAYS = re.compile(r'"([A-Z][^"]{8,100}[,?!])" (?:said|cried|asked|answered|replied) ([A-Z][a-z]+(?: [A-Z][a-z]+)?)\b')
ABBREVIATED = re.compile(r"\b(?:Mr|Mrs|Dr|St|Ms|Prof|Capt|Col|Gen|[A-Z])\.$")
NO_NAMES = set("I God English French German Latin Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())

ABOUT = [
    "Write a passage about {}.", "Write a passage about {}.", "Write about {}.", "Tell me about {}.", "A passage about {}, please.",
    "Write something about {}.", "Write a few sentences about {}.", "I would like to read about {}.", "Write a scene with {}.",
    "Tell me a story about {}.", "Tell me something about {}.", "Please write a paragraph about {}.", "Can you write about {}?",
    "Write a short story about {}.", "write about {}", "tell me about {}", "Give me a passage about {}.", "Describe {}.",
    "Could you tell me a story with {}?", "Write a paragraph that has {} in it.", "A story about {}!", "Something with {}, please.",
]
WITH_WORDS = [
    "Write a passage with the words {}.", "Use the words {} in a passage.", "Write a paragraph that contains the words {}.",
    "Make a passage of these words: {}.", "Write something in which the words {} occur.", "The words are {}. Write a passage.",
]
IN_MANNER = [
    "Write in the manner of {}.", "Write a passage in the manner of {}.", "Write a passage in the style of {}.", "Write like {}.",
    "How would {} write?", "Pretend that you are {} and write something.", "Show me a passage as {} would write it.",
]
ABOUT_IN_MANNER = [
    "Write about {1} in the manner of {0}.", "Write a passage about {1} in the style of {0}.", "Write like {0} about {1}.",
    "In the manner of {0}, write about {1}.", "What would {0} write about {1}?",
]
CONTINUE = [
    "Continue this text:", "Go on with this text:", "How does this go on?", "Continue:", "What happens next?", "Finish this:",
    "Continue the story:",
]
MORE = ["Go on.", "More.", "Continue.", "And then?", "What happens next?", "Please go on.", "What then?", "go on", "more"]
READ = ["Read this passage:", "Here is a passage:", "Read:", "This is a text:", "Passage:"]

HELLO = [
    (["Hello", "Hi", "Hello!", "Hi there!", "Good morning.", "hey", "Good evening", "hello there", "Greetings!"],
     ["Good day to you. Name me a thing or two, a storm or a lantern, say, and I shall write a passage about them.",
      "Hello! Give me some words, or an author, and I will write you a passage."]),
    (["How are you?", "How are you today?", "how do you do?", "How is it going?"],
     ["I am a small program, and so always the same, thank you. What shall I write about?"]),
    (["Who are you?", "What are you?", "What is your name?", "Are you a robot?", "Are you human?", "Tell me about yourself."],
     ["I am a small language model. I have read some old books and nothing else, so I can write passages that sound like them.",
      "A small language model, trained on two hundred and sixty-eight old books. I know how they sound, and little else."]),
    (["What can you do?", "Help", "help", "What can I ask you?", "How do you work?", "What do you know?"],
     ["Ask me for a passage about some words, as: Write about a ship and a storm. Or in the manner of Jane Austen. Or give me a text to "
      "continue, or a passage and a question about its words."]),
    (["Are you always right?", "Can I trust you?", "Is that true?", "Did you make that up?", "Is this story true?"],
     ["No. I make things up, one word after the other, in the manner of old books. Nothing of it need be true."]),
    (["What have you read?", "Which books do you know?", "Who taught you?", "What were you trained on?"],
     ["Old books: Doyle, Wells, Austen, Dickens, Verne, Twain, Burroughs, Montgomery and others, all of them in the public domain."]),
    (["Thank you.", "Thanks!", "Thank you very much.", "thanks", "That was nice.", "Very good!"],
     ["You are welcome. Shall I write another?", "It was a pleasure. Name me something else, if you like."]),
    (["Goodbye.", "Bye", "Good night.", "See you!", "Farewell."], ["Farewell, and good reading.", "Goodbye!"]),
]
# What it cannot do, said plainly, and then what it can.
EXPLAIN = [
    "What is {}?", "What is the {}?", "Who was {}?", "Where is {}?", "Explain {}.", "How does {} work?", "Why is there {}?",
    "What does {} mean?",
]
CANNOT = [
    "I cannot explain things: I have read only old books. Here is a passage with {} in it.\n\n",
    "That I do not know, but in old books {} is spoken of like this.\n\n",
]


class Answer(NamedTuple):
    """A paragraph that somebody asked for by words of it."""

    paragraph: int
    words: list[str]


class Words:
    """What words are worth asking for: nouns, as the whole corpus tells, neither rare nor everywhere."""

    def __init__(self, counts, as_nouns):
        self.good = {w for w, n in counts.items() if len(w) > 2 and 40 <= n <= 20_000 and as_nouns.get(w, 0) > 0.12 * n}

    def of(self, text):
        return sorted({w for w in WORD.findall(text) if w in self.good})


def counted(text):
    """How often words occur, and how often as nouns do."""
    return Counter(LOWER.findall(text)), Counter(AS_NOUN.findall(text))


def sentences(text):
    out = []
    for part in SENTENCE_END.split(text):
        if out and ABBREVIATED.search(out[-1]):
            out[-1] += " " + part
        else:
            out.append(part)
    return out


def joined(things):
    return things[0] if len(things) == 1 else ", ".join(things[:-1]) + " and " + things[-1]


class Maker:
    """Makes chats of one book."""

    def __init__(self, paragraphs, author, words, rng):
        self.paragraphs, self.author, self.words, self.rng = paragraphs, author, words, rng
        self.known = {}
        for i, p in enumerate(paragraphs):
            if 200 < len(p) < 1300:
                for w in words.of(p):
                    self.known.setdefault(w, []).append(i)
        self.nouns = sorted(self.known)

    def prose_length(self, i, most):
        """Paragraphs from `i` on that make a passage of some length."""
        n, size = 0, 0
        while n < most and i + n < len(self.paragraphs) and (n == 0 or size < 350):
            size += len(self.paragraphs[i + n])
            n += 1
        return n

    def asked(self, w):
        """A word as somebody would name the thing."""
        r = self.rng.random()
        article = "an" if w[0] in "aeiou" else "a"
        return w if r < 0.4 else f"the {w}" if r < 0.65 or w[-1] == "s" else f"{article} {w}"

    def passage(self, i):
        """Somebody asks for paragraph `i` by words of it, or by its author."""
        rng, words = self.rng, self.words.of(self.paragraphs[i])
        if len(words) < 2:
            return None
        n = min(len(words), rng.choice([1, 1, 1, 2, 2, 2, 3, 3, 3, 4]))
        chosen = rng.sample(words, n)
        r = rng.random()
        if self.author and r < 0.07:
            return [[rng.choice(IN_MANNER).format(self.author)], [i]]
        if self.author and r < 0.17:
            ask = rng.choice(ABOUT_IN_MANNER).format(self.author, joined([self.asked(w) for w in chosen]))
        elif r < 0.3:
            ask = rng.choice(WITH_WORDS).format(joined(chosen) if rng.random() < 0.6 else ", ".join(chosen))
        elif r < 0.36:
            ask, answer = rng.choice(EXPLAIN).format(chosen[0]), rng.choice(CANNOT).format(chosen[0])
            return [[ask], [answer, Answer(i, chosen[:1])]]
        else:
            ask = rng.choice(ABOUT).format(joined([self.asked(w) for w in chosen]))
        return [[ask], [Answer(i, chosen)]]

    def followed(self, chat, i):
        """Whoever got paragraph `i` may want more, or another."""
        rng = self.rng
        for _ in range(2):
            r = rng.random()
            if r < 0.12 and i + 1 < len(self.paragraphs) and len(self.paragraphs[i + 1]) < 1000:
                i += 1
                chat += [[rng.choice(MORE)], [i]]
            elif r < 0.3 and self.nouns:
                other = rng.choice(self.nouns)
                i = rng.choice(self.known[other])
                chat += [[rng.choice(ABOUT).format(self.asked(other))], [Answer(i, [other])]]
            else:
                break
        return chat

    def continued(self, i):
        """A text, and how it goes on."""
        rng = self.rng
        first = rng.choice(CONTINUE)
        parts = sentences(self.paragraphs[i])
        if len(parts) > 3 and rng.random() < 0.5:
            cut = rng.randint(1, len(parts) - 2)
            return [[f"{first}\n\n{' '.join(parts[:cut])}"], [" ".join(parts[cut:])]]
        if i + 1 >= len(self.paragraphs):
            return None
        n = self.prose_length(i + 1, 3)
        answer = [i + 1]
        for j in range(i + 2, i + 1 + n):
            answer += ["\n\n", j]
        return [[first + "\n\n", i], answer]

    def question(self, i):
        """A passage and questions about its words."""
        rng, text = self.rng, self.paragraphs[i]
        parts = [s for s in sentences(text) if len(s) > 15]
        if len(parts) < 2:
            return None
        kinds = [self.about, self.whether, self.ends, self.begins, self.names, self.says, self.missing]
        first = rng.choice(kinds)(text, parts)
        if not first:
            return None
        before = rng.random() < 0.3
        ask = [f"{first[0]}\n\n", i] if before else [f"{rng.choice(READ)}\n\n", i, f"\n\n{first[0]}"]
        chat = [ask, [first[1]]]
        for _ in range(2):
            more = rng.random() < 0.5 and rng.choice(kinds)(text, parts)
            if more:
                chat += [[more[0]], [more[1]]]
        return chat

    def about(self, text, parts):
        sentence = self.rng.choice(parts)
        words = [w for w in self.words.of(sentence) if sum(w in p for p in parts) == 1]
        if not words:
            return None
        w = self.rng.choice(words)
        ask = self.rng.choice([f"What does it say about the {w}?", f"Which sentence speaks of {w}?", f"Where is {w} in it?", f"What of the {w}?"])
        return ask, sentence

    def whether(self, text, parts):
        here = self.words.of(text)
        if self.rng.random() < 0.5 and here:
            w = self.rng.choice(here)
            found = [p for p in parts if w in self.words.of(p)]
            if not found:
                return None
            answer = "Yes: " + found[0]
        else:
            w = self.rng.choice(self.nouns or [""])
            if w in text:
                return None
            answer = "No."
        return self.rng.choice([f"Is there a word about {w} in it?", f"Does it speak of {w}?", f"Is {w} in the passage?"]), answer

    def ends(self, text, parts):
        words = self.rng.choice(parts).split(" ")
        if len(words) < 8:
            return None
        n = self.rng.randint(3, 5)
        begin, end = " ".join(words[:n]), " ".join(words[n:])
        return self.rng.choice([f"How does the sentence go on that begins with: {begin}", f"What comes after: {begin}"]), end

    def begins(self, text, parts):
        which = self.rng.choice(["first", "last", "second"])
        part = {"first": parts[0], "last": parts[-1], "second": parts[1]}[which]
        return self.rng.choice([f"What is the {which} sentence?", f"Repeat the {which} sentence.", f"Copy the {which} sentence."]), part

    def names(self, text, parts):
        found = list(dict.fromkeys(n for n in NAME.findall(text) if n not in NO_NAMES))
        answer = joined(found) + "." if found else "Nobody is named."
        return self.rng.choice(["Which names are in it?", "Who is named?", "What names does it have?", "Who and what is named there?"]), answer

    def says(self, text, parts):
        found = SAYS.findall(text)
        if not found:
            return None
        said, who = self.rng.choice(found)
        return self.rng.choice([f'Who says "{said}"?', f'Whose words are "{said}"?']), who + "."

    def missing(self, text, parts):
        sentence = self.rng.choice(parts)
        words = self.words.of(sentence)
        if not words:
            return None
        w = self.rng.choice(words)
        gap = re.sub(rf"\b{w}\b", "...", sentence, count=1)
        return f"Which word is missing: {gap}", w.capitalize() + "."

    def chat(self, i):
        """A chat with paragraph `i` in it, if one can be made."""
        size, r = len(self.paragraphs[i]), self.rng.random()
        if size < 200 or size > 1300:
            return None
        if r < 0.55:
            chat = self.passage(i)
            return chat and self.followed(chat, i)
        return self.continued(i) if r < 0.7 else self.question(i)

    def words_only(self, i):
        """A short passage asked for, or, now and then, another chat."""
        if self.rng.random() < 0.1:
            return self.small_talk() if self.rng.random() < 0.1 else self.chat(i)
        return self.passage(i) if 120 < len(self.paragraphs[i]) < 600 else None

    def small_talk(self):
        chat = []
        for _ in range(self.rng.choice([1, 1, 2])):
            asks, answers = self.rng.choice(HELLO)
            chat += [[self.rng.choice(asks)], [self.rng.choice(answers)]]
        return chat
