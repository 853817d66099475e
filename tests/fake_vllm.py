"""vLLM's routes on loopback, answered by our own sampler with a tiny model, and with vLLM's traps.

with FakeVLLM(model folder) as server: server.url, server.asked (bodies), server.loads [(name, folder)]

Traps, as seen in the real one: what was first loaded under a name, or from a folder, is what answers there
for ever (vLLM's stale prefix cache, made worse); no BOS without add_special_tokens; n greedy responses are
refused; runtime LoRA may be off; a restart forgets adapters.
"""

import base64
import json
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import PeftModel

from lib import rollout, vlm

RAW = -7.5  # the probe's log-prob where raw ones are told


class FakeVLLM:
    """faults: names of FAULTS, one a chat request, then none. Every other argument is an option of the real
    server, or `shift`: what is added to each log-prob; `lies`: a function that changes a reply."""

    def __init__(self, model, faults=(), positions=1024, rank=32, runtime=True, raw=False, key=None):
        self.model, self.processor = vlm.load(str(model))
        self.faults = list(faults)
        self.positions = positions
        self.rank = rank
        self.runtime = runtime
        self.raw = raw
        self.key = key
        self.shift = 0.0
        self.lies = lambda reply: reply
        self.before = lambda body: None  # called with each chat request, while others go on
        self.asked = []
        self.loads = []
        self.sees = True  # the folders of the other side
        self.lock = threading.Lock()
        self.restart()

    def restart(self):
        self.loaded = {}  # name → folder
        self.first = {}  # name or folder → the weights that answer under it

    def __enter__(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(None)

            def do_POST(self):
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, body):
                fault = None
                if self.path == "/v1/chat/completions":
                    fake.before(body)
                    fault = fake.faults.pop(0) if fake.faults else None
                if fault == "reset":
                    self.connection.close()
                    return
                with fake.lock:
                    status, reply = fake.route(self.path, body)
                if fault and fault.isdigit():
                    status, reply = refusal(int(fault), "for a moment")
                if fake.key and self.headers["Authorization"] != f"Bearer {fake.key}":
                    status, reply = 401, {"error": "Unauthorized"}
                if fault == "abort":
                    reply["choices"][0]["finish_reason"] = "abort"
                if fault == "torn":
                    reply = json.dumps(reply)[:-20]
                self.send(status, reply)

            def send(self, status, reply):
                content = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    # ---------------------------------------------------------------- routes, → status, reply

    def route(self, path, body):
        if path == "/v1/models":
            return 200, {"data": self.cards()}
        if path == "/v1/chat/completions":
            return self.chat(body)
        if path == "/v1/load_lora_adapter" and self.runtime:
            return self.load(body["lora_name"], body["lora_path"])
        if path == "/v1/unload_lora_adapter" and self.runtime:
            if self.loaded.pop(body["lora_name"], None) is None:
                return refusal(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
            return 200, "Success"
        return 404, {"detail": "Not Found"}

    def cards(self):
        base = {"id": "base", "root": "/base", "parent": None, "max_model_len": self.positions}
        adapters = [{"id": name, "root": root, "parent": "base"} for name, root in self.loaded.items()]
        return [base, *adapters]

    def load(self, name, folder):
        self.loads.append((name, folder))
        if name in self.loaded:
            return refusal(400, f"The lora adapter '{name}' has already been loaded.")
        if not self.sees or not Path(folder, "adapter_config.json").exists():
            return refusal(404, f"Loading lora {name} failed: No adapter found for {folder}")
        rank = json.loads(Path(folder, "adapter_config.json").read_text())["r"]
        if rank > self.rank:
            words = f"'LoRA rank {rank} is greater than max_lora_rank {self.rank}.'"
            return refusal(500, f"Call to add_lora method failed: Worker failed with error {words}, please …")
        weights = self.first.get(name) or self.first.get(folder)
        if weights is None:
            weights = f"weights{len(self.loads)}"
            if isinstance(self.model, PeftModel):
                self.model.load_adapter(folder, weights)
            else:
                self.model = PeftModel.from_pretrained(self.model, folder, weights)
            self.model.eval()
        self.first |= {name: weights, folder: weights}
        self.loaded[name] = folder
        return 200, "Success"

    def chat(self, body):
        self.asked.append(body)
        name = body["model"]
        if name != "base" and name not in self.loaded:
            return refusal(404, f"The model `{name}` does not exist.")
        if body["n"] > 1 and not body["temperature"]:
            return refusal(400, "n must be 1 when using greedy sampling")
        picture, question = body["messages"][0]["content"]
        with tempfile.NamedTemporaryFile(suffix=".png") as file:
            file.write(base64.b64decode(picture["image_url"]["url"].partition("base64,")[2]))
            file.flush()
            item = question["text"], file.name
            prompt_ids = vlm.processor_inputs(self.processor, *item)["input_ids"][0].tolist()
            prompts = vlm.encode(self.model, self.processor, [item])
        if len(prompt_ids) + body["max_tokens"] > self.positions:
            return refusal(400, f"max_tokens={body['max_tokens']} is too large for {self.positions}")
        if not body.get("add_special_tokens") and prompt_ids[0] == self.processor.tokenizer.bos_token_id:
            prompt_ids = prompt_ids[1:]
        choices = []
        for sample in self.draw(name, prompts, body):
            shift = self.shift if body["max_tokens"] > 1 else 0  # a probe asks for one token
            content = [{"logprob": logp + shift} for logp in sample.logps]
            choice = {"index": len(choices), "token_ids": sample.completion_ids}
            choice["finish_reason"] = "stop" if sample.finished else "length"
            choices.append(choice | {"logprobs": {"content": content}, "message": {"content": sample.text}})
        return 200, self.lies({"prompt_token_ids": prompt_ids, "choices": choices[::-1]})

    def draw(self, name, prompts, body):
        forced = [int(token) for token, bias in body["logit_bias"].items() if bias > 50]
        if forced:
            return [
                rollout.Sample("", forced, forced[0] in body["stop_token_ids"], [RAW if self.raw else 0.0])
            ]
        options = body["n"], body["max_tokens"], body["temperature"], body["top_p"]
        if isinstance(self.model, PeftModel):
            self.model.base_model.set_adapter(self.first.get(name, next(iter(self.model.peft_config))))
        if name == "base" and isinstance(self.model, PeftModel):
            with self.model.disable_adapter():
                [samples] = rollout.sample(self.model, self.processor, prompts, *options, [body["seed"]])
        else:
            [samples] = rollout.sample(self.model, self.processor, prompts, *options, [body["seed"]])
        for sample in samples:
            sample.logps = sample.logps or torch.zeros(len(sample.completion_ids)).tolist()
        return samples


def refusal(status, message):
    return status, {"error": {"message": message, "code": status}}
