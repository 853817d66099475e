"""What one reply means: shapes that OpenAI-compatible servers really send, and refusals by what they say."""

import json
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import pytest

from common import Stopped
from lib import reply

CASES = Path(__file__).parent / "cases" / "refusals.jsonl"


def body(message=None, finish="stop", **fields):
    choice = {
        "index": 0,
        "message": {"content": "fine"} if message is None else message,
        "finish_reason": finish,
    }
    return {"choices": [choice], "model": "m", **fields}


def only(message=None, finish="stop"):
    (choice,) = reply.parse_reply(body(message, finish)).choices
    return choice


def judged(status, content, headers=None, answered=False):
    text = content if isinstance(content, str) else json.dumps(content)
    asked = reply.Asked(1, "some-model", "KEY", answered)
    return reply.verdict(status, headers or {}, text, asked, lambda text: " ".join(text.split()))


@pytest.mark.parametrize(
    "usage, expected",
    [
        ({"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}, (7, 2)),
        ({"prompt_tokens": 7.0, "completion_tokens": "2"}, (7, 2)),
        ({"prompt_tokens": 7, "total_tokens": 9, "completion_tokens": None}, (7, 2)),
        ({"input_tokens": 7, "output_tokens": 2}, (7, 2)),
        ({"prompt_tokens": 7, "completion_tokens": 2, "details": {"x": [None]}}, (7, 2)),
        ({"prompt_tokens": None, "completion_tokens": None}, None),
        ({"prompt_tokens": -1, "completion_tokens": 2}, None),
        ({"prompt_tokens": float("nan"), "completion_tokens": 2}, None),
        ({"prompt_tokens": {}, "completion_tokens": []}, None),
        ({}, None),
        (None, None),
        ("12 tokens", None),
        ([7, 2], None),
        (12, None),
    ],
)
def test_no_answer_is_lost_for_its_accounting(usage, expected):
    read = reply.parse_reply(body(usage=usage))
    assert [choice.text for choice in read.choices] == ["fine"]
    assert read.usage == (expected and dict(zip(reply.TOKENS, expected, strict=True)))


@pytest.mark.parametrize("model", [None, 3, ["m"], {}])
def test_odd_models_are_tolerated(model):
    assert reply.parse_reply({**body(), "model": model}).model is None


@pytest.mark.parametrize(
    "message, text",
    [
        ({"content": "fine"}, "fine"),
        ({"content": "fine", "reasoning_content": "I think"}, "fine"),
        ({"content": [{"type": "text", "text": "fi"}, {"type": "text", "text": "ne"}]}, "fine"),
        ({"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "fine"}]}, "fine"),
        ({"content": ["fi", "ne"]}, "fine"),
        ({"content": {"type": "text", "text": "fine"}}, "fine"),
        ({"content": [{"type": "text", "text": {"value": "fine", "annotations": []}}]}, "fine"),
        ("fine", "fine"),
    ],
)
def test_text_comes_in_many_shapes(message, text):
    assert only(message)[:2] == (text, "ok")


def test_a_choice_without_message_may_have_text():
    assert reply.parse_reply({"choices": [{"text": "fine"}]}).choices == [reply.Choice("fine", "ok", None)]


FINISHES = {
    "ok": [None, "", "stop", "STOP", "eos", "eos_token", "end_turn", "stop_sequence", "FinishReason.STOP",
           {"type": "stop", "matched": 2}],
    "length": ["length", "max_tokens", "MAX_TOKENS", "model_length", "max_output_tokens", "token_limit",
               {"type": "length", "length": 12}],
    "content_filter": ["content_filter", "SAFETY", "safety", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT",
                       "SPII",
                       "guardrail_intervened", "ERROR_TOXIC"],
    "refusal": ["refusal"],
    "tool_calls": ["tool_calls"],
    "malformed_function_call": ["MALFORMED_FUNCTION_CALL"],
}  # fmt: skip


@pytest.mark.parametrize("status, finish", [(status, f) for status, group in FINISHES.items() for f in group])
def test_finish_reasons(status, finish):
    assert only(None, finish).status == status


@pytest.mark.parametrize(
    "finish", ["error", "abort", "ERROR", "network_error", "insufficient_system_resource"]
)
def test_broken_off_choices_are_asked_again_and_whole_ones_kept(finish):
    with pytest.raises(ValueError, match="finish reason"):
        reply.parse_reply(body(None, finish))
    two = {"choices": [*body(None, finish)["choices"], *body()["choices"]]}
    assert len(reply.parse_reply(two, 2).choices) == 1


def test_a_filtered_choice_needs_no_message():
    (choice,) = reply.parse_reply({"choices": [{"index": 0, "finish_reason": "SAFETY"}]}).choices
    assert choice == ("", "content_filter", "SAFETY")


@pytest.mark.parametrize("content", [None, "", "  \n", "<think>long", "<think>a</think>", []])
def test_an_answer_without_words_is_empty(content):
    assert only({"content": content, "role": "assistant"}).status == "empty"


@pytest.mark.parametrize("message", [{}, None, [], 3])
def test_no_choice_without_text(message):
    with pytest.raises(ValueError):
        reply.parse_reply({"choices": [{"message": message}]})


@pytest.mark.parametrize(
    "junk", [None, [], {}, "x", {"choices": None}, {"choices": {}}, {"choices": [None, 3]}]
)
def test_what_is_no_completion(junk):
    with pytest.raises(ValueError):
        reply.parse_reply(junk)


@pytest.mark.parametrize(
    "text",
    [
        "<think>a [x]</think>\nfine",
        "<THINK>a</THINK>fine",
        "<thinking>a</thinking><think>b</think>fine",
        "a\nb</think>fine",
        "[THINK]a[/THINK]fine",
        "◁think▷a◁/think▷fine",
        "<seed:think>a</seed:think>fine",
        "<|begin_of_thought|>a<|end_of_thought|>fine",
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>fine<|return|>",
        "<|channel|>final <|constrain|>json<|message|>fine",
        "analysisThe user asksassistantfinalfine",
        "fine",
    ],
)
def test_thoughts_are_not_spoken(text):
    assert reply.spoken(text) == "fine"


def test_spoken_keeps_what_only_mentions_thoughts():
    text = "Image Description: a sign says <b>think</b>"
    assert reply.spoken(text) == text


# -------------------------------------------------------------------------------- refusals

MORE_REFUSALS = """\
I can’t help with that request.
I won't be able to assist.
I'm afraid I can't do that.
Je suis désolé, mais je ne peux pas identifier des personnes.
Lo siento, pero no puedo ayudar con eso.
Es tut mir leid, aber dabei kann ich nicht helfen.
申し訳ありませんが、お手伝いできません。
죄송하지만 도와드릴 수 없습니다.
I'd prefer not to identify people.
It's against my guidelines to identify people.
This request violates our policy.
I am programmed not to identify people.
I can't identify who this is. I can describe the image if you like.
Thank you for sharing. However, I cannot identify people.
No, I can't do that.
I do not feel comfortable identifying real people.
I'm just an AI and can't do that.
I have to decline this request.
That's not something I can help with.
<think>The user wants names.</think>I can't help with identifying people."""
ANSWERS = """[]
No quintuples.
I cannot find any quintuples in this tweet.
I don't see any relations between the entities.
Josh Gordon cannot play; he is a member of Browns.
Sorry, the quintuple is (A, per, B, org, peer)
The image shows a man who says I can't help it.
Scores: R1=2 R2=2 R3=2 R4=1 R5=1 R6=2. However, I cannot verify the place.
R1: 2, I cannot see an error.
A (per) -> peer -> B (per). I can't see more.
I cannot see his face.\\n| Bob | per | Browns | org | peer |
Image Description: A man. I cannot read it.\\nVisual-Text Alignment: he is Bob.\\nQuintuple Reasoning: per."""


def test_refusals_by_what_they_say():
    cases = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
    for case in cases:
        assert reply.refused(case["text"]) == case["refusal"], case
    for text in MORE_REFUSALS.splitlines():
        assert only({"content": text}).status == "refusal", text
    for text in ANSWERS.split("\n"):
        assert only({"content": text.replace("\\n", "\n")}).status == "ok", text
    assert only({"content": None, "refusal": "I will not"})[:2] == ("I will not", "refusal")


def test_a_long_chain_is_no_refusal():
    assert not reply.refused("I cannot say who he is. " + "The man wears a red shirt. " * 50)


# -------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "status, content",
    [
        (429, {"error": {"message": "x", "code": "insufficient_quota"}}),
        (400, {"error": {"message": "Your credit balance is too low to access the Anthropic API."}}),
        (403, {"error": {"message": "Insufficient balance. Please recharge."}}),
        (429, {"error": {"message": "You have run out of credits: billing page"}}),
        (402, {"error": "Payment required"}),
        (429, {"error": {"message": "账户余额不足"}}),
        (200, {"error": {"message": "quota used up", "code": "insufficient_quota"}}),
    ],
)
def test_nothing_left_to_pay_with_stops(status, content):
    with pytest.raises(Stopped, match="quota or credit"):
        judged(status, content, answered=True)


@pytest.mark.parametrize(
    "status, content, headers, wait",
    [
        (429, {"error": {"message": "Quota exceeded for requests per minute, see billing"}}, {}, None),
        (429, [{"error": {"message": "exceeded your current quota. Please retry in 34.5s."}}], {}, 34.5),
        (429, {"error": {"message": "exceeded your quota"}}, {"retry-after": "7"}, 7),
        (429, {"error": {"message": "Please try again in 1m30s."}}, {}, 90),
        (429, {"error": {"message": "Please try again in 20ms"}}, {}, 0.02),
        (429, "plain text", {"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        (200, {"error": {"message": "slow", "type": "rate_limit_error"}}, {}, None),
    ],
)  # fmt: skip
def test_a_limit_that_passes_is_waited_for(status, content, headers, wait):
    with pytest.raises(reply.Again) as again:
        judged(status, content, headers)
    assert again.value.status == 429 and again.value.wait == (None if wait is None else pytest.approx(wait))


@pytest.mark.parametrize(
    "content",
    [
        {"error": {"message": "wrong thing"}},
        {"error": "wrong thing"},
        {"detail": "wrong thing"},
        {"detail": [{"loc": ["body"], "msg": "wrong thing", "type": "extra_forbidden"}]},
        {"object": "error", "message": "wrong thing", "code": 400},
        [{"error": {"message": "wrong thing", "status": "INVALID_ARGUMENT"}}],
        {"errors": [{"message": "wrong thing"}]},
        {"error": {"message": {"text": "wrong thing"}}},
        {"error": {"message": "wrong thing", "code": ["a", {"b": 1}], "type": 3.5}},
        "wrong thing",
    ],
)
def test_errors_in_any_shape_are_told(content):
    with pytest.raises(reply.CallFailed, match="400 .*wrong thing"):
        judged(400, content)


def test_403_and_404_of_one_row():
    for status in (403, 404):
        with pytest.raises(Stopped):
            judged(status, {"error": {"message": "no"}})
        with pytest.raises(reply.CallFailed):
            judged(status, {"error": {"message": "no"}}, answered=True)
        with pytest.raises(Stopped):
            judged(status, {"error": {"message": "The model `x` does not exist"}}, answered=True)


def test_a_400_that_names_the_model_stops_before_a_first_answer():
    fault = {"detail": "Server is pinned to 'other'; requested 'some-model'."}
    with pytest.raises(Stopped, match="check --model"):
        judged(400, fault)
    with pytest.raises(reply.CallFailed):
        judged(400, fault, answered=True)


@pytest.mark.parametrize("code", ["content_filter", "content_policy_violation", "data_inspection_failed"])
def test_a_filtered_prompt_is_an_answer(code):
    (choice,) = judged(400, {"error": {"message": "no", "code": code}}).choices
    assert choice.status == "content_filter"


def test_an_answer_beside_an_error_is_kept():
    assert judged(200, {**body(), "error": {"message": "late", "code": 500}}).choices[0].text == "fine"


# -------------------------------------------------------------------------------- time


def test_times_in_any_form():
    then = datetime.now(timezone.utc) + timedelta(seconds=100)
    forms = ["100", "1m40s", "100s", "100000ms", str(then.timestamp()), str(then.timestamp() * 1000),
             then.isoformat(), then.isoformat().replace("+00:00", "Z"), 
             format_datetime(then, usegmt=True)]  # fmt: skip
    for form in forms:
        assert reply.seconds_told(form) == pytest.approx(100, abs=5), form
    assert reply.seconds_told("1h2m3s") == 3723
    for form in (None, "", "soon", "nan", "inf", "1x", "1s and more"):
        assert reply.seconds_told(form) is None, form
    assert reply.seconds_told("-5") == 0


def test_the_limit_that_is_used_up_tells_the_wait():
    headers = {
        "x-ratelimit-remaining-requests": "12",
        "x-ratelimit-reset-requests": "1h",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "6m0s",
    }
    assert reply.wait_told(headers) == 360
    assert reply.wait_told({**headers, "retry-after": "2"}) == 2
    assert (
        reply.used_up({"anthropic-ratelimit-tokens-remaining": "0", "anthropic-ratelimit-tokens-reset": "3"})
        == 3
    )
    assert reply.used_up({"x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": "9"}) is None
    assert reply.used_up({"x-ratelimit-reset-requests": "9"}) is None
