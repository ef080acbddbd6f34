"""The `openai` client, as it is, against the server."""

import asyncio
import json
import os
import unittest
from typing import Literal

import openai
from pydantic import BaseModel, ConfigDict

from server import post, serve

HERE = os.path.dirname(__file__)
ASK = [{"role": "user", "content": "Write a passage about the sea."}]


class Mood(BaseModel):
    model_config = ConfigDict(extra="forbid")
    mood: Literal["calm", "wild"]
    waves: bool


TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks up a word",
        "parameters": {
            "type": "object",
            "properties": {"word": {"enum": ["sea", "ship"]}, "deep": {"type": "boolean"}},
            "required": ["word", "deep"],
            "additionalProperties": False,
        },
    },
}


class Client(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.address = cls.enterClassContext(serve("--alias", "books"))
        cls.client = openai.OpenAI(base_url=cls.address + "/v1", api_key="none", max_retries=0)

    def chat(self, **more):
        fields = {"model": "books", "messages": ASK, "max_tokens": 40, "temperature": 0, **more}
        return self.client.chat.completions.create(**fields)

    def test_models(self):
        self.assertEqual([m.id for m in self.client.models.list()], ["books"])
        self.assertEqual(self.client.models.retrieve("books").id, "books")

    def test_a_stream_is_the_reply(self):
        whole = self.chat()
        self.assertGreater(len(whole.choices[0].message.content), 40)
        self.assertEqual(whole.choices[0].finish_reason, "length")
        self.assertEqual(whole.usage.completion_tokens, 40)
        chunks = list(self.chat(stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        self.assertEqual(text, whole.choices[0].message.content)
        self.assertEqual(chunks[-1].usage.completion_tokens, 40)
        self.assertEqual([c.choices[0].finish_reason for c in chunks if c.choices][-1], "length")
        self.assertEqual(len({c.id for c in chunks}), 1)

    def test_a_stop_is_not_part_of_the_reply(self):
        whole = self.chat().choices[0].message.content
        stop = whole[20:27]
        cut = self.chat(stop=[stop])
        self.assertEqual(cut.choices[0].message.content, whole[: whole.index(stop)])
        self.assertEqual(cut.choices[0].finish_reason, "stop")

    def test_seeds_choices_and_biases(self):
        hot = {"temperature": 1.3, "seed": 7, "n": 3}
        first, again = self.chat(**hot), self.chat(**hot)
        texts = [c.message.content for c in first.choices]
        self.assertEqual(texts, [c.message.content for c in again.choices])
        self.assertEqual(len(set(texts)), 3)
        logprobs = self.chat(logprobs=True, top_logprobs=3, max_tokens=1).choices[0].logprobs
        likeliest = self.tokenize(logprobs.content[0].token)[0]
        banned = self.chat(logit_bias={str(likeliest): -100}, max_tokens=1)
        self.assertNotEqual(banned.choices[0].message.content, logprobs.content[0].token)

    def tokenize(self, text):
        return post(self.address + "/tokenize", {"content": text})["tokens"]

    def test_logprobs(self):
        reply = self.chat(logprobs=True, top_logprobs=4)
        tokens = reply.choices[0].logprobs.content
        self.assertEqual(len(tokens), 40)
        for token in tokens:
            self.assertEqual(len(token.top_logprobs), 4)
            # Greedily chosen.
            self.assertEqual(token.logprob, token.top_logprobs[0].logprob)
        text = b"".join(bytes(token.bytes) for token in tokens).decode()
        self.assertEqual(text, reply.choices[0].message.content)

    def test_completions(self):
        prompts = ["The sea was", "The king had"]
        both = self.client.completions.create(
            model="books", prompt=prompts, max_tokens=8, temperature=0, logprobs=2, echo=True
        )
        self.assertEqual([c.index for c in both.choices], [0, 1])
        for prompt, choice in zip(prompts, both.choices):
            self.assertTrue(choice.text.startswith(prompt))
            self.assertIsNone(choice.logprobs.token_logprobs[0])
            self.assertEqual(len(choice.logprobs.tokens), len(choice.logprobs.text_offset))
        ids = self.tokenize("The sea was")
        again = self.client.completions.create(
            model="books", prompt=ids, max_tokens=8, temperature=0
        )
        self.assertGreater(len(again.choices[0].text), 8)

    def test_schema(self):
        reply = self.client.chat.completions.parse(
            model="books", messages=ASK, response_format=Mood, max_tokens=60, temperature=1, seed=3
        )
        self.assertIsInstance(reply.choices[0].message.parsed, Mood)
        for seed in range(5):
            schema = {"name": "mood", "schema": Mood.model_json_schema(), "strict": True}
            reply = self.chat(
                response_format={"type": "json_schema", "json_schema": schema},
                temperature=1.5,
                seed=seed,
                max_tokens=100,
            )
            Mood.model_validate_json(reply.choices[0].message.content)

    def test_grammar(self):
        grammar = 'root ::= ("aye" | "nay") [.!]{2}'
        reply = self.chat(extra_body={"grammar": grammar})
        self.assertRegex(reply.choices[0].message.content, r"^(aye|nay)[.!]{2}$")

    def test_variants(self):
        swapped = self.chat(extra_body={"qkov": {"norm": "sigmoid", "mask": "window:n=8"}})
        self.assertIn("sigmoid", swapped.system_fingerprint)
        self.assertNotEqual(
            swapped.choices[0].message.content, self.chat().choices[0].message.content
        )

    def test_embeddings(self):
        data = self.client.embeddings.create(model="books", input=["the sea", "a ship"]).data
        for vector in (item.embedding for item in data):
            self.assertAlmostEqual(sum(x * x for x in vector), 1, places=4)
        # The client asks for base64 by itself; the numbers are the same.
        plain = self.client.embeddings.create(
            model="books", input="the sea", encoding_format="float"
        )
        for a, b in zip(plain.data[0].embedding, data[0].embedding):
            self.assertAlmostEqual(a, b, places=6)

    def test_errors(self):
        with self.assertRaises(openai.NotFoundError) as caught:
            self.chat(model="another")
        self.assertEqual(caught.exception.code, "model_not_found")
        with self.assertRaises(openai.BadRequestError) as caught:
            self.chat(messages=[{"role": "user", "content": "sea " * 5000}])
        self.assertEqual(caught.exception.code, "context_length_exceeded")
        for field, value in [("temperature", -1), ("top_p", 2), ("n", 0), ("top_logprobs", 99)]:
            with self.assertRaises(openai.BadRequestError) as caught:
                self.chat(**{field: value})
            self.assertIn(field, caught.exception.message)
        with self.assertRaises(openai.BadRequestError) as caught:
            self.chat(extra_body={"temprature": 1})
        self.assertIn("temprature", caught.exception.message)

    def test_many_at_once(self):
        client = openai.AsyncOpenAI(base_url=self.address + "/v1", api_key="none", max_retries=0)

        async def one(i):
            fields = {"model": "books", "prompt": f"{i} The sea", "max_tokens": 50}
            reply = await client.completions.create(temperature=0, **fields)
            return reply.choices[0].text

        async def all_of_them():
            alone = [await one(i) for i in range(16)]
            self.assertEqual(await asyncio.gather(*(one(i) for i in range(16))), alone)
            await client.close()

        asyncio.run(all_of_them())


class Tools(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        template = os.path.join(HERE, "hermes.jinja")
        cls.address = cls.enterClassContext(serve("--alias", "books", "--template", template))
        cls.client = openai.OpenAI(base_url=cls.address + "/v1", api_key="none", max_retries=0)

    def test_a_call_is_made_and_answered(self):
        fields = {
            "model": "books",
            "messages": ASK,
            "tools": [TOOL],
            "tool_choice": "required",
            "max_tokens": 120,
            "temperature": 0.8,
            "seed": 5,
        }
        reply = self.client.chat.completions.create(**fields)
        self.assertEqual(reply.choices[0].finish_reason, "tool_calls")
        call = reply.choices[0].message.tool_calls[0]
        self.assertEqual(call.function.name, "look_up")
        arguments = json.loads(call.function.arguments)
        self.assertIn(arguments["word"], ["sea", "ship"])
        self.assertIsInstance(arguments["deep"], bool)
        streamed = ""
        for chunk in self.client.chat.completions.create(stream=True, **fields):
            for part in chunk.choices[0].delta.tool_calls or []:
                streamed += part.function.arguments or ""
        self.assertEqual(json.loads(streamed), arguments)
        answered = [*ASK, reply.choices[0].message.model_dump(exclude_none=True)]
        answered.append({"role": "tool", "tool_call_id": call.id, "content": "salt water"})
        more = self.client.chat.completions.create(
            model="books", messages=answered, tools=[TOOL], max_tokens=5
        )
        self.assertGreater(more.usage.prompt_tokens, reply.usage.prompt_tokens)


if __name__ == "__main__":
    unittest.main()
