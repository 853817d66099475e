"""Teach a tiny model what a published one brings along: to see and to copy.

It learns from scratch. It is shown conversations about a picture and a text of the world: describe the
picture, what is on the left, repeat the text, list its names, say these words after me (lessons.py). It never
meets our prompts, tags, quintuples, a name with a type or a relation, nor which name belongs to which figure:
that is left to 03 and 04. (Single tokens of all these it meets, drawn at random to be said again, so that
none is a stranger.) Its pictures are figures, signs and posters thrown together at random: it meets no scene
of the grammar, and does not learn what goes with what.

demo/base/qwen2_5_vl and demo/base/llava are what this command makes, half an hour on one core each (3000
tokens a step, float32). Of scenes and texts never seen: Qwen2.5-VL captions exact on 100 %, names on 91.7 %,
random tokens said again on 99.1 %; LLaVA 100 %, 93.2 %, 99.1 %.

    OMP_NUM_THREADS=1 python -m demo.base.school --arch qwen2_5_vl --out demo/base/qwen2_5_vl --steps 2400
    --tokens 3000

Reads: nothing but common.py's prompts and the world's texts.  Writes: OUT/, with bf16 weights.
"""

import argparse
import math
import random
import sys
import time
from statistics import mean
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy, layer_norm
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer

import common
from demo import world
from demo.base import build
from demo.base.build import PATCH, SIDE
from demo.base.lessons import SCRAMBLE, captions, list_names, turns, tweet

BETAS = (0.9, 0.98)  # of AdamW

# B rows of a step   L their tokens   T tokens of the answers   V vocabulary   D hidden size


class Row(NamedTuple):
    scene: world.Scene
    ids: list  # [L]
    weights: list  # [L]: 1 on the answers' tokens and the stop that ends each, else 0


