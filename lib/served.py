"""A vLLM server as rollout engine: adapters loaded and unloaded, responses asked for and checked, outages
waited out. Knows no reward, no loss.

    what happens                               what is done about it
    server down, 5xx, answer cut off           asked again for PATIENCE seconds, said once; then exit 3, and
                                               the same command goes on
    server started again, adapter forgotten    loaded again from its folder, asked again
    runtime LoRA off, rank above the server's  exit 2, with the option that helps
    server does not see OUT                    asked again for LAG seconds (file systems lag), then exit 2
    other model, chat template, image size     exit 2: the prompt's token ids are not ours; also probed at the
                                               start, with a picture that is too large and one too small
    other weights, other arithmetic            04 stops where log-probs differ by LARGEST_GAP in the mean; 05
                                               cannot see it, and stores what the server says it serves
    raw log-probs, no logit_bias               exit 2 at the start: a probe's only possible token has
                                               log-prob 0
    context too short                          exit 2 at the start: every prompt is compared with the server's
    penalties from generation_config.json      cannot be: every neutral value is sent
    stale cache of an adapter                  cannot be: each has a new name and a new folder; vLLM keeps
                                               prefixes by both, also of adapters that were unloaded
    a killed run's adapters                    unloaded and deleted by the next start on the same OUT
"""

import base64
import hashlib
import http.client
import io
import json
import os
import secrets
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from peft import PeftModel
from PIL import Image
from transformers import GenerationConfig

import common
from common import InputError, Stopped, above
from lib import data, rollout, vlm

PATIENCE = 900  # seconds that the server may be away, as while somebody starts it again
TIMEOUT = 3600  # seconds of one request
LAG = 30  # seconds until the server must see a new folder
OUTAGES = (408, 429, 500, 502, 503, 504)
IN_FLIGHT = 64  # requests of a rank at once; the server queues what it cannot take
LARGEST_GAP = 0.25  # nats a token, in the mean of an update: bf16 alone gives a tenth of it
# no proxy: the server is on this machine or on a private network
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# values that change nothing; unsent, they come from the model's generation_config.json
NEUTRAL = {"top_k": -1, "min_p": 0.0, "min_tokens": 0, "ignore_eos": False}
NEUTRAL |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "stop": []}
# without add_special_tokens LLaVA's prompt has no BOS
TOLD = {"add_special_tokens": True, "return_token_ids": True, "logprobs": True, "top_logprobs": 0}


class Refused(InputError):
    """What the server says no to, whatever is tried again."""

    def __init__(self, url, status, words):
        hint = " (VLLM_API_KEY must hold the server's key)" if status == 401 else ""
        super().__init__(f"--rollout-url {url}: {status}, {words}{hint}")
        self.status = status
        self.words = words


def add_arguments(group):
    group.add_argument("--rollout-url", help="vLLM server that draws the responses [ours: this process]")
    cap = "with --rollout-url: largest importance weight of a token [ours: usual]"
    group.add_argument("--rollout-cap", type=above(0), default=2.0, help=cap)


def connect(args, processor, ranks):
    """The Server of --rollout-url, or None without one."""
    if args.rollout_url:
        if args.static_cache:
            raise InputError("--static-cache belongs to responses drawn here: leave it out, or --rollout-url")
        return Server(args.rollout_url, args.model, processor, args.out, ranks)
    args.rollout_cap = None  # settings never lie: nothing is weighted
    return None


