"""Requests of every kind that a server takes, by name: 64 of them, no two alike."""
from __future__ import annotations

from ask import Ask, chat, complete

TEXT = "The water cycle moves water between the oceans, the air and the land. "
LONG = " ".join(f"{TEXT}In year {i} it rained on {7 * i % 31} days." for i in range(12))  # about 400 tokens
STORY = "Once upon a time there was a fox who"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 10}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
GRAMMAR = 'root ::= "the " colour " " animal\ncolour ::= "red" | "blue"\nanimal ::= "cat" | "dog" | "fox"\n'


def structured(**kind: object) -> dict:
    return {"structured_outputs": kind, "temperature": 1.0, "seed": 4}


def every_kind() -> list[Ask]:
    """64 requests; of those that can be streamed every other one is."""
    warm = {"temperature": 1.0, "seed": 11}
    asks = [
        complete(STORY),
        complete(LONG, 12),
        complete(LONG + STORY, 12, temperature=0.7, seed=5),
        complete([500 + 7 * i for i in range(40)], 12),
        complete(STORY, temperature=0.8, seed=1),
        complete(STORY, temperature=1.5, seed=2**63 - 1),
        complete(STORY, temperature=1.0, top_p=0.8, seed=2),
        complete(STORY, temperature=1.0, top_k=20, seed=3),
        complete(STORY, temperature=1.2, min_p=0.1, seed=4),
        complete(STORY, temperature=1.2, top_p=0.9, top_k=50, min_p=0.02, seed=6),
        complete(STORY, 24, repetition_penalty=1.3),
        complete(STORY, 24, presence_penalty=1.5, **warm),
        complete(STORY, 24, frequency_penalty=1.0, **warm),
        complete(LONG, 20, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3, top_k=40, **warm),
        complete(STORY, logit_bias={"253": 8.0, "28": -5.0}),
        complete(STORY, allowed_token_ids=list(range(300, 900)), **warm),
        complete(STORY, bad_words=["was"]),
        complete(STORY, 24, bad_words=["was a", "named", "lived in a", "the forest"]),
        complete(STORY, 24, bad_words=["lived in", "to the"], repetition_penalty=1.1, **warm),
        complete(STORY, 20, min_tokens=12, stop_token_ids=[28, 30, 253]),
        complete(STORY, 20, stop_token_ids=[28, 30]),
        complete(STORY, 24, stop=["in", "zebra"]),
        complete(STORY, 24, stop=["in"], include_stop_str_in_output=True),
        complete("The end.", 20, ignore_eos=True),
        complete(STORY, 10, n=2, **warm),
        complete(STORY, 10, n=3, logprobs=2, temperature=0.9, seed=8),
        complete(STORY, 10, logprobs=0),
        complete(STORY, 10, logprobs=3, **warm),
        complete(STORY, 6, logprobs=32),
        complete(STORY, 4, logprobs=40, **warm),
        complete(STORY, 2, logprobs=-1),
        complete(STORY, 4, prompt_logprobs=2),
        complete(STORY, 4, prompt_logprobs=40, logprobs=1),
        complete(LONG, 4, prompt_logprobs=1, **warm),
        complete(STORY, 4, echo=True),
        complete(STORY, 4, echo=True, logprobs=2),
        complete(STORY, 1, echo=True, logprobs=1, repetition_penalty=1.5),
        complete(STORY, 1),
        complete(STORY, 4, skip_special_tokens=False, add_special_tokens=False),
        complete("Call me: ", 24, **structured(regex="[0-9]{3}-[0-9]{4}")),
        complete("The sky is ", 8, **structured(choice=["blue", "green", "grey as lead"])),
        complete("I see ", 12, **structured(grammar=GRAMMAR)),
        complete("A person as JSON: ", 40, **structured(json=SCHEMA)),
        complete("A person as JSON: ", 24, **structured(json_object=True)),
        complete("The sky is ", 8, logprobs=2, bad_words=["blue", "grey as"], **structured(choice=["blue", "green", "grey as lead"])),
        complete("Call me: ", 24, repetition_penalty=1.3, **structured(regex="[0-9]{3}-[0-9]{4}")),
        chat("Name a colour."),
        chat("Name an animal.", **warm),
        chat("Name a city.", 8, logprobs=True, top_logprobs=5),
        chat("Name a river.", 8, logprobs=True, top_logprobs=40, **warm),
        chat("Name a river.", 8, n=2, logprobs=True, **warm),
        chat(LONG + "What is this about?", 12, top_p=0.7, **warm),
        chat("Who are you?", 48, response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}),
        chat("How is the weather in Rome?", 60, tools=[TOOL], tool_choice="required"),
        chat("And in Oslo?", 60, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "get_weather"}}),
        chat("And in Oslo?", 12, tools=[TOOL]),
        chat("Write a haiku.", 20, stop=["\n"]),
        chat("Write a haiku.", 20, frequency_penalty=1.2, presence_penalty=0.5, min_tokens=10, **warm),
    ]
    for seed in range(64 - len(asks)):
        asks.append(complete(STORY, 8 + seed, temperature=1.0, seed=100 + seed, top_p=1 - 0.05 * seed))
    for i, ask in enumerate(asks):
        ask.stream = i % 2 == 1 and ask.can_stream
    return asks
