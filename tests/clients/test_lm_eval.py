"""lm-evaluation-harness, as it is, against the server: what it measures is what `qkov eval` does."""

import glob
import json
import math
import os
import subprocess
import sys
import tempfile
import unittest

from lm_eval.models.openai_completions import LocalCompletionsAPI

from server import post, qkov, serve

# Words that the model that ships has not seen in this order.
TEXT = """The harbour lay open to the west, and in the evenings the boats came home with the light
behind them, so that those who waited on the wall saw only sails, and guessed at the names. Old Marten
never guessed. He had built half of them, and knew each by the way it took the last wave before the
bar, as a man knows his children by their step upon the stair. "That is the Ellen," he would say, when
the rest of us saw nothing but a speck; and presently it was the Ellen, with her patched jib, and her
master standing in the bow with a coil of rope over his arm. There was a winter when the Ellen did not
come. We stood on the wall until the lamps were lit, and then until they were put out, and nobody spoke
of her. In the morning Marten went down to his shed and began to lay a keel. He asked for no money and
told nobody for whom it was, but he worked at it every day until the spring, and when it was done he
painted a name upon it, and the name was hers. """

TASK = """task: harbour
dataset_path: json
dataset_kwargs: {data_files: {test: "%s"}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
should_decontaminate: false
metric_list:
  - metric: byte_perplexity
"""


class Harness(unittest.TestCase):
    def test_perplexity_is_that_of_eval(self):
        n_ctx = 128
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "text.txt")
            with open(file, "w") as out:
                out.write(TEXT)
            for norm in ["softmax", "entmax:alpha=1.3"]:
                expected = qkov("eval", "-f", file, "-c", str(n_ctx), "--norm", norm)
                found = self.perplexity(norm, n_ctx)
                print(f"{norm}: eval {expected['ppl']}, lm-eval {found}")
                self.assertAlmostEqual(found / expected["ppl"], 1, delta=1e-6)

    def perplexity(self, norm, n_ctx):
        with serve("--norm", norm, "--alias", "books") as address:
            lm = LocalCompletionsAPI(
                base_url=address + "/v1/completions", model="books", num_concurrent=4, max_length=1024
            )
            self.assertEqual(lm.tokenizer_backend, "remote")
            asked = {"content": TEXT, "add_special": True, "parse_special": False}
            tokens = post(address + "/tokenize", asked)["tokens"]
            requests = []
            # The windows of `qkov eval`, which are llama-perplexity's.
            for start in range(0, len(tokens) - n_ctx + 1, n_ctx):
                window = [lm.prefix_token_id] + tokens[start + 1 : start + n_ctx]
                middle = n_ctx // 2 + 1
                requests.append(((None, str(start)), window[:middle], window[middle:]))
            scores = lm._loglikelihood_tokens(requests, disable_tqdm=True)
            n = sum(len(target) for _, _, target in requests)
            return math.exp(-sum(score for score, _ in scores) / n)

    def test_the_program(self):
        with tempfile.TemporaryDirectory() as folder, serve("--alias", "books") as address:
            data = os.path.join(folder, "texts.jsonl")
            with open(data, "w") as out:
                for part in TEXT.split(". ")[:4]:
                    out.write(json.dumps({"text": part}) + "\n")
            with open(os.path.join(folder, "harbour.yaml"), "w") as out:
                out.write(TASK % data)
            model = f"base_url={address}/v1/completions,model=books,max_length=1024"
            command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"]
            command += ["--model_args", model, "--include_path", folder, "--tasks", "harbour"]
            run = subprocess.run(
                [*command, "--output_path", folder],
                env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": folder},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            self.assertEqual(run.returncode, 0, run.stdout)
            (path,) = glob.glob(os.path.join(folder, "**", "results_*.json"), recursive=True)
            with open(path) as results:
                found = json.load(results)["results"]["harbour"]["byte_perplexity,none"]
            self.assertGreater(found, 1.5)
            self.assertLess(found, 6)


if __name__ == "__main__":
    unittest.main()