class Chat:
    """Conversations as token ids, in the model's own chat template."""

    def __init__(self, arch, tokenizer):
        self.tokenizer = tokenizer
        self.mark = "\x00"  # stands in a frame for what is asked
        content = [{"type": "image"}, {"type": "text", "text": self.mark}]
        opening = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        if arch == "qwen2_5_vl":
            self.opening = opening.replace("<|image_pad|>", "<|image_pad|>" * 4)
            self.between = f"\n<|im_start|>user\n{self.mark}<|im_end|>\n<|im_start|>assistant\n"
            self.lead = ""
        else:
            self.opening = opening.replace("<image>", "<image>" * (SIDE // PATCH) ** 2)
            self.between = f" USER: {self.mark} ASSISTANT:"
            self.lead = " "
        # Every token a prompt or response of the world uses, so that each has met the model; drawn singly, in
        # no order. One left out stays at 8 % when LoRA is sure of it: it cannot be told from the other tokens
        # that never were an answer.
        tags = common.format_response("", [])
        tags += common.format_response(".", []).replace("\n", "")
        known = set()
        for text in {*build.corpus(), tags}:
            known.update(self.ids(text))
        self.known = sorted(known)

    def ids(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def row(self, rng, scene, text, conversation, preamble=0):
        """[(question, answer)] → Row.

        preamble: tokens without sense before the text, since our prompts are long.
        """
        ids, weights = [], []
        for i, (question, answer) in enumerate(conversation):
            said = self.ids(self.lead + answer)
            scrambled = []
            if question == SCRAMBLE:
                said = scrambled = rng.choices(self.known, k=rng.randint(3, 8))
            if i == 0:
                asked = self.first(rng, f"Text: {text}\n{question}", scrambled, preamble)
            else:
                asked = self.framed(self.between, question, scrambled)
            ids += asked + said + [self.tokenizer.eos_token_id]
            weights += [0] * len(asked) + [1] * (len(said) + 1)
        return Row(scene, ids, weights)

    def framed(self, frame, question, scrambled):
        before, behind = frame.split(self.mark)
        return self.ids(before + question) + scrambled + self.ids(behind)

    def first(self, rng, question, scrambled, preamble):
        """The first question, behind the picture and the preamble."""
        asked = self.framed(self.opening, question, scrambled)
        if preamble:
            head = self.ids(self.opening.split(self.mark)[0])
            noise = rng.choices(self.known, k=preamble)
            asked = head + noise + asked[len(head) :]
        if self.lead and self.tokenizer.bos_token_id is not None:
            asked = [self.tokenizer.bos_token_id, *asked]
        return asked


def thrown_together(seed, count=3000):
    """Scenes of any figures with any sign and poster, to learn to see, and not what goes with what."""
    rng = random.Random(f"scenes:{seed}")

    def figure(kinds):
        kind = rng.choice(list(kinds))
        colour = rng.choice(list(world.COLOURS))
        return world.Figure(kind, colour)

    scenes = []
    for _ in range(count):
        left, right = figure(world.TYPE), figure(world.TYPE)
        sign = rng.choice((None, *world.SIGNS))
        poster = rng.choice((None, figure(world.POSTERS)))
        night = rng.random() < 0.5
        scenes.append(world.Scene(left, right, sign, poster, night))
    return scenes


class Pictures:
    """Pictures of scenes as the model's own preprocessor gives them.

    Each scene is drawn twice, its figures a little aside, when it is first asked for.
    """

    def __init__(self, arch, folder, seed):
        self.arch = arch
        self.processor = AutoImageProcessor.from_pretrained(folder)
        self.seed = seed
        self.values = {}  # scene: its two pictures, in half precision so that all of them fit in memory

    def draw(self, scene):
        rng = random.Random(f"pictures:{self.seed}:{scene}")
        drawn = []
        for _ in range(2):
            shifts = (rng.randint(-1, 1), rng.randint(-1, 1))
            drawn.append(world.draw(scene, shifts))
        pixels = self.processor(images=drawn, return_tensors="pt")["pixel_values"]
        if self.arch == "qwen2_5_vl":
            pixels = pixels.view(2, -1, *pixels.shape[1:])  # [2, patches, …]
        return pixels.half()

    def batch(self, rng, scenes):
        """One of the two pictures of each scene → what the vision tower takes."""
        for scene in scenes:
            if scene not in self.values:
                self.values[scene] = self.draw(scene)
        drawn = [self.values[scene][rng.randrange(2)] for scene in scenes]
        pixels = torch.stack(drawn).float()
        if self.arch == "llava":
            return {"pixel_values": pixels}
        side = SIDE // PATCH
        grids = torch.tensor([[1, side, side]] * len(scenes))
        return {"pixel_values": pixels.flatten(0, 1), "image_grid_thw": grids}


def is_vision(name):
    return "visual." in name or "vision_tower." in name or "multi_modal_projector." in name


# ------------------------------------------------------------------------------------------------ to see

LOUD = (
    3.0  # standard deviation of the image features: captions exact after 500 steps on 68 %, with 0.2 on none
)


def facts(scene):
    """{(quarter of the picture, what is asked): answer}: all that a scene shows, and which quarter it is."""
    figures = {
        "left": scene.left,
        "right": scene.right,
        "poster": scene.poster,
        "sign": world.Figure(scene.sign, None),
    }
    found = {}
    for place, figure in figures.items():
        found[place, "kind"] = getattr(figure, "kind", None)
        found[place, "colour"] = getattr(figure, "colour", None)
    for place in world.QUARTERS:
        found[place, "place"] = place
    found["sign", "night"] = scene.night
    return found


def known_answers(scenes):
    """{what is asked: {answer: its number}}"""
    answers = {}
    for scene in scenes:
        for (_, asked), answer in facts(scene).items():
            numbers = answers.setdefault(asked, {})
            numbers.setdefault(answer, len(numbers))
    return answers


def see(model, pictures, scenes, args, batch=64):
    """School the vision tower before it meets a word, as CLIP's was: linear heads, thrown away after, name
    what each quarter shows.

    And which quarter it is: Qwen's rotary frequencies for the column are so low that left and right look
    alike to the decoder."""
    rng = random.Random(f"see:{args.seed}")
    answers = known_answers(scenes)
    width = model.config.get_text_config().hidden_size
    heads = nn.ModuleDict()
    for asked, numbers in answers.items():
        heads[asked] = nn.Linear(width, len(numbers))
    tower = [weight for name, weight in model.named_parameters() if is_vision(name)]
    optimizer = torch.optim.AdamW([*tower, *heads.parameters()], betas=BETAS)
    for step in progress("see", args.see):
        set_lr(optimizer, args.lr * warm_up(step) * cosine(step / args.see))
        drawn = rng.choices(scenes, k=batch)
        features = image_features(model, pictures.batch(rng, drawn))  # [B, tokens, D]
        loss, right = name_quarters(heads, features, drawn, answers)
        update(optimizer, loss, tower)
        if (step + 1) % 100 == 0:
            say(f"see, step {step + 1}: loss {loss.item():.3f}, all right in {right:.2f}")
    # Image tokens far larger than word embeddings: what the decoder's first layers add leaves them readable.
    vision = [module for name, module in model.named_modules() if is_vision(name)]
    last = [module for module in vision if isinstance(module, nn.Linear)][-1]
    for parameter in last.parameters():
        parameter.data *= LOUD / features.std().item()


def image_features(model, inputs):
    return torch.stack(list(model.model.get_image_features(**inputs).pooler_output))


def name_quarters(heads, features, scenes, answers):
    """features [B, tokens, D] → loss, share of the pictures whose every fact is right."""
    half = int(features.shape[1] ** 0.5) // 2
    grid = features.unflatten(1, (2, half, 2, half))  # [B, row, half, column, half, D]
    quarters = grid.mean((2, 4)).flatten(1, 2)  # [B, 4, D]
    # Normalised, or a few loud features drown what the decoder must tell apart.
    quarters = layer_norm(quarters, quarters.shape[-1:])
    places = list(world.QUARTERS)
    wanted = [facts(scene) for scene in scenes]
    loss = 0.0
    right = torch.ones(len(scenes), dtype=torch.bool)
    for place, asked in wanted[0]:
        logits = heads[asked](quarters[:, places.index(place)])
        numbers = answers[asked]
        target = torch.tensor([numbers[found[place, asked]] for found in wanted])
        loss = loss + cross_entropy(logits, target)
        right &= logits.argmax(-1) == target
    return loss, right.float().mean()


def warm_up(step):
    return min(1, (step + 1) / 60)


def cosine(done):
    """1 at the start, 0 at the end."""
    return (1 + math.cos(math.pi * done)) / 2


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


def update(optimizer, loss, parameters):
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def progress(name, steps):
    return tqdm(range(steps), desc=name, unit="step", disable=None)


def say(text):
    """A line above the progress bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


# ------------------------------------------------------------------------------------------------ to speak


def forward(model, pictures, rng, rows):
    """rows [B] → logits [T, V] that predict the answers' tokens, targets [T], number of each one's row
    [T]."""
    ids = padded([row.ids for row in rows])  # [B, L]
    mask = padded([[1] * len(row.ids) for row in rows])
    answer = padded([row.weights for row in rows]).bool()
    inputs = pictures.batch(rng, [row.scene for row in rows])
    if pictures.arch == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    output = model.model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs)
    hidden = output.last_hidden_state[:, :-1][answer[:, 1:]]  # [B, L, D] → [T, D]
    row, _ = answer.nonzero(as_tuple=True)  # [T]
    return model.lm_head(hidden), ids[answer], row


def padded(lists):
    return pad_sequence([torch.tensor(items) for items in lists], batch_first=True)


def draw_rows(rng, chat, scenes, tokens, done):
    """Conversations of one step, of `tokens` with their padding. done: 0 … 1 of the schooling."""
    count = rng.randint(1, 3) if done < 0.3 else rng.randint(2, 7)
    preamble = rng.choice((0, 0, 60, 180)) if done > 0.6 else 0
    rows = []
    longest = 0
    while not rows or (len(rows) + 1) * longest <= tokens:
        scene, text = rng.choice(scenes), tweet(rng)
        conversation = turns(rng, scene, text, count)
        rows.append(chat.row(rng, scene, text, conversation, preamble))
        longest = max(longest, len(rows[-1].ids))
    return rows


def make_optimizer(model, lr):
    """Of all that is trainable; weight decay on matrices alone."""
    matrices, others = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (matrices if parameter.dim() > 1 else others).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS)


def learn(model, chat, pictures, scenes, args):
    """Train the decoder alone, the tower stays as `see` left it. → seconds

    Conversations get longer: near copies first, then from afar.
    """
    rng = random.Random(f"learn:{args.seed}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_vision(name))
    optimizer = make_optimizer(model, args.lr)
    model.train()
    began = time.perf_counter()
    losses = []  # since the last line
    for step in progress("learn", args.steps):
        done = step / args.steps
        set_lr(optimizer, args.lr * warm_up(step) * (0.1 + 0.9 * cosine(done)))
        rows = draw_rows(rng, chat, scenes, args.tokens, done)
        logits, targets, _ = forward(model, pictures, rng, rows)
        loss = cross_entropy(logits, targets)
        update(optimizer, loss, model.parameters())
        losses.append(loss.item())
        if (step + 1) % 250 == 0:
            exact = percent(check(model, chat, pictures, scenes[::31]))
            say(f"step {step + 1}: loss {mean(losses):.3f}, {exact}")
            losses.clear()
            save(model, args.out)
    return time.perf_counter() - began


KINDS = {  # what is checked: its question and answer
    "captions": lambda scene, text: captions(scene)[0],
    "names": lambda scene, text: list_names(text),
    "scrambled tokens": lambda scene, text: (SCRAMBLE, ""),
}


@torch.no_grad()
def check(model, chat, pictures, scenes, seed=1):
    """{kind of answer: share of greedy answers that are exact}: those whose every token is the likeliest."""
    model.eval()
    rng = random.Random(f"check:{seed}")
    exact = {kind: [] for kind in KINDS}
    for start in range(0, len(scenes), 32):
        for kind, last in KINDS.items():
            rows = []
            for scene in scenes[start : start + 32]:
                text = tweet(rng)
                conversation = turns(rng, scene, text, 2)
                conversation.append(last(scene, text))
                row = chat.row(rng, scene, text, conversation)
                rows.append(last_answer(row))
            logits, targets, places = forward(model, pictures, rng, rows)
            right = (logits.argmax(-1) == targets).float()  # [T]
            whole = torch.ones(len(rows)).scatter_reduce(0, places, right, "amin")  # [B]
            exact[kind] += whole.tolist()
    model.train()
    return {kind: mean(right) for kind, right in exact.items()}


def last_answer(row):
    """The row with weight on its last answer alone."""
    length = row.weights[::-1].index(0)
    before = len(row.weights) - length
    return row._replace(weights=[0] * before + [1] * length)


def percent(exact):
    return ", ".join(f"{kind} exact {100 * share:.1f} %" for kind, share in exact.items())


def save(model, out):
    """Stored as bf16, half the size; config.json says fp32, which is what loading gives."""
    state = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    del state["lm_head.weight"]  # tied to the embedding
    model.save_pretrained(out, state_dict=state)


# ------------------------------------------------------------------------------------------------ main


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    build.add_arguments(parser)
    parser.add_argument("--steps", type=int, default=2400, help="of learning to see and to copy [ours]")
    parser.add_argument(
        "--see", type=int, default=200, help="steps of 64 pictures, before: the vision tower's own [ours]"
    )
    parser.add_argument("--tokens", type=int, default=4000, help="of a step, padding included [ours]")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak, cosine to a tenth [ours]")
    return parser.parse_args(argv)


@common.exit_codes
def main(args):
    model = build.build_as_told(args)
    chat = Chat(args.arch, AutoTokenizer.from_pretrained(args.out))
    pictures = Pictures(args.arch, args.out, args.seed)
    grammar = set(world.scenes())
    scenes = [scene for scene in thrown_together(args.seed) if scene not in grammar]
    see(model, pictures, scenes, args)
    seconds = learn(model, chat, pictures, scenes, args)
    save(model, args.out)
    exact = check(model, chat, pictures, world.scenes()[::5], seed=2)
    print(f"{args.out}: {args.steps} steps in {seconds / 60:.1f} minutes")
    print(f"scenes never seen: {percent(exact)}")


if __name__ == "__main__":
    main(parse_args())