class Server:
    """vLLM at `url`, serving the model `name`. Adapters go to it through OUT/served, which it must see under
    the same path. Raises InputError, Stopped.

    VLLM_API_KEY is its key, as it is for the server itself.
    """

    def __init__(self, url, name, processor, out, ranks):
        if not url.startswith(("http://", "https://")):
            raise InputError(f"--rollout-url {url}: expected http://HOST:PORT")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.headers = {"Content-Type": "application/json", **authorization()}
        self.processor = processor
        self.lock = threading.Lock()  # of the processor: a tokenizer serves one thread at a time
        self.folder = Path(out).resolve() / "served"
        self.ranks = ranks
        self.adapter = None  # its name there; None: the base is asked
        self.away = False  # said to be
        described = describe(name)
        self.stops = vlm.stop_ids(described, processor)
        self.banned = vlm.image_ids(described)
        models = self._call("/v1/models", parse=json.loads)["data"]
        base = next((model for model in models if model.get("max_model_len")), None)
        if base is None:
            raise InputError(f"--rollout-url {url}: a server, but not vLLM's: it tells no max_model_len")
        self.base = base["id"]
        self.root = base["root"]  # the name or folder that it was started with
        self.positions = base["max_model_len"]  # of prompt and response
        if ranks.main:
            print(f"responses by vLLM at {self.url}, serving {self.root}", flush=True)

    def _call(self, path, body=None, parse=str, outages=OUTAGES, patience=None):
        """The answer, parsed; an outage is waited out. Raises Refused, and Stopped after `patience` seconds
        (PATIENCE)."""
        patience = PATIENCE if patience is None else patience
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, content, self.headers)
        since = None  # when it began to fail
        wait = 0.5
        while True:
            try:
                with DIRECT.open(request, timeout=TIMEOUT) as reply:
                    answer = parse(reply.read().decode())
                self.away = False
                return answer
            except urllib.error.HTTPError as error:
                fault = words(error)
                if error.code not in outages:
                    raise Refused(self.url, error.code, fault) from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                fault = common.first_line(getattr(error, "reason", error)) or type(error).__name__
            since = since or time.monotonic()
            if time.monotonic() - since >= patience:
                advice = "start the server again; then the same command goes on"
                raise Stopped(f"{self.url}: {fault}, for {patience / 60:.0f} minutes: {advice}")
            if not self.away and self.ranks.main:
                print(f"waiting for {self.url} ({fault})", flush=True)
            self.away = True
            time.sleep(wait)
            wait = min(10, 2 * wait)

    # ---------------------------------------------------------------- adapters

    def publish(self, adapter):
        """From here on responses come from `adapter`: a PeftModel as it is now, or a stored folder. To be
        called by all ranks. Raises InputError, Stopped, on all ranks."""
        name = f"jmere-{secrets.token_hex(8)}"
        folder = self.folder / name
        with self.ranks.together():
            if self.ranks.main:
                if self.adapter is None:
                    self._tidy()
                write(adapter, folder)
                self._load(name)
                if self.adapter:
                    self._drop(self.adapter)
        self.adapter = self.ranks.gather(name)[0]

    def _tidy(self):
        """Drop what a killed run left. Here, not at the start: only now this run holds the lock of OUT."""
        for model in self._call("/v1/models", parse=json.loads)["data"]:
            if model.get("parent") and Path(model["root"]).is_relative_to(self.folder):
                self._drop(model["id"])
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self):
        """Delete and unload the last adapter; a server that is away is not waited for."""
        if self.ranks.main and self.adapter:
            with suppress(Stopped):
                self._drop(self.adapter, patience=0)

    def _load(self, name):
        folder = self.folder / name
        body = {"lora_name": name, "lora_path": str(folder)}
        outages = tuple(status for status in OUTAGES if status != 500)  # 500: it cannot be loaded
        until = time.monotonic() + LAG
        while True:
            try:
                self._call("/v1/load_lora_adapter", body, outages=outages)
                return
            except Refused as refusal:
                fault = refusal.words
            if "already been loaded" in fault:  # by another rank, or the answer was lost
                return
            if "No adapter found" not in fault or time.monotonic() > until:
                break
            time.sleep(1)
        if "No adapter found" in fault:
            fault = f"it does not see {folder}: --out must be on storage that both see, under one path"
        if fault == "Not Found" or "LoRA is not enabled" in fault:
            fault = "start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        if "max_lora_rank" in fault:
            rank = json.loads((folder / "adapter_config.json").read_text())["r"]
            fault = f"start it with --max-lora-rank {rank}, or the next that it has"
        raise InputError(f"--rollout-url {self.url} takes no adapter: {fault}")

    def _drop(self, name, patience=None):
        shutil.rmtree(self.folder / name, ignore_errors=True)
        with suppress(OSError):  # others are in it
            self.folder.rmdir()
        with suppress(Refused):  # not known there: the server was started again
            self._call("/v1/unload_lora_adapter", {"lora_name": name}, patience=patience)

    # ---------------------------------------------------------------- responses

    def sample(self, items, n, max_new_tokens, temperature, top_p=1.0, keys=None):
        """n responses to each (prompt text, image path) → list (an item) of lists of n rollout.Sample.

        keys: one hashable value an item, which its seed follows from. temperature 0 is greedy, n 1.
        """
        drawing = {"n": n, "max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            jobs = []
            for item, key in zip(items, keys or range(len(items)), strict=True):
                jobs.append(pool.submit(self._ask, item, drawing | {"seed": seed_of(key)}))
            try:
                return [job.result() for job in jobs]
            finally:
                pool.shutdown(cancel_futures=True)  # after a fault the others are not asked any more

    def _ask(self, item, drawing, bias=None):
        """n Sample of one item; bias: {token id: what is added to its logit}."""
        text, image = item
        with self.lock:
            prompt_ids = vlm.processor_inputs(self.processor, text, image)["input_ids"][0].tolist()
        picture = {"type": "image_url", "image_url": {"url": png_url(image)}}
        question = {"type": "text", "text": vlm.plain_text(self.processor, text)}
        body = {"messages": [{"role": "user", "content": [picture, question]}], **drawing, **NEUTRAL, **TOLD}
        body["stop_token_ids"] = self.stops
        body["logit_bias"] = dict.fromkeys(self.banned, -100) | (bias or {})
        for _ in range(3):
            body["model"] = self.adapter or self.base
            try:
                reply = self._call("/v1/chat/completions", body, parse=whole)
                return self._samples(reply, image, prompt_ids, drawing)
            except Refused as refusal:
                if refusal.status != 404 or not self.adapter:
                    raise
            self._load(self.adapter)  # the server was started again
        raise Stopped(f"{self.url} forgets its adapter while it is asked: look at its log")

    def _samples(self, reply, image, prompt_ids, drawing):
        """The n Sample of a reply. Raises InputError where it is no answer to what was asked."""
        found = reply.get("prompt_token_ids")
        if not found:
            raise InputError(f"--rollout-url {self.url}: tells no token ids: take a newer vLLM (tried: 0.32)")
        if found != prompt_ids:
            limits = pixel_limits(self.processor)
            option = f", --mm-processor-kwargs '{json.dumps(limits)}'" if limits else ""
            raise InputError(
                f"{image}: the prompt has {len(found)} tokens at {self.url} and {len(prompt_ids)} here, or "
                f"others: start it with this --model{option}, without --chat-template"
            )
        samples = []
        for choice in sorted(reply["choices"], key=lambda choice: choice["index"]):
            ids = choice["token_ids"]
            logps = [token["logprob"] for token in choice["logprobs"]["content"]]
            finished = ids[-1] in self.stops
            if not finished and len(ids) != drawing["max_tokens"]:
                raise InputError(f"{image}: {self.url} ended a response without stop id or --max-new-tokens")
            if set(ids) & set(self.banned):
                raise InputError(f"{image}: {self.url} drew an image token: it does not heed logit_bias")
            with self.lock:
                text = vlm.decode(self.processor, ids)
            samples.append(rollout.Sample(text, ids, finished, logps if drawing["temperature"] else None))
        if len(samples) != drawing["n"]:
            raise InputError(f"{image}: {self.url} gave {len(samples)} of {drawing['n']} responses")
        return samples

    def check_gap(self, run, gap):
        """End the run, on all ranks, where log-probs as drawn and as trained differ so much in the mean."""
        if gap > LARGEST_GAP:
            run.fail(
                f"log-probs of {self.url} are {gap:.2g} nats a token off ours, expected at most "
                f"{LARGEST_GAP}: it must serve the weights of --model {run.args.model}, not quantised, "
                "without --hf-overrides; last/ is the state before"
            )

    def prove(self, text, image):
        """Raise InputError, on all ranks, unless the server reads this prompt as we do, also with pictures of
        other sizes, heeds logit_bias, and tells the log-probs that it draws by."""
        with self.ranks.together(), tempfile.TemporaryDirectory() as folder:
            if not self.ranks.main:
                return
            images = [image]
            for name, pixels in pixel_limits(self.processor).items():
                side = max(14, int(pixels**0.5 * (2 if name == "max_pixels" else 0.5)))
                images.append(f"{folder}/{name}.png")
                Image.new("RGB", (side, side), "teal").save(images[-1])
            stop = self.stops[0]
            drawing = {"n": 1, "max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "seed": 0}
            for image in images:
                [sample] = self._ask((text, image), drawing, {stop: 100})
            if sample.completion_ids != [stop] or abs(sample.logps[0]) > 0.01:
                raise InputError(
                    f"--rollout-url {self.url}: the only token that logit_bias leaves has log-prob "
                    f"{sample.logps[0]:.3g}, expected 0: start it with --logprobs-mode processed_logprobs"
                )


def describe(name):
    """What vlm.stop_ids and vlm.image_ids read of a model, without its weights."""
    config = vlm.read_config(name)
    try:
        generation = GenerationConfig.from_pretrained(name)
    except OSError:  # the model has none of its own
        generation = GenerationConfig.from_model_config(config)
    return SimpleNamespace(config=config, generation_config=generation)


def write(adapter, folder):
    """A PeftModel's policy, or a stored folder's, into the new folder `folder`."""
    if isinstance(adapter, PeftModel):
        adapter.save_pretrained(folder, selected_adapters=["default"])
        return
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(Path(adapter) / name, folder)


def authorization():
    """The header of the server's key. Raises InputError, and never shows it."""
    key = os.environ.get("VLLM_API_KEY", "").strip()
    if not key.isascii() or not key.isprintable():
        raise InputError("VLLM_API_KEY: holds a line break or a letter that no key has: copy it again")
    return {"Authorization": f"Bearer {key}"} if key else {}


def seed_of(key):
    """A seed that follows from `key` alone; child j of n draws with seed + j, so there is room above it."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def png_url(path):
    """The picture as we see it, RGB, as a data URL: a server would blend RGBA on white."""
    buffer = io.BytesIO()
    data.load_image(path).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def pixel_limits(processor):
    """What a server must be told of image sizes; {} where the family makes one size of all."""
    size = processor.image_processor.size
    if not size.get("longest_edge"):
        return {}
    return {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}


def whole(text):
    """A chat completion. Raises ValueError where a response was broken off: the server is going down."""
    reply = json.loads(text)
    for choice in reply["choices"]:
        if choice["finish_reason"] not in ("stop", "length"):
            raise ValueError(f"a response ended by {choice['finish_reason']}")
    return reply


def words(error):
    """What the server says in an HTTPError."""
    text = error.read().decode(errors="replace")
    try:
        body = json.loads(text)
        text = body["error"]["message"] if "error" in body else body["detail"]
    except (ValueError, KeyError, TypeError):
        pass  # no JSON, or none of vLLM's
    return common.first_line(text) or f"HTTP {error.code}"
